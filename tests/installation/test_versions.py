"""The requirements at their lowest versions."""

from installation.environments import ROOT
from installation.versions import TESTS, lower_bounds

METADATA = """Metadata-Version: 2.4
Name: dvora
Requires-Dist: torch>=2.8
Provides-Extra: peft
Requires-Dist: transformers>=4.50; extra == 'peft'
Provides-Extra: cli
Requires-Dist: rich>=13.8; extra == 'cli'
Requires-Dist: transformers>=4.50; extra == 'cli'
Requires-Dist: transformers>=5.0; extra == 'cli'
"""


def test_the_highest_of_several_bounds_counts() -> None:
    assert lower_bounds(METADATA, "cli") == ["rich==13.8", "torch==2.8", "transformers==5.0"]


def test_the_tests_that_it_runs_are_there() -> None:
    assert not [path for path in TESTS if not (ROOT / path).exists()]
