"""What votes send, counted at the connections over loopback, not by formula."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stac_optimizer import STAC, MajorityVote
from tests.ranks import run_ranks

IS_LINUX = sys.platform == "linux"
# Where Linux's struct tcp_info holds tcpi_bytes_received.
RECEIVED = slice(128, 136)


def received() -> int:
    """Bytes that came in so far over this process's connections; nobody else's are counted."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{descriptor}").rpartition("/")[2].startswith("socket:"):
            with socket.socket(fileno=os.dup(int(descriptor))) as connection, suppress(OSError):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, RECEIVED.stop)
                total += int.from_bytes(info[RECEIVED], sys.byteorder)
    return total


def traffic(action: Callable[[], object]) -> int:
    dist.barrier()
    before = received()
    action()
    return received() - before


NUMEL = 1 << 20


def bytes_of(encoding: str) -> tuple[int, int]:
    """What this rank receives for one all-reduce in float32, and for one step by vote."""
    param = nn.Parameter(torch.zeros(NUMEL))
    groups = [{"params": [("weight", param)], "stac_role": "trunk"}]
    optimizer = STAC(groups, vote=MajorityVote(encoding=encoding))
    param.grad = torch.randn(NUMEL) + dist.get_rank()
    optimizer.step()
    return traffic(lambda: dist.all_reduce(torch.zeros(NUMEL))), traffic(optimizer.step)


@pytest.mark.skipif(not IS_LINUX, reason="counts bytes as Linux does")
@pytest.mark.parametrize(
    ("encoding", "ranks", "share"),
    [("ternary", 2, 1 / 16), ("binary", 2, 1 / 32), ("int8", 2, 1 / 4), ("ternary", 4, 1 / 16), ("binary", 4, 3 / 64)],
)
def test_share_of_the_traffic_of_averaging(encoding: str, ranks: int, share: float) -> None:
    for averaging, votes in run_ranks(bytes_of, ranks, encoding):
        assert averaging == pytest.approx(2 * (ranks - 1) / ranks * 4 * NUMEL, rel=0.01)
        assert votes / averaging == pytest.approx(share, rel=0.01)
