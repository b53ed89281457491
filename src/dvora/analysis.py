"""What training changed, layer by layer: the public address of `dvora.tools.analysis`."""

from .tools.analysis import Analysis, LayerChange, analyze

__all__ = ["Analysis", "LayerChange", "analyze"]
