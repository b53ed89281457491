"""Sixteen classifiers of one message in one pass: trained on few rows each, served, and one taught anew meanwhile.

The messages are Webster's definitions, film reviews and lines of code. Each classifier is a run of `dvora train` in the
last two blocks of MiniLM, and what is served of it is the adapter or the head alone, whichever was better on rows that
were held out. `dvora serve` answers for all of them in one pass, which computes the four blocks below once.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import dvora
from examples.checks import report, require
from examples.messages import Rows, labelled
from examples.serving import classify, replace, server
from materials.models import minilm

FEW, MANY, HELD_OUT = 128, 500, 200
"""Rows to train on, of most classifiers and of some, and rows to test on."""
WITH_MANY = ("opinion", "language", "rating")
TAUGHT = "ships"
MESSAGES = (
    "The surgeon of the frigate was tried by a court for his sermon.",
    "A long and tedious film, saved by its organ music.",
    "for (int i = 0; i < n; i++) { sum += a[i]; }",
)


def train(name: str, rows: Rows, folder: Path) -> dict[str, Any]:
    """A run of `dvora train`, as it is typed; what it says."""
    folder.mkdir(exist_ok=True)
    table = folder / f"{name}.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    task = "regression" if name == "rating" else "text-classification"
    given = ["--task", task, "--model", minilm(), "--data", table, "--output", folder / name, "--blocks", "last:2"]
    command = [sys.executable, "-m", "dvora.cli", "train", *map(str, given), "--json", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    require(ended.returncode == 0, f"{name} is trained: {ended.stderr}")
    return json.loads(ended.stdout)


def accuracy(address: str, name: str, rows: Rows) -> float:
    answers = classify(address, [name], [text for text, _ in rows])
    return mean(answer["label"] == label for answer, (_, label) in zip(answers, rows, strict=True))


def described(answers: Sequence[dict[str, Any]]) -> str:
    """What those say that do not say no."""
    return ", ".join(
        " ".join(filter(None, (f"{one['model']}:", one["label"], f"{one['score']:.2f}")))
        for one in answers
        if one["label"] != "no"
    )


def seconds(action: Callable[[], object]) -> float:
    before = perf_counter()
    action()
    return perf_counter() - before


def main(folder: Path) -> None:
    rows = labelled("train", lambda name: MANY if name in WITH_MANY else FEW)
    names = list(rows)
    before = perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = dict(zip(names, threads.map(lambda one: train(one, rows[one], folder / "runs"), names), strict=True))
    minutes = (perf_counter() - before) / 60
    held_out = labelled("test", lambda _: HELD_OUT)
    with server(minilm(), folder / "runs") as address:
        answers = {message: described(classify(address, names, [message])) for message in MESSAGES}
        scores = {name: accuracy(address, name, held_out[name]) for name in names if name != "rating"}
        one_text = [MESSAGES[0]]
        ratio = median(
            seconds(lambda: [classify(address, [name], one_text) for name in names])
            / seconds(lambda: classify(address, names, one_text))
            for _ in range(9)
        )
        before_it = {answer["model"]: answer for answer in classify(address, names, one_text)}
        # A department corrects its classifier, while others go on asking.
        more = labelled("train", lambda _: 10 * FEW)[TAUGHT]
        answered, is_over = list[str](), threading.Event()

        def ask() -> None:
            while not is_over.is_set():
                for answer in classify(address, names, one_text):
                    if answer["model"] != TAUGHT:
                        require(answer == before_it[answer["model"]], "other classifiers answer as before")
                    answered.append(answer["digest"])

        with ThreadPoolExecutor(1) as threads:
            asking = threads.submit(ask)
            try:
                results[TAUGHT] = train(TAUGHT, more, folder / "again")
                change = seconds(lambda: replace(address, TAUGHT, folder / "again" / TAUGHT))
            finally:
                is_over.set()
            asking.result()
        after = accuracy(address, TAUGHT, held_out[TAUGHT])
        (new,) = classify(address, [TAUGHT], one_text)
        require(new["digest"] != before_it[TAUGHT]["digest"], "the new version answers")
    report(
        {
            "works": True,
            "figures": {
                "answers": answers,
                "heads_alone": sum(result.get("saved") == "head" for result in results.values()),
                "minutes_to_train_all": round(minutes, 1),
                "accuracy": round(mean(scores.values()), 3),
                "one_request_as_fast_as_sixteen": round(ratio, 1),
                "taught_anew": [round(scores[TAUGHT], 3), round(after, 3)],
                "ms_to_replace": round(1000 * change),
                "answers_meanwhile": len(answered),
            },
            "versions": {"dvora": dvora.__version__},
        }
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
