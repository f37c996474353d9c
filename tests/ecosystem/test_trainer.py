"""STAC in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, TrainingArguments

from stac_optimizer import STAC, embeddings, last_layers, recipes, vectors
from tests.ecosystem.pages import Run, block, continued, named_state, run
from tests.real_models import MODELS
from tests.support import assert_same_bits

# What Trainer writes while it runs, no test reads.
QUIET = {'    report_to="none",\n': '    report_to="none",\n    disable_tqdm=True,\n    use_cpu=True,\n'}
FACTORLESS = "trainer = Trainer(model, arguments, train_dataset=texts, optimizers=(STAC(model, **recipe), None))\n"


def log(done: Run, key: str) -> list[float]:
    return [entry[key] for entry in done.names["trainer"].state.log_history if key in entry]


def run_with(folder: Path, *arguments: str, **change: str) -> Run:
    """The program with further arguments of Trainer's."""
    (old, new), *_ = QUIET.items()
    return run("trainer", folder, change={old: new + "".join(f"    {line},\n" for line in arguments), **change})


def test_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, again = continued("trainer", tmp_path, 7, QUIET)
    assert again.steps == 3
    assert_same_bits(again.model.state_dict(), whole.model.state_dict())
    assert_same_bits(named_state(again.optimizer), named_state(whole.optimizer))
    assert log(whole, "learning_rate")[:3] == pytest.approx([0.0, 5e-4, 1e-3])  # the trunk's, in its warm-up
    assert min(log(whole, "grad_norm")) > 0.1


def test_step_sees_clipped_gradients(tmp_path: Path) -> None:
    norms: list[torch.Tensor] = []

    def measure(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads))

    handle = register_optimizer_step_pre_hook(measure)
    try:
        done = run_with(tmp_path, **{"    max_grad_norm=1.0,\n": "    max_grad_norm=0.05,\n"})
    finally:
        handle.remove()
    assert min(log(done, "grad_norm")) > 0.1  # as it was before
    assert torch.stack(norms).tolist() == pytest.approx([0.05] * 9, rel=1e-4)


def test_class_and_the_model_among_its_arguments_are_the_same_run(tmp_path: Path) -> None:
    one, other = (
        run("trainer", tmp_path / name, change={**QUIET, FACTORLESS: trainer})
        for name, trainer in (("instance", FACTORLESS), ("class", block("trainer-class")))
    )
    assert_same_bits(other.model.state_dict(), one.model.state_dict())


def test_class_without_the_model_is_told_what_to_pass(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, weight_decay=0.1)
    trainer = Trainer(MODELS["bert"](), arguments, optimizer_cls_and_kwargs=(STAC, {"lr": 1e-3}))
    with pytest.raises(ValueError, match=r'stac_role must be.*\(STAC, \{"model": model, \.\.\.\}\)$'):
        trainer.create_optimizer()


@pytest.mark.parametrize("name", ["gpt2-untied", "bert", "vit"])
def test_override_of_vectors_decays_what_trainer_decays(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    overrides = [(vectors(), {"weight_decay": 0.0})]
    optimizer = STAC(model, weight_decay=0.1, cap=last_layers(1) | embeddings(), overrides=overrides)
    decayed = {name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}
    own = {name for name, _ in model.named_parameters()}  # its list also has the other names of tied weights
    assert decayed == own & set(trainer.get_decay_parameter_names(model))


@pytest.mark.parametrize("argument", ["bf16=True", "gradient_checkpointing=True", 'optim="adafactor"'])
def test_arguments_that_need_nothing(argument: str, tmp_path: Path) -> None:
    done = run_with(tmp_path / "with", argument)
    assert done.steps == 9
    if argument != "bf16=True":
        assert_same_bits(done.model.state_dict(), run_with(tmp_path / "without").model.state_dict())


def test_released_gradients_are_not_clipped_and_trainers_log_shows_it(tmp_path: Path) -> None:
    """As the page says: nothing tells an optimizer that clip_grad_norm_ found no gradient."""
    released = {
        "    gradient_accumulation_steps=2,\n": "",
        FACTORLESS: FACTORLESS + "release = trainer.optimizer.release_gradients(model)\n",
    }
    clipped = run_with(tmp_path / "clipped", **released)
    assert set(log(clipped, "grad_norm")) == {0.0}
    unclipped = {**released, "    max_grad_norm=1.0,\n": "    max_grad_norm=0.0,\n"}
    assert_same_bits(run_with(tmp_path / "not", **unclipped).model.state_dict(), clipped.model.state_dict())


def test_tied_head_is_told_of_and_the_line_to_write_is_quiet(told: list[str]) -> None:
    model: Any = MODELS["gpt2"]()
    assert STAC(model).partition.cap_layer_names == ("transformer.ln_f",)
    message, of_positions = told
    assert "the trunk holds the embedding 'transformer.wpe'" in of_positions  # and not wte, all of which has gradients
    assert "To have the tied weight in the cap, write cap=named('transformer.wte') | norms()" in message
    told.clear()
    names: dict[str, Any] = {}
    exec("from stac_optimizer import named, norms\ncap = " + message.rpartition("cap=")[2], names)
    assert "transformer.wte" in STAC(model, cap=names["cap"], trunk_cautious=True).partition.cap_layer_names
    STAC(model, **recipes.transformer(lr=1e-3))
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
