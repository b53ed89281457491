"""Computing as a run did: its precision, no gradients, on a device that is there."""

import pytest
import torch

from dvora.recipes.models.bases import computing, device_of
from dvora.recipes.settings import Settings


def settings(mixed_precision: str) -> Settings:
    given = {"task": "regression", "model": "m", "data": "d.csv", "cpu": True, "mixed_precision": mixed_precision}
    return Settings.model_validate(given)


# A run in float16 comes from a GPU; a CPU goes on in the precision of the weights.
@pytest.mark.parametrize(
    ("mixed_precision", "expected"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float32)]
)
def test_precision_and_no_gradients(mixed_precision: str, expected: torch.dtype) -> None:
    layer = torch.nn.Linear(3, 2)
    with computing(settings(mixed_precision)):
        output = layer(torch.ones(1, 3))
    assert output.dtype == expected
    assert not output.requires_grad
    assert layer(torch.ones(1, 3)).requires_grad


def test_a_run_that_keeps_to_the_cpu_computes_there() -> None:
    assert device_of(settings("no")).type == "cpu"
    torch.ones(1, device=device_of(settings("no").model_copy(update={"cpu": False})))
