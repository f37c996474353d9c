"""Checkpoints of older versions, and of AdamW, brought into the present form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stac_optimizer.groups.other_checkpoints import refuse_no_adamw, refuse_other_kind
from stac_optimizer.model.names import unwrapped
from stac_optimizer.rule import Group, Rule
from stac_optimizer.validation import mapping

__all__ = ["from_adamw", "translated"]

# Groups of stac-optimizer 0.1.2 held these beside lr and weight_decay, which say the same.
REPEATED_KEYS = frozenset({"trunk_lr", "cap_lr", "trunk_weight_decay", "cap_weight_decay"})
# And every group held the hyper-parameters of both roles.
ROLE_KEYS = {"trunk": {"trunk_momentum": "momentum"}, "cap": {}}
OF_THE_OTHER_ROLE = {"trunk": frozenset({"eps", "amsgrad"}), "cap": frozenset({"trunk_momentum"})}
OLD_AVERAGE = "trunk_momentum_buffer"

ROLES_OF_0_3_0 = {"sign": "trunk", "adamw": "cap"}
KEPT_OF_0_3_0 = ("lr", "betas", "maximize", "error_if_nonfinite", "foreach")

Groups = list[dict[str, Any]]
States = dict[Any, dict[str, Any]]


def translated(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Mapping[str, Any]], present: Sequence[Group]
) -> tuple[Groups, States]:
    """Copies of a checkpoint's groups and states, those of older versions under their present keys."""
    new_groups = [dict(group) for group in groups]
    new_states = {number: dict(mapping(f"state of parameter {number!r}", state)) for number, state in states.items()}
    if any(OLD_AVERAGE in state for state in new_states.values()) or any("trunk_lr" in group for group in groups):
        return _from_0_1_2(new_groups, new_states)
    if any(group.get("stac_role") in ROLES_OF_0_3_0 for group in groups):
        return _from_0_3_0(new_groups, present), new_states
    return new_groups, new_states


def _from_0_1_2(groups: Groups, states: States) -> tuple[Groups, States]:
    """Trunk state had a name of its own, and the trunk did not count its steps."""
    translated_groups = []
    for group in groups:
        role = str(group.get("stac_role"))
        dropped = REPEATED_KEYS | OF_THE_OTHER_ROLE.get(role, frozenset())
        names = ROLE_KEYS.get(role, {})
        translated_groups.append({names.get(key, key): value for key, value in group.items() if key not in dropped})
    counted = [state["step"] for state in states.values() if "step" in state]
    for state in states.values():
        if OLD_AVERAGE in state:
            state["exp_avg"] = state.pop(OLD_AVERAGE)
            state.setdefault("step", max(counted, default=1))
    return translated_groups, states


def _from_0_3_0(saved: Groups, present_groups: Sequence[Group]) -> Groups:
    """The groups of 0.3.0, dealt out by name into the present ones.

    Its trunk took the sign of the bare gradient, which momentum 0 goes on with. A mask said which parameters decay.
    """
    held: dict[str, tuple[Any, bool, dict[str, Any]]] = {}
    for group in saved:
        for name, number, decays in zip(group["param_names"], group["params"], group["decay_param_mask"], strict=True):
            held[unwrapped(name)] = (number, bool(decays), group)
    result = []
    for index, present in enumerate(present_groups):
        names = list(present.get("param_names", ()))
        unknown = [name for name in names if name not in held]
        if unknown or not names:
            raise ValueError(f"group {index}: the checkpoint of 0.3.0 lacks {unknown[0] if unknown else 'names'!r}")
        members = [held.pop(name) for name in names]
        first = members[0][2]
        for name, (_, decays, old) in zip(names, members, strict=True):
            if old is not first:
                raise ValueError(
                    f"{name!r} is of the role {ROLES_OF_0_3_0[old['stac_role']]!r} in the checkpoint, and in another "
                    f"than {names[0]!r}; give last_n_layers={old['resolved_last_n_modules']}"
                )
            if decays != members[0][1] and first["weight_decay"]:
                raise ValueError(
                    f"weight decay is off for one of {names[0]!r}, {name!r} in this checkpoint of 0.3.0; build STAC "
                    "with overrides=[(vectors() | biases(), {'weight_decay': 0.0})]"
                )
        role = ROLES_OF_0_3_0[first["stac_role"]]
        own = {"momentum": 0.0} if role == "trunk" else {key: first[key] for key in ("eps", "amsgrad")}
        decay = first["weight_decay"] if members[0][1] else 0.0
        structure = {key: present[key] for key in ("rule", "layer_names", "param_names")}
        kept = {key: first[key] for key in KEPT_OF_0_3_0}
        numbers = [number for number, _, _ in members]
        result.append({**structure, **kept, **own, "stac_role": role, "weight_decay": decay, "params": numbers})
    if held:
        raise ValueError(f"{next(iter(held))!r} is in the checkpoint of 0.3.0 and not in this optimizer")
    return result


