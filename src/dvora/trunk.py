"""The trunk of a model, which is all that comes before the first block that is trained: computed once a text.

Dimensions: B rows of a batch, T tokens, H features.
"""

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .blocks import are_known, block_lists
from .tensors import Float, autocast_dtype, replace_forward

__all__ = ["Trunk", "cached_trunk", "frozen_blocks"]

MEMORY = 2**30
"""Bytes of a cache that is in memory; a larger one is in a file."""
NOT_CACHED = "blocks that are not trained are computed in every pass"
UNREAD = ("labels", "num_items_in_batch", "return_dict")
"""Arguments of models on which nothing depends that enters a block."""
_log = logging.getLogger(__name__)


def frozen_blocks(model: nn.Module) -> int:
    """How many blocks come before the first one that is trained; 0 where none is, or the model has not one list."""
    lists = block_lists(model)
    trained = [any(p.requires_grad for p in block.parameters()) for block in lists[0][1]] if len(lists) == 1 else []
    return trained.index(True) if any(trained) else 0


@contextmanager
def cached_trunk(
    model: nn.Module, *, memory: int = MEMORY, folder: Path | None = None, note: Callable[[str], None] = _log.info
) -> Iterator["Trunk | None"]:
    """Let passes of a model, in training and evaluation, compute what comes before the first trained block once a text.

    Later passes begin with what enters that block, cached for each text without padding. It is computed in evaluation
    mode: there is no dropout before that block. Other than that the outputs are the model's own, which is checked with
    the first batch. Blocks have to be known ones of transformers (`dvora.blocks`), and weights of the trunk must not
    change meanwhile.

    Args:
        model: on one device, called by one process with tensors of B rows (`input_ids`, `attention_mask`, ...). Calls
            with other arguments, such as a cache of keys and values, are computed as ever.
        memory: bytes of the cache in memory; as soon as it is larger it is a file.
        folder: of that file, which has no name in it and goes with the process at the latest; None: the system's.
        note: called with one line that says why, if nothing can be cached and all is computed as ever.

    Yields:
        The trunk; None if nothing can be cached.
    """
    if obstacle := _obstacle(model):
        note(f"{NOT_CACHED}: {obstacle}")
        yield None
        return
    with closing(Trunk(model, _Rows(memory, folder), note)) as trunk:
        yield trunk


def _obstacle(model: nn.Module) -> str:
    """Why the trunk of a model cannot be cached; empty if nothing in the model says so."""
    modules, names = [*model.modules()], [name for name, _ in block_lists(model)]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return "several processes train together"
    if any(isinstance(module, nn.DataParallel) for module in modules):
        return "the model is spread over several devices"
    if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in modules):
        return "the model is compiled"
    if any(vars(module).get("gradient_checkpointing") for module in modules):
        return "gradient checkpointing computes blocks twice"
    if len(names) != 1:
        return f"the model has {len(names)} lists of blocks ({', '.join(names) or 'none'}), where one was expected"
    if not (frozen := frozen_blocks(model)):
        return "no block comes before the first that is trained"
    block = block_lists(model)[0][1][0]
    known = are_known(block_lists(model)[0][1][:frozen])
    return "" if known else f"nobody knows whether a text in a {type(block).__name__} depends on others in its batch"


