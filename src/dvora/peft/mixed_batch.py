"""A batch in which every row has an adapter of its own: PEFT's `adapter_names`, for one call of the model.

PEFT enters `names_passed` within one call of the model and leaves it there. Other threads and tasks may run the same
modules meanwhile, so names are passed only where this batch is the innermost one of the context.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..factors import Factors
from ..rows.batch import entered, innermost
from ..tensors import Float, grad_recorded, is_traced
from ..weight import AdaptedWeight
from .layer_types import ActiveAdapter

BASE = "__base__"
"""PEFT's name for "no adapter" in a batch of adapter names."""


class NamedBatch:
    """One call of a model with an adapter for each row; compared by identity.

    Args:
        names: one a row.
        in_encoder: the names for the encoder, whose rows beam search does not repeat.
        silent: modules whose adapters rest: those of parameters, which would change every row.
    """

    def __init__(self, names: Sequence[str], in_encoder: Sequence[str], silent: Collection[nn.Module]) -> None:
        self.names = names
        self.in_encoder = in_encoder
        self.silent = silent
        self.updates: dict[tuple[int, int, int], list[ActiveAdapter]] = {}
        """Without gradients, of every layer: generation asks for them with each token, and goes on as it began."""


def is_silent(module: nn.Module) -> bool:
    """Whether the adapters of a module rest in the current call."""
    if torch.compiler.is_compiling():
        return False
    batch = innermost(NamedBatch)
    return batch is not None and module in batch.silent


@contextmanager
def names_passed(batch: NamedBatch, called: Collection[nn.Module], encoder: Collection[nn.Module]) -> Iterator[None]:
    """Pass the names of a batch to the modules that are called with them; those of the encoder get their own."""
    handles = []
    try:
        for module in called:
            names = batch.in_encoder if module in encoder else batch.names
            hook = partial(_with_names, batch=batch, names=names)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with nullcontext() if torch.compiler.is_compiling() else entered(batch):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _with_names(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    batch: NamedBatch,
    names: Sequence[str],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    # Another thread may run a hook that is only half registered or removed: then without `kwargs`.
    if kwargs is None or innermost(NamedBatch) is not batch:
        return None
    return args, {**kwargs, "adapter_names": names}


def check_rows(adapter_names: Sequence[str], x: Tensor, merged: Sequence[str], name: str) -> None:
    """Refuse adapter names that do not fit the batch, or any while adapters are merged."""
    if len(adapter_names) != len(x):
        raise ValueError(
            f"{name}: adapter_names has {len(adapter_names)} entries, the batch has {len(x)} rows; pass one name a row"
        )
    if merged:
        raise ValueError(
            f"{name}: adapter_names cannot be used while adapters are merged ({', '.join(merged)}); call "
            "unmerge_adapter first"
        )


def updates_in(
    layer: object,
    adapter_names: Sequence[str],
    dimensions: int,
    make: Callable[[Sequence[str], int], list[ActiveAdapter]],
) -> list[ActiveAdapter]:
    """The updates of a layer, made from names and dimensions of outputs once in a call that is not differentiated."""
    batch = None if is_traced() or grad_recorded() else innermost(NamedBatch)
    if batch is None or (adapter_names is not batch.names and adapter_names is not batch.in_encoder):
        return make(adapter_names, dimensions)
    key = id(layer), id(adapter_names), dimensions
    if key not in batch.updates:
        batch.updates[key] = make(adapter_names, dimensions)
    return batch.updates[key]


def row_updates(
    adapted: Mapping[str, AdaptedWeight],
    factors: Mapping[str, Float[Tensor, "F"]],
    adapter_names: Sequence[str],
    dimensions: int,
) -> list[ActiveAdapter]:
    """The updates of a layer by row: one for all adapters that share A and B.

    Args:
        adapted: the frozen sides of the adapters in the batch that the layer has, by name.
        factors: `Factors.row` of each.
        adapter_names: one a row.
        dimensions: of the layer's outputs.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, weight in adapted.items():
        groups.setdefault(weight.update_key, []).append(name)
    updates = []
    for group in groups.values():
        values = torch.stack([factors[name] for name in group])
        if group != list(adapter_names):
            # The row of zeros behind them is the base's, and that of adapters in other groups.
            place = {name: place for place, name in enumerate(group)}
            index = torch.tensor([place.get(name, len(group)) for name in adapter_names], device=values.device)
            values = pad(values, (0, 0, 0, 1))[index]
        first = adapted[group[0]]
        updates.append(ActiveAdapter(first, Factors.of_rows(values, first.lambda_d_size, dimensions), None))
    return updates
