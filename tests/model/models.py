"""Models of every shape that the tests of layers, selectors and partition need, and what wraps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from stac_optimizer import STACPartition

Wrap = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    """A module with these submodules and parameters of its own, in this order."""

    def __init__(self, **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


class TokenEmbedding(nn.Embedding):
    """An embedding by its base."""


def parameter(*shape: int, trainable: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape), requires_grad=trainable)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    """The module with these parameters frozen; with all where no name is given."""
    for name, param in module.named_parameters():
        if name in names or not names:
            param.requires_grad_(False)
    return module


def tied_model(*, bias: bool = False) -> Net:
    """A language model whose head shares the weight of the embedding."""
    model = Net(wte=nn.Embedding(7, 4), block=nn.Linear(4, 4), ln_f=nn.LayerNorm(4), lm_head=nn.Linear(4, 7, bias=bias))
    model.get_submodule("lm_head").weight = model.get_parameter("wte.weight")
    return model


def two_blocks() -> Net:
    """A model with a parameter of its own and submodules that the user called "module"."""
    return Net(w=parameter(1), module=Net(module=nn.Linear(2, 2), norm=nn.LayerNorm(2)), head=nn.Linear(2, 2))


def lora_embedding() -> Net:
    """An embedding as PEFT adapts it: tables of parameters beside the frozen layer."""
    return Net(
        base_layer=frozen(nn.Embedding(7, 4)),
        lora_A=nn.ModuleDict(),
        lora_embedding_A=nn.ParameterDict({"default": parameter(2, 7)}),
        lora_embedding_B=nn.ParameterDict({"default": parameter(4, 2)}),
    )


def compiled(module: nn.Module) -> nn.Module:
    wrapper = torch.compile(module)
    assert isinstance(wrapper, nn.Module)
    return wrapper


def checkpointed(module: nn.Module) -> nn.Module:
    wrapper: nn.Module = checkpoint_wrapper(module)
    return wrapper


WRAPPERS: dict[str, Wrap] = {
    "bare": lambda module: module,
    "data-parallel": nn.DataParallel,
    "compile": compiled,
    "checkpoint": checkpointed,
    "compile-of-data-parallel": lambda module: compiled(nn.DataParallel(module)),
    "data-parallel-of-compile-of-checkpoint": lambda module: nn.DataParallel(compiled(checkpointed(module))),
    "data-parallel-twice": lambda module: nn.DataParallel(nn.DataParallel(module)),
}


def wrapped_inside(model: Net, wrap: Wrap) -> Net:
    """The model with its children wrapped."""
    for name, child in list(model.named_children()):
        setattr(model, name, wrap(child))
    return model


def described(partition: STACPartition, *, with_type: bool = True) -> list[tuple[Any, ...]]:
    """What a wrapper must not change."""
    return [
        (
            role,
            layer.name,
            layer.type_name * with_type,
            layer.parameter_names,
            [id(param) for param in layer.parameters],
        )
        for role, layers in (("trunk", partition.trunk_layers), ("cap", partition.cap_layers))
        for layer in layers
    ]
