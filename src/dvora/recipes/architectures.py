"""Which class a base model has, told by its configuration, and the model itself: with its weights or without memory."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

from .bases import check_model_folder, quiet_transformers
from .hub import check_reachable, check_weights, told_in_one_line

_OWN_CODE = ", which is not run; only transformers' own models are read"

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


def config_of(source: str) -> Any:
    """The configuration of a model.

    Args:
        source: a folder, or the name of a model on the hub.

    Raises:
        ValueError: there is none.
    """
    check_model_folder(source)
    check_reachable(source)
    with told_in_one_line("the model", source, _OWN_CODE):
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)


def model_class(config: Any, task_type: str | None = None, class_name: str | None = None) -> Any:
    """The class to load a model with: that of the task, that of the name, or the one that the model was saved with.

    Raises:
        ValueError: the task is unknown.
    """
    if task_type is not None:
        if task_type not in AUTO_CLASSES:
            raise ValueError(f"unknown task type {task_type!r}, expected one of {', '.join(AUTO_CLASSES)}")
        return AUTO_CLASSES[task_type]
    for name in (class_name, *(config.architectures or ())):
        if isinstance(found := vars(transformers).get(name) or _of_transformers(name), type):
            return found
    return transformers.AutoModel


def load_base(source: str, model_class: Any, config: Any, dtype: torch.dtype | str = "auto") -> Any:
    """A model with its weights, in evaluation mode, its parameters frozen.

    Args:
        source: a folder, or the name of a model on the hub.
        model_class: of `model_class`.
        config: of the model; may ask for another head.
        dtype: of its weights; "auto" means as they are stored.

    Raises:
        ValueError: its weights cannot be read, or are pickled.
    """
    check_weights(source)
    # The head that an adapter brings is drawn first: not from the global generator.
    with told_in_one_line("the model", source, _OWN_CODE), quietly(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True
        )
    return model.eval().requires_grad_(False)


def without_memory(model_class: Any, config: Any) -> nn.Module:
    """A model of which nothing but names and shapes exists."""
    with torch.device("meta"), quietly():
        # The automatic classes look the class up, the others are one.
        automatic = model_class.__name__.startswith("Auto")
        model: nn.Module = model_class.from_config(config) if automatic else model_class(config)
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
def quietly() -> Iterator[None]:
    """Without transformers' reports, progress bars and PEFT's questions by old names; what matters is told by us."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _of_transformers(name: str | None) -> Any:
    """A class of transformers, which imports them at their first use."""
    return getattr(transformers, name, None) if name else None
