"""Stand-ins for FLUX.2-klein and DINOv2: the same classes with random weights and some hundred thousand parameters."""

from pathlib import Path

import torch
from diffusers import (  # type: ignore[import-not-found, unused-ignore]
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

END = "<|endoftext|>"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
TEXT_WIDTH, TEXT_LAYERS = 16, 3


def write_image_models(folder: Path, pipeline: Path) -> None:
    """Save both models.

    Args:
        folder: the task's; DINOv2 goes to `stand-in/dino` there.
        pipeline: for the pipeline, as `from_pretrained` reads it.
    """
    torch.manual_seed(0)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(),
        transformer=_transformer(),
    ).save_pretrained(pipeline)
    dino = folder / "stand-in" / "dino"
    Dinov2Model(_dino()).save_pretrained(dino)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(dino)


def _transformer() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        # The script joins the outputs of three layers of the text encoder.
        joint_attention_dim=3 * TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def _autoencoder() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=32,
    )


def _dino() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=14,
    )


def _text_encoder() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def _tokenizer() -> Qwen2Tokenizer:
    """Bytes for tokens."""
    vocabulary = {letter: number for number, letter in enumerate([END, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
