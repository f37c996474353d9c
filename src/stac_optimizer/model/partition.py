"""The split of a model's layers into trunk and cap. Knows no optimizer. The table that shows it: see ``table.py``."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from glob import escape

from torch import Tensor, nn

from stac_optimizer.model.html import as_html
from stac_optimizer.model.layers import Layers, STACLayer, find_layers
from stac_optimizer.model.names import layer_of, listed
from stac_optimizer.model.selection import in_place_of
from stac_optimizer.model.selectors import Selector, last_layers
from stac_optimizer.model.table import Table, table_of
from stac_optimizer.validation import count, warn

__all__ = ["STACLayer", "STACPartition", "partition_trainable_layers", "split"]

# What PEFT calls the parts of its adapters: h.0.attn.lora_B.default, h.0.mlp.ia3_l.
ADAPTER = re.compile(r"\.((?:lora|ia3)_\w+)")


@dataclass(frozen=True, eq=False, kw_only=True)
class STACPartition:
    """The layers of each role, in registration order. ``print`` shows them as a table.

    A layer stands in both roles where only part of its parameters is in the cap: each holds its own part, under the
    layer's name.

    Args:
        trunk_layers: the trunk's layers, or parts of layers.
        cap_layers: the cap's.
        amsgrad: whether the AdamW that the table compares with is AMSGrad.
        moved: full names of the parameters that are in the cap because the trunk's rule takes matrices only.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import last_layers, partition_trainable_layers, vectors
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> partition = partition_trainable_layers(model, cap=last_layers(1) | vectors())
        >>> partition.trunk_layer_names, partition.cap_layer_names
        (('0',), ('0', '1'))
        >>> [tuple(parameter.shape) for parameter in partition.cap_parameters]
        [(8,), (2, 8), (2,)]
    """

    trunk_layers: tuple[STACLayer, ...]
    cap_layers: tuple[STACLayer, ...]
    amsgrad: bool = False
    moved: tuple[str, ...] = ()

    @property
    def trunk_layer_names(self) -> tuple[str, ...]:
        """Names of the trunk's layers."""
        return tuple(layer.name for layer in self.trunk_layers)

    @property
    def cap_layer_names(self) -> tuple[str, ...]:
        """Names of the cap's layers."""
        return tuple(layer.name for layer in self.cap_layers)

    @property
    def trunk_parameters(self) -> tuple[Tensor, ...]:
        """Parameters of the trunk, layer by layer."""
        return tuple(parameter for layer in self.trunk_layers for parameter in layer.parameters)

    @property
    def cap_parameters(self) -> tuple[Tensor, ...]:
        """Parameters of the cap, layer by layer."""
        return tuple(parameter for layer in self.cap_layers for parameter in layer.parameters)

    def __str__(self) -> str:
        """A table: a line for each layer, a total for each role and for both.

        Layers that repeat each other in three or more numbered blocks share a line. ``state bytes`` is what the
        optimizer keeps once every parameter has stepped ("-" where no optimizer was asked), ``AdamW bytes`` what
        ``torch.optim.AdamW`` would keep. ``lr`` and ``decay`` are shown where they differ.
        """
        return str(self._table)

    def _repr_html_(self) -> str:
        """The same in notebooks, roles in colour; a line of several layers unfolds to their names."""
        return as_html(self._table)

    @property
    def _table(self) -> Table:
        return table_of(self.trunk_layers, self.cap_layers, amsgrad=self.amsgrad, moved=self.moved)


def split(
    layers: Layers,
    *,
    last_n_layers: int = 1,
    cap: Selector | None = None,
    trunk_takes: Callable[[Tensor], bool] | None = None,
) -> STACPartition:
    """Split layers that were found already.

    Args:
        layers: what :func:`find_layers` found.
        last_n_layers: see :func:`partition_trainable_layers`.
        cap: likewise.
        trunk_takes: whether the trunk's rule can take a parameter; those that it cannot go to the cap. None: it takes
            all.
    """
    cap = _cap_selector(last_n_layers, cap)
    chosen = cap.select(layers) if cap is not None else frozenset()
    moved = tuple(
        name
        for name, parameter in layers.named_parameters
        if name not in chosen and trunk_takes is not None and not trunk_takes(parameter)
    )
    in_cap = chosen.union(moved)
    if cap is not None:
        _warn_of_tied_end(layers, cap, in_cap)
        _warn_of_frozen_end(layers, cap, in_cap)
        _warn_of_adapters(layers, cap, in_cap)
    in_trunk = {name for name, _ in layers.named_parameters} - in_cap
    return STACPartition(trunk_layers=_parts(layers, in_trunk), cap_layers=_parts(layers, in_cap), moved=moved)


def _cap_selector(last_n_layers: int, cap: Selector | None) -> Selector | None:
    """The selector of the cap; None where everything is trunk."""
    last_n_layers = count("last_n_layers", last_n_layers)
    if cap is None:
        return last_layers(last_n_layers) if last_n_layers else None
    if not isinstance(cap, Selector):
        raise TypeError(
            f"cap must be a selector, such as named('lm_head'), or None, got {cap!r} of type {type(cap).__name__}"
            f"{in_place_of(cap)}"
        )
    if last_n_layers != 1:
        raise ValueError(
            f"last_n_layers must be left out beside cap, which replaces it, got last_n_layers={last_n_layers} and "
            f"cap={cap!r}; a selector counts from the end with last_layers(n)"
        )
    return cap


