"""The constructor's arguments, the groups that they make, groups given as dicts, and rules of one's own."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from stac_optimizer import STAC, embeddings, last_layers, norms, partition_trainable_layers
from stac_optimizer.validation import non_negative
from stac_optimizer.rules import RULES, Group, Hyperparameter, Rule, StateTensor, StepInputs, hyperparameters
from tests.support import assert_same_bits, small_model, take_steps, through_file
from tests.model.models import Net, compiled, described, frozen, parameter
from tests.model.models import TokenEmbedding

NAMES = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
STRUCTURE = ["params", "param_names", "stac_role", "rule", "layer_names", "layer_types"]


def group_of(role: str | None, *layers: str, **rest: Any) -> dict[str, Any]:
    """A group dict with the parameters of fresh linear layers; no role where that is None."""
    params = [(f"{layer}.{name}", param) for layer in layers for name, param in nn.Linear(2, 2).named_parameters()]
    return {"params": params, **({} if role is None else {"stac_role": role}), **rest}


def by_role(optimizer: STAC, key: str) -> dict[str, Any]:
    """A group key's value for each role."""
    return {group["stac_role"]: group[key] for group in optimizer.param_groups}


def test_defaults_of_constructor_are_those_of_the_rules() -> None:
    arguments = inspect.signature(STAC).parameters
    known = hyperparameters()
    of_roles = {f"{role}_{name}" for role in ("trunk", "cap") for name in ("lr", "weight_decay")}
    set_by_vote = {"trunk_vote"}
    assert set(arguments) == {"params", "last_n_layers", "cap", "vote"} | of_roles | set(known) - set_by_vote
    for name, argument in arguments.items():
        if name in known:
            assert argument.default == known[name].default
            assert type(argument.default) is type(known[name].default)
        assert argument.kind is (argument.POSITIONAL_OR_KEYWORD if name in ("params", "lr") else argument.KEYWORD_ONLY)
    assert arguments["last_n_layers"].default == 1
    assert all(arguments[name].default is None for name in (*of_roles, "cap", "vote"))


def test_groups_of_model_are_trunk_and_cap() -> None:
    model = small_model()
    for params in (model, model.named_parameters(), list(model.named_parameters())):
        groups = STAC(params).param_groups
        assert [group["stac_role"] for group in groups] == ["trunk", "cap"]
        assert [group["rule"] for group in groups] == ["sign_momentum", "adamw"]
        assert [group["param_names"] for group in groups] == [NAMES[:4], NAMES[4:]]
        assert [group["layer_names"] for group in groups] == [("0", "1"), ("3",)]
        held = [param for group in groups for param in group["params"]]
        assert all(one is other for one, other in zip(held, model.parameters(), strict=True))
        assert all(set(group) == {*STRUCTURE, *hyperparameters()} for group in groups)
        for key, known in hyperparameters().items():
            expected = [7.5e-4, 1e-3] if key == "lr" else [known.default] * 2
            assert [group[key] for group in groups] == expected
    assert [group["layer_types"] for group in STAC(model).param_groups] == [("Linear", "LayerNorm"), ("Linear",)]


@pytest.mark.parametrize(("last_n_layers", "role"), [(0, "trunk"), (3, "cap"), (99, "cap")])
def test_role_without_layers_has_no_group(last_n_layers: int, role: str) -> None:
    (group,) = STAC(small_model(), lr=0.5, last_n_layers=last_n_layers).param_groups
    assert (group["stac_role"], group["lr"], group["layer_names"]) == (role, 0.5, ("0", "1", "3"))
    own_lr: dict[str, Any] = {f"{role}_lr": 0.25}
    assert by_role(STAC(small_model(), lr=0.5, last_n_layers=last_n_layers, **own_lr), "lr") == {role: 0.25}


