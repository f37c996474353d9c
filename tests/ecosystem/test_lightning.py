"""STAC in Lightning: automatic and manual optimization, callbacks that touch optimizers, two ranks."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from stac_optimizer import STAC, last_layers, named
from tests.ecosystem.by_hand import train
from tests.ecosystem.pages import block, continued, named_state, run
from tests.support import assert_same_bits


class Net(lightning.LightningModule):  # type: ignore[misc]  # its package is not installed where types are checked
    """A backbone and a head, and what to give to STAC."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)
        self.arguments = arguments

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.head(self.backbone(inputs)), targets)

    def configure_optimizers(self) -> STAC:
        return STAC(self, **self.arguments)


class Manual(Net):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, index) / 2)
        if index % 2:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            self.lr_schedulers().step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        optimizer = STAC(self)
        return [optimizer], [LambdaLR(optimizer, lambda step: 1 - step / 12)]


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(24, 6, generator=generator), torch.randint(3, (24,), generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=4)


def fitted(model: lightning.LightningModule, folder: Path, **arguments: Any) -> lightning.Trainer:
    settings = {"max_epochs": 4, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    trainer = lightning.Trainer(**{**settings, **quiet, **arguments})
    trainer.fit(model, batches())
    return trainer


@pytest.mark.parametrize(
    ("name", "kill_after"), [("lightning", 7), ("finetuning", 7), ("finetuning", 20)], ids=["", "frozen", "unfrozen"]
)
def test_killed_run_goes_on_to_the_bit(name: str, kill_after: int, tmp_path: Path) -> None:
    whole, again = continued(name, tmp_path, kill_after)
    assert_same_bits(again.model.state_dict(), whole.model.state_dict())
    assert_same_bits(named_state(again.optimizer), named_state(whole.optimizer))
    if name == "finetuning":
        thawed = whole.model.get_parameter("backbone.0.weight")
        torch.manual_seed(0)
        assert not torch.equal(thawed, type(whole.model)().get_parameter("backbone.0.weight"))


def test_run_is_the_loop_by_hand(tmp_path: Path) -> None:
    fit = "trainer.fit(model, data, ckpt_path="
    done = run("lightning", tmp_path, change={fit: f"import copy\nfirst = copy.deepcopy(model)\n{fit}"})
    model, data = done.names["first"], done.names["data"]
    made = model.configure_optimizers()
    train(model.net, made["optimizer"], made["lr_scheduler"]["scheduler"], [*data] * 4)
    assert_same_bits(done.model.state_dict(), model.state_dict())


def test_manual_optimization_is_the_loop_by_hand(tmp_path: Path) -> None:
    model = Manual()
    twin = copy.deepcopy(model)
    fitted(model, tmp_path)
    (optimizer,), (schedule,) = twin.configure_optimizers()
    train(nn.Sequential(twin.backbone, twin.head), optimizer, schedule, [*batches()] * 4)
    assert_same_bits(model.state_dict(), twin.state_dict())


def test_clipping_and_fused_go_together(tmp_path: Path) -> None:
    fused, plain = Net(fused=True), Net()
    for model in (fused, plain):
        fitted(model, tmp_path, gradient_clip_val=0.1, max_epochs=1)
    for name, weight in fused.backbone.state_dict().items():
        torch.testing.assert_close(weight, plain.backbone.state_dict()[name])


@pytest.mark.parametrize("fused", [True, False])
def test_clipping_under_a_scaler_is_refused_where_the_step_takes_over_the_scale(fused: bool) -> None:
    """By Lightning, which clips unscaled gradients alone."""
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refusal = pytest.raises(RuntimeError, match="performs unscaling of gradients internally")
    with refusal if fused else nullcontext():
        precision.clip_gradients(STAC(Net(), fused=fused), 1.0)


@pytest.mark.parametrize("kill_after", [7, 14, 20], ids=["frozen", "unfrozen", "after-that"])
def test_backbone_finetuning_that_is_told_the_role_goes_on_to_the_bit(kill_after: int, tmp_path: Path) -> None:
    (own,) = re.findall(r"^class Unfreeze.*?\n\n\n", block("finetuning"), flags=re.MULTILINE | re.DOTALL)
    recipe = {"STAC(self, **recipes.finetuning(lr=1e-3), include_frozen=True)": "STAC(self, lr=1e-3)"}
    change = {own: block("backbone") + "\n\n", "Unfreeze()": "Unfreeze(2)", **recipe}
    whole, again = continued("finetuning", tmp_path, kill_after, change)
    assert_same_bits(again.model.state_dict(), whole.model.state_dict())
    assert_same_bits(named_state(again.optimizer), named_state(whole.optimizer))
    cap, trunk = whole.optimizer.param_groups
    assert (cap["stac_role"], trunk["stac_role"]) == ("cap", "trunk")
    assert trunk["lr"] == pytest.approx(2 * 0.1 * cap["lr"])  # a tenth of the head's, doubled in the next epoch
    assert whole.optimizer.partition.trunk_layer_names == ("backbone.0", "backbone.2")


def test_backbone_finetuning_is_refused_and_told_what_to_build(tmp_path: Path) -> None:
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    with pytest.raises(RuntimeError, match=r"names no stac_role.*include_frozen=True instead"):
        fitted(Net(), tmp_path, callbacks=[callback])


def test_backbone_finetuning_writes_into_the_last_group_as_the_page_says(tmp_path: Path) -> None:
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 2.0)
    trainer = fitted(Net(include_frozen=True, cap=named("head")), tmp_path, callbacks=[callback])
    cap = trainer.optimizers[0].param_groups[-1]
    assert (cap["name"], cap["lr"]) != ("cap", 1e-3)


def test_weight_averages_of_lightning(tmp_path: Path, told: list[str]) -> None:
    ema = fitted(Net(), tmp_path, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert ema.global_step == 24
    swa = StochasticWeightAveraging(swa_lrs=[7.5e-4, 1e-3], swa_epoch_start=2, annealing_epochs=1)
    trainer = fitted(Net(), tmp_path, callbacks=[swa])
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([7.5e-4, 1e-3])
    assert told == []
    one = StochasticWeightAveraging(swa_lrs=5e-4, swa_epoch_start=1, annealing_epochs=2)
    fitted(Net(), tmp_path, callbacks=[one], max_epochs=6)
    assert len(told) <= 1
    told.clear()


def test_monitor_calls_several_groups_of_a_role_apart(tmp_path: Path) -> None:
    model = Net(cap=last_layers(1), overrides=[(named("backbone.0"), {"lr_ratio": 0.5})])
    monitor = LearningRateMonitor()
    fitted(model, tmp_path, callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert set(monitor.lrs) == {"lr-STAC/trunk", "lr-STAC/trunk_1", "lr-STAC/cap"}


class Released(Net):
    """Releases gradients."""

    def on_train_start(self) -> None:
        self.release = self.trainer.optimizers[0].release_gradients(self)


def test_released_gradients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="step got a closure while gradients are released"):
        fitted(Released(), tmp_path)
