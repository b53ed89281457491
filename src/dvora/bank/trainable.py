"""Many adapters of a bank trained in one step: rows of one parameter, gathered by the rows of a batch.

The gradient of one adapter comes from its own rows of the batch only, so a step equals one of each adapter alone.

Dimensions: N adapters in training, n of them in a batch, B rows of a batch, S values of an adapter's vectors, H of its
heads, L layers of one shape, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..factors import Factors, Pass, StackConstants, current_pass, saved_here, stacked_factors
from ..flat import with_zeros
from ..functional import Vectors
from ..peft.base_weight import keep_differentiable
from ..tensors import Float, is_traced
from .factors import FactorRows, LayerPlace
from .rows import CurrentRows, RowIndex, check_names
from .served import ServedHead, ServedLayer
from .sources import AdapterValues


class TrainableAdapters:
    """Adapters of one bank in training; made by `AdapterBank.trainable`.

    `vectors` (N, S), float32, and `heads` (N, H) are the parameters; `dvora.bank.TenantAdamW` steps each adapter by
    itself.

    Args:
        rows: how adapters become factor rows on the bank's model.
        current: tells the batch that a thread is in.
        values: where each adapter starts, by name; None is the base.

    Raises:
        ValueError: the base is not frozen, or an adapter has other layers than the bank, or a strength.
    """

    def __init__(self, rows: FactorRows, current: CurrentRows, values: Mapping[str, AdapterValues | None]) -> None:
        if not values:
            raise ValueError("names and new are empty; name the adapters to train")
        self.names = tuple(values)
        self.served, self._rows, self._current = rows.served, rows, current
        self._check_frozen()
        starts = [self._start(name, start) for name, start in values.items()]
        device = self.served.device
        self.vectors = nn.Parameter(torch.stack([vector for vector, _ in starts]).to(device))
        self.heads = nn.Parameter(torch.stack([heads for _, heads in starts]).to(device))
        self.stepped: set[int] = set()
        """Places of the adapters that a gradient has come for since the last step."""
        self._place = {name: place for place, name in enumerate(self.names)}
        self._constants: dict[str, StackConstants] = {}
        self._dropout = nn.Dropout(self.served.config.dvora_dropout)
        for module in self.served.model.modules():
            keep_differentiable(module)

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[TrainedRows]:
        """Within it, in this thread, the rows of a batch train these adapters; call backward within it, too.

        Args:
            names: one a row, in the order of the batch.

        Raises:
            TypeError, ValueError: a name is not trained here, or the thread is in a batch already. In the pass: there
                is not one name a row.
        """
        check_names(names, repeats=1)
        places, device = [self.place(name) for name in names], self.vectors.device
        present = sorted(set(places))
        position = {place: position for position, place in enumerate(present)}
        of_rows = torch.tensor([position[place] for place in places], device=device)
        self._dropout.train(self.served.model.training and self._dropout.p > 0)
        dropout = self._dropout if self._dropout.training else None
        trained = TrainedRows(self, torch.tensor(present, device=device), RowIndex(of_rows, 1), dropout)
        with self._current.entered(trained):
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
        heads = self.heads[place].to("cpu", torch.float32)
        return torch.cat([self.vectors[place].cpu(), heads])

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
        own = [tuple(parameter.shape) for parameter in self.parameters()]
        if tuple(state["names"]) != self.names or shapes != own:
            raise ValueError(
                f"the checkpoint has {len(state['names'])} adapters ({', '.join(state['names'][:5])}, ...) of shapes "
                f"{shapes}, and here are {len(self.names)} ({', '.join(self.names[:5])}, ...) of {own}; call "
                "bank.trainable with the same names in the same order"
            )
        self.vectors.copy_(state["vectors"])
        self.heads.copy_(state["heads"])

    def values_of(self, kind: str) -> Tensor:
        """Which of the S values belong to one kind of vector ("magnitude", "lambda_b", "lambda_d"), as a mask."""
        lengths = [length for layer in self.served.content.layers for length in layer.lengths]
        kinds = torch.tensor([field == kind for field in Vectors._fields]).repeat(len(self.served.content.layers))
        return kinds.repeat_interleave(torch.tensor(lengths)).to(self.vectors.device)

    def gathered(self, parameter: nn.Parameter, places: Tensor) -> Tensor:
        """Rows of a parameter; the next step moves their adapters if a gradient comes for them."""
        rows = parameter.index_select(0, places)
        if rows.requires_grad:
            rows.register_hook(lambda _: self.stepped.update(places.tolist()))
        return rows

    def factors(self, present: Tensor) -> dict[str, Float[Tensor, "n F"]]:
        """The factors of the adapters of a batch, by layer, as `Factors.of_rows` takes them, with a graph."""
        sizes = self.served.content.layers
        parts = iter(self.gathered(self.vectors, present).split([n for size in sizes for n in size.lengths], 1))
        vectors = {size.name: Vectors(next(parts), next(parts), next(parts)) for size in sizes}
        found: dict[str, Tensor] = {}
        for stack in self._rows.stacks:
            own = [with_zeros(vectors[layer.name]) for layer in stack]
            stacked = Vectors(*(torch.stack(of_kind) for of_kind in zip(*own, strict=True)))
            weights = [layer.refreshed() for layer in stack]
            constants = self._constants.get(stack[0].name)
            if constants is None or not constants.fit(weights):
                constants = self._constants[stack[0].name] = StackConstants.of(weights)
            stacked = stacked.to(constants.w.dtype)
            gain_minus_one, scale, _ = stacked_factors(stacked, constants)
            rows = torch.cat([gain_minus_one, scale, stacked.lambda_d], -1)
            found |= zip((layer.name for layer in stack), rows, strict=True)
        return found

    def _start(self, name: str, values: AdapterValues | None) -> tuple[Tensor, Tensor]:
        base = self._rows.base_heads
        if values is None:
            both = zip(self.served.layers, self.served.content.layers, strict=True)
            own = [(layer.adapted.initial_vectors(self.served.config.d_initial), size) for layer, size in both]
            parts = [v[:n] for vectors, size in own for v, n in zip(vectors, size.lengths, strict=True)]
            return torch.cat(parts).float().cpu(), base
        self._rows.check(values.content)
        if any(strength != 1 for strength in values.strengths):
            raise ValueError(f"names: {name!r} has a strength other than one in its configuration; train it at one")
        return values.vector, self._rows.heads_of(values)

    def _check_frozen(self) -> None:
        for name, parameter in self.served.model.named_parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"model: {name} requires a gradient, and all adapters share the base; call "
                    "model.requires_grad_(False)"
                )


class TrainedRows:
    """Rows of adapters in training; their factors are made once in a pass of the model.

    Args:
        adapters: in training.
        present: the places of those in the batch, (n,).
        index: of each row, among those.
        dropout: of the inputs of updates.
    """

    def __init__(
        self, adapters: TrainableAdapters, present: Tensor, index: RowIndex, dropout: nn.Module | None
    ) -> None:
        self.dropout = dropout
        self._adapters, self._present, self._index = adapters, present, index
        self._made: _Made | None = None

    def loss(self, losses: Float[Tensor, "B"], weights: Float[Tensor, "B"] | None = None) -> Float[Tensor, ""]:
        """The sum of every adapter's own mean loss, so that each gets the gradient that it would get alone.

        Args:
            losses: one a row.
            weights: of the rows in the mean of their adapter, such as their numbers of tokens; None weighs all alike.
                An adapter whose rows all weigh nothing has a loss of zero.

        Raises:
            ValueError: there is not one loss or weight a row.
        """
        index = self._index.index
        if losses.shape != index.shape:
            raise ValueError(f"losses has shape {tuple(losses.shape)}, expected one a row, {tuple(index.shape)}")
        weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        if weights.shape != index.shape:
            raise ValueError(f"weights has shape {tuple(weights.shape)}, expected one a row, {tuple(index.shape)}")
        totals = weights.new_zeros(len(self._present)).index_add(0, index, weights)
        totals = torch.where(totals == 0, 1, totals)
        return (losses * weights / totals.index_select(0, index)).sum()

    def factors(self, layer: ServedLayer, place: LayerPlace, rows: int, dimensions: int) -> Factors:
        """The factors of a layer."""
        if is_traced():
            raise RuntimeError("adapters of a bank are trained without torch.compile; call the model itself")
        values = self._factors()[layer.name].index_select(0, self._index.for_batch(rows, layer.name))
        return Factors.of_rows(values, place.rank, dimensions)

    def head(self, head: ServedHead, rows: int) -> dict[str, Tensor]:
        """The parameters of a head."""
        places = self._present.index_select(0, self._index.for_batch(rows, head.name))
        return head.of_rows(self._adapters.gathered(self._adapters.heads, places))

    def of_base(self, rows: int, name: str) -> None:
        """Every row has an adapter."""

    def _factors(self) -> Mapping[str, Tensor]:
        """Of this pass; what a checkpoint repeats in the backward pass gets those of the last one."""
        running, made, version = current_pass(), self._made, self._adapters.vectors._version
        state = (version, torch.is_grad_enabled())
        if made is None or made.state != state or (running is not None and made.in_pass is not running):
            # A checkpointed layer may be the first to ask for them, and does not make them when it is repeated.
            with saved_here():
                made = self._made = _Made(running, state, self._adapters.factors(self._present))
        return made.factors


class _Made(NamedTuple):
    in_pass: Pass | None
    state: tuple[int, bool]
    """The version of the vectors, and whether gradients were recorded."""
    factors: Mapping[str, Tensor]
