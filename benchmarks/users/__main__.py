"""The command: `python -m benchmarks.users` goes on where it was; `--help` says how to do less."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch

from benchmarks.environment import machine
from benchmarks.pictures import save
from benchmarks.quality.results import FOLDER, read_rows, write_rows
from benchmarks.quality.tuning import one_more
from benchmarks.users.sources import SOURCES
from benchmarks.users.tables import picture
from benchmarks.users.training import ARMS, LAYERS, base, run
from examples.top_layers import TopLayers

RESULT = FOLDER / "users.json"
USERS, TUNED_ON = 50, 12
"""Users, and how many of them choose the rates, on rows for development."""
EXAMPLES = (8, 32)
"""Rows of a user that are trained on."""
TUNING_SEED, SEEDS = 100, (0, 1, 2)
Rows = dict[str, dict[str, Any]]
"""By their keys."""


def main(arguments: list[str] | None = None) -> None:
    """Train an adapter for each user, with every method, rate and seed that has no row yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.users", description=main.__doc__)
    parser.add_argument("--hours", type=float, default=3.0, help="start no run after so many hours")
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--examples", nargs="+", type=int, default=list(EXAMPLES), help="rows of a user")
    parser.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    end, rows = perf_counter() + chosen.hours * 3600, read_rows(chosen.output)
    for source in chosen.source:
        users = SOURCES[source](USERS)
        development = {name: users.parts[name][:TUNED_ON] for name in ("train", "development")}
        tuned = TopLayers.of(development, LAYERS)
        for examples in chosen.examples:
            for arm in chosen.arm:
                while perf_counter() < end and (rate := next_rate(rows, source, arm, examples)) is not None:
                    keep(rows, _row(tuned, source, arm, rate, examples, TUNING_SEED, "development"), chosen.output)
        del tuned
        tested = TopLayers.of({name: users.parts[name] for name in ("train", "test")}, LAYERS)
        if _key(source, "base", 0, 0, 0, "test") not in rows:
            keep(rows, _base_row(tested, source), chosen.output)
        for seed in chosen.seed:
            for examples in chosen.examples:
                for arm in chosen.arm:
                    rate = best_rate(rows, source, arm, examples)
                    if rate is None or perf_counter() > end:
                        continue
                    if _key(source, arm, rate, examples, seed, "test") not in rows:
                        keep(rows, _row(tested, source, arm, rate, examples, seed, "test"), chosen.output)
    save("users", lambda: picture({"rows": list(rows.values())}))


def next_rate(rows: Rows, source: str, arm: str, examples: int) -> float | None:
    """A rate to try: three of the arm's, then one more, beyond the best at an edge, else beside it; None after that."""
    tried = trials(rows, source, arm, examples)
    if missing := [rate for rate in ARMS[arm].rates if rate not in tried]:
        return missing[0]
    if len(tried) > len(ARMS[arm].rates):
        return None
    return one_more(tried, 3**0.5)


def best_rate(rows: Rows, source: str, arm: str, examples: int) -> float | None:
    """The rate with the lowest mean loss on rows for development; None while rates are missing."""
    tried = trials(rows, source, arm, examples)
    return min(tried, key=tried.__getitem__) if len(tried) > len(ARMS[arm].rates) else None


def trials(rows: Rows, source: str, arm: str, examples: int) -> Mapping[float, float]:
    """Mean losses by rate."""
    wanted = (source, arm, examples, "development")
    found = (r for r in rows.values() if (r["source"], r["arm"], r["examples"], r["part"]) == wanted)
    return {row["rate"]: mean(row["losses"]) for row in found}


def keep(rows: Rows, row: dict[str, Any], file: Path) -> None:
    """Add a row with the machine and write the file."""
    rows[row["key"]] = row | {"machine": machine()}
    write_rows(list(rows.values()), file)
    print(f"{row['key']}: {mean(row['losses']):.4f} ({row['seconds']:.0f} s)", file=sys.stderr, flush=True)


def _row(top: TopLayers, source: str, arm: str, rate: float, examples: int, seed: int, part: str) -> dict[str, Any]:
    start = perf_counter()
    outcome = run(top, arm, rate, examples, seed, part)
    return {
        "key": _key(source, arm, rate, examples, seed, part),
        **{"source": source, "arm": arm, "rate": rate, "examples": examples, "seed": seed, "part": part},
        **outcome.sizes,
        "losses": [round(loss, 4) for loss in outcome.losses],
        "seconds": round(perf_counter() - start, 1),
    }


def _base_row(top: TopLayers, source: str) -> dict[str, Any]:
    losses = [round(loss, 4) for loss in base(top, "test")]
    return {
        "key": _key(source, "base", 0, 0, 0, "test"),
        **{"source": source, "arm": "base", "rate": 0, "examples": 0, "seed": 0, "part": "test"},
        **{"losses": losses, "seconds": 0},
    }


def _key(source: str, arm: str, rate: float, examples: int, seed: int, part: str) -> str:
    return f"{source} {arm} {part} examples {examples} seed {seed} rate {rate:.3g}"


if __name__ == "__main__":
    main()
