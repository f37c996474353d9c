"""Parameters of classes with operations of their own: stepped as plain ones, or refused before anything has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stac_optimizer import STAC
from stac_optimizer.optim import AdamW, Lion
from tests.rule_cases import RULE_CASES, RuleCase
from tests.support import assert_same_bits, set_units

aten = torch.ops.aten


class Wrapped(Tensor):
    """Holds another tensor, ``bare``, and knows the operations of ``implemented`` alone. None: all of them."""

    bare: Tensor
    implemented: frozenset[Any] | None = None
    gives_plain_zeros = False
    kept: Callable[[Tensor], Tensor] = staticmethod(lambda values: values)

    @staticmethod
    def __new__(cls, bare: Tensor) -> Wrapped:
        kwargs: Any = {"dtype": bare.dtype, "device": bare.device, "strides": bare.stride()}
        made: Wrapped = Tensor._make_wrapper_subclass(cls, bare.shape, **kwargs)
        return made

    def __init__(self, bare: Tensor) -> None:
        self.bare = bare

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # a classmethod, as torch documents
        if cls.implemented is not None and func not in cls.implemented:
            raise NotImplementedError(f"{cls.__name__} lacks {func}")
        bare_args, bare_kwargs = tree_map(_bare, (args, kwargs or {}))
        result = func(*bare_args, **bare_kwargs)
        if func in (aten.zeros_like.default, aten._to_copy.default) and cls.gives_plain_zeros:
            return result
        if not isinstance(args[0], cls) and func is not aten.detach.default:
            return args[0] if result is args[0] else result
        if isinstance(args[0], cls) and result is args[0].bare:  # in place
            result.copy_(cls.kept(result))
            return args[0]
        return tree_map(lambda value: cls(value) if isinstance(value, Tensor) else value, result)


def _bare(value: Any) -> Any:
    return value.bare if isinstance(value, Wrapped) else value


class Generic(Wrapped):
    """Passes everything on, so that its zeros are of the class too."""


class Sparing(Wrapped):
    """Knows no more than quantized weights do."""

    gives_plain_zeros = True
    implemented = frozenset({aten.detach.default, aten.clone.default, aten.zeros_like.default, aten.copy_.default})


class Rounding(Sparing):
    """Keeps eighths, as a quantized weight would keep few values."""

    kept = staticmethod(lambda values: torch.round(values * 8) / 8)


class Unwritable(Sparing):
    """Cannot be copied to."""

    implemented = Sparing.implemented - {aten.copy_.default}


class Stubborn(Wrapped):
    """Has zeros of its own class, and no arithmetic."""

    implemented = frozenset({*Sparing.implemented, aten.ones_like.default})


SHAPES = {"large": (4, 300), "matrix": (6, 10), "vector": (7,), "scalar": ()}


def params_of(kind: type[Wrapped] | None, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Plain ones among those of a class, or plain ones alone."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    made["plain"] = torch.randn(2, 5, generator=generator).to(dtype)
    wrap = kind if kind is not None else lambda tensor: tensor
    return {name: nn.Parameter(tensor if name == "plain" else wrap(tensor)) for name, tensor in made.items()}


def set_random(params: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def held(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Any:
    bare = tree_map(_bare, {name: (param.data, dict(optimizer.state[param])) for name, param in params.items()})
    return copy.deepcopy(bare)


def stepped(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 3) -> Any:
    for seed in range(steps):
        set_random(params, seed)
        optimizer.step()
    return held(params, optimizer)


@pytest.mark.parametrize("kind", [Generic, Sparing])
@pytest.mark.parametrize("case", RULE_CASES, ids=lambda case: case.name)
def test_rule_steps_as_on_plain_tensors(case: RuleCase, kind: type[Wrapped], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under blocks and packs that would cut and join them, did they bear it."""
    for dtype in (torch.float32, torch.bfloat16):
        for path in case.paths:
            set_units(monkeypatch, block=100, pack=50)
            wrapped, plain = case.taken(params_of(kind, dtype)), case.taken(params_of(None, dtype))
            # Without a plain copy to run them on, other paths leave such parameters to the single-tensor one.
            like = "single" if kind is Generic and not case.agrees_by_bits else path
            if kind is Generic and not case.agrees_by_bits:
                set_units(monkeypatch)  # what sums up parts rounds otherwise than what sums up wholes
            expected = stepped(plain, case.optimizer(plain, like))
            actual = stepped(wrapped, case.optimizer(wrapped, path))
            for name in list(plain)[: None if like == path else -1]:
                assert_same_bits(actual[name], expected[name], f"{dtype} {path} {name}")


FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("trunk", {"trunk_state_dtype": torch.int8}),
    "bfloat16": ("trunk", {"trunk_state_dtype": torch.bfloat16}),
    "rounding": ("trunk", {"stochastic_rounding": True}),
    "rounding-cap": ("cap", {"stochastic_rounding": True, "amsgrad": True}),
    "rounding-int8-cautious": (
        "trunk",
        {"stochastic_rounding": True, "trunk_state_dtype": torch.int8, "trunk_cautious": True},
    ),
    "rounding-lion": ("trunk", {"stochastic_rounding": True, "trunk_optimizer": Lion}),
    "finite-tensor-lr": ("trunk", {"error_if_nonfinite": True, "lr": torch.tensor(2.0**-6)}),
}


@pytest.mark.parametrize("path", [{"foreach": False}, {"fused": True}], ids=["single", "fused"])
@pytest.mark.parametrize(("role", "arguments"), FLAGS.values(), ids=list(FLAGS))
def test_every_flag_steps_as_on_plain_tensors(role: str, path: dict[str, Any], arguments: dict[str, Any]) -> None:
    def run(kind: type[Wrapped] | None) -> Any:
        params = params_of(kind, torch.bfloat16)
        groups = [{"params": list(params.items()), "stac_role": role}]
        optimizer = STAC(groups, **{"lr": 2.0**-6, "weight_decay": 0.25, **path, **arguments})
        stepped(params, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        return stepped(params, optimizer, 1)

    assert_same_bits(run(Sparing), run(None))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weights_that_round_are_rounded_once_a_step(weight_decay: float) -> None:
    weight = nn.Parameter(Rounding(torch.linspace(-1, 1, 17)))
    exact = nn.Parameter(torch.linspace(-1, 1, 17))
    for param in (weight, exact):
        optimizer = STAC([{"params": [("w", param)], "stac_role": "trunk"}], lr=0.07, weight_decay=weight_decay)
        param.grad = torch.ones(17)
        optimizer.step()
    assert_same_bits(_bare(weight.data), torch.round(exact.detach() * 8) / 8)


def test_as_torch_steps_them() -> None:
    ours, theirs = params_of(Generic), params_of(Generic)
    expected = stepped(theirs, torch.optim.AdamW(theirs.values(), lr=0.01, foreach=False))
    assert_same_bits(stepped(ours, AdamW(ours.values(), lr=0.01, foreach=False)), expected)


@pytest.mark.parametrize("kind", [Unwritable, Stubborn])
@pytest.mark.parametrize("case", RULE_CASES, ids=lambda case: case.name)
def test_what_a_class_lacks_is_refused_before_anything_has_changed(case: RuleCase, kind: type[Wrapped]) -> None:
    for path in case.paths:
        params = case.taken(params_of(kind))
        optimizer = case.in_role(params, path)
        set_random(params, 0)
        before = [_bare(param.data).clone() for param in params.values()]
        generator = torch.get_rng_state()
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=rf"'large' \(\w+\) is of the class {kind.__name__}.*Nothing was changed"
            ):
                optimizer.step()
            assert_same_bits([_bare(param.data) for param in params.values()], before)
            assert all(float(state["step"]) == 0 for state in optimizer.state.values())
        assert torch.equal(torch.get_rng_state(), generator)
        for name in params.keys() - {"plain"}:
            params[name].grad = None
        optimizer.step()
        assert not torch.equal(params["plain"], before[-1])
