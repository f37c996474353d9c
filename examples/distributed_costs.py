"""What training on many processes costs on paper: bytes over the wire, and bytes of state, as the README's tables.

    python examples/distributed_costs.py

All figures are for one rank. Ring algorithms send as much as they receive.
"""

from __future__ import annotations

from collections.abc import Sequence

from command_line import Parser

__all__ = ["averaging", "main", "state", "vote"]

WEIGHTS = {"125 M": 125e6, "1.5 B": 1.5e9, "7 B": 7e9}
RANKS = (8, 64, 1024)
SHARDS = (8, 64)
# Norms, biases and a small head; and, as in GPT-2's smallest model, token embeddings that serve as the head.
SMALL_CAP, LARGE_CAP = 0.02, 0.30


def averaging(weights: float, ranks: int, bytes_each: int) -> float:
    """Return the bytes that a rank sends to average gradients: a ring scatters the sums, and gathers them."""
    return 2 * (ranks - 1) / ranks * bytes_each * weights


def vote(weights: float, ranks: int, cap: float) -> float:
    """Return the bytes that a rank sends for a ternary vote on the trunk, and to average the cap's float32 gradients.

    On more than two ranks: all-to-all of the votes, two bits a weight, and all-gather of the decisions, as many.
    """
    trunk = (1 - cap) * weights
    return 2 * (ranks - 1) / ranks * trunk * 2 / 8 + averaging(cap * weights, ranks, 4)


def state(weights: float, cap: float, shards: int = 1) -> float:
    """Return the bytes of float32 state on a rank: one value for a trunk weight, two for the cap's; AdamW: all cap."""
    return (4 * (1 - cap) + 8 * cap) * weights / shards


def amount(count: float) -> str:
    """Return a number of bytes in readable units, to three digits."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    value = count / unit
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {name}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def wire_table() -> str:
    """Return the bytes that a rank sends a step."""
    caps = [f"ternary vote, cap {share:.0%}" for share in (SMALL_CAP, LARGE_CAP)]
    rows = [
        [
            name,
            f"{ranks:,}",
            *(amount(averaging(weights, ranks, size)) for size in (4, 2)),
            *(amount(vote(weights, ranks, share)) for share in (SMALL_CAP, LARGE_CAP)),
        ]
        for name, weights in WEIGHTS.items()
        for ranks in RANKS
    ]
    return table(["weights", "ranks", "averages in float32", "averages in bfloat16", *caps], rows)


def state_table() -> str:
    """Return the bytes of state that a rank holds, replicated and sharded."""
    places = [("each rank", 1), *((f"sharded over {shards}", shards) for shards in SHARDS)]
    header = ["weights", *(f"{name}, {place}" for place, _ in places for name in ("AdamW", "STAC"))]
    rows = [
        [name, *(amount(state(weights, cap, shards)) for _, shards in places for cap in (1.0, SMALL_CAP))]
        for name, weights in WEIGHTS.items()
    ]
    return table(header, rows)


def main(argv: Sequence[str] | None = None) -> str:
    """Print both tables, and return them."""
    Parser(__doc__).parse_args(argv)
    tables = f"{wire_table()}\n\n{state_table()}"
    print(tables)
    return tables


if __name__ == "__main__":
    main()
