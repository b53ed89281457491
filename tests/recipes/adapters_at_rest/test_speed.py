"""Timings: every method runs, what is timed is what is said, and one that cannot run says why."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dvora.recipes.adapters_at_rest.speed import CONFIGS, Speed, adapted, bench, decoding_step, training_step
from tests.recipes import tiny_models

# `bench` keeps quiet about it; transformers before 5.20 do not know the new name.
deprecated_name = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


@pytest.mark.parametrize(
    ("make", "inference"),
    [(tiny_models.bert, "forward"), (tiny_models.llama, "one token"), (tiny_models.vit, "forward")],
)
def test_every_method_is_timed_beside_the_base(make: object, inference: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    rounds = []
    found: Speed = bench(str(base), rank=5, low_rank=2, tokens=8, rounds=2, on_round=lambda: rounds.append(1))
    assert [timing.method for timing in found.timings] == ["base", *CONFIGS]
    assert [timing.rank for timing in found.timings] == [None, 2, 2, 5, 5, 5]
    assert inference in found.inference
    assert found.threads == torch.get_num_threads()
    assert found.dtype == "float32"
    assert len(rounds) == 4
    for timing in found.timings:
        assert timing.training_seconds is not None
        assert timing.training_seconds > 0
        assert timing.inference_ratio is not None
        assert timing.inference_ratio > 0
        assert bool(timing.trained) == (timing.method != "base")
    assert found.timings[0].training_ratio == 1


def test_kernels_are_counted_a_layer_beyond_the_bases(tmp_path: Path) -> None:
    found = bench(str(tiny_models.llama(tmp_path)), rank=5, low_rank=2, tokens=8, rounds=1)
    kernels = {timing.method: (timing.training_kernels, timing.inference_kernels) for timing in found.timings}
    # LoRA: two products, a strength and a sum. Backward: two products a matrix, the strength again, and a sum.
    assert kernels["base"] == (0, 0)
    assert kernels["lora"] == (10, 4)
    assert kernels["vera"] == (14, 5)
    assert all(training > inference > 4 for training, inference in (kernels["dvora"], kernels["dvora dense"]))


@deprecated_name
def test_methods_share_the_bases_weights_and_leave_them_alone(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_models.llama(tmp_path)).requires_grad_(False)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, "dvora", 4, ["q_proj"])
    ids = {"input_ids": torch.arange(3, 11)[None], "attention_mask": torch.ones(1, 8).long()}
    training_step(model, ids)()
    own = {p.data_ptr() for p in base.parameters()}
    assert all(p.requires_grad or p.data_ptr() in own for p in model.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    decoding_step(model, ids)()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before.items())


@deprecated_name
def test_the_decoded_token_is_the_one_after_the_prompt(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_models.llama(tmp_path)).eval()
    ids = torch.arange(3, 11)[None]
    step = decoding_step(base, {"input_ids": ids})
    step()
    with torch.no_grad():
        expected = base(ids).logits[:, -1]
    logits = []
    base.lm_head.register_forward_hook(lambda *call: logits.append(call[2]))
    step()
    step()
    torch.testing.assert_close(logits[0][:, -1], expected)
    assert torch.equal(logits[0], logits[1])
    assert logits[0].shape[1] == 1


def test_a_method_that_cannot_adapt_a_layer_says_why(tmp_path: Path) -> None:
    base = tiny_models.bert(tmp_path)
    found = bench(str(base), targets=["word_embeddings"], methods=["vera", "dvora"], rank=3, tokens=4, rounds=1)
    assert [timing.method for timing in found.timings] == ["base", "dvora", "vera"]
    assert "No layers types compatible with VeRA" in found.timings[-1].note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rounds": 0}, "rounds must be positive, got 0"), ({"methods": ["dvor"]}, "unknown method 'dvor', expected one")],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        bench(str(tiny_models.bert(tmp_path)), **arguments)
