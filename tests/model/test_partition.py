"""The split of a model into trunk and cap: parts of layers, wrappers, tied heads; random models against a reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from stac_optimizer import (
    STACPartition,
    biases,
    embeddings,
    last_layers,
    named,
    norms,
    of_type,
    partition_trainable_layers,
    vectors,
)
from stac_optimizer.model.layers import find_layers
from stac_optimizer.model.partition import split
from tests.model.models import (
    WRAPPERS,
    Net,
    Wrap,
    checkpointed,
    compiled,
    described,
    frozen,
    parameter,
    tied_model,
    two_blocks,
    wrapped_inside,
)
from tests.support import small_model


def parts(partition: STACPartition) -> tuple[list[str], list[str]]:
    """The parameters of each role, by name."""
    trunk, cap = (
        [name for layer in layers for name in layer.parameter_names]
        for layers in (partition.trunk_layers, partition.cap_layers)
    )
    return trunk, cap


def test_same_model_twice_gives_same_split() -> None:
    model = tied_model(bias=True)
    assert described(partition_trainable_layers(model)) == described(partition_trainable_layers(model))


def test_named_parameters_split_as_the_model() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), weight_norm(nn.Linear(4, 4)), tied_model(bias=True))
    by_number: list[dict[str, Any]] = [{"last_n_layers": number} for number in range(9)]
    for arguments in (*by_number, {"cap": vectors()}, {"cap": named("1") - biases()}):
        by_module = partition_trainable_layers(model, **arguments)
        by_name = partition_trainable_layers(model.named_parameters(), **arguments)
        assert described(by_name) == described(by_module, with_type=False)


@pytest.mark.parametrize(("last_n_layers", "caps"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3), (10**9, 3)])
def test_last_n_layers_counts_from_the_end(last_n_layers: int, caps: int) -> None:
    model = small_model()
    partition = partition_trainable_layers(model, last_n_layers=last_n_layers)
    names = ("0", "1", "3")
    assert partition.trunk_layer_names == names[: 3 - caps]
    assert partition.cap_layer_names == names[3 - caps :]
    held = (*partition.trunk_parameters, *partition.cap_parameters)
    assert [id(param) for param in held] == [id(param) for param in model.parameters()]
    assert len(partition.cap_parameters) == 2 * caps


def test_cap_replaces_last_n_layers() -> None:
    partition = partition_trainable_layers(small_model(), cap=named("1"))
    assert (partition.trunk_layer_names, partition.cap_layer_names) == (("0", "3"), ("1",))


def test_layer_stands_in_both_roles_with_part_of_its_parameters_in_each() -> None:
    model = small_model()
    partition = partition_trainable_layers(model, cap=last_layers(1) | vectors())
    assert partition.trunk_layer_names == ("0",)
    assert partition.cap_layer_names == ("0", "1", "3")
    assert parts(partition) == (["0.weight"], ["0.bias", "1.weight", "1.bias", "3.weight", "3.bias"])
    assert partition.trunk_parameters[0] is model.get_parameter("0.weight")
    assert partition.cap_parameters[0] is model.get_parameter("0.bias")
    assert [(layer.type_name, layer.numel) for layer in (partition.trunk_layers[0], partition.cap_layers[0])] == [
        ("Linear", 30),
        ("Linear", 5),
    ]
    assert partition.moved == ()


def test_parametrized_head_goes_to_the_cap_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(2, 2), weight_norm(nn.Linear(2, 2)))
    head = ["1.bias", "1.parametrizations.weight.original0", "1.parametrizations.weight.original1"]
    for cap in (None, named("1"), of_type(nn.Linear) - named("0")):
        assert parts(partition_trainable_layers(model, cap=cap)) == (["0.weight", "0.bias"], head)


def test_include_frozen_splits_frozen_layers_too() -> None:
    model = frozen(small_model(), "0.weight", "0.bias", "3.weight", "3.bias")
    assert partition_trainable_layers(model).cap_layer_names == ("1",)
    cap, (message,) = split_and_warnings(model, include_frozen=True)
    assert cap == ("3",)
    assert "the cap has frozen layers alone ('3')" in message
    assert "cap=named(...)" in message


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (["0.weight", "0.bias"], {}),
        (["3.weight"], {}),
        (["3.weight", "3.bias"], {"last_n_layers": 2}),
        (["3.weight", "3.bias"], {"cap": last_layers(1) | norms()}),
        (["3.weight", "3.bias"], {"cap": named("3")}),
        ([], {}),
    ],
    ids=["body", "part", "two", "norms", "by-name", "all"],
)
def test_unfreezing_moves_no_layer_to_the_other_role(names: list[str], arguments: dict[str, Any]) -> None:
    free = partition_trainable_layers(small_model(), **arguments)
    cap, messages = split_and_warnings(frozen(small_model(), *names), include_frozen=True, **arguments)
    assert (cap, messages) == (free.cap_layer_names, [])


def is_matrix(param: Tensor) -> bool:
    return param.dim() == 2


@pytest.mark.parametrize(
    ("arguments", "trunk", "moved"),
    [
        ({}, ["0.weight"], ["0.bias", "1.weight", "1.bias"]),
        ({"last_n_layers": 0}, ["0.weight", "3.weight"], ["0.bias", "1.weight", "1.bias", "3.bias"]),
        ({"cap": norms() | named("3")}, ["0.weight"], ["0.bias"]),
        ({"cap": last_layers(1) | vectors()}, ["0.weight"], []),
        ({"last_n_layers": 3}, [], []),
    ],
    ids=["one-layer", "no-cap", "selector", "vectors-chosen-already", "all-cap"],
)
def test_what_the_trunk_cannot_take_moves_to_the_cap(
    arguments: dict[str, Any], trunk: list[str], moved: list[str]
) -> None:
    model = small_model()
    partition = split(find_layers(model), trunk_takes=is_matrix, **arguments)
    names = [name for name, _ in model.named_parameters()]
    assert parts(partition) == (trunk, [name for name in names if name not in trunk])
    assert list(partition.moved) == moved


# The arguments, the error, and the parts of its message in order.
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative-last_n_layers": ({"last_n_layers": -1}, ValueError, r"last_n_layers.*\[0, inf\).*-1"),
    "float-last_n_layers": ({"last_n_layers": 1.0}, TypeError, r"last_n_layers.*an integer.*1\.0"),
    "bool-last_n_layers": ({"last_n_layers": True}, TypeError, "last_n_layers.*an integer.*True"),
    "none-last_n_layers": ({"last_n_layers": None}, TypeError, "last_n_layers.*an integer.*None"),
    "last_n_layers-beside-cap": (
        {"last_n_layers": 2, "cap": named("0")},
        ValueError,
        r"last_n_layers must be left out beside cap.*last_n_layers=2 and cap=named\('0'\).*last_layers\(n\)",
    ),
    "last_n_layers-0-beside-cap": ({"last_n_layers": 0, "cap": named("0")}, ValueError, "last_n_layers=0 and cap"),
    "negative-last_n_layers-beside-cap": ({"last_n_layers": -1, "cap": named("0")}, ValueError, "last_n_layers"),
    "cap-string": ({"cap": "3"}, TypeError, r"cap must be a selector.*named\('lm_head'\).*'3'"),
    "cap-function": ({"cap": bool}, TypeError, "cap must be a selector.*type type"),
    "cap-false": ({"cap": False}, TypeError, "cap must be a selector.*False"),
    "include_frozen-none": ({"include_frozen": None}, TypeError, "include_frozen must be True or False"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_argument_raises(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        partition_trainable_layers(small_model(), **arguments)


def test_first_argument_is_called_model() -> None:
    assert partition_trainable_layers(model=small_model()).cap_layer_names == ("3",)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("cap", [None, of_type(nn.LayerNorm), named("module.module"), vectors()], ids=repr)
def test_wrapped_model_split_as_the_bare_one(wrap: Wrap, cap: Any) -> None:
    model = two_blocks()
    bare = described(partition_trainable_layers(model, cap=cap))
    assert described(partition_trainable_layers(wrap(model), cap=cap)) == bare
    assert described(partition_trainable_layers(wrap(wrapped_inside(model, wrap)), cap=cap)) == bare


def test_names_of_compiled_and_checkpointed_model_split_as_the_bare_one() -> None:
    model = two_blocks()
    bare = described(partition_trainable_layers(model), with_type=False)
    wrapped = compiled(wrapped_inside(model, checkpointed))
    assert described(partition_trainable_layers(wrapped.named_parameters())) == bare


def split_and_warnings(model: Any, **arguments: Any) -> tuple[tuple[str, ...], list[str]]:
    """The cap, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = partition_trainable_layers(model, **arguments).cap_layer_names
    assert all(warning.filename == __file__ for warning in caught)
    return names, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("arguments", "now", "cap"),
    [
        ({}, "the last layer is now 'ln_f'", ("ln_f",)),
        ({"last_n_layers": 2}, "the last 2 layers are now 'block', 'ln_f'", ("block", "ln_f")),
        ({"cap": last_layers(1)}, "the last layer is now 'ln_f'", ("ln_f",)),
        ({"cap": vectors() | last_layers(1)}, "the last layer is now 'ln_f'", ("block", "ln_f")),
        ({"cap": (last_layers(3) | norms()) - embeddings()}, None, ("block", "ln_f")),
    ],
    ids=["one-layer", "two-layers", "selector", "union", "taken-out"],
)
def test_tied_head_warns_what_is_tied_what_the_cap_is_and_what_to_write(
    arguments: dict[str, Any], now: str | None, cap: tuple[str, ...]
) -> None:
    names, (message,) = split_and_warnings(tied_model(), **arguments)
    assert names == cap
    now = now or "the last 3 layers are now 'wte', 'block', 'ln_f'"
    assert message == (
        f"'lm_head.weight' is tied to 'wte.weight', so 'lm_head' has no parameters of its own and {now}. "
        "To have the tied weight in the cap, write cap=named('wte') | norms()"
    )