# Arguments, a group key, and what it holds in trunk and cap.
RESOLVED: list[tuple[dict[str, Any], str, Any, Any]] = [
    ({"lr": 1}, "lr", 0.75, 1.0),
    ({"lr": np.float32(0.5)}, "lr", 0.375, 0.5),
    ({"lr": 0.5, "trunk_lr": 0.1}, "lr", 0.1, 0.5),
    ({"lr": 0.5, "trunk_lr": 0}, "lr", 0.0, 0.5),
    ({"lr": 0.5, "cap_lr": 0.1}, "lr", 0.375, 0.1),
    ({"lr": 0.5, "trunk_lr": np.float64(0.2), "cap_lr": np.float64(0.1)}, "lr", 0.2, 0.1),
    ({"weight_decay": 0.1}, "weight_decay", 0.1, 0.1),
    ({"weight_decay": 0.1, "trunk_weight_decay": 0}, "weight_decay", 0.0, 0.1),
    ({"weight_decay": 0.1, "cap_weight_decay": np.float64(0.2)}, "weight_decay", 0.1, 0.2),
    ({"trunk_weight_decay": 0.1, "cap_weight_decay": 0.2}, "weight_decay", 0.1, 0.2),
    ({"betas": [0.8, np.float32(0.5)]}, "betas", (0.8, 0.5), (0.8, 0.5)),
    ({"trunk_momentum": np.float32(0.5)}, "trunk_momentum", 0.5, 0.5),
    ({"eps": np.float64(0.1)}, "eps", 0.1, 0.1),
    *(
        ({name: value}, name, value, value)
        for name, value in [
            ("trunk_cautious", True),
            ("amsgrad", True),
            ("maximize", True),
            ("error_if_nonfinite", True),
            ("foreach", True),
            ("foreach", False),
            ("fused", True),
            ("capturable", True),
            ("differentiable", True),
        ]
    ),
]


def argument_id(arguments: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items()) if isinstance(arguments, dict) else ""


@pytest.mark.parametrize(
    ("arguments", "key", "trunk", "cap"), [pytest.param(*case, id=argument_id(case[0])) for case in RESOLVED]
)
def test_argument_reaches_groups_as_plain_python(arguments: dict[str, Any], key: str, trunk: Any, cap: Any) -> None:
    optimizer = STAC(small_model(), **arguments)
    assert by_role(optimizer, key) == {"trunk": trunk, "cap": cap}
    assert through_file(optimizer.state_dict()) == optimizer.state_dict()
    assert not any(name.startswith(("trunk_lr", "cap_")) for group in optimizer.param_groups for name in group)


LR = torch.tensor(1e-3)


@pytest.mark.parametrize(
    "arguments",
    [{"lr": LR}, {"trunk_lr": LR, "cap_lr": LR}, {"cap_lr": LR}, {"lr": LR, "trunk_lr": LR}],
    ids=["lr", "both", "cap", "trunk"],
)
def test_tensor_lr_never_shared_between_groups(arguments: dict[str, Any]) -> None:
    lrs = by_role(STAC(small_model(), **copy.deepcopy(arguments)), "lr")
    assert lrs["cap"] == LR
    assert float(lrs["trunk"]) == pytest.approx(1e-3 if "trunk_lr" in arguments else 7.5e-4)
    lrs["cap"].fill_(0.5)
    assert float(lrs["trunk"]) < 0.5


def test_tensor_lr_never_shared_between_explicit_groups() -> None:
    given = [group_of("cap", "0"), group_of("cap", "1"), group_of("trunk", "3", lr=LR), group_of("trunk", "4", lr=LR)]
    lrs = [group["lr"] for group in STAC(given, lr=torch.tensor(0.5), trunk_lr=0.25).param_groups]
    assert [float(lr) for lr in lrs] == pytest.approx([0.5, 0.5, 1e-3, 1e-3])
    assert len({lr.data_ptr() for lr in lrs}) == 4


def test_explicit_groups_keep_order_and_hyperparameters() -> None:
    given = [
        group_of("cap", "a", lr=0.5, betas=[0.5, 0.25], initial_lr=0.5),
        group_of("trunk", "b.c", "b.d", weight_decay=0.5),
        group_of("trunk", "e", lr=0.25, trunk_momentum=0, rule="sign_momentum"),
        group_of("trunk", "f", rule="adamw", amsgrad=True),
    ]
    before = [dict(group) for group in given]
    optimizer = STAC(given, lr=0.1, trunk_weight_decay=0.25)
    assert given == before
    assert [
        (group["stac_role"], group["rule"], group["lr"], group["weight_decay"], group["layer_names"])
        for group in optimizer.param_groups
    ] == [
        ("cap", "adamw", 0.5, 0.0, ("a",)),
        ("trunk", "sign_momentum", pytest.approx(0.075), 0.5, ("b.c", "b.d")),
        ("trunk", "sign_momentum", 0.25, 0.25, ("e",)),
        ("trunk", "adamw", pytest.approx(0.075), 0.25, ("f",)),
    ]
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.25)
    assert optimizer.param_groups[0].pop("initial_lr") == 0.5
    assert all(set(group) == {*STRUCTURE, *hyperparameters()} for group in optimizer.param_groups)
    assert optimizer.partition.trunk_layer_names == ("b.c", "b.d", "e", "f")
    assert optimizer.partition.cap_layer_names == ("a",)


