"""Many adapters of a bank trained in one step: each has parameters of its own, gathered by the rows of a batch.

The gradient of one adapter comes from its own rows of the batch only, so a step equals one of each adapter alone.

Dimensions: N adapters in training, n of them in a batch, B rows of a batch, S values of an adapter's vectors, H of its
head, F values of a factor row.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_file.values import AdapterValues
from ..peft.base_weight import keep_differentiable
from ..rows.batch import Batches
from ..rows.gathered import GatheredRows, Held, RowIndex, check_names, saved_here
from ..tensors import Float, is_traced
from ..training import GROUPS, HEAD_RATE, LAMBDA_RATE, Group, grouped, magnitude_rate
from .factor_rows import FactorRows
from .hooks import check_unchanged

_VECTORS = GROUPS[:-1]
"""In the order in which a layer has them."""
_SHARED = ("train", "dvora_dropout", "detach_norm")
"""Settings that all adapters trained together have in common."""


class TrainableAdapters:
    """Adapters of one bank in training; made by `AdapterBank.trainable`.

    Every adapter has a parameter of each kind: "magnitude", "lambda_b" and "lambda_d" of all its layers, float32, and
    "head". So an optimizer of `torch.optim` has moments and steps of each, and leaves those alone that got no gradient.

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
        if not self.served.layers:
            raise ValueError("the bank has no adapter of DVoRA, which a new one would be like; add one first")
        self._check_frozen()
        self.config = self._common_config(values)
        for name, start in values.items():
            self._check_start(name, start)
        device, own_heads = self.served.device, self.served.own_heads
        started = [own_heads if start is None else self.served.heads_of(start.whole) for start in values.values()]
        self.head_shapes = [{name: tuple(values.shape) for name, values in heads.items()} for heads in started]
        kinds = [field for _ in self.served.layers for field in _VECTORS]
        of_values = [kind for kind, length in zip(kinds, rows.lengths, strict=True) for _ in range(length)]
        self._columns = torch.tensor([i for kind in _VECTORS for i, of in enumerate(of_values) if of == kind])
        self._order = self._columns.argsort().to(device)
        self._lengths = [of_values.count(kind) for kind in _VECTORS]
        self.parameters_of: dict[str, dict[Group, nn.Parameter]] = {}
        """Of each adapter by kind, those that are not trained and those without values included."""
        for (name, start), heads in zip(values.items(), started, strict=True):
            vector = (rows.start if start is None else rows.vector(start))[self._columns].to(device)
            parts: dict[Group, Tensor] = dict(zip(_VECTORS, vector.split(self._lengths), strict=True))
            parts["head"] = torch.cat([part.flatten() for part in heads.values()] or [vector[:0]]).to(device)
            self.parameters_of[name] = {
                kind: nn.Parameter(part.clone(), requires_grad=kind == "head" or kind in self.config.train)
                for kind, part in parts.items()
            }
        self._place = {name: place for place, name in enumerate(self.names)}
        self._dropout = nn.Dropout(self.config.dvora_dropout)
        keep_differentiable(self.served.model)

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
        check_unchanged(self.served.layers, self.served.modules)
        present = sorted(set(names), key=self.place)
        position = {name: position for position, name in enumerate(present)}
        self._dropout.train(self.served.model.training and self._dropout.p > 0)
        index = RowIndex([position[name] for name in names], 1, self.served.device)
        trained = TrainedRows(self, present, index, self._dropout if self._dropout.training else None)

        def begin(*_: object) -> None:
            # A pass of another thread is of another batch.
            if not is_traced() and self._batches.current() is batch:
                trained.begin()

        with self._batches.entered(trained.gathered) as batch, self.served.model.register_forward_pre_hook(begin):
            yield trained

    def place(self, name: str) -> int:
        """Where an adapter stands among the names.

        Raises:
            ValueError: it is not trained here.
        """
        if name not in self._place:
            some = ", ".join(self.names[:5])
            raise ValueError(f"names: {name!r} is none of the {len(self.names)} adapters in training ({some}, ...)")
        return self._place[name]

    @torch.no_grad()
    def flat_vector(self, name: str) -> Float[Tensor, "SH"]:
        """An adapter as a flat vector in the order of `dvora.flat.Layout`, on the CPU: its vectors, then its head."""
        self.place(name)
        return torch.cat([self._vectors([name])[0].cpu(), self.parameters_of[name]["head"].to("cpu", torch.float32)])

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for own in self.parameters_of.values() for p in own.values() if p.requires_grad and p.numel()]

    def parameter_groups(
        self,
        learning_rate: float = LAMBDA_RATE,
        *,
        weight_decay: float = 0.0,
        learning_rates: Mapping[Group, float] | None = None,
    ) -> list[dict[str, Any]]:
        """All that is trained by kind, for an optimizer of `torch.optim`; with `foreach=True` it steps all at once.

        Args:
            learning_rate: of lambda_b and lambda_d.
            weight_decay: of all but magnitudes, see `dvora.training.parameter_groups`.
            learning_rates: by kind; what is left out is as `dvora.training.recommended_rates` has it.

        Returns:
            One dictionary a kind that is trained: `name`, `params`, `lr`, `weight_decay`.

        Raises:
            ValueError: a kind is unknown or not trained, or a number is not finite or negative.
        """
        members: dict[Group, list[Tensor]] = {
            kind: [p for own in self.parameters_of.values() if (p := own[kind]).requires_grad and p.numel()]
            for kind in next(iter(self.parameters_of.values()))
        }
        # From the base's rows, which all adapters share.
        magnitude = magnitude_rate(torch.cat([layer.adapted.w for layer in self.served.layers]), learning_rate)
        usual: dict[Group, float] = {"magnitude": magnitude, "head": HEAD_RATE}
        rates = {kind: rate for kind, rate in usual.items() if members[kind]} | dict(learning_rates or {})
        return grouped(members, learning_rate, weight_decay=weight_decay, learning_rates=rates)

    def clip_grad_norm_(self, max_norm: float) -> dict[str, float]:
        """Clip the norm of each adapter's own gradient; one that is not finite is dropped, with a warning.

        So the next step of the optimizer leaves that adapter as it is, and the others go on.

        Args:
            max_norm: of an adapter; infinite: only look whether gradients are finite.

        Returns:
            The norms by name, as they were, of adapters that have a gradient.
        """
        with_gradient = {
            name: parameters
            for name, own in self.parameters_of.items()
            if (parameters := [p for p in own.values() if p.grad is not None])
        }
        if not with_gradient:
            return {}
        found = [nn.utils.clip_grad_norm_(parameters, max_norm) for parameters in with_gradient.values()]
        norms: dict[str, float] = dict(zip(with_gradient, torch.stack(found).tolist(), strict=True))
        if diverged := [name for name, norm in norms.items() if not isfinite(norm)]:
            for name in diverged:
                for parameter in with_gradient[name]:
                    parameter.grad = None
            warnings.warn(
                f"the gradient of {', '.join(map(repr, diverged[:5]))} ({len(diverged)} of {len(norms)} adapters) is "
                "not finite; the step leaves their values as they are, and the others go on",
                stacklevel=2,
            )
        return norms

    def state_dict(self) -> dict[str, Any]:
        """Names and values, for a checkpoint beside the optimizer's."""
        heads = [own["head"].detach() for own in self.parameters_of.values()]
        return {"names": self.names, "vectors": self._vectors(self.names).detach(), "heads": heads}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values of a checkpoint.

        Raises:
            ValueError: it is of other adapters, or of these in another order.
        """
        shapes, expected = (
            [tuple(of["vectors"].shape), [len(head) for head in of["heads"]]] for of in (state, self.state_dict())
        )
        if tuple(state["names"]) != self.names or shapes != expected:
            raise ValueError(
                f"the checkpoint has {len(state['names'])} adapters ({', '.join(state['names'][:5])}, ...) of "
                f"{shapes[0][-1]} values, and here are {len(self.names)} ({', '.join(self.names[:5])}, ...) of "
                f"{expected[0][-1]}, or their heads differ; call bank.trainable with the same names in the same order"
            )
        for own, vector, head in zip(self.parameters_of.values(), state["vectors"], state["heads"], strict=True):
            parts = [*vector[self._columns.to(vector.device)].split(self._lengths), head]
            for parameter, values in zip(own.values(), parts, strict=True):
                parameter.copy_(values)

    def held_of(self, names: Sequence[str]) -> list[Held]:
        """The heads of adapters by their parts."""
        held = []
        for name in names:
            shapes = self.head_shapes[self.place(name)]
            parts = self.parameters_of[name]["head"].split([prod(shape) for shape in shapes.values()])
            held.append(Held({part: flat.view(shapes[part]) for part, flat in zip(shapes, parts, strict=True)}))
        return held

    def factors(self, names: Sequence[str]) -> Float[Tensor, "n F"]:
        """The factor rows of adapters, with a graph."""
        return self._rows.of_vectors(self._vectors(names))

    def version(self, names: Sequence[str]) -> int:
        """A number that is another one as soon as a value of these adapters was written to."""
        return sum(parameter._version for name in names for parameter in self.parameters_of[name].values())

    def _vectors(self, names: Sequence[str]) -> Float[Tensor, "n S"]:
        own = [self.parameters_of[name] for name in names]
        by_kind = [torch.stack([parameters[kind] for parameters in own]) for kind in _VECTORS]
        return torch.cat(by_kind, 1).index_select(1, self._order)

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
            if start.content.factors:
                raise ValueError(f"names: {name!r} is of {start.content.method}, which is served here and not trained")
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


class TrainedRows:
    """Rows of adapters in training; their factors are made once in a pass of the model.

    Args:
        adapters: in training.
        present: the names of those in the batch, n of them.
        rows: the position of each row's adapter among those.
        dropout: of the inputs of updates.
    """

    def __init__(
        self, adapters: TrainableAdapters, present: Sequence[str], rows: RowIndex, dropout: nn.Module | None
    ) -> None:
        self._adapters, self._present, self._rows = adapters, present, rows
        self.gathered = GatheredRows(
            rows, adapters.row_lengths, self._matrix, lambda: adapters.held_of(present), dropout=dropout
        )
        self._cached: tuple[tuple[int, bool], Tensor] | None = None
        """The factor rows of a pass, with the version of the values and whether gradients were recorded."""

    def begin(self) -> None:
        """Begin a pass of the model: the graph of the last one's factor rows may be gone."""
        self._cached = None

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

    def _matrix(self) -> Tensor:
        """The factor rows of this pass; what a checkpoint repeats in the backward pass gets those of the last one."""
        state = (self._adapters.version(self._present), torch.is_grad_enabled())
        if self._cached is None or self._cached[0] != state:
            # A checkpointed layer may be the first to ask for them, and does not make them when it is repeated.
            with saved_here():
                self._cached = state, self._adapters.factors(self._present)
        return self._cached[1]
