"""From a training model to where it is served: every version is whole, itself, and there as long as it should be.

What went wrong for others has a test here: rollouts by the base in the adapter's place, a scale that is applied twice
after an eviction, a stale version after a restart.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import dvora
from dvora import sync
from dvora.adapter_file.content import SavedWhole
from dvora.flat import Layout
from dvora.sync import (
    AdapterVersion,
    BankTarget,
    FolderTarget,
    ModelTarget,
    Publisher,
    Target,
    newest,
    vector_digest,
)
from dvora.whole_files import locked
from tests.peft.kinds import GROUPS
from tests.peft.tiny import same_bits, train_vectors
from tests.recipes import tiny_models

IDS = torch.tensor([[2, 9, 12, 7, 3], [2, 11, 4, 18, 3]])
ROWS = len(IDS)


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a head of its own, of three classes."""
    return tiny_models.classifier(tmp_path_factory.mktemp("bases") / "critic")


def base_of(critic: Path) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(critic).eval()


def adapted(critic: Path, **settings: object) -> PeftModel:
    """A model whose adapter is not trained yet."""
    config = dvora.DVoRAConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS", **settings})
    return get_peft_model(base_of(critic), config).eval()


@pytest.fixture
def groups(request: pytest.FixtureRequest) -> int:
    """Of lambda_d."""
    return getattr(request, "param", 1)


of_groups = pytest.mark.parametrize("groups", [1, GROUPS], indirect=True, ids=["one group", "groups"])


@pytest.fixture
def trainer(critic: Path, groups: int) -> PeftModel:
    return adapted(critic, lambda_d_groups=groups)


@pytest.fixture
def adapters(critic: Path, groups: int, tmp_path: Path) -> Path:
    """What a bank starts with: the adapter before its training."""
    adapted(critic, lambda_d_groups=groups).save_pretrained(tmp_path / "adapters" / "start")
    return tmp_path / "adapters"


@pytest.fixture
def model(critic: Path) -> nn.Module:
    """The base that the bank serves."""
    return base_of(critic)


@pytest.fixture
def bank(model: nn.Module, adapters: Path) -> Iterator[dvora.AdapterBank]:
    with dvora.AdapterBank(model, like=adapters / "start") as bank:
        yield bank


@pytest.fixture
def other_model(critic: Path) -> PeftModel:
    """With an adapter that a target gives values."""
    return adapted(critic)


@pytest.fixture(params=["model", "bank", "folder"])
def target(request: pytest.FixtureRequest, other_model: PeftModel, tmp_path: Path) -> Target:
    """One of each kind."""
    if request.param == "bank":
        return BankTarget(request.getfixturevalue("bank"))
    return FolderTarget(tmp_path / "shared") if request.param == "folder" else ModelTarget(other_model)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def banked(bank: dvora.AdapterBank, model: nn.Module, name: str | None) -> Tensor:
    with bank.rows([name] * ROWS):
        return logits(model)


def saved(trainer: PeftModel, folder: Path) -> Path:
    """The adapter as it is now, for a model of its own."""
    trainer.save_pretrained(folder)
    return folder


# What is served is what was published.


@of_groups
def test_a_model_gets_every_version_bit_for_bit(critic: Path, groups: int, trainer: PeftModel) -> None:
    server = adapted(critic, lambda_d_groups=groups)
    target = ModelTarget(server)
    publisher = Publisher(trainer, target, "policy")
    for number in range(1, 4):
        train_vectors(trainer, seed=number)
        assert not same_bits(logits(server), logits(trainer))
        assert publisher.publish().name == target.name == f"policy-v{number}"
        assert same_bits(logits(server), logits(trainer))


