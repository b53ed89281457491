"""Thousands of damaged adapter folders: each loads the values that it holds, or is refused and changes nothing.

`--fuzz` loads all of them; without it, a sample of every kind of damage, and those that once broke the rule.
"""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.tuner.state.edits import Mutation
from tests.tuner.state.folder_cases import CASES, Sound, saved
from tests.tuner.state.loads import Outcome, outcome
from tests.tuner.state.mutations import mutations

SAMPLE = 25
"""Folders of each case in a short run."""

ONCE_BROKEN = (
    *("base_layer.weight (24, 24) added", "base_layer.weight (32, 32) added", "base_layer.weight (3,) added"),
    *("as 'base_model.model.classifier.original_module.weight'", "lin2.weight also as", "base_layer.bias dropped"),
    *("base_layer.bias with nan", "base_layer.bias twice", "lin2.weight all NaN", "with 1e300", "float8_e4m3fn"),
    *(
        "stream_0 as torch.bfloat16",
        "stream_0 empty",
        "r = 18446744073709551616",
        "rank_pattern = {'lin0': 2147483648}",
    ),
    *("alpha = 100000", "alpha_pattern = {'lin0': 100000", "d_initial = -118059", "d_initial = 1e+308"),
    *("base_probes = {'lin0': [100000", "rank_pattern = {'(': 5}", "target_modules = '*'", "exclude_modules = [[]]"),
    *("base_model_name_or_path = -1", "modules_to_save dropped", "bias dropped", "renamed 'self'", "cls added"),
    *("bin: malice in a torch file, no", "bin: a list in a torch file, no", "bin: numbers in a torch file, no"),
    *("bin: nothing, no", "safetensors: a folder", "modules_to_save = ['', '']", "modules_to_save = ['(']"),
)
"""Parts of names."""

WAYS = [(name, beside) for name, case in CASES.items() for beside in ((False, True) if case.beside else (False,))]
each_way = pytest.mark.parametrize(("sound", "beside"), WAYS, indirect=["sound"])


@pytest.fixture(scope="module")
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return saved(CASES[request.param], tmp_path_factory.mktemp("sound"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT looks on the hub for a file that it does not find."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(sound: Sound, mutation: Mutation, beside: bool, parent: Path) -> Outcome:
    folder = parent / "damaged"
    shutil.copytree(sound.folder, folder)
    mutation.apply(folder)
    found = outcome(sound, folder, beside=beside)
    shutil.rmtree(folder)
    return found


@each_way
def test_a_damaged_folder_gives_what_it_holds_or_is_refused(
    sound: Sound, beside: bool, tmp_path: Path, outcomes: Counter[tuple[str, str]], pytestconfig: pytest.Config
) -> None:
    known = mutations(sound.folder)
    broken = []
    for mutation in known if pytestconfig.getoption("fuzz") else known[:SAMPLE]:
        found = load(sound, mutation, beside, tmp_path)
        outcomes[mutation.family, found.kind] += 1
        broken += [f"{mutation.name}: {problem}" for problem in found.problems]
    assert not broken, f"{len(broken)} problems\n" + "\n".join(broken[:100])


@each_way
def test_a_folder_that_once_broke_the_rule_keeps_it(sound: Sound, beside: bool, tmp_path: Path) -> None:
    known = mutations(sound.folder)
    chosen = [next((mutation for mutation in known if part in mutation.name), None) for part in ONCE_BROKEN]
    loads = {mutation.name: load(sound, mutation, beside, tmp_path) for mutation in chosen if mutation}
    assert not {name: found for name, found in loads.items() if found.problems}


@each_way
def test_an_undamaged_folder_gives_the_same(sound: Sound, beside: bool, tmp_path: Path) -> None:
    assert load(sound, Mutation("none", "none", lambda folder: None), beside, tmp_path) == Outcome("same")


def test_there_are_thousands_and_always_the_same(tmp_path: Path) -> None:
    folders = [saved(case, tmp_path / name).folder for name, case in CASES.items()]
    names = [[mutation.name for mutation in mutations(folder)] for folder in folders]
    assert sum(len(set(each)) for each in names) >= 5000
    assert names == [[mutation.name for mutation in mutations(folder)] for folder in folders]
    assert names[0] != [mutation.name for mutation in mutations(folders[0], seed=1)]


def test_every_folder_that_once_broke_the_rule_is_still_there(tmp_path: Path) -> None:
    names = [
        mutation.name for name, case in CASES.items() for mutation in mutations(saved(case, tmp_path / name).folder)
    ]
    assert not [part for part in ONCE_BROKEN if not any(part in name for name in names)]
