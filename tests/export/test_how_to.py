"""The commands and the program on the page about exporting run as they stand there, on a tiny model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import dvora
from tests.recipes import tiny_models
from tests.serve.served import copied, save_classifier
from transcript.forks import dvora as program

PAGE = Path(dvora.__file__).parents[2] / "docs" / "how-to" / "export.md"
BLOCK = re.compile(r"(?:^<!-- not run.*-->\n)?^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_page(tmp_path: Path) -> None:
    bert = tiny_models.bert(tmp_path / "minilm", layers=1)
    for number, name in enumerate(("films", "shop")):
        copied(save_classifier(bert, tmp_path / f"saved-{name}", number, 2), tmp_path / "customers" / name)
    ran = []
    for found in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        kind, block = found.groups()
        if found[0].startswith("<!-- not run") or "pip install" in block:
            continue
        if kind == "sh":
            ended = program(shlex.split(block)[1:], tmp_path)
        else:
            command = [sys.executable, "-c", block]
            ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, (block, ended.stdout, ended.stderr)
        ran.append(ended.stdout)
        # Minutes for a larger model: it says where it is.
        stages = ("are read", "PyTorch traces", "are written", "are compared")
        assert "dvora export" not in block or all(stage in ended.stderr for stage in stages)
    assert len(ran) == 2
    assert ran[1].count("[") == 3
