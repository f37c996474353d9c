"""The decoder-only transformer of ``char_lm.py`` on Python's documentation: at its usual size, and twice that."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from char_lm import CharTransformer, Corpus, load_corpus, sample_batch, validation_loss
from quality.task import Problem, Task

__all__ = ["CHAR_LM", "CHAR_LM_WIDE", "CONTEXT", "corpus"]

CONTEXT = 64


@functools.cache
def corpus() -> Corpus:
    """Return the text, read once a process."""
    return load_corpus()


def begin(seed: int, *, width: int, depth: int, batch_size: int) -> Problem:
    """Return a transformer with the first weights of the seed."""
    text = corpus()
    torch.manual_seed(seed)
    model = CharTransformer(len(text.vocabulary), context=CONTEXT, width=width, depth=depth, heads=4)

    def loss(generator: torch.Generator) -> Tensor:
        return model.loss(*sample_batch(text.train, batch_size, CONTEXT, generator))

    def validate() -> float:
        return validation_loss(model, text.validation, CONTEXT, torch.device("cpu"))

    return Problem(model=model, loss=loss, validate=validate)


CHAR_LM = Task(
    name="char-lm",
    kind="character transformer, 2 blocks of 64",
    metric="validation loss, nats per character",
    steps=600,
    recipe="transformer",
    begin=functools.partial(begin, width=64, depth=2, batch_size=32),
    points=12,
)
CHAR_LM_WIDE = Task(
    name="char-lm-wide",
    kind="character transformer, 4 blocks of 128",
    metric="validation loss, nats per character",
    steps=400,
    recipe="transformer",
    begin=functools.partial(begin, width=128, depth=4, batch_size=16),
    points=10,
)
