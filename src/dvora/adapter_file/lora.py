"""The factors of LoRA as PEFT saves them: A and B of `y + scaling B (A x)`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from peft import LoraConfig

from .content import FactorSizes
from .patterns import value_of
from .values_file import Shape

FACTORS = ("lora_A.weight", "lora_B.weight")
SETTINGS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "eva_config", "qalora_group_size", "megatron_core"),
}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it was."""


def lora_sizes(shapes: Mapping[str, Sequence[Shape]], config: LoraConfig) -> list[FactorSizes]:
    """What a file of LoRA has of each layer.

    Args:
        shapes: of A and B by layer.
        config: of the adapter.

    Raises:
        ValueError: it changes the base or biases, or the file is damaged.
    """
    if config.bias != "none":
        raise ValueError(f"bias={config.bias!r:.80} is not served beside adapters of DVoRA; merge the adapter")
    if (start := config.init_lora_weights) not in _PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights={start!r:.40} changes the base itself; convert the adapter to a plain one "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained), or merge it"
        )
    return [_sizes(name, of_A, of_B, config) for name, (of_A, of_B) in shapes.items()]


def _sizes(name: str, of_A: Shape, of_B: Shape, config: LoraConfig) -> FactorSizes:
    if len(of_A) != 2 or len(of_B) != 2 or of_A[0] != of_B[1]:
        raise ValueError(
            f"{name} has factors of shapes {of_A} and {of_B}, expected (r, in) and (out, r) of a linear layer"
        )
    (rank, in_features), (out_features, _) = of_A, of_B
    if rank != value_of(config.rank_pattern or {}, name, config.r):
        raise ValueError(f"{name} has rank {rank}, and another one in r or rank_pattern; save the adapter again")
    alpha = value_of(config.alpha_pattern or {}, name, config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return FactorSizes(name, "lora", in_features, out_features, rank, (scaling,))
