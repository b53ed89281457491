"""Which batch a thread is in, and which adapter each of its rows has."""

import pytest
import torch

from dvora.bank.rows import CurrentRows, RowIndex, SlotRows, check_names
from tests.bank.versions import in_threads


def test_rows_are_repeated_one_after_another_and_an_encoder_s_are_not() -> None:
    index = RowIndex(torch.tensor([4, 2, 9]), 2)
    assert index.for_batch(6, "layer").tolist() == [4, 4, 2, 2, 9, 9]
    assert index.for_batch(3, "layer").tolist() == [4, 2, 9]
    for rows in (1, 2, 4, 5, 7, 12):
        with pytest.raises(ValueError, match=f"layer: bank.rows got 3 names, each repeated 2 times, .* {rows} rows"):
            index.for_batch(rows, "layer")
    plain = RowIndex(torch.tensor([4, 2, 9]), 1)
    assert plain.repeated is plain.index
    with pytest.raises(ValueError, match=r"bank\.rows got 3 names, and the layer a batch of 6 rows"):
        plain.for_batch(6, "layer")


def test_a_thread_is_in_its_own_batch_and_in_one_only() -> None:
    current = CurrentRows()
    one, other = (SlotRows(RowIndex(torch.tensor([0]), 1), torch.zeros(1, 3), torch.zeros(1, 0), ()) for _ in range(2))
    with pytest.raises(ValueError, match=r"called outside of bank\.rows"):
        current.known()
    with current.entered(one):
        assert current.known() is one
        with pytest.raises(ValueError, match="in a batch of the bank already"), current.entered(other):
            raise AssertionError

        def elsewhere() -> bool:
            assert current.rows is None
            with current.entered(other):
                return current.known() is other

        assert in_threads(elsewhere) == [True]
        assert current.known() is one
    assert current.rows is None


def test_a_batch_ends_with_an_error() -> None:
    current = CurrentRows()
    rows = SlotRows(RowIndex(torch.tensor([0]), 1), torch.zeros(1, 3), torch.zeros(1, 0), ())
    with pytest.raises(KeyboardInterrupt), current.entered(rows):
        raise KeyboardInterrupt
    assert current.rows is None


def test_names_may_be_any_sequence() -> None:
    check_names(["a", None], 1)
    check_names(("a",), 3)
    with pytest.raises(TypeError, match="names must be a list with one name a row"):
        check_names(iter(["a"]), 1)
