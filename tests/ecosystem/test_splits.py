"""What is printed of real models, by default and by their recipe, in tests/data/splits.txt; whether warnings are true.

``python -m tests.ecosystem.test_splits`` writes the file anew; read what it changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import UNet2DModel
from torch import nn

from stac_optimizer import STAC, embeddings, last_layers, recipes
from tests.ecosystem.pages import own_warnings
from tests.real_models import LLAMA_LIKE, MODELS, TEXT, loss_of

FILE = Path(__file__).parents[1] / "data" / "splits.txt"


def _gemma() -> Any:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**LLAMA_LIKE, head_dim=4))


def _bart() -> Any:
    of_bart = {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(
        **TEXT, **of_bart, d_model=16, encoder_layers=2, decoder_layers=2, max_position_embeddings=16
    )
    return transformers.BartForConditionalGeneration(config)


def _unet() -> Any:
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
    }
    return UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, attention_head_dim=4, **blocks)


TEXTS, IMAGES = ("transformer", "vision")
SPLITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{name: (MODELS[name], TEXTS) for name in ("gpt2", "llama", "bert", "t5", "whisper", "mamba", "mixtral")},
    "gemma": (_gemma, TEXTS),
    "bart": (_bart, TEXTS),
    **{name: (MODELS[name], IMAGES) for name in ("vit", "resnet", "convnext")},
    "unet": (_unet, IMAGES),
}


def split(name: str, *, by_recipe: bool) -> tuple[nn.Module, STAC, str]:
    """The model, its optimizer, and all that is said of it."""
    make, recipe = SPLITS[name]
    torch.manual_seed(0)
    model = make()
    with own_warnings() as told:
        optimizer = STAC(model, **(getattr(recipes, recipe)(lr=1e-3) if by_recipe else {}))
    title = f"== {name}: STAC(model{f', **recipes.{recipe}(lr=1e-3)' if by_recipe else ''})"
    return model, optimizer, "\n".join([title, *(f"warning: {message}" for message in told), str(optimizer.partition)])


def written() -> dict[str, str]:
    parts = re.split(r"\n\n(?===)", FILE.read_text(encoding="utf-8").rstrip("\n"))
    return {part.splitlines()[0]: part for part in parts}


@pytest.mark.parametrize("by_recipe", [False, True], ids=["default", "recipe"])
@pytest.mark.parametrize("name", SPLITS)
def test_what_is_printed_is_what_was_reviewed(name: str, by_recipe: bool) -> None:
    _, _, printed = split(name, by_recipe=by_recipe)
    assert printed == written()[printed.splitlines()[0]]
    assert not (by_recipe and "warning: " in printed)


@pytest.mark.parametrize("name", [name for name in SPLITS if SPLITS[name][1] == TEXTS])
def test_embeddings_are_warned_of_where_rows_have_no_gradient_and_nowhere_else(name: str) -> None:
    model, optimizer, printed = split(name, by_recipe=False)
    loss_of(model).backward()
    tables = {key: module for key, module in model.named_modules() if isinstance(module, nn.Embedding)}
    in_trunk = set(optimizer.partition.trunk_layer_names)
    idle = {
        key
        for key, table in tables.items()
        if key in in_trunk and table.weight.grad is not None and bool((table.weight.grad == 0).all(dim=1).any())
    }
    (listed,) = re.findall(r"the trunk holds the embeddings? (.*?): rows", printed) or [""]
    assert idle <= set(re.findall("'(.*?)'", listed)) <= in_trunk
    assert not any(f"{key}.weight" == tied for key in listed for tied in re.findall(r"tied to '(.*?)'", printed))


@pytest.mark.parametrize("name", SPLITS)
def test_what_warnings_say_to_write_is_quiet(name: str) -> None:
    model, _, printed = split(name, by_recipe=False)
    if "last_layers(1) | embeddings()" in printed:
        STAC(model, cap=last_layers(1) | embeddings())
    for line in re.findall(r"write (cap=named\(.*)", printed):
        names: dict[str, Any] = {}
        exec(f"from stac_optimizer import named, norms\n{line}", names)
        STAC(model, cap=names["cap"] | embeddings())


if __name__ == "__main__":
    printed = [split(name, by_recipe=by_recipe)[2] for name in SPLITS for by_recipe in (False, True)]
    FILE.write_text("\n\n".join(printed) + "\n", encoding="utf-8")
