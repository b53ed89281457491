"""What is on a server's disk: from strangers, damaged, half written, or not to be written; all else is served."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from safetensors.torch import load_file, save_file

import dvora
from dvora.adapter_file import uploads
from dvora.adapter_file.packs import write_pack
from dvora.serve import store
from tests.serve.served import ADMIN, Alone, answer_of, ask, copied, put, serving

SETTINGS, VALUES = "adapter_config.json", "adapter_model.safetensors"
OTHERS = ["a0", "a1", "a2", "a3", "a4", "a5"]


def names_of(client: httpx.Client) -> list[str]:
    return [card["name"] for card in client.get("/v1/adapters").json()["adapters"]]


def change_settings(folder: Path, **settings: object) -> None:
    file = folder / SETTINGS
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def entry(folder: str, is_upload: bool = True, digest: str = "0" * 32) -> dict[str, object]:
    return {"folder": folder, "labels": [], "is_upload": is_upload, "digest": digest}


def test_a_strangers_index_removes_and_reads_nothing_elsewhere(critic: Path, adapters: Path, tmp_path: Path) -> None:
    elsewhere = copied(adapters / "a1", tmp_path / "elsewhere")
    with serving(critic, adapters) as (client, _):
        # Or all of it would be refused as another content.
        digest = client.get("/v1/adapters/a1").json()["digest"]
    served = adapters / ".served"
    (served / "notes").mkdir()
    (served / ("0" * 16)).symlink_to(elsewhere)
    copied(elsewhere, served / ("1" * 16))
    (served / ("1" * 16) / VALUES).unlink()
    (served / ("1" * 16) / VALUES).symlink_to(elsewhere / VALUES)
    hostile = {
        "up": entry("../elsewhere", digest=digest),
        "beside": entry("../elsewhere", is_upload=False, digest=digest),
        "given": entry("a1", digest=digest),
        "link": entry(f".served/{'0' * 16}", digest=digest),
        "file": entry(f".served/{'1' * 16}", digest=digest),
        "dots": entry(f".served/../.served/{'1' * 16}", digest=digest),
    }
    (served / "index.json").write_text(json.dumps(hostile))
    with serving(critic, adapters) as (client, _):
        left_out = {card["name"] for card in client.get("/v1/adapters").json()["left_out"]}
        assert left_out == set(hostile)
        assert names_of(client) == OTHERS
        for name in hostile:
            assert client.delete(f"/v1/adapters/{name}", headers=ADMIN).status_code == 200
    assert sorted(path.name for path in elsewhere.iterdir()) == sorted([SETTINGS, VALUES, "README.md"])
    assert (served / "notes").is_dir()
    assert (adapters / "a1" / VALUES).is_file()


@pytest.mark.parametrize("name", ["", "lock", "changes", "index.json"])
def test_links_where_a_server_writes_are_refused(name: str, critic: Path, adapters: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim if name else victim / ("0" * 16)).mkdir(parents=True) if not name else victim.write_text("{}")
    (adapters / ".served").mkdir() if name else None
    (adapters / ".served" / name).symlink_to(victim)
    with pytest.raises(ValueError, match="is no plain file"):
        serving(critic, adapters).__enter__()
    assert victim.read_text() == "{}" if name else (victim / ("0" * 16)).is_dir()


def test_what_a_strangers_folder_has_besides_adapters_is_left_out(
    critic: Path, trained: Path, adapters: Path, tmp_path: Path
) -> None:
    """Links that lead out of it, names that are no text, an adapter for another class of the base."""
    (adapters / "link").symlink_to(trained / "a1")
    copied(adapters / "a1", adapters / "file")
    (adapters / "file" / VALUES).unlink()
    (adapters / "file" / VALUES).symlink_to(trained / "a1" / VALUES)
    copied(adapters / "a1", Path(os.fsdecode(os.fsencode(adapters) + b"/name-\xff")))
    shutil.copytree(adapters / "a1", adapters / "run" / "adapter")
    (adapters / "run" / "run.json").write_text(json.dumps({"labels": ["\ud800", "b"]}))
    change_settings(copied(adapters / "a1", adapters / "a"), task_type="FEATURE_EXTRACTION")
    with serving(critic, adapters) as (client, _):
        assert client.get("/readyz").json()["left_out"] == 4
        assert {card["name"] for card in client.get("/v1/models").json()["left_out"]} == {
            "link",
            "file",
            "name-?",
            "run",
        }
        assert names_of(client) == ["a", *OTHERS]
        assert answer_of(client, "a1") == Alone(critic).answer(trained / "a1")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def with_another_value(file: Path) -> None:
    values = load_file(file)
    name = sorted(values)[0]
    save_file({**values, name: values[name] + 0.25}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [truncated, with_another_value, Path.unlink])
def test_a_damaged_upload_is_left_out_and_the_rest_is_served(
    damage: Callable[[Path], None], critic: Path, adapters: Path
) -> None:
    with serving(critic, adapters) as (client, server):
        put(client, "tenant", adapters / "a1").raise_for_status()
        put(client, "other", adapters / "a2").raise_for_status()
        folder = adapters / server.store.index["tenant"].folder  # type: ignore[union-attr]
    damage(folder / VALUES)
    with serving(critic, adapters) as (client, _):
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["left_out"]) == (200, 1)
        (left_out,) = client.get("/v1/models").json()["left_out"]
        assert left_out["name"] == "tenant"
        assert str(adapters) not in left_out["reason"]
        answer = ask(client, "tenant")
        assert (answer.status_code, str(adapters) in answer.text) == (422, False)
        assert answer_of(client, "other") == answer_of(client, "a2")
        # A new one heals it.
        assert put(client, "tenant", adapters / "a3").status_code == 201
        assert answer_of(client, "tenant") == answer_of(client, "a3")
        assert client.get("/readyz").json()["left_out"] == 0


def test_what_a_killed_server_left_half_written_is_removed(critic: Path, adapters: Path) -> None:
    served = adapters / ".served"
    served.mkdir()
    (served / f".{'a' * 16}.unfinished").mkdir()
    (served / ".index.json.k3_x8m2a").write_text("{")
    (served / ("b" * 16)).mkdir()
    (served / "of the operator").write_text("")
    with serving(critic, adapters):
        assert sorted(path.name for path in served.iterdir()) == ["lock", "of the operator"]


def test_where_nothing_can_be_written_nothing_changes(critic: Path, adapters: Path) -> None:
    with serving(critic, adapters) as (client, server):
        put(client, "tenant", adapters / "a1").raise_for_status()
        index = adapters / ".served" / "index.json"
        index.rename(adapters / ".served" / "kept")
        # No file takes the place of a folder.
        index.mkdir()
        before, texts = sorted(server.base.bank), answer_of(client, "tenant")
        for answer in (
            put(client, "tenant", adapters / "a2"),
            put(client, "new", adapters / "a2"),
            client.delete("/v1/adapters/tenant", headers=ADMIN),
            client.delete("/v1/adapters/a0", headers=ADMIN),
        ):
            assert answer.status_code == 507, answer.text
        assert sorted(server.base.bank) == before
        assert (names_of(client), answer_of(client, "tenant")) == ([*OTHERS, "tenant"], texts)
        assert len([path for path in (adapters / ".served").glob("[0-9a-f]*") if path.is_dir()]) == 1


def test_who_puts_one_name_at_the_same_time_waits_for_the_others(critic: Path, adapters: Path) -> None:
    with serving(critic, adapters) as (client, server), ThreadPoolExecutor(12) as pool:
        vector = dvora.flat.Layout.of(adapters / "a0").to_vector(adapters / "a1").numpy().tobytes()

        def change(number: int) -> int:
            if number % 3 == 0:
                return put(client, "tenant", adapters / f"a{number % 5}").status_code
            if number % 3 == 1:
                query = {"format": "vector"}
                return client.put("/v1/adapters/tenant", content=vector, params=query, headers=ADMIN).status_code
            return client.get("/v1/adapters/tenant").status_code

        put(client, "tenant", adapters / "a0").raise_for_status()
        assert set(pool.map(change, range(90))) == {200}
        assert len(server.base.bank) == 7


def test_a_new_name_takes_nothing_of_another_adapter(critic: Path, adapters: Path) -> None:
    change_settings(adapters / "a0", strength=0.5)
    with serving(critic, adapters) as (client, _):
        assert put(client, "new", adapters / "a1").status_code == 201
        assert answer_of(client, "new") == answer_of(client, "a1") == Alone(critic).answer(adapters / "a1")
        # What replaces an adapter has that one's.
        digest = client.get("/v1/adapters/a0").json()["digest"]
        put(client, "a0", adapters / "a0").raise_for_status()
        assert client.get("/v1/adapters/a0").json()["digest"] == digest


def test_names_of_classes_are_an_adapters_own(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    adapters = copied(classifiers, tmp_path / "adapters")
    for name, labels in (("old", ["a", "b"]), ("later", ["c", "d"])):
        shutil.copytree(classifiers / "two", adapters / name / "adapter")
        (adapters / name / "run.json").write_text(json.dumps({"labels": labels}))
    with serving(bert, adapters) as (client, _):
        load = {"lora_name": "old", "lora_path": "later", "load_inplace": True}
        client.post("/v1/load_lora_adapter", json=load, headers=ADMIN).raise_for_status()
        assert client.get("/v1/adapters/old").json()["labels"] == ["c", "d"]
        load["lora_path"] = "two"
        client.post("/v1/load_lora_adapter", json=load, headers=ADMIN).raise_for_status()
        assert client.get("/v1/adapters/old").json()["labels"] == []
        assert put(client, "new", adapters / "three", labels=["x", "y"]).status_code == 422
        assert put(client, "new", adapters / "three", labels=["x", "y", "z"]).status_code == 201
        # Of three classes the names of two, or of two the names of three, would be others'.
        refused = put(client, "new", adapters / "two")
        assert refused.status_code == 422
        assert "there are 3, of the adapter before, and the head has 2 outputs; put it with labels=" in refused.text
        assert client.get("/v1/adapters/new").json()["labels"] == ["x", "y", "z"]
        assert put(client, "new", adapters / "two", labels=["x", "y"]).json()["labels"] == ["x", "y"]


@pytest.mark.parametrize("name", ["critic", "base"])
def test_no_adapter_is_called_as_the_base(name: str, critic: Path, adapters: Path) -> None:
    copied(adapters / "a1", adapters / name)
    with serving(critic, adapters) as (client, _):
        assert names_of(client) == OTHERS
        assert answer_of(client, "critic") == Alone(critic).answer(None)
        assert put(client, name, adapters / "a1").status_code == 400


def without_one_layer(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    values = load_file(target / VALUES)
    layer = sorted(values)[0].rpartition(".")[0]
    kept = {name: value for name, value in values.items() if not name.startswith(layer)}
    save_file(kept, target / VALUES, metadata={"format": "pt"})
    return target


def test_an_adapter_that_lacks_layers_says_nothing_of_others(critic: Path, adapters: Path) -> None:
    partial = without_one_layer(adapters / "a0", adapters / "a00")
    with serving(critic, adapters) as (client, _):
        assert names_of(client) == OTHERS
    with pytest.raises(ValueError, match="none of the 1 adapters can be served; --like: the adapter lacks bert"):
        serving(critic, adapters, like=partial).__enter__()


def test_an_upload_takes_no_more_than_it_brings(
    critic: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack of many adapters is refused before any is read, and headers are as large as adapters need."""
    for number in range(20):
        copied(adapters / "a1", tmp_path / "many" / f"x{number}")
        change_settings(tmp_path / "many" / f"x{number}", revision="r" * 100_000)
    write_pack(tmp_path / "bomb", {path.name: path for path in (tmp_path / "many").iterdir()})
    with serving(critic, adapters) as (client, _):
        assert "expected one" in put(client, "x", tmp_path / "bomb").text
        monkeypatch.setattr(uploads, "LARGEST_HEADER", 100)
        for file in (adapters / "a1" / VALUES, tmp_path / "bomb"):
            assert put(client, "x", file).status_code == 422


