"""Which parameters are matrices of hidden layers, and which of those hold several matrices in one.

A trunk that takes the sign of a whole matrix wants weights that map one hidden vector to another. Everything else that
a model has is small, and AdamW's: tables of which a batch touches few rows, tokens, scales, what meets the data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from stac_optimizer.model.layers import Layers
from stac_optimizer.model.names import layer_of, tensor_name
from stac_optimizer.model.selection import Selector
from stac_optimizer.model.selectors import biases, embeddings, norms, vectors

__all__ = ["all_but_hidden_matrices", "gates", "hidden_matrices", "queries_keys_values", "stacked_experts"]

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Modules that hold a matrix themselves call it so: weight, in_proj_weight, weight_hh_l0; gate_up_proj, w1 of experts;
# lora_A. Tokens, positions, bias tables and states go by other names: cls_token, pos_embed, latents, A_log.
MATRIX_NAME = re.compile(r"weight|(proj|projection|kernel)$|^lora_|^w\d?$")
FUSED_NAME = re.compile(r"qkv|query_key_value|c_attn|in_proj_weight", re.IGNORECASE)

# A recurrent layer's parameters, of which weight_hr projects and has no gates.
GATED_NAME = re.compile(r"^weight_[ih]h")


def _selector(description: str, names: Callable[[Layers], frozenset[str]]) -> Selector:
    return Selector(description=description, pick=lambda layers, _: names(layers), unit="parameter", by_type=True)


def hidden_matrices() -> Selector:
    """Weight matrices, convolutions' included, of all but embeddings, norms and the first convolution.

    A parameter is one by what its own module calls it (``weight``, ``..._proj``, ``w1``), so that class tokens,
    positions, bias tables and states of a module are none, whatever their shape. None either are a single row or column
    and the filters of a grouped convolution, which mix few channels or none. Needs the model, not names alone.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import partition_trainable_layers
        >>> from stac_optimizer.model.hidden import hidden_matrices
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        ... )
        >>> [layer.parameter_names for layer in partition_trainable_layers(model, cap=hidden_matrices()).cap_layers]
        [('2.weight',)]
    """
    return _selector("hidden_matrices()", _hidden)


def all_but_hidden_matrices() -> Selector:
    """What :func:`hidden_matrices` leaves out: a cap for a trunk of matrices, beside the last layer.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import last_layers, partition_trainable_layers
        >>> from stac_optimizer.model.hidden import all_but_hidden_matrices
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False))
        >>> cap = last_layers(1) | all_but_hidden_matrices()
        >>> [layer.parameter_names for layer in partition_trainable_layers(model, cap=cap).trunk_layers]
        [('1.weight',)]
    """
    return _selector("all_but_hidden_matrices()", lambda layers: frozenset(_names(layers)) - _hidden(layers))


def stacked_experts() -> Selector:
    """Hidden matrices that a module holds as a stack of three dimensions, one matrix for each expert."""
    return _hidden_where(
        "stacked_experts()",
        lambda _, param, module: param.ndim == 3 and not isinstance(module, (*CONVOLUTIONS, nn.Bilinear)),
    )


def queries_keys_values() -> Selector:
    """Hidden matrices that are query, key and value one upon the other, in three equal blocks of rows."""
    return _hidden_where(
        "queries_keys_values()",
        lambda name, param, _: param.ndim == 2 and param.shape[0] == 3 * param.shape[1] and _is_fused(name),
    )


def gates(count: int) -> Selector:
    """Hidden matrices of recurrent layers that are so many gates one upon the other: 4 of an LSTM, 3 of a GRU."""
    kinds = {4: (nn.LSTM, nn.LSTMCell), 3: (nn.GRU, nn.GRUCell)}[count]
    return _hidden_where(
        f"gates({count})",
        lambda name, _, module: isinstance(module, kinds) and GATED_NAME.search(tensor_name(name)) is not None,
    )


def _is_fused(name: str) -> bool:
    own = (tensor_name(name), layer_of(name).rpartition(".")[2])
    return any(FUSED_NAME.search(part) for part in own)


def _each(layers: Layers) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
    """Every parameter with its name and the module that holds it."""
    for layer, module in zip(layers.layers, layers.modules, strict=True):
        for name, param in zip(layer.parameter_names, layer.parameters, strict=True):
            yield name, param, module


def _names(layers: Layers) -> Iterator[str]:
    return (name for name, _ in layers.named_parameters)


def _hidden(layers: Layers) -> frozenset[str]:
    apart = (embeddings() | norms() | vectors() | biases()).select(layers, allow_empty=True)
    first = next((module for module in layers.modules if isinstance(module, CONVOLUTIONS)), None)
    return frozenset(
        name
        for name, param, module in _each(layers)
        if name not in apart
        and MATRIX_NAME.search(tensor_name(name))
        and _is_matrix(param)
        and _is_hidden(module, first)
    )


def _is_matrix(param: Tensor) -> bool:
    """Whether both sides have more than one element."""
    return param.shape[0] > 1 and param.numel() > param.shape[0]


def _is_hidden(module: nn.Module | None, first_convolution: nn.Module | None) -> bool:
    if isinstance(module, CONVOLUTIONS):
        return module is not first_convolution and module.groups == 1
    return not any("Embed" in base.__name__ for base in type(module).__mro__)


def _hidden_where(description: str, is_chosen: Callable[[str, Tensor, nn.Module | None], bool]) -> Selector:
    def names(layers: Layers) -> frozenset[str]:
        hidden = _hidden(layers)
        return frozenset(
            name for name, param, module in _each(layers) if name in hidden and is_chosen(name, param, module)
        )

    return _selector(description, names)
