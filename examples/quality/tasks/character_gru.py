"""A recurrent network on the text of the character transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from char_lm import character_loss, sample_batch
from quality.task import Problem, Task
from quality.tasks.character_transformer import CONTEXT, corpus

__all__ = ["CHARACTER_GRU"]

BATCH_SIZE = 32


class CharacterGRU(nn.Module):
    """Embedding, one GRU layer, head.

    Args:
        vocabulary_size: number of different tokens.
        width: of the embedding; the GRU is twice as wide.
    """

    def __init__(self, vocabulary_size: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.recurrent = nn.GRU(width, 2 * width, batch_first=True)
        self.head = nn.Linear(2 * width, vocabulary_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token: (batch, length) in, (batch, length, vocabulary) out."""
        logits: Tensor = self.head(self.recurrent(self.tokens(tokens))[0])
        return logits


def begin(seed: int) -> Problem:
    """Return a GRU with the first weights of the seed."""
    text = corpus()
    torch.manual_seed(seed)
    model = CharacterGRU(len(text.vocabulary), 64)
    windows = (len(text.validation) - 1) // CONTEXT
    inputs = text.validation[: windows * CONTEXT].view(windows, CONTEXT)
    targets = text.validation[1 : windows * CONTEXT + 1].view(windows, CONTEXT)

    def loss(generator: torch.Generator) -> Tensor:
        characters, following = sample_batch(text.train, BATCH_SIZE, CONTEXT, generator)
        return character_loss(model(characters), following)

    def validate() -> float:
        return character_loss(model(inputs), targets).item()

    return Problem(model=model, loss=loss, validate=validate)


CHARACTER_GRU = Task(
    name="gru",
    kind="character GRU, 128 wide",
    metric="validation loss, nats per character",
    steps=400,
    recipe="rnn",
    begin=begin,
)
