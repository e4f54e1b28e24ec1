"""Several tasks and one encoder: the draw of tasks, what is shared, and training step by step."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_berts
import tiny_reviews
import torch
import torch.nn.functional as F
from command_line import call, refused
from ranks import spawn
from rich.console import Console
from test_recipes_by_hand import EPSILON, SETTINGS, STEPS, by_hand, inputs
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from kdfast.data import tasks
from kdfast.data.sampler import TaskSampler
from kdfast.models.shared_encoder import SharedEncoder
from kdfast.objective import Hinton, Labels, Logits, Tasks, Terms
from kdfast.recipes import hinton, multi_task
from kdfast.results import compare
from kdfast.runs import run, stages
from kdfast.runs.multi_task import TaskCollator, TaskRows, TaskTrainer

SHORT = SETTINGS | {"train_rows": STEPS * 4}  # of each of two tasks


# ---- which task ----
@pytest.mark.parametrize(("tau", "share"), [(1.0, 0.8), (0.5, 2 / 3), (0.0, 0.5)])
def test_tasks_are_drawn_by_their_size(tau: float, share: float) -> None:
    lengths = [[1 + i % 7 for i in range(1600)], [1 + i % 5 for i in range(397)]]
    sampler = TaskSampler(lengths, 4, tau, seed=3)
    drawn = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 4 * 500
        batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        assert all(len({row < 1600 for row in batch}) == 1 for batch in batches)
        drawn += [batch[0] < 1600 for batch in batches]
    assert sum(drawn) / len(drawn) == pytest.approx(share, abs=0.04)  # twice the standard deviation and more


def test_passes_have_every_row() -> None:
    sampler = TaskSampler([[3] * 10, [5] * 3], 4, seed=1)
    rows = [row for epoch in range(40) for row in (sampler.set_epoch(epoch), list(sampler))[1]]
    assert {*rows} == {*range(13)}
    batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    of_small = [batch for batch in batches if batch[0] >= 10]
    assert of_small
    assert all(len({*batch}) == 3 for batch in of_small)  # three rows, one of them twice
    sampler.set_epoch(2)
    again = TaskSampler([[3] * 10, [5] * 3], 4, seed=1)
    again.set_epoch(2)
    assert list(sampler) == list(again)
    again.set_epoch(3)
    assert list(sampler) != list(again)


def test_samplers_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^TaskSampler: lengths: expected rows of every task, got \[1, 0\]$"):
        TaskSampler([[1], []], 2)
    with pytest.raises(ValueError, match=r"^TaskSampler: tau: expected a number that is not negative, got -1.0$"):
        TaskSampler([[1]], 2, -1.0)


# ---- what is shared ----
def shared() -> SharedEncoder:
    return SharedEncoder({"a": tiny_berts.bert(0), "b": tiny_berts.bert(1, classes=2)})


def test_the_encoder_is_shared_and_heads_are_not() -> None:
    model, batch = shared(), tiny_berts.collate(tiny_berts.rows(4))
    alone = tiny_berts.bert(0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in alone.parameters()) + 2 * 16 + 2
    expected = alone(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    columns = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(task="a", **columns).logits, expected)
    model(task="b", **columns).logits.sum().backward()
    assert model.encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert model.heads["b"]["classifier"].weight.grad.abs().sum() > 0
    assert model.heads["a"]["classifier"].weight.grad is None
    assert model.train().models["b"].training
    assert not model.eval().models["b"].training
    copied = copy.deepcopy(model)
    assert copied.models["b"].bert is copied.encoder is not model.encoder


def test_folders_load_as_plain_models(tmp_path: Path) -> None:
    model, batch = shared(), tiny_berts.collate(tiny_berts.rows(4))
    columns = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model.save_pretrained(tmp_path)
    for name, classes in (("a", 3), ("b", 2)):
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / name).eval()
        assert found.config.num_labels == classes
        assert torch.equal(found(**columns).logits, model(task=name, **columns).logits)


def test_models_that_are_refused() -> None:
    with pytest.raises(ValueError, match="SharedEncoder: models: expected some, by names without a dot, got none"):
        SharedEncoder({})
    wide = "SharedEncoder: models: expected BertForSequenceClassification with the encoder of the first, got "
    with pytest.raises(ValueError, match=f"{wide}BertForSequenceClassification for b"):
        SharedEncoder({"a": tiny_berts.bert(0), "b": tiny_berts.bert(0, width=24)})
    with pytest.raises(ValueError, match=f"{wide}BertForMaskedLM for b"):
        SharedEncoder({"a": tiny_berts.bert(0), "b": tiny_berts.masked_lm(0)})


# ---- the objective ----
def objective() -> Tasks:
    return Tasks({"a": Hinton(0.9, 2.0), "b": Terms(ce=Labels(), mse=Logits("logit_mse"))}, {"b": 0.5})


def test_a_batch_has_the_terms_of_its_task() -> None:
    s, t = torch.randn(4, 3), torch.randn(4, 3)
    batch = {"labels": torch.tensor([0, 1, 2, 0]), "teacher_logits": t, "sample_task": "b"}
    values = objective()(SimpleNamespace(logits=s), None, batch)
    assert list(values) == ["a_kl", "a_ce", "b_ce", "b_mse"]
    assert values["a_kl"] == values["a_ce"] == 0
    torch.testing.assert_close(values["b_ce"], 0.5 * F.cross_entropy(s, batch["labels"]))
    torch.testing.assert_close(values["b_mse"], 0.5 * F.mse_loss(s, t))
    half = objective()(SimpleNamespace(logits=s), None, {**batch, "num_items": torch.tensor(8.0)})
    torch.testing.assert_close(half["b_mse"], 0.25 * F.mse_loss(s, t))
    tasks_ = objective()
    tasks_.progress = 0.25
    assert all(of.progress == tasks_.progress == 0.25 for of in tasks_.objectives.values())


def test_objectives_that_are_refused() -> None:
    for arguments, expected in (
        (({},), "objectives: expected some, by names without a dot, got none"),
        (({"a.b": Hinton()},), "objectives: expected some, by names without a dot, got a.b"),
        (({"a": Hinton()}, {"b": 1.0}), "weights: expected those of a, got b"),
        (({"a": Hinton()}, {"a": -1.0}), "weights: expected a number that is not negative, got -1.0"),
    ):
        with pytest.raises(ValueError, match=f"^Tasks: {expected}$"):
            Tasks(*arguments)
    with pytest.raises(TypeError, match=r"^Tasks: objectives: expected Terms for a, got Labels$"):
        Tasks({"a": Labels()})  # type: ignore[dict-item]
    for task, got in (({}, "none"), ({"sample_task": "c"}, "'c'")):
        with pytest.raises(ValueError, match=f"^Tasks: sample_task: expected one of a, b, got {got}$"):
            objective()(SimpleNamespace(logits=torch.zeros(1, 3)), None, {"labels": torch.zeros(1), **task})
    with pytest.raises(ValueError, match=r"^TaskCollator: rows: expected those of one task, got a, b$"):
        TaskCollator({})([{"sample_task": "a"}, {"sample_task": "b"}])


# ---- training ----
class Rows(list[Any]):
    """With what a cache's rows have beside them."""

    @property
    def dataset(self) -> Any:
        return self


