"""Every stage of DynaBERT against a training loop in plain torch, where a sub-network is the whole model with what it lacks
set to zero; two processes against one; and killed runs."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_recipes_by_hand as loops
import tiny_reviews
import torch
import torch.nn.functional as F
from ranks import spawn
from rich.console import Console
from test_recipes_by_hand import EPSILON, RATE, SETTINGS, STEPS, WARMUP
from tiny_berts import bert, logged, rows, same, trainer
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from kdfast import runs
from kdfast.data import demo
from kdfast.elastic import Elastic
from kdfast.objective import Hidden, Labels, Logits, Terms
from kdfast.recipes import dynabert
from kdfast.runs import stages
from kdfast.train.subnetworks import SubnetworkTrainer

WIDTHS, DEPTHS = (0.5, 1.0), (0.5, 1.0)
KEPT = {1.0: [0, 1, 2, 3, 4, 5], 0.5: [0, 2, 4]}  # of 6 layers
LAST = {1.0: [0, 1, 2, 3, 4, 5], 0.5: [1, 3, 5]}
HEAD, NEURONS = 16, 16  # of 2 heads of 16, and of 32 neurons: what a half keeps


@contextmanager
def narrow(model: Any, width: float, kept: list[int]) -> Iterator[None]:
    """Hooks that set the second head and the second half of the neurons to zero, and pass on what other layers get."""
    handles = []

    def first(count: int) -> Any:
        return lambda module, given: (torch.cat([given[0][..., :count], 0 * given[0][..., count:]], -1),)

    for number, layer in enumerate(model.bert.encoder.layer):
        if width < 1:
            handles.append(layer.attention.output.dense.register_forward_pre_hook(first(HEAD)))
            handles.append(layer.output.dense.register_forward_pre_hook(first(NEURONS)))
        if number not in kept:
            handles.append(layer.register_forward_hook(lambda module, given, output: given[0]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answers(model: Any, batch: dict[str, Tensor], width: float, kept: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the inputs of the layers that are kept and the last output."""
    states: list[Tensor] = []
    layers = model.bert.encoder.layer
    with narrow(model, width, kept):
        handles = [layers[i].register_forward_pre_hook(lambda module, given: states.append(given[0])) for i in kept]
        handles.append(model.bert.pooler.register_forward_pre_hook(lambda module, given: states.append(given[0])))
        logits = model(**loops.inputs(batch)).logits
    for handle in handles:
        handle.remove()
    return logits, states


def loss_of(mine: Any, its: Any, batch: dict[str, Tensor], weight: float, padding: bool, where: list[int]) -> Tensor:
    on = batch["attention_mask"].bool()
    soft = -(its[0].softmax(-1) * mine[0].log_softmax(-1)).sum(-1).mean()
    pairs = zip(mine[1], (its[1][i] for i in where), strict=True)
    return soft + weight * sum(F.mse_loss(a, b) if padding else F.mse_loss(a[on], b[on]) for a, b in pairs)


def step_losses(
    student: Any, teacher: Any, batch: dict[str, Tensor], recipe: dynabert.Recipe, folder: str
) -> Iterator[Tensor]:
    """Of the sub-networks of a step, the largest first."""
    of_depth = LAST if recipe.keep_last else KEPT
    depths = (1.0,) if folder == "width" else DEPTHS[::-1]
    weight, known = 0.1 if folder == "width" else 1.0, None
    for depth, width in itertools.product(depths, WIDTHS[::-1]):
        kept = of_depth[depth]
        mine = answers(student, batch, width, kept)
        if folder == "finetuned":
            yield F.cross_entropy(mine[0], batch["labels"])
            continue
        if recipe.teacher_width == "in_place":
            if known is None:
                known = mine[0].detach(), [state.detach() for state in mine[1]]
                yield F.cross_entropy(mine[0], batch["labels"])
                continue
            its = known
        else:
            matched = recipe.teacher_width == "match" and folder == "depth"
            with torch.no_grad():
                its = answers(teacher, batch, width if matched else 1.0, KEPT[1.0])
        yield loss_of(mine, its, batch, weight, recipe.padding, [*kept, 6])


