"""How many parameters our experiments train, from the layer sizes that the models' configurations give."""

from collections.abc import Mapping

from benchmarks.yardstick.experiments import RANK, Experiment
from benchmarks.yardstick.tasks import METHOD

WIDTH, INNER, KEYS, BLOCKS = 3072, 8192, 8 * 128, 28
"""Llama-3.2-3B: hidden size, intermediate size, 8 key-value heads of 128, layers."""
FLUX_WIDTH, FLUX_INNER, DOUBLE, SINGLE = 24 * 128, 3 * 24 * 128, 5, 20
"""FLUX.2-klein-base-4B: 24 heads of 128, a feed-forward three times as wide, double and single blocks."""

Layers = Mapping[str, tuple[int, int, int]]
"""By module: the inputs and outputs of a layer, and how many layers of the name there are."""

LAYERS: dict[str, Layers] = {
    "MetaMathQA": {
        **dict.fromkeys(("q_proj", "o_proj"), (WIDTH, WIDTH, BLOCKS)),
        **dict.fromkeys(("k_proj", "v_proj"), (WIDTH, KEYS, BLOCKS)),
        **dict.fromkeys(("gate_proj", "up_proj"), (WIDTH, INNER, BLOCKS)),
        "down_proj": (INNER, WIDTH, BLOCKS),
    },
    "image-gen": {
        **dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), (FLUX_WIDTH, FLUX_WIDTH, DOUBLE)),
        **dict.fromkeys(("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), (FLUX_WIDTH, FLUX_WIDTH, DOUBLE)),
        # Two feed-forward networks a double block, whose first layers make gate and value at once.
        "linear_in": (FLUX_WIDTH, 2 * FLUX_INNER, 2 * DOUBLE),
        "linear_out": (FLUX_INNER, FLUX_WIDTH, 2 * DOUBLE),
        "to_qkv_mlp_proj": (FLUX_WIDTH, 3 * FLUX_WIDTH + 2 * FLUX_INNER, SINGLE),
    },
}


def trained_parameters(experiment: Experiment, layers: Layers | None = None) -> int:
    """The parameters that an experiment trains.

    Of each layer DVoRA has a magnitude and a lambda_b an output, and a lambda_d a rank; LoRA r=1 has one an input and
    one an output.

    Args:
        experiment: one of ours.
        layers: of the model; None means those of the task's model.
    """
    sizes = LAYERS[experiment.task] if layers is None else layers
    targets = [sizes[name] for name in experiment.target_modules]
    if experiment.method == METHOD:
        return sum(count * (2 * outputs + RANK) for _, outputs, count in targets)
    return sum(count * (inputs + outputs) for inputs, outputs, count in targets)
