"""The terms of layers of kdfast.objective against plain torch, on a few random numbers; models that are run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objective_outputs import (
    BATCH,
    CLASSES,
    LENGTHS,
    MASK,
    PRECISIONS,
    WEIGHTED,
    ByHand,
    batch,
    check,
    compare,
    kl,
    leaves,
    side,
)
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from kdfast.objective import CLS, Attention, Cosine, Embedding, Hidden, Labels, Logits, Relations, Terms

MEANS = pytest.mark.parametrize("mean_over_layers", [False, True], ids=["sum", "mean"])

# ---- layers ----
Distance = Callable[[int, Tensor, Tensor], Tensor]


def of_tokens(pairs: dict[int, int], distance: Distance, masked: bool = True, mean: bool = False) -> ByHand:
    def value(student: Any, teacher: Any, inputs: Any) -> Tensor:
        on = MASK if masked else torch.ones_like(MASK)
        w = inputs.get("sample_weight", torch.ones(BATCH)).double()[:, None]
        layers = [distance(n, student.hidden[i], teacher.hidden[j]) for n, (i, j) in enumerate(pairs.items())]
        total = sum((w.to(x) * x)[on].sum() / on.sum() for x in layers)
        return total / len(pairs) if mean else total

    return value


@PRECISIONS
@WEIGHTED
@MEANS
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "padding counts"])
@pytest.mark.parametrize("projections", ["equal widths", "shared", "per layer", "per layer, no bias"])
def test_hidden(
    projections: str, masked: bool, mean_over_layers: bool, weighted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    equal, bias = projections == "equal widths", "no bias" not in projections
    torch.manual_seed(3)
    linears = [nn.Linear(12, 20, bias=bias, dtype=dtype) for _ in range(1 if projections == "shared" else 2)]
    projection = None if equal else linears[0] if projections == "shared" else linears
    term = Hidden(projection=projection, masked=masked, mean_over_layers=mean_over_layers)
    assert len(list(term.parameters())) == (0 if equal else len(linears) * (1 + bias))

    def distance(n: int, s: Tensor, t: Tensor) -> Tensor:
        p = s if equal else s @ linears[n % len(linears)].weight.T + (linears[n % len(linears)].bias if bias else 0)
        return (p - t).square().mean(-1)

    by_hand = of_tokens({1: 2, 2: 4}, distance, masked, mean_over_layers)
    teacher = side(1, dtype, layers=4, width=12 if equal else 20)
    check(term, by_hand, side(0, dtype), teacher, batch(weighted), tolerance)


def test_projection_of_both_widths() -> None:
    made: list[tuple[int, int]] = []

    def projection(width: int, teacher_width: int) -> nn.Linear:
        made.append((width, teacher_width))
        return nn.Linear(width, teacher_width)

    small, large = (BertConfig(hidden_size=width, num_attention_heads=2) for width in (12, 20))
    student, teacher = (BertForSequenceClassification(config) for config in (small, large))
    objective = Terms(hid=Hidden(projection=projection))
    assert not list(objective.parameters())
    assert objective.for_models(student, teacher) is objective
    weight = objective.terms["hid"].projection.weight
    assert weight.shape == (20, 12)
    objective.for_models(student, teacher)  # what is there stays
    assert objective.terms["hid"].projection.weight is weight
    assert made == [(12, 20)]


@WEIGHTED
def test_embedding_and_hidden_share_a_projection(weighted: bool) -> None:
    linear = nn.Linear(12, 20, dtype=torch.float64)
    objective = Terms(emb=Embedding(projection=linear, weight=0.5), hid=Hidden("uniform", projection=linear))
    assert len(list(objective.parameters())) == 2
    student, teacher, inputs = side(0), side(1, width=20), batch(weighted)
    by_hand = of_tokens({0: 0, 1: 1, 2: 2}, lambda n, s, t: (0.5 if n == 0 else 1) * (linear(s) - t).square().mean(-1))
    values = objective(student, teacher, inputs)
    assert list(values) == ["emb", "hid"]
    compare(sum(values.values()), by_hand(student, teacher, inputs), leaves(student, linear), 1e-10)


@PRECISIONS
@WEIGHTED
@MEANS
@pytest.mark.parametrize("layers", [None, {0: 1, -1: -2}])
def test_cosine(layers: Any, mean_over_layers: bool, weighted: bool, dtype: torch.dtype, tolerance: float) -> None:
    pairs = {2: 3} if layers is None else {0: 1, 2: 2}
    by_hand = of_tokens(pairs, lambda n, s, t: 1 - F.cosine_similarity(s, t, dim=-1), mean=mean_over_layers)
    term = Cosine(layers, mean_over_layers=mean_over_layers)
    check(term, by_hand, side(0, dtype), side(1, dtype, layers=3), batch(weighted), tolerance)


PLACES: list[Any] = [0, -1, 2, torch.tensor([5, 2, 0, 4])]


@PRECISIONS
@WEIGHTED
@MEANS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("places", [(0, 0), (3, 0), (1, 3)], ids=["first", "last of each, first", "last, last of each"])
def test_cls(
    places: tuple[int, int],
    normalize: bool,
    mean_over_layers: bool,
    weighted: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    mine, its = (PLACES[i] for i in places)

    def by_hand(student: Any, teacher: Any, inputs: Any) -> Tensor:
        w = inputs.get("sample_weight", torch.ones(BATCH)).to(dtype)
        total = torch.zeros((), dtype=dtype)
        for i, j in ((1, 2), (2, 4)):
            for b in range(BATCH):
                s = student.hidden[i][b, mine if isinstance(mine, int) else mine[b]]
                t = teacher.hidden[j][b, its if isinstance(its, int) else its[b]]
                if normalize:
                    s, t = s / s.norm(), t / t.norm()
                total = total + w[b] * (s - t).square().mean() / BATCH
        return total / 2 if mean_over_layers else total

    term = CLS("skip", normalize=normalize, mean_over_layers=mean_over_layers)
    student, teacher = side(0, dtype, layers=3, cls_index=mine), side(1, dtype, layers=6, cls_index=its)
    check(term, by_hand, student, teacher, batch(weighted), tolerance)


def of_heads(
    pairs: dict[int, int], of_row: Callable[[Any, Any, int, int, int], Tensor], count: Callable[[int], int], mean: bool
) -> ByHand:
    """of_row(student, teacher, layer, layer, row): the loss of each head and what counts, of one sequence without padding."""

    def value(student: Any, teacher: Any, inputs: Any) -> Tensor:
        w, total = inputs.get("sample_weight"), torch.zeros((), dtype=torch.float64)
        for i, j in pairs.items():
            sums = [of_row(student, teacher, i - 1, j - 1, b) for b in range(BATCH)]
            if w is None:
                total = total + sum(x.sum() for x in sums) / sum(
                    len(x) * count(int(n)) for x, n in zip(sums, LENGTHS, strict=True)
                )
            else:
                total = total + sum(w[b] * sums[b].mean() / count(int(LENGTHS[b])) for b in range(BATCH)) / BATCH
        return total / len(pairs) if mean else total

    return value


@PRECISIONS
@WEIGHTED
@MEANS
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    ("heads", "shared_by", "head_map"),
    [((2, 2), 1, None), ((4, 4), 2, None), ((2, 4), 1, [3, 0]), ((2, 4), 1, [1, -1])],
)
def test_attention(
    heads: tuple[int, int], shared_by: int, head_map: Any, causal: bool, mean_over_layers: bool, weighted: bool,
    dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    maps = list(range(heads[0])) if head_map is None else head_map
    live = [h for h in range(heads[0]) if maps[h] >= 0]

    def of_row(student: Any, teacher: Any, i: int, j: int, b: int) -> Tensor:
        n, scores = int(LENGTHS[b]), []
        for x, layer in ((student, i), (teacher, j)):
            q, k = x.q[layer][b, :, :n], x.k[layer][b, :, :n]
            scores.append(x.scale * torch.einsum("hid,hjd->hij", q, k.repeat_interleave(len(q) // len(k), 0)))
        squares = (scores[0][live] - scores[1][[maps[h] for h in live]]) ** 2
        return (squares.tril() if causal else squares).sum((1, 2))

    def count(n: int) -> int:
        return n * (n + 1) // 2 if causal else n * n

    term = Attention(head_map=head_map, mean_over_layers=mean_over_layers)
    student = side(0, dtype, heads=heads[0], shared_by=shared_by, causal=causal)
    teacher, inputs = side(1, dtype, layers=4, width=20, heads=heads[1], causal=causal), batch(weighted)
    if weighted and -1 in maps:
        with pytest.raises(ValueError, match="Attention: head_map: expected no heads to skip beside sample_weight"):
            term(student, teacher, inputs)
        return
    check(term, of_heads({1: 2, 2: 4}, of_row, count, mean_over_layers), student, teacher, inputs, tolerance)


@PRECISIONS
@WEIGHTED
def test_attention_of_padding(weighted: bool, dtype: torch.dtype, tolerance: float) -> None:
    """As TinyBERT's code: scores of keys that are padding are 0 on both sides, and all count."""
    length = MASK.shape[1]

    def by_hand(student: Any, teacher: Any, inputs: Any) -> Tensor:
        w, total = inputs.get("sample_weight", torch.ones(BATCH)).double(), torch.zeros((), dtype=dtype)
        for i, j in ((0, 1), (1, 3)):
            a, b = (x.scale * x.q[n] @ x.k[n].mT for x, n in ((student, i), (teacher, j)))
            squares = torch.where(MASK[:, None, None, :], (a - b).square(), 0)
            total = total + (w.to(dtype) * squares.mean((1, 2, 3))).mean()
        return total

    term, inputs = Attention(masked=False), batch(weighted)
    student, teacher = side(0, dtype), side(1, dtype, layers=4, width=20)
    check(term, by_hand, student, teacher, inputs, tolerance)
    assert term.count(inputs) == (BATCH if weighted else BATCH * length**2)
    causal = side(0, dtype, causal=True)
    with pytest.raises(ValueError, match="Attention: masked: expected True for causal models"):
        term(causal, side(1, dtype, layers=4, causal=True), inputs)


