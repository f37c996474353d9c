"""The table of rules: one row gives a rule every test of tests/optim/test_rules.py. A new rule is one more row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stac_optimizer.optim import AdamW, Lion, Muon, Signum
from tests import reference
from tests.optim.adaptive.cases import ADAPTIVE
from tests.optim.laplacian.cases import LAPLACIAN
from tests.optim.layerwise.cases import LAYERWISE
from tests.rule_case import DTYPES, PATHS, RuleCase

__all__ = ["CAUTIOUS", "DTYPES", "PLAIN", "RULE_CASES", "RuleCase", "random_gradients", "step_with", "zoo"]


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
    *LAYERWISE,
    *ADAPTIVE,
    *LAPLACIAN,
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
