"""The README.md beside what was trained: how to load it, its base, its data, how good it is."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ...adapter_file.card import NEEDS, is_name_on_hub
from ...text import shown, visible
from ..models.bases import AUTO_CLASSES, TASK_TYPES
from ..settings import Settings
from ..tasks.calibration import calibration_sentence
from ..tasks.metrics import metric_rows
from ..tasks.verdict import HEAD_SAVED

PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "IMAGE_CLS": "image-classification",
    "CAUSAL_LM": "text-generation",
}
"""The hub's names of tasks, by PEFT's."""
LIBRARIES = {"dvora": "dvora", "head": "dvora", "full": "transformers"}
"""What loads the result of a method; PEFT that of others."""
_README = """---
{front}
---

# {title}

## How to load it

{loading}

## What it is

{facts}

## How good it is

{metrics}

Made by `dvora train`; `run.json` in the folder above has the hashes of the data and every loss.
"""


def model_card(settings: Settings, record: Mapping[str, Any], labels: Sequence[str], config: Any) -> str:
    """The README.md of a finished run's adapter, or of its whole model; `config` is that of the base as trained."""
    is_here = Path(settings.model).exists()
    base = Path(settings.model).name if is_here else settings.model
    front = ModelCardData(
        # A folder here is nothing that a hub knows.
        base_model=settings.model if is_name_on_hub(settings.model) else None,
        base_model_relation="finetune" if settings.method == "full" else "adapter",
        library_name=LIBRARIES.get(settings.method, "peft"),
        pipeline_tag=PIPELINES[TASK_TYPES[settings.task]],
        tags=[settings.method, settings.task],
    )
    data = ", ".join(Path(path).name for path in settings.all_data)
    rows = ", ".join(f"{part} {count:,}" for part, count in record["data"]["rows"].items())
    facts = {
        "Base": base,
        "Method": settings.method
        + (f", rank {settings.rank}" if settings.rank else "")
        + (f", lambda_d in {settings.lambda_d_groups} groups" if settings.lambda_d_groups > 1 else ""),
        "Note": HEAD_SAVED if record.get("saved") == "head" else "",
        "Head": "fitted again to what the trained model gives" if record.get("head_fitted_again") else "",
        "Trained parameters": f"{record['trained_parameters']:,}",
        "Data": f"{data} (rows: {rows})",
        "Classes": ", ".join(labels),
        "Calibration": calibration_sentence(record["calibration"]) if "calibration" in record else "",
        "Texts are cut at": "" if settings.task == "image-classification" else f"{record['max_length']} tokens",
        "Steps": f"{record['steps']:,} (step {record['best_step']:,} was kept)",
        "Versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    return _README.format(
        front=front.to_yaml(),
        title=f"{_cell(base)} trained with {settings.method} for {settings.task}",
        loading="\n".join(_loading(settings, f"path/to/{base}" if is_here else base, labels, config)),
        facts="\n".join(f"- {name}: {_cell(text)}" for name, text in facts.items() if text),
        metrics="\n".join(_table(record["metrics"])),
    )


def _loading(settings: Settings, base: str, labels: Sequence[str], config: Any) -> list[str]:
    if settings.method == "head":
        return ["The head alone was trained (`head.safetensors`): `dvora predict RUN FILE` loads it onto the base."]
    auto = AUTO_CLASSES[TASK_TYPES[settings.task]].__name__
    options, names = "", list[str]()
    if labels:
        # No letter of a name may end the block of code.
        names = [f"labels = {json.dumps(list(labels)).replace('`', chr(92) + 'u0060')}"]
        options = ", id2label=dict(enumerate(labels)), label2id={name: index for index, name in enumerate(labels)}"
    if settings.task != "causal-lm":
        options += f"{'' if labels else ', num_labels=1'}, ignore_mismatched_sizes=True"
        if getattr(config, "pad_token_id", None) is not None:
            options += f", pad_token_id={config.pad_token_id}"
    folder = "path/to/this/folder"
    if settings.method == "full":
        code = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{folder}").eval()']
    else:
        code = [
            *["import dvora  # makes the method known to PEFT"] * (settings.method == "dvora"),
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            *names,
            f"base = {auto}.from_pretrained({json.dumps(base, ensure_ascii=False)}{options})",
            f'model = PeftModel.from_pretrained(base, "{folder}").eval()  # or its name on a hub',
        ]
    needs = [NEEDS, ""] if settings.method == "dvora" else []
    return [*needs, "```python", *code, "```"]


def _table(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    named = metric_rows(metrics)
    rows = [[name.replace("_", " ") for name in named[0]], ["---"] * len(named[0])] if named else []
    rows += [[_cell(shown(value)) for value in row.values()] for row in named]
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(text: str) -> str:
    """Text of a file that does nothing to the Markdown around it."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|" else letter for letter in visible(text))
