"""Predictions: those of the model, in order, of every kind of input, in constant memory."""

import io
import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

from dvora.recipes.data.examples import Input, file_inputs, line_inputs, reading_settings
from dvora.recipes.data.run_data import load_data
from dvora.recipes.data.tables import stream_lines, stream_table
from dvora.recipes.reports.evaluation import evaluate_run
from dvora.recipes.reports.prediction import Predicted, Predictor
from dvora.recipes.reports.run_model import load_trained
from dvora.recipes.run_folder import Run
from dvora.recipes.tasks.metrics import number_metrics
from tests.recipes.finished_runs import finished

TEXTS = ["good a the movie", "awful it was", "a book", "bad bad bad very bad it is", "great", "the the the"]


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(finished("text-classification", tmp_path_factory.mktemp("classified"), epochs=10, rank=16))


def from_file(predictor: Predictor, path: Path, **columns: str) -> list[Predicted]:
    notes: list[str] = []
    return [*predictor.predict(file_inputs(path, reading_settings(predictor.run, columns), notes.append), 4)]


def from_lines(predictor: Predictor, text: str, batch_size: int = 4, every_class: bool = False) -> list[Predicted]:
    lines = stream_lines(io.BytesIO(text.encode()), "stdin")
    return [*predictor.predict(line_inputs(lines, reading_settings(predictor.run, {})), batch_size, every_class)]


def logits(run: Run, *texts: list[str]) -> torch.Tensor:
    """Of texts one at a time, without any of the code under test but the loading."""
    model, tokenizer = load_trained(run)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*row, return_tensors="pt")).logits for row in zip(*texts, strict=True)])


def test_classes_are_the_model_s(classified: Predictor) -> None:
    expected = logits(classified.run, TEXTS).softmax(-1)
    found = from_lines(classified, "\n".join(TEXTS), every_class=True)
    assert {row.columns["prediction"] for row in found} == {"good", "bad"}
    assert [row.input.row["text"] for row in found] == TEXTS
    for row, probabilities in zip(found, expected, strict=True):
        assert row.columns["prediction"] == classified.run.labels[int(probabilities.argmax())]
        predicted = [row.columns[f"probability_{name}"] for name in classified.run.labels]
        torch.testing.assert_close(torch.tensor(predicted), probabilities, rtol=1e-4, atol=1e-6)
        assert row.columns["probability"] == max(predicted)
    assert {*from_lines(classified, TEXTS[0])[0].columns} == {"prediction", "probability"}


