"""What is said of something that is no model with parameters to train: what was given, and what to pass instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["kind_of_model", "no_pair", "nothing_to_train"]

WHAT_TO_PASS = "pass the model itself, or model.named_parameters()"


def kind_of_model(model: Any) -> str:
    """What something is that is no model, and what to pass instead."""
    kind, what, way = type(model).__name__, "", WHAT_TO_PASS
    tensors = [value for value in model.values() if isinstance(value, Tensor)] if isinstance(model, Mapping) else []
    if tensors and len(tensors) == len(model) and any(tensor.requires_grad for tensor in tensors):
        what, way = " of parameters by name", f"{WHAT_TO_PASS}, or the dict's .items()"
    elif tensors and len(tensors) == len(model):
        what = " of tensors without gradients, as model.state_dict() gives it"
    elif isinstance(model, str):
        what = f" {model!r}"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        what, way = f": {model.__name__} is a class", f"pass a model that was made of it, {model.__name__}(...)"
    elif callable(model) and not isinstance(model, Tensor):
        what = ", a function that was not called"
    return f"{kind}{what}; {way}"


def no_pair(item: Any) -> str:
    """Of an item that is no (name, parameter) pair."""
    expected = (
        "model: expected (name, parameter) pairs as model.named_parameters() gives, got an item of type "
        f"{type(item).__name__}"
    )
    if isinstance(item, Tensor) and not item.requires_grad:
        return (
            f"{expected}. model has no trainable parameters here, only tensors without names and gradients, as "
            f"model.buffers() gives them: {WHAT_TO_PASS}"
        )
    if isinstance(item, nn.Module) or (isinstance(item, tuple) and any(isinstance(part, nn.Module) for part in item)):
        return f"{expected}, with a module in it: pass the module around them, or nn.ModuleList([...]) of them"
    why = f"The item is {item!r}"
    if isinstance(item, Tensor):
        why = "Parameters without names, as model.parameters() gives them, do not tell which layers they form"
    return f"{expected}. {why}: {WHAT_TO_PASS}, or group dicts with a stac_role"


def nothing_to_train(held: Sequence[tuple[str, Tensor]], *, include_frozen: bool) -> str:
    """Of a model without parameters to train.

    Args:
        held: the parameters that it has, by name.
        include_frozen: whether frozen ones were wanted too.
    """
    if held and not any(isinstance(parameter, nn.Parameter) for _, parameter in held):
        return (
            "model has no trainable parameters, only tensors without gradients, as model.state_dict() and "
            "model.named_buffers() give them; pass the model itself or model.named_parameters() to have at least one "
            "trainable parameter"
        )
    if include_frozen:
        return "model has no parameters; it must have at least one, trainable or frozen"
    needed = "model has no trainable parameters; at least one trainable parameter is needed, with requires_grad=True"
    if held:
        return (
            f"{needed}, and all {len(held)} are frozen: unfreeze some with requires_grad_(True), or pass "
            "include_frozen=True to unfreeze them later"
        )
    return f"{needed}; it has none at all. An iterator such as model.named_parameters() can be used only once"
