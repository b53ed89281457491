"""Many classifiers on one text: with the blocks below their adapters computed once, and in other ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import dvora
from benchmarks.environment import machine
from benchmarks.many_adapters.plan import OneText
from benchmarks.population import perturbed
from benchmarks.speed.runner import Report
from benchmarks.speed.timing import Step
from tests.peft.tiny import train_vectors

ENCODERS = {"MiniLM": (6, 384, 12, 1536), "BERT-base": (12, 768, 12, 3072), "tiny": (4, 32, 2, 64)}
"""Blocks, width, heads of attention and width within: of random values, which change no time."""
WAYS = ("base", "fanned out", "as rows", "one merged model after another", "heads alone")
VOCABULARY, LAST = 1000, 2
"""Tokens, and blocks that adapters are in."""


class Way(NamedTuple):
    """A way to ask so many classifiers about one text."""

    way: str
    classifiers: int

    @property
    def name(self) -> str:
        """As in the result file."""
        return f"{self.way}, {self.classifiers}"

    def described(self) -> dict[str, Any]:
        """For a row of the result file."""
        return {"arm": self.name, "way": self.way, "classifiers": self.classifiers}


def measure(report: Report, asked: OneText, folder: Path) -> None:
    """Add a row for each way, number of classifiers and length of the text.

    Args:
        report: gets the rows.
        asked: what is measured.
        folder: an empty one for adapters.
    """
    encoder, counts = asked.encoder, asked.classifiers
    model, blocks = _base(encoder), ENCODERS[encoder][0]
    merged = _base(encoder)
    names = _adapters(encoder, folder, max(counts), [*range(blocks - LAST, blocks)])
    like = folder / "adapters" / names[0]
    with dvora.AdapterBank(model, like=like, own_heads=True) as bank, torch.inference_mode():
        bank.add_folder(folder / "adapters")
        bank.add_folder(folder / "heads", allow_unchanged=True)

        def step(way: Way, texts: Tensor) -> Step:
            count = way.classifiers
            if way.way in ("base", "one merged model after another"):
                return lambda: [merged(input_ids=texts[:1]) for _ in range(1 if way.way == "base" else count)]
            rows = [f"head-{name}" if way.way == "heads alone" else name for name in names[:count]]
            inputs = texts[:count] if way.way == "as rows" else texts[:1].repeat(count, 1)
            return partial(_in_bank, bank, rows, model, inputs)

        for length in asked.tokens:
            texts = torch.randint(3, VOCABULARY, (max(counts), length), generator=torch.Generator().manual_seed(0))
            ways = [Way("base", 1), *(Way(way, count) for count in counts for way in WAYS[1:])]
            makers: dict[Any, Callable[[], Step]] = {way: partial(step, way, texts) for way in ways}
            setting = {"part": "one text", "workload": encoder, "dtype": "float32", "machine": machine()}
            report.time_in_turns({**setting, "tokens": length, "blocks": blocks, "last": LAST}, makers, asked.rounds)


def _in_bank(bank: dvora.AdapterBank, names: Sequence[str], model: nn.Module, inputs: Tensor) -> None:
    with bank.rows(names):
        model(input_ids=inputs)


def _base(encoder: str) -> nn.Module:
    blocks, width, heads, within = ENCODERS[encoder]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=within,
        num_labels=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval().requires_grad_(False)


def _adapters(encoder: str, folder: Path, count: int, blocks: list[int]) -> list[str]:
    """Adapters in some blocks, and heads alone, each in a folder; the names of the first."""
    config = dvora.DVoRAConfig(
        r=256, target_modules=["query", "key", "value", "dense"], layers_to_transform=blocks, task_type="SEQ_CLS"
    )
    adapted = get_peft_model(_base(encoder), config)
    adapted.save_pretrained(str(folder / "head"))
    train_vectors(adapted)
    adapted.save_pretrained(str(folder / "first"))
    names = list(perturbed(folder / "first", folder / "adapters", count, heads=(4,)))
    for name in names:
        (folder / "heads").mkdir(exist_ok=True)
        (folder / "heads" / f"head-{name}").symlink_to(folder / "head")
    return names
