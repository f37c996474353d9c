"""What a step looks out for, to warn once where a user would lose without a word. Knows groups, changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from stac_optimizer.model.names import listed
from stac_optimizer.rule import Group

__all__ = ["IdleRoles", "OneLr", "OtherSchedule"]

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


class OtherSchedule:
    """Whether a schedule goes on where that of an AdamW stood whose state was loaded; asked at the next step.

    A scheduler's state has a value for each of its groups, which are not AdamW's, and an optimizer cannot see it
    loaded: torch then fails at the scheduler's next step, or moves some groups alone, or none to where they had been.
    """

    NEAR = 0.05
    """Of a share: schedules may be a step apart."""

    def __init__(self, saved: Sequence[Group]) -> None:
        self._count = len(saved)
        shares = _shares(saved)
        self._share = shares[0] if shares else None

    def warning(self, groups: Sequence[Group]) -> str | None:
        """What to warn of at this step, once."""
        share, self._share = self._share, None
        others = [] if share is None else _shares(groups)
        if share is None or all(abs(other - share) <= self.NEAR * max(other, share) for other in others):
            return None
        return (
            f"AdamW's scheduler had brought its lr to {share:.3g} of what it began with, and the groups here are at "
            f"{', '.join(f'{other:.3g}' for other in others)}. If the schedule is to go on, do not load its state: it "
            f"is of {self._count} group{'s' * (self._count != 1)}, and here are {len(groups)} with other rates. Build "
            "the scheduler anew, and bring it there: for _ in range(scheduler_state['last_epoch']): scheduler.step()"
        )


def _shares(groups: Sequence[Group]) -> list[float]:
    """What schedules have left of each group's first lr; none where to read one would wait for a device."""
    pairs = [(group["lr"], group["initial_lr"]) for group in groups if "lr" in group and "initial_lr" in group]
    if any(isinstance(value, Tensor) and not value.is_cpu for pair in pairs for value in pair):
        return []
    return [float(lr) / float(first) for lr, first in pairs if first]


class IdleRoles:
    """Whether the parameters of one role never have a gradient while the other's have."""

    def __init__(self) -> None:
        self._idle: dict[str, int] = {}
        self._is_done = False

    def warning(self, groups: Sequence[Group], stepped: Collection[str] = ()) -> str | None:
        """What to warn of at this step, once.

        Args:
            groups: all groups.
            stepped: the roles that were updated in backward, where gradients are released.
        """
        if self._is_done:
            return None
        had: dict[str, bool] = {}
        for group in groups:
            role = group["stac_role"]
            had[role] = had.get(role, role in stepped) or any(param.grad is not None for param in group["params"])
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
        shown = listed(names, 5) if names else f"{len(of_idle)} parameters without names"
        return (
            f"the {idle} ({shown}) has had no gradient for {IDLE_ROLE_STEPS} steps while the other role had: are these "
            "layers unused, a copy such as an EMA's, or was a module replaced after the optimizer was built? Choose "
            "layers that train with cap=..., or build the optimizer after the change"
        )
