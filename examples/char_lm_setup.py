"""What the character model is trained with: the settings, their optimizers and their schedule. No training here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from char_lm import CharTransformer, Corpus
from stac_optimizer import STAC, embeddings, last_layers, norms, partition_trainable_layers, recipes

__all__ = [
    "Settings",
    "add_settings",
    "given_settings",
    "make_adamw",
    "make_model",
    "make_schedule",
    "make_stac",
    "refuse_other_settings",
    "refuse_unread_settings",
]

T = TypeVar("T")

# The row of a rare character sees mostly zero gradients, which still have a sign once averaged; norms have too few
# weights for their state to matter; and the head is the layer that STAC's cap is made for.
CAP = embeddings() | norms() | last_layers(1)


def setting(default: T, description: str) -> T:
    """Declare a field of ``Settings``, which is at the same time a command-line option."""
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the course of a run. A checkpoint carries it, so a resumed run cannot drift from it."""

    steps: int = setting(600, "length of the whole schedule, also when a run stops earlier")
    warmup: int = setting(30, "steps of linear warm-up before the cosine decay to a tenth")
    validate_every: int = setting(75, "steps between two validation points")
    batch_size: int = setting(32, "windows per batch")
    context: int = setting(64, "characters per window")
    width: int = setting(64, "size of the residual stream")
    depth: int = setting(2, "transformer blocks")
    heads: int = setting(4, "attention heads per block")
    tied: bool = setting(False, "use the token embedding as the output head")
    seed: int = setting(0, "of the first weights and of the batches")
    recipe: bool = setting(True, "STAC by its recipe for transformers; else with the sign trunk of the stac options")
    recipe_lr: float = setting(1e-2, "the learning rate that the recipe is given")
    recipe_weight_decay: float = setting(0.1, "the weight decay that the recipe is given")
    weight_decay: float = setting(0.01, "weight decay of AdamW and of STAC's cap, but for the recipe's")
    adamw_trunk_lr: float = setting(4e-3, "AdamW's learning rate for the matrices of the blocks")
    adamw_cap_lr: float = setting(3e-2, "AdamW's learning rate for all else")
    stac_trunk_lr: float = setting(1.2e-3, "STAC's learning rate for the matrices of the blocks, its trunk")
    stac_cap_lr: float = setting(3e-2, "STAC's learning rate for all else, its cap")
    stac_trunk_weight_decay: float = setting(1.0, "STAC's weight decay in its trunk")
    stac_trunk_momentum: float = setting(0.9, "STAC's averaging factor before the sign")
    stac_trunk_cautious: bool = setting(True, "in STAC's trunk, step only where the present gradient agrees")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("warmup", "seed") or isinstance(value, float) else 1
            if not isinstance(value, bool) and not least <= value < math.inf:
                kind = "a finite number" if isinstance(value, float) else "a whole number"
                raise ValueError(f"{name} = {value}, but it must be {kind} of at least {least}")
        if self.seed >= 2**32:
            raise ValueError(f"seed = {self.seed}, but it must be below 2**32")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Give a parser one option per field of ``Settings``, unset unless given."""
    for entry in fields(Settings):
        kind: dict[str, Any] = {"type": type(entry.default)}
        if kind["type"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        description = f"{entry.metadata['help']} (default: {entry.default})"
        option = "--" + entry.name.replace("_", "-")
        parser.add_argument(option, default=argparse.SUPPRESS, help=description, **kind)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return those of the settings that the command line gave."""
    names = [entry.name for entry in fields(Settings)]
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def refuse_unread_settings(given: Mapping[str, Any], settings: Settings) -> None:
    """Raise where the command line gave what STAC's chosen form would not read.

    Raises:
        ValueError: the first such setting.
    """
    unread, remedy = ("stac_", "add --no-recipe") if settings.recipe else ("recipe_", "leave out --no-recipe")
    for name, value in given.items():
        if name.startswith(unread):
            raise ValueError(f"{name} = {value} would not be read: {remedy}")


def refuse_other_settings(given: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise where the command line gave another value than the checkpoint was made with.

    Raises:
        ValueError: the first difference.
    """
    if stored.keys() != {entry.name for entry in fields(Settings)}:
        raise ValueError("the checkpoint was made by another version of this example, which has other settings")
    for name, value in given.items():
        if value != stored[name]:
            raise ValueError(f"{name} = {value}, but the checkpoint was made with {name} = {stored[name]}")


def make_model(settings: Settings, corpus: Corpus) -> CharTransformer:
    """Return the model with its first weights; the same settings, the same weights.

    Raises:
        ValueError: the text is too short for the context.
    """
    longest = len(corpus.validation) - 1
    if settings.context > longest:
        raise ValueError(f"context = {settings.context}, but the text to validate on allows {longest} at most")
    torch.manual_seed(settings.seed)
    return CharTransformer(
        len(corpus.vocabulary),
        context=settings.context,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        tied=settings.tied,
    )


def make_adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Return torch's AdamW over the same two sets of layers, each with a learning rate of its own.

    Two rates serve this model better than one, whatever the optimizer. With two on both sides, what differs between
    the contestants is the rule of the trunk alone.
    """
    partition = partition_trainable_layers(model, cap=CAP)
    groups = [
        {"params": partition.trunk_parameters, "lr": settings.adamw_trunk_lr},
        {"params": partition.cap_parameters, "lr": settings.adamw_cap_lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def make_stac(model: nn.Module, settings: Settings, **arguments: Any) -> STAC:
    """Return STAC with the matrices inside the blocks as its trunk and all else as its cap; more arguments are its."""
    if settings.recipe:
        recipe = recipes.transformer(settings.recipe_lr, weight_decay=settings.recipe_weight_decay)
        return STAC(model, **recipe, **arguments)
    return STAC(
        model,
        cap=CAP,
        trunk_lr=settings.stac_trunk_lr,
        cap_lr=settings.stac_cap_lr,
        trunk_momentum=settings.stac_trunk_momentum,
        trunk_cautious=settings.stac_trunk_cautious,
        trunk_weight_decay=settings.stac_trunk_weight_decay,
        cap_weight_decay=settings.weight_decay,
        **arguments,
    )


def make_schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> LambdaLR:
    """Return linear warm-up, then a cosine from the optimizer's learning rates down to a tenth of them."""

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / (settings.warmup + 1)
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
