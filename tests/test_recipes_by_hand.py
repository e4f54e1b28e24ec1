"""Every stage of every recipe of classifiers against its paper's loss and a training loop in plain torch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForSequenceClassification, get_constant_schedule, get_linear_schedule_with_warmup

from kdfast import runs
from kdfast.data import demo
from kdfast.recipes import hinton, minilm, patient_kd, tinybert
from kdfast.runs import stages

STEPS, BATCH, RATE, WARMUP = 20, 8, 1e-3, 0.1
SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "teacher_epochs": 1,
    "learning_rate": RATE,
    "warmup": WARMUP,
    "batch_size": BATCH,
    "train_rows": STEPS * BATCH,
    "test_rows": 8,
    "precision": "float32",
}
# The gradient of a key bias is zero but for rounding, as softmax ignores it; Adam's default of 1e-8 would turn that
# rounding into steps of full size.
EPSILON = 1e-4

Loss = Callable[[Any, Any, dict[str, Tensor]], Tensor]


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}


def labels_alone(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(student(**inputs(batch)).logits, batch["labels"])


def of_hinton(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    alpha, t = 0.9, 2.0
    z = student(**inputs(batch)).logits
    soft = F.softmax(teacher(**inputs(batch)).logits / t, -1)
    kl = F.kl_div(F.log_softmax(z / t, -1), soft, reduction="batchmean")
    return alpha * t**2 * kl + (1 - alpha) * F.cross_entropy(z, batch["labels"])


def of_patient_kd(normalize: bool, layers: dict[int, int]) -> Loss:
    def loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
        alpha, t, beta = 0.7, 10.0, 50.0
        s = student(**inputs(batch), output_hidden_states=True)
        with torch.no_grad():
            of_teacher = teacher(**inputs(batch), output_hidden_states=True)
        # As in the code: reduction "mean" is over classes too.
        kl = F.kl_div(F.log_softmax(s.logits / t, -1), F.softmax(of_teacher.logits / t, -1), reduction="none").mean()
        mine = torch.stack([s.hidden_states[i][:, 0] for i in layers])
        its = torch.stack([of_teacher.hidden_states[i][:, 0] for i in layers.values()])
        if normalize:
            mine, its = F.normalize(mine, dim=-1), F.normalize(its, dim=-1)
        hard = F.cross_entropy(s.logits, batch["labels"])
        return (1 - alpha) * hard + alpha * t**2 * kl + beta * F.mse_loss(mine, its)

    return loss


def of_minilm(relations: tuple[str, ...], heads: int, layer: int) -> Loss:
    def probabilities(model: Any, layer: int, batch: dict[str, Tensor]) -> list[Tensor]:
        """Logarithms, of the relations of a layer, [B, heads, L, L]."""
        before = model(**inputs(batch), output_hidden_states=True).hidden_states[layer - 1]
        attention = model.bert.encoder.layer[layer - 1].attention.self
        split = {
            name: getattr(attention, full)(before).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name, full in (("q", "query"), ("k", "key"), ("v", "value"))
        }
        absent = batch["attention_mask"][:, None, None] == 0
        scores = [split[a] @ split[b].mT / split[a].shape[-1] ** 0.5 for a, b in relations]
        return [score.masked_fill(absent, -torch.inf).log_softmax(-1) for score in scores]

    def loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            its = probabilities(teacher, tiny_reviews.LAYERS + 1 + layer, batch)
        mine = probabilities(student, len(student.bert.encoder.layer), batch)
        present = batch["attention_mask"][:, None].bool().expand(-1, heads, -1)
        total = torch.zeros(())
        for s, t in zip(mine, its, strict=True):
            per_row = torch.where(t.isinf(), 0.0, t.exp() * (t - s)).sum(-1)
            total = total + per_row[present].mean()
        return total

    return loss


def eager_scores(model: Any, states: Any, layer: int, batch: dict[str, Tensor]) -> Tensor:
    """Those of a layer from 1 on, [B, H, L, L], with the mask added as BERT does."""
    attention = model.bert.encoder.layer[layer - 1].attention.self
    q, k = (
        linear(states[layer - 1]).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (attention.query, attention.key)
    )
    return q @ k.mT / q.shape[-1] ** 0.5 + (1 - batch["attention_mask"][:, None, None, :].float()) * -10000.0


def of_tinybert(layers: dict[int, int], padding: bool, projection: str) -> Loss:
    """`student.distillation` has the projections."""

    def loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
        s = student(**inputs(batch), output_hidden_states=True).hidden_states
        with torch.no_grad():
            t = teacher(**inputs(batch), output_hidden_states=True).hidden_states
        on, total = batch["attention_mask"].bool(), torch.zeros(())
        counted = (on[:, None, :, None] & on[:, None, None, :]).expand(-1, 2, -1, -1)
        for mine, its in layers.items():
            a, b = eager_scores(student, s, mine, batch), eager_scores(teacher, t, its, batch)
            if padding:  # as the original
                a, b = (torch.where(x <= -100, 0.0, x) for x in (a, b))
                total = total + F.mse_loss(a, b)
            else:
                total = total + F.mse_loss(a[counted], b[counted])
        terms = student.distillation.terms
        for number, (mine, its) in enumerate({0: 0, **layers}.items()):
            linear = terms["embedding" if projection == "paper" and mine == 0 else "hidden"].projection
            linear = linear[number] if projection == "per_layer" else linear
            assert (linear.bias is None) == (projection == "paper")
            a, b = linear(s[mine]), t[its]
            total = total + (F.mse_loss(a, b) if padding else F.mse_loss(a[on], b[on]))
        return total

    return loss


def of_prediction(temperature: float, factor: float) -> Loss:
    def loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
        soft = F.softmax(teacher(**inputs(batch)).logits / temperature, -1)
        return -factor * (soft * F.log_softmax(student(**inputs(batch)).logits / temperature, -1)).sum(-1).mean()

    return loss


TINY: dict[str, Any] = {"general_epochs": 1, "intermediate_epochs": 1, "general_rate": RATE, "intermediate_rate": RATE}
NARROW = "hidden_size=16,intermediate_size=24"
EVERY_SECOND = {1: 2, 2: 4, 3: 6}
V2 = {"relations": ("qq", "kk", "vv"), "relation_heads": 4, "teacher_layer": -2}
# Recipe, and of each of its stages the loss and what stands for the teacher.
CASES: dict[str, tuple[Any, dict[str, tuple[Loss, str]]]] = {
    "hinton": (
        hinton.Recipe(**SETTINGS),
        {"labels_only": (labels_alone, "teacher"), "student": (of_hinton, "teacher")},
    ),
    "patient-kd": (
        patient_kd.Recipe(**SETTINGS, beta=50.0),
        {"student": (of_patient_kd(True, {1: 2, 2: 4}), "teacher")},
    ),
    "patient-kd last, raw": (
        patient_kd.Recipe(**SETTINGS, beta=50.0, layers="last", normalize=False),
        {"student": (of_patient_kd(False, {1: 4, 2: 5}), "teacher")},
    ),
    "minilm": (
        minilm.Recipe(**SETTINGS, relation_epochs=1, relation_rate=RATE),
        {"relations": (of_minilm(("qk", "vv"), 2, -1), "base"), "student": (labels_alone, "base")},
    ),
    "minilm v2": (
        minilm.Recipe(**SETTINGS, relation_epochs=1, relation_rate=RATE, **V2),
        {"relations": (of_minilm(("qq", "kk", "vv"), 4, -2), "base")},
    ),
    "tinybert": (
        tinybert.Recipe(**SETTINGS, **TINY, augment=0),
        {
            "general": (of_tinybert(EVERY_SECOND, False, "shared"), "base"),
            "intermediate": (of_tinybert(EVERY_SECOND, False, "shared"), "teacher"),
            "student": (of_prediction(1.0, 0.5), "teacher"),
        },
    ),
    "tinybert, as its code": (
        tinybert.Recipe(**SETTINGS, **TINY, augment=1, padding=True, student_config=NARROW),
        {
            "general": (of_tinybert(EVERY_SECOND, True, "shared"), "base"),
            "intermediate": (of_tinybert(EVERY_SECOND, True, "shared"), "teacher"),
            "student": (of_prediction(1.0, 0.5), "teacher"),
        },
    ),
    "tinybert, as its paper": (
        tinybert.Recipe(
            **SETTINGS, **TINY, augment=2, augment_prediction=False, projection="paper", layers="top", per_class=False,
            t_squared=True, temperature=2.0,
        ),
        {
            "intermediate": (of_tinybert({1: 4, 2: 5, 3: 6}, False, "paper"), "teacher"),
            "student": (of_prediction(2.0, 4.0), "teacher"),
        },
    ),
    "tinybert, a projection per layer": (
        tinybert.Recipe(**SETTINGS, **TINY, augment=0, projection="per_layer", layers="bottom"),
        {"intermediate": (of_tinybert({1: 1, 2: 2, 3: 3}, False, "per_layer"), "teacher")},
    ),
}  # fmt: skip
CONSTANT = ("intermediate",)  # stages whose rate is


def by_hand(
    student: Any, teacher: Any, batches: list[dict[str, Tensor]], loss_of: Loss, constant: bool = False
) -> list[float]:
    """The Trainer's defaults: AdamW, decay of matrices, linear schedule, clipping at 1."""
    student.train()
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    decays = [("bias" not in name and "LayerNorm" not in name, p) for name, p in trained]
    groups = [{"params": [p for d, p in decays if d is on], "weight_decay": 0.01 * on} for on in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=EPSILON)
    linear = get_linear_schedule_with_warmup(optimizer, int(WARMUP * STEPS), STEPS)
    schedule = get_constant_schedule(optimizer) if constant else linear
    losses = []
    for batch in batches:
        loss = loss_of(student, teacher, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def follow(recipe: Any, expected: dict[str, tuple[Loss, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a recipe, every stage of `expected` beside its plain loop, with its teacher: "base", or a folder of the run,
    or several with commas."""
    assets = tiny_reviews.make(tmp_path)
    monkeypatch.setattr(demo, "fetch", lambda package: assets[package.requirement])
    train_stage, compared = stages.train_stage, []

    def compare(trainer: Any, folder: Path, title: str, dtype: str) -> Any:
        trainer.args.logging_steps, trainer.args.adam_epsilon = 1, EPSILON
        trainer.args.max_steps = STEPS  # of augmented rows there are more
        if folder.name not in expected:
            return train_stage(trainer, folder, title, dtype)
        loss_of, teacher_folder = expected[folder.name]
        base = assets[demo.MINILM.requirement]
        where = [base if one == "base" else tmp_path / "run" / one for one in teacher_folder.split(",")]
        teachers = [AutoModelForSequenceClassification.from_pretrained(one).eval() for one in where]
        teacher = teachers[0] if len(teachers) == 1 else teachers
        copied, batches = copy.deepcopy(trainer.model), list(trainer.get_train_dataloader())[:STEPS]
        copied.distillation = copy.deepcopy(trainer.objective)
        losses = by_hand(copied, teacher, batches, loss_of, folder.name in CONSTANT)
        history = train_stage(trainer, folder, title, dtype)
        assert len(batches) == STEPS
        got = [event["loss"] for event in history if "loss" in event]
        torch.testing.assert_close(got, losses, rtol=1e-5, atol=1e-5)
        assert max(losses) > 1.01 * min(losses) > 0
        assert {name for name, _ in copied.distillation.named_parameters()} == {*trainer._parameters_of_objective()}
        trainer.model.distillation = trainer.objective
        for (name, a), b in zip(trainer.model.named_parameters(), copied.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        del trainer.model.distillation
        compared.append(folder.name)
        return history

    monkeypatch.setattr(stages, "train_stage", compare)
    runs.run(recipe, tmp_path / "run", Console(file=io.StringIO()))
    assert compared == list(expected)


@pytest.mark.parametrize("case", CASES)
def test_stages_follow_a_plain_loop(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(*CASES[case], tmp_path, monkeypatch)
