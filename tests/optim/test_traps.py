"""What a naive sign optimizer gets wrong in silence. Each trap is shown on naive code first, then on STAC."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC, embeddings, last_layers
from stac_optimizer.optim import Lion, Signum
from tests.support import assert_same_bits


def naive_step(weight: Tensor, average: Tensor, grad: Tensor, *, lr: float, momentum: float = 0.9) -> None:
    """Sign of momentum as it is usually written."""
    average.mul_(momentum).add_(grad, alpha=1 - momentum)
    weight.sub_(torch.sign(average), alpha=lr)


def trunk_of(weight: nn.Parameter, kind: type[Signum] | type[Lion] = Signum, **arguments: object) -> STAC:
    groups = [{"params": [("layer.weight", weight)], "stac_role": "trunk", **arguments}]
    return STAC(groups, trunk_optimizer=kind)


PATHS = {"single": {"foreach": False}, "foreach": {"foreach": True}}
path = pytest.mark.parametrize("path", PATHS)
kinds = pytest.mark.parametrize("kind", [Signum, Lion])


@path
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        pytest.param(Signum, {}, id="signum"),
        pytest.param(Signum, {"momentum": 0.0}, id="signum-momentum-0"),
        pytest.param(Lion, {}, id="lion"),
    ],
)
@pytest.mark.parametrize("cautious", [False, True], ids=["plain", "cautious"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nonfinite_gradient_shows_in_the_weight(
    bad: float,
    cautious: bool,
    kind: type[Signum] | type[Lion],
    arguments: dict[str, float],
    path: str,
    dtype: torch.dtype,
) -> None:
    """torch.sign(nan) is 0, so naive code freezes the weight for ever."""
    grad = torch.tensor([bad, 1.0], dtype=dtype)
    weight = torch.zeros(2)
    naive_step(weight, torch.zeros(2), grad.float(), lr=0.5)
    assert weight.isfinite().all()

    parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
    optimizer = trunk_of(parameter, kind, lr=0.5, cautious=cautious, **arguments, **PATHS[path])
    parameter.grad = grad
    optimizer.step()
    assert parameter[0].isnan()
    assert parameter[1].isfinite()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter[0].isnan()


@pytest.mark.parametrize(("kind", "path"), [(Signum, "single"), (Signum, "foreach"), (Lion, "single")])
def test_zero_gradients_drift_unless_cautious(kind: type[Signum] | type[Lion], path: str) -> None:
    """The average of zeros keeps its sign: after one gradient a weight walks on all 3,000 steps that have none."""
    steps, lr = 3000, 1e-3
    weights = {cautious: nn.Parameter(torch.zeros(4)) for cautious in (False, True)}
    adamw_weight = nn.Parameter(torch.zeros(4))
    optimizers: list[torch.optim.Optimizer] = [
        trunk_of(weights[cautious], kind, lr=lr, cautious=cautious, **PATHS[path]) for cautious in weights
    ]
    optimizers.append(torch.optim.AdamW([adamw_weight], lr=lr))
    for step in range(1 + steps):
        for weight in (*weights.values(), adamw_weight):
            weight.grad = torch.full((4,), 1.0 if step == 0 else 0.0)
        for optimizer in optimizers:
            optimizer.step()
    drift = {name: -weight.min().item() / lr for name, weight in [*weights.items(), ("adamw", adamw_weight)]}
    # The average underflows to 0 in float32 after about a thousand steps; until then every step is a full one.
    assert drift[False] > 900
    assert drift[True] == pytest.approx(1.0)
    assert drift["adamw"] < 12


def test_zero_gradients_do_not_move_momentum_free_trunk() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = trunk_of(weight, lr=1e-3, momentum=0.0)
    for step in range(10):
        weight.grad = torch.full((4,), 1.0 if step == 0 else 0.0)
        optimizer.step()
    assert torch.equal(weight, torch.full((4,), -1e-3))


class Bigram(nn.Module):
    """Predicts from one token; tokens that a batch lacks have zero gradient in their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens))
        return out


def absent_row_drift(optimizer: STAC, model: Bigram) -> float:
    """How far, in lr, the row of a token moves that is in the first batch only."""
    lr: float
    (lr,) = (g["lr"] for g in optimizer.param_groups if any(p is model.embedding.weight for p in g["params"]))
    for step in range(101):
        optimizer.zero_grad()
        model(torch.tensor([0, 1] if step == 0 else [1, 2])).square().sum().backward()
        if step == 1:
            start = model.embedding.weight[0].detach().clone()
        optimizer.step()
    return float((model.embedding.weight[0].detach() - start).abs().max()) / lr


