"""Pruning while a model is trained: rates, callbacks beside objectives, resuming, what can be taken back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pruning_oracle as zero
import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn

import kdfast
from kdfast import prune
from kdfast.prune import criteria, schedules
from kdfast.prune.geometry import output_columns
from kdfast.prune.layers import layers_of
from kdfast.prune.optimizer import forget
from kdfast.prune.select import live_masks

KINDS: tuple[Any, ...] = ("heads", "neurons")
STEPS = 8


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, tiny_models.VOCABULARY, (16, 7), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[i],
            "attention_mask": torch.ones(7, dtype=torch.int64),
            "labels": self.ids[i, 0] % 2,
        }


def trainer_of(model: Any, folder: Path, callbacks: list[Any], **settings: Any) -> Any:
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": 4,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "weight_decay": 0.0,
        "seed": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    arguments = transformers.TrainingArguments(str(folder), **{**given, **settings})
    return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)


def l2(model: Any) -> list[prune.Scores]:
    return [criteria.score(model, "l2", of) for of in KINDS]


def counts(masks: prune.Masks) -> tuple[int, int]:
    return sum(int(x.sum()) for x in masks.heads), sum(int(x.sum()) for x in masks.neurons)


# ---- pruning ----
@pytest.mark.parametrize("rate", ["cubic", "iterative", "one-shot"])
def test_pruning(rate: str, tmp_path: Path) -> None:
    """As much as asked, ever the same units, and a smaller model that computes what the masked one does."""
    rates = {
        "cubic": schedules.Cubic(0.5, end=6),
        "iterative": schedules.Iterative(0.5, end=6, rounds=3),
        "one-shot": schedules.OneShot(0.5),
    }
    model, seen = tiny_models.make("bert"), []

    class See(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            seen.append(live_masks(model))

    callback = schedules.Pruning(rates[rate], l2)
    trainer_of(model, tmp_path, [callback, See()]).train()
    expected = [1 - rates[rate](step) for step in range(STEPS)]
    assert [counts(masks) for masks in seen] == [(round(18 * keep), round(111 * keep)) for keep in expected]
    for before, after in itertools.pairwise(seen):
        for was, live in zip((*before.heads, *before.neurons), (*after.heads, *after.neurons), strict=True):
            assert not bool((live & ~was).any())
    assert callback.masks == seen[-1]
    batch = tiny_models.batch(model)
    smaller = prune.compact(model.eval(), callback.masks)
    torch.testing.assert_close(smaller(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("criterion", ["l2", "movement", "hard_concrete", "group_lasso"])
def test_resumed_it_is_the_same(criterion: str, tmp_path: Path) -> None:
    """Interrupted behind step 4: weights, masks and the tracker's numbers, bit for bit, with dropout."""

    def run(folder: Path, resume: str | None) -> tuple[Any, Any, Any]:
        model = tiny_models.make("bert", dropout=0.1)
        tracker = None if criterion == "l2" else criteria.track(model, criterion, KINDS)
        scores = l2 if tracker is None else lambda _: [tracker.scores(of) for of in KINDS]
        pruning = schedules.Pruning(schedules.Cubic(0.5, end=7), scores, every=2)
        callbacks: list[Any] = [pruning] if tracker is None else [schedules.Tracking(tracker), pruning]
        trainer_of(model, folder, callbacks).train(resume_from_checkpoint=resume)
        return model, pruning.masks, tracker

    whole, masks, tracker = run(tmp_path, None)
    other, same, again = run(tmp_path / "other", str(tmp_path / "checkpoint-4"))
    assert counts(masks) == (9, 56)
    assert same == masks
    start = tiny_models.make("bert").state_dict()
    for name, x in whole.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name
    assert not torch.equal(whole.state_dict()["classifier.weight"], start["classifier.weight"])
    if tracker is not None:
        for a, b in zip(tracker.values("neurons"), again.values("neurons"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_moments_of_what_is_dead(name: str) -> None:
    """Zero where weights are dead, as they were elsewhere; then nothing dead moves."""
    model = tiny_models.make(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch = tiny_models.batch(model)
    for _ in range(2):
        model(**batch).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = prune.select(model, l2(model), keep=0.5)
    masks.layers[1] = False
    before = {p: x["exp_avg"].clone() for p, x in optimizer.state.items()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    forget(optimizer, model, masks)
    dead = zero.dead(model, masks)
    assert len(dead) > 6
    for n, p in model.named_parameters():
        if p not in before:
            continue
        off = dead.get(n, torch.zeros_like(p, dtype=torch.bool))
        assert bool((before[p][off] != 0).any()) or not off.any() or "key.bias" in n or "k_proj.bias" in n
        expected = before[p].masked_fill(off, 0)
        assert torch.equal(optimizer.state[p]["exp_avg"], expected)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"] == 0, off | (optimizer.state[p]["exp_avg_sq"] == 0))
    prune.apply(model, masks)
    model(**batch).logits.square().sum().backward()
    optimizer.step()
    for n, p in model.named_parameters():
        off = dead.get(n, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[off], weights[n][off])


def test_beside_an_objective(tmp_path: Path) -> None:
    """Distilled and pruned together."""
    teacher, student = tiny_models.make("bert"), tiny_models.make("bert", seed=1)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True
    )
    objective = kdfast.objective.Terms(logits=kdfast.objective.Logits(temperature=2.0))
    rows: Any = Rows()
    batches = [{k: torch.stack([rows[i][k] for i in range(8)]) for k in rows[0]}]
    pruning = schedules.Pruning(
        schedules.Cubic(0.5, end=3), lambda model: [criteria.score(model, "taylor", of, batches) for of in KINDS]
    )
    trainer = kdfast.DistillationTrainer(
        model=student, teacher=teacher, objective=objective, args=arguments, train_dataset=rows, callbacks=[pruning]
    )
    trainer.train()
    assert counts(live_masks(student)) == (9, 56)


# ---- a bound ----
def test_play_and_prune(tmp_path: Path) -> None:
    model = tiny_models.make("bert")
    qualities = iter([0.95, 0.905, 0.85, 0.9, 0.93])
    callback = schedules.PlayAndPrune(l2, metric="eval_quality", bound=0.9, final=0.4, step=0.2, slack=0.01)
    trainer = trainer_of(model, tmp_path, [callback], eval_strategy="steps", eval_steps=2, max_steps=10)
    trainer.compute_metrics = lambda _: {"quality": next(qualities)}
    gone = []

    class See(transformers.TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, *_: Any, **__: Any) -> None:
            gone.append(callback.gone)

    trainer.add_callback(See())
    trainer.train()
    assert gone == pytest.approx([0.2, 0.3, 0.3, 0.3, 0.4])
    assert counts(live_masks(model)) == (round(18 * 0.6), round(111 * 0.6))
    with pytest.raises(ValueError, match=r"PlayAndPrune: metric: expected one of eval_loss, got 'eval_quality'"):
        callback.on_evaluate(None, None, None, model=model, metrics={"eval_loss": 1.0})


# ---- what can be taken back ----
def test_soft_pruning(tmp_path: Path) -> None:
    """Columns are zero after an epoch, trained on, and masked in the end."""
    model, zeros, later = tiny_models.make("bert"), [], []

    class See(transformers.TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            zeros.append(off(model))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:  # one behind the first epoch's end
                later.append(off(model))

    callback = schedules.SoftPruning(l2, keep=0.5)
    trainer_of(model, tmp_path, [callback, See()]).train()
    assert zeros[0] == (9, 111 - 56)
    assert later == [(0, 0)]
    assert callback.masks is not None
    assert counts(callback.masks) == (9, 56)
    assert live_masks(model) == callback.masks


class Cut(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends a training within a step, as a power cut does."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 6:
            raise InterruptedError


@pytest.mark.parametrize("schedule", ["soft", "soft, saved by epochs", "play-and-prune", "surgery to a share"])
def test_cut_off_it_goes_on_to_the_same(schedule: str, tmp_path: Path) -> None:
    """From the checkpoint behind step 4, which is also the end of an epoch: weights and masks bit for bit, with dropout."""
    settings: dict[str, Any] = {"max_steps": 12}
    if "epochs" in schedule:
        settings |= {"save_strategy": "epoch"}
    if schedule == "play-and-prune":
        settings |= {"eval_strategy": "steps", "eval_steps": 2}

    def run(folder: Path, *also: Any, resume: str | None = None) -> tuple[Any, Any]:
        model = tiny_models.make("bert", dropout=0.1)
        made: Any = {
            "play": lambda: schedules.PlayAndPrune(l2, metric="eval_loss", bound=0.0, final=0.5, slack=2.0),
            "surg": lambda: schedules.Surgery(decay=0.1, keep=0.5, until=10),
            "soft": lambda: schedules.SoftPruning(l2, keep=0.5),
        }[schedule[:4]]()
        trainer_of(model, folder, [made, *also], **settings).train(resume_from_checkpoint=resume)
        return model, made.masks

    whole, masks = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", Cut())
    other, same = run(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-4"))
    if schedule == "play-and-prune":
        assert 9 < counts(masks)[0] < 18
    else:
        assert counts(masks) == (9, 56)
    assert same == masks
    for name, x in whole.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name


def off(model: Any) -> tuple[int, int]:
    """How many heads and neurons have columns that are zero."""
    found = [[output_columns(layer, of).flatten(1).abs().sum(1) == 0 for layer in layers_of(model)] for of in KINDS]
    heads, neurons = (int(torch.cat(each).sum()) for each in found)
    return heads, neurons


def test_surgery_by_hand(tmp_path: Path) -> None:
    """W ∘ T forward, the gradient to all of W, thresholds with a gap; and units that come back."""
    model, by_hand = tiny_models.make("bert"), tiny_models.make("bert")
    callback = schedules.Surgery(("neurons",), decay=0.0)
    trainer = trainer_of(model, tmp_path, [callback], lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0)
    trainer.args.learning_rate = 0.5
    trainer.train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    by_hand.train()
    live = [torch.ones(37, dtype=torch.bool) for _ in range(3)]
    back = 0
    for batch in order(tmp_path):
        whole = [layer.output.dense.weight.detach().clone() for layer in by_hand.bert.encoder.layer]
        with torch.no_grad():
            for layer, w, mask in zip(by_hand.bert.encoder.layer, whole, live, strict=True):
                norms = w.float().norm(dim=0)
                was = mask.clone()
                mask[norms < 0.9 * norms.mean()] = False
                mask[norms >= 1.1 * norms.mean()] = True
                back += int((mask & ~was).sum())
                layer.output.dense.weight.copy_(w * mask)
        by_hand(**batch).loss.backward()
        with torch.no_grad():
            for layer, w in zip(by_hand.bert.encoder.layer, whole, strict=True):
                layer.output.dense.weight.copy_(w)
        optimizer.step()
        optimizer.zero_grad()
    assert back > 0
    assert callback.masks is not None
    for mine, mask in zip(callback.masks.neurons, live, strict=True):
        assert torch.equal(mine, mask)
        assert 0 < int(mask.sum()) < 37
    for (name, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)
    assert live_masks(model) == callback.masks


def order(folder: Path) -> list[dict[str, Tensor]]:
    """The batches that a trainer of these settings sees."""
    seen: list[dict[str, Tensor]] = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
            seen.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
            return {"loss": self.w * 1.0, "logits": self.w[None]}

    trainer_of(Recorder(), folder / "order", [], save_strategy="no").train()
    assert len(seen) == STEPS
    return seen


@pytest.mark.parametrize("until", [5, STEPS])
def test_surgery_to_a_share(until: int, tmp_path: Path) -> None:
    """The share is exact after step `until`, or in the end, and the same from there on; gaps close on the way."""
    model, seen = tiny_models.make("bert"), []
    callback = schedules.Surgery(keep=0.3, until=until, decay=0.0, scope="local", multiple={"neurons": 4})

    class See(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            assert callback.masks is not None
            seen.append(callback.masks.copy())

    trainer_of(model, tmp_path, [callback, See()]).train()
    assert callback.masks is not None
    exact = [(2, 12)] * 3  # of 6 heads and 37 neurons
    assert [
        (int(h.sum()), int(n.sum())) for h, n in zip(callback.masks.heads, callback.masks.neurons, strict=True)
    ] == exact
    assert live_masks(model) == callback.masks
    assert all(masks == callback.masks for masks in seen[until:])
    assert all(masks != callback.masks for masks in seen[:2])


def test_play_and_prune_between_steps(tmp_path: Path) -> None:
    model, gone = tiny_models.make("bert"), []
    callback = schedules.PlayAndPrune(l2, metric="eval_loss", bound=0.0, final=0.5, step=0.1, begin=4, until=6)
    trainer = trainer_of(model, tmp_path, [callback], eval_strategy="steps", eval_steps=2, max_steps=10)

    class See(transformers.TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, *_: Any, **__: Any) -> None:
            gone.append(callback.gone)

    trainer.add_callback(See())
    trainer.train()
    assert gone == pytest.approx([0.0, 0.1, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("criterion", ["slimming", "hard_concrete", "movement"])
def test_gates_go_into_the_weights(criterion: str, tmp_path: Path) -> None:
    """After the training the model computes what it did with its gates, without them."""
    model = tiny_models.make("bert")
    tracker, seen = criteria.track(model, criterion, KINDS), []
    batch = tiny_models.batch(model)

    class See(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_end(self, *_: Any, **__: Any) -> None:
            seen.append(model.eval()(**batch).logits.detach())

    trainer_of(model, tmp_path, [See(), schedules.Tracking(tracker)], save_strategy="no").train()
    assert all(not module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model.eval()(**batch).logits, seen[0])


def test_surgery_resumed(tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "run0" / "checkpoint-4")):
        model = tiny_models.make("bert", dropout=0.1)
        callback = schedules.Surgery(decay=0.5, seed=3)
        trainer_of(model, tmp_path / f"run{len(runs)}", [callback]).train(resume_from_checkpoint=resume)
        runs.append((model.state_dict(), callback.masks))
    assert runs[0][1] == runs[1][1]
    for name, x in runs[0][0].items():
        assert torch.equal(x, runs[1][0][name]), name


# ---- what is refused ----
def test_errors() -> None:
    with pytest.raises(ValueError, match=r"Pruning: every: expected at least 1, got 0"):
        schedules.Pruning(schedules.OneShot(0.5), l2, every=0)
    with pytest.raises(ValueError, match=r"SoftPruning: keep: expected a share between 0 and 1, got 1"):
        schedules.SoftPruning(l2, keep=1)
    for given, name in (
        ({"keep": 1.0, "until": 3}, "keep: expected a share"),
        ({"keep": 0.5}, "until: expected a step"),
    ):
        with pytest.raises(ValueError, match=rf"Surgery: {name}"):
            schedules.Surgery(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Surgery: of: expected heads, neurons or both, got \('layers',\)"):
        schedules.Surgery(("layers",))
    for settings, name in (({"final": 1.0}, "final"), ({"step": 0.0}, "step"), ({"slack": 0.0}, "slack")):
        with pytest.raises(ValueError, match=rf"PlayAndPrune: {name}: expected"):
            schedules.PlayAndPrune(l2, **{"metric": "m", "bound": 0.5, "final": 0.5, **settings})  # type: ignore[arg-type]
