"""The PEFT method: importing it registers DVoRA with PEFT."""

from .config import DVoRAConfig
from .layers.layer import DVoRALayer
from .merging import merged
from .model import DVoRAModel
from .registration import register
from .state.hotswap import hotswap_adapter

register()

__all__ = ["DVoRAConfig", "DVoRALayer", "DVoRAModel", "hotswap_adapter", "merged"]
