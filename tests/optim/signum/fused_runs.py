"""Weights of every layout, and trunks that step them with ``fused=True`` and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from tests.support import assert_same_bits

# Of every layout, of the sizes 0 and 1; rows of whole blocks of codes, of none, and of one and a rest.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "matrix": (40, 256),
    "row": (1, 640),
    "block": (1, 128),
    "ragged": (6, 200),
    "vector": (333,),
    "small": (7, 9),
    "small-vector": (64,),
    "one": (1,),
    "scalar": (),
    "empty": (0, 64),
    "image": (4, 8, 3, 3),
}


def weights(dtype: torch.dtype, *, more: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: (shape[0] + more, *shape[1:]) if len(shape) > 1 else shape for name, shape in SHAPES.items()}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["transposed"] = torch.randn(30, 20, generator=generator).to(dtype).t()
    tensors["sliced"] = torch.randn(20, 300, generator=generator).to(dtype)[:, ::2]
    tensors["image"] = tensors["image"].contiguous(memory_format=torch.channels_last)
    return {f"layer.{name}": nn.Parameter(tensor) for name, tensor in tensors.items()}


def trunk_of(params: Mapping[str, nn.Parameter], **arguments: Any) -> STAC:
    return STAC([{"params": list(params.items()), "stac_role": "trunk"}], **{"lr": 0.03, **arguments})


def give_gradients(params: Mapping[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    """The same for the same seed; every third time some that are not finite, or tiny."""
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        grad = torch.randn(param.shape, generator=generator)
        if param.numel() > 4 and seed % 3 == 2:
            grad.view(-1)[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 2e-7, -1e-7])
        param.grad = (grad * scale).to(param.dtype)


def without_payload(tensor: Tensor) -> Tensor:
    """With one NaN for all: which operand's sign and payload an operation on two NaN keeps, no standard says."""
    return tensor.detach().masked_fill(tensor.detach().isnan(), torch.nan) if tensor.is_floating_point() else tensor


def assert_same_runs(one: STAC, other: STAC) -> None:
    for left, right in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert_same_bits(without_payload(left), without_payload(right))
        states = [
            {key: without_payload(value) for key, value in held.state[p].items()}
            for held, p in ((one, left), (other, right))
        ]
        assert_same_bits(states[0], states[1])


def assert_fused_steps_alike(dtype: torch.dtype) -> None:
    """Three steps, the last with gradients that are not finite, with kernels where there are some, and by default."""
    params, fused_params = weights(dtype), weights(dtype)
    default, fused = trunk_of(params), trunk_of(fused_params, fused=True)
    for seed in range(3):
        for held, optimizer in ((params, default), (fused_params, fused)):
            give_gradients(held, seed)
            optimizer.step()
    assert_same_runs(default, fused)
