"""What a key or an argument that nobody knows was meant to be, and what is said of it."""

from __future__ import annotations

import difflib
from collections.abc import Collection

__all__ = ["few", "meant"]

# How alike a key must be to a known one to be taken for a misspelling of it.
NEAR = 0.8
# What others call it, and what it may be here; the first that is known counts.
ALIASES: dict[str, tuple[str, ...]] = {
    "wd": ("weight_decay",),
    "decay": ("weight_decay",),
    "l2": ("weight_decay",),
    "learning_rate": ("lr",),
    "mu": ("momentum", "betas"),
    "beta": ("momentum", "betas"),
    "beta1": ("betas", "momentum"),
    "beta2": ("betas",),
    "betas": ("momentum",),
    "trunk_betas": ("trunk_momentum",),
    "momentum": ("betas",),
    "epsilon": ("eps",),
    "seed": ("rounding_seed",),
    "params": ("model",),
    "parameters": ("model",),
    "named_parameters": ("model",),
    "module": ("model",),
    "head_lr": ("cap_lr",),
    "body_lr": ("trunk_lr",),
    "backbone_lr": ("trunk_lr",),
    "n_layers": ("last_n_layers",),
    "last_n": ("last_n_layers",),
    "last_n_modules": ("last_n_layers",),
    "last_layers": ("last_n_layers",),
    "optimizer": ("trunk_optimizer",),
    "param_groups": ("overrides",),
    "lr_ratio": ("overrides",),
    "no_decay": ("overrides",),
    "cap_layers": ("cap",),
    "selector": ("cap",),
}
ROLES = ("trunk", "cap")
# Known keys of groups that are set in another way.
NOT_TO_SET = frozenset({"params", "vote"})


def meant(key: str, known: Collection[str]) -> str | None:
    """The known name that was meant; None where nothing is like it.

    Args:
        key: that nobody knows. A role may stand before or behind it, as in ``trunk_wd`` and ``lr_trunk``.
        known: the names of hyper-parameters, or of STAC's arguments, some of which begin with a role.
    """
    role = next((role for role in ROLES if key.startswith(f"{role}_") or key.endswith(f"_{role}")), None)
    bare = key if role is None else key.removeprefix(f"{role}_").removesuffix(f"_{role}")
    # Of no role by its name, a hyper-parameter may be one that STAC takes for the trunk alone.
    names = [*ALIASES.get(key, ()), bare, *ALIASES.get(bare, ())] if role else [bare, *ALIASES.get(bare, ())]
    candidates = [name for each in names for name in ((f"{role}_{each}", each) if role else (each, f"trunk_{each}"))]
    found = next((name for name in candidates if name in known and name != key), None)
    near = difflib.get_close_matches(key, known, n=1, cutoff=NEAR) or difflib.get_close_matches(
        bare, known, n=1, cutoff=NEAR
    )
    return found or (near[0] if near else None)


def few(known: Collection[str], flags: Collection[str]) -> str:
    """The known names for a message, without the flags that every optimizer has."""
    return f"{', '.join(sorted(set(known) - set(flags) - NOT_TO_SET))}, and flags such as fused"
