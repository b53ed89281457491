"""Train, validation and test rows: drawn by a seed, what is the same in one part, and classes in the same shares.

Finished runs draw their held-out rows again, so the same rows and seed have to give the same parts in every version.
scikit-learn's `StratifiedGroupKFold` has shares of one k-th only, refuses small data, and is slow with many groups.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Indices of the rows of each part, ascending; every row is in one."""

    train: list[int]
    validation: list[int]
    test: list[int]


def same_text(text: str) -> str:
    """The same for texts that differ in case or spacing only."""
    return " ".join(text.split()).casefold()


def split_rows(
    keys: Sequence[Hashable], classes: Sequence[int], validation_share: float, test_share: float, seed: int
) -> Split:
    """Split rows by a seed.

    Args:
        keys: rows with the same key stay together.
        classes: of each row; all the same where there are none. A key has the class of its first row.
        validation_share, test_share: of the keys, as nearly as whole keys of every class allow. The last key of a class
            is never held out.
        seed: of the split.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    groups_of: dict[int, list[list[int]]] = {}
    for rows in rows_of.values():
        groups_of.setdefault(classes[rows[0]], []).append(rows)
    generator = np.random.default_rng(seed)
    split = Split([], [], [])
    owed = {"test": 0.0, "validation": 0.0}
    for name in sorted(groups_of):
        groups = [groups_of[name][place] for place in generator.permutation(len(groups_of[name]))]
        for part, share in (("test", test_share), ("validation", validation_share)):
            # What rounding takes from one class the next one gives.
            owed[part] += share * len(groups_of[name])
            taken = min(int(owed[part] + 1e-9), len(groups) - 1)
            owed[part] -= taken
            getattr(split, part).extend(row for group in groups[:taken] for row in group)
            groups = groups[taken:]
        split.train.extend(row for group in groups for row in group)
    return Split(*map(sorted, split))
