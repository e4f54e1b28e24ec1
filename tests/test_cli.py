"""The command line: help, mistakes in one line with exit code 2, and what users can meet on the way."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_teacher
import torch
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

import kdfast
from kdfast.cli import main
from kdfast.cli.distill import RECIPES
from kdfast.data import demo
from kdfast.ops._divergence import KINDS
from kdfast.recipes import hinton
from kdfast.runs.classifier import ClassifierRun
from kdfast.runs.stages import StageInterrupted
from kdfast.teacher_cache import TeacherCache, text_rows, write
from kdfast.teacher_cache._teacher import Teacher


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kdfast", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    return exit_.value.code or 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distil"], "No such command 'distil'"),
        (["distill", "hintn"], "No such command 'hintn'"),
        (["distill", "hinton", "--epoch", "2"], "--epoch"),
        (["distill", "hinton", "--epochs", "two"], "valid integer"),
        (["distill", "hinton", "--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["distill", "hinton", "--alpha", "1.5"], "alpha: expected 0 to 1, got 1.5"),
        (["distill", "hinton", "--temperature", "0"], "temperature: expected a positive number, got 0"),
        (
            ["distill", "hinton", "--student-layers", "0;2"],
            "student_layers: expected layer numbers such as 0,2,4, got '0;2'",
        ),
        (["distill", "hinton", "--student-layers=-1,2"], "student_layers: expected numbers from 0 on, got [-1, 2]"),
        (["distill", "hinton", "--learning-rate", "-1"], "learning_rate"),
        (["cache-teacher"], "Missing argument"),
        (["cache-teacher", "/none", "a.txt", "out"], "model /none: expected the folder of a model, got no folder"),
        (
            ["cache-teacher", "m", "a.txt", "out", "--layers", "1;2"],
            "layers: expected layer numbers such as 0,2,4, got '1;2'",
        ),
        (["cache-teacher", "m", "a.txt", "out", "--max-length", "0"], "--max-length"),
        (["distill", "hinton", "--output", __file__], f"output {__file__}: expected a folder, got a file"),
        (
            ["distill", "hinton", "--output", str(Path(__file__).parent)],
            "expected an empty folder or one with a run, got other files; choose another",
        ),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kdfast: ")
    assert err.count("\n") == 1
    assert expected in err


def test_other_settings_in_the_same_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(hinton.Recipe(epochs=5).to_yaml())
    assert _run(monkeypatch, "distill", "hinton", "--output", str(tmp_path)) == 2
    assert (
        f"epochs: expected 5, as the run in the output folder {tmp_path} has, got 3; choose" in capsys.readouterr().err
    )


def test_help_names_recipe_and_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert _run(monkeypatch, "distill", "--help") == 0
    assert "hinton" in capsys.readouterr().out
    assert _run(monkeypatch, "distill", "hinton", "--help") == 0
    shown = capsys.readouterr().out
    for text in ("--output", "--quick", "--fresh", "--temperature", "metrics.json", "Ctrl-C"):
        assert text in shown


def test_help_of_encoder_decoders(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Which have no demonstration; and of their losses, all are named."""
    monkeypatch.setenv("COLUMNS", "120")
    assert _run(monkeypatch, "distill", "seq2seq", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "demonstration" not in shown
    assert f"Between teacher and student: {', '.join(KINDS)}. Default" in shown
    assert shown.count("<0,2,4>") == 2
    assert "test rows 200; by default in runs/seq2seq-quick." in shown
    assert _run(monkeypatch, "distill", "hinton", "--help") == 0
    assert "demonstration" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [(), (-1, 2)])
def test_layers_are_checked_alike_in_all_recipes(wrong: tuple[int, ...]) -> None:
    """Before a teacher is there. Without any, the default would take their place."""
    checked = []
    for recipe in RECIPES:
        for name in ("student_layers", "decoder_layers"):
            if name in inspect.signature(recipe).parameters:
                checked.append((recipe.name, name))
                expected = rf"^{name}: expected numbers from 0 on, got {re.escape(str([*wrong]))}$"
                with pytest.raises(ValueError, match=expected):
                    recipe(**{name: wrong})
    assert {("hinton", "student_layers"), ("seq2seq", "decoder_layers")} < {*checked}


def test_variables_of_recipes_say_what_they_hold() -> None:
    """The command reads the types of all of them, and Python 3.10 refuses to: `ClassVar` alone is none to it."""
    classes = {cls for recipe in RECIPES for cls in recipe.__mro__}
    types = {(cls.__module__, name): of for cls in classes for name, of in inspect.get_annotations(cls).items()}
    assert types["kdfast.recipes.base", "name"] == "ClassVar[str]"
    assert [key for key, of in types.items() if of in ("ClassVar", "typing.ClassVar")] == []


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"kdfast {kdfast.__version__}\n"


