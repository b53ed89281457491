"""Tensor parallelism: which part of a weight this process holds, and what it exchanges with the others.

Every process has the whole vectors, which are kilobytes, and saves them like one process alone. Of one weight:

| | outputs divided (column-wise) | inputs divided (row-wise) |
|---|---|---|
| holds of W | rows | columns |
| holds of w, C and B | those of its rows | all |
| forward | exchanges nothing | z is summed |
| backward | the gradients of z and of the vectors are summed | exchanges nothing |

The weight itself is gathered when the constants are made, one layer at a time, and never in a training step.
"""

import sys
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..matrices.shard import Shard
from ..method.functional import Vectors
from ..ops.annotations import Float
from ..ops.tracing import grad_recorded


class TensorParallelShard(NamedTuple):
    """What one process of a group holds: a shard of the outputs or one of the inputs."""

    outputs: Shard | None
    inputs: Shard | None
    group: Any
    """Of processes."""

    def of_rows(self, tensor: Tensor) -> Tensor:
        """The rows, of a tensor with one for each output."""
        return tensor if self.outputs is None else tensor[self.outputs.start : self.outputs.stop].clone()

    def vectors(self, vectors: Vectors) -> Vectors:
        """Those of this process, whose gradients are summed over all."""
        if self.outputs is None:
            return vectors
        if grad_recorded():
            whole = _SumOfGradients.apply(torch.cat(vectors), self.group)
            vectors = Vectors(*whole.split([len(vector) for vector in vectors]))
        return Vectors(self.outputs.of(vectors.magnitude), self.outputs.of(vectors.lambda_b), vectors.lambda_d)

    def z(self, projected: Float[Tensor, "*T R"]) -> Float[Tensor, "*T R"]:
        """`x A^T` of all inputs, for outputs that other processes have too, from the product of this process."""
        function = _Sum if self.outputs is None else _SumOfGradients
        z: Tensor = function.apply(projected, self.group)
        return z

    def check_sizes(self, x: Float[Tensor, "*T I"], base_output: Float[Tensor, "*T O"], name: str) -> None:
        """Refuse inputs or outputs that are not those of the part.

        Raises:
            TypeError: they are no local tensors.
            ValueError: they are whole where the weight is divided.
        """
        for what, tensor, shard in (("input", x, self.inputs), ("output", base_output, self.outputs)):
            if is_dtensor(tensor):
                raise TypeError(f"{name}: the {what} is a DTensor; DVoRA takes local tensors (use_local_output=True)")
            if shard is not None and tensor.shape[-1] != shard.stop - shard.start:
                raise ValueError(
                    f"{name}: the weight is sharded and the layer's {what} is not ({tensor.shape[-1]} of {shard.total} "
                    f"features, expected {shard.stop - shard.start}). DVoRA supports ColwiseParallel and "
                    "RowwiseParallel with their default layouts, and fully_shard on the adapted layer or around it"
                )


def is_dtensor(weight: Tensor | None) -> bool:
    """Whether every process holds a part of the weight: it is a DTensor."""
    if type(weight) in (Tensor, nn.Parameter, type(None)):
        return False
    # Not imported here: those who never use it are spared its time.
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(weight, dtensor)


def shard_of(weight: Tensor, name: str) -> TensorParallelShard:
    """The part of a divided weight (O, I) that this process holds.

    Raises:
        ValueError: it is not divided along one dimension over one group of processes.
    """
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]  # it is a DTensor
    from torch.distributed.tensor import Shard as ShardPlacement

    # The type itself: packed weights are divided in turns, by a subclass that passes for equal.
    plain = [type(placement) is ShardPlacement for placement in placements]
    if plain != [True] or placements[0].dim not in (0, 1):
        raise ValueError(
            f"{name}: the base weight is a DTensor with placements {placements} on a mesh of {mesh.ndim} dimensions; "
            "DVoRA supports weights of torch.nn.Linear divided by ColwiseParallel or RowwiseParallel over one dimension"
        )
    divided, rank = placements[0].dim, mesh.get_local_rank()
    total = weight.shape[divided]
    size = -(-total // mesh.size())
    shard = Shard(min(rank * size, total), min((rank + 1) * size, total), total)
    assert local(weight).shape[divided] == shard.stop - shard.start, (shard, local(weight).shape)
    outputs, inputs = (shard, None) if divided == 0 else (None, shard)
    return TensorParallelShard(outputs, inputs, mesh.get_group())


def check_whole(weight: Tensor | None, name: str) -> None:
    """Refuse to read or set all of a weight of which every process holds a part: it may be larger than a memory.

    Raises:
        ValueError: it is divided.
    """
    if is_dtensor(weight):
        raise ValueError(
            f"{name}: every process holds a part of the weight, so it cannot be merged here. Save the adapter, load it "
            "with the whole base model in one process, and merge there"
        )


@overload
def local(tensor: Tensor) -> Tensor: ...
@overload
def local(tensor: None) -> None: ...
def local(tensor: Tensor | None) -> Tensor | None:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[union-attr]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, from all processes that hold a part of it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient all of them have."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SumOfGradients.apply(gradient, ctx.group), None


class _SumOfGradients(torch.autograd.Function):
    """The tensor itself, which all processes have; each brings a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None
