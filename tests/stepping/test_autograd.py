"""Backward through a graph from before a step: autograd must find out that weights have moved, on every path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from stac_optimizer import STAC, MajorityVote
from stac_optimizer.optim import AdamW, Lion, Muon, Signum
from stac_optimizer.optim.signum.fused import devices as fused_paths
from tests.rule_cases import RULE_CASES, RuleCase, zoo
from tests.runs import process_group, train
from tests.sharded import distributed
from tests.support import seeded_loss, set_gradients, small_model

AFTER_THE_WRITE = "modified by an inplace operation"
Params = Mapping[str, nn.Parameter]


def parameters_of_all_sizes(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """What is packed, and what is cut into blocks, in every layout."""
    sizes = {"rows": (300, 128), "rest": (20001,), "blocks": (1024, 600)}
    return zoo(dtype) | {name: nn.Parameter(torch.randn(size).to(dtype)) for name, size in sizes.items()}


def assert_backward_raises_after(step: Callable[[], Any], params: Params, *, unmoved: tuple[str, ...] = ()) -> None:
    """A backward that needs a weight from before the step raises, but for those that do not move."""
    inputs = {name: torch.ones_like(param).requires_grad_() for name, param in params.items()}
    outputs = {name: inputs[name] * param for name, param in params.items()}
    for name, param in params.items():
        outputs[name].backward(torch.ones_like(outputs[name]), retain_graph=True)
        if name in unmoved:
            param.grad = None
    step()
    for name, output in outputs.items():
        if name in unmoved:
            output.backward(torch.ones_like(output))
        else:
            with pytest.raises(RuntimeError, match=AFTER_THE_WRITE):
                output.backward(torch.ones_like(output))


def _takes(case: RuleCase, path: str, dtype: torch.dtype) -> bool:
    """Torch has no fused AdamW for complex numbers, and the sign of a matrix is for real ones."""
    return dtype in case.dtypes and not (case.kind is AdamW and path == "fused" and dtype.is_complex)


@pytest.mark.parametrize(
    ("case", "path", "dtype"),
    [
        pytest.param(case, path, dtype, id=f"{case.name}-{path}-{dtype}")
        for case in RULE_CASES
        for path in case.paths
        for dtype in (torch.float32, torch.bfloat16, torch.complex64)
        if _takes(case, path, dtype)
    ],
)
def test_every_rule_on_every_path(case: RuleCase, path: str, dtype: torch.dtype) -> None:
    is_default = case.name.endswith("default") and dtype == torch.float32  # others take long to compile
    params = parameters_of_all_sizes(dtype) if is_default else zoo(dtype)
    params = case.taken(params)
    assert_backward_raises_after(case.optimizer(params, path).step, params)


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Signum, {"stochastic_rounding": True}),
        (Signum, {"state_dtype": "int8"}),
        (Signum, {"state_dtype": "bfloat16"}),
        (AdamW, {"stochastic_rounding": True}),
    ],
)
def test_rounded_weights_and_averages(kind: Any, arguments: dict[str, Any], path: dict[str, Any]) -> None:
    params = parameters_of_all_sizes(torch.bfloat16)
    assert_backward_raises_after(kind(list(params.items()), lr=0.1, **arguments, **path).step, params)


def test_fused_step_under_a_grad_scaler() -> None:
    params = parameters_of_all_sizes(torch.float32)
    optimizer = AdamW(list(params.items()), fused=True)
    vars(optimizer).update(grad_scale=torch.ones(()), found_inf=torch.zeros(()))
    assert_backward_raises_after(optimizer.step, params)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
def test_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They write to addresses, of which autograd knows nothing."""
    pytest.importorskip("triton")
    monkeypatch.setattr(fused_paths, "by_cpp", fused_paths.by_triton)
    params = {"weight": nn.Parameter(torch.randn(16, 128))}
    assert_backward_raises_after(Signum(list(params.items()), fused=True).step, params)


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [Signum, AdamW, Lion, Muon])
def test_dtensors_whose_local_parts_are_written(tmp_path: Path, kind: Any, path: dict[str, Any]) -> None:
    """They count their own versions, whatever happens to the tensors within."""
    with process_group(tmp_path):
        mesh = init_device_mesh("cpu", (1,))
        params = {
            str(placement): nn.Parameter(distributed(torch.randn(300, 128), mesh, [placement]))
            for placement in (Shard(0), Replicate())
        }
        optimizer = kind(list(params.items()), **({} if kind is Lion and "fused" in path else path))
        assert_backward_raises_after(optimizer.step, params)