def test_embedding_in_trunk_warns_and_both_cures_hold() -> None:
    torch.manual_seed(0)
    model = Bigram()
    with pytest.warns(UserWarning, match="embedding") as caught:
        optimizer = STAC(model)
    assert len(caught) == 1
    assert all(word in str(caught[0].message) for word in ("'embedding'", "trunk_cautious=True", "embeddings()"))
    assert caught[0].filename == __file__
    assert absent_row_drift(optimizer, model) > 99
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cures = [STAC(model, trunk_cautious=True), STAC(model, cap=embeddings() | last_layers(1))]
    assert absent_row_drift(cures[0], model) == 0
    assert absent_row_drift(cures[1], model) < 12


def test_step_below_half_an_ulp_is_lost_in_bfloat16_and_warned_of() -> None:
    """Near 1 neighbouring bfloat16 values lie 2^-7 above and 2^-8 below: an lr of 1e-3 rounds to nothing."""
    weight = torch.ones(3, dtype=torch.bfloat16)
    naive_step(weight, torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16), lr=1e-3)
    assert torch.equal(weight, torch.ones_like(weight))

    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="round to nothing") as caught:
        STAC(model, lr=1e-3)
    message = str(caught[0].message)
    assert len(caught) == 1
    assert "'0.weight'" in message
    assert "'1.weight'" not in message  # its weights are small enough
    assert all(word in message for word in ("0.00075", "float32", "trunk_lr"))


@pytest.mark.parametrize(
    ("dtype", "lr", "warns"),
    [
        pytest.param(torch.bfloat16, 1e-3, True, id="bfloat16-small-lr"),
        pytest.param(torch.bfloat16, 4e-3, False, id="bfloat16-large-lr"),
        pytest.param(torch.float16, 1e-4, True, id="float16-small-lr"),
        pytest.param(torch.float16, 1e-3, False, id="float16-large-lr"),
        pytest.param(torch.float32, 1e-6, False, id="float32"),
        pytest.param(torch.bfloat16, 0.0, False, id="lr-of-zero-means-to-stay"),
        pytest.param(torch.bfloat16, torch.tensor(1e-3), True, id="tensor-lr"),
    ],
)
def test_lost_step_warning_follows_dtype_and_lr(dtype: torch.dtype, lr: float | Tensor, warns: bool) -> None:
    weight = nn.Parameter(torch.ones(5, dtype=dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = trunk_of(weight, lr=lr)
    assert bool(caught) == warns
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.ones_like(weight)) == (warns or not lr)


@path
@kinds
@pytest.mark.parametrize("cautious", [False, True], ids=["plain", "cautious"])
def test_average_too_small_for_float16_still_moves_the_weight(
    cautious: bool, kind: type[Signum] | type[Lion], path: str
) -> None:
    """A tenth of the gradient 2e-7 rounds to 0 in float16: an average read back from there would freeze the weight."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = trunk_of(weight, kind, lr=0.125, cautious=cautious, **PATHS[path])
    for _ in range(4):
        weight.grad = torch.full((2,), 2e-7, dtype=torch.float16)
        optimizer.step()
    assert not optimizer.state[weight]["exp_avg"].any()
    assert weight.tolist() == [-0.5, -0.5]


def test_decay_is_outside_the_sign() -> None:
    """Decay in the gradient would vanish in the sign: here it shrinks the weight in proportion."""
    weights = [nn.Parameter(torch.tensor([4.0, -2.0])) for _ in range(2)]
    for weight, decay in zip(weights, (0.0, 0.5), strict=True):
        optimizer = trunk_of(weight, lr=0.125, weight_decay=decay)
        weight.grad = torch.ones(2)
        optimizer.step()
    assert weights[0].tolist() == [3.875, -2.125]
    assert weights[1].tolist() == [4.0 * (1 - 0.125 * 0.5) - 0.125, -2.0 * (1 - 0.125 * 0.5) - 0.125]


def test_zero_gradients_and_zero_lr_leave_weights_to_the_bit() -> None:
    """The hidden step by which torch.distributed.checkpoint makes state; negative zeros and subnormals included."""
    values = torch.tensor([1.0, -0.0, 0.0, 1e-42, -3.0])
    for role in ("trunk", "cap"):
        weight = nn.Parameter(values.clone())
        optimizer = STAC([{"params": [("w", weight)], "stac_role": role}], lr=0.0, weight_decay=0.1)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert_same_bits(weight.detach(), values)
