"""The rules of the house: which way imports go, what is public, what the documentation says of it."""

import ast
import re
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dvora

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "dvora"

# From the one that knows least to the one that knows most; each may import those before it, and no others.
ORDER = [
    "text",
    "tensors",
    "blocks",
    "functional",
    "matrices",
    "checks",
    "engines",
    "weight",
    "factors",
    "layer",
    "adapter",
    "heads",
    "training",
    "adapter_file",
    "rows",
    "peft",
    "flat",
    "bank",
    "export",
    "sync",
    "tools",
    "recipes",
    "serve",
    "cli",
]
NOT_BELOW = {"sync": {"export"}, "tools": {"bank", "export", "sync"}}
"""Rooms beside each other."""
ROOMS = {room: set(ORDER[:index]) - NOT_BELOW.get(room, set()) for index, room in enumerate(ORDER)}
ROOMS["whole_files"] = set()
for room_of_files in ("adapter_file", "bank", "export", "sync", "recipes", "serve", "cli"):
    ROOMS[room_of_files].add("whole_files")
ADDRESSES = {"__init__", "extras", "peft_hook", "functional", "doctor", "analysis"}
"""Of the package itself: what users import, from the rooms beneath."""
PLAIN = set(ORDER[: ORDER.index("adapter_file")])
"""Rooms of the plain layer."""
FILES = sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path) for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """Names, relative to the package, of the modules that a file imports anywhere in it; "" is the package itself."""
    package = path.relative_to(SOURCE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *(node.module or "").split(".")]).strip(".")
            names = {f"{base}.{alias.name}".strip(".") for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return found


def top_level_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    return names


def room(path: Path) -> str:
    """The room of a file: a folder of the package, or a file in it."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_file_is_in_a_room() -> None:
    assert {room(path) for path in FILES} == {*ROOMS, *ADDRESSES}


@pytest.mark.parametrize("path", [path for path in FILES if room(path) in ROOMS], ids=module_name)
def test_a_room_imports_those_before_it_only(path: Path) -> None:
    # The package itself stands for its version, which is no import of a room; what is missing may be said anywhere.
    allowed = {"", "extras", room(path), *ROOMS[room(path)]}
    others = {name for name in imported_modules(path) if name.partition(".")[0] not in allowed}
    assert not others, f"{module_name(path)} imports {others}; {room(path)} may import {sorted(allowed - {''})}"


@pytest.mark.parametrize("path", [path for path in FILES if room(path) in PLAIN], ids=module_name)
def test_the_plain_layer_needs_torch_and_numpy_alone(path: Path) -> None:
    assert top_level_imports(path) - sys.stdlib_module_names <= {"torch", "numpy"}


def folder(module: str) -> str:
    """The folder within a room that a module is in; of one in the room itself, its own name."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else module


@pytest.mark.parametrize("place", [str, folder], ids=["files", "folders"])
def test_imports_go_one_way_within_a_room(place: Callable[[str], str]) -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        # A room's `__init__` only names what is in it.
        if path.name != "__init__.py":
            name = place(module_name(path))
            graph.setdefault(name, set()).update({place(each) for each in imported_modules(path)} - {name, ""})
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_says_first_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "no docstring"


@pytest.mark.parametrize("room", ORDER[ORDER.index("adapter_file") : ORDER.index("peft")])
def test_what_the_method_for_peft_imports_imports_peft_first(room: str) -> None:
    # Whose import brings the method, which would find the room half imported.
    first = next(node for node in ast.parse((SOURCE / room / "__init__.py").read_text()).body if _is_import(node))
    assert isinstance(first, ast.Import)
    assert first.names[0].name == "peft"


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def test_every_public_name_exists_and_is_documented() -> None:
    for name in dvora.__all__:
        assert getattr(dvora, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        dvora.no_such_name  # noqa: B018


def test_contributing_maps_every_room() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(SOURCE).as_posix() for path in FILES} - {"."}
    missing = {folder for folder in folders if f"{folder}/" not in contributing}
    assert not missing, missing


def test_no_code_names_what_a_machine_may_have_installed() -> None:
    # What a package of Debian brings is fetched, see materials/fetch.py; a program is looked for in PATH.
    installed = re.compile(r"""["']/(usr|etc|opt|var)/""")
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    naming = [str(file) for file in files if installed.search(file.read_text(encoding="utf-8"))]
    assert files
    assert not naming, naming
