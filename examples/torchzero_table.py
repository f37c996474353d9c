"""Every module of torchzero in STAC's trunk: does it step, resume and copy as torchzero alone does, to the bit?

    python -m pip install -c constraints.txt -e ".[bench]" && python examples/torchzero_table.py [NAME ...]

A module stands in a chain by itself, with an ``LR`` behind it where it moves with one, and gets a closure where it
needs one. Takes half a minute.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import inspect
import io
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torchzero as tz
from torch import Tensor, nn

from command_line import Parser
from stac_optimizer import STAC

m: Any = tz.m
STEPS, SAVED_AT = 6, 3
# Solved with a Hessian that must not be singular, or two runs of torchzero alone differ.
CONVEX = {"SixthOrder3P", "TwoPointNewton"}


def is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim >= 2


# What modules get that cannot be made without arguments: names, positional arguments, keywords. Modules are made anew.
ARGUMENTS: list[tuple[str, Callable[[], list[Any]], dict[str, Any]]] = [
    ("Add Sub RSub Mul Div RDiv Maximum Minimum CopySign RCopySign CopyMagnitude GramSchimdt", lambda: [m.Adam()], {}),
    ("GraftInputToOutput GraftOutputToInput GGTBasis SOAPBasis MSAM RestartOnStuck Online", lambda: [m.Adam()], {}),
    ("BirginMartinezRestart PowellRestart ScalarProjection VectorProjection ViewAsReal", lambda: [m.Adam()], {}),
    ("GradientSampling", lambda: [m.Adam()], {"n": 4}),
    ("Multistep RestartEvery", lambda: [m.Adam()], {"steps": 2}),
    ("To", lambda: [m.Adam()], {"dtype": torch.float64}),
    ("ClipModules", lambda: [m.Adam(), -0.5, 0.5], {}),
    ("Alternate Sum Mean Prod MaximumModules MinimumModules Graft SubModules", lambda: [m.Adam(), m.HeavyBall()], {}),
    ("DivModules IntermoduleCautious ScaleModulesByCosineSimilarity", lambda: [m.Adam(), m.HeavyBall()], {}),
    ("WeightedMean WeightedSum", lambda: [m.Adam(), m.HeavyBall()], {"weights": (0.3, 0.7)}),
    ("LerpModules", lambda: [m.Adam(), m.HeavyBall()], {"weight": 0.3}),
    ("Switch", lambda: [m.Adam(), m.HeavyBall()], {"steps": 2}),
    ("Sequential", lambda: [[m.Adam(), m.HeavyBall()]], {}),
    ("PowModules", lambda: [m.Abs(), m.Abs()], {}),
    ("Split", lambda: [is_matrix, m.Adam(), m.Lion()], {}),
    ("CubicRegularization Dogleg LevenbergMarquardt TrustCG", lambda: [m.BFGS(inverse=False)], {}),
    ("TerminateAll TerminateAny", lambda: [m.TerminateAfterNSteps(4), m.TerminateOnLossReached(0.0)], {}),
    ("Pow RPow Fill ClipValue ClipNorm TerminateOnLossReached", lambda: [2.0], {}),
    ("LR StepSize MSAMMomentum MatrixMomentum WeightDecay DirectWeightDecay CautiousWeightDecay", lambda: [0.01], {}),
    ("Averaging MedianAveraging GradientAccumulation TerminateAfterNEvaluations", lambda: [3], {}),
    ("TerminateAfterNSeconds TerminateAfterNSteps", lambda: [3], {}),
    ("CustomUnaryOperation", lambda: ["copy"], {}),
    ("LambdaHomotopy", lambda: [torch.log1p], {}),
    ("UnaryLambda", lambda: [torch._foreach_sign], {}),
    ("UnaryParameterwiseLambda", lambda: [torch.sign], {}),
    ("RandomReinitialize", list, {"p_reinit": 0.0}),
    ("RandomStepSize", list, {"seed": 0}),
    ("SVRG", list, {"svrg_steps": 2}),
    ("Threshold", lambda: [0.01, 0.0, False], {}),
    ("Uniform", lambda: [-1.0, 1.0], {}),
    ("WeightedAveraging", lambda: [[0.5, 0.3, 0.2]], {}),
    ("Wrap", lambda: [torch.optim.Adam], {"lr": 1.0}),
]
ARGUMENTS_OF = {name: (args, keywords) for names, args, keywords in ARGUMENTS for name in names.split()}


def chain(name: str, has_lr: bool, groups: Any) -> Any:
    args, keywords = ARGUMENTS_OF.get(name, (list, {}))
    return tz.Optimizer(groups, getattr(m, name)(*args(), **keywords), *([m.LR(0.05)] if has_lr else []))


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def run(model: nn.Module, optimizer: Any, kind: str, steps: Iterable[int], *, convex: bool) -> list[Tensor]:
    """The weights after each step; ``kind`` is that of the closure: none, scalar or vector."""
    path = []
    for step in steps:
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(step)
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

        optimizer.step(*([] if kind == "none" and [closure()] else [closure]))
        path.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return path


def is_same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(one, other, strict=True))


def differences(build: Any, expected: list[Tensor], step: Any) -> list[str]:
    """In what STAC differs from torchzero alone: in its steps, after a checkpoint, in a copy."""
    models = network(0), network(1)
    pairs: list[Any] = [(model, STAC(model, last_n_layers=0, trunk_optimizer=build)) for model in models]
    path = step(*pairs[0], steps=range(SAVED_AT))
    file = io.BytesIO()
    torch.save([each.state_dict() for each in pairs[0]], file)
    file.seek(0)
    for each, state in zip(pairs[1], torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    runs = {"copied": copy.deepcopy(pairs[0]), "itself": pairs[0], "resumed": pairs[1]}
    return [key for key, run in runs.items() if not is_same(path + step(*run, steps=range(SAVED_AT, STEPS)), expected)]


def verdict(name: str) -> tuple[str, str]:
    """Whether a module runs alone, and whether as a guest then; and what it needs, or why not."""
    if inspect.isabstract(getattr(m, name)) or name.endswith("Base"):
        return "abstract", ""
    error, found = "", None
    for has_lr, kind in [(has_lr, kind) for has_lr in (True, False) for kind in ("none", "scalar", "vector")]:
        model, build = network(0), partial(chain, name, has_lr)
        step = partial(run, kind=kind, convex=name in CONVEX)
        try:
            expected = step(model, build([{"params": list(model.parameters())}]), steps=range(STEPS))
        except Exception as failure:  # whatever a module asks for and does not get here
            error = error or f"{type(failure).__name__}: {str(failure).partition(chr(10))[0][:70]}"
            continue
        moves = any(not is_same(expected[:1], [later]) for later in expected)
        if moves or found is None:
            needs = f"closure: {kind}{'' if has_lr else ', no LR'}{'' if moves else ', never moves'}"
            found = build, expected, step, needs
        if moves:
            break
    if found is None:
        return "not alone", error
    bad = differences(*found[:3])
    return ("DIFFERS", f"{found[3]}; {', '.join(bad)}") if bad else ("guest", found[3])


def main(argv: Sequence[str] | None = None) -> None:
    kinds = [name for name, kind in vars(m).items() if inspect.isclass(kind) and issubclass(kind, tz.core.Module)]
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="MODULE", help="a class of torchzero.m (default: all)")
    names = parser.parse_args(argv).names
    if unknown := [name for name in names if name not in kinds]:
        parser.error(f"torchzero.m has no module {unknown[0]!r}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):  # state of PSGD's Kronecker modules
        from opt_einsum.contract import ContractExpression  # noqa: PLC0415

        torch.serialization.add_safe_globals([ContractExpression])
    counts: collections.Counter[str] = collections.Counter()
    for name in names or sorted(kinds):
        with contextlib.redirect_stdout(io.StringIO()):  # some modules print
            result, note = verdict(name)
        counts[result] += 1
        print(f"{name:34} {result:10} {note}".rstrip(), flush=True)
    print(", ".join(f"{count} {result}" for result, count in counts.items()))


if __name__ == "__main__":
    main()
