"""What of a checkpoint is a wrapper's own: told from the base's, checked, copied. Changes nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.groups.other_checkpoints import refuse_other_kind
from stac_optimizer.model.names import named_parameters
from stac_optimizer.rule import Group
from stac_optimizer.tensors.precision import arithmetic_dtype
from stac_optimizer.validation import Checker, mapping

__all__ = ["Loaded", "Own", "parted"]

# By the beginning of its keys, whose state it is.
WRAPPERS = {"lookahead_": "Lookahead", "scout_": "Scout", "mechanic_": "mechanize"}


class Own(NamedTuple):
    """A wrapper's keys in the state of parameters.

    Args:
        weights: of tensors like the parameter.
        shared: of small tensors that all parameters have one of, and on the same device.
        counter: of one more of these, which counts steps on the host.
        wide: those of ``weights`` that are held in the precision of arithmetic, others in the parameter's dtype.
    """

    weights: tuple[str, ...]
    shared: tuple[str, ...] = ()
    counter: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()

    def dtype_of(self, key: str, param: Tensor) -> torch.dtype:
        """What a tensor like the parameter is held in."""
        return arithmetic_dtype(param.dtype) if key in self.wide else param.dtype

    @property
    def keys(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.weights, *self.shared, *self.counter)


class Loaded(NamedTuple):
    """A wrapper's own state.

    Args:
        states: by parameter.
        shared: what all parameters have one of, by key.
    """

    states: dict[Tensor, dict[str, Tensor]]
    shared: dict[str, Tensor]


def parted(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Group],
    own: Own,
    hyperparameters: Mapping[str, Checker],
    *,
    is_innermost: bool,
) -> tuple[dict[str, Any], Loaded]:
    """Part a state dict.

    Args:
        state_dict: what a wrapper's ``state_dict()`` returned.
        param_groups: the present groups.
        own: the wrapper's keys.
        hyperparameters: its group keys.
        is_innermost: whether the base is no wrapper, so that nobody else knows the keys of one.

    Returns:
        What the base is to load, and the wrapper's own.

    Raises:
        TypeError: a hyper-parameter, or the state dict itself, of the wrong type.
        ValueError: what does not fit the parameters, or the state of a wrapper that there is none of.
    """
    refuse_other_kind(state_dict)
    groups = [dict(mapping(f"checkpoint group {i}", group)) for i, group in enumerate(state_dict["param_groups"])]
    for index, group in enumerate(groups):
        for key in hyperparameters.keys() & group.keys():
            group[key] = hyperparameters[key](f"checkpoint group {index}: {key}", group[key])
    rest: dict[Any, Any] = {}
    given: dict[Any, dict[str, Any]] = {}
    for number, state in mapping("state", state_dict["state"]).items():
        if not isinstance(state, Mapping):
            rest[number] = state
            continue
        # torch's flattened state dicts hold an empty dict in place of what is absent.
        mine = {key: state[key] for key in own.keys if key in state and not isinstance(state[key], Mapping)}
        others = {key: value for key, value in state.items() if key not in own.keys}
        if is_innermost:
            _refuse_other_wrapper(others)
        if others or not any(key in state for key in own.keys):
            rest[number] = others
        if mine:
            given[number] = mine
    loaded = _checked(given, groups, param_groups, own)
    return {**state_dict, "state": rest, "param_groups": groups}, loaded


def _refuse_other_wrapper(state: Iterable[Any]) -> None:
    for key in state:
        whose = next((name for prefix, name in WRAPPERS.items() if str(key).startswith(prefix)), None)
        if whose is not None:
            raise ValueError(
                f"the checkpoint has {key!r}, the state of {whose}, which this optimizer is not wrapped in; wrap it as "
                "it was then"
            )


def _checked(
    given: Mapping[Any, Mapping[str, Any]], groups: Sequence[Group], param_groups: Sequence[Group], own: Own
) -> Loaded:
    numbers = [number for group in groups for number in group.get("params", ())]
    named = list(named_parameters(param_groups))
    loaded = Loaded({}, {})
    if len(numbers) != len(named):
        return loaded  # which the base refuses
    for number, (name, param, _) in zip(numbers, named, strict=True):
        state = given.get(number)
        if state is None:
            continue
        for key, value in state.items():
            what = f"the checkpoint's {key!r} of {name!r}"
            if not isinstance(value, Tensor):
                raise ValueError(f"{what} must be a tensor, got {type(value).__name__}")
            if key in own.weights:
                loaded.states.setdefault(param, {})[key] = _copied(what, value, param, own.dtype_of(key, param))
                continue
            if key not in loaded.shared:
                device = torch.device("cpu") if key in own.counter else param.device
                loaded.shared[key] = value.detach().clone().to(device)
            elif not torch.equal(loaded.shared[key], value.detach().to(loaded.shared[key].device)):
                raise ValueError(f"{what} differs from that of other parameters, and all have one")
            loaded.states.setdefault(param, {})[key] = loaded.shared[key]
    return loaded


def _copied(what: str, value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    if value.shape != param.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}, that of the parameter {tuple(param.shape)}")
    if (value.is_floating_point(), value.is_complex()) != (param.is_floating_point(), param.is_complex()):
        raise ValueError(f"{what} is {value.dtype}, and the parameter {param.dtype}")
    if is_sharded(value) != is_sharded(param):
        given, needed = ("sharded", "whole") if is_sharded(value) else ("whole", "sharded")
        raise ValueError(
            f"{what} is {given}, that of the parameter {needed}; torch.distributed.checkpoint.state_dict makes state "
            "dicts whole with StateDictOptions(full_state_dict=True), and loads them into shards with it"
        )
    return torch.empty_like(param, dtype=dtype).copy_(value.detach())
