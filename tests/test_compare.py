"""`kdfast compare`: numbers by hand, what it writes, and mistakes in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from command_line import call, classifier_run, refused, width

from kdfast.recipes import hinton, minilm, patient_kd
from kdfast.results import plots
from kdfast.results.compare import compare


def _row(accuracy: float, **more: float) -> dict[str, float]:
    of_all = {"kl_to_teacher": 0.1, "agreement": 0.9, "parameters": 17_390_594, "megabytes": 70.0}
    return {
        "accuracy": accuracy,
        **of_all,
        "latency_ms_batch_1": 13.2,
        "latency_ms_batch_32": 79.0,
        "training_seconds": 180.0,
        **more,
    }


def _language_run(folder: Path, settings: dict[str, Any], **perplexities: float) -> Path:
    folder.mkdir(parents=True)
    models = {
        name: {"perplexity": value, "kl_to_teacher": 0.5, "parameters": 1e8, "tokens_per_second": 300.0}
        for name, value in perplexities.items()
    }
    (folder / "metrics.json").write_text(json.dumps({"settings": settings, "versions": {}, "models": models}))
    return folder


TEACHER, ALONE, STUDENT = (0.86, 0.87, 0.88), (0.79, 0.80, 0.81), (0.80, 0.82, 0.87)
PATIENT, MINILM = (0.85, 0.85, 0.88), (0.7, 0.7, 0.7)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three recipes with three seeds each; Hinton's runs have the teachers, and the students on the labels alone."""
    made = []
    layers: dict[str, Any] = {"student_layers": (0, 2, 4), "epochs": 3, "learning_rate": 1e-4, "warmup": 0.06}
    for seed in range(3):
        teacher = _row(TEACHER[seed], kl_to_teacher=0.0, agreement=1.0, latency_ms_batch_1=25.0)
        path = tmp_path / f"hinton-{seed}"
        alone, student = _row(ALONE[seed]), _row(STUDENT[seed])
        made.append(
            classifier_run(
                path, hinton.Recipe(seed=seed, **layers), teacher=teacher, labels_only=alone, student=student
            )
        )
        # One path as the other commands might have been given it: relative to the folder of all runs.
        recipe: Any = patient_kd.Recipe(seed=seed, teacher=f"hinton-{seed}/teacher", student_start="teacher", **layers)
        made.append(classifier_run(tmp_path / f"patient-{seed}", recipe, teacher=teacher, student=_row(PATIENT[seed])))
        recipe = minilm.Recipe(seed=seed, teacher=str(path / "teacher"), base="/minilm", **layers)
        made.append(classifier_run(tmp_path / f"minilm-{seed}", recipe, teacher=teacher, student=_row(MINILM[seed])))
    return made


def test_mean_and_standard_error_over_seeds(runs: list[Path]) -> None:
    rows = {row["name"]: row for row in compare(runs).as_dict()["rows"]}
    assert list(rows) == ["teacher", "hinton/labels_only", "hinton/student", "patient/student", "minilm/student"]
    assert all(row["seeds"] == [0, 1, 2] and row["n"] == 3 for row in rows.values())
    assert rows["patient/student"]["runs"] == [str(run) for run in runs if run.name.startswith("patient")]
    # Deviations -3, -1, 4 %: sqrt((9 + 1 + 16) / 2) / sqrt(3) = 2.0817.
    student = rows["hinton/student"]["metrics"]["accuracy"]
    assert student == {"mean": pytest.approx(0.83), "standard_error": pytest.approx(0.020816660), "n": 3}
    assert rows["teacher"]["metrics"]["latency_ms_batch_1"] == {"mean": 25.0, "standard_error": 0.0, "n": 3}


def test_difference_to_the_same_student_on_the_labels_alone(runs: list[Path]) -> None:
    rows = {row["name"]: row["difference_to_labels_only"] for row in compare(runs).as_dict()["rows"]}
    # 1, 2 and 6 %, seed by seed: sqrt((4 + 1 + 9) / 2) / sqrt(3) = 1.5275.
    assert rows["hinton/student"] == {"mean": pytest.approx(0.03), "standard_error": pytest.approx(0.015275252), "n": 3}
    # Another run, with the same teacher, start and training: 6, 5 and 7 %.
    assert rows["patient/student"] == {"mean": pytest.approx(0.06), "standard_error": pytest.approx(0.0057735), "n": 3}
    assert rows["minilm/student"] is None  # starts from the base
    assert rows["teacher"] is None
    assert rows["hinton/labels_only"] is None


