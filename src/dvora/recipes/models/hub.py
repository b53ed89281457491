"""Models that are not local: what may be fetched, whether the hub can be reached, and errors in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import constants

from ...text import did_you_mean, nearest
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


def check_model(source: str, trust: Trust) -> None:
    """Check that there is a model, before the libraries are imported that read it.

    Args:
        source: a folder, or a name on the hub, which is asked if that is allowed.
        trust: whether it is.

    Raises:
        ValueError: it is no model's folder, or a name that neither the hub nor its cache knows.
    """
    from huggingface_hub import try_to_load_from_cache

    check_model_folder(source)
    if not _asked_for(source, trust) and not Path(source).exists():
        try:
            is_cached = isinstance(try_to_load_from_cache(source, "config.json"), str)
        except ValueError:
            is_cached = False
        if not is_cached:
            raise ValueError(
                f"the model {source!r} is no folder here{_near(source)} and not in the hub's cache, and nothing may be "
                "downloaded; give --download, or its name with --model, whichever this command takes, or unset "
                "HF_HUB_OFFLINE"
            )


def _asked_for(source: str, trust: Trust) -> bool:
    """Whether a model is to be fetched, and then that the hub has it."""
    if Path(source).exists() or not trust.download or ALWAYS_OFFLINE:
        return False
    with offline(False):
        _check_on_hub(source)
    return True


def _near(source: str) -> str:
    """The model's folder whose name is like that of a missing one, for an error."""
    here = [path.parent.name for path in Path(source).absolute().parent.glob("*/config.json")]
    return f" ({did_you_mean(Path(source).name, here)})" if nearest(Path(source).name, here) else ""


@cache
def _check_on_hub(name: str) -> None:
    """Ask the hub for a name, once: its client would retry for minutes where nothing answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    near = _near(name)
    try:
        HfApi().model_info(name, timeout=SECONDS)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(f"{name!r} is no folder here, and no model on the hub{near}") from error
    except (HfHubHTTPError, ValueError):
        # It answered.
        return
    except Exception as error:  # of the HTTP client, which is another one in other versions
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name!r} is no folder here{near}, and the hub cannot be reached ({message}); give a folder, or set "
            "HF_HUB_OFFLINE=1 if the model was fetched before"
        ) from error


def check_model_folder(source: str) -> None:
    """Check that a model that is no name on the hub is a folder with a model's configuration.

    Raises:
        ValueError: it is a file, or a folder of something else, or of more than a model.
    """
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file; a model is a folder with config.json and safetensors weights")
    if not folder.is_dir():
        return
    has_adapter = (folder / "adapter_config.json").exists()
    if not (folder / "config.json").exists():
        if has_adapter:
            raise ValueError(f"{source} holds an adapter, not a model; name its base")
        raise ValueError(f"{source} holds no config.json, so it is no model folder")
    if has_adapter:
        # transformers would load another base, which the adapter names, in place of the model beside it.
        raise ValueError(f"{source} holds an adapter beside the model; a model's folder has to be without one")


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
    _asked_for(source, trust)
    try:
        with offline(is_here or not trust.download):
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
