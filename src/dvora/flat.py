"""One flat vector is the adapter: the public address of `dvora.tuner.flat`."""

from .tuner.flat.layout import Layout
from .tuner.flat.row_factors import LayerFactors

__all__ = ["LayerFactors", "Layout"]