def test_hinton_with_alpha_0_is_training_on_the_labels_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "teacher": "org/teacher",
        "base": "org/base",
        "student_start": "base",
        "baseline": False,
    }
    start = {"epochs": 3, "learning_rate": 1e-4, "warmup": 0.06}
    alone = hinton.Recipe(alpha=0.0, **settings, **start)
    runs = [
        classifier_run(tmp_path / "alone", alone, teacher=_row(0.9), student=_row(0.6)),
        classifier_run(tmp_path / "minilm", minilm.Recipe(**settings, **start), teacher=_row(0.9), student=_row(0.7)),
    ]
    rows = {row.name: row for row in compare(runs).rows}
    assert list(rows) == ["teacher", "alone/student", "minilm/student"]
    assert rows["alone/student"].differences == []
    assert rows["minilm/student"].differences == [pytest.approx(0.1)]


def test_single_runs_have_no_standard_error(runs: list[Path]) -> None:
    row = compare(runs[:1]).as_dict()["rows"][2]
    assert row["name"] == "hinton-0/student"
    assert row["metrics"]["accuracy"] == {"mean": 0.8, "standard_error": None, "n": 1}
    assert row["difference_to_labels_only"]["standard_error"] is None


def test_runs_called_the_same_are_told_by_their_settings(tmp_path: Path) -> None:
    runs = [
        classifier_run(tmp_path / part / name, hinton.Recipe(alpha=alpha, seed=seed), student=_row(0.8))
        for part, alpha in (("a", 0.5), ("b", 0.9))
        for seed, name in enumerate(("run-seed1", "run-seed2"))
    ]
    assert [row.name for row in compare(runs).rows] == ["hinton alpha 0.5/student", "hinton alpha 0.9/student"]
    assert [row.name for row in compare(runs[:2]).rows] == ["run/student"]
    # As often as it is given, a folder is one run.
    assert len(compare([runs[0], runs[0], tmp_path / "a" / ".." / "a" / "run-seed1"]).rows[0].runs) == 1


def test_each_teacher_of_its_own_has_a_row(tmp_path: Path) -> None:
    runs = [
        classifier_run(tmp_path / f"run-{part}", hinton.Recipe(alpha=alpha), teacher=_row(0.9), student=_row(0.8))
        for part, alpha in (("a", 0.5), ("b", 0.9))
    ]
    assert [row.name for row in compare(runs).rows][::2] == ["run-a/teacher", "run-b/teacher"]


