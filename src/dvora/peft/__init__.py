"""The PEFT method: importing it registers DVoRA with PEFT."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from ..adapter_file.settings import DVoRAConfig
from .layer import DVoRALayer
from .merging import merged
from .model import DVoRAModel
from .model_adapter import hotswap_adapter

__all__ = ["DVoRAConfig", "DVoRALayer", "DVoRAModel", "hotswap_adapter", "merged"]

_NAME = "DVORA"


def register() -> None:
    """Register config and model with PEFT; does nothing the second time."""
    _extend_peft_type()
    if _NAME not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=_NAME.lower(), config_cls=DVoRAConfig, model_cls=DVoRAModel, prefix=DVoRAModel.prefix)


def _extend_peft_type() -> None:
    """Add DVORA to PEFT's enumeration of methods, which has no public way to do so."""
    if _NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, _NAME)
    member._name_ = member._value_ = _NAME
    type.__setattr__(PeftType, _NAME, member)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member


register()
