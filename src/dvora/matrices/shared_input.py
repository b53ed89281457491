"""The projection of the inputs that sibling layers share: query, key and value read the same x, gate and up too.

`z = x A^T` is made for the first of them and handed to the others, so autograd sums its gradient before the one product
with A. What is kept belongs to one tensor in one state, one thread and one way of running; it is dropped with the
tensor. PyTorch does not count writes through `x.data` or NumPy. So a layer that asks twice is in another pass, and gets
a new projection; and on a CPU the values of inputs that are no part of a graph are compared with those that were
projected, which costs less than the product that is saved.
"""

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.tracing import is_traced


class ProjectionCache:
    """The last projected tensor of each thread, weakly held, and its projection."""

    def __init__(self) -> None:
        self._local = threading.local()

    def of(self, x: Tensor, rank: int, reader: object, project: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`project(x, rank)`, or what it gave to another reader of the same tensor a moment ago.

        Args:
            x: inputs.
            rank: number of rows of A.
            reader: the layer that asks.
            project: the product with A^T.
        """
        # PyTorch does not count the changes of inference tensors, and a graph being made keeps nothing.
        if is_traced() or x.is_inference():
            return project(x, rank)
        context = _context(x, rank)
        last: _Entry | None = getattr(self._local, "entry", None)
        if last is not None and last.reference() is x and last.context == context:
            z = last.handed_to(reader, x)
            if z is not None:
                return z
        # Before it is projected: another thread may write to it meanwhile.
        values = x.detach().clone() if x.is_cpu and not (torch.is_grad_enabled() and x.requires_grad) else None
        z = project(x, rank)
        self._local.entry = _Entry(x, values, context, z, reader)
        return z

    def __reduce__(self) -> tuple[type["ProjectionCache"], tuple[()]]:
        return ProjectionCache, ()


def _context(x: Tensor, rank: int) -> tuple[object, ...]:
    """Everything but the values of x on which its projection, or the use of it, depends."""
    device, recorded = x.device.type, torch.is_grad_enabled()
    # `detach_` changes nothing but the node that made x.
    graph = (x.requires_grad, x.grad_fn, _hook()) if recorded else None
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    stream = _stream(x) if x.is_cuda else None
    values = (x._version, x.data_ptr(), x.stride())
    return values, rank, graph, recorded, torch.is_inference_mode_enabled(), autocast, stream


def _hook() -> "_Hook | None":
    """What is done with tensors that are saved for the backward pass.

    Checkpointing runs a part of the model twice, and both runs must save the same tensors: neither may take what was
    projected outside it.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else _Hook(hooks[0])


class _Hook:
    """A hook, held weakly because it holds what it saved; one that cannot be is like no other."""

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
    """A projection and the tensor that it is of; the projection goes when the tensor does."""

    def __init__(
        self, x: Tensor, values: Tensor | None, context: tuple[object, ...], z: Tensor, reader: object
    ) -> None:
        self.context, self.values = context, values
        # The graph of z holds a leaf that wants a gradient, so z must not be what keeps that alive.
        self.z: Callable[[], Tensor | None] = weakref.ref(z) if x.is_leaf and x.requires_grad else lambda: z
        self.readers = {id(reader)}
        entry = weakref.ref(self)

        def forget(_: object) -> None:
            if (kept := entry()) is not None:
                # The context holds the node that made x, and that the whole graph.
                kept.z, kept.context, kept.values = lambda: None, (), None

        self.reference = weakref.ref(x, forget)

    def handed_to(self, reader: object, x: Tensor) -> Tensor | None:
        """The projection, for a reader that has not had it yet, of inputs that are what they were."""
        if id(reader) in self.readers or not (self.values is None or torch.equal(self.values, x)):
            return None
        self.readers.add(id(reader))
        return self.z()


def _stream(x: Tensor) -> tuple[int, bool]:
    """The stream that x is used on, and whether its work is being captured."""
    return torch.cuda.current_stream(x.device).cuda_stream, torch.cuda.is_current_stream_capturing()
