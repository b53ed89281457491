"""Tiny models with random weights, one for each hub id that PEFT's tests load.

They keep what the tests rely on (architecture, layer names, number of layers, tied or untied embeddings) and are small
otherwise. Weights are larger than an untrained model's, so that an adapter changes the outputs visibly.
"""

from collections.abc import Callable

import torch
import transformers as tf
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
_SPREAD = 0.2
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": _SPREAD,
}
_LLAMA = {
    **_TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": _SPREAD,
}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 32}
_EXPERTS = {**_LLAMA, "num_local_experts": 4, "head_dim": 8}


def _opt(layers: int) -> PreTrainedConfig:
    return tf.OPTConfig(
        **_TOKENS,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=_SPREAD,
    )


def _gpt2() -> PreTrainedConfig:
    return tf.GPT2Config(**_TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=_SPREAD)


def _gptj() -> PreTrainedConfig:
    return tf.GPTJConfig(
        **_TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, initializer_range=_SPREAD
    )


def _t5() -> PreTrainedConfig:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4}
    return tf.T5Config(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **sizes)


def _bart() -> PreTrainedConfig:
    return tf.BartConfig(
        **_TOKENS,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        init_std=_SPREAD,
    )


def _bloom() -> PreTrainedConfig:
    return tf.BloomConfig(**_TOKENS, hidden_size=32, n_layer=5, n_head=4, initializer_range=_SPREAD)


def _clip_text() -> PreTrainedConfig:
    sizes = {**_ENCODER, "num_hidden_layers": 2, "projection_dim": 16}
    return tf.CLIPTextConfig(**sizes)


def _llama4() -> PreTrainedConfig:
    return tf.Llama4TextConfig(
        **_EXPERTS,
        intermediate_size_mlp=64,
        interleave_moe_layer_step=1,
        num_experts_per_tok=1,
        attention_chunk_size=32,
    )


def _gpt_oss() -> PreTrainedConfig:
    layers = ["sliding_attention", "full_attention"]
    return tf.GptOssConfig(**_EXPERTS, num_experts_per_tok=2, sliding_window=32, layer_types=layers)


def _gpt_neox() -> PreTrainedConfig:
    sizes = {**_ENCODER, "num_hidden_layers": 2, "rotary_pct": 0.5}
    return tf.GPTNeoXConfig(**sizes)


def _resnet() -> PreTrainedConfig:
    return tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=3
    )


Architecture = tuple[type[PreTrainedModel], Callable[[], PreTrainedConfig]]

_OPT: Architecture = (tf.OPTForCausalLM, lambda: _opt(5))
_GPT2: Architecture = (tf.GPT2LMHeadModel, _gpt2)
_LLAMA_LM: Architecture = (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**_LLAMA))
_T5: Architecture = (tf.T5ForConditionalGeneration, _t5)
_BERT: Architecture = (tf.BertForSequenceClassification, lambda: tf.BertConfig(**_ENCODER))

MODELS: dict[str, Architecture] = {
    "bert-base-uncased": _BERT,
    "google/flan-t5-small": _T5,
    "gpt2": _GPT2,
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        tf.Gemma3ForCausalLM,
        lambda: tf.Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA_LM,
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    "peft-internal-testing/opt-125m": (tf.OPTForCausalLM, lambda: _opt(12)),
    "peft-internal-testing/tiny-clip-text-2": (tf.CLIPTextModelWithProjection, _clip_text),
    "peft-internal-testing/tiny-dummy-qwen2": (tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**_LLAMA)),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (tf.BartForConditionalGeneration, _bart),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _BERT,
    "peft-internal-testing/tiny-random-BertModel": (tf.BertModel, lambda: tf.BertConfig(**_ENCODER)),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (tf.BloomForCausalLM, _bloom),
    "peft-internal-testing/tiny-random-DebertaModel": (
        tf.DebertaModel,
        lambda: tf.DebertaConfig(**_ENCODER, relative_attention=True, pos_att_type="c2p|p2c"),
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        tf.DebertaV2Model,
        lambda: tf.DebertaV2Config(**_ENCODER, relative_attention=True, pos_att_type="c2p|p2c"),
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _GPT2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (tf.GPTJForCausalLM, _gptj),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (tf.GPTNeoXForCausalLM, _gpt_neox),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA_LM,
    "peft-internal-testing/tiny-random-OPTForCausalLM": _OPT,
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (tf.ResNetForImageClassification, _resnet),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        tf.RobertaForSequenceClassification,
        lambda: tf.RobertaConfig(**_ENCODER),
    ),
    "peft-internal-testing/tiny-random-RobertaModel": (tf.RobertaModel, lambda: tf.RobertaConfig(**_ENCODER)),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _T5,
    "peft-internal-testing/tiny-random-t5": _T5,
    "trl-internal-testing/tiny-GptOssForCausalLM": (tf.GptOssForCausalLM, _gpt_oss),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (tf.Llama4ForCausalLM, _llama4),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        tf.LlamaForSequenceClassification,
        lambda: tf.LlamaConfig(**_LLAMA),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA_LM,
}
"""Model class and configuration by hub id."""


def tiny_model(hub_id: str) -> PreTrainedModel:
    """The model that stands for a hub id; the same weights every time."""
    model_class, config = MODELS[hub_id]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config())
