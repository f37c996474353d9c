"""Every module of torchzero in STAC's trunk: does it step, resume and copy as torchzero alone does, to the bit?

    pip install "stac-optimizer[bench]" && python examples/torchzero_table.py [NAME ...]

A module stands in a chain by itself, with an ``LR`` behind it where it moves with one, and gets a closure where it needs
one. Takes about two minutes.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import inspect
import io
import random
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torchzero as tz
from torch import Tensor, nn

from stac_optimizer import STAC

m: Any = tz.m
STEPS, SAVED_AT = 6, 3
# Solved with a Hessian that must not be singular, or two runs of torchzero alone differ.
CONVEX = {"SixthOrder3P", "TwoPointNewton"}


def is_matrix(tensor: Tensor) -> bool:
    """For ``Split``."""
    return tensor.ndim >= 2


def two() -> tuple[Any, ...]:
    """For what combines modules."""
    return m.Adam(), m.HeavyBall(0.5)


def same(names: str, make: Callable[[Any], Any]) -> dict[str, Callable[[Any], Any]]:
    """One way to make all of these."""
    return dict.fromkeys(names.split(), make)


# What modules get that cannot be made without arguments.
MAKERS: dict[str, Callable[[Any], Any]] = {
    **same("Add Sub RSub Mul Div RDiv Maximum Minimum CopySign RCopySign CopyMagnitude", lambda c: c(m.Adam())),
    **same("GramSchimdt GraftInputToOutput GraftOutputToInput GGTBasis SOAPBasis MSAM", lambda c: c(m.Adam())),
    **same("BirginMartinezRestart PowellRestart RestartOnStuck Online ViewAsReal", lambda c: c(m.Adam())),
    **same("ScalarProjection VectorProjection", lambda c: c(m.Adam())),
    **same("Pow RPow Fill ClipValue ClipNorm TerminateOnLossReached", lambda c: c(2.0)),
    **same("LR StepSize MSAMMomentum MatrixMomentum", lambda c: c(0.01)),
    **same("WeightDecay DirectWeightDecay CautiousWeightDecay", lambda c: c(0.01)),
    **same("Averaging MedianAveraging GradientAccumulation", lambda c: c(3)),
    **same("TerminateAfterNEvaluations TerminateAfterNSeconds TerminateAfterNSteps", lambda c: c(3)),
    **same("Alternate Sum Mean Prod MaximumModules MinimumModules Graft SubModules DivModules", lambda c: c(*two())),
    **same("IntermoduleCautious ScaleModulesByCosineSimilarity", lambda c: c(*two())),
    **same("WeightedMean WeightedSum", lambda c: c(*two(), weights=(0.3, 0.7))),
    **same("CubicRegularization Dogleg LevenbergMarquardt TrustCG", lambda c: c(hess_module=m.BFGS(inverse=False))),
    **same("TerminateAll TerminateAny", lambda c: c(m.TerminateAfterNSteps(4), m.TerminateOnLossReached(0.0))),
    "ClipModules": lambda c: c(m.Adam(), -0.5, 0.5),
    "CustomUnaryOperation": lambda c: c("copy"),
    "GradientSampling": lambda c: c(m.Adam(), n=4),
    "LambdaHomotopy": lambda c: c(torch.log1p),
    "LerpModules": lambda c: c(*two(), weight=0.3),
    "Multistep": lambda c: c(m.Adam(), steps=2),
    "PowModules": lambda c: c(m.Abs(), m.Abs()),
    "RandomReinitialize": lambda c: c(p_reinit=0.0),
    "RandomStepSize": lambda c: c(seed=0),
    "RestartEvery": lambda c: c(m.Adam(), steps=4),
    "Sequential": lambda c: c([m.Adam(), m.HeavyBall()]),
    "Split": lambda c: c(is_matrix, m.Adam(), m.Lion()),
    "SVRG": lambda c: c(svrg_steps=2),
    "Switch": lambda c: c(*two(), steps=2),
    "Threshold": lambda c: c(0.01, 0.0, False),
    "To": lambda c: c(m.Adam(), dtype=torch.float64),
    "UnaryLambda": lambda c: c(torch._foreach_sign),
    "UnaryParameterwiseLambda": lambda c: c(torch.sign),
    "Uniform": lambda c: c(-1.0, 1.0),
    "WeightedAveraging": lambda c: c([0.5, 0.3, 0.2]),
    "Wrap": lambda c: c(torch.optim.Adam, lr=1.0),
}


def chain(name: str, has_lr: bool, groups: Any) -> Any:
    """The optimizer of one module."""
    module = MAKERS.get(name, lambda kind: kind())(getattr(m, name))
    return tz.Optimizer(groups, module, *([m.LR(0.05)] if has_lr else []))


def network(seed: int) -> nn.Sequential:
    """Two small layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def run(model: nn.Module, optimizer: Any, steps: Iterable[int], kind: str, *, convex: bool = False) -> list[Tensor]:
    """The weights after each step; ``kind`` is that of the closure: none, scalar or vector."""
    path = []
    for step in steps:
        torch.manual_seed(step), np.random.seed(step), random.seed(step)  # noqa: NPY002 - some modules draw so
        inputs, targets = torch.randn(6, 3), torch.randn(6, 2)

        def closure(backward: bool = True, inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            with torch.enable_grad():  # some modules call it without
                errors = (model(inputs) - targets).square()
                loss: Tensor = errors.mean(1) if kind == "vector" else errors.mean()
                loss = loss + sum(weight.square().sum() for weight in model.parameters()) if convex else loss
            if backward:
                optimizer.zero_grad()
                loss.sum().backward()
            return loss

        if kind == "none":
            closure()
        optimizer.step(None if kind == "none" else closure)
        path.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return path


def differences(build: Any, expected: list[Tensor], kind: str, *, convex: bool) -> list[str]:
    """In what STAC differs from torchzero alone: in its steps, after a checkpoint, in a copy."""
    model, other = network(0), network(1)
    optimizer, resumed = (STAC(each, last_n_layers=0, trunk_optimizer=build) for each in (model, other))
    path = run(model, optimizer, range(SAVED_AT), kind, convex=convex)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    runs = {"copied": copy.deepcopy((model, optimizer)), "itself": (model, optimizer), "resumed": (other, resumed)}
    return [
        name
        for name, pair in runs.items()
        if not equal(path + run(*pair, range(SAVED_AT, STEPS), kind, convex=convex), expected)
    ]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(one, other, strict=True))


