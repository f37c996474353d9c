"""Mechanic: finds the scale of a base optimizer's learning rate while it trains.

Reference: Mechanic: A Learning Rate Tuner (Cutkosky, Defazio, Mehta), https://arxiv.org/abs/2306.00144.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from stac_optimizer.model.names import name_of
from stac_optimizer.rule import Group
from stac_optimizer.validation import Checker, boolean, mapping, non_negative, real, unit_fraction
from stac_optimizer.wrappers import tuner
from stac_optimizer.wrappers.base.loading import Own
from stac_optimizer.wrappers.base.parts import by_kind
from stac_optimizer.wrappers.base.refusals import refuse_own_operations, votes
from stac_optimizer.wrappers.base.wrapper import Wrapper

__all__ = ["Mechanic", "mechanize"]

DELTA, REFERENCE, NUMBERS = "mechanic_delta", "mechanic_reference", "mechanic_numbers"


def check_betas(name: str, value: Any) -> tuple[float, ...]:
    """A tuple of fractions, one at least."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of numbers in [0, 1), got {value!r} of type {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must hold at least one number in [0, 1), got {value!r}")
    return tuple(unit_fraction(f"{name}[{index}]", each) for index, each in enumerate(value))


def check_positive(name: str, value: Any) -> float:
    """A finite float above 0."""
    number = real(name, value, "a finite number in (0, inf)")
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number in (0, inf), got {value!r}")
    return number


class Noted(NamedTuple):
    """What is noted before the base's step.

    Args:
        weights: by parameter with a gradient a copy.
        numbers: the tuner's, of before the step and of after it; None where the step is for the state alone.
    """

    weights: dict[Tensor, Tensor]
    numbers: tuple[Tensor, Tensor] | None


