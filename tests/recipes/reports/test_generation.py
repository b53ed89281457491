"""Continuations: the adapted model's and the base's, as if each were alone; drawn from a seed and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from dvora.recipes.files import checked
from dvora.recipes.models.bases import quiet_transformers
from dvora.recipes.reports.generation import Continuation, Generator, text_after
from dvora.recipes.reports.run_model import as_run
from dvora.recipes.run_folder import Run
from dvora.recipes.settings import Sampling
from tests.recipes.finished_runs import finished
from tests.recipes.saved_adapters import save

PROMPT = "the movie was"
GREEDY, DRAWN = Sampling(max_new_tokens=12), Sampling(max_new_tokens=12, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished("causal-lm", tmp_path_factory.mktemp("play"))


@pytest.fixture(scope="module")
def generator(run: Run) -> Generator:
    return Generator(run)


def likeliest(model: Any, tokenizer_folder: Path, prompt: str) -> str:
    """The likeliest tokens after a prompt, one forward pass of the whole text each."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokens = start = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(GREEDY.max_new_tokens):
        with torch.no_grad():
            best = model.eval()(input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)
        if best.item() == tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, best], 1)
    return str(tokenizer.decode(tokens[0, start.shape[1] :], skip_special_tokens=True))


def test_each_side_is_what_its_model_says_alone(run: Run, generator: Generator, models: dict[str, Path]) -> None:
    found = generator.continued(PROMPT, GREEDY)
    assert found.prompt == PROMPT
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    assert found.without_adapter == likeliest(base, models["llama"], PROMPT)
    with quiet_transformers():
        adapted = PeftModel.from_pretrained(base, run.adapter)
    assert found.with_adapter == likeliest(adapted, models["llama"], PROMPT)
    assert found.with_adapter != found.without_adapter
    # The adapter is on again.
    assert generator.continued(PROMPT, GREEDY) == found


def test_without_the_base_or_without_its_run(run: Run, generator: Generator, models: dict[str, Path]) -> None:
    expected = generator.continued(PROMPT, GREEDY)
    alone = Generator(run, compares=False).continued(PROMPT, GREEDY)
    assert alone == replace(expected, without_adapter=None)
    for base in (None, str(models["llama"])):
        assert Generator(as_run(run.adapter, base)).continued(PROMPT, GREEDY) == expected


def test_a_run_that_trained_everything(models: dict[str, Path], tmp_path: Path) -> None:
    run = finished("causal-lm", tmp_path, method="full", learning_rate=0.01)
    found = Generator(run).continued(PROMPT, GREEDY)
    for folder, text in ((run.adapter, found.with_adapter), (models["llama"], found.without_adapter)):
        assert text == likeliest(AutoModelForCausalLM.from_pretrained(folder), models["llama"], PROMPT)


def test_draws_depend_on_the_seed_alone(generator: Generator) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = generator.continued(PROMPT, DRAWN)
    assert torch.equal(torch.rand(3), expected)
    generator.continued("another prompt", DRAWN)
    assert generator.continued(PROMPT, DRAWN) == first
    assert generator.continued(PROMPT, DRAWN.model_copy(update={"seed": 4})) != first
    assert generator.continued(PROMPT, DRAWN.model_copy(update={"temperature": 0.0})) != first


def test_drawing_from_the_likeliest_alone_is_greedy(generator: Generator) -> None:
    expected = generator.continued(PROMPT, GREEDY)
    assert generator.continued(PROMPT, DRAWN.model_copy(update={"top_k": 1})) == expected
    assert generator.continued(PROMPT, DRAWN.model_copy(update={"top_p": 1e-6})) == expected
    assert generator.continued(PROMPT, GREEDY.model_copy(update={"repetition_penalty": 5.0})) != expected


def test_what_the_model_says_of_drawing_is_overruled(run: Run, generator: Generator) -> None:
    expected = [generator.continued(PROMPT, sampling) for sampling in (GREEDY, DRAWN)]
    other = Generator(run)
    own = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=2, top_p=0.5, num_beams=3, max_length=20, eos_token_id=3
    )
    other.model.base_model.model.generation_config = own
    assert [other.continued(PROMPT, sampling) for sampling in (GREEDY, DRAWN)] == expected


def test_a_chat_goes_through_the_template(run: Run, generator: Generator) -> None:
    # The template of the tiny model, written out.
    asked = "[CLS] user is it? [SEP] [CLS] assistant"
    plain = generator.continued(asked, GREEDY)
    chat = generator.continued("is it?", GREEDY, is_chat=True)
    assert chat == replace(plain, prompt="is it?")
    assert generator.continued("is it?", GREEDY, is_chat=True, system="no") != chat
    other = Generator(run)
    other.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        other.continued("is it?", GREEDY, is_chat=True)


def test_a_text_ends_where_the_model_cannot_read_on(generator: Generator) -> None:
    found = generator.continued("x" * 60, Sampling(max_new_tokens=1000))
    assert isinstance(found, Continuation)
    assert len(found.with_adapter) <= 4
    with pytest.raises(ValueError, match="the prompt has 64 tokens, but the model reads 64"):
        generator.continued("x" * 64, GREEDY)
    with pytest.raises(ValueError, match="the prompt is empty"):
        generator.continued("", GREEDY)


def test_the_space_between_prompt_and_continuation_is_kept() -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0, "▁the": 1, "▁movie": 2, "s": 3}, unk_token="[UNK]"))
    words.decoder = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokens = torch.tensor([1, 2, 3, 1])
    assert [text_after(tokens, start, tokenizer) for start in (1, 2, 3)] == [" movies the", "s the", " the"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: input should be greater than or equal to 1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p is 1\.5: input should be less than or equal to 1"),
        ({"top_k": 5}, "top_k is set but temperature is 0"),
    ],
)
def test_values_out_of_range_are_reported(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(Sampling, values)


def test_an_adapter_that_names_no_base_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    save(models["llama"], tmp_path, task_type="CAUSAL_LM")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "DVORA"}')
    with pytest.raises(ValueError, match="does not name its base model; give it with --model"):
        as_run(tmp_path, None)
