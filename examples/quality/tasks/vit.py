"""A small vision transformer on MNIST's digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quality.task import Problem, Task
from quality.tasks.mnist import begin_images

__all__ = ["VIT"]


class VisionTransformer(nn.Module):
    """Square patches, learned positions, torch's pre-norm encoder, the mean over patches, head.

    Args:
        patch: its side, in pixels; 28 must be a multiple.
        width: size of the residual stream.
        depth: number of blocks.
    """

    def __init__(self, *, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch = patch
        self.patches = nn.Linear(patch * patch, width)
        self.positions = nn.Embedding((28 // patch) ** 2, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        # Layers of their own instead of nn.TransformerEncoder, whose copies would all start with the same weights.
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width,
                    nhead=4,
                    dim_feedforward=2 * width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the digits: (batch, 1, 28, 28) in, (batch, 10) out."""
        pieces = images.squeeze(1).unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        hidden = self.blocks(self.patches(pieces.flatten(3).flatten(1, 2)) + self.positions.weight)
        logits: Tensor = self.head(self.norm(hidden).mean(dim=1))
        return logits


def begin(seed: int) -> Problem:
    """Return a vision transformer with the first weights of the seed."""
    torch.manual_seed(seed)
    return begin_images(VisionTransformer(patch=7, width=64, depth=3))


VIT = Task(
    name="vit",
    kind="vision transformer, 3 blocks of 64",
    metric="validation loss on 1,000 MNIST digits",
    steps=500,
    recipe="vision",
    begin=begin,
)
