"""A small decoder-only transformer over characters, and the text it learns: Python's own documentation.

Model, data, validation and a clock only. Nothing here knows an optimizer, so any training script can import it.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CharTransformer", "Corpus", "character_loss", "load_corpus", "now", "sample_batch", "validation_loss"]


@dataclass(frozen=True)
class Corpus:
    """A text as numbers: the first nine tenths to learn from, the last tenth to be judged on.

    Attributes:
        vocabulary: every character of the text once, sorted; a token is an index into it.
        train, validation: one-dimensional int64 tensors, on the CPU.
        digest: SHA-256 of the text. Python releases differ in their documentation, so a checkpoint must know its text.
    """

    vocabulary: str
    train: Tensor
    validation: Tensor
    digest: str


def load_corpus() -> Corpus:
    """Return the texts behind Python's ``help()``, joined in the order of their names."""
    text = "\n".join(topics[name] for name in sorted(topics))
    vocabulary = "".join(sorted(set(text)))
    token_of = {character: token for token, character in enumerate(vocabulary)}
    tokens = torch.tensor([token_of[character] for character in text])
    train, validation = tokens.split([len(text) * 9 // 10, len(text) - len(text) * 9 // 10])
    return Corpus(vocabulary, train, validation, hashlib.sha256(text.encode()).hexdigest())


def sample_batch(tokens: Tensor, batch_size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``batch_size`` random windows of ``context`` tokens and, for each token, the one that follows it.

    Args:
        tokens: the text to draw from, on the CPU.
        generator: a CPU generator and the only source of chance, so that every device sees the same batches.
    """
    starts = torch.randint(len(tokens) - context, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


class SelfAttention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.query_key_value(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.output(attended.transpose(1, 2).flatten(-2))
        return projected


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind its own normalisation and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        attended: Tensor = hidden + self.attention(self.attention_norm(hidden))
        transformed: Tensor = attended + self.mlp(self.mlp_norm(attended))
        return transformed


class CharTransformer(nn.Module):
    """Pre-norm decoder-only transformer with learned positions.

    Args:
        vocabulary_size: number of different tokens.
        context: longest sequence it can read, in tokens.
        width: size of the residual stream; a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads per block.
        tied: use the token embedding as the output head too.
    """

    def __init__(
        self, vocabulary_size: int, *, context: int, width: int, depth: int, heads: int, tied: bool = False
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        # Embeddings as small as the residual branches' first outputs, and logits near zero: a uniform first guess.
        for weight in (self.tokens.weight, self.positions.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token: (batch, length) in, (batch, length, vocabulary) out."""
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))
        return logits

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of ``targets``, in nats per character."""
        return character_loss(self(inputs), targets)


def character_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of ``targets`` under the logits that any wrapper of the model gave."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


@torch.no_grad()
def validation_loss(model: CharTransformer, tokens: Tensor, context: int, device: torch.device) -> float:
    """Return the mean loss over the whole of ``tokens``, cut into windows that do not overlap (a rest is left out)."""
    windows = (len(tokens) - 1) // context
    inputs = tokens[: windows * context].view(windows, context)
    targets = tokens[1 : windows * context + 1].view(windows, context)
    total = 0.0
    for chunk, wanted in zip(inputs.split(64), targets.split(64), strict=True):
        total += model.loss(chunk.to(device), wanted.to(device)).item() * len(chunk)
    return total / windows


def now(device: torch.device) -> float:
    """Return the time in seconds, once the device has done all it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
