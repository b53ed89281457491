"""Adapters on their base: all of an adapter's values are there, or it is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dvora.recipes.models.adapters import adapter_on, load_adapted, read_adapter
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import adapted, save


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


BASES = {
    tiny_models.bert: "query",
    tiny_models.roberta: "query",
    tiny_models.distilbert: "q_lin",
    tiny_models.llama: "q_proj",
}
IDS = torch.tensor([[2, 5, 7, 9, 8]])


@pytest.mark.parametrize("classes", [2, 16, 24])
@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("method", ["dvora", "lora"])
def test_a_head_of_any_size_comes_with_its_adapter(
    method: str, make: Callable[[Path], Path], classes: int, tmp_path: Path
) -> None:
    """By PEFT alone and from a run; models are 16 wide, and RoBERTa's heads have a layer before the last one."""
    base = make(tmp_path / "base")
    model = adapted(base, method, task_type="SEQ_CLS", classes=classes, target_modules=[BASES[make]])
    model.save_pretrained(tmp_path / "run" / "adapter")
    with torch.no_grad():
        expected = model(IDS).logits
        found = load_adapted(read_adapter(tmp_path / "run"), str(base))
        torch.testing.assert_close(found(IDS).logits, expected)
    names = [f"class {number}" for number in range(classes)]
    for labels in (names, [*names, "another"], names[:16]):
        (tmp_path / "run" / "run.json").write_text(json.dumps({"labels": labels}))
        if labels == names:
            found = load_adapted(read_adapter(tmp_path / "run"), str(base))
            assert [*found.config.id2label.values()] == names
        else:
            with pytest.raises(ValueError, match=rf"{len(labels)} classes are on record, and "):
                load_adapted(read_adapter(tmp_path / "run"), str(base))


def test_what_is_trained_whole_need_not_be_the_head(bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["query"], modules_to_save=["pooler"])
    model = get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    found = load_adapted(read_adapter(tmp_path / "adapter"), str(tmp_path / "base"))
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits)


def test_a_head_of_another_base_is_refused(bert: Path, tmp_path: Path) -> None:
    adapter = save(tiny_models.roberta(tmp_path / "roberta"), tmp_path / "adapter", task_type="SEQ_CLS")
    with pytest.raises(
        ValueError, match=r"has a head of the shapes .* and BertForSequenceClassification of this base has no such"
    ):
        load_adapted(read_adapter(adapter), str(bert))
