"""Makes the method known to PEFT under the name "DVORA"."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from .config import DVoRAConfig
from .model import DVoRAModel

NAME = "DVORA"


def extend_peft_type() -> None:
    """Add DVORA to PEFT's enumeration of methods, which has no public way to do so; does nothing the second time."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


def register() -> None:
    """Register config and model with PEFT; does nothing the second time."""
    extend_peft_type()
    if NAME not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=DVoRAConfig, model_cls=DVoRAModel, prefix=DVoRAModel.prefix)
