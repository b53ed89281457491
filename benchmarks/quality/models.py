"""The pretrained models, and the small modules around them that read a task's inputs."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertModel, BitsAndBytesConfig, MPNetModel
from transformers.utils import logging

from materials.fetch import cache_folder
from materials.models import minilm, mpnet, smollm2

Base = str
"""float32 or nf4; or fine_tuned: float32, and trained before (MiniLM only)."""
FINE_TUNED = "quality-minilm-fine-tuned-on-wordnet-topics"
"""The cache's folder of the fine-tuned MiniLM."""


class SentenceReader(nn.Module):
    """MiniLM or MPNet, the mean of its token vectors (what it was trained for), and a linear head."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """(batch, width) float32 means."""
        tokens = self.backbone(input_ids=batch["ids"], attention_mask=batch["mask"]).last_hidden_state.float()
        weights = batch["mask"][:, :, None].to(tokens.dtype)
        means: Tensor = (tokens * weights).sum(1) / weights.sum(1)
        return means

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """(batch, outputs) float32."""
        features = self.features(batch)
        # Not in lower precision: 1e-2 of a logit would be lost.
        with torch.autocast(features.device.type, enabled=False):
            outputs: Tensor = self.head(features)
        return outputs


class TextModel(nn.Module):
    """SmolLM2, which has no head of the task."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, None

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """(windows, tokens - 1) nats of each token after the first, float32."""
        ids = batch["ids"]
        logits = self.backbone(input_ids=ids).logits[:, :-1].float()
        nats: Tensor = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return nats


def load_minilm(base: Base) -> nn.Module:
    """MiniLM without dropout, so that training draws nothing but the order of the batches."""
    return _loaded(
        BertModel,
        cache_folder() / FINE_TUNED if base == "fine_tuned" else minilm(),
        base,
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def load_mpnet(base: Base) -> nn.Module:
    """all-mpnet-base-v2, likewise."""
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _loaded(MPNetModel, mpnet(), base, add_pooling_layer=False, **without_dropout)


def load_smollm2(base: Base) -> nn.Module:
    """SmolLM2-135M-Instruct, dequantised from Q4_1."""
    return _loaded(AutoModelForCausalLM, smollm2(), base)


LOADERS: dict[str, Callable[[Base], nn.Module]] = {"minilm": load_minilm, "mpnet": load_mpnet, "smollm2": load_smollm2}


@contextmanager
def quietly() -> Iterator[None]:
    """Without what would tear the progress bar."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # It warns in every product that it casts.
    getLogger("bitsandbytes").setLevel(ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(verbosity)


def _loaded(model_class: Any, folder: Path, base: Base, **settings: Any) -> nn.Module:
    if base == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    with quietly():
        # On a CPU the backward pass of fused attention takes a fifth of a step, this one a fiftieth.
        model: nn.Module = model_class.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **settings
        )
    return model.eval()
