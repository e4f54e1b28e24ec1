"""Encoders that rows leave early: the originals' numbers, batches against rows alone, files, and what is refused."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from early_exits import (
    CLASSES,
    LENGTH,
    ROWS,
    batch,
    early_exit,
    every_uncertainty,
)
from test_students import model_of
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification

import kdfast
from kdfast.early_exit import EarlyExit
from kdfast.objective import Branches, Labels, Missing, Terms

NAMES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "mpnet", "modernbert")


# ---- batches ----
def between(every: Tensor, count: int) -> list[float]:
    """Speeds that no rounding makes another row's: in the middle between uncertainties that are apart."""
    values = every.flatten().sort().values
    middles = ((values[1:] + values[:-1]) / 2)[values.diff() > 1e-4]
    return middles[torch.linspace(0, len(middles) - 1, count).long()].tolist()


@pytest.mark.parametrize("head", ["", "classes"])
@pytest.mark.parametrize("name", NAMES)
def test_batches_leave_as_rows_alone(name: str, head: str) -> None:
    dtype, tolerance = (torch.float32, 1e-4) if name == "bert" else (torch.float64, 1e-10)
    model, inputs = early_exit(name, head).to(dtype), batch()
    every = every_uncertainty(model, inputs)
    speeds = [0.0, *between(every, 4), 1.0]
    seen: set[int] = set()
    with torch.no_grad():
        answers = model(**inputs, branches=True)
        stacked = torch.stack([*answers.branch_logits, answers.logits])
        for speed in speeds:
            outputs = model(**inputs, speed=speed)
            alone = [model(**{k: v[i : i + 1] for k, v in inputs.items()}, speed=speed) for i in range(ROWS)]
            assert torch.equal(outputs.layers, torch.cat([one.layers for one in alone]))
            for kind in ("logits", "uncertainty"):
                assert_close(outputs[kind], torch.cat([one[kind] for one in alone]), rtol=0, atol=tolerance)
            sure = (every <= speed) & (speed > 0)
            sure[-1] = True
            first = sure.int().argmax(0)
            assert torch.equal(outputs.layers, first + 1)
            assert_close(outputs.logits, stacked[first, torch.arange(ROWS)], rtol=0, atol=tolerance)
            seen |= set(outputs.layers.tolist())
        plain = model.model(**inputs)
    assert len(seen) >= 2 + (name != "albert")  # whose layers are one
    assert model(**inputs, speed=1.0).layers.tolist() == [1] * ROWS
    if head:
        assert torch.equal(model(**inputs, speed=0.0).logits, plain.logits)
        assert torch.equal(answers.logits, plain.logits)
    mean_layers = [model(**inputs, speed=speed).layers.float().mean() for speed in speeds]
    assert mean_layers == sorted(mean_layers, reverse=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_a_mask_and_with_positions(attention: str) -> None:
    for name in ("bert", "modernbert", "mpnet"):
        model = early_exit(name)
        if name != "mpnet":
            model.model.set_attn_implementation(attention)
        ids = batch()["input_ids"]
        speed = between(every_uncertainty(model, {"input_ids": ids})[:1], 3)[1]
        positions = torch.arange(LENGTH).flip(0).expand(ROWS, -1)
        for more in ({}, {"position_ids": positions}) if name != "mpnet" else ({},):
            outputs = model(ids, speed=speed, **more)
            alone = [
                model(ids[i : i + 1], speed=speed, **{k: v[i : i + 1] for k, v in more.items()}) for i in range(ROWS)
            ]
            assert torch.equal(outputs.layers, torch.cat([one.layers for one in alone]))
            assert_close(outputs.logits, torch.cat([one.logits for one in alone]), rtol=1e-5, atol=1e-5)
            assert len({*outputs.layers.tolist()}) > 1


def test_fewer_rows_are_computed_and_then_none() -> None:
    model, inputs = early_exit(), batch()
    counted: list[int] = []
    for layer in model.model.bert.encoder.layer:
        layer.attention.register_forward_hook(lambda _, args, out: counted.append(len(args[0])))
    every = every_uncertainty(model, inputs)
    counted.clear()
    speed = between(every[:1], 3)[1]
    layers = model(**inputs, speed=speed).layers
    assert counted == [n for n in ((layers > i).sum().item() for i in range(model.depth)) if n]
    assert 0 < counted[1] < ROWS
    counted.clear()
    model(**inputs, speed=1.0)
    assert counted == [ROWS]
    counted.clear()
    asked: list[int] = []
    model.branches[0].register_forward_hook(lambda *_: asked.append(1))
    model(**inputs, speed=0.0)
    assert counted == [ROWS] * model.depth
    assert asked == []


def test_strict_and_stored_speed() -> None:
    model, inputs = early_exit(), batch()
    with torch.no_grad():
        model.branches[0].classifier.weight.zero_()  # one uncertainty, to the bit, whatever the products' library
    speed = every_uncertainty(model, inputs)[0].max().item()
    assert (model(**inputs, speed=speed).layers == 1).all()
    model.strict = True
    assert (model(**inputs, speed=speed).layers > 1).any()
    model.strict, model.speed = False, speed
    assert (model(**inputs).layers == 1).all()
    assert model.train()(**inputs).layers.tolist() == [model.depth] * ROWS


def test_empty_batch_and_nan() -> None:
    model, inputs = early_exit(), batch()
    none = {name: x[:0] for name, x in inputs.items()}
    for options in ({"speed": 0.5}, {"speed": 0.0}, {"branches": True}):
        outputs = model(**none, **options)
        assert outputs.logits.shape == (0, CLASSES)
    assert len(outputs.branch_logits) == model.depth - 1
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.branches[0].classifier.bias[0] = torch.nan  # unsure, whatever the speed
    outputs = broken(**inputs, speed=1.0)
    assert outputs.layers.tolist() == [2] * ROWS
    assert outputs.logits.isfinite().all()


def test_copies_are_on_their_own_and_models_as_before() -> None:
    model, inputs = early_exit(), batch()
    speed = between(every_uncertainty(model, inputs), 3)[1]
    expected = model(**inputs, speed=speed)
    plain = model.model(**inputs).logits
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again = copied(**inputs, speed=speed)
    assert_close(again.logits, expected.logits, rtol=0, atol=0)
    assert torch.equal(again.layers, expected.layers)
    assert torch.equal(copied.model(**inputs).logits, plain)


def test_threads_do_not_meet() -> None:
    model, inputs = early_exit(), batch()
    speed = between(every_uncertainty(model, inputs), 3)[1]
    parts = [{k: v[i : i + 3] for k, v in inputs.items()} for i in (0, 3, 6)] * 2
    expected = [model(**part, speed=speed) for part in parts]
    wrong: list[Any] = []

    def work(number: int) -> None:
        for _ in range(5):
            found = model(**parts[number], speed=speed)
            if not torch.equal(found.layers, expected[number].layers):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, inputs = early_exit(), batch()
    expected = model(**inputs, speed=0.0).logits
    other = copy.deepcopy(model).to(dtype)
    outputs = other(**inputs, speed=0.0)
    assert outputs.logits.dtype == dtype
    assert_close(outputs.logits.float(), expected, rtol=0.1, atol=0.1)
    outputs = other(**inputs, speed=0.5)
    assert outputs.uncertainty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert outputs.logits.dtype == dtype


# ---- training ----
def test_what_is_trained_and_still() -> None:
    model = early_exit("bert", "")
    model.train_backbone().train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {"0", "1", "2"}
    assert all(name.startswith("branches.") for name in frozen)
    assert model.model.training
    for dropout in (False, True):
        model.train_branches(dropout).train()
        assert {name for name, p in model.named_parameters() if p.requires_grad} == frozen
        assert model.model.training is dropout
        assert model.branches[0].training
        assert model.branches[-1].training is dropout
    assert not model.eval().branches[0].training


def test_objectives_of_branches() -> None:
    model, inputs = early_exit(), batch()
    objective = Terms(branches=Branches(), ce=Labels())
    outputs = objective.run(model, inputs)
    with pytest.raises(Missing, match="labels"):
        objective(outputs, None, inputs)
    with pytest.raises(TypeError, match=r"Terms: model: expected a kdfast.early_exit.EarlyExit, got Bert"):
        objective.run(model.model, inputs)
    with pytest.raises(ValueError, match=r"Branches: student: expected a kdfast.early_exit.EarlyExit"):
        Branches()(model(**inputs), None, inputs)
    with pytest.raises(TypeError, match="Branches: arguments"):
        Branches(beta=0.5)
    weight = torch.linspace(0.5, 2, ROWS)
    weighted = Branches()(outputs, None, {**inputs, "sample_weight": weight})
    log_t = outputs.logits.detach().log_softmax(-1)
    rows = sum(
        F.kl_div(z.log_softmax(-1), log_t, reduction="none", log_target=True).sum(-1) for z in outputs.branch_logits
    )
    assert_close(weighted, (weight * rows).mean(), rtol=1e-5, atol=1e-6)


# ---- files ----
@pytest.mark.parametrize("head", ["", "classes"])
def test_saved_and_loaded(head: str, tmp_path: Path) -> None:
    model, inputs = early_exit("bert", head, speed=0.25, strict=True), batch()
    speed = between(every_uncertainty(model, inputs), 3)[1]
    model.save_pretrained(tmp_path)
    again = kdfast.early_exit.EarlyExit.from_pretrained(tmp_path)
    assert not again.training
    assert (again.speed, again.strict, again.width, again.own_head) == (0.25, True, 8, bool(head))
    a, b = (of(**inputs, speed=speed) for of in (model, again))
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.layers, b.layers)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    half = EarlyExit.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    kind = AutoModelForSequenceClassification if head else AutoModel
    plain = kind.from_pretrained(tmp_path).eval()  # transformers' own
    assert_close(plain(**inputs)[0], model.model(**inputs)[0], rtol=0, atol=0)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"EarlyExit.from_pretrained: source: expected a model with early_exit.json, got"
    ):
        EarlyExit.from_pretrained(tmp_path)
    early_exit().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "early_exit.json").read_text())
    (tmp_path / "early_exit.json").write_text(json.dumps({**settings, "width": 16}))
    with pytest.raises(ValueError, match=r"EarlyExit.from_pretrained: source: .*size mismatch"):
        EarlyExit.from_pretrained(tmp_path)