def trainer(folder: Path, ranks: int) -> TaskTrainer:
    """Micro-batches of 2; one process has as many more of them in a step."""
    torch.manual_seed(2)
    rows = {
        name: Rows({**row, "labels": row["labels"] % classes, "teacher_logits": torch.randn(classes)} for row in tiny_berts.rows(count))
        for name, classes, count in (("a", 3, 16), ("b", 2, 8))
    }  # fmt: skip
    model = SharedEncoder({"a": tiny_berts.bert(0), "b": tiny_berts.bert(1, classes=2)})
    arguments = TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2 // ranks, num_train_epochs=2,
        learning_rate=1e-3, adam_epsilon=1e-4, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False, ddp_backend=None if ranks == 1 else "gloo",
    )  # fmt: skip

    def collate(given: Any) -> dict[str, Any]:
        own = [{name: x for name, x in row.items() if name != "teacher_logits"} for row in given]
        return {**tiny_berts.collate(own), "teacher_logits": torch.stack([row["teacher_logits"] for row in given])}

    return TaskTrainer(
        model,
        arguments,
        objective=Tasks({"a": Hinton(0.5, 2.0), "b": Hinton(0.2, 1.0)}, {"b": 2.0}),
        train_dataset=TaskRows(rows),
        data_collator=TaskCollator(dict.fromkeys(rows, collate)),
    )


