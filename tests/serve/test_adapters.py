"""Adapters that come, change and go over HTTP, and are there again after a restart."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

import dvora
from dvora.adapter_file.packs import write_pack
from dvora.serve.server import Server
from dvora.serve.settings import Settings
from tests.peft.kinds import by_groups
from tests.serve.served import (
    ADMIN,
    TOKEN,
    Alone,
    answer_of,
    ask,
    copied,
    process,
    save_classifier,
    save_critics,
    serving,
)

VALUES = "adapter_model.safetensors"


@by_groups
def test_put_a_file_a_pack_and_a_vector(groups: int, critic: Path, tmp_path: Path) -> None:
    alone, these = Alone(critic), save_critics(critic, tmp_path / "adapters", 4, lambda_d_groups=groups)
    layout = dvora.flat.Layout.of(these / "a2")
    vector = layout.to_vector(these / "a2").numpy().tobytes()
    write_pack(tmp_path / "pack", {"anything": these / "a3"})
    with serving(critic, copied(these, tmp_path / "copy")) as (client, _):
        described = client.get("/v1/adapters").json()["layout"]
        assert (described["digest"], described["bytes"]) == (layout.digest, len(vector))
        for name, content, query in (
            ("file", (these / "a1" / VALUES).read_bytes(), {}),
            ("vector", vector, {"format": "vector"}),
            ("pack", (tmp_path / "pack").read_bytes(), {}),
        ):
            answer = client.put(f"/v1/adapters/{name}", content=content, params=query, headers=ADMIN)
            assert answer.status_code == 201
            assert answer.headers["x-dvora-digest"] == answer.json()["digest"] != ""
        for name, source in (("file", "a1"), ("vector", "a2"), ("pack", "a3")):
            assert answer_of(client, name) == alone.answer(these / source)
        # Equal contents have one digest, whichever way they came.
        assert client.get("/v1/adapters/vector").json()["digest"] == client.get("/v1/adapters/a2").json()["digest"]


def test_a_vector_has_the_strength_of_the_adapter_that_it_replaces(critic: Path, trained: Path, tmp_path: Path) -> None:
    adapters = copied(trained, tmp_path / "adapters")
    file = adapters / "a0" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "strength": 0.5}))
    before = dvora.DVoRAConfig.from_pretrained(str(adapters / "a0"))
    assert before.strength == 0.5
    vector = dvora.flat.Layout.of(adapters / "a0").to_vector(adapters / "a0").numpy().tobytes()
    with serving(critic, adapters) as (client, _):
        answer, digest = answer_of(client, "a0"), client.get("/v1/adapters/a0").json()["digest"]
        client.put("/v1/adapters/a0", content=vector, params={"format": "vector"}, headers=ADMIN).raise_for_status()
        assert answer_of(client, "a0") == answer
        assert client.get("/v1/adapters/a0").json()["digest"] == digest


@by_groups
def test_a_new_vector_means_what_it_means_in_the_adapter_that_it_is_of(groups: int, bert: Path, tmp_path: Path) -> None:
    """Whatever ranks, groups, scales and kinds of layers that has."""
    layers = {
        "target_modules": ["query", "key", "value"],
        "magnitude_modules": ["dense"],
        "exclude_modules": "pooler.*",
    }
    scales = {"rank_pattern": {"1.*query": 2, "value": 3}, "alpha": 0.1, "alpha_pattern": {"0.*key": 0.7}}
    of_method = {"projection_seed": 5, "projection_init": "kaiming_uniform", "direction": "weight"}
    of_method |= {"lambda_d_groups": groups}
    source = save_classifier(bert, tmp_path / "adapters" / "first", 1, 3, rank=7, **layers, **scales, **of_method)
    file = source / "adapter_config.json"
    file.write_text(file.read_text().replace('"classifier"', '"classifier", "a name of nothing"'))
    layout = dvora.flat.Layout.of(source)
    vector, query = layout.to_vector(source).numpy().tobytes(), {"format": "vector"}
    with serving(bert, tmp_path / "adapters") as (client, _):
        answer = client.put("/v1/adapters/new", content=vector, params=query, headers=ADMIN)
        assert answer.status_code == 201
        assert answer.json()["digest"] == client.get("/v1/adapters/first").json()["digest"]
        settings = client.get("/v1/adapters").json()["layout"]["settings"]
    assert settings["modules_to_save"] == ["classifier"]
    (stored,) = (tmp_path / "adapters" / ".served").glob("*/adapter_config.json")
    assert dvora.flat.Layout.of(stored.parent) == layout
    model = Alone(bert).merged(source, 3)
    torch.testing.assert_close(Alone(bert).merged(stored.parent, 3).state_dict(), model.state_dict())


def test_heads_of_any_size_and_names_of_classes(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    new = save_classifier(bert, tmp_path / "new", 9, 4)
    labels = ["north", "east", "south", "west"]
    with serving(bert, copied(classifiers, tmp_path / "adapters")) as (client, _):
        content = (new / VALUES).read_bytes()
        for query in ({"labels": labels}, {}):
            answer = client.put("/v1/adapters/wind", content=content, params=query, headers=ADMIN)
            # Kept when a new version comes without names.
            assert answer.json()["labels"] == labels
        twice = client.put("/v1/adapters/wind", content=content, params={"labels": ["a", "a", "b", "c"]}, headers=ADMIN)
        assert (twice.status_code, "one name" in twice.text) == (422, True)
        row = client.post("/v1/classify", json={"model": "wind", "input": "good"}).json()["data"][0]
    assert row["labels"] == labels
    assert row["probs"] == pytest.approx(Alone(bert).logits(new, 4, "good").softmax(-1).tolist(), abs=1e-5)


def test_the_dialect_of_vllm(critic: Path, trained: Path, tmp_path: Path) -> None:
    adapters = copied(trained, tmp_path / "adapters")
    with serving(critic, adapters) as (client, _):

        def load(**body: object) -> httpx.Response:
            return client.post("/v1/load_lora_adapter", json=body, headers=ADMIN)

        answer = load(lora_name="policy-v1", lora_path="a1")
        assert answer.text == "Success: LoRA adapter 'policy-v1' added successfully."
        assert load(lora_name="policy-v2", lora_path="a2").status_code == 200
        assert load(lora_name="policy-v1", lora_path="a2").status_code == 400
        # Several versions at once, each itself.
        assert answer_of(client, "policy-v1") == answer_of(client, "a1") != answer_of(client, "policy-v2")
        assert load(lora_name="policy-v1", lora_path="a2", load_inplace=True).status_code == 200
        assert answer_of(client, "policy-v1") == answer_of(client, "a2")
        assert load(lora_name="x", lora_path="a9").status_code == 404
        for path in ("../elsewhere", "/etc", str(trained / "a1"), ".served"):
            assert load(lora_name="x", lora_path=path).status_code in (400, 404), path
        unload = {"lora_name": "policy-v2"}
        assert client.post("/v1/unload_lora_adapter", json=unload, headers=ADMIN).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json=unload, headers=ADMIN).status_code == 404
        assert ask(client, "policy-v2").status_code == 404
        # The folders are the operator's.
        assert (adapters / "a2" / VALUES).is_file()


def test_only_who_has_the_token_changes_adapters(critic: Path, trained: Path, tmp_path: Path) -> None:
    values = (trained / "a1" / VALUES).read_bytes()
    load = {"lora_name": "x", "lora_path": "a1"}
    with serving(critic, copied(trained, tmp_path / "adapters")) as (client, server):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
            assert client.put("/v1/adapters/x", content=values, headers=headers).status_code == 401
            assert client.delete("/v1/adapters/a1", headers=headers).status_code == 401
            assert client.post("/v1/load_lora_adapter", json=load, headers=headers).status_code == 401
            assert client.post("/v1/unload_lora_adapter", json={"lora_name": "a1"}, headers=headers).status_code == 401
        assert len(server.base.bank) == 6
    with serving(critic, tmp_path / "adapters", token=None) as (client, _):
        assert client.delete("/v1/adapters/a1", headers=ADMIN).status_code == 403


@pytest.mark.parametrize("is_packed", [False, True], ids=["folder", "pack"])
def test_a_restart_serves_the_same(critic: Path, trained: Path, tmp_path: Path, is_packed: bool) -> None:
    adapters = tmp_path / "adapters"
    if is_packed:
        write_pack(adapters, {path.name: path for path in trained.iterdir()})
    else:
        copied(trained, adapters)
    values = (trained / "a5" / VALUES).read_bytes()
    with serving(critic, adapters) as (client, server):
        for name in ("a0", "new", "gone"):
            client.put(f"/v1/adapters/{name}", content=values, headers=ADMIN).raise_for_status()
        for name in ("a1", "gone"):
            client.delete(f"/v1/adapters/{name}", headers=ADMIN).raise_for_status()
        names = [version.name for version in server.registry.versions()]
        assert names == ["a0", "a2", "a3", "a4", "a5", "new"]
        answers = {name: answer_of(client, name) for name in names}
        digests = {name: client.get(f"/v1/adapters/{name}").json()["digest"] for name in names}
    with serving(critic, adapters) as (client, _):
        assert {card["id"] for card in client.get("/v1/models").json()["data"]} == {"critic", *names}
        assert {name: answer_of(client, name) for name in names} == answers
        assert {name: client.get(f"/v1/adapters/{name}").json()["digest"] for name in names} == digests


def test_an_adapter_that_changes_nothing_yet_is_there_after_a_restart(
    critic: Path, trained: Path, tmp_path: Path
) -> None:
    """Of a trainer before its first step."""
    config = dvora.DVoRAConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = AutoModelForSequenceClassification.from_pretrained(critic)
    get_peft_model(model, config).save_pretrained(tmp_path / "new")
    adapters = copied(trained, tmp_path / "adapters")
    for _ in range(2):
        with serving(critic, adapters) as (client, _):
            if "policy" not in {card["id"] for card in client.get("/v1/models").json()["data"]}:
                content = (tmp_path / "new" / VALUES).read_bytes()
                client.put("/v1/adapters/policy", content=content, headers=ADMIN).raise_for_status()
            assert answer_of(client, "policy") == Alone(critic).answer(None)


def test_an_empty_folder_takes_what_comes(critic: Path, trained: Path, tmp_path: Path) -> None:
    """A server that knows its adapters' layers from `like` alone, which it does not serve."""
    (tmp_path / "adapters").mkdir()
    with pytest.raises(ValueError, match="--adapters: there is none, so nobody knows which layers they have; put one"):
        Server(Settings(base=str(critic), adapters=tmp_path / "adapters"))
    with serving(critic, tmp_path / "adapters", like=trained / "a0") as (client, server):
        assert answer_of(client, "critic") == Alone(critic).answer(None)
        assert not server.registry.versions()
        values = (trained / "a1" / VALUES).read_bytes()
        vector = dvora.flat.Layout.of(trained / "a2").to_vector(trained / "a2").numpy().tobytes()
        for name, content, query in (("a2", vector, {"format": "vector"}), ("a1", values, {})):
            sent = client.put(f"/v1/adapters/{name}", content=content, params=query, headers=ADMIN)
            assert sent.status_code == 201
            assert answer_of(client, name) == Alone(critic).answer(trained / name)
        assert answer_of(client, "critic") == Alone(critic).answer(None)


