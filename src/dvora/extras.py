"""Which of dvora's extras brings a package that is missing, and how to install it."""

_BROUGHT = {
    "peft": ("accelerate", "peft", "transformers"),
    "cli": ("datasets", "filelock", "PIL", "pydantic", "rich", "typer", "yaml"),
    "report": ("jinja2", "matplotlib"),
    "triton": ("triton",),
}
"""Of each extra, the modules that are imported from what it installs."""


def how_to_install(extra: str) -> str:
    """What to do to have an extra, as the end of an error."""
    return f"install dvora's extra {extra!r}: pip install '.[{extra}]' in a clone of its repository"


def missing(error: ImportError) -> str | None:
    """What to install for a module that was not found; None if it comes with none of the extras."""
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in _BROUGHT.items() if module in modules), None)
    return None if extra is None else f"{module} is missing; {how_to_install(extra)}"
