"""On-policy distillation: the student is trained on completions of its own, which the teacher scores (GKD)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from kdfast.data.text import OFF, padded
from kdfast.train.trainer import DistillationTrainer


class OnPolicyTrainer(DistillationTrainer):
    """Generalized knowledge distillation (Agarwal et al., 2024, arXiv:2306.13649, algorithm 1).

    With probability `on_policy` a batch's completions are replaced by samples of the student, from its whole
    distribution at temperature 1, before student and teacher are run on it; no gradient goes through the sampling.
    Whether and what is sampled depends on the weights, the batch, the seed, the step, the micro-batch and the process
    alone, so that a resumed run repeats what the uninterrupted one would have done. The labels of a batch tell prompts
    (-100) from completions; where completions are sampled, the labels are the samples.

    Args:
        on_policy: lambda of the paper: 0 uses the rows as they are, 1 samples always.
        max_new_tokens: the longest sample.
        **kwargs: of `DistillationTrainer`, with an objective of language models.

    Raises:
        ValueError: `on_policy` outside [0, 1], `max_new_tokens` below 1, a student that is sharded over processes, or a
            row without a prompt.
    """

    def __init__(self, *args: Any, on_policy: float, max_new_tokens: int, **kwargs: Any) -> None:
        if not 0 <= on_policy <= 1:
            raise ValueError(f"OnPolicyTrainer: on_policy: expected 0 to 1, got {on_policy}")
        if max_new_tokens < 1:
            raise ValueError(f"OnPolicyTrainer: max_new_tokens: expected at least 1, got {max_new_tokens}")
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            expected = "a student that is whole on every process, as sampling needs it"
            raise ValueError(f"OnPolicyTrainer: model: expected {expected}, got one that is sharded; use DDP")
        self.on_policy = on_policy
        self.max_new_tokens = max_new_tokens

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """A step's micro-batches; here, because their tokens are counted before the first of them is run."""
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        sampled = [self._maybe_sampled(batch, number) for number, batch in enumerate(batches)]
        if any(new is not old for new, old in zip(sampled, batches, strict=True)):
            counted = self._get_num_items_in_batch(sampled, device)
        return sampled, counted

    def _maybe_sampled(self, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        # One coin for all processes, so that none waits for another's samples; not one seed.
        coin = f"{self.args.seed} {self.state.global_step} {number}"
        if random.Random(coin).random() >= self.on_policy:
            return batch
        seed = random.Random(f"{coin} {self.args.process_index}").getrandbits(63)
        with self.accelerator.autocast():
            return sample_completions(self.model, self._prepare_inputs(batch), self.max_new_tokens, seed)


@torch.no_grad()
def sample_completions(model: Any, batch: dict[str, Tensor], max_new_tokens: int, seed: int) -> dict[str, Tensor]:
    """A batch with the same prompts, and completions sampled by `model`, without dropout, from its whole distribution.

    Args:
        model: a causal language model of transformers.
        batch: `input_ids`, `labels` and, where there is padding, on whichever side, `attention_mask`, [B, L]. A row's
            prompt is what comes before its first label, padding aside; all of it where it has no label.
        max_new_tokens: where samples end that do not end by themselves, with the model's end-of-text token.
        seed: of the samples. The random state of the process stays as it is.

    Returns a batch of those three, padded on the right, in which the samples count, their end-of-text tokens included.

    Raises:
        ValueError: a row without a prompt, a model without an end-of-text token, or an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        got = f"{type(model).__name__}, an encoder-decoder"
        raise ValueError(f"sample_completions: model: expected a causal language model, got {got}")
    ids, device = batch["input_ids"], batch["input_ids"].device
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise ValueError("sample_completions: model: expected an eos_token_id in its generation_config, got None")
    ends = [ends] if isinstance(ends, int) else list(ends)
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    before = (batch["labels"] != OFF).cumsum(1) == 0
    prompts = [row[on].tolist() for row, on in zip(ids, real & before, strict=True)]
    if not all(prompts):
        raise ValueError(
            "sample_completions: batch: expected a prompt in every row: labels that begin with -100, got none"
        )
    # Padded on the left, so that all samples begin in one column.
    left = [torch.tensor(prompt) for prompt in prompts]
    start = pad_sequence(left, batch_first=True, padding_value=ends[0], padding_side="left")
    shown = pad_sequence([torch.ones_like(prompt) for prompt in left], batch_first=True, padding_side="left")
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
    )
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = model.generate(start.to(device), attention_mask=shown.to(device), generation_config=settings)
    finally:
        model.train(training)
    samples = [until_end(row, ends) for row in output[:, start.shape[1] :].tolist()]
    rows = [prompt + sample for prompt, sample in zip(prompts, samples, strict=True)]
    labels = [[OFF] * len(prompt) + sample for prompt, sample in zip(prompts, samples, strict=True)]
    return {name: tensor.to(device) for name, tensor in padded(rows, labels, ends[0]).items()}


def until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Up to the first of the tokens that end a text; all of one that none ends."""
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0] + 1] if places else tokens
