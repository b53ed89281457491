"""What a user typed, and what is in a user's files."""

from pathlib import Path

from dvora.recipes.files import typed
from dvora.whole_files import write_atomically


def test_a_link_stays_a_link_where_somebody_typed_its_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(typed(tmp_path / "link"), b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"content"
