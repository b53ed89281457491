"""What a method has to beat: the majority class, bags of words, and the frozen model with the best linear head."""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from benchmarks.quality.evaluation import Evaluation, Problem
from benchmarks.quality.grid import TaskPlan
from benchmarks.quality.heads import PENALTIES, fitted
from benchmarks.quality.language import CronExpressions, Plays
from benchmarks.quality.problems import SOURCES, Labelled

Evaluations = tuple[Evaluation, Evaluation]


def baseline(method: str, name: str, plan: TaskPlan, task: Problem) -> Evaluations:
    """Its evaluations on the validation and the test split."""
    return _BASELINES[method](name, plan, task)


def _majority(name: str, plan: TaskPlan, task: Problem) -> Evaluations:
    """The commonest class, the mean rating; of bytes, that all are equally likely."""
    if isinstance(task, Plays):
        return _uniform(task, "validation"), _uniform(task, "test")
    if isinstance(task, CronExpressions):
        return _commonest(task, "validation"), _commonest(task, "test")
    assert isinstance(task, Labelled)
    train = task.parts["train"].labels
    if task.outputs == 1:
        predicted = torch.zeros(1, dtype=torch.float64) + train.double().mean()
        return _evaluated(task, predicted, "validation"), _evaluated(task, predicted, "test")
    shares = torch.bincount(train, minlength=task.outputs).double() / len(train)
    return _evaluated(task, shares.log(), "validation"), _evaluated(task, shares.log(), "test")


def _evaluated(task: Labelled, outputs: Tensor, part: str) -> Evaluation:
    return task.evaluate_outputs(outputs.expand(len(task.parts[part].labels), -1), part)


def _uniform(task: Plays, part: str) -> Evaluation:
    nats = task.bytes[part] * np.log(256)
    return Evaluation(float(nats.sum() / (len(nats) * 127)), 8.0, nats.astype(np.float32))


def _commonest(task: CronExpressions, part: str) -> Evaluation:
    """One answer for all, which is right once: no schedule is described twice."""
    correct = np.arange(len(task.rows[part])) == 0
    return Evaluation(float("nan"), float(correct.mean()), correct)


def _tfidf(name: str, plan: TaskPlan, task: Problem) -> Evaluations:
    """Words and pairs of words, weighted by how rare they are, and a linear model whose penalty validation chose."""
    assert isinstance(task, Labelled)
    texts = SOURCES[name]()
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    train = vectoriser.fit_transform(texts.train.texts[: plan.train])
    labels = texts.train.labels[: plan.train]
    parts = {
        part: vectoriser.transform(getattr(texts, part).texts[: getattr(plan, part)]) for part in ("validation", "test")
    }
    tried: list[Evaluations] = []
    for penalty in PENALTIES:
        weight, bias = fitted(train, labels, penalty, task.outputs)
        predicted = {part: torch.from_numpy(words @ weight.T + bias) for part, words in parts.items()}
        tried.append(
            (
                task.evaluate_outputs(predicted["validation"], "validation"),
                task.evaluate_outputs(predicted["test"], "test"),
            )
        )
    return min(tried, key=lambda each: each[0].loss)


def _frozen(name: str, plan: TaskPlan, task: Problem) -> Evaluations:
    """The pretrained model before any adaptation: with the best linear head, or none where the task has none."""
    model = task.model("float32")
    return task.evaluate(model, "validation"), task.evaluate(model, "test")


_BASELINES: dict[str, Callable[[str, TaskPlan, Problem], Evaluations]] = {
    "majority": _majority,
    "tfidf": _tfidf,
    "frozen": _frozen,
}
