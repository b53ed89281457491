"""Adapters of LoRA over HTTP, beside those of DVoRA."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dvora.adapter_file.packs import write_pack
from tests.serve.served import ADMIN, Alone, copied, serving, text_of


@pytest.fixture(scope="module")
def lora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the language model."""
    folder = tmp_path_factory.mktemp("lora") / "l0"
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(folder)
    return folder


def test_it_is_put_and_answers_beside_others_after_a_restart_too(
    llama: Path, language_adapters: Path, lora: Path, tmp_path: Path
) -> None:
    alone, adapters = Alone(llama), copied(language_adapters, tmp_path / "adapters")
    copied(lora, adapters / "given")
    write_pack(tmp_path / "pack", {"l0": lora})
    for is_restarted in (False, True):
        with serving(llama, adapters) as (client, _):
            if not is_restarted:
                sent = client.put("/v1/adapters/sent", content=(tmp_path / "pack").read_bytes(), headers=ADMIN)
                assert sent.status_code == 201
            for name, folder in (("sent", lora), ("given", lora), ("a1", language_adapters / "a1")):
                assert text_of(client, name) == alone.continued(folder, "the ", 12)
            digests = {client.get(f"/v1/adapters/{name}").json()["digest"] for name in ("sent", "given")}
            assert len(digests) == 1


def test_a_server_of_lora_alone_takes_adapters_of_dvora(
    llama: Path, language_adapters: Path, lora: Path, tmp_path: Path
) -> None:
    alone, adapters = Alone(llama), copied(lora, tmp_path / "adapters" / "l0").parent
    write_pack(tmp_path / "pack", {"a1": language_adapters / "a1"})
    with serving(llama, adapters) as (client, _):
        assert text_of(client, "l0") == alone.continued(lora, "the ", 12)
        client.put("/v1/adapters/a1", content=(tmp_path / "pack").read_bytes(), headers=ADMIN).raise_for_status()
        assert text_of(client, "a1") == alone.continued(language_adapters / "a1", "the ", 12)
        assert text_of(client, "l0") == alone.continued(lora, "the ", 12)
