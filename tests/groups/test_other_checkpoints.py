"""State dicts of something else: the message says what they are, and the way on; the optimizer stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lion_pytorch
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from stac_optimizer import STAC, norms
from stac_optimizer.optim import AdamW, Lion, Signum
from tests.support import assert_same_bits, small_model, snapshot, take_steps


def trained(make: Callable[[nn.Module], optim.Optimizer]) -> dict[str, Any]:
    model = small_model()
    optimizer = make(model)
    take_steps(model, optimizer, [0])
    return optimizer.state_dict()


def decaying_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As nanoGPT makes them."""
    weights, rest = ([p for p in model.parameters() if (p.dim() > 1) is wide] for wide in (True, False))
    return [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def adamw(model: nn.Module) -> optim.Optimizer:
    return optim.AdamW(model.parameters())


def schedule(make: Callable[[optim.Optimizer], Any]) -> dict[str, Any]:
    held: dict[str, Any] = make(adamw(small_model())).state_dict()
    return held


WAY = "load_adamw_state_dict(state_dict, model)"
WEIGHTS = "load the model's weights alone"
RETURNS = "must hold 'state' and 'param_groups', as optimizer.state_dict() returns"
# What STAC is given to load, and the words that its message must have.
OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], list[str]]] = {
    "AdamW": (lambda: trained(adamw), ["it is an AdamW's", WAY]),
    "AdamW with names": (lambda: trained(lambda m: optim.AdamW(m.named_parameters())), ["it is an AdamW's", WAY]),
    "AdamW before a step": (lambda: adamw(small_model()).state_dict(), ["it is an AdamW's", WAY]),
    "AdamW of two groups": (lambda: trained(lambda m: optim.AdamW(decaying_groups(m))), ["it is an AdamW's", WAY]),
    "AdamW of six groups": (
        lambda: trained(lambda m: optim.AdamW([{"params": [p]} for p in m.parameters()])),
        ["it is an AdamW's", WAY],
    ),
    "AMSGrad": (lambda: trained(lambda m: optim.AdamW(m.parameters(), amsgrad=True)), ["it is an AdamW's", WAY]),
    "Adam": (lambda: trained(lambda m: optim.Adam(m.parameters())), ["it is an Adam", WAY]),
    "our AdamW": (lambda: trained(lambda m: AdamW(m.parameters())), ["it is one of adamw alone", WAY]),
    "NAdam": (lambda: trained(lambda m: optim.NAdam(m.parameters())), ["it is a NAdam's", WAY]),
    "Adamax": (lambda: trained(lambda m: optim.Adamax(m.parameters())), ["it is another optimizer's", WEIGHTS]),
    "SGD": (lambda: trained(lambda m: optim.SGD(m.parameters(), momentum=0.9)), ["it is an SGD's", WEIGHTS]),
    "SGD of two groups": (lambda: trained(lambda m: optim.SGD(decaying_groups(m))), ["it is an SGD's", WEIGHTS]),
    "RMSprop": (lambda: trained(lambda m: optim.RMSprop(m.parameters())), ["it is an RMSprop's", WEIGHTS]),
    "Adagrad": (lambda: trained(lambda m: optim.Adagrad(m.parameters())), ["it is an Adagrad's", WEIGHTS]),
    "Lion": (lambda: trained(lambda m: lion_pytorch.Lion(m.parameters())), ["it is a Lion's", WEIGHTS]),
    "our Lion": (lambda: trained(lambda m: Lion(m.parameters())), ["it is one of lion alone", WEIGHTS]),
    "our Signum": (lambda: trained(lambda m: Signum(decaying_groups(m))), ["it is one of signum alone", WEIGHTS]),
    "in a checkpoint": (
        lambda: {"epoch": 3, "model": small_model().state_dict(), "optimizer": trained(adamw)},
        [RETURNS, "pass state_dict['optimizer']"],
    ),
    "of a trainer": (
        lambda: {"state_dict": small_model().state_dict(), "optimizer_states": [trained(STAC)], "lr_schedulers": []},
        [RETURNS, "pass state_dict['optimizer_states'][0]"],
    ),
    "in a checkpoint's wrapper": (
        lambda: {"optimizer": {"base_optimizer_state": trained(STAC)}},
        [RETURNS, "pass state_dict['optimizer']['base_optimizer_state']"],
    ),
    "scheduler": (
        lambda: schedule(lambda o: lr_scheduler.CosineAnnealingLR(o, 9)),
        [RETURNS, "scheduler's", "scheduler.load_state_dict"],
    ),
    "chain of schedulers": (
        lambda: schedule(lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2)])),
        [RETURNS, "scheduler.load_state_dict"],
    ),
    "scaler": (
        lambda: torch.amp.GradScaler("cpu").state_dict(),
        [RETURNS, "GradScaler's", "scaler.load_state_dict"],
    ),
    "model": (lambda: small_model().state_dict(), [RETURNS, "it is a model's", "model.load_state_dict"]),
    "other things": (lambda: {"epoch": 1}, [RETURNS, "got the keys ['epoch']"]),
    "nothing": (dict, [RETURNS]),
}