@of_groups
def test_a_bank_serves_the_newest_versions_and_each_is_itself(
    trainer: PeftModel, bank: dvora.AdapterBank, model: nn.Module
) -> None:
    """The ratio of importance, exp of the difference of log-probabilities, is one to within 0.001."""
    publisher = Publisher(trainer, BankTarget(bank), "policy", keep=2)
    expected = {}
    for number in range(1, 5):
        train_vectors(trainer, seed=number)
        expected[publisher.publish().name] = logits(trainer).log_softmax(-1)
    assert list(bank) == ["policy-v3", "policy-v4"]
    for name in bank:
        ratio = (banked(bank, model, name).log_softmax(-1) - expected[name]).exp()
        assert ratio.sub(1).abs().max() < 1e-3
    with pytest.raises(ValueError, match="there is no adapter 'policy-v2'"):
        banked(bank, model, "policy-v2")


@of_groups
def test_a_folder_has_the_newest_versions_bit_for_bit(
    critic: Path, groups: int, trainer: PeftModel, tmp_path: Path
) -> None:
    folder = FolderTarget(tmp_path / "shared")
    assert folder.latest("policy") is None
    other = Publisher(trainer, folder, "policy-v1")
    other.publish()
    publisher = Publisher(trainer, folder, "policy")
    for number in range(1, 12):
        train_vectors(trainer, seed=number)
        published = publisher.publish()
        other.publish()
        read = folder.latest("policy")
        assert (read.name, read.digest, read.layout) == (f"policy-v{number}", published.digest, published.layout)
        server = adapted(critic, lambda_d_groups=groups)
        ModelTarget(server).put(read)
        assert same_bits(logits(server), logits(trainer))
    assert {*folder.names()} == {"policy-v10", "policy-v11", "policy-v1-v11", "policy-v1-v12"}


def test_versions_of_equal_values_are_dropped_one_by_one(
    trainer: PeftModel, bank: dvora.AdapterBank, model: nn.Module
) -> None:
    """A step that changed nothing: a bank has the values of both once."""
    train_vectors(trainer)
    publisher = Publisher(trainer, BankTarget(bank), "policy", keep=1)
    assert publisher.publish().digest == publisher.publish().digest
    assert list(bank) == ["policy-v2"]
    torch.testing.assert_close(banked(bank, model, "policy-v2"), logits(trainer))


# A scale is applied once.


def test_an_eviction_scales_nothing_twice(
    critic: Path, trainer: PeftModel, model: nn.Module, adapters: Path, tmp_path: Path
) -> None:
    """Neither from the slot nor from memory, with room for one adapter in each, beside one of half the strength."""
    with dvora.AdapterBank(model, slots=1, like=adapters / "start") as bank:
        one = bank.stats()
        train_vectors(trainer, seed=9)
        trainer.base_model.set_strength(0.5)
        bank.add("half", saved(trainer, tmp_path / "half"))
        size = bank.stats().host_bytes - one.host_bytes
    with dvora.AdapterBank(model, slots=1, host_bytes=size, like=adapters / "start") as bank:
        bank.add("half", tmp_path / "half")
        expected = {"half": logits(trainer)}
        trainer.base_model.set_strength(1.0)
        publisher = Publisher(trainer, BankTarget(bank), "policy")
        for seed in range(2):
            train_vectors(trainer, seed=seed)
            expected[publisher.publish().name] = logits(trainer)
        for name in [*expected] * 3:
            torch.testing.assert_close(banked(bank, model, name), expected[name])
        assert bank.stats().evictions >= 8
        assert bank.stats().reads >= 9


@pytest.mark.parametrize("is_target", [False, True], ids=["trainer", "target"])
def test_an_adapter_that_is_scaled_is_refused(critic: Path, trainer: PeftModel, is_target: bool) -> None:
    server = adapted(critic)
    publisher = Publisher(trainer, ModelTarget(server), "policy")
    (server if is_target else trainer).base_model.set_strength(0.5)
    train_vectors(trainer)
    before = logits(server)
    with pytest.raises(ValueError, match=r"strength 0.5 in .*, which a vector does not carry"):
        publisher.publish()
    assert same_bits(logits(server), before)


# Restarts.


