"""Damaged adapter folders: one fixed list of named edits, made from a sound folder and a seed."""

import json
import pickle
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from safetensors.torch import load_file, save

from tests.tuner.state.adapter_files import CONFIG, WEIGHTS, edit_config
from tests.tuner.state.edits import Mutation, flipped, rewrite
from tests.tuner.state.mutated_weights import mutated_bytes, mutated_headers, mutated_tensors

PICKLE = "adapter_model.bin"
MARKER = "code-from-the-file-ran"
"""Left in the folder by the malicious pickles, if anything runs them."""

VALUES: tuple[object, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**64, -(2**70), 10**400),
    *(0.5, -0.0, 6.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "6", "(", "[", "*", "\0", "\ud800", "é" * 3000, "all-linear", "all", "unit", "CAUSAL_LM"),
    *([], [None], [[]], [6], ["("], ["x"], ["", ""], [10**400], [1.5, "x"]),
    *({}, {"": 1}, {"(": 5}, {"lin0": 2**31}, {"lin0": -1}, {"x": None}, {"x": [1.0]}, {"x": {"y": {}}}),
    *({"lin0": [10**400] * 9}, {"lin0": [float("nan")] * 9}, {"lin0": 10**400}, {"lin0": []}),
)
TEXTS = ("", " ", "{", "}", "{}", "[]", "[{}]", '["peft_type"]', "null", "3", '"x"', '"peft_type"', "NaN")
DEEP = ("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000)
ENCODINGS = ("utf-16", "utf-32", "utf-8-sig", "utf-16-le", "cp500")


class Malice:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return Path.write_text, (self.marker, "")


def mutations(sound: Path, seed: int = 0) -> list[Mutation]:
    """All edits of a sound folder, in an order in which every beginning of the list holds all families."""
    families = (mutated_bytes, mutated_headers, mutated_tensors, _values, _settings, _texts, _files)
    placed: list[tuple[float, int, Mutation]] = []
    for number, family in enumerate(families):
        rng = random.Random(f"{seed} {family.__name__}")
        edits = list(family(sound, rng))
        rng.shuffle(edits)
        # Positions in [0, 1) interleave families of different lengths evenly.
        placed.extend((place / len(edits), number, edit) for place, edit in enumerate(edits))
    return [edit for _, _, edit in sorted(placed, key=lambda entry: entry[:2])]


def _values(sound: Path, _: random.Random) -> Iterator[Mutation]:
    """Settings replaced by values of other types and sizes."""
    for key in json.loads((sound / CONFIG).read_text()):
        for value in VALUES:
            yield Mutation("values", f"{key} = {value!r:.40}", partial(edit_config, **{key: value}))


def _settings(sound: Path, rng: random.Random) -> Iterator[Mutation]:
    """Settings dropped, renamed, added, given twice."""
    text = (sound / CONFIG).read_text().strip()
    config = json.loads(text)

    def mutation(name: str, new: str) -> Mutation:
        return Mutation("settings", f"setting {name}", lambda folder: (folder / CONFIG).write_text(new))

    for key, value in config.items():
        rest = {k: v for k, v in config.items() if k != key}
        yield mutation(f"{key} dropped", json.dumps(rest))
        new = rng.choice([key.upper(), f"{key} ", key[::-1], f"_{key}", "self", "cls", "kwargs", ""])
        yield mutation(f"{key} renamed {new!r}", json.dumps({**rest, new: value}))
        odd = json.dumps(rng.choice(VALUES))
        yield mutation(f"{key} twice, first {odd:.40}", f"{{{json.dumps(key)}: {odd}, {text[1:]}")
        yield mutation(f"{key} twice, last {odd:.40}", f"{text[:-1]}, {json.dumps(key)}: {odd}}}")
    for task in TaskType:
        yield mutation(f"task_type = {task.value!r}", json.dumps({**config, "task_type": task.value}))
    for key in ("self", "cls", "kwargs", "__class__", "runtime_config", "lora_alpha", "config", "check", "to_dict"):
        yield mutation(f"{key} added", json.dumps({**config, key: rng.choice(VALUES)}))


def _texts(sound: Path, rng: random.Random) -> Iterator[Mutation]:
    """The configuration's text, without regard for what it means."""
    data = (sound / CONFIG).read_bytes()

    def mutation(name: str, change: Callable[[bytes], bytes]) -> Mutation:
        return Mutation("texts", f"configuration's {name}", partial(rewrite, name=CONFIG, change=change))

    for new in (*TEXTS, *DEEP):
        yield mutation(f"text = {new!r:.40}", lambda _, n=new: n.encode())
    for new in (bytes(range(256)), bytes(500)):
        yield mutation(f"bytes = {new!r:.40}", lambda _, n=new: n)
    for encoding in ENCODINGS:
        yield mutation(f"encoding = {encoding}", lambda d, e=encoding: d.decode().encode(e))
    for bit in rng.sample(range(8 * len(data)), 100):
        yield mutation(f"bit {bit}", partial(flipped, bit=bit))
    for length in rng.sample(range(len(data)), 15):
        yield mutation(f"first {length} bytes only", lambda d, n=length: d[:n])
    for name, more in {"a brace": b"}", "zeros": bytes(9), "itself": data, "spaces": b" \n" * 9}.items():
        yield mutation(f"end with {name}", lambda d, m=more: d + m)
    yield mutation("alpha of 5000 digits", lambda d: d.rstrip()[:-1] + b', "alpha": ' + b"9" * 5000 + b"}")


def _files(sound: Path, rng: random.Random) -> Iterator[Mutation]:
    """Files missing, of another kind, or beside others."""
    tensors, noise = load_file(sound / WEIGHTS), rng.randbytes(300)
    contents: dict[str, Callable[[Path], bytes]] = {
        "a malicious pickle": lambda folder: pickle.dumps(Malice(folder / MARKER)),
        "malice in a pickled dictionary": lambda folder: pickle.dumps({"x": Malice(folder / MARKER)}),
        "malice in a torch file": lambda folder: _torch_saved(folder, {**tensors, "x": Malice(folder / MARKER)}),
        "the tensors in a torch file": lambda folder: _torch_saved(folder, tensors),
        "a list in a torch file": lambda folder: _torch_saved(folder, [1, 2]),
        "numbers in a torch file": lambda folder: _torch_saved(folder, dict.fromkeys(tensors, 1.5)),
        "nothing": lambda _: b"",
        "random bytes": lambda _: noise,
        "the tensors": lambda _: save(tensors),
    }

    def mutation(name: str, *edits: Callable[[Path], object]) -> Mutation:
        return Mutation("files", name, lambda folder: [edit(folder) for edit in edits])

    for name, content in contents.items():
        yield mutation(f"{PICKLE}: {name}, beside the weights", partial(_write, name=PICKLE, content=content))
        yield mutation(
            f"{PICKLE}: {name}, no {WEIGHTS}",
            partial(_write, name=PICKLE, content=content),
            partial(_remove, name=WEIGHTS),
        )
        yield mutation(f"{WEIGHTS}: {name}", partial(_write, name=WEIGHTS, content=content))
        yield mutation(f"{CONFIG}: {name}", partial(_write, name=CONFIG, content=content))
    for name in (WEIGHTS, CONFIG, "README.md"):
        remove = partial(_remove, name=name)
        yield mutation(f"{name}: missing", remove)
        yield mutation(f"{name}: a folder", remove, lambda folder, n=name: (folder / n).mkdir())
        yield mutation(f"{name}: a link to nothing", remove, lambda f, n=name: (f / n).symlink_to(f / "nothing"))
        yield mutation(f"{name}: a link to itself", remove, lambda f, n=name: (f / n).symlink_to(f / n))
    yield mutation("no file at all", *(partial(_remove, name=name) for name in (WEIGHTS, CONFIG, "README.md")))
    yield mutation("another model card", lambda folder: (folder / "README.md").write_text("base_model: other\n"))
    yield mutation(f"{CONFIG} of {WEIGHTS}", lambda f: (f / CONFIG).write_bytes((f / WEIGHTS).read_bytes()))
    yield mutation(f"{WEIGHTS} of {CONFIG}", lambda f: (f / WEIGHTS).write_bytes((f / CONFIG).read_bytes()))


def _write(folder: Path, name: str, content: Callable[[Path], bytes]) -> None:
    (folder / name).write_bytes(content(folder))


def _remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _torch_saved(folder: Path, value: object) -> bytes:
    file = folder / "saved"
    torch.save(value, file)
    return (file.read_bytes(), file.unlink())[0]
