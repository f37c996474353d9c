"""On a CUDA device: paths by bits, torch.optim.AdamW by bits, no synchronization, graphs, scaler, mixed devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import STAC
from stac_optimizer.optim import Muon
from tests.rule_cases import DTYPES, RULE_CASES, RuleCase, random_gradients, step_with, zoo
from tests.support import assert_same_bits, set_gradients, small_model

pytestmark = pytest.mark.cuda


def cuda_zoo(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(param.detach().cuda()) for name, param in zoo(dtype).items()}


def cuda_gradients(params: dict[str, nn.Parameter], seed: int) -> dict[str, Any]:
    cpu = {name: param.detach().cpu() for name, param in params.items()}
    return {name: None if g is None else g.cuda() for name, g in random_gradients(cpu, seed).items()}


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in RULE_CASES if c.agrees_by_bits])
def test_paths_and_devices_agree_by_bits(case: RuleCase, dtype: torch.dtype) -> None:
    on_cpu = zoo(dtype)
    runs = [(case.optimizer(on_cpu, "single"), on_cpu)]
    for path in case.paths:
        params = cuda_zoo(dtype)
        runs.append((case.optimizer(params, path), params))
    for seed in range(7):
        gradients = cuda_gradients(runs[1][1], seed)
        for optimizer, params in runs:
            step_with(optimizer, params, {n: g.to(params[n].device) for n, g in gradients.items()})
        for name, param in on_cpu.items():
            for optimizer, params in runs[1:]:
                assert_same_bits(param, params[name], name)
                expected = {key: value.cpu() for key, value in runs[0][0].state[param].items()}
                actual = {key: value.cpu() for key, value in optimizer.state[params[name]].items()}
                assert_same_bits(expected, actual, name)


@pytest.mark.parametrize(
    "flags", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cap_equals_torch_adamw_by_bits(dtype: torch.dtype, flags: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = {
        f"layer.{i}": nn.Parameter(torch.randn(shape, dtype=dtype, device="cuda"))
        for i, shape in enumerate([(4, 3), (5,), ()])
    }
    theirs = copy.deepcopy(ours)
    optimizer = STAC([{"params": list(ours.items()), "stac_role": "cap"}], lr=0.01, **flags)
    adamw = torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.0, **flags)
    for seed in range(50):
        gradients = cuda_gradients(ours, seed)
        step_with(optimizer, ours, gradients)
        for name, param in theirs.items():
            param.grad = gradients[name]
        adamw.step()
    for name, param in ours.items():
        assert_same_bits(param, theirs[name], name)
        assert_same_bits(dict(optimizer.state[param]), dict(adamw.state[theirs[name]]), name)


@pytest.mark.parametrize(("ns_dtype", "tolerance"), [("float32", 1e-3), (None, 0.1)], ids=str)
@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}], ids=str)
def test_muon_steps_as_on_the_cpu(path: dict[str, Any], ns_dtype: str | None, tolerance: float) -> None:
    """In float32, to the rounding that the iterations make larger; by default in bfloat16, which has two digits."""
    shapes = {"square": (48, 48), "wide": (32, 160), "tall": (160, 32), "filters": (32, 8, 3, 3)}
    on_cpu = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    on_device = {name: nn.Parameter(param.detach().cuda()) for name, param in on_cpu.items()}
    before = {name: param.detach().clone() for name, param in on_cpu.items()}
    reference = Muon(on_cpu.items(), lr=0.1, weight_decay=0.0, ns_dtype="float32", foreach=False)
    optimizer = Muon(on_device.items(), lr=0.1, weight_decay=0.0, ns_dtype=ns_dtype, **path)
    for seed in range(3):
        step_with(reference, on_cpu, random_gradients(on_cpu, seed))
        step_with(optimizer, on_device, cuda_gradients(on_device, seed))
    for name, param in on_cpu.items():
        moved, expected = on_device[name].detach().cpu() - before[name], param.detach() - before[name]
        assert (moved - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize(
    "arguments",
    [{}, {"trunk_cautious": True}, {"foreach": False}, {"fused": True}, {"trunk_optimizer": Muon}],
    ids=str,
)
def test_step_does_not_synchronize(arguments: dict[str, Any]) -> None:
    model = small_model().cuda()
    lr = torch.tensor(0.01, device="cuda")
    optimizer = STAC(model, lr=lr, weight_decay=0.1, capturable=True, **arguments)
    set_gradients(model, 0)
    optimizer.step()
    with no_synchronization():
        optimizer.step()


@pytest.mark.parametrize("arguments", [{}, {"trunk_cautious": True}, {"trunk_momentum": 0.0}], ids=str)
def test_captured_step_replays_under_a_schedule(arguments: dict[str, Any]) -> None:
    models = [small_model().cuda() for _ in range(2)]
    optimizers = [
        STAC(model, lr=torch.tensor(0.01, device="cuda"), weight_decay=0.1, capturable=True, **arguments)
        for model in models
    ]
    for model in models:
        set_gradients(model, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizers[0].step()
    torch.cuda.current_stream().wait_stream(side)
    optimizers[1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for seed in range(1, 5):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(0.01 / seed)
        gradients = [param.grad for param in models[0].parameters()]
        set_gradients(models[1], seed)
        for grad, other in zip(gradients, models[1].parameters(), strict=True):
            assert grad is not None
            assert other.grad is not None
            grad.copy_(other.grad)
        graph.replay()
        optimizers[1].step()
    for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(param, other)


def test_layers_on_two_devices_and_of_two_dtypes_in_one_model() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1][1].cuda()
    models[1][2].cuda()
    for dtype_of in models:
        dtype_of[1].double()
    for model in models:
        optimizer = STAC(model, lr=torch.tensor(0.01), foreach=None, trunk_cautious=True)
        for seed in range(3):
            set_gradients(model, seed)
            optimizer.step()
    for param, other in zip(models[0][:2].parameters(), models[1][:2].parameters(), strict=True):
        assert_same_bits(param, other)


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_skips_infinite_gradients(fused: bool | None) -> None:
    model = small_model().cuda()
    optimizer = STAC(model, fused=fused, error_if_nonfinite=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * model(torch.ones(2, 6, device="cuda")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == torch.inf:
            assert_same_bits(model.state_dict(), before)
            # On the device the step is skipped without the host's knowing, so there is state, at step 0.
            assert all(state["step"] == 0 for state in optimizer.state.values())
            assert fused or not optimizer.state
    assert not torch.equal(model.get_parameter("3.bias"), before["3.bias"])
