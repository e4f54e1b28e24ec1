"""TinyBERT's losses as the recipe puts them together give the numbers of the original code, of whole models too.

Inputs, parameters, losses and gradients come from `oracles/`, each with a description beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from kdfast.objective import Terms
from kdfast.recipes import tinybert

ORACLES = Path(__file__).parent / "oracles"
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
AS_THE_CODE = tinybert.Recipe(padding=True)


def oracle(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors, inputs in `dtype` and results in float64, and its settings."""
    with np.load(ORACLES / f"{name}.npz") as data:
        tensors = {key: torch.from_numpy(np.atleast_1d(data[key])).reshape(data[key].shape) for key in data.files}
    hyper: dict[str, Any] = json.loads((ORACLES / f"{name}.json").read_text())["hyper"]
    return {key: x.to(dtype) if x.dtype == torch.float32 else x for key, x in tensors.items()}, hyper


def agree(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.any(), "zeros would pass"
    assert float((got.detach().double() - expected).norm()) <= tolerance * float(expected.norm())


def several(o: dict[str, Tensor], name: str) -> list[Tensor]:
    return [o[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in o))]


def objective(
    stage: str, recipe: tinybert.Recipe, student: int = 2, teacher: int = 4, kind: str = "classification"
) -> Terms:
    found = next(one for one in recipe.stages(student, teacher, kind) if one.folder == stage)
    assert isinstance(found.objective, Terms)
    return found.objective


# ---- losses ----
def with_scores(scores: list[Tensor]) -> SimpleNamespace:
    """Queries and keys whose product is the scores, before the mask."""
    keys = [torch.eye(x.shape[-1], dtype=x.dtype).expand_as(x) for x in scores]
    return SimpleNamespace(q=scores, k=keys, scale=1.0, causal=False, hidden=[scores[0], *scores])


@PRECISIONS
def test_attention(dtype: torch.dtype, tolerance: float) -> None:
    o, hyper = oracle("tinybert_attention", dtype)
    mask = o["attention_mask"]
    added = (1 - mask)[:, None, None, :] * hyper["mask_value"]
    s, t = ([x - added for x in several(o, f"{side}_scores")] for side in ("student", "teacher"))
    lowest = torch.cat([torch.where(mask[:, None, None, :].bool(), x, 0).flatten() for x in (*s, *t)]).min()
    # A score that is no padding's and below the floor, which the original takes for one of padding: it counts here.
    floored = (
        [torch.where(x <= hyper["threshold"], 0.0, x) for x in s],
        [torch.where(x <= hyper["threshold"], 0.0, x) for x in t],
    )
    assert lowest <= hyper["threshold"]
    student, teacher = ([x.clone().requires_grad_() for x in side] for side in floored)
    term = objective("intermediate", AS_THE_CODE).terms["attention"]
    loss = term(with_scores(student), with_scores(teacher), {"attention_mask": mask})
    agree(loss, o["loss"], tolerance)
    for i, gradient in enumerate(torch.autograd.grad(loss, student)):
        kept = s[i] > hyper["threshold"]
        agree(gradient * kept, o[f"grad_student_scores.{i}"], tolerance)
    weighted = term(
        with_scores(student), with_scores(teacher), {"attention_mask": mask, "sample_weight": torch.ones(len(mask))}
    )
    agree(weighted, o["loss"], tolerance)


@PRECISIONS
@pytest.mark.parametrize("name", ["hidden", "embedding"])
def test_hidden(name: str, dtype: torch.dtype, tolerance: float) -> None:
    o, _ = oracle(f"tinybert_{name}", dtype)
    if name == "hidden":
        student, teacher = several(o, "student_hidden"), several(o, "teacher_hidden")
        gradients = several(o, "grad_student_hidden")
        term: Any = objective("intermediate", AS_THE_CODE).terms["hidden"]
        mask = o["attention_mask"]
    else:
        student, teacher, gradients = [o["student_emb"]], [o["teacher_emb"]], [o["grad_student_emb"]]
        term = objective("intermediate", tinybert.Recipe(padding=True, projection="paper")).terms["embedding"]
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    student = [x.requires_grad_() for x in student]
    term.projection = nn.Linear(6, 8, dtype=dtype)
    term.projection.load_state_dict({"weight": o["W"], "bias": o["b"]})
    loss = term(SimpleNamespace(hidden=student), SimpleNamespace(hidden=teacher), {"attention_mask": mask})
    agree(loss, o["loss"], tolerance)
    *of_states, of_weight, of_bias = torch.autograd.grad(loss, [*student, *term.projection.parameters()])
    for gradient, expected in zip(
        (*of_states, of_weight, of_bias), (*gradients, o["grad_W"], o["grad_b"]), strict=True
    ):
        agree(gradient, expected, tolerance)