@pytest.mark.parametrize("form", ["list", "generator", "tensor", "param_names"])
def test_explicit_group_takes_parameters_in_any_form(form: str) -> None:
    param = parameter(2)
    forms: dict[str, dict[str, Any]] = {
        "list": {"params": [param]},
        "generator": {"params": (each for each in [param])},
        "tensor": {"params": param},
        "param_names": {"params": [param], "param_names": ["a.w"]},
    }
    (group,) = STAC([{"stac_role": "cap", **forms[form]}]).param_groups
    assert group["params"][0] is param
    assert group.get("param_names") == forms[form].get("param_names")
    assert group["layer_names"] == (("a",) if form == "param_names" else ())
    assert group["lr"] == 1e-3


def test_explicit_groups_train_as_the_model_would() -> None:
    explicit, whole = small_model(), small_model()
    params = list(explicit.named_parameters())
    given = [{"params": params[:4], "stac_role": "trunk"}, {"params": params[4:], "stac_role": "cap"}]
    optimizers = STAC(given, lr=0.1), STAC(whole, lr=0.1)
    for model, optimizer in zip((explicit, whole), optimizers, strict=True):
        take_steps(model, optimizer, range(3))
    assert_same_bits(explicit.state_dict(), whole.state_dict())
    assert optimizers[0].partition.cap_layer_names == ("3",)


SHARED = parameter(2)
CAP = {"stac_role": "cap"}
KINDS = "params must be a module, named parameters or group dicts, got "
# What is given, the error, and what its message holds.
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "none": (lambda: None, TypeError, KINDS + "NoneType"),
    "number": (lambda: 1, TypeError, KINDS + "int"),
    "string": (lambda: "ab", TypeError, KINDS + "str"),
    "tensor": (lambda: SHARED, TypeError, KINDS + "Parameter"),
    "method": (lambda: nn.Linear(2, 2).parameters, TypeError, KINDS + "method"),
    "one-dict": (lambda: group_of("cap", "0"), TypeError, "or group dicts with a stac_role"),
    "without-names": (lambda: nn.Linear(2, 2).parameters(), TypeError, "type Parameter.*pass the model itself"),
    "missing-role": (lambda: [group_of(None, "0")], ValueError, "^group 0: stac_role .*'trunk', 'cap', got None"),
    "unknown-role": (lambda: [group_of("head", "0")], ValueError, "^group 0: stac_role .*'trunk', 'cap', got 'head'"),
    "role-no-string": (lambda: [{**group_of("cap", "0"), "stac_role": ["cap"]}], Exception, "^group 0: stac_role"),
    "unknown-rule": (lambda: [group_of("cap", "0", rule="sgd")], ValueError, "rule .*'adamw', got 'sgd'"),
    "unknown-key": (
        lambda: [group_of("trunk", "0"), group_of("cap", "1", weight_dekay=0)],
        ValueError,
        "^group 1: unknown key 'weight_dekay'; allowed are .*weight_decay",
    ),
    "argument-as-key": (lambda: [group_of("cap", "0", cap_lr=0.1)], ValueError, "^group 0: unknown key 'cap_lr'"),
    "exhausted": (
        lambda: [group_of("cap", "0"), {**CAP, "params": iter([])}],
        ValueError,
        "^group 1: params must hold at least one .*exhausted",
    ),
    "no-params": (lambda: [CAP], ValueError, "^group 0: params is missing"),
    "params-no-iterable": (lambda: [{**CAP, "params": 1}], TypeError, "group 0: params .*int"),
    "params-set": (lambda: [{**CAP, "params": {SHARED}}], TypeError, "ordered|set"),
    "too-few-names": (lambda: [{**CAP, "params": [SHARED], "param_names": []}], ValueError, "^group 0: param_names"),
    "name-no-string": (lambda: [{**CAP, "params": [(0, SHARED)]}], TypeError, "group 0: .*name"),
    "set-of-pairs": (lambda: set(nn.Linear(2, 2).named_parameters()), TypeError, "ordered|set"),
    "name-twice": (lambda: [{**CAP, "params": [("a", SHARED), ("a", parameter(1))]}], ValueError, "'a' twice"),
    "triple": (lambda: [{**CAP, "params": [("a", SHARED, 1)]}], TypeError, r"group 0: .*\(name, parameter\) pair"),
    "param-no-tensor": (
        lambda: [{**CAP, "params": [1.0]}],
        TypeError,
        "group 0: parameter 0 must be a parameter or .*got 1.0",
    ),
    "unnamed-beside-named": (lambda: [{**CAP, "params": [("a", SHARED), parameter(1)]}], ValueError, "without names"),
    "unnamed-group": (lambda: [group_of("cap", "0"), {**CAP, "params": [SHARED]}], ValueError, "without names"),
    "in-two-groups": (lambda: [{**CAP, "params": [SHARED]}] * 2, ValueError, "one parameter twice"),
    "lazy": (lambda: [{**CAP, "params": nn.LazyLinear(2).parameters()}], ValueError, "no shape yet"),
    "dict-then-tensor": (lambda: [group_of("cap", "0"), SHARED], TypeError, "^group 1: expected a dict.*Parameter"),
    "pair-then-dict": (lambda: [("a.w", SHARED), group_of("cap", "0")], TypeError, "type dict"),
}


