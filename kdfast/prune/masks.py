"""What of a model lives: its heads, neurons and layers."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.prune.layers import Layer, layers_of

__all__ = ["Masks"]

_PLAN = 1  # the form of the JSON


@dataclass(eq=False, repr=False)
class Masks:
    """What lives: bool tensors on the CPU, True where something does, set in place.

    heads: of every layer, [query heads]. neurons: of every layer, [neurons of the feed-forward network]. layers:
    [layers]; a layer that is False passes on what it gets, where one without heads and neurons still adds its biases.
    groups: of every layer, which group of keys and values each head reads; a group lives where one of its heads does.
    model_type: the architecture, as `model.config.model_type` has it. hidden: the numbers of a hidden state that live,
    [hidden size], None for all; for `compact` alone. ALBERT, whose layers share weights, has masks for each distinct
    layer.

        masks = Masks.full(model)
        masks.heads[3][[1, 5]] = False      # two heads
        masks.heads[0][:] = False           # a layer's attention: what its output adds is its bias
        masks.neurons[4][2000:] = False     # some of a feed-forward network, or [:] for all of it
        masks.drop_group(2, 1)              # a group of keys and values, with all heads that read it
        masks.layers[7] = False
        kdfast.prune.apply(model, masks)

    Two are equal where the same lives of the same architecture. `to_json` is a plan: it lists what lives, and what
    `from_json` makes of it prunes the original model again.
    """

    heads: list[Tensor]
    neurons: list[Tensor]
    layers: Tensor
    groups: list[Tensor]
    model_type: str
    hidden: Tensor | None = None

    @classmethod
    def full(cls, model: nn.Module) -> Masks:
        """Everything lives.

        Raises:
            TypeError, ValueError: model as in `layers_of`.
        """
        layers = layers_of(model, "kdfast.prune.Masks", of_blocks=True)
        return cls(
            heads=[_all(layer.heads) for layer in layers],
            neurons=[_all(layer.neurons) for layer in layers],
            layers=_all(len(layers)),
            groups=[layer.group_of.clone() for layer in layers],
            model_type=unwrapped(model).config.model_type,
        )

    @classmethod
    def from_json(cls, text: str) -> Masks:
        """Masks of a plan that `to_json` made.

        Raises:
            ValueError: no such plan; the message says where.
        """
        try:
            plan = json.loads(text)
            if plan["version"] != _PLAN:
                _wrong_plan(f"version {_PLAN}", plan["version"])
            layers = plan["layers"]
            return cls(
                heads=[_living(layer["heads"], f"heads of layer {i}") for i, layer in enumerate(layers)],
                neurons=[_living(layer["neurons"], f"neurons of layer {i}") for i, layer in enumerate(layers)],
                layers=torch.tensor([_bool(layer["lives"]) for layer in layers], dtype=torch.bool, device="cpu"),
                groups=[torch.tensor(_numbers(layer["groups"]), dtype=torch.int64, device="cpu") for layer in layers],
                model_type=str(plan["model_type"]),
                hidden=_living(plan["hidden"], "hidden") if "hidden" in plan else None,
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            is_path = isinstance(text, str) and text.endswith(".json")
            hint = "; it takes the file's text, Path(...).read_text()" * is_path
            _wrong_plan("what Masks.to_json writes", f"{type(error).__name__}: {error}{hint}")

    def to_json(self) -> str:
        """A plan: by layer, which heads and neurons of how many live, whether the layer does, and the groups; and what
        lives of hidden states, if not all."""
        layers = [
            {
                "lives": bool(self.layers[i]),
                "heads": {"of": len(self.heads[i]), "kept": heads.tolist()},
                "neurons": {"of": len(self.neurons[i]), "kept": neurons.tolist()},
                "groups": self.groups[i].tolist(),
            }
            for i, (heads, neurons) in enumerate(map(self.kept, range(len(self.heads))))
        ]
        lines = ",\n".join(json.dumps(layer) for layer in layers)  # a line each, for those who read or compare them
        hidden = ""
        if self.hidden is not None:
            kept = {"of": len(self.hidden), "kept": self.hidden.nonzero().flatten().tolist()}
            hidden = f'"hidden": {json.dumps(kept)}, '
        return f'{{"version": {_PLAN}, "model_type": {json.dumps(self.model_type)}, {hidden}"layers": [\n{lines}\n]}}\n'

    def copy(self) -> Masks:
        """The same in tensors of its own."""
        return Masks(
            heads=[mask.clone() for mask in self.heads],
            neurons=[mask.clone() for mask in self.neurons],
            layers=self.layers.clone(),
            groups=[groups.clone() for groups in self.groups],
            model_type=self.model_type,
            hidden=None if self.hidden is None else self.hidden.clone(),
        )

    def everything(self) -> Masks:
        """Masks of the same shape in which all lives."""
        whole = self.copy()
        for mask in (*whole.heads, *whole.neurons, whole.layers, *([] if whole.hidden is None else [whole.hidden])):
            mask[:] = True
        return whole

    def drop_group(self, layer: int, group: int) -> None:
        """No head that reads this group of keys and values lives.

        Raises:
            ValueError: the layer has no such group.
        """
        groups = self.groups[layer]
        count = int(groups.max()) + 1 if len(groups) else 0
        if group not in range(count):
            _checks.wrong_value("kdfast.prune.Masks.drop_group", "group", f"0 to {count - 1}", group)
        self.heads[layer] &= groups != group

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """The numbers of a layer's heads and neurons that live, in order."""
        return self.heads[layer].nonzero().flatten(), self.neurons[layer].nonzero().flatten()

    def check(self, model: nn.Module) -> None:
        """That these are masks of this model.

        Raises:
            TypeError, ValueError: model as in `layers_of`; masks of another architecture, of other numbers of layers,
                heads or neurons, of another dtype or on another device.
        """
        op = "kdfast.prune.Masks.check"
        check(op, self, layers_of(model, op, of_blocks=True), unwrapped(model).config)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        mine, others = (
            [
                *masks.heads,
                *masks.neurons,
                masks.layers,
                *masks.groups,
                *([] if masks.hidden is None else [masks.hidden]),
            ]
            for masks in (self, other)
        )
        return (
            self.model_type == other.model_type
            and len(self.heads) == len(other.heads)
            and len(mine) == len(others)
            and all(map(torch.equal, mine, others))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        live = self.layers.nonzero().flatten().tolist()
        counts = [f"{len(live)} of {len(self.layers)} layers"]
        for name, of in (("heads", self.heads), ("neurons", self.neurons)):
            counts.append(f"{sum(int(of[i].sum()) for i in live)} of {sum(map(len, of))} {name}")
            without = [str(i) for i in live if len(of[i]) and not of[i].any()]
            if without:
                counts[-1] += f" (none in layer {', '.join(without)})"
        if self.hidden is not None:
            counts.append(f"{int(self.hidden.sum())} of {len(self.hidden)} hidden")
        return f"Masks({self.model_type}: {', '.join(counts)})"


def check(op: str, masks: object, layers: Sequence[Layer], config: Any) -> None:
    """`Masks.check`, of a model's layers and config."""
    model_type = config.model_type
    if not isinstance(masks, Masks):
        _checks.wrong_type(op, "masks", "kdfast.prune.Masks", _checks.kind(masks))
    if masks.model_type != model_type:
        _checks.wrong_value(op, "masks", f"those of a model of type {model_type!r}", f"those of {masks.model_type!r}")
    for name in ("heads", "neurons", "groups"):
        count = len(getattr(masks, name))
        if count != len(layers):
            _checks.wrong_value(op, f"masks.{name}", f"a tensor for each of {len(layers)} layers", f"{count} tensors")
    _check_mask(op, "layers", masks.layers, len(layers))
    if masks.hidden is not None:
        _check_mask(op, "hidden", masks.hidden, config.hidden_size)
    for i, layer in enumerate(layers):
        _check_mask(op, f"heads[{i}]", masks.heads[i], layer.heads)
        _check_mask(op, f"neurons[{i}]", masks.neurons[i], layer.neurons)
        if not torch.equal(masks.groups[i], layer.group_of):
            expected = f"the model's, {layer.group_of.tolist()}"
            _checks.wrong_value(op, f"masks.groups[{i}]", expected, masks.groups[i].tolist())
    if model_type == "albert" and not bool(masks.layers.all()):
        which = masks.layers.logical_not().nonzero().flatten().tolist()
        expected = "all True for ALBERT, whose layers share their weights (prune heads and neurons)"
        _checks.wrong_value(op, "masks.layers", expected, f"False at {which}")


def _check_mask(op: str, name: str, mask: object, count: int) -> None:
    if isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == (count,) and mask.is_cpu:
        return
    expected = f"a bool tensor of shape [{count}] on the CPU"
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        _checks.wrong_type(op, f"masks.{name}", expected, _checks.kind(mask))
    hint = "" if mask.shape == (count,) else "; new ones are kdfast.prune.Masks.full(model)"
    _checks.wrong_value(op, f"masks.{name}", expected, f"shape {list(mask.shape)} on {mask.device}{hint}")


def _all(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool, device="cpu")


def _living(given: dict[str, Any], what: str) -> Tensor:
    count, kept = given["of"], _numbers(given["kept"])
    wrong = [i for before, i in zip([-1, *kept], kept, strict=False) if not before < i < count]
    if wrong:
        _wrong_plan(
            f"{what}: numbers from 0 to {count - 1}, sorted, each once", f"{wrong[0]} among {reprlib.repr(kept)}"
        )
    mask = torch.zeros(count, dtype=torch.bool, device="cpu")
    mask[kept] = True
    return mask


def _numbers(given: object) -> list[int]:
    if not isinstance(given, list) or any(type(i) is not int for i in given):
        _wrong_plan("lists of whole numbers", reprlib.repr(given))
    return given


def _bool(given: object) -> bool:
    if not isinstance(given, bool):
        _wrong_plan("lives: true or false", given)
    return given


def _wrong_plan(expected: str, got: object) -> NoReturn:
    _checks.wrong_value("kdfast.prune.Masks.from_json", "text", expected, got)
