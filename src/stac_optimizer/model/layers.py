"""From a model, or its named parameters, to its layers. Knows neither roles nor optimizers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stac_optimizer.model.names import FSDP1_NAME, ROOT, WRAPPED_NAMES, layer_of, unwrapped
from stac_optimizer.model.refusals import kind_of_model, no_pair, nothing_to_train
from stac_optimizer.validation import boolean

__all__ = ["Layers", "STACLayer", "SharedPlace", "find_layers", "writable"]

FSDP1_REFUSAL = (
    "{}, which flattens the parameters of several layers into one, so that roles and shapes are gone. Use fully_shard "
    "of torch.distributed.fsdp instead, and build the optimizer after it"
)
# These call it "module", as a user may: only under them it is a wrapper's name.
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, eq=False, kw_only=True)
class STACLayer:
    """A module that directly owns parameters to train, or the part of it that is in one role.

    Args:
        name: its path in the model without the prefixes of wrappers; ``"<root>"`` for the model itself.
        parameter_names: the full names of the parameters that it owns, in registration order.
        parameters: those parameters.
        type_name: the class name of the module; empty where only names were given.
        state_bytes: bytes of optimizer state that these parameters have once they have stepped; None without optimizer.
        lrs: the learning rates of these parameters, each once; empty without optimizer.
        weight_decays: their weight decays likewise.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import partition_trainable_layers
        >>> (head,) = partition_trainable_layers(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))).cap_layers
        >>> head.name, head.type_name, head.parameter_names, head.numel
        ('1', 'Linear', ('1.weight', '1.bias'), 18)
    """

    name: str
    parameter_names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    type_name: str = ""
    state_bytes: int | None = None
    lrs: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()

    @property
    def numel(self) -> int:
        """How many weights these are."""
        return sum(parameter.numel() for parameter in self.parameters)


@dataclass(frozen=True, eq=False, kw_only=True)
class SharedPlace:
    """A further place of a parameter that an earlier module owns.

    Args:
        name: the parameter's full name at this place.
        owner: its full name at its first owner.
        module: the module that holds it here.
    """

    name: str
    owner: str
    module: nn.Module | None

    @property
    def layer(self) -> str:
        """The name of the module that holds it here."""
        return layer_of(self.name)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layers:
    """What selectors choose from: the layers in registration order, and what lies behind them.

    Args:
        layers: every layer. No parameter, and no name of one, stands twice in them.
        modules: the module of each layer; None where only names were given.
        parents: the module around each of these, None around the model; likewise.
        shared: every further place of a shared parameter.
        tied_end: one of ``shared``, in the model's last module, where that owns no parameter itself.
    """

    layers: tuple[STACLayer, ...]
    modules: tuple[nn.Module | None, ...]
    parents: tuple[nn.Module | None, ...]
    shared: tuple[SharedPlace, ...] = ()
    tied_end: SharedPlace | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(layer.name for layer in self.layers)

    @property
    def named_parameters(self) -> tuple[tuple[str, Tensor], ...]:
        """Every parameter with its full name, layer by layer."""
        pairs = (zip(layer.parameter_names, layer.parameters, strict=True) for layer in self.layers)
        return tuple(pair for layer_pairs in pairs for pair in layer_pairs)

    @property
    def ties(self) -> tuple[SharedPlace, ...]:
        """One place of each module that holds parameters and owns none of them."""
        names = set(self.names)
        places = {place.layer: place for place in reversed(self.shared) if place.layer not in names}
        return tuple(reversed(places.values()))


def find_layers(model: nn.Module | Iterable[tuple[str, Tensor]], *, include_frozen: bool = False) -> Layers:
    """Find the layers of a model, in registration order.

    A shared parameter belongs to the first module that holds it, a parametrized one to the module that it is
    parametrized for.

    Args:
        model: a module, or (name, parameter) pairs, which give the layers that the module would.
        include_frozen: keep parameters that do not require gradients, except those that never could (integers).

    Raises:
        TypeError: ``model`` is neither a module nor an ordered iterable of (name, parameter), or ``include_frozen`` is
            no boolean.
        ValueError: nothing in it is trainable, a name stands twice, a lazy parameter has no shape yet, a parameter is
            expanded, or FSDP1 has flattened the parameters.
    """
    include_frozen = boolean("include_frozen", include_frozen)
    if not isinstance(model, nn.Module | Iterable) or isinstance(model, set | frozenset | str | Tensor | Mapping):
        raise TypeError(f"model must be a module, or (name, parameter) pairs in order, got {kind_of_model(model)}")
    modules, held = _by_module(model) if isinstance(model, nn.Module) else ({}, list(_by_name(model)))
    _check(held)
    owned: dict[str, list[tuple[str, Tensor]]] = {}
    shared: list[SharedPlace] = []
    owners: dict[int, str] = {}
    last_place = ""
    for name, parameter in held:
        if not (parameter.requires_grad or (include_frozen and _can_be_trained(parameter))):
            continue
        last_place = layer_of(name)
        owner = owners.setdefault(id(parameter), name)
        if owner == name:
            owned.setdefault(last_place, []).append((name, parameter))
        else:
            shared.append(SharedPlace(name=name, owner=owner, module=modules.get(last_place)))
    if not owned:
        raise ValueError(nothing_to_train(held, include_frozen=include_frozen))
    return Layers(
        layers=tuple(_layer(name, pairs, modules.get(name)) for name, pairs in owned.items()),
        modules=tuple(modules.get(name) for name in owned),
        parents=tuple(modules.get(layer_of(name)) if name != ROOT else None for name in owned),
        shared=tuple(shared),
        tied_end=next((place for place in shared if place.layer == last_place and last_place not in owned), None),
    )


def _check(held: Iterable[tuple[str, Tensor]]) -> None:
    names: set[str] = set()
    for name, parameter in held:
        if name in names:
            raise ValueError(f"model has the name {name!r} twice; each parameter needs a name of its own")
        names.add(name)
        writable(name, parameter)


def _can_be_trained(parameter: Tensor) -> bool:
    """Whether a frozen tensor could be unfrozen: quantized weights could not, buffers of a state_dict never are."""
    return isinstance(parameter, nn.Parameter) and (parameter.is_floating_point() or parameter.is_complex())


def _layer(name: str, pairs: list[tuple[str, Tensor]], module: nn.Module | None) -> STACLayer:
    names, parameters = zip(*pairs, strict=True)
    return STACLayer(name=name, parameter_names=names, parameters=parameters, type_name=_type_name(module))


def _fsdp_class(name: str) -> tuple[type, ...]:
    """A class of torch.distributed.fsdp; none where nobody has imported that, and so nobody can have used it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (getattr(fsdp, name),)