def test_an_upload_is_on_the_disk_before_it_is_answered(
    critic: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder with a new name is synced, and the index after them."""
    synced, sync = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with serving(critic, adapters) as (client, _):
        put(client, "tenant", adapters / "a1").raise_for_status()
    upload = next(place for place, name in enumerate(synced) if name.endswith(".unfinished"))
    assert {SETTINGS, VALUES} <= set(synced[:upload])
    assert synced[upload + 1] == ".served"
    assert synced[upload + 2].startswith(".index.json.")
    assert synced[upload + 3] == ".served"


def test_reasons_say_what_is_wrong_and_not_where(critic: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncated(adapters / "a0" / VALUES)
    monkeypatch.chdir(adapters.parent)
    adapters.rename("a")
    with serving(critic, Path("a")) as (client, _):
        (left_out,) = client.get("/v1/models").json()["left_out"]
    assert left_out["reason"].startswith("adapter_model.safetensors has")


@pytest.mark.parametrize("path", ["x\0y", "x" * 5000, "/" * 3000, "..", "."])
def test_paths_that_are_none(path: str, critic: Path, adapters: Path) -> None:
    with serving(critic, adapters) as (client, _):
        load = {"lora_name": "x", "lora_path": path}
        answer = client.post("/v1/load_lora_adapter", json=load, headers=ADMIN)
        assert answer.status_code in (400, 404)
        assert str(adapters.parent) not in answer.text


def test_no_upload_decides_what_the_base_is(critic: Path, adapters: Path, tmp_path: Path) -> None:
    """Of which class it is says the most frequent task of the adapters there at the start."""
    copied(adapters / "a1", tmp_path / "other")
    change_settings(tmp_path / "other", task_type="FEATURE_EXTRACTION")
    copied(adapters / "a1", tmp_path / "unnamed")
    change_settings(tmp_path / "unnamed", task_type=None, auto_mapping={"base_model_class": "BertModel"})
    (tmp_path / "empty").mkdir()
    for folder in (adapters, tmp_path / "empty"):
        with serving(critic, folder, like=adapters / "a1") as (client, _):
            for name in ("other", "unnamed"):
                write_pack(tmp_path / "pack", {"x": tmp_path / name})
                answer = put(client, "x", tmp_path / "pack")
                assert answer.status_code == 422
                assert "task_type" in answer.text
            write_pack(tmp_path / "pack", {"x": adapters / "a1"})
            assert put(client, "y", tmp_path / "pack").status_code == 201
        with serving(critic, folder) as (client, server):
            assert server.base.works == ("classify", "embed")
            assert answer_of(client, "y") == Alone(critic).answer(adapters / "a1")


def test_the_index_is_never_larger_than_is_read(
    critic: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LARGEST_INDEX", 1000)
    with serving(critic, adapters) as (client, _):
        answers = [put(client, f"x{number}", adapters / "a1").status_code for number in range(10)]
        assert answers.index(507) > 2
        assert put(client, "x0", adapters / "a1", labels=["a" * 257, "b"]).status_code == 400
        served = names_of(client)
        assert len(served) == 6 + answers.count(201)
    with serving(critic, adapters) as (client, _):
        assert names_of(client) == served


def test_what_was_acknowledged_is_there_after_a_disk_that_fails_late(
    critic: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index may have its name already, and not be on the disk."""
    with serving(critic, adapters) as (client, _):
        assert put(client, "x", adapters / "a1").status_code == 201
        first = answer_of(client, "x")

        def failing(descriptor: int) -> None:
            if Path(f"/proc/self/fd/{descriptor}").resolve() == adapters / ".served" and len(calls) < 2:
                calls.append(descriptor)
                if len(calls) == 2:
                    raise OSError(5, "Input/output error")

        calls = list[int]()
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing)
            assert put(client, "x", adapters / "a2").status_code == 507
        assert answer_of(client, "x") == first
    with serving(critic, adapters) as (client, _):
        assert answer_of(client, "x") == first


