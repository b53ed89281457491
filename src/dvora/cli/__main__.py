"""Where the program starts: `dvora`, and `python -m dvora.cli` for launchers that start modules, such as torchrun."""

import sys

from ..extras import missing


def main() -> None:
    """Run the program, or say what to install for it."""
    try:
        from .app import main as run
    except ImportError as error:
        if (message := missing(error)) is None:
            raise
        print(f"Error: {message}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
