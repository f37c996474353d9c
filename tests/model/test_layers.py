"""From a model, or its names, to its layers: order, owners, parametrizations, wrappers, frozen parameters, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from stac_optimizer.model.layers import Layers, find_layers
from stac_optimizer.model.names import layer_of, listed, tensor_name
from tests.model.models import Net, checkpointed, compiled, frozen, parameter, tied_model, two_blocks, wrapped_inside
from tests.support import small_model


class Scale(nn.Module):
    """A parametrization with a parameter, and a module, of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = parameter(1)
        self.inner = nn.Linear(2, 2, bias=False)

    def forward(self, weight: Tensor) -> Tensor:
        out: Tensor = self.scale * self.inner(weight)
        return out


def scaled(module: nn.Module, name: str = "weight") -> nn.Module:
    return register_parametrization(module, name, Scale())


def reused_model() -> Net:
    block = nn.Linear(2, 2)
    return Net(first=block, second=nn.Linear(2, 2), third=block)


def shared_within_layer() -> Net:
    weight = parameter(2)
    return Net(layer=Net(a=weight, b=weight, c=parameter(1)), head=nn.Linear(2, 2))


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(2, 2))


NORMED = "parametrizations.weight.original0 parametrizations.weight.original1"
SCALED = "parametrizations.{0}.original parametrizations.{0}.0.scale parametrizations.{0}.0.inner.weight"
# A model, its layers as "layer: parameters" in order, and the layers' types.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "sequential": (small_model, ["0: weight bias", "1: weight bias", "3: weight bias"], "Linear LayerNorm Linear"),
    "order-of-registration": (
        lambda: Net(z=nn.Linear(2, 2), a=Net(k=nn.Linear(2, 2, bias=False), b=nn.LayerNorm(2))),
        ["z: weight bias", "a.k: weight", "a.b: weight bias"],
        "Linear Linear LayerNorm",
    ),
    "root-alone": (lambda: nn.Linear(2, 2), ["<root>: weight bias"], "Linear"),
    "root-first": (
        lambda: Net(sub=nn.Linear(2, 2), w=parameter(1)),
        ["<root>: w", "sub: weight bias"],
        "Net Linear",
    ),
    "frozen-layer-left-out": (
        lambda: nn.Sequential(nn.Linear(2, 2), frozen(nn.Linear(2, 2)), nn.Linear(2, 2)),
        ["0: weight bias", "2: weight bias"],
        "Linear Linear",
    ),
    "frozen-parameter-left-out": (
        lambda: nn.Sequential(frozen(nn.Linear(2, 2), "bias"), nn.Linear(2, 2)),
        ["0: weight", "1: weight bias"],
        "Linear Linear",
    ),
    "buffers-do-not-count": (
        lambda: Net(a=nn.BatchNorm1d(2), b=nn.BatchNorm1d(2, affine=False)),
        ["a: weight bias"],
        "BatchNorm1d",
    ),
    "shared-parameter-to-first-owner": (
        lambda: tied_model(bias=True),
        ["wte: weight", "block: weight bias", "ln_f: weight bias", "lm_head: bias"],
        "Embedding Linear LayerNorm Linear",
    ),
    "shared-within-one-module": (shared_within_layer, ["layer: a c", "head: weight bias"], "Net Linear"),
    "shared-module-once": (reused_model, ["first: weight bias", "second: weight bias"], "Linear Linear"),
    "attention": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2), nn.LayerNorm(4)),
        ["0: in_proj_weight in_proj_bias", "0.out_proj: weight bias", "1: weight bias"],
        "MultiheadAttention NonDynamicallyQuantizableLinear LayerNorm",
    ),
    "parameter-list": (
        lambda: Net(scales=nn.ParameterList([parameter(1), parameter(2)])),
        ["scales: 0 1"],
        "ParameterList",
    ),
    "parameter-dict": (
        lambda: Net(table=nn.ParameterDict({"a": parameter(1), "b": parameter(2)})),
        ["table: a b"],
        "ParameterDict",
    ),
    "weight-norm": (
        lambda: nn.Sequential(nn.Linear(2, 2), weight_norm(nn.Linear(2, 2))),
        ["0: weight bias", f"1: bias {NORMED}"],
        "Linear Linear",
    ),
    "weight-norm-without-bias": (
        lambda: nn.Sequential(weight_norm(nn.Linear(2, 2, bias=False)), nn.Linear(2, 2)),
        [f"0: {NORMED}", "1: weight bias"],
        "Linear Linear",
    ),
    "weight-norm-of-the-root": (lambda: weight_norm(nn.Linear(2, 2)), [f"<root>: bias {NORMED}"], "Linear"),
    "old-weight-norm": (old_weight_norm, ["<root>: bias weight_g weight_v"], "Linear"),
    "spectral-norm-and-orthogonal": (
        lambda: Net(a=spectral_norm(nn.Conv1d(2, 2, 1)), b=orthogonal(nn.Linear(2, 2))),
        ["a: bias parametrizations.weight.original", "b: bias parametrizations.weight.original"],
        "Conv1d Linear",
    ),
    "parametrized-embedding": (
        lambda: Net(tokens=spectral_norm(nn.Embedding(4, 2)), head=nn.Linear(2, 4)),
        ["tokens: parametrizations.weight.original", "head: weight bias"],
        "Embedding Linear",
    ),
    "parametrization-with-parameters": (
        lambda: nn.Sequential(scaled(nn.Linear(2, 2)), nn.Linear(2, 2)),
        [f"0: bias {SCALED.format('weight')}", "1: weight bias"],
        "Linear Linear",
    ),
    "parametrization-of-a-parametrization": (
        lambda: Net(a=scaled(weight_norm(nn.Linear(2, 2)), "bias")),
        [f"a: {NORMED} {SCALED.format('bias')}"],
        "Linear",
    ),
    "parametrized-beside-children": (
        lambda: nn.Sequential(spectral_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"), nn.Linear(2, 2)),
        [
            "0: in_proj_bias parametrizations.in_proj_weight.original",
            "0.out_proj: weight bias",
            "1: weight bias",
        ],
        "MultiheadAttention NonDynamicallyQuantizableLinear Linear",
    ),
    "own-submodule-called-module": (
        lambda: Net(module=Net(module=nn.Linear(2, 2)), head=nn.Linear(2, 2)),
        ["module.module: weight bias", "head: weight bias"],
        "Linear Linear",
    ),
    "own-submodule-called-parametrizations": (
        lambda: Net(parametrizations=Net(weight=nn.Linear(2, 2))),
        ["parametrizations.weight: weight bias"],
        "Linear",
    ),
    "empty-parameter": (lambda: Net(a=Net(w=parameter(0)), b=Net(w=parameter(0))), ["a: w", "b: w"], "Net Net"),
}