def test_pipes_loops_and_half_letters(critic: Path, adapters: Path) -> None:
    """All that a stranger's folder has is left out, or refused with its name; nobody waits for it."""
    served = adapters / ".served"
    served.mkdir()
    os.mkfifo(served / "index.json")
    with pytest.raises(ValueError, match=r"index.json is no plain file"):
        serving(critic, adapters).__enter__()
    (served / "index.json").unlink()
    (adapters / "loop").symlink_to(adapters / "loop")
    (adapters / "b").mkdir()
    shutil.copy(adapters / "a1" / SETTINGS, adapters / "b" / SETTINGS)
    (adapters / "b" / VALUES).symlink_to(adapters / "b" / VALUES)
    half = {**entry("a1", is_upload=False), "labels": ["\ud800"]}
    (served / "index.json").write_text(json.dumps({"half": half, "x": entry("loop", is_upload=False)}))
    with serving(critic, adapters) as (client, _):
        assert names_of(client) == OTHERS
        assert {one["name"] for one in client.get("/v1/adapters").json()["left_out"]} >= {"half", "x"}
        body = {"lora_name": "y", "lora_path": "loop"}
        assert client.post("/v1/load_lora_adapter", json=body, headers=ADMIN).status_code in (400, 404)


def test_an_adapter_whose_folder_is_gone_can_be_unloaded(critic: Path, adapters: Path, tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    with serving(critic, tmp_path / "steps", like=adapters / "a1") as (client, _):
        shutil.copytree(adapters / "a1", tmp_path / "steps" / "step1")
        body = {"lora_name": "policy", "lora_path": "step1"}
        client.post("/v1/load_lora_adapter", json=body, headers=ADMIN).raise_for_status()
        shutil.rmtree(tmp_path / "steps" / "step1")
        (tmp_path / "steps" / "step2").mkdir()
        assert client.delete("/v1/adapters/policy", headers=ADMIN).status_code == 200
        assert client.get("/v1/adapters/policy").status_code == 404
