"""Adapters by the thousand: the first is the given one, all others differ, and they are asked for by Zipf's law."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.population import SETTINGS, VALUES, drawn, name_of, perturbed


def test_the_first_is_as_given_and_heads_have_their_sizes_in_turns(tmp_path: Path) -> None:
    (first := tmp_path / "first").mkdir()
    given = {"vector": torch.ones(4), "classifier.weight": torch.ones(2, 3)}
    save_file(given, first / VALUES)
    (first / SETTINGS).write_text("{}", encoding="utf-8")
    folders = perturbed(first, tmp_path / "all", 3, heads=(2, 5))
    assert [*folders] == [name_of(number) for number in range(3)]
    values = [load_file(folder / VALUES) for folder in folders.values()]
    assert [torch.equal(each["vector"], given["vector"]) for each in values] == [True, False, False]
    assert not torch.equal(values[1]["vector"], values[2]["vector"])
    assert [each["classifier.weight"].shape[0] for each in values] == [2, 5, 2]
    assert all((folder / SETTINGS).read_text(encoding="utf-8") == "{}" for folder in folders.values())


def test_requests_follow_zipf_s_law() -> None:
    asked = drawn(count=100, requests=200_000)
    harmonic = sum(1 / rank for rank in range(1, 101))
    shares = [asked.count(name_of(number)) / len(asked) for number in (0, 1, 9)]
    assert shares == pytest.approx([1 / harmonic, 1 / (2 * harmonic), 1 / (10 * harmonic)], rel=0.05)
    assert drawn(9, 50) == drawn(9, 50)