@PRECISIONS
@WEIGHTED
@pytest.mark.parametrize(
    ("relations", "relation_heads", "heads"),
    [(("qk", "vv"), None, (2, 2)), (("qq", "kk", "vv"), 4, (2, 2)), (("qq", "kk", "vv"), 2, (3, 4))],
    ids=["MiniLM", "MiniLMv2", "MiniLMv2, other heads"],
)
@pytest.mark.parametrize("layers", [None, {1: 2, 2: -1}], ids=["last", "two layers"])
def test_relations(
    layers: Any, relations: Any, relation_heads: Any, heads: tuple[int, int], weighted: bool, dtype: torch.dtype,
    tolerance: float,
) -> None:  # fmt: skip
    def rows(x: Tensor, b: int) -> Tensor:
        x = x[b, :, : LENGTHS[b]]
        return x if relation_heads is None else torch.stack(torch.cat(list(x), -1).chunk(relation_heads, -1))

    def of_row(student: Any, teacher: Any, i: int, j: int, b: int) -> Tensor:
        total = torch.zeros((), dtype=dtype)
        for pair in relations:
            logs = []
            for x, layer in ((student, i), (teacher, j)):
                first, second = (rows(getattr(x, name)[layer], b) for name in pair)
                logs.append((first @ second.mT / math.sqrt(first.shape[-1])).log_softmax(-1))
            total = total + kl(logs[1], logs[0]).sum(-1)
        return total

    student, teacher = side(0, dtype, heads=heads[0]), side(1, dtype, layers=3, width=24, heads=heads[1])
    by_hand = of_heads({2: 3} if layers is None else {1: 2, 2: 3}, of_row, lambda n: n, layers is not None)
    term = Relations(layers, relations=relations, relation_heads=relation_heads, mean_over_layers=layers is not None)
    check(term, by_hand, student, teacher, batch(weighted), tolerance)


