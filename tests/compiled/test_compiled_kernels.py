"""Every kernel compiles for a GPU of today and keeps its values in registers; no GPU is needed for that."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled")

from benchmarks import compiled_kernels as report  # noqa: E402  it imports triton

CASES = [
    *report.combine_cases(8192, 4096),
    *report.combine_cases(1, 4096),
    report.kronecker_case(8192, (16, 64), (16, 64)),
    report.kronecker_case(8192, (64, 32), (64, 32)),
    report.kronecker_case(8192, (32, 44), (32, 64)),
    report.kronecker_case(8192, (112, 16), (128, 16)),
    report.kronecker_case(8192, (256, 256), (32, 256)),
    report.kronecker_case(8192, (16, 64), (16, 64), torch.float32),
]
SHARED_MEMORY = 99 * 1024
"""The least that a program may have on GPUs since compute capability 8.0."""


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel.__name__} {case.sizes} {case.dtype}")
def test_kernels_compile_without_spills(case: report.Case) -> None:
    row = report.resources(case)
    assert row["spilled bytes"] == 0
    assert row["shared bytes"] <= SHARED_MEMORY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_in_half_precision_use_tensor_cores_on_rounded_operands(dtype: torch.dtype) -> None:
    ptx = report.compiled(report.kronecker_case(8192, (16, 64), (16, 64), dtype)).asm["ptx"]
    half = dtype == torch.bfloat16
    assert bool(report.tensor_core_instructions(ptx)) == half
    # The mask of the bits that TF32 keeps; the interpreter, whose products are exact, would not miss it.
    assert (f"{-0x2000};" in ptx) == half


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[8]], ids=lambda case: case.kernel.__name__)
def test_results_are_rounded_to_nearest(case: report.Case) -> None:
    conversions = set(re.findall(r"cvt\.(r\w)\S*\.bf16(?:x2)?\.f32", report.compiled(case).asm["ptx"]))
    assert conversions == {"rn"}


def test_the_interpreter_stays_in_its_process() -> None:
    assert isinstance(report.triton_combine._combine_kernel, triton.runtime.JITFunction)


def test_dvora_is_imported_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import dvora, dvora.weight.linear"
    subprocess.run([sys.executable, "-c", program], check=True)
