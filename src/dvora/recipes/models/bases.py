"""Base models with their tokenizers and image processors: loaded with the task's head, and where they compute."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..files import check_no_device
from ..run_folder import local_rank
from ..settings import NOTHING, Settings, Task, Trust
from .hub import check_weights, loading

_ADVICE = "; if you trust its author, give --trust-remote-code", "give --download to have it fetched"

MODEL_CLASSES: dict[Task, type] = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "sentence-pairs": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")


@dataclass(frozen=True)
class Base:
    """A base model with the head of its task.

    Args:
        model: with the labels in its configuration.
        heads: names of the modules that the task adds to the base; trained and saved whole by every method.
        new: names of the modules whose values are random, since the model's file has none for them.
        notes: what was made new, for whoever starts the run.
    """

    model: Any
    heads: tuple[str, ...]
    new: frozenset[str]
    notes: tuple[str, ...]


def load_processor(settings: Settings, trust: Trust = NOTHING) -> Any:
    """The tokenizer of a run, or its image processor.

    Args:
        settings: of the run.
        trust: what is allowed to get it.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    # A folder without a model has no tokenizer either; report the model first.
    check_model_folder(settings.model)
    source = settings.tokenizer or settings.model
    kind = transformers.AutoImageProcessor if settings.task == "image-classification" else transformers.AutoTokenizer
    images = settings.task == "image-classification"
    files = ("preprocessor_config.json", "processor_config.json") if images else TOKENIZER_FILES
    name = "image processor" if images else "tokenizer"
    folder = Path(source)
    if folder.is_dir() and not any(True for pattern in files for _ in folder.glob(pattern)):
        raise ValueError(f"{source} holds no {name} ({', '.join(files)}); give its folder with `tokenizer`")
    check_model_files(source)
    with loading(f"the {name}", source, trust, *_ADVICE):
        processor = kind.from_pretrained(source, **trust.options)
    if not images and processor.pad_token is None:
        if processor.eos_token is None:
            raise ValueError(f"the tokenizer of {source} has neither a token to pad with nor one that ends a text")
        processor.pad_token = processor.eos_token
    return processor


def load_base(settings: Settings, labels: Sequence[str], pad_token_id: int | None, trust: Trust = NOTHING) -> Base:
    """The model of a run before training; new layers are made from the run's seed.

    Args:
        settings: of the run.
        labels: names of the classes; empty where numbers or tokens are predicted.
        pad_token_id: the tokenizer's, None for images.
        trust: what is allowed to get it.

    Raises:
        ValueError: it is no model, cannot be fetched, or has no safetensors weights.
    """
    source = settings.model
    check_model_folder(source)
    check_weights(source)
    with loading("the model", source, trust, *_ADVICE):
        options = _head_options(settings.task, labels)
        config = transformers.AutoConfig.from_pretrained(source, **trust.options, **options)
        if pad_token_id is not None:
            config.pad_token_id = pad_token_id
        with quiet_transformers(), torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            model, info = MODEL_CLASSES[settings.task].from_pretrained(  # type: ignore[attr-defined]
                source,
                config=config,
                dtype=getattr(torch, settings.base_dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **trust.options,
            )
    new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    if settings.task == "causal-lm":
        if new:
            raise ValueError(f"{source} is no language model: it has no weights for {', '.join(sorted(new)[:3])}")
        return Base(model, (), frozenset(), ())
    heads = _heads(model, new)
    notes = [f"new layers: {', '.join(heads)}"] if new else [f"the head of {source} is trained on: {', '.join(heads)}"]
    return Base(model, heads, frozenset(key.rpartition(".")[0] for key in new), tuple(notes))


def _head_options(task: Task, labels: Sequence[str]) -> dict[str, Any]:
    """The model configuration's entries for the labels."""
    if task == "causal-lm":
        return {}
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def _heads(model: nn.Module, new: set[str]) -> tuple[str, ...]:
    """The modules beside the base, and those in the base that its weights lack."""
    base = model.base_model_prefix
    beside = [name for name, module in model.named_children() if name != base and [*module.parameters()]]
    lacking = {key.rpartition(".")[0] for key in new if key.partition(".")[0] == base}
    return (*beside, *sorted(lacking))


def check_model_folder(source: str) -> None:
    """Check that a model that is no name on the hub is a folder with a model's configuration.

    Raises:
        ValueError: it is a file, or a folder of something else, or of more than a model.
    """
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file; a model is a folder with config.json and safetensors weights")
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"{source} holds an adapter, not a model; name its base")
        raise ValueError(f"{source} holds no config.json, so it is no model folder")
    if (folder / "adapter_config.json").exists():
        # transformers would load another base, which the adapter names, in place of the model beside it.
        raise ValueError(f"{source} holds an adapter beside the model; a model's folder has to be without one")
    check_model_files(source)


def check_model_files(source: str) -> None:
    """Refuse a model's or a tokenizer's folder with pipes and devices, which transformers would wait for.

    Raises:
        ValueError: there is one.
    """
    folder = Path(source)
    for path in folder.iterdir() if folder.is_dir() else ():
        check_no_device(path)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' reports and progress bars; what matters of them is in `Base.notes`."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for a flag by its old name, and transformers 4 knows no other.
            warnings.filterwarnings("ignore", message=r"`\w*gradient_checkpointing\w*` is deprecated")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def device_of(settings: Settings) -> torch.device:
    """The accelerator of this process, if there is one and the run does not keep to the CPU."""
    found = None if settings.cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    return torch.device("cpu") if found is None else torch.device(found.type, local_rank())


@contextmanager
def computing(settings: Settings) -> Iterator[None]:
    """Compute outputs in the run's precision, quietly."""
    device = device_of(settings)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.mixed_precision)
    # The Trainer has no float16 on CPUs, so no run was made with it there.
    wanted = half is not None and not (half is torch.float16 and device.type == "cpu")
    with quiet_transformers(), torch.no_grad(), torch.autocast(device.type, half, enabled=wanted):
        yield
