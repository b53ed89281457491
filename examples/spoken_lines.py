"""What the biggest parts of Shakespeare's plays say, in rows of tokens; whole scenes are held out."""

import re
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from materials.data import shakespeare

TOKENS = 48
"""Of a row: what one speaker says, in several speeches where they are short."""
ROWS = {"train": 32, "development": 4, "test": 8}
"""Of each speaker."""
HELD_OUT = {3: "development", 4: "test"}
"""Of five scenes of a play, one after another; the others are for training."""
NAME = re.compile(r"^([A-Z][A-Za-z' ]{1,24})\.$")
SCENE = re.compile(r"^(ACT\b.*)?SCENE\b", flags=re.IGNORECASE)

Spoken = dict[str, dict[str, str]]
"""By speaker, then by the name of the part."""


class Lines(NamedTuple):
    """Rows of tokens, in the order of the speakers."""

    speakers: list[str]
    parts: dict[str, Tensor]
    """Each (speakers, rows, tokens)."""


def spoken_lines(tokenizer: PreTrainedTokenizerBase, count: int) -> Lines:
    """The speakers who say most.

    Args:
        tokenizer: of the model.
        count: of speakers.
    """
    spoken = sorted(_spoken().items(), key=lambda each: -len(each[1].get("train", "")))
    found: dict[str, dict[str, Tensor]] = {}
    for speaker, parts in spoken:
        rows = {part: _rows(tokenizer, parts.get(part, ""), number) for part, number in ROWS.items()}
        if all(len(rows[part]) == number for part, number in ROWS.items()):
            found[speaker] = rows
        if len(found) == count:
            break
    return Lines(list(found), {part: torch.stack([rows[part] for rows in found.values()]) for part in ROWS})


def _rows(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> Tensor:
    """So many rows, spread evenly over a text; fewer if it is too short."""
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def _spoken() -> Spoken:
    spoken: Spoken = defaultdict(lambda: defaultdict(str))
    library = shakespeare()
    for title, text in {**library.train, **library.validation, **library.test}.items():
        scene = 0
        # Without stage directions.
        for speech in re.split(r"\n\s*\n", re.sub(r"\[[^\]]*\]", "", text)):
            lines = [line.strip() for line in speech.strip().splitlines() if line.strip()]
            scene += bool(lines and SCENE.match(lines[0]))
            if len(lines) > 1 and (name := NAME.match(lines[0])):
                part = HELD_OUT.get(scene % 5, "train")
                spoken[f"{name[1].title()} ({title.replace('_', ' ')})"][part] += "\n".join(lines[1:]) + "\n"
    return spoken
