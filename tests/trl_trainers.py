"""Small trainers of TRL: Llamas of a few layers, a tokenizer of words, prompts and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as hf
import trl
from datasets import Dataset
from language_models import PAD, VOCABULARY, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from trl.experimental import gkd

ROWS = [[f"w{(i * k + 3) % 300}" for k in range(1, 4 + i % 5)] for i in range(16)]


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "w0", "pad_token": f"w{PAD}", "eos_token": f"w{PAD}"}
    found = hf.PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    found.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return found


def settings(folder: Path) -> dict[str, Any]:
    # Plain gradient descent: Adam's steps have the sign of gradients that are nearly 0.
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 0.5,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def distillation_trainer(folder: Path, **more: Any) -> Any:
    args = trl.DistillationConfig(max_completion_length=6, **settings(folder), **more)
    rows = Dataset.from_dict({"prompt": [" ".join(words) for words in ROWS]})
    models: dict[str, Any] = {"model": llama(0, 2, tied=False), "teacher_model": llama(1, 3)}
    return trl.DistillationTrainer(
        **models, args=args, train_dataset=rows, eval_dataset=rows.select(range(4)), processing_class=tokenizer()
    )


def gkd_trainer(folder: Path, **more: Any) -> Any:
    args = gkd.GKDConfig(max_new_tokens=5, max_length=20, **settings(folder), **more)
    turns = [{"role": "user", "content": " ".join(words)} for words in ROWS]
    answers = [{"role": "assistant", "content": " ".join(words[::-1])} for words in ROWS]
    rows = Dataset.from_dict({"messages": [list(pair) for pair in zip(turns, answers, strict=True)]})
    models: dict[str, Any] = {"model": llama(0, 2, tied=False), "teacher_model": llama(1, 3)}
    return gkd.GKDTrainer(
        **models, args=args, train_dataset=rows, eval_dataset=rows.select(range(4)), processing_class=tokenizer()
    )


def run(trainer: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history, trainer.model.state_dict()
