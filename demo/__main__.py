"""Fine-tune MiniLM with DVoRA on movie reviews, in minutes on two cores, and check everything that was promised.

python -m demo ["a sentence of yours"] [--quick] [--record] [--out FOLDER]
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer

from demo.batches import labelled, unlabelled
from demo.check import THREADS, logits_in_a_fresh_process, quiet
from demo.model import add_adapter, load_classifier, trainable_values
from demo.plot import save_plot
from demo.report import Findings, compare, print_findings, print_predictions, save_findings
from demo.statistics import layer_changes, linear_weights
from demo.train import Settings, encode, train_adapter, train_head
from materials.data import movie_reviews
from materials.fetch import FetchError
from materials.models import minilm

HERE = Path(__file__).parent
# The run that the README quotes.
RECORD = HERE.parent / "benchmarks" / "results" / "demo.json"
SEED = 0
SETTINGS = Settings(
    passes=1, batch=32, lambda_rate=3e-2, magnitude_rate=3e-3, head_rate=1e-3, warmup=0.1, evaluations=4
)
# Sentences for training, validation and test with --quick.
QUICK = (480, 100, 200)
EXAMPLES = (
    "A warm, funny and quietly brave little film.",
    "Two hours of my life that I will never get back.",
    "It wants to be clever, and for a while you almost believe it.",
)


def main() -> None:
    """Run the demo."""
    options = parse()
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
    with console.status("Fitting a head to the frozen model"):
        train_head(model, train, validation)
        frozen_logits = encode(model, test)
    head_values = trainable_values(model.classifier)
    weights_before = linear_weights(model)

    # DVoRA, from there.
    adapted = add_adapter(model)
    dvora_values = trainable_values(adapted)
    history = train_adapter(adapted, train, validation, SETTINGS, np.random.default_rng(SEED))
    adapted.save_pretrained(adapter_folder)

    # The same model three times: as trained, loaded by a fresh process, merged into plain linear layers.
    with console.status("Testing: as trained, loaded in a fresh process, merged"):
        logits = encode(adapted, test)
        fresh_logits = logits_in_a_fresh_process(options.out, task.test.texts[: len(test)])
        merged = adapted.merge_and_unload()
        merged_logits = encode(merged, test)

    findings = Findings(
        scores=compare(train.labels, test.labels, frozen_logits, logits, head_values, dvora_values),
        adapter_bytes=(adapter_folder / "adapter_model.safetensors").stat().st_size,
        model_bytes=(model_folder / "model.safetensors").stat().st_size,
        fresh_process_difference=(fresh_logits - logits).abs().max().item(),
        merged_difference=(merged_logits - logits).abs().max().item(),
        history=history,
    )
    print_findings(findings, console)
    texts = [*options.sentence, *EXAMPLES][:3]
    print_predictions(texts, encode(merged, unlabelled(texts, tokenizer)), console)

    figures = RECORD if options.record else options.out / "result.json"
    # A quick run must not replace the picture of a whole one.
    picture = (options.out if options.quick else HERE) / "curve.png"
    save_findings(findings, SETTINGS, SEED, figures)
    save_plot(history, layer_changes(weights_before, linear_weights(merged)), picture)
    console.print(f"Adapter: {adapter_folder}   Figures: {figures}   Picture: {picture}")


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="Fine-tune MiniLM with DVoRA on movie reviews.")
    parser.add_argument("sentence", nargs="*", help="what someone said about a movie")
    parser.add_argument("--quick", action="store_true", help="a much shorter run; its picture is kept in --out")
    parser.add_argument("--record", action="store_true", help="make this run the one that the README quotes")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="for adapter and figures (default: demo/out)")
    options = parser.parse_args()
    if options.quick and options.record:
        parser.error("--quick and --record exclude each other: the README quotes a whole run")
    return options


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(str(error))
