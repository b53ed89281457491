"""Folders that must not be loaded: each is refused with an error that says why, and the model goes on as it was.

Damaged, edited, of another base, or made by a stranger: one table, `FOLDERS`, within limits of time and memory. Random
damage (`--fuzz`: far more) loads what it holds, or nothing.
"""

import contextlib
import copy
import json
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import dvora
from dvora import DVoRAConfig
from tests.census import Census, little_more_memory
from tests.hardening.strangers import Evil
from tests.peft.kinds import CONFIG, WEIGHTS, Kind, edit_config, edit_weights, mlp, saved
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, outputs, same_bits, train_vectors

Edit = Callable[[Path], object]
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
TABLE = "base_model.model.model.embed_tokens.weight"
CLASSIFIER = "base_model.model.classifier"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def bert(**settings: Any) -> Kind:
    return Kind(MODELS["bert"], {"r": 6, "target_modules": LAYERS["bert"], **settings})


BERT = bert(projection_init="kaiming_uniform")
PLAIN = bert()
GROUPS = bert(lambda_d_groups=4)
HEAD = bert(target_modules=["query"], modules_to_save=["classifier"])
BIASES = bert(target_modules=["query"], bias="dvora_only")
LLAMA = Kind(MODELS["llama"], {"r": 6, "target_modules": LAYERS["llama"]})
TOKENS = Kind(MODELS["llama"], {"r": 6, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]})
MLP = mlp(r=5, target_modules=LAYERS["mlp"][:2], rank_pattern={"lin1": 4}, modules_to_save=["lin2"])


KINDS = (BERT, HEAD, BIASES, LLAMA, TOKENS, MLP, PLAIN, GROUPS)


