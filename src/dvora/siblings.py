"""The projection of the inputs that sibling layers share: query, key and value read the same x, gate and up too.

`z = x A^T` is made for the first of them and handed to the others, so autograd sums its gradient before the one product
with A. What is kept belongs to one tensor in one state, one thread and one way of running; it is dropped with the
tensor. A layer that asks twice is in another pass, and gets a new one: the tensor may have been written to through
`x.data`, which PyTorch does not count.
"""

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .transforms import transforming


class LastProjection:
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
        # PyTorch does not count the changes of inference tensors, and the graph of a leaf would keep it alive.
        if transforming() or x.is_inference() or (x.is_leaf and x.requires_grad):
            return project(x, rank)
        try:
            context = _Context(x, rank)
        except TypeError:  # hooks of the user's that cannot be told apart
            return project(x, rank)
        last: _Entry | None = getattr(self._local, "entry", None)
        if last is not None and last.reference() is x and last.context == context:
            z = last.handed_to(reader)
            if z is not None:
                return z
        z = project(x, rank)
        self._local.entry = _Entry(x, context, z, reader)
        return z

    def __reduce__(self) -> tuple[type["LastProjection"], tuple[()]]:
        return LastProjection, ()


class _Context:
    """Everything but the values of x on which its projection, or the use of it, depends."""

    def __init__(self, x: Tensor, rank: int) -> None:
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.values = (x._version, x.data_ptr(), x.stride(), x.requires_grad)
        self.mode = (rank, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, _stream(x))
        # `detach_` changes nothing else.
        self.grad_fn = x.grad_fn
        # Checkpointing runs a part of the model twice, and both runs must save the same tensors: neither may take what
        # was projected outside it. Weak, for the hooks hold what they saved.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.hook = None if hooks is None else weakref.ref(hooks[0])

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Context)
        if (self.hook is None) != (other.hook is None):
            return False
        same_hook = self.hook is None or other.hook is None or self.hook() is other.hook()
        same_graph = self.grad_fn is other.grad_fn
        return same_hook and same_graph and self.values == other.values and self.mode == other.mode

    __hash__ = None  # type: ignore[assignment]  # it is compared, never looked up


class _Entry:
    """A projection and the tensor that it is of; the projection goes when the tensor does."""

    def __init__(self, x: Tensor, context: _Context, z: Tensor, reader: object) -> None:
        self.context = context
        self.z: Tensor | None = z
        self.readers = {id(reader)}
        entry = weakref.ref(self)

        def forget(_: object) -> None:
            if (kept := entry()) is not None:
                kept.z = None

        self.reference = weakref.ref(x, forget)

    def handed_to(self, reader: object) -> Tensor | None:
        """The projection, for a reader that has not had it yet."""
        if id(reader) in self.readers:
            return None
        self.readers.add(id(reader))
        return self.z


def _stream(x: Tensor) -> tuple[int, bool] | None:
    """The stream that x is used on, and whether its work is being captured; None where there are no streams."""
    if not x.is_cuda:
        return None
    return torch.cuda.current_stream(x.device).cuda_stream, torch.cuda.is_current_stream_capturing()
