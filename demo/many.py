"""A batch in which every sentence has an adapter of its own, beside the same batch with one adapter and with none."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import dvora
from demo.model import load_adapter, load_classifier
from dvora.flat import Layout
from materials.batches import Sentences

ROWS = 64
ROUNDS, WARM_UP = 9, 2


@dataclass(frozen=True)
class ManyAdapters:
    """Times of a batch, and how far its rows are from those of each adapter alone."""

    rows: int
    adapter_bytes: int
    """Of one adapter in the bank."""
    base_seconds: float
    one_seconds: float
    many_seconds: float
    largest_difference: float

    def lines(self) -> tuple[str, ...]:
        """What the demo says of it."""
        one, many = self.one_seconds / self.base_seconds, self.many_seconds / self.base_seconds
        return (
            f"A batch of {self.rows} sentences with one adapter takes {one:.2f} times the frozen model's time; with "
            f"{self.rows} adapters, one for each sentence, {many:.2f} times.",
            f"Each row is as if its adapter was alone (largest difference {self.largest_difference:.2g}); an adapter "
            f"takes {self.adapter_bytes / 1e3:,.0f} kB of memory.",
        )


@torch.no_grad()
def many_adapters(model_folder: Path, adapter_folder: Path, sentences: Sentences) -> ManyAdapters:
    """Serve the trained adapter and 63 like it in one batch.

    Args:
        model_folder: of the base.
        adapter_folder: of the trained adapter.
        sentences: of which the first are used.
    """
    layout, rows = Layout.of(adapter_folder), min(ROWS, len(sentences))
    trained = layout.to_vector(adapter_folder)
    random = torch.Generator().manual_seed(0)
    # Different customers' adapters, of which there is only one here, are it with each value changed by some percent.
    vectors = {f"customer-{n}": trained * (1 + 0.05 * torch.randn(len(trained), generator=random)) for n in range(rows)}
    batch, names = sentences.batch(np.arange(rows)), list(vectors)

    base, alone = load_classifier(model_folder), load_adapter(load_classifier(model_folder), adapter_folder)
    frozen = load_classifier(model_folder)
    with dvora.AdapterBank(base, slots=ROWS, like=adapter_folder) as bank:
        for name, vector in vectors.items():
            bank.add(name, vector)
        contexts: tuple[Callable[[], AbstractContextManager[object]], ...] = (
            nullcontext,
            lambda: bank.rows(names[:1] * rows),
            lambda: bank.rows(names),
        )
        seconds: list[list[float]] = [[], [], []]
        outputs = torch.empty(0)
        for _ in range(WARM_UP + ROUNDS):
            for of_kind, context in zip(seconds, contexts, strict=True):
                start = time.perf_counter()
                with context():
                    outputs = (frozen if context is nullcontext else base)(*batch)
                of_kind.append(time.perf_counter() - start)
        stats = bank.stats()
    difference = (outputs - _one_by_one(alone, layout, vectors, batch)).abs().max().item()
    base_seconds, one_seconds, many_seconds = (median(of_kind[WARM_UP:]) for of_kind in seconds)
    adapter_bytes = stats.host_bytes // stats.host_adapters
    return ManyAdapters(rows, adapter_bytes, base_seconds, one_seconds, many_seconds, difference)


def print_many(many: ManyAdapters, console: Console) -> None:
    """Print the last lines of the demo."""
    for line in many.lines():
        console.print(line, highlight=False)


def _one_by_one(
    model: torch.nn.Module, layout: Layout, vectors: dict[str, Tensor], batch: tuple[Tensor, Tensor]
) -> Tensor:
    """Each row by the PEFT model with its adapter alone."""
    rows = []
    for row, vector in enumerate(vectors.values()):
        layout.from_vector(vector, model)
        rows.append(model(*(part[row : row + 1] for part in batch)))
    return torch.cat(rows)
