"""From a model, or its named parameters, to its layers. Knows neither roles nor optimizers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["ROOT", "Layers", "STACLayer", "find_layers", "layer_of", "unwrapped", "writable"]

ROOT = "<root>"

# Names that torch.compile, activation checkpointing and FSDP1 put between a module and what they wrap.
FSDP1_NAME = "_fsdp_wrapped_module"
WRAPPED_NAMES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", FSDP1_NAME})
FSDP1_REFUSAL = (
    "{}, which flattens the parameters of several layers into one, so that roles and shapes are gone. Use fully_shard "
    "of torch.distributed.fsdp instead, and build the optimizer after it"
)
# These call it "module", as a user may: only under them it is a wrapper's name.
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, eq=False, kw_only=True)
class STACLayer:
    """A module that directly owns trainable parameters.

    Args:
        name: its path in the model without the prefixes of wrappers; ``"<root>"`` for the model itself.
        parameter_names: the full names of the parameters that it owns, in registration order.
        parameters: those parameters.
        type_name: the class name of the module; empty where only names were given.
        state_bytes: bytes of optimizer state that these parameters have once they have stepped; None without optimizer.
        amsgrad: whether the AdamW to compare with is AMSGrad.
    """

    name: str
    parameter_names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    type_name: str = ""
    state_bytes: int | None = None
    amsgrad: bool = False

    @property
    def numel(self) -> int:
        """How many weights the layer owns."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def adamw_bytes(self) -> int:
        """State bytes of ``torch.optim.AdamW``: two averages, three for AMSGrad, and a float32 counter."""
        averages = 3 if self.amsgrad else 2
        return sum(averages * parameter.numel() * parameter.element_size() + 4 for parameter in self.parameters)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What selectors choose from: the layers in registration order, and what lies behind them.

    Args:
        layers: every layer.
        modules: the module of each layer; None where only names were given.
        ties: for each module whose trainable parameters all belong to earlier layers: (module, parameter, first owner).
        trailing_ties: those of ``ties`` that come after the last layer.
    """

    layers: tuple[STACLayer, ...]
    modules: tuple[nn.Module | None, ...]
    ties: tuple[tuple[str, str, str], ...] = ()
    trailing_ties: tuple[tuple[str, str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(layer.name for layer in self.layers)


def find_layers(model: nn.Module | Iterable[tuple[str, Tensor]]) -> Layers:
    """Find the layers of a model, in registration order.

    Frozen parameters are left out. A shared parameter belongs to the first module that holds it.

    Raises:
        TypeError: ``model`` is neither a module nor an iterable of (name, parameter).
        ValueError: nothing in it is trainable, a name stands twice, a lazy parameter has no shape yet, or FSDP1 has
            flattened the parameters.
    """
    if not isinstance(model, nn.Module | Iterable) or isinstance(model, set | frozenset):
        raise TypeError(f"model must be a module, or (name, parameter) pairs in order, got {type(model).__name__}")
    layers: list[STACLayer] = []
    modules: list[nn.Module | None] = []
    ties: list[tuple[str, str, str]] = []
    trailing_ties: list[tuple[str, str, str]] = []
    owners: dict[int, str] = {}
    held = _held_by_module(model) if isinstance(model, nn.Module) else _held_by_name(model)
    for name, module, named_parameters in held:
        trainable = [(full_name, parameter) for full_name, parameter in named_parameters if parameter.requires_grad]
        owned = [item for item in trainable if owners.setdefault(id(item[1]), item[0]) == item[0]]
        if owned:
            names, parameters = zip(*owned, strict=True)
            layer = STACLayer(name=name, parameter_names=names, parameters=parameters, type_name=_type_name(module))
            layers.append(layer)
            modules.append(module)
            trailing_ties.clear()
        elif trainable:
            full_name, parameter = trainable[0]
            ties.append((name, full_name, owners[id(parameter)]))
            trailing_ties.append(ties[-1])
    if not layers:
        raise ValueError("model has no trainable parameters; at least one must have requires_grad=True")
    return Layers(layers=tuple(layers), modules=tuple(modules), ties=tuple(ties), trailing_ties=tuple(trailing_ties))


def _fsdp_class(name: str) -> tuple[type, ...]:
    """A class of torch.distributed.fsdp; none where nobody has imported that, and so nobody can have used it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (getattr(fsdp, name),)


def _type_name(module: nn.Module | None) -> str:
    """The name of a module's class as its author knows it: FSDP2 puts a subclass in its place."""
    if module is None:
        return ""
    kind = type(module)
    if isinstance(module, _fsdp_class("FSDPModule")):
        kind = next(base for base in kind.__bases__ if issubclass(base, nn.Module))
    return kind.__name__


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def writable(full_name: str, parameter: Tensor) -> Tensor:
    """The parameter itself, unless a step could not write to it."""
    if is_lazy(parameter):
        raise ValueError(f"parameter {full_name!r} has no shape yet; run the model once before building the optimizer")
    if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
        raise ValueError(f"parameter {full_name!r} is expanded: several elements share memory; pass a clone")
    return parameter


def _held_by_module(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[tuple[str, Tensor]]]]:
    """Each module's clean path and the parameters that it holds itself."""
    fsdp1 = _fsdp_class("FullyShardedDataParallel")
    cleaned: dict[str, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        parent_path, _, own_name = path.rpartition(".")
        clean = ""
        if path:
            clean_parent, parent = cleaned[parent_path]
            is_wrapped = own_name in WRAPPED_NAMES or (own_name == "module" and isinstance(parent, WRAPPERS))
            clean = clean_parent if is_wrapped else _join(clean_parent, own_name)
        cleaned[path] = (clean, module)
        if isinstance(module, fsdp1):
            raise ValueError(FSDP1_REFUSAL.format(f"model holds FullyShardedDataParallel as {path or ROOT!r}"))
        held = module.named_parameters(recurse=False)
        named = [(_join(clean, name), parameter) for name, parameter in held]
        yield clean or ROOT, module, [(name, writable(name, parameter)) for name, parameter in named]


def unwrapped(name: str) -> str:
    """A parameter's name without those of wrappers. A "module" stays: a user's own submodule may have that name."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED_NAMES)


def layer_of(name: str) -> str:
    """The name of the layer that a parameter of this name belongs to."""
    return name.rpartition(".")[0] or ROOT


def _held_by_name(named_parameters: Iterable[Any]) -> Iterator[tuple[str, None, list[tuple[str, Tensor]]]]:
    """The same from names alone."""
    held: dict[str, dict[str, Tensor]] = {}
    for item in named_parameters:
        if not (
            isinstance(item, (tuple, list))
            and len(item) == 2
            and isinstance(item[0], str)
            and isinstance(item[1], Tensor)
        ):
            raise TypeError(
                f"expected (name, parameter) pairs as model.named_parameters() gives, got an item of type "
                f"{type(item).__name__}. Parameters without names do not tell which layers they form: pass the model "
                "itself, or group dicts with a stac_role"
            )
        if FSDP1_NAME in item[0].split("."):
            raise ValueError(FSDP1_REFUSAL.format(f"the name {item[0]!r} is one of FullyShardedDataParallel"))
        name = unwrapped(item[0])
        layer = held.setdefault(layer_of(name), {})
        if name in layer:
            raise ValueError(f"params has the name {name!r} twice")
        layer[name] = writable(name, item[1])
    for layer_name, parameters in held.items():
        yield layer_name, None, list(parameters.items())
