"""The tenants: 48 small questions about texts, each with classes of its own, cut out of larger data by fixed rules.

No rule looks at what a model makes of the texts. Every tenant's rows are split at random, duplicates out first.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from examples.spoken_lines import NAME
from materials.data import shakespeare, wordnet_nouns
from materials.many_classes import code_languages, countries, webster_fields
from materials.splits import TextTask, text_task

ROWS = 1000
"""Of a tenant, in all three parts, at most."""
KINDS: Mapping[str, int] = {"countries": 8, "fields": 6, "languages": 10, "kinds": 16, "plays": 8}
"""How many tenants are of which kind; their names begin with it."""

Classes = Mapping[str, Sequence[str]]
"""Texts by the names of their classes."""


def tenants(kinds: Mapping[str, int] = KINDS) -> list[TextTask]:
    """The tenants of some kinds, the first ones of each.

    Raises:
        FetchError: WordNet or the dictionary could not be had.
    """
    sources = {
        # In which of five countries is the town? In which of four fields is the definition, the line in which of
        # four programming languages?
        "countries": lambda: _groups(countries(), 5),
        "fields": lambda: _groups(webster_fields(), 4),
        "languages": lambda: _groups(code_languages(), 4),
        "kinds": _kinds,
        "plays": _plays,
    }
    found = []
    for kind, count in kinds.items():
        some = zip(range(count), sources[kind](), strict=False)
        found += [_tenant(f"{kind}: {name}", classes) for _, (name, classes) in some]
    return found


def _tenant(name: str, classes: Classes) -> TextTask:
    """The task of its classes, of each as many texts as fit, spread evenly over what there is."""
    most, texts, labels = ROWS // len(classes), list[str](), list[int]()
    for label, some in enumerate(classes.values()):
        step = max(1, len(some) // most)
        kept = some[::step][:most]
        texts += kept
        labels += [label] * len(kept)
    return text_task(name, tuple(classes), texts, labels, seed=0)


def _groups(task: TextTask, size: int) -> Iterator[tuple[str, Classes]]:
    """The classes of a larger task, so many at a time, in the order of their names."""
    texts: dict[str, list[str]] = {each: [] for each in sorted(task.classes)}
    for part in (task.train, task.validation, task.test):
        for text, label in zip(part.texts, part.labels, strict=True):
            texts[task.classes[int(label)]].append(text)
    names = list(texts)
    for first in range(0, len(names), size):
        chosen = names[first : first + size]
        yield ", ".join(chosen), {each: texts[each] for each in chosen}


def _kinds() -> Iterator[tuple[str, Classes]]:
    """Which kind of bird, vehicle, work ... is defined? Nouns of WordNet with three or more kinds of 60 nouns and more.

    Those with the fewest nouns come first, and none that shares a noun with one before it.
    """
    words, definitions, below = {}, {}, defaultdict(list)
    for line in wordnet_nouns():
        data, text = line.split(" | ", 1)
        number, _, _, _, word, *_ = data.split(" ")
        words[number], definitions[number] = word.replace("_", " "), text.split('; "', 1)[0].strip()
        # `@` points to the more general.
        for more_general in re.findall(r" @i? (\d{8}) n", data):
            below[more_general].append(number)

    def nouns(top: str) -> frozenset[str]:
        seen, waiting = set(), [top]
        while waiting:
            number = waiting.pop()
            if number not in seen:
                seen.add(number)
                waiting += below[number]
        return frozenset(seen)

    large = {number: those for number in words if len(those := nouns(number)) >= 60}
    used: set[str] = set()
    for top in sorted(large, key=lambda each: (len(large[each]), each)):
        kinds = [number for number in below[top] if number in large]
        if len(kinds) >= 3 and not used & large[top]:
            used |= large[top]
            several = Counter(noun for kind in kinds for noun in large[kind])
            yield (
                words[top],
                {words[k]: [definitions[noun] for noun in sorted(large[k]) if several[noun] == 1] for k in kinds},
            )


def _plays() -> Iterator[tuple[str, Classes]]:
    """Who says it? The four characters of a play by Shakespeare who speak most often; plays by how often these do."""
    library, found = shakespeare(), {}
    for title, text in {**library.train, **library.validation, **library.test}.items():
        speeches: dict[str, list[str]] = defaultdict(list)
        # Without stage directions; of a speech the first three lines.
        for speech in re.split(r"\n\s*\n", re.sub(r"\[[^\]]*\]", "", text)):
            lines = [line.strip() for line in speech.strip().splitlines() if line.strip()]
            if len(lines) > 1 and (name := NAME.match(lines[0])):
                speeches[name[1].title()].append(" ".join(lines[1:4]))
        found[title] = dict(sorted(speeches.items(), key=lambda each: -len(each[1]))[:4])
    yield from sorted(found.items(), key=lambda each: -sum(map(len, each[1].values())))
