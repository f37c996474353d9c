"""What the fork server of :mod:`tests.ranks` imports once for all processes. DTensor imports torch._dynamo late."""

from __future__ import annotations

import pytest
import torch._dynamo  # as the first step of any optimizer does
import torch.distributed.checkpoint.state_dict
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.optim
import torch.distributed.tensor
import torch.nn.parallel

import stac_optimizer
import tests.support

__all__ = ["pytest", "stac_optimizer", "tests", "torch"]
