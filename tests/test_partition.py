"""From a model to its layers and their split; the table that shows it; random models against a reference."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm

from stac_optimizer import STAC, STACPartition, named, norms, of_type, partition_trainable_layers
from tests.support import small_model

Wrap = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    """A module with these submodules and parameters of its own, in this order."""

    def __init__(self, **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


def parameter(*shape: int, trainable: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape), requires_grad=trainable)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    """The module with these parameters frozen; with all where no name is given."""
    for name, param in module.named_parameters():
        if name in names or not names:
            param.requires_grad_(False)
    return module


def tied_model(*, bias: bool = False) -> Net:
    """A language model whose head shares the weight of the embedding."""
    model = Net(wte=nn.Embedding(7, 4), block=nn.Linear(4, 4), ln_f=nn.LayerNorm(4), lm_head=nn.Linear(4, 7, bias=bias))
    model.get_submodule("lm_head").weight = model.get_parameter("wte.weight")
    return model


def reused_model() -> Net:
    block = nn.Linear(2, 2)
    return Net(first=block, second=nn.Linear(2, 2), third=block)


def shared_within_layer() -> Net:
    weight = parameter(2)
    return Net(layer=Net(a=weight, b=weight, c=parameter(1)), head=nn.Linear(2, 2))


# A model, and its layers as "layer: parameters" in order.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "sequential": (small_model, ["0: weight bias", "1: weight bias", "3: weight bias"]),
    "order-of-registration": (
        lambda: Net(z=nn.Linear(2, 2), a=Net(k=nn.Linear(2, 2, bias=False), b=nn.LayerNorm(2))),
        ["z: weight bias", "a.k: weight", "a.b: weight bias"],
    ),
    "root-alone": (lambda: nn.Linear(2, 2), ["<root>: weight bias"]),
    "root-first": (lambda: Net(sub=nn.Linear(2, 2), w=parameter(1)), ["<root>: w", "sub: weight bias"]),
    "frozen-layer-left-out": (
        lambda: nn.Sequential(nn.Linear(2, 2), frozen(nn.Linear(2, 2)), nn.Linear(2, 2)),
        ["0: weight bias", "2: weight bias"],
    ),
    "frozen-parameter-left-out": (
        lambda: nn.Sequential(frozen(nn.Linear(2, 2), "bias"), nn.Linear(2, 2)),
        ["0: weight", "1: weight bias"],
    ),
    "buffers-do-not-count": (lambda: Net(a=nn.BatchNorm1d(2), b=nn.BatchNorm1d(2, affine=False)), ["a: weight bias"]),
    "shared-parameter-to-first-owner": (
        lambda: tied_model(bias=True),
        ["wte: weight", "block: weight bias", "ln_f: weight bias", "lm_head: bias"],
    ),
    "shared-within-one-module": (shared_within_layer, ["layer: a c", "head: weight bias"]),
    "shared-module-once": (reused_model, ["first: weight bias", "second: weight bias"]),
    "attention": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2), nn.LayerNorm(4)),
        ["0: in_proj_weight in_proj_bias", "0.out_proj: weight bias", "1: weight bias"],
    ),
    "parameter-list": (lambda: Net(scales=nn.ParameterList([parameter(1), parameter(2)])), ["scales: 0 1"]),
    "parameter-dict": (lambda: Net(table=nn.ParameterDict({"a": parameter(1), "b": parameter(2)})), ["table: a b"]),
    "parametrization": (
        lambda: nn.Sequential(weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2)),
        ["0: bias", "0.parametrizations.weight: original0 original1", "1: weight bias"],
    ),
    "own-submodule-called-module": (
        lambda: Net(module=Net(module=nn.Linear(2, 2)), head=nn.Linear(2, 2)),
        ["module.module: weight bias", "head: weight bias"],
    ),
    "empty-parameter": (lambda: Net(a=Net(w=parameter(0)), b=Net(w=parameter(0))), ["a: w", "b: w"]),
}
EVERY_MODEL = pytest.mark.parametrize(("build", "expected"), MODELS.values(), ids=MODELS)


def described(partition: STACPartition, *, with_type: bool = True) -> list[tuple[Any, ...]]:
    """What a wrapper must not change."""
    return [
        (
            role,
            layer.name,
            layer.type_name * with_type,
            layer.parameter_names,
            [id(param) for param in layer.parameters],
        )
        for role, layers in (("trunk", partition.trunk_layers), ("cap", partition.cap_layers))
        for layer in layers
    ]


@EVERY_MODEL
def test_layers_found_in_order_with_their_parameters(build: Callable[[], nn.Module], expected: list[str]) -> None:
    model = build()
    partition = partition_trainable_layers(model)
    layers = (*partition.trunk_layers, *partition.cap_layers)
    names = [[name.removeprefix(f"{layer.name}.") for name in layer.parameter_names] for layer in layers]
    assert [f"{layer.name}: {' '.join(own)}" for layer, own in zip(layers, names, strict=True)] == expected
    for layer in layers:
        owned = [model.get_parameter(name) for name in layer.parameter_names]
        assert all(one is other for one, other in zip(layer.parameters, owned, strict=True))
        assert layer.numel == sum(param.numel() for param in owned)
        assert layer.state_bytes is None
        assert layer.type_name == type(model.get_submodule(layer.name.replace("<root>", ""))).__name__


@EVERY_MODEL
def test_named_parameters_split_as_the_model(build: Callable[[], nn.Module], expected: list[str]) -> None:
    model = build()
    for last_n_layers in range(len(expected) + 2):
        by_module = partition_trainable_layers(model, last_n_layers=last_n_layers)
        by_name = partition_trainable_layers(model.named_parameters(), last_n_layers=last_n_layers)
        assert described(by_name) == described(by_module, with_type=False)


def test_same_model_twice_gives_same_split() -> None:
    model = tied_model(bias=True)
    assert described(partition_trainable_layers(model)) == described(partition_trainable_layers(model))


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
    partition = partition_trainable_layers(small_model(), last_n_layers=3, cap=named("1"))
    assert (partition.trunk_layer_names, partition.cap_layer_names) == (("0", "3"), ("1",))


# A model, the other arguments, the error, and the parts of its message in order.
ERRORS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "all-frozen": (lambda: frozen(small_model()), {}, ValueError, "no trainable parameters.*requires_grad=True"),
    "no-parameters": (nn.Tanh, {}, ValueError, "no trainable parameters"),
    "no-names": (list, {}, ValueError, "no trainable parameters"),
    "lazy": (lambda: Net(a=nn.LazyLinear(2)), {}, ValueError, "'a.weight' has no shape yet; run the model once"),
    "lazy-by-name": (lambda: nn.LazyLinear(2).named_parameters(), {}, ValueError, "'weight' has no shape yet"),
    "without-names": (
        lambda: small_model().parameters(),
        {},
        TypeError,
        r"named_parameters\(\).*type Parameter.*pass the model itself",
    ),
    "name-alone": (lambda: ["weight"], {}, TypeError, "pairs.*type str"),
    "name-no-string": (lambda: [(1, parameter(1))], {}, TypeError, "pairs.*type tuple"),
    "no-tensor": (lambda: [("a", 1.0)], {}, TypeError, "pairs.*type tuple"),
    "no-model": (lambda: None, {}, TypeError, "module.*NoneType"),
    "name-twice": (lambda: [("a.w", parameter(1)), ("a.w", parameter(1))], {}, ValueError, "'a.w' twice"),
    "negative-last_n_layers": (small_model, {"last_n_layers": -1}, ValueError, r"last_n_layers.*\[0, inf\).*-1"),
    "float-last_n_layers": (small_model, {"last_n_layers": 1.0}, TypeError, r"last_n_layers.*an integer.*1\.0"),
    "bool-last_n_layers": (small_model, {"last_n_layers": True}, TypeError, "last_n_layers.*an integer.*True"),
    "last_n_layers-beside-cap": (small_model, {"last_n_layers": -1, "cap": named("0")}, ValueError, "last_n_layers"),
    "cap-string": (small_model, {"cap": "3"}, TypeError, r"cap must be a selector.*named\('lm_head'\).*'3'"),
    "cap-function": (small_model, {"cap": bool}, TypeError, "cap must be a selector.*type type"),
    "cap-of-names": (
        lambda: small_model().named_parameters(),
        {"cap": norms()},
        ValueError,
        r"norms\(\) needs the model itself",
    ),
}


@pytest.mark.parametrize(("build", "arguments", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_argument_raises(
    build: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        partition_trainable_layers(build(), **arguments)


def compiled(module: nn.Module) -> nn.Module:
    wrapper = torch.compile(module)
    assert isinstance(wrapper, nn.Module)
    return wrapper


def checkpointed(module: nn.Module) -> nn.Module:
    wrapper: nn.Module = checkpoint_wrapper(module)
    return wrapper


WRAPPERS: dict[str, Wrap] = {
    "bare": lambda module: module,
    "data-parallel": nn.DataParallel,
    "compile": compiled,
    "checkpoint": checkpointed,
    "compile-of-data-parallel": lambda module: compiled(nn.DataParallel(module)),
    "data-parallel-of-compile-of-checkpoint": lambda module: nn.DataParallel(compiled(checkpointed(module))),
    "data-parallel-twice": lambda module: nn.DataParallel(nn.DataParallel(module)),
}


def wrapped_inside(model: Net, wrap: Wrap) -> Net:
    """The model with its children wrapped."""
    for name, child in list(model.named_children()):
        setattr(model, name, wrap(child))
    return model


def two_blocks() -> Net:
    """A model with a parameter of its own and submodules that the user called "module"."""
    return Net(w=parameter(1), module=Net(module=nn.Linear(2, 2), norm=nn.LayerNorm(2)), head=nn.Linear(2, 2))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("cap", [None, of_type(nn.LayerNorm), named("module.module")], ids=repr)
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


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without distributed")
@pytest.mark.usefixtures("process_group")
def test_distributed_model_split_as_the_bare_one() -> None:
    model = two_blocks()
    bare = described(partition_trainable_layers(model))
    wrapped = nn.parallel.DistributedDataParallel(compiled(wrapped_inside(model, checkpointed)))
    assert described(partition_trainable_layers(wrapped)) == bare


TABLE = """\
layer               type       role   parameters   share  state bytes  AdamW bytes
----------------------------------------------------------------------------------
encoder.projection  Linear     trunk      12,040   98.3%       48,168       96,328
encoder.norm        LayerNorm  trunk          80    0.7%          328          648
head                Linear     cap           123    1.0%          992          992
----------------------------------------------------------------------------------
2 layers                       trunk      12,120   99.0%       48,496       96,976
1 layer                        cap           123    1.0%          992          992
3 layers                       all        12,243  100.0%       49,488       97,968"""


def test_table_shows_state_bytes_of_an_optimizer_alone() -> None:
    model = Net(encoder=Net(projection=nn.Linear(300, 40), norm=nn.LayerNorm(40)), head=nn.Linear(40, 3))
    assert str(STAC(model).partition) == TABLE
    open_bytes = re.sub(r"[\d,]+(?=  +[\d,]+$)", lambda match: "-".rjust(len(match[0])), TABLE, flags=re.MULTILINE)
    assert str(partition_trainable_layers(model)) == open_bytes


@EVERY_MODEL
@pytest.mark.parametrize("last_n_layers", [0, 1, 99])
def test_table_lines_up_and_adds_up(build: Callable[[], nn.Module], expected: list[str], last_n_layers: int) -> None:
    model = build()
    header, *lines = str(STAC(model, trunk_cautious=True, last_n_layers=last_n_layers).partition).splitlines()
    body = [line for line in lines if set(line) != {"-"}]
    role = header.index("role")
    ends = [role + len("trunk"), *(header.index(word) + len(word) for word in ("parameters", "share", "state bytes"))]
    rows = []
    for line in body:
        assert line[role - 2 : role] == "  "
        cells = [line[start:end] for start, end in pairwise([*ends, None])]
        assert all(re.fullmatch(r" {2,}[\d,.]+%?", cell) for cell in cells), line
        numbers = [float(cell.strip(" %").replace(",", "")) for cell in cells]
        rows.append((line[role : ends[0]].strip(), numbers))
    layers, totals = rows[: len(expected)], dict(rows[len(expected) :])
    for name, total in totals.items():
        added = [numbers for own_role, numbers in layers if name in (own_role, "all")]
        summed = [sum(column) for column in zip(*added, strict=True)] or [0.0] * 4
        assert total == pytest.approx(summed, abs=0.05 * len(expected) + 0.05)
    assert list(totals) == ["trunk", "cap", "all"]
    assert totals["all"][0] == sum(param.numel() for param in model.parameters() if param.requires_grad)


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

    def reference(self) -> tuple[list[tuple[str, tuple[str, ...]]], bool]:
        """Section 3 of design.md on the plan alone: the layers, and whether the model ends in a tied module."""
        layers: list[tuple[str, tuple[str, ...]]] = []
        seen: set[int] = set()
        owned: set[int] = set()
        ends_tied = False
        to_visit: list[tuple[int, tuple[str, ...]]] = [(0, ())]
        while to_visit:
            number, path = to_visit.pop()
            if number in seen:
                continue
            seen.add(number)
            held, children, _ = self.modules[number]
            names = []
            for position, param in enumerate(held):
                if self.trainable[param] and param not in owned:
                    owned.add(param)
                    names.append(".".join((*path, f"p{position}")))
            if names:
                layers.append((".".join(path) or "<root>", tuple(names)))
            if any(self.trainable[param] for param in held):
                ends_tied = not names
            below = [(child, (*path, name)) for name, child in zip(CHILD_NAMES, children, strict=False)]
            to_visit += reversed(below)
        return layers, ends_tied


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
    layers, ends_tied = plan.reference()
    assume(layers)
    bare = plan.build(wrapped=False)
    start = max(len(layers) - last_n_layers, 0)
    is_warned = ends_tied and 0 < last_n_layers < len(layers)
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
