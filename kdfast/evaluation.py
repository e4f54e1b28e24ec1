"""Classifiers and regressors of text on a task's test rows: quality, distance to a teacher, size, speed.

task = tasks.load("sst2")
evaluation.evaluate({"teacher": "org/bert-sst2", "student": "runs/hinton/student"}, task, teacher="teacher")
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from kdfast import pairing, report, stages, tasks
from kdfast._hub import first_line, why_no_answer
from kdfast.objective import model_inputs

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
) -> dict[str, report.Metrics]:
    """`measure` of models that are loaded here, each with its own tokenizer.

    Args:
        sources: folders or Hub names, by what the models are called in the result.
        task: the test rows are measured on.
        max_length: tokens; longer rows are cut.
        teacher: which of the names is the others' teacher, if there is one.
        batch_size: rows per forward pass.
        tell: gets what a user should know: classes that are matched by their numbers, as their names are others.

    Raises:
        ValueError: a model that cannot be loaded, has no head, tokenizer or padding token, other classes or another order of them,
            or fewer positions.
    """
    test_alone = replace(task, train=task.train.select(()))
    candidates = {}
    for name, source in sources.items():
        model = classifier(task, name, source).to(device())
        tokenizer = load_tokenizer(name, source)
        pairing.pad_alike(named(name, source), model, tokenizer)
        pairing.check_length(named(name, source), model, max_length)
        rows = tasks.tokenize(test_alone, tokenizer, max_length)[1].to_list()
        pairing.check_ids(named(name, source), model, rows)
        if note := pairing.matched_by_number(named(name, source), model.config, task.names):
            tell(note)
        candidates[name] = Candidate(f"test: {name}", model, source, tokenizer, rows)
    if teacher is not None:
        for name, of in candidates.items():
            pairing.check_same_classes(named(name, of.source), of.model, candidates[teacher].model)
    return measure(candidates, task, teacher, batch_size)


def measure(
    candidates: Mapping[str, Candidate], task: tasks.Task, teacher: str | None = None, batch_size: int = BATCH
) -> dict[str, report.Metrics]:
    """By the candidates' names: what `tasks.metrics` gives, parameters, megabytes, and milliseconds of a forward pass of 1
    and of 32 rows, the median, fastest and slowest. Beside a candidate named `teacher` also `kdfast.distances.to_teacher`."""
    logits = {name: _logits(of, batch_size) for name, of in candidates.items()}
    results = {}
    for name, of in candidates.items():
        labels = torch.tensor([row["labels"] for row in of.rows])
        results[name] = tasks.metrics(task.metric, logits[name], labels)
        if teacher is not None:
            results[name] |= report.against_teacher(logits[name], logits[teacher], task.kind)
        results[name] |= report.size(of.model, Path(of.source))
        if not results[name]["megabytes"]:  # of the Hub, or not in safetensors
            results[name]["megabytes"] = sum(p.numel() * p.element_size() for p in of.model.parameters()) / 1e6
    for count in LATENCY_ROWS:
        ready = {name: _Ready(of, count) for name, of in candidates.items()}
        for name, milliseconds in report.latencies_ms(ready, {}).items():
            key = f"latency_ms_batch_{count}"
            results[name] |= {key: median(milliseconds), key + report.FAST: min(milliseconds)}
            results[name][key + report.SLOW] = max(milliseconds)
    return results


def _logits(of: Candidate, batch_size: int) -> Tensor:
    if of.logits is not None:
        return of.logits
    with shortcut(of.model):
        return stages.predict_logits(of.model, of.rows, of.tokenizer, of.title, batch_size)


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


def classifier(task: tasks.Task, argument: str, source: str | Path) -> Any:
    """A classifier whose classes are the task's, in the same order: other orders are common, and silent otherwise.

    Args:
        task: what it is to be a classifier, or regressor, of.
        argument: how messages call it.
        source: folder or Hub name.

    Raises:
        ValueError: it cannot be loaded, has no head, another number of classes or another order of them.
    """
    who = named(argument, source)
    options = {"output_loading_info": True, "dtype": torch.float32}
    model, loading = pretrained(AutoModelForSequenceClassification, argument, source, **options)
    if absent := sorted(loading["missing_keys"]):
        raise ValueError(f"{who} is no classifier: it has no weights for {', '.join(absent[:4])}")
    if model.config.num_labels != max(1, len(task.names)):
        raise ValueError(f"{who} has {model.config.num_labels} classes, the data {max(1, len(task.names))}")
    pairing.check_names(who, model.config, task.names)
    model.config.problem_type = task.head["problem_type"]  # many do not tell theirs
    return model


def load_tokenizer(argument: str, source: str | Path) -> Any:
    """Of a model. In a folder without one, transformers finds a tokenizer that knows no word.

    Raises:
        ValueError: it cannot be loaded, or is such a one.
    """
    absent = f"{named(argument, source)} has no tokenizer: save it beside the model"
    try:
        tokenizer = pretrained(AutoTokenizer, argument, source)
    except ValueError as error:  # of models with a tokenizer of no class of its own
        raise (ValueError(absent) if "instantiate the backend tokenizer" in str(error) else error) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(absent)
    return tokenizer


def pretrained(kind: Any, argument: str, source: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained`, with the argument named where it fails.

    Raises:
        ValueError: it cannot be loaded, or is a model whose weights are quantised.
    """
    who = named(argument, source)
    unreachable = None if Path(source).is_dir() else _why_no_answer(who, source)
    # Without the Hub, what was downloaded before is still there.
    here = {"local_files_only": True} if unreachable else {}
    try:
        if hasattr(kind, "from_config"):  # of models, not of configurations or tokenizers
            _check_not_quantised(AutoConfig.from_pretrained(source, **here))
        return kind.from_pretrained(source, **options, **here)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        if unreachable and isinstance(error, OSError):
            reason = f"there is no such folder, and the Hub cannot be reached ({unreachable})"
        raise ValueError(f"{who}: {reason}") from None