def test_what_the_warning_of_a_tied_head_says_to_write_is_quiet() -> None:
    model = Net(transformer=tied_model())
    _, (message,) = split_and_warnings(model)
    written = message.partition("cap=")[2]
    assert written == "named('transformer.wte') | norms()"
    cap = named("transformer.wte") | norms()
    assert split_and_warnings(model, cap=cap) == (("transformer.wte", "transformer.ln_f"), [])


@pytest.mark.parametrize("parametrized", [["wte"], ["lm_head"], ["wte", "lm_head"]], ids=" and ".join)
def test_tied_head_is_told_of_through_parametrizations(parametrized: list[str]) -> None:
    model = tied_model()
    for name in parametrized:
        parametrize.register_parametrization(model.get_submodule(name), "weight", nn.Identity())
    names, (message,) = split_and_warnings(model)
    assert names == ("ln_f",)
    assert "write cap=named('wte') | norms()" in message
    cap = last_layers(1) | embeddings() | vectors()
    assert split_and_warnings(model, cap=cap) == (("wte", "block", "ln_f"), [])


def test_several_tied_heads_warn_once() -> None:
    model = tied_model()
    model.second_head = nn.Linear(4, 7, bias=False)
    model.second_head.weight = model.get_parameter("wte.weight")
    names, (message,) = split_and_warnings(model)
    assert names == ("ln_f",)
    assert "'second_head.weight' is tied to 'wte.weight'" in message


