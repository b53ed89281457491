"""What is measured on which model: everything at hidden 1,024, less where a step takes longer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.speed import workloads
from benchmarks.speed.arms import BASE, FULL, HYPERADAPT, IA3, MAGNITUDE, MERGED, ROAD, Arm
from benchmarks.speed.workloads import Workload


def at_rank(rank: int) -> list[Arm]:
    """VeRA and DVoRA, which are compared rank by rank and so are timed next to one another."""
    return [Arm("dvora dense", rank), Arm("VeRA", rank)]


SMALL = [Arm("LoRA", 16), Arm("LoRA", 1), Arm("dvora dense", 64)]
OTHERS = [Arm("LoRA", 8), ROAD]
COMPARED = [BASE, FULL, *SMALL, *OTHERS, Arm("RandLoRA", 32), *at_rank(256), *at_rank(1024), Arm("DoRA", 16)]
"""The methods as they are used: LoRA and DoRA at small ranks, VeRA and DVoRA at large ones; LoRA r=1 is as small."""
FEW = [BASE, *SMALL, *at_rank(256), Arm("DoRA", 16)]
WIDE = [*FEW, *OTHERS]
WHOLE_MODEL = [*WIDE, MAGNITUDE, HYPERADAPT, IA3]
TINY = [BASE, Arm("LoRA", 1), Arm("DoRA", 4), *at_rank(16)]
"""For models of hidden size 64."""
DECODING = [*(arm for arm in COMPARED if arm != FULL), MERGED]
LEFT_OUT = (
    "hidden 2,048: seven methods, no bfloat16, no prompts and no decoding",
    "SmolLM2: seven methods, 128 tokens; MiniLM: twelve methods, 16 x 32 and 64 x 32 tokens",
    "bfloat16: the Llama block of hidden 1,024, 512 tokens of training",
    "GPUs: nothing here was run on one; `python -m benchmarks.speed --device cuda` would",
)
"""What the plan leaves out, for the result file."""

linears_1024 = partial(workloads.linears, 1024, 2816)
llama_1024 = partial(workloads.llama, 1024, 2816, heads=16)
linears_2048 = partial(workloads.linears, 2048, 5632)
llama_2048 = partial(workloads.llama, 2048, 5632, heads=32)
linears_64 = partial(workloads.linears, 64, 176)
llama_64 = partial(workloads.llama, 64, 176, heads=4)


@dataclass(frozen=True)
class Run:
    """Methods that are timed in turns.

    Args:
        part: "training", "prefill" or "decode".
        workload: makes the model's description.
        arms: the methods; the base comes first.
        dtype: of the base model.
        batch, tokens: size of the input; for decoding, what was read before the token is added.
        rounds: how often every method is timed.
    """

    part: str
    workload: Callable[[], Workload]
    arms: Sequence[Arm]
    dtype: str = "float32"
    batch: int = 1
    tokens: int = 512
    rounds: int = 9


WHOLE = (
    Run("training", linears_1024, COMPARED, tokens=128, rounds=15),
    Run("training", linears_1024, COMPARED, tokens=512, rounds=11),
    Run("training", linears_1024, COMPARED, tokens=2048, rounds=7),
    Run("training", linears_1024, COMPARED, tokens=4096, rounds=5),
    Run("training", llama_1024, COMPARED, rounds=11),
    Run("training", llama_1024, COMPARED, dtype="bfloat16"),
    Run("training", linears_2048, FEW, rounds=5),
    Run("training", llama_2048, FEW, rounds=5),
    Run("training", llama_2048, FEW, tokens=2048, rounds=3),
    Run("training", workloads.minilm, WHOLE_MODEL, batch=16, tokens=32, rounds=11),
    Run("training", workloads.minilm, WHOLE_MODEL, batch=64, tokens=32, rounds=7),
    Run("training", workloads.smollm2, FEW, tokens=128, rounds=5),
    Run("prefill", llama_1024, DECODING),
    Run("decode", llama_1024, DECODING, batch=1, tokens=1, rounds=15),
    Run("decode", llama_1024, DECODING, batch=16, tokens=1, rounds=15),
)
"""Every run of the committed result file."""
NARROW = [BASE, *SMALL, *OTHERS, *at_rank(16), Arm("DoRA", 16)]
"""For models of hidden size 64, beside small ranks of other methods."""
OVERHEAD = (
    Run("training", llama_1024, WIDE, tokens=512, rounds=1),
    Run("training", llama_1024, WIDE, tokens=8, rounds=1),
    Run("prefill", llama_1024, WIDE, tokens=1, rounds=1),
    Run("training", llama_64, NARROW, tokens=8, rounds=15),
    Run("prefill", llama_64, NARROW, tokens=1, rounds=15),
)
"""What a method adds to every layer: kernels, and on a model without weight the host's time to launch them."""
GROUPED = [BASE, Arm("LoRA", 1), Arm("dvora dense", 64), *(Arm("dvora 64 groups", rank) for rank in (16, 64))]
linears_384 = partial(workloads.linears, 384, 1536)
GROUPS = (
    *(
        Run("training", linears, GROUPED, dtype, tokens=tokens, rounds=9)
        for linears in (linears_384, linears_1024)
        for dtype in ("float32", "bfloat16")
        for tokens in (64, 512, 2048)
    ),
    Run("decode", llama_1024, GROUPED, batch=1, tokens=1, rounds=15),
    Run("decode", llama_1024, GROUPED, batch=16, tokens=1, rounds=15),
)
"""lambda_d by groups beside one for all: with --threads 1, in processor time."""
QUICK = (
    Run("training", linears_64, TINY, tokens=32, rounds=2),
    Run("training", llama_64, TINY, dtype="bfloat16", tokens=32, rounds=2),
    Run("prefill", llama_64, TINY, tokens=32, rounds=2),
    Run("decode", llama_64, [*TINY, MERGED._replace(rank=16)], batch=2, tokens=1, rounds=2),
)
"""The same kinds of run on tiny models: whether everything works, not how fast it is."""