def test_a_new_publisher_goes_on_after_the_newest_version(trainer: PeftModel, tmp_path: Path) -> None:
    folder = FolderTarget(tmp_path / "shared")
    for _ in range(3):
        Publisher(trainer, folder, "policy", keep=5).publish()
    assert Publisher(trainer, folder, "policy", keep=2).publish().name == "policy-v4"
    assert sorted(folder.names()) == ["policy-v3", "policy-v4"]


def test_a_publisher_goes_on_after_what_another_one_published_and_dropped(trainer: PeftModel, tmp_path: Path) -> None:
    """Or a name would come back with other values."""
    folder = FolderTarget(tmp_path / "shared")
    one, two = (Publisher(trainer, folder, "policy", keep=1) for _ in range(2))
    for _ in range(3):
        one.publish()
    assert two.publish().name == "policy-v4"
    assert one.publish().name == "policy-v5"
    assert folder.names() == ["policy-v5"]


# One name, one content.


def test_a_name_that_is_there_gets_no_other_values(trainer: PeftModel, other_model: PeftModel, target: Target) -> None:
    layout = Layout.of(trainer)
    vector = layout.to_vector(trainer)
    first, other = (AdapterVersion("policy", 1, layout, vector + step) for step in (0, 0.5))
    target.put(first)
    before = layout.to_vector(other_model)
    with pytest.raises(ValueError, match=r"'policy-v1' with another content.* Give each publisher a name of its own"):
        target.put(other)
    # As it was, so that whose answer was lost may put it again.
    assert torch.equal(layout.to_vector(other_model), before)
    target.put(first)
    target.drop("policy-v1")
    assert isinstance(target, ModelTarget) or "policy-v1" not in target.names()


RACING = """
import os, signal, sys
from contextlib import suppress
from dvora import sync, whole_files

folder = sync.FolderTarget(sys.argv[1])
layout = folder.read("policy-v1").layout
print("ready", flush=True)
sys.stdin.readline()
for number in range(2, 102):
    version = sync.AdapterVersion("policy", number, layout, folder.read("policy-v1").vector * 0 + 2)
    with suppress(ValueError):
        folder.put(version)
        print(number, flush=True)
sys.stdin.readline()
whole_files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
folder.put(sync.AdapterVersion("policy", 102, layout, version.vector))
"""


