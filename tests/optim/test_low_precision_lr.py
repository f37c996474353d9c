"""A learning rate in a low-precision tensor is computed with as what it is, so that weights decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optim import AdamW, Signum
from stac_optimizer.optim.signum.fused import devices as fused_paths
from stac_optimizer.optimizer import RuleOptimizer
from tests.rule_cases import RULE_CASES, RuleCase, random_gradients, step_with, zoo
from tests.support import assert_same_bits, set_gradients, wide_model

LOW = (torch.bfloat16, torch.float16)
# What torch.tensor(1e-3) is under a bfloat16 default dtype; 1 - lr * 0.1 rounds to 1 in either.
LR = 1e-3
Params = dict[str, nn.Parameter]


def cases(*, on_cpu: bool) -> list[Any]:
    """Every rule on every path. A tensor lr is for lists of tensors only where the step is capturable."""
    return [
        pytest.param(case, path, id=f"{case.name}-{path}")
        for case in RULE_CASES
        for path in case.paths
        if not (on_cpu and case.kind is AdamW and path == "foreach")
    ]


def built(case: RuleCase, path: str, params: Params, lr: Tensor, **arguments: Any) -> RuleOptimizer:
    return case.optimizer(params, path, lr=lr, **({"capturable": True} if path == "foreach" else {}), **arguments)


def stepped(case: RuleCase, path: str, dtype: torch.dtype, lr: Tensor) -> Any:
    params = case.taken(zoo(dtype))
    optimizer = built(case, path, params, lr)
    for seed in range(3):
        step_with(optimizer, params, random_gradients(params, seed))
    return params, optimizer.state_dict()["state"]


@pytest.mark.filterwarnings("ignore:.*an lr of:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize(("case", "path"), cases(on_cpu=True))
def test_steps_are_those_of_the_same_lr_in_float32(
    case: RuleCase, path: str, low: torch.dtype, dtype: torch.dtype
) -> None:
    lr = torch.tensor(LR, dtype=low)
    assert_same_bits(stepped(case, path, dtype, lr), stepped(case, path, dtype, lr.float()))


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize(("case", "path"), [p for p in cases(on_cpu=True) if p.values[0].decays_alone])
def test_weights_without_gradient_decay(case: RuleCase, path: str, low: torch.dtype) -> None:
    params = case.taken({"weight": nn.Parameter(torch.ones(300, 128)), "bias": nn.Parameter(torch.ones(5))})
    lr = torch.tensor(LR, dtype=low)
    decay: dict[str, Any] = {"weight_decay": 0.1}
    if "decoupled_weight_decay" in case.kind.rule.hyperparameters:
        decay["decoupled_weight_decay"] = True
    optimizer = built(case, path, params, lr, **decay)
    step_with(optimizer, params, {name: torch.zeros_like(param) for name, param in params.items()})
    for param in params.values():
        torch.testing.assert_close(param.detach(), torch.full_like(param, 1 - lr.item() * 0.1), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("arguments", [{}, {"fused": True}, {"foreach": False}], ids=str)
def test_both_roles_take_it(arguments: dict[str, Any], low: torch.dtype) -> None:
    runs = []
    for dtype in (low, torch.float32):
        model = wide_model()
        optimizer = STAC(model, lr=torch.tensor(2**-10, dtype=dtype), weight_decay=0.1, **arguments)
        for seed in range(3):
            set_gradients(model, seed)
            optimizer.step()
        runs.append(model.state_dict())
    assert_same_bits(runs[0], runs[1])


@pytest.mark.parametrize("arguments", [{}, {"foreach": True, "capturable": True}], ids=str)
def test_step_that_torch_compiles(arguments: dict[str, Any]) -> None:
    torch._dynamo.reset()
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        model = wide_model()
        optimizer = STAC(model, lr=torch.tensor(2**-10, dtype=dtype), weight_decay=0.1, **arguments)
        step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
        for seed in range(3):
            set_gradients(model, seed)
            step()
        runs.append(model.state_dict())
    assert_same_bits(runs[0], runs[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
def test_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(fused_paths, "by_cpp", fused_paths.by_triton)
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        params = {"weight": nn.Parameter(torch.ones(16, 128))}
        optimizer = Signum(list(params.items()), torch.tensor(LR, dtype=torch.bfloat16).to(dtype), 0.9, 0.1, fused=True)
        step_with(optimizer, params, random_gradients(params, 0))
        runs.append(params)
    assert_same_bits(runs[0], runs[1])


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "path"), cases(on_cpu=False))
def test_captured_steps_follow_it(case: RuleCase, path: str) -> None:
    """On the device, where a graph reads it anew with every replay."""
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        params = {"weight": nn.Parameter(torch.ones(300, 128, device="cuda"))}
        lr = torch.tensor(LR, dtype=torch.bfloat16, device="cuda").to(dtype)
        optimizer = case.optimizer(params, path, lr=lr, weight_decay=0.1, capturable=True)
        params["weight"].grad = torch.ones(300, 128, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for factor in (1, 2):
            lr.fill_(2**-10 * factor)
            graph.replay()
        torch.cuda.synchronize()
        runs.append(params["weight"].detach().cpu())
    assert_same_bits(runs[0], runs[1])
