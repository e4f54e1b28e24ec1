"""What every operator refuses, in one voice: `operator: argument: expected …, got …`, before any memory is touched."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum", "batchmean")
TOPK = ("teacher_topk_logprobs", "teacher_topk_indices")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wrong_value(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def wrong_type(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"{op}: {argument}: expected {expected}, got {got}")


def shown(x: object) -> str:
    """A name that came: in quotes; what is no string by its kind, lest a tensor fill the message."""
    return repr(x) if isinstance(x, str) else kind(x)


def kind(x: object) -> str:
    """How an error names what came: a tensor by dtype, others by class."""
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def check_float(op: str, argument: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        wrong_type(op, argument, "float32, bfloat16, float16 or float64", x.dtype)
    if x.dtype == torch.float64 and x.device.type != "cpu":
        wrong_type(op, argument, "float32, bfloat16 or float16 (float64 only on the CPU)", x.dtype)


def check_logits(op: str, student: Tensor, teacher: Tensor) -> None:
    """Checks a pair of logits `[..., V]`, but for their widths."""
    for argument, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            wrong_type(op, argument, "a tensor", kind(logits))
        check_float(op, argument, logits)
        if logits.dim() == 0:
            wrong_value(op, argument, "at least one dimension, the vocabulary last", "a scalar")
    if student.device != teacher.device:
        wrong_value(op, "teacher_logits", f"the student's device {student.device}", teacher.device)
    if student.shape[:-1] != teacher.shape[:-1]:
        wrong_value(
            op, "teacher_logits", f"the student's leading dimensions {list(student.shape[:-1])}", list(teacher.shape)
        )


def check_vocab_size(op: str, student: Tensor, teacher: Tensor, vocab_size: int | None) -> int:
    """How many columns of a pair of logits count."""
    widths = student.shape[-1], teacher.shape[-1]
    if vocab_size is None:
        if widths[0] != widths[1]:
            wrong_value(
                op,
                "teacher_logits",
                f"the student's width {widths[0]} (for padded vocabularies pass vocab_size=, the columns that count)",
                widths[1],
            )
        return widths[0]
    check_int(op, "vocab_size", vocab_size)
    if not 1 <= vocab_size <= min(widths):
        wrong_value(op, "vocab_size", f"1 to {min(widths)} for widths {widths[0]} and {widths[1]}", vocab_size)
    return vocab_size


def check_int(op: str, argument: str, x: object) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        wrong_type(op, argument, "an int", kind(x))


def check_bools(op: str, **given: object) -> None:
    for argument, x in given.items():
        if not isinstance(x, bool):
            wrong_type(op, argument, "True or False", shown(x))


def check_fraction(op: str, argument: str, x: float, below_one: bool = False) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        wrong_type(op, argument, "a number", kind(x))
    if not 0 <= x <= 1 or (below_one and x == 1):
        wrong_value(op, argument, "a number from 0 to 1" + (", 1 excluded" if below_one else ""), x)


def check_topk_tensors(op: str, *given: object) -> None:
    """Log-probabilities and indices: without one of them there is no top-k."""
    for argument, x in zip(TOPK, given, strict=True):
        if not isinstance(x, Tensor):
            wrong_type(op, argument, "a tensor", kind(x))


def check_topk(op: str, student: Tensor, log_probabilities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """A teacher's top-k, in the dtypes of the raw operator."""
    values, at = TOPK
    for argument, x in ((values, log_probabilities), (at, indices)):
        if x.device != student.device:
            wrong_value(op, argument, f"the student's device {student.device}", x.device)
        if x.dim() != student.dim() or x.shape[:-1] != student.shape[:-1]:
            expected = f"the student's leading dimensions {list(student.shape[:-1])} and k"
            wrong_value(op, argument, expected, list(x.shape))
    if log_probabilities.dtype not in FLOATS:
        wrong_type(op, values, "float32, bfloat16, float16 or float64", log_probabilities.dtype)
    if indices.dtype not in (torch.int64, torch.int32):
        wrong_type(op, at, "int64 or int32", indices.dtype)
    if indices.shape != log_probabilities.shape:
        wrong_value(op, at, f"the log-probabilities' shape {list(log_probabilities.shape)}", list(indices.shape))
    return log_probabilities.detach().to(loss_dtype(student)), indices.long()


