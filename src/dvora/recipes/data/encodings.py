"""Files of text, whatever their encoding and line ends, read in constant memory."""

import codecs
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

Note = Callable[[str], None]
CHUNK = 2**20
MARK = "\ufeff"


@contextmanager
def opened_text(path: Path, encoding: str | None, note: Note) -> Iterator[TextIO]:
    r"""A text file to read, its line ends as "\n" and without a byte order mark.

    Args:
        path: of the file, which is read once before it is opened to find its encoding.
        encoding: None: UTF-8, or that of its byte order mark, and windows-1252 for what is not UTF-8.
        note: called with what had to be assumed.

    Raises:
        ValueError: it is empty, no text, or not in the encoding.
        OSError: it cannot be read.
    """
    with path.open(encoding=_encoding_of(path, encoding, note)) as file:
        if file.read(1) != MARK:
            file.seek(0)
        yield file


def stream_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
    """The lines of UTF-8 text that cannot be read twice, each with its place, as soon as they are there.

    Raises:
        ValueError: a line is not UTF-8.
    """
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{name}, line {number}: not UTF-8") from None
        yield f"{name}, line {number}", (text.removeprefix(MARK) if number == 1 else text).rstrip("\r\n")


def _encoding_of(path: Path, encoding: str | None, note: Note) -> str:
    if encoding is not None:
        try:
            # Some codecs are known but not of text, and two are of names: their time grows with the square of a file.
            "".encode(encoding)
            if codecs.lookup(encoding).name in ("idna", "punycode"):
                raise LookupError
        except LookupError:
            raise ValueError(
                f"encoding {encoding!r} is unknown; `utf-8`, `latin-1` and `cp1252` are common ones"
            ) from None
    with path.open("rb") as file:
        marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    name = encoding or ("utf-16" if marked else "utf-8-sig")
    line = _first_undecodable(path, name)
    if line is None:
        return name
    if encoding or marked:
        raise ValueError(f"{path}, line {line}: not {name}")
    name = "cp1252" if _first_undecodable(path, "cp1252") is None else "latin-1"
    common = {"cp1252": "windows-1252"}.get(name, name)
    note(f"{path.name} is not UTF-8 (line {line}): read as {common}; set `encoding` if it is another")
    return name


def _first_undecodable(path: Path, encoding: str) -> int | None:
    """The first line that is not in an encoding, None if all are.

    Raises:
        ValueError: there is nothing but spaces, or a zero byte.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    line, blank = 1, True
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].count(b"\n")
            if "\0" in text:
                zero = line + text[: text.index("\0")].count("\n")
                raise ValueError(f"{path} is no text: it has a zero byte in line {zero}")
            line += text.count("\n")
            blank = blank and not text.strip(MARK).strip()
            if not chunk:
                break
    if blank:
        raise ValueError(f"{path} is empty")
    return None
