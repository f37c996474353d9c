"""Words by which users of older versions know a message, and may look for it: they stay, in every class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from stac_optimizer import STAC, vectors
from stac_optimizer.optim import AdamW, Lion, Signum
from tests.support import set_gradients, small_model


def _of_parameters(kind: Any, model: nn.Module, **arguments: Any) -> Optimizer:
    optimizer: Optimizer = kind(model.parameters(), **arguments)
    return optimizer


CLASSES: dict[str, Callable[..., Optimizer]] = {
    "STAC": STAC,
    "all cap": partial(STAC, last_n_layers=9),
    "Lion in the trunk": partial(STAC, trunk_optimizer=Lion),
    "foreign trunk": partial(STAC, trunk_optimizer=torch.optim.Adam),
    **{kind.__name__: partial(_of_parameters, kind) for kind in (Signum, AdamW, Lion)},
}
each_class = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


@each_class
def test_nothing_to_train(make: Callable[..., Optimizer]) -> None:
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        make(nn.Tanh())


@each_class
@pytest.mark.parametrize("asks_for_finite", [False, True])
def test_sparse_gradient(make: Callable[..., Optimizer], asks_for_finite: bool) -> None:
    model = small_model()
    optimizer = make(model, error_if_nonfinite=asks_for_finite) if asks_for_finite else make(model)
    set_gradients(model, 0)
    weight = model.get_parameter("3.weight")
    weight.grad = torch.ones_like(weight).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


@each_class
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "3.bias"])
def test_nonfinite_gradient(make: Callable[..., Optimizer], value: float, name: str) -> None:
    model = small_model()
    optimizer = make(model, error_if_nonfinite=True)
    set_gradients(model, 0)
    model.get_parameter(name).grad.fill_(value)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="non-finite gradients"):
        optimizer.step()


@each_class
def test_checkpoint_of_other_groups(make: Callable[..., Optimizer]) -> None:
    weights, rest = ([p for p in small_model().parameters() if (p.dim() > 1) is wide] for wide in (True, False))
    optimizer = make(small_model())
    for saved in (
        AdamW([{"params": [param]} for param in (*weights, *rest)]),
        STAC(small_model(), cap=vectors()),
        STAC(small_model(), last_n_layers=2, overrides=[(vectors(), {"lr": 0.1})]),
    ):
        with pytest.raises(ValueError, match="parameter groups"):
            optimizer.load_state_dict(saved.state_dict())


def test_group_without_a_role() -> None:
    for make in CLASSES.values():
        optimizer = make(small_model())
        if isinstance(optimizer, STAC):
            with pytest.raises(RuntimeError, match="does not support add_param_group"):
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
