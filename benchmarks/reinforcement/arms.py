"""The adapters that are compared, and the learning rates that are tried."""

from collections.abc import Callable, Mapping

from peft import LoraConfig, PeftConfig, VeraConfig

from benchmarks.quality.adapting import magnitude_only
from dvora import DVoRAConfig

EVERY_LAYER = r".*\.([qkvo]|gate|up|down)_proj"

ARMS: Mapping[str, Callable[[int], PeftConfig | None]] = {
    "structured_r64": lambda seed: DVoRAConfig(
        r=64, target_modules="all-linear", projection_init="structured", projection_seed=seed
    ),
    "dvora_r256": lambda seed: DVoRAConfig(
        r=256, target_modules="all-linear", projection_init="kaiming_uniform", projection_seed=seed
    ),
    "magnitude": lambda seed: magnitude_only(EVERY_LAYER),
    "vera_r256": lambda seed: VeraConfig(r=256, target_modules="all-linear", projection_prng_key=seed),
    "lora_r1": lambda seed: LoraConfig(r=1, lora_alpha=2, target_modules="all-linear"),
    "lora_r16": lambda seed: LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    "dora_r8": lambda seed: LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear"),
    "full": lambda seed: None,
}
"""The adapters, by the names in the result file; None trains the whole model."""
BASE = "base"
"""The model without an adapter, by its name in the result file."""
RATES: Mapping[str, tuple[float, ...]] = {
    "structured_r64": (0.001, 0.003, 0.01),
    "dvora_r256": (0.001, 0.003, 0.01),
    "magnitude": (0.001, 0.003, 0.01),
    "vera_r256": (0.01, 0.03, 0.1),
    "lora_r1": (0.0003, 0.001, 0.003),
    "lora_r16": (0.0001, 0.0003, 0.001),
    "dora_r8": (0.0001, 0.0003, 0.001),
    "full": (0.000003, 0.00001, 0.00003),
}
"""Learning rates that are tried, as many for each."""
