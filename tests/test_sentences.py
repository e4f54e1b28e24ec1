"""Terms of sentences' embeddings against plain torch, and against sentence-transformers' losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objective_outputs import MASK, PRECISIONS, WEIGHTED, batch, check, rows_of, side
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import kdfast
from kdfast.objective import MarginMSE, Missing, SentenceMSE, Terms

POOLINGS = pytest.mark.parametrize("pooling", ["mean", "cls"])


def pooled(side: Any, pooling: str, mask: Tensor = MASK) -> Tensor:
    hidden: Tensor = side.hidden[-1]
    if pooling == "cls":
        return hidden[:, side.cls_index]
    return torch.stack([row[on].mean(0) for row, on in zip(hidden, mask, strict=True)])


@PRECISIONS
@WEIGHTED
@POOLINGS
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_sentence_mse(
    projected: bool, normalize: bool, pooling: str, weighted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(12, 20, dtype=dtype)
    term = SentenceMSE(pooling=pooling, normalize=normalize, projection=linear if projected else None)

    def by_hand(student: Any, teacher: Any, inputs: Any) -> Tensor:
        s, t = pooled(student, pooling), pooled(teacher, pooling)
        s, t = (F.normalize(x, dim=-1) for x in (s, t)) if normalize else (s, t)
        losses = ((linear(s) if projected else s) - t).square().mean(-1)
        return (losses * inputs.get("sample_weight", torch.ones(4)).to(dtype)).mean()

    teacher = side(1, dtype, layers=4, width=20 if projected else 12, cls_index=-1)
    check(term, by_hand, side(0, dtype), teacher, batch(weighted), tolerance)


def test_stored_embeddings() -> None:
    stored = torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    term, inputs = SentenceMSE(), batch(teacher_embedding=stored)
    check(term, lambda s, t, i: F.mse_loss(pooled(s, "mean"), stored), side(0), None, inputs, 1e-10)
    terms = Terms(mse=term)
    assert terms(side(0), None, inputs)["mse"] == term(side(0), None, inputs)
    with pytest.raises(Missing, match="SentenceMSE: teacher: expected one, or rows with a teacher_embedding column"):
        terms(side(0), None, batch())


def test_a_teacher_with_its_own_tokens() -> None:
    """Its mask says what its tokens are, and not the batch's."""
    teacher = side(1)
    own = dataclasses.replace(teacher, mask=MASK.flip(0))
    expected = F.mse_loss(pooled(side(0), "mean"), pooled(teacher, "mean", MASK.flip(0)))
    torch.testing.assert_close(SentenceMSE()(side(0), own, batch()), expected, rtol=1e-10, atol=0)


# ---- margins ----
def groups(of: Any, count: int) -> Any:
    """Sequences of the outputs again, as many as make whole groups."""
    return rows_of(of, torch.arange(count) % 4)


def margins(embeddings: Tensor, group: int, similarity: str) -> Tensor:
    found = []
    for query, positive, *negatives in embeddings.split(group):
        score = (lambda a, b: F.cosine_similarity(a, b, dim=0)) if similarity == "cosine" else torch.dot
        found.append(torch.stack([score(query, positive) - score(query, x) for x in negatives]))
    return torch.stack(found)


