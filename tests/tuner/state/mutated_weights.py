"""Damage to the file of an adapter's values: its bytes, its header, its tensors."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tuner.state.adapter_files import WEIGHTS, edit_weights
from tests.tuner.state.edits import Mutation, flipped, rewrite

DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
)
POISONS = (float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, 0.0)
RESHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "as a column": lambda t: t.unsqueeze(-1),
    "as a row": lambda t: t.unsqueeze(0),
    "one longer": lambda t: torch.cat([t, t[:1]]),
    "one shorter": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "as a scalar": lambda t: t.flatten()[0],
    "twice": lambda t: torch.cat([t, t]),
    "in two rows": lambda t: t.reshape(2, -1),
}
FIELDS: dict[str, tuple[object, ...]] = {
    "dtype": (*("F64", "F16", "BF16", "I32", "U32", "BOOL", "F8_E5M2", "F4", "C64", "f32", "F128", ""), None, 5, []),
    "shape": ([], [0], [-1], [2**62, 4], [2**64], [1.5], ["6"], None, "6", [[6]], [3, 2], 6),
    "data_offsets": ([0, 0], [0, 1], [4, 0], [-4, 20], [0, 2**63], [0, 2**64], [8], [], None, [0, 24, 48], [0.0, 24.0]),
}
METADATA = (None, [], {}, 5, "x", {"format": 5}, {"format": "tf"}, {"format": None}, {"x": "é" * 9999})
HEADERS = ("[]", "null", "{}", "5", '"x"', "[" * 9999 + "]" * 9999, '{"a":' * 9999 + "1" + "}" * 9999)


def mutated_bytes(sound: Path, rng: random.Random) -> Iterator[Mutation]:
    """Without regard for what they mean."""
    data = (sound / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")

    def mutation(name: str, change: Callable[[bytes], bytes]) -> Mutation:
        return Mutation("bytes", f"weights' {name}", partial(rewrite, name=WEIGHTS, change=change))

    for bit in range(64):
        yield mutation(f"bit {bit}, in the header's length", partial(flipped, bit=bit))
    for bit in rng.sample(range(64, 8 * start), 120):
        yield mutation(f"bit {bit}, in the header", partial(flipped, bit=bit))
    for position, byte in zip(rng.sample(range(8, start), 40), rng.randbytes(40), strict=True):
        yield mutation(
            f"byte {position}, in the header, = {byte}",
            lambda d, p=position, b=byte: d[:p] + bytes([b]) + d[p + 1 :],
        )
    for bit in rng.sample(range(8 * start, 8 * len(data)), 120):
        yield mutation(f"bit {bit}, in the values", partial(flipped, bit=bit))
    for length in (0, 1, 7, 8, 9, start - 1, start, len(data) - 1, *rng.sample(range(len(data)), 30)):
        yield mutation(f"first {length} bytes only", lambda d, n=length: d[:n])
    for count in (1, 4, 8, 1000, 10**6):
        yield mutation(f"end with {count} zeros", lambda d, n=count: d + bytes(n))
        yield mutation(f"start with {count} zeros", lambda d, n=count: bytes(n) + d)
        yield mutation(f"middle with {count} zeros", lambda d, n=count: d[:start] + bytes(n) + d[start:])
        more = rng.randbytes(count)
        yield mutation(f"end with {count} random bytes", lambda d, m=more: d + m)
    yield mutation("bytes twice", lambda d: d + d)
    yield mutation("bytes backwards", lambda d: d[::-1])


def mutated_headers(sound: Path, rng: random.Random) -> Iterator[Mutation]:
    """JSON again, but it says something else."""
    data = (sound / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    keys = [key for key in header if key != "__metadata__"]

    def mutation(name: str, new: str) -> Mutation:
        return Mutation("headers", f"header: {name}", partial(_with_header, header=new))

    for key, other in [tuple(rng.sample(keys, 2)) for _ in range(12)]:
        text = json.dumps(header)
        same, others = ({**header[k], "shape": header[k]["shape"]} for k in (key, other))
        yield mutation(f"{key} twice", f"{text[:-1]}, {json.dumps(key)}: {json.dumps(same)}}}")
        yield mutation(f"{key} again, as {other}", f"{text[:-1]}, {json.dumps(key)}: {json.dumps(others)}}}")
        yield mutation(f"{key} and {other} exchanged", json.dumps({**header, key: header[other], other: header[key]}))
    for key, (field, values) in itertools.product(rng.sample(keys, 3), FIELDS.items()):
        for value in values:
            changed = {**header, key: {**header[key], field: value}}
            yield mutation(f"{field} of {key} = {value!r:.40}", json.dumps(changed))
        less = {name: value for name, value in header[key].items() if name != field}
        yield mutation(f"{key} without {field}", json.dumps({**header, key: less}))
    for value in METADATA:
        yield mutation(f"__metadata__ = {value!r:.40}", json.dumps({**header, "__metadata__": value}))
    for text in HEADERS:
        yield mutation(f"{text:.10} of {len(text)} characters", text)
    yield mutation("spaces at the end", json.dumps(header) + " " * 4096)
    yield mutation("spaces at the start", " " * 4096 + json.dumps(header))


def mutated_tensors(sound: Path, rng: random.Random) -> Iterator[Mutation]:
    """A sound file of other tensors."""
    tensors = load_file(sound / WEIGHTS)

    def mutation(name: str, edit: Callable[[dict[str, Tensor]], object]) -> Mutation:
        return Mutation("tensors", f"tensors: {name}", partial(edit_weights, edit=edit))

    def change(key: str, name: str, function: Callable[[Tensor], Tensor]) -> Mutation:
        return mutation(f"{key} {name}", lambda t: t.update({key: function(t[key]).contiguous()}))

    for key, value in tensors.items():
        yield mutation(f"{key} dropped", lambda t, k=key: t.pop(k))
        for new in rng.sample(_other_names(key), 3):
            yield mutation(f"{key} renamed {new!r}", lambda t, k=key, n=new: t.update({n: t.pop(k)}))
            yield mutation(f"{key} also as {new!r}", lambda t, k=key, n=new: t.update({n: t[k].clone()}))
        for name, reshape in RESHAPES.items():
            if name != "in two rows" or value.numel() % 2 == 0:
                yield change(key, name, reshape)
        for dtype in DTYPES:
            yield change(key, f"as {dtype}", lambda v, d=dtype: v.to(d))
        for poison in POISONS:
            yield change(key, f"with {poison}", partial(_poisoned, index=rng.randrange(value.numel()), value=poison))
        yield change(key, "with 1e300", lambda v: _poisoned(v.double(), 0, 1e300))
        yield change(key, "all NaN", lambda v: torch.full_like(v, float("nan")))
    for key in [key for key in tensors if key.endswith("dvora_lambda_b")]:
        weight, size = key.replace("dvora_lambda_b", "base_layer.weight"), len(tensors[key])
        for shape in ((size, size), (size, 10), (size, 32), (3,)):
            yield mutation(f"{weight} {shape} added", lambda t, w=weight, s=shape: t.update({w: torch.ones(s)}))
    for key, other in [tuple(rng.sample(list(tensors), 2)) for _ in range(10)]:
        yield mutation(f"{key} and {other} exchanged", lambda t, a=key, b=other: t.update({a: t[b], b: t[a]}))
    yield mutation("all dropped", dict.clear)
    yield mutation("an unknown one added", lambda t: t.update({"unknown": torch.ones(2)}))
    for part in ("dvora_", "lambda_d", "lin0", "query", "projections", "bias", "classifier"):
        yield mutation(f"all with {part} dropped", lambda t, p=part: [t.pop(k) for k in list(t) if p in k])


def _with_header(folder: Path, header: str) -> None:
    new = header.encode()
    rewrite(folder, WEIGHTS, lambda d: len(new).to_bytes(8, "little") + new + d[8 + int.from_bytes(d[:8], "little") :])


def _other_names(key: str) -> list[str]:
    parent, _, name = key.rpartition(".")
    return [
        key.upper(),
        key.removeprefix("base_model."),
        f"base_model.{key}",
        f"{key}.default",
        f"{key}.loaded",
        f"{key}.mine",
        f"{parent}.{name[::-1]}",
        f"{parent}.base_layer.weight",
        f"{parent}.weight",
        f"{parent}.modules_to_save.mine.{name}",
        f"{parent}.original_module.{name}",
        name,
        "",
    ]


def _poisoned(tensor: Tensor, index: int, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.flatten()[index] = value
    return tensor
