"""The table of rules: one row gives a rule every test of tests/optim/test_rules.py. A new rule is one more row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optim import AdamW, Lion, Muon, Signum
from stac_optimizer.optimizer import RuleOptimizer
from tests import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


@dataclass(frozen=True, kw_only=True)
class RuleCase:
    """One rule under one set of hyper-parameters.

    Args:
        kind: its drop-in class.
        arguments: hyper-parameters besides the defaults.
        reference: the float64 reference.
        role: the role of STAC that it is tested in.
        paths: the class's arguments for each path, by the path's name.
        agrees_by_bits: whether all paths give the same bits; where not, the rule's own tests tell what they must give.
        slack: roundings, in units of the dtype's epsilon, by which a result may differ from the reference.
        dtypes: those on which the reference binds.
    """

    name: str
    kind: type[RuleOptimizer]
    arguments: Mapping[str, Any]
    reference: Callable[..., reference.Result]
    role: str = "trunk"
    paths: Mapping[str, Mapping[str, Any]]
    agrees_by_bits: bool = True
    slack: float = 1.5  # decay and step round once each, to at most half an epsilon; measured 1.06
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def optimizer(self, params: Mapping[str, Tensor], path: str, **overrides: Any) -> RuleOptimizer:
        """The class alone, over these parameters in one group."""
        build: Callable[..., RuleOptimizer] = self.kind
        return build(list(params.items()), **{**self.arguments, **self.paths[path], **overrides})

    def taken(self, params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those that the rule can update."""
        return {name: param for name, param in params.items() if self.kind.rule.takes(param)}

    def in_role(self, params: Mapping[str, Tensor], path: str, **overrides: Any) -> STAC:
        """STAC over these parameters in one group of the case's role, which the class updates."""
        build = partial(self.kind, **{**self.arguments, **self.paths[path], **overrides})
        groups = [{"params": list(params.items()), "stac_role": self.role}]
        roles: dict[str, Any] = {f"{self.role}_optimizer": build}
        return STAC(groups, **roles)


# On the CPU Signum's fused path leaves tensors as small as those here to the single-tensor one.
PATHS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def _signum(name: str, **arguments: Any) -> RuleCase:
    return RuleCase(
        name=f"signum-{name}",
        kind=Signum,
        arguments={"lr": 0.01, "weight_decay": 0.1, **arguments},
        reference=reference.signum,
        paths=PATHS,
    )


def _lion(name: str, **arguments: Any) -> RuleCase:
    return RuleCase(
        name=f"lion-{name}",
        kind=Lion,
        arguments={"lr": 0.01, "weight_decay": 0.1, **arguments},
        reference=reference.lion,
        paths={"single": PATHS["single"], "foreach": PATHS["foreach"]},
    )


def _adamw(name: str, **arguments: Any) -> RuleCase:
    return RuleCase(
        name=f"adamw-{name}",
        kind=AdamW,
        arguments={"lr": 0.01, "weight_decay": 0.1, **arguments},
        reference=reference.adamw,
        role="cap",
        paths=PATHS,
        agrees_by_bits=False,
        # A rounding for each of about ten operations, low-precision ones in their own dtype.
        slack=4.0,
        # In float16 torch's squared gradients underflow, to infinite steps; there only equality with torch is asserted.
        dtypes=tuple(dtype for dtype in DTYPES if dtype != torch.float16),
    )


def _muon(name: str, **arguments: Any) -> RuleCase:
    return RuleCase(
        name=f"muon-{name}",
        kind=Muon,
        # Products in bfloat16 are for CPUs and devices that have them. Steps are 0.2 lr, so low precision takes more.
        arguments={"lr": 0.1, "weight_decay": 0.1, "ns_dtype": "float32", **arguments},
        reference=reference.muon,
        paths={"single": PATHS["single"], "foreach": PATHS["foreach"]},
        agrees_by_bits=False,
        slack=24.0,  # sums of products in each of five iterations; measured 19
        dtypes=tuple(dtype for dtype in DTYPES if dtype in (torch.float32, torch.bfloat16, torch.float16)),
    )


PLAIN = _signum("default")
CAUTIOUS = _signum("cautious", cautious=True)
RULE_CASES = (
    PLAIN,
    _signum("no-decay", weight_decay=0.0),
    _signum("maximize", maximize=True, momentum=0.5),
    _signum("no-momentum", momentum=0.0),
    _signum("no-momentum-maximize", momentum=0.0, maximize=True),
    CAUTIOUS,
    _signum("cautious-maximize", cautious=True, maximize=True),
    _signum("cautious-no-momentum", cautious=True, momentum=0.0, maximize=True),
    _adamw("default"),
    _adamw("amsgrad", amsgrad=True),
    _adamw("maximize", maximize=True, betas=(0.5, 0.9), eps=1e-6),
    _lion("default"),
    _lion("no-decay", weight_decay=0.0),
    _lion("maximize", maximize=True, betas=(0.5, 0.75)),
    _lion("cautious", cautious=True),
    _lion("cautious-maximize", cautious=True, maximize=True),
    _muon("default"),
    _muon("maximize", maximize=True, momentum=0.5, nesterov=False),
    _muon("no-momentum", momentum=0.0, weight_decay=0.0, adjust_lr="original", ns_steps=3),
    _muon("blocks", row_blocks=2),
    _muon("cautious", cautious=True, adjust_lr="spectral", lr=1.0),
    _muon("cautious-maximize", cautious=True, maximize=True),
)


def zoo(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    """Parameters of every shape and layout that users have, by name."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        real = torch.randn(*shape, 2 if dtype.is_complex else 1, generator=generator)
        return (torch.view_as_complex(real) if dtype.is_complex else real[..., 0]).to(dtype)

    tensors = {
        "matrix": randn(6, 10),
        "vector": randn(7),
        "scalar": randn(),
        "empty": randn(0, 3),
        "transposed": randn(5, 4).t(),
        "sliced": randn(6, 8)[:, ::2],
        "channels_last": randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }
    return {f"layer.{name}": nn.Parameter(tensor) for name, tensor in tensors.items()}


def random_gradients(params: Mapping[str, Tensor], seed: int, *, skip: Iterable[str] = ()) -> dict[str, Tensor | None]:
    """A gradient for each parameter, of its dtype but contiguous whatever its layout; None for those in ``skip``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: None
        if name in skip
        else torch.randn(param.shape, generator=generator, dtype=param.dtype)
        if param.dtype.is_complex
        else torch.randn(param.shape, generator=generator).to(param.dtype)
        for name, param in params.items()
    }


def step_with(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> None:
    """One step with these gradients, which must come out of it as they went in."""
    for name, param in params.items():
        gradient = gradients[name]
        param.grad = None if gradient is None else gradient.clone()
    optimizer.step()
    for name, param in params.items():
        gradient = gradients[name]
        assert (param.grad is None) == (gradient is None)
        if gradient is not None and param.grad is not None:
            assert torch.equal(param.grad, gradient), f"the gradient of {name} was written to"
