"""What a command imports before it does anything: nothing large without need, however fast the machine is."""

from pathlib import Path

import pytest

from benchmarks.start_up import COMMANDS, SOURCE, started

FOR_DATA = {"datasets", "pandas", "pyarrow"}
FOR_PAGES = {"matplotlib"}
# PEFT and transformers import these where they are installed; a command that imports PEFT cannot keep them away.
PEFTS_OWN = {"torchao", "bitsandbytes", "hqq", "triton", "scipy"}
# dvora's commands that read a table, and those that draw.
READS_DATA = {"doctor", "evaluate", "predict", "report", "train", "generate"}
DRAWS = {"report"}


@pytest.mark.parametrize("command", COMMANDS["help"])
def test_what_loads_no_model_imports_nothing_large(command: str, tmp_path: Path) -> None:
    assert started(command, SOURCE, tmp_path).packages == []


@pytest.mark.parametrize(
    ("command", "expected"), [("import dvora", set()), ("dvora.DVoRAAdapter", {"torch"})], ids=["dvora", "plain layer"]
)
def test_python_imports_what_a_name_needs(command: str, expected: set[str], tmp_path: Path) -> None:
    assert set(started(command, SOURCE, tmp_path).packages) == expected


@pytest.mark.parametrize("command", COMMANDS["start"])
def test_a_command_imports_what_it_uses(command: str, tmp_path: Path) -> None:
    name = command.split()[1]
    allowed = {"torch", "transformers", "peft", "accelerate", *PEFTS_OWN}
    allowed |= FOR_DATA if name in READS_DATA else set()
    allowed |= FOR_PAGES if name in DRAWS else set()
    assert set(started(command, SOURCE, tmp_path).packages) <= allowed
