"""Two processes on gloo train a language model to what one makes of both batches: DDP in the trainer, FSDP2 in a plain loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from language_models import ARGUMENTS, PAD, RATE, completion_rows, llama, losses, plain_loop, same
from ranks import spawn
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

import kdfast
from kdfast import text
from kdfast.objective import LanguageModel

RANKS, STEPS, BATCH = 2, 6, 2
OBJECTIVE = LanguageModel(alpha=0.7, temperature=2.0)


def batch(step: int, rank: int) -> dict[str, Tensor]:
    begin = (step * RANKS + rank) * BATCH
    return text.Collator(PAD)(completion_rows(begin + BATCH)[begin:])


def expected_of(student: Any, teacher: Any) -> list[float]:
    steps = ([batch(step, rank) for rank in range(RANKS)] for step in range(STEPS))
    return plain_loop(student, teacher, steps, OBJECTIVE)


def check_ddp(rank: int, tied: bool, folder: Path) -> None:
    """The Trainer looks for unused parameters by default: the output embeddings must not count as such."""
    teacher, student = llama(0, 3, tied), llama(1, 2, tied)
    one = copy.deepcopy(student)
    trainer = kdfast.DistillationTrainer(
        student,
        TrainingArguments(
            output_dir=str(folder / "run"), per_device_train_batch_size=BATCH, ddp_backend="gloo", **ARGUMENTS
        ),
        teacher=teacher,
        objective=OBJECTIVE,
        train_dataset=completion_rows(STEPS * RANKS * BATCH),
        data_collator=text.Collator(PAD),
    )
    trainer.train()
    assert trainer.args.world_size == RANKS
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    expected = expected_of(one, teacher)
    torch.testing.assert_close(losses(trainer), expected, rtol=0, atol=1e-5)
    same(student, one, 1e-5)


# Where the output embeddings are after the forward: whole in the root; sharded again with the root; in a group of their own.
WRAPPINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "root": ({}, False),
    "root sharded again": ({"reshard_after_forward": True}, False),
    "norm and head": ({}, True),
}


def shard(model: Any, options: dict[str, Any], head: bool) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head:
        fully_shard([model.model.norm, model.lm_head], **options)
    return fully_shard(model, **options)


def check_fsdp2(rank: int, tied: bool, folder: Path) -> None:
    for name, (options, head) in WRAPPINGS.items():
        if head and tied:  # FSDP2 does not split what is tied
            continue
        one = llama(1, 2, tied)
        expected = expected_of(one, llama(0, 3, tied))
        student, teacher = (shard(model, options, head) for model in (llama(1, 2, tied), llama(0, 3, tied)))
        assert all(isinstance(p, DTensor) for model in (student, teacher) for p in model.parameters())
        optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, eps=1e-4, weight_decay=0.0)
        for step in range(STEPS):
            inputs: dict[str, Any] = batch(step, rank)
            counted = OBJECTIVE.num_items(inputs).float()
            dist.all_reduce(counted)
            inputs["num_items"] = counted / RANKS
            with torch.no_grad():
                of_teacher = OBJECTIVE.run(teacher, inputs)
            loss = sum(OBJECTIVE(OBJECTIVE.run(student, inputs), of_teacher, inputs).values())
            loss.backward()
            assert all(isinstance(p, DTensor) for p in student.parameters())
            assert all(isinstance(p.grad, DTensor) for p in student.parameters()), name
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total.item() / RANKS, expected[step], rtol=0, atol=1e-5)
        for parameter, whole in zip(student.parameters(), one.parameters(), strict=True):
            assert isinstance(parameter, DTensor)
            torch.testing.assert_close(
                parameter.full_tensor(), whole, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def check_heads(rank: int, check: Any, folder: Path) -> None:
    for tied in (True, False):
        check(rank, tied, folder)


@pytest.mark.parametrize("check", [check_ddp, check_fsdp2], ids=["ddp", "fsdp2"])
def test_two_processes_agree_with_one(check: Any, tmp_path: Path) -> None:
    spawn(check_heads, RANKS, tmp_path, check, tmp_path)
