"""Which of dvora's extras brings a package that is missing, and how to install it."""

_BROUGHT = {
    "peft": ("accelerate", "peft", "transformers"),
    "cli": ("datasets", "PIL", "pydantic", "rich", "scipy", "sklearn", "typer", "yaml"),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "report": ("jinja2", "matplotlib"),
}
"""Of each extra, the modules that are imported from what it installs."""


def how_to_install(extra: str) -> str:
    """What to do to have an extra, as the end of an error."""
    return f"install dvora's extra {extra!r}: pip install '.[{extra}]' in a clone of its repository"


def missing(error: ImportError) -> str | None:
    """What to install for a package that is not there, or is too old; None if it comes with none of the extras."""
    package, _, part = (error.name or "").partition(".")
    extra = next((extra for extra, packages in _BROUGHT.items() if package in packages), None)
    if extra is None:
        return None
    if isinstance(error, ModuleNotFoundError) and not part:
        return f"{package} is missing; {how_to_install(extra)}"
    return f"dvora does not work with the installed {package} ({error}); {how_to_install(extra)}"
