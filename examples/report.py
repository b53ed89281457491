"""How an example says what it found: one line of JSON on its standard output, the last it writes."""

import json
from collections.abc import Mapping
from typing import Any

HEAD = '{"works": '
OTHER_OUTCOMES = ("refused", "base cannot")


def report(result: Mapping[str, Any]) -> None:
    """Print what an example found.

    Args:
        result: `works`, true or false; `figures`, the few worth showing, by name; `versions` of packages, by name.
            Where it does not work also `outcome`, "refused" (by dvora) or "base cannot" (nor can other methods there),
            and `reason`. A claim that does not hold is no outcome: leave with `raise SystemExit("what is wrong")`.

    Raises:
        ValueError: `works` is missing, or what has to come with false.
    """
    if not isinstance(result.get("works"), bool):
        raise ValueError(f"result['works'] must be True or False, got {result.get('works')!r}")
    if not result["works"] and (result.get("outcome") not in OTHER_OUTCOMES or not result.get("reason")):
        raise ValueError(
            f"a result that does not work needs an outcome, one of {OTHER_OUTCOMES}, and a reason; got "
            f"{result.get('outcome')!r} and {result.get('reason')!r}"
        )
    print(json.dumps({"works": result["works"], **result}), flush=True)


def read_report(output: str) -> dict[str, Any] | None:
    """The report in an example's standard output; None if it made none."""
    lines = [line for line in output.splitlines() if line.startswith(HEAD)]
    found: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return found
