"""One vector of a text: sentence-transformers' file is read, padding counts for nothing."""

import json
from pathlib import Path

import pytest
import torch

from dvora.recipes.models.pooling import POOLINGS, Pooling, pooled, pooling_of


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_counts_for_nothing(pooling: Pooling) -> None:
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    lengths = (3, 5)
    mask = torch.tensor([[token < length for token in range(5)] for length in lengths]).long()
    for row, length in enumerate(lengths):
        tokens = hidden[row, :length].double()
        expected = {"mean": tokens.mean(0), "cls": tokens[0], "lasttoken": tokens[-1]}[pooling]
        vector = pooled(hidden, mask, pooling)[row].double()
        torch.testing.assert_close(vector, expected / expected.norm(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "pooling"), [("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "lasttoken")]
)
def test_the_file_says_how(tmp_path: Path, name: str, pooling: Pooling) -> None:
    assert pooling_of(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({f"pooling_mode_{name}": True, "pooling_mode_max_tokens": False}))
    assert pooling_of(tmp_path) == pooling
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="another pooling"):
        pooling_of(tmp_path)
