"""Which batch a call of the model is in, and what hooks on its layers and heads do for each row of that batch.

A batch belongs to whoever entered it: a thread, within it an asyncio task, and a generator while it runs. A call from
anywhere else is refused, since it would get the adapters of somebody else's rows: a generator's next step may run in
another thread, in which another batch has begun. An ended batch serves nobody, wherever it was ended.

The backward pass may repeat a checkpointed layer, on a GPU in a thread of its own. There the batch is known by the
backward pass: its first step is a hook on the model's outputs, which the batch has put there.

Dimensions: B rows of a batch, O out, R rank.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from ..peft.layer_types import ActiveAdapter, LayerType, adapted_outputs, check_gradient
from ..tensors import TensorVersion, bias_of, is_traced
from ..weight import AdaptedWeight
from .slots import GatheredRows, HeadGroup, ServedHead

_ENTER = {
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._AsyncGeneratorContextManager.__aenter__.__code__,
}
"""What runs a generator as the beginning of a `with` block: the block is not in the generator, but around its yield."""


class Batch:
    """One batch of a bank, compared by identity.

    Args:
        rows: its adapters.
    """

    def __init__(self, rows: GatheredRows) -> None:
        self.rows = rows
        self.backward_passes: set[int] = set()
        """By autograd's number: those that began at outputs of this batch."""
        self.widths: dict[str, list[int]] = {}
        """Outputs of each row, by head, once it has run."""
        self._owner, self._generators = _owner(), _generators(sys._getframe(1))

    def is_running(self) -> bool:
        """Whether this call comes from where the batch was entered."""
        if self._owner != _owner():
            return False
        return not self._generators or self._generators <= set(_frames(sys._getframe(1)))

    def forget_frames(self) -> None:
        """Let go of what the batch was entered from."""
        self._generators = frozenset()

    def split(self, outputs: Tensor, head: str | None = None) -> list[Tensor]:
        """The outputs of a head by row, each without what was filled up for adapters with more outputs.

        Args:
            outputs: of the model in this batch, (B, ..., O).
            head: its name, if the model has several.

        Raises:
            ValueError: no such head has run in this batch, or the outputs are of other rows.
        """
        if (head is None and len(self.widths) != 1) or (head is not None and head not in self.widths):
            raise ValueError(f"head: {head!r} is none that has run in this batch: {sorted(self.widths)}")
        widths = next(iter(self.widths.values())) if head is None else self.widths[head]
        if len(outputs) != len(widths):
            raise ValueError(f"outputs has {len(outputs)} rows, and the batch {len(widths)}")
        return [row[..., :width] for row, width in zip(outputs, widths, strict=True)]


class Batches:
    """The batches of one bank that run now, and which of them a call belongs to."""

    def __init__(self) -> None:
        self._running: set[Batch] = set()
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def entered(self, rows: GatheredRows) -> Iterator[Batch]:
        """Make a batch that of the calls from here.

        Raises:
            ValueError: they are in another one, or the bank was closed.
        """
        self.check_free()
        batch = Batch(rows)
        with self._lock:
            self.check_open()
            self._running.add(batch)
        _entered.set((*_entered.get(), batch))
        try:
            yield batch
        finally:
            # Here for all; below for this context, which may be another one than the batch was entered in.
            self._running.discard(batch)
            batch.forget_frames()
            _entered.set(tuple(other for other in _entered.get() if other is not batch))

    def close(self) -> None:
        """Take no more batches.

        Raises:
            ValueError: some run; nothing has changed then.
        """
        with self._lock:
            if self._running:
                raise ValueError(
                    f"{len(self._running)} batches are in the bank, which would have the base's outputs; leave their "
                    "`with` blocks before it is closed"
                )
            self._closed = True

    @property
    def are_running(self) -> bool:
        """Whether somebody is in a batch."""
        return bool(self._running)

    def check_open(self) -> None:
        """Refuse what comes after the end.

        Raises:
            ValueError: the bank was closed.
        """
        if self._closed:
            raise ValueError("the bank was closed; make a new one")

    def check_free(self) -> None:
        """Refuse a second batch here.

        Raises:
            ValueError: this call is in one.
        """
        if self.current() is not None:
            raise ValueError("this call is in a batch of the bank already; leave its `with` block first")

    def current(self) -> Batch | None:
        """The batch that this call is in."""
        if (number := torch._C._current_graph_task_id()) != -1:
            # Whatever thread it runs in, and whatever batch that is in.
            entered = [batch for batch in list(self._running) if number in batch.backward_passes]
        else:
            entered = [batch for batch in _entered.get() if batch in self._running and batch.is_running()]
        if len(entered) > 1:
            raise ValueError("this call is in two batches of the bank, one of a generator; take one at a time")
        return entered[0] if entered else None

    def required(self) -> Batch:
        """The batch that this call is in.

        Raises:
            ValueError: it is in none.
            RuntimeError: it is compiled, exported, traced or transformed: a graph would give later batches the adapters
                of this one.
        """
        if is_traced():
            raise RuntimeError(
                "a model in an AdapterBank cannot be compiled, exported, traced or transformed by torch.func: call it "
                "as it is, or export it with its adapters (dvora export)"
            )
        batch = self.current()
        if batch is None:
            self._refuse()
        return batch

    def _refuse(self) -> NoReturn:
        advice = "call it within `with bank.rows(names):`, where None names the base, or close the bank"
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "the backward pass repeats a checkpointed layer of a bank's model and is in no batch: call backward() "
                "within `with tenants.rows(names):`, on what was computed from the model's outputs there"
            )
        if any(batch in self._running for batch in _entered.get()):
            raise ValueError(
                "the model was called outside of bank.rows(...), from another thread, task or generator than the one "
                f"that entered a batch here; a batch serves only the code that entered it: {advice}"
            )
        raise ValueError(
            "the model is in an AdapterBank and was called outside of bank.rows(...), so nobody said which adapter "
            f"each row has; {advice}. A batch is of the thread, the task and the generator that entered it"
        )