def weights(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    return lambda folder: edit_weights(folder, change)


def value(key: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return weights(lambda tensors: tensors.update({key: change(tensors[key])}))


def added(key: str, make: Callable[[], Tensor]) -> Edit:
    return weights(lambda tensors: tensors.update({key: make()}))


def renamed(old: str, new: str) -> Edit:
    return weights(lambda tensors: tensors.update({new: tensors.pop(old)}))


def settings(**values: object) -> Edit:
    return lambda folder: edit_config(folder, **values)


def vera(sizes: str) -> Edit:
    return settings(projection_init=f"peft_vera({sizes})", projection_fingerprint="0" * 16)


def text(content: str) -> Edit:
    return lambda folder: (folder / CONFIG).write_text(content)


def data(change: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def several(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def poisoned(number: float) -> Callable[[Tensor], Tensor]:
    return lambda vector: vector.index_fill(0, torch.tensor([1]), number)


def doubled(tensors: dict[str, Tensor]) -> None:
    tensors.update({key: vector.repeat(2) for key, vector in tensors.items() if "lambda_d" in key})


def of_lambda_d(change: Callable[[Tensor], Tensor]) -> Edit:
    """Of every layer."""
    return weights(lambda t: t.update({key: change(value) for key, value in t.items() if "lambda_d" in key}))


def evil(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Evil(folder / "mark")}, folder / "adapter_model.bin")


FOLDERS: dict[str, tuple[Kind, Edit, str]] = {
    "a missing vector": (BERT, weights(lambda t: t.pop(f"{QUERY}.dvora_magnitude")), r"lacks .*query\.dvora_magnitude"),
    "no value": (BERT, weights(dict.clear), "lacks vectors of adapted layers: bert"),
    "a vector more": (BERT, added(f"{QUERY[:-5]}key.dvora_magnitude", lambda: torch.ones(32)),
        "not adapted here: .*key"),
    "another rank": (BERT, value(f"{QUERY}.dvora_lambda_d", lambda v: v.repeat(2)),
        r"lambda_d.* shape \(12,\).*\(6,\)"),
    "another rank everywhere": (BERT, weights(doubled),
                                r"shape \(12,\) in the adapter and \(6,\) in the model"),
    "groups that the file does not have": (PLAIN, settings(lambda_d_groups=4),
        r"lambda_d\S* has shape \(6,\) in the adapter and \(4, 6\) in the model: .* or lambda_d_groups"),
    "groups that the settings do not say": (GROUPS, settings(lambda_d_groups=1),
        r"lambda_d\S* has shape \(4, 6\) in the adapter and \(6,\) in the model"),
    "fewer groups": (GROUPS, settings(lambda_d_groups=3), r"shape \(4, 6\) in the adapter and \(3, 6\)"),
    "groups without end": (GROUPS, settings(lambda_d_groups=10**9), "lambda_d_groups=1000000000 cuts the columns"),
    "more groups than columns": (GROUPS,
        several(settings(lambda_d_groups=33), of_lambda_d(lambda _: torch.ones(33, 6))),
        "lambda_d_groups=33 cuts the columns of the weight, of which it has 32"),
    "no group": (GROUPS, settings(lambda_d_groups=0), "lambda_d_groups must be at least 1, got 0"),
    "groups of text": (GROUPS, settings(lambda_d_groups="4"), "lambda_d_groups must be an integer, got '4'"),
    "groups as ranks": (GROUPS, several(settings(lambda_d_groups=6, r=4), of_lambda_d(lambda v: v.T.contiguous()),
        value(f"{QUERY}.dvora_lambda_d", lambda v: v.T.contiguous())), r"shape \(4, 6\) .* and \(6, 4\)"),
    "groups in one row": (GROUPS, of_lambda_d(Tensor.flatten), r"shape \(24,\) in the adapter and \(4, 6\)"),
    "integers": (BERT, value(f"{QUERY}.dvora_lambda_b", Tensor.long), r"query\.dvora_lambda_b.* torch\.int64"),
    "NaN": (BERT, value(f"{QUERY}.dvora_lambda_d", poisoned(torch.nan)), r"query\.dvora_lambda_d.* not finite"),
    "NaN in a bias": (BIASES, value(f"{QUERY}.base_layer.bias", lambda v: v * torch.nan),
        "bias has values that are not"),
    "far magnitudes": (BERT, several(value(f"{QUERY}.dvora_magnitude", lambda v: torch.full_like(v, 3e38)),
                                     value(f"{QUERY}.dvora_lambda_d", lambda v: torch.full_like(v, 1e30))),
                       "so large that outputs would not be finite"),
    "far rows": (BERT, value(f"{QUERY}.dvora_lambda_d", lambda v: torch.full_like(v, 3e38)), "so large that outputs"),
    "probes without end": (BERT, settings(base_probes={"query": [1.0] * 10**6}), "base_probes .* expected 64 at most"),
    "one token a million times": (TOKENS, settings(trainable_token_indices={"embed_tokens": [0] * 10**6}),
                                  "trainable_token_indices: "),
    "half a file": (BERT, data(lambda content: content[:-7]), "(?i)incomplete|header"),
    "a folder as file": (BERT, lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()], "is not a file"),
    "another fingerprint": (BERT, settings(projection_fingerprint="0123456789abcdef"),
        "fingerprint is '0123456789abcdef'"),
    "another format": (BERT, settings(projection_format=99), "projection_format is 99, this version makes format 1"),
    "a rank twice": (LLAMA, lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().rstrip()[:-1] + ', "r": 65536}'),
                     r"has rank 65536 in its configuration, and no lambda_d .* more than 6 values"),
    "a rank for one layer": (BERT, settings(rank_pattern={"query": 5}),
        r"query.*shape \(6,\) in the adapter and \(5,\)"),
    "a rank of other layers": (LLAMA, settings(r=65536, rank_pattern={".*_proj": 6}, target_modules=["lm_head"]),
                               r"has rank 65536 in its configuration, and no lambda_d .* more than 6 values"),
    "fewer targets": (BERT, settings(target_modules=["query"]), "not adapted here: .*dense"),
    "more targets": (BERT, settings(target_modules=[*LAYERS["bert"], "key"]), "lacks vectors of adapted layers: .*key"),
    "wide matrices of VeRA": (LLAMA, vera("r=6, in=22369600, out=22369600"), "larger than any layer .* 48 features"),
    "long matrices of VeRA": (LLAMA, vera("r=60000, in=2000, out=2000"), "larger than any layer .* and rank 6"),
    "no JSON": (BERT, text("{not json"), "(?i)expecting|json"),
    "a method of no one": (LLAMA, text('{"peft_type": "NOPE"}'), "NOPE"),
    "probes of another base": (BERT, settings(base_probes={QUERY.removeprefix("base_model.model."): [1.0] * 9}),
                               "made for another base model"),
    "a table": (LLAMA, added(TABLE, lambda: torch.ones(40, 32)), r"does not train: .*embed_tokens\.weight"),
    "a weight": (LLAMA, added(f"{Q_PROJ}.base_layer.weight", lambda: torch.ones(32, 32)), "does not train"),
    "a bias": (PLAIN, added(f"{QUERY}.base_layer.bias", lambda: torch.ones(32)),
        "does not train: .*bias"),
    "a missing bias": (BIASES, weights(lambda t: t.pop(f"{QUERY}.base_layer.bias")),
        r"lacks biases.*query\.base_layer\.bias"),
    "a missing head": (HEAD, weights(lambda t: t.pop(f"{CLASSIFIER}.weight")),
        r"lacks classifier\.weight, which"),
    "a head without columns": (HEAD, added(f"{CLASSIFIER}.weight", lambda: torch.ones(300_000, 0)),
                               r"classifier\S* has shape \(300000, 0\) in the adapter and \(3, 32\) in the model"),
    "another adapter's head": (HEAD, added(f"{CLASSIFIER}.modules_to_save.other.weight", lambda: torch.ones(3, 32)),
                               "does not train|classifier"),
    "tokens that are missing": (LLAMA, settings(trainable_token_indices=[6]),
        r"lacks model\.embed_tokens\S*, which its configuration trains"),
    "fewer tokens": (TOKENS, weights(lambda t: [t.update({k: v[:1].clone()}) for k, v in [*t.items()] if "delta" in k]),
                     r"delta\S* has shape \(1, 32\) in the adapter and \(2, 32\)"),
    "matrices": (PLAIN, added("base_model.dvora_projections.stream_0", lambda: torch.ones(6, 32)), "not adapted here"),
    "a pickle that runs code": (LLAMA, evil, r"pickled adapter_model\.bin, which can run any code"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """Folders of trained adapters, which can be loaded."""

    @cache
    def folder(of: int) -> Path:
        made = saved(KINDS[of].trained(), tmp_path_factory.mktemp("sound"), save_embedding_layers=False)
        PeftModel.from_pretrained(KINDS[of].base(), made)
        return made

    return lambda kind: folder(KINDS.index(kind))


@contextlib.contextmanager
def small_tensors_only() -> Iterator[None]:
    """Nothing is made that is larger than the tiny models' weights."""
    with Census() as made:
        yield
    assert made.largest() <= 2**19


REFUSALS = ValueError, TypeError, SafetensorError, KeyError


def refused(kind: Kind, folder: Path, message: str) -> None:
    """Neither a fresh model nor one that has an adapter takes the folder; both go on as they were."""
    fresh = kind.base().eval()
    before = snapshot(fresh)
    with pytest.raises(REFUSALS, match=message):
        PeftModel.from_pretrained(fresh, folder)
    assert_unchanged(fresh, before)
    assert "peft_config" not in vars(fresh)
    first = next(name for name, module in fresh.named_modules() if isinstance(module, nn.Linear))
    model = get_peft_model(kind.base(), DVoRAConfig(r=3, target_modules=[first]), "own").eval()
    train_vectors(model, "own")
    before = snapshot(model)
    with pytest.raises(REFUSALS, match=message):
        model.load_adapter(folder, "stranger")
    assert_unchanged(model, before)
    assert model.active_adapters == list(model.peft_config) == ["own"]


SECONDS = 5.0


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_refused_and_changes_nothing(name: str, sound: Callable[[Kind], Path], tmp_path: Path) -> None:
    kind, edit, message = FOLDERS[name]
    folder = Path(shutil.copytree(sound(kind), tmp_path / "folder"))
    edit(folder)
    start = time.process_time()
    with small_tensors_only(), little_more_memory():
        refused(kind, folder, message)
    assert time.process_time() - start < SECONDS
    assert not (folder / "mark").exists()


def test_an_expression_is_not_matched_with_a_long_name_in_the_file(
    sound: Callable[[Kind], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sound(PLAIN), tmp_path / "folder"))
    settings(rank_pattern={".*a.*a.*a.*a!": 4})(folder)
    added(f"base_model.model.{'a' * 9999}.dvora_lambda_d", lambda: torch.ones(4))(folder)
    start = time.process_time()
    with pytest.raises(ValueError, match="rank_pattern: "):
        dvora.hotswap_adapter(PLAIN.fresh(), folder)
    assert time.process_time() - start < SECONDS


SWAPPED = {"a rank of other layers", "fewer targets", "more targets"}
"""A hot swap compares vectors and scales, whatever targets they were made by."""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hot_swap_takes_vectors_from_it_or_refuses_it(
    name: str, sound: Callable[[Kind], Path], tmp_path: Path
) -> None:
    kind, edit, _ = FOLDERS[name]
    folder, model = Path(shutil.copytree(sound(kind), tmp_path / "folder")), kind.fresh()
    edit(folder)
    before, swapped = snapshot(model), kind.trained()
    with small_tensors_only(), contextlib.nullcontext() if name in SWAPPED else pytest.raises(REFUSALS):
        dvora.hotswap_adapter(model, folder)
    assert_unchanged(model, snapshot(swapped) if name in SWAPPED else before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"peft_type": ["DVORA"]}', r"peft_type is \['DVORA'\], which is no method"),
        ("[1]", "holds a list, expected settings by name"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"r": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ('{"self": 1}', "'self' is not a setting"),
    ],
)
def test_our_own_door_says_what_is_wrong_with_a_configuration(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=f"{CONFIG}.*{message}"):
        DVoRAConfig.from_pretrained(str(tmp_path))


ARRIVING: dict[str, tuple[str, Callable[[], Tensor], str]] = {
    "NaN": (f"{Q_PROJ}.dvora_lambda_d", lambda: torch.full((6,), torch.nan), "not finite"),
    "an expanded tensor": (f"{Q_PROJ}.dvora_lambda_d", lambda: torch.ones(1).expand(2**30), "has not as many values"),
    "a sparse tensor": (f"{Q_PROJ}.dvora_lambda_d", lambda: torch.ones(6).to_sparse(), "has not as many values"),
    "another rank": (f"{Q_PROJ}.dvora_lambda_d", lambda: torch.ones(7), r"shape \(7,\) in the adapter and \(6,\)"),
    "a weight": (f"{Q_PROJ}.base_layer.weight", lambda: torch.ones(32, 32), "does not train"),
    "a table": (TABLE, lambda: torch.ones(40, 32), "does not train"),
}


@pytest.mark.parametrize("name", ARRIVING)
def test_a_state_dict_over_a_loaded_adapter_is_checked_as_a_folder_is(name: str, sound: Callable[[Kind], Path]) -> None:
    key, make, message = ARRIVING[name]
    model = PeftModel.from_pretrained(MODELS["llama"](), sound(LLAMA))
    before, state = snapshot(model), get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, {**state, key: make()})
    assert_unchanged(model, before)


BAD_NAMES = ("a.b", ".", "..", "keys", "forward", "base_layer", "/etc", "a\\b", "x" * 201, "\0")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_model_could_keep_is_refused(name: str, sound: Callable[[Kind], Path]) -> None:
    base = MODELS["llama"]()
    before, config = snapshot(base), DVoRAConfig(r=3, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="adapter_name"):
        get_peft_model(base, config, adapter_name=name)
    with pytest.raises(ValueError, match="adapter_name"):
        PeftModel.from_pretrained(base, sound(LLAMA), adapter_name=name)
    assert_unchanged(base, before)
    model = get_peft_model(base, config)
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_name"):
        model.load_adapter(sound(LLAMA), name)
    assert list(model.peft_config) == ["default"]
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["é b", "0", "lin0", "(", "org/name", "dvora_lambda_b", "modules_to_save", "x" * 200])
def test_a_name_that_is_accepted_keeps_everything(name: str, tmp_path: Path) -> None:
    config = DVoRAConfig(r=4, target_modules=["lin0", "lin1"], bias="all", modules_to_save=["lin2"])
    model = get_peft_model(MODELS["mlp"](), config, name).eval()
    train_vectors(model, name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    for other in (name, "default"):
        loaded = PeftModel.from_pretrained(MODELS["mlp"](), tmp_path / name, other)
        assert same_bits(outputs(loaded.eval()), outputs(model))


# Damage at random.

SHORT, LONG = 30, 2000
"""Folders of each kind of damage."""
ERRORS = (ValueError, TypeError, KeyError, FileNotFoundError, SafetensorError, RecursionError)
"""KeyError and RecursionError are PEFT's, which reads the configuration before dvora."""
VALUES: tuple[object, ...] = (
    *(None, True, 0, -1, 1, 7, 2**31, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "6", "(", "[", "*", "\0", "all-linear", "unit", "CAUSAL_LM", "é" * 3000),
    *([], [None], [[]], ["("], ["x"], [10**400], {}, {"": 1}, {"(": 5}, {"lin0": 2**31}, {"lin0": -1}, {"x": None}),
    *({"lin0": [10**400] * 9}, {"lin0": [float("nan")] * 9}, {"lin0": 10**400}),
)


def bits(folder: Path, rng: random.Random) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    # Half of them in the header.
    limit = 8 + int.from_bytes(content[:8], "little") if rng.random() < 0.5 else len(content)
    content[rng.randrange(limit)] ^= 1 << rng.randrange(8)
    (folder / WEIGHTS).write_bytes(content)


def one_tensor(folder: Path, rng: random.Random) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        key, other = rng.sample(sorted(tensors), 2)
        tensor = tensors.pop(key)
        name = rng.choice([key, f"{key}.0", key.replace("dvora_lambda_b", "base_layer.weight")])
        tensors[name] = rng.choice([tensor, tensors[other], torch.cat([tensor, tensor]), tensor.half()]).clone()

    edit_weights(folder, edit)


def one_setting(folder: Path, rng: random.Random) -> None:
    names = json.loads((folder / CONFIG).read_text())
    edit_config(folder, **{rng.choice([*names, "lambda_d_groups", "unknown"]): rng.choice(VALUES)})


def a_file(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([WEIGHTS, CONFIG])
    content, cut = path.read_bytes(), rng.randrange(100)
    path.unlink()
    changed = rng.choice([content[:cut], content[::-1], content[:cut] + rng.randbytes(8) + content[cut:], b"", None])
    path.mkdir() if changed is None else path.write_bytes(changed)


@pytest.mark.parametrize("damage", [bits, one_tensor, one_setting, a_file])
def test_a_damaged_folder_gives_what_it_holds_or_is_refused(
    damage: Callable[[Path, random.Random], object],
    sound: Callable[[Kind], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    # PEFT looks on the hub for a file that it does not find.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=3, target_modules=["lin0"]), "mine").eval()
    train_vectors(own, "mine")
    before, expected, refusals = snapshot(own), outputs(own), 0
    for seed in range(LONG if pytestconfig.getoption("--fuzz") else SHORT):
        folder, model = Path(shutil.copytree(sound(MLP), tmp_path / str(seed))), copy.deepcopy(own)
        damage(folder, random.Random(f"{seed}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model.load_adapter(str(folder), "loaded")
            except HFValidationError:
                # PEFT looks for the file of values when the adapter is complete, and knows no way back.
                assert not (folder / WEIGHTS).is_file(), seed
            except ERRORS:
                refusals += 1
                assert list(model.peft_config) == ["mine"], seed
                assert_unchanged(model, before)
            else:
                file = load_file(folder / WEIGHTS)
                loaded = {n: p for n, p in model.named_parameters() if ".dvora_" in n and n.endswith(".loaded")}
                assert loaded
                for name, vector in loaded.items():
                    assert vector.isfinite().all(), (seed, name)
                    assert torch.equal(vector, file[name.removesuffix(".loaded")].to(vector.dtype)), (seed, name)
        assert model.active_adapters == ["mine"]
        assert same_bits(outputs(model), expected)
        shutil.rmtree(folder)
    assert refusals
