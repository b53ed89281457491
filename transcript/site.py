"""What the site's build adds to pages: dark pictures, and the commands, settings and examples from the source.

MkDocs calls the functions that begin with `on_`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import typer
from mkdocs.plugins import event_priority

from benchmarks.examples.catalogue import CATALOGUE
from dvora.cli.app import app
from dvora.recipes.data import columns as names
from dvora.recipes.settings import Settings, default_of

ROOT = Path(__file__).parent.parent
PICTURE = re.compile(r"^!\[(.*?)\]\((\S*pictures/\w+)\.(svg|webp)\)$", flags=re.MULTILINE)


@event_priority(100)
def on_page_markdown(markdown: str, **_: Any) -> str:
    """Every picture as a pair, and each marker replaced by what it stands for."""
    for marker, write in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, write())
    return PICTURE.sub(r"![\1](\2.\3#only-light)\n![\1](\2-dark.\3#only-dark)", markdown)


def commands() -> str:
    """A section for each command, from the program itself."""
    found = cast(Any, typer.main.get_command(app)).commands
    return "\n\n".join(_command(name, command) for name, command in found.items())


def _command(name: str, command: Any) -> str:
    if inner := getattr(command, "commands", None):
        sections = [_command(f"{name} {each}", inner[each]) for each in inner]
        return "\n\n".join([f"### dvora {name}", command.help, *(f"#{section}" for section in sections)])
    about, *examples = re.split("Examples?:", command.help, maxsplit=1)
    typed = re.findall(r"^ *(dvora .+)$", "".join(examples), flags=re.MULTILINE)
    lines = [f"### dvora {name}", "", about.replace("\b", "").strip(), ""]
    lines += ["```sh", *typed, "```", "", "| | | default |", "|---|---|---|"]
    lines += [_parameter(each) for each in command.params if not each.hidden and each.name != "help"]
    return "\n".join(lines)


def _parameter(parameter: Any) -> str:
    is_option = parameter.opts[0].startswith("-")
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
    has_default = parameter.default not in (None, False, []) and parameter.show_default
    default = f"`{_plain(parameter.default)}`" if has_default else ""
    if isinstance(parameter.show_default, str):
        default = _cell(parameter.show_default)
    shown = ", ".join(f"`{name}`" for name in names)
    return f"| {shown} | {_cell(parameter.help or '')} | {'required' if parameter.required else default} |"


def settings() -> str:
    """A table for each section of the configuration, from the settings themselves."""
    lines, section = [], ""
    for name, field in Settings.model_fields.items():
        extra: Any = field.json_schema_extra
        if extra["section"] != section:
            section = extra["section"]
            lines += ["", f"### {section}", "", "| key | default | |", "|---|---|---|"]
        default = _cell(default_of(field)) or ("required" if field.is_required() else "none")
        lines.append(f"| `{name}` | {default} | {_cell(str(field.description))} |")
    return "\n".join(lines)


def columns() -> str:
    """Rows of a table: the names by which a column is recognised."""
    found = {
        "the text": names.TEXT,
        "the entities": names.ENTITIES,
        "the first of two texts": names.FIRST_TEXT,
        "the second": names.SECOND_TEXT,
        "a class": names.CLASS,
        "a number": names.NUMBER,
        "a language model's text or chat": names.LANGUAGE,
    }
    return "\n".join(f"| {what} | {', '.join(f'`{name}`' for name in known)} |" for what, known in found.items())


def examples() -> str:
    """The code of each example, and of the files that they share."""
    sections = []
    for each in CATALOGUE:
        needs = f" Needs {', '.join(each.needs)}." if each.needs else ""
        typed = " ".join(["python", *each.launcher, "-m", f"examples.{each.name}"])
        sections.append(f"## {each.trainer}\n\n{each.shows[0].upper()}{each.shows[1:]}.{needs}\n\n{_run(typed)}")
        sections.append(_code(f"examples/{each.name}.py"))
    shared = sorted(path.stem for path in (ROOT / "examples").glob("[a-z]*.py"))
    rest = [_code(f"examples/{name}.py") for name in shared if name not in {each.name for each in CATALOGUE}]
    return "\n\n".join([*sections, "## What they share", *rest])


def _run(typed: str) -> str:
    return f"```sh\n{typed}\n```"


def _code(path: str) -> str:
    code = (ROOT / path).read_text(encoding="utf-8").rstrip().replace("\n", "\n    ")
    return f'??? example "{path}"\n\n    ```python\n    {code}\n    ```'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


MARKERS: dict[str, Callable[[], str]] = {
    "<!-- commands -->": commands,
    "<!-- settings -->": settings,
    "<!-- columns -->": columns,
    "<!-- examples -->": examples,
}
"""Comments in pages, and what takes their place."""