# ---- costs ----
def test_flops_of_a_row() -> None:
    """By hand: two operations for each multiplication, of projections, scores, mixtures and feed-forward network."""
    n, d, f, w, heads = 7, 32, 48, 8, 2
    layer = 2 * n * (4 * d * d + 2 * d * f) + 2 * 2 * n * n * d
    of_heads = (
        2 * w * w + 2 * heads * n * w * 2 + 2 * w * w
    )  # keys' matrix times the query, scores, mixture, values' matrix
    branch = 2 * n * d * w + 2 * w * w + of_heads + 2 * w * w * 2 + 2 * w * CLASSES
    for head, last in (("", branch), ("classes", 2 * d * d + 2 * d * CLASSES)):
        model = early_exit("bert", head)
        expected = [4 * layer + last, *(i * (layer + branch) for i in (1, 2, 3))]
        assert model.train().flops(n) == [*expected, 3 * branch + 4 * layer + last]
        assert model.training


# ---- what is refused ----
def test_refused_models_and_settings() -> None:
    bert = model_of("bert", "classes", num_labels=CLASSES)
    for model, options, error, expected in (
        ("bert", {}, TypeError, "EarlyExit: model: expected a transformers model, got str"),
        (
            model_of("llama", "classes"),
            {},
            ValueError,
            "first token stands for a sequence, of albert, bert, .* got 'llama'",
        ),
        (model_of("xlnet", "classes"), {}, ValueError, "got 'xlnet'"),
        (model_of("bert", "words"), {}, ValueError, "an encoder, or a classifier of sequences, got BertForMaskedLM"),
        (model_of("bert", "classes", num_labels=1), {}, ValueError, "two classes or more .* got 1"),
        (bert, {"width": 9}, ValueError, "EarlyExit: width: expected a multiple of the 2 heads, got 9"),
        (bert, {"width": 8.0}, TypeError, "EarlyExit: width: expected an int"),
        (bert, {"heads": 0}, ValueError, "EarlyExit: heads: expected 1 or more, got 0"),
        (bert, {"speed": 1.5}, ValueError, "EarlyExit: speed: expected a number from 0 to 1, got 1.5"),
    ):
        with pytest.raises(error, match=expected):
            EarlyExit(model, **options)
    assert "forward" not in vars(bert.bert.encoder.layer[0])


