"""What loading an adapter folder did: it gave the values of the files, or it refused and changed nothing."""

import json
import re
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import peft
import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import dvora
from dvora import DVoRAConfig
from dvora.tuner import DVoRALayer
from tests.tuner.state.adapter_files import CONFIG, WEIGHTS
from tests.tuner.state.folder_cases import OWN, Case, Sound, adapted_outputs, with_own_adapter
from tests.tuner.state.mutations import MARKER, PICKLE
from tests.tuner.tiny import same_bits

TIME_LIMIT = 4.0
"""Seconds of the processor that a load may take: no setting may make it endless."""

SETTINGS = tuple(field.name for field in fields(DVoRAConfig))
_NAMED = (*SETTINGS, WEIGHTS, CONFIG, PICKLE, "rank", "seed", "distribution", "task type", "header", "adapter's file")
SUBJECTS = re.compile(rf"\b({'|'.join(name for name in _NAMED if name != 'r')})\b|dvora_|lambda_|base_model\.")
"""One of these, or the folder, is in every refusal: a file, a setting or a tensor."""

CLEAR = (ValueError, TypeError, FileNotFoundError, SafetensorError)

FILLED_IN = ("inference_mode", "peft_type", "peft_version", "base_probes", "projection_fingerprint", "target_modules")
"""Settings that loading completes where the file has none."""


class PeftAlone(NamedTuple):
    """A refusal in PEFT's words, given where no code of dvora runs."""

    error: type[Exception]
    function: str
    """The innermost one of PEFT."""
    message: str
    reason: str


_EARLY = f"PEFT reads {CONFIG} for its peft_type before it knows whose configuration it is"
_TASK = "PEFT's model class of the task asks the base for what it lacks, after the adapter is complete"
_HEAD = "PEFT looks up the values of modules_to_save before it hands the file's to the tuner"
_LATE = "PEFT looks for the file of values, on the hub at last, after the adapter is complete"

PEFT_ALONE = (
    PeftAlone(HFValidationError, "load_peft_weights", "^Repo id must be in the form", _LATE),
    PeftAlone(json.JSONDecodeError, "from_json_file", r"line \d+ column \d+", _EARLY),
    PeftAlone(UnicodeDecodeError, "from_json_file", "^'utf-8' codec can't decode", _EARLY),
    PeftAlone(RecursionError, "from_json_file", "while decoding a JSON", _EARLY),
    PeftAlone(ValueError, "from_json_file", "^Exceeds the limit .* for integer string conversion", _EARLY),
    PeftAlone(TypeError, "from_json_file", "is not iterable$", _EARLY),
    PeftAlone(TypeError, "_get_peft_type", "indices must be integers", _EARLY),
    PeftAlone(KeyError, "_get_peft_type", "^'peft_type'$", _EARLY),
    PeftAlone(KeyError, "from_pretrained", "", _EARLY),
    PeftAlone(KeyError, "load_adapter", "", _EARLY),
    PeftAlone(TypeError, "from_pretrained", "^unhashable type", _EARLY),
    PeftAlone(TypeError, "load_adapter", "^unhashable type", _EARLY),
    PeftAlone(KeyError, "set_peft_model_state_dict", r"^'base_model\.model\.", _HEAD),
    PeftAlone(AttributeError, "__getattr__", "no attribute 'prepare_inputs_for_generation'$", _TASK),
)
"""LoRA's folders give the same."""


class Outcome(NamedTuple):
    """How a load ended, for counting, and what about it breaks the rule."""

    kind: str
    problems: tuple[str, ...] = ()


