"""Every encoder and decoder class of transformers that a tiny configuration makes, and why others are left out."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "image_size"), 8),
    **{
        "vocab_size": 97,
        "mamba_d_ssm": 64,
        "num_key_value_heads": 2,
        "type_vocab_size": 2,
        "patch_size": 4,
        "num_experts_per_tok": 2,
    },
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "chunk_size", "max_seqlen"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_chunk_size"), 8),
    **{"moe_intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
MOST_PARAMETERS, MOST_SECONDS = 2 * 10**7, 0.1
"""Of a pass, some forty of which are made of each: the loops of linear attention take longer in plain Python."""
ROWS, TOKENS = 11, 7
"""Of a batch: no other size is one of these."""


class LeftOutError(Exception):
    """Why a class is not compared."""


def kinds() -> list[str]:
    """Of all models in transformers, by their type."""
    return sorted(CONFIG_MAPPING.keys())


def family_of(kind: str) -> str:
    """The folder of its files in transformers."""
    return str(CONFIG_MAPPING[kind].__module__.split(".")[2])


def tiny(kind: str) -> nn.Module:
    """The model of a type, in a size for tests, whose rows are what they are alone.

    Raises:
        LeftOutError: there is none.
    """
    try:
        config_class = CONFIG_MAPPING[kind]
        if config_class not in MODEL_MAPPING:
            raise LeftOutError("it is a part of another model, or has no plain model of its own")
        config = config_class()
        _shrink(config)
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise LeftOutError(f"its configuration has sizes of other names: {size / 1e6:.0f} million parameters")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = transformers.AutoModel.from_config(config).eval().requires_grad_(False)
            for parameter in model.parameters():
                # transformers starts with biases of zero and tables of hardly anything, which would hide differences.
                if parameter.is_floating_point():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        if model.main_input_name not in ("input_ids", "pixel_values"):
            raise LeftOutError(f"it takes {model.main_input_name}, neither texts nor images")
        batch = inputs(model, ROWS)
        started = time.process_time()
        outputs = states(model, batch)
        if time.process_time() - started > MOST_SECONDS:
            raise LeftOutError(f"a pass takes more than {MOST_SECONDS} s")
        if len(outputs) != ROWS or not outputs.is_floating_point():
            raise LeftOutError("its first output has no rows")
        for row in range(ROWS):
            alone = states(model, {name: value[row : row + 1] for name, value in batch.items()})
            if not torch.allclose(alone[0], outputs[row], rtol=1e-4, atol=1e-4):
                raise LeftOutError("a row of the base alone is not what it is in a batch")
    except LeftOutError:
        raise
    except Exception as error:  # whatever any class of transformers may raise
        raise LeftOutError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
        ) from error
    return model


def inputs(model: nn.Module, rows: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Texts, or images, that all differ."""
    generator = torch.Generator().manual_seed(rows)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 8)
        return {
            "pixel_values": torch.randn(rows, getattr(model.config, "num_channels", 3), size, size, generator=generator)
        }
    ids = torch.randint(5, 90, (rows, tokens), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :4] + 1} if model.config.is_encoder_decoder else {})}


def states(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The first output."""
    with torch.no_grad():
        outputs = model(**batch)
    first = outputs[0] if not isinstance(outputs, dict) else next(iter(outputs.values()))
    if not isinstance(first, Tensor):
        raise LeftOutError("its first output is no tensor")
    return first


def _shrink(config: PreTrainedConfig) -> None:
    for name, size in SIZES.items():
        value = vars(config).get(name)
        if (isinstance(value, int) and not isinstance(value, bool)) or (name == "head_dim" and name in vars(config)):
            setattr(config, name, size)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value)
        elif name in ("layer_types", "layers_block_type") and isinstance(value, list):
            setattr(config, name, value[:3])
        elif name in ("attention_window", "block_size") and value:
            setattr(config, name, 4)
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            # Half of a head's 8 dimensions.
            value["mrope_section"] = [2, 1, 1]
    if "use_cache" in vars(config):
        config.use_cache = False
