"""Adapters of LoRA as files, which no model is needed to read."""

from pathlib import Path

import pytest

from dvora.adapter_file.packs import write_pack
from dvora.adapter_file.values import FolderSource
from tests.bank.tenants import BERT
from tests.peft.kinds import edit_config
from tests.peft.lora import lora


def test_factors_of_layers_that_settings_leave_out(tmp_path: Path) -> None:
    path = lora(BERT.base(), tmp_path / "a", target_modules=["query", "value"])
    assert len(FolderSource(path).content.factors) == 4
    edit_config(path, target_modules=r".*query")
    said = r"layer\.0\.attention\.self\.value has factors in the file, and its settings leave the layer out"
    with pytest.raises(ValueError, match=said):
        write_pack(tmp_path / "pack", {"a": path})
    for of_model in (None, "all-linear"):
        edit_config(path, target_modules=of_model)
        assert len(FolderSource(path).content.factors) == 4
