"""What is measured of batches on which model, and of how many adapters; less where a step takes seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.many_adapters.arms import ManyArm
from benchmarks.speed import workloads
from benchmarks.speed.arms import Arm
from benchmarks.speed.workloads import Workload

ROWS = 64
"""Of a batch."""
MANY = 1024
"""Adapters known to a bank, where nothing else is said."""
KNOWN = (ROWS, MANY, 10_000)
SLOTS = 256
DENSE, SMALL = Arm("dvora dense", 256), Arm("dvora dense", 64)
LORAS = (Arm("LoRA", 8), Arm("LoRA", 1))
BASE, MERGED = ManyArm("base"), ManyArm("merged", DENSE)
PASSES = 16
"""Tokens that are decoded with the same rows."""
LEFT_OUT = (
    "GPUs: nothing here was run on one",
    "64 adapters known to the bank: only of rank 64 and all 64 in the batch; 10,000: only in the linear layers",
    "SmolLM2: float32 only, 64 adapters known, prompts of 4 tokens, only LoRA r=8 through adapter_names",
    "bfloat16: MiniLM and the linear layers, fewer ways and rounds",
    "(IA)3: PEFT has no batches of several of its adapters",
    "batches repeat their names, so that all their adapters are in slots; requests to the server load and evict",
)
"""What the plan leaves out, for the result file."""


@dataclass(frozen=True)
class Phase:
    """One kind of step: the rows are chosen, then come one or more passes.

    Args:
        part: "prefill" or "decode".
        tokens: in a row of the batch.
        rounds: how often every arm is timed.
        passes: before rows are chosen anew; a text is decoded with the same rows.
        cached: tokens before the one that is decoded; 0 if the model has no attention.
    """

    part: str
    tokens: int
    rounds: int
    passes: int = 1
    cached: int = 0


@dataclass(frozen=True)
class Ground:
    """A model, and the arms that are timed on it in turns; the base comes first."""

    workload: Workload
    dtype: str
    arms: Sequence[ManyArm]
    phases: Sequence[Phase]
    rows: int = ROWS


@dataclass(frozen=True)
class OneText:
    """Many classifiers on one text.

    Args:
        encoder: of `one_text.ENCODERS`.
        classifiers: how many there are.
        tokens: of the text.
        rounds: how often every way is timed.
    """

    encoder: str
    classifiers: Sequence[int]
    tokens: Sequence[int]
    rounds: int


@dataclass(frozen=True)
class Plan:
    """All that is measured.

    Args:
        grounds: of batches.
        encoder: of training, and of what thousands of adapters take in memory.
        adapter: of the encoder.
        known: adapters of the banks whose memory is measured.
        resident: slots, and bytes of the host's tier, of these banks.
        loaded: models whose adapters are loaded and weighed, which adapters these are, and how many are loaded.
        one_text: many classifiers on one text.
    """

    grounds: Sequence[Ground]
    encoder: Workload
    adapter: Arm
    known: int
    resident: Sequence[tuple[int, int]]
    loaded: Sequence[tuple[Workload, Sequence[Arm], int]]
    one_text: Sequence[OneText]


def whole() -> Plan:
    """Of the committed result file."""
    return Plan(
        grounds=whole_grounds(),
        encoder=workloads.minilm(),
        adapter=SMALL,
        known=KNOWN[-1],
        resident=[(SLOTS, 2**30), (64, 2**26)],
        loaded=[(model, (DENSE, SMALL), 16) for model in (workloads.minilm(), workloads.smollm2())],
        one_text=[OneText("MiniLM", (1, 6, 16, 64), (32, 128, 500), 7), OneText("BERT-base", (6, 16), (32, 128), 3)],
    )


def quick() -> Plan:
    """The same on tiny models: whether everything works, not how fast it is."""
    tiny = workloads.bert(64, 1)
    return Plan(
        grounds=quick_grounds(),
        encoder=tiny,
        adapter=Arm("dvora dense", 16),
        known=SLOTS + 4,
        resident=[(SLOTS, 2**30)],
        loaded=[(tiny, [Arm("dvora dense", rank) for rank in (16, 4)], 6)],
        one_text=[OneText("tiny", (1, 3), (9,), 2)],
    )


def whole_grounds() -> list[Ground]:
    """Every model, and what is timed on it."""
    linears, minilm, smollm2 = workloads.linears(1024, 2816, blocks=2), workloads.minilm(), workloads.smollm2()
    ten_thousand = bank_arm(SMALL, ROWS, KNOWN[-1])
    smollm2_arms = [BASE, MERGED, *bank_arms([SMALL, DENSE], ROWS), *by_names(LORAS[0]), *gathered()]
    return [
        Ground(linears, "float32", [*all_arms(), ten_thousand], [Phase("decode", 1, 7, PASSES)]),
        Ground(linears, "bfloat16", few_arms(), [Phase("decode", 1, 5, PASSES)]),
        Ground(minilm, "float32", [*all_arms(), *kinds()], [Phase("prefill", 32, 5)]),
        Ground(minilm, "bfloat16", few_arms(), [Phase("prefill", 32, 3)]),
        Ground(smollm2, "float32", smollm2_arms, [Phase("decode", 1, 5, 2, cached=16), Phase("prefill", 4, 3)]),
    ]


def quick_grounds() -> list[Ground]:
    """Every way, on tiny models."""
    tiny = [Arm("dvora dense", rank) for rank in (16, 4)]
    arms = [BASE, MERGED, *(bank_arm(arm, n, 8) for arm in tiny for n in (1, 8))]
    arms += [ManyArm("adapter_names", arm, n, 8) for arm in (*tiny, LORAS[0]) for n in (1, 8)]
    arms += [ManyArm("gathered", arm, 8, 8) for arm in LORAS]
    arms += [bank_arm(LORAS[0], 8, 8), kinds()[-1]._replace(adapter=tiny[0], distinct=8, known=8)]
    llama = workloads.llama(64, 176, heads=4)
    return [
        Ground(workloads.linears(64, 176), "bfloat16", arms[:4], [Phase("decode", 1, 2, PASSES)], rows=8),
        Ground(llama, "float32", arms, [Phase("decode", 1, 2, PASSES, cached=4), Phase("prefill", 4, 2)], rows=8),
    ]


def all_arms() -> list[ManyArm]:
    """Everything but ten thousand adapters."""
    banks = [bank_arm(adapter, distinct, MANY) for adapter in (SMALL, DENSE) for distinct in (1, 16, ROWS)]
    return [BASE, MERGED, *banks, bank_arm(SMALL, ROWS, ROWS), *by_names(SMALL, DENSE, *LORAS), *gathered()]


def few_arms() -> list[ManyArm]:
    """The least that shows what another adapter in every row costs."""
    return [BASE, MERGED, *bank_arms([SMALL, DENSE], MANY), *by_names(*LORAS), *gathered()]


def bank_arm(adapter: Arm, distinct: int, known: int) -> ManyArm:
    return ManyArm("bank", adapter, distinct, known)


def bank_arms(adapters: Sequence[Arm], known: int) -> list[ManyArm]:
    """One adapter in the batch, and one a row."""
    return [bank_arm(adapter, distinct, known) for adapter in adapters for distinct in (1, ROWS)]


def by_names(*adapters: Arm) -> list[ManyArm]:
    """Through PEFT's `adapter_names`."""
    return [ManyArm("adapter_names", adapter, distinct, ROWS) for adapter in adapters for distinct in (1, ROWS)]


def kinds() -> list[ManyArm]:
    """LoRA in a bank, alone and in half of the rows."""
    return [*bank_arms(LORAS[:1], ROWS), ManyArm("bank, half of the rows LoRA r=8", SMALL, ROWS, ROWS)]


def gathered() -> list[ManyArm]:
    """LoRA as fast as PyTorch makes it."""
    return [ManyArm("gathered", adapter, distinct, ROWS) for adapter in LORAS for distinct in (1, ROWS)]
