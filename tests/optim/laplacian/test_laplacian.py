"""Rules with a Laplacian beyond the table of rules: fields, floors, lr 0, derivatives, shards, advice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC, embeddings, last_layers, optim
from stac_optimizer.optim import LAdaGrad, LAdam, LRMSProp, WaveAdam
from stac_optimizer.optim.laplacian import laplacian_overrides, stencil, suggest_c2
from stac_optimizer.optimizer import RuleOptimizer
from tests.optim.comparisons import as_array, assert_traced_equals_eager
from tests.optim.laplacian import reference
from tests.optim.laplacian.cases import LAPLACIAN
from tests.ranks import run_ranks
from tests.rule_case import RuleCase
from tests.rule_cases import random_gradients, step_with, zoo
from tests.sharded import Gradients, full, shard_each, shard_in_part
from tests.support import assert_same_bits, set_units, wide_model

each_case = pytest.mark.parametrize("case", LAPLACIAN, ids=lambda case: case.name)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("points", ["9point", "5point"])
@pytest.mark.parametrize("rows_numel", [1, 20, 1 << 30])
def test_tensors_are_fields_of_first_and_rest(points: str, rows_numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are worked on at once."""
    monkeypatch.setattr(stencil, "ROWS_NUMEL", rows_numel)
    shapes = [(5, 7), (5, 7), (4, 2, 3), (3, 6), (9,), (4,), (3,), (2, 9), (9, 2), (), (0, 3), (4, 7)]
    tensors = [randn(*shape, dtype=torch.float64) for shape in shapes]
    hyper = {"c2": 0.1, "stencil": points, "min_spatial_size": 4}
    expected = [reference.with_laplacian(as_array(tensor), hyper) for tensor in tensors]
    stencil.diffused_wholes(tensors, 0.1, points, 4)
    for tensor, field in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, torch.from_numpy(field), rtol=1e-14, atol=1e-14)


@each_case
def test_parts_of_complex_numbers_are_fields_of_their_own(case: RuleCase) -> None:
    numbers = nn.Parameter(randn(6, 8, dtype=torch.complex64)[:, ::2])
    parts = [nn.Parameter(part.clone()) for part in torch.view_as_real(numbers.detach()).unbind(-1)]
    held = {"real": parts[0], "imaginary": parts[1]}
    optimizer, other = case.optimizer({"w": numbers}, "foreach"), case.optimizer(held, "foreach")
    for seed in range(3):
        gradients = random_gradients({"w": numbers}, seed)
        whole = gradients["w"]
        assert whole is not None
        step_with(optimizer, {"w": numbers}, gradients)
        step_with(other, held, {"real": whole.real.clone(), "imaginary": whole.imag.clone()})
    assert_same_bits(torch.view_as_real(numbers.detach()), torch.stack(list(parts), dim=-1).detach())


@each_case
def test_large_tensors_step_alike_however_they_are_cut(case: RuleCase, monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped() -> Any:
        params = zoo(torch.float32)
        optimizer = case.optimizer(params, "single")
        step_with(optimizer, params, random_gradients(params, 0))
        return [param.detach() for param in params.values()], [dict(optimizer.state[p]) for p in params.values()]

    whole = stepped()
    set_units(monkeypatch, block=8)
    monkeypatch.setattr(stencil, "ROWS_NUMEL", 10)
    assert_same_bits(stepped(), whole)


@pytest.mark.parametrize(
    ("kind", "share"), [(partial(LAdam, betas=(0.9, 0.99)), 1.0), (LAdaGrad, 1.0), (partial(LRMSProp, alpha=0.75), 2.0)]
)
def test_tiny_gradients_step_as_far_as_others(kind: Any, share: float) -> None:
    """Second moments of 1e-24 diffuse to about as much, and are not floored."""
    weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    weight.grad = torch.full_like(weight, 1e-12)
    kind([weight], lr=0.01, c2=1e-4, eps=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, -0.01 * share), rtol=1e-9, atol=0.0)


def test_second_moments_end_at_0_where_much_flows_off() -> None:
    """Beyond c2 = 0.3 a lone value gives more than it has."""
    weight = nn.Parameter(torch.zeros(4, 4))
    weight.grad = torch.zeros(4, 4)
    weight.grad[1, 1] = 1.0
    LAdam([weight], lr=1e-9, c2=0.5, eps=1e-8).step()
    assert weight[1, 1].item() == pytest.approx(-0.1)  # lr / eps


def test_weights_diffuse_without_lr_and_nothing_else_moves_them() -> None:
    """But not in the step that makes state, of zero gradients."""
    start = randn(6, 6)
    moved = reference.with_laplacian(as_array(start), {"c2": 0.1, "stencil": "9point", "min_spatial_size": 16})
    for mode in ("variance_lap", "update_lap", "weight_lap"):
        weight = nn.Parameter(start.clone())
        optimizer = LAdam([weight], lr=0.0, weight_decay=0.1, c2=0.1, mode=mode)
        step_with(optimizer, {"w": weight}, {"w": torch.zeros(6, 6)})
        assert_same_bits(weight.detach(), start)
        step_with(optimizer, {"w": weight}, {"w": torch.ones(6, 6)})
        if mode == "weight_lap":
            torch.testing.assert_close(weight.detach(), torch.from_numpy(moved).float(), rtol=1e-6, atol=1e-7)
        else:
            assert_same_bits(weight.detach(), start)


