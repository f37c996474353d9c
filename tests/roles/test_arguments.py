"""The constructor's arguments and the groups that they make; the partition of an optimizer; what is warned of."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stac_optimizer import STAC, embeddings, last_layers, norms, partition_trainable_layers
from stac_optimizer.optim import AdamW, Signum
from stac_optimizer.rule import COMMON_HYPERPARAMETERS
from tests.model.models import Net, TokenEmbedding, described, frozen
from tests.roles.support import KEYS, NAMES, RULES, argument_id, by_role
from tests.support import small_model, take_steps, through_file


def test_defaults_of_constructor_are_those_of_the_rules() -> None:
    arguments = inspect.signature(STAC).parameters
    own = {f"trunk_{name}": known for name, known in Signum.rule.hyperparameters.items() if name != "vote"}
    of_rules = {**COMMON_HYPERPARAMETERS, **AdamW.rule.hyperparameters, **own}
    of_roles = {f"{role}_{name}" for role in ("trunk", "cap") for name in ("lr", "weight_decay", "optimizer")}
    rest = {"model", "last_n_layers", "cap", "vote", "overrides", "include_frozen"}
    assert set(arguments) == rest | of_roles | set(of_rules)
    for name, argument in arguments.items():
        if name in of_rules:
            assert argument.default == of_rules[name].default
            assert type(argument.default) is type(of_rules[name].default)
        assert argument.kind is (argument.POSITIONAL_OR_KEYWORD if name in ("model", "lr") else argument.KEYWORD_ONLY)
    defaults = {"last_n_layers": 1, "overrides": (), "include_frozen": False}
    assert {name: arguments[name].default for name in defaults} == defaults
    assert all(arguments[name].default is None for name in (*of_roles, "cap", "vote"))


def test_groups_of_model_are_trunk_and_cap() -> None:
    model = small_model()
    for params in (model, model.named_parameters(), list(model.named_parameters())):
        groups = STAC(params).param_groups
        assert [group["stac_role"] for group in groups] == [group["name"] for group in groups] == ["trunk", "cap"]
        assert [group["rule"] for group in groups] == ["signum", "adamw"]
        assert [group["param_names"] for group in groups] == [NAMES[:4], NAMES[4:]]
        assert [group["layer_names"] for group in groups] == [("0", "1"), ("3",)]
        held = [param for group in groups for param in group["params"]]
        assert all(one is other for one, other in zip(held, model.parameters(), strict=True))
        for group, lr in zip(groups, (7.5e-4, 1e-3), strict=True):
            role = group["stac_role"]
            assert set(group) == KEYS[role]
            defaults = {key: known.default for key, known in RULES[role].items()}
            assert {key: group[key] for key in defaults} == {**defaults, "lr": lr}
            assert group["betas"] == (0.9, 0.999)
    assert [group["layer_types"] for group in STAC(model).param_groups] == [("Linear", "LayerNorm"), ("Linear",)]
    assert STAC(model=model).partition.cap_layer_names == ("3",)


@pytest.mark.parametrize(("last_n_layers", "role"), [(0, "trunk"), (3, "cap"), (99, "cap")])
def test_role_without_layers_has_no_group(last_n_layers: int, role: str) -> None:
    (group,) = STAC(small_model(), lr=0.5, last_n_layers=last_n_layers).param_groups
    assert (group["stac_role"], group["lr"], group["layer_names"]) == (role, 0.5, ("0", "1", "3"))
    own_lr: dict[str, Any] = {f"{role}_lr": 0.25}
    assert by_role(STAC(small_model(), lr=0.5, last_n_layers=last_n_layers, **own_lr), "lr") == {role: 0.25}


# Arguments, a group key, and what it holds in the groups that have it.
RESOLVED: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"lr": 1}, "lr", {"trunk": 0.75, "cap": 1.0}),
    ({"lr": np.float32(0.5)}, "lr", {"trunk": 0.375, "cap": 0.5}),
    ({"lr": 0.5, "trunk_lr": 0.1}, "lr", {"trunk": 0.1, "cap": 0.5}),
    ({"lr": 0.5, "trunk_lr": 0}, "lr", {"trunk": 0.0, "cap": 0.5}),
    ({"lr": 0.5, "cap_lr": 0.1}, "lr", {"trunk": 0.375, "cap": 0.1}),
    ({"lr": 0.5, "trunk_lr": np.float64(0.2), "cap_lr": np.float64(0.1)}, "lr", {"trunk": 0.2, "cap": 0.1}),
    ({"weight_decay": 0.1}, "weight_decay", {"trunk": 0.1, "cap": 0.1}),
    ({"weight_decay": 0.1, "trunk_weight_decay": 0}, "weight_decay", {"trunk": 0.0, "cap": 0.1}),
    ({"weight_decay": 0.1, "cap_weight_decay": np.float64(0.2)}, "weight_decay", {"trunk": 0.1, "cap": 0.2}),
    ({"trunk_weight_decay": 0.1, "cap_weight_decay": 0.2}, "weight_decay", {"trunk": 0.1, "cap": 0.2}),
    ({"betas": [0.8, np.float32(0.5)]}, "betas", {"trunk": (0.8, 0.5), "cap": (0.8, 0.5)}),
    ({"trunk_momentum": np.float32(0.5)}, "momentum", {"trunk": 0.5}),
    ({"trunk_cautious": True}, "cautious", {"trunk": True}),
    ({"trunk_state_dtype": torch.int8}, "state_dtype", {"trunk": "int8"}),
    ({"eps": np.float64(0.1)}, "eps", {"cap": 0.1}),
    ({"amsgrad": True}, "amsgrad", {"cap": True}),
    *(
        ({name: value}, name, {"trunk": value, "cap": value})
        for name, value in [
            ("maximize", True),
            ("error_if_nonfinite", True),
            ("foreach", True),
            ("foreach", False),
            ("fused", True),
            ("capturable", True),
            ("differentiable", True),
            ("rounding_seed", 3),
        ]
    ),
]


@pytest.mark.parametrize(
    ("arguments", "key", "expected"), [pytest.param(*case, id=argument_id(case[0])) for case in RESOLVED]
)
def test_argument_reaches_groups_as_plain_python(arguments: dict[str, Any], key: str, expected: dict[str, Any]) -> None:
    optimizer = STAC(small_model(), **arguments)
    assert by_role(optimizer, key) == expected
    assert {type(value) for value in by_role(optimizer, key).values()} <= {bool, int, float, str, tuple}
    assert through_file(optimizer.state_dict()) == optimizer.state_dict()
    assert not any(name.startswith(("trunk_", "cap_")) for group in optimizer.param_groups for name in group)


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
}


@pytest.mark.parametrize(("build", "arguments"), QUIET.values(), ids=QUIET)
def test_harmless_embedding_draws_no_warning(build: Callable[[], Any], arguments: dict[str, Any]) -> None:
    assert STAC(build(), **arguments).partition.cap_layer_names[-1] == "head"  # a warning would raise
