"""The matrices of PEFT's VeRA as a kind of projections: its values, cut to layers, and nothing larger."""

import pytest
import torch
from peft.tuners.vera.model import _kaiming_init

from dvora.matrices.interface import SharedProjections
from dvora.matrices.vera import VeraSizes, vera_sizes

SIZES = VeraSizes(rank=6, in_features=40, out_features=33)


def shared(seed: int = 3) -> SharedProjections:
    return SharedProjections(seed, SIZES.distribution)


def test_the_name_tells_the_sizes() -> None:
    assert SIZES.distribution == "peft_vera(r=6, in=40, out=33)"
    assert vera_sizes(SIZES.distribution) == SIZES
    assert vera_sizes("kaiming_uniform") is None


@pytest.mark.parametrize("seed", [0, 3, 2**63])
def test_the_values_are_those_that_peft_draws(seed: int) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    A, B = _kaiming_init((6, 40), generator), _kaiming_init((33, 6), generator)
    assert torch.equal(shared(seed).A(6, 40), A)
    assert torch.equal(shared(seed).B(6, 33), B)
    assert torch.equal(shared(seed).A(6, 11), A[:, :11])
    assert torch.equal(shared(seed).B(6, 12), B[:12])


def test_the_fingerprint_is_of_all_values_and_sizes() -> None:
    prints = {shared(seed).fingerprint() for seed in range(4)}
    others = {SharedProjections(3, SIZES._replace(in_features=size).distribution).fingerprint() for size in (39, 41)}
    assert len(prints | others) == 6
    assert shared().fingerprint() == shared().fingerprint()


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(7, 40, 33), (6, 41, 33), (6, 40, 34)])
def test_nothing_larger_is_made_up(rank: int, inputs: int, outputs: int) -> None:
    with pytest.raises(ValueError, match="has matrices of rank 6 for at most"):
        shared().reserve(rank, inputs, outputs)


def test_a_file_holds_the_matrices_as_they_were_drawn() -> None:
    projections = shared()
    projections.reserve(4, 20, 25)
    saved = projections.saved_tensors()
    assert torch.equal(saved["stream_0"], projections.A(6, 40))
    assert torch.equal(saved["stream_1"], projections.B(6, 33).T)
    projections.check_saved_tensors(saved)
    for name, matrix in saved.items():
        for damaged in (matrix[:, 1:], matrix + 1e-6, matrix.T):
            with pytest.raises(ValueError, match=f"matrix {name} differs"):
                projections.check_saved_tensors({name: damaged})
