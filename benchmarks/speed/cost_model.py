"""Operations of a training step from the shapes alone, relative to the frozen base, to hold measured times against.

Counted are the multiplications and additions of matrix products, forward and backward: two for each value of a matrix
and token. Work on single values (sums, scales, norms of rows) is not counted, nor is what memory can deliver: at few
tokens and for small products the measured times lie above.

Dimensions: T tokens, I in, O out, R rank.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dvora.kronecker import block_rows, operations
from dvora.norms import cache_dtype
from dvora.routes import pays


class Product(NamedTuple):
    """One linear layer."""

    in_features: int
    out_features: int
    siblings: int
    """How many layers read the same input, this one included."""


def llama_block(hidden: int, intermediate: int) -> list[Product]:
    """The seven linear layers of a Llama block."""
    return [
        *[Product(hidden, hidden, 3)] * 3,
        Product(hidden, hidden, 1),
        *[Product(hidden, intermediate, 2)] * 2,
        Product(intermediate, hidden, 1),
    ]


def relative_cost(method: str, products: Sequence[Product], rank: int, tokens: int) -> float:
    """Operations of a step as a multiple of the frozen base's.

    Args:
        method: "base", "full fine-tuning", "LoRA", "DoRA", "VeRA", "dvora dense", "dvora orthogonal" or
            "dvora structured".
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
    """That of `dvora_orthogonal`, and the triangular products with `G = A A^T` of the norm and of its gradient."""
    outputs = product.out_features
    triangles = 2.5 * outputs * min(rank, product.in_features) * rank
    return dvora_orthogonal(product, rank, tokens) + triangles / tokens


def dvora_orthogonal(product: Product, rank: int, tokens: int) -> float:
    """VeRA's with one product with A for all siblings, and `delta^T z`; or the updated weight, made twice a step."""
    inputs, outputs, siblings = product
    norm = 4 * outputs * rank / tokens
    if pays(tokens, outputs, inputs):
        return 2 * rank * inputs / siblings + 2 * rank * outputs + 4 * outputs * inputs * rank / tokens + norm
    return 4 * rank * inputs / siblings + 6 * rank * outputs + norm


def dvora_structured(product: Product, rank: int, tokens: int) -> float:
    """The same with fast products; the update is made a second time in place of `delta^T z`."""
    inputs, outputs, siblings = product
    norm = 2 * fast_product(outputs, rank) + norm_cross(product, rank)
    return 2 * fast_product(inputs, rank) / siblings + 3 * fast_product(outputs, rank) + norm / tokens


def norm_cross(product: Product, rank: int) -> float:
    """The norm's term `C lambda_d` and its gradient, once a step; C is made again in both if it is not kept."""
    made_again = (
        0.0 if keeps_cross(product, rank) else 2 * product.out_features * fast_product(product.in_features, rank)
    )
    return 4.0 * product.out_features * rank + made_again


def keeps_cross(product: Product, rank: int) -> bool:
    """Whether `norm_cache="auto"` keeps C of a structured float32 layer."""
    weight = torch.empty(product.out_features, product.in_features, device="meta")
    return cache_dtype(weight, rank, "auto") is not None


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
    "dvora orthogonal": dvora_orthogonal,
    "dvora structured": dvora_structured,
}
"""What each method adds to the base, a token."""
