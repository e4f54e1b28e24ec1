"""What is particular to the distances between layers: the originals' numbers, closeness, edge values, errors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdfast

ORACLES = Path(__file__).parent / "oracles"
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])


def oracle(name: str) -> dict[str, Tensor]:
    with np.load(ORACLES / f"{name}.npz") as data:
        return {key: torch.from_numpy(np.atleast_1d(data[key])).reshape(data[key].shape) for key in data.files}


def several(o: dict[str, Tensor], name: str, dtype: torch.dtype) -> list[Tensor]:
    return [o[f"{name}.{i}"].to(dtype) for i in range(sum(key.startswith(f"{name}.") for key in o))]


def agree(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.any(), "zeros would pass"
    assert float((got.detach().double() - expected).norm()) <= tolerance * float(expected.norm())


def with_gradient(layers: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in layers]


# ---- the originals' numbers ----
@PRECISIONS
def test_tinybert_attention(dtype: torch.dtype, tolerance: float) -> None:
    o = oracle("tinybert_attention")
    student = with_gradient(several(o, "student_scores", dtype))
    teachers = several(o, "teacher_scores", dtype)
    teacher = [teachers[i] for i in o["teacher_att_index"]]
    loss = kdfast.attention_mse(student, teacher, floor=-100)
    agree(loss, o["loss"], tolerance)
    for i, gradient in enumerate(torch.autograd.grad(loss, student)):
        agree(gradient, o[f"grad_student_scores.{i}"], tolerance)
    each = [kdfast.attention_mse(s, t, floor=-100) for s, t in zip(student, teacher, strict=True)]
    agree(torch.stack(each), o["per_layer_loss"], tolerance)


@PRECISIONS
def test_tinybert_hidden(dtype: torch.dtype, tolerance: float) -> None:
    o = oracle("tinybert_hidden")
    student = with_gradient(several(o, "student_hidden", dtype))
    teachers = several(o, "teacher_hidden", dtype)
    weight, bias = with_gradient([o["W"].to(dtype), o["b"].to(dtype)])
    loss = kdfast.hidden_mse(student, [teachers[i] for i in o["teacher_state_index"]], projection=weight, bias=bias)
    agree(loss, o["loss"], tolerance)
    *of_student, of_weight, of_bias = torch.autograd.grad(loss, [*student, weight, bias])
    for i, gradient in enumerate(of_student):
        agree(gradient, o[f"grad_student_hidden.{i}"], tolerance)
    agree(of_weight, o["grad_W"], tolerance)
    agree(of_bias, o["grad_b"], tolerance)


@PRECISIONS
def test_tinybert_embedding(dtype: torch.dtype, tolerance: float) -> None:
    o = oracle("tinybert_embedding")
    trained = with_gradient([o[name].to(dtype) for name in ("student_emb", "W", "b")])
    loss = kdfast.hidden_mse(trained[0], o["teacher_emb"].to(dtype), projection=trained[1], bias=trained[2])
    agree(loss, o["loss"], tolerance)
    for gradient, name in zip(torch.autograd.grad(loss, trained), ("student_emb", "W", "b"), strict=True):
        agree(gradient, o[f"grad_{name}"], tolerance)


@PRECISIONS
def test_tinybert_prediction(dtype: torch.dtype, tolerance: float) -> None:
    o = oracle("tinybert_prediction")
    for temperature, name in ((1.0, "T1.0"), (2.5, "T2.5")):
        (student,) = with_gradient([o["student_logits"].to(dtype)])
        loss = kdfast.soft_cross_entropy(student, o["teacher_logits"].to(dtype), temperature=temperature) / 3
        agree(loss, o[f"loss.{name}"], tolerance)
        agree(torch.autograd.grad(loss, student)[0], o[f"grad_student_logits.{name}"], tolerance)


@PRECISIONS
@pytest.mark.parametrize("name", ["skip_norm", "skip_raw", "last_norm", "last_raw"])
def test_patient_kd(name: str, dtype: torch.dtype, tolerance: float) -> None:
    o = oracle(f"pkd_pt_{name}")
    (student,) = with_gradient([o["student_cls"].to(dtype)])
    layers = [student[i] for i in o["student_layer_index"]]
    teacher = [o["teacher_cls"][i].to(dtype) for i in o["teacher_layer_index"]]
    weight = [1 / len(layers)] * len(layers)
    loss = kdfast.cls_distance(layers, teacher, normalize=name.endswith("norm"), layer_weight=weight)
    agree(loss, o["loss_fp64"], tolerance)
    agree(torch.autograd.grad(loss, student)[0], o["grad_student_cls"], tolerance)
    paper = kdfast.cls_distance(layers, teacher, normalize=name.endswith("norm"), reduction="sum")
    agree(paper, o["paper_sum_over_NMd"], tolerance)


@PRECISIONS
def test_distilbert_cosine(dtype: torch.dtype, tolerance: float) -> None:
    o = oracle("distilbert_cos")
    (student,) = with_gradient([o["student_last_hidden"].to(dtype)])
    loss = kdfast.cosine_distance(student, o["teacher_last_hidden"].to(dtype), mask=o["attention_mask"].bool())
    agree(loss, o["loss_cos"], tolerance)
    agree(torch.autograd.grad(loss, student)[0], o["grad_student_last_hidden"], tolerance)


@PRECISIONS
@pytest.mark.parametrize("name", ["att_mse", "hid_mse", "cos", "pkd"])
def test_textbrewer_masked_reductions(name: str, dtype: torch.dtype, tolerance: float) -> None:
    o = oracle("extra_textbrewer_masked_losses")
    mask = o["mask"].bool()
    side = "att" if name.startswith("att") else "hid"
    (student,), teacher = with_gradient([o[f"{side}_S"].to(dtype)]), o[f"{side}_T"].to(dtype)
    if name == "att_mse":
        loss = kdfast.attention_mse(student, teacher, key_mask=mask, query_mask=mask)
    elif name == "hid_mse":
        loss = kdfast.hidden_mse(student, teacher, mask=mask)
    elif name == "cos":
        loss = kdfast.cosine_distance(student, teacher, mask=mask)
    else:
        loss = kdfast.cls_distance(student, teacher, reduction="batchmean")
    agree(loss, o[f"{name}_masked.loss"], tolerance)
    agree(torch.autograd.grad(loss, student)[0], o[f"{name}_masked.grad.0"], tolerance)


def test_projection_of_bfloat16_with_nan_between_rows() -> None:
    x, weight = torch.randn(3, 7, 70).bfloat16(), torch.randn(70, 70).bfloat16()
    apart = torch.full((3, 7, 75), torch.nan, dtype=x.dtype)[..., :70].copy_(x)
    losses = [kdfast.hidden_mse(given, torch.zeros(3, 7, 70), projection=weight) for given in (x, apart)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


# ---- closeness: a student that is nearly its teacher ----
def direct(qs: Tensor, ks: Tensor, qt: Tensor, kt: Tensor) -> Tensor:
    scale = qs.shape[-1] ** -0.5
    return ((qs @ ks.mT * scale - qt @ kt.mT * scale) ** 2).mean()


def measured(function: Any, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    student = with_gradient(tensors[:2])
    loss = function(*student, *tensors[2:])
    return loss.detach().double(), torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, student)])


@pytest.mark.parametrize("gap", [1, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("length", [60, 700], ids=["scores", "grams"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("cpu_variant")
def test_qk_attention_mse_at_every_distance(dtype: torch.dtype, length: int, gap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.randn(1, 2, length, 64, generator=generator, dtype=torch.float64) for _ in range(2)]
    student = [t + gap * torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in teacher]
    tensors = [x.to(dtype) for x in student + teacher]
    exact, exact_gradient = measured(direct, [x.double() for x in tensors])
    eager, eager_gradient = measured(direct, [x.float() for x in tensors])
    got, gradient = measured(kdfast.qk_attention_mse, tensors)
    assert abs(got - exact) <= max(2 * abs(eager - exact), 2**-21 * exact)
    rounding = 2**-8 if dtype == torch.bfloat16 else 0.0
    allowed = 2 * (eager_gradient - exact_gradient).norm() + rounding * exact_gradient.norm()
    assert (gradient - exact_gradient).norm() <= allowed < 0.1 * exact_gradient.norm()


@pytest.mark.parametrize("function", [kdfast.cosine_distance, kdfast.cls_distance])
@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_angles_keep_their_digits(function: Any, gap: float) -> None:
    """1 - cos of float32 vectors is noise below 1e-7, where the loss still has seven digits."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 1, 300, generator=generator)
    student = teacher + gap * torch.randn(4, 1, 300, generator=generator)
    exact = [x.double().requires_grad_(i == 0) for i, x in enumerate((student, teacher))]
    expected = function(*exact)
    (near,) = with_gradient([student])
    loss = function(near, teacher)
    assert 0 < expected < gap
    agree(loss, expected.detach(), 1e-6)
    agree(torch.autograd.grad(loss, near)[0], torch.autograd.grad(expected, exact[0])[0], 1e-6)


