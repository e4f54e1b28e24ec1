"""Small Llamas, rows with prompts, and distillation of language models in plain torch, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kdfast.data import text
from kdfast.objective import LanguageModel

VOCABULARY, PAD = 301, 2
RATE = 1e-3


def llama(seed: int, layers: int, tied: bool = True) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # logits far enough apart
        eos_token_id=PAD,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


def completion_rows(count: int) -> list[text.Row]:
    """Prompts and completions of unequal lengths."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (6 + 5 * i % 9,), generator=generator).tolist()
        rows.append(text.with_prompt(ids[: 2 + i % 3], ids[2 + i % 3 :], 64))
    return rows


def divergence(student: Tensor, teacher: Tensor, name: str, beta: float) -> Tensor:
    """The divergences of logits at temperature 1, per row, from torch's own functions."""
    log_s, log_t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    if name == "kl_div":
        return kl(log_t, log_s)
    if name == "reverse_kl_div":
        return kl(log_s, log_t)
    log_m = torch.logaddexp(log_t + torch.tensor(beta).log(), log_s + torch.tensor(1 - beta).log())
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def check_per_token(
    found: dict[str, Any], models: dict[str, Any], plain: Callable[[Any, Any], Tensor], rel: float, abs: float
) -> None:
    """What runs measure of models, against a loss in plain torch of a model and an objective; `rel`, `abs`: of the KL."""
    for name, model in models.items():
        hard, soft = (plain(model, LanguageModel(alpha=alpha, temperature=1.0)).item() for alpha in (0.0, 1.0))
        assert found[name]["perplexity"] == pytest.approx(torch.tensor(hard).exp().item(), rel=1e-5)
        assert found[name]["kl_to_teacher"] == pytest.approx(soft, rel=rel, abs=abs)


def plain_loss(student: Any, teacher: Any, batch: dict[str, Tensor], objective: Any) -> Tensor:
    """The loss of `kdfast.objective.LanguageModel` from all logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1]
    s = student(**inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    on, temperature = labels != -100, objective.temperature
    soft = divergence(s[on] / temperature, t[on] / temperature, objective.divergence, objective.beta).mean()
    hard = F.cross_entropy(s.flatten(0, 1), labels.flatten())
    return objective.alpha * temperature**2 * soft + (1 - objective.alpha) * hard


def plain_loop(student: Any, teacher: Any, steps: Iterable[list[dict[str, Tensor]]], objective: Any) -> list[float]:
    """The Trainer's defaults (AdamW, clipping at 1) with a constant rate; a step's batches count as one."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, eps=1e-4, weight_decay=0.0)
    losses = []
    for batches in steps:
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        means = [plain_loss(student, teacher, batch, objective) for batch in batches]
        loss = sum((n * mean for n, mean in zip(counts, means, strict=True)), torch.zeros(())) / sum(counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "num_train_epochs": 1,
    "learning_rate": RATE,
    "adam_epsilon": 1e-4,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def losses(trainer: Any) -> list[float]:
    return [event["loss"] for event in trainer.state.log_history if "loss" in event]


def same(first: Any, second: Any, tolerance: float) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
