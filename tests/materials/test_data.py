"""The real data sets: free of duplicates, disjoint, and the same for everyone (pinned counts and digests)."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest

from materials import data
from materials.fetch import FetchError
from materials.splits import Images, ImageTask, Texts, TextTask, same_text

Task = TypeVar("Task", TextTask, ImageTask)


def digest(part: Texts | Images) -> str:
    content = "\n".join(part.texts).encode() if isinstance(part, Texts) else part.pixels.tobytes()
    return hashlib.sha256(content + part.labels.tobytes()).hexdigest()[:16]


def sizes(task: TextTask | ImageTask) -> tuple[int, int, int]:
    return len(task.train), len(task.validation), len(task.test)


def assert_no_text_twice(task: TextTask) -> None:
    texts = [same_text(text) for part in (task.train, task.validation, task.test) for text in part.texts]
    assert len(texts) == len(set(texts))


def loaded(loader: Callable[[], Task]) -> Task:
    try:
        return loader()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("loader", "counts", "test_digest"),
    [
        (data.movie_reviews, (7049, 1007, 2014), "8a1b898922376c5c"),
        (data.movie_ratings, (7423, 1060, 2120), "e16abff5afab4c83"),
        (data.tweets, (2361, 337, 674), "719058a1eff6db5f"),
        (data.tweet_ratings, (2898, 414, 828), "dd9f61ae9bd8d068"),
    ],
)
def test_rated_texts(loader: Callable[[], TextTask], counts: tuple[int, int, int], test_digest: str) -> None:
    task = loader()
    assert_no_text_twice(task)
    assert sizes(task) == counts
    assert digest(task.test) == test_digest


def test_another_seed_makes_other_parts() -> None:
    assert digest(data.movie_reviews(seed=1).test) != digest(data.movie_reviews(seed=0).test)


def test_movie_reviews_are_balanced_and_their_text_is_whole() -> None:
    task = data.movie_reviews()
    parts = (task.train, task.validation, task.test)
    assert abs(np.concatenate([part.labels for part in parts]).mean() - 0.5) < 0.01
    words = " ".join(text for part in parts for text in part.texts).split()
    assert "clichés" in words
    assert not any("Ã" in word or "\ufffd" in word for word in words)


def test_ratings_are_on_the_scale() -> None:
    labels = data.movie_ratings().train.labels
    assert labels.dtype == np.float32
    assert -4 <= labels.min() < -3
    assert 3 < labels.max() <= 4


def test_shakespeare_holds_out_whole_plays() -> None:
    library = data.shakespeare()
    assert len(library.train) == 38
    assert set(library.validation) == {"macbeth", "twelfth_night"}
    assert set(library.test) == {"hamlet", "tempest"}
    assert library.test["hamlet"].startswith("HAMLET, PRINCE OF DENMARK")
    everything = "".join(text for _, text in sorted((library.train | library.validation | library.test).items()))
    assert len(everything) == 5_057_198


def test_wordnet10() -> None:
    task = loaded(data.wordnet10)
    assert_no_text_twice(task)
    assert len(task.classes) == len(set(task.train.labels.tolist())) == 10
    assert not any('; "' in text for text in task.train.texts)


def test_fashion_mnist_repeats_no_image() -> None:
    task = loaded(data.fashion_mnist)
    assert sizes(task) == (54_000, 6_000, 10_000)
    images = {image.tobytes() for part in (task.train, task.validation, task.test) for image in part.pixels}
    assert len(images) == 70_000


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn brings this data set")
    task = data.digits()
    assert sizes(task) == (1259, 179, 359)
    assert digest(task.test) == "5867a4f3129786e9"
