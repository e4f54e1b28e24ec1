"""A pass through an encoder that rows leave after the layer at which they are sure; the others go on without them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.branch import uncertainty

Branches = Callable[[int, Tensor, Tensor | None], Tensor]  # layer from 1, its states [b, L, D], mask [b, L]: [b, C]

# Of the thread that runs: passes of several threads through one model do not meet.
_current: ContextVar[Pass | None] = ContextVar("pass", default=None)


class Watched:
    """A layer's forward that tells the pass that runs, if one does, and else is what it was.

    Not a hook: hooks cannot leave a layer out. An object and not a closure, so that copies of the model have their own.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.inner = layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = _current.get()
        return self.inner(*args, **kwargs) if running is None else running.layer(self.inner, args, kwargs)


def watch(layers: list[nn.Module]) -> None:
    for layer in layers:
        if not isinstance(vars(layer).get("forward"), Watched):
            layer.forward = Watched(layer)  # type: ignore[method-assign]


class Pass:
    """One batch on its way through the layers, all of its rows to the end.

    Tensors among a layer's arguments whose first dimension is the batch's rows (masks, biases of positions) are taken
    to have a row for each; that holds for the architectures that `kdfast.hf.ADAPTERS` names.
    """

    def __init__(self, rows: int, depth: int, mask: Tensor | None) -> None:
        self.rows, self.depth, self.mask = rows, depth, mask
        self.number = 0  # of layers that were run

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        token = _current.set(self)
        try:
            return model(**inputs)
        finally:
            _current.reset(token)

    def layer(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.number += 1
        output = inner(*args, **kwargs)
        self.in_tuple = isinstance(output, tuple)
        hidden = output[0] if self.in_tuple else output
        if self.number == 1 and len(hidden) != self.rows:
            got = f"{list(hidden.shape)} for {self.rows} rows"
            raise ValueError(
                f"EarlyExit: model: expected layers that return hidden states [batch, length, size], got {got}"
            )
        hidden = self.after(hidden)
        return (hidden, *output[1:]) if self.in_tuple else hidden

    def after(self, hidden: Tensor) -> Tensor:
        """What the next layer gets of a layer's output."""
        raise NotImplementedError


class AllBranches(Pass):
    """Logits of every branch, of all rows."""

    def __init__(self, rows: int, depth: int, mask: Tensor | None, branches: Branches) -> None:
        super().__init__(rows, depth, mask)
        self.branches = branches
        self.logits: list[Tensor] = []

    def after(self, hidden: Tensor) -> Tensor:
        if self.number < self.depth:
            self.logits.append(self.branches(self.number, hidden, self.mask))
        return hidden


class Exits(Pass):
    """Rows leave with a branch's logits where its uncertainty is at most `speed`, or, if `strict`, below it.

    Attributes:
        alive: [b] int64, numbers of the rows that are still there, ascending; None: all.
        left: of every layer after which rows left: their numbers, logits, uncertainties, and the layer, from 1.
    """

    def __init__(
        self, rows: int, depth: int, mask: Tensor | None, branches: Branches, speed: float, strict: bool
    ) -> None:
        super().__init__(rows, depth, mask)
        self.branches, self.speed, self.strict = branches, speed, strict
        self.alive: Any = None  # all
        self.left: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self._compacted: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: the argument, and its rows that are alive

    def layer(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.alive is None:
            return super().layer(inner, args, kwargs)
        if len(self.alive):
            args, kwargs = self._of_alive(args), self._of_alive(kwargs)
            return super().layer(inner, args, kwargs)
        self.number += 1
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = self._whole(hidden) if self.number == self.depth else hidden
        return (hidden,) if self.in_tuple else hidden

    def _of_alive(self, x: Any) -> Any:
        if isinstance(x, dict):
            return {name: self._of_alive(value) for name, value in x.items()}
        if isinstance(x, tuple):
            return tuple(self._of_alive(value) for value in x)
        if not isinstance(x, Tensor) or not x.dim() or len(x) != self.rows:  # hidden states have fewer rows already
            return x
        if id(x) not in self._compacted:  # layers share their masks
            self._compacted[id(x)] = (x, x.index_select(0, self.alive))
        return self._compacted[id(x)][1]

    def after(self, hidden: Tensor) -> Tensor:
        if self.number == self.depth:
            return self._whole(hidden)
        mask = self.mask if self.alive is None else self._of_alive(self.mask)
        logits = self.branches(self.number, hidden, mask)
        unsure = uncertainty(logits)
        leaves = unsure < self.speed if self.strict else unsure <= self.speed
        if not leaves.any():  # on a GPU this waits for the device: how many rows go on is a shape
            return hidden
        alive = torch.arange(self.rows, device=hidden.device) if self.alive is None else self.alive
        go, stay = leaves.nonzero().flatten(), (~leaves).nonzero().flatten()
        self.left.append((alive[go], logits[go], unsure[go], self.number))
        self.alive = alive[stay]
        self._compacted.clear()
        return hidden.index_select(0, stay)

    def _whole(self, hidden: Tensor) -> Tensor:
        """The last layer's states as the rest of the model expects them: rows that left are 0."""
        if self.alive is None:
            return hidden
        return hidden.new_zeros(self.rows, *hidden.shape[1:]).index_copy(0, self.alive, hidden)
