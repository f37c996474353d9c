"""What is checked and upgraded before a checkpoint is loaded. Changes nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stac_optimizer._groups import STRUCTURE_KEYS, TORCH_KEYS, check_fitness, checked, named_parameters
from stac_optimizer._shards import is_sharded
from stac_optimizer._validation import mapping, non_negative
from stac_optimizer.rules import RULES, Group, StateTensor, hyperparameters

__all__ = ["prepare"]

# Groups of stac-optimizer 0.1.2 held these beside lr and weight_decay, which say the same.
LEGACY_GROUP_KEYS = frozenset({"trunk_lr", "cap_lr", "trunk_weight_decay", "cap_weight_decay"})
LEGACY_AVERAGE = "trunk_momentum_buffer"

LR_ROUNDING = 1e-9


def prepare(
    state_dict: Mapping[str, Any], param_groups: Sequence[Group]
) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
    """Check a state dict against the present groups and bring it into their form.

    Args:
        state_dict: what ``state_dict()`` returned, now or in stac-optimizer 0.1.2.
        param_groups: the groups of the optimizer that is to load it.

    Returns:
        The groups to load, and the state of each parameter as fresh tensors on its device.

    Raises:
        TypeError: a hyper-parameter, or the state dict itself, of the wrong type.
        ValueError: the first difference between the checkpoint and the groups, or a value out of range.
    """
    if not {"state", "param_groups"} <= set(mapping("state_dict", state_dict)):
        raise ValueError("state_dict must hold 'state' and 'param_groups', as optimizer.state_dict() returns")
    if not isinstance(state_dict["param_groups"], (list, tuple)):
        raise TypeError(f"param_groups must be a list, got {type(state_dict['param_groups']).__name__}")
    groups, states = _upgraded(
        [mapping(f"checkpoint group {index}", group) for index, group in enumerate(state_dict["param_groups"])],
        mapping("state", state_dict["state"]),
    )
    if len(groups) != len(param_groups):
        raise ValueError(f"the checkpoint has {len(groups)} groups, this optimizer {len(param_groups)}")
    loaded = [
        _checked_group(saved, present, f"checkpoint group {index}: ")
        for index, (saved, present) in enumerate(zip(groups, param_groups, strict=True))
    ]
    present_params = [present["params"] for present in param_groups]
    check_fitness({**group, "params": params} for group, params in zip(loaded, present_params, strict=True))
    ids = [number for group in groups for number in group["params"]]
    named = list(named_parameters(param_groups))
    merged = [group for group in loaded for _ in group["params"]]
    known = set(ids)
    unknown = [number for number in states if number not in known]
    if unknown:
        raise ValueError(f"the checkpoint has state for {unknown[0]!r}, which is in none of its groups")
    state = {
        param: _checked_state(states[number], name, param, group)
        for number, (name, param, _), group in zip(ids, named, merged, strict=True)
        if number in states
    }
    return loaded, state


def _upgraded(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Copies of groups and states, those of 0.1.2 under their present keys. The trunk did not count its steps."""
    new_groups = [{key: group[key] for key in group if key not in LEGACY_GROUP_KEYS} for group in groups]
    new_states = {number: dict(mapping(f"state of parameter {number!r}", state)) for number, state in states.items()}
    counted = [state["step"] for state in new_states.values() if "step" in state]
    for state in new_states.values():
        if LEGACY_AVERAGE in state:
            state["exp_avg"] = state.pop(LEGACY_AVERAGE)
            state.setdefault("step", max(counted, default=1))
    return new_groups, new_states


