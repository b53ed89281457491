"""The host tier: rows by digest, at most so many bytes, the least recently used out first."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvora.bank.factors import Factors
from dvora.bank.host import HostTier
from tests.bank.versions import in_threads


def rows(size: int) -> Factors:
    """Of so many times eight bytes."""
    return Factors(torch.zeros(size), torch.zeros(size))


def test_bytes_are_those_of_both_rows() -> None:
    tier = HostTier(100)
    tier.put("a", Factors(torch.zeros(3, dtype=torch.float16), torch.zeros(2)))
    assert tier.nbytes == 14
    tier.remove("a")
    tier.remove("a")
    assert (tier.nbytes, len(tier)) == (0, 0)
    assert tier.get("a") is None


def test_the_least_recently_used_leaves_first() -> None:
    tier = HostTier(8 * 2)
    for digest in "ab":
        tier.put(digest, rows(1))
    tier.get("a")
    tier.put("c", rows(1))
    assert [digest in tier for digest in "abc"] == [True, False, True]


@given(
    limit=st.integers(1, 6),
    steps=st.lists(st.tuples(st.sampled_from(["put", "get", "remove"]), st.sampled_from("abcde")), max_size=50),
)
def test_any_history_is_that_of_a_plain_list(limit: int, steps: list[tuple[str, str]]) -> None:
    sizes = dict(zip("abcde", (1, 1, 2, 1, 3), strict=True))
    tier, known = HostTier(8 * max(limit, 3)), OrderedDict[str, Factors]()
    for step, digest in steps:
        if step == "put" and digest not in known:
            while known and 8 * sum(sizes[each] for each in [*known, digest]) > tier.limit:
                known.popitem(last=False)
            known[digest] = rows(sizes[digest])
            tier.put(digest, known[digest])
        elif step == "get":
            assert tier.get(digest) is known.get(digest)
            if digest in known:
                known.move_to_end(digest)
        elif step == "remove":
            known.pop(digest, None)
            tier.remove(digest)
        assert [each in tier for each in "abcde"] == [each in known for each in "abcde"]
        assert len(tier) == len(known)
        assert tier.nbytes == 8 * sum(sizes[each] for each in known) <= tier.limit


def test_what_is_there_already_is_kept() -> None:
    tier = HostTier(100)
    tier.put("a", first := rows(1))
    tier.put("a", rows(1))
    assert tier.get("a") is first
    assert tier.nbytes == 8


@pytest.mark.usefixtures("hasty_threads")
def test_bytes_are_counted_right_under_threads() -> None:
    tier = HostTier(8 * 7)

    def use(start: int) -> None:
        for number in range(300):
            digest = str((start + number * 7) % 11)
            tier.put(digest, rows(1))
            tier.get(str(number % 11))
            if number % 3 == 0:
                tier.remove(digest)

    in_threads(*(lambda start=start: use(start) for start in range(3)))
    assert tier.nbytes == 8 * len(tier) <= tier.limit
