"""Terms of layers: hidden states, their first token, attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast import cls_distance, cosine_distance, hidden_mse, qk_attention_mse, qk_relation_kl
from kdfast.models.inputs import unwrapped
from kdfast.objective._protocol import Missing
from kdfast.objective.layer_maps import LayerMap, layer_map
from kdfast.objective.schedules import Weight
from kdfast.objective.term import Inputs, Stored, Term, check_aligned, token_mask, tokens_of_rows
from kdfast.ops._checks import check_int

Linears = nn.Linear | Sequence[nn.Linear]
Projection = Linears | Callable[[int, int], Linears] | None


class _OfLayers(Term):
    """Pairs of hidden states by a layer map; sums over layers, or their mean."""

    needs = "hidden"
    stored = "hidden"  # the kind of state that a teacher's columns may hold

    def __init__(self, layers: LayerMap, weight: Weight, mean_over_layers: bool) -> None:
        super().__init__(weight)
        layer_map(layers, *(2, 2) if isinstance(layers, str) else (10**6, 10**6), type(self).__name__)  # checks it
        self.layers, self.mean_over_layers = layers, mean_over_layers

    def pairs(self, student: Any, teacher: Any) -> dict[int, int]:
        """States of the student to states of the teacher."""
        name, count = type(self).__name__, len(student.hidden) - 1
        if not isinstance(teacher, Stored):
            return layer_map(self.layers, count, len(teacher.hidden) - 1, name)
        if isinstance(self.layers, str) or min(self.layers.values()) < 0:
            if not teacher.has(self.stored):
                columns = f"teacher_{self.stored}_<state> columns"
                raise Missing(f"{name}: teacher: expected one, or rows with {columns}, got neither")
            self.refuse(
                "layers", "a dict of numbers from 0 where the teacher's states are columns of the batch", self.layers
            )
        return layer_map(self.layers, count, max(self.layers.values()), name)

    def states(self, student: Any, teacher: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The states of every pair, in turn."""
        pairs = self.pairs(student, teacher)
        return [self._state(student, i) for i in pairs], [self._state(teacher, i) for i in pairs.values()]

    def _state(self, side: Any, number: int) -> Tensor:
        """A hidden state [B, L, D], or (`stored` "cls") its token that stands for the sequence, [B, D]."""
        if isinstance(side, Stored):
            found = side.state(self.stored, number)
            if found is None:
                expected = f"one, or rows with a teacher_{self.stored}_{number} column"
                raise Missing(f"{type(self).__name__}: teacher: expected {expected}, got neither")
            return found
        hidden: Tensor = side.hidden[number]
        if self.stored == "hidden":
            return hidden
        place = torch.as_tensor(side.cls_index, device=hidden.device).expand(len(hidden))
        first: Tensor = hidden[torch.arange(len(hidden), device=hidden.device), place]
        return first

    def reduced(self, loss: Callable[..., Tensor], layers: int, inputs: Inputs, divisor: Tensor | int) -> Tensor:
        """The mean of a loss, with the weights of the batch's `sample_weight` [B] where it has them.

        loss(reduction=...) is an operator with its arguments; its values under "none" are [layers, B, ...].
        """
        part = 1 / layers if self.mean_over_layers else 1.0
        weight = inputs.get("sample_weight")
        if weight is None:
            return part * loss(reduction="mean")
        values = loss(reduction="none").sum(0)
        weighted: Tensor = weight.float().view(-1, *[1] * (values.dim() - 1)) * values
        return part * weighted.sum() / (divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1))