class Trunk:
    """What comes before the first trained block, with a cache of what it gave; made by `cached_trunk`."""

    def __init__(self, model: nn.Module, rows: "_Rows", note: Callable[[str], None]) -> None:
        ((path, blocks),) = block_lists(model)
        self._model, self._rows, self._note, self._blocks = model, rows, note, frozen_blocks(model)
        self._first = blocks[self._blocks]
        self._states: Tensor | None = None
        """What enters the first trained block in this pass; None: it is computed."""
        self._ran: list[tuple[nn.Module, Any]] | None = None
        """In a pass that ends there: what ran so far, and its outputs."""
        self._gives: dict[nn.Module, list[None] | None] = {}
        """What ran before it and gave a tensor of its shape; if in a tuple, what comes behind it there."""
        self._is_checked = False
        self._give_back = [
            replace_forward(module, self._or_states(module, module.forward))
            for module in (*blocks[: self._blocks], *_beside(model, path))
        ]
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def __str__(self) -> str:
        which = "block 0 is" if self._blocks == 1 else f"blocks 0 to {self._blocks - 1} are"
        where = "on disk" if self._rows.is_on_disk else "in memory"
        size = f"{len(self._rows):,} texts, {self._rows.bytes / 1e6:,.1f} MB {where}"
        return f"{which} computed once a text, without dropout: {size}"

    @property
    def is_used(self) -> bool:
        """Whether passes begin with the cache: nothing against it has come up."""
        return bool(self._handles)

    def store(self, inputs: Mapping[str, Any]) -> None:
        """Cache what the trunk gives of a batch, of which nothing else is computed."""
        if self.is_used:
            self._enter(_Batch.of(self._model.forward, (), inputs))

    def close(self) -> None:
        """Let the model compute all as ever, and forget the cache."""
        for give_back in self._give_back:
            give_back()
        for handle in self._handles:
            handle.remove()
        self._give_back, self._handles = [], []
        self._rows.close()

    def _or_states(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a module, which gives the states at once where they are there."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._states is not None and module in self._gives:
                more = self._gives[module]
                return self._states if more is None else (self._states, *more)
            output = forward(*args, **kwargs)
            if self._ran is not None:
                self._ran.append((module, output))
            return output

        return run

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states = self._enter(_Batch.of(model.forward, args, kwargs))

    def _end(self, *_: Any) -> None:
        self._states = None

    def _enter(self, batch: "_Batch | None") -> Float[Tensor, "B T H"] | None:
        """What enters the first trained block; None where it is not cached."""
        if batch is None:
            return None
        if not all(key in self._rows for key in batch.keys):
            with _evaluating(self._model):
                obstacle = self._add(batch)
            if obstacle:
                self.close()
                self._note(f"{NOT_CACHED}: {obstacle}")
                return None
        return batch.padded([self._rows[key] for key in batch.keys])

    def _add(self, batch: "_Batch") -> str:
        """Cache the rows of a batch; of the first one see that outputs are the same. Says what is in the way."""
        states = self._computed(batch)
        if not isinstance(states, Tensor) or states.dim() != 3 or not batch.has_shape(states):
            return "they are not called with rows of hidden states"
        if states.requires_grad:
            return "something before the first trained block is trained, such as embeddings"
        if batch.mask is not None and not batch.mask[:, 0].all():
            return "texts begin with padding, on which positions depend; set the tokenizer's padding_side to 'right'"
        for key, row in zip(batch.keys, batch.rows(states), strict=True):
            self._rows.add(key, row)
        if not self._is_checked:
            outputs = []
            for self._states in (None, batch.padded([self._rows[key] for key in batch.keys])):
                with torch.no_grad():
                    outputs.append(batch.real(batch.run()))
            if not all(map(_alike, *outputs)):
                return "the model's outputs depend on more than what enters the first trained block"
            self._is_checked = True
        return ""

    def _computed(self, batch: "_Batch") -> Any:
        """What enters the first trained block, from a pass that ends there."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _EnteredError(args[0] if args else kwargs.get("hidden_states"))

        handle = self._first.register_forward_pre_hook(stop, with_kwargs=True)
        self._states, self._ran = None, []
        try:
            # With gradients, to see whether anything before this block is trained.
            with torch.inference_mode(False), torch.enable_grad():
                batch.run()
        except _EnteredError as entered:
            (states,) = entered.args
            for module, output in self._ran:
                first, *more = output if isinstance(output, tuple) else (output,)
                if isinstance(states, Tensor) and isinstance(first, Tensor) and first.shape == states.shape:
                    self._gives[module] = [None] * len(more) if isinstance(output, tuple) else None
            return states
        finally:
            handle.remove()
            self._ran = None


class _EnteredError(Exception):
    """Ends a pass where the first trained block begins; its argument is what enters that."""


class _Batch(NamedTuple):
    """A pass of a model over rows."""

    run: Callable[[], Any]
    mask: Tensor | None
    """Where its rows have tokens, on the CPU; None: everywhere."""
    keys: list[bytes]
    """Of the rows, in the cache."""
    device: torch.device

    @classmethod
    def of(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "_Batch | None":
        """None if there are other arguments than tensors of as many rows."""
        arguments = {**dict(zip(signature(forward).parameters, args, strict=False)), **kwargs}
        read = {k: v for k, v in sorted(arguments.items()) if v is not None and v is not False and k not in UNREAD}
        values = {name: v.detach().cpu() for name, v in read.items() if isinstance(v, Tensor) and v.dim()}
        if not values or len(values) < len(read) or len({len(value) for value in values.values()}) > 1:
            return None
        device, mask = next(iter(read.values())).device, values.pop("attention_mask", None)
        if mask is not None and (mask.dim() != 2 or not values):
            return None
        mask = None if mask is None else mask.bool()
        keys = []
        for row in range(len(next(iter(values.values())))):
            key = hashlib.blake2b(f"{[*values]} {autocast_dtype(device)}".encode(), digest_size=16)
            parts = [_without_padding(value, mask, row) for value in values.values()]
            for part in parts if mask is None else [*parts, mask[row].nonzero()]:
                key.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
            keys.append(key.digest())
        return cls(lambda: forward(*args, **kwargs), mask, keys, device)

    def has_shape(self, states: Tensor) -> bool:
        """Whether a tensor has its rows and tokens."""
        return len(states) == len(self.keys) if self.mask is None else states.shape[:2] == self.mask.shape

    def rows(self, states: Float[Tensor, "B T H"]) -> Sequence[Tensor]:
        """Of hidden states, on the CPU without padding."""
        states = states.detach().cpu()
        return states.unbind() if self.mask is None else states[self.mask].split(self.mask.sum(1).tolist())

    def padded(self, rows: list[Tensor]) -> Float[Tensor, "B T H"]:
        """Hidden states on the batch's device, zero where there is padding."""
        if self.mask is None:
            return torch.stack(rows).to(self.device)
        states = rows[0].new_zeros(*self.mask.shape, rows[0].shape[-1])
        states[self.mask] = torch.cat(rows)
        return states.to(self.device)

    def real(self, outputs: Any) -> list[Tensor]:
        """The tensors among a model's outputs, without what is of padding."""
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        tensors = [outputs] if isinstance(outputs, Tensor) else [v for v in values if isinstance(v, Tensor)]
        return [_without_padding(tensor.cpu(), self.mask) for tensor in tensors]


def _without_padding(value: Tensor, mask: Tensor | None, row: Any = ...) -> Tensor:
    """Rows of a tensor, or one, without what is of padding if it has something for every token."""
    return value[row] if mask is None or value.shape[:2] != mask.shape else value[row][mask[row]]


def _alike(expected: Tensor, actual: Tensor) -> bool:
    tolerance = 10 * torch.finfo(expected.dtype).resolution * expected.abs().max()
    return bool((actual - expected).abs().max() <= tolerance)


class _Rows:
    """Tensors by key, in memory, or in a file without a name if there are more bytes than may be there."""

    def __init__(self, memory: int, folder: Path | None) -> None:
        self.bytes, self._memory = 0, memory
        self._file = tempfile.SpooledTemporaryFile(max(1, memory), dir=None if folder is None else str(folder))  # noqa: SIM115  (closed by `close`)
        self._places: dict[bytes, tuple[int, torch.Size, torch.dtype]] = {}

    @property
    def is_on_disk(self) -> bool:
        """Whether they are in the file."""
        return self.bytes > self._memory

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: bytes) -> Tensor:
        start, shape, dtype = self._places[key]
        self._file.seek(start)
        data = bytearray(self._file.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def add(self, key: bytes, row: Tensor) -> None:
        """Add what is not there yet."""
        if key not in self:
            self._places[key] = self.bytes, row.shape, row.dtype
            self._file.seek(self.bytes)
            self._file.write(row.contiguous().view(torch.uint8).numpy().tobytes())
            self.bytes += row.nbytes

    def close(self) -> None:
        """Forget everything."""
        self._places = {}
        self._file.close()


def _beside(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules beside those that hold a list of blocks."""
    parts = path.split(".")
    for depth, part in enumerate(parts):
        yield from (m for name, m in model.get_submodule(".".join(parts[:depth])).named_children() if name != part)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
