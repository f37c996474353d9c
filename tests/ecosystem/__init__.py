"""STAC in the trainers that people use. Runs where the extra ``ecosystem`` is installed, and is left out elsewhere."""

from contextlib import suppress

import torch

# The package index has torchvision built for CUDA alone. Beside a CPU build of torch its library does not load, and
# without these two operators, which nothing here calls, neither do the packages that import it.
with suppress(ModuleNotFoundError):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        LIBRARY = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
