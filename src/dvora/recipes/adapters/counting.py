"""How many values an adapter has, DVoRA's beside LoRA's, from a model's configuration alone."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from ...checks import checked_groups
from ..models.bases import config_of, heads_of, model_class, quiet_transformers, without_memory


def count(
    source: str, targets: Sequence[str] = (), ranks: Sequence[int] = (), task_type: str | None = None, groups: int = 1
) -> dict[str, Any]:
    """Trained values, a head included, and their bytes in float32; only the configuration is read.

    Args:
        source: a folder, or the name of a model on the hub.
        targets: names of the layers to adapt; none means all linear layers.
        ranks: to count with; none means those that are usual for each method.
        task_type: PEFT's name of the task; None keeps the class that the model was saved with.
        groups: of inputs with a lambda_d each, of DVoRA.

    Raises:
        ValueError: there is no such model, a rank or a number of groups is none, a layer has fewer columns than groups,
            or no layer has such a name.
    """
    if wrong := [rank for rank in ranks if rank < 1]:
        raise ValueError(f"ranks must be positive, got {wrong[0]}")
    checked_groups(groups)
    config = config_of(source)
    model = without_memory(model_class(config, task_type), config)
    sizes, heads = {name: values.numel() for name, values in model.named_parameters()}, heads_of(model)
    total, head = sum(sizes.values()), sum(size for name, size in sizes.items() if name.split(".")[0] in heads)
    # PEFT adapts a linear head that it also trains whole, unless it is left out.
    excluded = [name for name, _ in model.named_modules() if name.split(".")[0] in heads]
    one = LoraConfig(r=1, target_modules=list(targets) or "all-linear", exclude_modules=excluded or None)
    with torch.device("meta"), quiet_transformers():
        lora = {n: values for n, values in get_peft_model(model, one).named_parameters() if "lora_" in n}
    for name, values in lora.items():
        if "_A." in name:
            # A of rank one has as many values as the weight has columns.
            checked_groups(groups, values.numel(), name.partition(".lora_")[0].removeprefix("base_model.model."))
    layers, outputs = len(lora) // 2, sum(len(values) for name, values in lora.items() if "_B." in name)
    trained = [("dvora", rank, 2 * outputs + layers * groups * rank + head) for rank in ranks or (16, 64, 256)]
    trained += [("lora", rank, rank * sum(map(torch.numel, lora.values())) + head) for rank in ranks or (1, 8, 16)]
    rows = [
        {"method": method, "rank": rank, "trained": values, "share": values / total, "bytes": 4 * values}
        for method, rank, values in (*trained, ("full", None, total))
    ]
    return {"parameters": total, "head": head, "layers": layers, "counts": rows}