def written(layers: Layers) -> list[str]:
    """The layers as ``MODELS`` writes them."""
    return [
        f"{layer.name}: {' '.join(name.removeprefix(f'{layer.name}.') for name in layer.parameter_names)}"
        for layer in layers.layers
    ]


@pytest.mark.parametrize(("build", "expected", "types"), MODELS.values(), ids=MODELS)
def test_layers_found_in_order_with_their_parameters(
    build: Callable[[], nn.Module], expected: list[str], types: str
) -> None:
    model = build()
    layers = find_layers(model)
    assert written(layers) == expected
    assert [layer.type_name for layer in layers.layers] == types.split()
    for layer, module in zip(layers.layers, layers.modules, strict=True):
        assert module is model.get_submodule(layer.name.replace("<root>", ""))
        owned = [model.get_parameter(name) for name in layer.parameter_names]
        assert all(one is other for one, other in zip(layer.parameters, owned, strict=True))
        assert layer.numel == sum(param.numel() for param in owned)
        assert (layer.state_bytes, layer.lrs, layer.weight_decays) == (None, (), ())


@pytest.mark.parametrize(("build", "expected", "types"), MODELS.values(), ids=MODELS)
def test_names_alone_give_the_same_layers_without_types(
    build: Callable[[], nn.Module], expected: list[str], types: str
) -> None:
    layers = find_layers(build().named_parameters())
    assert written(layers) == expected
    assert {layer.type_name for layer in layers.layers} == {""}
    assert layers.modules == layers.parents == (None,) * len(types.split())


