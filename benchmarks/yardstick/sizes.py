"""How many parameters our experiments train, from the layer sizes that the models' configurations give."""

from collections.abc import Mapping

from benchmarks.yardstick.experiments import RANK, Experiment

WIDTH, INNER, KEYS, BLOCKS = 3072, 8192, 8 * 128, 28
"""Llama-3.2-3B: hidden size, intermediate size, 8 key-value heads of 128, layers."""
FLUX_WIDTH, FLUX_INNER, DOUBLE, SINGLE = 24 * 128, 3 * 24 * 128, 5, 20
"""FLUX.2-klein-base-4B: 24 heads of 128, a feed-forward three times as wide, double and single blocks."""

Outputs = Mapping[str, tuple[int, int]]
"""By module: the outputs of a layer, and how many layers of the name there are."""

OUTPUTS: dict[str, Outputs] = {
    "MetaMathQA": {
        **dict.fromkeys(("q_proj", "o_proj", "down_proj"), (WIDTH, BLOCKS)),
        **dict.fromkeys(("k_proj", "v_proj"), (KEYS, BLOCKS)),
        **dict.fromkeys(("gate_proj", "up_proj"), (INNER, BLOCKS)),
    },
    "image-gen": {
        **dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), (FLUX_WIDTH, DOUBLE)),
        **dict.fromkeys(("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), (FLUX_WIDTH, DOUBLE)),
        # Two feed-forward networks a double block, whose first layers make gate and value at once.
        "linear_in": (2 * FLUX_INNER, 2 * DOUBLE),
        "linear_out": (FLUX_WIDTH, 2 * DOUBLE),
        "to_qkv_mlp_proj": (3 * FLUX_WIDTH + 2 * FLUX_INNER, SINGLE),
    },
}


def trained_parameters(experiment: Experiment, outputs: Outputs | None = None) -> int:
    """The parameters that an experiment trains: of each layer a magnitude and a lambda_b an output, a lambda_d a rank.

    Args:
        experiment: one of ours.
        outputs: of the model's layers; None means those of the task's model.
    """
    layers = OUTPUTS[experiment.task] if outputs is None else outputs
    return sum(count * (2 * width + RANK) for width, count in (layers[name] for name in experiment.target_modules))


def vera_parameters(experiment: Experiment, rank: int) -> int:
    """What VeRA trains on the same layers: a lambda_b an output, a lambda_d a rank; PEFT's rows say it too."""
    layers = OUTPUTS[experiment.task]
    return sum(count * (width + rank) for width, count in (layers[name] for name in experiment.target_modules))
