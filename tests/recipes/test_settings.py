"""Settings: what a file and flags may say, and how they are written down."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dvora import training
from dvora.recipes.settings import (
    HEAD_RATE,
    LEARNING_RATES,
    METHODS,
    SMALL_RANK_RATE,
    Settings,
    checked_settings,
    commented,
    read_settings,
    resolved,
)

LEAST: dict[str, Any] = {"task": "regression", "model": "a/b", "data": "x.csv"}


def test_what_is_printed_is_read_back_as_it_was() -> None:
    chosen = checked_settings(
        {**LEAST, "data": ["a b.csv", "ü.csv"], "learning_rates": {"head": 1e-5}, "targets": ["query"], "rank": 7}
        | {"lambda_d_groups": 4},
        "",
    )
    assert checked_settings(yaml.safe_load(commented(chosen)), "") == chosen
    assert checked_settings(yaml.safe_load(commented(resolved(chosen))), "") == resolved(chosen)


def test_every_key_has_a_comment_of_its_own() -> None:
    lines = commented(checked_settings(LEAST, "")).splitlines()
    for key in Settings.model_fields:
        place = next(number for number, line in enumerate(lines) if line.startswith(f"{key}: "))
        assert lines[place - 1].startswith("# ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat', did you mean 'learning_rate'"),
        ({"task": "regresion"}, "task is 'regresion', did you mean 'regression'"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast': input should be a valid number"),
        ({"learning_rate": "-1e-3"}, "learning_rate is '-1e-3': input should be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: input should be a finite number"),
        *(
            ({"lambda_d_groups": 4, "method": method}, "lambda_d_groups is 4, which only the method dvora has")
            for method in METHODS
            if method != "dvora"
        ),
        ({"lambda_d_groups": 0}, "lambda_d_groups is 0: input should be greater than or equal to 1"),
        ({"lambda_d_groups": "many"}, "lambda_d_groups is 'many'"),
        ({"rank": 0}, "rank is 0: input should be greater than or equal to 1"),
        ({"data": []}, "data is"),
        ({"validation_share": 0.6, "test_share": 0.4}, "leave nothing to train on"),
        ({"evaluate_every": 3, "save_every": 4}, "save_every 4 is no multiple of evaluate_every 3"),
        ({"early_stopping": 2, "keep_best": False}, "early_stopping is set but keep_best is false"),
        ({"method": "lora", "learning_rates": {"lambda_b": 1.0}}, "learning_rates has lambda_b, which only"),
        ({"learning_rates": {"magnitud": 1.0}}, "did you mean 'magnitude'"),
        ({"learning_rates": "head: ["}, "learning_rates is .* while parsing"),
        ({"task": "causal-lm", "method": "head"}, "causal-lm has no new head"),
        ({"blocks": "first:2"}, "blocks is 'first:2': string should match pattern"),
        ({"blocks": "last:0"}, "blocks is 'last:0'"),
        ({"blocks": "last:2", "method": "full"}, "blocks is last:2, but the method full adapts no layers"),
    ],
)
def test_a_mistake_is_reported_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        checked_settings({**LEAST, **change}, "a.yaml")
    assert str(error.value).startswith("a.yaml: ")
    assert "\n" not in str(error.value)


def test_all_missing_settings_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"task is missing.*model is missing.*data is missing"):
        checked_settings({}, "a.yaml")


def test_yaml_s_traps_are_read_as_they_are_meant(tmp_path: Path) -> None:
    file = tmp_path / "a b.yaml"
    file.write_bytes(
        b"\xef\xbb\xbftask: regression\r\nmodel: m\r\ndata: x.csv\r\nmixed_precision: no\r\nlearning_rate: 1e-4\r\n"
    )
    found = read_settings(file, {"model": "other"})
    assert (found.mixed_precision, found.learning_rate, found.model, found.data) == ("no", 1e-4, "other", ("x.csv",))


@pytest.mark.parametrize(("typed", "meant"), [("1e-4", 1e-4), ("3", 3.0), ("null", None)])
def test_a_learning_rate_is_a_number_or_left_out(tmp_path: Path, typed: str, meant: object) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"task: regression\nmodel: m\ndata: x.csv\nlearning_rate: {typed}\n")
    found = read_settings(file, {})
    assert found.learning_rate == meant
    assert checked_settings(yaml.safe_load(commented(found)), "") == found


@pytest.mark.parametrize("content", [b"- a\n", b"text", b"a: [", b"\xff\xfe\x00", b"a: 1\na\n"])
def test_a_file_without_settings_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.yaml"):
        read_settings(tmp_path / "a.yaml", {})


def test_a_resolved_run_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").touch()
    found = resolved(checked_settings(LEAST, ""))
    assert found.data == (str(tmp_path / "x.csv"),)
    assert found.output == str(tmp_path / "dvora-run")
    assert (found.model, found.rank, found.learning_rate) == ("a/b", 64, LEARNING_RATES["dvora"])


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, {"head": HEAD_RATE}),
        ({"method": "full"}, {"head": HEAD_RATE}),
        ({"learning_rates": {"head": 0.5, "magnitude": 0.1}}, {"head": 0.5, "magnitude": 0.1}),
        ({"learning_rate": 0.01}, {"head": HEAD_RATE}),
        ({"method": "head"}, {}),
        ({"task": "causal-lm"}, {}),
    ],
)
def test_new_layers_have_a_rate_of_their_own_unless_one_is_given(changes: dict[str, Any], rates: Any) -> None:
    assert resolved(checked_settings({**LEAST, **changes}, "")).learning_rates == rates


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"method": "lora"}, LEARNING_RATES["lora"]),
        ({"method": "lora", "rank": 1}, SMALL_RANK_RATE),
        ({"method": "dora", "rank": 4}, SMALL_RANK_RATE),
        ({"method": "lora", "rank": 5}, LEARNING_RATES["lora"]),
        ({"method": "lora", "rank": 1, "learning_rate": 0.01}, 0.01),
        ({"method": "vera", "rank": 1}, LEARNING_RATES["vera"]),
    ],
)
def test_small_ranks_of_lora_learn_at_a_rate_of_their_own(changes: dict[str, Any], rate: float) -> None:
    assert resolved(checked_settings({**LEAST, **changes}, "")).learning_rate == rate


def test_the_rates_are_those_of_the_library() -> None:
    assert HEAD_RATE == training.HEAD_RATE
    assert LEARNING_RATES["dvora"] == training.LAMBDA_RATE


def test_a_linked_model_keeps_the_name_of_its_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot-4f2a").mkdir()
    (tmp_path / "minilm").symlink_to("snapshot-4f2a")
    assert resolved(checked_settings({**LEAST, "model": "minilm"}, "")).model == str(tmp_path / "minilm")