def test_votes(tmp_path: Path) -> None:
    with process_group(tmp_path):
        model = small_model()
        optimizer = STAC(model, vote=MajorityVote())
        assert_backward_raises_after(optimizer.step, dict(model.named_parameters()))


@pytest.mark.filterwarnings("ignore:(Graph break|Dynamo):UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("arguments", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_step_that_torch_compiles(arguments: dict[str, Any], backend: str) -> None:
    torch._dynamo.reset()
    model = small_model()
    step = torch.compile(STAC(model, **arguments).step, backend=backend)
    for _ in range(2):
        assert_backward_raises_after(step, dict(model.named_parameters()))


class WritesData(optim.SGD):
    """As many optimizers outside of torch write."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch declares two
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data.sub_(param.grad, alpha=group["lr"])


@pytest.mark.parametrize("role", ["trunk_optimizer", "cap_optimizer"])
@pytest.mark.parametrize("guest", [lambda params: optim.Adam(params, fused=True), WritesData], ids=["fused", "data"])
def test_foreign_optimizers(guest: Any, role: str) -> None:
    model = small_model()
    optimizer = STAC(model, **{role: guest})
    assert_backward_raises_after(optimizer.step, dict(model.named_parameters()), unmoved=("0.bias", "3.bias"))


@pytest.mark.parametrize("arguments", [{}, {"fused": True}], ids=str)
def test_weights_that_stay_are_not_told_to_have_moved(arguments: dict[str, Any]) -> None:
    model = small_model()
    params = dict(model.named_parameters())
    optimizer = STAC(model, **arguments)
    assert_backward_raises_after(optimizer.step, params, unmoved=("0.bias", "3.weight"))
    # torch.distributed.checkpoint makes state by a step that moves nothing.
    fresh = STAC(model, lr=0.0, **arguments)
    for param in params.values():
        param.grad = torch.zeros_like(param)
    before = [param._version for param in params.values()]
    fresh.step()
    assert fresh.state
    assert [param._version for param in params.values()] == before


class ReadsTwice(nn.Module):
    """Uses the head's weight a second time, as a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs)
        constant = nn.functional.linear(hidden, self.head.weight.detach())  # the last to be gone through backward
        output: Tensor = constant + self.head(hidden)
        return output


@pytest.mark.parametrize("arguments", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_released_weight_that_the_backward_under_way_still_needs(arguments: dict[str, Any]) -> None:
    model = ReadsTwice()
    optimizer = STAC(model, **arguments)
    with optimizer.release_gradients(model), pytest.raises(RuntimeError, match=AFTER_THE_WRITE):
        seeded_loss(model, 0).backward()


@pytest.mark.parametrize("arguments", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_graph_that_is_retained_over_a_step(arguments: dict[str, Any]) -> None:
    for released in (False, True):
        model = small_model()
        optimizer = STAC(model, **arguments)
        if released:
            optimizer.release_gradients(model)
        train((model, optimizer), range(1))
        optimizer.zero_grad()
        loss = seeded_loss(model, 1)
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match=f"{AFTER_THE_WRITE}|second gradient"):
            loss.backward()


def test_gradients_set_by_hand_are_enough() -> None:
    """A step in a loop without graphs, and inside inference mode, tells nobody and fails nowhere."""
    with torch.inference_mode():
        model = small_model()
        optimizer = STAC(model, fused=True)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    model = small_model()
    optimizer = STAC(model, fused=True)
    set_gradients(model, 0)
    with torch.inference_mode():
        optimizer.step()


def test_foreign_optimizer_that_gets_the_closure_is_seen() -> None:
    model = small_model()
    optimizer = STAC(model, last_n_layers=0, trunk_optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, fused=True))
    set_gradients(model, 0)
    loss = seeded_loss(model, 1)
    optimizer.step(lambda: 0.0)
    with pytest.raises(RuntimeError, match=AFTER_THE_WRITE):
        loss.backward()