def verdict(name: str) -> tuple[str, str]:
    """Whether the module runs alone, and as a guest then; and what it needs, or why not."""
    if inspect.isabstract(getattr(m, name)) or name.endswith("Base"):
        return "abstract", ""
    error, still = "", None
    convex = name in CONVEX
    for has_lr, kind in [(lr, kind) for lr in (True, False) for kind in ("none", "scalar", "vector")]:
        build = partial(chain, name, has_lr)
        try:
            model = network(0)
            expected = run(model, build([{"params": list(model.parameters())}]), range(STEPS), kind, convex=convex)
        except Exception as failure:  # whatever a module asks for that it does not get here
            error = error or f"{type(failure).__name__}: {str(failure).partition(chr(10))[0][:70]}"
            continue
        moves = any(not equal([expected[0]], [each]) for each in expected)
        needs = f"closure: {kind}{'' if has_lr else ', no LR'}{'' if moves else ', never moves'}"
        if moves:
            break
        still = still or (build, expected, kind, needs)
    else:
        if still is None:
            return "not alone", error
        build, expected, kind, needs = still
    try:
        bad = differences(build, expected, kind, convex=convex)
    except Exception as failure:
        return "FAILS", f"{needs}; {type(failure).__name__}: {str(failure)[:70]}"
    return ("DIFFERS", f"{needs}; {bad}") if bad else ("guest", needs)


def main(names: list[str]) -> None:
    """Print the table and the counts."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):  # state of PSGD's Kronecker modules
        from opt_einsum.contract import ContractExpression  # noqa: PLC0415

        torch.serialization.add_safe_globals([ContractExpression])
    kinds = [name for name, kind in vars(m).items() if inspect.isclass(kind) and issubclass(kind, tz.core.Module)]
    counts: collections.Counter[str] = collections.Counter()
    for name in names or sorted(kinds):
        with contextlib.redirect_stdout(io.StringIO()):  # some modules print
            result, note = verdict(name)
        counts[result] += 1
        print(f"{name:34} {result:10} {note}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
