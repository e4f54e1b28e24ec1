"""Encoders that answer after few layers where these suffice: FastBERT (Liu et al., 2020, arXiv:2004.02178).

model = EarlyExit.from_pretrained(folder)
answers = model(**batch, speed=0.5)
answers.logits, answers.layers, answers.uncertainty
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.utils import ModelOutput, cached_file

from kdfast.models import reader
from kdfast.models.branch import Branch, uncertainty
from kdfast.models.exits import AllBranches, Exits, watch
from kdfast.models.inputs import model_inputs
from kdfast.models.student_parts import layers_path
from kdfast.ops import _checks

__all__ = ["Branch", "EarlyExit", "EarlyExitOutput", "saved_in", "uncertainty"]

SETTINGS, BRANCHES = "early_exit.json", "branches.safetensors"  # beside what transformers saves of the encoder


@dataclass
class EarlyExitOutput(ModelOutput):  # type: ignore[misc]
    """What `EarlyExit` returns, in the batch's order.

    logits: [B, C], of the layer that each row left at; where every branch was asked for, of the last.
    layers: [B] int64, those layers, from 1. uncertainty: [B], of these logits, as `uncertainty` has it.
    branch_logits: where asked for, [B, C] of every layer but the last.
    """

    logits: Tensor | None = None
    layers: Tensor | None = None
    uncertainty: Tensor | None = None
    branch_logits: tuple[Tensor, ...] | None = None


class EarlyExit(nn.Module):
    """An encoder of transformers with a classifier after every layer, of which the last is the others' teacher.

    At inference a row leaves after the first layer whose classifier's `uncertainty` is at most `speed`; the rows that
    go on do so in a smaller batch, with their rows of the masks. The model's own forward runs, embeddings, masks and
    biases of positions included. Which rows leave where is that of each row alone, but for rounding of the sums.

    Args:
        model: an encoder (`AutoModel`), whose last classifier then is a `Branch` too, as in the paper, and which loses
            its pooler, that no classifier reads; or a classifier (`AutoModelForSequenceClassification`), which keeps
            its own as the last. Of one of `kdfast.hf.ADAPTERS`, encoders whose first token stands for a sequence.
        width, heads: of each `Branch`.
        speed: where a call says none; from 0, no row leaves early, to 1, all leave after the first layer.
        strict: leave only where the uncertainty is below `speed`, as the paper and the authors' package have it; else
            at most `speed`, as their experiments'.

    Raises:
        TypeError: model is none of transformers; an argument of another type.
        ValueError: a model without one list of layers, of an architecture that is not known or whose first token does
            not stand for a sequence; fewer than two classes; a width that heads do not divide; a speed outside [0, 1].
    """

    def __init__(
        self, model: Any, *, width: int = 128, heads: int = 2, speed: float = 0.0, strict: bool = False
    ) -> None:
        super().__init__()
        path = layers_path("EarlyExit", model, "model")
        _check_model(model)
        _checks.check_fraction("EarlyExit", "speed", speed)
        for name, value in (("width", width), ("heads", heads)):
            _checks.check_int("EarlyExit", name, value)
            if value < 1:
                _checks.wrong_value("EarlyExit", name, "1 or more", value)
        if width % heads:
            _checks.wrong_value("EarlyExit", "width", f"a multiple of the {heads} heads", width)
        self.model, self.width, self.heads, self.speed, self.strict = model, width, heads, speed, strict
        self.own_head = model.base_model is not model
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        config = model.config
        self.branches = nn.ModuleList(
            Branch(config.hidden_size, config.num_labels, width=width, heads=heads).to(model.device, model.dtype)
            for _ in range(config.num_hidden_layers - self.own_head)
        )
        self.still = False  # whether all but the branches are in eval mode, also in training
        watch(_layers(model, path))
        self.train(model.training)

    # ---- what others ask a model of transformers ----
    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def base_model(self) -> Any:
        return self.model.base_model

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.get_input_embeddings()
        return embeddings

    @property
    def depth(self) -> int:
        return int(self.config.num_hidden_layers)

    # ---- training ----
    def train_backbone(self) -> EarlyExit:
        """The first stage: all but the branches of layers before the last are trained."""
        self.requires_grad_(True)
        self.branches[: self.depth - 1].requires_grad_(False)
        self.still = False
        return self.train(self.training)

    def train_branches(self, dropout: bool = False) -> EarlyExit:
        """The second stage: only the branches of layers before the last are trained.

        Args:
            dropout: whether the rest keeps its dropout while training, as in the authors' code; without, it is in eval
                mode throughout.
        """
        self.requires_grad_(False)
        self.branches[: self.depth - 1].requires_grad_(True)
        self.still = not dropout
        return self.train(self.training)

    def train(self, mode: bool = True) -> EarlyExit:
        super().train(mode)
        if self.still:
            self.model.eval()
            self.branches[self.depth - 1 :].eval()
        return self

    # ---- running ----
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        speed: float | None = None,
        branches: bool = False,
        **inputs: Any,
    ) -> EarlyExitOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, **inputs: as the model takes them, B rows; attention_mask [B, L].
            speed: None: that of the model, and in training 0, so that all rows reach the last layer.
            branches: every classifier answers, for all rows, whatever the speed.

        Raises:
            TypeError, ValueError: a speed that is no number from 0 to 1; an attention_mask of another shape; no inputs;
                output_hidden_states or output_attentions, as rows leave; layers that return another form.
        """
        speed = (0.0 if self.training else self.speed) if speed is None else speed
        _checks.check_fraction("EarlyExit", "speed", speed)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids, **inputs}
        for name in ("output_hidden_states", "output_attentions"):
            if inputs.get(name):
                _checks.wrong_value("EarlyExit", name, "none, as rows leave", inputs[name])
        given = model_inputs(self.model, {name: x for name, x in given.items() if x is not None})
        rows = _rows(given)
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            _checks.wrong_value("EarlyExit", "attention_mask", "[batch, length]", list(mask.shape))
        if not rows:
            return self._empty(branches)
        if branches:
            every = AllBranches(rows, self.depth, mask, self._branch)
            logits = self._last(every.run(self.model, given), mask, None)
            return EarlyExitOutput(logits=logits, branch_logits=tuple(every.logits))
        if speed == 0:
            return _ordered(rows, [], self._last(self.model(**given), mask, None), None, self.depth)
        exits = Exits(rows, self.depth, mask, self._branch, speed, self.strict)
        outputs = exits.run(self.model, given)
        return _ordered(rows, exits.left, self._last(outputs, mask, exits.alive), exits.alive, self.depth)

    def _branch(self, number: int, hidden: Tensor, mask: Tensor | None) -> Tensor:
        logits: Tensor = self.branches[number - 1](hidden, mask)
        return logits

    def _last(self, outputs: Any, mask: Tensor | None, alive: Tensor | None) -> Tensor:
        """The last classifier's logits, of the rows that are alive."""
        if self.own_head:
            logits: Tensor = outputs.logits
            return logits if alive is None else logits[alive]
        hidden = outputs.last_hidden_state
        if alive is not None:
            hidden, mask = hidden[alive], None if mask is None else mask[alive]
        return self._branch(self.depth, hidden, mask)

    def _empty(self, branches: bool) -> EarlyExitOutput:
        logits = torch.empty(0, self.config.num_labels, device=self.device, dtype=self.model.dtype)
        if branches:
            return EarlyExitOutput(logits=logits, branch_logits=(logits,) * (self.depth - 1))
        return _ordered(0, [], logits, None, self.depth)

    # ---- files ----
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what transformers writes of the encoder or classifier, which it still loads as such;
        branches.safetensors and early_exit.json."""
        self.model.save_pretrained(folder)
        weights = {name: value.detach().contiguous() for name, value in self.branches.state_dict().items()}
        save_file(weights, Path(folder) / BRANCHES, metadata={"format": "pt"})
        settings = {name: getattr(self, name) for name in ("width", "heads", "speed", "strict", "own_head")}
        (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> EarlyExit:
        """One that was saved, in eval mode.

        Args:
            source: a folder, or a name on the Hub.
            options: of transformers' `from_pretrained`, such as `dtype`.

        Raises:
            ValueError: no early_exit.json there, or branches of other shapes.
        """
        if not saved_in(source):
            _checks.wrong_value("EarlyExit.from_pretrained", "source", f"a model with {SETTINGS}", source)
        settings = json.loads(Path(cached_file(source, SETTINGS)).read_text())
        own_head = settings.pop("own_head")
        model = (
            AutoModelForSequenceClassification.from_pretrained(source, **options)
            if own_head
            else encoder(source, **options)
        )
        made = cls(model, **settings)
        try:
            made.branches.load_state_dict(load_file(cached_file(source, BRANCHES)))
        except RuntimeError as error:
            what = " ".join(str(error).split())
            raise ValueError(
                f"EarlyExit.from_pretrained: source: expected branches as {SETTINGS} has them, got others: {what}"
            ) from None
        return made.eval()

    # ---- costs ----
    @torch.no_grad()
    def flops(self, length: int) -> list[int]:
        """Floating-point operations of a row of `length` tokens: first at speed 0, where no branch is asked, then of one
        that leaves after layer 1, 2, … All matrix products count, two for a multiplication with its addition.

        Raises:
            TypeError: length is no int.
        """
        from torch.utils.flop_counter import FlopCounterMode

        _checks.check_int("EarlyExit.flops", "length", length)
        ids = torch.zeros(1, length, dtype=torch.long, device=self.device)
        before = self.training
        self.eval()
        with sdpa_kernel(SDPBackend.MATH):  # as products, which are what is counted
            with FlopCounterMode(display=False) as plain:
                self(ids, speed=0.0)
            with FlopCounterMode(display=False) as counter:
                counting = _Counting(1, self.depth, None, self._branch, counter)
                self._last(counting.run(self.model, {"input_ids": ids}), None, None)
        self.train(before)
        return [plain.get_total_flops(), *counting.totals, counter.get_total_flops()]


class _Counting(AllBranches):
    """The operations up to each branch, this included."""

    def __init__(self, *of_pass: Any) -> None:
        *others, self.counter = of_pass
        super().__init__(*others)
        self.totals: list[int] = []

    def after(self, hidden: Tensor) -> Tensor:
        hidden = super().after(hidden)
        if self.number < self.depth:
            self.totals.append(self.counter.get_total_flops())
        return hidden


def encoder(source: str | Path, **options: Any) -> Any:
    """`AutoModel.from_pretrained` without the pooler, which no branch reads, and which not every file has."""
    config = AutoConfig.from_pretrained(source)
    kind = AutoModel._model_mapping[type(config)]
    if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        options["add_pooling_layer"] = False
    return AutoModel.from_pretrained(source, **options)


def saved_in(source: str | Path) -> bool:
    """Whether a folder, or a name on the Hub, holds an `EarlyExit`."""
    if Path(source).is_dir():
        return (Path(source) / SETTINGS).is_file()
    found = cached_file(
        source, SETTINGS, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return found is not None


def _check_model(model: Any) -> None:
    config = model.config
    # Layers of DeBERTa are given embeddings of distances, which have no rows of the batch.
    known = {name for name, of in reader.ADAPTERS.items() if of.cls_index == 0 and not of.causal} - {"deberta-v2"}
    if config.model_type not in known:
        expected = f"an encoder whose first token stands for a sequence, of {', '.join(sorted(known))}"
        _checks.wrong_value("EarlyExit", "model", expected, repr(config.model_type))
    if model.base_model is not model and not type(model).__name__.endswith("ForSequenceClassification"):
        _checks.wrong_value("EarlyExit", "model", "an encoder, or a classifier of sequences", type(model).__name__)
    if config.num_labels < 2:
        _checks.wrong_value("EarlyExit", "model", "two classes or more (num_labels of its config)", config.num_labels)


def _layers(model: Any, path: str | None) -> list[nn.Module]:
    """What runs once for every layer: of ALBERT, whose layers share weights, the groups of them."""
    groups = (
        model.base_model.encoder.albert_layer_groups if path is None else model.get_submodule(path.removesuffix("."))
    )
    return list(groups)


def _rows(inputs: dict[str, Any]) -> int:
    for x in inputs.values():
        if isinstance(x, Tensor) and x.dim() > 1:
            return len(x)
    return _checks.wrong_value(
        "EarlyExit", "inputs", "a batch such as input_ids [batch, length]", ", ".join(inputs) or "none"
    )


def _ordered(
    rows: int, left: list[tuple[Tensor, Tensor, Tensor, int]], logits: Tensor, alive: Tensor | None, depth: int
) -> EarlyExitOutput:
    """The answers of rows that left, and of those that reached the last layer, in the batch's order."""
    if alive is None:
        at = torch.full((rows,), depth, device=logits.device)
        return EarlyExitOutput(logits, at, uncertainty(logits))
    parts = [*left, (alive, logits, uncertainty(logits), depth)]
    order = torch.cat([numbers for numbers, *_ in parts]).argsort()
    at = torch.cat([torch.full_like(numbers, layer) for numbers, _, _, layer in parts])
    together = (torch.cat([part[i] for part in parts])[order] for i in (1, 2))  # type: ignore[misc]
    return EarlyExitOutput(next(together), at[order], next(together))
