"""Distillation of causal language models without logits, against plain torch with all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from language_models import ARGUMENTS, PAD, VOCABULARY, completion_rows, llama, losses, plain_loop, plain_loss, same
from transformers import TrainingArguments

import kdfast
from kdfast.data import text
from kdfast.models.last_hidden import last_hidden
from kdfast.objective import LanguageModel
from kdfast.train.on_policy import OnPolicyTrainer, sample_completions

STEPS, BATCH = 20, 4
SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": LLAMA | {"tie_word_embeddings": False},
    "gemma2": LLAMA
    | {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 2},
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_head": 4, "n_layer": 2},
    "phi": SMALL | {"intermediate_size": 48},  # a bias in its output
}


def _model(name: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **CONFIGS.get(name, LLAMA))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # some biases begin as zeros
    return model


def _batch(rows: int = BATCH) -> dict[str, torch.Tensor]:
    return text.Collator(PAD)(completion_rows(rows))


@pytest.mark.parametrize("name", CONFIGS)
def test_last_hidden_states_make_the_logits(name: str) -> None:
    model = _model(name)
    ids = torch.randint(60, (2, 7), generator=torch.Generator().manual_seed(1))
    shapes = []
    watch = model.get_output_embeddings().register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    outputs = last_hidden(model, input_ids=ids)
    watch.remove()
    assert len(shapes) == 1
    assert shapes[0] == (1, 1, 60)
    logits = F.linear(outputs.hidden, outputs.weight, outputs.bias)
    if outputs.softcap is not None:
        logits = outputs.softcap * torch.tanh(logits / outputs.softcap)
    torch.testing.assert_close(logits, model(input_ids=ids).logits)  # which are whole again
    assert (outputs.softcap is not None) == (name == "gemma2")
    assert (outputs.bias is not None) == (name == "phi")


def test_models_without_output_embeddings_are_refused() -> None:
    with pytest.raises(TypeError, match="kdfast: model: expected one with output embeddings, got Linear"):
        last_hidden(torch.nn.Linear(2, 2), input_ids=torch.zeros(1, 2))


def _trainer(folder: Path, model: Any, teacher: Any, objective: Any, rows: list[text.Row], **options: Any) -> Any:
    arguments = {"output_dir": str(folder), "per_device_train_batch_size": BATCH, **ARGUMENTS}
    more = {name: options.pop(name) for name in ("on_policy", "max_new_tokens") if name in options}
    return (OnPolicyTrainer if more else kdfast.DistillationTrainer)(
        model,
        TrainingArguments(**{**arguments, **options}),
        teacher=teacher,
        objective=objective,
        train_dataset=rows,
        data_collator=text.Collator(PAD),
        **more,
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "objective",
    [
        LanguageModel(),
        LanguageModel(alpha=1.0, temperature=2.0),
        LanguageModel(alpha=0.0),
        LanguageModel(alpha=0.5, divergence="reverse_kl_div"),
        LanguageModel(alpha=1.0, divergence="js_div", beta=0.3),
    ],
    ids=["kl and labels", "kl", "labels", "reverse kl", "js"],
)
def test_follows_a_plain_loop(tmp_path: Path, objective: LanguageModel, tied: bool) -> None:
    """Completions alone count; micro-batches of unequal counts make what one batch would."""
    teacher, student = llama(0, 3, tied), llama(1, 2, tied)
    by_hand, start = copy.deepcopy(student), copy.deepcopy(student)
    rows = completion_rows(STEPS * BATCH)
    batches = [text.Collator(PAD)(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    trainer = _trainer(
        tmp_path, student, teacher, objective, rows, per_device_train_batch_size=1, gradient_accumulation_steps=BATCH
    )
    trainer.train()
    expected = plain_loop(by_hand, teacher, ([batch] for batch in batches), objective)
    torch.testing.assert_close(losses(trainer), expected, rtol=0, atol=1e-5)
    same(student, by_hand, 1e-5)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(student.parameters(), start.parameters(), strict=True))
    for event in trainer.state.log_history[:-1]:
        assert event["kd"] + event.get("ce", 0.0) == pytest.approx(event["loss"], abs=2e-6)


def test_what_counts_without_labels() -> None:
    teacher, student, batch = llama(0, 3), llama(1, 2), _batch()
    objective = LanguageModel(alpha=1.0)
    labelled = {**batch, "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)}
    expected = plain_loss(student, teacher, labelled, objective)
    for inputs in (labelled, {name: batch[name] for name in ("input_ids", "attention_mask")}):
        outputs = objective.run(student, inputs), objective.run(teacher, inputs)
        torch.testing.assert_close(objective(*outputs, inputs)["kd"], expected)
    whole = {"input_ids": batch["input_ids"]}
    assert objective.num_items(whole) == whole["input_ids"][:, 1:].numel()


def test_evaluation_and_mistakes(tmp_path: Path) -> None:
    teacher, student = llama(0, 3), llama(1, 2)
    objective = LanguageModel()
    rows = completion_rows(6)
    trainer = _trainer(tmp_path, student, teacher, objective, rows, prediction_loss_only=True)
    measured = trainer.evaluate(rows[:4])["eval_loss"]
    assert measured == pytest.approx(plain_loss(student, teacher, text.Collator(PAD)(rows[:4]), objective).item())
    with pytest.raises(ValueError, match="LanguageModel: teacher: expected one, or rows with its top-k"):
        _trainer(tmp_path, student, None, objective, rows).train()
    unlabelled = {name: value for name, value in _batch().items() if name != "labels"}
    outputs = objective.run(student, unlabelled)
    with pytest.raises(ValueError, match="inputs: expected rows with labels, as alpha < 1"):
        objective(outputs, outputs, unlabelled)


def test_samples_are_the_students() -> None:
    model, batch = llama(1, 2), _batch()
    state = torch.get_rng_state()
    model.train()
    sampled = sample_completions(model, batch, 12, seed=5)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    again = sample_completions(model, batch, 12, seed=5)
    assert all(torch.equal(sampled[name], again[name]) for name in again)
    assert not torch.equal(sampled["input_ids"], sample_completions(model, batch, 12, seed=6)["input_ids"])
    for row in range(BATCH):
        prompt = int((batch["labels"][row] != -100).int().argmax())
        ids, labels = sampled["input_ids"][row], sampled["labels"][row]
        assert torch.equal(ids[:prompt], batch["input_ids"][row, :prompt])
        end = int(sampled["attention_mask"][row].sum())
        assert (labels[:prompt] == -100).all()
        assert torch.equal(labels[prompt:end], ids[prompt:end])
        assert (labels[end:] == -100).all()
        assert (ids[prompt : end - 1] != PAD).all()
        assert end == prompt + 12 or ids[end - 1] == PAD
    certain = copy.deepcopy(model)  # one that has no choice: its samples are its own, token by token
    with torch.no_grad():
        certain.model.norm.weight.mul_(1e3)
    sampled = sample_completions(certain, batch, 12, seed=5)
    greedy = certain(input_ids=sampled["input_ids"], attention_mask=sampled["attention_mask"]).logits[:, :-1].argmax(-1)
    on = sampled["labels"][:, 1:] != -100
    assert on.any()
    assert torch.equal(greedy[on], sampled["labels"][:, 1:][on])


def test_sampling_mistakes(tmp_path: Path) -> None:
    model, batch = llama(1, 2), _batch()
    with pytest.raises(ValueError, match="expected a prompt in every row"):
        sample_completions(model, {**batch, "labels": batch["input_ids"]}, 4, 0)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="model: expected an eos_token_id in its generation_config, got None"):
        sample_completions(model, batch, 4, 0)
    for wrong, match in (
        ({"on_policy": 2}, "on_policy: expected 0 to 1, got 2"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
    ):
        options = {"on_policy": 1.0, "max_new_tokens": 4} | wrong
        with pytest.raises(ValueError, match=match):
            _trainer(tmp_path, model, llama(0, 3), LanguageModel(), completion_rows(4), **options)


ON_POLICY: dict[str, Any] = {"on_policy": 0.5, "max_new_tokens": 8, "gradient_accumulation_steps": 2, "seed": 3}


def test_on_policy_follows_a_plain_loop(tmp_path: Path) -> None:
    """About half of the batches are samples of the student of that moment; both models and the loss see these."""
    teacher, student = llama(0, 3), llama(1, 2)
    objective = LanguageModel(divergence="js_div")
    by_hand = copy.deepcopy(student)
    rows = completion_rows(6 * 2 * BATCH)
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    handles = []
    for name, model in (("student", student), ("teacher", teacher)):

        def keep(_: Any, __: Any, arguments: dict[str, Any], name: str = name) -> None:
            if not arguments["use_cache"]:  # with which it samples
                seen[name].append(arguments["input_ids"])

        handles.append(model.model.register_forward_pre_hook(keep, with_kwargs=True))
    trainer = _trainer(tmp_path, student, teacher, objective, rows, **ON_POLICY)
    trainer.train()
    for handle in handles:
        handle.remove()

    used = []
    again = _trainer(tmp_path, by_hand, teacher, objective, rows, **ON_POLICY)

    def steps() -> Iterator[list[dict[str, torch.Tensor]]]:
        for step in range(6):
            again.state.global_step = step
            begin = 2 * step * BATCH
            batches = [text.Collator(PAD)(rows[i : i + BATCH]) for i in (begin, begin + BATCH)]
            used.extend(again._maybe_sampled(batch, number) for number, batch in enumerate(batches))
            yield used[-2:]

    expected = plain_loop(by_hand, teacher, steps(), objective)
    for batch, of_student, of_teacher in zip(used, seen["student"], seen["teacher"], strict=True):
        assert torch.equal(batch["input_ids"], of_student)
        assert torch.equal(batch["input_ids"], of_teacher)
    originals = {tuple(row["input_ids"]) for row in rows}
    sampled = [
        tuple(batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()) not in originals for batch in used
    ]
    assert 2 < sum(sampled) < 10
    torch.testing.assert_close(losses(trainer), expected, rtol=0, atol=1e-5)
    same(student, by_hand, 1e-5)


def test_resumed_on_policy_run_gives_the_same_weights(tmp_path: Path) -> None:
    teacher, through, resumed = llama(0, 3), llama(1, 2), llama(5, 2)
    rows = completion_rows(5 * BATCH)
    options = ON_POLICY | {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    options |= {"train_sampling_strategy": "group_by_length"}
    _trainer(tmp_path, through, teacher, LanguageModel(), rows, **options).train()
    torch.manual_seed(99)
    checkpoint = str(tmp_path / "checkpoint-4")
    _trainer(tmp_path, resumed, teacher, LanguageModel(), rows, **options).train(resume_from_checkpoint=checkpoint)
    same(resumed, through, 0.0)


class _Letters:
    """A tokenizer of letters."""

    eos_token_id = PAD

    def __call__(self, string: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in string]}


def test_packed_text() -> None:
    rows = text.packed(["abc", "de", "fghi"], _Letters(), 4)
    assert [row["input_ids"] for row in rows] == [[97, 98, 99, 2], [100, 101, 2, 102], [103, 104, 105, 2]]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert len(text.packed(["abc", "de", "fgh"], _Letters(), 4)) == 2  # and a rest


def test_rows_of_prompts_and_completions(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "ab", "completion": "c"}\n\n{"prompt": "abcdefgh", "completion": "ijklmn"}\n')
    short, long = text.read_completions(file, _Letters(), 8)
    assert short == {"input_ids": [97, 98, 99, 2], "labels": [-100, -100, 99, 2]}
    assert long["input_ids"] == [ord(letter) for letter in "efghijkl"]  # both are cut, the prompt at its beginning
    assert long["labels"] == [-100] * 4 + long["input_ids"][4:]
    batch = text.Collator(pad=7)([short, long])
    assert batch["input_ids"][0].tolist() == [97, 98, 99, 2, 7, 7, 7, 7]
    assert batch["labels"][0].tolist() == [-100, -100, 99, 2, -100, -100, -100, -100]
    assert batch["attention_mask"].sum(1).tolist() == [4, 8]
    endless = _Letters()
    endless.eos_token_id = None  # type: ignore[assignment]
    for read in (lambda: text.read_completions(file, endless, 8), lambda: text.packed(["ab"], endless, 4)):
        with pytest.raises(ValueError, match="expected one with an eos_token, which closes texts, got None"):
            read()
    for line in (
        "[1]",
        '{"prompt": "a"}',
        "{",
        '{"prompt": 1, "completion": "a"}',
        '{"prompt": "a", "completion": ""}',
    ):
        file.write_text('{"prompt": "ab", "completion": "c"}\n' + line)
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: "):
            text.read_completions(file, _Letters(), 8)


def test_texts_between_empty_lines(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\nstill one\n\n  \ntwo\n", encoding="utf-8-sig")  # with the mark that Windows begins it with
    assert text.read_texts(file) == ["one\nstill one", "two"]


assert VOCABULARY > 110  # letters are tokens
