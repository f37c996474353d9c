"""What the fork server of :mod:`tests.ranks` imports once for all processes."""

from __future__ import annotations

import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.parallel

import stac_optimizer
import tests.support

__all__ = ["stac_optimizer", "tests", "torch"]
