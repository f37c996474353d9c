"""Recipes: the split that each makes of real models, and the arguments that it gives."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import STAC, layerwise_lr_decay, named, partition_trainable_layers, recipes

from .real_models import MODELS, loss_of
from .support import names_of_gradients

RECIPES = {name: getattr(recipes, name) for name in recipes.__all__}
OF_MATRICES = ("transformer", "vision", "mlp", "pinn", "rnn")
OF_ELEMENTS = ("finetuning",)

# What stands in the cap besides vectors, of each model; a number in a name is written N.
CAPS = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt2-untied": {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"},
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "llama-tied": {"model.embed_tokens.weight"},
    "mixtral": {"model.embed_tokens.weight", "lm_head.weight"},
    "qwen3-moe": {"model.embed_tokens.weight", "lm_head.weight"},
    "gpt-neox": {"gpt_neox.embed_in.weight", "lm_head.weight"},
    "bert": {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
    "bert-classifier": {
        *(f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")),
        "classifier.weight",
    },
    "t5": {
        "shared.weight",
        "encoder.block.N.layer.N.SelfAttention.relative_attention_bias.weight",
        "decoder.block.N.layer.N.SelfAttention.relative_attention_bias.weight",
    },
    "whisper": {
        "model.encoder.conv1.weight",
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
    },
    "mamba": {
        "backbone.embeddings.weight",
        "backbone.layers.N.mixer.A_log",
        "backbone.layers.N.mixer.conv1d.weight",
    },
    "vit": {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
        "classifier.weight",
    },
    "swin": {
        "swin.embeddings.patch_embeddings.projection.weight",
        "swin.encoder.layers.N.blocks.N.attention.relative_position_bias.relative_position_bias_table",
        "classifier.weight",
    },
    "resnet": {"resnet.embedder.embedder.convolution.weight", "classifier.N.weight"},
    "convnext": {
        "convnext.embeddings.patch_embeddings.weight",
        "convnext.encoder.stages.N.layers.N.dwconv.weight",
        "classifier.weight",
    },
    "timm-vit": {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"},
    "timm-resnext": {"conv1.weight", "layerN.N.conv2.weight", "fc.weight"},
    "timm-convnext": {"stem.N.weight", "stages.N.blocks.N.conv_dw.weight", "head.fc.weight"},
    "timm-swin": {
        "patch_embed.proj.weight",
        "layers.N.blocks.N.attn.relative_position_bias_table",
        "head.fc.weight",
    },
}
# What the trunk takes apart: its keys other than those of a single matrix.
TAKEN_APART = {
    "gpt-neox": {"gpt_neox.layers.N.attention.query_key_value.weight": {"row_blocks": 3}},
    "mixtral": {f"model.layers.N.mlp.experts.{kind}_proj": {"batch_dims": 1} for kind in ("gate_up", "down")},
    "qwen3-moe": {f"model.layers.N.mlp.experts.{kind}_proj": {"batch_dims": 1} for kind in ("gate_up", "down")},
    "timm-vit": {"blocks.N.attn.qkv.weight": {"row_blocks": 3}},
    "timm-swin": {"layers.N.blocks.N.attn.qkv.weight": {"row_blocks": 3}},
}


def unnumbered(name: str) -> str:
    return re.sub(r"\d+(?=\.)", "N", name)


def unnumbered_but_convolutions(name: str) -> str:
    """The name; of layers called conv1, conv2 the number tells what they are."""
    return ".".join(part if part.startswith("conv") else re.sub(r"\d+$", "N", part) for part in name.split("."))


def matrices_of(optimizer: STAC, role: str) -> dict[str, dict[str, int]]:
    """What is no vector in a role, and which keys take it apart."""
    whole = {"row_blocks": 1, "batch_dims": 0}
    return {
        unnumbered_but_convolutions(name): {
            key: group[key] for key in whole if group.get(key, whole[key]) != whole[key]
        }
        for group in optimizer.param_groups
        if group["stac_role"] == role
        for name, param in zip(group["param_names"], group["params"], strict=True)
        if param.ndim > 1
    }


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def stepped_once(model: nn.Module, optimizer: STAC) -> None:
    """One training step; all that has a gradient moves, or the step has left it out."""
    before = copy.deepcopy(model.state_dict())
    loss_of(model).backward()
    optimizer.step()
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved
    assert moved <= set(names_of_gradients(model))


@pytest.mark.parametrize("name", MODELS)
def test_real_model_is_split_as_documented(name: str) -> None:
    model = model_of(name)
    optimizer = STAC(model, **recipes.transformer(lr=1e-3))
    trunk = matrices_of(optimizer, "trunk")
    assert set(matrices_of(optimizer, "cap")) == CAPS[name]
    assert {key: apart for key, apart in trunk.items() if apart} == TAKEN_APART.get(name, {})
    assert all(param.ndim > 1 for param in optimizer.partition.trunk_parameters)
    assert optimizer.partition.moved == ()
    stepped_once(model, optimizer)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["gpt2", "bert-classifier", "vit", "resnet"])
def test_every_recipe_serves_every_kind(name: str, recipe: str) -> None:
    model = model_of(name)
    optimizer = STAC(model, **RECIPES[recipe](lr=1e-3))
    assert set(matrices_of(optimizer, "cap")) == CAPS[name]
    stepped_once(model, optimizer)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_measured_by_adamw(recipe: str) -> None:
    """Both trunks shrink weights about as AdamW would; the cap has its lr and no decay."""
    arguments = RECIPES[recipe](4e-3, weight_decay=0.5)
    groups = {group["stac_role"]: group for group in STAC(model_of("bert"), **arguments).param_groups}
    trunk, cap = groups["trunk"], groups["cap"]
    assert (cap["rule"], cap["lr"], cap["weight_decay"]) == ("adamw", 4e-3, 0.0)
    assert trunk["lr"] * trunk["weight_decay"] == pytest.approx(4e-3 * 0.5)
    assert trunk["rule"] == ("muon" if recipe in OF_MATRICES else "signum")
    assert trunk["lr"] == pytest.approx(4e-3 if recipe in OF_MATRICES else 1e-3)
    assert trunk["cautious"] is (recipe in OF_ELEMENTS)
    assert set(OF_MATRICES + OF_ELEMENTS) == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_takes_a_tensor_and_survives_pickling(recipe: str) -> None:
    optimizer = STAC(model_of("gpt2"), **RECIPES[recipe](torch.tensor(1e-3)))
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be a finite number in \[0, inf\), got -1.0"),
        ({"lr": "fast"}, TypeError, "lr must be a finite number"),
        ({"lr": 1e-3, "weight_decay": float("nan")}, ValueError, "weight_decay must be"),
    ],
)
def test_wrong_argument_is_named(recipe: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RECIPES[recipe](**arguments)


def test_recipe_needs_the_model_itself() -> None:
    with pytest.raises(ValueError, match="Pass the model in place of its named parameters"):
        STAC(model_of("vit").named_parameters(), **recipes.vision(1e-3))


def test_wrapped_model_is_split_alike() -> None:
    model = model_of("vit")
    wrapped = torch.compile(nn.DataParallel(model))
    assert isinstance(wrapped, nn.Module)
    plain, other = (STAC(each, **recipes.vision(1e-3)) for each in (model, wrapped))
    assert plain.partition.cap_layer_names == other.partition.cap_layer_names
    assert [len(group["params"]) for group in plain.param_groups] == [
        len(group["params"]) for group in other.param_groups
    ]


def test_recipe_is_a_dict_to_add_to() -> None:
    model = model_of("gpt2")
    recipe = recipes.transformer(lr=1e-3, overrides=layerwise_lr_decay(model, 0.5))
    optimizer = STAC(model, **{**recipe, "betas": (0.9, 0.99)}, error_if_nonfinite=True)
    assert len({group["lr"] for group in optimizer.param_groups}) == 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_else_is_the_caps_is_not_taken_apart(recipe: str) -> None:
    """AdamW knows no blocks of rows."""
    model = model_of("gpt-neox")
    optimizer = STAC(model, **RECIPES[recipe](1e-3, also_cap=named("gpt_neox.layers.0")))
    assert "gpt_neox.layers.N.attention.query_key_value.weight" in matrices_of(optimizer, "cap")
    assert {layer.split(".")[2] for layer in optimizer.partition.trunk_layer_names} == {"1"}
    with pytest.raises(ValueError, match="matches no layer"):
        STAC(model, **RECIPES[recipe](1e-3, also_cap=named("second_head")))


def test_cap_is_shown_as_it_is_written() -> None:
    assert repr(recipes.rnn(1e-3)["cap"]) == "last_layers(1) | all_but_hidden_matrices()"


def test_partition_is_known_before_an_optimizer_is() -> None:
    partition = partition_trainable_layers(model_of("llama"), cap=recipes.transformer(1e-3)["cap"])
    assert partition.cap_layer_names[-1] == "lm_head"
