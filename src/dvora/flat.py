"""One flat vector is the adapter: the public address of `dvora.peft.flat`."""

from .peft.flat.layout import Layout
from .peft.flat.row_factors import LayerFactors

__all__ = ["LayerFactors", "Layout"]
