// The trunk's update on the CPU, in one pass over memory. cpu.py compiles it, with -D for the types PARAM, GRAD and
// AVERAGE: float, double, bfloat16, float16; of averages also codes (int8 with scales) and none (no momentum).
//
// The arithmetic is that of the other paths to the bit: Note [Same operations on every path] in arithmetic.py. So two
// operations may not become one multiply-add (-ffp-contract=off). What is in a loop has no branches, for the compiler
// to make vector instructions of.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

static_assert(sizeof(void*) == sizeof(int64_t), "addresses come as 64-bit integers");

namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct codes {
  int8_t code;
};
struct none {};

template <class To, class From>
To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

constexpr uint32_t MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000;

// Arithmetic precision: Note [Low-precision arithmetic] in precision.py.

float widen(float value) { return value; }
double widen(double value) { return value; }
float widen(bfloat16 value) { return as<float>(uint32_t(value.bits) << 16); }
float widen(float16 value) {
  const uint32_t magnitude = value.bits & 0x7fff, sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t bias = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;  // infinity and NaN have the largest exponent
  const uint32_t subnormal = as<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);
  return as<float>(sign | (magnitude < 0x400 ? subnormal : (magnitude << 13) + bias));
}

uint16_t nearest_bfloat16(float value) {
  const uint32_t bits = as<uint32_t>(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & MAGNITUDE) > INFINITE ? 0x7fc0 : rounded);
}

uint16_t bfloat16_by_chance(float value, uint32_t noise) {  // as in rounding.py, by its lowest 16 bits
  const uint32_t bits = as<uint32_t>(value), rounded = (bits + (noise & 0xffff)) >> 16;
  return uint16_t((bits & MAGNITUDE) > INFINITE ? 0x7fc0 : rounded);
}

uint16_t nearest_float16(float value) {
  const uint32_t bits = as<uint32_t>(value), magnitude = bits & MAGNITUDE;
  const uint32_t subnormal = as<uint32_t>(as<float>(magnitude) + 0.5f) - as<uint32_t>(0.5f);
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t small = magnitude < 0x38800000 ? subnormal : normal, large = magnitude > INFINITE ? 0x7e00 : 0x7c00;
  return uint16_t((bits >> 16 & 0x8000) | (magnitude < 0x47800000 ? small : large));
}

// float64 goes to 16 bits by way of float32, as in torch.
template <bool BY_CHANCE> void store(double& place, double value, uint32_t) { place = value; }
template <bool BY_CHANCE> void store(float& place, float value, uint32_t) { place = value; }
template <bool BY_CHANCE> void store(float16& place, float value, uint32_t) { place.bits = nearest_float16(value); }
template <bool BY_CHANCE> void store(bfloat16& place, float value, uint32_t noise) {
  place.bits = BY_CHANCE ? bfloat16_by_chance(value, noise) : nearest_bfloat16(value);
}
template <bool BY_CHANCE> void store(codes&, float, uint32_t) {}  // see encode
template <bool BY_CHANCE> void store(none&, double, uint32_t) {}

uint32_t noise_at(uint32_t position, uint32_t noise_seed) {  // as in rounding.py
  uint32_t hash = position * 0x9E3779B1u + noise_seed;
  hash = (hash ^ hash >> 16) * 0x85EBCA6Bu;
  return (hash ^ hash >> 13) * 0xC2B2AE35u;
}

// The most elements of a block: those that have one scale where they are codes, see codes.py, its Note [Codes by chance]
// above all.
constexpr int BLOCK = 128;
constexpr float LEVELS = 127 * 127, LEAST_SCALE = 1e-30f, CHANCE_PARTS = 1 << 13;
constexpr uint32_t PLACES = 79, REST_BITS = 6;

template <class Wide, class Held> void encode(const Wide*, Held*, int, float*, uint32_t) {
  static_assert(!std::is_same_v<Held, codes>, "codes are computed in float");
}
void encode(const float* averages, codes* stored, int count, float* scale, uint32_t noise) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int k = 0; k < count; ++k) largest = std::max(largest, as<uint32_t>(averages[k]) & MAGNITUDE);
  *scale = as<float>(std::min(largest, INFINITE));  // infinite where one is NaN, too
  const bool is_usable = *scale > LEAST_SCALE && largest < INFINITE;
  const float factor = is_usable ? LEVELS / *scale : 0;
  const uint32_t drawn = (noise & 0xfff) << 1;
#pragma omp simd
  for (int k = 0; k < count; ++k) {
    const float square = is_usable ? std::abs(averages[k]) * factor : 0;
    const float level = float(int32_t(std::sqrt(square)));
    const uint32_t place = (uint32_t(k) * PLACES & (BLOCK - 1)) << REST_BITS | 1;
    const float chance = float(int32_t(drawn ^ place)) / CHANCE_PARTS;
    const float above = square - level * level;
    const int32_t raised = int32_t(level) + (above > (2 * level + 1) * chance);
    stored[k].code = int8_t(averages[k] < 0 ? -raised : raised);
  }
}

using Param = decltype(widen(PARAM{}));
using Grad = decltype(widen(GRAD{}));

Grad decode(none, float) { return 0; }
template <class Held> auto decode(Held held, float) { return widen(held); }
float decode(codes held, float unit) {
  const float level = held.code;
  return level * std::abs(level) * unit;
}

using Average = std::common_type_t<Grad, decltype(decode(AVERAGE{}, 0))>;

