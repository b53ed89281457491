"""The trainers on the page "What works with what", from what the examples reported."""

from typing import Any

from benchmarks.tables import table, text


def examples(result: dict[str, Any]) -> str:
    """The trainers that have an example, and what does not work."""
    rows, environment = result["rows"], result["environment"]
    works = sum(row["outcome"] == "works" for row in rows)
    return text(
        f"{works} of {len(rows)} examples work (`make examples`, `benchmarks/results/examples.json` has all versions; "
        f"torch {environment['torch']}, PEFT {environment['peft']}, CPU). Each trains, and stops with an error if what "
        "it shows does not hold.",
        [
            f"- `examples/{row['name']}.py`: {row['outcome']}: {' '.join(row['reason'].split())}"
            for row in rows
            if row["outcome"] != "works"
        ],
    )


def synchronisation(result: dict[str, Any]) -> str:
    """What reaches a serving model after a step, by method; and federated rounds in 8 bits."""
    rows = {row["name"]: row for row in result["rows"]}
    rl, federated = rows["rl_sync"]["figures"], rows["federated_flower"]["figures"]
    names = {"DVoRA": "DVoRA r=256", "LoRA_r1": "LoRA r=1", "LoRA_r16": "LoRA r=16", "full_weights": "full weights"}
    lines = [
        (
            name,
            _size(rl[f"{method}_bytes"]),
            f"{rl[f'{method}_ms_of_a_core_through_a_file']:,.0f}",
        )
        for method, name in names.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in rows["rl_sync"]["versions"].items())
    full, bits = (_size(federated[f"{size}_bytes"]) for size in ("each_message", "in_8_bits"))
    return text(
        table(("SmolLM2-135M", "bytes", "ms of a core through a file in memory"), lines),
        f"Medians of `examples/rl_sync.py` (`benchmarks/results/examples.json`; {versions}; CPU). Trainer and bank "
        f"give a token the same probability to within {rl['off_the_ratio_of_importance']:.0e}.",
        f"Federated rounds (`examples/federated_flower.py`, MiniLM, three clients, three seeds): {full} a message in "
        f"float32, {bits} in 8 bits; accuracy {100 * federated['validation_accuracy'][1]:.1f} % and "
        f"{100 * federated['accuracy_in_8_bits']:.1f} %.",
    )


def sixteen(result: dict[str, Any]) -> str:
    """What sixteen classifiers of a message say, and what they took."""
    figures = next(row["figures"] for row in result["rows"] if row["name"] == "sixteen_classifiers")
    before, after = figures["taught_anew"]
    return text(
        [f"- {message}<br>*{said}*" for message, said in figures["answers"].items()],
        f"In {figures['minutes_to_train_all']:.0f} minutes on two cores all sixteen were trained, and "
        f"{figures['heads_alone']} of them are served as heads alone. They are right on "
        f"{100 * figures['accuracy']:.0f} % of held-out messages (mean). One request for all takes "
        f"1/{figures['one_request_as_fast_as_sixteen']:.0f} of sixteen. Meanwhile `ships` learned from more rows "
        f"({100 * before:.0f} to {100 * after:.0f} %) and was replaced in {figures['ms_to_replace']} ms; "
        f"{figures['answers_meanwhile']:,} answers by others did not change.",
    )


def _size(value: int) -> str:
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.3g} kB"