def _type_name(module: nn.Module | None) -> str:
    """The name of a module's class as its author knows it: FSDP2 and parametrizations put subclasses in its place."""
    if module is None:
        return ""
    kind = type(module)
    mixins = _fsdp_class("FSDPModule")
    while kind.__module__ == "torch.nn.utils.parametrize" or any(mixin in kind.__bases__ for mixin in mixins):
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


def _by_module(model: nn.Module) -> tuple[dict[str, nn.Module], list[tuple[str, Tensor]]]:
    """Every module by its path without the names of wrappers, and the parameters that each holds, in order."""
    fsdp1 = _fsdp_class("FullyShardedDataParallel")
    cleaned: dict[str, tuple[str, nn.Module]] = {}
    modules: dict[str, nn.Module] = {}
    held: list[tuple[str, Tensor]] = []
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
        modules[clean or ROOT] = module  # a wrapper's path is taken over by what it wraps, which comes after it
        held += [(_join(clean, name), parameter) for name, parameter in module.named_parameters(recurse=False)]
    return modules, held


def _by_name(named_parameters: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """The parameters from names alone."""
    for item in named_parameters:
        if not (
            isinstance(item, (tuple, list))
            and len(item) == 2
            and isinstance(item[0], str)
            and isinstance(item[1], Tensor)
        ):
            raise TypeError(no_pair(item))
        if FSDP1_NAME in item[0].split("."):
            raise ValueError(FSDP1_REFUSAL.format(f"the name {item[0]!r} is one of FullyShardedDataParallel"))
        yield unwrapped(item[0]), item[1]