def test_table_at_80_columns_and_files(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "out"
    assert call(monkeypatch, "compare", *runs, "--output", folder) == 0
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert width(shown) <= 80
    assert "…" not in shown
    for word in ("accuracy", "labels", "teacher", "agrees", "params", "ms,", "32", "train", "83.0±2.1", "+3.0±1.5"):
        assert word in shown
    assert json.loads((folder / "comparison.json").read_text()) == {
        "family": "classifier",
        "metric": "accuracy",
        "data": None,
        "measured_on": {"test": "2000 rows, 0f"},
        "rows": compare(runs).as_dict()["rows"],
    }
    lines = (folder / "comparison.md").read_text().splitlines()
    assert lines[0].startswith("movie reviews: runs compared. n seeds: mean ± standard error. ")
    assert "| hinton/student | 3 | 83.0±2.1 | +3.0±1.5 | 0.1000±0.0000 | 90.0±0.0 | 17.4 | 13.2±0.0 |" in lines[6]
    assert len({line.count("|") for line in lines[2:]}) == 1
    for plot in (plots.plot_comparison, plots.plot_costs):
        plot(folder / "comparison.png", compare(runs))
        across, down = struct.unpack(">II", (folder / "comparison.png").read_bytes()[16:24])
        assert across == 780  # a phone's 390 points at twice the pixels
        assert 600 < down < 1600


def test_another_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = classifier_run(tmp_path / "r", hinton.Recipe(data="qqp"), "f1", student={"f1": 0.75, "accuracy": 0.5})
    assert call(monkeypatch, "compare", run) == 0
    assert " 75.0" in capsys.readouterr().out
    assert call(monkeypatch, "compare", run, "--metric", "accuracy", "--output", tmp_path / "o") == 0
    shown = capsys.readouterr().out
    assert " 50.0" in shown
    assert "75.0" not in shown
    assert "metric: expected one of accuracy, f1, got auc" in refused(
        monkeypatch, capsys, "compare", run, "--metric", "auc"
    )


def test_language_models_among_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"recipe": "causal-lm", "data": None, "teacher": None, "test_rows": 64, "max_length": 256}
    runs = [
        _language_run(tmp_path / f"{name}{seed}", {**settings, "seed": seed, "alpha": alpha}, **perplexities)
        for name, alpha, student in (("kd-", 0.9, 30.0), ("ce-", 0.0, 40.0))
        for seed in (0, 1)
        for perplexities in [{"teacher": 20.0, "start": 1.5e6, "student": student + 2 * seed}]
    ]
    rows = compare(runs).as_dict()["rows"]
    assert [row["name"] for row in rows] == ["teacher", "kd/start", "kd/student", "ce/start", "ce/student"]
    assert rows[0]["n"] == 1  # the one of the demonstration
    assert rows[2]["metrics"]["perplexity"] == {"mean": 31.0, "standard_error": pytest.approx(1.0), "n": 2}
    assert call(monkeypatch, "compare", *runs, "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "31.00±1.00" in shown
    assert "1.5e+06±0.0e+00" in shown
    other = _language_run(tmp_path / "short", {**settings, "max_length": 128, "seed": 5}, student=9.0)
    message = refused(monkeypatch, capsys, "compare", runs[0], other)
    assert f"short: expected a run measured on the rows of {runs[0]}, max_length 256, got max_length 128" in message
    for name, known in (("kd-0", "0a"), ("kd-1", "0b"), ("ce-0", "0a")):
        path = tmp_path / name / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": known}))
    message = refused(monkeypatch, capsys, "compare", *runs)
    assert (
        f"{tmp_path}/kd-1: expected the tokenizer of {tmp_path}/kd-0, got another; what is measured per token"
        in message
    )
    assert len(compare([runs[0], *runs[2:]]).rows) == 5  # ce-1 does not tell
    sampled = _language_run(tmp_path / "gkd", {**settings, "on_policy": 1.0}, student=9.0)
    assert "on_policy 0.0, got on_policy above 0" in refused(monkeypatch, capsys, "compare", runs[0], sampled)


def test_what_cannot_be_compared(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = _language_run(tmp_path / "causal", {"recipe": "causal-lm", "seed": 0}, student=30.0)
    masked = _language_run(tmp_path / "masked", {"recipe": "distilbert", "seed": 0}, student=5.0)
    other = classifier_run(tmp_path / "other", hinton.Recipe(data="sst2"), test="872 rows, a1", student=_row(0.8))
    same = classifier_run(
        tmp_path / "same", hinton.Recipe(data="sst2", test_rows=900), test="872 rows, a1", student=_row(0.8)
    )
    assert len(compare([other, same]).rows) == 2
    again = classifier_run(tmp_path / "again", hinton.Recipe(data="sst2"), test="872 rows, a1", student=_row(0.9))
    as_many = classifier_run(tmp_path / "as-many", hinton.Recipe(), test="2000 rows, a1", student=_row(0.8))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.json").write_text('{"settings": {}, "models": {"student": {"accuracy": 0.8}}}')
    (tmp_path / "empty").mkdir()
    for given, expected in (
        (
            (runs[0], causal),
            f"{causal}: expected a run of classifiers, as {runs[0]} is, got one of language models (causal-lm); com",
        ),
        ((causal, masked), "language models (causal-lm), as "),
        ((runs[0], other), f"measured on the test rows of {runs[0]} (2000 rows), got 872 rows"),
        ((runs[0], as_many), f"measured on the test rows of {runs[0]} (2000 rows), got as many others"),
        ((other, again), f"{again}: expected other settings or another seed than {other}, got the same and seed 0"),
        ((tmp_path / "none",), "none: expected the folder of a run, got no folder"),
        ((tmp_path / "empty",), "empty: expected a finished run, got no metrics.json"),
        ((tmp_path,), f"got no metrics.json; there are runs in it: {tmp_path / 'again'}"),
        ((tmp_path / "old",), "metrics.json: expected what a run of this version of kdfast has, got KeyError('task')"),
        ((runs[0], "--output", runs[0] / "metrics.json"), "metrics.json: expected a folder, got a file"),
        ((), "Missing argument"),
    ):
        assert expected in refused(monkeypatch, capsys, "compare", *given)


def test_runs_of_before_a_setting_came(tmp_path: Path) -> None:
    made = [classifier_run(tmp_path / f"run-{seed}", hinton.Recipe(seed=seed), student=_row(0.8)) for seed in (0, 1)]
    stored = json.loads((made[0] / "metrics.json").read_text())
    assert stored["settings"].pop("baseline_epochs") is None
    (made[0] / "metrics.json").write_text(json.dumps(stored))
    (row,) = compare(made).rows
    assert len(row.runs) == 2
