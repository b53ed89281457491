"""What hooks on the layers and heads of a bank's model do for each row of the batch that a call is in.

Dimensions: O out.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..peft.layer_types import ActiveAdapter, LayerType, adapted_outputs, check_gradient
from ..rows.batch import Batch, Batches
from ..rows.gathered import GatheredRows, HeadByRow, HeadGroup, RowsFirst, ServedHead
from ..rows.low_rank import LowRank, rows_of
from ..rows.shared import KnownBlocks, SharedPass
from ..tensors import TensorVersion, bias_of, is_traced, replace_forward
from ..weight import AdaptedWeight


class ServedLayer(NamedTuple):
    """One layer, with the frozen side of all adapters."""

    name: str
    module: nn.Module
    layer_type: LayerType
    adapted: AdaptedWeight
    measured_bias: Tensor | None
    fingerprint: tuple[float, ...]
    frozen: tuple[tuple[Mapping[str, Any], str, TensorVersion], ...]
    """Where the tensors are that the weight is or is computed from, and how they were when the constants were computed;
    none of a quantised layer."""

    def is_unchanged(self) -> bool:
        """Whether the weight is still the one whose constants are kept, as far as PyTorch counts writes."""
        for holder, name, version in self.frozen:
            if (tensor := holder.get(name)) is None or not version.is_of(tensor):
                return False
        return True


ModulePlace = tuple[Mapping[str, nn.Module | None], str, nn.Module]
"""The children of a module, the name of one, and that one."""


def check_unchanged(layers: Sequence[ServedLayer], modules: Sequence[ModulePlace]) -> None:
    """Refuse to serve over a base that was written to, cast or moved since, or has lost modules with their hooks.

    Raises:
        ValueError: a layer has another weight, or a module's place another module.
    """
    for children, name, module in modules:
        if children.get(name) is not module:
            raise ValueError(
                f"model: {name}, a {type(module).__name__}, was replaced or removed since the bank was made, and what "
                "is in its place would answer without adapters; close the bank and make a new one"
            )
    for layer in layers:
        if not layer.is_unchanged():
            raise ValueError(
                f"{layer.name}: its weight was written to, cast or moved since the bank was made, and what the bank "
                "holds belongs to the weight as it was; close the bank and make a new one"
            )


def frozen_tensors(layer: nn.Module, layer_type: LayerType) -> tuple[tuple[Mapping[str, Any], str, TensorVersion], ...]:
    """The tensors that a layer's weight is, or is computed from in every pass: where, and as they are now."""
    if not layer_type.has_weight:
        return ()
    if parametrize.is_parametrized(layer, "weight"):
        sources = layer.get_submodule("parametrizations.weight").modules()
        places: list[tuple[Mapping[str, Any], str]] = [(m._parameters, name) for m in sources for name in m._parameters]
    else:
        places = [next((d, "weight") for d in (layer._parameters, layer._buffers, vars(layer)) if "weight" in d)]
    return tuple((holder, name, TensorVersion.of(holder[name])) for holder, name in places)


