"""DVoRA beside PEFT's other methods in one model."""

from pathlib import Path

import pytest
from peft import LoraConfig, VeraConfig, get_peft_model, inject_adapter_in_model

from dvora import DVoRAConfig
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import MODELS, loss, outputs, same_bits, train_vectors


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_other_methods_on_other_layers_train_together() -> None:
    lora = LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    model = inject_adapter_in_model(lora, MODELS["bert"]())
    model = inject_adapter_in_model(DVoRAConfig(r=4, target_modules=["value"]), model).eval()
    train_vectors(model)
    loss(model).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all("query.lora_" in name or "value.dvora_" in name for name in trained)
    assert len(trained) == 2 * (2 + 3)


@pytest.mark.parametrize("other", [LoraConfig(target_modules=["query"]), VeraConfig(target_modules=["query"])])
def test_a_peft_model_takes_adapters_of_one_method(other: object) -> None:
    model = get_peft_model(MODELS["bert"](), DVoRAConfig(r=4, target_modules=["query"])).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", other)
    assert_unchanged(model, before)


def test_pefts_mixed_model_is_closed_to_other_methods() -> None:
    base = MODELS["bert"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"not compatible|not supported|peft_type"):
        get_peft_model(base, DVoRAConfig(r=4, target_modules=["query"]), mixed=True)
    assert_unchanged(base, before)


def test_a_merged_lora_can_be_adapted_further(tmp_path: Path) -> None:
    lora = get_peft_model(MODELS["bert"](), LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    base = lora.merge_and_unload().eval()
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=["query"])).eval()
    with model.disable_adapter():
        expected = outputs(model)
    assert same_bits(outputs(model), expected)
