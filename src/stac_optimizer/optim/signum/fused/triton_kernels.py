"""The trunk's update as Triton kernels: one program for each chunk of a tensor's memory, walked block by block.

The arithmetic is that of the other paths to the bit: see Note [Same operations on every path] in
arithmetic.py.
Names: ``start`` is a block's first element, ``count`` how many elements its tensor has from there, and ``is_whole``
says that they fill the block; ``arithmetic`` is the dtype of Note [Low-precision arithmetic]. Arguments that are None
are switches: the compiler leaves out what depends on them. Signatures of many names are not laid out one to a line.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["CHUNK", "OPTIONS", "count_kernel", "update_kernel"]

# Elements of a chunk: enough that looking up its tensor, three loads each of which waits for the last, costs little.
CHUNK = tl.constexpr(8192)
# Elements of a block, in rows of one scale each. With four warps a thread has eight: 16 bytes of bfloat16, twice 16 of
# float32. Not autotuned: an autotuner would run an update, which is in place, several times.
BLOCK = tl.constexpr(1024)
ROW = tl.constexpr(128)
# A multiply-add that rounds once has other bits than two operations, and flips signs near zero.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# 127 squared: int8 codes hold square roots, so c * |c| / LEVELS goes from -1 to 1.
LEVELS = tl.constexpr(127.0 * 127.0)
LEAST_SCALE = tl.constexpr(1e-30)
ROOT_PARTS = tl.constexpr(2**15)
CHANCE_PARTS = tl.constexpr(2**13)
PLACES = tl.constexpr(79)
REST_BITS = tl.constexpr(6)
INFINITY = tl.constexpr(float("inf"))
# No NaN among these: Triton asks before each launch whether a constant still equals itself.


@triton.jit
def _locate(owners, firsts, numels, found_inf):
    """This program's tensor, the first element of its chunk, and the tensor's size: 0 where the step is skipped."""
    chunk = tl.program_id(0)
    index = tl.load(owners + chunk)
    begin = (chunk - tl.load(firsts + index)) * CHUNK
    numel = tl.load(numels + index)
    if found_inf is not None:
        numel = tl.where(tl.load(found_inf) == 0, numel, 0)
    return index, begin, numel


@triton.jit
def _pointer(row, index, dtype: tl.constexpr, is_aligned: tl.constexpr):
    """The memory of one tensor, None without a row."""
    if row is None:
        pointer = None
    else:
        pointer = tl.load(row + index).to(tl.pointer_type(dtype))
        if is_aligned:
            pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _rows():
    return tl.arange(0, BLOCK // ROW)


@triton.jit
def _offsets():
    return _rows()[:, None] * ROW + tl.arange(0, ROW)[None, :]


# Whole blocks have no mask: the compiler could not tell that a mask agrees over 16 bytes, and would load element by
# element. What a mask leaves out is read as 0.
@triton.jit
def _load(pointer, offsets, count, is_whole: tl.constexpr):
    return tl.load(pointer + offsets) if is_whole else tl.load(pointer + offsets, mask=offsets < count, other=0)


@triton.jit
def _store(pointer, offsets, values, count, is_whole: tl.constexpr):
    if is_whole:
        tl.store(pointer + offsets, values)
    else:
        tl.store(pointer + offsets, values, mask=offsets < count)


@triton.jit
def _divide(numerator, denominator):
    """IEEE division: in float32 ``/`` is an approximation, and div_rn is for float32 alone.

    Triton 3.2's div_rn takes subnormal quotients for zeros, 3.7's does not.
    """
    return numerator / denominator if numerator.dtype == tl.float64 else tl.div_rn(numerator, denominator)


@triton.jit
def _round(values, dtype: tl.constexpr):
    """To the nearest of a dtype, ties to even; float64 to 16 bits by way of float32, as torch does."""
    return values.to(dtype) if dtype == tl.float64 else values.to(tl.float32).to(dtype)


@triton.jit
def _noise(positions, noise_seed):
    """A hash of positions and noise_seed."""
    h = positions.to(tl.uint32) * 0x9E3779B1 + noise_seed.to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    return (h ^ (h >> 13)) * 0xC2B2AE35


@triton.jit
def _round_by_chance(values, noise):
    """To bfloat16, up as often as the 16 bits that go say, by the highest 16 of noise."""
    bits = (values.to(tl.uint32, bitcast=True) + (noise >> 16)) & 0xFFFF0000
    rounded = bits.to(tl.float32, bitcast=True)
    # The sum carries some NaN over into numbers; NaN differs from itself.
    return tl.where(values == values, rounded, values).to(tl.bfloat16)  # noqa: PLR0124


@triton.jit
def _decode(averages, scales, start, count, arithmetic: tl.constexpr, is_whole: tl.constexpr):
    """A block of averages as numbers: c * |c| in units of a row's scale where they are codes."""
    average = _load(averages + start, _offsets(), count, is_whole)
    if scales is not None:
        codes = average.to(tl.float32)
        units = _load(scales + start // ROW, _rows(), count // ROW, is_whole) * (1 / LEVELS)
        average = (codes * tl.abs(codes)) * units[:, None]
    return average.to(arithmetic)


@triton.jit
def _encode(average, averages, scales, noise_seed, start, count, rounds: tl.constexpr, is_whole: tl.constexpr):
    """Store a block of averages. As codes: a row with NaN or infinity in it gets an infinite scale, so decodes to NaN.

    A maximum may lose a NaN, hence the infinity in its place. See Note [Codes by chance] in codes.py.
    """
    if scales is None:
        if rounds and averages.dtype.element_ty == tl.bfloat16:
            stored = _round_by_chance(average.to(tl.float32), _noise(start + _offsets(), noise_seed) << 16)
        else:
            stored = _round(average, averages.dtype.element_ty)
    else:
        values = average.to(tl.float32)
        magnitudes = tl.where(tl.abs(values) < INFINITY, tl.abs(values), INFINITY)
        scale = tl.max(magnitudes, axis=1)
        _store(scales + start // ROW, _rows(), scale, count // ROW, is_whole)
        is_usable = (scale > LEAST_SCALE) & (scale < INFINITY)
        inverse = tl.where(is_usable, tl.div_rn(LEVELS, tl.where(is_usable, scale, 1.0)), 0.0)
        squares = tl.where(magnitudes < INFINITY, magnitudes * inverse[:, None], 0.0)
        squares = tl.minimum(squares, LEVELS)
        levels = (tl.sqrt(squares) - 1 / ROOT_PARTS).to(tl.int32).to(tl.float32)
        drawn = (_noise(start + _rows() * ROW, noise_seed) & (CHANCE_PARTS // 2 - 1)) * 2
        places = ((tl.arange(0, ROW) * PLACES & (ROW - 1)) << REST_BITS) | 1
        chances = (drawn.to(tl.int32)[:, None] ^ places[None, :]).to(tl.float32)
        above = squares - levels * levels
        part = levels * (2 / CHANCE_PARTS) + 1 / CHANCE_PARTS
        levels += tl.where(above > part * chances, 1.0, 0.0)
        stored = tl.where(values < 0, -levels, levels).to(tl.int8)
    _store(averages + start, _offsets(), stored, count, is_whole)


@triton.jit
def _next_average(
    grads, averages, scales, change, grad_scale, start, count,
    arithmetic: tl.constexpr, maximize: tl.constexpr, is_whole: tl.constexpr,
):  # fmt: skip
    """The gradient, unscaled and negated under maximize, and the average after it; without momentum the gradient."""
    grad = _load(grads + start, _offsets(), count, is_whole).to(arithmetic)
    if grad_scale is not None:
        grad = _divide(grad, grad_scale)
    if maximize:
        grad = -grad
    average = grad
    if averages is not None:
        average = _decode(averages, scales, start, count, arithmetic, is_whole)
        average = average + (grad - average) * change
    return grad, average


@triton.jit
def _passes(average, grad):
    """Cautious Optimizers' mask, by the signs, for the product may underflow."""
    return ((average > 0) & (grad > 0)) | ((average < 0) & (grad < 0))


@triton.jit
def _count_block(
    grads, averages, scales, change, grad_scale, start, count,
    arithmetic: tl.constexpr, maximize: tl.constexpr, is_whole: tl.constexpr,
):  # fmt: skip
    grad, average = _next_average(
        grads, averages, scales, change, grad_scale, start, count, arithmetic, maximize, is_whole
    )
    return _passes(average, grad).to(tl.int32)


@triton.jit
def _update_block(
    weights, grads, averages, scales, noise_seed, factor, lr, decay, change, grad_scale, start, count,
    arithmetic: tl.constexpr, maximize: tl.constexpr, decays: tl.constexpr, rounds: tl.constexpr,
    is_whole: tl.constexpr,
):  # fmt: skip
    # First, so that its trip does not wait for a store that might have changed it.
    weight = _load(weights + start, _offsets(), count, is_whole).to(arithmetic)
    grad, average = _next_average(
        grads, averages, scales, change, grad_scale, start, count, arithmetic, maximize, is_whole
    )
    if averages is not None:
        _encode(average, averages, scales, noise_seed, start, count, rounds, is_whole)
    if decays:
        weight = weight * decay
    direction = (average > 0).to(arithmetic) - (average < 0).to(arithmetic)
    direction = tl.where(tl.abs(average) < INFINITY, direction, float("nan"))  # Note [Non-finite averages]
    if factor is not None:
        direction = direction * _passes(average, grad).to(arithmetic) * factor
    weight = weight - direction * lr
    if rounds:
        stored = _round_by_chance(weight, _noise(start + _offsets(), noise_seed))
    else:
        stored = _round(weight, weights.dtype.element_ty)
    _store(weights + start, _offsets(), stored, count, is_whole)


@triton.jit
def count_kernel(
    counts, owners, firsts, numels, grad_row, average_row, scale_row, coefficients, grad_scale, found_inf,
    grad_dtype: tl.constexpr, average_dtype: tl.constexpr, arithmetic: tl.constexpr, maximize: tl.constexpr,
    is_aligned: tl.constexpr,
):  # fmt: skip
    """Add to a tensor's count where in one chunk its next average and its gradient will agree; no state is written."""
    index, begin, numel = _locate(owners, firsts, numels, found_inf)
    grads = _pointer(grad_row, index, grad_dtype, is_aligned)
    averages = _pointer(average_row, index, average_dtype, is_aligned)
    scales = _pointer(scale_row, index, tl.float32, False)
    change = tl.load(coefficients + 2)
    scale = None if grad_scale is None else tl.load(grad_scale).to(arithmetic)
    passing = tl.zeros((BLOCK // ROW, ROW), tl.int32)
    for start in range(begin, tl.minimum(begin + CHUNK, numel), BLOCK):
        count = numel - start
        if count >= BLOCK:
            passing += _count_block(grads, averages, scales, change, scale, start, count, arithmetic, maximize, True)
        else:
            passing += _count_block(grads, averages, scales, change, scale, start, count, arithmetic, maximize, False)
    tl.atomic_add(counts + index, tl.sum(tl.sum(passing, axis=1), axis=0).to(tl.int64))


@triton.jit
def update_kernel(
    owners, firsts, numels, weight_row, grad_row, average_row, scale_row, noise_seeds, factors, coefficients,
    grad_scale, found_inf, weight_dtype: tl.constexpr, grad_dtype: tl.constexpr, average_dtype: tl.constexpr,
    arithmetic: tl.constexpr, maximize: tl.constexpr, decays: tl.constexpr, rounds: tl.constexpr,
    is_aligned: tl.constexpr,
):  # fmt: skip
    """Update one chunk. ``factors`` are the reciprocals of the masks' means, None where the step is not cautious."""
    index, begin, numel = _locate(owners, firsts, numels, found_inf)
    weights = _pointer(weight_row, index, weight_dtype, is_aligned)
    grads = _pointer(grad_row, index, grad_dtype, is_aligned)
    averages = _pointer(average_row, index, average_dtype, is_aligned)
    scales = _pointer(scale_row, index, tl.float32, False)
    lr, decay, change = tl.load(coefficients), tl.load(coefficients + 1), tl.load(coefficients + 2)
    scale = None if grad_scale is None else tl.load(grad_scale).to(arithmetic)
    noise_seed = None if noise_seeds is None else tl.load(noise_seeds + index)
    factor = None if factors is None else tl.load(factors + index)
    for start in range(begin, tl.minimum(begin + CHUNK, numel), BLOCK):
        count = numel - start
        if count >= BLOCK:
            _update_block(
                weights, grads, averages, scales, noise_seed, factor, lr, decay, change, scale, start, count,
                arithmetic, maximize, decays, rounds, True,
            )  # fmt: skip
        else:
            _update_block(
                weights, grads, averages, scales, noise_seed, factor, lr, decay, change, scale, start, count,
                arithmetic, maximize, decays, rounds, False,
            )  # fmt: skip
