"""Run histories by hand: `--seed 3` or `--seeds 0 100`, `--without OPERATION`, `--steps an_operation:1,another:2`."""

import argparse
from collections import Counter

import torch

from tests.histories.machine import History, Step, shown

torch.set_num_threads(1)


def main() -> None:
    """Run, shorten what fails, and show it."""
    parser = argparse.ArgumentParser(prog="python -m tests.histories", description=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 100))
    parser.add_argument("--steps", help="operation:seed,... instead of those of the seed")
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("--short", action="store_true", help="one line for each failure")
    arguments = parser.parse_args()
    first, last = arguments.seeds if arguments.seed is None else (arguments.seed, arguments.seed + 1)
    kinds: Counter[str] = Counter()
    operations = 0
    for seed in range(first, last):
        history = History.drawn(seed, frozenset(arguments.without))
        if arguments.steps is not None:
            steps = [] if arguments.steps == "none" else arguments.steps.split(",")
            history = history._replace(steps=tuple(Step(s.split(":")[0], int(s.split(":")[1])) for s in steps))
        done, failure = history.run()
        operations += done
        if failure is None:
            continue
        kinds[failure.kind] += 1
        if kinds[failure.kind] > 1 and arguments.short:
            continue
        history, failure = history.shortened(failure)
        print(f"{failure.kind}\n    {failure.error}\n    {history}" if arguments.short else shown(history, failure))
    print(f"{last - first} histories, {operations} operations, {kinds.total()} failures")
    for kind, count in kinds.most_common():
        print(f"{count:5} {kind}")


main()
