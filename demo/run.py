"""The run itself: data and model, a head for the frozen model, DVoRA from there, and checks of what is promised."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer

from demo.check import THREADS, logits_in_a_fresh_process, quiet
from demo.many import many_adapters, print_many
from demo.model import add_adapter, load_classifier, trainable_parameters
from demo.plot import save_plot
from demo.report import Findings, compare, print_findings, print_predictions, save_findings
from demo.statistics import layer_changes, linear_weights
from demo.train import Settings, encode, train_adapter, train_head
from materials.batches import labelled, unlabelled
from materials.data import movie_reviews
from materials.models import minilm

HERE = Path(__file__).parent
# The run that the README quotes.
RECORD = HERE.parent / "benchmarks" / "results" / "demo.json"
SEED = 0
SETTINGS = Settings(
    passes=1, batch=32, lambda_rate=3e-2, magnitude_rate=3e-3, head_rate=1e-3, warmup=0.1, evaluations=3
)
SAME = 400
"""Test sentences on which the loaded and the merged model are compared with the trained one."""
# Sentences for training, validation and test with --quick.
QUICK = (480, 100, 200)
EXAMPLES = (
    "A warm, funny and quietly brave little film.",
    "Two hours of my life that I will never get back.",
    "It wants to be clever, and for a while you almost believe it.",
)


def run(options: Namespace) -> None:
    """Run the demo.

    Args:
        options: sentence, quick, record and out, as `demo.__main__` explains them.

    Raises:
        FetchError: the model or the data cannot be fetched.
        OSError: the folder `out` cannot be written to.
    """
    console = Console()
    torch.set_num_threads(THREADS)
    quiet()
    adapter_folder = options.out / "adapter"
    adapter_folder.mkdir(parents=True, exist_ok=True)

    # The data and the model; the first run fetches them.
    task, model_folder = movie_reviews(SEED), minilm()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    parts = [labelled(part, tokenizer) for part in (task.train, task.validation, task.test)]
    if options.quick:
        parts = [part.first(count) for part, count in zip(parts, QUICK, strict=True)]
    train, validation, test = parts

    # The frozen model, with the best head for its features.
    model = load_classifier(model_folder)
    with _doing("Fitting a head to the frozen model", console):
        train_head(model, train, validation)
        frozen_logits = encode(model, test)
    head_parameters = trainable_parameters(model.classifier)
    weights_before = linear_weights(model)

    # DVoRA, from there.
    console.print("Training DVoRA on", f"{len(train):,} sentences", highlight=False)
    adapted = add_adapter(model)
    dvora_parameters = trainable_parameters(adapted)
    history = train_adapter(adapted, train, validation, SETTINGS, np.random.default_rng(SEED))
    adapted.save_pretrained(adapter_folder)

    # The same model three times: as trained, loaded by a fresh process, merged into plain linear layers.
    with _doing("Testing: as trained, loaded in a fresh process, merged", console):
        logits = encode(adapted, test)
        # In the same batches, whose padding changes the last bits.
        some = test.first(SAME)
        some_logits = encode(adapted, some)
        fresh_logits = logits_in_a_fresh_process(options.out, task.test.texts[: len(some)])
        merged = adapted.merge_and_unload()
        merged_logits = encode(merged, some)

    findings = Findings(
        scores=compare(train.labels, test.labels, frozen_logits, logits, head_parameters, dvora_parameters),
        adapter_bytes=(adapter_folder / "adapter_model.safetensors").stat().st_size,
        model_bytes=(model_folder / "model.safetensors").stat().st_size,
        fresh_process_difference=(fresh_logits - some_logits).abs().max().item(),
        merged_difference=(merged_logits - some_logits).abs().max().item(),
        history=history,
    )
    print_findings(findings, console)
    texts = [*options.sentence, *EXAMPLES][:3]
    print_predictions(texts, encode(merged, unlabelled(texts, tokenizer)), console)
    with _doing("One batch, an adapter for each sentence", console):
        many = many_adapters(model_folder, adapter_folder, test)
    print_many(many, console)

    # Only a recorded run replaces the files under version control.
    metrics = RECORD if options.record else options.out / "result.json"
    plot = (HERE if options.record else options.out) / "curve.png"
    save_findings(findings, many, SETTINGS, SEED, metrics)
    save_plot(history, layer_changes(weights_before, linear_weights(merged)), plot)
    console.print(f"Adapter: {adapter_folder}   Metrics: {metrics}   Plot: {plot}")


@contextmanager
def _doing(what: str, console: Console) -> Iterator[None]:
    """Say what is done: with a spinner on a terminal, else in a line."""
    if not console.is_terminal:
        console.print(what)
    with console.status(what):
        yield
