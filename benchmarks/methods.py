"""The methods that are compared, as configurations of PEFT: one table for all benchmarks."""

from collections.abc import Callable, Mapping
from typing import Any

from peft import (
    C3AConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TinyLoraConfig,
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
    # Of these the rank is what sets their size.
    "lokr": lambda rank, targets, seed: LoKrConfig(r=rank, alpha=rank, target_modules=targets),
    "oft": lambda size, targets, seed: OFTConfig(r=0, oft_block_size=size, target_modules=targets),
    # C3A and FourierFT are the base at the start if `init_weights` says so.
    "c3a": lambda size, targets, seed: C3AConfig(block_size=size, target_modules=targets, init_weights=True),
    "shira": lambda rank, targets, seed: ShiraConfig(r=rank, target_modules=targets, random_seed=seed),
    "fourierft": lambda count, targets, seed: FourierFTConfig(
        n_frequency=count, target_modules=targets, random_loc_seed=seed, init_weights=True
    ),
    "tinylora": lambda rank, targets, seed, **options: TinyLoraConfig(
        r=rank, target_modules=targets, projection_seed=seed, **options
    ),
    "ln_tuning": lambda rank, targets, seed: LNTuningConfig(target_modules=targets),
    "vblora": lambda rank, targets, seed, **options: VBLoRAConfig(r=rank, target_modules=targets, **options),
    "unilora": lambda rank, targets, seed, **options: UniLoraConfig(
        r=rank, target_modules=targets, proj_seed=seed, **options
    ),
}
