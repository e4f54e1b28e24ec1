"""Objectives put together from terms give the numbers of the original codes: Patient-KD, DistilBERT, Hinton, TextBrewer.

Inputs, losses and gradients come from `oracles/`, each with a description beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdfast.objective import CLS, Attention, Cosine, Hidden, Labels, Logits, Terms

ORACLES = Path(__file__).parent / "oracles"
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])


def oracle(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors, inputs in `dtype` and results in float64, and its settings."""
    with np.load(ORACLES / f"{name}.npz") as data:
        tensors = {key: torch.from_numpy(np.atleast_1d(data[key])).reshape(data[key].shape) for key in data.files}
    hyper: dict[str, Any] = json.loads((ORACLES / f"{name}.json").read_text())["hyper"]
    return {key: x.to(dtype) if x.dtype == torch.float32 else x for key, x in tensors.items()}, hyper


def agree(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.any(), "zeros would pass"
    assert float((got.detach().double() - expected).norm()) <= tolerance * float(expected.norm())


def states(cls: Tensor) -> list[Tensor]:
    """Hidden states whose first tokens are cls, [layers, B, D], after an embedding and beside tokens that must not count."""
    return [torch.full_like(x, torch.nan)[:, None] for x in cls[:1]] + [
        torch.stack((x, torch.full_like(x, 7.0)), 1) for x in cls
    ]


# ---- Patient-KD ----
@PRECISIONS
@pytest.mark.parametrize("stored", [False, True], ids=["teacher", "stored teacher"])
@pytest.mark.parametrize("layers", ["skip", "last"])
def test_patient_kd(layers: str, stored: bool, dtype: torch.dtype, tolerance: float) -> None:
    o, hyper = oracle(f"pkd_combined_{layers}", dtype)
    alpha, its = hyper["alpha"], [int(i) + 1 for i in hyper["fc_layer_idx"].split(",")]
    objective = Terms(
        ce=Labels(weight=1 - alpha),
        ds=Logits(temperature=hyper["T"], per_class=True, weight=alpha),
        pt=CLS(dict(zip(range(1, 6), its, strict=True)) if stored else layers, weight=hyper["beta"]),
    )
    cls, logits = o["student_cls"].requires_grad_(), o["student_logits"].requires_grad_()
    student = SimpleNamespace(hidden=states(cls), logits=logits, cls_index=0)
    inputs: dict[str, Any] = {"labels": o["labels"]}
    teacher = SimpleNamespace(hidden=states(o["teacher_cls"]), logits=o["teacher_logits"], cls_index=0)
    if stored:
        inputs |= {f"teacher_cls_{i}": o["teacher_cls"][i - 1] for i in its} | {"teacher_logits": o["teacher_logits"]}
    values = objective(student, None if stored else teacher, inputs)
    agree(values["ce"] / (1 - alpha), o["ce_loss"], tolerance)
    agree(values["ce"] + values["ds"], o["loss_dl"], tolerance)
    agree(values["pt"], o["pt_loss_times_beta"], tolerance)
    loss = sum(values.values())
    agree(loss, o["loss"], tolerance)
    of_logits, of_cls = torch.autograd.grad(loss, (logits, cls))
    agree(of_logits, o["grad_student_logits"], tolerance)
    agree(of_cls, o["grad_student_cls"], tolerance)
    assert not of_cls[-1].any()  # the last layer learns from the logits


@PRECISIONS
@pytest.mark.parametrize("name", ["skip_norm", "skip_raw", "last_norm", "last_raw"])
def test_patient_kd_patience(name: str, dtype: torch.dtype, tolerance: float) -> None:
    o, _ = oracle(f"pkd_pt_{name}", dtype)
    layers, kind = name.split("_")
    cls = o["student_cls"].requires_grad_()
    student = SimpleNamespace(hidden=states(cls), cls_index=0)
    teacher = SimpleNamespace(hidden=states(o["teacher_cls"]), cls_index=0)
    inputs = {"input_ids": torch.ones(4, 2)}
    loss = CLS(layers, normalize=kind == "norm")(student, teacher, inputs)
    agree(loss, o["loss_fp64"], tolerance)
    agree(torch.autograd.grad(loss, cls)[0], o["grad_student_cls"], tolerance)
    paper = CLS(layers, normalize=kind == "norm", mean_over_layers=False)(
        student, teacher, inputs
    )  # a sum, and of rows
    agree(paper * cls.shape[1] * cls.shape[2], o["paper_sum_over_NMd"], tolerance)


@PRECISIONS
@pytest.mark.parametrize("name", ["T5_a0.2", "T10_a0.7", "T20_a0.5"])
def test_patient_kd_logits(name: str, dtype: torch.dtype, tolerance: float) -> None:
    o, hyper = oracle(f"pkd_ds_{name}", dtype)
    alpha, logits = hyper["alpha"], o["student_logits"].requires_grad_()
    objective = Terms(ce=Labels(weight=1 - alpha), ds=Logits(temperature=hyper["T"], per_class=True, weight=alpha))
    values = objective(
        SimpleNamespace(logits=logits), None, {"labels": o["labels"], "teacher_logits": o["teacher_logits"]}
    )
    agree(values["ce"] / (1 - alpha), o["nll_loss"], tolerance)
    agree(values["ds"] / alpha, o["d_loss"], tolerance)
    agree(torch.autograd.grad(values["ds"] / alpha, logits, retain_graph=True)[0], o["grad_d_loss"], tolerance)
    agree(torch.autograd.grad(sum(values.values()), logits)[0], o["grad_total"], tolerance)


# ---- DistilBERT ----
@PRECISIONS
@pytest.mark.parametrize(
    "name", ["total_5_2_1", "total_restrict", "ce_attnmask", "ce_mlmmask", "ce_T1", "mlm", "cos", "mse"]
)
def test_distilbert(name: str, dtype: torch.dtype, tolerance: float) -> None:
    o, hyper = oracle(f"distilbert_{name}", dtype)
    tokens = "labels" if hyper["restrict_ce_to_mask"] else "all"
    vocabulary = o["student_logits"].shape[-1]
    objective = Terms(
        ce=Logits(tokens=tokens, temperature=hyper["temperature"], weight=hyper["alpha_ce"]),
        mlm=Labels("tokens", weight=hyper["alpha_mlm"]),
        cos=Cosine(weight=hyper["alpha_cos"]),
        mse=Logits("logit_mse", tokens=tokens, weight=hyper["alpha_mse"] * vocabulary),  # a sum over the vocabulary
    )
    logits, hidden = o["student_logits"].requires_grad_(), o["student_last_hidden"].requires_grad_()
    student = SimpleNamespace(logits=logits, hidden=[hidden.new_full((), torch.nan), hidden])
    last = o["teacher_last_hidden"]
    teacher = SimpleNamespace(logits=o["teacher_logits"], hidden=[*[last.new_full((), torch.nan)] * 2, last])
    values = objective(student, teacher, {"attention_mask": o["attention_mask"], "labels": o["mlm_labels"]})
    for term, value in values.items():
        agree(value / hyper[f"alpha_{term}"], o[f"loss_{term}"], tolerance)
    assert set(values) == {term for term in ("ce", "mlm", "cos", "mse") if hyper[f"alpha_{term}"]}
    loss = sum(values.values())
    agree(loss, o["loss"], tolerance)
    gradients = torch.autograd.grad(loss, (logits, hidden), allow_unused=True)
    for gradient, of in zip(gradients, ("grad_student_logits", "grad_student_last_hidden"), strict=True):
        if gradient is None:
            assert not o[of].any()
        else:
            agree(gradient, o[of], tolerance)


# ---- Hinton, and TextBrewer without T² ----
@PRECISIONS
@pytest.mark.parametrize(("temperature", "alpha"), [(3.0, 0.5), (4.0, 0.9), (1.0, 0.3)])
def test_vanilla(temperature: float, alpha: float, dtype: torch.dtype, tolerance: float) -> None:
    o, _ = oracle("extra_vanilla_kd", dtype)
    case, inputs = f".T{temperature}.a{alpha}", {"labels": o["labels"], "teacher_logits": o["teacher_logits"]}
    logits = o["student_logits"].requires_grad_()

    def logits_term(divergence: str, **more: Any) -> Logits:
        return Logits(divergence, temperature=temperature, t_squared=False, **more)

    objectives = {
        "hinton_total": Terms(kl=Logits(temperature=temperature, weight=alpha), ce=Labels(weight=1 - alpha)),
        "seed_total": Terms(kl=logits_term("kl_div", weight=alpha), ce=Labels(weight=1 - alpha)),
        "tb_kd_ce": Terms(kd=logits_term("soft_cross_entropy")),
        "tb_kd_mse": Terms(kd=logits_term("logit_mse")),
    }
    for name, objective in objectives.items():
        loss = sum(objective(SimpleNamespace(logits=logits), None, inputs).values())
        agree(loss, o[name + case], tolerance)
        agree(torch.autograd.grad(loss, logits)[0], o[f"grad_{name}{case}"], tolerance)


# ---- TextBrewer's masked losses ----
@PRECISIONS
@pytest.mark.parametrize(
    ("name", "masked"),  # not its attention without a mask, which zeroes negative scores
    [("att_mse", "masked"), *((name, masked) for name in ("hid_mse", "cos", "pkd") for masked in ("masked", "nomask"))],
)
def test_textbrewer(name: str, masked: str, dtype: torch.dtype, tolerance: float) -> None:
    o, _ = oracle("extra_textbrewer_masked_losses", dtype)
    mask = o["mask"] if masked == "masked" else torch.ones_like(o["mask"])
    if name == "att_mse":
        trained = o["att_S"].requires_grad_()
        keys = torch.eye(5, dtype=dtype).expand(2, 2, 5, 5)  # so that queries are scores
        student, teacher = (
            SimpleNamespace(q=[x], k=[keys], scale=1.0, causal=False, hidden=[x, x]) for x in (trained, o["att_T"])
        )
        term: Any = Attention()
    else:
        trained = o["hid_S"].requires_grad_()
        student, teacher = (SimpleNamespace(hidden=[x, x], cls_index=0) for x in (trained, o["hid_T"]))
        terms = {"hid_mse": Hidden(), "cos": Cosine(), "pkd": CLS({1: 1}, weight=trained.shape[-1])}
        term = terms[name]
    loss = sum(Terms(it=term)(student, teacher, {"attention_mask": mask}).values())
    agree(loss, o[f"{name}_{masked}.loss"], tolerance)
    agree(torch.autograd.grad(loss, trained)[0], o[f"{name}_{masked}.grad.0"], tolerance)
