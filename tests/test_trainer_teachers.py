"""Teachers of DistillationTrainer: with tokenizers of their own, sharing parameters, dispatched, quantised, wrapped; and model_init."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_berts import CLASSES, bert, collate, logged, masked_lm, moved, rows, same, trainer
from tiny_teacher import VOCABULARY, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from kdfast.data.sampler import TeacherCollator
from kdfast.models.inputs import teacher_inputs
from kdfast.objective import (
    CLS,
    Attention,
    Cosine,
    Embedding,
    Hidden,
    Hinton,
    Labels,
    Logits,
    Relations,
    Terms,
    model_inputs,
)


# ---- another tokenizer ----
def large_vocabulary() -> Any:
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, initializer_range=0.4, **sizes)
    return BertForSequenceClassification(config).eval()


def two_tokenizers(count: int) -> list[dict[str, Any]]:
    """Rows whose teacher reads another number of tokens than the student, of its own vocabulary."""
    given = rows(count)
    for i, row in enumerate(given):
        row["teacher_input_ids"] = [2 + (7 * i + 3 * j) % (VOCABULARY - 2) for j in range(2 + i % 4)]
    return given


def whole_sequences() -> Terms:
    return Terms(kl=Logits(temperature=2.0), ce=Labels(), cls=CLS({1: 1}))


def test_the_teacher_reads_its_own_tokens(tmp_path: Path) -> None:
    teacher, student, given = large_vocabulary(), bert(1), two_tokenizers(8)
    read: list[dict[str, Any]] = []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs), with_kwargs=True)
    shown: list[dict[str, Any]] = []
    student.register_forward_pre_hook(lambda _, args, kwargs: shown.append(kwargs), with_kwargs=True)
    collator = TeacherCollator(collate, tokenizer())
    it = trainer(
        tmp_path, student, given, whole_sequences(), teacher=teacher, eval_dataset=given, data_collator=collator
    )
    metrics = it.evaluate()
    it.train()
    batch = collate([{name: row[name] for name in ("input_ids", "labels")} for row in given[:4]])
    length = max(len(row["teacher_input_ids"]) for row in given[:4])
    for seen in (read[0], read[2]):  # of the evaluation, and of the training
        for name, pad in (("input_ids", 1), ("attention_mask", 0)):
            of_rows = [row["teacher_input_ids"] if pad else [1] * len(row["teacher_input_ids"]) for row in given[:4]]
            assert seen[name].tolist() == [row + [pad] * (length - len(row)) for row in of_rows]
    assert shown[0]["input_ids"].tolist() == batch["input_ids"].tolist()
    assert not any(name.startswith("teacher") for kwargs in (*shown, *read) for name in kwargs)
    # By hand, of all rows alone.
    student = bert(1)
    with torch.no_grad():
        s = [student(torch.tensor([row["input_ids"]]), output_hidden_states=True) for row in given]
        t = [teacher(input_ids=torch.tensor([row["teacher_input_ids"]]), output_hidden_states=True) for row in given]
    log_s, log_t = ((torch.cat([x.logits for x in of]) / 2).log_softmax(-1) for of in (s, t))
    kl = 4 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    first = [nn.functional.normalize(torch.cat([x.hidden_states[1][:, 0] for x in of]), dim=-1) for of in (s, t)]
    assert metrics["eval_kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert metrics["eval_cls"] == pytest.approx((first[0] - first[1]).square().mean().item(), rel=1e-4)
    assert len(logged(it)) == 2


TOKEN_TERMS: dict[str, Any] = {
    "Hidden": Hidden, "Embedding": Embedding, "Cosine": Cosine, "Attention": Attention, "Relations": Relations,
    "Logits": lambda: Logits(tokens="all"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKEN_TERMS)
def test_terms_of_tokens_refuse_sequences_that_do_not_align(name: str) -> None:
    student, teacher = masked_lm(1), masked_lm(0)
    objective, batch = Terms(it=TOKEN_TERMS[name]()), collate(rows(3))
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def value(**columns: Any) -> Tensor:
        inputs = batch | columns
        with torch.no_grad():
            of_teacher = objective.run(teacher, teacher_inputs(teacher, inputs))
            return objective(objective.run(student, inputs), of_teacher, inputs)["it"]

    message = rf"{name}: teacher_input_ids: expected the tokens of input_ids, one by one .*, got "
    with pytest.raises(ValueError, match=message + rf"\[3, {ids.shape[1] - 1}\]"):
        value(teacher_input_ids=ids[:, 1:], teacher_attention_mask=mask[:, 1:])
    fewer = mask.clone()
    fewer[mask.sum(-1).argmax(), -1] = 0
    with pytest.raises(ValueError, match=message + r"\[\d+, \d+, \d+\]"):
        value(teacher_input_ids=ids, teacher_attention_mask=fewer)
    aligned = value(teacher_input_ids=(ids + 1) % 40, teacher_attention_mask=mask)
    assert aligned > 1e-3
    assert not torch.isclose(aligned, value(), rtol=1e-3)  # the teacher did read other words


def test_what_is_the_teachers_and_what_the_objectives() -> None:
    teacher, batch = bert(0), collate(rows(3))
    ids = batch["input_ids"]
    stored = {
        f"teacher_{name}": ids
        for name in ("logits", "cls_3", "hidden_3", "topk_logprobs", "topk_indices", "token_mask")
    }
    stored |= {
        "teacher_temperature": 2.0,
        "teacher_vocab_size": 40,
        "sample_weight": torch.ones(3),
        "teacher_labels": ids,
    }
    batch |= {"token_type_ids": torch.zeros_like(ids)}
    names = ["input_ids", "attention_mask", "token_type_ids"]
    for own in ({}, {"teacher_attention_mask": ids}, {"teacher_token_type_ids": ids}):
        given = model_inputs(teacher, teacher_inputs(teacher, batch | stored | own))
        assert sorted(given) == sorted(names)
        for name in names:
            assert given[name] is own.get(f"teacher_{name}", batch[name])
    shorter = ids[:, :2]
    given = model_inputs(teacher, teacher_inputs(teacher, batch | stored | {"teacher_input_ids": shorter}))
    assert list(given) == ["input_ids"]  # the student's mask and token types are of other tokens
    assert given["input_ids"] is shorter
    assert not any(name.startswith("teacher") for name in model_inputs(bert(1), batch | {"teacher_input_ids": ids}))


class Keywords(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs)


class IdsAndKeywords(Keywords):
    def forward(self, input_ids: Any, **kwargs: Any) -> Any:
        return self.model(input_ids, **kwargs)


class Images(nn.Module):
    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=pixel_values)


@pytest.mark.parametrize("kind", [Keywords, IdsAndKeywords])
def test_a_teacher_that_takes_keywords_reads_its_own_tokens(tmp_path: Path, kind: Any) -> None:
    given, options = two_tokenizers(8), {"data_collator": TeacherCollator(collate, tokenizer())}
    objective = Terms(kl=Logits(temperature=2.0), ce=Labels())
    found = [
        trainer(tmp_path, bert(1), None, objective, teacher=teacher, eval_dataset=given, **options).evaluate()
        for teacher in (large_vocabulary(), kind(large_vocabulary()))
    ]
    assert found[0]["eval_kl"] == pytest.approx(found[1]["eval_kl"], rel=1e-5)
    assert found[0]["eval_kl"] > 1e-3
    batch = collate(rows(3))
    types = torch.ones_like(batch["input_ids"])
    inputs = batch | {"token_type_ids": types, "teacher_logits": types, "teacher_cls_3": types}
    named = model_inputs(Keywords(bert(0)), teacher_inputs(Keywords(bert(0)), inputs))
    assert named["token_type_ids"] is types
    assert set(named) == {"input_ids", "attention_mask", "token_type_ids"}


def test_tokens_for_a_teacher_that_takes_none_are_refused() -> None:
    message = r"^DistillationTrainer: teacher_input_ids: expected a teacher whose forward takes input_ids, got Images"
    with pytest.raises(ValueError, match=message):
        teacher_inputs(nn.DataParallel(Images()), {"teacher_input_ids": torch.ones(2, 3)})
    assert "pixel_values" in teacher_inputs(Images(), {"teacher_pixel_values": torch.ones(2, 3)})


def test_collator_of_two_tokenizers_names_the_row() -> None:
    with pytest.raises(ValueError, match="TeacherCollator: row 1: expected teacher_input_ids, got input_ids, labels"):
        TeacherCollator(collate, tokenizer())([*two_tokenizers(1), *rows(1)])


# ---- parameters of both ----
def peft_of_the_teacher() -> tuple[Any, Any, str]:
    base = bert(0)
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["query"]))
    return student, base, "get_peft_model changes the model that it is given"


def one_embedding() -> tuple[Any, Any, str]:
    student, teacher = bert(1), bert(0, layers=4)
    student.bert.embeddings = teacher.bert.embeddings
    return student, teacher, r"got \d in both, as bert.embeddings.word_embeddings.weight"


def one_memory() -> tuple[Any, Any, str]:
    """Two parameters, but one tensor."""
    student, teacher = bert(1), bert(0)
    student.classifier.weight = nn.Parameter(teacher.classifier.weight.data)
    return student, teacher, "got 1 in both, as classifier.weight"


def frozen() -> tuple[Any, Any, str]:
    student, teacher, message = one_embedding()
    teacher.requires_grad_(False)
    return student, teacher, message


def itself() -> tuple[Any, Any, str]:
    student = bert(1)
    return student, student, "got the same module"


@pytest.mark.parametrize("case", [peft_of_the_teacher, one_embedding, one_memory, frozen, itself])
@pytest.mark.parametrize("init", [False, True], ids=["model", "model_init"])
def test_shared_parameters_are_refused(tmp_path: Path, case: Any, init: bool) -> None:
    student, teacher, message = case()
    trained = [p.requires_grad for p in student.parameters()]
    given = {"model_init": lambda: student} if init else {}
    expected = rf"DistillationTrainer: teacher: expected one that shares no parameters with model \(a copy.*{message}"
    with pytest.raises(ValueError, match=expected):
        trainer(tmp_path, None if init else student, rows(4), Hinton(), teacher=teacher, **given)
    assert [p.requires_grad for p in student.parameters()] == trained


def test_a_peft_student_beside_a_copy_of_its_base(tmp_path: Path) -> None:
    """Its token types reach the model inside, as do the hooks that read queries and keys."""
    base = bert(0)
    student = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    batch = collate(rows(4)) | {"token_type_ids": torch.ones(4, 1, dtype=torch.long)}
    assert "token_type_ids" in model_inputs(student, batch)
    objective = Terms(kl=Logits(), attention=Attention())
    it = trainer(tmp_path, student, rows(8), objective, teacher=base)
    before, start = copy.deepcopy(base), {name: p.detach().clone() for name, p in student.named_parameters()}
    it.train()
    assert min(logged(it, "attention")) > 1e-3
    same(base, before, 0.0)
    after = {name: p for name, p in student.named_parameters() if "lora" in name}
    assert len(after) == 4
    assert all((p - start[name]).abs().max() > 1e-4 for name, p in after.items())


# ---- where a teacher is ----
class Quantised(BertForSequenceClassification):  # type: ignore[misc]
    is_quantized = True

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("`.to` is not supported for `8-bit` models")


def dispatched(teacher: Any, folder: Path) -> Any:
    teacher.save_pretrained(folder / "teacher")
    places = dict.fromkeys(("bert.embeddings", "bert.encoder.layer.0", "bert.pooler"), "cpu")
    places |= dict.fromkeys(("bert.encoder.layer.1", "classifier"), "disk")
    return AutoModelForSequenceClassification.from_pretrained(
        folder / "teacher", device_map=places, offload_folder=folder / "offload"
    )


def quantised(teacher: Any, folder: Path) -> Any:
    made = Quantised(teacher.config).eval()
    made.load_state_dict(teacher.state_dict())
    return made


PLACES: dict[str, Any] = {"dispatched": dispatched, "quantised": quantised, "parallel": lambda t, _: nn.DataParallel(t)}


@pytest.mark.parametrize("place", PLACES)
def test_teachers_that_are_not_plain(tmp_path: Path, place: str) -> None:
    """Queries, hidden states and logits of theirs arrive; they train the student that a plain one does."""
    plain, given = bert(0), rows(12)
    students = bert(1), bert(1)
    losses = []
    for student, teacher in zip(students, (plain, PLACES[place](plain, tmp_path)), strict=True):
        objective = Terms(kl=Logits(temperature=2.0), hidden=Hidden(), relations=Relations(), attention=Attention())
        it = trainer(tmp_path, student, given, objective, teacher=teacher)
        it.train()
        losses.append([logged(it, name) for name in ("loss", *objective.terms)])
        assert not any(p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    assert all(min(values) > 1e-3 for values in losses[0])
    same(*students, 1e-5)
    if place == "dispatched":
        assert it.teacher.hf_device_map["classifier"] == "disk"
        assert it.teacher.classifier.weight.is_meta


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("bert-base-uncased", r"a module, as from_pretrained makes one of a name, got 'bert-base-uncased'"),
        ([1, 2], r"one module, or None, got a list of 2"),
        (BertForSequenceClassification, r"a module, got the class BertForSequenceClassification"),
        (SimpleNamespace(), r"one module, or None, got a SimpleNamespace"),
    ],
)
def test_what_is_no_teacher(tmp_path: Path, teacher: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^DistillationTrainer: teacher: expected {message}"):
        trainer(tmp_path, bert(1), rows(4), Hinton(), teacher=teacher)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Hinton, r"an object, such as Hinton\(\), got the class Hinton"),
        ({"kl": Logits()}, r"a kdfast.objective.Objective, such as Terms\(kl=Logits\(\)\), got dict"),
        (Logits(), r"named terms, such as Terms\(it=Logits\(\)\), got Logits alone"),
    ],
)
def test_what_is_no_objective(tmp_path: Path, objective: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^DistillationTrainer: objective: expected {message}"):
        trainer(tmp_path, bert(1), rows(4), objective, teacher=bert(0))


# ---- model_init ----
def linear() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(16, 24)


@pytest.mark.parametrize("make", [lambda: bert(1), lambda trial: bert(1), lambda seed=1: bert(seed)])
def test_model_init_starts_the_objective_anew_too(tmp_path: Path, make: Any) -> None:
    teacher, given = bert(0, width=24), rows(12)
    by_model = Terms(kl=Logits(), hidden=Hidden(projection=linear()))
    once = trainer(tmp_path, bert(1), given, by_model, teacher=teacher)
    once.train()
    objective = Terms(kl=Logits(), hidden=Hidden(projection=linear()))
    options = {"save_strategy": "steps", "save_steps": 2, "model_init": make}
    it = trainer(tmp_path, None, given, objective, teacher=teacher, **options)
    for _ in range(2):
        it.train()
        same(it.model, once.model, 1e-6)
        same(objective, by_model, 1e-6)
        assert not hasattr(it.model, "distillation")
    moved(it.model, bert(1))
    moved(objective.terms.hidden.projection, linear())
    saved = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "distillation.safetensors"} <= saved


def test_model_init_without_a_teacher(tmp_path: Path) -> None:
    it = trainer(tmp_path, None, rows(8), Terms(ce=Labels()), model_init=lambda: bert(1))
    it.train()
    moved(it.model, bert(1))
