"""An adapter for each speaker: which rows are held out, every arm in little, the table."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.speakers import ARMS
from examples.speakers import ALL, BASE, BOTH, EACH, QUICK, run
from examples.spoken_lines import ROWS, TOKENS, spoken_lines
from materials.fetch import cache_folder
from materials.models import SMOLLM2_FOLDER, minilm


def test_speakers_have_rows_of_their_own_in_every_part() -> None:
    lines = spoken_lines(AutoTokenizer.from_pretrained(minilm()), 8)
    assert len(set(lines.speakers)) == 8
    assert {part: tuple(ids.shape) for part, ids in lines.parts.items()} == {
        part: (8, rows, TOKENS) for part, rows in ROWS.items()
    }
    rows = [tuple(row.tolist()) for ids in lines.parts.values() for row in ids.flatten(0, 1)]
    assert len(set(rows)) == len(rows)


@pytest.mark.skipif(not Path(cache_folder() / SMOLLM2_FOLDER).is_dir(), reason="materials.models.smollm2() makes it")
# transformers deprecates a property that PEFT still asks for.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_arm_learns() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    setting = QUICK._replace(speakers=2, batch=4)
    speakers, (losses,) = run(setting, [0])
    assert set(losses) == set(ARMS)
    assert {len(each) for each in losses.values()} == {len(speakers)} == {setting.speakers}
    for arm in (ALL, EACH, BOTH):
        assert all(trained < base for trained, base in zip(losses[arm], losses[BASE], strict=True))
    assert torch.equal(torch.get_rng_state(), before)
