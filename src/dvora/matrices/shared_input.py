"""One projection for sibling layers, which read the same inputs: query, key and value, or gate and up.

`z = x A^T` is computed for the first of them and reused by the others, so autograd sums its gradient before the one
product with A. It is keyed on tensor, version, rank, pass of the model, grad mode, autocast and stream, with one cache
a thread, and is dropped with the tensor. PyTorch does not count writes through `x.data` or NumPy; within one pass of a
model none are expected. Elsewhere, a layer that asks twice is taken to be in another pass, and gets a new projection;
and on the CPU, inputs outside a graph are compared by value with those that were projected, which costs less than the
product.
"""

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.passes import Pass, current_pass
from ..ops.tracing import is_traced


class PassProjection(NamedTuple):
    """The last projection in a pass of a model without gradients and autocast, on the CPU."""

    x: "weakref.ref[Tensor]"
    memory: tuple[object, ...]
    rank: int
    matrices: object
    """With A, compared by identity."""
    readers: list[object]
    z: Tensor


def projected_in_pass(
    x: Tensor, rank: int, matrices: object, reader: object, project: Callable[[Tensor], Tensor], running: Pass
) -> Tensor:
    """`project(x)` as from a `ProjectionCache`, which asks much more than is needed here.

    Args:
        x: inputs, on the CPU.
        rank: number of rows of A.
        matrices: with A.
        reader: the calling layer.
        project: the product with A^T, without gradients and autocast.
        running: the pass.
    """
    last: PassProjection | None = running.projected
    if (
        last is not None
        and last.x() is x
        and last.memory == _memory(x)
        and last.rank == rank
        and last.matrices is matrices
        and reader not in last.readers
    ):
        last.readers.append(reader)
        return last.z
    z = project(x)
    # Inference tensors have no version: always stale.
    if not x.is_inference():
        running.projected = PassProjection(weakref.ref(x), _memory(x), rank, matrices, [reader], z)
    return z


class ProjectionCache:
    """The last projection of each thread, with a weak reference to its input."""

    def __init__(self) -> None:
        self._local = threading.local()

    def of(self, x: Tensor, rank: int, reader: object, project: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`project(x, rank)`, or its last result if another reader projected the same tensor.

        Args:
            x: inputs.
            rank: number of rows of A.
            reader: the calling layer.
            project: the product with A^T.
        """
        # Inference tensors have no version: always stale. A traced graph must not depend on a cache.
        if is_traced() or x.is_inference():
            return project(x, rank)
        context = _context(x, rank)
        last: _Entry | None = getattr(self._local, "entry", None)
        if last is not None and last.reference() is x and last.context == context:
            z = last.handed_to(reader, x)
            if z is not None:
                return z
        # Before projecting, since another thread may write to x meanwhile.
        compared = x.is_cpu and current_pass() is None and not (torch.is_grad_enabled() and x.requires_grad)
        values = x.detach().clone() if compared else None
        z = project(x, rank)
        self._local.entry = _Entry(x, values, context, z, reader)
        return z

    def __reduce__(self) -> tuple[type["ProjectionCache"], tuple[()]]:
        return ProjectionCache, ()


def _context(x: Tensor, rank: int) -> tuple[object, ...]:
    """Everything other than the values of x that its projection, or its use, depends on."""
    device, recorded = x.device.type, torch.is_grad_enabled()
    # `detach_` changes only the node that made x.
    graph = (x.requires_grad, x.grad_fn, _hook()) if recorded else None
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    stream = _stream(x) if x.is_cuda else None
    return _memory(x), rank, current_pass(), graph, recorded, torch.is_inference_mode_enabled(), autocast, stream


def _memory(x: Tensor) -> tuple[object, ...]:
    """Where the values of x are, and how often they were written to."""
    return x._version, x.data_ptr(), x.stride()


def _hook() -> "_Hook | None":
    """The current hook on saved tensors.

    Checkpointing runs a part of the model twice, and both runs must save the same tensors, so neither may reuse a
    projection from outside.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else _Hook(hooks[0])


class _Hook:
    """A weak reference to a hook, which holds what it saved; without weak references, hooks never compare equal."""

    def __init__(self, hook: object) -> None:
        try:
            self.reference: Callable[[], object] | None = weakref.ref(hook)
        except TypeError:
            self.reference = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Hook) or self.reference is None or other.reference is None:
            return False
        return self.reference() is other.reference()

    __hash__ = None  # type: ignore[assignment]  # it is compared, never looked up


class _Entry:
    """A projection and its input; the projection is freed with the input."""

    def __init__(
        self, x: Tensor, values: Tensor | None, context: tuple[object, ...], z: Tensor, reader: object
    ) -> None:
        self.context, self.values = context, values
        # The graph of z holds a leaf that requires a gradient, so the cache must not keep z alive.
        self.z: Callable[[], Tensor | None] = weakref.ref(z) if x.is_leaf and x.requires_grad else lambda: z
        self.readers = {id(reader)}
        entry = weakref.ref(self)

        def forget(_: object) -> None:
            if (kept := entry()) is not None:
                # The context holds the node that made x, which holds the whole graph.
                kept.z, kept.context, kept.values = lambda: None, (), None

        self.reference = weakref.ref(x, forget)

    def handed_to(self, reader: object, x: Tensor) -> Tensor | None:
        """The projection, for a reader that has not had it yet, if the inputs are unchanged."""
        if id(reader) in self.readers or not (self.values is None or torch.equal(self.values, x)):
            return None
        self.readers.add(id(reader))
        return self.z()


def _stream(x: Tensor) -> tuple[int, bool]:
    """The current stream of x's device, and whether it is being captured."""
    return torch.cuda.current_stream(x.device).cuda_stream, torch.cuda.is_current_stream_capturing()
