"""Train the small language model with STAC on several processes: replicated, sharded, or with votes on the trunk.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --strategy ddp

Strategies: ``ddp`` averages all gradients (DistributedDataParallel); ``fsdp2`` shards weights, gradients and state
(``fully_shard``); ``vote`` averages the cap's gradients and lets ranks vote on the trunk's steps. Every step's batch is
the same whatever the strategy and the number of processes, and each process learns from its share of it.

Go on with another number of processes, or under another strategy:

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --stop-at 300 --save half
    torchrun --standalone --nproc-per-node 4 examples/train_distributed.py --resume half

With ``--save run --save-every 25 --resume`` one command begins the run, and given again after a kill goes on from its
last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from char_lm import CharTransformer, Corpus, character_loss, load_corpus, now, sample_batch, validation_loss
from char_lm_setup import (
    Settings,
    add_settings,
    given_settings,
    make_model,
    make_schedule,
    make_stac,
    refuse_other_settings,
    refuse_unread_settings,
)
from checkpoint_folder import folder_to_load, load_folder, save_folder
from checkpoint_options import add_checkpoint_options, check_checkpoint_options, is_due
from command_line import Parser, check_torchrun, output_folder, thread_count, usable_device
from distributed_report import Loopback, Report
from stac_optimizer import STAC, MajorityVote

STRATEGIES = ("ddp", "fsdp2", "vote")


def say(text: str) -> None:
    """Print on the first rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def distribute(model: CharTransformer, settings: Settings, options: argparse.Namespace) -> tuple[nn.Module, STAC]:
    """Return the model as the ranks train it, and its optimizer, which must come after."""
    if options.strategy == "fsdp2":
        mesh = init_device_mesh(options.device, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, make_stac(model, settings)
    ddp = DistributedDataParallel(model)
    vote = MajorityVote(encoding=options.encoding) if options.strategy == "vote" else None
    return ddp, make_stac(ddp, settings, vote=vote)


class Run:
    """One rank's part of a run."""

    def __init__(self, options: argparse.Namespace, settings: Settings, corpus: Corpus) -> None:
        self.strategy: str = options.strategy
        self.settings = settings
        self.corpus = corpus
        self.device = torch.device(options.device)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if settings.batch_size % self.size:
            raise ValueError(f"batch_size = {settings.batch_size} must be a multiple of the {self.size} processes")
        self.model = make_model(settings, corpus).to(self.device)
        self.distributed, self.optimizer = distribute(self.model, settings, options)
        self.schedule = make_schedule(self.optimizer, settings)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.loopback = Loopback()
        self.step = 0
        self.train_losses: dict[int, float] = {}
        self.validation_losses: dict[int, float] = {}
        self.gradients_seconds: list[float] = []
        self.step_seconds: list[float] = []

    def train_step(self) -> Tensor:
        """Learn from this rank's share of the next batch; return its loss."""
        # All ranks draw all of it: so one generator's state serves any number of ranks that go on from a checkpoint.
        batch = sample_batch(self.corpus.train, self.settings.batch_size, self.settings.context, self.generator)
        inputs, targets = (part[self.rank :: self.size].to(self.device) for part in batch)
        begin = now(self.device)
        self.optimizer.zero_grad()
        loss = character_loss(self.distributed(inputs), targets)
        loss.backward()
        before_step = now(self.device)
        self.optimizer.step()
        self.step_seconds.append(now(self.device) - before_step)
        self.gradients_seconds.append(before_step - begin)
        self.schedule.step()
        self.step += 1
        return loss.detach()

    def train_until(self, stop: int) -> None:
        """Train without a pause, then report."""
        begin = self.step
        self.loopback.start()
        loss = torch.stack([self.train_step() for _ in range(begin, stop)]).mean()
        self.loopback.stop(stop - begin)
        dist.all_reduce(loss)
        self.train_losses[stop] = loss.item() / self.size
        self.validation_losses[stop] = validated = self.validate()
        say(f"step {stop:>4}: training loss {self.train_losses[stop]:.4f}, validation loss {validated:.4f}")

    def validate(self) -> float:
        """Return the present loss over the whole validation text, which every rank computes: it is short."""
        loss = validation_loss(self.model, self.corpus.validation, self.settings.context, self.device)
        if isinstance(self.model, FSDPModule):
            # Without a backward pass the root's weights stay gathered, and no step would reach them.
            self.model.reshard()
        return loss

    def digest(self) -> str:
        """Return a digest of all weights.

        Raises:
            RuntimeError: ranks differ.
        """
        weights: dict[str, Any] = get_model_state_dict(self.distributed, options=StateDictOptions(full_state_dict=True))
        # Flat, for a tensor without dimensions cannot be seen as bytes.
        held = b"".join(weights[name].cpu().flatten().view(torch.uint8).numpy().tobytes() for name in sorted(weights))
        digests: list[str] = [""] * self.size
        dist.all_gather_object(digests, hashlib.sha256(held).hexdigest()[:12])
        if len(set(digests)) > 1:
            raise RuntimeError(f"ranks hold different weights: {digests}")
        return digests[0]

    def state_bytes(self) -> int:
        """Return the size of this rank's part of the state; ``optimizer.state_bytes()`` counts all parts."""
        tensors = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return sum((value.to_local() if hasattr(value, "to_local") else value).nbytes for value in tensors)

    def report(self, resumed_digest: str | None) -> Report:
        """Return what the run has reached and what it costs."""
        vote = self.optimizer.param_groups[0]["vote"]
        return Report(
            name=self.strategy if vote is None else f"{self.strategy}, {vote},",
            processes=self.size,
            steps=self.step,
            train_losses=self.train_losses,
            validation_losses=self.validation_losses,
            wire_bytes=self.loopback.bytes_a_step,
            gradients_ms=1e3 * statistics.median(self.gradients_seconds or [math.nan]),
            step_ms=1e3 * statistics.median(self.step_seconds or [math.nan]),
            state_bytes=self.state_bytes(),
            resumed_digest=resumed_digest,
            digest=self.digest(),
        )

    def save(self, path: Path) -> None:
        """Write, all ranks together, all that the rest of the run depends on."""
        if self.optimizer.param_groups[0]["vote"] is not None:
            # Each rank has averages of its own, which serve only as many ranks; their mean serves any number.
            self.optimizer.average_trunk_state()
        self.optimizer.zero_grad()
        save_folder(header(self.settings, self.corpus, self.step, self.generator) | self.body(), path)

    def body(self) -> dict[str, Any]:
        """Return weights, optimizer and schedule, as any strategy and number of ranks can take them up."""
        model, optimizer = get_state_dict(self.distributed, self.optimizer)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def load(self, folder: Path, step: int, generator: Tensor) -> None:
        """Take up, all ranks together, what ``save`` wrote."""
        body = self.body()
        load_folder(body, folder)
        set_state_dict(
            self.distributed, self.optimizer, model_state_dict=body["model"], optim_state_dict=body["optimizer"]
        )
        self.schedule.load_state_dict(body["schedule"])
        self.step = step
        self.generator.set_state(generator)


def header(settings: Settings, corpus: Corpus, step: int, generator: torch.Generator) -> dict[str, Any]:
    """Return the part of a checkpoint that can be read before there is a model."""
    return {
        "settings": dataclasses.asdict(settings),
        "corpus": corpus.digest,
        "step": step,
        "generator": generator.get_state(),
    }


def open_run(options: argparse.Namespace) -> Run:
    """Return a new run, or the one that ``--resume`` names.

    Raises:
        ValueError: a setting is out of range, or differs from the one the checkpoint was made with; there is none.
    """
    # Votes are for the sign trunk, and cannot be cautious; strategies are to differ in nothing else.
    given = {"recipe": False, "stac_trunk_cautious": False} | given_settings(options)
    corpus = load_corpus()
    if options.resume is None:
        settings = Settings(**given)
        refuse_unread_settings(given_settings(options), settings)
        return Run(options, settings, corpus)
    folder = folder_to_load(options.resume)
    if folder is None:
        raise ValueError(f"there is no checkpoint in {options.resume}")
    stored = header(Settings(), corpus, 0, torch.Generator())
    load_folder(stored, folder)
    refuse_other_settings(given, stored["settings"])
    if stored["corpus"] != corpus.digest:
        raise ValueError("the checkpoint was trained on another text: resume it with the Python that wrote it")
    run = Run(options, Settings(**stored["settings"]), corpus)
    run.load(folder, stored["step"], stored["generator"])
    return run


def make_parser() -> Parser:
    """Return a parser with the options of one command and those of ``Settings``."""
    parser = Parser(__doc__)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="(default: %(default)s)")
    parser.add_argument(
        "--encoding", choices=("ternary", "binary", "int8"), default="ternary", help="of votes (default: %(default)s)"
    )
    parser.add_argument(
        "--device", type=usable_device, choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=thread_count, default=1, help="CPU threads of each process (default: %(default)s)"
    )
    add_checkpoint_options(parser, "folder", output_folder)
    add_settings(parser)
    return parser


def train(argv: Sequence[str] | None = None) -> Report:
    """Train as one rank of the process group there is; the first rank prints."""
    parser = make_parser()
    options = parser.parse_args(argv)
    check_checkpoint_options(parser, options, folder_to_load)
    torch.set_num_threads(options.threads)
    try:
        run = open_run(options)
    except ValueError as error:
        parser.error(str(error))
    resumed_digest = run.digest() if options.resume is not None else None
    if resumed_digest is not None:
        say(f"resumed at step {run.step} on {run.size} processes, weights {resumed_digest}")
    stop = run.settings.steps if options.stop_at is None else min(options.stop_at, run.settings.steps)
    every = [run.settings.validate_every, options.save_every or run.settings.validate_every]
    while run.step < stop:
        run.train_until(min(stop, *(run.step - run.step % steps + steps for steps in every)))
        if is_due(options, run.step, stop):
            run.save(options.save)
    if options.save is not None:
        run.save(options.save)
    report = run.report(resumed_digest)
    say(str(report))
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Join the process group that torchrun describes, train, and leave."""
    parser = make_parser()
    device = parser.parse_args(argv).device
    check_torchrun(parser)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    train(argv)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way


if __name__ == "__main__":
    main()
