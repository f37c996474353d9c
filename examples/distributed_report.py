"""What a run on several processes reports: its figures, and what processes on one Linux machine send each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

__all__ = ["Loopback", "Report"]

COUNTERS = Path("/proc/net/dev")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run has reached and what it costs, as one rank sees it; ``str`` gives it as lines of text.

    Attributes:
        name: of the strategy.
        processes, steps: how many.
        train_losses: mean over ranks and over the steps since the validation before, by the number of steps done.
        validation_losses: by the number of steps done, in nats per character.
        wire_bytes: what all ranks receive a step, or why it was not counted.
        gradients_ms, step_ms: median times of forward and backward, and of the optimizer's step.
        state_bytes: size of the optimizer's state on this rank.
        resumed_digest, digest: of all weights, after resuming (None without) and at the end.
    """

    name: str
    processes: int
    steps: int
    train_losses: dict[int, float]
    validation_losses: dict[int, float]
    wire_bytes: float | str
    gradients_ms: float
    step_ms: float
    state_bytes: int
    resumed_digest: str | None
    digest: str

    def __str__(self) -> str:
        is_counted = isinstance(self.wire_bytes, float)
        wire = f"{self.wire_bytes:,.0f}" if is_counted else f"not counted, for {self.wire_bytes}"
        return "\n".join(
            [
                f"{self.name} on {self.processes} processes: {self.steps} steps, weights {self.digest}",
                f"bytes that all ranks receive a step: {wire}",
                f"forward and backward: {self.gradients_ms:.2f} ms; optimizer's step: {self.step_ms:.2f} ms (medians)",
                f"optimizer's state on this rank: {self.state_bytes:,} bytes",
            ]
        )


class Loopback:
    """A count of the bytes that all ranks together receive a step, headers and acknowledgements of TCP included.

    Other processes may use the interface too, so the least of several counts stands.

    Attributes:
        bytes_a_step: the least so far, or why there is none.
    """

    def __init__(self) -> None:
        self.bytes_a_step: float | str = "no step was taken"
        self.is_counting = False
        here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        if dist.get_backend() != "gloo":
            self.bytes_a_step = f"{dist.get_backend()} does not send over the loopback interface"
        elif here < dist.get_world_size():
            self.bytes_a_step = "the ranks are on several machines"
        elif not COUNTERS.exists():
            self.bytes_a_step = "only Linux has /proc/net/dev"
        else:
            self.is_counting = True

    def start(self) -> None:
        """Begin to count, on all ranks."""
        self._before = self._read_between_barriers()

    def stop(self, steps: int) -> None:
        """End a count over so many steps, on all ranks."""
        count = (self._read_between_barriers() - self._before) / max(1, steps)
        if self.is_counting:
            known = self.bytes_a_step
            self.bytes_a_step = count if isinstance(known, str) else min(count, known)

    def _read_between_barriers(self) -> int:
        """The bytes so far: no rank looks before all are done, or goes on before all have looked."""
        if not self.is_counting:
            return 0
        dist.barrier()
        count = received()
        dist.barrier()
        return count


def received() -> int:
    """Return the bytes that have come over the loopback interface since the machine started."""
    for line in COUNTERS.read_text(encoding="ascii").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    raise RuntimeError(f"{COUNTERS} lists no loopback interface")
