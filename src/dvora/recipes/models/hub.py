"""Models that are not local: what may be fetched, whether the hub can be reached, and errors in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import constants

from ..files import check_no_device
from ..settings import Trust

SECONDS = 10.0
ALWAYS_OFFLINE = constants.HF_HUB_OFFLINE
"""Whether the user set the variable of this name."""


@contextmanager
def offline(wanted: bool = True) -> Iterator[None]:
    """Keep libraries from asking the hub, some at their import; within a block of it, `wanted=False` lets them."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = ALWAYS_OFFLINE or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@cache
def _check_reachable(name: str) -> None:
    """Check that the hub can be reached, once for a name: its client would retry for minutes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=SECONDS)
    except (HfHubHTTPError, ValueError):
        # It answered, or the name is none.
        return
    except Exception as error:  # of the HTTP client, which is another one in other versions
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name!r} is no folder here, and the hub cannot be reached ({message}); give a folder, or set "
            "HF_HUB_OFFLINE=1 if the model was fetched before"
        ) from error


@contextmanager
def loading(what: str, source: str, trust: Trust) -> Iterator[None]:
    """Load `what` from a folder or the hub with transformers, and turn its long errors into a sentence.

    Raises:
        ValueError: it cannot be loaded, or its folder has a pipe or a device, which transformers would wait for.
    """
    from safetensors import SafetensorError

    is_here = Path(source).exists()
    for path in Path(source).iterdir() if Path(source).is_dir() else ():
        check_no_device(path)
    wanted = trust.download and not is_here
    with offline(not wanted):
        if wanted and not ALWAYS_OFFLINE:
            _check_reachable(source)
    try:
        with offline(not wanted):
            yield
    except SafetensorError as error:
        raise ValueError(f"the weights of {source} are damaged ({error}); copy or download them again") from error
    except PermissionError:
        raise
    except RecursionError as error:
        raise ValueError(f"{what} in {source} cannot be read: a file is nested too deeply") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            message = (
                "it is made of code that comes with it, which is not run; if you trust its author, dvora train, "
                "evaluate, predict, generate, report and doctor run it with --trust-remote-code"
            )
        if is_here:
            raise ValueError(f"{what} in {source} cannot be read: {message}") from error
        if not trust.download:
            raise ValueError(
                f"{what} {source!r} is no folder here and not in the hub's cache, and what only a file names is not "
                "downloaded; give --download, or its name with --model, whichever this command takes"
            ) from error
        raise ValueError(f"{what} {source!r} is no folder here, and the hub did not give it: {message}") from error
