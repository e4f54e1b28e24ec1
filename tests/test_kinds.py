"""Regression and several labels at once: distances to the teacher by hand, what runs show of them; and spreads of latency."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import call, width
from rich.console import Console
from transformers import BertConfig, TrainingArguments
from word_classifiers import WORDS, bert, run, save, tokenizer

from kdfast.data.distances import COMPARED, kind_of, to_teacher
from kdfast.data.labels import KINDS
from kdfast.data.tasks import Task
from kdfast.objective import Labels, Logits, Terms
from kdfast.recipes import hinton
from kdfast.results import plots, tables
from kdfast.train.trainer import DistillationTrainer


def _logits(seed: int, rows: int, width: int) -> torch.Tensor:
    return 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


# ---- distances
def _of_labels(student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, float]:
    """Mean KL of Bernoulli distributions, and the share of equal decisions, in float64 and one by one."""
    p, q = torch.sigmoid(teacher.double()), torch.sigmoid(student.double())
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return kl.mean().item(), ((p > 0.5) == (q > 0.5)).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_by_hand(dtype: torch.dtype) -> None:
    student, teacher = (_logits(seed, 7, 4).to(dtype) for seed in (0, 1))
    kl, agreement = _of_labels(student, teacher)
    assert 0.1 < kl < 5
    assert 0 < agreement < 1
    found = to_teacher(student, teacher, "multi_label")
    assert found["kl_to_teacher"].item() == pytest.approx(kl, rel=1e-5)
    assert found["agreement"].item() == pytest.approx(agreement)
    assert found["kl_to_teacher"] != to_teacher(student, teacher, "classification")["kl_to_teacher"]
    squares = to_teacher(student[:, :1], teacher[:, :1], "regression")
    assert list(squares) == ["mse_to_teacher"]
    expected = F.mse_loss(student[:, :1].double(), teacher[:, :1].double()).item()
    assert squares["mse_to_teacher"].item() == pytest.approx(expected, rel=1e-6)
    p, log_q = teacher.double().softmax(-1), student.double().log_softmax(-1)
    classes = to_teacher(student, teacher, "classification")
    assert classes["kl_to_teacher"].item() == pytest.approx((p * (p.log() - log_q)).sum(-1).mean().item(), rel=1e-5)


def test_kind_of_a_model() -> None:
    for options, outputs, expected in (
        ({}, 3, "classification"),
        ({}, 1, "regression"),
        ({"problem_type": "multi_label_classification"}, 3, "multi_label"),
        ({"problem_type": "multi_label_classification"}, 1, "multi_label"),
        ({"problem_type": "single_label_classification"}, 2, "classification"),
        ({"problem_type": "regression"}, 2, "regression"),
    ):
        assert kind_of(bert(0, **options).config, outputs) == expected
    assert kind_of(None, 2) == "classification"
    for kind in KINDS:  # and back, from a task's
        head = Task("it", None, None, kind, () if kind == "regression" else ("a", "b", "c"), "").head
        config = BertConfig(**head)
        assert (kind_of(config, 3), config.num_labels) == (kind, 1 if kind == "regression" else 3)


@pytest.mark.parametrize(("problem", "classes"), [("multi_label_classification", 3), ("regression", 1)])
def test_trainer_evaluates_the_distance_of_the_kind(problem: str, classes: int, tmp_path: Path) -> None:
    student, teacher = (bert(seed, num_labels=classes, problem_type=problem) for seed in (0, 1))
    rows = [{"input_ids": [3 + (i + k) % 7 for k in range(2 + i % 5)]} for i in range(10)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_eval_batch_size=4, report_to="none", disable_tqdm=True
    )
    trainer = DistillationTrainer(
        student,
        arguments,
        teacher=teacher,
        objective=Terms(mse=Logits("logit_mse")),
        eval_dataset=rows,
        processing_class=tokenizer(),
    )
    found = trainer.evaluate()
    with torch.no_grad():
        own, its = (
            torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
            for model in (student, teacher)
        )
    if problem == "regression":
        assert found["eval_mse_to_teacher"] == pytest.approx(F.mse_loss(own, its).item(), rel=1e-4)
        assert "eval_kl_to_teacher" not in found
    else:
        kl, agreement = _of_labels(own, its)
        assert kl > 1e-3
        assert found["eval_kl_to_teacher"] == pytest.approx(kl, rel=1e-3)
        assert found["eval_agreement"] == pytest.approx(agreement, abs=1e-5)


@pytest.mark.parametrize(
    ("objective", "problem", "kind"),
    [
        (lambda: Terms(kl=Logits("logit_mse"), ce=Labels("multi_label")), None, "multi_label"),
        (lambda: Terms(kl=Logits(), ce=Labels("regression")), None, "regression"),
        (lambda: Terms(kl=Logits(), ce=Labels("regression")), "single_label_classification", "regression"),
        (lambda: Terms(kl=Logits(), ce=Labels(weight=0.0)), "multi_label_classification", "multi_label"),
        (lambda: Terms(kl=Logits("js_div")), None, "classification"),
        (lambda: Terms(kl=Logits("logit_mse"), ce=Labels()), None, "classification"),
        (lambda: Terms(kl=Logits("logit_mse")), "regression", "regression"),
        (lambda: Terms(kl=Logits("logit_mse")), None, ""),
        (lambda: lambda student, teacher, inputs: {"z": (student.logits - teacher.logits).abs().mean()}, None, ""),
    ],
)
def test_kind_is_that_of_the_labels(objective: Any, problem: str | None, kind: str, tmp_path: Path) -> None:
    """The kind for three outputs: first by the labels of the objective, then by the config, last by the divergence."""
    student, teacher = (bert(seed, num_labels=3, problem_type=problem) for seed in (0, 1))
    floats = kind in ("multi_label", "regression")
    rows = [{"input_ids": [3 + i, 5], "labels": [float(i % 2), 1.0, 0.0] if floats else i % 3} for i in range(6)]
    options = {"use_cpu": True, "per_device_eval_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    trainer = DistillationTrainer(
        student, TrainingArguments(str(tmp_path), **options), teacher=teacher, objective=objective(), eval_dataset=rows
    )
    found = trainer.evaluate()
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        own, its = (model(input_ids=ids).logits for model in (student, teacher))
    expected: dict[str, float] = {}
    if kind == "multi_label":
        expected = dict(zip(("kl_to_teacher", "agreement"), _of_labels(own, its), strict=True))
    elif kind == "regression":
        expected = {"mse_to_teacher": F.mse_loss(own, its).item()}
    elif kind:
        kl = F.kl_div(own.log_softmax(-1), its.log_softmax(-1), log_target=True, reduction="batchmean")
        expected = {"kl_to_teacher": kl.item(), "agreement": (own.argmax(-1) == its.argmax(-1)).float().mean().item()}
    compared = {name.removeprefix("eval_"): value for name, value in found.items() if name[5:] in COMPARED}
    assert compared == pytest.approx(expected, rel=1e-3)
    assert all(value > 1e-4 for name, value in expected.items() if name != "agreement")
    assert found["eval_loss"] > 1e-4


# ---- runs
@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with how good they are, and with which of three words they have."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(120):
        words = [WORDS[3 + int(k)] for k in torch.randint(7, (2 + i % 7,), generator=generator)]
        good = sum(word in ("good", "fine") for word in words) - sum(word in ("bad", "poor") for word in words)
        tags = [int(word in words) for word in ("good", "film", "the")]
        made.append({"text": " ".join(words), "stars": good + 0.5, "tags": tags})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    return path


@pytest.mark.parametrize(
    ("column", "kind", "metric", "distance", "shown"),
    [
        ("stars", "regression", "pearson", "mse_to_teacher", "MSE: squared distance to the teacher's numbers. ms:"),
        ("tags", "multi_label", "micro_f1", "kl_to_teacher", "KL: from the teacher's probability of each label, in nats."),
    ],
)  # fmt: skip
def test_runs_show_what_the_task_has(
    column: str, kind: str, metric: str, distance: str, shown: str, rows: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    base = save(tmp_path / "base", bert(0).bert)
    recipe = hinton.Recipe(
        data=str(rows), label_column=column, base=base, max_length=16, epochs=2, teacher_epochs=4, learning_rate=2e-3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's of legends
        results, told = run(tmp_path / "run", recipe)
    assert shown in " ".join(told.split())
    assert results["teacher"][distance] == pytest.approx(0, abs=1e-6)
    assert results["student"][distance] > 1e-4
    (figure,) = figures
    quality, panel = figure.axes
    title, unit = plots.DISTANCES[distance]
    assert (panel.get_title("left"), panel.get_ylabel().split(",")[0]) == (title.format(rows="all test rows"), unit)
    assert quality.get_title("left") == f"{'Micro F1' if kind == 'multi_label' else 'Pearson'} on all test rows"
    for axes in (quality, panel):
        lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
        assert [line.get_label() for line in lines] == ["student, distilled", "student, labels alone"]
    # The curve ends where the table is, but for training's precision: all test rows are on it.
    assert panel.lines[0].get_ydata()[-1] == pytest.approx(results["student"][distance], rel=0.1)

    assert call(monkeypatch, "evaluate", tmp_path / "run", "--output", tmp_path / "out.json") == 0
    evaluated = capsys.readouterr().out
    assert width(evaluated) <= 80
    assert ("MSE to" if kind == "regression" else "KL to") in evaluated
    again = json.loads((tmp_path / "out.json").read_text())["models"]["student, distilled"]
    for name in (metric, distance):
        assert again[name] == pytest.approx(results["student"][name], rel=1e-3)
    assert call(monkeypatch, "compare", tmp_path / "run", "--output", tmp_path / "compared") == 0
    compared = capsys.readouterr().out
    assert f"{results['student'][distance]:.4f}" in compared
    assert ("MSE: squared distance" if kind == "regression" else "of each label") in " ".join(compared.split())


def test_base_with_a_head_of_other_classes(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    base = save(tmp_path / "base", bert(0, num_labels=5))
    with pytest.raises(
        ValueError,
        match=r"^base .*base: expected weights of 3 labels, any number.*, got others: classifier.bias, classifier.weight",
    ):
        run(tmp_path / "run", hinton.Recipe(data=str(rows), label_column="tags", base=base, max_length=16))


# ---- latencies
def _measured(slowest: float) -> dict[str, float]:
    row = {"accuracy": 0.861, "kl_to_teacher": 0.2551, "agreement": 0.923, "parameters": 22.7e6, "megabytes": 90.9}
    row |= {"latency_ms_batch_1": 15.6, "latency_ms_batch_1_fastest": 12.2, "latency_ms_batch_1_slowest": slowest}
    row |= {
        "latency_ms_batch_32": 97.4,
        "latency_ms_batch_32_fastest": 90.1,
        "latency_ms_batch_32_slowest": 6.2 * slowest,
    }
    return {**row, "training_seconds": 192.0}


@pytest.mark.parametrize("table", ["results", "evaluation"])
def test_spread_of_latencies_where_it_is_wide(table: str) -> None:
    def shown(slowest: float) -> str:
        titles = {"teacher": "teacher", "student": "student, labels alone"}
        results = {name: _measured(slowest) for name in titles}
        if table == "results":
            made = tables.results_table(results, titles, "movie_reviews", "accuracy")
        else:
            results = {
                title: {k: v for k, v in row.items() if k != "training_seconds"} for title, row in results.items()
            }
            made = tables.evaluation_table(results, "movie_reviews", 2000)
        out = io.StringIO()
        Console(file=out, width=80).print(made)
        return out.getvalue()

    wide, narrow = shown(31.4), shown(1.25 * 15.6 - 0.1)
    for text in (wide, narrow):
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        assert "15.6" in text
    assert "12–31" in wide
    assert "90–195" in wide
    assert "below it fastest–slowest" in " ".join(wide.split())
    assert "–" not in narrow.replace("fastest–slowest", "")
    assert "fastest" not in narrow


def test_sub_millisecond_spreads_keep_a_digit() -> None:
    row = {"latency_ms_batch_1": 0.3, "latency_ms_batch_1_fastest": 0.27, "latency_ms_batch_1_slowest": 12.4}
    assert tables._spread(row, "latency_ms_batch_1") == "\n0.3–12"
    assert tables._spread({"pearson": -0.5}, "pearson") == ""


def test_what_distillation_brought_in_a_line() -> None:
    results = {
        "labels_only": {"accuracy": 0.786, "kl_to_teacher": 0.7974, "agreement": 0.9},
        "student": {"accuracy": 0.807, "kl_to_teacher": 0.1851, "agreement": 0.9},
    }
    shown = "accuracy 80.7 %, on the labels alone 78.6 % (+2.1 points); KL to the teacher 0.1851 against 0.7974"
    assert tables.gain(results, "accuracy") == [f"Distilled: {shown}"]
    assert tables.gain({"student": results["student"], "teacher": {}}, "accuracy") == []
