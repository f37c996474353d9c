"""The contract of a rule, by rules that exist here alone: what they declare is what is made, asked and refused."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC, last_layers
from stac_optimizer.optim import AdamW, Lion, Muon, Signum
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import (
    COUNTER,
    Group,
    Hyperparameter,
    Rule,
    StateLists,
    StateTensor,
    TensorList,
    Wholes,
)
from stac_optimizer.validation import unit_fraction
from tests.support import assert_same_bits, set_gradients, small_model, snapshot, take_steps, through_file


class ScaledRule(Rule):
    """State of many kinds: a scalar that starts at 2, and for matrices alone a value for each row."""

    name = "scaled"
    needs: ClassVar[Literal["elements", "tensor", "matrix"]] = "tensor"
    lr_ratio = 0.5
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "decline": Hyperparameter(default=0.5, check=unit_fraction)
    }
    state_keys = ("step", "weight", "rows")

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        weight = StateTensor(key="weight", shape=(), dtype=torch.float32, fill=2.0)
        rows = StateTensor(key="rows", shape=(param.shape[0], 1), dtype=torch.float64) if param.ndim > 1 else None
        return (COUNTER, weight) if rows is None else (COUNTER, weight, rows)

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        """p <- p - lr * w * g / |g|_1, w <- decline * w; rows count what they have moved."""
        norms = wholes.sums([grad.abs().sum() for grad in grads])
        for index, (param, grad, norm, weight) in enumerate(zip(params, grads, norms, state["weight"], strict=True)):
            param.sub_(group["lr"] * weight * grad / norm)
            weight.mul_(group["decline"])
            if "rows" in state:
                state["rows"][index].add_(grad.flatten(1).sum(1, keepdim=True))


class Scaled(RuleOptimizer):
    rule = ScaledRule()

    def __init__(self, params: Any, lr: float = 1e-3, **values: Any) -> None:
        super().__init__(params, {"lr": lr, **values})


class MatrixRule(ScaledRule):
    """The same for matrices alone."""

    name = "matrix_alone"
    needs = "matrix"


class MatrixAlone(RuleOptimizer):
    rule = MatrixRule()

    def __init__(self, params: Any, lr: float = 1e-3, **values: Any) -> None:
        super().__init__(params, {"lr": lr, **values})


def test_state_is_made_as_declared_for_each_parameter() -> None:
    model = small_model()
    optimizer = Scaled(model.named_parameters(), lr=0.1)
    take_steps(model, optimizer, range(2))
    matrix, vector = (optimizer.state[model.get_parameter(f"0.{key}")] for key in ("weight", "bias"))
    assert sorted(vector) == ["step", "weight"]
    assert vector["weight"].shape == ()
    assert vector["weight"].item() == 0.5
    assert sorted(matrix) == ["rows", "step", "weight"]
    assert matrix["rows"].shape == (5, 1)
    assert matrix["rows"].dtype == torch.float64
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}


def test_update_gets_what_it_needs_in_every_form_of_parameter() -> None:
    real = torch.arange(1.0, 13.0).view(3, 4)
    grad = torch.arange(12.0).view(3, 4) - 5
    expected = real.double() - 0.1 * 2 * grad.double() / grad.double().abs().sum()
    for param, gradient, slack in (
        (real.clone(), grad, 1e-6),
        (real.t().contiguous().t(), grad, 1e-6),
        (real.double(), grad.double(), 1e-14),
        (real.bfloat16(), grad.bfloat16(), 4e-2),
    ):
        weight = nn.Parameter(param.clone(memory_format=torch.preserve_format))
        weight.grad = gradient.clone()
        before = weight.grad.clone()
        Scaled([weight], lr=0.1).step()
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=slack)
        assert torch.equal(weight.grad, before)


def test_norms_of_complex_numbers_are_of_two_reals() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    weight.grad = torch.tensor([3 - 1j, 0 + 4j])
    Scaled([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), -torch.tensor([3 - 1j, 0 + 4j]) / 8)


def test_lr_of_low_precision_loses_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = Scaled([weight], lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.bfloat16)
    optimizer.step()
    exact = 1 - torch.tensor(0.1, dtype=torch.bfloat16).double().item()
    torch.testing.assert_close(
        weight.detach().double(), torch.full((2,), exact, dtype=torch.float64), rtol=0, atol=1e-7
    )


def test_checkpoint_copy_and_pickle_of_a_rule_from_elsewhere_are_exact() -> None:
    model = small_model()
    optimizer = STAC(model, trunk_optimizer=Scaled, lr=0.1)
    take_steps(model, optimizer, range(2))
    weights, saved = through_file((model.state_dict(), optimizer.state_dict()))
    other = small_model()
    resumed = STAC(other, trunk_optimizer=Scaled, lr=0.1)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    runs: list[tuple[nn.Module, STAC]] = [(other, resumed), copy.deepcopy((model, optimizer))]
    runs.append(pickle.loads(pickle.dumps((model, optimizer))))
    take_steps(model, optimizer, range(4, 6))
    for run_model, run in runs:
        take_steps(run_model, run, range(4, 6))
        assert_same_bits(snapshot(run_model, run), snapshot(model, optimizer))


def test_role_starts_at_the_rules_share_of_the_lr_beside_another_role() -> None:
    assert [group["lr"] for group in STAC(small_model(), lr=0.1, trunk_optimizer=Scaled).param_groups] == [0.05, 0.1]
    (alone,) = STAC(small_model(), lr=0.1, trunk_optimizer=Scaled, last_n_layers=0).param_groups
    assert alone["lr"] == 0.1
    assert STAC(small_model(), trunk_lr=0.3, trunk_optimizer=Scaled).param_groups[0]["lr"] == 0.3


def test_defaults_of_two_rules_for_one_key_do_not_mix() -> None:
    optimizer = STAC(small_model(), trunk_optimizer=Lion)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.99), (0.9, 0.999)]
    assert STAC(small_model(), trunk_optimizer=Lion, betas=(0.5, 0.6)).param_groups[0]["betas"] == (0.9, 0.99)


def test_groups_hold_common_keys_betas_and_those_of_their_own_rule() -> None:
    trunk, cap = STAC(small_model(), trunk_optimizer=Scaled).param_groups
    assert "decline" in trunk
    assert "decline" not in cap
    assert "eps" in cap
    assert "eps" not in trunk
    assert not {"momentum", "cautious", "state_dtype", "vote"} & (trunk.keys() | cap.keys())
    assert "betas" in trunk


def test_vectors_of_a_matrix_rule_go_to_the_cap_and_the_table_says_so() -> None:
    model = small_model()
    optimizer = STAC(model, trunk_optimizer=MatrixAlone)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight"]
    assert optimizer.param_groups[1]["param_names"] == ["0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert "0" in optimizer.partition.trunk_layer_names
    assert "0" in optimizer.partition.cap_layer_names
    last = str(optimizer.partition).splitlines()[-1]
    assert "0.bias" in last
    assert "1.weight" in last
    take_steps(model, optimizer, range(2))


def test_vectors_are_refused_where_a_matrix_rule_must_take_them() -> None:
    model = small_model()
    with pytest.raises(
        ValueError, match=r"'0.bias' .matrix_alone. has 1 dimension, and matrix_alone updates whole matri"
    ):
        MatrixAlone(model.named_parameters())
    with pytest.raises(ValueError, match=r"'3.bias' .cap. has 1 dimension"):
        STAC(model, cap_optimizer=MatrixAlone, cap=last_layers(1))


def test_parameter_that_was_flattened_after_construction_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    optimizer = MatrixAlone(model.named_parameters())
    flat = nn.Parameter(torch.ones(12))
    flat.grad = torch.ones(12)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(
        RuntimeError, match=r"has 1 dimension.*do not flatten parameters, as ZeRO and DeepSpeed do. Nothing was changed"
    ):
        optimizer.step()
    assert torch.equal(flat, torch.ones(12))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decline": 2.0}, ValueError, r"decline must be a number in \[0, 1\), got 2.0"),
        ({"declin": 0.5}, TypeError, "scaled has no argument 'declin'; did you mean 'decline'"),
        ({"foo": 0.5}, TypeError, "scaled has no argument 'foo'"),
        ({"fused": True, "foreach": True}, ValueError, "fused and foreach exclude each other"),
        ({"lr": float("nan")}, ValueError, "lr must be a finite number"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Scaled([nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, "pass model.parameters()"),
        ([], ValueError, "params holds no parameter"),
        ({nn.Parameter(torch.ones(2))}, TypeError, "ordered iterable"),
        (torch.ones(2), TypeError, "ordered iterable of parameters or dicts, got Tensor"),
        ([1.0], TypeError, "must be a parameter or a"),
        ([{"lr": 1.0}], ValueError, "group 0: params is missing"),
        ([{"params": [torch.ones(2)], "decln": 1.0}], ValueError, "did you mean 'decline'"),
    ],
)
def test_parameters_that_cannot_be_are_refused(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Scaled(params)


@pytest.mark.parametrize("kind", [Signum, AdamW, Lion, Muon])
def test_every_hyperparameter_is_an_argument_of_its_class(kind: type[RuleOptimizer]) -> None:
    known = set(inspect.signature(kind).parameters)
    assert {"lr", "weight_decay", *kind.rule.hyperparameters} <= known


def test_keys_of_frameworks_pass() -> None:
    optimizer = Scaled([{"params": [nn.Parameter(torch.ones(2))], "lr_scale": 0.5, "is_expert": True}])
    assert optimizer.param_groups[0]["lr_scale"] == 0.5
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["is_expert"] is True


def test_gradients_are_released_by_any_rule() -> None:
    model, twin = small_model(), small_model()
    optimizer, other = Scaled(model.parameters(), lr=0.1), Scaled(twin.parameters(), lr=0.1)
    batch = torch.ones(4, 6)
    with optimizer.release_gradients(model):
        for _ in range(2):
            model(batch).sum().backward()
            optimizer.step()
    for _ in range(2):
        other.zero_grad()
        twin(batch).sum().backward()
        other.step()
    assert_same_bits(snapshot(model, optimizer), snapshot(twin, other))


def test_rule_without_update_or_step_says_so() -> None:
    class Empty(Rule):
        name = "empty"
        state_keys = ("step",)

        def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
            return (COUNTER,)

    class EmptyOptimizer(RuleOptimizer):
        rule = Empty()

    weight = nn.Parameter(torch.ones(2))
    set_gradients(nn.ParameterList([weight]), 0)
    with pytest.raises(TypeError, match="Empty has neither update nor a step"):
        EmptyOptimizer([weight], {}).step()
