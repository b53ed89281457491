"""PEFT's repository at one commit, unchanged, on a branch of the name that its scripts ask for."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "build" / "yardstick" / "peft"
URL = os.environ.get("PEFT_URL") or "https://github.com/huggingface/peft"
COMMIT = os.environ.get("PEFT_COMMIT") or "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"
"""Of the branch main, 21 August 2026. The scripts are in the repository only, in no package; a tag could be moved."""
BRANCH = "main"
"""PEFT's scripts keep rows of this branch, and take those of others for trials."""


class CheckoutError(RuntimeError):
    """The repository could not be had, or is not as it was; the message says what to do."""


def checked_out(folder: Path = FOLDER, url: str = URL, commit: str = COMMIT) -> Path:
    """The folder with PEFT's files at the commit; fetches them on the first call only.

    Args:
        folder: where they are, or will be.
        url: of the repository, for git.
        commit: its full hash, which git checks the files against.

    Returns:
        The folder.

    Raises:
        CheckoutError: the hash is not a full one, git failed, or files were changed.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise CheckoutError(f"PEFT_COMMIT={commit!r} is no full hash of a commit, 40 hexadecimal digits: look it up")
    if not (folder / ".git").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _git(folder, "init", "--quiet")
    if _git(folder, "rev-parse", "--quiet", "--verify", "HEAD", check=False) != commit:
        _git(folder, "fetch", "--quiet", "--depth", "1", url, commit)
        _git(folder, "checkout", "--quiet", "-B", BRANCH, commit)
    check_unchanged(folder, commit)
    return folder


def check_unchanged(folder: Path = FOLDER, commit: str = COMMIT) -> None:
    """Check that the folder has the commit's files, on the right branch; files of other names may lie among them.

    Raises:
        CheckoutError: a file differs, or another commit or branch is checked out.
    """
    remedy = f"delete {folder} and start again: it is fetched anew"
    found = _git(folder, "rev-parse", "HEAD")
    if found != commit:
        raise CheckoutError(f"{folder} has the commit {found}, expected {commit}; {remedy}")
    branch = _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    if branch != BRANCH:
        raise CheckoutError(f"{folder} is on the branch {branch!r}, expected {BRANCH!r}; {remedy}")
    # Looks into every file, also into those whose time and size are as they were.
    _git(folder, "update-index", "--quiet", "--really-refresh", check=False)
    if changed := _git(folder, "status", "--porcelain", "--untracked-files=no"):
        first = changed.splitlines()[0].split(maxsplit=1)[1]
        raise CheckoutError(f"{folder} is not as PEFT has it: {first} was changed; {remedy}")


def _git(folder: Path, *arguments: str, check: bool = True) -> str:
    """What git prints.

    Raises:
        CheckoutError: git is missing, or failed and `check` is set.
    """
    try:
        ended = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CheckoutError("git is missing: install it, for PEFT's scripts are fetched with it and ask it") from error
    if check and ended.returncode != 0:
        said = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
        raise CheckoutError(
            f"git {arguments[0]} failed in {folder}. It said: {said}\n"
            "Check the network, and PEFT_URL and PEFT_COMMIT if they are set, then run this again"
        )
    return ended.stdout.strip()
