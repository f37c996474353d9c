"""What tests of wrappers share: bases, wrappers around them, runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stac_optimizer import STAC, optim
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.wrappers import Lookahead, Scout, mechanize
from tests.roles.guests import CLASSES
from tests.support import assert_same_bits, set_gradients, small_model, snapshot, through_file

__all__ = ["BASES", "WRAPPERS", "Run", "assert_go_on_alike", "built", "loaded", "stepped", "takes"]

Run = tuple[nn.Module, Any]
Make = Callable[[Any], Any]


def takes(kind: type[Optimizer], model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a class can update: Muons take matrices alone."""
    only_matrices = kind.__name__ == "Muon"
    return [param for param in model.parameters() if param.ndim == 2 or not only_matrices]


def _of_class(kind: type[Optimizer], **values: Any) -> Callable[[nn.Module, Make], Any]:
    """Makes an optimizer of the class, by another class in its place where one is given."""
    return lambda model, make: make(kind)(takes(kind, model), **values)


def _parts(function: Any) -> tuple[Any, dict[str, Any]]:
    """The class, and what is written beside it."""
    return getattr(function, "func", function), getattr(function, "keywords", {})


def _optim() -> dict[str, type[Optimizer]]:
    found = {name: getattr(optim, name) for name in optim.__all__}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, RuleOptimizer)}


BASES: dict[str, Callable[[nn.Module, Make], Any]] = {
    "STAC": lambda model, make: make(STAC)(model, lr=1e-2, weight_decay=0.1),
    "STAC-int8": lambda model, make: make(STAC)(model, lr=1e-2, trunk_state_dtype=torch.int8),
    "STAC-guest": lambda model, make: make(STAC)(model, lr=1e-2, trunk_optimizer=torch.optim.NAdam),
    **{f"optim.{name}": _of_class(kind, lr=1e-2) for name, kind in _optim().items()},
    **{
        name: _of_class(kind, **{"lr": 1e-2, **written})
        for name, (kind, written) in ((name, _parts(function)) for name, function in CLASSES.items())
    },
}
"""By name what makes an optimizer of a model, of what ``make`` makes of its class."""

WRAPPERS: dict[str, Callable[[Callable[[nn.Module, Make], Any], nn.Module], Any]] = {
    "Lookahead": lambda base, model: Lookahead(base(model, _as_it_is), sync_period=3),
    "Scout": lambda base, model: Scout(base(model, _as_it_is), sync_rate=0.1, sync_period=3),
    "mechanize": lambda base, model: base(model, _mechanized),
    "mechanize-store-delta": lambda base, model: base(model, _mechanized_with_reference),
    "Lookahead-mechanize": lambda base, model: Lookahead(base(model, _mechanized), 0.3, 2),
}


def _as_it_is(kind: Any) -> Any:
    return kind


# A scale that moves weights from the first steps on.
def _mechanized(kind: Any) -> Any:
    return mechanize(kind, s_init=0.3)


def _mechanized_with_reference(kind: Any) -> Any:
    return mechanize(kind, s_init=0.3, store_delta=True)


def built(wrapper: str, base: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Run:
    """A small model with a wrapper around an optimizer of it."""
    model = small_model(seed, dtype)
    return model, WRAPPERS[wrapper](BASES[base], model)


def stepped(run: Run, seeds: Iterable[int], **skipped: Any) -> Run:
    """The run after a step for each seed."""
    model, optimizer = run
    for seed in seeds:
        set_gradients(model, seed, **skipped)
        optimizer.step()
    return run


def loaded(target: Run, source: Run) -> Run:
    """The target, once it has loaded the source's checkpoint through a file."""
    weights, state = through_file((source[0].state_dict(), source[1].state_dict()))
    target[0].load_state_dict(weights)
    target[1].load_state_dict(state)
    return target


def assert_go_on_alike(one: Run, other: Run, steps: int = 4) -> None:
    """Weights and state are the same to the bit, now and after some steps."""
    for seed in range(100, 100 + steps + 1):
        assert_same_bits(snapshot(*one), snapshot(*other))
        for run in (one, other):
            stepped(run, [seed])
