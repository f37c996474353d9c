"""What is said of a state dict that is none of this optimizer's: what it is, and the way on. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stac_optimizer.rule import Group, Rule

__all__ = ["refuse_no_adamw", "refuse_other_kind", "refuse_other_optimizer"]

NEEDED = frozenset({"state", "param_groups"})
ADAMWS_STATE = frozenset({"exp_avg", "exp_avg_sq"})
# How torch's optimizers are told by what their groups hold; the first that fits counts.
BY_KEYS: tuple[tuple[str, frozenset[str]], ...] = (
    ("an SGD's", frozenset({"dampening"})),
    ("an RMSprop's", frozenset({"centered"})),
    ("an Adagrad's", frozenset({"lr_decay"})),
    ("a NAdam's", frozenset({"momentum_decay"})),
    ("an AdamW's", frozenset({"betas", "amsgrad"})),
)
DEPTH = 3


def refuse_other_kind(state_dict: Mapping[str, Any]) -> None:
    """Refuse what is no optimizer's state dict.

    Raises:
        ValueError: saying what it is, where that can be told, and what to pass instead.
    """
    if state_dict.keys() >= NEEDED:
        return
    needed = "state_dict must hold 'state' and 'param_groups', as optimizer.state_dict() returns"
    place = _place_of_optimizer(state_dict, "state_dict", DEPTH)
    if place is not None:
        raise ValueError(f"{needed}; this dict holds such a one: pass {place}")
    if "last_epoch" in state_dict or "_schedulers" in state_dict:
        raise ValueError(f"{needed}; it is a learning-rate scheduler's: load it with scheduler.load_state_dict")
    if "growth_factor" in state_dict:
        raise ValueError(f"{needed}; it is a GradScaler's: load it with scaler.load_state_dict")
    if state_dict and all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{needed}; it is a model's: load it with model.load_state_dict")
    raise ValueError(f"{needed}, got the keys {sorted(map(str, state_dict))[:8]}")


def _place_of_optimizer(value: Any, place: str, depth: int) -> str | None:
    """Where in a checkpoint of many things an optimizer's state dict is."""
    if isinstance(value, Mapping) and value.keys() >= NEEDED:
        return place
    if depth == 0 or not isinstance(value, Mapping | list | tuple):
        return None
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    found = (_place_of_optimizer(each, f"{place}[{key!r}]", depth - 1) for key, each in items)
    return next((place for place in found if place is not None), None)


def refuse_other_optimizer(
    groups: Sequence[Group], state: Mapping[Any, Mapping[str, Any]], present: Sequence[Group], rules: Mapping[str, Rule]
) -> None:
    """Refuse groups that another optimizer than the present one had.

    Args:
        groups: the checkpoint's.
        state: the checkpoint's, by number.
        present: of the optimizer that is to load it.
        rules: its rules, by the name that groups hold.

    Raises:
        ValueError: saying whose they are, and the way on.
    """
    was_stac, is_stac = (any("stac_role" in group for group in some) for some in (groups, present))
    if not groups or (was_stac and is_stac):
        return
    if was_stac:
        raise ValueError(
            f"the checkpoint's parameter groups have a stac_role: it is a STAC's, and this is {present[0]['rule']} "
            "alone. Load it into a STAC that is built as that one was"
        )
    held = _held(state)
    whose = _whose(groups, held)
    if is_stac:
        way = "STAC cannot go on from its state: load the model's weights alone"
        if _is_as_adamws(groups, held):
            way = "Go on from it with optimizer.load_adamw_state_dict(state_dict, model)"
            if any(rule.is_guest for rule in rules.values()):
                way += ", which takes roles with rules of this package, and no foreign optimizer"
        raise ValueError(f"the checkpoint's parameter groups have no stac_role: it is {whose}. {way}")
    own = rules[present[0]["rule"]].hyperparameters
    if own and not any("rule" in group or own.keys() & set(group) for group in groups):
        raise ValueError(
            f"the checkpoint's parameter groups have none of {', '.join(sorted(own))}, which those of "
            f"{present[0]['rule']} have: it is {whose}. Load the model's weights alone"
        )


def refuse_no_adamw(groups: Sequence[Group], state: Mapping[Any, Mapping[str, Any]]) -> None:
    """Refuse groups and state of which nothing would be taken as AdamW's.

    Raises:
        ValueError: saying whose they are.
    """
    held = _held(state)
    if not _is_as_adamws(groups, held):
        shown = f", with {', '.join(sorted(held))}" if held else ""
        raise ValueError(
            f"the checkpoint is no AdamW's, whose state is exp_avg and exp_avg_sq: it is {_whose(groups, held)}{shown}"
            ". Load the model's weights alone"
        )


def _held(state: Mapping[Any, Mapping[str, Any]]) -> set[str]:
    """What is kept of the first parameter that has stepped; a counter may stand alone before."""
    return next((set(each) for each in state.values() if len(each) > 1), set())


def _is_as_adamws(groups: Sequence[Group], held: set[str]) -> bool:
    return held >= ADAMWS_STATE or (not held and all({"betas", "eps"} <= set(group) for group in groups))


def _whose(groups: Sequence[Group], held: set[str]) -> str:
    """What made these groups, as well as it can be told."""
    keys, first = set(groups[0]), groups[0]
    if "rule" in first:
        return f"one of {first['rule']} alone"
    if held >= ADAMWS_STATE and first.get("decoupled_weight_decay") is False and "amsgrad" in keys:
        return "an Adam's"
    found = next((name for name, wanted in BY_KEYS if wanted <= keys), None)
    if found is None and held >= ADAMWS_STATE:
        return "an AdamW's"
    if found is None and "betas" in keys and "eps" not in keys:
        return "a Lion's"
    return found or "another optimizer's"
