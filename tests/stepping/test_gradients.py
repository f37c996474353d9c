"""Gradients as autograd and hooks leave them: lazily conjugated or negated, expanded, overlapping, of other dtypes.

What can be applied gives the result of a plain copy to the bit; what cannot is refused before anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optim import AdamW, Lion, Signum
from tests import reference
from tests.rule_cases import RULE_CASES, RuleCase
from tests.support import assert_same_bits, set_units

SIDE = 12
CASES = [case for case in RULE_CASES if case.name.endswith(("default", "cautious", "amsgrad"))]


def created_graph(values: Tensor) -> Tensor:
    """A gradient that requires grad."""
    weight = values.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad((weight * weight.abs()).abs().sum(), weight, create_graph=True)
    assert grad.requires_grad
    return grad


Make = Callable[[Tensor], Tensor]
OF_ANY: Mapping[str, Make] = {
    "negated": torch._neg_view,
    "expanded": lambda values: values[:1].expand(SIDE, SIDE),
    "overlapping": lambda values: values.flatten().as_strided((SIDE, SIDE), (1, 1)),
    "transposed": lambda values: values.t(),
    "sliced": lambda values: torch.cat((values, values), 1)[:, ::2],
    "with-graph": created_graph,
    "parameter": nn.Parameter,
}
OF_COMPLEX: Mapping[str, Make] = {
    **OF_ANY,
    "conjugated": torch.conj,
    "transposed-and-conjugated": lambda values: values.mH,
    "negated-and-conjugated": lambda values: torch._neg_view(values).conj(),
}
OF_REAL: Mapping[str, Make] = {
    **OF_ANY,
    "imaginary-part": lambda values: torch.complex(values, values).conj().imag,
    "number-expanded": lambda values: values[0, 0].expand(SIDE, SIDE),
}
KINDS = [
    pytest.param(case, dtype, make, id=f"{case.name}-{dtype}-{name}")
    for case in CASES
    for dtype, makes in ((torch.float32, OF_REAL), (torch.complex64, OF_COMPLEX))
    for name, make in makes.items()
    if dtype in case.dtypes
]


def values_of(dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(SIDE, SIDE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def stepped(case: RuleCase, path: str, weight: Tensor, grad: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
    """Two steps beside a plain parameter, in one group with it: the weight and its state."""
    param, beside = nn.Parameter(weight.clone()), nn.Parameter(torch.ones(1, 3))
    optimizer = case.optimizer({"beside": beside, "param": param}, path, **arguments)
    for _ in range(2):
        param.grad, beside.grad = grad, torch.ones(1, 3)
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize(("case", "dtype", "make"), KINDS)
def test_gradient_of_any_form_gives_what_its_plain_copy_gives(
    case: RuleCase, dtype: torch.dtype, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad, weight = make(values_of(dtype, 0)), values_of(dtype, 1)
    plain = grad.detach().clone().resolve_conj().resolve_neg().contiguous()
    for path in case.paths:
        if path == "fused" and dtype.is_complex and case.kind is AdamW:
            continue
        expected = stepped(case, path, weight, plain)
        assert_same_bits(stepped(case, path, weight, grad), expected, path)
        if path == "fused" and case.kind is Signum:  # which would compile; see below
            continue
        with monkeypatch.context() as patch:
            set_units(patch, block=64)  # and in blocks, of whole vectors
            assert_same_bits(stepped(case, path, weight, grad), stepped(case, path, weight, plain), path)
    assert_same_bits(grad.detach().resolve_conj().resolve_neg(), plain, "the gradient was written to")


def test_kernel_sees_that_a_gradient_is_negated() -> None:
    weight, values = torch.zeros(32, 128), torch.ones(32, 128)
    for grad, expected in ((values, -0.5), (torch._neg_view(values), 0.5)):
        param = nn.Parameter(weight.clone())
        optimizer = Signum([param], lr=0.5, fused=True)
        param.grad = grad
        optimizer.step()
        assert torch.equal(param.detach(), torch.full_like(weight, expected))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name)
        for case in CASES
        if torch.complex64 in case.dtypes and "amsgrad" not in case.name
    ],
)
def test_conjugate_of_a_gradient_is_what_the_reference_descends_along(case: RuleCase) -> None:
    """Reproduced by a hook that returns ``grad.conj()``, with another group that steps before."""
    weight, grad = values_of(torch.complex64, 1), values_of(torch.complex64, 0)
    param, before = nn.Parameter(weight.clone()), nn.Parameter(torch.ones(3))
    param.register_hook(torch.conj)
    kind: Any = case.kind
    groups = [{"params": [before]}, {"params": [param]}]
    optimizer = kind(groups, **case.arguments, error_if_nonfinite=True)
    ((param * grad.conj()).real.sum() + before.sum()).backward()
    assert param.grad is not None
    assert param.grad.is_conj()
    optimizer.step()

    def reals(tensor: Tensor) -> reference.Array:
        result: reference.Array = torch.view_as_real(tensor.detach().resolve_conj()).double().numpy()
        return result

    group = optimizer.param_groups[1]
    expected = case.reference(reals(weight), reals(param.grad), {"step": np.zeros(())}, group)
    np.testing.assert_allclose(reals(param), expected.p, rtol=0, atol=1e-5)
    np.testing.assert_allclose(reals(param.grad), reals(grad.conj()), rtol=0, atol=1e-6)


FLOAT8 = torch.float8_e4m3fn
# The dtype of the weight at the step, that of its gradient, and words of the message.
REFUSED = [
    (FLOAT8, FLOAT8, ["is torch.float8_e4m3fn, for which torch has no arithmetic", "float32 or bfloat16"]),
    (torch.float8_e5m2, torch.float8_e5m2, ["is torch.float8_e5m2"]),
    (torch.int32, torch.int32, ["is torch.int32"]),
    (torch.bool, torch.bool, ["is torch.bool"]),
    (torch.float32, FLOAT8, ["float8_e4m3fn"]),
    (torch.float32, torch.bool, ["torch.bool"]),
    (torch.float32, torch.complex64, ["torch.float32", "torch.complex64"]),
    (torch.complex64, torch.float32, ["torch.complex64", "torch.float32"]),
]


@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [Signum, Lion, AdamW])
@pytest.mark.parametrize(("dtype", "grad_dtype", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_numbers_without_arithmetic_are_refused_before_anything_moves(
    dtype: torch.dtype, grad_dtype: torch.dtype, words: list[str], kind: Any, flags: dict[str, Any]
) -> None:
    if kind is Lion and "fused" in flags:
        pytest.skip("Lion has no fused path")
    if dtype != grad_dtype and not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype")
    has_grad = dtype.is_floating_point or dtype.is_complex
    param = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    other = nn.Parameter(torch.ones(3))
    optimizer = kind([("other", other), ("param", param)], lr=0.1, **flags)
    if dtype != grad_dtype:
        param.grad_dtype = grad_dtype
    param.grad, other.grad = torch.ones(4, 4).to(grad_dtype), torch.ones(3)
    param.requires_grad_(has_grad)  # as it thaws
    with pytest.raises(RuntimeError, match=r"'param' .*Nothing was changed") as raised:
        optimizer.step()
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert torch.equal(other, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("role", ["trunk", "cap"])
def test_float8_weight_that_trains_is_refused_at_construction(role: str) -> None:
    weight = nn.Parameter(torch.ones(4, 4).to(FLOAT8))
    with pytest.raises(ValueError, match=rf"'a.w' \({role}\) is torch.float8_e4m3fn, .* in float32 or bfloat16"):
        STAC([{"params": [("a.w", weight)], "stac_role": role}])


def test_frozen_weights_of_any_dtype_may_stand_in_groups() -> None:
    """As the quantized ones of a base model, whose parameters are all given."""
    frozen = [nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False) for dtype in (FLOAT8, torch.uint8)]
    trained = nn.Parameter(torch.ones(3))
    optimizer = Signum([*frozen, trained], lr=0.5)
    trained.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(trained.detach(), torch.full((3,), 0.5))


@pytest.mark.parametrize("make", [lambda: values_of(torch.complex64, 0).conj(), lambda: torch._neg_view(torch.ones(3))])
@pytest.mark.parametrize("kind", [Signum, Lion, AdamW])
def test_parameter_that_is_a_lazy_view_is_refused_at_construction(kind: Any, make: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"lazily conjugated or negated view.*resolve_conj"):
        kind([nn.Parameter(make())])


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("kind", [Signum, Lion, AdamW])
def test_complex_numbers_of_half_precision_work(kind: Any) -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.complex64).to(torch.complex32))
    optimizer = kind([param], lr=0.5, weight_decay=0.0)
    param.grad = torch.tensor([1 + 1j, -1 + 1j, 1 - 1j, 2 + 0.5j]).to(torch.complex32)
    optimizer.step()
    expected = torch.tensor([0.5 - 0.5j, 1.5 - 0.5j, 0.5 + 0.5j, 0.5 - 0.5j])
    torch.testing.assert_close(param.detach().to(torch.complex64), expected, rtol=0, atol=2e-3)
