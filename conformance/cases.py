"""Cases beyond LoRA's and VeRA's: options of DVoRA's own, and layers that only other methods are tested with."""

from typing import Any

from dvora import DVoRAConfig

_CUSTOM: dict[str, tuple[str, dict[str, Any]]] = {
    "MLP rank above the layers' sizes": ("MLP", {"target_modules": ["lin0", "lin1"], "r": 64}),
    "MLP direction weight": ("MLP", {"target_modules": ["lin0", "lin1"], "direction": "weight", "alpha": 4, "r": 8}),
    "MLP detached norm": ("MLP", {"target_modules": ["lin0", "lin1"], "detach_norm": True, "r": 8}),
    "MLP dropout and d_initial": ("MLP", {"target_modules": ["lin0"], "dvora_dropout": 0.1, "d_initial": 0.5, "r": 8}),
    "MLP all-linear": ("MLP", {"target_modules": "all-linear", "r": 8}),
    "MLP excluded": ("MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin0"], "r": 8}),
    "MLP rank and alpha patterns": (
        "MLP",
        {"target_modules": ["lin0", "lin1"], "r": 8, "rank_pattern": {"lin0": 3}, "alpha_pattern": {"lin1": 2.0}},
    ),
    "MLP all trained": ("MLP", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"], "r": 8}),
    "MLP with LayerNorm": (
        "MLP_LayerNorm",
        {"target_modules": ["lin0"], "modules_to_save": ["layernorm1"], "r": 8},
    ),
    "MLP2": ("MLP2", {"target_modules": ["lin0", "lin1"], "r": 8}),
    "Conv1d bigger": ("Conv1dBigger", {"target_modules": ["conv1d"], "r": 8}),
    "Conv1d groups": ("Conv1dGroups", {"target_modules": ["conv1d"], "r": 8}),
    "Conv2d 1x1": ("Conv2d1x1", {"target_modules": ["conv2d"], "r": 8}),
    "Conv2d2": ("Conv2d2", {"target_modules": ["lin0", "conv2d", "lin1"], "r": 8}),
    "Conv2d direction weight": ("Conv2d", {"target_modules": ["conv2d"], "direction": "weight", "r": 8}),
    "Conv3d detached norm": ("Conv3d", {"target_modules": ["conv3d"], "detach_norm": True, "r": 8}),
    "Embedding direction weight": ("EmbConv1D", {"target_modules": ["emb"], "direction": "weight", "r": 8}),
    "MHA direction weight": ("MHA", {"target_modules": ["mha"], "direction": "weight", "r": 8}),
    "MLP groups": ("MLP", {"target_modules": ["lin0", "lin1"], "lambda_d_groups": 3, "r": 8}),
    "Conv2d groups of lambda_d": ("Conv2d", {"target_modules": ["conv2d"], "lambda_d_groups": 3, "r": 8}),
    "Embedding groups": ("EmbConv1D", {"target_modules": ["emb"], "lambda_d_groups": 3, "r": 8}),
    "MHA groups": ("MHA", {"target_modules": ["mha"], "lambda_d_groups": 4, "r": 8}),
    "nn.Parameter and its module": (
        "MLP",
        {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"], "direction": "weight", "r": 8},
    ),
}
_LINES = {"target_modules": ["lin0"], "init_weights": False}
_SEVERAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Different seeds": (_LINES, {**_LINES, "projection_seed": 1}),
    "Different ranks": ({**_LINES, "r": 8}, {**_LINES, "r": 16}),
    "Different groups": (_LINES, {**_LINES, "lambda_d_groups": 2}),
    "Different directions": (_LINES, {**_LINES, "direction": "weight"}),
    "Overlapping": ({**_LINES, "target_modules": ["lin0", "lin1"]}, {**_LINES, "target_modules": ["lin1"]}),
}


def further_rows(names: str, rows: list[Any]) -> list[Any]:
    """Rows to add to a list of cases, which is recognised by the names of its parameters.

    Args:
        names: of the parameters, as given to `pytest.mark.parametrize`.
        rows: DVoRA's rows in it so far.
    """
    match names.replace(" ", ""):
        case "test_name,model_id,config_cls,config_kwargs":
            return [(name, model, DVoRAConfig, options) for name, (model, options) in _CUSTOM.items()]
        case "test_name,tuner_method,config_cls,config_kwargs_1,config_kwargs_2":
            return [(name, "dvora", DVoRAConfig, first, second) for name, (first, second) in _SEVERAL.items()]
        case "config_cls,config_kwargs" if "task_type" in rows[0][1]:
            task = rows[0][1]["task_type"]
            return [(DVoRAConfig, {"task_type": task, "target_modules": "all-linear", "direction": "weight", "r": 16})]
        case _:
            return []