def _checked_group(saved: dict[str, Any], present: Group, where: str) -> dict[str, Any]:
    """The saved group, completed by the present one where it lacks a key."""
    if not isinstance(saved.get("params"), list):
        raise ValueError(f"{where}params must be a list, got {saved.get('params')!r}")
    fallback = {"rule": present["rule"], "param_names": present.get("param_names")}  # 0.1.2 did not save these
    for key in ("stac_role", "rule", "layer_names", "param_names"):
        _refuse_difference(where + key, saved.get(key, fallback.get(key)), present.get(key))
    if len(saved["params"]) != len(present["params"]):
        raise ValueError(f"{where}it has {len(saved['params'])} parameters, this optimizer's {len(present['params'])}")
    unknown = [key for key in saved if key not in STRUCTURE_KEYS | TORCH_KEYS | set(hyperparameters()) | set(present)]
    if unknown:
        raise ValueError(f"{where}unknown key {unknown[0]!r}")
    structure = {key: present[key] for key in STRUCTURE_KEYS if key in present and key != "params"}
    merged = {**present, **saved, **structure, "trunk_vote": present["trunk_vote"]}  # the ranks' of now, not of then
    # A schedule that ends at zero may end a rounding below it.
    slightly_negative = isinstance(merged["lr"], float) and -LR_ROUNDING < merged["lr"] < 0
    values = checked({**merged, "lr": 0.0} if slightly_negative else merged, where)
    return {**merged, **values, "lr": merged["lr"]} if slightly_negative else {**merged, **values}


def _refuse_difference(what: str, saved: Any, present: Any) -> None:
    if not (isinstance(present, (tuple, list)) and isinstance(saved, (tuple, list))):
        if saved != present:
            raise ValueError(f"{what} is {saved!r} in the checkpoint, {present!r} in this optimizer")
        return
    for index, (theirs, ours) in enumerate(zip(saved, present, strict=False)):
        if theirs != ours:
            raise ValueError(f"{what}[{index}] is {theirs!r} in the checkpoint, {ours!r} in this optimizer")
    if len(saved) != len(present):
        longer, whose = (saved, "only in the checkpoint") if len(saved) > len(present) else (present, "not in it")
        raise ValueError(f"{what}: {longer[min(len(saved), len(present))]!r} is {whose}")


def _checked_state(saved: Mapping[str, Any], name: str, param: Tensor, group: Group) -> dict[str, Any]:
    """One parameter's state, copied to where it belongs. A key whose value is an empty dict counts as absent."""
    declared = {tensor.key: tensor for tensor in RULES[group["rule"]].state_tensors(group)}
    given = {key: value for key, value in saved.items() if not (isinstance(value, Mapping) and not value)}
    state: dict[str, Any] = {}
    steps = None
    for key, value in given.items():
        what = f"the checkpoint's {key!r} of {name!r}"
        if key not in RULES[group["rule"]].state_keys:
            raise ValueError(f"{what} is no state of the rule {group['rule']!r}")
        if key not in declared:
            continue  # of a hyper-parameter that has been switched off
        if declared[key].counter:
            steps = non_negative(what, value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
            state[key] = torch.tensor(steps, dtype=torch.float32, device=declared[key].device(param, group))
        else:
            state[key] = _copied(what, value, param, declared[key], group)
    if steps == 0:
        # Never stepped. Averages beside it are zeros, or left from another run by a partial load into its state dict.
        return {"step": state["step"]}
    # Averages that were saved as floating-point numbers stay such, without scales, where new ones would be in codes.
    has_codes = any(value.dtype == torch.int8 for value in state.values())
    needed = [key for key, tensor in declared.items() if has_codes or not tensor.scales]
    missing = [key for key in needed if key not in given]
    if missing and given:
        raise ValueError(f"the checkpoint's state of {name!r} lacks {missing[0]!r}")
    return state


def _copied(what: str, value: Any, param: Tensor, declared: StateTensor, group: Group) -> Tensor:
    """A state tensor in the layout and on the device of its parameter, in its own dtype."""
    shape = declared.shape(param)
    if not isinstance(value, Tensor) or value.shape != shape:
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} has shape {given}, that of the parameter {tuple(shape)}")
    expected = declared.dtype_for(param)
    is_alike = (value.is_floating_point(), value.is_complex()) == (param.is_floating_point(), param.is_complex())
    if value.dtype != expected and not is_alike:
        raise ValueError(f"{what} is {value.dtype}, that of the parameter {expected}")
    created = declared.create(param, group)
    if is_sharded(value) != is_sharded(created):
        given, needed = ("sharded", "whole") if is_sharded(value) else ("whole", "sharded")
        raise ValueError(
            f"{what} is {given}, that of the parameter {needed}; torch.distributed.checkpoint.state_dict makes state "
            "dicts whole with StateDictOptions(full_state_dict=True), and loads them into shards with it"
        )
    return torch.empty_like(created, dtype=value.dtype).copy_(value.detach())
