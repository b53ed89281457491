"""Adapters on their base: all of an adapter's values are there, or it is refused."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dvora.recipes.models.adapters import adapter_on, load_adapted, read_adapter
from tests.recipes import tiny_models
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


def test_a_decoder_finds_the_end_of_a_text_by_the_token_that_pads_it(tmp_path: Path) -> None:
    """Its configuration has none; its tokenizer pads with another token than the one that ends a text."""
    llama = tiny_models.llama(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(llama)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = AutoModelForSequenceClassification.from_pretrained(llama)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    adapted = load_adapted(read_adapter(tmp_path / "adapter"), str(llama))
    assert adapted.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = ["good", "a very bad day"]
    with torch.no_grad():
        together = adapted(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = [adapted(**tokenizer([text], return_tensors="pt")).logits for text in texts]
    torch.testing.assert_close(together, torch.cat(alone))
    # Without a tokenizer it is the token that ends a text.
    for file in llama.glob("tokenizer*"):
        file.unlink()
    assert load_adapted(read_adapter(tmp_path / "adapter"), str(llama)).config.pad_token_id == tokenizer.eos_token_id
