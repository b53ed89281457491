"""Users and their rows of tokens: what characters of Shakespeare's plays say, and source code of one language each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.spoken_lines import spoken_lines
from materials.fetch import fetch
from materials.many_classes import PYGMENTS
from materials.models import smollm2

TOKENS = 48
ROWS = {"train": 32, "development": 4, "test": 8}
"""Of a user; the parts of a text lie one after another, so that no test row is between two training rows."""
SHARES = {"train": (0.0, 0.7), "development": (0.7, 0.8), "test": (0.8, 1.0)}

NO_LANGUAGE = ("hexdump",)
"""A folder of dumps, whose next line is the line before and one."""


class Users(NamedTuple):
    """Rows of each user."""

    names: list[str]
    parts: dict[str, Tensor]
    """Tokens, each (users, rows, tokens)."""


def speakers(count: int) -> Users:
    """The characters who say most; whole scenes are held out."""
    return Users(*spoken_lines(AutoTokenizer.from_pretrained(smollm2()), count))


def languages(count: int) -> Users:
    """The languages of Pygments' example files with the most text, the end of each text held out."""
    folder, tokenizer = fetch(PYGMENTS) / PYGMENTS.members.removesuffix("/*"), AutoTokenizer.from_pretrained(smollm2())
    found: dict[str, dict[str, Tensor]] = {}
    for language, text in sorted(_texts(folder).items(), key=lambda each: -len(each[1])):
        rows = {part: _rows(tokenizer, text, part) for part in ROWS}
        if all(len(rows[part]) == wanted for part, wanted in ROWS.items()):
            found[language] = rows
        if len(found) == count:
            break
    return Users(list(found), {part: torch.stack([rows[part] for rows in found.values()]) for part in ROWS})


SOURCES: Mapping[str, Callable[[int], Users]] = {"speakers": speakers, "languages": languages}
"""By the names in the result file."""


def _texts(folder: Path) -> dict[str, str]:
    """By language, the beginnings of its files one after another: no file has more than a third of what is used."""
    most = 12 * TOKENS * sum(ROWS.values())
    return {
        each.name: "\n".join(
            file.read_text(encoding="utf-8", errors="replace")[: most // 3]
            for file in sorted(each.rglob("*"))
            if file.is_file() and file.suffix != ".output"
        )[:most]
        for each in sorted(folder.iterdir())
        if each.is_dir() and each.name not in NO_LANGUAGE
    }


def _rows(tokenizer: PreTrainedTokenizerBase, text: str, part: str) -> Tensor:
    """Rows spread evenly over the part's share of a text; fewer where it is too short."""
    start, end = (round(share * len(text)) for share in SHARES[part])
    ids = torch.tensor(tokenizer(text[start:end], verbose=False)["input_ids"], dtype=torch.long)
    rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    return rows[torch.linspace(0, len(rows) - 1, min(ROWS[part], len(rows))).long()]
