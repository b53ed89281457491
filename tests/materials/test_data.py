"""The real data sets: free of duplicates, disjoint, and the same for everyone (pinned counts and digests)."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from materials import data
from materials.splits import Images, Texts, TextTask, same_text


def digest(content: bytes, part: Texts | Images) -> str:
    return hashlib.sha256(content + part.labels.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("loader", "counts", "test_digest"),
    [
        (data.movie_reviews, (7049, 1007, 2014), "8a1b898922376c5c"),
        (data.movie_ratings, (7423, 1060, 2120), "e16abff5afab4c83"),
    ],
)
def test_texts_are_disjoint_and_pinned(
    loader: Callable[[], TextTask], counts: tuple[int, int, int], test_digest: str
) -> None:
    task = loader()
    parts = (task.train, task.validation, task.test)
    texts = [same_text(text) for part in parts for text in part.texts]
    assert len(texts) == len(set(texts))
    assert tuple(map(len, parts)) == counts
    assert digest("\n".join(task.test.texts).encode(), task.test) == test_digest


def test_movie_reviews_are_balanced_and_their_text_is_whole() -> None:
    task = data.movie_reviews()
    parts = (task.train, task.validation, task.test)
    assert abs(np.concatenate([part.labels for part in parts]).mean() - 0.5) < 0.01
    words = " ".join(text for part in parts for text in part.texts).split()
    assert "clichés" in words
    assert not any("Ã" in word or "\ufffd" in word for word in words)


def test_shakespeare_holds_out_whole_plays() -> None:
    library = data.shakespeare()
    assert len(library.train) == 38
    assert set(library.validation) == {"macbeth", "twelfth_night"}
    assert set(library.test) == {"hamlet", "tempest"}
    assert library.test["hamlet"].startswith("HAMLET, PRINCE OF DENMARK")
    everything = "".join(text for _, text in sorted((library.train | library.validation | library.test).items()))
    assert len(everything) == 5_057_198


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn brings this data set")
    task = data.digits()
    assert tuple(map(len, (task.train, task.validation, task.test))) == (1259, 179, 359)
    assert digest(task.test.pixels.tobytes(), task.test) == "5867a4f3129786e9"