def test_parents_are_the_modules_around_the_layers() -> None:
    model = two_blocks()
    layers = find_layers(wrapped_inside(model, checkpointed))
    assert layers.names == ("<root>", "module.module", "module.norm", "head")
    inner = model.get_submodule("module._checkpoint_wrapped_module")
    assert [id(parent) for parent in layers.parents] == [id(None), id(inner), id(inner), id(model)]


def test_names_lose_only_what_wrappers_put_there() -> None:
    names = find_layers(compiled(wrapped_inside(two_blocks(), checkpointed)).named_parameters()).names
    assert names == ("<root>", "module.module", "module.norm", "head")


def test_further_places_of_shared_parameters_are_told() -> None:
    layers = find_layers(tied_model())
    (place,) = layers.shared
    assert (place.name, place.owner, place.layer) == ("lm_head.weight", "wte.weight", "lm_head")
    assert isinstance(place.module, nn.Linear)
    assert layers.ties == (place,)
    assert layers.tied_end is place


@pytest.mark.parametrize(
    ("build", "shared"),
    [
        (lambda: tied_model(bias=True), ["lm_head.weight"]),
        (lambda: nn.Sequential(tied_model(), nn.Linear(7, 7)), ["0.lm_head.weight"]),
        (lambda: frozen(tied_model(), "wte.weight"), []),
        (small_model, []),
    ],
    ids=["own-bias", "tie-before-the-end", "frozen", "none"],
)
def test_model_that_does_not_end_in_a_tie_has_no_tied_end(build: Callable[[], nn.Module], shared: list[str]) -> None:
    layers = find_layers(build())
    assert layers.tied_end is None
    assert [place.name for place in layers.shared] == shared


def test_include_frozen_keeps_what_could_be_trained() -> None:
    quantized = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    model = Net(a=frozen(nn.Linear(2, 2)), b=frozen(nn.Linear(2, 2), "bias"), c=Net(codes=quantized, w=parameter(1)))
    assert written(find_layers(model)) == ["b: weight", "c: w"]
    kept = ["a: weight bias", "b: weight bias", "c: w"]
    assert written(find_layers(model, include_frozen=True)) == kept
    assert written(find_layers(model.named_parameters(), include_frozen=True)) == kept
    assert find_layers(frozen(small_model()), include_frozen=True).names == ("0", "1", "3")


def test_include_frozen_keeps_ties_of_frozen_parameters() -> None:
    tied = find_layers(frozen(tied_model(), "wte.weight"), include_frozen=True).tied_end
    assert tied is not None
    assert tied.owner == "wte.weight"


def two_paths_of_one_name() -> nn.Module:
    """A wrapper with a layer of its own, called as one that it wraps."""
    model = nn.DataParallel(Net(head=nn.Linear(2, 2)))
    model.head = nn.Linear(2, 2)
    return model


def expanded() -> nn.Parameter:
    return nn.Parameter(torch.ones(1).expand(3))


