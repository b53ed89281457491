"""PEFT knows the method by name, once."""

import copy
import json
import pickle
from enum import Enum

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from dvora import DVoRAConfig, DVoRAModel
from dvora.peft import register


def test_peft_finds_config_model_and_prefix_by_the_type_however_often_it_is_registered() -> None:
    members = list(PeftType)
    register()
    assert list(PeftType) == members
    kind = PeftType["DVORA"]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is DVoRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is DVoRAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == "dvora_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is peft.LoraConfig


def test_the_type_is_a_member_like_any_other() -> None:
    kind = PeftType["DVORA"]
    assert isinstance(kind, PeftType)
    assert isinstance(kind, Enum)
    assert PeftType("DVORA") is PeftType.DVORA is kind
    assert [member.name for member in PeftType].count("DVORA") == 1
    assert kind in PeftType
    assert kind == "DVORA"
    assert (kind.name, kind.value) == ("DVORA", "DVORA")
    assert repr(kind) == repr(PeftType.LORA).replace("LORA", "DVORA")
    assert str(kind) == str(PeftType.LORA).replace("LORA", "DVORA")
    assert len({PeftType.LORA, kind, PeftType["DVORA"]}) == 2
    assert json.dumps(kind) == '"DVORA"'
    assert copy.copy(kind) is copy.deepcopy(kind) is kind
    assert all(pickle.loads(pickle.dumps(kind, protocol)) is kind for protocol in range(pickle.HIGHEST_PROTOCOL + 1))
