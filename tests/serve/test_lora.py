"""Adapters of LoRA over HTTP, beside those of DVoRA."""

from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from dvora.adapter_file.packs import write_pack
from tests.peft.lora import lora
from tests.serve.served import ADMIN, Alone, answer_of, copied, serving


@pytest.fixture(scope="module")
def adapter(critic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the critic."""
    return saved(critic, tmp_path_factory.mktemp("lora") / "l0", r=4, target_modules=["query", "output.dense"])


def saved(critic: Path, folder: Path, **settings: object) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(critic)
    return lora(model, folder, task_type="SEQ_CLS", **settings)


def test_it_is_put_and_answers_beside_others_after_a_restart_too(
    critic: Path, trained: Path, adapter: Path, tmp_path: Path
) -> None:
    alone, adapters = Alone(critic), copied(trained, tmp_path / "adapters")
    copied(adapter, adapters / "given")
    write_pack(tmp_path / "pack", {"l0": adapter})
    for is_restarted in (False, True):
        with serving(critic, adapters) as (client, _):
            if not is_restarted:
                sent = client.put("/v1/adapters/sent", content=(tmp_path / "pack").read_bytes(), headers=ADMIN)
                assert sent.status_code == 201
            for name, folder in (("sent", adapter), ("given", adapter), ("a1", trained / "a1")):
                assert answer_of(client, name) == alone.answer(folder)
            digests = {client.get(f"/v1/adapters/{name}").json()["digest"] for name in ("sent", "given")}
            assert len(digests) == 1


def test_a_server_of_it_alone_takes_adapters_of_dvora_that_it_knows_the_layers_of(
    critic: Path, trained: Path, adapter: Path, tmp_path: Path
) -> None:
    alone, adapters = Alone(critic), copied(adapter, tmp_path / "adapters" / "l0").parent
    write_pack(tmp_path / "pack", {"a1": trained / "a1"})
    content = (tmp_path / "pack").read_bytes()
    with serving(critic, adapters) as (client, _):
        refused = client.put("/v1/adapters/a1", content=content, headers=ADMIN)
        assert refused.status_code == 422
        assert "begin with like= of one of DVoRA (dvora serve: --like)" in refused.text
    with serving(critic, adapters, like=trained / "a0") as (client, _):
        assert answer_of(client, "l0") == alone.answer(adapter)
        client.put("/v1/adapters/a1", content=content, headers=ADMIN).raise_for_status()
        assert answer_of(client, "a1") == alone.answer(trained / "a1")
        assert answer_of(client, "l0") == alone.answer(adapter)


def test_slots_follow_from_the_adapters_that_are_there(
    critic: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as have room for the largest; one that comes later and has none is refused by the server's options."""
    alone, adapters = Alone(critic), copied(adapter, tmp_path / "adapters" / "l0").parent
    with serving(critic, adapters, head_memory=2**-17, slots=256) as (client, _):
        assert answer_of(client, "l0") == alone.answer(adapter)
        slots = client.get("/info").json()["slots"]
        assert 1 <= slots < 256
        assert f"{slots} slots, not 256: the head and factors of l0 take" in caplog.text
        large = saved(critic, tmp_path / "large", r=512, target_modules="all-linear")
        write_pack(tmp_path / "large.pack", {"large": large})
        refused = client.put("/v1/adapters/large", content=(tmp_path / "large.pack").read_bytes(), headers=ADMIN)
        assert refused.status_code == 422
        assert "start the server with more --head-memory or fewer --slots" in refused.text
        assert "head_bytes" not in refused.text


def test_values_of_lora_without_settings_need_a_pack(
    critic: Path, trained: Path, adapter: Path, tmp_path: Path
) -> None:
    values = (adapter / "adapter_model.safetensors").read_bytes()
    with serving(critic, copied(trained, tmp_path / "adapters")) as (client, _):
        refused = client.put("/v1/adapters/new", content=values, headers=ADMIN)
        assert refused.status_code == 422
        assert "does not say its alpha; send its folder as a pack (`dvora bank pack`)" in refused.text
        write_pack(tmp_path / "pack", {"new": adapter})
        client.put("/v1/adapters/new", content=(tmp_path / "pack").read_bytes(), headers=ADMIN).raise_for_status()
        # Under its own name its settings are there.
        assert client.put("/v1/adapters/new", content=values, headers=ADMIN).status_code == 200