@pytest.mark.parametrize(("build", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_params_raise(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        STAC(build())


@pytest.mark.parametrize("arguments", [{"last_n_layers": -1}, {"cap": last_layers(1)}], ids=["last_n_layers", "cap"])
def test_choice_of_layers_beside_explicit_groups_raises(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} "):
        STAC([group_of("cap", "0")], **arguments)


@pytest.mark.parametrize("fused", [None, True], ids=["plain", "fused"])
@pytest.mark.parametrize("layers", [(), ("0",)], ids=["all-empty", "one-empty"])
def test_group_may_be_an_empty_list(layers: tuple[str, ...], fused: bool | None) -> None:
    given = [group_of("trunk"), group_of("cap", *layers), {"params": (), "stac_role": "cap"}]
    optimizer = STAC(given, fused=fused, error_if_nonfinite=True)
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(optimizer.state) == 2 * len(layers)
    assert optimizer.partition.cap_layer_names == layers
    assert [group["lr"] for group in optimizer.param_groups] == [0.75e-3, 1e-3, 1e-3]
    resumed = STAC(given, lr=0.5)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert_same_bits(resumed.state_dict(), optimizer.state_dict())


def test_layer_in_two_groups_of_a_role_is_listed_once() -> None:
    decayed, rest = group_of("trunk", "0", weight_decay=0.1), group_of("trunk", weight_decay=0.0)
    rest["params"].append(decayed["params"].pop())
    optimizer = STAC([decayed, rest])
    assert optimizer.partition.trunk_layer_names == ("0",)
    assert optimizer.partition.trunk_layers[0].parameter_names == ("0.weight", "0.bias")


def test_names_of_explicit_groups_are_without_wrappers() -> None:
    params = compiled(small_model()).named_parameters()
    (group,) = STAC([{"params": params, "stac_role": "trunk"}]).param_groups
    assert group["layer_names"] == ("0", "1", "3")
    assert group["param_names"] == NAMES


def test_failed_constructor_leaves_given_groups_usable() -> None:
    given = [group_of("trunk", "0"), group_of("cap", "1", lr=-1.0)]
    before = [dict(group) for group in given]
    with pytest.raises(ValueError, match=r"^group 1: lr"):
        STAC(given)
    assert given == before
    assert len(STAC([given[0], {**given[1], "lr": 0.1}]).param_groups) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"trunk_momentum": 0}, {"amsgrad": True, "last_n_layers": 2}, {"cap": norms()}, {"last_n_layers": 0}],
    ids=argument_id,
)
def test_partition_of_optimizer_is_the_models_with_state_bytes(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    model = small_model(dtype=dtype)
    optimizer = STAC(model, lr=0.5, **arguments)
    choice = {name: value for name, value in arguments.items() if name in ("last_n_layers", "cap")}
    expected = partition_trainable_layers(model, **choice)
    promised = optimizer.partition
    take_steps(model, optimizer, range(2))
    for partition in (promised, optimizer.partition):
        assert described(partition) == described(expected)
        for layer in (*partition.trunk_layers, *partition.cap_layers):
            state = [tensor for param in layer.parameters for tensor in optimizer.state[param].values()]
            assert layer.state_bytes == sum(tensor.nbytes for tensor in state)


def test_partition_counts_loaded_state_in_its_own_dtype() -> None:
    model = small_model()
    saved, loading = STAC(model), STAC(small_model(dtype=torch.bfloat16), lr=0.5)
    take_steps(model, saved, [0])
    loading.load_state_dict(saved.state_dict())
    assert [layer.state_bytes for layer in loading.partition.trunk_layers] == [4 * 35 + 8, 4 * 10 + 8]
    assert loading.partition.cap_layers[0].state_bytes == 8 * 18 + 8


def embedder(embedding: nn.Module) -> Net:
    return Net(tokens=embedding, block=nn.Linear(3, 3), head=nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("embedding", "names"),
    [
        pytest.param(nn.Embedding(4, 3), "'tokens'", id="embedding"),
        pytest.param(nn.EmbeddingBag(4, 3), "'tokens'", id="bag"),
        pytest.param(TokenEmbedding(4, 3), "'tokens'", id="subclass"),
        pytest.param(nn.Sequential(nn.Embedding(4, 3), nn.Embedding(4, 3)), "'tokens.0', 'tokens.1'", id="two"),
    ],
)
def test_embedding_in_trunk_warns_with_name_and_both_cures(embedding: nn.Module, names: str) -> None:
    cures = r"trunk_cautious=True, or .* cap=last_layers\(1\) \| embeddings\(\)"
    with pytest.warns(UserWarning, match=f"^the trunk holds the embeddings? {names}: .*{cures}") as caught:
        STAC(embedder(embedding))
    assert len(caught) == 1


QUIET: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "cautious": (lambda: embedder(nn.Embedding(4, 3)), {"trunk_cautious": True}),
    "no-momentum": (lambda: embedder(nn.Embedding(4, 3)), {"trunk_momentum": 0}),
    "in-cap": (lambda: embedder(nn.Embedding(4, 3)), {"cap": last_layers(1) | embeddings()}),
    "all-cap": (lambda: embedder(nn.Embedding(4, 3)), {"last_n_layers": 3}),
    "frozen": (lambda: embedder(frozen(nn.Embedding(4, 3))), {}),
    "names-alone": (lambda: embedder(nn.Embedding(4, 3)).named_parameters(), {}),
}