def by_hand(
    student: Any, teacher: Any, batches: list[dict[str, Tensor]], recipe: dynabert.Recipe, folder: str
) -> list[float]:
    """Trains a copy, and returns the mean loss of every step."""
    decay = [p for name, p in student.named_parameters() if "bias" not in name and "LayerNorm" not in name]
    others = [p for name, p in student.named_parameters() if "bias" in name or "LayerNorm" in name]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=EPSILON)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * STEPS), STEPS)
    losses = []
    student.train()
    for batch in batches:
        optimizer.zero_grad()
        of_step = []
        for loss in step_losses(student, teacher, batch, recipe, folder):
            loss.backward()
            of_step.append(loss.item())
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(sum(of_step) / len(of_step))
    return losses


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "match": {"teacher_width": "match", "padding": True},
    "in_place": {"teacher_width": "in_place"},
    "keep_last": {"keep_last": True, "finetune_epochs": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_stages_follow_a_plain_loop(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = tiny_reviews.make(tmp_path)
    monkeypatch.setattr(demo, "fetch", lambda package: assets[package.requirement])
    recipe = dynabert.Recipe(**SETTINGS, widths=WIDTHS, depths=DEPTHS, importance_rows=16, **CASES[case])
    train_stage, compared = stages.train_stage, []

    def compare(it: Any, folder: Path, title: str, dtype: str) -> Any:
        if folder.name == "teacher":
            return train_stage(it, folder, title, dtype)
        name = title.removeprefix("student, ")
        it.args.logging_steps, it.args.adam_epsilon = 1, EPSILON
        student = bert_like(it.model)
        teacher = None if it.teacher is None else bert_like(it.teacher)
        batches = list(it.get_train_dataloader())
        losses = by_hand(student, teacher, batches, recipe, name)
        history = train_stage(it, folder, title, dtype)
        assert len(batches) == STEPS
        got = [event["loss"] for event in history if "loss" in event]
        torch.testing.assert_close(got, losses, rtol=1e-5, atol=1e-5)
        assert max(losses) > 1.01 * min(losses) > 0
        same(it.model, student, 1e-5)
        compared.append(name)
        return history

    monkeypatch.setattr(stages, "train_stage", compare)
    runs.run(recipe, tmp_path / "run", Console(file=io.StringIO()))
    assert compared == ["width", "depth", *["finetuned"] * bool(recipe.finetune_epochs)]


def bert_like(model: Any) -> Any:
    """A plain copy, whose layers have no other forward than their classes'."""
    made = type(model)(copy.deepcopy(model.config))
    made.load_state_dict(model.state_dict())
    return made.eval()


# ---- processes ----
RANKS, BATCH = 2, 2


def run(folder: Path, ranks: int, in_place: bool) -> Any:
    model = bert(1, layers=4)
    networks = Elastic(model, WIDTHS, DEPTHS)

    def objective_of(width: float, depth: float) -> Terms:
        kept = networks.masks(width, depth).layers.nonzero().flatten().tolist()
        on_labels = in_place and width == depth == 1
        states = Hidden({i: i for i in (*kept, 4)}, weight=0.0 if on_labels else 1.0)
        return Terms(soft=Logits("kl_div", weight=1.0 - on_labels), hidden=states, ce=Labels(weight=float(on_labels)))

    given = rows(6 * RANKS * BATCH)
    kind = partial(SubnetworkTrainer, networks=networks, objective_of=objective_of, sandwich=1, in_place=in_place)
    return trainer(
        folder, model, given, objective_of(1.0, 1.0), teacher=None if in_place else bert(2, layers=4), kind=kind,
        per_device_train_batch_size=RANKS * BATCH // ranks, ddp_backend=None if ranks == 1 else "gloo",
        ddp_find_unused_parameters=False,
    )  # fmt: skip


def check(rank: int, folder: Path) -> None:
    for in_place in (False, True):
        it = run(folder / f"{in_place}-{rank}", RANKS, in_place)
        it.train()
        assert isinstance(it.model_wrapped, nn.parallel.DistributedDataParallel)
        one = torch.load(folder / f"{in_place}.pt")
        torch.testing.assert_close(logged(it), one["losses"], rtol=0, atol=1e-5)
        same(it.model, one["model"], 1e-5)


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    for in_place in (False, True):
        torch.manual_seed(0)
        it = run(tmp_path / "one" / str(in_place), 1, in_place)
        it.train()
        assert min(logged(it)) > 1e-3
        torch.save({"losses": logged(it), "model": it.model.state_dict()}, tmp_path / f"{in_place}.pt")
    spawn(check, RANKS, tmp_path, tmp_path)
