"""The rules of the house: which way imports go, what is public, what the documentation says of it."""

import ast
import re
import sys
from pathlib import Path

import pytest

import dvora

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "dvora"
README = (ROOT / "README.md").read_text(encoding="utf-8")

# A module may import from those above it only.
ORDER = [
    "shapes",
    "imported",
    "precision",
    "transforms",
    "devices",
    "scratch",
    "wide",
    "sums",
    "generator",
    "spans",
    "triton_kernels.combine",
    "triton_kernels.kronecker",
    "triton_kernels",
    "scaled_product",
    "dense_rows",
    "dense_store",
    "dense",
    "vera_matrices",
    "kronecker",
    "structured_rows",
    "structured",
    "siblings",
    "projections",
    "row_change",
    "functional",
    "norms",
    "small_rows",
    "kernels.combine",
    "kernels.gain",
    "kernels.updated",
    "kernels",
    "routes",
    "layouts",
    "validation",
    "evaluated",
    "last_input",
    "measured",
    "parts",
    "adapted_weight",
    "diagnostics",
    "linear_outputs",
    "combining",
    "merging",
    "shared",
    "adapter",
    "tuner.expressions",
    "tuner.vectors",
    "tuner.operations",
    "tuner.kinds",
    "tuner.operating_weight",
    "tuner.base",
    "tuner.restoring",
    "tuner.merges",
    "tuner.mergeable",
    "tuner.rows",
    "tuner.outputs",
    "tuner.layer",
    "tuner.parameters",
    "tuner.files",
    "tuner.config_checks",
    "tuner.config",
    "tuner.targets",
    "tuner.base_probes",
    "tuner.injection",
    "tuner.checks",
    "tuner.combining",
    "tuner.merging",
    "tuner.mixed_batch",
    "tuner.loading",
    "tuner.saving",
    "tuner.hotswap",
    "tuner.model",
    "tuner.converted",
    "tuner.to_dense",
    "tuner.to_dora",
    "tuner.from_vera",
    "tuner.registration",
    "tuner",
    "training",
    "ranks",
    "peft_hook",
    "",
    "rebuilt",
    "doctor.findings",
    "doctor.watched",
    "doctor.layer_checks",
    "doctor.model_checks",
    "doctor.training_checks",
    "doctor.round_trip",
    "doctor",
    "pages",
    "pages.cells",
    "pages.pictures",
    "pages.page",
    "analysis.measures",
    "analysis",
    "analysis.pictures",
    "analysis.page",
    "recipes.files",
    "recipes.hub",
    "recipes.nearest",
    "recipes.settings",
    "recipes.bases",
    "recipes.run_folder",
    "recipes.encodings",
    "recipes.tables",
    "recipes.columns",
    "recipes.labels",
    "recipes.splits",
    "recipes.images",
    "recipes.examples",
    "recipes.data",
    "recipes.metrics",
    "recipes.chats",
    "recipes.tasks",
    "recipes.computing",
    "recipes.evaluation",
    "recipes.methods",
    "recipes.processes",
    "recipes.records",
    "recipes.checkpoints",
    "recipes.watching",
    "recipes.trainers",
    "recipes.training",
    "recipes.architectures",
    "recipes.adapters",
    "recipes.inputs",
    "recipes.inspection",
    "recipes.counting",
    "recipes.conversion",
    "recipes.merging",
    "recipes.speed",
    "recipes.other_files",
    "recipes.judging",
    "recipes.inputs_to_predict",
    "recipes.prediction",
    "recipes.row_files",
    "recipes.generation",
    "recipes.examining",
    "recipes.analyzing",
    "recipes.outcomes",
    "recipes.run_pictures",
    "recipes.run_page",
    "recipes",
    "cli.streams",
    "cli.errors",
    "cli.output",
    "cli.progress",
    "cli.train",
    "cli.doctor",
    "cli.analyze",
    "cli.report",
    "cli.inspect",
    "cli.count",
    "cli.merge",
    "cli.convert",
    "cli.bench",
    "cli.evaluate",
    "cli.predict",
    "cli.generate",
    "cli.app",
    "cli.__main__",
    "cli",
]
FILES = sorted(SOURCE.rglob("*.py"))
NEED_PEFT = {"tuner", "rebuilt.py", "doctor", "pages", "analysis", "recipes", "cli"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(path: Path) -> set[str]:
    """Names, relative to the package, of the modules that a file imports anywhere in it."""
    package = path.relative_to(SOURCE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            base = [*start, *(node.module.split(".") if node.module else [])]
            if node.module:
                found.add(".".join(base))
            else:
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def top_level_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    return names


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(map(module_name, FILES)) == sorted(ORDER)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way_only(path: Path) -> None:
    place = ORDER.index(module_name(path))
    later = {name for name in imported_modules(path) if name in ORDER and ORDER.index(name) >= place}
    assert not later, f"{module_name(path)} imports {later}, which come after it"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if not {"tuner", "rebuilt.py", "doctor", "pages", "analysis", "recipes", "cli"} & {*p.parts}],
    ids=module_name,
)
def test_the_plain_layer_needs_torch_and_numpy_only(path: Path) -> None:
    allowed = {"numpy", "torch", *sys.stdlib_module_names}
    assert top_level_imports(path) <= (allowed | {"triton"} if path.parent.name == "triton_kernels" else allowed)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_has_one_purpose_said_first_and_is_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= 400


def test_public_names_are_those_of_the_readme() -> None:
    table = README.partition("## Public names")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `dvora\.(\w+)`", table, flags=re.MULTILINE)) == sorted(dvora.__all__)


def test_every_public_name_exists_and_is_documented() -> None:
    for name in dvora.__all__:
        assert getattr(dvora, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        dvora.no_such_name  # noqa: B018


def test_the_readme_maps_every_source_file() -> None:
    table = README.partition("## Map")[2].partition("\n## ")[0]
    mapped = set(re.findall(r"^ *(?:src/dvora/)?([\w/]+\.py) ", table, flags=re.MULTILINE))
    files = {path.relative_to(SOURCE).as_posix() for path in FILES}
    assert files <= mapped, files - mapped
