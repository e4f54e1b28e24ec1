"""Two processes on gloo train a language model to what one makes of both batches: DDP in the trainer, FSDP2 in a plain loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from language_models import ARGUMENTS, PAD, RATE, completion_rows, llama, losses, plain_loop, same
from peft import LoraConfig, get_peft_model
from ranks import spawn
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

import kdfast
from kdfast.data import text
from kdfast.objective import LanguageModel

RANKS, STEPS, BATCH = 2, 6, 2
OBJECTIVE = LanguageModel(alpha=0.7, temperature=2.0)


def batch(step: int, rank: int) -> dict[str, Tensor]:
    begin = (step * RANKS + rank) * BATCH
    return text.Collator(PAD)(completion_rows(begin + BATCH)[begin:])


def expected_of(student: Any, teacher: Any) -> list[float]:
    steps = ([batch(step, rank) for rank in range(RANKS)] for step in range(STEPS))
    return plain_loop(student, teacher, steps, OBJECTIVE)


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)).eval()


def check_ddp(rank: int, tied: bool, folder: Path) -> None:
    """The Trainer looks for unused parameters by default: the output embeddings must not count as such."""
    train(llama(1, 2, tied), llama(0, 3, tied), folder)


def check_ddp_of_adapters(rank: int, tied: bool, folder: Path) -> None:
    """Adapters of the output embeddings too, whose logits are made in chunks."""
    train(adapted(llama(1, 2, tied)), llama(0, 3, tied), folder)


def train(student: Any, teacher: Any, folder: Path) -> None:
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
        student, teacher = (shard(model, options, head) for model in (llama(1, 2, tied), llama(0, 3, tied)))
        follow(rank, name, student, teacher, one, llama(0, 3, tied))


def check_fsdp2_of_adapters(rank: int, tied: bool, folder: Path) -> None:
    """Their parameters are needed after the forward: whole in the root, or it is refused."""
    student, one = (adapted(llama(1, 2, tied)).base_model.model for _ in range(2))
    follow(rank, "root", shard(student, {}, False), shard(llama(0, 3, tied), {}, False), one, llama(0, 3, tied))
    student = shard(adapted(llama(1, 2, tied)).base_model.model, {"reshard_after_forward": True}, False)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM: expected output embeddings that are a plain nn\.Linear where "
    ):
        OBJECTIVE.run(student, batch(0, rank))


def follow(rank: int, name: str, student: Any, teacher: Any, one: Any, of_one: Any) -> None:
    expected = expected_of(one, of_one)
    assert all(isinstance(p, DTensor) for model in (student, teacher) for p in model.parameters())
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=1e-4, weight_decay=0.0)
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
        assert all(isinstance(p.grad, DTensor) for p in trained), name
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total.item() / RANKS, expected[step], rtol=0, atol=1e-5)
    for parameter, whole in zip(student.parameters(), one.parameters(), strict=True):
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.full_tensor(), whole, rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}")


def check_heads(rank: int, check: Any, folder: Path) -> None:
    for tied in (True, False):
        check(rank, tied, folder)


@pytest.mark.parametrize(
    "check",
    [check_ddp, check_ddp_of_adapters, check_fsdp2, check_fsdp2_of_adapters],
    ids=["ddp", "ddp of adapters", "fsdp2", "fsdp2 of adapters"],
)
def test_two_processes_agree_with_one(check: Any, tmp_path: Path) -> None:
    spawn(check_heads, RANKS, tmp_path, check, tmp_path)
