"""How much of a Laplacian the package ladam advises: for a kind of model, and for the layers of one."""

from __future__ import annotations

from collections.abc import Mapping

from stac_optimizer.model.layers import Layers
from stac_optimizer.model.selection import Selector
from stac_optimizer.model.selectors import embeddings, last_layers, norms
from stac_optimizer.validation import non_negative, one_of

__all__ = ["laplacian_overrides", "suggest_c2"]

ADVICE: Mapping[str, float] = {
    "auto": 1e-4,
    "cnn": 0.0,
    "cnn_denoise": 1e-3,
    "mlp": 1e-5,
    "pinn": 1e-5,
    "transformer": 1e-4,
}
# Parts of the names of parameters of attention, whose neighbours have nothing in common.
OF_ATTENTION = frozenset(
    {
        "attention",
        "attn",
        "k_proj",
        "key",
        "multihead_attn",
        "out_proj",
        "q_proj",
        "query",
        "self_attn",
        "v_proj",
        "value",
    }
)
LAST_LAYER = last_layers(1)


def suggest_c2(architecture: str = "auto") -> float:
    """The ``c2`` that the package ladam advises for a kind of model.

    Args:
        architecture: ``"pinn"``, ``"mlp"``, ``"transformer"``, ``"cnn"``, ``"cnn_denoise"`` (convolutions that restore
            images; of 0.4) or ``"auto"``, in any case of letters.

    Raises:
        TypeError: ``architecture`` is no string.
        ValueError: it is none of these.

    Example:
        >>> from stac_optimizer.optim.laplacian import suggest_c2
        >>> suggest_c2("pinn")
        1e-05

    References:
        ladam 0.2.0, https://github.com/gpartin/ladam. Its version 0.4 says 5e-4 for ``"mlp"``, and that large
        transformers are trained worse.
    """
    if not isinstance(architecture, str):
        raise TypeError(
            f"architecture must be a string, got {architecture!r} of type {type(architecture).__name__}; it is one of "
            f"{', '.join(map(repr, ADVICE))}"
        )
    chosen: str = one_of("architecture", architecture.lower(), tuple(ADVICE))
    return ADVICE[chosen]


def laplacian_overrides(
    cap: Selector | None = LAST_LAYER, *, c2: float = 1e-5
) -> list[tuple[Selector, dict[str, float]]]:
    """Overrides for STAC that give a Laplacian to the weights of linear layers alone, as ``auto_configure`` of ladam.

    Linear are matrices of two dimensions; none of embeddings, norms, and of attention, which is told by names. Beside
    it all others are to have none: ``trunk_optimizer=partial(LAdam, c2=0.0)``.

    Args:
        cap: the selector that STAC gets as ``cap``, whose optimizer knows no ``c2``: without one the last layer. None:
            there is no cap, or it has an optimizer of this kind too.
        c2: for those weights, in [0, inf).

    Returns:
        One (selector, ``{"c2": c2}``) pair, to stand beside others in STAC's ``overrides``. STAC raises ValueError
        where it matches nothing.

    Raises:
        TypeError: ``cap`` is no selector, or ``c2`` no number.
        ValueError: ``c2`` is out of range.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from stac_optimizer import STAC
        >>> from stac_optimizer.optim import LAdam
        >>> from stac_optimizer.optim.laplacian import laplacian_overrides
        >>> model = nn.Sequential(nn.Conv1d(1, 8, 3), nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, 2))
        >>> optimizer = STAC(model, trunk_optimizer=partial(LAdam, c2=0.0), overrides=laplacian_overrides())
        >>> [(group["c2"], group["param_names"]) for group in optimizer.param_groups if group["stac_role"] == "trunk"]
        [(0.0, ['0.weight', '0.bias', '2.bias']), (1e-05, ['2.weight'])]

    References:
        ladam 0.4.1, https://github.com/gpartin/ladam, whose function gives 1e-5 to linear layers, 0 to all else.
    """
    if cap is not None and not isinstance(cap, Selector):
        raise TypeError(f"cap must be a selector or None, got {cap!r} of type {type(cap).__name__}")
    linear = Selector(
        description="linear weights",
        pick=lambda layers, _: _linear_weights(layers),
        unit="parameter",
        by_type=True,
        hint="The model has none outside attention: leave the overrides out. ",
    )
    return [(linear if cap is None else linear - cap, {"c2": non_negative("c2", c2)})]


def _linear_weights(layers: Layers) -> frozenset[str]:
    matrices = frozenset(
        name
        for name, param in layers.named_parameters
        if param.ndim == 2 and OF_ATTENTION.isdisjoint(name.lower().split("."))
    )
    return matrices - (embeddings() | norms()).select(layers, allow_empty=True)