@POOLINGS
@WEIGHTED
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("stored", [False, True], ids=["teacher", "scores"])
@pytest.mark.parametrize("group", [3, 4])
def test_margin_mse(group: int, stored: bool, similarity: str, weighted: bool, pooling: str) -> None:
    student, teacher = groups(side(0), 12), groups(side(1), 12)
    inputs: dict[str, Any] = {name: x[torch.arange(12) % 4] for name, x in batch(weighted).items()}
    mask, score = MASK[torch.arange(12) % 4], torch.randn(12, dtype=torch.float64)
    if stored:
        inputs["teacher_score"] = score

    def by_hand(student: Any, teacher: Any, inputs: Any) -> Tensor:
        def of(side: Any) -> Tensor:
            return margins(pooled(side, pooling, mask), group, similarity)

        of_groups = score.view(-1, group)
        s, t = of(student), of_groups[:, 1:2] - of_groups[:, 2:] if stored else of(teacher)
        weight = inputs.get("sample_weight", torch.ones(12)).double()[::group, None]
        return (weight * (s - t).square()).mean()

    term = MarginMSE(group, similarity=similarity, pooling=pooling)
    assert term.count(inputs) == 12 // group * (group - 2)
    check(term, by_hand, student, None if stored else teacher, inputs, 1e-10)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SentenceMSE(pooling="max"), ValueError, "SentenceMSE: pooling: expected 'mean' or 'cls', got 'max'"),
        (lambda: MarginMSE(2), ValueError, "MarginMSE: group: expected 3 or more rows, .*, got 2"),
        (lambda: MarginMSE(3.0), TypeError, "MarginMSE: group: expected an int, got 3.0"),  # type: ignore[arg-type]
        (lambda: MarginMSE(similarity="l2"), ValueError, "MarginMSE: similarity: expected 'dot' or 'cosine', got 'l2'"),
        (
            lambda: MarginMSE()(side(0), side(1), batch()),
            ValueError,
            "inputs: expected groups of 3 rows, .*got '4 rows'",
        ),
        (lambda: MarginMSE(4)(side(0), None, batch()), Missing, "MarginMSE: teacher: expected one, or .*teacher_score"),
        (lambda: SentenceMSE()(side(0), side(1, width=20), batch()), ValueError, "projection: expected one"),
    ],
)
def test_errors(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- sentence-transformers ----
def bert(seed: int, layers: int) -> BertModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(num_hidden_layers=layers, initializer_range=0.3, **sizes)).eval()


@pytest.mark.parametrize("of_scores", [False, True], ids=["MSELoss", "MarginMSELoss"])
def test_as_sentence_transformers(of_scores: bool) -> None:
    """Its pooling and its losses, of models that are run."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses, modules

    student, teacher = bert(0, 1), bert(1, 2)
    inputs = {"input_ids": torch.randint(0, 50, (12, 6)), "attention_mask": MASK[torch.arange(12) % 4].long()}
    pooling = modules.Pooling(24, "mean")

    def embeddings(model: BertModel) -> Tensor:
        tokens = {"token_embeddings": model(**inputs).last_hidden_state, "attention_mask": inputs["attention_mask"]}
        found: Tensor = pooling(tokens)["sentence_embedding"]
        return found

    s, t = embeddings(student), embeddings(teacher).detach()
    if of_scores:
        of_teacher = torch.stack([t[::4] * t[i::4] for i in range(1, 4)], 1).sum(-1)
        theirs = losses.MarginMSELoss(None).compute_loss_from_embeddings([s[i::4] for i in range(4)], of_teacher)
    else:
        theirs = losses.MSELoss(None).compute_loss_from_embeddings([s], [t])
    terms = Terms(of=MarginMSE(4) if of_scores else SentenceMSE())
    with torch.no_grad():
        of_teacher = terms.run(teacher, inputs)
    ours = terms(terms.run(student, inputs), of_teacher, inputs)["of"]
    assert float(theirs.detach()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    weights = [student.encoder.layer[0].attention.self.query.weight, student.embeddings.word_embeddings.weight]
    for mine, its in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        assert float(its.norm()) > 1e-3
        assert float((mine - its).norm()) < 1e-4 * float(its.norm())


def test_kl_of_scores_as_sentence_transformers() -> None:
    """Its `DistillKLDivLoss` of a query's scores is `kdfast.kl_div` times T²."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses

    torch.manual_seed(0)
    query, *others = torch.randn(4, 5, 8).requires_grad_().unbind()
    scores = torch.randn(5, 3)
    theirs = losses.DistillKLDivLoss(None, temperature=2.0).compute_loss_from_embeddings([query, *others], scores)
    ours = kdfast.kl_div(torch.stack([(query * x).sum(-1) for x in others], 1), scores, temperature=2.0) * 4
    assert float(theirs.detach()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
