"""Encoders with half of their heads and neurons gone: time of a forward pass, whole, masked and smaller.

`python benchmarks/pruned_encoder.py [--output folder]`. all-MiniLM-L6-v2 (6 layers, 384 wide) and an encoder of the
shape of BERT-base with random weights, float32. Of every layer half of the heads and half of the neurons live, drawn
with a fixed seed. `masked`: `kdfast.prune.apply`, in place; `smaller`: `kdfast.prune.compact`. The three take turns in
one process, once masked and smaller are seen to compute the same.

Accuracy is of movie reviews: all-MiniLM-L6-v2 fine-tuned for two epochs; with the half of the heads and neurons that
`kdfast.prune.importance` tells to be the more important ones, of DynaBERT's kind, on training rows; and that trained
for two epochs beside the whole one as its teacher (`--epochs 0`: none of it).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    TrainingArguments,
)
from transformers.utils import logging

import kdfast
from kdfast import prune
from kdfast.bench import harness
from kdfast.data import demo, tasks
from kdfast.models import cost
from kdfast.objective import Labels, Logits, Terms
from kdfast.results import measure as measuring

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = ((32, 128), (1, 128))  # rows, tokens
WAYS = ("whole", "masked", "smaller")
TOLERANCE = 1e-4  # of outputs of layer norms, about 1


def minilm() -> Any:
    return AutoModel.from_pretrained(demo.fetch(demo.MINILM), local_files_only=True)


def bert_base() -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig())


ENCODERS = {"all-MiniLM-L6-v2": minilm, "BERT-base's shape": bert_base}


def half(model: Any) -> prune.Masks:
    """Masks under which every other head and neuron lives, in no order."""
    masks, generator = prune.Masks.full(model), torch.Generator().manual_seed(0)
    for mask in (*masks.heads, *masks.neurons):
        mask[torch.randperm(len(mask), generator=generator)[: len(mask) // 2]] = False
    return masks


def ways(model: Any) -> dict[str, Any]:
    """The model in each of `WAYS`."""
    masks, masked = half(model), copy.deepcopy(model)
    prune.apply(masked, masks)
    return dict(zip(WAYS, (model, masked, prune.compact(model, masks)), strict=True))


def difference(models: dict[str, Any], batch: dict[str, Tensor]) -> float:
    """The largest between masked and smaller outputs. Not finite where these are also those of the whole model."""
    with torch.inference_mode():
        whole, masked, smaller = (models[way](**batch).last_hidden_state for way in WAYS)
    apart = float((masked - smaller).abs().max())
    return apart if (whole - masked).abs().max() > 0.01 else float("inf")


def measure(repeats: int, cases: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    results = []
    for name, make in ENCODERS.items():
        models = ways(make().to(DEVICE).eval())
        for rows, tokens in cases:
            batch = {"input_ids": torch.randint(1000, 2000, (rows, tokens), device=DEVICE)}
            apart = difference(models, batch)
            if not apart < TOLERANCE:
                raise AssertionError(f"{name}: outputs differ by {apart}: not worth timing")
            for way, of in cost.measured(models, batch, DEVICE, repeats).items():
                case = {"encoder": name, "rows": rows, "tokens": tokens, "way": way, "difference": apart}
                spread = {"ms": of.ms, "fastest_ms": min(of.milliseconds), "slowest_ms": max(of.milliseconds)}
                size = {"parameters": of.parameters, "megabytes": of.megabytes, "gflop": of.gflop}
                results.append(case | size | spread)
    return results


# ---- accuracy ----
def important_half(model: Any, batches: list[dict[str, Tensor]]) -> prune.Masks:
    """Masks under which the more important half of every layer's heads and neurons lives."""
    masks, found = prune.Masks.full(model), prune.importance(model, batches)
    for living, scores in ((masks.heads, found.heads), (masks.neurons, found.neurons)):
        for mask, of in zip(living, scores, strict=True):
            mask[of.argsort()[: len(mask) // 2]] = False
    return masks


def trained(model: Any, rows: Any, tokenizer: Any, epochs: float, teacher: Any = None) -> Any:
    soft = {} if teacher is None else {"kl": Logits(temperature=2.0, weight=0.5)}
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-4,
            warmup_steps=0.06,
            save_strategy="no",
            report_to="none",
            use_cpu=DEVICE == "cpu",
            train_sampling_strategy="group_by_length",
            dataloader_pin_memory=False,
        )
        objective = Terms(ce=Labels(weight=0.5 if soft else 1.0), **soft)
        kdfast.DistillationTrainer(
            model,
            arguments,
            teacher=teacher,
            objective=objective,
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
        ).train()
    return model.eval()


def accuracies(epochs: float) -> dict[str, float]:
    """In percent: of the whole model, of what is left of it, and of that after training on."""
    task, folder = tasks.load(None), demo.fetch(demo.MINILM)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows, test = tasks.tokenize(task, tokenizer, 64)
    labels = torch.tensor(test["labels"])

    def accuracy(model: Any) -> float:
        logits = measuring.predict_logits(model, test.to_list(), tokenizer, "test")
        return 100 * float((logits.argmax(-1) == labels).double().mean())

    torch.manual_seed(0)
    whole = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, **task.head)
    trained(whole, rows, tokenizer, epochs)
    collate, few = DataCollatorWithPadding(tokenizer), rows.select(range(1024)).to_list()
    batches = [dict(collate(few[i : i + 32]).to(DEVICE)) for i in range(0, len(few), 32)]
    smaller = prune.compact(whole, important_half(whole, batches))
    found = {"whole": accuracy(whole), "pruned": accuracy(smaller)}
    return found | {"trained": accuracy(trained(smaller, rows, tokenizer, epochs, whole))}