def test_rows_that_are_not_sure_name_no_class_and_evaluation_counts_them(classified: Predictor) -> None:
    rows = load_data(classified.run.settings).test
    inputs = [Input({}, {"text": row["text"]}) for row in rows]
    named = [row.columns for row in classified.predict(inputs, 8)]
    least = sorted(float(str(columns["probability"])) for columns in named)[len(rows) // 2]
    answered = []
    for row, before, after in zip(rows, named, classified.predict(inputs, 8, abstain_below=least), strict=True):
        abstains = float(str(before["probability"])) < least
        assert after.columns == {
            **before,
            "prediction": None if abstains else before["prediction"],
            "abstained": abstains,
        }
        answered += [] if abstains else [before["prediction"] == classified.run.labels[row["label"]]]
    # Probabilities of predictions are rounded.
    metrics = evaluate_run(classified.run, abstain_below=least - 1e-6).metrics["test"]
    assert metrics["coverage"] == pytest.approx(len(answered) / len(rows))
    assert metrics["answered_accuracy"] == pytest.approx(sum(answered) / len(answered))
    assert "answered_accuracy" not in evaluate_run(classified.run, abstain_below=1.0).metrics["test"]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_change_nothing(classified: Predictor, batch_size: int) -> None:
    one, other = (from_lines(classified, "\n".join(TEXTS), size) for size in (4, batch_size))
    assert [row.input for row in one] == [row.input for row in other]
    np.testing.assert_allclose(
        [row.columns["probability"] for row in one], [row.columns["probability"] for row in other], rtol=1e-4
    )


def test_equal_texts_are_computed_once(classified: Predictor) -> None:
    sizes = list[int]()
    handle = classified.model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    found = from_lines(classified, "a book\ngreat\na book\na book")
    handle.remove()
    assert sizes == [2]
    first, other, *rest = [row.columns for row in found]
    assert rest == [first, first] != [other, other]


def test_numbers_are_the_model_s_with_the_metrics_of_its_evaluation(tmp_path: Path) -> None:
    run = finished("regression", tmp_path)
    held_out = load_data(run.settings).test
    texts = [row["text"] for row in held_out]
    found = [row.columns for row in from_lines(Predictor(run), "\n".join(texts))]
    assert all(row.keys() == {"prediction"} for row in found)
    predicted = np.array([row["prediction"] for row in found], dtype=np.float64)
    np.testing.assert_allclose(predicted, logits(run, texts).reshape(-1), rtol=1e-4, atol=1e-6)
    metrics = number_metrics(predicted, np.array([row["label"] for row in held_out]))
    evaluated = evaluate_run(run).metrics["test"]
    assert metrics == pytest.approx({name: evaluated[name] for name in metrics}, rel=1e-4)


def test_pairs_have_a_tab_between_them(tmp_path: Path) -> None:
    run = finished("sentence-pairs", tmp_path)
    predictor = Predictor(run)
    expected = logits(run, TEXTS[:3], TEXTS[3:]).argmax(-1).tolist()
    pairs = [f"{one}\t{other}" for one, other in zip(TEXTS[:3], TEXTS[3:], strict=True)]
    found = from_lines(predictor, "\n".join(pairs))
    assert [row.columns["prediction"] for row in found] == [run.labels[label] for label in expected]
    assert found[0].row.keys() == {"sentence1", "sentence2", "prediction", "probability"}
    with pytest.raises(ValueError, match="stdin, line 2: expected two texts with a tab between them, found 1"):
        from_lines(predictor, f"{pairs[0]}\ngood\n")
    (tmp_path / "new.csv").write_text("first,sentence2\n" + "\n".join(pair.replace("\t", ",") for pair in pairs))
    again = from_file(predictor, tmp_path / "new.csv", text_column="first")
    assert [row.columns for row in again] == [row.columns for row in found]


def test_entities_are_those_of_the_pipeline_of_transformers(tmp_path: Path) -> None:
    predictor = Predictor(finished("token-classification", tmp_path, epochs=10))
    tags = predictor.run.labels
    assert tags == ("O", "B-OPINION", "I-OPINION", "B-THING", "I-THING")
    predictor.model.config.id2label = dict(enumerate(tags))
    alone = pipeline(
        "token-classification",
        predictor.model,
        tokenizer=predictor.processor,
        aggregation_strategy="simple",
        device="cpu",
    )
    texts = ["the movie was very good", "a", "bad bad very great it movie was movie", "it  is   very   good"]
    names = {"start": "start", "end": "end", "label": "entity_group", "score": "score"}
    for row, text in zip(from_lines(predictor, "\n".join(texts)), texts, strict=True):
        found = [{key: one[key] for key in names} for one in row.columns["prediction"]]
        assert found == [
            {key: pytest.approx(one[name], abs=1e-5) for key, name in names.items()} for one in alone(text)
        ]
        assert all(one["text"] == text[one["start"] : one["end"]] for one in row.columns["prediction"])
    with pytest.raises(ValueError, match="abstain_below is for classes"):
        next(predictor.predict([Input({}, {"text": "a"})], 1, abstain_below=0.5))


def test_images_by_folder_and_by_path(tmp_path: Path) -> None:
    run = finished("image-classification", tmp_path)
    predictor = Predictor(run)
    rows = load_data(run.settings).test
    (tmp_path / "paths.txt").write_text("\n".join(row["image"] for row in rows))
    found = from_file(predictor, tmp_path / "paths.txt")
    assert [row.row["image"] for row in found] == [row["image"] for row in rows]
    right = [row.columns["prediction"] == run.labels[label["label"]] for row, label in zip(found, rows, strict=True)]
    assert np.mean(right) == evaluate_run(run).metrics["test"]["accuracy"]
    everything = {row.row["image"]: row.columns["prediction"] for row in from_file(predictor, tmp_path / "images")}
    assert len(everything) == 40
    assert {path: everything[path] for path in everything.keys() & {r["image"] for r in rows}} == {
        row.row["image"]: row.columns["prediction"] for row in found
    }
    one = from_file(predictor, Path(rows[0]["image"]))
    assert [row.row["image"] for row in one] == [rows[0]["image"]]
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no\.png is no image that can be read"):
        from_file(predictor, tmp_path / "no.png")


def test_rows_keep_their_columns_and_lines_may_be_a_file(classified: Predictor, tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "text": text} for n, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = [row.columns for row in from_lines(classified, "\n\n".join(TEXTS))]
    read = from_file(classified, tmp_path / "a.jsonl")
    assert [row.row for row in read] == [row | columns for row, columns in zip(rows, expected, strict=True)]
    (tmp_path / "a.txt").write_bytes("\r\n".join(["schön", *TEXTS]).encode("latin-1"))
    assert [row.input.row["text"] for row in from_file(classified, tmp_path / "a.txt")] == ["schön", *TEXTS]


def test_no_more_than_a_batch_is_read_ahead(classified: Predictor) -> None:
    taken = itertools.count()

    def endless() -> Iterator[Input]:
        for number in taken:
            yield Input({"n": number}, {"text": "good"})

    predictions = classified.predict(endless(), 4)
    assert [next(predictions).row["n"] for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    assert next(taken) == 8


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_long_file_takes_no_more_memory(tmp_path: Path, name: str) -> None:
    row = {"a.csv": f"good {'x' * 1000}\n", "a.jsonl": json.dumps({"text": "x" * 1000}) + "\n"}[name]
    with (tmp_path / name).open("w") as file:
        file.write("text\n" if name == "a.csv" else "")
        file.writelines(row for _ in range(20_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_table(tmp_path / name, None, print)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 8e6 < (tmp_path / name).stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "sentence,label\ngood,1\n", r"no column 'text'; set --text-column, expected one of label, sentence$"),
        ("a.csv", "text\ngood\n\nbad\n   \n", r"a\.csv, row 3: column 'text' is empty; fill it in"),
        ("a.csv", "text,prediction\ngood,good\n", "a column 'prediction' already; rename it"),
        ("a.jsonl", '{"text": "good"}\n{"text": 3}\n', r"a\.jsonl, row 2: .*holds 3, which is no text"),
        ("a.jsonl", '{"text": "good"}\n{"txt": "good"}\n', r"row 2: column 'text' is empty"),
        ("a", None, "no such file"),
        (".", None, "is a folder; give a file"),
    ],
)
def test_an_input_that_does_not_fit_is_reported(
    classified: Predictor, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        from_file(classified, tmp_path / name)


def test_a_line_that_is_no_text_is_reported(classified: Predictor) -> None:
    lines = stream_lines(io.BytesIO(b"\xef\xbb\xbfgood\r\nb\xe4d\n"), "stdin")
    assert next(lines) == ("stdin, line 1", "good")
    with pytest.raises(ValueError, match="stdin, line 2: not UTF-8"):
        next(lines)