QUIET: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "all-trunk": (tied_model, {"last_n_layers": 0}),
    "all-cap": (tied_model, {"last_n_layers": 3}),
    "cap-by-name": (tied_model, {"cap": named("wte")}),
    "cap-by-type": (tied_model, {"cap": norms()}),
    "cap-holds-the-tied-weight": (tied_model, {"cap": last_layers(1) | embeddings()}),
    "cap-holds-it-by-name": (tied_model, {"cap": named("wt*") | last_layers(2)}),
    "own-bias": (lambda: tied_model(bias=True), {}),
    "frozen": (lambda: frozen(tied_model(), "wte.weight"), {}),
    "tie-before-the-end": (lambda: nn.Sequential(tied_model(), nn.Linear(7, 7)), {}),
    "names-alone": (lambda: tied_model().named_parameters(), {}),
}


@pytest.mark.parametrize(("build", "arguments"), QUIET.values(), ids=QUIET)
def test_tie_that_changes_nothing_draws_no_warning(build: Callable[[], Any], arguments: dict[str, Any]) -> None:
    assert split_and_warnings(build(), **arguments)[1] == []


def test_tied_head_follows_its_first_owner_into_the_cap() -> None:
    model = tied_model()
    partition = partition_trainable_layers(model, cap=named("wte"))
    assert partition.cap_parameters[0] is model.get_parameter("lm_head.weight")


