"""Does the answer at equal bytes hold with twice the steps, on a base in 4 bits, and on a base that was fine-tuned?"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from benchmarks.quality.equal_bytes import ARMS, YARDSTICK
from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import LABELS, Result, names_of
from benchmarks.quality.tables import difference

SLOWER = ("structured_r64", "dvora_r256", "vera_r256")
"""Arms of which a step takes one and a half to two times as long as the yardstick's."""
COMPARED = (YARDSTICK, "structured_r64", "dvora_r256", "vera_r256", "lora_r8")
"""Arms that also run in other settings."""


@dataclass(frozen=True)
class Setting:
    """How the arms of a column were trained.

    Args:
        endings: of the arms' names; where there are several, the one with the lowest validation loss counts.
        frozen: the arm without an adapter.
    """

    label: str
    endings: tuple[str, ...]
    frozen: str = "frozen"


USUAL = Setting("500 steps", ("",))
TWICE = Setting("1,000 steps", ("_twice", "_twice_half"))
SETTINGS = (
    USUAL,
    TWICE,
    Setting("base in nf4, 1,000 steps", ("_nf4",), "frozen_nf4"),
    Setting("base fine-tuned before, 500 steps", ("_continued",), "frozen_continued"),
)


def tasks_with(result: Result, setting: Setting) -> list[str]:
    """The tasks on which LoRA r=1 was trained in a setting; for the usual one those of twice the steps."""
    endings = TWICE.endings if setting == USUAL else setting.endings
    return [task for task in LABELS if all(result.finals(task, YARDSTICK + each) for each in endings)]


def gain_in(
    result: Result, setting: Setting, arm: str, over: str = YARDSTICK, over_in: Setting | None = None
) -> Interval | None:
    """How many points an arm is above another in a setting, a mean over its tasks; None where runs are missing.

    Args:
        over_in: the setting of the other arm, where it is not the same.
    """
    tasks, ours, theirs = tasks_with(result, setting), _names(setting, arm), _names(over_in or setting, over)
    if not tasks or not all(result.finals(task, name) for task in tasks for name in (*ours, *theirs)):
        return None
    return result.mean_gain([(task, _best(result, task, ours), _best(result, task, theirs)) for task in tasks])


def changed_places(result: Result) -> list[str]:
    """Pairs of arms of which one is better with the usual steps and the other with twice as many, both for certain."""
    found = []
    for first, second in combinations(COMPARED, 2):
        usual, twice = (gain_in(result, setting, first, second) for setting in (USUAL, TWICE))
        if usual and twice and max(usual.low, twice.low) > 0 > min(usual.high, twice.high):
            found.append(f"{ARMS[first].label} and {ARMS[second].label}")
    return found


def lines(result: Result) -> list[str]:
    """The table of settings, and what twice the steps change."""
    settings = [setting for setting in SETTINGS if tasks_with(result, setting)]
    if not settings:
        return ["These runs are missing."]
    heads = [f"{each.label} ({names_of(tasks_with(result, each))})" for each in settings]
    rows = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    rows += [_row("frozen base, best head", [gain_in(result, each, "frozen") for each in settings])]
    rows += [
        _row(ARMS[arm].label, [gain_in(result, each, arm) for each in settings]) for arm in COMPARED if arm != YARDSTICK
    ]
    if TWICE in settings:
        changed = changed_places(result)
        said = f"change places: {'; '.join(changed)}" if changed else "no two methods change places for certain"
        rows += ["", f"Points above LoRA r=1 in the same setting. With twice the steps {said}."]
        equal = [
            f"{ARMS[arm].label} {difference(found, 1)}"
            for arm in SLOWER
            if (found := gain_in(result, USUAL, arm, over_in=TWICE)) is not None
        ]
        rows += ["", f"With half of the steps, 500 above LoRA r=1 with 1,000: {'; '.join(equal)}."]
    return rows


def _best(result: Result, task: str, names: Sequence[str]) -> str:
    best = result.lowest_loss(task, names)
    assert best is not None, names
    return best


def _names(setting: Setting, arm: str) -> tuple[str, ...]:
    return (setting.frozen,) if arm == "frozen" else tuple(arm + ending for ending in setting.endings)


def _row(label: str, gains: Sequence[Interval | None]) -> str:
    return f"| {label} | {' | '.join('' if each is None else difference(each, 1) for each in gains)} |"
