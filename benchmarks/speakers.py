"""An adapter for each speaker beside one for all: `examples/speakers.py` at its full length, its table and picture.

Run from the repository's root: python -m benchmarks.speakers SEED ...
"""

import argparse
import time
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.pictures import FAINT, METHODS, WIDTH
from benchmarks.quality.statistics import Interval, over_seeds
from benchmarks.results import file_of, load, write
from examples.speakers import ALL, BASE, BOTH, EACH, FULL, run

ARMS = (BASE, ALL, EACH, BOTH)
COLOURS = {BASE: FAINT, EACH: METHODS["DVoRA"], BOTH: METHODS["DVoRA, r=64"]}
Result = dict[str, Any]
"""`environment`, `setting`, `tuning`, `processor_seconds` by seed, and `rows`: the losses of a speaker by arm."""


def measure(seed: int, earlier: Result) -> Result:
    """Train and judge every arm with a seed; the rows of other seeds stay."""
    start = time.process_time()
    speakers, (losses,) = run(FULL, [seed])
    seconds = round(time.process_time() - start)
    rows = [row for row in earlier.get("rows", ()) if row["seed"] != seed]
    for place, speaker in enumerate(speakers):
        rows.append({"seed": seed, "speaker": speaker, **{arm: round(losses[arm][place], 4) for arm in ARMS}})
    known = {**earlier.get("processor_seconds", {}), str(seed): seconds}
    return {**earlier, "setting": FULL._asdict(), "processor_seconds": known, "rows": rows}


def differences(result: Result, arm: str) -> dict[str, float]:
    """By speaker, how much lower the loss of an arm is than that of one adapter for all, over seeds."""
    speakers = dict.fromkeys(row["speaker"] for row in result["rows"])
    return {
        speaker: mean(row[ALL] - row[arm] for row in result["rows"] if row["speaker"] == speaker)
        for speaker in speakers
    }


def table(result: Result) -> str:
    """The arms and what they are beside one adapter for all."""
    rows, setting = result["rows"], result["setting"]
    speakers, seeds = dict.fromkeys(row["speaker"] for row in rows), dict.fromkeys(row["seed"] for row in rows)
    minutes = mean(result["processor_seconds"].values()) / 60
    lines = []
    for arm in ARMS:
        losses = [mean(row[arm] for row in rows if row["speaker"] == speaker) for speaker in speakers]
        against = list(differences(result, arm).values())
        better = f"{sum(difference > 0 for difference in against)} of {len(against)}"
        lines.append((arm, _interval(losses), *(("", "") if arm == ALL else (_interval(against, "+"), better))))
    return tables.text(
        f"{len(speakers)} speakers (95 % intervals over them), {setting['steps']} steps of {setting['batch']} rows for "
        f"every arm, {len(seeds)} {'seeds' if len(seeds) > 1 else 'seed'}, {minutes:.0f} minutes of a core a seed "
        f"(`benchmarks/results/speakers.json`; torch {result['environment']['torch']}, CPU):",
        tables.table(("adapter", "loss a token, held-out scenes", "lower than one for all by", "better for"), lines),
    )


def picture(result: Result) -> Figure:
    """What every speaker gains over one adapter for all."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    for arm, colour in COLOURS.items():
        if arm != BASE:
            gains = sorted(differences(result, arm).values())
            axes.plot(range(1, len(gains) + 1), gains, "o", markersize=4, color=colour, label=arm)
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.set(xlabel="speakers, in the order of what they gain", ylabel="loss a token lower than\nwith one for all")
    axes.legend()
    return figure


def _interval(values: list[float], sign: str = "") -> str:
    found: Interval = over_seeds(np.array(values))
    return f"{found.mean:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speakers")
    parser.add_argument("seeds", nargs="+", type=int, metavar="SEED")
    torch.set_num_threads(1)
    result = load("speakers")
    for seed in parser.parse_args().seeds:
        result = measure(seed, result)
    write(file_of("speakers"), **{name: value for name, value in result.items() if name != "environment"})


if __name__ == "__main__":
    main()
