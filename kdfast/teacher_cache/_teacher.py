"""One batch of rows through the teacher, and what is kept of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data.text import OFF, as_list
from kdfast.teacher_cache._identity import token_ids
from kdfast.teacher_cache._manifest import Settings, mismatch

# Logits that are worked on at a time: about what the processor caches (twice as fast as 128 MB at a width of 32,000),
# and on a GPU enough rows for the matrix product; 16 and 256 MB in float32.
SLICE, GPU_SLICE = 1 << 22, 1 << 26
COLUMNS = ("attention_mask", "token_type_ids", "labels", "completion_mask")


@dataclass(frozen=True)
class Row:
    """A row of the dataset: what the model is given, and the positions [n] of which outputs per token are stored."""

    number: int
    input_ids: list[int]
    attention_mask: list[int]
    token_type_ids: list[int] | None
    kept: list[int]

    @classmethod
    def of(cls, row: Any, number: int, positions: str) -> Row:
        """Checks and converts one.

        Raises:
            CacheError: input_ids or labels are missing, or not lists of one length.
        """
        ids = token_ids(row, number)
        columns = {name: as_list(row[name]) for name in COLUMNS if name in row}
        labelled = "labels" if "labels" in columns else "completion_mask"
        needed = ["attention_mask", "token_type_ids"] + ([] if positions == "all" else [labelled])
        for name in needed:
            found = columns.get(name)
            if found is not None and (not isinstance(found, list) or len(found) != len(ids)):
                raise mismatch(
                    "rows", f"{len(ids)} {name} in row {number}", len(found) if isinstance(found, list) else found
                )
        mask = columns.get("attention_mask") or [1] * len(ids)
        if not any(mask):
            raise mismatch("rows", f"a token in row {number}", "none")
        kept = [place for place, real in enumerate(mask) if real]
        if positions != "all":
            if labelled not in columns:
                raise mismatch(
                    "rows", f"labels or completion_mask in row {number}, for positions={positions!r}", list(row)
                )
            ignored = OFF if labelled == "labels" else 0
            ahead = 1 if positions == "next_labels" else 0
            counted = [label != ignored for label in columns[labelled][ahead:]] + [False] * ahead
            kept = [place for place in kept if counted[place]]
        return cls(number, ids, mask, columns.get("token_type_ids"), kept)


class Teacher:
    """The model, run on lists of rows. Puts it into eval mode, and moves it if a device is given."""

    def __init__(self, model: nn.Module, settings: Settings, tokenizer: Any, device: torch.device | str | None) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise mismatch("model", "an encoder or a decoder", f"{type(model).__name__}, which is both")
        self.model = model.eval() if device is None else model.eval().to(device)
        self.settings = settings
        self.pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        # XLNet's classifier reads the last token, whatever that is.
        self.left = getattr(getattr(model, "config", None), "model_type", "") == "xlnet"
        self.device = next(iter(model.parameters())).device
        self.head = self._plain_head() if settings.outputs == ("topk",) else None
        self.vocab_size: int | None = None

    @torch.inference_mode()
    def _plain_head(self) -> Any:
        """The model's output embeddings, where its logits are theirs of the last hidden state, bit for bit.

        They can then be made for the kept tokens alone, a slice at a time. A head with a transform before it or a
        softcap behind does not pass, and the model's own logits are used.
        """
        model: Any = self.model
        head = getattr(model, "get_output_embeddings", lambda: None)()
        base = getattr(model, "base_model", model)
        if head is None or base is model:
            return None
        ids = torch.arange(16, device=self.device)[None] % model.get_input_embeddings().weight.shape[0]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        hidden = getattr(_call(base, inputs), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
            return None
        return head if torch.equal(head(hidden), _call(model, inputs).logits) else None

    @torch.inference_mode()
    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """What is stored of these rows, tokens one after another, on the CPU.

        Raises:
            CacheError: the model does not give what `outputs` asks for, or NaN, or what the dtype cannot hold.
        """
        inputs, kept = self._batch(rows)
        wanted = self.settings.outputs
        if self.head is not None:
            base: Any = self.model.base_model
            hidden = _call(base, inputs).last_hidden_state.flatten(0, 1)
            stored = self._topk(hidden, self.head, self.head.weight.shape[0], kept)
        else:
            answer = _call(
                self.model, inputs, **({"output_hidden_states": True} if {"cls", "hidden"} & {*wanted} else {})
            )
            stored = {}
            if "topk" in wanted:
                logits = self._logits(answer, "topk", "[batch, length, vocabulary]", inputs["input_ids"].shape)
                stored = self._topk(logits.flatten(0, 1), lambda part: part, logits.shape[-1], kept)
            if "logits" in wanted:
                stored["logits"] = self._logits(answer, "logits", "[batch, classes]", inputs["input_ids"].shape[:1])
            if {"cls", "hidden"} & {*wanted}:
                stored |= self._hidden(answer, inputs["attention_mask"], kept)
        return {name: self._cast(name, value, rows) for name, value in stored.items()}

    def _batch(self, rows: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs [B, L], padded on one side, and the places [n] of the kept tokens in a flattened [B·L]."""
        length = max(len(row.input_ids) for row in rows)
        starts = [number * length + (length - len(row.input_ids)) * self.left for number, row in enumerate(rows)]

        def padded(lists: list[list[int]], fill: int) -> Tensor:
            fills = [[fill] * (length - len(one)) for one in lists]
            whole = [more + one if self.left else one + more for one, more in zip(lists, fills, strict=True)]
            return torch.tensor(whole, device=self.device)

        inputs = {
            "input_ids": padded([row.input_ids for row in rows], self.pad_id),
            "attention_mask": padded([row.attention_mask for row in rows], 0),
        }
        types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
        if len(types) == len(rows):
            inputs["token_type_ids"] = padded(types, 0)
        places = [start + place for start, row in zip(starts, rows, strict=True) for place in row.kept]
        return inputs, torch.tensor(places, dtype=torch.long, device=self.device)

    def _logits(self, answer: Any, output: str, form: str, leading: torch.Size) -> Tensor:
        logits = getattr(answer, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != len(leading) + 1 or logits.shape[:-1] != leading:
            got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else "none"
            raise mismatch("model", f"logits {form} for output {output!r} of {type(self.model).__name__}", got)
        return logits

    def _topk(self, values: Tensor, head: Any, vocabulary: int, kept: Tensor) -> dict[str, Tensor]:
        """Log-probabilities [n, k] at the temperature, falling, and their indices, of head(values[kept])."""
        k, temperature = self.settings.k or 0, self.settings.temperature or 1.0
        if k > vocabulary:
            raise mismatch("k", f"at most {vocabulary}, the width of the teacher's logits", k)
        self.vocab_size = vocabulary
        logprobs = torch.empty(len(kept), k, device=values.device)
        indices = torch.empty(len(kept), k, dtype=torch.int32, device=values.device)
        step = max(1, (SLICE if values.device.type == "cpu" else GPU_SLICE) // vocabulary)
        for start in range(0, len(kept), step):
            scaled = head(values[kept[start : start + step]]).float() / temperature
            top = scaled.topk(k)
            logprobs[start : start + step] = top.values - scaled.logsumexp(-1, keepdim=True)
            indices[start : start + step] = top.indices
        return {"topk_logprobs": logprobs, "topk_indices": indices}

    def _hidden(self, answer: Any, attention_mask: Tensor, kept: Tensor) -> dict[str, Tensor]:
        states = getattr(answer, "hidden_states", None)
        if states is None:
            raise mismatch(
                "model", "hidden_states for outputs 'hidden' and 'cls'", f"none of {type(self.model).__name__}"
            )
        if any(layer not in range(len(states)) for layer in self.settings.layers):
            raise mismatch("layers", f"numbers from 0 to {len(states) - 1}", list(self.settings.layers))
        stored: dict[str, Tensor] = {}
        if "hidden" in self.settings.outputs:
            stored |= {f"hidden_{layer}": states[layer].flatten(0, 1)[kept] for layer in self.settings.layers}
        if "cls" in self.settings.outputs:
            first = attention_mask.argmax(1)  # 0, but where a row brings padding on the left
            rows = torch.arange(len(first), device=first.device)
            of_layers = {f"cls_{layer}": states[layer] for layer in self.settings.layers} or {"cls": states[-1]}
            stored |= {name: state[rows, first] for name, state in of_layers.items()}
        return stored

    def _cast(self, name: str, value: Tensor, rows: list[Row]) -> Tensor:
        if not value.is_floating_point():
            return value.cpu()
        value = value.to(getattr(torch, self.settings.dtype)).cpu()
        # A log-probability is -inf where the teacher rules a token out.
        wrong = value.isnan() | (value.isposinf() if name == "topk_logprobs" else value.isinf())
        if wrong.any():
            where = f"{name} of rows {rows[0].number} to {rows[-1].number}"
            raise mismatch("model", f"outputs that {self.settings.dtype} can hold", f"NaN or infinity in {where}")
        return value


def _call(module: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    if "use_cache" in inspect.signature(module.forward).parameters:
        options["use_cache"] = False  # keys and values for tokens that nobody will ask for
    return module(**inputs, **options)
