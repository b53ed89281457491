"""Models that are not there: whether the hub can be reached, asked once (its client asks for minutes); what to say."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from .files import check_readable

SECONDS = 10.0


def check_reachable(source: str) -> None:
    """Make sure that a name on the hub can be asked for there; what the hub says is told by those who load from it.

    Args:
        source: a folder, or the name of a model on the hub.

    Raises:
        ValueError: it is no folder, and the hub does not answer.
    """
    if not Path(source).exists() and not constants.HF_HUB_OFFLINE:
        _ask(source)


@cache
def _ask(name: str) -> None:
    try:
        HfApi().model_info(name, timeout=SECONDS)
    except (HfHubHTTPError, ValueError):
        # It answered, or the name is none.
        return
    except Exception as error:  # of the HTTP client, which is another one in other versions
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name!r} is no folder here, and the hub cannot be reached ({told}); give a folder, or set "
            "HF_HUB_OFFLINE=1 if the model was fetched before"
        ) from error


def check_weights(source: str) -> None:
    """Refuse a folder whose weights are pickled or may not be read; a name on the hub is not looked at.

    Raises:
        OSError: a file may not be read.
        ValueError: there are no safetensors.
    """
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{source} holds no safetensors weights; pickled ones (*.bin) are never loaded: save the model once with "
            "save_pretrained"
        )
    check_readable(folder.glob("*.safetensors"))


@contextmanager
def told_in_one_line(what: str, source: str, own_code: str) -> Iterator[None]:
    """Turn the pages that transformers writes when something is missing into a sentence.

    Args:
        what: is loaded, for the message.
        source: a folder, or a name on the hub.
        own_code: what to say of a model that is made of code of its own.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights of {source} are damaged ({error}); copy or download them again") from error
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            said = f"it is made of code that comes with it{own_code}"
        if Path(source).exists():
            raise ValueError(f"{what} in {source} cannot be read: {said}") from error
        raise ValueError(f"{what} {source!r} is no folder here, and the hub did not give it: {said}") from error
