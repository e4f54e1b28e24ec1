"""Classifiers and regressors of text on a task's test rows: quality, distance to a teacher, size, speed.

task = tasks.load("sst2")
measure.evaluate({"teacher": "org/bert-sst2", "student": "runs/hinton/student"}, task, teacher="teacher")
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

import kdfast
from kdfast.data import metrics, tasks
from kdfast.data.distances import to_teacher
from kdfast.models import cost, pairing
from kdfast.models.first_token import shortcut
from kdfast.models.loading import classifier, device, load_tokenizer, named
from kdfast.objective import model_inputs
from kdfast.results.progress import bar

BATCH = 64  # rows of a forward pass without a backward
LATENCY_ROWS = (1, 32)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """A model to be measured.

    Attributes:
        title: of its progress bar.
        model: of transformers, on the device that it runs on.
        source: its folder or Hub name.
        tokenizer: its own.
        rows: the test rows, with its tokens and their labels; of all candidates in the same order.
        logits: of the rows, where they are known.
    """

    title: str
    model: Any
    source: str | Path
    tokenizer: Any
    rows: Rows
    logits: Tensor | None = None


def evaluate(
    sources: Mapping[str, str | Path],
    task: tasks.Task,
    *,
    max_length: int = 64,
    teacher: str | None = None,
    batch_size: int = BATCH,
    tell: Callable[[str], Any] = warnings.warn,
) -> dict[str, Metrics]:
    """`measure` of models that are loaded here, each with its own tokenizer.

    Args:
        sources: folders or Hub names, by what the models are called in the result.
        task: the test rows are measured on.
        max_length: tokens; longer rows are cut.
        teacher: which of the names is the others' teacher, if there is one.
        batch_size: rows per forward pass.
        tell: gets what a user should know: classes that are matched by their numbers, as their names are others.

    Raises:
        ValueError: a model that cannot be loaded, has no head, tokenizer or padding token, other classes or another
            order of them, or fewer positions.
    """
    candidates = _candidates(sources, task, max_length, tell)
    if teacher is not None:
        for name, of in candidates.items():
            pairing.check_same_classes(named(name, of.source), of.model, candidates[teacher].model)
    return measure(candidates, task, teacher, batch_size)


def _candidates(
    sources: Mapping[str, str | Path], task: tasks.Task, max_length: int, tell: Callable[[str], Any]
) -> dict[str, Candidate]:
    test_alone = replace(task, train=task.train.select(()))
    candidates = {}
    for name, source in sources.items():
        model = classifier(task, name, source, quantised=True).to(device())
        tokenizer = load_tokenizer(name, source)
        pairing.pad_alike(named(name, source), model, tokenizer)
        pairing.check_length(named(name, source), model, max_length)
        rows = tasks.tokenize(test_alone, tokenizer, max_length)[1].to_list()
        pairing.check_ids(named(name, source), model, rows)
        if note := pairing.matched_by_number(named(name, source), model.config, task.names):
            tell(note)
        candidates[name] = Candidate(f"test: {name}", model, source, tokenizer, rows)
    return candidates


def measure(
    candidates: Mapping[str, Candidate], task: tasks.Task, teacher: str | None = None, batch_size: int = BATCH
) -> dict[str, Metrics]:
    """By the candidates' names: what `kdfast.data.metrics` gives, parameters, megabytes, 10⁹ operations of a forward pass
    of one row, and milliseconds of one of 1 and of 32 rows, the median, fastest and slowest.
    Beside a candidate named `teacher` also `kdfast.data.distances.to_teacher`."""
    logits = {name: _logits(of, batch_size) for name, of in candidates.items()}
    results = {}
    for name, of in candidates.items():
        labels = torch.tensor([row["labels"] for row in of.rows])
        results[name] = metrics.metrics(task.metric, logits[name], labels)
        if teacher is not None:
            results[name] |= against_teacher(logits[name], logits[teacher], task.kind)
    of_all = costs(candidates)
    return {name: row | of_all[name] for name, row in results.items()}


def costs(candidates: Mapping[str, Candidate]) -> dict[str, Metrics]:
    """Of `measure` what does not depend on what the models answer."""
    results = _times(candidates)
    for name, of in candidates.items():
        its = size(of.model, Path(of.source)) | {"gflop": cost.flops(_Ready(of, 1), {}) / 1e9}
        results[name] = its | results[name]
    return results


def times(sources: Mapping[str, str | Path], task: tasks.Task, max_length: int = 64) -> dict[str, Metrics]:
    """Of `evaluate` the milliseconds alone, of models that take turns.

    Raises:
        ValueError: as `evaluate`.
    """
    return _times(_candidates(sources, task, max_length, warnings.warn))


def _times(candidates: Mapping[str, Candidate]) -> dict[str, Metrics]:
    found: dict[str, Metrics] = {name: {} for name in candidates}
    for count in LATENCY_ROWS:
        ready = {name: _Ready(of, count) for name, of in candidates.items()}
        for name, milliseconds in cost.latencies_ms(ready, {}, device()).items():
            key = f"latency_ms_batch_{count}"
            found[name] |= {key: median(milliseconds), key + FAST: min(milliseconds), key + SLOW: max(milliseconds)}
    return found


def _logits(of: Candidate, batch_size: int) -> Tensor:
    if of.logits is not None:
        return of.logits
    with shortcut(of.model):
        return predict_logits(of.model, of.rows, of.tokenizer, of.title, batch_size)


class _Ready(nn.Module):
    """A model with a batch of its own: models may differ in their tokenizers, and in the inputs that they know."""

    def __init__(self, of: Candidate, count: int) -> None:
        super().__init__()
        # Rows of median length and a little more, so that a batch has hardly any padding.
        middle = sorted(of.rows, key=length)[len(of.rows) // 2 :]
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in islice(cycle(middle), count)]
        batch = DataCollatorWithPadding(of.tokenizer)(rows).to(of.model.device)
        self.model, self.batch = of.model, model_inputs(of.model, batch)

    def forward(self) -> Any:
        return self.model(**self.batch)


def length(row: Mapping[str, Any]) -> int:
    return len(row["input_ids"])


Metrics = dict[str, float]


def against_teacher(logits: Tensor, teacher_logits: Tensor, kind: str = "classification") -> Metrics:
    """`kdfast.data.distances.to_teacher` in numbers."""
    found = to_teacher(logits, teacher_logits, kind)
    return {name: found[name].item() for name in ("kl_to_teacher", "mse_to_teacher", "agreement") if name in found}


def versions() -> dict[str, str]:
    return {"kdfast": kdfast.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def size(model: nn.Module, folder: Path) -> Metrics:
    """Number of parameters, and megabytes (10⁶ bytes) of the weights saved in `folder`; of a model of the Hub, or not in
    safetensors, as it would be saved, unless it is quantised, which is 0: not known."""
    megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    if not megabytes and getattr(model, "hf_quantizer", None) is None:
        megabytes = cost.megabytes(model)
    return {"parameters": cost.parameters(model), "megabytes": megabytes}


def speeds(models: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> dict[str, Metrics]:
    """Tokens of the batch per second of a forward pass, the median, fastest and slowest: of 5 passes in turn, and of small
    models as many more as a second has, which a busy machine disturbs the most."""
    tokens, key = 1e3 * int(batch["attention_mask"].sum()), "tokens_per_second"
    times = cost.latencies_ms(models, batch, device(), repeats=5, seconds=1.0)
    return {
        name: {key: tokens / median(ms), key + FAST: tokens / min(ms), key + SLOW: tokens / max(ms)}
        for name, ms in times.items()
    }


SLOW, FAST = "_slowest", "_fastest"


def predict_logits(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    batch_size: int = 64,
) -> Tensor:
    """Logits of a classifier for all rows, float32 `[rows, classes]`, in the order of the rows."""
    collate = DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # similar lengths: little padding
    logits: list[Tensor] = []
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode(), bar(title, len(rows)) as shown:
        for start in range(0, len(rows), batch_size):
            batch = [{k: v for k, v in rows[i].items() if k != "labels"} for i in order[start : start + batch_size]]
            logits.append(model(**model_inputs(model, collate(batch).to(device))).logits.float().cpu())
            shown.update(len(batch))
    in_length_order = torch.cat(logits)
    result = torch.empty(in_length_order.shape)
    result[torch.tensor(order)] = in_length_order
    return result
