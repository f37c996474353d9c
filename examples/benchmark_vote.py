"""Time a majority vote beside the all-reduce that it replaces, in nanoseconds a weight.

    torchrun --standalone --nproc-per-node 2 examples/benchmark_vote.py

One trunk weight of many elements on each rank; contestants take turns, and medians of several rounds are printed. A
whole step with votes stands beside a whole step without, whose gradient was averaged by an all-reduce first.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from command_line import Parser, at_least_one, check_torchrun
from stac_optimizer import STAC, MajorityVote
from stac_optimizer.distributed.vote import ENCODINGS, Voters

BLOCK = 256 * 1024


def voted(encoding: str, averages: Tensor) -> Callable[[], object]:
    """Return the vote alone: signs into bits, exchange, majority, and back into a direction."""
    voters = Voters.of(MajorityVote(encoding=encoding), None)
    blocks = averages.split(BLOCK)

    def run() -> None:
        ballot = voters.ballot(averages.numel(), averages.device)
        for index, block in enumerate(blocks):
            ballot.put(block, index * BLOCK)
        ballot.cast()
        ballot.decide()
        for index, block in enumerate(blocks):
            ballot.direction(index * BLOCK, block.numel(), averages.dtype)

    return run


def stepped(vote: MajorityVote | None, numel: int) -> Callable[[], object]:
    """Return a whole step of the trunk, with votes or after an all-reduce."""
    weight = nn.Parameter(torch.randn(numel))
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(dist.get_rank()))
    weight.grad = gradient
    optimizer = STAC([{"params": [("weight", weight)], "stac_role": "trunk"}], vote=vote)

    def run() -> None:
        if vote is None:
            dist.all_reduce(gradient)
            gradient.div_(dist.get_world_size())  # and so stay as large as they are
        optimizer.step()

    return run


def measure(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            dist.barrier()
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def compare(numel: int, rounds: int) -> dict[str, float]:
    """Return nanoseconds a weight, by contestant."""
    torch.set_num_threads(1)  # ranks of one machine share its cores
    averages = torch.randn(numel, generator=torch.Generator().manual_seed(dist.get_rank()))
    sums = torch.zeros(numel)  # which stay finite, summed again and again
    contestants: dict[str, Callable[[], object]] = {"all-reduce float32": lambda: dist.all_reduce(sums)}
    contestants |= {f"vote {encoding}": voted(encoding, averages) for encoding in ENCODINGS}
    contestants["step after all-reduce"] = stepped(None, numel)
    contestants |= {f"step with {each} votes": stepped(MajorityVote(encoding=each), numel) for each in ENCODINGS}
    return {name: 1e9 * seconds / numel for name, seconds in measure(contestants, rounds).items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run on every rank; print on the first."""
    parser = Parser(__doc__)
    parser.add_argument("--numel", type=at_least_one, default=1 << 24, help="weights (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=at_least_one, default=9, help="of which the median counts (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    check_torchrun(parser)
    dist.init_process_group("gloo")
    results = compare(options.numel, options.rounds)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, {options.numel:,} weights, gloo, torch {torch.__version__}")
        for name, nanoseconds in results.items():
            print(f"{name:26} {nanoseconds:8.2f} ns a weight")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way


if __name__ == "__main__":
    main()
