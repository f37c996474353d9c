"""STAC in timm's training: its factory, groups, schedulers, averages."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from stac_optimizer import STAC, layerwise_lr_decay, recipes, vectors
from stac_optimizer.stepping import watch
from tests.ecosystem.pages import block, continued, named_state
from tests.real_models import MODELS
from tests.support import assert_same_bits

VIT = "timm-vit"


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()


def test_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, again = continued("timm", tmp_path, 7)
    assert_same_bits(again.model.state_dict(), whole.model.state_dict())
    assert_same_bits(again.names["average"].state_dict(), whole.names["average"].state_dict())
    assert_same_bits(named_state(again.optimizer), named_state(whole.optimizer))


def test_registered_is_what_is_built_of_the_model() -> None:
    names: dict[str, Any] = {"STAC": STAC, "recipes": recipes, "model": MODELS[VIT]()}
    torch.manual_seed(0)
    exec(block("timm-registered"), names)
    made, plain = names["optimizer"], STAC(names["model"], **recipes.vision(lr=1e-3))
    assert isinstance(made, STAC)
    for group, other in zip(made.param_groups, plain.param_groups, strict=True):
        assert {key: group[key] for key in group if key != "params"} == {k: other[k] for k in other if k != "params"}


def test_groups_of_timm_are_refused_with_the_line_to_write() -> None:
    model = MODELS[VIT]()
    with pytest.raises(ValueError, match=r"weight_decay=0.05, overrides=\[\(vectors\(\)"):
        STAC(param_groups_weight_decay(model, 0.05))


def test_override_of_vectors_decays_what_timm_decays() -> None:
    model = MODELS[VIT]()
    optimizer = STAC(model, weight_decay=0.05, overrides=[(vectors(), {"weight_decay": 0.0})])
    groups = param_groups_weight_decay(model, 0.05)
    for one in (groups, optimizer.param_groups):
        assert {id(p) for g in one if g["weight_decay"] for p in g["params"]} == {
            id(p) for p in model.parameters() if p.ndim > 1
        }


@pytest.mark.parametrize("kind", ["cosine", "tanh", "step", "poly"])
def test_layer_scales_of_timm_work_with_its_schedulers(kind: str) -> None:
    """Of groups that say their role; the ratio of the layers stays at every step."""
    model: Any = MODELS[VIT]()
    head = {id(param) for param in model.get_classifier().parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    for group in groups:
        group.pop("param_names", None)
        group["stac_role"] = "cap" if id(group["params"][0]) in head else "trunk"
    optimizer = STAC(groups, lr=1e-3, trunk_lr=1e-3)
    scales = [group["lr_scale"] for group in groups]
    schedule, _ = create_scheduler_v2(optimizer, kind, num_epochs=6, warmup_epochs=2, warmup_lr=1e-4, decay_epochs=2)
    for epoch in range(6):
        stepped(model, optimizer)
        schedule.step(epoch + 1)
        unscaled = [group["lr"] / scale for group, scale in zip(optimizer.param_groups, scales, strict=True)]
        assert unscaled == pytest.approx([unscaled[0]] * len(unscaled))


def test_layerwise_decay_is_as_timm_has_it() -> None:
    model: Any = MODELS[VIT]()
    optimizer = STAC(model, trunk_lr=1e-3, overrides=layerwise_lr_decay(model, 0.5))
    ours = {id(param): group["lr"] / 1e-3 for group in optimizer.param_groups for param in group["params"]}
    blocks = [ours[id(block.attn.qkv.weight)] for block in model.blocks]
    theirs = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    of_timm = [theirs[id(block.attn.qkv.weight)] for block in model.blocks]
    ratios, ratios_of_timm = ([later / earlier for earlier, later in pairwise(each)] for each in (blocks, of_timm))
    assert ratios == pytest.approx(ratios_of_timm)


def test_head_that_was_reset_is_told_of(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "IDLE_ROLE_STEPS", 3)
    model: Any = MODELS[VIT]()
    optimizer = STAC(model)
    stepped(model, optimizer)
    model.reset_classifier(7)
    stepped(model, optimizer, 5)
    (message,) = told
    assert "the cap ('head') has had no gradient for 3 steps" in message
    told.clear()
    stepped(model, STAC(model))