def test_of_two_processes_one_has_the_name_and_what_one_leaves_the_other_removes(
    trainer: PeftModel, tmp_path: Path
) -> None:
    """One is killed while it writes."""
    folder = FolderTarget(tmp_path)
    start = Publisher(trainer, folder, "policy").publish()
    ones, wins = torch.ones_like(start.vector), set[int]()
    with subprocess.Popen(
        [sys.executable, "-c", RACING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline() == "ready\n"
        running.stdin.write("go\n")
        running.stdin.flush()
        for number in range(2, 102):
            with suppress(ValueError):
                folder.put(AdapterVersion("policy", number, start.layout, ones))
                wins.add(number)
        running.stdin.write("be killed\n")
        running.stdin.flush()
        theirs = {int(line) for line in running.stdout}
    assert running.returncode == -signal.SIGKILL
    assert wins | theirs == {*range(2, 102)}
    assert not wins & theirs
    for number in range(2, 102):
        assert (folder.read(f"policy-v{number}").vector == (1 if number in wins else 2)).all()
    hidden = {path.name[:20] for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {".lock", ".policy-v102.vector."}
    (tmp_path / ".policy-v102.vector.notes").touch()
    folder.put(AdapterVersion("policy", 103, start.layout, ones))
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {".lock", ".policy-v102.vector.notes"}


def test_what_another_one_is_writing_is_left_alone(
    trainer: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FolderTarget(tmp_path)
    publisher = Publisher(trainer, folder, "policy")
    (tmp_path / ".policy-v1.vector.abcd1234").touch()
    monkeypatch.setattr(sync, "WAITING_SECONDS", 0)
    with locked(tmp_path / ".lock"), pytest.raises(TimeoutError, match="another publisher has held the lock"):
        publisher.publish()
    assert (tmp_path / ".policy-v1.vector.abcd1234").exists()
    assert folder.names() == []
    publisher.publish()
    assert not (tmp_path / ".policy-v1.vector.abcd1234").exists()


# Nothing damaged, and nothing in the place of what is whole.


def test_values_that_are_not_finite_push_out_nothing(trainer: PeftModel, target: Target) -> None:
    publisher = Publisher(trainer, target, "policy")
    for _ in range(2):
        publisher.publish()
    had = {*target.names()}
    value = next(p for p in trainer.parameters() if p.requires_grad)
    for wrong in (torch.nan, torch.inf):
        with torch.no_grad():
            value[0] = wrong
        with pytest.raises(ValueError, match=r"not finite, the first at index \d+ \(\w+ of .*layer\."):
            publisher.publish()
    assert {*target.names()} == had
    with torch.no_grad():
        value[0] = 0.5
    publisher.publish()
    kept = {"policy-v3"} if isinstance(target, ModelTarget) else {"policy-v2", "policy-v3"}
    assert {*target.names()} - {"start"} == kept


def test_a_version_is_checked_when_it_is_made(trainer: PeftModel) -> None:
    layout = Layout.of(trainer)
    vector = layout.to_vector(trainer)
    for adapter, number, values, message in (
        ("../policy", 1, vector, "names no version"),
        ("policy", 0, vector, "names no version"),
        ("policy", 1, vector[1:], "vector has shape"),
        ("policy", 1, vector.half(), "vector is torch.float16"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            AdapterVersion(adapter, number, layout, values)


def test_damaged_versions_do_not_push_out_whole_ones(trainer: PeftModel, tmp_path: Path) -> None:
    folder = FolderTarget(tmp_path)
    before = Publisher(trainer, folder, "policy", keep=4)
    for number in range(1, 5):
        before.publish()
        if number > 2:
            file = tmp_path / f"policy-v{number}.vector"
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"policy-v4.vector is no version of an adapter, or damaged"):
        folder.latest("policy")
    publisher = Publisher(trainer, folder, "policy", keep=2)
    publisher.publish()
    assert sorted(folder.names()) == [f"policy-v{number}" for number in (2, 3, 4, 5)]
    assert folder.latest("policy").name == "policy-v5"
    publisher.publish()
    assert sorted(folder.names()) == ["policy-v5", "policy-v6"]


@pytest.mark.parametrize(
    "make",
    [
        lambda file: file.symlink_to("nowhere"),
        lambda file: file.symlink_to("policy-v1.vector"),
        lambda file: file.mkdir(),
        lambda file: os.mkfifo(file),
    ],
    ids=["nowhere", "link", "folder", "pipe"],
)
def test_what_is_no_file_is_named(trainer: PeftModel, tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A reader neither waits for it nor asks for ever."""
    folder = FolderTarget(tmp_path)
    Publisher(trainer, folder, "policy").publish()
    make(tmp_path / "policy-v2.vector")
    with pytest.raises(ValueError, match=r"policy-v2.vector is no version .*: it is a link, a folder, a pipe"):
        folder.latest("policy")


def test_a_name_that_is_listed_and_not_there_is_asked_for_twice(
    trainer: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network, where lists are older than what they list."""
    folder = FolderTarget(tmp_path)
    monkeypatch.setattr(folder, "names", lambda: ["policy-v1"])
    with pytest.raises(FileNotFoundError, match=r"policy-v1.vector"):
        folder.latest("policy")


@pytest.mark.parametrize("has_head", [True, False])
def test_of_a_file_that_is_too_large_no_more_is_read_than_a_version_has(
    trainer: PeftModel, tmp_path: Path, has_head: bool
) -> None:
    folder = FolderTarget(tmp_path)
    Publisher(trainer, folder, "policy").publish()
    os.truncate(tmp_path / "policy-v1.vector", 2**40 if has_head else 0)
    os.truncate(tmp_path / "policy-v1.vector", 2**40)
    with pytest.raises(ValueError, match=r"policy-v1.vector is no version of an adapter, or damaged"):
        folder.latest("policy")


def test_only_names_of_versions_are_listed_and_a_folder_stops_nobody(trainer: PeftModel, tmp_path: Path) -> None:
    folder = FolderTarget(tmp_path)
    (tmp_path / "policy-v1.vector" / "notes").mkdir(parents=True)
    for name in ("notes", "policy-v0", "policy-v2.vector"):
        (tmp_path / f"{name}.vector").touch()
    publisher = Publisher(trainer, folder, "policy", keep=1)
    assert [publisher.publish().name for _ in range(2)] == ["policy-v2", "policy-v3"]
    assert sorted(folder.names()) == ["policy-v1", "policy-v3"]
    assert (tmp_path / "policy-v1.vector" / "notes").is_dir()


def test_in_a_folder_the_same_values_for_another_base_are_another_content(trainer: PeftModel, tmp_path: Path) -> None:
    folder = FolderTarget(tmp_path)
    version = Publisher(trainer, folder, "policy").publish()
    content = version.layout.content
    base = tuple((name, tuple(value + 1 for value in fingerprint)) for name, fingerprint in content.base)
    with pytest.raises(ValueError, match="'policy-v1' with another content"):
        folder.put(AdapterVersion("policy", 1, Layout(content._replace(base=base)), version.vector))
    folder.put(version)


@pytest.mark.parametrize("target", ["folder", "model"])
def test_values_that_were_changed_in_a_version_are_checked_again(
    critic: Path, trainer: PeftModel, tmp_path: Path, target: str
) -> None:
    """Though nobody should write to them, a digest is that of what is served."""
    layout, server, folder = Layout.of(trainer), adapted(critic), FolderTarget(tmp_path)
    version = AdapterVersion("policy", 1, layout, layout.to_vector(trainer))
    put = (folder if target == "folder" else ModelTarget(server)).put
    before = version.digest
    version.vector[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        put(version)
    assert folder.names() == []
    version.vector[0] = 5
    put(version)
    if target == "folder":
        assert folder.read("policy-v1").digest == version.digest != before
    version.vector[0] = 6
    with pytest.raises(ValueError, match="with another content"):
        put(version)


def test_a_lock_that_is_a_link_is_named(trainer: PeftModel, tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"/\.lock is a link, and nothing is locked through one; remove it"):
        Publisher(trainer, FolderTarget(tmp_path), "policy").publish()
    assert [*tmp_path.glob("*.vector")] == []
    assert not (tmp_path / "nowhere").exists()


# Never half a vector.

PUBLISHING = """
import sys
import torch
from dvora.sync import AdapterVersion, FolderTarget

folder = FolderTarget(sys.argv[1])
layout = folder.read("policy-v1").layout
for number in range(2, 101):
    folder.put(AdapterVersion("policy", number, layout, torch.full([layout.size], float(number))))
    folder.drop(f"policy-v{number - 2}") if number > 2 else None
"""


def test_another_process_reads_whole_versions_while_they_come_and_go(trainer: PeftModel, tmp_path: Path) -> None:
    folder, layout, numbers = FolderTarget(tmp_path), Layout.of(trainer), [1]
    folder.put(AdapterVersion("policy", 1, layout, torch.ones(layout.size)))
    with subprocess.Popen([sys.executable, "-c", PUBLISHING, str(tmp_path)]) as running:
        while running.poll() is None:
            version = folder.latest("policy")
            assert (version.vector == version.number).all()
            numbers.append(version.number)
            time.sleep(0.001)
    assert running.returncode == 0
    assert numbers == sorted(numbers)
    assert len({*numbers}) > 20


def not_finite(data: bytes) -> bytes:
    """A version of NaN, as one that checks nothing would write it."""
    head, _, values = data.partition(b"\n")
    settings, values = json.loads(head), b"\xff" * len(values)
    del settings["digest"]
    settings["digest"] = vector_digest(json.dumps(settings, sort_keys=True), values)
    return json.dumps(settings).encode() + b"\n" + values


def of_base(data: bytes, change: Callable[[float], float] | None) -> bytes:
    """A version whose head says another base, or none."""
    head, _, values = data.partition(b"\n")
    settings = json.loads(head)
    base = settings["layout"]["base"]
    settings["layout"]["base"] = {name: list(map(change, base[name])) for name in base} if change else {}
    return json.dumps(settings).encode() + b"\n" + values


def without_sizes(data: bytes) -> bytes:
    """A layout whose one tensor is text, repeated to a million million letters."""
    head, _, values = data.partition(b"\n")
    settings = json.loads(head)
    content = Layout.from_dict(settings["layout"]).content._replace(whole=(SavedWhole("w", ("a", 10**12)),))
    return json.dumps({**settings, "layout": content.to_dict()}).encode() + b"\n" + values


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b"digest", b"dogest", 1),
        lambda data: data.partition(b"\n")[0],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: b"[" * 100_000 + data,
        lambda data: data.replace(b"policy-v1", b"policy-v2", 1),
        lambda data: not_finite(data),
        lambda data: without_sizes(data),
        lambda data: of_base(data, None),
        lambda data: of_base(data, lambda value: value + 1),
    ],
    ids=[
        "truncated",
        "one bit",
        "settings",
        "no values",
        "empty",
        "longer",
        "nested",
        "copied",
        "NaN",
        "sizes",
        "no base",
        "another base",
    ],
)
def test_a_damaged_file_is_refused(trainer: PeftModel, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = FolderTarget(tmp_path)
    version = Publisher(trainer, folder, "policy").publish()
    file = tmp_path / "policy-v1.vector"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"policy-v1.vector is no version of an adapter, or damaged"):
        folder.latest("policy")
    # It may have been read before the damage.
    with pytest.raises(ValueError, match="remove it, and publish again"):
        folder.put(version)


# What is refused.


@pytest.mark.parametrize("target", ["model", "bank"], indirect=True)
def test_a_target_of_another_layout_refuses(critic: Path, target: Target) -> None:
    """Vectors are as long, and mean something else."""
    with pytest.raises(ValueError, match="layout"):
        Publisher(adapted(critic, projection_seed=1), target, "policy").publish()
    assert newest("policy", target.names()) is None


@pytest.mark.parametrize("target", ["bank"], indirect=True)
def test_a_target_on_another_base_refuses(critic: Path, target: Target) -> None:
    other = base_of(critic)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    trainer = get_peft_model(other, dvora.DVoRAConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="the base models differ"):
        Publisher(trainer, target, "policy").publish()
    assert newest("policy", target.names()) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a/b"}, "name must be letters"),
        ({"name": ""}, "name must be letters"),
        ({"name": "x" * 101}, "name must be letters"),
        ({"keep": 0}, "keep must be a positive integer, got 0"),
        ({"keep": True}, "keep must be a positive integer, got True"),
        ({"adapter_name": "other"}, "there is no adapter 'other'"),
    ],
)
def test_wrong_arguments(trainer: PeftModel, tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Publisher(trainer, FolderTarget(tmp_path), **{"name": "policy", **arguments})


def test_a_target_of_ones_own(trainer: PeftModel) -> None:
    """A number whose put failed is not used again, and its version counts if it came."""

    class Lossy:
        def __init__(self) -> None:
            self.has: list[str] = []

        def names(self) -> Iterable[str]:
            return self.has

        def serves(self, name: str) -> bool:
            return name in self.has

        def put(self, version: AdapterVersion) -> None:
            if version.number not in (3, 4):
                self.has = [*self.has, version.name]
            if version.number in (3, 4, 6):
                raise TimeoutError("no answer")

        def drop(self, name: str) -> None:
            self.has = [other for other in self.has if other != name]

    target = Lossy()
    publisher = Publisher(trainer, target, "policy", keep=2)
    expected = {1: "1", 2: "12", 3: "12", 4: "12", 5: "25", 6: "256", 7: "67"}
    for number, there in expected.items():
        with pytest.raises(TimeoutError) if number in (3, 4, 6) else nullcontext():
            publisher.publish()
        assert target.has == [f"policy-v{digit}" for digit in there]