CHILD_NAMES = ("module", *(f"c{position}" for position in range(13)))


@dataclass(frozen=True)
class Plan:
    """A model in plain data: which parameters are trainable; of each module its parameters, children and wrapper."""

    trainable: list[bool]
    modules: list[tuple[list[int], list[int], str]]

    def build(self, *, wrapped: bool) -> nn.Module:
        params = [parameter(1, trainable=flag) for flag in self.trainable]
        built: dict[int, nn.Module] = {}
        for index, (held, children, wrapper) in reversed(list(enumerate(self.modules))):
            own = {f"p{position}": params[number] for position, number in enumerate(held)}
            module = Net(**own, **{name: built[child] for name, child in zip(CHILD_NAMES, children, strict=False)})
            built[index] = WRAPPERS[wrapper](module) if wrapped else module
        return built[0]

    def reference(self) -> tuple[list[tuple[str, tuple[str, ...]]], str | None]:
        """Section 3 of design.md on the plan alone: the layers, and the owner of what a tied last module holds."""
        layers: list[tuple[str, tuple[str, ...]]] = []
        seen: set[int] = set()
        owners: dict[int, str] = {}
        tied: str | None = None
        to_visit: list[tuple[int, tuple[str, ...]]] = [(0, ())]
        while to_visit:
            number, path = to_visit.pop()
            if number in seen:
                continue
            seen.add(number)
            held, children, _ = self.modules[number]
            names = []
            for position, param in enumerate(held):
                if self.trainable[param] and param not in owners:
                    owners[param] = ".".join((*path, f"p{position}"))
                    names.append(owners[param])
            if names:
                layers.append((".".join(path) or "<root>", tuple(names)))
            trainable = [param for param in held if self.trainable[param]]
            if trainable:
                tied = None if names else owners[trainable[0]]
            below = [(child, (*path, name)) for name, child in zip(CHILD_NAMES, children, strict=False)]
            to_visit += reversed(below)
        return layers, tied


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Up to eight modules and twelve parameters; a third of the modules, and many parameters, have two places."""
    random = draw(st.randoms(use_true_random=True))  # Hypothesis' own draws rarely make more than two layers
    trainable = [random.random() < 0.8 for _ in range(random.randint(1, 12))]
    size = random.randint(1, 8)
    children: list[list[int]] = [[] for _ in range(size)]
    for child in range(1, size):
        for _ in range(random.choice([1, 1, 2])):
            children[random.randrange(child)].append(child)
    held = [random.choices(range(len(trainable)), k=random.randint(0, 3)) for _ in range(size)]
    return Plan(
        trainable, [(own, below, random.choice([*WRAPPERS])) for own, below in zip(held, children, strict=True)]
    )


@settings(max_examples=200, deadline=None)
@given(plan=plans(), last_n_layers=st.integers(0, 4))
def test_random_model_split_as_the_reference_says(plan: Plan, last_n_layers: int) -> None:
    layers, tied = plan.reference()
    assume(layers)
    bare = plan.build(wrapped=False)
    start = max(len(layers) - last_n_layers, 0)
    is_warned = tied is not None and last_n_layers > 0 and any(tied in names for _, names in layers[:start])
    for model, warned in (
        (bare, is_warned),
        (plan.build(wrapped=True), is_warned),
        (list(bare.named_parameters()), False),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            partition = partition_trainable_layers(model, last_n_layers=last_n_layers)
        assert [(layer.name, layer.parameter_names) for layer in partition.trunk_layers] == layers[:start]
        assert [(layer.name, layer.parameter_names) for layer in partition.cap_layers] == layers[start:]
        assert len(caught) == warned