# ---- models that are run ----
def models() -> tuple[Any, Any, dict[str, Any]]:
    """A DistilBERT, a BERT, and rows with token types."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 16, "num_labels": CLASSES}
    student = DistilBertForSequenceClassification(
        DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, dropout=0.0, attention_dropout=0.0, **small)
    )
    widths = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    teacher = BertForSequenceClassification(BertConfig(**widths, **small, initializer_range=0.5))
    ids = torch.randint(1, 40, MASK.shape)
    types = (torch.arange(MASK.shape[1]) > 2).long().expand(MASK.shape)
    return student.eval(), teacher.eval(), batch(input_ids=ids, token_type_ids=types, labels=torch.arange(BATCH))


NEEDS: dict[str, Callable[[], Any]] = {"logits": Logits, "hidden": Cosine, "attention": Relations}


@pytest.mark.parametrize("needs", NEEDS)
def test_token_types_go_to_the_model_that_has_them(needs: str) -> None:
    student, teacher, inputs = models()
    more = {"sample_weight": torch.ones(BATCH), "teacher_topk": torch.ones(BATCH), "num_items": torch.ones(1)}
    objective = Terms(it=NEEDS[needs](), ce=Labels())
    with torch.no_grad():
        s, t = (objective.run(model, inputs | more) for model in (student, teacher))
        own = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(s.logits, student(**own).logits)
        torch.testing.assert_close(t.logits, teacher(**own, token_type_ids=inputs["token_type_ids"]).logits)
        assert (t.logits - teacher(**own).logits).abs().max() > 1e-3
    assert hasattr(s, "q") == (needs != "logits")
    assert len(t.q if needs == "attention" else ()) == (4 if needs == "attention" else 0)


def test_objective_of_models_reaches_every_layer() -> None:
    student, teacher, inputs = models()
    linear = nn.Linear(16, 16)
    objective = Terms(
        kl=Logits(temperature=2.0), ce=Labels(), hidden=Hidden(projection=linear), emb=Embedding(projection=linear),
        cosine=Cosine(), cls=CLS("skip"), attention=Attention(), relations=Relations(),
    )  # fmt: skip
    with torch.no_grad():
        of_teacher = objective.run(teacher, inputs)
    values = objective(objective.run(student, inputs), of_teacher, inputs)
    assert list(values) == list(objective.terms)
    assert min(value.item() for value in values.values()) > 1e-4
    sum(values.values()).backward()
    for name, parameter in (*student.named_parameters(), *linear.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
