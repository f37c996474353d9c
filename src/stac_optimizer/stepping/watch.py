"""What a step looks out for, to warn once where a user would lose without a word. Knows groups, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from stac_optimizer.rule import Group

__all__ = ["IdleRoles", "OneLr"]

# Of steps in which a role had no gradient while another had: enough for a warm-up, soon enough to be told in a run.
IDLE_ROLE_STEPS = 500


class OneLr:
    """Whether one learning rate was written into all groups, where construction had given them different ones.

    Found at the second value that all groups share, for a schedule's floor is one value, and 0 none.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        groups = list(groups)
        self._count = len(groups)
        self._is_done = len(_rates(groups)) < 2
        self._shared: float | None = None

    def warning(self, groups: Sequence[Group]) -> str | None:
        """What to warn of at this step, once."""
        if self._is_done:
            return None
        rates = _rates(groups)
        if len(rates) != 1 or len(groups) < self._count:  # DeepSpeed steps one group at a time
            return None
        (rate,) = rates
        if self._shared is None or self._shared == rate:
            self._shared = rate
            return None
        self._is_done = True
        return (
            f"all groups have the learning rate {rate:g} now, though they began with different ones: what writes one "
            "lr into all groups, such as a scheduler's max_lr or a loop over param_groups, has erased their ratio. "
            "Give one value for each group (max_lr=[group['lr'] for group in optimizer.param_groups]; in a loop, "
            "group['lr'] = factor * group['initial_lr']), or choose one rate for all with trunk_lr="
        )


def _rates(groups: Iterable[Group]) -> set[float]:
    """The learning rates of groups but for 0; none of them where to read one would wait for a device."""
    rates = [group.get("lr") for group in groups]
    if any(isinstance(rate, Tensor) and not rate.is_cpu for rate in rates):
        return set()
    values = [rate.detach() if isinstance(rate, Tensor) else rate for rate in rates if rate is not None]
    return set(map(float, values)) - {0.0}


class IdleRoles:
    """Whether the parameters of one role never have a gradient while the other's have."""

    def __init__(self) -> None:
        self._idle: dict[str, int] = {}
        self._is_done = False

    def warning(self, groups: Sequence[Group]) -> str | None:
        """What to warn of at this step, once."""
        if self._is_done:
            return None
        had: dict[str, bool] = {}
        for group in groups:
            role = group["stac_role"]
            had[role] = had.get(role, False) or any(param.grad is not None for param in group["params"])
        if len(had) < 2 or not any(had.values()):
            return None
        for role, has_gradient in had.items():
            self._idle[role] = 0 if has_gradient else self._idle.get(role, 0) + 1
        idle = next((role for role, steps in self._idle.items() if steps >= IDLE_ROLE_STEPS), None)
        if idle is None:
            return None
        of_idle = [param for group in groups if group["stac_role"] == idle for param in group["params"]]
        if not any(param.requires_grad for param in of_idle):  # frozen on purpose
            self._idle[idle] = 0
            return None
        self._is_done = True
        names = [name for group in groups if group["stac_role"] == idle for name in group["layer_names"]]
        shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return (
            f"the {idle} ({shown}) has had no gradient for {IDLE_ROLE_STEPS} steps while the other role had: are these "
            "layers unused, a copy such as an EMA's, or was a module replaced after the optimizer was built? Choose "
            "layers that train with cap=..., or build the optimizer after the change"
        )
