"""Tensor parallelism: the shard of a weight on this process, and its communication.

Every process has the whole vectors, which are kilobytes, and saves them as a single process would.

| | outputs sharded (column-wise) | inputs sharded (row-wise) |
|---|---|---|
| W | some rows | some columns |
| w, C and B | for its rows | whole |
| forward | no communication | z is summed |
| backward | gradients of z and of the vectors are summed | no communication |

The whole weight is gathered when the constants are computed, one layer at a time, and never in a training step.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .functional import Vectors
from .matrices.interface import Shard
from .tensors import Float, grad_recorded, is_dtensor, local


class TensorParallelShard(NamedTuple):
    """The shard of one process: some of the outputs, or some of the inputs."""

    outputs: Shard | None
    inputs: Shard | None
    group: Any
    """The process group."""

    def of_rows(self, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor with one row for each output."""
        return tensor if self.outputs is None else tensor[self.outputs.start : self.outputs.stop].clone()

    def vectors(self, vectors: Vectors) -> Vectors:
        """This process's part of the vectors; their gradients are summed over all processes."""
        if self.outputs is None:
            return vectors
        if grad_recorded():
            vectors = vectors.to(vectors.magnitude.dtype)
            whole = _SumOfGradients.apply(torch.cat(vectors), self.group)
            vectors = Vectors(*whole.split([len(vector) for vector in vectors]))
        return Vectors(self.outputs.of(vectors.magnitude), self.outputs.of(vectors.lambda_b), vectors.lambda_d)

    def z(self, projected: Float[Tensor, "*T R"]) -> Float[Tensor, "*T R"]:
        """z as all processes need it, from the product of this process: summed over them if the inputs are sharded."""
        function = _Sum if self.outputs is None else _SumOfGradients
        z: Tensor = function.apply(projected, self.group)
        return z

    def of_update(
        self, x: Float[Tensor, "*T I"], lambda_d: Float[Tensor, "*B K"]
    ) -> tuple[Float[Tensor, "*T I"], Float[Tensor, "*B K"]]:
        """What `x A'^T` is of, with lambda_d by groups: every process has a part of the gradient of one of them."""
        if self.outputs is not None:
            return _SumOfGradients.apply(x, self.group), lambda_d
        return x, _SumOfGradients.apply(lambda_d, self.group)

    def check_sizes(self, x: Float[Tensor, "*T I"], base_output: Float[Tensor, "*T O"], name: str) -> None:
        """Check that inputs and outputs are those of the shard.

        Raises:
            TypeError: they are DTensors.
            ValueError: they are whole although the weight is sharded.
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


def shard_of(weight: Tensor, name: str) -> TensorParallelShard:
    """This process's shard of a weight (O, I) that is a DTensor.

    Raises:
        ValueError: it is not sharded along one dimension of a one-dimensional mesh.
    """
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]  # it is a DTensor
    from torch.distributed.tensor import Shard as ShardPlacement

    # The exact type: packed weights use a subclass with interleaved shards, which compares equal.
    plain = [type(placement) is ShardPlacement for placement in placements]
    if plain != [True] or placements[0].dim not in (0, 1):
        raise ValueError(
            f"{name}: the base weight is a DTensor with placements {placements} on a mesh of {mesh.ndim} dimensions; "
            "DVoRA supports weights of torch.nn.Linear sharded by ColwiseParallel or RowwiseParallel over one dimension"
        )
    dim, rank = placements[0].dim, mesh.get_local_rank()
    total = weight.shape[dim]
    size = -(-total // mesh.size())
    shard = Shard(min(rank * size, total), min((rank + 1) * size, total), total)
    assert local(weight).shape[dim] == shard.stop - shard.start, (shard, local(weight).shape)
    outputs, inputs = (shard, None) if dim == 0 else (None, shard)
    return TensorParallelShard(outputs, inputs, mesh.get_group())


def check_whole(weight: Tensor | None, name: str) -> None:
    """Check that a weight is not a DTensor: the whole of one may not fit into memory.

    Raises:
        ValueError: it is one.
    """
    if is_dtensor(weight):
        raise ValueError(
            f"{name}: the weight is sharded over processes, so it cannot be merged here. Save the adapter, load it "
            "with the whole base model in one process, and merge there"
        )


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the same on all of them."""

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
    """The tensor itself, which is the same on all processes; its gradient is summed over them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None
