"""A merged adapter in llama.cpp answers as in PyTorch: the page's commands, by `make gguf`."""

from pathlib import Path

import pytest

from materials.files import lay_out

pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed; `make gguf` runs this")

from benchmarks.llama_cpp import in_llama_cpp, in_pytorch, run_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands ran."""
    folder = tmp_path_factory.mktemp("page")
    lay_out(folder)
    run_page(folder)
    return folder


@pytest.mark.parametrize("file", ["play.gguf", "play-f16.gguf"])
def test_greedy_answers_are_those_of_the_merged_model(folder: Path, file: str) -> None:
    assert in_llama_cpp(folder / file) == in_pytorch(folder / "merged")


def test_the_adapter_is_in_the_answers(folder: Path) -> None:
    assert in_llama_cpp(folder / "play.gguf") != in_pytorch(folder / "smollm2")
