"""Entities in texts: a label for some characters, and for a model a tag for each token (BIO), there and back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .chats import IGNORED

OUTSIDE = "O"
Offsets = Sequence[tuple[int, int]]
"""Of each token the first character, and the one behind the last; of special tokens both are the same."""


class Entity(NamedTuple):
    """Characters of a text that have a label."""

    start: int
    end: int
    label: Any
    """A name; in encoded rows the tag of its first token, after which comes that of the others."""


def checked_entities(value: object, text: str) -> tuple[Entity, ...]:
    """The entities of a row, in their order in the text.

    Raises:
        ValueError: they are no list of objects with start, end and label, reach out of the text, or overlap.
    """
    shape = 'expected a list of entities, such as [{"start": 0, "end": 4, "label": "NAME"}]'
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError(f"{shape}, got {value!r:.80}")
    entities = sorted(Entity(one.get("start"), one.get("end"), one.get("label")) for one in value)
    for one, before in zip(entities, [Entity(0, 0, ""), *entities], strict=False):
        if not (type(one.start) is type(one.end) is int and isinstance(one.label, str) and one.label.strip()):
            raise ValueError(f"{shape}, got {tuple(one)}")
        if not before.end <= one.start < one.end <= len(text):
            raise ValueError(f"the entity {tuple(one)} is empty, overlaps another, or is not in {len(text)} characters")
    return tuple(entities)


def tags_of(labels: Sequence[str]) -> tuple[str, ...]:
    """The tags of entities with these labels."""
    return (OUTSIDE, *(f"{place}-{label}" for label in sorted(labels) for place in "BI"))


def token_tags(offsets: Offsets, entities: Sequence[Entity]) -> list[int]:
    """The tag of each token; `IGNORED` where it has no characters."""
    tags, last = list[int](), None
    for start, end in offsets:
        entity = next((one for one in entities if one.start < end and start < one.end), None)
        tags.append(IGNORED if start == end else 0 if entity is None else entity.label + (entity is last))
        last = entity or last
    return tags


def tagged(tags: Sequence[str]) -> list[Entity]:
    """Tokens that belong together: an entity begins with B, or where the tag before it is of another label."""
    entities = list[Entity]()
    for place, tag in enumerate(tags):
        is_first, label = tag.startswith("B-"), tag[2:] if tag.startswith(("B-", "I-")) else tag
        if entities and not is_first and entities[-1][1:] == (place, label):
            entities[-1] = entities[-1]._replace(end=place + 1)
        elif tag != OUTSIDE:
            entities.append(Entity(place, place + 1, label))
    return entities
