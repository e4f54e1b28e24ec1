"""Augmented rows of a task in a folder that `kdfast distill` reads: for TinyBERT's stages, and `kdfast augment`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Features
from rich.console import Console
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForMaskedLM

from kdfast.data import augment, files, tasks
from kdfast.data.augment import Augmentation, Masked, Proposer, Vectors
from kdfast.models import pairing
from kdfast.models.last_hidden import last_hidden
from kdfast.models.loading import device, load_tokenizer, named, pretrained
from kdfast.results.disk import saving
from kdfast.results.measure import BATCH
from kdfast.results.progress import bar

TEXTS = {1: ("text",), 2: ("sentence1", "sentence2")}  # columns of the written files, which `kdfast.data.tasks` knows


class Predictor:
    """The most likely tokens for masks, of a masked language model that makes the logits of these places alone."""

    def __init__(self, model: Any, tokenizer: Any, count: int) -> None:
        self.model, self.tokenizer, self.count = model, tokenizer, count

    @torch.inference_mode()
    def __call__(self, masked: Sequence[Masked]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in masked]
        order = sorted(range(len(masked)), key=lambda i: len(masked[i].ids))  # hardly any padding
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            hidden = last_hidden(self.model, **self._inputs([masked[i] for i in some]))
            places = torch.tensor([masked[i].place for i in some], device=self.model.device)
            logits = hidden.make_logits(hidden.hidden[torch.arange(len(some), device=places.device), places])
            best = logits.topk(min(self.count, logits.shape[-1])).indices
            for i, tokens in zip(some, best.tolist(), strict=True):
                found[i] = tokens
        return found

    def _inputs(self, masked: Sequence[Masked]) -> dict[str, Any]:
        def padded(rows: Iterable[list[int]], value: int) -> Any:
            return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

        columns = {
            "input_ids": padded((one.ids for one in masked), self.tokenizer.pad_token_id),
            "attention_mask": padded(([1] * len(one.ids) for one in masked), 0),
            "token_type_ids": padded((one.types for one in masked), 0),
        }
        wanted = ("attention_mask", *self.tokenizer.model_input_names)
        return {name: x.to(self.model.device) for name, x in columns.items() if name in wanted}


def proposer(how: Augmentation, base: str | Path) -> Proposer:
    """What finds the candidates of words.

    A masked language model, where `how.model` or the base is one, for words of one piece, with `how.vectors` for
    others; else `how.vectors`, or the base's embeddings, for both.

    Raises:
        ValueError: a model, its tokenizer or the vectors cannot be used.
    """
    vectors = None if how.vectors is None else Vectors.read(how.vectors)
    source, argument = (base, "base") if how.model is None else (how.model, "augment_model")
    tokenizer = load_tokenizer(argument, source)
    if not tokenizer.is_fast:
        raise ValueError(f"{named(argument, source)}: expected a fast tokenizer, got {type(tokenizer).__name__}")
    model = _masked_language_model(argument, source, required=how.model is not None)
    if model is None:
        if vectors is None:
            embeddings = pretrained(AutoModel, argument, source, dtype=torch.float32).get_input_embeddings()
            vectors = Vectors.of_embeddings(tokenizer, embeddings.weight)
        return Proposer(tokenizer, how.candidates, None, vectors)
    for name in ("pad_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"{named(argument, source)}: expected a tokenizer with a {name}, got one without")
    length = min(pairing.positions(model) or 512, 512)
    return Proposer(tokenizer, how.candidates, Predictor(model, tokenizer, how.candidates), vectors, length)


def _masked_language_model(argument: str, source: str | Path, required: bool) -> Any:
    """None of a base that is none: it has no head, or its architecture knows no masked tokens."""
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    try:
        model, loading = pretrained(AutoModelForMaskedLM, argument, source, **options)
    except ValueError:
        if required:
            raise
        return None
    if missing := sorted(loading["missing_keys"]):
        if required:
            raise ValueError(
                f"{named(argument, source)}: expected a masked language model, got one without {', '.join(missing[:4])}"
            )
        return None
    return model.eval().to(device())


class AugmentedRows:
    """A task's training rows and variants of them, as files in a folder, with the test rows as they are.

    Args:
        how: to augment.
        task: whose rows.
        base: model whose candidates they are where `how` has none.
        folder: where they go; one with some of them is gone on with.

    Raises:
        ValueError: the folder holds something else; a model or vectors cannot be used.
    """

    def __init__(self, how: Augmentation, task: tasks.Task, base: str | Path, folder: Path) -> None:
        self.how, self.task, self.folder = how, task, folder
        self.identity = {"rows": tasks.fingerprint(task.train), "base": Path(how.model or base).name}
        augment.check(folder, how, self.identity)
        self.proposer = None if augment.complete(folder, len(task.train)) else proposer(how, base)

    def write(self, console: Console) -> tasks.Task:
        """Makes what is not there yet; returns the task of the rows that are there then."""
        if self.proposer is not None:
            texts = TEXTS[1 + ("text_pair" in self.task.train.column_names)]
            train, test = (self._renamed(part, texts) for part in (self.task.train, self.task.test))
            with saving(self.folder), bar("variants of the rows", len(train)) as shown:

                def progress(rows: int) -> None:
                    shown.update(rows - shown.n)

                augment.write(train, test, texts, self.how, self.proposer, self.folder, self.identity, progress)
            self.proposer = None
        made = tasks.load(self.folder, kind=self.task.kind)
        count = f"{len(made.train):,} rows, {len(self.task.train):,} of them as they were"
        console.print(f"{files.shown_name(str(self.folder))}: {count}")
        return made

    def _renamed(self, part: Any, texts: Sequence[str]) -> Any:
        """In columns that `kdfast.data.tasks` finds, with the names of the classes."""
        given = [name for name in ("text", "text_pair") if name in part.column_names]
        part = part.rename_columns({**dict(zip(given, texts, strict=True)), "labels": "label"})
        if self.task.kind != "classification":
            return part
        return part.cast(Features({**part.features, "label": ClassLabel(names=list(self.task.names))}))
