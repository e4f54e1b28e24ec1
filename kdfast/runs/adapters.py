"""Students of which adapters (LoRA) alone are trained; `kdfast.runs.stages.train_stage` merges them in the end."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from typing import Any

import transformers


def check_adapters(rank: int | None) -> None:
    """That adapters of a rank can be made; None is of a student that is trained as a whole.

    Raises:
        ValueError: peft is not installed.
    """
    if rank is not None and find_spec("peft") is None:
        raise ValueError(f"lora: expected peft to be installed, got none for rank {rank}; pip install peft")


def with_adapters(start: Any, rank: int | None, seed: int, task: str) -> Any:
    """A copy of a student's start to be trained, with adapters of all linear maps but the output where there is a rank.

    Args:
        seed: for the adapters' first factors.
        task: peft's name of what the model does.
    """
    student = copy.deepcopy(start)
    if rank is None:
        return student
    import peft

    transformers.set_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)
    with warnings.catch_warnings():  # that peft calls a property of transformers by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(student, config)
