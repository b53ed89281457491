"""Runs the documentation's notebook: python -m transcript.notebook [--record]

A cell that raises ends it with an error. With --record what the cells print is written into the notebook.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def main(arguments: Sequence[str]) -> None:
    """Run every cell in a fresh kernel."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600).execute()
    for cell in notebook.cells:
        # Times differ in every run, and libraries' own messages on stderr would distract the reader.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            print(*(output.get("text", "") for output in cell.outputs), sep="", end="")
    if "--record" in arguments:
        nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main(sys.argv[1:])
