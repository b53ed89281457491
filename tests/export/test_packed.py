"""What a layout's digest is of, and where adapters stand in vectors."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from dvora.adapter_file.values import FolderSource
from dvora.export.packed import Packing
from tests.recipes.saved_adapters import save
from tests.serve.served import save_classifier


def test_a_base_that_differs_in_its_embeddings_only_has_another_layout(bert: Path, tmp_path: Path) -> None:
    """Its layers are those that the adapter is of, and its graph is another one."""
    save_classifier(bert, tmp_path / "adapter", 0, 3)
    digests = []
    for seed in (0, 1, 0):
        with torch.random.fork_rng():
            # Of the head, which is the adapter's.
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
        digests.append(Packing(model, tmp_path / "adapter").layout["digest"])
        with torch.no_grad():
            model.get_input_embeddings().weight[3] += 1
        digests.append(Packing(model, tmp_path / "adapter").layout["digest"])
    assert len({*digests}) == 2
    assert digests[0] == digests[2] == digests[4]


@pytest.mark.parametrize("changed", [{"num_attention_heads": 4}, {"hidden_act": "relu"}], ids=str)
def test_a_base_of_the_same_weights_that_computes_otherwise_has_another_layout(
    bert: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    save_classifier(bert, tmp_path / "adapter", 0, 3)
    digests = []
    for settings in ({}, changed, {"id2label": {0: "bad", 1: "so", 2: "good"}}):
        config = AutoConfig.from_pretrained(bert, num_labels=3, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(bert, config=config)
        digests.append(Packing(model, tmp_path / "adapter").layout["digest"])
    assert digests[0] != digests[1]
    # Names of classes are no part of it.
    assert digests[0] == digests[2]


def test_vectors_have_room_for_the_largest_rank_of_each_layer(bert: Path, tmp_path: Path) -> None:
    """And no adapter is cut to it."""
    save(bert, tmp_path / "low", "lora", rank=2, target_modules=["query", "value"])
    save(bert, tmp_path / "high", "lora", rank=5, target_modules=["query"])
    model = AutoModel.from_pretrained(bert)
    alone = Packing(model, tmp_path / "low")
    with pytest.raises(ValueError, match=r"high: .*query has LoRA of rank 5, and .* room for 2; export the adapters"):
        alone.pack(tmp_path / "high")
    with pytest.raises(ValueError, match=r"low: .*value has LoRA of rank 2, and .* room for 0; "):
        Packing(model, tmp_path / "high").pack(tmp_path / "low")
    together = Packing(model, tmp_path / "low", [FolderSource(tmp_path / "high").content])
    assert [entry.shape for entry in together.entries] == [(16, 5), (5, 16), (16, 2), (2, 16)]
    filled = together.pack(tmp_path / "low")
    assert together.size == len(filled) == len(together.pack(tmp_path / "high")) == 7 * 32
    assert filled.count_nonzero() == len(alone.pack(tmp_path / "low")) == 4 * 32
    assert not together.null().any()
