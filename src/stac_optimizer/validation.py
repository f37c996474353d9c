"""One checker per kind of value, and the warning that points at the caller. Knows no optimizer.

Each checker returns the value as plain Python (a NumPy float would keep a checkpoint from loading with
``weights_only=True``) or raises: ``TypeError`` for a wrong type, ``ValueError`` for a value out of range. Every
message holds the argument's name, the value and what is allowed.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Checker",
    "boolean",
    "clipping_range",
    "count",
    "finite",
    "learning_rate",
    "mapping",
    "named_dtype",
    "non_negative",
    "one_of",
    "optional_boolean",
    "pair_of_fractions",
    "real",
    "triple_of_fractions",
    "unit_fraction",
    "warn",
]

# Modules whose lines a warning does not point at: this package's, and those of torch that wrap or call a step.
INTERNAL = (f"{__package__}.", "torch.optim.", "torch.utils._contextlib.", "torch.autograd.")

Checker = Callable[[str, Any], Any]
"""Takes an argument's name and value, returns the value as plain Python or raises."""


def real(name: str, value: Any, allowed: str) -> float:
    """A float, infinite where it is beyond the range of one, whatever the range allowed."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # beyond the range of a float, so beyond every range that a caller allows


def non_negative(name: str, value: Any) -> float:
    """A finite float, 0 or more."""
    allowed = "a finite number in [0, inf)"
    number = real(name, value, allowed)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def finite(name: str, value: Any) -> float:
    """A finite float."""
    allowed = "a finite number"
    number = real(name, value, allowed)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def unit_fraction(name: str, value: Any) -> float:
    """A float from 0 up to, not including, 1."""
    allowed = "a number in [0, 1)"
    number = real(name, value, allowed)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def pair_of_fractions(name: str, value: Any) -> tuple[float, float]:
    """Two floats, each from 0 up to, not including, 1. A list becomes a tuple."""
    first, second = _tuple_of(name, value, 2, "two numbers in [0, 1)")
    return unit_fraction(f"{name}[0]", first), unit_fraction(f"{name}[1]", second)


def triple_of_fractions(name: str, value: Any) -> tuple[float, float, float]:
    """Three floats, each from 0 up to, not including, 1. A list becomes a tuple."""
    first, second, third = _tuple_of(name, value, 3, "three numbers in [0, 1)")
    return unit_fraction(f"{name}[0]", first), unit_fraction(f"{name}[1]", second), unit_fraction(f"{name}[2]", third)


def clipping_range(name: str, value: Any) -> tuple[float, float] | None:
    """Two floats, the second at least the first, which is 0 or more; or None. The second may be infinite."""
    if value is None:
        return None
    first, second = _tuple_of(name, value, 2, "a least and a most number, 0 <= least <= most, or None")
    least, most = non_negative(f"{name}[0]", first), real(f"{name}[1]", second, "a number")
    if not least <= most:
        raise ValueError(f"{name} must be a tuple of a least and a most number, 0 <= least <= most, got {value!r}")
    return least, most


def _tuple_of(name: str, value: Any, length: int, what: str) -> Sequence[Any]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of {what}, got {value!r} of type {type(value).__name__}")
    if len(value) != length:
        raise ValueError(f"{name} must be a tuple of {what}, got {value!r}")
    return value


def learning_rate(name: str, value: Any) -> float | Tensor:
    """A finite number, 0 or more: a float, or a floating-point tensor of one element, returned as it is."""
    if not isinstance(value, Tensor):
        return non_negative(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name} as a tensor must have one element, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} as a tensor must be of a floating-point dtype, got {value.dtype}")
    non_negative(name, value.detach().item())
    return value


def boolean(name: str, value: Any) -> bool:
    """True or False, nothing that merely behaves like it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return value


def optional_boolean(name: str, value: Any) -> bool | None:
    """True, False, or None for "choose for me"."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, got {value!r} of type {type(value).__name__}")
    return value


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """One of these values."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def named_dtype(name: str, value: Any, allowed: Mapping[str, torch.dtype]) -> str | None:
    """The name of one of these dtypes, given as such or by name, or None.

    A name, for full state dicts of torch.distributed hold plain Python values alone.
    """
    if value is not None and not isinstance(value, torch.dtype | str):
        raise TypeError(f"{name} must be None or a torch.dtype, got {value!r} of type {type(value).__name__}")
    known: dict[Any, str] = {dtype: dtype_name for dtype_name, dtype in allowed.items()}
    chosen: str | None = one_of(name, known.get(value, value), (None, *allowed))
    return chosen


def mapping(name: str, value: Any) -> Mapping[Any, Any]:
    """A dict."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, got {type(value).__name__}")
    return value


def count(name: str, value: Any, *, least: int = 0) -> int:
    """An integer, ``least`` or more."""
    allowed = f"an integer in [{least}, inf)"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return int(value)


def warn(message: str) -> None:
    """Warn as of the line that called into this package, torch's wrappers around ``step`` not counted."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(INTERNAL):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