@pytest.mark.parametrize("function", [kdfast.cosine_distance, kdfast.cls_distance])
def test_vectors_far_apart(function: Any) -> None:
    """Lengths that differ by orders of magnitude, opposite directions."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 1, 300, generator=generator)
    student = torch.stack([1e4 * teacher[0], -teacher[1], 1e-4 * teacher[2].flip(-1), teacher[3].roll(1, -1)])
    exact = student.double().requires_grad_()
    expected = function(exact, teacher.double(), reduction="none").flatten()
    (got,) = with_gradient([student])
    values = function(got, teacher, reduction="none").flatten()
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-7)
    gradient, reference = torch.autograd.grad(values.sum(), got)[0], torch.autograd.grad(expected.sum(), exact)[0]
    for row in (2, 3):  # parallel vectors have none
        agree(gradient[row], reference[row], 1e-5)


# ---- edge values ----
def test_zero_vectors() -> None:
    teacher = torch.randn(2, 1, 8)
    (zero,) = with_gradient([torch.zeros(2, 1, 8)])
    for function in (kdfast.cls_distance, kdfast.cosine_distance):
        loss = function(zero, teacher, reduction="none")
        torch.testing.assert_close(loss.flatten(), torch.full((2,), 1 / 8 if function is kdfast.cls_distance else 1.0))
    assert not torch.autograd.grad(kdfast.cls_distance(zero, teacher), zero)[0].any()
    (student,) = with_gradient([torch.randn(2, 1, 8)])
    loss = kdfast.cls_distance(student, torch.zeros(2, 1, 8), reduction="sum")
    torch.testing.assert_close(loss, torch.tensor(2.0))
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-5  # its length does not change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("cpu_variant")
def test_rows_side_by_side_are_as_rows_apart(dtype: torch.dtype) -> None:
    """Rows without a gap are taken together where they count: runs of either kind, shorter and longer than 8 rows, of
    an odd width, over the end of a sequence."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, 3:25] = mask[0, 38:] = mask[1, :9] = mask[2, 5:6] = False
    student, teacher = (torch.randn(3, 40, 37, generator=generator).to(dtype) for _ in range(2))
    exact = student.double().requires_grad_()
    expected = (exact - teacher.double())[mask].square().mean()
    reference = torch.autograd.grad(expected, exact)[0]
    dead = student.masked_fill(~mask[..., None], torch.nan)
    apart = torch.nn.functional.pad(dead, (0, 1))[..., :-1]
    assert dead.is_contiguous()
    assert not apart.is_contiguous()
    for x in (dead, apart):
        (leaf,) = with_gradient([x])
        loss = kdfast.hidden_mse(leaf, teacher, mask=mask)
        agree(loss, expected.detach(), 1e-6)
        gradient = torch.autograd.grad(loss, leaf)[0]
        agree(gradient, reference, 2**-8 if dtype == torch.bfloat16 else 1e-6)
        assert not gradient[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("cpu_variant")
def test_long_rows_of_a_loss_alone(dtype: torch.dtype) -> None:
    """Read from two places at a time: every number counts once, also those that the halves leave."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 70, 97, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    expected = (student.double() - teacher.double()).square().sum()
    agree(kdfast.hidden_mse(student, teacher, reduction="sum"), expected, 1e-6)
    for place in (0, 3071, 3072, 6143, 6144, 70 * 97 - 1):
        one = torch.zeros_like(student)
        one.view(-1)[place] = 3
        agree(kdfast.hidden_mse(one, torch.zeros_like(one), reduction="sum"), torch.tensor(9.0), 1e-6)


def test_masked_numbers_are_not_read() -> None:
    mask = torch.tensor([[True, True, False, True, False]])
    scores = torch.randn(1, 2, 5, 5)
    clean = torch.where(mask[:, None, None] & mask[:, None, :, None], scores, 0.0)
    dirty = torch.where(mask[:, None, None] & mask[:, None, :, None], scores, torch.nan)
    teacher = torch.randn(1, 2, 5, 5)
    for function in (kdfast.attention_mse, kdfast.attention_kl):
        losses, gradients = [], []
        for x in (clean, dirty):
            (student,) = with_gradient([x])
            losses.append(function(student, teacher, key_mask=mask, query_mask=mask))
            gradients.append(torch.autograd.grad(losses[-1], student)[0])
        assert losses[0] == losses[1] > 0
        assert torch.equal(*gradients)
        assert gradients[0].any()
    tokens = torch.randn(1, 2, 5, 8)
    for loss in (kdfast.qk_attention_mse, kdfast.qk_relation_kl):
        values = []
        for filler in (0.0, torch.nan):
            q, k = with_gradient([torch.where(mask[:, None, :, None], tokens, filler)] * 2)
            value = loss(q, k, tokens + 1, tokens, key_mask=mask, query_mask=mask)
            values += [value.detach(), *torch.autograd.grad(value, (q, k))]
        for a, b in zip(values[:3], values[3:], strict=True):
            assert torch.equal(a, b)
            assert a.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_nothing_counts(reduction: str) -> None:
    none = torch.zeros(2, 4, dtype=torch.bool)
    scores, tokens = with_gradient([torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 8)])
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    for loss, student in (
        (kdfast.attention_mse(scores, scores.detach() + 1, key_mask=none, reduction=reduction), scores),
        (kdfast.attention_kl(scores, scores.detach() + 1, key_mask=none, reduction=reduction), scores),
        (kdfast.attention_mse(scores, scores.detach() + 1, head_map=[-1] * 3, reduction=reduction), scores),
        (kdfast.qk_attention_mse(tokens, tokens, tokens + 1, tokens, query_mask=none, reduction=reduction), tokens),
        (kdfast.qk_relation_kl(tokens, tokens, tokens + 1, tokens, key_mask=none, reduction=reduction), tokens),
        (kdfast.hidden_mse(hidden, hidden.detach() + 1, mask=none, reduction=reduction), hidden),
        (kdfast.cosine_distance(hidden, hidden.detach() + 1, mask=none, reduction=reduction), hidden),
    ):
        assert not loss.any()
        assert not torch.autograd.grad(loss.sum(), student)[0].any()


def test_empty_input() -> None:
    for shape in ((0, 2, 4, 4), (2, 2, 0, 0), (2, 0, 4, 4)):
        scores = torch.zeros(shape, requires_grad=True)
        for function in (kdfast.attention_mse, kdfast.attention_kl):
            loss = function(scores, torch.zeros(shape))
            assert loss == 0
            assert torch.autograd.grad(loss, scores)[0].shape == shape
    for shape in ((0, 2, 4, 8), (2, 2, 0, 8)):
        q = torch.zeros(shape, requires_grad=True)
        for function in (kdfast.qk_attention_mse, kdfast.qk_relation_kl):
            loss = function(q, q, torch.zeros(shape), torch.zeros(shape))
            assert loss == 0
            assert torch.autograd.grad(loss, q)[0].shape == shape
    hidden = torch.zeros(2, 0, 8, requires_grad=True)
    assert kdfast.hidden_mse(hidden, torch.zeros(2, 0, 8)) == 0


def test_backward_twice_and_scaled() -> None:
    """Gradients of the loss as part of a larger one, kept or not."""
    (student,), teacher = with_gradient([torch.randn(2, 3, 8)]), torch.randn(2, 3, 8)
    (expected,) = torch.autograd.grad(torch.nn.functional.mse_loss(student, teacher), student)
    loss = kdfast.hidden_mse(student, teacher)
    (first,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(first, 3 * expected)
    torch.testing.assert_close(second, expected)
    with pytest.raises(RuntimeError, match="hidden_mse: double backward is not available"):
        torch.autograd.grad(kdfast.hidden_mse(student, teacher), student, create_graph=True)


def test_relation_of_a_tensor_with_itself() -> None:
    values = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    teacher = torch.randn(2, 5, 9, 4, dtype=torch.float64)
    (student,) = with_gradient([values])
    loss = kdfast.qk_relation_kl(student, student, teacher, teacher, relation_heads=2)
    split = lambda x: x.transpose(1, 2).reshape(2, 9, 2, -1).transpose(1, 2)  # noqa: E731
    s, t = split(student), split(teacher)
    s, t = ((x @ x.mT / x.shape[-1] ** 0.5).log_softmax(-1) for x in (s, t))
    expected = torch.nn.functional.kl_div(s, t, log_target=True, reduction="sum") / (2 * 2 * 9)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0])


def test_qk_losses_keep_no_scores() -> None:
    """What a loss with gradients needs beside its inputs stays far below one matrix of scores."""
    from kdfast.bench.harness import peak_memory

    length, heads = 4096, 4
    q, k, tq, tk = (torch.randn(1, heads, length, 16).requires_grad_(i < 2) for i in range(4))
    for function in (kdfast.qk_attention_mse, kdfast.qk_relation_kl):
        call = functools.partial(lambda loss: torch.autograd.grad(loss(q, k, tq, tk), (q, k)), function)
        call()
        assert peak_memory(call, "cpu") < 0.1 * 4 * length**2 / 1e6


# ---- errors ----
H = torch.zeros(2, 5, 8)
S = torch.zeros(2, 3, 5, 5)
Q = torch.zeros(2, 4, 5, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kdfast.hidden_mse(H, torch.zeros(2, 5, 9)), ValueError, r"projection: expected one, \[9, 8\], as"),
        (lambda: kdfast.hidden_mse([H, H], [H]), ValueError, "teacher_hidden: expected as many layers as of the student"),
        (lambda: kdfast.hidden_mse(H.long(), H), TypeError, "student_hidden: expected float32"),
        (lambda: kdfast.hidden_mse([], []), ValueError, "student_hidden: expected a layer or more"),
        (lambda: kdfast.hidden_mse(H, H, bias=H[0, 0]), ValueError, "bias: expected a projection with it"),
        (lambda: kdfast.hidden_mse(H, H, projection=torch.zeros(8, 9)), ValueError, r"projection: expected \[8, 8\]"),
        (lambda: kdfast.hidden_mse(H, H, mask=torch.ones(2, 5)), TypeError, "mask: expected a bool tensor"),
        (lambda: kdfast.hidden_mse(H, H, reduction="average"), ValueError, "reduction: expected 'none'"),
        (lambda: kdfast.cosine_distance(H, torch.zeros(2, 5, 9)), ValueError, "teacher_hidden: expected the student's shape"),
        (lambda: kdfast.cosine_distance(H, H, layer_weight=[1, 2]), ValueError, "layer_weight: expected 1 numbers"),
        (lambda: kdfast.cls_distance(H, H, token_index=5), ValueError, "token_index: expected -5 to 4, got 5"),
        (lambda: kdfast.cls_distance(H, H, token_index=torch.tensor([0, 7])), ValueError, "token_index: expected -5 to 4, got 7"),
        (lambda: kdfast.cls_distance(H[0, 0], H), ValueError, r"student_hidden: expected \[B, L, D\] or \[B, D\]"),
        (lambda: kdfast.attention_mse(S, torch.zeros(2, 4, 5, 5)), ValueError, "head_map: expected one, as the student has 3"),
        (lambda: kdfast.attention_mse(S, S, head_map=[0, 1, 3]), ValueError, "head_map: expected heads of the teacher, 0 to 2"),
        (lambda: kdfast.attention_mse(S, S, head_map=[0, 1]), ValueError, "head_map: expected 3 numbers, got 2"),
        (lambda: kdfast.attention_mse(S, S, floor="low"), TypeError, "floor: expected a number, got str"),
        (lambda: kdfast.attention_mse(S, torch.zeros(2, 3, 5, 6)), ValueError, r"teacher_scores: expected \[2, heads, 5, 5\]"),
        (lambda: kdfast.attention_kl(S, S, key_mask=torch.ones(3, 5, dtype=torch.bool)), ValueError, r"key_mask: expected a shape that broadcasts to \[2, 5\]"),
        (lambda: kdfast.qk_attention_mse(Q, Q[:, :3], Q, Q), ValueError, "student_k: expected a number of heads that divides the 4"),
        (lambda: kdfast.qk_attention_mse(Q, Q, Q[:, :, :4], Q), ValueError, r"teacher_q: expected \[2, heads, 5, d\]"),
        (lambda: kdfast.qk_attention_mse(Q, Q[..., :7], Q, Q), ValueError, "student_k: expected the head size of student_q, 8"),
        (lambda: kdfast.qk_attention_mse(Q, Q, Q, Q, student_scale="1"), TypeError, "student_scale: expected a number"),
        (lambda: kdfast.qk_attention_mse(Q, Q, Q, Q, is_causal=Q), TypeError, "is_causal: expected True or False, got torch.float32"),
        (lambda: kdfast.cls_distance(H, H, normalize=None), TypeError, "normalize: expected True or False, got NoneType"),
        (lambda: kdfast.qk_relation_kl(Q, Q, Q[:, :2], Q[:, :2]), ValueError, "relation_heads: expected a number, as the student has 4"),
        (lambda: kdfast.qk_relation_kl(Q, Q, Q, Q, relation_heads=5), ValueError, "relation_heads: expected a divisor of the width 32"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^\w+: {message}"):
        call()
