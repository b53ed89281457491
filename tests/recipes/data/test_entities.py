"""Entities as tags of tokens, and back; and what is none."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvora.recipes.data.entities import Entity, tagged, tags_of, token_tags
from dvora.recipes.data.run_data import load_data
from dvora.recipes.tasks.entities import entities_in
from dvora.recipes.tasks.metrics import of_entities
from tests.recipes.finished_runs import settings_of

TAGS = tags_of(["NAME", "CREDIT-CARD"])


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([None, "NAME", "CREDIT-CARD"])), max_size=8))
def test_what_is_encoded_is_decoded(parts: list[tuple[int, str | None]]) -> None:
    """Words of three letters and a space, some of which belong together."""
    offsets, entities, place = [(0, 0)], list[Entity](), 0
    for words, label in parts:
        start = place
        for _ in range(words):
            offsets.append((place, place + 3))
            place += 4
        if label:
            entities.append(Entity(start, place - 1, TAGS.index(f"B-{label}")))
    offsets.append((0, 0))
    tags = token_tags(offsets, entities)
    assert [tag < 0 for tag in tags] == [start == end for start, end in offsets]
    logits = 9 * torch.nn.functional.one_hot(torch.tensor(tags).clamp_min(0), len(TAGS)).double()
    text = "abc " * ((place + 4) // 4)
    found = entities_in(text, offsets, logits, TAGS)
    assert [(one["start"], one["end"], f"B-{one['label']}") for one in found] == [
        (start, end, TAGS[tag]) for start, end, tag in entities
    ]
    assert all(one["text"] == text[one["start"] : one["end"]] for one in found)  # type: ignore[misc]


def test_an_entity_begins_with_b_or_where_the_label_changes() -> None:
    tags = ["I-A", "I-A", "B-A", "I-B", "O", "I-B", "B-B", "I-B"]
    assert tagged(tags) == [(0, 2, "A"), (2, 3, "A"), (3, 4, "B"), (5, 6, "B"), (6, 8, "B")]


def test_a_space_before_a_word_is_no_part_of_an_entity() -> None:
    """As the tokens of sentencepiece have them."""
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    assert token_tags([(0, 2), (2, 6), (6, 7)], [Entity(3, 7, 1)]) == [0, 1, 2]
    (one,) = entities_in("my Anna", [(0, 2), (2, 6), (6, 7)], logits, ("O", "B-NAME", "I-NAME"))
    assert (one["start"], one["end"], one["text"]) == (3, 7, "Anna")
    assert one["score"] == pytest.approx(float(logits.softmax(-1)[1, 1]))


def test_an_entity_is_right_if_its_label_and_all_of_its_tokens_are() -> None:
    labels = np.array([[-100, 1, 2, 0, 3, -100], [-100, 0, 1, 0, 0, -100]])
    predicted = np.array([[1, 1, 2, 0, 1, 1], [0, 1, 2, 0, 0, 3]])
    given = SimpleNamespace(predictions=predicted, label_ids=labels)
    found = of_entities(given, ("O", "B-A", "I-A", "B-B", "I-B"))
    assert found == {"f1": pytest.approx(2 / 6), "precision": pytest.approx(1 / 3), "recall": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("entities", "message"),
    [
        ("NAME", "expected a list of entities"),
        ([{"start": 0, "end": 2}], "expected a list of entities"),
        ([{"start": "0", "end": 2, "label": "A"}], "expected a list of entities"),
        ([{"start": 2, "end": 2, "label": "A"}], "is empty, overlaps another"),
        ([{"start": 0, "end": 99, "label": "A"}], "not in 11 characters"),
        ([{"start": 0, "end": 3, "label": "A"}, {"start": 2, "end": 4, "label": "B"}], "overlaps another"),
        ([], "no entity in any row"),
    ],
)
def test_what_is_no_entity_is_reported(tmp_path: Path, entities: Any, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "Anna is ill", "entities": entities}))
    with pytest.raises(ValueError, match=message):
        load_data(settings_of("token-classification", data=str(file)))
