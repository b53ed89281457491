"""Many adapters of a bank trained in one step: rows of one parameter, gathered by the rows of a batch.

The gradient of one adapter comes from its own rows of the batch only, so a step equals one of each adapter alone.

Dimensions: N adapters in training, n of them in a batch, B rows of a batch, S values of an adapter's vectors, H of its
heads, F values of a factor row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter_file.values import AdapterValues
from ..adapter_file.values_file import Shape
from ..functional import Vectors
from ..layer import current_pass
from ..peft.base_weight import keep_differentiable
from ..tensors import Float
from .factor_rows import FactorRows
from .hooks import Batches, check_unchanged
from .slots import GatheredRows, RowIndex, check_names, saved_here

_SHARED = ("train", "dvora_dropout", "detach_norm")
"""Settings that all adapters trained together have in common."""


class TrainableAdapters:
    """Adapters of one bank in training; made by `AdapterBank.trainable`.

    `vectors` (N, S), float32, and `heads` (N, H) are the parameters; `dvora.bank.TenantAdamW` steps each adapter by
    itself. Heads with fewer outputs than others are filled up with zeros, which nothing reads.

    Args:
        rows: how adapters become factor rows on the bank's model.
        batches: of the bank.
        values: where each adapter starts, by name; None is the base.

    Raises:
        ValueError: the base is not frozen, or an adapter has other layers than the bank, a strength, or settings of
            training that others do not have.
    """

    def __init__(self, rows: FactorRows, batches: Batches, values: Mapping[str, AdapterValues | None]) -> None:
        if not values:
            raise ValueError("names and new are empty; name the adapters to train")
        self.names, self.served = tuple(values), rows.served
        self._rows, self._batches, self.row_lengths = rows, batches, rows.row_lengths
        self._check_frozen()
        self.config = self._common_config(values)
        for name, start in values.items():
            self._check_start(name, start)
        device, own_heads = self.served.device, self.served.own_heads
        started = [own_heads if start is None else self.served.heads_of(start.whole) for start in values.values()]
        self.head_shapes = [{name: tuple(values.shape) for name, values in heads.items()} for heads in started]
        self._largest = {
            name: [max(sizes) for sizes in zip(*(h[name].shape for h in started), strict=True)] for name in own_heads
        }
        vectors = [rows.start if start is None else rows.vector(start) for start in values.values()]
        self.vectors = nn.Parameter(torch.stack(vectors).to(device))
        self.heads = nn.Parameter(torch.stack([self._joined(heads) for heads in started]).to(device))
        self.stepped: set[int] = set()
        """Places of the adapters that a gradient has come for since the last step."""
        self._place = {name: place for place, name in enumerate(self.names)}
        self._dropout = nn.Dropout(self.config.dvora_dropout)
        for module in self.served.model.modules():
            keep_differentiable(module)

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[TrainedRows]:
        """Within it, called from here, the rows of a batch train these adapters; call backward within it, too.

        Args:
            names: one a row, in the order of the batch.

        Raises:
            TypeError, ValueError: a name is not trained here, or this call is in a batch already. In the pass: there
                is not one name a row.
        """
        check_names(names, repeats=1)
        check_unchanged(self.served.layers)
        places = [self.place(name) for name in names]
        present = sorted(set(places))
        position = {place: position for position, place in enumerate(present)}
        self._dropout.train(self.served.model.training and self._dropout.p > 0)
        index = RowIndex([position[place] for place in places], 1, self.vectors.device)
        trained = TrainedRows(self, present, index, self._dropout if self._dropout.training else None)
        with self._batches.entered(trained.gathered):
            yield trained

    def place(self, name: str) -> int:
        """The row of an adapter in both parameters.

        Raises:
            ValueError: it is not trained here.
        """
        if name not in self._place:
            some = ", ".join(self.names[:5])
            raise ValueError(f"names: {name!r} is none of the {len(self.names)} adapters in training ({some}, ...)")
        return self._place[name]

    @torch.no_grad()
    def flat_vector(self, name: str) -> Float[Tensor, "SH"]:
        """An adapter as a flat vector in the order of `dvora.flat.Layout`, on the CPU: its vectors, then its heads."""
        place = self.place(name)
        heads = self.split_heads(self.heads[place])
        parts = [_within(heads[part], shape).flatten() for part, shape in self.head_shapes[place].items()]
        return torch.cat([self.vectors[place].cpu(), *(values.to("cpu", torch.float32) for values in parts)])

    def parameters(self) -> list[nn.Parameter]:
        """Both parameters, of which heads may be empty."""
        return [self.vectors, self.heads]

    def state_dict(self) -> dict[str, Any]:
        """Names and values, for a checkpoint beside the optimizer's."""
        return {"names": self.names, "vectors": self.vectors.detach(), "heads": self.heads.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values of a checkpoint.

        Raises:
            ValueError: it is of other adapters, or of these in another order.
        """
        shapes = [tuple(state[part].shape) for part in ("vectors", "heads")]
        expected = [tuple(parameter.shape) for parameter in self.parameters()]
        if tuple(state["names"]) != self.names or shapes != expected:
            raise ValueError(
                f"the checkpoint has {len(state['names'])} adapters ({', '.join(state['names'][:5])}, ...) of shapes "
                f"{shapes}, and here are {len(self.names)} ({', '.join(self.names[:5])}, ...) of {expected}; call "
                "bank.trainable with the same names in the same order"
            )
        self.vectors.copy_(state["vectors"])
        self.heads.copy_(state["heads"])

    def values_of(self, kind: str) -> Tensor:
        """Which of the S values belong to one kind of vector ("magnitude", "lambda_b", "lambda_d"), as a mask."""
        kinds = torch.tensor([field == kind for field in Vectors._fields]).repeat(len(self.served.layers))
        return kinds.repeat_interleave(torch.tensor(self._rows.lengths)).to(self.vectors.device)

    def gathered(self, parameter: nn.Parameter, places: Sequence[int]) -> Tensor:
        """Rows of a parameter; the next step moves their adapters if a gradient comes for them."""
        rows = parameter.index_select(0, torch.tensor(places, device=parameter.device))
        if rows.requires_grad:
            rows.register_hook(lambda _: self.stepped.update(places))
        return rows

    def factors(self, places: Sequence[int]) -> Float[Tensor, "n F"]:
        """The factor rows of adapters, with a graph."""
        return self._rows.of_vectors(self.gathered(self.vectors, places))

    def split_heads(self, heads: Float[Tensor, "*n H"]) -> dict[str, Tensor]:
        """Heads by their parts, filled up."""
        parts = heads.split([prod(shape) for shape in self._largest.values()], -1)
        return {
            name: part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for (name, shape), part in zip(self._largest.items(), parts, strict=True)
        }

    def _joined(self, heads: Mapping[str, Tensor]) -> Float[Tensor, "H"]:
        """The parts of a head, filled up with zeros, as one row."""
        if not heads:
            return torch.empty(0)
        rows = []
        for name, values in heads.items():
            filled = values.new_zeros(self._largest[name])
            _within(filled, tuple(values.shape)).copy_(values)
            rows.append(filled.flatten())
        return torch.cat(rows)

    def _common_config(self, values: Mapping[str, AdapterValues | None]) -> Any:
        """The configuration of the adapters, whose settings of training are the same; new ones take these."""
        named = {name: start.config for name, start in values.items() if start is not None}
        config = next(iter(named.values()), self.served.config)
        for name, other in named.items():
            for setting in _SHARED:
                if (here := getattr(other, setting)) != (there := getattr(config, setting)):
                    raise ValueError(
                        f"names: {setting} of {name!r} is {here!r} and {there!r} of {next(iter(named))!r}, and "
                        "adapters are trained together with the same; train them apart"
                    )
        if config.detach_norm != self.served.config.detach_norm:
            raise ValueError(
                f"names: detach_norm is {config.detach_norm} for {next(iter(named))!r}, and the bank was made for "
                f"{self.served.config.detach_norm}; make a bank with like= of an adapter that has it"
            )
        return config

    def _check_start(self, name: str, start: AdapterValues | None) -> None:
        if start is not None:
            self.served.check_fits(start.content, {})
            if any(strength != 1 for strength in start.strengths):
                raise ValueError(f"names: {name!r} has a strength other than one in its configuration; train it at one")

    def _check_frozen(self) -> None:
        for name, parameter in self.served.model.named_parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"model: {name} requires a gradient, and all adapters share the base; call "
                    "model.requires_grad_(False)"
                )


def _within(filled: Tensor, shape: Shape) -> Tensor:
    """A tensor of a shape in the one that it was filled up to."""
    return filled if filled.shape == shape else filled[tuple(slice(size) for size in shape)]


class TrainedRows:
    """Rows of adapters in training; their factors are made once in a pass of the model.

    Args:
        adapters: in training.
        present: the places of those in the batch, n of them.
        rows: the position of each row's adapter among those.
        dropout: of the inputs of updates.
    """

    def __init__(
        self, adapters: TrainableAdapters, present: Sequence[int], rows: RowIndex, dropout: nn.Module | None
    ) -> None:
        self._adapters, self._present, self._rows = adapters, present, rows
        self.gathered = GatheredRows(rows, adapters.row_lengths, self._matrix, self._heads, dropout=dropout)
        self._cached: _OfPass | None = None

    def loss(self, losses: Float[Tensor, "B"], weights: Float[Tensor, "B"] | None = None) -> Float[Tensor, ""]:
        """The sum of every adapter's own mean loss, so that each gets the gradient that it would get alone.

        Args:
            losses: one a row.
            weights: of the rows in the mean of their adapter, such as their numbers of tokens; None weighs all alike.
                An adapter whose rows all weigh nothing has a loss of zero.

        Raises:
            ValueError: there is not one loss or weight a row.
        """
        index = self._rows.once
        if losses.shape != index.shape:
            raise ValueError(f"losses has shape {tuple(losses.shape)}, expected one a row, {tuple(index.shape)}")
        weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        if weights.shape != index.shape:
            raise ValueError(f"weights has shape {tuple(weights.shape)}, expected one a row, {tuple(index.shape)}")
        totals = weights.new_zeros(len(self._present)).index_add(0, index, weights)
        totals = torch.where(totals == 0, 1, totals)
        return (losses * weights / totals.index_select(0, index)).sum()

    def _heads(self) -> list[dict[str, Tensor]]:
        adapters = self._adapters
        heads = adapters.split_heads(adapters.gathered(adapters.heads, self._present))
        parts = {name: part.unbind() for name, part in heads.items()}
        return [
            {name: _within(parts[name][position], shape) for name, shape in adapters.head_shapes[place].items()}
            for position, place in enumerate(self._present)
        ]

    def _matrix(self) -> Tensor:
        """The factor rows of this pass; what a checkpoint repeats in the backward pass gets those of the last one."""
        current, cached, version = current_pass(), self._cached, self._adapters.vectors._version
        state = (version, torch.is_grad_enabled())
        if cached is None or cached.state != state or (current is not None and cached.in_pass is not current):
            # A checkpointed layer may be the first to ask for them, and does not make them when it is repeated.
            with saved_here():
                cached = self._cached = _OfPass(current, state, self._adapters.factors(self._present))
        return cached.factors


class _OfPass(NamedTuple):
    in_pass: object | None
    state: tuple[int, bool]
    """The version of the vectors, and whether gradients were recorded."""
    factors: Tensor
