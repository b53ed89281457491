"""vLLM's answers with adapters of DVoRA: those of merged models, never another adapter's, the base's or yesterday's."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dvora_vllm
import pytest
from dvora_vllm.private import MEMBERS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from materials.models import smollm2

from .conftest import Client, Merged, perturb, save_adapters, save_base, serving


def mixed(count: int, vocabulary: int, adapters: int = 16) -> tuple[list[str | None], list[list[int]]]:
    """Requests to all adapters and to the base, in an order of chance, with prompts of 1 to 80 tokens."""
    chance = random.Random(0)
    names = [None if number % (adapters + 1) == adapters else f"a{number % (adapters + 1)}" for number in range(count)]
    chance.shuffle(names)
    prompts = [[chance.randrange(4, vocabulary) for _ in range(chance.randint(1, 80))] for _ in names]
    return names, prompts


def test_answers_in_mixed_batches_are_those_of_merged_models(client: Client, merged: Merged) -> None:
    names, prompts = mixed(200, vocabulary=96)
    answers = client.answers(names, prompts)
    assert answers == merged.answers(names, prompts, answers)
    # The prompts are different, and so are adapters for one prompt.
    assert len({tuple(client.answer(name, prompts[0])) for name in (None, "a0", "a1", "a2")}) == 4


@pytest.mark.parametrize("groups", [1, 16], ids=["one group", "groups"])
def test_answers_of_a_real_model_are_those_of_merged_models(groups: int, tmp_path: Path) -> None:
    base = smollm2()
    adapters = save_adapters(base, tmp_path / "adapters", 16, size=0.02, r=64, lambda_d_groups=groups)
    names, prompts = mixed(200, vocabulary=40_000)
    with serving(base, adapters) as client:
        answers = client.answers(names, prompts)
    assert answers == Merged(base, adapters).answers(names, prompts, answers)


def test_a_replaced_adapter_gets_no_blocks_of_the_old_one(client: Client, adapters: Path, merged: Merged) -> None:
    shutil.copytree(adapters / "a0", adapters / "changing")
    prompt = mixed(1, vocabulary=96)[1][0] * 400
    prompt = prompt[:400]
    old = client.answer("changing", prompt)
    before = prefix_hits(client)
    assert client.answer("changing", prompt) == old
    assert prefix_hits(client) > before, "the second time has no blocks of the first, so this test shows nothing"
    perturb(adapters / "changing", 100)
    # Until it is unloaded, its name is the old one's.
    assert client.answer("changing", prompt) == old
    assert client.post("/v1/unload_lora_adapter", lora_name="changing")[0] == 200
    new = client.answer("changing", prompt)
    assert new == merged.answer("changing", prompt, new)
    assert new != old


def prefix_hits(client: Client) -> float:
    found = re.search(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", client.get("/metrics"), flags=re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_an_adapter_of_another_base_is_refused(client: Client, adapters: Path, tmp_path: Path) -> None:
    foreign = save_adapters(save_base(tmp_path / "other", seed=1), tmp_path / "adapters", 1)
    shutil.copytree(foreign / "a0", adapters / "foreign")
    status, text = client.post("/v1/completions", model="foreign", prompt=[5, 6], max_tokens=1)
    assert status == 400
    assert "was found but could not be loaded" in text
    assert "the base models differ" in client.log.read_text()
    # The server goes on.
    assert client.answer("a0", [5, 6])


def test_other_adapters_are_refused(client: Client, base: Path, adapters: Path) -> None:
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(adapters / "lora")
    save_adapters(base, adapters / "heads", 1, modules_to_save=["lm_head"], target_modules=["q_proj"])
    shutil.copytree(adapters / "a0", adapters / "cut")
    values = adapters / "cut" / "adapter_model.safetensors"
    values.write_bytes(values.read_bytes()[:-4])
    (adapters / "heads" / "a0").rename(adapters / "head")
    refused = {"lora": "LORA", "head": "", "cut": "truncated", "none": "does not exist", "../adapters/a0": "does not"}
    for name, words in refused.items():
        status, text = client.post("/v1/completions", model=name, prompt=[5, 6], max_tokens=1)
        assert status in (400, 404), name
        assert words in text, (name, text)
    assert "serves vectors of linear layers only" in client.log.read_text()


def test_paths_without_a_digest_and_loads_in_place_are_refused(client: Client, adapters: Path) -> None:
    status, _ = client.post("/v1/load_lora_adapter", lora_name="plain", lora_path=str(adapters / "a1"))
    assert status >= 400
    assert "an adapter's path must end in the digest of its content" in client.log.read_text()
    client.answer("a1", [5, 6])
    copy = next(path for path in (adapters / ".vllm").iterdir())
    status, _ = client.post("/v1/load_lora_adapter", lora_name="x", lora_path=str(copy), load_inplace=True)
    assert status >= 400
    assert "vLLM would read the adapter again in every step" in client.log.read_text()


OFFLINE = """
import sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from dvora_vllm import lora_request