def check(rank: int, folder: Path) -> None:
    it = trainer(folder / str(rank), 2)
    it.train()
    assert isinstance(it.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    one = torch.load(folder / "one.pt")
    for name in ("loss", "a_kl", "b_ce"):
        torch.testing.assert_close(tiny_berts.logged(it, name), one["logged"][name], rtol=0, atol=1e-5)
    tiny_berts.same(it.model, one["student"], 1e-5)


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    it = trainer(tmp_path / "one", 1)
    start = copy.deepcopy(it.model)
    it.train()
    moved = [
        name for name, value in it.model.state_dict().items() if (value - start.state_dict()[name]).abs().max() > 1e-4
    ]
    assert {"heads.a.classifier.weight", "heads.b.classifier.weight"} <= {*moved}
    names = ("loss", "a_kl", "b_ce")
    found = {"logged": {name: tiny_berts.logged(it, name) for name in names}, "student": it.model.state_dict()}
    assert len(found["logged"]["loss"]) == 12
    assert all(max(found["logged"][name]) > 1e-3 for name in names)
    torch.save(found, tmp_path / "one.pt")
    spawn(check, 2, tmp_path, tmp_path)


# ---- the recipe ----
def of_tasks(student: Any, teachers: Any, batch: dict[str, Any]) -> Tensor:
    """Classes, and numbers, whose soft term is a squared difference."""
    task = batch["sample_task"]
    z = student(task=task, **inputs(batch)).logits
    with torch.no_grad():
        t = teachers[task](**inputs(batch)).logits
    if task == "movie_reviews":
        kl = F.kl_div((z / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")
        return 0.5 * (0.8 * 4 * kl + 0.2 * F.cross_entropy(z, batch["labels"]))
    return 0.6 * F.mse_loss(z, t) + 0.4 * F.mse_loss(z[:, 0], batch["labels"].float())


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    found = tiny_reviews.make(tmp_path)
    monkeypatch.setattr("kdfast.data.demo.fetch", lambda package: found[package.requirement])
    return found


def test_recipe_follows_a_plain_loop(assets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = multi_task.Recipe(**SHORT, alpha=(0.8, 0.6), temperature=(2.0,), weight=(0.5, 1.0), tau=0.5)
    train_stage, drawn = stages.train_stage, []

    def compared(trainer: Any, folder: Path, title: str, dtype: str) -> Any:
        trainer.args.logging_steps, trainer.args.adam_epsilon = 1, EPSILON
        if folder.name != "shared":
            return train_stage(trainer, folder, title, dtype)
        names = ("movie_reviews", "product_reviews")
        teachers = {
            name: AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "run" / f"task_{name}" / "teacher"
            ).eval()
            for name in names
        }
        copied, batches = copy.deepcopy(trainer.model), list(trainer.get_train_dataloader())
        drawn.extend(batch["sample_task"] for batch in batches)
        losses = by_hand(copied, teachers, batches, of_tasks)
        history = train_stage(trainer, folder, title, dtype)
        got = [event["loss"] for event in history if "loss" in event]
        torch.testing.assert_close(got, losses, rtol=1e-5, atol=1e-5)
        for (name, a), b in zip(trainer.model.named_parameters(), copied.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        return history

    monkeypatch.setattr(stages, "train_stage", compared)
    results = run(recipe, tmp_path / "run", Console(file=io.StringIO()))
    assert len(drawn) == STEPS
    assert {*drawn} == {"movie_reviews", "product_reviews"}
    assert list(results) == [
        f"{task}/{model}" for task in dict.fromkeys(sorted({*drawn})) for model in ("teacher", "student")
    ]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "task_movie_reviews",
        "task_product_reviews",
    }
    models = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / f"task_{name}" / "student")
        for name in sorted({*drawn})
    ]
    assert [model.config.num_labels for model in models] == [2, 1]
    for a, b in zip(models[0].bert.parameters(), models[1].bert.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_task_is_a_run_of_its_own(
    assets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = {**SHORT, "epochs": 4, "teacher_epochs": 3, "learning_rate": 2e-3, "test_rows": 64, "train_rows": 160}
    results = run(multi_task.Recipe(**settings, baseline=True), tmp_path / "run", Console(file=io.StringIO()))
    assert results["movie_reviews/student"]["accuracy"] > 0.9
    assert results["product_reviews/student"]["pearson"] > 0.8
    run(hinton.Recipe(**settings, baseline=False), tmp_path / "hinton", Console(file=io.StringIO()))
    rows = compare.compare([tmp_path / "run" / "task_movie_reviews", tmp_path / "hinton"]).rows
    assert [row.model for row in rows] == ["teacher", "labels_only", "student", "teacher", "student"]
    assert rows[2].differences
    assert call(monkeypatch, "evaluate", tmp_path / "run" / "task_product_reviews") == 0
    assert {"student,", "shared"} <= {*capsys.readouterr().out.split()}
    told = refused(monkeypatch, capsys, "evaluate", tmp_path / "run")
    assert "expected a run of one task, got one of several; one of its folders is " in told
    own = AutoTokenizer.from_pretrained(tmp_path / "run" / "task_product_reviews" / "student")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "task_product_reviews" / "student"
    ).eval()
    test = tasks.load("product_reviews", test_rows=64).test
    with torch.no_grad():
        numbers = model(**own(list(test["text"]), padding=True, return_tensors="pt")).logits[:, 0]
    found = torch.corrcoef(torch.stack([numbers, torch.tensor(test["labels"])]))[0, 1].item()
    assert found == pytest.approx(results["product_reviews/student"]["pearson"], abs=1e-4)


def test_stopped_run_continues(assets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = multi_task.Recipe(**SHORT | {"train_rows": 24})
    through = run(recipe, tmp_path / "through", Console(file=io.StringIO()))
    train_stage, trained = stages.train_stage, []

    def stop(trainer: Any, folder: Path, title: str, dtype: str) -> Any:
        trained.append(f"{folder.parent.name}/{folder.name}")
        if len(trained) in (2, 4):
            raise stages.StageInterrupted
        return train_stage(trainer, folder, title, dtype)

    monkeypatch.setattr(stages, "train_stage", stop)
    for _ in range(2):
        with pytest.raises(stages.StageInterrupted):
            run(recipe, tmp_path / "run", Console(file=io.StringIO()))
    again = run(recipe, tmp_path / "run", Console(file=io.StringIO()))
    teachers = ["task_movie_reviews/teacher", "task_product_reviews/teacher"]
    assert trained == [*teachers, teachers[1], "run/shared", "run/shared"]
    same = ("accuracy", "kl_to_teacher", "mse_to_teacher", "pearson")
    for name, row in through.items():
        for metric in {*same} & {*row}:
            assert again[name][metric] == pytest.approx(row[metric], rel=1e-4, abs=1e-7)
    # Stopped between the students' places, too.
    (tmp_path / "run" / "task_product_reviews" / "metrics.json").unlink()
    assert run(recipe, tmp_path / "run", Console(file=io.StringIO()))["product_reviews/student"][
        "pearson"
    ] == pytest.approx(through["product_reviews/student"]["pearson"], rel=1e-4)
    stored = json.loads((tmp_path / "run" / "task_movie_reviews" / "metrics.json").read_text())
    assert stored["settings"]["recipe"] == "multi-task-part"
    with pytest.raises(ValueError, match=r"alpha: expected \[0.9\], as the run in the output folder"):
        run(multi_task.Recipe(**SHORT | {"train_rows": 24}, alpha=(0.5,)), tmp_path / "run", Console())


def test_settings_that_are_refused() -> None:
    for settings, expected in (
        ({"data": ("sst2",)}, "data: expected two different tasks or more, got sst2"),
        ({"data": ("sst2", "sst2")}, "data: expected two different tasks or more, got sst2, sst2"),
        ({"teacher": ("a",)}, "teacher: expected 2, one for each task, got 1"),
        ({"alpha": (0.1, 0.2, 0.3)}, "alpha: expected one number or 2, got 3"),
        ({"alpha": (0.1, 1.2)}, "alpha: expected 0 to 1, got 1.2"),
        ({"temperature": (0.0,)}, "temperature: expected positive numbers, got 0.0"),
        ({"weight": (-1.0,)}, "weight: expected 0 to inf, got -1.0"),
        ({"tau": -1.0}, "tau: expected at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=f"^{expected}$"):
            multi_task.Recipe(**settings)


def test_names_of_folders(tmp_path: Path) -> None:
    (tmp_path / "my reviews.csv").write_text("")
    data = (str(tmp_path / "my reviews.csv"), "org/name:config", "shared", "org-name-config")
    assert list(multi_task.Recipe(data=data).parts()) == [
        "my-reviews",
        "org-name-config",
        "shared",
        "org-name-config-3",
    ]


def test_settings_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("kdfast.runs.run", lambda recipe, folder, console, fresh: seen.append(recipe))
    given = ("--data", "sst2", "--data", "rte", "--alpha", "0.9,0.5", "--tau", "0.5", "--output", tmp_path)
    assert call(monkeypatch, "distill", "multi-task", *given) == 0
    assert (seen[0].data, seen[0].alpha, seen[0].tau) == (("sst2", "rte"), (0.9, 0.5), 0.5)
    (tmp_path / "config.yaml").write_text(seen[0].to_yaml())
    assert multi_task.Recipe(**multi_task.Recipe.read_yaml(tmp_path / "config.yaml")) == seen[0]
    told = refused(monkeypatch, capsys, "distill", "multi-task", "--alpha", "much")
    assert "alpha: expected numbers such as 0.9,0.5, got 'much'" in told
