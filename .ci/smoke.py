"""Smoke test of an installed wheel: run it with `python -W error`, outside the source tree, with nothing but torch."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import io
import sysconfig
import warnings
from pathlib import Path

# torch itself warns on import where numpy is missing. It stays missing here: the package must not need it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import stac_optimizer  # noqa: E402
from stac_optimizer import STAC  # noqa: E402


def check(holds: bool, claim: str) -> None:
    """Stop with the claim that does not hold; unlike `assert`, also under `python -O`."""
    if not holds:
        raise SystemExit(f"smoke test failed: {claim}")


def make() -> tuple[nn.Sequential, STAC]:
    """Return a model with three layers, the same each time, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, STAC(model, lr=3e-3, last_n_layers=1, trunk_momentum=0.9, weight_decay=1e-2)


def train(model: nn.Module, optimizer: STAC, inputs: Tensor, targets: Tensor, steps: int) -> list[float]:
    """Take the steps and return the loss before each of them."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    installed = Path(sysconfig.get_path("purelib")).resolve()
    loaded = Path(stac_optimizer.__file__).resolve()
    check(loaded.is_relative_to(installed), f"stac_optimizer comes from {installed}, not {loaded}")
    for name in ("py.typed", "optim/signum/fused/cpu_kernels.cpp"):
        check(importlib.resources.files("stac_optimizer").joinpath(name).is_file(), f"{name} is in the package")
    version = importlib.metadata.version("stac-optimizer")
    check(stac_optimizer.__version__ == version, f"__version__ is {version!r}, as in the wheel's metadata")

    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    targets = inputs.sum(dim=1, keepdim=True).sin()
    model, optimizer = make()
    check(optimizer.partition.trunk_layer_names == ("0", "2"), "the trunk is every layer but the last")
    check(optimizer.partition.cap_layer_names == ("4",), "the cap is the last layer")

    losses = train(model, optimizer, inputs, targets, steps=100)
    check(losses[-1] < 0.5 * losses[0], f"the loss halves in 100 steps: {losses[0]:.4f} to {losses[-1]:.4f}")

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed_model, resumed_optimizer = make()
    resumed_model.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])

    more = train(model, optimizer, inputs, targets, steps=10)
    resumed = train(resumed_model, resumed_optimizer, inputs, targets, steps=10)
    same_weights = all(map(torch.equal, model.parameters(), resumed_model.parameters()))
    check(more == resumed and same_weights, "a resumed run equals the uninterrupted one bit for bit")
    hosted = STAC(make()[0], trunk_optimizer=stac_optimizer.optim.Lion, cap_optimizer=torch.optim.SGD)
    check([group["rule"] for group in hosted.param_groups] == ["lion", "torch.SGD"], "roles take other optimizers")
    print(
        f"smoke test passed: stac-optimizer {version}, torch {torch.__version__}, "
        f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps, resumed bit for bit"
    )


if __name__ == "__main__":
    main()
