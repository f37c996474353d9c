"""What the benchmark's optimizers step: the parameter shapes of known models, by formula. No model, no optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["SHAPES", "Entry", "Workload"]

# As small as a model's weights and gradients are, so that no step overflows and none is lost in bfloat16.
SCALE = 0.02


class Entry(NamedTuple):
    """One parameter, and whether a real split would give it to the cap."""

    name: str
    shape: tuple[int, ...]
    in_cap: bool = False


def affine(name: str, weight: tuple[int, ...], *, in_cap: bool = False) -> Iterator[Entry]:
    """Weight and bias of a linear layer or a norm."""
    yield Entry(f"{name}.weight", weight, in_cap)
    yield Entry(f"{name}.bias", weight[:1], in_cap)


def transformer_block(name: str, width: int) -> Iterator[Entry]:
    """Attention and a perceptron of four times the width, each behind a norm, as GPT-2 and ViT have them."""
    yield from affine(f"{name}.ln_1", (width,), in_cap=True)
    yield from affine(f"{name}.attention.in", (3 * width, width))
    yield from affine(f"{name}.attention.out", (width, width))
    yield from affine(f"{name}.ln_2", (width,), in_cap=True)
    yield from affine(f"{name}.mlp.in", (4 * width, width))
    yield from affine(f"{name}.mlp.out", (width, 4 * width))


def gpt2(*, width: int, depth: int, vocabulary: int = 50257, context: int = 1024) -> Iterator[Entry]:
    """GPT-2, its head tied to the token embedding; the cap is made of embeddings and norms."""
    yield Entry("wte.weight", (vocabulary, width), in_cap=True)
    yield Entry("wpe.weight", (context, width), in_cap=True)
    for block in range(depth):
        yield from transformer_block(f"h.{block}", width)
    yield from affine("ln_f", (width,), in_cap=True)


def vit_b16() -> Iterator[Entry]:
    """ViT-B/16 for ImageNet; the cap is made of embeddings, norms and the head."""
    width = 768
    yield Entry("class_token", (1, 1, width), in_cap=True)
    yield from affine("conv_proj", (width, 3, 16, 16))
    yield Entry("pos_embedding", (1, 14 * 14 + 1, width), in_cap=True)
    for block in range(12):
        yield from transformer_block(f"layers.{block}", width)
    yield from affine("ln", (width,), in_cap=True)
    yield from affine("head", (1000, width), in_cap=True)


def resnet50() -> Iterator[Entry]:
    """ResNet-50 for ImageNet; the cap is made of norms and the classifier."""

    def convolution(name: str, norm: str, shape: tuple[int, int, int, int]) -> Iterator[Entry]:
        yield Entry(f"{name}.weight", shape)
        yield from affine(norm, shape[:1], in_cap=True)

    yield from convolution("conv1", "bn1", (64, 3, 7, 7))
    channels = 64
    for stage, (width, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            yield from convolution(f"{name}.conv1", f"{name}.bn1", (width, channels, 1, 1))
            yield from convolution(f"{name}.conv2", f"{name}.bn2", (width, width, 3, 3))
            yield from convolution(f"{name}.conv3", f"{name}.bn3", (4 * width, width, 1, 1))
            if block == 0:
                yield from convolution(f"{name}.downsample.0", f"{name}.downsample.1", (4 * width, channels, 1, 1))
            channels = 4 * width
    yield from affine("fc", (1000, channels), in_cap=True)


SHAPES: dict[str, Callable[[], Iterable[Entry]]] = {
    "gpt2-small": lambda: gpt2(width=768, depth=12),
    "gpt2-xl": lambda: gpt2(width=1600, depth=48),
    "char-lm-wide": lambda: gpt2(width=128, depth=4, vocabulary=100, context=64),
    "resnet50": resnet50,
    "vit-b16": vit_b16,
    "many-tiny": lambda: [Entry(f"tensors.{index}", (64,)) for index in range(2000)],
    "one-huge": lambda: [Entry("tensor", (100_000_000,))],
}


class Workload:
    """Parameters with gradients, shared by all contestants: what a step costs does not hang on their values.

    Args:
        entries: the parameters to make.
        dtype: of parameters and gradients.
        device: where they live.
    """

    def __init__(self, entries: Iterable[Entry], *, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(SCALE)

        self.device = device
        self.entries = list(entries)
        self.parameters = [nn.Parameter(draw(entry.shape)) for entry in self.entries]
        self.gradients = [draw(entry.shape) for entry in self.entries]
        self.give_gradients()

    def give_gradients(self) -> None:
        """Put every gradient in its place; some optimizers take it away once it is used."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def named(self, *, in_cap: bool | None = None) -> list[tuple[str, nn.Parameter]]:
        """Return (name, parameter) pairs: those of the cap, those of the trunk, or, for ``None``, all."""
        pairs = zip(self.entries, self.parameters, strict=True)
        return [(entry.name, parameter) for entry, parameter in pairs if in_cap in (None, entry.in_cap)]

    def trunk_matrices(self) -> list[nn.Parameter]:
        """Return what Muon is made for: the matrices, without embeddings and heads."""
        return [parameter for _, parameter in self.named(in_cap=False) if parameter.ndim == 2]

    def others(self) -> list[nn.Parameter]:
        """Return all that are no matrices of the trunk."""
        matrices = set(map(id, self.trunk_matrices()))
        return [parameter for parameter in self.parameters if id(parameter) not in matrices]

    @property
    def weights(self) -> int:
        """How many weights all parameters hold."""
        return sum(math.prod(entry.shape) for entry in self.entries)
