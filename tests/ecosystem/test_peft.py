"""STAC on adapters of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from stac_optimizer import STAC, named
from tests.ecosystem.pages import block, continued, named_state, run
from tests.real_models import MODELS, loss_of
from tests.support import assert_same_bits, names_of_gradients

TARGETS = {"target_modules": ["query", "value"]}


def adapted(kind: type[peft.PeftConfig] = peft.LoraConfig, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(MODELS["bert-classifier"](), kind(**TARGETS, **arguments))


def test_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, again = continued("peft", tmp_path, 7)
    assert_same_bits(again.model.state_dict(), whole.model.state_dict())
    assert_same_bits(named_state(again.optimizer), named_state(whole.optimizer))
    (trunk, cap) = whole.optimizer.partition.trunk_layer_names, whole.optimizer.partition.cap_layer_names
    assert {name.split(".")[-2] for name in trunk} == {"lora_A"}
    assert {name.split(".")[-2] for name in cap} == {"lora_B"}
    first = {group["stac_role"]: group["initial_lr"] for group in whole.optimizer.param_groups}
    assert first == pytest.approx({"trunk": 2.5e-4, "cap": 4e-3})


@pytest.mark.parametrize(
    ("kind", "arguments", "last"),
    [
        (peft.LoraConfig, {}, "lora_B"),
        (peft.LoraConfig, {"use_dora": True}, "lora_magnitude_vector"),
        (peft.IA3Config, {"feedforward_modules": []}, "ia3_l"),
    ],
    ids=["lora", "dora", "ia3"],
)
def test_cap_by_chance_is_told_of_and_what_to_write_is_quiet(
    kind: type[peft.PeftConfig], arguments: dict[str, Any], last: str, told: list[str]
) -> None:
    model = adapted(kind, **arguments)
    assert len(STAC(model).partition.cap_layer_names) == 1
    (message,) = told
    assert f"1 of 4 layers {last!r}" in message
    told.clear()
    optimizer = STAC(model, cap=named(f"*.{last}"))
    assert len(optimizer.partition.cap_layer_names) == 4
    if kind is not peft.IA3Config:
        STAC(model, last_n_layers=0)
    loss_of(model.get_base_model()).backward()
    optimizer.step()
    held = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert held == set(names_of_gradients(model))


def test_saved_module_is_the_cap() -> None:
    optimizer = STAC(adapted(modules_to_save=["classifier"]))
    assert optimizer.partition.cap_layer_names == ("base_model.model.classifier.modules_to_save.default",)


def test_adapter_that_is_made_active_later_is_told_of_and_trains_once_it_is_added(
    tmp_path: Path, told: list[str]
) -> None:
    done = run("peft", tmp_path)
    code, add = block("adapter").split("optimizer.add_param_group")
    exec(code, done.names)
    model, optimizer = done.names["model"], done.optimizer
    second = model.base_model.model.transformer.h[0].attn.c_attn.lora_B["second"].weight
    for _ in range(4):
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
    assert not second.any()
    (message,) = told
    assert "all of the optimizer's parameters are frozen by now" in message
    told.clear()
    exec("optimizer.add_param_group" + add, done.names)
    optimizer.step()
    assert second.any()


def test_adapters_that_are_there_from_the_start_may_be_switched() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(**TARGETS))
    optimizer = STAC(model, include_frozen=True, cap=named("*.lora_B"), trunk_cautious=True)
    for name in ("default", "second"):
        model.set_adapter(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer.zero_grad()
        loss_of(model.get_base_model()).backward()
        optimizer.step()
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved
        assert all(f".{name}." in key and "lora_" in key for key in moved)
