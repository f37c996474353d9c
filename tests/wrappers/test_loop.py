"""A training loop around wrapped optimizers: schedulers, closures, hooks, GradScaler, groups, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, SequentialLR

from stac_optimizer import STAC
from stac_optimizer.optim import Lion
from stac_optimizer.wrappers import Lookahead, Scout, mechanize
from tests.support import assert_same_bits, seeded_loss, set_gradients, small_model, snapshot
from tests.wrappers.support import BASES, WRAPPERS, assert_go_on_alike, built, stepped

each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
each_base = pytest.mark.parametrize("base", ["STAC", "Adam"])


def _decayed(epoch: int) -> float:
    return 1 / (1 + epoch)


@each_base
@each_wrapper
def test_a_scheduler_on_either_moves_both(wrapper: str, base: str) -> None:
    runs = [built(wrapper, base) for _ in range(3)]
    targets = [runs[0][1], runs[1][1].base, runs[2][1]]
    schedulers: list[Any] = [LambdaLR(target, _decayed) for target in targets[:2]]
    for seed in range(4):
        for run, scheduler in zip(runs, [*schedulers, None], strict=True):
            stepped(run, [seed])
            if scheduler is not None:
                scheduler.step()
    assert_same_bits(snapshot(*runs[0]), snapshot(*runs[1]))
    assert [group["lr"] for group in runs[0][1].param_groups] != [group["lr"] for group in runs[2][1].param_groups]
    assert not torch.equal(runs[0][0].get_parameter("0.weight"), runs[2][0].get_parameter("0.weight"))


# Older torch warns of what its own class does.
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@each_wrapper
def test_schedules_over_many_groups_resume(wrapper: str) -> None:
    def made(seed: int) -> tuple[Any, Any]:
        run = built(wrapper, "STAC", seed=seed)
        warmup = LambdaLR(run[1], lambda epoch: min(1.0, epoch / 3))
        return run, SequentialLR(run[1], [warmup, CosineAnnealingLR(run[1], 6)], [3])

    (run, scheduler), (other, other_scheduler) = made(0), made(1)
    for seed in range(5):
        stepped(run, [seed])
        scheduler.step()
    other[0].load_state_dict(run[0].state_dict())
    other[1].load_state_dict(copy.deepcopy(run[1].state_dict()))
    other_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for seed in range(5, 8):
        for each, its in ((run, scheduler), (other, other_scheduler)):
            stepped(each, [seed])
            its.step()
    assert_same_bits(snapshot(*run), snapshot(*other))


@each_wrapper
def test_one_cycle_writes_into_groups(wrapper: str) -> None:
    run = built(wrapper, "STAC")
    scheduler = OneCycleLR(run[1], [0.1 * group["lr"] for group in run[1].param_groups], total_steps=4)
    for seed in range(4):
        stepped(run, [seed])
        if seed < 3:
            scheduler.step()


@each_wrapper
@pytest.mark.parametrize("mode", [False, True])
def test_a_closure_runs_once_with_gradients_and_leaves_the_mode(wrapper: str, mode: bool) -> None:
    for base in ("STAC", "Adam"):
        closing, plain = built(wrapper, base), built(wrapper, base)
        for seed in range(4):
            calls: list[bool] = []

            def closure(seed: int = seed, calls: list[bool] = calls, run: Any = closing) -> torch.Tensor:
                calls.append(torch.is_grad_enabled())
                run[1].zero_grad()
                loss = seeded_loss(run[0], seed)
                loss.backward()
                return loss

            with torch.set_grad_enabled(mode):
                loss = closing[1].step(closure)
                assert torch.is_grad_enabled() is mode
            assert calls == [True]
            plain[1].zero_grad()
            expected = seeded_loss(plain[0], seed)
            expected.backward()
            plain[1].step()
            assert_same_bits(loss.detach(), expected.detach())
        assert_same_bits(snapshot(*closing), snapshot(*plain))


@each_wrapper
def test_hooks_of_both_run(wrapper: str) -> None:
    model, optimizer = built(wrapper, "STAC")
    seen: list[str] = []
    for name, each in (("wrapper", optimizer), ("base", optimizer.base)):
        each.register_step_pre_hook(lambda *_, name=name: seen.append(f"{name} before"))
        each.register_step_post_hook(lambda *_, name=name: seen.append(f"{name} after"))
        each.register_state_dict_pre_hook(lambda *_, name=name: seen.append(f"{name} saves"))
        each.register_load_state_dict_post_hook(lambda *_, name=name: seen.append(f"{name} has loaded"))
    stepped((model, optimizer), [0])
    assert seen == ["wrapper before", "base before", "base after", "wrapper after"]
    seen.clear()
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    saved = optimizer.state_dict()
    assert saved["mark"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["wrapper saves", "base saves", "base has loaded", "wrapper has loaded"]


@each_wrapper
@each_base
def test_a_grad_scaler_unscales_and_skips(wrapper: str, base: str) -> None:
    scaled, plain = built(wrapper, base), built(wrapper, base)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for seed in range(5):
        for (model, optimizer), how in ((scaled, scaler), (plain, None)):
            optimizer.zero_grad()
            loss = seeded_loss(model, seed)
            (loss if how is None else how.scale(loss)).backward()
        if seed == 3:
            before = snapshot(*scaled)
            grads = [param.grad.clone() for param in scaled[0].parameters() if param.grad is not None]
            scaled[0].get_parameter("0.weight").grad[0, 0] = torch.inf  # type: ignore[index]
            scaler.step(scaled[1])
            scaler.update()
            assert_same_bits(snapshot(*scaled), before)
            scaled[1].zero_grad()
            scaler.scale(seeded_loss(scaled[0], seed)).backward()
            assert len(grads) == 6
        scaler.step(scaled[1])
        scaler.update()
        plain[1].step()
    assert_same_bits(scaled[0].state_dict(), plain[0].state_dict())


@each_wrapper
def test_under_autocast_and_inference_mode_a_step_is_the_same(wrapper: str) -> None:
    one, other = built(wrapper, "STAC"), built(wrapper, "STAC")
    for seed in range(4):
        stepped(one, [seed])
        set_gradients(other[0], seed)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            torch.set_default_dtype(torch.float64)
            try:
                other[1].step()
            finally:
                torch.set_default_dtype(torch.float32)
    assert_go_on_alike(one, other)


@each_wrapper
def test_a_tensor_lr_is_read_at_each_step(wrapper: str) -> None:
    model, optimizer = built(wrapper, "SGD")
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.01)
    stepped((model, optimizer), range(3))
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0]["lr"].fill_(0.0)
    optimizer.param_groups[0]["momentum"] = 0.0
    stepped((model, optimizer), [3])
    if "Lookahead" not in wrapper and "mech" not in wrapper:
        assert_same_bits(model.state_dict(), before)


@each_wrapper
def test_zero_grad_repr_and_bytes(wrapper: str) -> None:
    model, optimizer = built(wrapper, "STAC")
    declared = optimizer.state_bytes()
    stepped((model, optimizer), range(2))
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
    assert repr(optimizer).startswith(type(optimizer).__name__)
    assert "STAC (" in repr(optimizer)
    elements = sum(param.numel() for param in model.parameters())
    own = {"Lookahead": 4, "Scout": 16, "mechanize": 4, "mechanize-store-delta": 8, "Lookahead-mechanize": 8}[wrapper]
    base = optimizer.base.base if wrapper == "Lookahead-mechanize" else optimizer.base
    assert optimizer.state_bytes() == declared == base.state_bytes() + own * elements
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.numel() > 24)
    assert held <= optimizer.state_bytes()
    _, guest = built(wrapper, "STAC-guest")
    counted = guest.state_bytes()
    stepped((_, guest), range(2))
    assert guest.state_bytes() == counted
    assert set(guest.state[next(iter(_.parameters()))]) > {"exp_avg"}


@each_wrapper
def test_a_group_that_comes_late_may_have_values_of_its_own(wrapper: str) -> None:
    model, optimizer = built(wrapper, "Adam")
    stepped((model, optimizer), range(3))
    extra = nn.Parameter(torch.ones(3))
    key = next(iter(optimizer._values))
    value = optimizer._values[key]
    optimizer.add_param_group({"params": [extra], "lr": 0.5, key: value})
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.param_groups is optimizer.base.param_groups
    extra.grad = torch.ones(3)
    stepped((model, optimizer), range(3, 6))
    assert not torch.equal(extra, torch.ones(3))
    with pytest.raises((TypeError, ValueError), match=key):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], key: "much"})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [extra]})
    assert len(optimizer.param_groups) == 2


def test_a_released_base_is_refused() -> None:
    model = small_model()
    base = STAC(model, lr=1e-2)
    optimizer = Lookahead(base)
    with base.release_gradients(model):
        scaler = GradScaler("cpu", init_scale=1.0)
        scaler.scale(seeded_loss(model, 0)).backward()
        with pytest.raises(RuntimeError, match="Call remove"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="Call remove"):
            scaler.step(optimizer)
    seeded_loss(model, 0).backward()
    optimizer.step()


def test_sparse_gradients_are_refused_by_mechanize_before_anything_changes() -> None:
    model = nn.Embedding(4, 3, sparse=True)
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    before = copy.deepcopy(model.state_dict())
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert_same_bits(model.state_dict(), before)


# As users without types write it.
lookahead: Any = Lookahead
scout: Any = Scout
made: Any = mechanize


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda _: lookahead(torch.optim.SGD), TypeError, "base must be an optimizer, got SGD"),
        (lookahead, TypeError, "base must be an optimizer, got Sequential"),
        (lambda model: lookahead(STAC(model), sync_rate=1.5), ValueError, r"sync_rate must be .*\[0, 1\], got 1.5"),
        (lambda model: lookahead(STAC(model), sync_rate="0.5"), TypeError, "sync_rate"),
        (lambda model: scout(STAC(model), sync_period=0), ValueError, r"sync_period must be an integer in \[1"),
        (lambda model: scout(STAC(model), sync_period=2.0), TypeError, "sync_period"),
        (lambda model: lookahead(lookahead(STAC(model))), ValueError, "base holds Lookahead already"),
        (lambda model: scout(lookahead(STAC(model))), ValueError, "base holds Lookahead already"),
        (lambda model: lookahead(made(STAC)(model, differentiable=True)), ValueError, "differentiable"),
        (lambda model: STAC(model, trunk_optimizer=made(torch.optim.SGD)), TypeError, "wrap STAC"),
        (lambda model: STAC(model, cap_optimizer=lambda g: lookahead(Lion(g))), TypeError, "wrap STAC"),
        (lambda _: made(Lookahead), TypeError, "wrap what it makes instead"),
        (lambda _: made(made(STAC)), TypeError, "wrap what it makes instead"),
        (lambda _: made(torch.optim.LBFGS), TypeError, "needs a closure"),
        (lambda model: made(STAC(model)), TypeError, "Base must be a class of optimizers"),
        (lambda _: made(STAC, s_init=0), ValueError, r"s_init must be a finite number in \(0, inf\), got 0"),
        (lambda _: made(STAC, betas=()), ValueError, "betas must hold at least one number"),
        (lambda _: made(STAC, betas=0.9), TypeError, "betas must be a tuple"),
        (lambda _: made(STAC, betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be a number in \[0, 1\)"),
        (lambda _: made(STAC, s_decay=-1), ValueError, "s_decay"),
        (lambda _: made(STAC, store_delta=1), TypeError, "store_delta must be True or False"),
    ],
)
def test_arguments_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(small_model())


def test_groups_of_different_tuners_are_refused() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = mechanize(torch.optim.SGD)([{"params": [param]} for param in params], lr=1.0)
    optimizer.param_groups[1]["s_init"] = 0.5
    params[0].grad = torch.ones(2)
    with pytest.raises(ValueError, match="the same s_betas and s_init"):
        optimizer.step()
    assert params[0].tolist() == [1.0, 1.0]


@pytest.mark.cuda
@each_wrapper
def test_a_step_does_not_wait_for_the_device(wrapper: str) -> None:
    model = small_model().cuda()
    optimizer = WRAPPERS[wrapper](BASES["Adam"], model)
    stepped((model, optimizer), range(2))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("wrapper", ["Lookahead", "Scout"])
def test_a_base_whose_hook_drops_gradients_is_followed(wrapper: str) -> None:
    kept, dropped = built(wrapper, "Adam"), built(wrapper, "Adam")
    dropped[1].base.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    for run in (kept, dropped):
        stepped(run, range(7))
    assert_same_bits(snapshot(*kept), snapshot(*dropped))


BAD_GROUPS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (Lookahead, {"sync_period": 0}, ValueError, r"group 0: sync_period must be an integer in \[1, inf\), got 0"),
    (Lookahead, {"sync_rate": 7.0}, ValueError, r"group 0: sync_rate must be a number in \[0, 1\], got 7.0"),
    (mechanize(torch.optim.SGD), {"s_decay": "x"}, TypeError, "group 0: s_decay must be"),
]


@pytest.mark.parametrize(("wrap", "values", "error", "message"), BAD_GROUPS)
def test_settings_in_given_groups_are_checked(
    wrap: Any, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    groups = [{"params": small_model().parameters(), **values}]
    with pytest.raises(error, match=f"^{message}"):
        wrap(torch.optim.SGD(groups, lr=0.1)) if wrap is Lookahead else wrap(groups, lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: Lookahead(base, -0.1), r"sync_rate must be a number in \[0, 1\], got -0.1"),
        (lambda _: mechanize(torch.optim.SGD, s_init=-1), r"s_init must be a finite number in \(0, inf\), got -1"),
    ],
)
def test_range_of_a_setting_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make(torch.optim.SGD(small_model().parameters(), lr=0.1))


@pytest.mark.parametrize("again", [Lookahead, Scout])
def test_a_base_is_wrapped_once(again: Any) -> None:
    """A cell of a notebook that runs again would find groups and state of the first wrapper."""
    model, optimizer = stepped(built("Lookahead", "Adam"), range(2))
    for base in (optimizer.base, copy.deepcopy((model, optimizer))[1].base):
        with pytest.raises(ValueError, match="base is wrapped in Lookahead already"):
            again(base)


def test_all_groups_of_mechanize_have_one_scale() -> None:
    model, optimizer = stepped(built("mechanize", "SGD"), range(2))
    before = snapshot(model, optimizer)
    for key, value in (("s_betas", (0.5,)), ("s_init", 0.1)):
        with pytest.raises(ValueError, match=f"^{key} must be .* as in the other groups"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], key: value})
    assert_same_bits(snapshot(model, optimizer), before)


def test_bytes_and_checkpoints_know_groups_that_came_through_the_base() -> None:
    _, optimizer = stepped(built("mechanize", "SGD"), range(2))
    optimizer.base.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.state_bytes() > 0
    assert all("store_delta" in group for group in optimizer.state_dict()["param_groups"])


def test_scale_before_the_first_step_is_that_of_the_first() -> None:
    optimizer = mechanize(torch.optim.SGD, s_init=0.5, betas=(0.9, 0.99))(small_model().parameters(), lr=1.0)
    assert optimizer.scale.item() == 1.0


def test_frozen_weights_stay_within_slow_weights() -> None:
    model, optimizer = stepped(built("Lookahead", "SGD"), range(4))
    frozen = model.get_parameter("0.weight").requires_grad_(False)
    before = frozen.clone()
    with optimizer.slow_weights():
        assert torch.equal(frozen, before)
