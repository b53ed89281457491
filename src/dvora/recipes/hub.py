"""Whether the model hub can be reached, asked once: its client asks again for minutes, once for each missing file."""

from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

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
