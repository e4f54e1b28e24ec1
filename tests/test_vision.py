"""Models of images, whose batches have no input_ids: all tokens of their hidden states count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from objective_outputs import kl
from tiny_berts import logged, moved, same, trainer
from torch import Tensor, nn
from transformers import default_data_collator

from kdfast import hf
from kdfast.objective import CLS, Attention, Cosine, Embedding, Hidden, Labels, Logits, Relations, Terms, token_mask

CLASSES, IMAGE, PATCH, HEADS = 3, 8, 4, 2
KINDS = {
    "vit": transformers.ViTForImageClassification,
    "deit": transformers.DeiTForImageClassification,
    "dinov2": transformers.Dinov2ForImageClassification,
}


def model(seed: int, width: int = 16, layers: int = 2, kind: str = "vit") -> Any:
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=width, num_hidden_layers=layers, num_attention_heads=HEADS, intermediate_size=32, image_size=IMAGE,
        patch_size=PATCH, num_labels=CLASSES, initializer_range=0.4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    made = KINDS[kind](config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def images(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(count, 3, IMAGE, IMAGE, generator=generator)
    return [{"pixel_values": pixels[i], "labels": i % CLASSES} for i in range(count)]


def batch(count: int) -> dict[str, Tensor]:
    made: dict[str, Tensor] = default_data_collator(images(count))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_reader(kind: str) -> None:
    """Softmaxes of the scores that are read are the probabilities of eager attention."""
    it, pixels = model(0, kind=kind), batch(2)["pixel_values"]
    with torch.no_grad():
        with hf.Reader(it) as reader:
            features = reader(pixel_values=pixels)
        it.set_attn_implementation("eager")
        expected = it(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    for scores, probabilities in zip(features.scores, expected.attentions, strict=True):
        assert probabilities.std() > 1e-3
        torch.testing.assert_close(scores.softmax(-1), probabilities, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.hidden, expected.hidden_states, rtol=1e-4, atol=1e-4)
    assert features.mask is None
    assert features.cls_index == 0


LABELS = batch(5)["labels"]


# ---- terms, by hand: of Features of student and teacher, for layers 1 and 2 of two and four ----
def scores(read: Any, layer: int, a: str, b: str) -> Tensor:
    first, second = getattr(read, a)[layer], getattr(read, b)[layer]
    return first @ second.mT / first.shape[-1] ** 0.5


def of_relations(s: Any, t: Any) -> Tensor:
    both = (("q", "k"), ("v", "v"))
    return sum(kl(scores(t, -1, *pair).log_softmax(-1), scores(s, -1, *pair).log_softmax(-1)).mean() for pair in both)  # type: ignore[return-value]


def of_cls(s: Any, t: Any) -> Tensor:
    return (F.normalize(s.hidden[1][:, 0], dim=-1) - F.normalize(t.hidden[2][:, 0], dim=-1)).square().mean()


PAIRS = ((1, 2), (2, 4))
BY_HAND: dict[str, tuple[Any, Callable[[Any, Any], Tensor]]] = {
    "kl": (Logits(), lambda s, t: kl(t.logits.log_softmax(-1), s.logits.log_softmax(-1)).mean()),
    "ce": (Labels(), lambda s, t: F.cross_entropy(s.logits, getattr(s, "labels", LABELS))),
    "hidden": (Hidden(), lambda s, t: sum(F.mse_loss(s.hidden[i], t.hidden[j]) for i, j in PAIRS)),
    "padded": (Hidden(masked=False), lambda s, t: sum(F.mse_loss(s.hidden[i], t.hidden[j]) for i, j in PAIRS)),
    "embedding": (Embedding(), lambda s, t: F.mse_loss(s.hidden[0], t.hidden[0])),
    "cosine": (Cosine(), lambda s, t: (1 - F.cosine_similarity(s.hidden[-1], t.hidden[-1], dim=-1)).mean()),
    "cls": (CLS(), of_cls),
    "attention": (
        Attention(),
        lambda s, t: sum(F.mse_loss(scores(s, i - 1, "q", "k"), scores(t, j - 1, "q", "k")) for i, j in PAIRS),
    ),
    "relations": (Relations(), of_relations),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "sample_weight"])
@pytest.mark.parametrize("name", BY_HAND)
def test_terms(name: str, weighted: bool) -> None:
    term, by_hand = BY_HAND[name]
    objective, student, inputs = Terms(it=term), model(1), batch(5)
    read = [hf.Reader(m)(pixel_values=inputs["pixel_values"]) for m in (student, model(0, layers=4))]
    part = read
    if weighted:  # the same as the first row twice, and the third not at all
        inputs["sample_weight"] = torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0])
        part = [cut(x, torch.tensor([0, 0, 1, 3, 4])) for x in read]
    value = objective(*read, inputs)["it"]
    assert value > 1e-3
    torch.testing.assert_close(value, by_hand(*part), rtol=1e-4, atol=1e-6)
    of_student = list(student.parameters())
    mine, its = (
        torch.autograd.grad(x, of_student, allow_unused=True, retain_graph=True) for x in (value, by_hand(*part))
    )
    assert sum(float(g.norm()) for g in its if g is not None) > 1e-3
    for a, b in zip(mine, its, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * max(1.0, float(b.norm())))


def cut(read: Any, rows: Tensor) -> Any:
    """The rows of what a model left."""

    class Part:
        logits, labels, hidden = read.logits[rows], LABELS[rows], [x[rows] for x in read.hidden]
        q, k, v = ([x[rows] for x in getattr(read, name)] for name in "qkv")

    return Part


def every(projection: nn.Linear) -> Terms:
    terms = {
        name: term
        for name, (term, _) in BY_HAND.items()
        if name not in ("hidden", "padded", "embedding", "cls", "cosine")
    }
    return Terms(**terms, hidden=Hidden(projection=projection))


def linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(16, 24)


def test_unequal_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    """Counts tell the shares that means of micro-batches have, of 3, 3 and 1 image."""
    teacher, given, students = model(0, width=24, layers=4), images(7), [model(1), model(1)]
    whole, parts = (
        trainer(
            tmp_path, student, given, every(linear()), teacher=teacher, data_collator=default_data_collator,
            per_device_train_batch_size=size, gradient_accumulation_steps=-(-7 // size),
        )
        for student, size in zip(students, (7, 3), strict=True)
    )  # fmt: skip
    for it in (whole, parts):
        it.train()
        assert len(logged(it)) == 1
    for name in ("loss", *whole.objective.terms):
        torch.testing.assert_close(logged(parts, name), logged(whole, name), rtol=1e-4, atol=1e-5)
        assert logged(whole, name)[0] > 1e-3
    same(students[1], students[0], 1e-5)
    moved(students[0].classifier, model(1).classifier)


def test_evaluation_and_predictions(tmp_path: Path) -> None:
    student, teacher, given = model(1), model(0, layers=4), images(7)
    objective = Terms(**{name: term for name, (term, _) in BY_HAND.items()})
    found = []
    for size in (2, 7):
        it = trainer(
            tmp_path, student, None, objective, teacher=teacher, eval_dataset=given, data_collator=default_data_collator,
            per_device_eval_batch_size=size,
        )  # fmt: skip
        found.append(it.evaluate())
    for name in ("loss", *objective.terms, "kl_to_teacher"):
        assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], rel=1e-4)
        assert found[0][f"eval_{name}"] > 1e-3
    assert it.predict(given).predictions.shape == (7, CLASSES)


def test_token_mask_without_tokens() -> None:
    inputs = batch(2)
    assert token_mask(inputs, (2, 5)).tolist() == [[True] * 5] * 2
    mask = torch.tensor([[1, 0], [1, 1]])
    assert token_mask({"attention_mask": mask, **inputs}, (2, 2)).tolist() == mask.bool().tolist()
    assert token_mask({"input_ids": torch.ones(3, 4)}).shape == (3, 4)
    message = (
        r"kdfast.objective: attention_mask: expected the hidden states' \[2, 5\], a number for each token, got \[2, 2\]"
    )
    with pytest.raises(ValueError, match=message):
        token_mask({"attention_mask": mask, **inputs}, (2, 5))


def test_sounds() -> None:
    """`input_features`; and of models that shorten them to fewer tokens."""
    torch.manual_seed(0)
    sizes = {
        "d_model": 16,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "num_mel_bins": 6,
        "max_source_positions": 5,
    }
    student, teacher = (
        transformers.WhisperForAudioClassification(
            transformers.WhisperConfig(**sizes, encoder_layers=n, classifier_proj_size=8, num_labels=CLASSES)
        ).eval()
        for n in (1, 2)
    )
    inputs = {"input_features": torch.randn(3, 6, 10), "labels": torch.arange(3)}
    objective = Terms(kl=Logits(), hidden=Hidden(), cosine=Cosine(), cls=CLS("uniform"))
    s, t = (objective.run(m, inputs) for m in (student, teacher))
    values = objective(s, t, inputs)
    assert s.hidden[-1].shape == (3, 5, 16)
    torch.testing.assert_close(values["hidden"], F.mse_loss(s.hidden[1], t.hidden[2]))
    cosine = (1 - F.cosine_similarity(s.hidden[-1], t.hidden[-1], dim=-1)).mean()
    torch.testing.assert_close(values["cosine"], cosine)
    assert min(values["kl"], values["cls"], cosine, values["hidden"]) > 1e-5
    assert objective.num_items(inputs).tolist() == [3, 3, 3, 3]
