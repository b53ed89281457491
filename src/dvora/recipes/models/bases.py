"""Base models: their class and weights, with the head of a task, their tokenizers, and where they compute."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..files import check_readable
from ..run_folder import local_rank
from ..settings import NAMED, NOTHING, Settings, Task, Trust
from .hub import check_model_folder, loading

AUTO_CLASSES: Mapping[str, Any] = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    "IMAGE_CLS": transformers.AutoModelForImageClassification,
}
"""By PEFT's names of tasks; it has none for images."""
TASK_TYPES: Mapping[Task, str] = {
    "text-classification": "SEQ_CLS",
    "sentence-pairs": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "image-classification": "IMAGE_CLS",
    "causal-lm": "CAUSAL_LM",
}
NO_LIMIT = 10**6
"""Tokenizers without a limit give a number beyond this."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
COUNTED_FROM_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Types of models whose first token has the position after that of the padding's id."""
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


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

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    # A folder without a model has no tokenizer either; report the model first.
    check_model_folder(settings.model)
    source, images = settings.tokenizer or settings.model, settings.task == "image-classification"
    name, files = ("image processor", IMAGE_PROCESSOR_FILES) if images else ("tokenizer", TOKENIZER_FILES)
    if lacks(source, files):
        raise ValueError(f"{source} holds no {name} ({', '.join(files)}); give its folder with `tokenizer`")
    if images:
        with loading(f"the {name}", source, trust):
            return transformers.AutoImageProcessor.from_pretrained(source, **trust.options)
    tokenizer = load_tokenizer(source, trust)
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has neither a token to pad with nor one that ends a text")
    return tokenizer


def lacks(source: str, files: Sequence[str]) -> bool:
    """Whether a model is a folder with none of the files, which may be patterns."""
    folder = Path(source)
    return folder.is_dir() and not any(True for pattern in files for _ in folder.glob(pattern))


def load_tokenizer(source: str, trust: Trust) -> Any:
    """The tokenizer of a model, which pads with the token that ends a text if it has none to pad with."""
    with loading("the tokenizer", source, trust):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **trust.options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def longest_text(tokenizer: Any, config: Any) -> int:
    """Tokens that a tokenizer and a model of that configuration can take; NO_LIMIT if neither says."""
    # Absent where positions are not counted.
    positions = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    if config.model_type in COUNTED_FROM_PADDING:
        positions -= config.pad_token_id + 1
    return int(min(NO_LIMIT, tokenizer.model_max_length, positions))


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
    source, task_type = settings.model, TASK_TYPES[settings.task]
    config = config_of(source, trust)
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    if task_type != "CAUSAL_LM":
        config.problem_type = "single_label_classification" if labels else "regression"
        config.num_labels = 1
        set_labels(config, labels)
    dtype = getattr(torch, settings.base_dtype)
    model, new = load_model(source, AUTO_CLASSES[task_type], config, dtype, settings.seed, trust)
    if task_type == "CAUSAL_LM":
        if new:
            raise ValueError(f"{source} is no language model: it has no weights for {', '.join(sorted(new)[:3])}")
        return Base(model, (), frozenset(), ())
    modules = frozenset(key.rpartition(".")[0] for key in new)
    task_heads = heads_of(model)
    heads = (*task_heads, *sorted(name for name in modules if name.partition(".")[0] not in task_heads))
    note = f"new layers: {', '.join(heads)}" if new else f"the head of {source} is trained on: {', '.join(heads)}"
    return Base(model, heads, modules, (note,))


def config_of(source: str, trust: Trust = NAMED) -> Any:
    """The configuration of a model, a folder or a name on the hub.

    Raises:
        ValueError: there is none.
    """
    check_model_folder(source)
    with loading("the model", source, trust):
        return transformers.AutoConfig.from_pretrained(source, **trust.options)


def set_labels(config: Any, labels: Sequence[str]) -> None:
    """Name a configuration's classes, where there are names."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}


def model_class(config: Any, task_type: str | None = None, class_name: str | None = None) -> Any:
    """The class to load a model with: that of the task, that of the name, or the one that the model was saved with.

    Raises:
        ValueError: the task is unknown, or the name is that of no model.
    """
    if task_type is not None:
        if task_type not in AUTO_CLASSES:
            raise ValueError(f"unknown task type {task_type!r}, expected one of {', '.join(AUTO_CLASSES)}")
        return AUTO_CLASSES[task_type]
    for name in (class_name, *(config.architectures or ())):
        # transformers imports its classes at their first use.
        if isinstance(model := getattr(transformers, name or "", None), type):
            if not issubclass(model, transformers.PreTrainedModel):
                raise ValueError(f"the model's class is said to be transformers' {name}, which is no model")
            return model
    return transformers.AutoModel


def load_model(
    source: str, model_class: Any, config: Any, dtype: torch.dtype | str = "auto", seed: int = 0, trust: Trust = NAMED
) -> tuple[Any, set[str]]:
    """A model with its weights, and the names of the values that its files lack, which are random.

    Args:
        source: a folder, or the name of a model on the hub.
        model_class: of `model_class`.
        config: of the model; may ask for another head.
        dtype: of its weights; "auto" means as they are stored.
        seed: of the random values; the global generator is left alone.
        trust: whether it may be fetched, and its own code run.

    Raises:
        OSError: a file may not be read.
        ValueError: its weights cannot be read, or are pickled.
    """
    if Path(source).is_dir():
        weights = [*Path(source).glob("*.safetensors")]
        if not weights:
            raise ValueError(
                f"{source} holds no safetensors weights; pickled ones (*.bin) are never loaded: save the model once "
                "with save_pretrained"
            )
        check_readable(weights)
    options = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with loading("the model", source, trust), quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model, info = model_class.from_pretrained(source, config=config, **options, **trust.options)
    return model, {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}


def without_memory(model_class: Any, config: Any, trust: Trust = NOTHING) -> nn.Module:
    """A model on the meta device: names and shapes without memory."""
    with torch.device("meta"), quiet_transformers():
        # The automatic classes look the class up, the others are one.
        automatic = model_class.__name__.startswith("Auto")
        options = {"trust_remote_code": trust.code}
        model: nn.Module = model_class.from_config(config, **options) if automatic else model_class(config)
    return model.float()


def heads_of(model: nn.Module) -> list[str]:
    """The modules that a task adds to a base, such as a classifier; none for what a language model brings itself."""
    if not isinstance(model, transformers.PreTrainedModel) or model.get_output_embeddings() is not None:
        return []
    children, base = dict(model.named_children()), model.base_model_prefix
    if base not in children:
        return []
    return [name for name, module in children.items() if name != base and any(True for _ in module.parameters())]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' reports and progress bars; what matters of them is in `Base.notes`."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Of one library for another: PEFT 0.21 asks transformers 5 for a flag by its old name.
            warnings.simplefilter("ignore", FutureWarning)
            # What PEFT corrects by itself in models such as GPT-2.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def device_of(settings: Settings) -> torch.device:
    """The accelerator of this process, if there is one and the run does not keep to the CPU."""
    device = None if settings.cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    return torch.device("cpu") if device is None else torch.device(device.type, local_rank())


@contextmanager
def computing(settings: Settings) -> Iterator[None]:
    """Compute outputs in the run's precision, quietly."""
    device = device_of(settings)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.mixed_precision)
    # The Trainer has no float16 on CPUs, so no run was made with it there.
    wanted = half is not None and not (half is torch.float16 and device.type == "cpu")
    with quiet_transformers(), torch.no_grad(), torch.autocast(device.type, half, enabled=wanted):
        yield
