"""Rows of two tokenizers, tokens that both have, and models of each trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_berts import trainer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdfast.data import two_tokenizers
from kdfast.data.two_tokenizers import Collator, shared_tokens
from kdfast.models.inputs import teacher_inputs
from kdfast.objective import GOLD, ULD, Labels, Terms


def tokenizer(words: list[str], pattern: str, eos: bool = True) -> Any:
    rules = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", *words])}, "<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    end = {"eos_token": "<end>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", unk_token="<unk>", **end)


LETTERS = tokenizer([*"abcd "], ".")
PAIRS = tokenizer(["ab", "cd", "ba", " ", "a", "d"], "..?")


def test_row_of_both() -> None:
    row = two_tokenizers.row("ab", "abcda", LETTERS, PAIRS, 16, teacher_prompt="cd")
    assert row == {
        "input_ids": [3, 4, 3, 4, 5, 6, 3, 1],
        "labels": [-100, -100, 3, 4, 5, 6, 3, 1],
        "sample_ends": [0, 0, 1, 2, 3, 4, 5, 6],
        "teacher_input_ids": [4, 3, 4, 7, 1],
        "teacher_labels": [-100, 3, 4, 7, 1],
        "teacher_ends": [0, 2, 4, 5, 6],
    }
    cut = two_tokenizers.row("ab", "abcda", LETTERS, PAIRS, 5)  # the student's last tokens go, and the span's with them
    assert cut["sample_ends"] == [0, 0, 1, 2, 3]
    assert cut["teacher_ends"] == [0, 2, 4, 5, 6]
    batch = Collator(0, 9)([row, cut])
    assert batch["teacher_input_ids"].tolist() == [[4, 3, 4, 7, 1], [3, 3, 4, 7, 1]]
    assert batch["sample_ends"][1].tolist() == [0, 0, 1, 2, 3, 0, 0, 0]
    assert batch["attention_mask"].sum(-1).tolist() == [8, 5]
    assert GOLD().count(batch) == 4 + 1  # ab, cd, a and the end; ab
    assert ULD().count(batch) == 4 + 3


def test_shared_tokens() -> None:
    names = [
        [one.convert_ids_to_tokens(i) for i in ids]
        for one, ids in zip((LETTERS, PAIRS), shared_tokens(LETTERS, PAIRS).T.tolist(), strict=True)
    ]
    assert names[0] == names[1] == ["<pad>", "<end>", "<unk>", "a", "d", " "]
    assert shared_tokens(LETTERS, LETTERS)[:, 0].tolist() == list(range(len(LETTERS)))


def test_tokenizers_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher_tokenizer: expected one with an eos_token, got None$"):
        two_tokenizers.row("a", "b", LETTERS, tokenizer(["a"], ".", eos=False), 8)
    with pytest.raises(
        ValueError, match=r"^kdfast.data.two_tokenizers: tokenizer: expected a fast one, .* got object$"
    ):
        two_tokenizers.row("a", "b", object(), PAIRS, 8)


# ---- in a training ----
def small(vocabulary: int, seed: int, width: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.3, **sizes))


@pytest.mark.parametrize("kind", [ULD, GOLD])
def test_trainer(kind: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    texts = ["".join("abcd "[i] for i in torch.randint(5, (6 + n,), generator=generator)) for n in range(8)]
    rows = [two_tokenizers.row(text[:2], text[2:], LETTERS, PAIRS, 32) for text in texts]
    student, teacher = small(len(LETTERS), 0, 16), small(len(PAIRS), 1, 24)
    objective = Terms(it=kind(weight=1.5, shared=shared_tokens(LETTERS, PAIRS)), ce=Labels("next_tokens"))
    collate = Collator(0, 0)
    it = trainer(tmp_path, student, rows, objective, teacher=teacher, eval_dataset=rows, data_collator=collate)
    metrics = it.evaluate()
    batch = collate(rows)
    with torch.no_grad():
        of_teacher = objective.run(teacher.eval(), teacher_inputs(teacher, batch))
        values = objective(objective.run(student.eval(), batch), of_teacher, batch)
    assert values["it"] > 0.1
    assert metrics["eval_it"] == pytest.approx(values["it"].item(), rel=1e-4)
    assert metrics["eval_ce"] == pytest.approx(values["ce"].item(), rel=1e-4)
    before = [p.clone() for p in student.parameters()]
    it.train()
    assert any(not torch.equal(p, q) for p, q in zip(student.parameters(), before, strict=True))
