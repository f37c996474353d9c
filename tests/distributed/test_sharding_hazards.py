"""Sharded weights: gradients that lie otherwise than they, NaN that one rank alone sees, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from stac_optimizer import STAC
from stac_optimizer.distributed import shards
from tests.ranks import run_ranks
from tests.sharded import Gradients, distributed, full, shard_each, shard_in_part
from tests.support import assert_same_bits, same_bits, set_gradients, small_model, wide_model


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _sharded(make: Any = small_model, **arguments: Any) -> tuple[nn.Module, STAC, nn.Module]:
    """A sharded model, its optimizer, and a whole twin."""
    model, twin = make(), make()
    shard_each(model)
    return model, STAC(model, **{"lr": 1e-2, **arguments}), twin


def _placed(grad: Tensor, kind: str) -> Tensor:
    """A whole gradient as a DTensor of this kind."""
    mesh = _mesh()
    placement: Placement = Partial() if kind == "partial" else Replicate()
    if kind == "partial":
        # What ranks hold adds up without rounding.
        share = grad if dist.get_rank() == 0 else torch.zeros_like(grad)
        return DTensor.from_local(share, mesh, [placement], run_check=False)
    if kind == "other-dimension":
        return distributed(grad, mesh, [Shard(grad.ndim - 1)])
    if kind == "waiting":
        share = grad if dist.get_rank() == 0 else torch.zeros_like(grad)
        waiting = all_reduce(share, "sum", mesh)
        assert isinstance(waiting, AsyncCollectiveTensor)
        return DTensor.from_local(waiting, mesh, [placement], run_check=False)
    return DTensor.from_local(grad, mesh, [placement], run_check=False)


def _step_on_gradients_placed(kind: str, arguments: dict[str, Any]) -> None:
    model, optimizer, twin = _sharded(**arguments)
    of_twin = STAC(twin, **{"lr": 1e-2, **arguments})
    for seed in range(5):
        set_gradients(twin, seed)
        for param, whole in zip(model.parameters(), twin.parameters(), strict=True):
            assert whole.grad is not None
            param.grad = _placed(whole.grad, kind)
        optimizer.step()
        of_twin.step()
    for param, whole in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(full(param), whole)


@pytest.mark.parametrize("kind", ["replicated", "partial", "other-dimension", "waiting"])
@pytest.mark.parametrize(
    "arguments", [{}, {"trunk_cautious": True, "error_if_nonfinite": True}], ids=["default", "asking"]
)
def test_gradient_is_brought_to_where_its_weight_lies(kind: str, arguments: dict[str, Any]) -> None:
    run_ranks(_step_on_gradients_placed, 2, kind, arguments)


def _wait_for_plain_results() -> None:
    waiting = all_reduce(torch.ones(3), "sum", _mesh())
    assert isinstance(waiting, AsyncCollectiveTensor)
    (local,) = shards.local_views([waiting])
    assert type(local) is Tensor
    assert_same_bits(local, torch.full((3,), 2.0))
    sharded = DTensor.from_local(all_reduce(torch.ones(3), "sum", _mesh()), _mesh(), [Shard(0)], run_check=False)
    (local,) = shards.local_views([sharded])
    assert type(local) is Tensor


def test_asynchronous_results_are_waited_for() -> None:
    run_ranks(_wait_for_plain_results, 2)


def _bad_value_on_one_rank(where: str, value: float) -> None:
    """The bad value is the last element of a weight, so on the last rank alone, or in a plain parameter of rank 1."""
    model = wide_model()
    shard_in_part(model)
    optimizer = STAC(model, lr=1e-2, error_if_nonfinite=True)
    Gradients(model).set(0)
    optimizer.step()
    Gradients(model).set(1)
    grad = model.get_parameter(where).grad
    assert isinstance(grad, Tensor)
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    if dist.get_rank() == 1:
        local.view(-1)[-1] = value
    before = [full(tensor).clone() for tensor in _all_tensors(model, optimizer)]
    with pytest.raises(
        RuntimeError, match=rf"non-finite gradients: that of '{where}' .* holds NaN or infinity. Nothing was changed"
    ):
        optimizer.step()
    assert_same_bits([full(tensor) for tensor in _all_tensors(model, optimizer)], before)
    dist.barrier()


def _all_tensors(model: nn.Module, optimizer: STAC) -> list[Tensor]:
    return [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("where", ["0.weight", "1.weight", "3.bias"])
def test_bad_gradient_on_one_rank_raises_on_every_rank(where: str, value: float) -> None:
    run_ranks(_bad_value_on_one_rank, 2, where, value)


def _sum_that_overflows() -> None:
    """Finite on every rank, infinite as a sum."""
    model, optimizer, _ = _sharded(error_if_nonfinite=True)
    for param in model.parameters():
        huge = torch.full(param.shape, 3e38)
        param.grad = DTensor.from_local(huge, _mesh(), [Partial()], run_check=False)
    with pytest.raises(RuntimeError, match=r"'0.weight' .* holds NaN or infinity"):
        optimizer.step()


def test_partial_gradients_are_judged_by_their_sum() -> None:
    run_ranks(_sum_that_overflows, 2)


def _refuse_mixed() -> None:
    model, optimizer, _ = _sharded()
    Gradients(model).set(0)
    before = [full(param).clone() for param in model.parameters()]
    model.get_parameter("3.bias").grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"'3.bias' .* is a DTensor and its gradient a plain tensor"):
        optimizer.step()
    assert_same_bits([full(param) for param in model.parameters()], before)


def test_plain_gradient_of_a_sharded_weight_is_refused() -> None:
    run_ranks(_refuse_mixed, 2)


def _scaled_step(fused: bool) -> None:
    model, optimizer, _ = _sharded(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for is_bad in (True, False):
        before = [full(param).clone() for param in model.parameters()]
        scaler.scale(torch.ones(()))  # as if of a loss
        Gradients(model).set(0)
        grad = model.get_parameter("0.weight").grad
        if is_bad and dist.get_rank() == 1:
            assert isinstance(grad, DTensor)
            grad.to_local().view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for param, old in zip(model.parameters(), before, strict=True):
            assert same_bits(full(param), old) == is_bad
        assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("fused", [False, True], ids=["default", "fused"])
def test_scaler_that_finds_infinity_on_one_rank_skips_the_step_on_all(fused: bool) -> None:
    run_ranks(_scaled_step, 2, fused)
