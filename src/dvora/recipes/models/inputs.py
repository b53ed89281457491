"""Inputs that any model of a kind takes, the same in every process, to compare models and to time them."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from .bases import quiet_transformers


def example_inputs(model: Any, rows: int, tokens: int) -> dict[str, Tensor]:
    """A batch of random tokens, no more a row than the model takes, or pixels; a pure function of the arguments.

    Raises:
        ValueError: the model takes something else.
    """
    name, generator = model.main_input_name, torch.Generator().manual_seed(0)
    if name == "input_ids":
        text = model.config.get_text_config()
        # RoBERTa's positions start behind the padding index.
        longest = (getattr(text, "max_position_embeddings", None) or tokens + 2) - 2
        # The first tokens are for padding, beginnings and ends, as far as there are others.
        first, shape = min(10, text.vocab_size // 2), (rows, min(tokens, max(1, longest)))
        ids = torch.randint(first, text.vocab_size, shape, generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, : tokens // 2 + 1]
        return inputs
    if name == "pixel_values":
        size, colours = model.config.image_size, model.config.num_channels
        height, width = (size, size) if isinstance(size, int) else size
        # Of the mean and the deviation that image processors give.
        pixels = torch.randn(rows, colours, height, width, generator=generator)
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