@pytest.mark.parametrize(
    ("raised", "code", "expected"),
    [
        (demo.AssetError("cannot fetch it; put it there"), 1, "kdfast: cannot fetch it; put it there\n"),
        (StageInterrupted(), 130, "the same command continues"),
        (KeyboardInterrupt(), 130, "the same command continues"),
    ],
)
def test_what_can_stop_a_run_gives_one_line(
    raised: BaseException,
    code: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def execute(self: Any) -> None:
        raise raised

    monkeypatch.setattr(ClassifierRun, "execute", execute)
    assert _run(monkeypatch, "distill", "hinton", "--output", str(tmp_path / "run")) == code
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_options_reach_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ClassifierRun, "execute", lambda self: seen.append((self.recipe, self.folder)))
    run = ["distill", "hinton", "--output", str(tmp_path / "run")]
    assert _run(monkeypatch, *run) == 0
    assert seen.pop() == (hinton.Recipe(), tmp_path / "run")
    options = [
        "--quick",
        "--epochs=5",
        "--alpha=0.5",
        "--temperature=4",
        "--student-layers=1,3",
        "--seed=7",
        "--no-baseline",
    ]
    assert _run(monkeypatch, *run, *options) == 0
    recipe, _ = seen.pop()
    assert recipe == hinton.Recipe(
        epochs=5,
        alpha=0.5,
        temperature=4.0,
        student_layers=(1, 3),
        seed=7,
        baseline=False,
        train_rows=hinton.Recipe.quick["train_rows"],
        test_rows=hinton.Recipe.quick["test_rows"],
    )


def test_config_is_shown_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--relations=qq,kk,vv", "--relation-heads=8", "--text-columns=a,b", "--no-freeze-embeddings"]
    assert _run(monkeypatch, "distill", "minilm", "--print-config", *options) == 0
    shown = capsys.readouterr().out
    assert "relation_heads: 8" in shown
    assert "seed: 0" in shown
    (tmp_path / "mine.yaml").write_text(shown)
    again = ["distill", "minilm", "--print-config", "--config", str(tmp_path / "mine.yaml")]
    assert _run(monkeypatch, *again) == 0
    assert capsys.readouterr().out == shown
    assert _run(monkeypatch, *again, "--relation-heads=4") == 0
    assert capsys.readouterr().out == shown.replace("relation_heads: 8", "relation_heads: 4")
    (tmp_path / "mine.yaml").write_text("epochs: many")
    assert _run(monkeypatch, *again) == 2
    assert "epochs: expected int, got 'many'" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [recipe.name for recipe in RECIPES])
def test_every_setting_has_help(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    alone = recipe == "prune"  # a command of its own, whose teacher is its argument
    assert _run(monkeypatch, *([] if alone else ["distill"]), recipe, "--help") == 0
    shown = capsys.readouterr().out
    kind = next(one for one in RECIPES if one.name == recipe)
    for field in dataclasses.fields(kind):
        assert ("MODEL" if alone and field.name == "teacher" else f"--{field.name.replace('_', '-')}") in shown
        assert field.metadata["help"].split()[0] in shown


def test_prune_takes_its_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        _run(monkeypatch, "prune", "org/model", "--target", "latency=0.5", "--units", "neurons", "--print-config") == 0
    )
    shown = capsys.readouterr().out
    for line in ("recipe: prune", "teacher: org/model", "target: latency=0.5", "- neurons"):
        assert line in shown


def test_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; sys.argv = ['kdfast', 'distill', 'hinton']; "
        "from kdfast.cli import main; main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install kdfast[train]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of cache-teacher: a saved model, a file of text, and where to write."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    tiny_teacher.llama().save_pretrained(tmp_path / "model")
    tiny_teacher.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.txt").write_text("\n\n".join(tiny_teacher.texts(20)))
    return ["cache-teacher", *(str(tmp_path / name) for name in ("model", "rows.txt", "cache"))]


