"""What is checked before a checkpoint is loaded. Changes nothing itself; older forms: see ``translation.py``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.groups.foreign_state import moved_to
from stac_optimizer.groups.keys import STRUCTURE_KEYS, check_common, check_parameters, checked
from stac_optimizer.groups.other_checkpoints import refuse_other_kind, refuse_other_optimizer
from stac_optimizer.groups.translation import translated
from stac_optimizer.model.names import named_parameters
from stac_optimizer.rule import COUNTER, Group, Rule, StateTensor
from stac_optimizer.validation import mapping, non_negative, pair_of_fractions

__all__ = ["prepare"]

LR_ROUNDING = 1e-9
OTHER_SPLIT = (
    ". The checkpoint's parameter groups are of another split: build STAC of the same model with the last_n_layers, "
    "cap and overrides that it had then"
)
# What to do about a difference in what groups of STAC say of themselves.
WAYS = {
    "stac_role": OTHER_SPLIT,
    "rule": (
        ". The checkpoint's parameter groups are of another optimizer: build STAC with the trunk_optimizer and "
        "cap_optimizer that it had then"
    ),
    "layer_names": OTHER_SPLIT,
    "param_names": OTHER_SPLIT,
}


def prepare(
    state_dict: Mapping[str, Any], param_groups: Sequence[Group], rules: Mapping[str, Rule]
) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """Check a state dict against the present groups and bring it into their form.

    Args:
        state_dict: what ``state_dict()`` returned, now or in an older version.
        param_groups: the groups of the optimizer that is to load it.
        rules: its rules, by the name that groups hold.

    Returns:
        The groups to load, and the state of each parameter as fresh tensors on its device, besides what guests keep
        of none.

    Raises:
        TypeError: a hyper-parameter, or the state dict itself, of the wrong type.
        ValueError: the first difference between the checkpoint and the groups, or a value out of range.
    """
    refuse_other_kind(mapping("state_dict", state_dict))
    if not isinstance(state_dict["param_groups"], (list, tuple)):
        raise TypeError(f"param_groups must be a list, got {type(state_dict['param_groups']).__name__}")
    given, shared = _parted(mapping("state", state_dict["state"]), state_dict["param_groups"], rules)
    groups, states = translated(
        [mapping(f"checkpoint group {index}", group) for index, group in enumerate(state_dict["param_groups"])],
        given,
        param_groups,
    )
    refuse_other_optimizer(groups, states, param_groups, rules)
    _refuse_other_groups(groups, param_groups)
    loaded = [
        _checked_group(saved, present, rules[present["rule"]], f"checkpoint group {index}: ")
        for index, (saved, present) in enumerate(zip(groups, param_groups, strict=True))
    ]
    present_params = [present["params"] for present in param_groups]
    check_parameters([{**group, "params": params} for group, params in zip(loaded, present_params, strict=True)], rules)
    ids = [number for group in groups for number in group["params"]]
    named = list(named_parameters(param_groups))
    merged = [group for group in loaded for _ in group["params"]]
    known = set(ids)
    unknown = [number for number in states if number not in known]
    if unknown:
        raise ValueError(f"the checkpoint has state for {unknown[0]!r}, which is in none of its groups")
    state = {
        param: _checked_state(states[number], name, param, group, rules[group["rule"]])
        for number, (name, param, _), group in zip(ids, named, merged, strict=True)
        if number in states
    }
    return loaded, {**state, **copy.deepcopy(shared)}


def _parted(
    state: Mapping[Any, Any], groups: Iterable[Mapping[str, Any]], rules: Mapping[str, Rule]
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """State of parameters, and what a guest keeps of none, such as one counter of all steps."""
    has_guest = any(rule.is_guest for rule in rules.values())
    # torch.distributed.checkpoint calls parameters by names.
    ids = {number for group in groups for number in group.get("params", ())} if has_guest else set()
    names = {key for key in state if isinstance(key, str) and key not in ids} if has_guest else set()
    return {key: state[key] for key in state if key not in names}, {key: state[key] for key in names}


def _refuse_other_groups(groups: Sequence[Group], param_groups: Sequence[Group]) -> None:
    """Refuse another number of groups, with the way out."""
    saved, present = len(groups), len(param_groups)
    if saved != present:
        more = (
            "Give the optimizer as many groups as it had then"
            if "stac_role" not in param_groups[0]
            else "Groups that overrides or add_param_group made must be the same at loading: build the optimizer with "
            "the arguments it had then, load, and add groups afterwards"
            if saved < present
            else "Build the optimizer with the overrides it had then, and add the groups that add_param_group made"
        )
        raise ValueError(f"the checkpoint has {saved} parameter groups, this optimizer {present}. {more}")


def _checked_group(saved: dict[str, Any], present: Group, rule: Rule, where: str) -> dict[str, Any]:
    """The saved group, completed by the present one where it lacks a key."""
    if not isinstance(saved.get("params"), list):
        raise ValueError(f"{where}params must be a list, got {saved.get('params')!r}")
    fallback = {"rule": present["rule"], "param_names": present.get("param_names")}  # 0.1.2 did not save these
    for key in ("stac_role", "rule", "layer_names", "param_names"):
        if key in present or key in saved:
            way = WAYS[key] if "stac_role" in present else ""
            _refuse_difference(where + key, saved.get(key, fallback.get(key)), present.get(key), way)
    if len(saved["params"]) != len(present["params"]):
        raise ValueError(f"{where}it has {len(saved['params'])} parameters, this optimizer's {len(present['params'])}")
    structure = {key: present[key] for key in STRUCTURE_KEYS if key in present and key != "params"}
    merged = {**present, **saved, **structure}
    if "vote" in present:
        merged["vote"] = present["vote"]  # the ranks' of now, not of then
    # A schedule that ends at zero may end a rounding below it.
    lr = merged.get("lr")  # a guest may have none
    slightly_negative = isinstance(lr, float) and -LR_ROUNDING < lr < 0
    if "betas" in merged and "betas" not in rule.hyperparameters and not rule.is_guest:
        merged["betas"] = pair_of_fractions(where + "betas", merged["betas"])
    if rule.is_guest:
        check_common(merged, where)
    values = {} if rule.is_guest else checked({**merged, "lr": 0.0} if slightly_negative else merged, rule, where)
    return {**merged, **values, "lr": lr} if slightly_negative else {**merged, **values}


def _refuse_difference(what: str, saved: Any, present: Any, way: str) -> None:
    if not (isinstance(present, (tuple, list)) and isinstance(saved, (tuple, list))):
        if saved != present:
            raise ValueError(f"{what} is {saved!r} in the checkpoint, {present!r} in this optimizer{way}")
        return
    for index, (theirs, ours) in enumerate(zip(saved, present, strict=False)):
        if theirs != ours:
            raise ValueError(f"{what}[{index}] is {theirs!r} in the checkpoint, {ours!r} in this optimizer{way}")
    if len(saved) != len(present):
        longer, whose = (saved, "only in the checkpoint") if len(saved) > len(present) else (present, "not in it")
        raise ValueError(f"{what}: {longer[min(len(saved), len(present))]!r} is {whose}{way}")


def _checked_state(saved: Mapping[str, Any], name: str, param: Tensor, group: Group, rule: Rule) -> dict[str, Any]:
    """One parameter's state, copied to where it belongs. A key whose value is an empty dict counts as absent."""
    if rule.is_guest:
        return {key: moved_to(param, value, group, key) for key, value in saved.items()}
    declared = {tensor.key: tensor for tensor in rule.state(param, group)}
    given = {key: value for key, value in saved.items() if not (isinstance(value, Mapping) and not value)}
    state: dict[str, Any] = {}
    steps = None
    for key, value in given.items():
        what = f"the checkpoint's {key!r} of {name!r}"
        if key not in rule.state_keys:
            raise ValueError(f"{what} is no state of the rule {group['rule']!r}")
        if key not in declared:
            continue  # of a hyper-parameter that has been switched off
        if key == COUNTER.key:
            steps = non_negative(what, value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
            state[key] = torch.tensor(steps, dtype=torch.float32, device=COUNTER.device_of(param, group))
        else:
            state[key] = _copied(what, value, param, declared[key], group)
    if steps == 0:
        # Never stepped. Averages beside it are zeros, or left from another run by a partial load into its state dict.
        return {"step": state["step"]}
    missing = [key for key in declared if key not in given and not rule.can_lack(key, state)]
    if missing and given:
        raise ValueError(f"the checkpoint's state of {name!r} lacks {missing[0]!r}")
    return state


def _copied(what: str, value: Any, param: Tensor, declared: StateTensor, group: Group) -> Tensor:
    """A state tensor in the layout and on the device of its parameter, in its own dtype."""
    shape = declared.shape_of(param)
    if not isinstance(value, Tensor) or value.shape != shape:
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} has shape {given}, that of the parameter {tuple(shape)}")
    expected = declared.dtype_of(param)
    kinds = [(dtype.is_floating_point, dtype.is_complex) for dtype in (value.dtype, param.dtype, expected)]
    is_alike = kinds[0] in kinds[1:]
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
