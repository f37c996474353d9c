"""State that a foreign optimizer keeps of a parameter: any nesting of tensors and plain values. Knows no rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["moved_to", "tensors_in"]


def moved_to(param: Tensor, value: Any, group: Mapping[str, Any], key: str = "") -> Any:
    """A copy of loaded state on its parameter's device, in the dtypes that it was saved in.

    torch would cast averages to the parameter's dtype. As there, a counter stays on the host unless a kernel reads it.
    """
    if isinstance(value, Tensor):
        is_on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
        return value.detach().clone() if is_on_host else value.detach().clone().to(param.device)
    if isinstance(value, Mapping):
        return {name: moved_to(param, each, group, name) for name, each in value.items()}
    if isinstance(value, list | tuple):
        items = [moved_to(param, each, group) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