class Mechanic(Wrapper):
    """What the classes that :func:`mechanize` makes have in common; see there."""

    base_class: ClassVar[type[Optimizer]]
    arguments: ClassVar[Mapping[str, Any]]
    hyperparameters: ClassVar[Mapping[str, Checker]] = {
        "s_decay": non_negative,
        "s_betas": check_betas,
        "s_init": check_positive,
        "store_delta": boolean,
    }
    own: ClassVar[Own] = Own(weights=(DELTA, REFERENCE), shared=(NUMBERS,), wide=(DELTA,))
    hands_closure_on: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._betas: tuple[Any, Tensor] | None = None
        super().__init__(self.base_class(*args, **kwargs), self.arguments)

    def _refuse(self, base: Optimizer) -> None:
        super()._refuse(base)
        if votes(base):
            raise ValueError(
                f"vote lets each rank have gradients of its own, and {type(self).__name__} one scale for all ranks by "
                "the gradients; build it without vote, so that ranks average gradients"
            )

    @property
    def scale(self) -> Tensor:
        """The present scale, by which the base's updates are multiplied; a tensor, on the device of the weights."""
        numbers = self._shared(NUMBERS)
        if numbers is None:
            betas, s_init = self._settings()
            numbers = tuner.first_numbers(len(betas), s_init, self._params()[0])
        return numbers[tuner.SCALE].sum()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every wrapper; ``s_betas`` and ``s_init`` must be those of the other groups."""
        group = mapping("param_group", param_group)
        for key in ("s_betas", "s_init"):
            known = self.param_groups[0][key]
            if key in group and self.hyperparameters[key](key, group[key]) != known:
                raise ValueError(
                    f"{key} must be {known!r}, as in the other groups, which have one scale, or be left out; got "
                    f"{group[key]!r}"
                )
        super().add_param_group(param_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_anew, (self.base_class, tuple(self.arguments.items())), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_betas": None}

    def _kept(self, group: Group) -> Sequence[str]:
        return (DELTA, REFERENCE) if group["store_delta"] else (DELTA,)

    def _before(self, *, may_get_gradients: bool, makes_state: bool) -> Noted:
        stepped = {param: group for param, group in self._groups().items() if param.grad is not None}
        held = self._held(DELTA)
        refuse_own_operations([p for p in stepped if p not in held], self.param_groups, type(self).__name__)
        for param in stepped:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{name_of(self.param_groups, param)!r} has a gradient of layout {param.grad.layout}, and "
                    f"{type(self).__name__} takes no sparse gradients; make it dense, for embeddings with "
                    "sparse=False. Nothing was changed"
                )
        numbers = None if makes_state else self._next_numbers(stepped, held)
        return Noted({param: param.detach().clone() for param in stepped}, numbers)

    def _groups(self) -> dict[Tensor, Group]:
        return {param: group for group in self.param_groups for param in group["params"]}

    def _settings(self) -> tuple[tuple[float, ...], float]:
        """What all groups must have alike."""
        settings = [(tuple(group["s_betas"]), group["s_init"]) for group in self.param_groups]
        if any(each != settings[0] for each in settings):
            raise ValueError(
                f"all groups have one scale, and must have the same s_betas and s_init, got {settings}. Nothing was "
                "changed"
            )
        return settings[0]

    def _next_numbers(
        self, stepped: Mapping[Tensor, Group], deltas: Mapping[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        betas, s_init = self._settings()
        everything = self._params()
        if not everything:  # libraries that deal parameters out over ranks may leave one none
            return None
        numbers = self._shared(NUMBERS)
        if numbers is None:
            numbers = tuner.first_numbers(len(betas), s_init, everything[0])
        key = (betas, numbers.dtype, numbers.device)
        if self._betas is None or self._betas[0] != key:  # to make them anew would wait for the device
            self._betas = key, torch.tensor(betas, dtype=numbers.dtype, device=numbers.device)
        inner = tuner.inner_product(stepped, deltas, everything, numbers)
        return numbers, tuner.next_numbers(numbers, inner, self._betas[1], s_init)

    def _after(self, noted: Noted, *, makes_state: bool) -> None:
        before = noted.weights
        deltas = self._held(DELTA, list(before))
        self._begin([param for param in before if param not in deltas], noted)
        if noted.numbers is None or not before:
            return
        numbers, next_numbers = noted.numbers
        scale, next_scale = (each[tuner.SCALE].sum() for each in (numbers, next_numbers))
        with_reference = self._held(REFERENCE, list(before))
        for keys in ((DELTA,), (DELTA, REFERENCE)):
            params = [param for param in before if (param in with_reference) == (REFERENCE in keys)]
            kept = [[self.state[param][key] for param in params] for key in keys]
            for now, then, *states in by_kind(params, [before[param] for param in params], *kept):
                tuner.move_(now, then, states, scale, next_scale)
        numbers.copy_(next_numbers)
        torch.autograd.graph.increment_version(list(before))  # see Note [Unseen writes] in optimizer.py

    def _begin(self, params: Sequence[Tensor], noted: Noted | None = None) -> None:
        groups, before = self._groups(), {} if noted is None else noted.weights
        numbers = self._shared(NUMBERS)
        if numbers is None and noted is not None and noted.numbers is not None:
            numbers = noted.numbers[0]
        for param in params:
            if numbers is None:
                betas, s_init = self._settings()
                numbers = tuner.first_numbers(len(betas), s_init, param)
            state, weights = self.state[param], before.get(param, param.detach())
            dtype = self.own.dtype_of(DELTA, param)
            state[DELTA] = torch.zeros_like(weights, dtype=dtype, memory_format=torch.preserve_format)
            state[NUMBERS] = numbers
            if groups[param]["store_delta"]:
                state[REFERENCE] = weights.clone()

    def _check_loaded(self, groups: Sequence[Group], shared: Mapping[str, Tensor]) -> None:
        settings = [(group.get("s_betas"), group.get("s_init")) for group in groups]
        if any(each != settings[0] for each in settings):
            raise ValueError(f"the checkpoint's groups must have the same s_betas and s_init, got {settings}")
        numbers = shared.get(NUMBERS)
        if numbers is None:
            return
        betas = groups[0].get("s_betas", self._values["s_betas"])
        if numbers.shape != (4, len(betas)):
            raise ValueError(
                f"the checkpoint's {NUMBERS!r} has shape {tuple(numbers.shape)}, and its s_betas {betas} want "
                f"{(4, len(betas))}"
            )


def mechanize(
    Base: type[Optimizer],  # noqa: N803 - as users of mechanic-pytorch write it
    s_decay: float = 0.01,
    betas: Sequence[float] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
    s_init: float = 1e-8,
    store_delta: bool = False,
) -> type[Mechanic]:
    r"""Make a class of optimizers that find the scale of their learning rate.

    The class is called as ``Base`` is. Its optimizers let one of ``Base`` step, and move the weights by a multiple of
    its updates. Algorithm 1 of the paper, with two refinements of the authors' code (``optax.contrib.mechanize``): the
    clipping of :math:`h`, and :math:`\epsilon` in :math:`m`. From :math:`\Delta = v = r = m = 0` and
    :math:`s = s_\text{init}`, each step, with the vectors over the :math:`n` betas:

    .. math::
        h &\leftarrow -\Big\langle \Delta,\ g + \lambda \, \Sigma s \, \frac{\|g\|}{\|x\| + \epsilon} \, x
             \Big\rangle \\
        \hat h &\leftarrow \min(\max(h, -m), m), \quad m \leftarrow \max(\beta m, |h| + \epsilon), \quad
            v \leftarrow \beta^2 v + h^2, \quad r \leftarrow \beta r + \hat h s \\
        s' &\leftarrow \Big(\frac{s_\text{init}}{n} m + \max(0, r)\Big) / (\sqrt v + \epsilon) \\
        \Delta' &\leftarrow \Delta + u, \quad x' \leftarrow x_\text{ref} + \Sigma s' \, \Delta'

    where :math:`u` is what the base's step has added to the weights, and :math:`\epsilon` is 1e-8.

    ==================================== ================================================================
    paper                                here
    ==================================== ================================================================
    :math:`\lambda, s_\text{init}`       group keys ``s_decay``, ``s_init``
    :math:`\beta_1, \dots, \beta_n`      argument ``betas``, group key ``s_betas``
    :math:`s, r, m, v`                   state ``mechanic_numbers``, of all parameters together
    :math:`\Delta`                       state ``mechanic_delta``, in float32 at least
    :math:`x_\text{ref}`                 state ``mechanic_reference``, with ``store_delta``
    ==================================== ================================================================

    **Learning rates.** ``lr`` is a shape and no size: give 1.0, and let a scheduler multiply it, for warm-up and decay.
    ``optimizer.scale`` is what it is multiplied by. The base's decay stays what it is beside its learning rate: of
    AdamW, a weight shrinks by ``scale * lr * weight_decay``. Ratios of learning rates between groups stay too. Bases
    that norm their gradients as a whole (LARS, LAMB) give Mechanic little to find, say its authors.

    **Weights that others write** between steps, as by clipping or by averaging, go on from where they are; the
    reference moves with them. So do those without a gradient, which a step leaves alone.

    The paper's experiments ran with the authors' code in JAX, and so r is held as there. What differs from their
    package mechanic-pytorch: its s begins at 0 and its m at 1e-6, it does not clip h, has no epsilon in m, cuts r off
    at 0, takes the weights of after the base's step for the decay, and an ascent (``maximize``) for a descent; it
    cannot resume, nor add groups.

    A step costs a copy of the weights for its time. The numbers stay on the device, so that no step waits for it. A
    gradient with NaN makes all weights NaN: bases of this package can refuse it by ``error_if_nonfinite``. All ranks
    find the same scale where gradients are averaged, and under FSDP2 by one collective more for each device mesh.
    ``torch.compile`` of a step is not supported; compile the model.

    Args:
        Base: a class of optimizers that step without closures: of torch, of :mod:`stac_optimizer.optim`, STAC, others.
        s_decay: how strongly the scale is held back, 0 or more.
        betas: how long the tuner remembers, one number in [0, 1) for each of its parts.
        s_init: where the scale begins, above 0.
        store_delta: keep a second tensor for each weight, the reference. Then what the scale makes small beside a
            weight is never lost to rounding, which matters for weights in bfloat16 and float16.

    Returns:
        A class; the same one for the same arguments. ``isinstance`` of its optimizers knows :class:`Mechanic`.

    Raises:
        TypeError: ``Base`` is no such class, or an argument of the wrong type.
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stac_optimizer import STAC
        >>> from stac_optimizer.wrappers import mechanize
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = mechanize(STAC)(model, lr=1.0)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> float(optimizer.scale) > 0
        True
    """
    if not (isinstance(Base, type) and issubclass(Base, Optimizer)):
        raise TypeError(
            f"Base must be a class of optimizers, got {Base!r}; its arguments go to what mechanize returns: "
            "mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)"
        )
    if issubclass(Base, Wrapper):
        raise TypeError(
            f"Base is the wrapper {Base.__name__}, and mechanize must see the updates of a plain optimizer; wrap what "
            "it makes instead: Lookahead(mechanize(torch.optim.SGD)(model.parameters(), lr=1.0))"
        )
    closure = inspect.signature(Base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"Base {Base.__name__} needs a closure in every step, by which it scales its steps itself; use it as it is"
        )
    given = {"s_decay": s_decay, "s_betas": betas, "s_init": s_init, "store_delta": store_delta}
    names = {"s_betas": "betas"}
    values = {key: Mechanic.hyperparameters[key](names.get(key, key), value) for key, value in given.items()}
    return _mechanized(cast(Any, Base), tuple(values.items()))


@functools.cache
def _mechanized(base_class: type[Optimizer], arguments: tuple[tuple[str, Any], ...]) -> type[Mechanic]:
    """One class for each base and arguments, so that copies of an optimizer have its class."""
    body = {
        "__doc__": f"{base_class.__name__} whose learning rate Mechanic scales; see :func:`mechanize`.",
        "__module__": __name__,
        "base_class": base_class,
        "arguments": dict(arguments),
    }
    return type(f"Mechanized{base_class.__name__}", (Mechanic,), body)


def _made_anew(base_class: type[Optimizer], arguments: tuple[tuple[str, Any], ...]) -> Mechanic:
    """An optimizer that has nothing yet, to be filled by its ``__setstate__``."""
    kind = _mechanized(cast(Any, base_class), arguments)
    return kind.__new__(kind)
