"""Kinds of language models: encoder-decoders, decoders of encoder families, mixtures of experts, and what is refused; and
which tokens count. Against plain torch with all logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language_models import ARGUMENTS, PAD, RATE, completion_rows, llama, losses, plain_loss, same
from peft import LoraConfig, get_peft_model
from tiny_pairs import bart, initialised, plain_pairs, t5
from torch import Tensor
from transformers import TrainingArguments

import kdfast
from kdfast.data import text
from kdfast.models.router import router_loss
from kdfast.objective import LanguageModel, LinearSchedule, Logits, Terms
from kdfast.objective._protocol import Missing
from kdfast.train.on_policy import sample_completions

OBJECTIVE = LanguageModel(alpha=0.6, temperature=2.0)
BERT = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}


def pairs(seed: int, rows: int, ends: bool = True) -> dict[str, Tensor]:
    """Sources and targets of one length, the targets' ends padded."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(3, 64, (rows, 8), generator=generator) for _ in range(2))
    for row in range(rows):
        labels[row, 8 - (row + seed) % 5 if ends else 8 :] = -100
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(8) < 6 + torch.arange(rows)[:, None] % 3).long(),
        "labels": labels,
    }


def total(student: Any, teacher: Any, batch: dict[str, Tensor], objective: LanguageModel) -> Tensor:
    with torch.no_grad():
        of_teacher = objective.run(teacher, batch)
    return torch.stack([*objective(objective.run(student, batch), of_teacher, batch).values()]).sum()