def test_teacher_is_cached_and_described(
    teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *teacher, "--k", "6", "--temperature", "2", "--batch-size", "3", "--dtype", "float16") == 0
    tokens = sum(len(text.split()) for text in tiny_teacher.texts(20))
    shown = capsys.readouterr().out
    for text in ("20", f"{tokens}", "bytes per token", "tokens/s", "19 of 39 rows have no text and are left out\n"):
        assert text in shown
    tokenizer = tiny_teacher.tokenizer()
    cache = TeacherCache(tmp_path / "cache", tokenizer=tokenizer, teacher=teacher[1], k=6, temperature=2.0)
    rows = text_rows(teacher[2], tokenizer)
    item = cache.beside(rows)[7]
    assert item["input_ids"] == tiny_teacher.rows(20)[7]["input_ids"]
    with torch.no_grad():
        logits = tiny_teacher.llama()(input_ids=torch.tensor([item["input_ids"]])).logits[0]
    expected = (logits / 2).log_softmax(-1).topk(6)
    torch.testing.assert_close(item["teacher_topk_logprobs"].float(), expected.values, rtol=1e-3, atol=1e-3)
    assert torch.equal(item["teacher_topk_indices"].long(), expected.indices)

    assert _run(monkeypatch, "check-cache", str(tmp_path / "cache")) == 0
    shown = capsys.readouterr().out
    for text in ("complete", str(tmp_path / "model"), "topk", "float16", "2.0", str(tiny_teacher.VOCABULARY)):
        assert text in shown
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert _run(monkeypatch, "check-cache", str(tmp_path / "cache")) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "shard-00000.safetensors with sha256" in err


def test_stopped_cache_is_continued(
    teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Any, rows: Any) -> Any:
        if rows[0].number >= 8:
            raise KeyboardInterrupt
        return run(self, rows)

    run = Teacher.__call__
    options = ["--outputs", "cls, hidden", "--layers", "1", "--batch-size", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", stop)
        # A megabyte would hold all rows.
        patch.setattr(
            "kdfast.runs.cache.write",
            lambda *arguments, **options: write(*arguments, **{**options, "shard_bytes": options["shard_bytes"] >> 10}),
        )
        assert _run(patch, *teacher, *options, "--shard-mb", "1") == 130
    assert "the same command continues" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 1
    assert _run(monkeypatch, "check-cache", str(tmp_path / "cache")) == 1
    assert "stopped after 4 rows; the same write goes on there" in capsys.readouterr().err
    assert _run(monkeypatch, *teacher, *options) == 0
    cache = TeacherCache(tmp_path / "cache")
    assert sorted(cache[0]) == ["cls_1", "hidden_1", "length", "positions"]
    with torch.no_grad():
        ids = torch.tensor([tiny_teacher.rows(20)[19]["input_ids"]])
        states = tiny_teacher.llama()(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(cache[19]["hidden_1"], states[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache[19]["cls_1"], states[1][0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (["--k", "51"], 2, "k: expected at most 50, the width of the teacher's logits, got 51"),
        (["--temperature", "0"], 2, "temperature: expected a positive number, got 0.0"),
        (["--outputs", "topk,heads"], 2, "outputs: expected some of topk, logits, cls, hidden, got ['topk', 'heads']"),
        (["--outputs", "logits"], 2, "model: expected all weights of LlamaForSequenceClassification in"),
        (["--text-column", "body"], 2, "text_column: expected one of text in"),
        (["--dtype", "float64"], 2, "dtype: expected one of float32, float16, bfloat16, got float64"),
    ],
)
def test_mistakes_in_a_cache_give_one_line(
    options: list[str],
    code: int,
    expected: str,
    teacher: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(monkeypatch, *teacher, *options) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kdfast: {expected}")
    assert err.count("\n") == 1
    assert expected in err


def test_mistakes_in_a_cache_name_the_commands_arguments(
    teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which are `folder` and `rows` of `kdfast.teacher_cache`."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").touch()
    assert _run(monkeypatch, *teacher) == 2
    assert capsys.readouterr().err.startswith(
        "kdfast: output: expected a new folder, or one that holds a teacher cache"
    )


def test_models_that_cannot_be_loaded_give_one_line(
    teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    for folder, expected in {
        "model": f"model: expected one that AutoModelForCausalLM loads from {tmp_path}",
        "empty": f"model {tmp_path / 'empty'}: expected what transformers loads, got ",
    }.items():
        assert _run(monkeypatch, "cache-teacher", str(tmp_path / folder), *teacher[2:]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"kdfast: {expected}")


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_models_without_a_tokenizer_are_not_cached(
    kept: tuple[str, ...],
    teacher: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """transformers makes up one whose every word is unknown, and a cache of its rows looks like any other."""
    T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    T5Tokenizer().save_pretrained(tmp_path / "made-up")
    for name in kept:
        (tmp_path / "made-up" / name).rename(tmp_path / "t5" / name)
    got = "tokenizer_config.json without its vocabulary (tokenizer.json or spiece.model)" if kept else "one without"
    assert _run(monkeypatch, teacher[0], str(tmp_path / "t5"), *teacher[2:], "--outputs", "cls") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"kdfast: model {tmp_path / 't5'}: expected a model with a tokenizer, got {got}; save ")
    assert not (tmp_path / "cache").exists()


def test_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "kdfast", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"kdfast {kdfast.__version__}\n"