class _Hook:
    """What hooks have in common: they hold a running bank, which cannot be copied with the model, nor be in a graph."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterBank serves this model, so it cannot be copied or saved as a whole; close the bank")


class LayerHook(_Hook):
    """The forward hook of a layer: from the base's outputs to those of each row's adapter.

    Args:
        layer: the layer.
        position: among the layers of the bank.
        rows_first: of the layer.
        batches: of the bank.
    """

    def __init__(self, layer: ServedLayer, position: int, rows_first: RowsFirst, batches: Batches) -> None:
        super().__init__(batches)
        self.layer, self.position, self.rows_first = layer, position, rows_first

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], base_output: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        check_gradient(module, self.layer.layer_type, x, base_output, self.layer.name)
        rows = self.batches.required().rows
        if not self.rows_first.is_known:
            self.rows_first.look(x, rows.rows)
        if not rows.changes(self.position):
            rows.rows.of(len(x))
            return base_output
        if not self.rows_first.is_known:
            self.rows_first.check(x)
        if (part := rows.with_vectors(len(x))) is not None:
            # Copying rows costs less than updating those that have nothing to update.
            who, rows = part
            if not len(who):
                return base_output
            outputs = self._outputs(module, x.index_select(0, who), base_output.index_select(0, who), rows)
            # Nobody else has seen them yet.
            return base_output.index_copy_(0, who, outputs)
        return self._outputs(module, x, base_output, rows)

    def _outputs(self, module: nn.Module, x: Tensor, base_output: Tensor, rows: GatheredRows) -> Tensor:
        layer = self.layer
        factors = rows.factors(self.position, len(x), base_output.dim(), layer.adapted.w.dtype)
        adapter = ActiveAdapter(layer.adapted, factors, rows.dropout)
        bias = bias_of(module, layer.measured_bias)
        # This hook is the first one, so that nobody has seen the base's outputs.
        return adapted_outputs(module, layer.layer_type, x, base_output, [adapter], bias, in_place=True)


class LowRankHook(_Hook):
    """The forward hook of a linear layer: what adapters of LoRA do for their rows.

    Args:
        name: of the layer.
        rows_first: of the layer.
        batches: of the bank.
    """

    def __init__(self, name: str, rows_first: RowsFirst, batches: Batches) -> None:
        super().__init__(batches)
        self.name, self.rows_first = name, rows_first

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if self.batches.have_factors:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            for who, factors in self._groups(x):
                # Nobody else has seen the outputs yet.
                put = torch.index_copy if torch.is_grad_enabled() else Tensor.index_copy_
                updated = factors.outputs(x, who, rows_of(output, who))
                output = updated if who is None else put(output, 0, who, updated)
        return output

    def _groups(self, x: Tensor) -> list[tuple[Tensor | None, LowRank]]:
        rows = self.batches.required().rows
        if not self.rows_first.is_known:
            self.rows_first.look(x, rows.rows)
        groups = rows.low_rank(self.name, len(x))
        if groups and not self.rows_first.is_known:
            self.rows_first.check(x)
        return groups


class BlockForward(_Hook):
    """In the place of a known block's forward: it is computed once for rows of a batch that are equal in it.

    Args:
        module: the block.
        number, place: of its list, and of the block in that.
        known: the list.
        passes: through the list, of the batches that run.
        batches: of the bank.
    """

    def __init__(
        self,
        module: nn.Module,
        number: int,
        place: int,
        known: KnownBlocks,
        passes: MutableMapping[Batch, SharedPass],
        batches: Batches,
    ) -> None:
        super().__init__(batches)
        self._number, self._place, self._known, self._passes = number, place, known, passes
        self._forward = module.forward
        self.remove = replace_forward(module, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_first = self._place == 0
        if not (is_first or self._passes) or is_traced() or (batch := self.batches.current()) is None:
            return self._forward(*args, **kwargs)
        arguments, shared = self._known.arguments(args, kwargs), self._passes.pop(batch, None)
        if is_first:
            is_known = not torch.is_grad_enabled() and self._known.run_as_known()
            x = next(iter(arguments.values()))
            shared = SharedPass.begun(batch.rows, self._number, x) if is_known else None
        if shared is None or (portions := shared.enter(self._place, arguments)) is None:
            return self._forward(*args, **kwargs)
        all_rows, outputs = batch.rows, []
        try:
            for batch.rows, narrowed in portions:
                outputs.append(self._forward(**narrowed))
        finally:
            batch.rows = all_rows
        self._passes[batch] = shared
        return shared.leave(outputs)


class HeadHook(_Hook):
    """The forward hook of a head: the outputs of each row by the head of its adapter, as if it was alone.

    Rows whose heads have fewer outputs than others are filled up with minus infinity, which no class is chosen by.

    Args:
        head: the head.
        rows_first: of the head.
        batches: of the bank.
    """

    def __init__(self, head: ServedHead, rows_first: RowsFirst, batches: Batches) -> None:
        super().__init__(batches)
        self.head, self.rows_first = head, rows_first
        self._by_row = HeadByRow(head)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], base_output: Any) -> Tensor:
        head = self.head
        if kwargs or not all(isinstance(value, Tensor) for value in (*args, base_output)):
            got = [type(value).__name__ for value in (*args, *kwargs.values())]
            raise TypeError(
                f"{head.name}: a head of a bank takes tensors, without keywords, and returns one; it got {got} and "
                f"returned {type(base_output).__name__}"
            )
        self._by_row.module.train(module.training)
        count = len(args[0])
        batch = self.batches.required()
        groups = batch.rows.heads(head, count)
        if not self.rows_first.is_known:
            self.rows_first.look(args[0], batch.rows.rows)
            self.rows_first.check(args[0])
        parts = [
            self._by_row.outputs(
                group.parameters, args if group.rows is None else [x.index_select(0, group.rows) for x in args]
            )
            for group in groups
        ]
        of_base = batch.rows.of_base(count)
        batch.widths[head.name] = _widths(groups, parts, count)
        outputs = _filled(groups, parts, count)
        if of_base is None:
            return outputs
        # To the bits, which batched products need not have.
        padded = _padded(base_output, outputs.shape[-1])
        return torch.where(of_base.view(-1, *(1,) * (outputs.dim() - 1)), padded, outputs)


def _padded(outputs: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(outputs, (0, width - outputs.shape[-1]), value=-torch.inf)


def _widths(groups: list[HeadGroup], parts: list[Tensor], count: int) -> list[int]:
    """The number of outputs of each row."""
    widths = [0] * count
    for group, part in zip(groups, parts, strict=True):
        for row in range(count) if group.rows is None else group.rows.tolist():
            widths[row] = part.shape[-1]
    return widths


def _filled(groups: list[HeadGroup], parts: list[Tensor], count: int) -> Tensor:
    """The outputs of all rows, filled up to the largest number of them."""
    if len(groups) == 1 and groups[0].rows is None:
        return parts[0]
    width = max(part.shape[-1] for part in parts)
    rows = torch.cat([group.rows for group in groups if group.rows is not None])
    return torch.cat([_padded(part, width) for part in parts])[rows.argsort()]


class OutputHook(_Hook):
    """The forward hook of the model: a backward pass that begins at its outputs is the batch's."""

    def __call__(self, _module: nn.Module, _args: object, outputs: object) -> None:
        if not torch.is_grad_enabled() or (batch := self.batches.current()) is None:
            return
        running = weakref.ref(batch)

        def begin(_: Tensor) -> None:
            if (of_outputs := running()) is not None:
                of_outputs.backward_passes.add(torch._C._current_graph_task_id())

        for tensor in _tensors(outputs):
            if tensor.requires_grad:
                tensor.register_hook(begin)


def _tensors(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict | list | tuple):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _tensors(value)


def check_without_bank(model: nn.Module) -> None:
    """Refuse a model that a bank serves already.

    Raises:
        ValueError: it does.
    """
    for name, module in model.named_modules():
        if any(isinstance(hook, _Hook) for hook in module._forward_hooks.values()):
            raise ValueError(f"model: {name} is served by another bank; close that one first")
