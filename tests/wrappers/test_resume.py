"""Checkpoints and copies of wrapped optimizers, over many bases: they go on to the bit."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

from tests.support import assert_same_bits, set_gradients
from tests.wrappers.support import BASES, WRAPPERS, assert_go_on_alike, built, loaded, stepped

each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


@pytest.mark.parametrize(
    ("wrapper", "base"),
    [
        *(("Lookahead-mechanize", base) for base in BASES),
        *((wrapper, base) for wrapper in WRAPPERS for base in ("STAC-int8", "STAC-guest", "Adagrad", "SGD")),
    ],
)
def test_resumes_from_a_file(wrapper: str, base: str) -> None:
    source = stepped(built(wrapper, base), range(4))
    assert_go_on_alike(loaded(built(wrapper, base, seed=1), source), source)


@each_wrapper
@pytest.mark.parametrize("base", ["STAC", "optim.Lion", "Adam", "SGD"])
def test_resumes_in_an_optimizer_that_has_stepped(wrapper: str, base: str) -> None:
    source = stepped(built(wrapper, base), range(4))
    assert_go_on_alike(loaded(stepped(built(wrapper, base, seed=1), range(7, 9)), source), source)


@each_wrapper
@pytest.mark.parametrize("base", ["STAC", "Adam"])
def test_resumes_before_the_first_step(wrapper: str, base: str) -> None:
    source = built(wrapper, base)
    assert_go_on_alike(loaded(built(wrapper, base, seed=1), source), source)


@each_wrapper
@pytest.mark.parametrize("base", ["STAC", "Adam", "SGD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_state_keeps_its_dtype(wrapper: str, base: str, dtype: torch.dtype) -> None:
    source = stepped(built(wrapper, base, dtype=dtype), range(4))
    target = loaded(built(wrapper, base, seed=1, dtype=dtype), source)
    if base != "STAC":  # torch's own casts its averages, which are of the weights' dtype here
        assert_go_on_alike(target, source)
    assert_same_bits(target[1].state_dict(), source[1].state_dict())


@each_wrapper
@pytest.mark.parametrize("base", ["STAC", "STAC-guest", "optim.Muon", "Adam", "Adagrad", "SGD"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(wrapper: str, base: str, how: str) -> None:
    run = stepped(built(wrapper, base), range(4))
    twin = copy.deepcopy(run) if how == "deepcopy" else pickle.loads(pickle.dumps(run))
    assert type(twin[1]) is type(run[1])
    assert not {id(param) for param in twin[1].state} & {id(param) for param in run[1].state}
    assert_go_on_alike(twin, run)


@each_wrapper
@pytest.mark.parametrize("base", ["STAC", "Adam", "SGD"])
def test_a_checkpoint_of_the_base_alone_loads(wrapper: str, base: str) -> None:
    """The wrapper begins with the weights that its next step finds."""
    if "mechanize" in wrapper:
        source = stepped(built("Lookahead", base), range(2))
        plain = (source[0], source[1].base)
        saved = plain[1].state_dict()
        for state in saved["state"].values():
            for key in [key for key in state if key.startswith("lookahead_")]:
                del state[key]
    else:
        model, optimizer = built(wrapper, base)
        plain = (model, optimizer.base)
        saved = stepped(plain, range(2))[1].state_dict()
    target = built(wrapper, base)
    target[1].load_state_dict(saved)
    own = [key for state in target[1].state.values() for key in state if key.startswith(("look", "scout", "mech"))]
    assert own == []
    stepped(target, range(3))


@each_wrapper
def test_what_all_parameters_have_one_of_is_one_tensor_again(wrapper: str) -> None:
    source = stepped(built(wrapper, "Adam"), range(4))
    target = loaded(built(wrapper, "Adam", seed=1), source)
    for run in (source, target, copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        for key in ("lookahead_step", "scout_step", "mechanic_numbers"):
            assert len({id(state[key]) for state in run[1].state.values() if key in state}) <= 1


@each_wrapper
@pytest.mark.parametrize("base", ["STAC", "Adam", "SGD"])
def test_parameters_that_begin_late_and_groups_that_come_late_resume(wrapper: str, base: str) -> None:
    def grown(seed: int) -> tuple[torch.nn.Module, object]:
        model, optimizer = built(wrapper, base, seed=seed)
        model.extra = torch.nn.Linear(3, 3)
        role = {"stac_role": "trunk"} if base == "STAC" else {}
        pairs = [(f"extra.{name}", param) for name, param in model.extra.named_parameters()]
        params = pairs if base == "STAC" else [param for _, param in pairs]
        optimizer.add_param_group({"params": params, "lr": 2e-2, **role})
        return model, optimizer

    source = grown(0)
    stepped(source, range(3), skip=("0.bias", "extra.weight"))
    stepped(source, range(3, 5), skip=("1.weight",))
    assert_go_on_alike(loaded(grown(1), source), source)


def test_a_first_step_without_any_gradient_changes_nothing() -> None:
    for wrapper in WRAPPERS:
        for base in ("STAC", "Adam", "SGD"):
            late, prompt = built(wrapper, base), built(wrapper, base)
            before = copy.deepcopy(late[0].state_dict())
            late[1].step()
            late[1].step()
            assert_same_bits(late[0].state_dict(), before)
            for run in (late, prompt):
                set_gradients(run[0], 0)
                run[1].step()
            assert_same_bits(late[0].state_dict(), prompt[0].state_dict())


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("base", ["STAC", "SGD"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_resumes_and_goes_on_in_another_dtype(wrapper: str, base: str) -> None:
    """The wrapper's own state goes with the weights, and nothing of it is left in the old dtype."""
    for before, after in itertools.permutations(DTYPES, 2):
        source = stepped(built(wrapper, base, dtype=before), range(4))
        target = loaded(built(wrapper, base, seed=1, dtype=after), source)
        stepped(target, range(4, 11))
        for param in target[0].parameters():
            own = {key: value for key, value in target[1].state[param].items() if "_slow" in key or "_reference" in key}
            assert {value.dtype for value in own.values()} <= {after}
            assert param.isfinite().all()


def test_a_model_that_is_cast_in_mid_run_goes_on() -> None:
    model, optimizer = stepped(built("Lookahead", "SGD"), range(4))
    stepped((model.to(torch.bfloat16), optimizer), range(4, 8))
    assert all(param.isfinite().all() for param in model.parameters())
