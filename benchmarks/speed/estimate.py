"""An estimate of a training step on a GPU from counts and stated assumptions; nothing of it was measured on one."""

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.speed.cost_model import Product, base, llama_block, relative_cost


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted.

    Args:
        hidden, intermediate, blocks: sizes of a Llama-shaped model of 7 billion parameters.
        tokens: in a step.
        launch_seconds: that the host takes to launch a kernel, with Python and autograd, in eager mode.
        operations: multiplications and additions of large products a second, in bfloat16.
    """

    hidden: int = 4096
    intermediate: int = 11008
    blocks: int = 32
    tokens: int = 512
    launch_seconds: float = 5e-6
    operations: float = 4e14

    @property
    def block(self) -> list[Product]:
        """The linear layers of a block."""
        return llama_block(self.hidden, self.intermediate)

    @property
    def layers(self) -> int:
        """Adapted linear layers."""
        return self.blocks * len(self.block)

    @property
    def weights(self) -> int:
        """Weights of all adapted layers."""
        return self.blocks * sum(product.in_features * product.out_features for product in self.block)

    @property
    def base_seconds(self) -> float:
        """The products of a step of the frozen base: outputs, and the gradients of inputs."""
        return self.blocks * sum(base(product) for product in self.block) * self.tokens / self.operations


class Estimate(NamedTuple):
    """A step of one method."""

    launches: float
    host_seconds: float
    """To launch all kernels, the base's included."""
    compute_seconds: float
    """Of the matrix products, the base's included."""

    @property
    def seconds(self) -> float:
        """At least: the host launches ahead while the GPU computes, so the longer of the two counts."""
        return max(self.host_seconds, self.compute_seconds)


def step(method: str, rank: int, kernels: float, base_kernels: float, given: Assumptions) -> Estimate:
    """A step of a method.

    Args:
        method, rank: as in the cost model.
        kernels: that a layer launches beyond the base's.
        base_kernels: that the base launches, divided by its adapted layers.
        given: the assumptions.

    Raises:
        ValueError: the method is unknown.
    """
    launches = given.layers * (kernels + base_kernels)
    compute = given.base_seconds * relative_cost(method, given.block, rank, given.tokens)
    return Estimate(launches, launches * given.launch_seconds, compute)
