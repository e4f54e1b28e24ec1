"""Terms of sentences' embeddings: sentence-transformers' `MSELoss` and `MarginMSELoss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast import hidden_mse
from kdfast.objective._protocol import Missing
from kdfast.objective.of_layers import Hidden, Projection
from kdfast.objective.schedules import Weight
from kdfast.objective.term import Inputs, Stored, Term, rows_of, token_mask

POOLINGS = ("mean", "cls")
SIMILARITIES = ("dot", "cosine")


class SentenceMSE(Hidden):
    """Mean over rows and width of (e_s Wᵀ + b − e_t)², e a sentence's embedding: sentence-transformers' `MSELoss`
    (Reimers and Gurevych, 2020, arXiv:2004.09813), by `kdfast.hidden_mse`.

    The student's embedding is pooled from its last hidden state. The teacher's is too, or is stored: a column
    `teacher_embedding` [B, D_t] of the batch, such as `SentenceTransformer.encode` makes.

    Args:
        pooling: "mean" over tokens that are no padding, or "cls", the token that stands for the sequence.
        normalize: to length 1, before the projection, of both sides but not of a stored teacher.
        projection, weight: as of `Hidden`.

    A column `sample_weight` [B] of the batch multiplies every row's loss; it stays out of the divisor.

    Raises:
        ValueError: a pooling that is not known; embeddings of two widths without a projection.
    """

    def __init__(
        self,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        projection: Projection = None,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__({-1: -1}, projection=projection, weight=weight)
        _check_pooling(self, pooling)
        self.pooling, self.normalize = pooling, normalize

    def count(self, inputs: Inputs) -> Tensor:
        return Term.count(self, inputs)

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        s = _embeddings(student, inputs, self.pooling, self.normalize)
        t = inputs.get("teacher_embedding")
        if t is None:
            t = _embeddings(_run(self, teacher, "teacher_embedding"), inputs, self.pooling, self.normalize)

        def loss(reduction: str) -> Tensor:
            return hidden_mse([s[:, None]], [t[:, None]], reduction=reduction, **self._projected(1))

        return self.reduced(loss, 1, inputs, len(s))


class MarginMSE(Term):
    """Mean over negatives of ((s(q, p) − s(q, n)) − (t(q, p) − t(q, n)))²: sentence-transformers' `MarginMSELoss`
    (Hofstätter et al., 2020, arXiv:2010.02666).

    The rows of a batch are groups, one after the other: a query, its positive and its negatives. The student's scores s
    are similarities of embeddings pooled from its last hidden state. The teacher's scores t are such similarities too,
    or stored, as a cross-encoder's are: a column `teacher_score` [B] of the batch, the score of each row's text for its
    query, in which the queries' own rows are not read.

    Args:
        group: rows of a query with its texts, 3 or more.
        similarity: "dot", or "cosine".
        pooling: as of `SentenceMSE`.
        weight: a number or a schedule.

    Raises:
        TypeError, ValueError: a setting out of range; a batch that is not made of whole groups.
    """

    needs = "hidden"

    def __init__(self, group: int = 3, *, similarity: str = "dot", pooling: str = "mean", weight: Weight = 1.0) -> None:
        super().__init__(weight)
        if isinstance(group, bool) or not isinstance(group, int):
            self.refuse("group", "an int", group, TypeError)
        if group < 3:
            self.refuse("group", "3 or more rows, a query, a positive and a negative", group)
        if similarity not in SIMILARITIES:
            self.refuse("similarity", "'dot' or 'cosine'", similarity)
        _check_pooling(self, pooling)
        self.group, self.similarity, self.pooling = group, similarity, pooling

    def count(self, inputs: Inputs) -> Tensor:
        """Margins: one for every negative."""
        return torch.tensor(rows_of(inputs) // self.group * (self.group - 2))

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        if rows_of(inputs) % self.group:
            self.refuse("inputs", f"groups of {self.group} rows, a query and its texts", f"{rows_of(inputs)} rows")
        s, scores = self._margins(student, inputs), inputs.get("teacher_score")
        if scores is None:
            t = self._margins(_run(self, teacher, "teacher_score"), inputs)
        else:
            t = _margins_of(scores.to(s.dtype).view(-1, self.group)[:, 1:])
        losses = (s - t.detach()).square()
        weight = inputs.get("sample_weight")  # of a query's row
        if weight is not None:
            losses = losses * weight[:: self.group, None]
        return losses.sum() / max(losses.numel(), 1)

    def _margins(self, side: Any, inputs: Inputs) -> Tensor:
        """[B / group, group - 2]."""
        embeddings = _embeddings(side, inputs, self.pooling, self.similarity == "cosine")
        of_groups = embeddings.unflatten(0, (-1, self.group))
        return _margins_of((of_groups[:, :1] * of_groups[:, 1:]).sum(-1))


def _margins_of(scores: Tensor) -> Tensor:
    return scores[:, :1] - scores[:, 1:]


def _check_pooling(term: Term, pooling: str) -> None:
    if pooling not in POOLINGS:
        term.refuse("pooling", "'mean' or 'cls'", pooling)


def _run(term: Term, teacher: Any, column: str) -> Any:
    if teacher is None or isinstance(teacher, Stored):
        raise Missing(f"{type(term).__name__}: teacher: expected one, or rows with a {column} column, got neither")
    return teacher


def _embeddings(side: Any, inputs: Inputs, pooling: str, normalize: bool) -> Tensor:
    """[B, D], of the last hidden state; its dtype, but float32 at least."""
    hidden = side.hidden[-1]
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling == "cls":
        place = torch.as_tensor(side.cls_index, device=hidden.device).expand(len(hidden))
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), place]
    else:
        on = side.mask if side.mask is not None else token_mask(inputs, hidden.shape[:2])
        on = on.to(hidden)[..., None]
        pooled = (hidden * on).sum(1) / on.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled
