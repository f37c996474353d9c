"""AdamW against torch.optim.AdamW: the same bits on every path, dtype and layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer.optim import AdamW
from tests.rule_cases import DTYPES, random_gradients, step_with, zoo
from tests.support import assert_same_bits

FLAGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "amsgrad-maximize": {"amsgrad": True, "maximize": True},
    "betas-eps-decay": {"betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.3},
    "tensor-lr": {"lr": torch.tensor(0.02)},
    "tensor-lr-of-shape-1": {"lr": torch.tensor([0.02])},
}
PATHS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("flags", FLAGS)
def test_adamw_equals_torchs_by_bits(flags: str, path: str, dtype: torch.dtype) -> None:
    arguments = {"lr": 0.01, **FLAGS[flags], **PATHS[path]}
    if path == "foreach" and "tensor" in flags:
        pytest.skip("torch.optim.AdamW refuses a tensor lr with foreach=True, and so does this class")
    if path == "fused" and dtype.is_complex:
        pytest.skip("torch has no fused AdamW for complex parameters, and this class refuses it")
    ours, theirs = zoo(dtype), zoo(dtype)
    if path == "fused":
        # torch's fused kernel writes outside a sliced parameter; what this class does there is tested below.
        del ours["layer.sliced"], theirs["layer.sliced"]
    optimizer = AdamW(list(ours.items()), **{"weight_decay": 0.0, **arguments})
    if arguments.get("lr") is FLAGS["tensor-lr-of-shape-1"]["lr"]:
        arguments["lr"] = torch.tensor(0.02)  # with shape (1,) torch's own fails on 0-dim parameters
    adamw = torch.optim.AdamW(theirs.values(), **{"weight_decay": 0.0, **arguments})
    for seed in range(50):
        gradients = random_gradients(ours, seed, skip={"layer.vector"} if seed == 2 else ())
        step_with(optimizer, ours, gradients)
        for name, param in theirs.items():
            gradient = gradients[name]
            # In the parameter's layout, or torch's fused kernel pairs the wrong elements.
            param.grad = None if gradient is None else torch.empty_like(param).copy_(gradient)
        adamw.step()
    for name, param in ours.items():
        assert_same_bits(param, theirs[name], name)
        assert_same_bits(dict(optimizer.state[param]), dict(adamw.state[theirs[name]]), name)


def test_fused_takes_single_path_for_sliced_parameters() -> None:
    base = {fused: torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) for fused in (True, False)}
    untouched = base[True][:, 1::2].clone()
    for fused, tensor in base.items():
        param = nn.Parameter(tensor[:, ::2])
        params = {"layer.sliced": param, "layer.dense": nn.Parameter(torch.ones(3))}
        optimizer = AdamW(list(params.items()), fused=fused)
        for seed in range(5):
            step_with(optimizer, params, random_gradients(params, seed))
    assert_same_bits(base[True], base[False])
    assert_same_bits(base[True][:, 1::2], untouched)