def same_gradients(student: Any, ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    found = (torch.autograd.grad(x, list(parameters.values()), allow_unused=True) for x in (ours, expected))
    for name, a, b in zip(parameters, *found, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


SEQ2SEQ: dict[str, Any] = {
    "t5": t5,
    "t5, untied": lambda seed, layers: t5(seed, layers, tie_word_embeddings=False),
    "bart": bart,
    "t5, lora": lambda seed, layers: get_peft_model(
        t5(seed, layers), LoraConfig(r=4, target_modules=["q", "lm_head"], init_lora_weights=False)
    ).eval(),
}


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_encoder_decoders(kind: str) -> None:
    student, teacher, batch = SEQ2SEQ[kind](1, 1), SEQ2SEQ[kind](0, 2), pairs(0, 3)
    expected = plain_pairs(student, teacher, batch, OBJECTIVE)
    same_gradients(student, total(student, teacher, batch, OBJECTIVE), expected)
    assert OBJECTIVE.for_student(student).num_items(batch) == (batch["labels"] != -100).sum()
    shorter = {**batch, "labels": batch["labels"][:, :6]}
    same_gradients(
        student, total(student, teacher, shorter, OBJECTIVE), plain_pairs(student, teacher, shorter, OBJECTIVE)
    )
    assert OBJECTIVE.num_items(shorter) == (shorter["labels"] != -100).sum()
    outputs = OBJECTIVE.run(student, batch)
    given = student.prepare_decoder_input_ids_from_labels(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"decoder_input_ids": given}
    torch.testing.assert_close(OBJECTIVE.logits(outputs), student(**inputs).logits, rtol=1e-4, atol=1e-5)
    # Without labels: what the decoder's mask says.
    soft, mask = LanguageModel(alpha=1.0), batch["labels"] != -100
    unlabelled = {**inputs, "decoder_attention_mask": mask.long()}
    expected = plain_pairs(student, teacher, batch, soft)
    torch.testing.assert_close(total(student, teacher, unlabelled, soft), expected)
    assert soft.num_items(unlabelled) == mask.sum()
    with pytest.raises(ValueError, match="LanguageModel: decoder_input_ids: expected it in the batches of an encoder-"):
        soft.run(student, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="sample_completions: model: expected a causal language model, got "):
        sample_completions(student, batch, 2, 0)


def test_encoder_decoders_in_the_trainer(tmp_path: Path) -> None:
    """Micro-batches of unequal counts, of sources and targets of one length: what the batch alone would not tell."""
    student, teacher, batch = t5(1, 1), t5(0, 2), pairs(0, 16)
    by_hand, rows = copy.deepcopy(student), [{k: v[i].tolist() for k, v in batch.items()} for i in range(16)]
    options = ARGUMENTS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = kdfast.DistillationTrainer(
        student,
        TrainingArguments(output_dir=str(tmp_path), **options),
        teacher=teacher,
        objective=OBJECTIVE,
        train_dataset=rows,
    )
    trainer.train()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=RATE, eps=1e-4, weight_decay=0.0)
    expected = []
    for begin in range(0, 16, 4):
        loss = plain_pairs(by_hand, teacher, {k: v[begin : begin + 4] for k, v in batch.items()}, OBJECTIVE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    torch.testing.assert_close(losses(trainer), expected, rtol=0, atol=1e-5)
    same(student, by_hand, 1e-5)


def bert(kind: Any, layers: int = 2, **options: Any) -> Any:
    torch.manual_seed(layers)
    return initialised(kind(transformers.BertConfig(vocab_size=301, num_hidden_layers=layers, **BERT | options)), 0.2)


def test_a_decoder_of_a_family_of_encoders() -> None:
    """Its head has a transform before it and a bias."""
    student, teacher = (bert(transformers.BertLMHeadModel, n, is_decoder=True) for n in (1, 2))
    batch = text.Collator(PAD)(completion_rows(4))
    same_gradients(student, total(student, teacher, batch, OBJECTIVE), plain_loss(student, teacher, batch, OBJECTIVE))


def test_models_that_are_refused(tmp_path: Path) -> None:
    batch = text.Collator(PAD)(completion_rows(2))
    for model, error, match in (
        (
            bert(transformers.BertForMaskedLM),
            ValueError,
            r"expected a causal language model or an encoder-decoder \(for masked ones: "
            r"Terms\(kl=Logits\(tokens='labels'\), .* got BertForMaskedLM",
        ),
        (
            bert(transformers.BertLMHeadModel),
            ValueError,
            "expected one with config.is_decoder=True .* got BertLMHeadModel",
        ),
        (
            bert(transformers.BertForSequenceClassification),
            TypeError,
            "expected a language model .* Hinton, .* got BertForSequenceClassification",
        ),
    ):
        with pytest.raises(error, match="LanguageModel: student or teacher: .*" + match):
            OBJECTIVE.run(model, batch)
        args = TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
        with pytest.raises(error, match="LanguageModel: student: .*" + match):
            kdfast.DistillationTrainer(model, args, teacher=llama(0, 2), objective=OBJECTIVE)
        trainer = kdfast.DistillationTrainer(llama(0, 2), args, teacher=model, objective=OBJECTIVE)
        with pytest.raises(error, match="LanguageModel: teacher: .*" + match):
            trainer.compute_loss(trainer.model, batch)
    student, labels = t5(1, 1), torch.randint(3, 64, batch["input_ids"].shape)
    outputs = OBJECTIVE.run(student, {"input_ids": labels, "labels": labels})
    with pytest.raises(
        ValueError, match="LanguageModel: teacher: expected an encoder-decoder, as the student is, got a "
    ):
        OBJECTIVE(outputs, OBJECTIVE.run(llama(0, 2), batch), {"input_ids": labels, "labels": labels})
    longer = {name: torch.cat([x, x[:, :1]], 1) for name, x in batch.items()}
    ours = OBJECTIVE.run(llama(1, 2), batch)
    with pytest.raises(
        ValueError, match=r"LanguageModel: teacher: expected hidden states of the batch's \[2, \d+\] tokens"
    ):
        OBJECTIVE(ours, OBJECTIVE.run(llama(0, 2), longer), batch)


def mixtral(seed: int, coefficient: float) -> Any:
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=coefficient,
        initializer_range=0.2,
    )
    return transformers.MixtralForCausalLM(config).eval()


def test_the_loss_of_a_router() -> None:
    student, teacher, batch = mixtral(1, 0.5), mixtral(0, 0.5), text.Collator(PAD)(completion_rows(4))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = plain_loss(student, teacher, batch, OBJECTIVE) + 0.5 * student(**inputs).aux_loss
    same_gradients(student, total(student, teacher, batch, OBJECTIVE), expected)
    whole = student(**batch)  # transformers' own loss, all of it
    labels = LanguageModel(alpha=0.0)
    terms = labels(labels.run(student, batch), labels.run(teacher, batch), batch)
    torch.testing.assert_close(torch.stack([*terms.values()]).sum(), whole.loss)
    torch.testing.assert_close(terms["aux"], 0.5 * whole.aux_loss)
    items = 4 * labels.num_items(batch).float()  # of a step of which this batch is a quarter
    share = labels(labels.run(student, batch), labels.run(teacher, batch), {**batch, "num_items": items})
    torch.testing.assert_close(share["aux"], terms["aux"] / 4)
    silent = mixtral(1, 0.5)
    silent.config.output_router_logits = False
    assert "aux" not in labels(labels.run(silent, batch), labels.run(teacher, batch), batch)
    objective = Terms(kl=Logits(tokens="all"))
    outputs = objective.run(student, inputs), objective.run(teacher, inputs)
    with pytest.warns(
        UserWarning, match="Terms: the student's outputs have aux_loss: its router's loss is not trained"
    ):
        objective(*outputs, inputs)
    with pytest.warns(UserWarning, match="LanguageModel: the student's outputs have aux_loss"):
        assert router_loss(torch.nn.Linear(1, 1), outputs[0]) is None  # a model that does not say how it weighs it


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
def test_padding_on_either_side(labelled: bool, stored: bool) -> None:
    """The same loss, gradient and number of tokens: what padding predicts does not count, nor what it follows."""
    student, teacher = llama(1, 2), llama(0, 3)
    rows = completion_rows(4)
    right = text.Collator(PAD)(rows)
    right["labels"] = torch.where(right["attention_mask"].bool(), right["input_ids"], -100)
    left = {name: torch.empty_like(x) for name, x in right.items()}
    for row, real in enumerate(right["attention_mask"].sum(1).tolist()):
        for name, x in right.items():
            left[name][row] = x[row].roll(-real)
    assert left["attention_mask"][:, -1].all()
    objective = LanguageModel(alpha=0.6 if labelled else 1.0)
    expected = plain_loss(student, teacher, right, objective)
    for batch in (right, left):
        batch = dict(batch)
        # As generation has them: rotary positions count from the first token of the text.
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if not labelled:
            del batch["labels"]
        assert objective.num_items(batch) == (right["attention_mask"].sum(1) - 1).sum()
        if not stored:
            ours = total(student, teacher, batch, objective)
        else:
            inputs = {name: batch[name] for name in batch if name != "labels"}
            top = teacher(**inputs).logits.log_softmax(-1).topk(301)
            beside = {"teacher_topk_logprobs": top.values.detach(), "teacher_topk_indices": top.indices}
            beside["teacher_token_mask"] = batch["attention_mask"].bool()
            terms = objective(objective.run(student, batch), None, batch | beside)
            ours = torch.stack([*terms.values()]).sum()
        same_gradients(student, ours, plain_loss(student, teacher, right, objective))
    assert expected > 0.1


def test_what_an_evaluation_can_tell() -> None:
    """Without labels the teacher's term, without a teacher that of the labels, each as it is beside the other."""
    student, teacher, batch = llama(1, 2), llama(0, 3), text.Collator(PAD)(completion_rows(4))
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    unlabelled = {name: x for name, x in batch.items() if name != "labels"}
    objective = LanguageModel(alpha=0.6, temperature=2.0, divergence="js_div")
    ours, theirs = objective.run(student, batch), objective.run(teacher, batch)
    whole, missing = objective.possible(ours, theirs, batch)
    assert not missing
    assert whole.keys() == {"kd", "ce"}
    for name, given, inputs, match in (
        ("kd", theirs, unlabelled, "inputs: expected rows with labels, as alpha < 1, got input_ids, attention_mask"),
        ("ce", None, batch, "teacher: expected one, or rows with its top-k"),
    ):
        terms, missing = objective.possible(ours, given, inputs)
        assert terms.keys() == {name}
        torch.testing.assert_close(terms[name], whole[name])
        assert match in str(*missing.values())
        with pytest.raises(Missing, match=match):
            objective(ours, given, inputs)
    terms, missing = objective.possible(ours, None, unlabelled)
    assert not terms
    assert missing.keys() == {"kd", "ce"}


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_predictions(tmp_path: Path, lora: bool) -> None:
    """What compute_metrics and predict get are the model's own logits, with labels and without."""
    student, teacher, rows = llama(1, 2), llama(0, 3), completion_rows(4)
    if lora:
        student = get_peft_model(student, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)).eval()
    batch = text.Collator(PAD)(rows)
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    seen = []
    trainer = kdfast.DistillationTrainer(
        student,
        TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS),
        teacher=teacher,
        objective=OBJECTIVE,
        data_collator=text.Collator(PAD),
        compute_metrics=lambda given: seen.append(given) or {"rows": len(given.predictions)},
    )
    assert trainer.evaluate(rows)["eval_rows"] == 4
    torch.testing.assert_close(torch.tensor(seen[0].predictions), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.tensor(seen[0].label_ids), batch["labels"])
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    trainer.data_collator = lambda given: {
        name: x
        for name, x in text.padded([row["input_ids"] for row in given], [[1]] * 4, PAD).items()
        if name != "labels"
    }
    with pytest.warns(
        UserWarning, match="evaluation without ce: LanguageModel: inputs: expected rows with labels, as alpha < 1"
    ):
        output = trainer.predict(unlabelled)
    torch.testing.assert_close(torch.tensor(output.predictions), logits, rtol=1e-4, atol=1e-5)
    assert output.label_ids is None
    assert output.metrics["test_kd"] == output.metrics["test_loss"] > 0.01


