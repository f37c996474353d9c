"""Train one small language model with STAC and with AdamW, side by side, and compare what each reaches and costs.

Both start from the same weights and read the same batches, step by step in turn, so that noise of the machine hits
both alike. Text: the documentation that Python carries with it. Run from the repository root:

    python examples/train_char_lm.py

Interrupt and resume: the second command continues exactly where the first stopped; on one machine the two end, bit
for bit, where a single run would have ended.

    python examples/train_char_lm.py --stop-at 300 --save half.pt
    python examples/train_char_lm.py --resume half.pt

Safe from being killed: this command begins the run, and given again goes on from the last checkpoint that it wrote.

    python examples/train_char_lm.py --save run.pt --save-every 25 --resume
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from char_lm import CharTransformer, Corpus, load_corpus, now, sample_batch, validation_loss
from char_lm_report import Summary, draw_curves, format_table, picture_file
from char_lm_setup import (
    Settings,
    add_settings,
    given_settings,
    make_adamw,
    make_model,
    make_schedule,
    make_stac,
    refuse_other_settings,
    refuse_unread_settings,
)
from checkpoint_file import load_checkpoint, save_checkpoint
from checkpoint_options import add_checkpoint_options, check_checkpoint_options, is_due
from command_line import Parser, output_file, thread_count, usable_device
from stac_optimizer import STAC

CHECKPOINT_KEYS = ("settings", "corpus", "step", "generator", "contestants")


class Contestant:
    """One optimizer with its own copy of the model, its schedule and its record."""

    def __init__(self, name: str, model: CharTransformer, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
        self.name = name
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.train_losses: list[float] = []
        self.validation_losses: dict[int, float] = {}
        # Times belong to the machine, not to the course of the run: a checkpoint leaves them out.
        self.step_seconds: list[float] = []
        self.iteration_seconds: list[float] = []

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Learn from one batch, and record its loss and the time taken."""
        begin = now(inputs.device)
        self.optimizer.zero_grad()
        loss = self.model.loss(inputs, targets)
        loss.backward()
        before_step = now(inputs.device)
        self.optimizer.step()
        end = now(inputs.device)
        self.schedule.step()
        self.train_losses.append(loss.item())
        self.step_seconds.append(end - before_step)
        self.iteration_seconds.append(end - begin)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizer, schedule and curves."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "train_losses": self.train_losses,
            "validation_losses": self.validation_losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.train_losses = state["train_losses"]
        self.validation_losses = state["validation_losses"]


