"""Random BERTs that train in a second, rows of unequal lengths, and distillation in plain torch to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, TrainingArguments

import kdfast

VOCABULARY, CLASSES, RATE = 40, 3, 1e-3
# The gradient of a key bias is zero but for rounding, as softmax ignores it; Adam's default of 1e-8 would turn that
# rounding into steps of full size.
EPSILON = 1e-4
Row = dict[str, Any]


def bert(
    seed: int, *, width: int = 16, layers: int = 2, dropout: float = 0.0, kind: Any = None, classes: int = CLASSES
) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=classes,
        initializer_range=0.4,  # far enough apart for the terms to matter
    )
    return (kind or BertForSequenceClassification)(config).eval()


def masked_lm(seed: int, **options: Any) -> Any:
    return bert(seed, kind=BertForMaskedLM, **options)


def rows(count: int, tokens: bool = False) -> list[Row]:
    """Rows of 3 to 12 tokens; with a class, or with token labels of which at least one counts."""
    generator = torch.Generator().manual_seed(3)
    made: list[Row] = []
    for i in range(count):
        ids = torch.randint(1, VOCABULARY, (3 + 7 * i % 10,), generator=generator).tolist()
        labels: Any = int(torch.randint(CLASSES, (), generator=generator))
        if tokens:
            labels = [x if (i + j) % (2 + i % 3) == 0 or j == 0 else -100 for j, x in enumerate(reversed(ids))]
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(given: Sequence[Row]) -> dict[str, Any]:
    length = max(len(row["input_ids"]) for row in given)
    columns: dict[str, list[Any]] = {name: [row[name] for row in given] for name in given[0]}
    columns["attention_mask"] = [[1] * len(ids) + [0] * (length - len(ids)) for ids in columns["input_ids"]]
    columns["input_ids"] = [ids + [0] * (length - len(ids)) for ids in columns["input_ids"]]
    if isinstance(columns.get("labels", [0])[0], list):
        columns["labels"] = [of + [-100] * (length - len(of)) for of in columns["labels"]]
    return {name: torch.tensor(values) for name, values in columns.items()}


def trainer(
    folder: Path, model: Any, given: Any, objective: Any, *, teacher: Any = None, kind: Any = None, **options: Any
) -> Any:
    own = (
        "eval_dataset",
        "callbacks",
        "compute_metrics",
        "preprocess_logits_for_metrics",
        "model_init",
        "data_collator",
    )
    of_trainer = {"data_collator": collate} | {name: options.pop(name) for name in own if name in options}
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "adam_epsilon": EPSILON,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return (kind or kdfast.DistillationTrainer)(
        model,
        TrainingArguments(**{**defaults, **options}),
        teacher=teacher,
        objective=objective,
        train_dataset=given,
        **of_trainer,
    )


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [event[name] for event in trainer.state.log_history if name in event]


def same(first: Any, second: Any, tolerance: float) -> None:
    """Weights of modules, or of a module and a state dict."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (first, second))
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def moved(module: Any, start: Any) -> None:
    """That training changed every weight, but for biases of keys, which softmax ignores."""
    for (name, a), b in zip(module.named_parameters(), start.parameters(), strict=True):
        assert name.endswith("key.bias") or (a - b).abs().max() > 1e-4, name


# ---- in plain torch ----
@contextlib.contextmanager
def projections(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Queries, keys and values of every layer, [B, H, L, d], by hooks on the linear layers that make them."""
    kept: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    handles = []
    heads = model.config.num_attention_heads
    for name, module in model.named_modules():
        if name.endswith((".self.query", ".self.key", ".self.value")):
            into = kept[name.rsplit(".", 1)[1][0]]
            handles.append(
                module.register_forward_hook(
                    lambda _, args, out, into=into: into.append(out.unflatten(-1, (heads, -1)).transpose(1, 2))
                )
            )
    yield kept
    for handle in handles:
        handle.remove()


class Sides:
    """What a student and its teacher make of a batch, and the published losses between them."""

    def __init__(self, student: Any, teacher: Any, batch: dict[str, Tensor]) -> None:
        own = {name: batch[name] for name in ("input_ids", "attention_mask")}
        self.on, self.labels = batch["attention_mask"].bool(), batch.get("labels")
        with projections(student) as self.sq:
            self.s = student(**own, output_hidden_states=True)
        with torch.no_grad(), projections(teacher) as self.tq:
            self.t = teacher(**own, output_hidden_states=True)

    def kl(self, temperature: float) -> Tensor:
        log_s, log_t = ((x.logits / temperature).log_softmax(-1) for x in (self.s, self.t))
        return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)

    def kl_of_targets(self, temperature: float) -> Tensor:
        on = self.labels != -100
        log_s, log_t = ((x.logits[on] / temperature).log_softmax(-1) for x in (self.s, self.t))
        return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)

    def ce(self) -> Tensor:
        return F.cross_entropy(self.s.logits.flatten(0, -2), self.labels.flatten())

    def hidden(self, pairs: dict[int, int], linear: Callable[[Tensor], Tensor]) -> Tensor:
        return sum(
            F.mse_loss(linear(self.s.hidden_states[i][self.on]), self.t.hidden_states[j][self.on])
            for i, j in pairs.items()
        )  # type: ignore[return-value]

    def cls(self, pairs: dict[int, int]) -> Tensor:
        s, t = (
            torch.stack([x.hidden_states[i][:, 0] for i in states])
            for x, states in ((self.s, pairs), (self.t, pairs.values()))
        )
        return F.mse_loss(F.normalize(s, dim=-1), F.normalize(t, dim=-1))

    def cosine(self) -> Tensor:
        s, t = (x.hidden_states[-1][self.on] for x in (self.s, self.t))
        return F.cosine_embedding_loss(s, t, torch.ones(len(s)))

    def scores(self, layer: int, kept: dict[str, list[Tensor]], a: str = "q", b: str = "k") -> Tensor:
        return kept[a][layer] @ kept[b][layer].mT / kept[a][layer].shape[-1] ** 0.5

    def attention(self, pairs: dict[int, int]) -> Tensor:
        counted = (self.on[:, None, :, None] & self.on[:, None, None, :]).expand(-1, 2, -1, -1)
        return sum(
            F.mse_loss(self.scores(i - 1, self.sq)[counted], self.scores(j - 1, self.tq)[counted])
            for i, j in pairs.items()
        )  # type: ignore[return-value]

    def relations(self, pairs: Sequence[str] = ("qk", "vv")) -> Tensor:
        total = torch.zeros(())
        for a, b in pairs:
            s, t = (
                self.scores(-1, kept, a, b).masked_fill(~self.on[:, None, None, :], -1e4).log_softmax(-1)
                for kept in (self.sq, self.tq)
            )
            of_rows = F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
            total = total + of_rows[self.on[:, None].expand_as(of_rows)].mean()
        return total


def plain_loop(parameters: list[Any], batches: Sequence[Any], loss_of: Callable[[Any, int], Tensor]) -> list[float]:
    """The Trainer's defaults (AdamW, clipping at 1) with a constant rate; loss_of(batch, step)."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=EPSILON, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        loss = loss_of(batch, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
