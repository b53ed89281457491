"""The demo's statistics against known values."""

import pytest

from demo.statistics import sign_test, wilson


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [
        # R's prop.test(correct, count, correct = FALSE).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_agrees_with_published_intervals(correct: int, count: int, low: float, high: float) -> None:
    assert wilson(correct, count) == pytest.approx((low, high), abs=5e-5)


def test_sign_test() -> None:
    assert sign_test(0, 0) == sign_test(5, 5) == 1.0
    assert sign_test(10, 0) == 2 / 2**10
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
