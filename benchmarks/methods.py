"""The methods that are compared, as configurations of PEFT: one table for all benchmarks."""

from collections.abc import Callable, Mapping
from typing import Any

from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    RandLoraConfig,
    RoadConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

from dvora import DVoRAConfig

Targets = str | list[str]


def peft_config(
    method: str, rank: int | None, targets: Targets, seed: int = 0, options: Mapping[str, Any] | None = None
) -> PeftConfig:
    """A method's configuration.

    Args:
        method: one of `METHODS`.
        rank: of the update, for methods that have one.
        targets: the adapted layers, as PEFT takes them.
        seed: of the random matrices, for methods that draw them from one of their own.
        options: further fields of the configuration.
    """
    return METHODS[method](rank, targets, seed, **(options or {}))


def _lora(rank: int, targets: Targets, seed: int, **options: Any) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **options)


def _dvora(rank: int, targets: Targets, seed: int, **options: Any) -> PeftConfig:
    return DVoRAConfig(r=rank, target_modules=targets, projection_seed=seed, **options)


METHODS: Mapping[str, Callable[..., PeftConfig]] = {
    "dvora": _dvora,
    # Nothing trained but the magnitudes: every target is in both lists, and the matrices are never made.
    "magnitude": lambda rank, targets, seed, **options: _dvora(1, targets, seed, magnitude_modules=targets, **options),
    "lora": _lora,
    "dora": lambda rank, targets, seed, **options: _lora(rank, targets, seed, use_dora=True, **options),
    "vera": lambda rank, targets, seed: VeraConfig(r=rank, target_modules=targets, projection_prng_key=seed),
    "randlora": lambda rank, targets, seed: RandLoraConfig(r=rank, target_modules=targets, projection_prng_key=seed),
    "ia3": lambda rank, targets, seed: IA3Config(target_modules=targets, feedforward_modules=[]),
    "road": lambda rank, targets, seed, **options: RoadConfig(target_modules=targets, **options),
    "vblora": lambda rank, targets, seed, **options: VBLoRAConfig(r=rank, target_modules=targets, **options),
    "unilora": lambda rank, targets, seed, **options: UniLoraConfig(
        r=rank, target_modules=targets, proj_seed=seed, **options
    ),
}