def test_even_weights_stay_even() -> None:
    weight = nn.Parameter(torch.full((64, 64), 0.3))
    weight.grad = torch.ones_like(weight)
    optimizer = LAdam([weight], lr=0.0, c2=1e-2, mode="weight_lap")
    for _ in range(100):
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((64, 64), 0.3), rtol=2e-7, atol=0.0)


def test_coupling_that_begins_later_takes_effect() -> None:
    """The step asks the group, and no state."""
    runs = []
    for first in (0.0, 0.1):
        weight = nn.Parameter(torch.zeros(4, 4))
        optimizer = LAdam([weight], c2=first)
        for seed, c2 in enumerate((first, 0.1)):
            optimizer.param_groups[0]["c2"] = c2
            before = weight.detach().clone()
            step_with(optimizer, {"w": weight}, random_gradients({"w": weight}, seed))
        runs.append(weight.detach() - before)
    torch.testing.assert_close(runs[0], runs[1])


@each_case
def test_derivatives_of_a_step(case: RuleCase) -> None:
    """By what comes back through the step, against differences."""

    def stepped(start: Tensor, source: Tensor, lr: Tensor) -> Tensor:
        weight = start.clone()
        weight.grad = 2 * source
        case.optimizer({"w": weight}, "single", lr=lr, differentiable=True).step()
        return weight

    inputs = randn(5, 4, dtype=torch.float64), randn(5, 4, dtype=torch.float64).flip(0), torch.tensor(0.01).double()
    assert torch.autograd.gradcheck(stepped, [tensor.requires_grad_() for tensor in inputs], atol=1e-4)


# torch 2.6 warns of its own configuration while it logs what it compiles.
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")
@pytest.mark.parametrize("name", ["ladam-default", "ladam-weight"])
def test_compiled_step_agrees(name: str) -> None:
    """Not by bits: corrections of the bias are then computed of counters in float32."""
    case = next(case for case in LAPLACIAN if case.name == name)
    eager, traced = ({"w": nn.Parameter(randn(6, 6)), "b": nn.Parameter(randn(20))} for _ in range(2))
    held = (eager, case.optimizer(eager, "foreach")), (traced, case.optimizer(traced, "foreach"))
    assert_traced_equals_eager(*held, by_bits=False)


def weights_after(case: RuleCase, model: nn.Module) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    gradients, optimizer = Gradients(model), case.optimizer(params, "foreach")
    for seed in range(3):
        gradients.set(seed)
        optimizer.step()
    return {name: full(param.detach()) for name, param in params.items()}


def assert_shards_step_as_whole() -> None:
    """On one rank: rows over ranks by FSDP2, plain parameters beside them."""
    for case in LAPLACIAN:
        whole = weights_after(case, wide_model())
        for shard in (shard_each, shard_in_part):
            model = wide_model()
            shard(model)
            torch.testing.assert_close(weights_after(case, model), whole, rtol=1e-6, atol=1e-7)


def test_shards_step_as_whole_ones() -> None:
    run_ranks(assert_shards_step_as_whole, 2, timeout=120.0)


def test_roles_of_different_coupling() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    optimizer = STAC(
        model, trunk_optimizer=partial(WaveAdam, c2=1e-5), cap_optimizer=partial(LAdam, mode="weight_lap", c2=1e-3)
    )
    found = [(group["rule"], group["c2"], group["mode"]) for group in optimizer.param_groups]
    assert found == [("ladam", 1e-5, "variance_lap"), ("ladam", 1e-3, "weight_lap")]
    assert isinstance(optimizer, RuleOptimizer)
    assert optim.WaveAdam is optim.LAdam


def test_overrides_choose_linear_weights_outside_attention() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 8),
        nn.TransformerEncoderLayer(8, 2, 16),
        nn.Conv1d(8, 8, 3),
        nn.LayerNorm((4, 4)),
        nn.Linear(8, 9),
    )

    def coupled(optimizer: STAC) -> set[str]:
        return {name for group in optimizer.param_groups if group.get("c2") for name in group["param_names"]}

    trunk = partial(LAdam, c2=0.0)
    assert coupled(STAC(model, trunk_optimizer=trunk, overrides=laplacian_overrides())) == {
        "1.linear1.weight",
        "1.linear2.weight",
    }
    everywhere = STAC(model, trunk_optimizer=trunk, last_n_layers=0, overrides=laplacian_overrides(None, c2=1e-3))
    assert coupled(everywhere) == {"1.linear1.weight", "1.linear2.weight", "4.weight"}
    cap = embeddings() | last_layers(2)
    assert len(coupled(STAC(model, trunk_optimizer=trunk, cap=cap, overrides=laplacian_overrides(cap)))) == 2
    with pytest.raises(ValueError, match="leave the overrides out"):
        STAC(nn.Conv1d(4, 4, 3), trunk_optimizer=trunk, last_n_layers=0, overrides=laplacian_overrides(None))


def test_bad_advice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"architecture must be one of 'auto', .*'resnet'"):
        suggest_c2("resnet")
    wrong: Any = 3
    with pytest.raises(TypeError, match="architecture must be a string, got 3"):
        suggest_c2(wrong)
    with pytest.raises(TypeError, match="cap must be a selector or None, got 3"):
        laplacian_overrides(wrong)
    with pytest.raises(ValueError, match="c2 must be"):
        laplacian_overrides(c2=-1.0)