base, folder = sys.argv[1:]
llm = LLM(base, dtype="float32", enable_lora=True, max_model_len=512, skip_tokenizer_init=True)
prompt, greedy = {"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)

def answer(name):
    request = name and lora_request(name, f"{folder}/{name}")
    return list(llm.generate([prompt], greedy, lora_request=request)[0].outputs[0].token_ids)

def refused(call):
    try:
        call()
    except Exception as error:
        return str(error)

print("ANSWERS", [answer(name) for name in ("a0", "a1", None)])
first, second = (lora_request(name, f"{folder}/{name}") for name in ("a1", "a2"))
print("NUMBER", refused(lambda: llm.llm_engine.add_lora(LoRARequest("other", first.lora_int_id, second.lora_path))))
llm.collective_rpc("reload_weights")
print("REPLACED", refused(lambda: llm.llm_engine.add_lora(second)))
"""


def test_offline(base: Path, adapters: Path, merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers, a number that is another adapter's, and weights that are replaced."""
    monkeypatch.setenv("DVORA_ADAPTERS", str(adapters))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    ended = subprocess.run(
        [sys.executable, "-c", OFFLINE, base, adapters], capture_output=True, text=True, timeout=200, check=False
    )
    said = dict(re.findall(r"^(ANSWERS|NUMBER|REPLACED) (.*)$", ended.stdout, flags=re.MULTILINE))
    assert said.keys() == {"ANSWERS", "NUMBER", "REPLACED"}, ended.stdout + ended.stderr
    for name, answer in zip(("a0", "a1", None), json.loads(said["ANSWERS"]), strict=True):
        assert answer == merged.answer(name, [5, 6, 7], answer)
    assert "has the number of another adapter" in said["NUMBER"] + ended.stdout + ended.stderr
    assert "the base's weights were replaced" in said["REPLACED"] + ended.stdout + ended.stderr


def test_settings_that_were_never_tried_are_refused(base: Path, adapters: Path) -> None:
    # Bound to cores, two workers need two NUMA nodes.
    two = serving(base, adapters, "-tp", "2", VLLM_CPU_OMP_THREADS_BIND="nobind")
    with pytest.raises(RuntimeError, match="dvora-vllm does not serve"), two:
        pass


def test_without_a_folder_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.v1.worker import lora_model_runner_mixin

    monkeypatch.delenv("DVORA_ADAPTERS", raising=False)
    dvora_vllm.register()
    assert lora_model_runner_mixin.LRUCacheWorkerLoRAManager is LRUCacheWorkerLoRAManager
    assert "dvora" not in LoRAResolverRegistry.get_supported_resolvers()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DVORA_ADAPTERS", str(tmp_path))
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(RuntimeError, match=r"works with vLLM 0\.32\.0, and 0\.33\.0 is installed"):
        dvora_vllm.register()


def test_the_private_names_are_there() -> None:
    assert [(owner, name) for owner, names in MEMBERS.items() for name in names if name not in dir(owner)] == []
