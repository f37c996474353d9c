"""Small models of the kinds that people train, built from configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

__all__ = ["MODELS", "loss_of"]

WORDS, LENGTH, WIDTH, PIXELS = 50, 8, 16, 32
TEXT = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    **TEXT,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
BERT_LIKE = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGES = {"image_size": PIXELS, "num_labels": 5}
TIMM = {"num_classes": 5}


def loss_of(model: nn.Module) -> torch.Tensor:
    """A loss that has gradients in all that the model uses, on an input of the kind that it takes."""
    torch.manual_seed(0)
    tokens = torch.randint(3, WORDS, (2, LENGTH))
    images, classes = torch.randn(2, 3, PIXELS, PIXELS), torch.tensor([0, 1])
    if not isinstance(model, transformers.PreTrainedModel):
        return nn.functional.cross_entropy(model(images), classes)
    data = {"input_ids": tokens, "pixel_values": images, "input_features": torch.randn(2, 8, 32)}
    is_classifier = type(model).__name__.endswith("Classification")
    given = {model.main_input_name: data[model.main_input_name], "labels": classes if is_classifier else tokens}
    loss: torch.Tensor = model(**given).loss
    return loss


def _gpt2(**more: Any) -> Any:
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=16, **TEXT, **more)
    return transformers.GPT2LMHeadModel(config)


def _llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE, **more))


def _mixtral() -> Any:
    config = transformers.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def _qwen_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **LLAMA_LIKE, head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _neox() -> Any:
    config = transformers.GPTNeoXConfig(**BERT_LIKE, **TEXT, max_position_embeddings=16)
    return transformers.GPTNeoXForCausalLM(config)


def _bert(kind: Any, **more: Any) -> Any:
    return kind(transformers.BertConfig(**BERT_LIKE, **TEXT, max_position_embeddings=16, **more))


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=WIDTH, d_kv=4, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        **TEXT,
        decoder_start_token_id=1,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _mamba() -> Any:
    config = transformers.MambaConfig(**TEXT, hidden_size=WIDTH, state_size=4, time_step_rank=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


def _vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**BERT_LIKE, **IMAGES, patch_size=8))


def _swin() -> Any:
    config = transformers.SwinConfig(
        **IMAGES, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


def _resnet() -> Any:
    config = transformers.ResNetConfig(
        num_labels=5, embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="bottleneck"
    )
    return transformers.ResNetForImageClassification(config)


def _convnext() -> Any:
    config = transformers.ConvNextConfig(**IMAGES, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    return transformers.ConvNextForImageClassification(config)


def _timm(name: str, **arguments: Any) -> Any:
    """A model of timm, where it imports: torchvision's wheel in the index does not, beside a CPU build of torch."""
    timm = pytest.importorskip("timm", exc_type=ImportError, reason="timm and a torchvision that imports are not here")
    return timm.create_model(name, **arguments)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "gpt2-untied": lambda: _gpt2(tie_word_embeddings=False),
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "mixtral": _mixtral,
    "qwen3-moe": _qwen_moe,
    "gpt-neox": _neox,
    "bert": lambda: _bert(transformers.BertForMaskedLM),
    "bert-classifier": lambda: _bert(transformers.BertForSequenceClassification, num_labels=5),
    "t5": _t5,
    "whisper": _whisper,
    "mamba": _mamba,
    "vit": _vit,
    "swin": _swin,
    "resnet": _resnet,
    "convnext": _convnext,
    "timm-vit": lambda: _timm(
        "vit_tiny_patch16_224", **TIMM, img_size=PIXELS, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=4
    ),
    "timm-swin": lambda: _timm(
        "swin_tiny_patch4_window7_224",
        **TIMM,
        img_size=PIXELS,
        window_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(2, 2),
    ),
    "timm-resnext": lambda: _timm("resnext50_32x4d", **TIMM, layers=(1, 1, 1, 1)),
    "timm-convnext": lambda: _timm("convnext_atto", **TIMM, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
}
