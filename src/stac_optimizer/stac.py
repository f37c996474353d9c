"""STAC: arguments to partition to groups, and the step: check, gather, dispatch. No arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stac_optimizer import checkpoint
from stac_optimizer._agreement import check_agreement, scopes_of
from stac_optimizer._gradients import check_capture, check_scaler, check_step
from stac_optimizer._group_building import build_groups
from stac_optimizer._groups import check_fitness, check_vote, checked, named_parameters, partition_of
from stac_optimizer._release import GradientRelease
from stac_optimizer._validation import mapping, warn
from stac_optimizer.partition import STACPartition
from stac_optimizer.rules import RULES, Group, StepInputs, hyperparameters
from stac_optimizer.selectors import Selector
from stac_optimizer.vote import MajorityVote, Voters

__all__ = ["STAC"]

# An optimizer whose parameters never had a gradient raises at this step.
IDLE_STEPS = 3


class STAC(Optimizer):
    r"""Sign trunk, AdamW cap: one optimizer for a whole model.

    The last layers (the *cap*) get AdamW or AMSGrad, to the bit as ``torch.optim.AdamW``; all earlier layers (the
    *trunk*) get the sign of a gradient average, which needs one state tensor instead of two.

    Trunk, for gradient :math:`g` (negated under ``maximize``) and momentum :math:`\mu`, in this order:

    .. math::
        p &\leftarrow p \cdot (1 - \text{lr} \cdot \text{weight\_decay}) \\
        m &\leftarrow m + (1 - \mu)(g - m), \quad m_0 = 0 \\
        p &\leftarrow p - \text{lr} \cdot \operatorname{sign}(m)

    One step moves a trunk weight by exactly lr, and a cap weight by about lr. bfloat16 and float16 trunk weights are
    computed in float32 and rounded once; the sign is that of m before it is rounded to be stored.

    Args:
        params: what to optimize, one of

            - a module;
            - (name, parameter) pairs as ``model.named_parameters()`` gives, split exactly as the module would be;
            - group dicts, each with ``params`` (parameters, or pairs), an explicit ``stac_role`` of ``"trunk"`` or
              ``"cap"``, and any hyper-parameters of its own (``lr``, ``weight_decay``, ``trunk_momentum``, ...).
        lr: shared base learning rate in [0, inf); float or one-element tensor. Groups do not share a tensor: what is
            written into this one reaches one group alone, so write into ``group["lr"]`` of each.
        last_n_layers: how many final trainable layers form the cap, 0 or more; 0: all trunk; more than there are: all
            cap.
        cap: a selector of the cap's layers, which replaces ``last_n_layers``; see :mod:`stac_optimizer.selectors`.
        trunk_lr: the trunk's learning rate. None: ``0.75 * lr`` when both roles have layers, else ``lr``.
        cap_lr: the cap's learning rate. None: ``lr``.
        trunk_momentum: factor of the gradient average in [0, 1); 0: plain signSGD without trunk state.
        trunk_cautious: move a trunk weight only where sign(m) agrees with the sign of the present gradient, and divide
            the step by the share of such weights in the tensor, floored at 1e-3.
        weight_decay: decoupled weight decay in [0, inf), multiplied by the role's learning rate.
        trunk_weight_decay: the trunk's; None: ``weight_decay``.
        cap_weight_decay: the cap's; None: ``weight_decay``.
        betas: the cap's factors of the averages of gradient and squared gradient, each in [0, 1).
        eps: added to the cap's denominator, in [0, inf).
        amsgrad: whether the cap uses the maximum of the averages of the squared gradient.
        maximize: ascend instead of descend.
        error_if_nonfinite: raise before anything changes when a gradient holds NaN or infinity; it costs one pass over
            the gradients and one synchronization a step. Otherwise the weight becomes NaN, as AdamW's would. Under a
            GradScaler, which skips such steps itself, it has nothing to do.
        foreach: update lists of tensors at once. None: where torch would, that is on CUDA.
        fused: one pass over memory. The cap gets torch's fused kernel; the trunk on the CPU a kernel that torch.compile
            makes at the first step, which takes seconds and a C++ compiler (without one a warning says that the default
            path runs), on CUDA one Triton launch for all its tensors. Excludes ``foreach`` and ``differentiable``. A
            GradScaler hands over its scale instead of unscaling gradients; on CUDA the kernels themselves skip a step
            with an infinite one.
        capturable: keep step counters on the device, so that a CUDA graph can capture the step.
        differentiable: record the step for autograd.
        trunk_state_dtype: what the trunk's averages are held in. None: the weight's dtype; ``torch.bfloat16``;
            ``torch.int8``: codes of 8 bits, spaced by the square root, with a float32 scale for each 128 consecutive
            weights of a row, about 1.03 bytes a weight. Complex weights keep their dtype; under int8 so do float64
            ones, and those with rows shorter than 64 elements, such as biases and norms. Groups hold the dtype's name,
            which may be given too: ``"bfloat16"``, ``"int8"``.
        stochastic_rounding: round bfloat16 weights, and the cap's averages, up or down by chance so that the mean is
            right: a step below half the spacing of values then moves the weight in expectation. All weights of the
            group must be bfloat16. The cap is computed in float32.
        rounding_seed: of that chance, an integer, 0 or more. The same on every rank, or replicas drift apart.
        vote: a :class:`stac_optimizer.MajorityVote`: ranks vote on the trunk's steps instead of averaging its
            gradients. Excludes ``trunk_cautious``, ``capturable`` and ``differentiable``; ``foreach`` and ``fused``
            then say how the cap is updated.

    =========  ==================  =======  ===========  ===========================================
    role       key                 shape    dtype        present
    =========  ==================  =======  ===========  ===========================================
    both       ``step``            ``()``   float32      always; on the CPU unless capturable, fused
    trunk      ``exp_avg``         weight   see above    unless ``trunk_momentum`` is 0
    trunk      ``exp_avg_scale``   rows x   float32      with averages, under ``torch.int8``;
                                   blocks                no blocks where averages keep their dtype
    cap        ``exp_avg``         weight   weight       always
    cap        ``exp_avg_sq``      weight   weight       always
    cap        ``max_exp_avg_sq``  weight   weight       with ``amsgrad``
    =========  ==================  =======  ===========  ===========================================

    A parameter that never had a gradient has ``step`` alone.

    Schedulers move ``lr`` of every group. Those that cycle momentum (OneCycleLR, CyclicLR) move the first of ``betas``,
    which the cap reads; ``trunk_momentum`` stays.

    Raises:
        TypeError: an argument of the wrong type, or parameters without names.
        ValueError: an argument out of range, nothing to train, a selector that matches nothing, a group without role or
            with an unknown key, stochastic rounding of weights that are not bfloat16. On every rank, naming what
            differs: ranks that share a DDP model or DTensors, or vote, and build different optimizers; all of them
            must build.
        RuntimeError: from :meth:`step`, before anything has changed: a sparse gradient, a non-finite one under
            ``error_if_nonfinite``, one that the cap's AdamW cannot apply; the third step of an optimizer none of whose
            parameters ever had a gradient. From :meth:`add_param_group`, always.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stac_optimizer import STAC
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = STAC(model, lr=1e-3, weight_decay=1e-2)
        >>> optimizer.partition.trunk_layer_names, optimizer.partition.cap_layer_names
        (('0',), ('2',))
        >>> loss = model(torch.ones(2, 4)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    References:
        signSGD with Majority Vote, https://arxiv.org/abs/1810.05291; Momentum Ensures Convergence of SIGNSGD under
        Weaker Assumptions (ICML 2023); Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101;
        Cautious Optimizers, https://arxiv.org/abs/2411.16085; 8-bit Optimizers via Block-wise Quantization,
        https://arxiv.org/abs/2110.02861; Revisiting BFloat16 Training, https://arxiv.org/abs/2010.06192.
    """

    _accepts_groups = False
    _release: GradientRelease | None = None
    _voters: Voters | None = None
    _had_gradient = False
    _idle_steps = 0

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]],
        lr: float | Tensor = 1e-3,
        *,
        last_n_layers: int = 1,
        cap: Selector | None = None,
        trunk_lr: float | Tensor | None = None,
        cap_lr: float | Tensor | None = None,
        trunk_momentum: float = 0.9,
        trunk_cautious: bool = False,
        weight_decay: float = 0.0,
        trunk_weight_decay: float | None = None,
        cap_weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        trunk_state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        vote: MajorityVote | None = None,
    ) -> None:
        if vote is not None and not isinstance(vote, MajorityVote):
            raise TypeError(f"vote must be a MajorityVote or None, got {type(vote).__name__}")
        shared = {
            "lr": lr,
            "trunk_momentum": trunk_momentum,
            "trunk_cautious": trunk_cautious,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "error_if_nonfinite": error_if_nonfinite,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "trunk_state_dtype": trunk_state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
            "trunk_vote": None if vote is None else vote.encoding,
        }
        defaults = checked({name: known.default for name, known in hyperparameters().items()} | shared)
        own = {
            "trunk": {"lr": trunk_lr, "weight_decay": trunk_weight_decay},
            "cap": {"lr": cap_lr, "weight_decay": cap_weight_decay},
        }
        groups = build_groups(params, defaults, own, last_n_layers=last_n_layers, cap=cap)
        self._accepts_groups = True
        super().__init__(groups, defaults)
        del self._accepts_groups
        check_fitness(self.param_groups)
        check_vote(self.param_groups, defaults["trunk_vote"])
        voters = None if vote is None else Voters.of(vote, params)
        check_agreement(self.param_groups, scopes_of(params, self.param_groups, voters and voters.group))
        for group in self.param_groups:
            names = [name for name, _, _ in named_parameters([group])]
            advice = RULES[group["rule"]].advice(names, group["params"], group)
            if advice is not None:
                warn(f"{group['stac_role']}: {advice}")
        if voters is not None:
            voters.hook(p for group in self.param_groups if RULES[group["rule"]].votes for p in group["params"])
            self._voters = voters

    @property
    def partition(self) -> STACPartition:
        """The layers of trunk and cap, with the bytes of their state; ``print`` shows them as a table."""
        return partition_of(self.param_groups, self.state)

    def state_bytes(self) -> int:
        """Bytes of the state once every parameter has stepped, and meanwhile what those that have not will hold."""
        held = named_parameters(self.param_groups)
        return sum(RULES[group["rule"]].nbytes(param, self.state.get(param, {}), group) for _, param, group in held)

    def release_gradients(self, model: nn.Module) -> GradientRelease:
        """Update each parameter during backward, as soon as its gradient is there, and free the gradient.

        Args:
            model: the module that holds the optimizer's parameters.

        Returns:
            A context manager with ``remove()``. :class:`stac_optimizer._release.GradientRelease` says what changes
            while it is active.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: a parameter of the optimizer is not in ``model``.
            RuntimeError: what a release cannot serve, such as several ranks. Nothing was changed.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from stac_optimizer import STAC
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
            >>> optimizer = STAC(model, lr=1e-3)
            >>> with optimizer.release_gradients(model):
            ...     for _ in range(3):
            ...         model(torch.ones(2, 4)).square().mean().backward()
            ...         optimizer.step()
            >>> [param.grad for param in model.parameters()]
            [None, None, None, None]
        """
        return GradientRelease(self, model)

    # Found by torch.amp.GradScaler, which then leaves gradients scaled and sets grad_scale and found_inf for the step.
    # While gradients are released, or ranks vote, a step that has these can say why it refuses them.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        refuses = self._release is not None or self._voters is not None
        return refuses or all(group["fused"] for group in self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        held: dict[str, Any] = super().__getstate__()
        return held if self._voters is None else {**held, "_voters": self._voters}

    @torch.no_grad()
    def average_trunk_state(self) -> None:
        """Replace the averages that each rank keeps for its votes by their mean; all ranks must call it.

        The mean is that of the averaged gradients. All ranks have the same state afterwards, which the checkpoint of
        any of them holds, and with which any number of ranks may go on.

        Raises:
            RuntimeError: no ranks vote; on all ranks, that their states are not of one kind. Nothing was changed.
        """
        if self._voters is None:
            raise RuntimeError(
                "average_trunk_state is for optimizers with a vote; others have the same state everywhere"
            )
        states = [self.state.get(param, {}) for group in self.param_groups for param in group["params"]]
        kinds = [sorted((key, str(value.dtype)) for key, value in state.items()) for state in states]
        self._voters.agree_on(str(kinds))
        for group in self.param_groups:
            RULES[group["rule"]].average_state(group["params"], self.state, self._voters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the split comes from the model, so a new one is made from it.

        Raises:
            RuntimeError: always, once the optimizer stands.
        """
        if not self._accepts_groups:
            raise RuntimeError(
                "STAC takes no further groups, for the split comes from the model; build a new optimizer from the "
                "model, or give all groups, each with its stac_role, at construction"
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; none has while gradients are released, and an iteration ends.

        Args:
            closure: computes the loss anew; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient that cannot be applied. Parameters and state are as before.
        """
        if self._release is not None:
            self._release.end_iteration(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._update(self.param_groups)
        except Exception:
            # A GradScaler takes these away after a step that succeeds, and would multiply its scale by one left here.
            for name in ("grad_scale", "found_inf"):
                vars(self).pop(name, None)
            raise
        return loss

    def _update(self, groups: Sequence[Group], position: int | None = None) -> None:
        """Check, gather, dispatch.

        Args:
            groups: all of the optimizer's groups, or in backward one group cut to one parameter.
            position: in backward that parameter's place among all.
        """
        check_capture(groups)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        is_scaled = found_inf is not None
        check_scaler(is_scaled=is_scaled, votes=self._voters is not None)
        if found_inf is not None:
            if all(RULES[group["rule"]].skips_by_itself(group, self.state) for group in groups):
                found_inf = (found_inf != 0).to(torch.float32)  # as a sum over devices it may be more than 1
            elif found_inf.item():
                return
            else:
                found_inf = None
        only_makes_state = check_step(
            groups,
            self.param_groups,
            voters=self._voters,
            is_scaled=is_scaled,
            is_first=position is None and not self.state,
            rest_may_have_changed=self._release is not None,
        )
        if not (only_makes_state or torch.compiler.is_compiling()):
            self._count_idle_steps(groups)
        start = position or 0
        gathered = []
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            states: list[list[Tensor]] = [[] for _ in RULES[group["rule"]].state_tensors(group)]
            positions: list[int] = []
            self._init_group(group, start, positions, params, grads, *states)
            start += len(group["params"])
            if params:
                gathered.append(
                    StepInputs(group, params, grads, states, grad_scale, positions, found_inf, self._voters)
                )
        for inputs in gathered:
            if not only_makes_state:
                with torch.set_grad_enabled(inputs.group["differentiable"]):
                    RULES[inputs.group["rule"]].update(inputs)

    def _count_idle_steps(self, groups: Sequence[Group]) -> None:
        """Refuse to go on without any gradient ever: a step that does nothing would otherwise not show.

        Not where parameters have no names: libraries that deal them out over ranks may give one rank unused ones alone.

        Raises:
            RuntimeError: at the third such step.
        """
        if self._had_gradient:
            return
        params = [param for group in groups for param in group["params"]]
        self._had_gradient = any(param.grad is not None for param in params)
        is_idle = not self._had_gradient and any(param.requires_grad for param in params)
        if not is_idle or self._release is not None or any("param_names" not in group for group in groups):
            return
        self._idle_steps = min(self._idle_steps + 1, IDLE_STEPS)
        if self._idle_steps == IDLE_STEPS:
            raise RuntimeError(
                f"none of the optimizer's parameters has had a gradient in {self._idle_steps} steps, so nothing was "
                "ever updated. Either the model has other parameters by now, as after fully_shard, which replaces "
                "them: build the optimizer after that. Or backward did not run, or gradients were set to None before "
                "the step"
            )

    def _init_group(
        self,
        group: Group,
        start: int,
        positions: list[int],
        params: list[Tensor],
        grads: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Gather what has a gradient, and create its state. torch.compile knows this name and runs it untraced."""
        tensors = {tensor.key: tensor for tensor in RULES[group["rule"]].state_tensors(group)}
        counter = next(iter(tensors))
        held = list(zip(tensors, states, strict=True))
        for position, param in enumerate(group["params"], start):
            grad = param.grad
            state = self.state[param]
            # Without a gradient the counter alone: strict loading of distributed checkpoints wants state of every one.
            for key in tensors if grad is not None else (counter,):
                if key not in state:
                    state[key] = tensors[key].create(param, group)
            if grad is not None:
                positions.append(position)
                params.append(param)
                grads.append(grad)
                for key, values in held:
                    values.append(state[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or a checkpoint of stac-optimizer 0.1.2.

        All is checked first: roles, layer names, parameter names, shapes, hyper-parameters. State keeps the dtype that
        it was saved in, and is copied.

        Raises:
            TypeError: a hyper-parameter of the wrong type.
            ValueError: the checkpoint belongs to another model or split; the message names the first difference. The
                optimizer is as before.
        """
        mapping("state_dict", state_dict)
        state: dict[Tensor, dict[str, Any]] = {}

        def check(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            groups, loaded = checkpoint.prepare(incoming, self.param_groups)
            state.update(loaded)
            return {"state": {}, "param_groups": groups}

        def fill(_: Optimizer) -> None:
            self.state.update(state)

        # As hooks, to stand after the user's own pre-hooks and before the post-hooks. torch itself gets no state, for
        # it would cast that to the parameters' dtype.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