@pytest.mark.parametrize(("build", "arguments"), QUIET.values(), ids=QUIET)
def test_harmless_embedding_draws_no_warning(build: Callable[[], Any], arguments: dict[str, Any]) -> None:
    assert STAC(build(), **arguments).partition.cap_layer_names[-1] == "head"  # a warning would raise


def loaded(optimizer: STAC) -> STAC:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


@pytest.mark.parametrize(
    "passed_on",
    [lambda optimizer: optimizer, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer)), loaded],
    ids=["new", "deepcopy", "pickle", "loaded"],
)
def test_add_param_group_is_refused(passed_on: Callable[[STAC], STAC]) -> None:
    optimizer = passed_on(STAC(small_model()))
    with pytest.raises(RuntimeError, match=r"^STAC takes no further groups.* build a new optimizer from the model"):
        optimizer.add_param_group(group_of("cap", "4"))
    assert by_role(optimizer, "layer_names") == {"trunk": ("0", "1"), "cap": ("3",)}


class Toy(Rule):
    """Descends along the sum of all gradients, times a gain."""

    name = "toy"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "toy_gain": Hyperparameter(default=2.0, check=non_negative)
    }

    state_keys = frozenset({"step", "toy_sum"})

    def state_tensors(self, group: Group) -> tuple[StateTensor, ...]:
        return StateTensor(key="step", counter=True), StateTensor(key="toy_sum")

    def update(self, inputs: StepInputs) -> None:
        gain = inputs.group["lr"] * inputs.group["toy_gain"]
        for param, grad, step, toy_sum in zip(inputs.params, inputs.grads, *inputs.states, strict=True):
            step.add_(1)
            param.sub_(toy_sum.add_(grad) * gain)


def test_rule_added_to_table_trains_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, Toy.name, Toy())

    def optimizer_of(model: nn.Module) -> STAC:
        params = list(model.named_parameters())
        toy: dict[str, Any] = {"params": params[4:], "stac_role": "cap", "rule": "toy", "toy_gain": 0.5, "lr": 0.25}
        return STAC([{"params": params[:4], "stac_role": "trunk"}, toy])

    model, other = small_model(seed=0), small_model(seed=1)
    optimizer, resumed = optimizer_of(model), optimizer_of(other)
    assert by_role(optimizer, "toy_gain") == {"trunk": 2.0, "cap": 0.5}
    weight = model.get_parameter("3.weight")
    expected, total = weight.detach().clone(), torch.zeros_like(weight)
    for seed in range(3):
        take_steps(model, optimizer, [seed])
        assert weight.grad is not None
        total += weight.grad
        expected -= total * 0.125
    assert_same_bits(weight.detach(), expected)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    take_steps(model, optimizer, [3, 4])
    take_steps(other, resumed, [3, 4])
    assert_same_bits(other.state_dict(), model.state_dict())
    assert_same_bits(resumed.state_dict(), optimizer.state_dict())
    with pytest.raises(ValueError, match=r"^group 0: toy_gain must be a finite number"):
        STAC([group_of("cap", "0", toy_gain=-1)])
