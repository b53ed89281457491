"""The same matrices in every process, on every processor and after every move; held once; nothing global touched."""

import copy
import hashlib
import io
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import dvora
from dvora import DVoRAAdapter, SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS
from tests.cases import linear, randn, train

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)

DIGESTS = """
import hashlib
from dvora import SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS
for distribution in DISTRIBUTIONS:
    shared = SharedProjections(11, distribution)
    for matrix in (shared.A(40, 700), shared.B(40, 300)):
        print(hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest())
"""


def digests_here() -> list[str]:
    sources = [SharedProjections(11, distribution) for distribution in DISTRIBUTIONS]
    matrices = [matrix for shared in sources for matrix in (shared.A(40, 700), shared.B(40, 300))]
    return [hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest() for matrix in matrices]


def plain_processor(threads: int) -> dict[str, str]:
    """An environment in which torch and NumPy use none of the processor's extensions."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    variables = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **variables, "NPY_DISABLE_CPU_FEATURES": " ".join(found)}


def test_another_processor_and_thread_count_make_the_same_bits() -> None:
    command = [sys.executable, "-c", DIGESTS]
    threads = 1 if torch.get_num_threads() > 1 else 2
    done = subprocess.run(command, env=plain_processor(threads), capture_output=True, text=True, check=True)
    assert done.stdout.split() == digests_here()


def test_global_generators_are_untouched_by_making_and_training_layers() -> None:
    base = linear(6, 5)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for distribution in DISTRIBUTIONS:
        layer = DVoRAAdapter(base, 3, shared=SharedProjections(4, distribution))
        layer(randn(2, 6, seed=0)).sum().backward()
        layer.update_parameters(0.1)
        layer.merge_to_original_layer()
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    np.testing.assert_equal(before[1], after[1])
    assert before[2] == after[2]


def made(shared: SharedProjections) -> list[torch.Tensor]:
    return [shared.A(3, 6), shared.B(3, 5), shared.impl.gram(3, 6, torch.float32)]


def assert_same(shared: SharedProjections, other: SharedProjections) -> None:
    for matrix, expected in zip(made(shared), made(other), strict=True):
        assert torch.equal(matrix, expected)


@every_distribution
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda shared: shared.half(), id="half"),
        pytest.param(lambda shared: shared.double(), id="double"),
        pytest.param(lambda shared: shared.to(torch.bfloat16), id="to bfloat16"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda shared: pickle.loads(pickle.dumps(shared)), id="pickle"),
        pytest.param(lambda shared: shared.to("meta").to_empty(device="cpu"), id="meta and to_empty"),
    ],
)
def test_matrices_survive(change, distribution: str) -> None:
    shared = SharedProjections(2, distribution)
    made(shared)
    assert_same(change(shared), SharedProjections(2, distribution))


@every_distribution
def test_matrices_on_the_meta_device_hold_no_memory(distribution: str) -> None:
    shared = SharedProjections(0, distribution)
    made(shared)
    assert list(shared.buffers())
    assert all(buffer.is_meta for buffer in shared.to("meta").buffers())


@every_distribution
def test_a_whole_model_survives_the_meta_device(distribution: str) -> None:
    shared = SharedProjections(2, distribution)
    model = nn.Sequential(train(DVoRAAdapter(linear(6, 5), 3, shared=shared)), nn.ReLU())
    x = randn(4, 6, seed=0)
    expected, values = model(x), model.state_dict()
    model = model.to("meta").to_empty(device="cpu")
    model.load_state_dict(values)
    assert torch.equal(model(x), expected)


@every_distribution
def test_matrices_are_no_part_of_the_state_dict_and_no_parameters(distribution: str) -> None:
    shared = SharedProjections(0, distribution)
    made(shared)
    assert shared.state_dict() == {}
    assert list(shared.parameters()) == []
    assert not any(buffer.requires_grad for buffer in shared.buffers())


def twelve_layers(shared: SharedProjections) -> nn.ModuleList:
    sizes = [(64, 64), (64, 256), (256, 64)] * 4
    return nn.ModuleList(DVoRAAdapter(linear(*size), 8, shared=shared) for size in sizes)


def storages(model: nn.Module, start: str = "") -> set[int]:
    """Distinct memory blocks behind all buffers of the projections whose names start with `start`."""
    buffers = model.named_buffers(remove_duplicate=False)
    found = {name: buffer for name, buffer in buffers if ".dvora_projections." in name}
    return {t.untyped_storage().data_ptr() for name, t in found.items() if name.rpartition(".")[2].startswith(start)}


def test_a_model_of_twelve_layers_holds_each_dense_matrix_once() -> None:
    model = twelve_layers(SharedProjections())
    assert len(storages(model, "stream_0")) == len(storages(model, "stream_1")) == 1
    assert len(storages(model, "gram")) == 2, "one small G for each width"
    assert len(storages(model, "scaled_0")) == len(storages(model, "scaled_1")) == 2, "and each scaled for each width"
    assert len(storages(model)) == 8


@every_distribution
def test_a_moved_or_copied_model_still_holds_each_matrix_once(distribution: str) -> None:
    model = twelve_layers(SharedProjections(0, distribution))
    for changed in (model, model.double(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(storages(changed)) == len(list(changed[0].shared.buffers())) > 0
        assert len({id(layer.shared) for layer in changed}) == 1


@every_distribution
def test_a_saved_model_does_not_repeat_the_matrices(distribution: str) -> None:
    model = twelve_layers(SharedProjections(0, distribution))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    base_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    assert len(file.getvalue()) < 1.1 * base_bytes
    assert {key.rpartition(".")[2] for key in model.state_dict()} == {
        "weight",
        "bias",
        "magnitude",
        "lambda_b",
        "lambda_d",
    }


@every_distribution
def test_inference_mode_leaves_matrices_that_can_be_trained_through(distribution: str) -> None:
    with torch.inference_mode():
        shared = SharedProjections(0, distribution)
        shared.reserve(3, 6, 5)
    layer = dvora.DVoRAAdapter(linear(6, 5), 3, shared=shared)
    layer(randn(2, 6, seed=0)).sum().backward()
    assert layer.lambda_b.grad.isfinite().all()