@pytest.mark.parametrize("arguments", [{}, {"last_n_layers": 0}, {"overrides": [(norms(), {"lr": 0.1})]}], ids=str)
@pytest.mark.parametrize(("saved", "words"), OTHERS.values(), ids=OTHERS)
def test_what_stac_cannot_load_is_told_with_the_way_on(
    saved: Callable[[], dict[str, Any]], words: list[str], arguments: dict[str, Any]
) -> None:
    model = small_model()
    optimizer = STAC(model, **arguments)
    take_steps(model, optimizer, [1])
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"^(the checkpoint's parameter groups|state_dict)") as raised:
        optimizer.load_state_dict(saved())
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)
    assert_same_bits(snapshot(model, optimizer), before)


def test_way_of_adamw_is_one_that_works() -> None:
    for name in ("AdamW", "AdamW with names", "AdamW before a step", "Adam", "our AdamW", "NAdam"):
        model = small_model()
        optimizer = STAC(model)
        optimizer.load_adamw_state_dict(OTHERS[name][0](), model)
        take_steps(model, optimizer, [2])


@pytest.mark.parametrize("name", [name for name, (_, words) in OTHERS.items() if WAY not in words])
def test_what_is_no_adamws_is_refused_on_that_way_too(name: str) -> None:
    model = small_model()
    optimizer = STAC(model)
    take_steps(model, optimizer, [1])
    before = snapshot(model, optimizer)
    words = "is no AdamW's, whose state is exp_avg and exp_avg_sq: it is|must hold 'state' and 'param_groups'"
    with pytest.raises(ValueError, match=words):
        optimizer.load_adamw_state_dict(OTHERS[name][0](), model)
    assert_same_bits(snapshot(model, optimizer), before)


def test_state_in_a_form_of_its_own_is_not_lost_in_silence() -> None:
    """As an 8-bit AdamW keeps it."""
    saved = trained(adamw)
    saved["state"] = {0: {"step": 1, "state1": torch.ones(30), "state2": torch.ones(30)}}
    model = small_model()
    with pytest.raises(ValueError, match="it is an AdamW's, with state1, state2, step"):
        STAC(model).load_adamw_state_dict(saved, model)


def test_adamws_checkpoint_for_foreign_optimizers_says_which_roles_take_it() -> None:
    optimizer = STAC(small_model(), trunk_optimizer=optim.SGD)
    with pytest.raises(ValueError, match=r"load_adamw_state_dict.*takes roles with rules of this package"):
        optimizer.load_state_dict(trained(adamw))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: optim.Adagrad(model.parameters()), "it is an Adagrad's. Load the model's weights alone"),
        (STAC, "have a stac_role: it is a STAC's.* Load it into a STAC"),
        (lambda model: STAC(model, last_n_layers=0), "have a stac_role: it is a STAC's"),
    ],
    ids=["Adagrad", "STAC", "all-trunk"],
)
@pytest.mark.parametrize("kind", [Signum, Lion])
def test_drop_in_class_refuses_what_is_of_another_class(kind: Any, make: Any, words: str) -> None:
    optimizer = kind(small_model().parameters())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(trained(make))


def test_drop_in_class_refuses_groups_and_state_of_another_class() -> None:
    with pytest.raises(ValueError, match=r"it is an AdamW's\. Load the model's weights alone"):
        Signum(small_model().parameters()).load_state_dict(trained(adamw))
    with pytest.raises(ValueError, match=r"'exp_avg_sq' of '<group 0>\.0' is no state of the rule 'lion'"):
        Lion(small_model().parameters()).load_state_dict(trained(adamw))
    with pytest.raises(ValueError, match="have none of amsgrad, betas, eps, which those of adamw have: it is an SGD's"):
        AdamW(small_model().parameters()).load_state_dict(trained(lambda m: optim.SGD(m.parameters())))


def test_drop_in_class_takes_groups_of_the_published_class() -> None:
    optimizer = Lion(small_model().parameters())
    optimizer.load_state_dict(lion_pytorch.Lion(small_model().parameters(), lr=0.5).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"last_n_layers": 2},
            ["layer_names", "parameter groups are of another split", "last_n_layers, cap and overrides"],
        ),
        ({"cap": norms()}, ["layer_names", "parameter groups are of another split"]),
        ({"last_n_layers": 9}, ["1 parameter groups, this optimizer 2", "the arguments it had then"]),
        ({"overrides": [(norms(), {"lr": 0.1})]}, ["3 parameter groups, this optimizer 2", "overrides it had then"]),
        (
            {"trunk_optimizer": Lion},
            ["rule is 'lion'", "'signum'", "the trunk_optimizer and cap_optimizer that it had"],
        ),
    ],
    ids=["another-number", "another-cap", "one-role", "overrides", "another-rule"],
)
def test_checkpoint_of_another_split_says_what_to_build(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="checkpoint") as raised:
        STAC(small_model()).load_state_dict(trained(lambda model: STAC(model, **arguments)))
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)


def test_number_of_groups_of_a_drop_in_class_says_nothing_of_overrides() -> None:
    with pytest.raises(ValueError, match=r"2 parameter groups, this optimizer 1\. Give the optimizer as many groups"):
        AdamW(small_model().parameters()).load_state_dict(trained(lambda m: AdamW(decaying_groups(m))))
