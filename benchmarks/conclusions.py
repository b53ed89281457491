"""How often do conclusions hold? Simulated rows through what decides: intervals, what is saved, temperatures.

Rows of results/conclusions.json. Run from the repository's root: python -m benchmarks.conclusions
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.random import Generator
from rich.progress import track
from torch.nn.functional import cross_entropy

from benchmarks.results import Row, file_of, write
from dvora.recipes.tasks.calibration import chosen_temperature, fitted_temperature
from dvora.recipes.tasks.comparison import METRICS, compared, is_preferred

SEED = 0
Pair = tuple[np.ndarray, np.ndarray]


def shares(up: float, down: float) -> Callable[[int, Generator], Pair]:
    """Rows that only the first model, or only the second, has right; of the others three in five are right."""

    def draw(rows: int, random: Generator) -> Pair:
        drawn = random.random(rows)
        both = drawn > up + down + 0.4 * (1 - up - down)
        right = (drawn < up) | both, ((drawn >= up) & (drawn < up + down)) | both
        return tuple(np.stack([of, np.ones(rows)], 1).astype(float) for of in right)  # type: ignore[return-value]

    return draw


def losses(rows: int, random: Generator) -> Pair:
    """Texts of 5 to 60 tokens, some harder than others."""
    tokens, hard = random.integers(5, 60, rows), random.gamma(2, 1, rows)
    first, second = (tokens * (hard * share + random.gamma(1, 0.3, rows)) for share in (0.9, 1.0))
    return np.stack([first, tokens], 1), np.stack([second, tokens], 1)


def errors(rows: int, random: Generator) -> Pair:
    """Squared errors, part of which both models make."""
    shared = random.normal(size=rows)
    first, second = ((share * shared + 0.4 * random.normal(size=rows)) ** 2 for share in (0.8, 1.0))
    return np.stack([first, np.ones(rows)], 1), np.stack([second, np.ones(rows)], 1)


def entities(rows: int, random: Generator) -> Pair:
    """Texts with none to three entities."""
    true = random.integers(0, 4, rows)
    right = [random.binomial(true, share) for share in (0.8, 0.7)]
    guessed = [of + random.poisson(wrong, rows) for of, wrong in zip(right, (0.4, 0.5), strict=True)]
    first, second = (np.stack([*of, true], 1).astype(float) for of in zip(right, guessed, strict=True))
    return first, second


CASES: Mapping[str, tuple[str, Callable[[int, Generator], Pair]]] = {
    "accuracy, 5 % and 5 % differ": ("accuracy", shares(0.05, 0.05)),
    "accuracy, 15 % and 10 % differ": ("accuracy", shares(0.15, 0.1)),
    "accuracy, 30 % and 10 % differ": ("accuracy", shares(0.3, 0.1)),
    "loss": ("loss", losses),
    "rmse": ("rmse", errors),
    "f1": ("f1", entities),
}


def coverage(rows: int, case: str, times: int = 1000) -> Row:
    """How often the 95 % interval holds the true difference, and what is concluded."""
    metric, draw = CASES[case]
    random = np.random.default_rng(SEED)
    first, second = draw(1_000_000, random)
    of, sign = METRICS[metric], 1 if metric in ("accuracy", "f1") else -1
    true = sign * float(of(first.sum(0)) - of(second.sum(0)))
    found = [compared(metric, *draw(rows, random)) for _ in range(times)]
    held = float(np.mean([one.low <= true <= one.high for one in found]))
    outcomes = {
        name: sum(one.outcome == name for one in found) / times for name in ("better", "no better", "cannot tell")
    }
    return {"what": "interval", "case": case, "rows": rows, "true": round(true, 4), "covered": held, **outcomes}


RULES: Mapping[str, Callable[[np.ndarray, np.ndarray], bool]] = {
    "metric, then loss": lambda trained, head: is_preferred(
        "accuracy", {"validation": trained, "validation_head_alone": head}
    ),
    "metric, then head": lambda trained, head: trained[:, 0].sum() > head[:, 0].sum(),
    "loss": lambda trained, head: trained[:, 2].sum() < head[:, 2].sum(),
    "where the sign test says better": lambda trained, head: compared("accuracy", trained, head).outcome == "better",
    "always what was trained": lambda *_: True,
    "always the head": lambda *_: False,
}


def saving(rows: int, gain: float, times: int = 1000) -> Row:
    """Points that are lost by what each rule saves, on average, by so many validation rows.

    Rows have a margin of hardness that both models share; what was trained has a true gain, 0.35 around `gain` in
    units of a logit, is the best of five steps on these rows, and is up to three times too sure.
    """
    random, lost = np.random.default_rng(SEED), dict.fromkeys(RULES, 0.0)
    for _ in range(times):
        easy, better, sure = random.uniform(0.3, 2.5), random.normal(gain, 0.35), random.uniform(1, 3)

        def drawn(count: int, easy: float = easy, better: float = better) -> Pair:
            shared = random.normal(size=count) * 0.85**0.5
            head, base = (easy + 2 * (shared + 0.15**0.5 * random.normal(size=count)) for _ in range(2))
            return head, base + better + 2 * 0.05**0.5 * random.normal(size=(5, count))

        def results(margins: np.ndarray, sure: float = 1.0) -> np.ndarray:
            return np.stack([margins > 0, np.ones(len(margins)), np.logaddexp(0, -sure * margins)], 1).astype(float)

        head, steps = drawn(rows)
        best = int((steps > 0).sum(1).argmax())
        truth_head, truth_steps = drawn(4000)
        true = {False: float((truth_head > 0).mean()), True: float((truth_steps[best] > 0).mean())}
        for name, rule in RULES.items():
            lost[name] += (
                100 * (max(true.values()) - true[bool(rule(results(steps[best], sure), results(head)))]) / times
            )
    rounded = {name: round(value, 2) for name, value in lost.items()}
    return {"what": "saving", "gain": gain, "rows": rows, "points lost": rounded}


def temperatures(rows: int, scale: float, times: int = 150) -> Row:
    """By how much the loss of other rows falls, on average and in the worst 5 %, of logits `scale` times too sure."""
    generator, fell = torch.Generator().manual_seed(SEED), {"chosen": list[float](), "always": list[float]()}
    for _ in range(times):
        logits = 2.5 * torch.randn(rows + 3000, 3, generator=generator, dtype=torch.float64)
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()
        logits = scale * logits
        given = logits[:rows], labels[:rows]
        for name, divisor in (("chosen", chosen_temperature(*given)[0]), ("always", fitted_temperature(*given))):
            before, after = (cross_entropy(logits[rows:] / by, labels[rows:]) for by in (1.0, divisor))
            fell[name].append(float(before - after))
    found = {
        f"{name}, {what}": round(float(of(np.array(values))), 4)
        for name, values in fell.items()
        for what, of in (("mean", np.mean), ("worst 5 %", lambda values: np.quantile(values, 0.05)))
    }
    return {"what": "temperature", "scale": scale, "rows": rows, "loss fell": found}


def rows() -> Iterator[Row]:
    """All of them."""
    for count in track((14, 20, 30, 60, 100, 300, 1000), description="intervals"):
        yield from (coverage(count, case) for case in CASES)
    # Validation rows of tables of 30 to 2,000.
    for count in track((5, 15, 30, 75, 150, 300), description="what is saved"):
        yield from (saving(count, gain) for gain in (0.0, 0.25))
    for count in track((5, 14, 20, 30, 60, 150), description="temperatures"):
        yield from (temperatures(count, scale) for scale in (0.6, 1.0, 1.5, 2.5))


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(file_of("conclusions"), rows(), seed=SEED)