class Hidden(_OfLayers):
    """Σ_layers mean (H_s Wᵀ + b − H_t)² over tokens and width: TinyBERT, DynaBERT (`kdfast.hidden_mse`).

    Args:
        layers: which state of the student learns from which of the teacher's (`kdfast.objective.layer_map`).
        projection: an `nn.Linear` of the student's width to the teacher's, shared by all layers (TinyBERT's code), or
            one per layer; several terms may share one too; or a function of both widths that makes it, which
            `Terms.for_models` calls. None where the widths are equal. It is trained with the student and is no part of
            it.
        weight: a number or a schedule.
        masked: leave out padding; False counts it, as the code of TinyBERT and DynaBERT does.
        mean_over_layers: divide by the number of layers.
    """

    def __init__(
        self,
        layers: LayerMap = "uniform",
        *,
        projection: Projection = None,
        weight: Weight = 1.0,
        masked: bool = True,
        mean_over_layers: bool = False,
    ) -> None:
        super().__init__(layers, weight, mean_over_layers)
        self.make_projection: Callable[[int, int], Linears] | None = None
        if callable(projection) and not isinstance(projection, nn.Module):
            self.make_projection, projection = projection, None
        self.projection = self._checked(projection)
        self.masked = masked

    def _checked(self, projection: Any) -> nn.Linear | nn.ModuleList | None:
        if projection is None or isinstance(projection, nn.Linear):
            return projection
        several = isinstance(projection, (Sequence, nn.ModuleList))
        if not several or not all(isinstance(x, nn.Linear) for x in projection):
            got = type(projection) if isinstance(projection, nn.Module) else projection
            expected = "an nn.Linear, or a list of them, one per layer, or a function of both widths that makes either"
            self.refuse("projection", expected, got, TypeError)
        return nn.ModuleList(projection)

    def for_models(self, student: Any, teacher: Any) -> None:
        if self.make_projection is None or self.projection is not None:
            return
        configs = [getattr(unwrapped(model), "config", None) for model in (student, teacher)]
        widths: list[Any] = [getattr(config, "hidden_size", None) for config in configs]
        if None in widths:
            expected = "a module where a model's config has no hidden_size, or there is no teacher"
            self.refuse("projection", expected, self.make_projection)
        self.projection = self._checked(self.make_projection(*widths))

    def count(self, inputs: Inputs) -> Tensor:
        return tokens_of_rows(inputs, self.masked).sum()

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        check_aligned(type(self).__name__, inputs)
        s, t = self.states(student, teacher)
        mask = token_mask(inputs, s[0].shape[:2]) if self.masked else None

        def loss(reduction: str) -> Tensor:
            return hidden_mse(s, t, mask=mask, reduction=reduction, **self._projected(len(s)))

        return self.reduced(loss, len(s), inputs, s[0].shape[:2].numel() if mask is None else mask.sum())

    def _projected(self, layers: int) -> dict[str, Any]:
        if self.projection is None and self.make_projection is not None:
            self.refuse("projection", "one that Terms.for_models(student, teacher) made", self.make_projection)
        if self.projection is None:
            return {}
        if isinstance(self.projection, nn.Linear):
            return {"projection": self.projection.weight, "bias": self.projection.bias}
        linears: Any = list(self.projection)
        if len(linears) != layers:
            self.refuse("projection", f"one nn.Linear, or {layers}, one per layer", len(linears))
        weights, biases = [x.weight for x in linears], [x.bias for x in linears]
        if all(bias is None for bias in biases):
            return {"projection": weights}
        biases = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        return {"projection": weights, "bias": biases}


class Embedding(Hidden):
    """mean (E_s Wᵀ + b − E_t)² of the embeddings' outputs: TinyBERT. Arguments as of `Hidden`."""

    def __init__(self, *, projection: Projection = None, weight: Weight = 1.0, masked: bool = True) -> None:
        super().__init__({0: 0}, projection=projection, weight=weight, masked=masked)


class Cosine(_OfLayers):
    """mean over tokens that are no padding of 1 − cos(h_s, h_t), of the last hidden states: DistilBERT.

    Args:
        layers: another map than last to last. Equal widths.
        weight: a number or a schedule.
        mean_over_layers: divide by the number of layers.
    """

    def __init__(self, layers: LayerMap | None = None, *, weight: Weight = 1.0, mean_over_layers: bool = False) -> None:
        super().__init__({-1: -1} if layers is None else layers, weight, mean_over_layers)

    def count(self, inputs: Inputs) -> Tensor:
        return tokens_of_rows(inputs).sum()

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        check_aligned(type(self).__name__, inputs)
        s, t = self.states(student, teacher)
        mask = token_mask(inputs, s[0].shape[:2])

        def loss(reduction: str) -> Tensor:
            return cosine_distance(s, t, mask=mask, reduction=reduction)

        return self.reduced(loss, len(s), inputs, mask.sum())


class CLS(_OfLayers):
    """Mean over rows, layers and width of (h_s/‖h_s‖ − h_t/‖h_t‖)², h the token that stands for the sequence:
    Patient-KD.

    Args:
        layers: "skip", "last" or another map. Equal widths.
        normalize: False compares the vectors themselves, as Patient-KD's selected runs for MNLI, QNLI, QQP and RACE do.
        weight: a number or a schedule.
        mean_over_layers: False adds the layers up.
    """

    stored = "cls"

    def __init__(
        self,
        layers: LayerMap = "skip",
        *,
        normalize: bool = True,
        weight: Weight = 1.0,
        mean_over_layers: bool = True,
    ) -> None:
        super().__init__(layers, weight, mean_over_layers)
        self.normalize = normalize

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        s, t = self.states(student, teacher)

        def loss(reduction: str) -> Tensor:
            return cls_distance(s, t, normalize=self.normalize, reduction=reduction)

        return self.reduced(loss, len(s), inputs, len(s[0]))


class _OfHeads(_OfLayers):
    """Pairs of layers whose queries, keys and values are read."""

    needs = "attention"

    def heads(self, student: Any, teacher: Any, inputs: Inputs) -> tuple[list[int], list[int]]:
        """Layers, numbered from 0."""
        check_aligned(type(self).__name__, inputs)
        if isinstance(teacher, Stored):
            raise Missing(f"{type(self).__name__}: teacher: expected one, as attention is not stored, got none")
        pairs = self.pairs(student, teacher)
        if 0 in pairs or 0 in pairs.values():
            self.refuse("layers", "layers from 1, as the embeddings have no attention", pairs)
        return [i - 1 for i in pairs], [i - 1 for i in pairs.values()]

    def mask(self, student: Any, inputs: Inputs) -> Tensor:
        batch, _, length, _ = student.q[0].shape
        return token_mask(inputs, (batch, length))