def check_topk_values(
    op: str, log_probabilities: Tensor, indices: Tensor, mask: Tensor | None, vocabulary: int
) -> None:
    """Values of CPU tensors, of rows that count and columns that are there (not -inf); a device would wait."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or not indices.numel():
        return
    counted = True if mask is None else mask[..., None]
    least, most = indices.aminmax()
    if least < 0 or most >= vocabulary:
        wrong = ((indices < 0) | (indices >= vocabulary)) & (log_probabilities > -torch.inf) & counted
        if wrong.any():
            wrong_value(op, TOPK[1], f"0 to {vocabulary - 1}", indices[wrong][0].item())
    if log_probabilities.max() > 1e-2:
        wrong = (log_probabilities > 1e-2) & counted
        if wrong.any():
            got = f"a maximum of {log_probabilities[wrong].max()}"
            wrong_value(op, TOPK[0], "logarithms of probabilities, at most 0", got)


def check_topk_repeats(op: str, loss: Tensor, log_probabilities: Tensor, indices: Tensor, mask: Tensor | None) -> None:
    """Refuses a column that comes twice in a row, once it has made the loss NaN: to sort all rows before would cost."""
    if loss.device.type != "cpu" or torch.compiler.is_compiling() or not loss.isnan().any():
        return
    none = torch.arange(-indices.shape[-1], 0)  # as many as there are, none of them a column
    columns = torch.where(log_probabilities > -torch.inf, indices, none).sort(-1).values
    twice = columns[..., 1:] == columns[..., :-1]
    if mask is not None:
        twice &= mask[..., None]
    if twice.any():
        place = twice.nonzero()[0].tolist()
        expected = "a column once in a row (-inf as the log-probability where a row has fewer)"
        wrong_value(op, TOPK[1], expected, f"column {columns[tuple(place)]} twice in row {place[:-1]}")


def check_labels(
    op: str, labels: Tensor, mask: Tensor | None, logits: Tensor, vocabulary: int, ignore_index: int
) -> Tensor | None:
    """The rows that count, of class indices for every row: those of the mask; without one all that have a label (None:
    every row). Values of CPU tensors are checked; on a device, where that would wait, a row with a label that is not in
    the vocabulary gives NaN."""
    if not isinstance(labels, Tensor):
        wrong_type(op, "labels", "a tensor", kind(labels))
    if labels.dtype != torch.int64:
        wrong_type(op, "labels", "an int64 tensor of class indices", labels.dtype)
    if labels.device != logits.device:
        wrong_value(op, "labels", f"the logits' device {logits.device}", labels.device)
    if labels.shape != logits.shape[:-1]:
        wrong_value(op, "labels", f"the logits' leading dimensions {list(logits.shape[:-1])}", list(labels.shape))
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
        return labels != ignore_index if mask is None else mask
    least, most = (int(x) for x in labels.aminmax())  # where nothing is ignored one pass tells
    if mask is None and least <= ignore_index <= most:
        mask = labels != ignore_index
    if least < 0 or most >= vocabulary:
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
        if mask is not None:
            wrong &= mask
        if bool(wrong.any()):
            wrong_value(op, "labels", f"0 to {vocabulary - 1}, or ignore_index {ignore_index}", labels[wrong][0].item())
    return mask


def check_reduction(op: str, reduction: str, logits: Tensor) -> None:
    if reduction not in REDUCTIONS:
        wrong_value(op, "reduction", "'none', 'mean', 'sum' or 'batchmean'", shown(reduction))
    if reduction == "batchmean" and logits.dim() < 2:
        wrong_value(op, "reduction", "logits with a batch dimension for 'batchmean'", f"shape {list(logits.shape)}")


def check_rows(op: str, argument: str, x: Tensor | None, logits: Tensor) -> Tensor | None:
    """Expands a value per row to the logits' leading dimensions."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        wrong_type(op, argument, "a tensor", kind(x))
    if argument == "mask":
        if x.dtype != torch.bool:
            wrong_type(op, argument, "a bool tensor, True where a row counts (attention_mask.bool())", x.dtype)
    elif not x.dtype.is_floating_point:
        wrong_type(op, argument, "a floating-point tensor", x.dtype)
    elif x.requires_grad:
        wrong_value(
            op, argument, "a tensor without gradient (it is not differentiated; detach it)", "requires_grad=True"
        )
    if x.device != logits.device:
        wrong_value(op, argument, f"the logits' device {logits.device}", x.device)
    leading = logits.shape[:-1]
    if argument != "mask":
        x = x.to(loss_dtype(logits))
    if x.shape == leading:
        return x
    if x.dim() > len(leading) or any(
        a != 1 and a != b for a, b in zip(reversed(x.shape), reversed(leading), strict=False)
    ):
        per_first = " (for a value per sequence pass shape [B, 1])" if x.dim() < len(leading) else ""
        wrong_value(
            op, argument, f"a shape that broadcasts to the leading dimensions {list(leading)}{per_first}", list(x.shape)
        )
    return x.expand(leading)


def check_temperature(op: str, temperature: float | Tensor, logits: Tensor) -> tuple[float, Tensor | None]:
    """A number, or a value per row. Values in CPU tensors are checked, those on a device are not (it would wait)."""
    if isinstance(temperature, Tensor):
        rows = check_rows(op, "temperature", temperature, logits)
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((temperature > 0).all()):
            wrong_value(op, "temperature", "values > 0", f"a minimum of {temperature.min().item()}")
        return 1.0, rows
    check_temperature_number(op, temperature, "a number or a tensor")
    return float(temperature), None


def check_temperature_number(op: str, temperature: object, expected: str = "a number") -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        wrong_type(op, "temperature", expected, kind(temperature))
    if not 0 < temperature < float("inf"):
        wrong_value(op, "temperature", "a finite number > 0", temperature)


def check_num_items(op: str, num_items: float | Tensor | None, reduction: str, logits: Tensor) -> float | Tensor | None:
    """The denominator of `mean` when given: a number, or one in a tensor on the device."""
    if num_items is None:
        return None
    if reduction != "mean":
        wrong_value(op, "num_items", "reduction='mean' with it", f"reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            wrong_value(op, "num_items", "one number", f"shape {list(num_items.shape)}")
        if num_items.device != logits.device:
            wrong_value(op, "num_items", f"the logits' device {logits.device}", num_items.device)
        return num_items.detach().to(loss_dtype(logits))
    if isinstance(num_items, bool) or not isinstance(num_items, (int, float, torch.SymInt)):
        wrong_type(op, "num_items", "a number or a tensor of one", kind(num_items))
    if not num_items > 0:
        wrong_value(op, "num_items", "a number > 0", num_items)
    return num_items


def loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; of `meta` there is none."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