_entered: ContextVar[tuple[Batch, ...]] = ContextVar("dvora_batches", default=())
"""Batches that were entered in this context, ended ones perhaps among them."""


def _owner() -> tuple[int, object]:
    """This thread, and its asyncio task: a task that another one starts gets a copy of its context."""
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:
        return threading.get_ident(), None


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _generators(frame: FrameType) -> frozenset[FrameType]:
    """The generators that a call runs in. One may stop in the middle of a batch, and go on anywhere."""
    kinds = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    return frozenset(
        caller
        for caller in _frames(frame)
        if caller.f_code.co_flags & kinds and not (caller.f_back is not None and caller.f_back.f_code in _ENTER)
    )


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
        return all(
            (tensor := holder.get(name)) is not None and version.is_of(tensor) for holder, name, version in self.frozen
        )


def check_unchanged(layers: Sequence[ServedLayer]) -> None:
    """Refuse to serve over a base that was written to, cast or moved since: factors are of its rows.

    Raises:
        ValueError: a layer has another weight.
    """
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
        batches: of the bank.
    """

    def __init__(self, layer: ServedLayer, position: int, batches: Batches) -> None:
        super().__init__(batches)
        self.layer, self.position = layer, position

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], base_output: Tensor) -> Tensor:
        layer = self.layer
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        check_gradient(module, layer.layer_type, x, base_output, layer.name)
        rows = self.batches.required().rows
        factors = rows.factors(self.position, len(x), base_output.dim(), layer.adapted.w.dtype)
        adapter = ActiveAdapter(layer.adapted, factors, rows.dropout)
        bias = bias_of(module, layer.measured_bias)
        return adapted_outputs(module, layer.layer_type, x, base_output, [adapter], bias)


class _Skeleton(threading.local):
    """A copy of a head for each thread: `functional_call` puts the parameters of its call into the module."""

    def __init__(self, head: nn.Module) -> None:
        self.module = copy.deepcopy(head)


class HeadHook(_Hook):
    """The forward hook of a head: the outputs of each row by the head of its adapter, as if it was alone.

    Rows whose heads have fewer outputs than others are filled up with minus infinity, which no class is chosen by.

    Args:
        head: the head.
        batches: of the bank.
    """

    def __init__(self, head: ServedHead, batches: Batches) -> None:
        super().__init__(batches)
        self.head = head
        self._skeleton = _Skeleton(head.skeleton)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], base_output: Any) -> Tensor:
        head = self.head
        if kwargs or not all(isinstance(value, Tensor) for value in (*args, base_output)):
            got = [type(value).__name__ for value in (*args, *kwargs.values())]
            raise TypeError(
                f"{head.name}: a head of a bank takes tensors, without keywords, and returns one; it got {got} and "
                f"returned {type(base_output).__name__}"
            )
        self._skeleton.module.train(module.training)
        count = len(args[0])
        batch = self.batches.required()
        groups = batch.rows.heads(head, count)
        parts = [self._outputs(group, args) for group in groups]
        of_base = batch.rows.of_base(count)
        batch.widths[head.name] = _widths(groups, parts, count)
        outputs = _filled(groups, parts, count)
        if of_base is None:
            return outputs
        # To the bits, which batched products need not have.
        padded = _padded(base_output, outputs.shape[-1])
        return torch.where(of_base.view(-1, *(1,) * (outputs.dim() - 1)), padded, outputs)

    def _outputs(self, group: HeadGroup, args: tuple[Tensor, ...]) -> Tensor:
        if group.rows is not None:
            args = tuple(x.index_select(0, group.rows) for x in args)
        outputs: Tensor = torch.vmap(self._alone, randomness="different")(group.parameters, *args)
        return outputs

    def _alone(self, parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        inputs = tuple(x.unsqueeze(0) for x in inputs)
        output: Tensor = functional_call(self._skeleton.module, parameters, inputs)
        return output.squeeze(0)


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
