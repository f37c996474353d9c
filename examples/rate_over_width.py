"""Whether a learning rate found on a narrow model serves a wide one: the loss over the rate, at several widths.

Trains the character model of ``char_lm.py`` by the recipe for transformers, at each width with each learning rate.

    python examples/rate_over_width.py
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from char_lm import Corpus, load_corpus, sample_batch, validation_loss
from char_lm_report import picture_file
from char_lm_setup import Settings, make_model, make_schedule, make_stac
from command_line import Parser, at_least_one, positive, thread_count

# By width and learning rate.
Losses = dict[tuple[int, float], float]


def train(settings: Settings, corpus: Corpus) -> float:
    """Train one model to the end of its schedule, and return its validation loss."""
    generator = torch.Generator().manual_seed(settings.seed)
    model = make_model(settings, corpus)
    optimizer = make_stac(model, settings)
    schedule = make_schedule(optimizer, settings)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        model.loss(*sample_batch(corpus.train, settings.batch_size, settings.context, generator)).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return validation_loss(model, corpus.validation, settings.context, torch.device("cpu"))


def format_table(losses: Mapping[tuple[int, float], float]) -> str:
    """Return a line for each width, the least loss of each marked."""
    widths, rates = sorted({width for width, _ in losses}), sorted({rate for _, rate in losses})
    lines = ["width" + "".join(f"{rate:>10g}" for rate in rates)]
    for width in widths:
        least = min(losses[width, rate] for rate in rates)
        shown = [f"{losses[width, rate]:.4f}" + ("*" if losses[width, rate] == least else " ") for rate in rates]
        lines.append(f"{width:>5}" + "".join(f"{text:>10}" for text in shown))
    return "\n".join(lines)


def draw(losses: Mapping[tuple[int, float], float], path: Path) -> None:
    """Draw a curve for each width."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="learning rate of the recipe", ylabel="validation loss, nats per character")
    axes.set_xscale("log")
    for width in sorted({width for width, _ in losses}):
        rates = sorted(rate for other, rate in losses if other == width)
        axes.plot(rates, [losses[width, rate] for rate in rates], marker="o", label=f"width {width}")
    rates = sorted({rate for _, rate in losses})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> Losses:
    """Train every width with every rate, print the table, draw the curves, and return the losses."""
    parser = Parser(__doc__)
    parser.add_argument("--widths", type=at_least_one, nargs="+", default=[64, 128, 256], help="(default: 64 128 256)")
    parser.add_argument(
        "--rates", type=positive, nargs="+", default=[2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2], help="(default: 0.0025 to 0.04)"
    )
    parser.add_argument("--steps", type=at_least_one, default=300, help="of each run (default: %(default)s)")
    parser.add_argument("--threads", type=thread_count, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--out", type=picture_file, metavar="PNG", default="rate_over_width.png", help="(default: %(default)s)"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    corpus = load_corpus()
    losses: Losses = {}
    for width, rate in tqdm(list(itertools.product(options.widths, options.rates)), unit="run", disable=None):
        try:
            settings = Settings(width=width, steps=options.steps, batch_size=16, recipe_lr=rate)
        except ValueError as error:
            parser.error(str(error))
        losses[width, rate] = train(settings, corpus)
    print(format_table(losses))
    draw(losses, options.out)
    print(f"curves: {options.out}")
    return losses


if __name__ == "__main__":
    main()
