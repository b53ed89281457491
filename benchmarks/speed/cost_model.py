"""Operations of a training step from the shapes alone, relative to the frozen base, to hold measured times against.

Counted are the multiplications and additions of matrix products, forward and backward: two for each value of a matrix
and token. Work on single values (sums, scales, norms of rows) is not counted, nor is what memory can deliver: at few
tokens and for small products the measured times lie above.

Dimensions: T tokens, I in, O out, R rank.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dvora.matrices.kronecker import block_rows, operations

# The rules by which dense matrices chose between ways to compute, as they were when `results/speed.json` was measured.
MOST_TOKENS_KEPT = 2
"""Tokens for each rank up to which training keeps the update for its backward pass."""
KEPT_BYTES, KEPT_BYTES_OF_ALL = 3 * 2**20, 2**26
"""Of the norm's (rank, out) elements that are kept for the backward pass: of one layer, or of all of one shape."""
WORTH_IT = 2.0
"""How many times cheaper the updated weight has to be, to be formed."""


class Product(NamedTuple):
    """One linear layer."""

    in_features: int
    out_features: int
    siblings: int
    """How many layers read the same input, this one included."""
    alike: int = 1
    """How many layers have this shape, whose norms are made together."""


def llama_block(hidden: int, intermediate: int) -> list[Product]:
    """The seven linear layers of a Llama block."""
    return [
        *[Product(hidden, hidden, 3, 4)] * 3,
        Product(hidden, hidden, 1, 4),
        *[Product(hidden, intermediate, 2, 2)] * 2,
        Product(intermediate, hidden, 1),
    ]


def relative_cost(method: str, products: Sequence[Product], rank: int, tokens: int) -> float:
    """Operations of a step as a multiple of the frozen base's.

    Args:
        method: "base", "full fine-tuning", "LoRA", "DoRA", "VeRA", "dvora dense" or "dvora structured".
        products: the layers.
        rank: of the update.
        tokens: in the step; what is done once a step weighs less with more of them.

    Raises:
        ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}")
    of_base = sum(base(product) for product in products)
    return 1 + sum(METHODS[method](product, rank, tokens) for product in products) / of_base


def norm_share(method: str, products: Sequence[Product], rank: int, tokens: int) -> float:
    """The share of the norm in the operations of a step."""
    of_base = sum(base(product) for product in products)
    of_norm = sum(NORMS[method](product, rank) for product in products)
    return of_norm / tokens / of_base / relative_cost(method, products, rank, tokens)


def base(product: Product) -> float:
    """Output and gradient of the input, a token."""
    return 4.0 * product.in_features * product.out_features


def full(product: Product, rank: int, tokens: int) -> float:
    """The gradient of the weight."""
    return base(product) / 2


def lora(product: Product, rank: int, tokens: int) -> float:
    """Two small products, with gradients of inputs and of both matrices."""
    return 6.0 * rank * (product.in_features + product.out_features)


def dora(product: Product, rank: int, tokens: int) -> float:
    """LoRA's, and the dense update made in every step from an identity matrix, as PEFT does."""
    inputs, outputs = product.in_features, product.out_features
    return lora(product, rank, tokens) + 2 * rank * inputs * (inputs + outputs) / tokens


def vera(product: Product, rank: int, tokens: int) -> float:
    """Two products with frozen matrices, and the gradients of their inputs."""
    return 4.0 * rank * (product.in_features + product.out_features)


def dvora_dense(product: Product, rank: int, tokens: int) -> float:
    """VeRA's with one product with A for all siblings, and `z^T grad_output` where the update is not kept.

    Or the updated weight twice a step.
    """
    inputs, outputs, siblings, _ = product
    norm = dense_norm(product, rank) / tokens
    if tokens * (2 * outputs + inputs) > WORTH_IT * 2 * outputs * inputs:
        return 2 * rank * inputs / siblings + 2 * rank * outputs + 4 * outputs * inputs * rank / tokens + norm
    kept = tokens <= MOST_TOKENS_KEPT * rank
    return 4 * rank * inputs / siblings + (4 if kept else 6) * rank * outputs + norm


def dense_norm(product: Product, rank: int) -> float:
    """`C lambda_d`, its gradient, and the product with `G = A A^T` (or A and its transpose), made twice if not kept."""
    inputs, outputs, _, alike = product
    kept = 4 * alike * rank * outputs <= (KEPT_BYTES if alike == 1 else KEPT_BYTES_OF_ALL)
    products = (1 if kept else 2) if rank <= inputs else (2 if kept else 3)
    return 4.0 * outputs * rank + 2.0 * products * outputs * min(rank, inputs) * rank


def dvora_structured(product: Product, rank: int, tokens: int) -> float:
    """The same with fast products; the update is made a second time in place of `grad_output^T z`."""
    inputs, outputs, siblings, _ = product
    products = 2 * fast_product(inputs, rank) / siblings + 3 * fast_product(outputs, rank)
    return products + structured_norm(product, rank) / tokens


def structured_norm(product: Product, rank: int) -> float:
    """`q`, `cross` and their gradients, once a step."""
    return 2 * fast_product(product.out_features, rank) + norm_cross(product, rank)


def norm_cross(product: Product, rank: int) -> float:
    """The norm's term `cross` and its gradient, once a step, from C."""
    return 4.0 * product.out_features * rank


def fast_product(size: int, rank: int) -> float:
    """Operations of a vector through `C1 (x) C2`, size to rank or back, by two small products."""
    signs = size * len(block_rows(rank, size))
    return 2.0 * (operations(rank, size) - signs)


METHODS: dict[str, Callable[[Product, int, int], float]] = {
    "base": lambda product, rank, tokens: 0.0,
    "full fine-tuning": full,
    "LoRA": lora,
    "DoRA": dora,
    "VeRA": vera,
    "dvora dense": dvora_dense,
    "dvora structured": dvora_structured,
}
"""What each method adds to the base, a token."""
NORMS: dict[str, Callable[[Product, int], float]] = {
    "dvora dense": dense_norm,
    "dvora structured": structured_norm,
}
"""What of it is the norm's, a step."""
