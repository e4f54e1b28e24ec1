"""What a way of computing a loss is, and those of other libraries, which are imported when they are asked for."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# The loss, and the gradients of the student's tensors, or of pieces of these in their order.
Made = tuple[Tensor, Sequence[Tensor]]
Call = Callable[[], Made]


@dataclass(frozen=True)
class Inputs:
    """student, teacher: logits [N, V]; or hidden states [N, H] and output embeddings [V, H]. labels: [N], all of which
    count. The student's tensors require gradients."""

    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]
    labels: Tensor


Way = Callable[[Inputs], Call]
# By the name of a comparison and that of the way.
Ways = dict[str, dict[str, Way]]


def way(loss: Callable[[Inputs], Tensor]) -> Way:
    """Through autograd."""

    def prepared(inputs: Inputs) -> Call:
        def call() -> Made:
            value = loss(inputs)
            return value.detach(), torch.autograd.grad(value, inputs.student)

        return call

    return prepared


def of_logits(loss: Callable[..., Tensor]) -> Way:
    return way(lambda inputs: loss(*inputs.student, *inputs.teacher))


LIGER_COMPILED = "liger-kernel, compiled"  # its default


def _liger(device: str) -> Ways:
    """On a CPU its chunked loss alone: the others are Triton's."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def jsd_and_labels(**settings: Any) -> Way:
        loss = LigerFusedLinearJSDLoss(**settings)
        return way(lambda inputs: loss(*inputs.student, *inputs.teacher, inputs.labels))

    chunked = {LIGER_COMPILED: jsd_and_labels(), "liger-kernel, eager": jsd_and_labels(compiled=False)}
    found: Ways = {"linear_js_div_labels": chunked}
    if device == "cpu":
        return found
    from liger_kernel.transformers import (
        LigerFusedLinearCrossEntropyLoss,
        LigerFusedLinearJSD,
        LigerJSD,
        LigerKLDIVLoss,
    )

    kl, jsd, fused, labels = (
        *(LigerKLDIVLoss(reduction="batchmean"), LigerJSD(beta=0.5)),
        *(LigerFusedLinearJSD(jsd_beta=0.5), LigerFusedLinearCrossEntropyLoss()),
    )
    losses: dict[str, Way] = {
        "kl_div": of_logits(lambda s, t: kl(s.log_softmax(-1), t.softmax(-1))),
        "js_div": of_logits(lambda s, t: jsd(s.log_softmax(-1), t.log_softmax(-1))),
        "linear_js_div": way(lambda inputs: fused(*inputs.student, *inputs.teacher, inputs.labels)),
        "linear_cross_entropy": way(lambda inputs: labels(inputs.student[1], inputs.student[0], inputs.labels)),
    }
    return found | {name: {"liger-kernel": loss} for name, loss in losses.items()}


def _trl(device: str) -> Ways:
    """The loss of its DistillationTrainer (Triton on a GPU, tiles on a CPU), which makes the student's entropy too, and
    that of its GKDTrainer."""
    from trl.experimental.gkd import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def chunked(inputs: Inputs) -> Tensor:
        (hidden, weight), (t_hidden, t_weight) = inputs.student, inputs.teacher
        counted = torch.ones_like(inputs.labels)[None]
        loss: Tensor = _chunked_divergence_loss(hidden[None], t_hidden[None], weight, t_weight, counted, 0.5)[0]
        return loss

    def gkd(beta: float) -> Way:
        return of_logits(
            lambda s, t: GKDTrainer.generalized_jsd_loss(s[None], t[None], beta=beta, num_items_in_batch=len(s))
        )

    return {
        "kl_div": {"TRL, GKD": gkd(0.0)},
        "reverse_kl_div": {"TRL, GKD": gkd(1.0)},
        "js_div": {"TRL, GKD": gkd(0.5)},
        "linear_js_div": {"TRL": way(chunked)},
    }


def _torchtune(device: str) -> Ways:
    losses = _file_of("torchtune", "modules/loss/kd_losses.py")

    def whole(loss: Callable[..., Tensor]) -> Way:
        return way(lambda inputs: loss(*inputs.student, *inputs.teacher, inputs.labels))

    def chunked(loss: Callable[..., Tensor], chunks: int = 8) -> Way:
        """Its models return their logits in pieces, so these are the tensors that get gradients."""

        def prepared(inputs: Inputs) -> Call:
            s, t = ([piece[None] for piece in x[0].detach().chunk(chunks)] for x in (inputs.student, inputs.teacher))
            s = [piece.requires_grad_() for piece in s]

            def call() -> Made:
                value = loss(s, t, inputs.labels[None])
                return value.detach(), torch.autograd.grad(value, s)

            return call

        return prepared

    return {
        "soft_cross_entropy": {
            "torchtune": whole(losses.ForwardKLLoss()),
            "torchtune, 8 chunks": chunked(losses.ForwardKLWithChunkedOutputLoss()),
        },
        "reverse_kl_div": {
            "torchtune": whole(losses.ReverseKLLoss()),
            "torchtune, 8 chunks": chunked(losses.ReverseKLWithChunkedOutputLoss()),
        },
    }


def _file_of(package: str, file: str) -> ModuleType:
    """A file that needs torch alone, of a package whose own `__init__` needs much more."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"No module named {package!r}")
    path = Path(spec.submodule_search_locations[0], file)
    of_file = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    if of_file is None or of_file.loader is None or not path.exists():
        raise ImportError(f"{package} has no {file}")
    module = importlib.util.module_from_spec(of_file)
    of_file.loader.exec_module(module)
    return module


# What each of them computes on a device, by the name that its package is installed by.
LIBRARIES: dict[str, Callable[[str], Ways]] = {"liger-kernel": _liger, "trl": _trl, "torchtune": _torchtune}


@dataclass(frozen=True)
class Found:
    """The ways of the libraries that are there, their versions, and why the others are not."""

    ways: Ways
    versions: dict[str, str]
    missing: dict[str, str]


def find(names: Sequence[str], device: str) -> Found:
    ways: Ways = {}
    versions, missing = {}, {}
    for name in names:
        try:
            with warnings.catch_warnings():  # TRL's, of what is experimental
                warnings.simplefilter("ignore")
                theirs = LIBRARIES[name](device)
            versions[name] = metadata.version(name)
        except ImportError as error:
            missing[name] = str(error).splitlines()[0]
            continue
        for comparison, more in theirs.items():
            ways[comparison] = ways.get(comparison, {}) | more
    return Found(ways, versions, missing)
