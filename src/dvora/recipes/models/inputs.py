"""Inputs that any model of a kind takes, the same in every process, to compare models and to time them."""

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from ...matrices.philox import raw_row, uniform_row
from .bases import quiet_transformers

_SEED, _TOKENS, _PIXELS = 0, 2**36, 2**36 + 1


def example_inputs(model: Any, rows: int, tokens: int) -> dict[str, Tensor]:
    """A batch of random tokens or pixels, a pure function of the arguments.

    Args:
        model: of transformers.
        rows: of the batch.
        tokens: of each row; cut to what the model takes. Images have their own size.

    Raises:
        ValueError: the model takes something else.
    """
    name = model.main_input_name
    if name == "input_ids":
        inputs = {"input_ids": _ids(model, rows, tokens), "attention_mask": torch.ones(rows, _length(model, tokens))}
        inputs["attention_mask"] = inputs["attention_mask"].long()
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, : tokens // 2 + 1]
        return inputs
    if name == "pixel_values":
        size, colours = model.config.image_size, model.config.num_channels
        height, width = (size, size) if isinstance(size, int) else size
        values = np.stack([uniform_row(_SEED, _PIXELS, row, colours * height * width) for row in range(rows)])
        pixels = torch.from_numpy(values).view(rows, colours, height, width)
        return {name: pixels.to(model.dtype)}
    raise ValueError(f"{type(model).__name__} takes {name!r}; only models of tokens and of pixels are known here")


def first_output(outputs: Any) -> Tensor:
    """The tensor that matters among a model's outputs: logits where there are any."""
    named: dict[str, Tensor] = dict(outputs)
    return named["logits"] if "logits" in named else next(iter(named.values()))


@torch.no_grad()
def example_output(model: Any) -> Tensor | None:
    """The output of a model, adapted or not, on a small fixed batch; None if its inputs are not known here."""
    try:
        inputs = example_inputs(model.get_base_model() if isinstance(model, PeftModel) else model, rows=2, tokens=16)
    except ValueError:
        return None
    with quiet_transformers():
        return first_output(model(**inputs)).double()


def difference(actual: Tensor | None, expected: Tensor | None) -> float | None:
    """The largest difference of two outputs, relative to the largest expected one; None where there are none."""
    if actual is None or expected is None:
        return None
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _ids(model: Any, rows: int, tokens: int) -> Tensor:
    length, vocabulary = _length(model, tokens), model.config.get_text_config().vocab_size
    raw = np.stack([raw_row(_SEED, _TOKENS, row, length) for row in range(rows)])
    # The first tokens are for padding, beginnings and ends, as far as there are others.
    first = min(10, vocabulary // 2)
    ids: Tensor = torch.from_numpy((raw % np.uint64(vocabulary - first)).astype(np.int64)) + first
    return ids


def _length(model: Any, tokens: int) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokens
    # RoBERTa's positions start behind the padding index.
    return int(min(tokens, max(1, longest - 2)))