class Attention(_OfHeads):
    """Σ_layers mean (Q_s K_sᵀ/√d_s − Q_t K_tᵀ/√d_t)² over heads and pairs of tokens:
    TinyBERT (`kdfast.qk_attention_mse`).

    Args:
        layers: which layer of the student learns from which of the teacher's.
        head_map: the teacher's head of every student head; needed where the counts differ.
        weight: a number or a schedule.
        masked: leave out padding, queries and keys alike; False: as TinyBERT's code, to which scores of keys that are
            padding are 0 on both sides, and all else counts: queries that are padding, and every score in the divisor.
        mean_over_layers: divide by the number of layers.

    With `sample_weight`, the mean of every row is weighted (and rows of any length count alike).

    Attributes:
        causal: whether n tokens are counted as n(n + 1)/2 scores, not n²; `Terms.for_student` sets it.
    """

    def __init__(
        self,
        layers: LayerMap = "uniform",
        *,
        head_map: Sequence[int] | None = None,
        weight: Weight = 1.0,
        masked: bool = True,
        mean_over_layers: bool = False,
    ) -> None:
        super().__init__(layers, weight, mean_over_layers)
        if head_map is not None and not isinstance(head_map, Sequence):
            self.refuse("head_map", "the teacher's head of every student head, such as [0, 2]", head_map, TypeError)
        self.head_map, self.masked, self.causal = head_map, masked, False

    def count(self, inputs: Inputs) -> Tensor:
        if "sample_weight" in inputs:
            return super().count(inputs)
        tokens = tokens_of_rows(inputs, self.masked)
        return (tokens * (tokens + 1) // 2 if self.causal else tokens**2).sum()

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        mine, its = self.heads(student, teacher, inputs)
        if self.head_map is not None and min(self.head_map) < 0 and "sample_weight" in inputs:
            self.refuse("head_map", "no heads to skip beside sample_weight", list(self.head_map))
        if student.causal and not self.masked:
            self.refuse("masked", "True for causal models, whose padding sees other tokens", self.masked)
        mask = self.mask(student, inputs)

        def loss(reduction: str) -> Tensor:
            value = qk_attention_mse(
                *([getattr(student, name)[i] for i in mine] for name in "qk"),
                *([getattr(teacher, name)[i] for i in its] for name in "qk"),
                student_scale=student.scale,
                teacher_scale=teacher.scale,
                key_mask=mask,
                query_mask=mask if self.masked else None,
                is_causal=student.causal,
                head_map=self.head_map,
                reduction=reduction,
            )
            value = value.mean(-1) if reduction == "none" else value
            if self.masked:
                return value
            share = mask.to(value.dtype).mean(-1)  # of each row's keys: the others' zeros count in the divisor
            return value * (share if reduction == "none" else share.mean())

        return self.reduced(loss, len(mine), inputs, len(student.q[0]))


class Relations(_OfHeads):
    """Σ_relations mean over heads and tokens of KL(softmax(A_t B_tᵀ/√d) ‖ softmax(A_s B_sᵀ/√d)):
    MiniLM (`qk_relation_kl`).

    Args:
        layers: another map than last to last.
        relations: pairs of "q", "k" and "v": ("qk", "vv") is MiniLM, ("qq", "kk", "vv") MiniLMv2.
        relation_heads: into how many heads queries, keys and values are split anew (MiniLMv2: 48 for base-size
            teachers); needed where the numbers of heads differ.
        weight: a number or a schedule.
        mean_over_layers: divide by the number of layers.

    With `sample_weight`, the mean of every row is weighted (and rows of any length count alike).
    """

    def __init__(
        self,
        layers: LayerMap | None = None,
        *,
        relations: Sequence[str] = ("qk", "vv"),
        relation_heads: int | None = None,
        weight: Weight = 1.0,
        mean_over_layers: bool = False,
    ) -> None:
        super().__init__({-1: -1} if layers is None else layers, weight, mean_over_layers)
        if not relations or any(len(pair) != 2 or not set(pair) <= set("qkv") for pair in relations):
            self.refuse("relations", "pairs of q, k and v such as 'qk'", relations)
        if relation_heads is not None:
            check_int(type(self).__name__, "relation_heads", relation_heads)
        self.relations, self.relation_heads = tuple(relations), relation_heads

    def count(self, inputs: Inputs) -> Tensor:
        return super().count(inputs) if "sample_weight" in inputs else tokens_of_rows(inputs).sum()

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        mine, its = self.heads(student, teacher, inputs)
        mask = self.mask(student, inputs)

        def loss(reduction: str) -> Tensor:
            values = [
                qk_relation_kl(
                    *([getattr(student, name)[i] for i in mine] for name in pair),
                    *([getattr(teacher, name)[i] for i in its] for name in pair),
                    relation_heads=self.relation_heads,
                    key_mask=mask,
                    query_mask=mask,
                    reduction=reduction,
                )
                for pair in self.relations
            ]
            total = torch.stack(values).sum(0)
            return total.mean(-1) if reduction == "none" else total

        return self.reduced(loss, len(mine), inputs, len(student.q[0]))