template <class Held> Average next(Held held, float unit, Grad grad, Average change_factor) {
  const Average average = decode(held, unit);
  return average + (grad - average) * change_factor;
}
Average next(none, float, Grad grad, Average) { return grad; }

bool passes(Average average, Grad grad) { return (average > 0) & (grad > 0) | (average < 0) & (grad < 0); }

}  // namespace

// What cpu.py hands over: for each tensor its memory, how it is cut into blocks, and what is known of it alone. Blocks
// follow one another, those of one row first, and the last of a row may be shorter; only codes have more than one row.
struct Work {
  int64_t tensors;
  const int64_t* first_blocks;  // among those of all, with one more for the end
  const int64_t* columns;
  PARAM** params;
  const GRAD** grads;
  AVERAGE** averages;
  float** scales;
  const uint32_t* noise_seeds;
  const Param* masked_lrs;
  int64_t* passing;
  double lr, decay_factor, change_factor, grad_scale;
  int64_t maximize, rounds;
};

namespace {

// One block of a tensor.
struct Block {
  int64_t start;
  int count;
  PARAM* params;
  const GRAD* grads;
  AVERAGE* averages;
  float* scale;
  float unit;

  Block(const Work& work, int64_t tensor, int64_t block) {
    const int64_t columns = work.columns[tensor], of_row = (columns + BLOCK - 1) / BLOCK, before = block % of_row * BLOCK;
    start = block / of_row * columns + before;
    count = int(std::min<int64_t>(BLOCK, columns - before));
    params = work.params[tensor] + start;
    grads = work.grads[tensor] + start;
    averages = work.averages[tensor] + start;
    scale = work.scales ? work.scales[tensor] + block : nullptr;
    unit = scale ? *scale * (1 / LEVELS) : 0;
  }
};

// What the gradient and the average are made of.
struct Inputs {
  Grad scale, sign;
  Average change_factor;

  explicit Inputs(const Work& work)
      : scale(Grad(work.grad_scale)), sign(work.maximize ? -1 : 1), change_factor(Average(work.change_factor)) {}
  Grad gradient(const Block& block, int k) const { return widen(block.grads[k]) / scale * sign; }
  Average average(const Block& block, int k, Grad grad) const {
    return next(block.averages[k], block.unit, grad, change_factor);
  }
};

template <bool IS_MASKED, bool ROUNDS> void update_blocks(const Work& work, int64_t tensor, int64_t begin, int64_t end) {
  const Inputs inputs(work);
  const Param lr = IS_MASKED ? work.masked_lrs[tensor] : Param(work.lr), decay_factor = Param(work.decay_factor);
  const uint32_t noise_seed = work.noise_seeds ? work.noise_seeds[tensor] : 0;
  for (int64_t index = begin; index < end; ++index) {
    const Block block(work, tensor, index);
    const uint32_t start = uint32_t(block.start);
    Average averages[BLOCK];
#pragma omp simd
    for (int k = 0; k < block.count; ++k) {
      const Grad grad = inputs.gradient(block, k);
      const Average average = averages[k] = inputs.average(block, k, grad);
      const uint32_t noise = ROUNDS ? noise_at(start + uint32_t(k), noise_seed) : 0;
      store<ROUNDS>(block.averages[k], average, noise);
      const Param step = average > 0 ? lr : average < 0 ? -lr : 0;
      const Param whole = step + Param(average * 0);  // Note [Non-finite averages]
      const Param change = !IS_MASKED || passes(average, grad) ? whole : whole * 0;  // which keeps NaN, and -0
      store<ROUNDS>(block.params[k], widen(block.params[k]) * decay_factor - change, noise >> 16);
    }
    encode(averages, block.averages, block.count, block.scale, noise_at(start, noise_seed));
  }
}

void count_blocks(const Work& work, int64_t tensor, int64_t begin, int64_t end) {
  const Inputs inputs(work);
  int64_t passing = 0;
  for (int64_t index = begin; index < end; ++index) {
    const Block block(work, tensor, index);
    int of_block = 0;
#pragma omp simd reduction(+ : of_block)
    for (int k = 0; k < block.count; ++k) {
      const Grad grad = inputs.gradient(block, k);
      of_block += passes(inputs.average(block, k, grad), grad);
    }
    passing += of_block;
  }
  __atomic_fetch_add(work.passing + tensor, passing, __ATOMIC_RELAXED);
}

// Run a function on those blocks of each tensor that lie between two among those of all.
void walk(const Work& work, int64_t begin, int64_t end, void (*run)(const Work&, int64_t, int64_t, int64_t)) {
  const int64_t* firsts = work.first_blocks;
  int64_t tensor = std::upper_bound(firsts, firsts + work.tensors, begin) - firsts - 1;
  for (; begin < end; ++tensor) {
    const int64_t stop = std::min(end, firsts[tensor + 1]);
    run(work, tensor, begin - firsts[tensor], stop - firsts[tensor]);
    begin = stop;
  }
}

template <bool ROUNDS> void update_by(const Work& work, int64_t begin, int64_t end) {
  walk(work, begin, end, work.masked_lrs ? update_blocks<true, ROUNDS> : update_blocks<false, ROUNDS>);
}

}  // namespace

extern "C" void count_passing(const Work* work, int64_t begin, int64_t end) { walk(*work, begin, end, count_blocks); }

extern "C" void update(const Work* work, int64_t begin, int64_t end) {
  if (work->rounds)
    update_by<std::is_same_v<PARAM, bfloat16>>(*work, begin, end);
  else
    update_by<false>(*work, begin, end);
}