def _warn_of_tied_end(layers: Layers, cap: Selector, in_cap: Container[str]) -> None:
    """Warn where a cap counts from the end, and the weight that works there is an earlier layer's and in the trunk."""
    tied = layers.tied_end
    if tied is None or not cap.from_end or tied.owner in in_cap:
        return
    last = layers.names[-cap.from_end :]
    now = "layer is" if len(last) == 1 else f"{len(last)} layers are"
    warn(
        f"{tied.name!r} is tied to {tied.owner!r}, so {tied.layer!r} has no parameters of its own and the last {now} "
        f"now {listed(last, 8)}. To have the tied weight in the cap, write "
        f"cap=named({escape(layer_of(tied.owner))!r}) | norms()"
    )


def _warn_of_frozen_end(layers: Layers, cap: Selector, in_cap: Container[str]) -> None:
    """Warn where a cap counts from the end, and finds only what is frozen, while the trunk trains."""
    trains = {name in in_cap for name, parameter in layers.named_parameters if parameter.requires_grad}
    if cap.from_end and trains == {False}:
        last = listed(layers.names[-cap.from_end :], 8)
        warn(
            f"the cap has frozen layers alone ({last}), so it updates nothing before they are unfrozen: include_frozen="
            "True counts frozen layers among the last ones, for unfreezing must move no layer to the other role. To "
            "have layers that train in the cap, name them: cap=named(...)"
        )


def _warn_of_adapters(layers: Layers, cap: Selector, in_cap: Container[str]) -> None:
    """Warn where a cap counts from the end of a model that ends in adapters, of which it then has some by chance."""
    found = ADAPTER.search(layers.names[-1]) if cap.from_end else None
    if found is None:
        return
    kind = found.group(1)
    of_kind = [layer for layer in layers.layers if kind in layer.name.split(".")]
    held = [layer.name for layer in of_kind if layer.parameter_names[0] in in_cap]
    if len(held) < len(of_kind):
        warn(
            f"the model ends in adapters, and no layer that is its head trains: the cap has {listed(held, 2)}, "
            f"{len(held)} of {len(of_kind)} layers {kind!r}, only because it comes last. To have all of them in the "
            f"cap, write cap=named('*.{kind}'), of a recipe also_cap=named('*.{kind}'); to have none, last_n_layers=0"
        )


def _parts(layers: Layers, names: Container[str]) -> tuple[STACLayer, ...]:
    """The layers with those of their parameters that have these names, without layers that have none."""
    parts = []
    for layer in layers.layers:
        pairs = zip(layer.parameter_names, layer.parameters, strict=True)
        kept = [(name, parameter) for name, parameter in pairs if name in names]
        if kept:
            own_names, parameters = zip(*kept, strict=True)
            parts.append(replace(layer, parameter_names=own_names, parameters=parameters))
    return tuple(parts)


def partition_trainable_layers(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    last_n_layers: int = 1,
    cap: Selector | None = None,
    include_frozen: bool = False,
) -> STACPartition:
    """Split the layers of a model into trunk and cap, as :class:`STAC` does where its trunk takes every parameter.

    A layer is a module that directly owns trainable parameters, in the order of ``model.named_modules()``. A shared
    parameter belongs to its first owner, a parametrized one (weight norm, spectral norm) to the module that it is
    parametrized for, parameters of the model itself form the layer ``"<root>"``. Names never carry the prefixes of
    wrappers (DDP, ``torch.compile``, checkpoint wrappers); where only names are given, a leading ``module.`` stays, as
    a user's own submodule may be called so.

    Args:
        model: a module, or (name, parameter) pairs as ``model.named_parameters()`` gives, which are split exactly as
            the module would be.
        last_n_layers: how many final layers form the cap, in [0, inf), default 1; 0: all trunk; more than there are:
            all cap. Beside ``cap`` it must be left out.
        cap: a selector that replaces ``last_n_layers``, default None. It may choose part of a layer, which then stands
            in both roles.
        include_frozen: keep parameters that do not require gradients, default False. Layers of frozen ones then count
            as any other, so that unfreezing moves none to the other role.

    Raises:
        TypeError: an argument of the wrong type, or parameters without names.
        ValueError: nothing is trainable, a negative ``last_n_layers``, one beside ``cap``, or a selector that matches
            nothing.

    Warns:
        UserWarning: the cap counts from the end, and the model ends in a tied head whose weight is in the trunk, in
            frozen layers alone, or in adapters.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import norms, last_layers, partition_trainable_layers
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> partition_trainable_layers(model, cap=norms() | last_layers(1)).cap_layer_names
        ('1', '2')
    """
    return split(find_layers(model, include_frozen=include_frozen), last_n_layers=last_n_layers, cap=cap)
