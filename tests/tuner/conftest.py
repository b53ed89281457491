"""Settings of the tests of the PEFT method."""

import pytest

# PEFT 0.21 asks transformers 5 for a flag by its old name, in every `get_peft_model`; only PEFT can change that.
_PEFT_ASKS_BY_THE_OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tuner" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings(_PEFT_ASKS_BY_THE_OLD_NAME))
