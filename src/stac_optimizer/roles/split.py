"""From what STAC is given to the plans of its groups: a model is split, dicts say their role themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stac_optimizer.model.layers import Layers, find_layers
from stac_optimizer.model.partition import split
from stac_optimizer.model.refusals import kind_of_model
from stac_optimizer.model.selectors import Selector, untied_embeddings
from stac_optimizer.roles.overrides import checked_overrides
from stac_optimizer.roles.plan import GroupPlan, planned, planned_as_given
from stac_optimizer.rule import Group, Rule
from stac_optimizer.validation import count, warn

__all__ = ["as_given", "plans_of", "warn_of_embeddings", "without_arguments"]


EMBEDDING_TYPES = ("Embedding", "EmbeddingBag")


def as_given(model: Any) -> Any:
    """A module as it is, and what else STAC takes as a list.

    Raises:
        TypeError: neither a module nor an ordered iterable.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, Tensor | str | set | frozenset) or not isinstance(model, Iterable):
        raise TypeError(f"model must be a module, named parameters or group dicts, got {kind_of_model(model)}")
    if isinstance(model, Mapping):
        one = "one group dict: put it in a list, [group]" if "params" in model else kind_of_model(model)
        raise TypeError(f"model must be a module, named parameters or group dicts with a stac_role, got {one}")
    return list(model)


def without_arguments(model: Any, arguments: Mapping[str, Any]) -> Any:
    """Group dicts without what repeats STAC's own arguments: ZeroRedundancyOptimizer writes all of them into groups.

    Args:
        model: what :func:`as_given` returned.
        arguments: STAC's by name, those that one role's own rule reads.
    """

    def is_repeated(key: str, value: Any) -> bool:
        argument = arguments.get(key, is_repeated)
        return value is argument or (
            type(value) is type(argument) and not isinstance(value, Tensor) and value == argument
        )

    if not (isinstance(model, list) and all(isinstance(group, Mapping) for group in model)):
        return model
    return [{key: value for key, value in group.items() if not is_repeated(key, value)} for group in model]


def plans_of(
    model: Any,
    overrides: Any,
    *,
    last_n_layers: int,
    cap: Selector | None,
    include_frozen: bool,
    trunk_takes: Callable[[Tensor], bool],
    trunk_only: Collection[str],
) -> tuple[list[GroupPlan], Layers | None, tuple[str, ...]]:
    """The groups that STAC's arguments ask for, the layers, where there are any, and what went to the cap by itself.

    Args:
        model: what :func:`as_given` returned.
        overrides: see :class:`stac_optimizer.STAC`; so for the others.
        last_n_layers: how many layers form the cap.
        cap: the selector of the cap.
        include_frozen: whether to keep frozen parameters.
        trunk_takes: whether what updates the trunk can update a parameter; others go to the cap.
        trunk_only: keys of overrides that only what updates the trunk reads.
    """
    last_n_layers = count("last_n_layers", last_n_layers)
    checked = checked_overrides(overrides)
    if isinstance(model, list) and model and isinstance(model[0], Mapping):
        chosen: dict[str, tuple[Any, Any]] = {
            "cap": (cap, None),
            "last_n_layers": (last_n_layers, 1),
            "overrides": (checked, []),
        }
        for name, (value, default) in chosen.items():
            if value is not default and value != default:
                raise ValueError(
                    f"{name} chooses layers of a model, got {value!r} beside groups that name their stac_role; leave "
                    "it out and say it in the groups, or pass the model in place of groups"
                )
        return planned_as_given(model), None, ()
    layers = find_layers(model, include_frozen=include_frozen)
    partition = split(layers, last_n_layers=last_n_layers, cap=cap, trunk_takes=trunk_takes)
    return planned(layers, partition, checked, trunk_only), layers, partition.moved


def warn_of_embeddings(
    layers: Layers | None, groups: Sequence[Group], rules: Mapping[str, Rule], *, is_own: bool
) -> None:
    """Warn of embeddings in a trunk whose weights walk on without a gradient; tied ones have gradients everywhere.

    Args:
        layers: of the model; None where only groups are known.
        groups: all groups.
        rules: by the name that groups hold.
        is_own: whether the trunk has STAC's own rule.
    """
    walking = [g for g in groups if g["stac_role"] == "trunk" and rules[g["rule"]].walks_on(g)]
    if layers is None:  # what groups say of themselves
        typed = [pair for group in walking for pair in zip(group["layer_names"], group["layer_types"], strict=True)]
        found = [name for name, kind in typed if kind in EMBEDDING_TYPES]
    else:
        untied = untied_embeddings(layers) & {name for group in walking for name in group["param_names"]}
        found = [layer.name for layer in layers.layers if untied.intersection(layer.parameter_names)]
    if found:
        what = "the embedding" if len(found) == 1 else "the embeddings"
        warn(
            f"the trunk holds {what} {', '.join(map(repr, found))}: rows that a batch does not use, of absent tokens "
            "or positions, keep moving by the full lr, for the sign of their average outlives their gradient. Pass "
            f"{'trunk_cautious=True' if is_own else 'cautious=True in trunk_optimizer'}, or put embeddings in the cap "
            "with cap=last_layers(1) | embeddings()"
        )
