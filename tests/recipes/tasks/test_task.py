"""What tasks make of rows: nothing of a text is lost, and of a chat the assistant's words alone are learned."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dvora.recipes.data.chats import IGNORED, chat_features
from dvora.recipes.models.bases import load_processor
from dvora.recipes.tasks.task import Truncation, bytes_of, features, longest
from tests.recipes.finished_runs import settings_of


@pytest.fixture
def letters(models: dict[str, Path]) -> Any:
    return load_processor(settings_of("causal-lm", models["llama"]))


CHAT = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1."},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2."},
]


def test_blocks_hold_the_whole_text(models: dict[str, Path], letters: Any) -> None:
    text = "The quick brown fox\njumps over the lazy dog" * 9
    made = features([{"passage": text}], settings_of("causal-lm", models["llama"]), letters, 50).dataset
    assert letters.decode([token for block in made["input_ids"] for token in block]) == text
    assert {len(block) for block in made["input_ids"][:-1]} == {50}
    assert made["labels"] == made["input_ids"]
    # The first letter of each block is predicted from nothing.
    assert bytes_of(made) == len(text) - len(made)


def test_a_whole_text_ends_and_a_passage_goes_on(models: dict[str, Path], letters: Any) -> None:
    task = settings_of("causal-lm", models["llama"])
    assert features([{"text": "ab"}], task, letters, 50).dataset["input_ids"][0][-1] == letters.eos_token_id
    assert features([{"passage": "ab"}], task, letters, 50).dataset["input_ids"][0][-1] != letters.eos_token_id


def test_the_assistant_s_words_are_learned_and_no_others(letters: Any) -> None:
    made = chat_features(CHAT, letters, 1000)
    learned = [token for token in made["labels"] if token != IGNORED]
    assert letters.decode(learned) == " 1. [SEP]  2. [SEP] "
    assert letters.decode(made["input_ids"]) == letters.apply_chat_template(CHAT, tokenize=False)
    assert made["bytes"] == len(" 1. [SEP] ") * 2
    assert chat_features(CHAT, letters, 5)["bytes"] == 0


def test_a_chat_cut_before_the_answer_is_left_out(models: dict[str, Path], letters: Any) -> None:
    assert len(features([{"messages": CHAT}], settings_of("causal-lm", models["llama"]), letters, 5).dataset) == 0


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ messages | length }}{{ messages[-1]['content'] }}", "changes earlier messages"),
    ],
)
def test_a_template_that_cannot_be_used_is_reported(letters: Any, template: str | None, message: str) -> None:
    letters.chat_template = template
    with pytest.raises(ValueError, match=message):
        chat_features(CHAT, letters, 100)


def test_pairs_and_labels_reach_the_model(models: dict[str, Path]) -> None:
    task = settings_of("sentence-pairs", models["bert"])
    words = load_processor(task)
    rows = [{"text": "good movie", "text2": "bad book", "label": 1}]
    made = features(rows, task, words, 32).dataset
    assert made["label"] == [1]
    assert words.decode(made["input_ids"][0]) == "[CLS] good movie [SEP] bad book [SEP]"
    assert "label" not in features([{"text": "good"}], task, words, 32).dataset.column_names
    assert len(features([{"text": "good " * 99}], task, words, 9).dataset["input_ids"][0]) == 9


def test_a_model_s_length_is_never_exceeded(models: dict[str, Path]) -> None:
    task = settings_of("regression", models["bert"])
    words = load_processor(task)
    config = AutoConfig.from_pretrained(models["bert"])
    assert longest(task.model_copy(update={"max_length": 20}), words, config) == 20
    assert longest(task.model_copy(update={"max_length": 128}), words, config) == 32


def test_a_model_without_tokenizer_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((models["bert"] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"holds no tokenizer .* give its folder with `tokenizer`"):
        load_processor(settings_of("regression", tmp_path))
    elsewhere = settings_of("regression", tmp_path).model_copy(update={"tokenizer": str(models["bert"])})
    assert load_processor(elsewhere).vocab_size > 0
    with pytest.raises(ValueError, match="holds no image processor"):
        load_processor(settings_of("image-classification", tmp_path))


@pytest.mark.parametrize("pair", [False, True])
def test_what_is_cut_is_counted(models: dict[str, Path], pair: bool) -> None:
    task = settings_of("sentence-pairs" if pair else "text-classification", models["bert"])
    words = load_processor(task)
    rows: list[dict[str, Any]] = [{"text": "good " * count} for count in (1, 6, 7, 8, 20)]
    if pair:
        rows = [{**row, "text2": "bad movie"} for row in rows]
    # Beside the words: the beginning, the end, and the end of a second text.
    lengths = [len(row["text"].split()) + 2 + 3 * pair for row in rows]
    for longest_text in (5, 9, 10, 12, 99):
        made = features(rows, task, words, longest_text)
        over = [length - longest_text for length in lengths if length > longest_text]
        assert made.truncation == Truncation(len(rows), len(over), sum(lengths), sum(over))
        read = sum(map(len, made.dataset["input_ids"]))
        assert read == sum(lengths) - sum(over)


def test_chats_that_are_cut_or_left_out_are_counted(models: dict[str, Path], letters: Any) -> None:
    task = settings_of("causal-lm", models["llama"])
    length = len(letters(letters.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"])
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    whole = features(rows, task, letters, length).truncation
    assert (whole.texts, whole.cut, whole.tokens_lost, whole.left_out) == (2, 0, 0, 0)
    cut = features(rows[:1], task, letters, length - 3).truncation
    assert cut == Truncation(1, 1, length, 3)
    assert features(rows[:1], task, letters, 5).truncation == Truncation(1, 1, length, length - 5, left_out=1)
    # Texts without a label go on in the next block.
    assert features([{"text": "ab" * 99}], task, letters, 5).truncation == Truncation()


def test_what_is_cut_is_said_in_a_sentence() -> None:
    assert Truncation(10, 0, 100, 0).sentence(8) == ""
    both = Truncation(10, 1, 100, 5) + Truncation(10, 4, 100, 45)
    assert both.sentence(128) == (
        "5 of 20 texts (25.0%) are longer than 128 tokens and were cut: 25.0% of all tokens were not read"
    )
    assert "; 2 chats were left out" in Truncation(3, 3, 30, 20, left_out=2).sentence(8)
