"""What strangers send: refused with a status and a sentence, and the server goes on serving what it served."""

import random
from contextlib import suppress
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from safetensors.torch import load, save
from transformers import BertForSequenceClassification

from dvora.adapter_file.packs import write_pack
from dvora.serve import bounds, connections
from tests.recipes import tiny_models
from tests.serve.served import ADMIN, Alone, Serving, answer_of, ask, copied, save_classifier, serving
from tests.serve.test_connections import POST, connected

VALUES = "adapter_model.safetensors"


def changed(values: bytes, change: object) -> bytes:
    tensors = load(values)
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    return save(tensors)


def hostile_uploads(values: bytes, count: int) -> list[bytes]:
    """An adapter cut off, with a damaged header, or something else altogether."""
    draw, length = random.Random(0), 8 + int.from_bytes(values[:8], "little")
    uploads = [
        b"PK\x03\x04" + bytes(100),
        b"\x80\x04\x95" + bytes(100),
        bytes(8),
        b"\xff" * 64,
        (2**40).to_bytes(8, "little") + b"{}",
        changed(values, lambda tensor: tensor * torch.nan),
        changed(values, lambda tensor: tensor.fill_(torch.inf)),
        changed(values, lambda tensor: tensor[:-1].clone()),
        changed(values, lambda tensor: tensor.double()),
        save({"other": torch.zeros(3)}),
    ]
    while len(uploads) < count:
        if draw.random() < 0.5:
            uploads.append(values[: draw.randrange(1, len(values))])
        else:
            damaged = bytearray(values)
            for _ in range(draw.randint(1, 8)):
                damaged[draw.randrange(length)] = draw.choice(b'\0{}[]",:9\xff')
            # Some only exchange a letter of a name's length with itself.
            uploads += [bytes(damaged)] * (bytes(damaged) != values)
    return uploads


def test_hostile_uploads(critic: Path, trained: Path, tmp_path: Path) -> None:
    values = (trained / "a1" / VALUES).read_bytes()
    adapters = copied(trained, tmp_path / "adapters")
    other = save_classifier(other_critic(tmp_path), tmp_path / "other", 0, 3)
    write_pack(tmp_path / "two", {"x": trained / "a1", "y": trained / "a2"})
    write_pack(tmp_path / "of_another_base", {"x": other})
    uploads = [*hostile_uploads(values, 200), *((tmp_path / name).read_bytes() for name in ("two", "of_another_base"))]
    with serving(critic, adapters) as (client, server):
        for number, upload in enumerate(uploads):
            answer = client.put("/v1/adapters/a0", content=upload, headers=ADMIN)
            assert answer.status_code == 422, (number, answer.text)
            assert len(answer.json()["error"]["message"]) > 20
        for query, content in (({}, b""), ({"format": "vector"}, bytes(12)), ({"format": "vector"}, bytes(13))):
            assert client.put("/v1/adapters/a0", content=content, params=query, headers=ADMIN).status_code in (400, 422)
        assert answer_of(client, "a0") == Alone(critic).answer(trained / "a0")
        assert sorted(server.base.bank) == [f"a{number}" for number in range(6)]
        assert [path.name for path in (adapters / ".served").iterdir()] == ["lock"]


def other_critic(folder: Path) -> Path:
    """Another base of the same shapes."""
    base = tiny_models.classifier(folder / "base")
    model = BertForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(base)
    return base


@pytest.mark.parametrize("name", ["..%2F..%2Fx", ".hid", "a:b", "critic", "a" * 129, "x%00y", "%20"])
def test_names_that_no_adapter_can_have(name: str, critic: Path, trained: Path, tmp_path: Path) -> None:
    values = (trained / "a1" / VALUES).read_bytes()
    base = copied(critic, tmp_path / "critic")
    with serving(base, copied(trained, tmp_path / "adapters")) as (client, server):
        assert client.put(f"/v1/adapters/{name}", content=values, headers=ADMIN).status_code in (400, 404)
        assert len(server.base.bank) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "critic"]


def test_bodies_that_are_too_large(
    critic: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1)
    adapters = copied(trained, tmp_path / "adapters")
    with serving(critic, adapters, upload=10_000) as (client, _):
        assert client.put("/v1/adapters/x", content=bytes(10_001), headers=ADMIN).status_code == 413

        def endless() -> object:
            while True:
                yield bytes(10_000)

        # It hangs up in the middle of our sending, perhaps before we read why.
        with suppress(httpx.HTTPError):
            assert client.put("/v1/adapters/x", content=endless(), headers=ADMIN).status_code == 413  # type: ignore[arg-type]
        json_body = {"content-type": "application/json"}
        too_large = client.post("/v1/classify", content=bytes(bounds.LARGEST_JSON + 1), headers=json_body)
        assert too_large.status_code == 413
        assert ask(client, "a0").status_code == 200


def test_a_slow_body_is_given_up(critics: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "BODY_SECONDS", 0.5)
    client, _ = critics
    with connected(client, POST + b"Content-Length: 100\r\n\r\n{") as slow:
        assert b" 408 " in slow.recv(1000)


def test_damaged_adapters_fail_alone(critic: Path, trained: Path, tmp_path: Path) -> None:
    """Values that are damaged in their folder show when they are first used: to who asks for them, and nobody else."""
    adapters = copied(trained, tmp_path / "adapters")
    file = adapters / "a3" / VALUES
    file.write_bytes(changed(file.read_bytes(), lambda tensor: tensor * torch.nan))
    with serving(critic, adapters) as (client, _):
        answer = ask(client, "a3")
        assert answer.status_code == 422
        assert "a3" in answer.json()["error"]["message"]
        assert ask(client, "a2").status_code == 200
        assert client.get("/healthz").status_code == 200
