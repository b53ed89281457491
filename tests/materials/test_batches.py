"""Every sentence is in one batch, whole, whatever the order."""

import numpy as np
import torch

from materials.batches import BATCHES_PER_POOL, Sentences, batches_by_length, random_batches

LENGTHS = [int(length) for length in np.random.default_rng(0).integers(1, 50, 700)]


def test_every_row_is_in_one_batch() -> None:
    by_length, at_random = batches_by_length(LENGTHS, 32), random_batches(LENGTHS, 32, np.random.default_rng(1))
    for batches in (by_length, at_random):
        assert sorted(np.concatenate(batches)) == list(range(700))
        assert max(len(batch) for batch in batches) == 32
    lengths = [LENGTHS[row] for batch in by_length for row in batch]
    assert lengths == sorted(lengths)


def test_random_batches_waste_little_on_padding() -> None:
    batches = random_batches(LENGTHS, 700 // BATCHES_PER_POOL, np.random.default_rng(1))
    padded = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)


def test_a_batch_is_padded_and_masked() -> None:
    sentences = Sentences(([5, 6, 7], [8], [9, 9]), torch.tensor([0, 1, 0]), padding=1)
    ids, mask = sentences.batch(np.array([1, 0]))
    assert ids.tolist() == [[8, 1, 1], [5, 6, 7]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