# A model, the other arguments, the error, and the parts of its message in order.
ERRORS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "all-frozen": (
        lambda: frozen(small_model()),
        {},
        ValueError,
        "no trainable parameters.*at least one trainable parameter.*requires_grad",
    ),
    "no-parameters": (nn.Tanh, {}, ValueError, "no trainable parameters"),
    "no-parameters-at-all": (nn.Tanh, {"include_frozen": True}, ValueError, "no parameters.*trainable or frozen"),
    "no-names": (list, {}, ValueError, "no trainable parameters"),
    "state-dict": (
        lambda: small_model().state_dict().items(),
        {},
        ValueError,
        r"no trainable parameters.*state_dict\(\).*pass the model itself.*at least one trainable parameter",
    ),
    "state-dict-with-frozen": (
        lambda: small_model().state_dict().items(),
        {"include_frozen": True},
        ValueError,
        r"no trainable parameters.*state_dict\(\)",
    ),
    "lazy": (lambda: Net(a=nn.LazyLinear(2)), {}, ValueError, "'a.weight' has no shape yet; run the model once"),
    "lazy-by-name": (lambda: nn.LazyLinear(2).named_parameters(), {}, ValueError, "'weight' has no shape yet"),
    "expanded": (lambda: Net(a=Net(w=expanded())), {}, ValueError, "'a.w' is expanded.*pass a clone"),
    "expanded-by-name": (lambda: [("b.w", expanded())], {}, ValueError, "'b.w' is expanded.*pass a clone"),
    "without-names": (
        lambda: small_model().parameters(),
        {},
        TypeError,
        r"named_parameters\(\).*type Parameter.*pass the model itself",
    ),
    "name-alone": (lambda: ["weight"], {}, TypeError, "pairs.*type str"),
    "name-no-string": (lambda: [(1, parameter(1))], {}, TypeError, "pairs.*type tuple"),
    "no-tensor": (lambda: [("a", 1.0)], {}, TypeError, "pairs.*type tuple"),
    "no-model": (lambda: None, {}, TypeError, "model must be a module.*NoneType"),
    "set": (lambda: {("a", parameter(1))}, {}, TypeError, "model must be.*pairs in order, got set"),
    "name-twice": (lambda: [("a.w", parameter(1)), ("a.w", parameter(1))], {}, ValueError, "'a.w' twice"),
    "path-twice": (two_paths_of_one_name, {}, ValueError, "'head.weight' twice"),
    "fsdp1-name": (lambda: [("a._fsdp_wrapped_module.w", parameter(1))], {}, ValueError, "Use fully_shard"),
    "include_frozen-number": (small_model, {"include_frozen": 1}, TypeError, "include_frozen must be True or False.*1"),
}


@pytest.mark.parametrize(("build", "arguments", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_what_has_no_layers_is_refused(
    build: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build()
    with pytest.raises(error, match=message):
        find_layers(model, **arguments)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without distributed")


@needs_distributed
@pytest.mark.usefixtures("process_group")
def test_distributed_model_has_the_layers_of_the_bare_one() -> None:
    model = two_blocks()
    bare = find_layers(model)
    wrapped = find_layers(nn.parallel.DistributedDataParallel(compiled(wrapped_inside(model, checkpointed))))
    assert written(wrapped) == written(bare)
    assert [id(module) for module in wrapped.modules[1:]] == [id(module) for module in bare.modules[1:]]


@needs_distributed
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", [nn.Linear, lambda *sizes: weight_norm(nn.Linear(*sizes))], ids=["plain", "normed"])
def test_fully_sharded_layer_has_the_type_that_its_author_knows(wrap: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(wrap(2, 2), nn.LayerNorm(2))
    mesh = init_device_mesh("cpu", (1,))
    for child in model:
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert [layer.type_name for layer in find_layers(model).layers] == ["Linear", "LayerNorm"]


@pytest.mark.parametrize(
    ("name", "layer", "tensor"),
    [
        ("weight", "<root>", "weight"),
        ("a.b.weight", "a.b", "weight"),
        ("parametrizations.weight.original", "<root>", "weight"),
        ("a.parametrizations.weight.original0", "a", "weight"),
        ("a.parametrizations.in_proj_bias.original", "a", "in_proj_bias"),
        ("a.parametrizations.weight.0.scale", "a", "scale"),
        ("a.parametrizations.weight.0.b.parametrizations.weight.original1", "a", "original1"),
        ("a.parametrizations.weight", "a.parametrizations", "weight"),
        ("a.parametrizations.weight.bias", "a.parametrizations.weight", "bias"),
        ("a.myparametrizations.weight.original", "a.myparametrizations.weight", "original"),
        ("a.original", "a", "original"),
    ],
)
def test_name_tells_layer_and_tensor(name: str, layer: str, tensor: str) -> None:
    assert layer_of(name) == layer
    assert tensor_name(name) == tensor


def test_listed_names_are_shortened_beyond_the_most() -> None:
    assert listed(["a", "b"], 2) == "'a', 'b'"
    assert listed([f"n{index}" for index in range(1002)], 2) == "'n0', 'n1' and 1,000 more"