class Run:
    """The contestants, the batches they share, and how far they have come."""

    def __init__(self, settings: Settings, corpus: Corpus, device: torch.device) -> None:
        self.settings = settings
        self.corpus = corpus
        self.device = device
        self.step = 0
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.contestants: list[Contestant] = []
        for name, make_optimizer in (("STAC", make_stac), ("AdamW", make_adamw)):
            model = make_model(settings, corpus).to(device)
            optimizer = make_optimizer(model, settings)
            self.contestants.append(Contestant(name, model, optimizer, make_schedule(optimizer, settings)))

    def train_step(self) -> None:
        """Draw one batch, let every contestant learn from it, and validate where that is due."""
        batch = sample_batch(self.corpus.train, self.settings.batch_size, self.settings.context, self.generator)
        inputs, targets = (part.to(self.device) for part in batch)
        for contestant in self.contestants:
            contestant.train_step(inputs, targets)
        self.step += 1
        if self.step % self.settings.validate_every == 0 or self.step == self.settings.steps:
            for contestant in self.contestants:
                contestant.validation_losses[self.step] = self.validate(contestant)

    def validate(self, contestant: Contestant) -> float:
        """Return the contestant's present loss over the whole validation text."""
        return validation_loss(contestant.model, self.corpus.validation, self.settings.context, self.device)

    def summarize(self, contestant: Contestant) -> Summary:
        """Return what the contestant has reached and what it costs."""
        state = contestant.optimizer.state.values()
        tensors = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
        return Summary(
            name=contestant.name,
            validation_loss=self.validate(contestant),
            state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            step_ms=1e3 * statistics.median(contestant.step_seconds or [math.nan]),
            iteration_ms=1e3 * statistics.median(contestant.iteration_seconds or [math.nan]),
            train_losses=contestant.train_losses,
            validation_losses=contestant.validation_losses,
        )

    def save(self, path: Path) -> None:
        """Write all that the rest of the run depends on."""
        checkpoint = {
            "settings": dataclasses.asdict(self.settings),
            "corpus": self.corpus.digest,
            "step": self.step,
            "generator": self.generator.get_state(),
            "contestants": {contestant.name: contestant.state_dict() for contestant in self.contestants},
        }
        save_checkpoint(checkpoint, path)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take up the run that ``save`` wrote.

        Raises:
            ValueError: the text differs, as it does between two releases of Python.
        """
        if checkpoint["corpus"] != self.corpus.digest:
            raise ValueError("the checkpoint was trained on another text: resume it with the Python that wrote it")
        self.step = checkpoint["step"]
        self.generator.set_state(checkpoint["generator"])
        for contestant in self.contestants:
            contestant.load_state_dict(checkpoint["contestants"][contestant.name])


def make_parser() -> Parser:
    """Return a parser with the options of one command and, unset unless given, one option per field of ``Settings``."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--device", type=usable_device, default="cpu", help="where to train, for example cuda (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=thread_count,
        default=1,
        help="CPU threads; on tensors this small a second one gains a third at best, and on a busy machine loses much "
        "(default: %(default)s)",
    )
    add_checkpoint_options(parser, "file", output_file)
    parser.add_argument(
        "--out", type=picture_file, metavar="PNG", default="char_lm.png", help="the curves (default: %(default)s)"
    )
    add_settings(parser)
    return parser


def open_run(options: argparse.Namespace) -> Run:
    """Return a new run, or the one that ``--resume`` names.

    Raises:
        ValueError: a setting is out of range, or differs from the one the checkpoint was made with; there is none.
    """
    given = given_settings(options)
    device = torch.device(options.device)
    if options.resume is None:
        settings = Settings(**given)
        refuse_unread_settings(given, settings)
        return Run(settings, load_corpus(), device)
    checkpoint = load_checkpoint(options.resume, CHECKPOINT_KEYS)
    stored = checkpoint["settings"]
    refuse_other_settings(given, stored)
    run = Run(Settings(**stored), load_corpus(), device)
    run.load(checkpoint)
    return run


def main(argv: Sequence[str] | None = None) -> dict[str, Summary]:
    """Train, print the split and the comparison, draw the curves; return the summaries by optimizer."""
    parser = make_parser()
    options = parser.parse_args(argv)
    check_checkpoint_options(parser, options, Path.exists)
    torch.set_num_threads(options.threads)
    try:
        run = open_run(options)
    except ValueError as error:
        parser.error(str(error))
    stop = run.settings.steps if options.stop_at is None else min(options.stop_at, run.settings.steps)

    if options.resume is not None:
        print(f"resumed {options.resume} at step {run.step}")
    for contestant in run.contestants:
        if isinstance(contestant.optimizer, STAC):
            print(contestant.optimizer.partition)
    # disable=None: no bar where nobody watches, for example in a log file.
    for _ in tqdm(range(run.step, stop), unit="step", disable=None):
        run.train_step()
        if is_due(options, run.step, stop):
            run.save(options.save)
    if options.save is not None:
        run.save(options.save)

    summaries = [run.summarize(contestant) for contestant in run.contestants]
    print(format_table(summaries))
    size = sum(parameter.numel() for parameter in run.contestants[0].model.parameters())
    settings = run.settings
    draw_curves(
        summaries,
        options.out,
        title=f"Transformer of {size:,} parameters on Python's documentation\n{settings.steps} steps of "
        f"{settings.batch_size} x {settings.context} characters, seed {settings.seed}",
    )
    print(f"curves: {options.out}")
    return {summary.name: summary for summary in summaries}


if __name__ == "__main__":
    main()