def outcome(sound: Sound, folder: Path, *, beside: bool) -> Outcome:
    """Load a folder, onto a fresh base or `beside` another adapter, and check what happened."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            kind, problems = _load(sound, folder, beside, caught)
        except Exception as error:
            kind, problems = "crashed after loading", [f"neither loaded nor as before: {error!r:.300}"]
    if (folder / MARKER).exists():
        problems.append("code from the file was run")
    return Outcome(kind, tuple(problems))


def _load(sound: Sound, folder: Path, beside: bool, caught: list[warnings.WarningMessage]) -> tuple[str, list[str]]:
    model = with_own_adapter(sound.case) if beside else None
    base = model.get_base_model() if model else sound.case.base()
    before = _Before.of(base, model)
    caught.clear()
    try:
        with _time_limit():
            if model:
                model.load_adapter(str(folder), "loaded")
            loaded = model or PeftModel.from_pretrained(base, str(folder))
    except Exception as error:
        kind, problems = _refusal(error, folder)
        if not kind.startswith("PEFT's"):
            problems += _remains(base, model)
        return kind, problems + before.changes(base, model, active=False)
    said = " ".join(str(warning.message) for warning in caught)
    return _check_loaded(sound, folder, loaded, "loaded" if beside else "default", before, said)


def _remains(base: nn.Module, model: PeftModel | None) -> list[str]:
    """What a refused load has left of its adapter."""
    if model:
        return [f"the adapter {name!r} has been left" for name in model.peft_config if name != OWN]
    return [f"{name} has been left wrapped" for name, layer in base.named_modules() if isinstance(layer, DVoRALayer)][
        :1
    ]


def _check_loaded(
    sound: Sound, folder: Path, model: PeftModel, name: str, before: "_Before", said: str
) -> tuple[str, list[str]]:
    """Of a load that succeeded."""
    state = get_peft_model_state_dict(model, adapter_name=name)
    trains_biases = model.peft_config[name].bias != "none"
    biases = {_plain(key) for key in state if trains_biases and key.endswith(".bias")}
    beside = model if before.own else None
    problems = before.changes(model.get_base_model(), beside, active=not beside, but=biases)
    model.set_adapter(name)
    found = adapted_outputs(model)
    same = state.keys() == sound.state.keys() and all(same_bits(v, sound.state[k]) for k, v in state.items())
    if same and same_bits(found, sound.outputs):
        return "same", problems
    written = json.loads((folder / CONFIG).read_text())
    unknown = [key for key in written if key not in SETTINGS and key not in said]
    problems += [f"setting {key!r} is ignored in silence" for key in unknown]
    problems += _unlike_settings(written, model.peft_config[name].to_dict())
    problems += _unlike_values(sound.case, folder, written, state, found)
    return "other", problems


def _unlike_settings(written: dict[str, object], held: dict[str, object]) -> Iterator[str]:
    defaults = DVoRAConfig().to_dict()
    for key, value in held.items():
        expected = written.get(key, defaults[key])
        if isinstance(expected, list) and key != "layers_to_transform":
            expected, value = (sorted(set(v)) if isinstance(v, list) else v for v in (expected, value))
        if key not in FILLED_IN and json.dumps(expected, sort_keys=True) != json.dumps(value, sort_keys=True):
            yield f"{key} is {expected!r} in the file and {value!r} in the model"


def _unlike_values(
    case: Case, folder: Path, written: dict[str, object], state: dict[str, Tensor], found: Tensor
) -> Iterator[str]:
    """Compared with a model into which the tensors of the file are copied one by one."""
    file = _read_weights(folder)
    for key, value in state.items():
        if "projections" in key and key not in file:
            continue
        if key not in file:
            yield f"{key} is not in the file"
        elif not value.isfinite().all():
            yield f"{key} is not finite"
        elif not (value.shape == file[key].shape and same_bits(value, file[key].to(value.dtype))):
            yield f"{key} is not as in the file"
    yield from (
        f"{key} of the file is ignored in silence" for key in file.keys() - state.keys() if "projections" not in key
    )
    settings = {key: value for key, value in written.items() if key in SETTINGS and key != "inference_mode"}
    # In inference mode settings may be such that nothing could be trained.
    expected = get_peft_model(case.base(), DVoRAConfig(**settings, inference_mode=True)).eval()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if _key(name) in state:
                parameter.copy_(file[_key(name)])
    if not same_bits(adapted_outputs(expected), found):
        yield "the outputs are not those of the values in the file"


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).exists():
        return load_file(folder / WEIGHTS)
    return torch.load(folder / PICKLE, weights_only=True)


def _key(name: str) -> str:
    """In a file, of a parameter of an adapted model."""
    return name.replace(".modules_to_save.default", "").removesuffix(".default")


def _refusal(error: Exception, folder: Path) -> tuple[str, list[str]]:
    """Of an error that ended a load: how to count it, and whether it is not one of the clear ones."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    functions = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    ours = any(Path(dvora.__file__).parent in file.parents for file in files)
    theirs = [name for file, name in zip(files, functions, strict=True) if Path(peft.__file__).parent in file.parents]
    kind = type(error).__name__
    for known in PEFT_ALONE:
        if not ours and (type(error), theirs[-1]) == known[:2] and re.search(known.message, str(error)):
            return f"PEFT's {kind}: {known.reason}", []
    where = "in dvora" if ours else f"in PEFT's {theirs[-1]}"
    if isinstance(error, UnicodeError | json.JSONDecodeError) or not isinstance(error, CLEAR):
        return f"crashed, {kind}", [f"another kind of error, {where}: {error!r:.300}"]
    if not (SUBJECTS.search(str(error)) or str(folder) in str(error)):
        return f"refused, {kind}", [f"names neither file nor setting, {where}: {error!r:.300}"]
    return f"refused, {kind}", []


class _Before(NamedTuple):
    """What a load must leave as it was."""

    values: dict[str, Tensor]
    outputs: Tensor
    own: dict[str, Tensor]

    @classmethod
    def of(cls, base: nn.Module, model: PeftModel | None) -> "_Before":
        return cls(_copied(_base_values(base)), adapted_outputs(base), _copied(_own_values(model)))

    def changes(
        self, base: nn.Module, model: PeftModel | None, *, active: bool, but: set[str] = frozenset()
    ) -> list[str]:
        """What is not as it was, `but` for base values that the loaded adapter trains, and outputs if it is active."""
        values, own = _base_values(base), _own_values(model)
        problems = [
            f"the base's {name} has changed"
            for name, value in self.values.items()
            if name not in but and not (name in values and same_bits(values[name], value))
        ]
        problems += [
            f"the other adapter's {name} has changed"
            for name, value in self.own.items()
            if not (name in own and same_bits(own[name], value))
        ]
        if not (active or same_bits(adapted_outputs(base), self.outputs)):
            problems.append("the outputs have changed")
        if model and model.active_adapters != [OWN]:
            problems.append(f"the active adapters are {model.active_adapters}")
        return problems


def _copied(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def _own_values(model: PeftModel | None) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name=OWN) if model else {}


def _plain(name: str) -> str:
    """The name in the base model that has no adapter."""
    return re.sub(r"\.(base_layer|original_module)\b", "", name.removeprefix("base_model.model."))


def _base_values(base: nn.Module) -> dict[str, Tensor]:
    plain = {_plain(name): value for name, value in base.state_dict().items()}
    return {name: value for name, value in plain.items() if not re.search(r"\.(dvora_|modules_to_save)", name)}


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still loading after {TIME_LIMIT} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
