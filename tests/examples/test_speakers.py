"""An adapter for each speaker: which rows are held out."""

from transformers import AutoTokenizer

from examples.spoken_lines import ROWS, TOKENS, spoken_lines
from materials.models import minilm


def test_speakers_have_rows_of_their_own_in_every_part() -> None:
    lines = spoken_lines(AutoTokenizer.from_pretrained(minilm()), 8)
    assert len(set(lines.speakers)) == 8
    assert {part: tuple(ids.shape) for part, ids in lines.parts.items()} == {
        part: (8, rows, TOKENS) for part, rows in ROWS.items()
    }
    rows = [tuple(row.tolist()) for ids in lines.parts.values() for row in ids.flatten(0, 1)]
    assert len(set(rows)) == len(rows)
