"""Resources of every compiled kernel: registers, spills and shared memory on sm_90, without a GPU.

Run from the repository's root: python -m benchmarks.compiled_kernels [--print]
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.environment import environment
from dvora.ops.triton import combine as triton_combine
from dvora.ops.triton import kronecker as triton_kronecker

RESULT = Path(__file__).parent / "results" / "compiled_kernels.json"
TARGET = GPUTarget("cuda", 90, 32)
TOKENS = 8192
HALF = torch.bfloat16
_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}


class Case(NamedTuple):
    """A kernel, the sizes and dtype of its tensors, and the arguments that a call with them passes."""

    kernel: Any
    sizes: str
    dtype: torch.dtype
    arguments: dict[str, str]
    """Types of the arguments that are known at run time only."""
    constants: dict[str, Any]
    options: dict[str, int]


def combine_cases(T: int, out: int, dtype: torch.dtype = HALF) -> Iterator[Case]:
    """Forward and backward, with and without a bias, with and without a low-rank product."""
    vector = "*fp64" if dtype == torch.float64 else "*fp32"
    rows, columns = triton_combine.tile_of(T, out, dtype)
    constants = {"WIDE": triton_combine.wide(dtype), "ROWS": rows, "COLUMNS": columns}
    for kernel, optional in (
        (triton_combine._combine_kernel, ("bias_ptr",)),
        (triton_combine._combine_backward_kernel, ("bias_ptr", "low_rank_ptr")),
    ):
        for missing in ((), *((name,) for name in optional)):
            types = {
                name: vector if name in ("gain_ptr", "scale_ptr", "partial_ptr") else _POINTER[dtype]
                for name in kernel.arg_names
                if name.endswith("_ptr") and name not in missing
            }
            numbers = {name: "i32" for name in kernel.arg_names if not name.endswith("_ptr") and name not in constants}
            sizes = f"{T} x {out}" + "".join(f", no {name.removesuffix('_ptr')}" for name in missing)
            yield Case(
                kernel,
                sizes,
                dtype,
                types | numbers,
                constants | dict.fromkeys(missing),
                {"num_warps": triton_combine.WARPS},
            )


def kronecker_case(T: int, left: tuple[int, int], right: tuple[int, int], dtype: torch.dtype = HALF) -> Case:
    """The product with both scales, all factors and scales in float32."""
    blocks = triton_kronecker.blocks_of(T, left, right, dtype)
    (r1, n1), (r2, n2) = left, right
    constants = {"N1": n1, "N2": n2, "R1": r1, "R2": r2, "TOKENS": blocks.tokens, "BLOCK_N1": blocks.n1}
    constants |= {"BLOCK_N2": blocks.n2, "BLOCK_R1": blocks.r1, "BLOCK_R2": blocks.r2}
    constants["PRECISION"] = triton_kronecker.precision_of(dtype)
    types = dict.fromkeys(("left_ptr", "right_ptr", "in_scale_ptr", "out_scale_ptr"), "*fp32")
    types |= {"x_ptr": _POINTER[dtype], "y_ptr": _POINTER[dtype], "T": "i32", "x_stride": "i32"}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    sizes = f"{T} x ({n1} * {n2}) -> ({r1} * {r2})"
    return Case(triton_kronecker._kronecker_kernel, sizes, dtype, types, constants, options)


def cases() -> Iterator[Case]:
    """Sizes of common models, and one of each rarer dtype."""
    for out_features in (576, 4096, 14336):
        yield from combine_cases(TOKENS, out_features)
    yield from combine_cases(1, 4096)
    for dtype in (torch.float16, torch.float32, torch.float64):
        yield from combine_cases(TOKENS, 4096, dtype)
    for dtype, ranks in ((HALF, ((16, 16), (32, 32))), (torch.float16, ((16, 16),)), (torch.float32, ((16, 16),))):
        for n1, n2 in ((24, 24), (44, 64), (64, 64), (112, 128)):
            for r1, r2 in ranks:
                yield kronecker_case(TOKENS, (r1, n1), (r2, n2), dtype)
                yield kronecker_case(TOKENS, (n1, r1), (n2, r2), dtype)
    yield kronecker_case(1, (16, 64), (16, 64))
    yield kronecker_case(1, (64, 16), (64, 16))


def compiled(case: Case) -> Any:
    """The compiled kernel of triton, for pointers and sizes divisible by 16 as in these cases."""
    names = case.kernel.arg_names
    signature = {name: case.arguments.get(name, "constexpr") for name in names}
    # A size of one would be specialised as a constant; all other sizes are multiples of 16.
    aligned = [i for i, name in enumerate(names) if name in case.arguments and name not in ("T", "chunk", "chunks")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    # Contraction into fused multiply-adds is named, as at the launch: its default differs between releases.
    source = ASTSource(case.kernel, signature, case.constants, attributes)
    return triton.compile(source, target=TARGET, options=case.options | {"enable_fp_fusion": True})


def resources(case: Case) -> dict[str, object]:
    """One row of the table: what a program of the kernel takes."""
    kernel = compiled(case)
    usage = _resource_usage(kernel.asm["cubin"])
    return {
        "kernel": case.kernel.__name__.strip("_").removesuffix("_kernel"),
        "sizes": case.sizes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "warps": case.options["num_warps"],
        "registers": usage["REG"],
        # Registers that do not fit live on the stack, in memory.
        "spilled bytes": usage["STACK"] + usage["LOCAL"],
        "shared bytes": kernel.metadata.shared,
        "tensor cores": tensor_core_instructions(kernel.asm["ptx"]),
    }


def tensor_core_instructions(ptx: str) -> list[str]:
    """The kinds of matrix instructions of a program."""
    return sorted(set(re.findall(r"\b(?:wgmma|mma)\.[\w.]*\.(?:tf32|bf16|f16)\b", ptx)))


def _resource_usage(binary: bytes) -> dict[str, int]:
    """What the compiled program itself declares, in registers a thread and bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}


def main() -> None:
    """Compile everything, print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="leave the result file alone")
    print_only = parser.parse_args().print
    rows = []
    for case in cases():
        rows.append(resources(case))
        print(*rows[-1].values(), sep="  ", flush=True)
    head = environment() | {"triton": triton.__version__, "target": f"sm_{TARGET.arch}"}
    if not print_only:
        RESULT.write_text(json.dumps({"environment": head, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
