"""Fine-tune MiniLM with DVoRA on movie reviews, in minutes on two cores, and check what the documentation promises.

python -m demo ["a sentence of yours"] [--quick] [--record] [--out FOLDER]
"""

import argparse
import logging
import os
import sys
from pathlib import Path

OUT = Path(__file__).parent / "out"
HOW_LONG = "This takes about three minutes on two cores; the first run fetches a model and data of 86 MB."
HOW_LONG_QUICK = "This takes about a minute on two cores; the first run fetches a model and data of 86 MB."


def main() -> None:
    """Run the demo."""
    options = parse()
    print(HOW_LONG_QUICK if options.quick else HOW_LONG, flush=True)
    # Everything is read from local folders, and users of the demo cannot act on other packages' warnings: PEFT imports
    # all quantisation libraries that are installed.
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    try:
        from demo.run import run
        from materials.fetch import FetchError
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing; `make demo` installs what the demo needs")
    try:
        run(options)
    except FetchError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename or options.out}: {error.strerror or error}; choose another folder with --out")


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="Fine-tune MiniLM with DVoRA on movie reviews.")
    parser.add_argument("sentence", nargs="*", help="what someone said about a movie")
    parser.add_argument("--quick", action="store_true", help="a much shorter run")
    parser.add_argument("--record", action="store_true", help="make this run the one that the README quotes")
    parser.add_argument("--out", type=Path, default=OUT, help="for adapter, metrics and plot (default: demo/out)")
    options = parser.parse_args()
    if options.quick and options.record:
        parser.error("--quick and --record exclude each other: the README quotes a whole run")
    return options


if __name__ == "__main__":
    main()
