"""What is measured on which model: everything at hidden 1,024, less where a step takes longer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.speed import workloads
from benchmarks.speed.arms import BASE, FULL, MAGNITUDE, MERGED, RANDLORA_RANK, Arm
from benchmarks.speed.workloads import Workload

RANKS = (16, 64, 256, 1024)
TOKENS = (128, 512, 2048, 4096)


def at_rank(rank: int) -> list[Arm]:
    """VeRA and both kinds of DVoRA, which are compared rank by rank and so are timed next to one another."""
    return [Arm("dvora dense", rank), Arm("VeRA", rank), Arm("dvora structured", rank)]


STRUCTURED_64 = Arm("dvora structured", 64)
COMPARED = [
    *(BASE, FULL, Arm("LoRA", 16), Arm("LoRA", 1), STRUCTURED_64, Arm("RandLoRA", RANDLORA_RANK)),
    *(*at_rank(256), *at_rank(1024), Arm("DoRA", 16)),
]
"""The methods as they are used: LoRA and DoRA at small ranks, VeRA and DVoRA at large ones; LoRA r=1 is as small."""
SWEPT = [*COMPARED, *at_rank(16), *at_rank(64)[:2], *(Arm("LoRA", rank) for rank in RANKS[1:])]
"""The same with every rank that all methods have."""
FEW = [BASE, Arm("LoRA", 16), Arm("LoRA", 1), STRUCTURED_64, *at_rank(256), Arm("DoRA", 16)]
TINY = [BASE, Arm("LoRA", 1), Arm("DoRA", 4), *at_rank(16)]
"""For models of hidden size 64."""
DECODING = [arm for arm in COMPARED if arm != FULL]


LEFT_OUT = (
    "hidden 2,048: only eight methods, no bfloat16, no prompts and no decoding",
    "a Llama block: 512 tokens, at hidden 2,048 also 2,048",
    "SmolLM2: only eight methods, 128 tokens; MiniLM: only ten methods, 16 x 32 and 64 x 32 tokens",
    "rank 16, and rank 64 but for structured matrices: only the linear layers of hidden 1,024 at 512 tokens",
    "bfloat16: only on the Llama block of hidden 1,024, 512 tokens of training",
    "CUDA: never run; benchmarks/speed/cuda.py is ready for it",
)
"""Combinations that the plan leaves out, for the result file."""


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


def linears_1024() -> Workload:
    return workloads.linears(1024, 2816)


def llama_1024() -> Workload:
    return workloads.llama(1024, 2816, heads=16)


def linears_2048() -> Workload:
    return workloads.linears(2048, 5632)


def llama_2048() -> Workload:
    return workloads.llama(2048, 5632, heads=32)


def linears_64() -> Workload:
    return workloads.linears(64, 176)


def llama_64() -> Workload:
    return workloads.llama(64, 176, heads=4)


def whole() -> list[Run]:
    """Every run of the committed result file."""
    return [*training(), *decoding()]


def quick() -> list[Run]:
    """The same kinds of run on tiny models: whether everything works, not how fast it is."""
    return [
        Run("training", linears_64, TINY, tokens=32, rounds=2),
        Run("training", llama_64, TINY, dtype="bfloat16", tokens=32, rounds=2),
        Run("prefill", llama_64, TINY, tokens=32, rounds=2),
        Run("decode", llama_64, [*TINY, MERGED._replace(rank=16)], batch=2, tokens=1, rounds=2),
    ]


def training() -> Iterator[Run]:
    """Training steps, the sweep over ranks first."""
    yield Run("training", linears_1024, SWEPT, tokens=512, rounds=11)
    yield Run("training", llama_1024, COMPARED, tokens=512, rounds=11)
    for tokens, rounds in ((128, 15), (2048, 7), (4096, 5)):
        yield Run("training", linears_1024, COMPARED, tokens=tokens, rounds=rounds)
    yield Run("training", llama_1024, COMPARED, dtype="bfloat16", tokens=512)
    yield Run("training", linears_2048, FEW, tokens=512, rounds=5)
    yield Run("training", llama_2048, FEW, tokens=512, rounds=5)
    yield Run("training", llama_2048, FEW, tokens=2048, rounds=3)
    for batch, rounds in ((16, 11), (64, 7)):
        yield Run(
            "training", workloads.minilm, [*FEW, Arm("LoRA", 8), MAGNITUDE], batch=batch, tokens=32, rounds=rounds
        )
    yield Run("training", workloads.smollm2, FEW, tokens=128, rounds=5)


def decoding() -> Iterator[Run]:
    """Prompts and single tokens."""
    arms = [*DECODING, MERGED]
    yield Run("prefill", llama_1024, arms, tokens=512)
    for batch in (1, 16):
        yield Run("decode", llama_1024, arms, batch=batch, tokens=1, rounds=15)
