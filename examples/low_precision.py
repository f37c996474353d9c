"""What a smaller state, and smaller weights, cost in quality: one language model, the same batches, several regimes.

The character model of ``train_char_lm.py`` under STAC: its trunk's averages in float32, bfloat16 or 8-bit codes, its
weights in float32 or in bfloat16, these rounded to nearest or stochastically. bfloat16 weights and their gradients are
converted on their way through the model, which computes in float32: many CPUs have no bfloat16 arithmetic. Every seed
gives other first weights and other batches. Run from the repository root:

    python examples/low_precision.py --seeds 0 1 2
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from char_lm import Corpus, load_corpus, sample_batch, validation_loss
from char_lm_setup import Settings, make_model, make_schedule, make_stac
from command_line import Parser, at_least_one, seed, thread_count

__all__ = ["REGIMES", "Outcome", "main"]


@dataclass(frozen=True)
class Regime:
    """What the weights are held in, and STAC's arguments besides those of ``train_char_lm.py``."""

    name: str
    dtype: torch.dtype
    arguments: dict[str, Any]


BFLOAT16 = torch.bfloat16
ROUNDING = {"stochastic_rounding": True}
REGIMES = (
    Regime("float32", torch.float32, {}),
    Regime("float32, state bfloat16", torch.float32, {"trunk_state_dtype": BFLOAT16}),
    Regime("float32, state int8", torch.float32, {"trunk_state_dtype": torch.int8}),
    Regime("bfloat16, to nearest", BFLOAT16, {}),
    Regime("bfloat16, stochastic", BFLOAT16, ROUNDING),
    Regime("bfloat16, stochastic, state int8", BFLOAT16, {**ROUNDING, "trunk_state_dtype": torch.int8}),
)


@dataclass(frozen=True)
class Outcome:
    """What one run has reached, and the bytes of weights and state that it kept."""

    loss: float
    weight_bytes: int
    state_bytes: int


def train(regime: Regime, settings: Settings, corpus: Corpus) -> Outcome:
    """Train one model to the end of its schedule."""
    generator = torch.Generator().manual_seed(settings.seed)
    model = make_model(settings, corpus).to(regime.dtype)
    optimizer = make_stac(model, settings, **regime.arguments)
    schedule = make_schedule(optimizer, settings)
    for _ in tqdm(range(settings.steps), desc=regime.name, leave=False, disable=None):
        inputs, targets = sample_batch(corpus.train, settings.batch_size, settings.context, generator)
        optimizer.zero_grad()
        weights = {name: parameter.float() for name, parameter in model.named_parameters()}
        logits = functional_call(model, weights, (inputs,))
        cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
        optimizer.step()
        schedule.step()
    loss = validation_loss(model.float(), corpus.validation, settings.context, torch.device("cpu"))
    size = sum(parameter.numel() for parameter in model.parameters())
    return Outcome(loss, size * regime.dtype.itemsize, optimizer.state_bytes())


def main(argv: Sequence[str] | None = None) -> dict[str, list[Outcome]]:
    """Train every regime with every seed, print the table, and return the outcomes by regime."""
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument(
        "--steps", type=at_least_one, default=Settings().steps, help="of each run (default: %(default)s)"
    )
    parser.add_argument("--threads", type=thread_count, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    corpus = load_corpus()
    print(f"{'weights and state':34}{'weight bytes':>14}{'state bytes':>13}{'mean loss':>11}  by seed")
    outcomes: dict[str, list[Outcome]] = {}
    for regime in REGIMES:
        runs = [train(regime, Settings(recipe=False, steps=options.steps, seed=seed), corpus) for seed in options.seeds]
        outcomes[regime.name] = runs
        losses = [run.loss for run in runs]
        by_seed = " ".join(f"{loss:.4f}" for loss in losses)
        costs = f"{runs[0].weight_bytes:>14,}{runs[0].state_bytes:>13,}"
        print(f"{regime.name:34}{costs}{statistics.mean(losses):>11.4f}  {by_seed}", flush=True)
    return outcomes


if __name__ == "__main__":
    main()