def from_adamw(
    state_dict: Mapping[str, Any],
    model: nn.Module | Iterable[tuple[str, Tensor]],
    present: Mapping[str, Any],
    param_groups: Sequence[Group],
    rules: Mapping[str, Rule],
) -> dict[str, Any]:
    """A state dict of the present optimizer, with the state of an AdamW's.

    Args:
        state_dict: AdamW's.
        model: whose parameters are in the order of AdamW's.
        present: the state dict of the present optimizer.
        param_groups: its groups, which hold the parameters.
        rules: its rules, by the name that groups hold.

    Raises:
        TypeError: something of the wrong type.
        ValueError: another number of parameters, or other names.
    """
    refuse_other_kind(state_dict)
    saved = [mapping("AdamW's group", group) for group in state_dict["param_groups"]]
    if any("stac_role" in group for group in saved):
        raise ValueError("the checkpoint is a STAC's; load it with load_state_dict")
    refuse_no_adamw(saved, mapping("state", state_dict["state"]))
    numbers = [number for group in saved for number in group["params"]]
    params = _in_adamws_order(saved, model)
    if len(numbers) != len(params):
        raise ValueError(
            f"AdamW's checkpoint has {len(numbers)} parameters, the model {len(params)}; pass (name, parameter) "
            "pairs of those that AdamW had, in its order"
        )
    if any(bool(group.get("maximize")) != bool(param_groups[0].get("maximize")) for group in saved):
        raise ValueError("AdamW ascends and this optimizer descends, or the reverse; give both the same maximize")
    state_of = dict(zip(map(id, params), (state_dict["state"].get(number, {}) for number in numbers), strict=True))
    states = {}
    positions = [number for group in present["param_groups"] for number in group["params"]]
    held = [(param, group) for group in param_groups for param in group["params"]]
    for number, (param, group) in zip(positions, held, strict=True):
        state = state_of.get(id(param), {})
        wanted = {tensor.key for tensor in rules[group["rule"]].state(param, group)}
        taken = {key: value for key, value in state.items() if key in wanted}
        if taken:
            states[number] = taken
    return {"state": states, "param_groups": present["param_groups"]}


def _in_adamws_order(saved: Sequence[Mapping[str, Any]], model: nn.Module | Iterable[Any]) -> list[Tensor]:
    named = list(model.named_parameters()) if isinstance(model, nn.Module) else list(model)
    if not all(isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[1], Tensor) for item in named):
        raise TypeError("model must be a module, or (name, parameter) pairs in the order of AdamW's parameters")
    names = [name for group in saved for name in group.get("param_names", ())]
    if names:
        by_name = {unwrapped(name): param for name, param in named}
        unknown = [name for name in names if unwrapped(name) not in by_name]
        if unknown:
            raise ValueError(f"AdamW's checkpoint has {unknown[0]!r}, which is not in the model")
        return [by_name[unwrapped(name)] for name in names]
    if len(saved) > 1 and isinstance(model, nn.Module):
        raise ValueError(
            f"AdamW's checkpoint has {len(saved)} groups without names, so a module does not tell their order; pass "
            "(name, parameter) pairs, group by group as AdamW got them"
        )
    return [param for _, param in named]