@PRECISIONS
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_prediction(temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    o, _ = oracle("tinybert_prediction", dtype)
    student = o["student_logits"].requires_grad_()
    terms = objective("student", tinybert.Recipe(temperature=temperature))
    (loss,) = terms(SimpleNamespace(logits=student), None, {"teacher_logits": o["teacher_logits"]}).values()
    agree(loss, o[f"loss.T{temperature}"], tolerance)
    agree(torch.autograd.grad(loss, student)[0], o[f"grad_student_logits.T{temperature}"], tolerance)


@PRECISIONS
def test_prediction_of_numbers(dtype: torch.dtype, tolerance: float) -> None:
    o, _ = oracle("tinybert_prediction", dtype)
    student = o["regr_student_logits"].requires_grad_()
    terms = objective("student", tinybert.Recipe(), kind="regression")
    inputs = {"labels": o["regr_labels"], "teacher_logits": torch.full((5, 1), torch.nan, dtype=dtype)}  # unused
    (loss,) = terms(SimpleNamespace(logits=student), None, inputs).values()
    agree(loss, o["regr_loss"], tolerance)
    agree(torch.autograd.grad(loss, student)[0], o["grad_regr_student_logits"], tolerance)


# ---- whole models ----
def model(o: dict[str, Tensor], side: str, hyper: dict[str, Any], dtype: torch.dtype) -> Any:
    """Of transformers, with the parameters of the original, whose head has a ReLU before the classifier."""
    own = hyper[side]
    made: Any = BertForSequenceClassification(
        BertConfig(
            vocab_size=hyper["vocab"],
            hidden_size=own["hidden"],
            num_hidden_layers=own["layers"],
            num_attention_heads=own["heads"],
            intermediate_size=own["ffn"],
            max_position_embeddings=16,
            num_labels=hyper["num_labels"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    weights = {key.removeprefix(f"{side}."): x for key, x in o.items() if key.startswith(f"{side}.")}
    weights = {key: x for key, x in weights.items() if not key.startswith("fit_dense")}
    made.to(dtype).load_state_dict(weights)
    made.classifier.register_forward_pre_hook(lambda module, args: (args[0].relu(),))
    return made.eval()


def test_intermediate_stage_of_models() -> None:
    o, hyper = oracle("tinybert_model_inter", torch.float64)
    student, teacher = (model(o, side, hyper, torch.float64) for side in ("student", "teacher"))
    batch = {name: o[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    assert not batch["attention_mask"].all()
    terms = objective("intermediate", AS_THE_CODE).for_models(student, teacher)
    hidden: Any = terms.terms["hidden"]
    assert hidden.projection.weight.shape == (12, 8)
    hidden.projection.double().load_state_dict(
        {"weight": o["student.fit_dense.weight"], "bias": o["student.fit_dense.bias"]}
    )
    s = terms.run(student, batch)
    with torch.no_grad():
        t = terms.run(teacher, batch)
    agree(s.logits, o["student_logits"], 1e-9)
    agree(t.logits, o["teacher_logits"], 1e-9)
    values = terms(s, t, batch)
    assert list(values) == ["attention", "hidden"]
    agree(values["attention"], o["att_loss"], 1e-9)
    agree(values["hidden"], o["rep_loss"], 1e-9)
    loss = sum(values.values())
    agree(loss, o["loss"], 1e-9)
    loss.backward()
    compared = 0
    for name, parameter in [
        *student.named_parameters(),
        *(("fit_dense." + k, v) for k, v in hidden.projection.named_parameters()),
    ]:
        expected = o.get(f"grad.{name}")
        if expected is None:
            continue
        if not expected.any():  # the classifier is out of reach
            assert parameter.grad is None or not parameter.grad.any()
        else:
            agree(parameter.grad, expected, 1e-9)
            compared += 1
    assert compared >= 7
    masked = objective("intermediate", tinybert.Recipe()).for_models(student, teacher).double()
    masked.terms["hidden"].load_state_dict(hidden.state_dict())
    assert abs(float(masked(s, t, batch)["attention"].detach() / o["att_loss"]) - 1) > 0.01


def test_prediction_stage_of_models() -> None:
    o, hyper = oracle("tinybert_model_pred", torch.float64)
    student, teacher = (model(o, side, hyper, torch.float64) for side in ("student", "teacher"))
    batch = {name: o[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    terms = objective("student", tinybert.Recipe(temperature=hyper.get("temperature", 1.0)))
    with torch.no_grad():
        of_teacher = terms.run(teacher, batch)
    (loss,) = terms(terms.run(student, batch), of_teacher, batch).values()
    agree(loss, o["loss"], 1e-9)
    loss.backward()
    compared = 0
    for name, parameter in student.named_parameters():
        if (expected := o.get(f"grad.{name}")) is not None and expected.abs().max() > 1e-12:
            agree(parameter.grad, expected, 1e-8)
            compared += 1
    assert compared >= 7
