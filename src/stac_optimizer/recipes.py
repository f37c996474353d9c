"""Arguments of STAC for kinds of models, from the learning rate and decay of a tuned AdamW.

``STAC(model, **recipes.transformer(lr=3e-4))``. A recipe is a plain dict: print it, change it, or add to it. It knows
no model, so one recipe serves any of its kind; ``print(optimizer.partition)`` shows what it made of yours.

Two trunks:

- *of matrices*: :class:`stac_optimizer.optim.Muon`. Its steps are as long as AdamW's, so AdamW's lr and decay serve;
- *of elements*: the cautious sign trunk. Its steps are longer, so it takes a part of AdamW's lr, and the more decay.

One cap: the last layer, embeddings, and what else is no hidden matrix (:mod:`stac_optimizer.model.hidden`), by AdamW at
its own lr, without decay.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from stac_optimizer.model.hidden import all_but_hidden_matrices, gates, queries_keys_values, stacked_experts
from stac_optimizer.model.layers import Layers
from stac_optimizer.model.selection import Selector
from stac_optimizer.model.selectors import last_layers
from stac_optimizer.optim import Muon
from stac_optimizer.roles.overrides import Overrides, checked_overrides
from stac_optimizer.validation import learning_rate, non_negative

__all__ = ["finetuning", "mlp", "pinn", "rnn", "transformer", "vision"]

# The numbers of all recipes. Ratios are to AdamW's lr and decay; what shrinks a weight is the product of both.
MATRIX_LR, MATRIX_DECAY, MATRIX_MOMENTUM = 1.0, 1.0, 0.95
ELEMENT_LR, ELEMENT_DECAY, ELEMENT_MOMENTUM = 0.25, 4.0, 0.9
CAP_LR, CAP_DECAY = 1.0, 0.0
BETAS_OF_TEXT, BETAS = (0.9, 0.95), (0.9, 0.999)


class _IfAny(Selector):
    """In overrides of a recipe, which serves models that have none of what it selects."""

    def select(self, layers: Layers, *, allow_empty: bool = False) -> frozenset[str]:
        return self.pick(layers, True)


def _cap(lr: float | Tensor, betas: tuple[float, float], also: Selector | None) -> dict[str, Any]:
    cap = last_layers(1) | all_but_hidden_matrices()
    return {
        "cap": cap if also is None else cap | also,
        "cap_lr": CAP_LR * learning_rate("lr", lr),
        "cap_weight_decay": CAP_DECAY,
        "betas": betas,
    }


def _of_matrices(
    lr: float | Tensor,
    weight_decay: float,
    betas: tuple[float, float],
    also_cap: Selector | None,
    overrides: Overrides,
) -> dict[str, Any]:
    """A trunk of matrices, those that are several in one taken apart."""
    of_cap = _cap(lr, betas, also_cap)
    several = [
        (queries_keys_values(), {"row_blocks": 3}),
        (gates(3), {"row_blocks": 3}),
        (gates(4), {"row_blocks": 4}),
        (stacked_experts(), {"batch_dims": 1}),
    ]
    return {
        **of_cap,
        "trunk_optimizer": partial(Muon, momentum=MATRIX_MOMENTUM),
        "trunk_lr": MATRIX_LR * learning_rate("lr", lr),
        "trunk_weight_decay": MATRIX_DECAY * non_negative("weight_decay", weight_decay),
        "overrides": [
            *((_IfAny(**vars(selector - of_cap["cap"])), values) for selector, values in several),
            *checked_overrides(overrides),
        ],
    }


def _of_elements(
    lr: float | Tensor,
    weight_decay: float,
    betas: tuple[float, float],
    also_cap: Selector | None,
    overrides: Overrides,
) -> dict[str, Any]:
    """A trunk of elements."""
    return {
        **_cap(lr, betas, also_cap),
        "trunk_cautious": True,
        "trunk_momentum": ELEMENT_MOMENTUM,
        "trunk_lr": ELEMENT_LR * learning_rate("lr", lr),
        "trunk_weight_decay": ELEMENT_DECAY * non_negative("weight_decay", weight_decay),
        "overrides": checked_overrides(overrides),
    }


def transformer(
    lr: float | Tensor, *, weight_decay: float = 0.1, also_cap: Selector | None = None, overrides: Overrides = ()
) -> dict[str, Any]:
    """A transformer from scratch: a trunk of matrices.

    Beside it: gradients clipped to a norm of 1, a warm-up of some percent of the steps, then a cosine or a line to a
    tenth of the lr or less. Fused query, key and value of one size are three matrices, stacked experts one each.

    Args:
        lr: of a tuned AdamW for this model.
        weight_decay: of the same AdamW.
        also_cap: what else is the cap's, such as further heads.
        overrides: as STAC takes them; they win over the recipe's.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import STAC, recipes
        >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16)
        >>> model = nn.Sequential(nn.Embedding(9, 8), layer, nn.Linear(8, 9))
        >>> optimizer = STAC(model, **recipes.transformer(lr=3e-4))
        >>> optimizer.partition.trunk_layer_names
        ('1.self_attn', '1.self_attn.out_proj', '1.linear1', '1.linear2')
    """
    return _of_matrices(lr, weight_decay, BETAS_OF_TEXT, also_cap, overrides)


def finetuning(
    lr: float | Tensor, *, weight_decay: float = 0.0, also_cap: Selector | None = None, overrides: Overrides = ()
) -> dict[str, Any]:
    """Any model that AdamW has trained already, whole or by adapters: a trunk of elements.

    Its steps are the likest to those that made the weights. Beside it: gradients clipped to a norm of 1, a short
    warm-up, then a line to 0. ``overrides=layerwise_lr_decay(model, 0.75)`` gives the earlier layers less.

    Args:
        lr: of a tuned AdamW for this task.
        weight_decay: of the same AdamW.
        also_cap: what else is the cap's, such as further heads.
        overrides: as STAC takes them; they win over the recipe's.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import STAC, layerwise_lr_decay, recipes
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = STAC(model, **recipes.finetuning(lr=4e-5, overrides=layerwise_lr_decay(model, 0.5)))
        >>> sorted(group["lr"] for group in optimizer.param_groups)
        [5e-06, 1e-05, 2e-05, 4e-05]

    References:
        Can Muon Fine-tune Adam-Pretrained Models? (https://arxiv.org/abs/2605.10468): it does so worse than Adam, the
        more so the more the weights move.
    """
    return _of_elements(lr, weight_decay, BETAS, also_cap, overrides)


def vision(
    lr: float | Tensor, *, weight_decay: float = 0.05, also_cap: Selector | None = None, overrides: Overrides = ()
) -> dict[str, Any]:
    """A vision transformer or a convolutional network from scratch: a trunk of matrices.

    The first convolution, which is the patch embedding of a vision transformer, tokens, positions, and grouped and
    depthwise convolutions are in the cap. Beside it: a warm-up, a cosine to about 0; for transformers gradients clipped
    to a norm of 1.

    Args:
        lr: of a tuned AdamW for this model.
        weight_decay: of the same AdamW.
        also_cap: what else is the cap's, such as further heads.
        overrides: as STAC takes them; they win over the recipe's.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import STAC, recipes
        >>> features = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)
        >>> model = nn.Sequential(*features, nn.Flatten(), nn.Linear(8, 9))
        >>> STAC(model, **recipes.vision(lr=1e-3)).partition.trunk_layer_names
        ('3',)
    """
    return _of_matrices(lr, weight_decay, BETAS, also_cap, overrides)


def mlp(
    lr: float | Tensor, *, weight_decay: float = 0.01, also_cap: Selector | None = None, overrides: Overrides = ()
) -> dict[str, Any]:
    """A multilayer perceptron on data, as for classification or regression: a trunk of matrices.

    Beside it: a cosine or a line to about 0.

    Args:
        lr: of a tuned AdamW for this model.
        weight_decay: of the same AdamW.
        also_cap: what else is the cap's, such as further heads.
        overrides: as STAC takes them; they win over the recipe's.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import STAC, recipes
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> [(group["stac_role"], group["rule"]) for group in STAC(model, **recipes.mlp(lr=4e-3)).param_groups]
        [('trunk', 'muon'), ('cap', 'adamw')]
    """
    return _of_matrices(lr, weight_decay, BETAS, also_cap, overrides)


def pinn(
    lr: float | Tensor, *, weight_decay: float = 0.0, also_cap: Selector | None = None, overrides: Overrides = ()
) -> dict[str, Any]:
    """A physics-informed network, or another that fits a smooth function without noise: a trunk of matrices.

    Beside it: a cosine to about 0, no clipping.

    Args:
        lr: of a tuned AdamW for this model.
        weight_decay: of the same AdamW.
        also_cap: what else is the cap's, such as further heads.
        overrides: as STAC takes them; they win over the recipe's.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import STAC, recipes
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> STAC(model, **recipes.pinn(lr=1e-3)).partition.trunk_layer_names
        ('0', '2')
    """
    return _of_matrices(lr, weight_decay, BETAS, also_cap, overrides)


def rnn(
    lr: float | Tensor, *, weight_decay: float = 0.01, also_cap: Selector | None = None, overrides: Overrides = ()
) -> dict[str, Any]:
    """A recurrent network: a trunk of matrices, each gate of an LSTM or a GRU one.

    Beside it: gradients clipped to a norm of 1, a short warm-up, a cosine or a line to about 0.

    Args:
        lr: of a tuned AdamW for this model.
        weight_decay: of the same AdamW.
        also_cap: what else is the cap's, such as further heads.
        overrides: as STAC takes them; they win over the recipe's.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import STAC, recipes
        >>> model = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "cell": nn.GRU(4, 8), "head": nn.Linear(8, 9)})
        >>> [group["row_blocks"] for group in STAC(model, **recipes.rnn(lr=1e-3)).param_groups if "row_blocks" in group]
        [3]
    """
    return _of_matrices(lr, weight_decay, BETAS, also_cap, overrides)
