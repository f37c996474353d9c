"""Which parameters are matrices of hidden layers: what modules hold besides them, by hand-made ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from stac_optimizer import named, partition_trainable_layers
from stac_optimizer.model.hidden import (
    all_but_hidden_matrices,
    gates,
    hidden_matrices,
    queries_keys_values,
    stacked_experts,
)
from stac_optimizer.model.selection import Selector

from .models import Net, TokenEmbedding, compiled, lora_embedding, parameter


class VocabularyEmbedding(Net):
    """An embedding that is not torch's."""


def chosen(selector: Selector, model: nn.Module) -> set[str]:
    """What a selector chooses of a model, which may be nothing."""
    layers = partition_trainable_layers(model, cap=named("end") | selector).cap_layers
    return {name for layer in layers for name in layer.parameter_names if not name.startswith("end.")}


def net(**members: nn.Module | nn.Parameter) -> Net:
    """A model that ends in a layer of its own, which nothing here is about."""
    return Net(**members, end=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("member", "matrices"),
    [
        (nn.Linear(3, 4), {"weight"}),
        (nn.Linear(3, 1), set()),
        (nn.Linear(1, 4), set()),
        (nn.Bilinear(3, 4, 5), {"weight"}),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight", "out_proj.weight"}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True),
            {f"{n}_proj_weight" for n in "qkv"} | {"out_proj.weight"},
        ),
        (nn.LSTM(3, 4, proj_size=2), {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}),
        (nn.GRUCell(3, 4), {"weight_ih", "weight_hh"}),
        (nn.LayerNorm([3, 4]), set()),
        (nn.PReLU(4), set()),
        (nn.Embedding(9, 4), set()),
        (TokenEmbedding(9, 4), set()),
        (lora_embedding(), set()),
        (VocabularyEmbedding(weight=parameter(9, 4)), set()),
        (Net(gate_up_proj=parameter(2, 6, 3), down_proj=parameter(2, 3, 3)), {"gate_up_proj", "down_proj"}),
        (Net(w1=parameter(2, 6, 3), w1_bias=parameter(2, 6), gate_up_proj_bias=parameter(2, 6)), {"w1"}),
        (Net(lora_A=parameter(2, 6), lora_B=parameter(6, 2)), {"lora_A", "lora_B"}),
        (Net(cls_token=parameter(1, 1, 4), pos_embed=parameter(1, 9, 4), latents=parameter(5, 4)), set()),
        (Net(relative_position_bias_table=parameter(9, 2), attention_biases=parameter(2, 9)), set()),
        (Net(A_log=parameter(8, 4), D=parameter(8), dt_bias=parameter(8)), set()),
        (Net(gamma=parameter(4, 1, 1), weight_g=parameter(4, 1), weight_v=parameter(4, 3)), {"weight_v"}),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), {"parametrizations.weight.original1"}),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), {"parametrizations.weight.original"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_hidden_matrix_is_what_maps_hidden_vectors(member: nn.Module, matrices: set[str]) -> None:
    model = net(member=member)
    assert chosen(hidden_matrices(), model) == {f"member.{name}" for name in matrices}
    rest = {name for name, param in member.named_parameters() if param.requires_grad} - matrices
    assert chosen(all_but_hidden_matrices(), model) == {f"member.{name}" for name in rest}


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_hidden_convolution_is_neither_the_first_nor_in_groups(kind: type[nn.Conv2d]) -> None:
    model = net(
        stem=kind(3, 8, 2), dense=kind(8, 8, 1), grouped=kind(8, 8, 2, groups=2), depthwise=kind(8, 8, 2, groups=8)
    )
    assert chosen(hidden_matrices(), model) == {"dense.weight"}
    assert chosen(hidden_matrices(), compiled(model)) == {"dense.weight"}


def test_frozen_convolution_is_not_the_first() -> None:
    """Of what is trained, the next one meets what does not change."""
    model = net(stem=nn.Conv2d(3, 8, 2).requires_grad_(False), one=nn.Conv2d(8, 8, 2), two=nn.Conv2d(8, 8, 2))
    assert chosen(hidden_matrices(), model) == {"two.weight"}


def test_tied_matrix_is_its_first_owners() -> None:
    model = net(embedding=nn.Embedding(9, 4), linear=nn.Linear(4, 9, bias=False))
    model.get_submodule("linear").weight = model.get_parameter("embedding.weight")
    assert chosen(hidden_matrices(), model) == set()


@pytest.mark.parametrize(
    ("selector", "model", "several"),
    [
        (queries_keys_values(), net(qkv=nn.Linear(4, 12), mlp=nn.Linear(4, 12)), {"qkv.weight"}),
        (queries_keys_values(), net(c_attn=nn.Linear(4, 12), Wqkv=nn.Linear(4, 8)), {"c_attn.weight"}),
        (queries_keys_values(), net(attention=nn.MultiheadAttention(4, 2)), {"attention.in_proj_weight"}),
        (queries_keys_values(), net(c_attn=Net(weight=parameter(4, 12))), set()),  # columns, as GPT-2's
        (gates(4), net(rnn=nn.LSTM(3, 4, proj_size=2)), {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}),
        (gates(4), net(rnn=nn.GRU(3, 4), plain=nn.RNN(3, 4)), set()),
        (gates(3), net(rnn=nn.GRUCell(3, 4)), {"rnn.weight_ih", "rnn.weight_hh"}),
        (stacked_experts(), net(experts=Net(up_proj=parameter(2, 6, 3), bias=parameter(2, 3, 1))), {"experts.up_proj"}),
        (stacked_experts(), net(conv=nn.Conv1d(4, 4, 3), other=nn.Conv1d(4, 4, 3), both=nn.Bilinear(3, 4, 5)), set()),
    ],
)
def test_matrices_that_are_several(selector: Selector, model: nn.Module, several: set[str]) -> None:
    assert chosen(selector, model) == several


@pytest.mark.parametrize("make", [hidden_matrices, all_but_hidden_matrices])
def test_selector_needs_the_model_and_must_match(make: Callable[[], Selector]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    with pytest.raises(ValueError, match="Pass the model in place of its named parameters"):
        partition_trainable_layers(model.named_parameters(), cap=make())
    with pytest.raises(ValueError, match="matches no parameter"):
        partition_trainable_layers(nn.Sequential(nn.ReLU(), nn.Linear(3, 1, bias=False)), cap=hidden_matrices())