def test_a_killed_server_starts_again_with_what_it_had(critic: Path, trained: Path, tmp_path: Path) -> None:
    """Killed while an adapter is replaced again and again: every start has the old one or the new one, whole."""
    adapters = copied(trained, tmp_path / "adapters")
    contents = {name: (trained / name / VALUES).read_bytes() for name in ("a1", "a2")}
    with process(critic, adapters) as (running, client):
        digests = {client.get(f"/v1/adapters/{name}").json()["digest"] for name in contents}
        client.delete("/v1/adapters/a3", headers=ADMIN).raise_for_status()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            for content in contents.values():
                client.put("/v1/adapters/a0", content=content, headers=ADMIN).raise_for_status()
        running.send_signal(signal.SIGKILL)
        running.wait()
    with serving(critic, adapters) as (client, server):
        assert client.get("/v1/adapters/a0").json()["digest"] in digests
        assert "a3" not in server.base.bank
        # Neither what was half written nor what was replaced is left.
        assert len([path for path in (adapters / ".served").iterdir() if path.is_dir()]) == 1


def waiting(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("dvora_queue_size "))


def test_sigterm_answers_what_was_taken(critic: Path, trained: Path, tmp_path: Path) -> None:
    """Also what still waits, since one row is computed at a time."""
    adapters = copied(trained, tmp_path / "adapters")
    with process(critic, adapters, "--batch-rows", "1") as (running, client), ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, client, "a0", ["good"] * 250) for _ in range(4)]
        # More than three of them have.
        while waiting(client) <= 750:
            assert not any(answer.done() for answer in answers), "it was answered before the signal"
        running.terminate()
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert running.wait(20) in (0, -signal.SIGTERM)


def test_a_change_whose_turn_comes_too_late_is_not_made(
    critic: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, goes_on = (adapters / "a1" / VALUES).read_bytes(), threading.Event()
    with serving(critic, adapters, timeout=1) as (client, server), ThreadPoolExecutor(2) as pool:
        keep = server.store.keep
        # As a disk that takes its time.
        monkeypatch.setattr(server.store, "keep", lambda version: (goes_on.wait(), keep(version)))
        begun = pool.submit(client.put, "/v1/adapters/begun", content=content, headers=ADMIN)
        time.sleep(0.5)
        late = pool.submit(client.put, "/v1/adapters/late", content=content, headers=ADMIN)
        time.sleep(1.5)
        goes_on.set()
        assert begun.result().status_code == 201
        assert late.result().status_code == 504
        assert "nothing was changed" in late.result().text
        assert client.get("/v1/adapters/late").status_code == 404
