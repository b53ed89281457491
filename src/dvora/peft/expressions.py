"""Regular expressions of a configuration: none is compiled or matched before it is known to take little time.

Python's `re` has no time limit, and PEFT matches these settings against every name in a model. So an upper
bound of the steps is computed first; above a limit the expression is tried in a process of its own, with limits.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

TIME_LIMIT = 3.0
"""Seconds that all expressions of a setting may take for all names."""
MEMORY_LIMIT = 2**30
MAX_CHARACTERS, MAX_EXPRESSIONS = 2**18, 2**12
"""Of a setting: more than a model with an entry for each of its layers has."""

_FREE = 10**6
"""Steps that need no trial: a fraction of a second."""
_STEPS_OF_A_SET = 1000
"""What compiling a set of characters costs."""
_NAME = re.compile(r"[\w.-]*")
"""A plain name, which matches in one way only."""

_TRIAL = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_LIMIT}, {MEMORY_LIMIT}))
except ImportError:
    pass
expressions, whole, names = json.load(sys.stdin)
for expression in expressions:
    compiled = re.compile(expression)
    match = compiled.fullmatch if whole else compiled.match
    for name in names:
        match(name)
"""


class _Form(NamedTuple):
    """How PEFT matches the names of a setting."""

    around: Callable[[str], str]
    """The expression that is matched."""
    whole: bool
    at_most: int = MAX_EXPRESSIONS
    """Expressions of the setting."""


def ending(name: str) -> str:
    """The expression with which PEFT matches a name in a pattern of ranks or alphas."""
    return rf"(.*\.)?({name})$"


_WHOLE, _ENDING = _Form(str, whole=True), _Form(ending, whole=False)
# PEFT compiles the last two again for every module, except for the few hundred that `re` caches.
_FORMS = {
    "target_modules": _WHOLE,
    "magnitude_modules": _WHOLE,
    "exclude_modules": _WHOLE,
    "rank_pattern": _ENDING,
    "alpha_pattern": _ENDING,
    "strength": _ENDING,
    "modules_to_save": _Form(lambda name: rf"(^|.*\.){name}($|\..*)", whole=False, at_most=256),
    "layers_pattern": _Form(lambda name: rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", whole=False, at_most=256),
}


def check_expressions(settings: Mapping[str, Any], names: Collection[str] = ()) -> None:
    """Refuse settings that should be regular expressions and are not, or that take too long.

    Args:
        settings: of a configuration of any method; what is no expression is ignored.
        names: what they will be matched against, if that is known.

    Raises:
        ValueError: an expression cannot be compiled, or matching it takes more than the limits.
    """
    for setting, form in _FORMS.items():
        written = [each for each in _expressions(setting, settings.get(setting)) if isinstance(each, str)]
        characters = sum(map(len, written))
        if len(written) > form.at_most or characters > MAX_CHARACTERS:
            raise ValueError(
                f"{setting} has {len(written)} expressions of {characters} characters together, expected at most "
                f"{form.at_most} and {MAX_CHARACTERS}"
            )
        longest = max(map(len, names), default=0)
        written = [each for each in written if _NAME.fullmatch(each) is None]
        steps = sum(_steps(setting, form.around(each), each, longest, max(1, len(names))) for each in written)
        if steps > _FREE:
            try:
                _try(tuple(map(form.around, written)), form.whole, tuple(sorted(names)))
            except (subprocess.SubprocessError, OSError) as error:
                raise ValueError(
                    f"{setting}: {_shown(written)} cannot be matched against {len(names)} names in {TIME_LIMIT:.0f} s "
                    f"and {MEMORY_LIMIT >> 20} MiB ({type(error).__name__}); write it with fewer repeats within each "
                    "other or behind each other"
                ) from error
        for each in written:
            _check_compiles(setting, form.around(each), each)


def first_match(patterns: Iterable[str], name: str) -> str:
    """The first of the patterns that PEFT finds at the end of a name; the name itself if there is none."""
    return next((pattern for pattern in patterns if _ends(pattern)(name)), name)


def _expressions(setting: str, value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    several = setting not in ("target_modules", "magnitude_modules", "exclude_modules")
    return value if several and isinstance(value, list | tuple | set | dict) else ()


@lru_cache(maxsize=2 * MAX_EXPRESSIONS)
def _ends(pattern: str) -> Callable[[str], object]:
    return re.compile(ending(pattern)).match


def _check_compiles(setting: str, expression: str, written: str) -> None:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{setting}: {_shown([written])} is not a regular expression: {error}") from error


def _steps(setting: str, expression: str, written: str, longest: int, names: int) -> float:
    """An upper bound for compiling an expression and matching it with so many names of so many characters."""
    parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
    try:
        # Without the form around it, too: it could close a bracket of the form's.
        parser.parse(written)
        parsed = parser.parse(expression)
        if parsed.state.flags & re.IGNORECASE:
            return math.inf
        return len(expression) + _STEPS_OF_A_SET * expression.count("[") + names * _ways(parsed, longest)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{setting}: {_shown([written])} is not a regular expression: {error}") from error


def _ways(parsed: Any, longest: int) -> float:
    """An upper bound of the ways in which an expression could match the beginning of a name."""
    return math.prod(_ways_of(str(code), argument, longest) for code, argument in parsed)


def _ways_of(code: str, argument: Any, longest: int) -> float:
    match code:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "AT" | "GROUPREF":
            return 1
        case "BRANCH":
            return sum(_ways(each, longest) for each in argument[1])
        case "SUBPATTERN":
            return _ways(argument[3], longest) if not argument[1] else math.inf
        case "ASSERT" | "ASSERT_NOT":
            return _ways(argument[1], longest)
        case "ATOMIC_GROUP":
            return _ways(argument, longest)
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            low, high, repeated = argument
            return _ways_of_repeat(low, high, repeated, longest)
    return math.inf


def _ways_of_repeat(low: int, high: int, repeated: Any, longest: int) -> float:
    if high > 1 and repeated.getwidth()[0] == 0:
        return math.inf  # nothing may be repeated for ever
    once, times = _ways(repeated, longest), min(high, longest)
    if once <= 1:
        return max(1, times - low + 1)
    return (times + 1) * once**times if times * math.log(once) < 100 else math.inf


@lru_cache(maxsize=16)
def _try(expressions: tuple[str, ...], whole: bool, names: tuple[str, ...]) -> None:
    """Compile and match in a separate process that can be killed.

    Raises:
        SubprocessError, OSError: it did not finish.
    """
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TRIAL],
        input=json.dumps([expressions, whole, names]).encode(),
        timeout=TIME_LIMIT,
        capture_output=True,
        check=True,
    )


def _shown(written: list[str]) -> str:
    return ", ".join(f"{each[:100]!r}{'...' if len(each) > 100 else ''}" for each in written[:3])