HEADER = (
    *("encoder, rows × tokens", "parameters M", "GFLOP", "ms", "ms, masked", "ms, smaller"),
    *("× masked", "× smaller"),
)
ACCURACY = "accuracy %, whole → its half → trained on"


def table(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The header, and a line per encoder and batch."""
    known = any("accuracy" in row for row in results)
    lines: list[tuple[str, ...]] = [(*HEADER, ACCURACY) if known else HEADER]
    for i in range(0, len(results), len(WAYS)):
        whole, masked, smaller = results[i : i + len(WAYS)]
        lines.append(
            (
                f"{whole['encoder']}, {whole['rows']} × {whole['tokens']}",
                f"{whole['parameters'] / 1e6:.1f} → {smaller['parameters'] / 1e6:.1f}",
                f"{whole['gflop']:.1f} → {smaller['gflop']:.1f}",
                *(f"{of['ms']:.1f}" for of in (whole, masked, smaller)),
                *(f"{whole['ms'] / of['ms']:.2f}" for of in (masked, smaller)),
                *[" → ".join(f"{value:.1f}" for value in whole.get("accuracy", {}).values()) or "–"] * known,
            )
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for JSON and table")
    parser.add_argument("--repeats", type=int, default=30, help="forward passes of each (default 30)")
    parser.add_argument("--epochs", type=float, default=2.0, help="of both trainings; 0: no accuracy (default 2)")
    options = parser.parse_args()
    logging.disable_progress_bar()
    facts = harness.environment(DEVICE)
    results = measure(options.repeats, CASES)
    if options.epochs:
        results[0]["accuracy"] = accuracies(options.epochs)  # of the first encoder
    header, *lines = table(results)
    shown = Table(*header)
    for line in lines:
        shown.add_row(*line)
    Console(width=160).print(shown)
    if options.output is not None:
        path = harness.write(results, facts, harness.results_path(facts, options.output, "pruned-encoder"))
        rows = [header, ("---", *("---:",) * (len(header) - 1)), *lines]
        path.with_suffix(".md").write_text("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
        print(path)


if __name__ == "__main__":
    main()
