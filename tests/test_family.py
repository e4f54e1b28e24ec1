"""What is particular to single members of the divergence family, and to `kd_loss`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import value_and_gradient
from torch import Tensor

import kdfast
from kdfast.ops import reference
from kdfast.ops._call import Call, Numbers, RowValues
from kdfast.ops._divergence import KINDS

INF = float("inf")
WIDTHS = pytest.mark.parametrize("width", [5, 40, 40000], ids=["lanes", "vectors", "shared_among_threads"])
EVERY = pytest.mark.parametrize("kind", KINDS)
# A softmax on both sides; logit_mse has none.
OF_DISTRIBUTIONS = [kind for kind in KINDS if kind != "logit_mse"]
INFINITE_AT_TEACHER_ZEROS = ("reverse_kl_div", "symmetric_kl_div")
INFINITE_AT_STUDENT_ZEROS = ("kl_div", "soft_cross_entropy", "symmetric_kl_div")


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return (teacher + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype), teacher.to(dtype)


def labels_for(student: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(student.shape[-1], student.shape[:-1], generator=generator)


# ---- edge values of every divergence ----
@WIDTHS
@pytest.mark.parametrize("kind", OF_DISTRIBUTIONS)
@pytest.mark.usefixtures("cpu_variant")
def test_no_distribution_gives_nan_in_its_row_only(kind: str, width: int) -> None:
    function = getattr(kdfast, kind)
    student, teacher = logits(8, width, dtype=torch.float32)
    clean = function(student, teacher, reduction="none")
    student[0] = -INF
    teacher[1] = -INF
    student[2, 3] = INF
    teacher[3, 1] = INF
    student[4, 2] = math.nan
    teacher[5, 4] = math.nan
    value, gradient = value_and_gradient(function, student, teacher, {"reduction": "none"})
    assert value[:6].isnan().all()
    assert torch.equal(value[6:], clean[6:])
    assert gradient[:6].isnan().any(-1).all()
    assert gradient[6:].isfinite().all()


@WIDTHS
@pytest.mark.parametrize("kind", OF_DISTRIBUTIONS)
@pytest.mark.usefixtures("cpu_variant")
def test_zero_probabilities(kind: str, width: int) -> None:
    """Both 0: counts nothing. One 0: infinite only where the definition is."""
    function = getattr(kdfast, kind)
    student, teacher = logits(3, width, dtype=torch.float32)
    without = function(student[:, 1:], teacher[:, 1:], reduction="none")
    student[0, 0] = teacher[0, 0] = -INF
    student[1, 0] = -INF
    teacher[2, 0] = -INF
    value, gradient = value_and_gradient(function, student, teacher, {"reduction": "none"})
    torch.testing.assert_close(value[0], without[0])
    assert gradient[0].isfinite().all()
    assert (value[1] == INF) == (kind in INFINITE_AT_STUDENT_ZEROS)
    assert (value[2] == INF) == (kind in INFINITE_AT_TEACHER_ZEROS)
    exact = reference.divergence(kind, student.double(), teacher.double(), reduction="none")
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    finite = value.isfinite()
    assert gradient[finite].isfinite().all()
    assert gradient[finite].any(-1).all()


def test_logit_mse_with_infinities() -> None:
    student, teacher = logits(3, 40, dtype=torch.float32)
    student[0, 3] = teacher[0, 3] = -INF
    student[1, 3] = -INF
    student[2, 3] = math.nan
    value, gradient = value_and_gradient(kdfast.logit_mse, student, teacher, {"reduction": "none"})
    rest = (student[0] - teacher[0])[torch.arange(40) != 3]
    torch.testing.assert_close(value[0], rest.square().sum() / 40)
    assert gradient[0].isfinite().all()
    assert value[1] == INF
    assert value[2].isnan()


@EVERY
def test_extreme_logits_stay_finite(kind: str) -> None:
    """Probabilities that float32 cannot hold, on either side, and finite masks."""
    student, teacher = logits(4, 300, dtype=torch.float32)
    student[0] *= 40
    teacher[1] *= 40
    student[2, ::3] = teacher[2, ::3] = -1e30 if kind != "logit_mse" else -100
    value, gradient = value_and_gradient(getattr(kdfast, kind), student, teacher, {"reduction": "none"})
    exact = value_and_gradient(reference.of(kind), student.double(), teacher.double(), {"reduction": "none"})
    torch.testing.assert_close(value.double(), exact[0], rtol=1e-5, atol=1e-5)
    assert (gradient.double() - exact[1]).norm() <= 1e-5 * exact[1].norm()
    assert gradient.any(-1).all()


@EVERY
def test_errors_name_the_operator(kind: str) -> None:
    function = getattr(kdfast, kind)
    with pytest.raises(ValueError, match=f"^{kind}: teacher_logits: expected the student's width 7"):
        function(torch.zeros(3, 7), torch.zeros(3, 8))
    with pytest.raises(TypeError, match=f"^{kind}: student_logits: expected float32"):
        function(torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7))
    with pytest.raises(ValueError, match=f"^{kind}: reduction: expected 'none'"):
        function(torch.zeros(3, 7), torch.zeros(3, 7), reduction="average")


# ---- definitions ----
def test_js_div_is_what_gkd_publishes() -> None:
    """At 0 and 1 the two KLs by definition; between, beta·KL(t ‖ m) + (1 − beta)·KL(s ‖ m) with m = beta·t + (1 − beta)·s."""
    student, teacher = logits(6, 50)
    for beta, function in ((0, kdfast.kl_div), (1, kdfast.reverse_kl_div)):
        for got, expected in zip(
            value_and_gradient(kdfast.js_div, student, teacher, {"beta": beta}),
            value_and_gradient(function, student, teacher, {}),
            strict=True,
        ):
            assert expected.any()
            assert torch.equal(got, expected)
    p_s, p_t = student.softmax(-1), teacher.softmax(-1)
    for beta in (0.01, 0.3, 0.5, 0.99):
        m = beta * p_t + (1 - beta) * p_s
        published = beta * (p_t * (p_t / m).log()).sum(-1) + (1 - beta) * (p_s * (p_s / m).log()).sum(-1)
        torch.testing.assert_close(kdfast.js_div(student, teacher, beta=beta, reduction="none"), published)


def test_relations_between_members() -> None:
    student, teacher = logits(6, 50)
    forward, reverse = kdfast.kl_div(student, teacher), kdfast.reverse_kl_div(student, teacher)
    torch.testing.assert_close(kdfast.kl_div(teacher, student), reverse)
    torch.testing.assert_close(kdfast.symmetric_kl_div(student, teacher), (forward + reverse) / 2)
    log_t = teacher.log_softmax(-1)
    entropy = -(log_t.exp() * log_t).sum(-1).mean()
    torch.testing.assert_close(kdfast.soft_cross_entropy(student, teacher), forward + entropy)
    torch.testing.assert_close(kdfast.skew_kl_div(student, teacher, skew=0), forward)
    torch.testing.assert_close(kdfast.skew_reverse_kl_div(student, teacher, skew=0), reverse)
    torch.testing.assert_close(kdfast.skew_kl_div(teacher, student), kdfast.skew_reverse_kl_div(student, teacher))
    assert 0 < kdfast.total_variation(student, teacher) < 1
    torch.testing.assert_close(kdfast.logit_mse(student, teacher), F.mse_loss(student, teacher))
    assert kdfast.skew_kl_div(student, teacher, skew=0.2) < -math.log(0.2)


@EVERY
def test_equal_logits_have_no_loss_and_no_gradient(kind: str) -> None:
    _, teacher = logits(5, 64, dtype=torch.float32)
    value, gradient = value_and_gradient(getattr(kdfast, kind), teacher, teacher, {"reduction": "none"})
    if kind != "soft_cross_entropy":
        assert value.abs().max() < 2e-6
    assert gradient.abs().max() < 1e-6


# ---- kd_loss ----
def in_eager(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float) -> Tensor:
    soft = F.kl_div((student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean")
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("width", [3, 700])
@pytest.mark.usefixtures("cpu_variant")
def test_kd_loss_is_hinton(width: int, temperature: float) -> None:
    student, teacher = logits(9, width)
    labels = labels_for(student)
    kwargs: dict[str, Any] = {"labels": labels, "alpha": 0.3, "temperature": temperature}
    value, gradient = value_and_gradient(kdfast.kd_loss, student, teacher, kwargs)
    exact = value_and_gradient(in_eager, student, teacher, kwargs)
    assert exact[1].any()
    torch.testing.assert_close(value, exact[0])
    torch.testing.assert_close(gradient, exact[1])


def test_each_term_has_its_own_denominator() -> None:
    student, teacher = logits(4, 3, 50)
    labels = labels_for(student)
    labels[0, :2] = -100
    mask = torch.tensor([[True, True, False]] * 4)
    loss, divergence, cross_entropy = kdfast.kd_loss(
        student, teacher, labels, alpha=0.25, temperature=3.0, mask=mask, return_components=True
    )
    kept = labels[mask]
    expected_ce = F.cross_entropy(student[mask], kept)  # over 6 labels
    expected_kl = 9 * kdfast.kl_div(student[mask], teacher[mask], temperature=3.0)  # over 8 rows
    torch.testing.assert_close(divergence, expected_kl)
    torch.testing.assert_close(cross_entropy, expected_ce)
    torch.testing.assert_close(loss, 0.25 * expected_kl + 0.75 * expected_ce)
    loss, divergence, cross_entropy = kdfast.kd_loss(
        student, teacher, labels, alpha=0.25, temperature=3.0, mask=mask, num_items=5, return_components=True
    )
    torch.testing.assert_close(divergence, expected_kl * 8 / 5)
    torch.testing.assert_close(cross_entropy, expected_ce * 6 / 5)


def test_components_carry_no_gradient_and_add_up_per_row() -> None:
    student, teacher = logits(7, 50)
    student.requires_grad_()
    labels = labels_for(student)
    labels[2] = -100
    loss, divergence, cross_entropy = kdfast.kd_loss(
        student, teacher, labels, alpha=0.4, reduction="none", return_components=True
    )
    assert loss.requires_grad
    assert not divergence.requires_grad
    assert not cross_entropy.requires_grad
    assert loss[2] == divergence[2] == cross_entropy[2] == 0
    kept = torch.arange(7) != 2
    assert (divergence[kept] > 0).all()
    assert (cross_entropy[kept] > 0).all()
    torch.testing.assert_close(loss.detach(), 0.4 * divergence + 0.6 * cross_entropy)


def test_all_labels_ignored_under_a_mask() -> None:
    student, teacher = logits(5, 50)
    kwargs = {"labels": torch.full((5,), -100), "alpha": 0.5, "mask": torch.ones(5, dtype=torch.bool)}
    value, gradient = value_and_gradient(kdfast.kd_loss, student, teacher, kwargs)
    expected = value_and_gradient(kdfast.kl_div, student, teacher, {"temperature": 2.0})
    torch.testing.assert_close(value, 2 * expected[0])
    torch.testing.assert_close(gradient, 2 * expected[1])


def test_label_of_a_masked_row_is_not_read() -> None:
    student, teacher = logits(3, 50)
    labels = torch.tensor([1, 999, 2])
    mask = torch.tensor([True, False, True])
    value = kdfast.kd_loss(student, teacher, labels, mask=mask)
    torch.testing.assert_close(value, kdfast.kd_loss(student[mask], teacher[mask], labels[mask]))


def test_padding_has_no_share_in_smoothing() -> None:
    student, teacher = logits(4, 60)
    labels = labels_for(student[:, :50])
    student[:, 50:] = math.nan
    value = kdfast.kd_loss(student, teacher, labels, alpha=0.0, label_smoothing=0.2, vocab_size=50)
    torch.testing.assert_close(value, F.cross_entropy(student[:, :50], labels, label_smoothing=0.2))


def test_alpha_one_needs_no_labels() -> None:
    student, teacher = logits(4, 60)
    value = kdfast.kd_loss(student, teacher, alpha=1.0, temperature=4.0, divergence="js_div", beta=0.2)
    torch.testing.assert_close(value, 16 * kdfast.js_div(student, teacher, temperature=4.0, beta=0.2))


S, T, L = torch.zeros(3, 7), torch.zeros(3, 7), torch.zeros(3, dtype=torch.long)
BAD = [
    (ValueError, "kd_loss: labels: expected labels where alpha is not 1, got None with alpha=0.5", (S, T), {}),
    (ValueError, "kd_loss: alpha: expected a number from 0 to 1, got 1.5", (S, T, L), {"alpha": 1.5}),
    (TypeError, "kd_loss: alpha: expected a number, got str", (S, T, L), {"alpha": "0.5"}),
    (TypeError, "kd_loss: return_components: expected True or False, got int", (S, T, L), {"return_components": 1}),
    (ValueError, "kd_loss: divergence: expected one of kl_div, .*got 'kl'", (S, T, L), {"divergence": "kl"}),
    (ValueError, "kd_loss: label_smoothing: expected a number from 0 to 1", (S, T, L), {"label_smoothing": -0.1}),
    (TypeError, "kd_loss: labels: expected an int64 tensor of class indices, got torch.float32", (S, T, L.float()), {}),
    (TypeError, "kd_loss: labels: expected a tensor, got list", (S, T, [1, 2, 3]), {}),
    (ValueError, r"kd_loss: labels: expected the logits' leading dimensions \[3\], got \[2\]", (S, T, L[:2]), {}),
    (ValueError, "kd_loss: labels: expected 0 to 6, or ignore_index -100, got 7", (S, T, L + 7), {}),
    (ValueError, "kd_loss: labels: expected 0 to 4, .*got 5", (S, T, L + 5), {"vocab_size": 5}),
    (ValueError, "kd_loss: labels: expected 0 to 6, or ignore_index 9, got -100", (S, T, L - 100), {"ignore_index": 9}),
    (ValueError, "kd_loss: skew: expected a number from 0 to 1, 1 excluded, got 1", (S, T, L), {"skew": 1}),
    (ValueError, "kd_loss: temperature: expected a finite number > 0", (S, T, L), {"temperature": 0.0}),
]


@pytest.mark.parametrize(("error", "match", "args", "kwargs"), BAD, ids=[b[1][:60] for b in BAD])
def test_kd_loss_refuses(error: type[Exception], match: str, args: Any, kwargs: Any) -> None:
    with pytest.raises(error, match=match):
        kdfast.kd_loss(*args, **kwargs)


def test_mixtures_refuse() -> None:
    with pytest.raises(ValueError, match=r"js_div: beta: expected a number from 0 to 1, got 1\.1"):
        kdfast.js_div(S, T, beta=1.1)
    with pytest.raises(ValueError, match="skew_kl_div: skew: expected a number from 0 to 1, 1 excluded, got 1"):
        kdfast.skew_kl_div(S, T, skew=1)


def test_raw_operator_guards_its_memory() -> None:
    """What Python has refused already must not reach memory by a direct call either."""
    rows = RowValues(None, None, None, None, None)
    numbers = Numbers(0, 0.5, 1.0, 7, 7, 0, 1.0, False, True, 0.5, 0.0, -100)

    def native(divisor: Tensor | None = None, labels: Tensor | None = None, **changed: Any) -> None:
        call = Call(rows._replace(labels=labels), divisor, numbers._replace(**changed))
        torch.ops.kdfast.divergence(S, T, *call.flat(), None, 0, 0)

    with pytest.raises(RuntimeError, match="kd_loss: labels: expected 0 to 6, or ignore_index -100, got 7 in row 0"):
        native(labels=L + 7)
    with pytest.raises(RuntimeError, match="kind: expected 0 to"):
        native(kind=99)
    with pytest.raises(RuntimeError, match="vocab_size: expected at least 8 for columns up to there, got 7"):
        native(vocab_start=1)
    with pytest.raises(RuntimeError, match=r"kd_loss: divisor: expected one number or two, got \[3\]"):
        native(torch.ones(3))
    with pytest.raises(RuntimeError, match="kd_loss: divisor: expected dtype Float, got Double"):
        native(torch.ones(2).double())
