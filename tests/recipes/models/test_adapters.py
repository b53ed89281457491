"""Adapters on their base: all of an adapter's values are there, or it is refused."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dvora.recipes.models.adapter_folder import adapter_on, read_adapter
from dvora.recipes.models.adapters import load_adapted
from tests.recipes.saved_adapters import save


def test_an_adapter_whose_file_lacks_values_is_refused(bert: Path, tmp_path: Path) -> None:
    adapted = load_adapted(read_adapter(save(bert, tmp_path / "whole", "lora")), str(bert))
    file = save(bert, tmp_path / "part", "lora") / "adapter_model.safetensors"
    values = load_file(file)
    del values[next(key for key in values if "lora_B" in key)]
    save_file(values, file)
    with pytest.raises(ValueError, match=r"lacks values that the adapter trains: .*lora_B"):
        load_adapted(read_adapter(tmp_path / "part"), str(bert))
    with pytest.raises(ValueError, match=r"lacks values that the adapter trains: .*lora_B"):
        adapter_on(adapted, read_adapter(tmp_path / "part"), "another")
