"""Our experiments, and the folders that hold them in PEFT's layout: python -m benchmarks.yardstick.experiments

PEFT's scripts have one learning rate for all that is trained. DVoRA wants two, that of the magnitude lower, so the
configuration holds their ratio. With `lambda_b = k b` and `lambda_d = k d`, a step of AdamW on `b` and `d` is one of k
times the rate on `lambda_b` and `lambda_d`. Training b and d is training a DVoRA of `alpha = k^2 r` that starts with
`d_initial / k`: the same function, with the magnitude's rate for all.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.yardstick.tasks import EXPERIMENTS, METHOD
from dvora.training import MAGNITUDE_SHARE

RANK = 256
ADAPTER_FILE = "adapter_config.json"
TRAINING_FILE = "training_params.json"
QUERY_VALUE = ("q_proj", "v_proj")
KEY_VALUE = ("k_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IMAGE_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_qkv_mlp_proj", "linear_in", "linear_out"),
)
"""Those of PEFT's experiments with VeRA and LoRA."""
LORA = {
    **{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True},
    **{"use_dora": False, "use_rslora": False},
}
"""LoRA r=1, as PEFT's own experiments have it of other ranks."""
LORA_WEIGHT_DECAY = {"MetaMathQA": 0.1, "image-gen": 0.0001}
"""PEFT's default of each task."""


@dataclass(frozen=True)
class Experiment:
    """One folder.

    Args:
        task: of PEFT's comparison.
        name: of the folder.
        target_modules: the layers that are adapted.
        rate: of lambda_b and lambda_d, or of LoRA.
        projection_init: the distribution of the shared matrices.
        task_type: as PEFT names it, or None.
        row_norm: the median norm of the rows that are adapted, to which the magnitude's rate is proportional.
        method: "dvora", or "lora" of rank 1, which has neither matrices nor magnitude.
    """

    task: str
    name: str
    target_modules: tuple[str, ...]
    rate: float = 0.01
    projection_init: str = "kaiming_uniform"
    task_type: str | None = "CAUSAL_LM"
    row_norm: float = 1.0
    method: str = METHOD

    @property
    def full_name(self) -> str:
        """The method and the folder, as PEFT's tables name an experiment."""
        return f"{self.method}/{self.name}"

    @property
    def magnitude_rate(self) -> float:
        """The magnitude's rate, as `dvora.training.recommended_rates` would give it for such rows."""
        return MAGNITUDE_SHARE * self.row_norm * self.rate


CATALOGUE = (
    Experiment("MetaMathQA", "llama-3.2-3B-rank256-target-qv", QUERY_VALUE),
    Experiment("MetaMathQA", "llama-3.2-3B-rank256-target-qv-structured", QUERY_VALUE, projection_init="structured"),
    Experiment("MetaMathQA", "llama-3.2-3B-rank256-all-linear", ALL_LINEAR),
    Experiment("MetaMathQA", "llama-3.2-3B-rank256-all-linear-structured", ALL_LINEAR, projection_init="structured"),
    # As many parameters as VeRA has on query and value, and fewer than (IA)3 has on all linear layers.
    Experiment("MetaMathQA", "llama-3.2-3B-rank256-target-kv", KEY_VALUE),
    Experiment("MetaMathQA", "llama-3.2-3B-rank256-target-qvo-down", (*QUERY_VALUE, "o_proj", "down_proj")),
    # Without warm-up or decay, as PEFT's experiments there: half of the rate.
    Experiment("image-gen", "flux2-klein-rank256", IMAGE_LAYERS, rate=0.005, task_type=None),
    Experiment("image-gen", "flux2-klein-rank256-structured", IMAGE_LAYERS, 0.005, "structured", None),
    # LoRA on PEFT's default layers, and on all.
    Experiment("MetaMathQA", "llama-3.2-3B-rank1", QUERY_VALUE, rate=0.0015, method="lora"),
    Experiment("MetaMathQA", "llama-3.2-3B-rank1-all-linear", ALL_LINEAR, rate=0.0015, method="lora"),
    Experiment("image-gen", "flux2-klein-rank1", IMAGE_LAYERS, rate=0.00075, task_type=None, method="lora"),
)


def folder_of(experiment: Experiment) -> Path:
    """Where an experiment's two files are."""
    return EXPERIMENTS / experiment.task / experiment.full_name


def of_task(task: str) -> list[Experiment]:
    """The experiments of a task."""
    return [experiment for experiment in CATALOGUE if experiment.task == task]


def adapter_config(experiment: Experiment) -> dict[str, Any]:
    """What `adapter_config.json` holds: of DVoRA every setting, so that later defaults change no experiment."""
    from dvora import DVoRAConfig

    if experiment.method != METHOD:
        return LORA | {"target_modules": [*experiment.target_modules], "task_type": experiment.task_type}
    scale = experiment.rate / experiment.magnitude_rate
    config = DVoRAConfig(
        r=RANK,
        alpha=round(scale**2 * RANK),
        d_initial=round(0.1 / scale, 6),
        target_modules=list(experiment.target_modules),
        projection_init=experiment.projection_init,
        task_type=experiment.task_type,
    )
    # Of the machine that writes the file.
    return {name: value for name, value in sorted(config.to_dict().items()) if name != "peft_version"}


def training_params(experiment: Experiment) -> dict[str, Any]:
    """What `training_params.json` holds: the optimizer's arguments, all else as PEFT has it."""
    if experiment.method != METHOD:
        decay = LORA_WEIGHT_DECAY[experiment.task]
        return {"optimizer_kwargs": {"lr": experiment.rate, "weight_decay": decay}}
    # Decay would pull the magnitude, which starts at the norms of the rows, to zero.
    return {"optimizer_kwargs": {"lr": round(experiment.magnitude_rate, 6), "weight_decay": 0.0}}


def write(experiment: Experiment) -> None:
    """Write an experiment's two files."""
    folder = folder_of(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (ADAPTER_FILE, adapter_config(experiment)),
        (TRAINING_FILE, training_params(experiment)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for each in CATALOGUE:
        write(each)
