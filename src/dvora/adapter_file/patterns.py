r"""Names and regular expressions of a configuration: which layers they match, and which value a layer has by them.

No expression of a file is matched before it is known to take little time.
PEFT matches them against every name in a model with `re`, which has no time limit, also where no method is asked. So
an upper bound of the steps is read off the parsed expression: repeats within repeats, as in `(.+)+!`, have none. A
matcher with a time limit would prove nothing: the package `regex` answers at once in most cases where `re` never ends.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

MOST_CHARACTERS, MOST_EXPRESSIONS = 2**18, 2**12
"""Of a setting: more than a model with an entry for each of its layers has."""
MOST_SETS = 256
"""Of characters, in the expressions of a setting; compiling one takes up to 4 ms."""
MOST_STEPS = 10**8
"""For one name; so many take seconds."""
TIME_LIMIT = 3.0
"""Seconds for all names and settings together."""
USUAL_LENGTH = 64
"""Of a layer's name."""
_Value = TypeVar("_Value")
_NAME = re.compile(r"[\w.-]*")
"""A plain name, which matches in one way only."""


class _Form(NamedTuple):
    """How PEFT matches the names of a setting."""

    around: str
    whole: bool = False
    at_most: int = MOST_EXPRESSIONS


_WHOLE, _ENDING = _Form("{}", whole=True), _Form(r"(.*\.)?({})$")
# PEFT compiles the last two again for every module, except for the few hundred that `re` caches.
_FORMS = {
    **dict.fromkeys(("target_modules", "magnitude_modules", "exclude_modules", "feedforward_modules"), _WHOLE),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "strength"), _ENDING),
    "modules_to_save": _Form(r"(^|.*\.){}($|\..*)", at_most=256),
    "layers_pattern": _Form(r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", at_most=256),
}


def value_of(values: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    """The rank, alpha or strength of a layer: the first whose pattern PEFT finds at the end of its name."""
    for pattern, value in values.items():
        if _matcher(_ENDING, pattern)(name):
            return value
    return default


def is_named(names: Collection[str] | str | None, path: str) -> bool:
    """Whether a path is one of the names, ends in one of them, or matches them as a regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return bool(names) and f".{path}".endswith(tuple([f".{name}" for name in names or ()]))


def check_expressions(settings: Mapping[str, Any], names: Collection[str] = (), *, bounded: bool = True) -> None:
    """Refuse settings that should be regular expressions and are not, or that take too long.

    Args:
        settings: of a configuration of any method; what is no expression is ignored.
        names: what they will be matched against, if that is known.
        bounded: whether their steps must have a bound, as those of files must.

    Raises:
        ValueError: an expression cannot be compiled, or matching it takes more than the limits.
    """
    longest, start = max(map(len, names), default=USUAL_LENGTH), time.monotonic()
    for setting, form in _FORMS.items():
        value = settings.get(setting)
        for expression in _expressions(setting, form, value) if value else ():
            match = _checked(setting, form, expression, longest, bounded)
            for name in names:
                match(name)
                if time.monotonic() - start > TIME_LIMIT:
                    raise ValueError(
                        f"{setting}: {_shown(expression)} cannot be matched against {len(names)} names in "
                        f"{TIME_LIMIT:g} s; write it with fewer repeats behind each other"
                    )


def _expressions(setting: str, form: _Form, value: Any) -> list[str]:
    """The expressions of a setting; lists of whole names have none."""
    several = value if isinstance(value, list | tuple | set | dict) and not form.whole else ()
    expressions = [value] if isinstance(value, str) else [entry for entry in several if isinstance(entry, str)]
    together = "".join(expressions)
    characters, sets = len(together), together.count("[")
    if len(expressions) > form.at_most or characters > MOST_CHARACTERS or sets > MOST_SETS:
        raise ValueError(
            f"{setting} has {len(expressions)} expressions of {characters} characters and {sets} sets together, "
            f"expected at most {form.at_most}, {MOST_CHARACTERS} and {MOST_SETS}"
        )
    return expressions


@lru_cache(maxsize=2 * MOST_EXPRESSIONS)
def _matcher(form: _Form, expression: str) -> Callable[[str], object]:
    compiled = re.compile(form.around.format(expression))
    return compiled.fullmatch if form.whole else compiled.match


def _checked(setting: str, form: _Form, expression: str, longest: int, bounded: bool) -> Callable[[str], object]:
    """What matches names; if it is an expression, and needs few steps for a name of so many characters."""
    if _NAME.fullmatch(expression):
        return _matcher(form, expression)
    parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
    try:
        # Without the form around it, too: it could close a bracket of the form's.
        parser.parse(expression)
        ways, repeats = _ways(parser.parse(form.around.format(expression)))
        match = _matcher(form, expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{setting}: {_shown(expression)} is not a regular expression: {error}") from error
    # Repeats behind each other divide a name between them.
    if bounded and ways * math.comb(longest + repeats, repeats) > MOST_STEPS:
        raise ValueError(
            f"{setting}: {_shown(expression)} could take more than {MOST_STEPS:,} steps for a name of {longest} "
            "characters; write it without repeats or alternatives within a repeat, and with few repeats"
        )
    return match


def _ways(parsed: Any) -> tuple[float, int]:
    """In how many ways an expression goes through its alternatives, and the repeats behind each other in it."""
    ways, repeats = zip((1.0, 0), *(_ways_of(str(code), argument) for code, argument in parsed), strict=True)
    return math.prod(ways), sum(repeats)


def _ways_of(code: str, argument: Any) -> tuple[float, int]:
    match code:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "AT" | "GROUPREF":
            return 1, 0
        case "SUBPATTERN":
            return _ways(argument[3])
        case "ASSERT" | "ASSERT_NOT":
            return _ways(argument[1])
        case "ATOMIC_GROUP":
            return _ways(argument)
        case "BRANCH":
            # Alternatives that begin with different characters exclude each other.
            by_first: Counter[object] = Counter()
            for alternative in argument[1]:
                plain = alternative and str(alternative[0][0]) == "LITERAL"
                first = chr(alternative[0][1]).casefold() if plain else None
                by_first[first] += _ways(alternative)[0]  # type: ignore[assignment]  # may be infinite
            return by_first.pop(None, 0) + max(by_first.values(), default=0), max(_ways(a)[1] for a in argument[1])
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            low, high, body = argument
            ways, repeats = _ways(body)
            if high <= 1:
                return ways * (1 + high - low), repeats
            # What may be empty can be repeated for ever.
            simple = ways == 1 and not repeats and body.getwidth()[0] > 0
            return 1 if simple else math.inf, int(high > low)
    return math.inf, 0


def _shown(expression: str) -> str:
    return f"{expression[:100]!r}{'...' if len(expression) > 100 else ''}"
