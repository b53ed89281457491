"""Adapters of LoRA, (IA)3 and RoAd over HTTP, beside those of DVoRA."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from dvora.adapter_file.packs import write_pack
from tests.peft.other_methods import other
from tests.serve.served import ADMIN, Alone, copied, serving, text_of

SETTINGS = {
    "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "road": {"target_modules": ["q_proj", "down_proj"], "variant": "road_2"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def adapter(request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the language model."""
    folder = tmp_path_factory.mktemp(request.param) / "l0"
    model = AutoModelForCausalLM.from_pretrained(llama)
    return other(model, folder, request.param, task_type="CAUSAL_LM", **SETTINGS[request.param])


def test_it_is_put_and_answers_beside_others_after_a_restart_too(
    llama: Path, language_adapters: Path, adapter: Path, tmp_path: Path
) -> None:
    alone, adapters = Alone(llama), copied(language_adapters, tmp_path / "adapters")
    copied(adapter, adapters / "given")
    write_pack(tmp_path / "pack", {"l0": adapter})
    for is_restarted in (False, True):
        with serving(llama, adapters) as (client, _):
            if not is_restarted:
                sent = client.put("/v1/adapters/sent", content=(tmp_path / "pack").read_bytes(), headers=ADMIN)
                assert sent.status_code == 201
            for name, folder in (("sent", adapter), ("given", adapter), ("a1", language_adapters / "a1")):
                assert text_of(client, name) == alone.continued(folder, "the ", 12)
            digests = {client.get(f"/v1/adapters/{name}").json()["digest"] for name in ("sent", "given")}
            assert len(digests) == 1


def test_a_server_of_it_alone_takes_adapters_of_dvora_that_it_knows_the_layers_of(
    llama: Path, language_adapters: Path, adapter: Path, tmp_path: Path
) -> None:
    alone, adapters = Alone(llama), copied(adapter, tmp_path / "adapters" / "l0").parent
    write_pack(tmp_path / "pack", {"a1": language_adapters / "a1"})
    content = (tmp_path / "pack").read_bytes()
    with serving(llama, adapters) as (client, _):
        refused = client.put("/v1/adapters/a1", content=content, headers=ADMIN)
        assert refused.status_code == 422
        assert "begin with like= of one of DVoRA (dvora serve: --like)" in refused.text
    with serving(llama, adapters, like=language_adapters / "a0") as (client, _):
        assert text_of(client, "l0") == alone.continued(adapter, "the ", 12)
        client.put("/v1/adapters/a1", content=content, headers=ADMIN).raise_for_status()
        assert text_of(client, "a1") == alone.continued(language_adapters / "a1", "the ", 12)
        assert text_of(client, "l0") == alone.continued(adapter, "the ", 12)


def test_slots_follow_from_the_adapters_that_are_there(
    llama: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as have room for the largest; one that comes later and has none is refused by the server's options."""
    alone, adapters = Alone(llama), copied(adapter, tmp_path / "adapters" / "l0").parent
    with serving(llama, adapters, head_memory=2**-17, slots=256) as (client, _):
        assert text_of(client, "l0") == alone.continued(adapter, "the ", 12)
        slots = client.get("/info").json()["slots"]
        assert 1 <= slots < 256
        assert f"{slots} slots, not 256: the head and factors of l0 take" in caplog.text
        model = AutoModelForCausalLM.from_pretrained(llama)
        large = other(model, tmp_path / "large", "lora", task_type="CAUSAL_LM", r=512, target_modules="all-linear")
        write_pack(tmp_path / "large.pack", {"large": large})
        refused = client.put("/v1/adapters/large", content=(tmp_path / "large.pack").read_bytes(), headers=ADMIN)
        assert refused.status_code == 422
        assert "start the server with more --head-memory or fewer --slots" in refused.text
        assert "head_bytes" not in refused.text


def test_values_of_lora_without_settings_need_a_pack(llama: Path, language_adapters: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    lora = other(model, tmp_path / "lora", "lora", task_type="CAUSAL_LM", **SETTINGS["lora"])
    values = (lora / "adapter_model.safetensors").read_bytes()
    with serving(llama, copied(language_adapters, tmp_path / "adapters")) as (client, _):
        refused = client.put("/v1/adapters/new", content=values, headers=ADMIN)
        assert refused.status_code == 422
        assert "does not say its alpha; send its folder as a pack (`dvora bank pack`)" in refused.text
        write_pack(tmp_path / "pack", {"new": lora})
        client.put("/v1/adapters/new", content=(tmp_path / "pack").read_bytes(), headers=ADMIN).raise_for_status()
        # Under its own name its settings are there.
        assert client.put("/v1/adapters/new", content=values, headers=ADMIN).status_code == 200