def test_samples_begin_at_the_prompt() -> None:
    """Wherever the padding is, on both sides too."""
    model, rows = llama(1, 2), completion_rows(4)
    right = text.Collator(PAD)(rows)
    expected = sample_completions(model, right, 6, seed=5)
    real, length = right["attention_mask"].sum(1).tolist(), right["input_ids"].shape[1] + 2
    for begins in ([length - n for n in real], [0, 1, 2, 0]):
        moved = {
            "input_ids": torch.full((4, length), PAD),
            "labels": torch.full((4, length), -100),
            "attention_mask": torch.zeros(4, length, dtype=torch.long),
        }
        for row, (begin, n) in enumerate(zip(begins, real, strict=True)):
            for name, x in moved.items():
                x[row, begin : begin + n] = right[name][row, :n]
        sampled = sample_completions(model, moved, 6, seed=5)
        assert all(torch.equal(sampled[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"alpha": 1.5}, ValueError, r"alpha: expected a number from 0 to 1, got 1\.5"),
        ({"alpha": LinearSchedule(1, 0)}, TypeError, "alpha: expected a number, got LinearSchedule"),
        ({"alpha": True}, TypeError, "alpha: expected a number, got bool"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a number from 0 to 1, got nan"),
        ({"beta": "0.5"}, TypeError, "beta: expected a number, got str"),
        ({"divergence": "js_div", "beta": 2}, ValueError, "beta: expected a number from 0 to 1, got 2"),
        ({"skew": 1.0}, ValueError, r"skew: expected a number from 0 to 1, 1 excluded, got 1\.0"),
        ({"temperature": "2"}, TypeError, "temperature: expected a number.*, got str"),
        ({"temperature": 0}, ValueError, "temperature: expected a finite number > 0, got 0"),
        ({"temperature": float("inf")}, ValueError, "temperature: expected a finite number > 0, got inf"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number > 0, got nan"),
        ({"temperature": torch.ones(2)}, TypeError, "temperature: expected a number.*, got torch.float32"),
        ({"divergence": "js"}, ValueError, "divergence: expected one of .*js_div.*, got 'js'"),
        ({"tail": "none"}, ValueError, "tail: expected 'bucket', 'renormalize' or 'drop', got 'none'"),
        ({"memory_budget": "much"}, TypeError, "memory_budget: expected a number of bytes or 'auto', got 'much'"),
        ({"memory_budget": 0}, ValueError, "memory_budget: expected 1 or more, got 0"),
        ({"vocab_size": 0}, ValueError, "vocab_size: expected 1 or more, or None, got 0"),
        ({"vocab_size": 32.0}, TypeError, "vocab_size: expected an int, got float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments(wrong: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"LanguageModel: {match}"):
        LanguageModel(**wrong)
