"""The class of a base model, from its configuration, and the model: with its weights or on the meta device."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from ..settings import NAMED, Trust
from .bases import check_model_folder, quiet_transformers
from .hub import check_weights, loading

_ADVICE = ", which is not run; only transformers' own models are read", "name it with --model to have it fetched"

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


def config_of(source: str, trust: Trust = NAMED) -> Any:
    """The configuration of a model.

    Args:
        source: a folder, or the name of a model on the hub.
        trust: whether it may be fetched; a model's own code is never run here.

    Raises:
        ValueError: there is none.
    """
    check_model_folder(source)
    with loading("the model", source, trust, *_ADVICE):
        return transformers.AutoConfig.from_pretrained(source, **_without_code(trust))


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
        if isinstance(found := vars(transformers).get(name) or _of_transformers(name), type):
            if not issubclass(found, transformers.PreTrainedModel):
                raise ValueError(f"the model's class is said to be transformers' {name}, which is no model")
            return found
    return transformers.AutoModel


def load_base(
    source: str, model_class: Any, config: Any, dtype: torch.dtype | str = "auto", trust: Trust = NAMED
) -> Any:
    """A model with its weights, in evaluation mode, its parameters frozen.

    Args:
        source: a folder, or the name of a model on the hub.
        model_class: of `model_class`.
        config: of the model; may ask for another head.
        dtype: of its weights; "auto" means as they are stored.
        trust: whether it may be fetched.

    Raises:
        ValueError: its weights cannot be read, or are pickled.
    """
    check_weights(source)
    # The head that an adapter brings is drawn first: not from the global generator.
    with loading("the model", source, trust, *_ADVICE), quietly(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **_without_code(trust),
        )
    return model.eval().requires_grad_(False)


def without_memory(model_class: Any, config: Any) -> nn.Module:
    """A model on the meta device: names and shapes without memory."""
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
    """Without transformers' reports, progress bars and PEFT's questions by old names; we report what matters."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _without_code(trust: Trust) -> dict[str, bool]:
    return replace(trust, code=False).options


def _of_transformers(name: str | None) -> Any:
    """A class of transformers, which imports them at their first use."""
    return getattr(transformers, name, None) if name else None