def _check_not_quantised(config: Any) -> None:
    """Before weights are loaded, which needs the library of the quantisation, and may end in a crash of it."""
    if (found := getattr(config, "quantization_config", None)) is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ValueError(
            f"expected weights that are not quantised, got {getattr(method, 'value', method)} (quantization_config in its "
            "config.json): load it, dequantise it and save that"
        )


def _why_no_answer(who: str, source: str | Path) -> str | None:
    """Of the Hub, where it is asked: not about what looks like a path."""
    if Path(source).is_file():
        raise ValueError(f"{who}: expected a folder or a name on the Hub, got a file")
    if str(source).startswith((os.sep, ".", "~")) or str(source).count(os.sep) > 1:
        raise ValueError(f"{who}: there is no such folder")
    absent = ValueError(f"{who}: there is no such folder, and the Hub has no such model that you may read")
    return why_no_answer("model_info", str(source), absent)


def named(argument: str, source: str | Path) -> str:
    """What messages call a model: once where both are the same, as `evaluate` has it of one in the working folder."""
    return argument if argument == str(source) else f"{argument} {source}"


@contextmanager
def first_token_only(model: Any) -> Iterator[None]:
    """Within the block, a BERT classifier computes its last layer for the first token alone, with the same logits.

    The classifier reads no other token. Past attention, three quarters of that layer's work are saved, which makes a
    training step of a 3-layer student 1.3 times as fast.
    """

    def keep_first(module: nn.Module, hidden_states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor[:, :1] for tensor in hidden_states)

    handle = model.base_model.encoder.layer[-1].attention.output.register_forward_pre_hook(keep_first)
    try:
        yield
    finally:
        handle.remove()


def shortcut(model: Any) -> Any:
    """`first_token_only` where the model is a BERT."""
    return first_token_only(model) if model.config.model_type == "bert" else nullcontext()


def length(row: Mapping[str, Any]) -> int:
    return len(row["input_ids"])


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