def test_refused_calls() -> None:
    model, inputs = early_exit(), batch()
    for more, error, expected in (
        ({"speed": -0.1}, ValueError, "EarlyExit: speed: expected a number from 0 to 1, got -0.1"),
        ({"speed": float("nan")}, ValueError, "EarlyExit: speed: expected a number from 0 to 1, got nan"),
        ({"speed": "fast"}, TypeError, "EarlyExit: speed: expected a number, got str"),
        ({"attention_mask": torch.ones(ROWS, 1, 1, LENGTH)}, ValueError, r"attention_mask: expected \[batch, length\]"),
        ({"output_hidden_states": True}, ValueError, "EarlyExit: output_hidden_states: expected none"),
        ({"input_ids": None, "attention_mask": None}, ValueError, "EarlyExit: inputs: expected a batch"),
    ):
        with pytest.raises(error, match=expected):
            model(**{**inputs, "speed": 0.5, **more})
    assert model(**inputs, labels=torch.zeros(ROWS).long(), speed=0.5).logits.shape == (ROWS, CLASSES)


def test_benchmark_of_what_branches_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import early_exit as benchmark

    monkeypatch.setitem(benchmark.SIZES, "tiny", {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32})
    found = benchmark.measure("tiny", 2, 8, 2)
    assert set(found["ways"]) == {"plain", "speed 0", "every branch"}
    assert found["ways"]["plain"]["ms"] > 0
    assert found["flops"][1] > found["flops"][0] > 0
