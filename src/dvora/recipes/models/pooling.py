"""How a sentence encoder makes one vector of its tokens', by the file that sentence-transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ...tensors import Float
from ..files import read_json

Pooling = Literal["mean", "cls", "lasttoken"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
_SUFFIX = {"mean": "_tokens", "cls": "_token", "lasttoken": ""}


def pooling_of(folder: Path) -> Pooling:
    """How the model in a folder pools; the mean, where nothing is said.

    Raises:
        ValueError: it says something else than one of three ways.
    """
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    settings = read_json(file)
    chosen = [name for name in POOLINGS if settings.get(f"pooling_mode_{name}{_SUFFIX[name]}")]
    if len(chosen) != 1:
        raise ValueError(f"{file} asks for another pooling than one of {', '.join(POOLINGS)}: {json.dumps(settings)}")
    return chosen[0]


def pooled(hidden: Float[Tensor, "B T H"], mask: Tensor, pooling: Pooling) -> Float[Tensor, "B H"]:
    """One vector of length one for each row, float32.

    Args:
        hidden: of all tokens.
        mask: 1 for tokens of the text, (B, T).
        pooling: how.
    """
    if pooling == "cls":
        vectors = hidden[:, 0]
    elif pooling == "lasttoken":
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), last]
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
