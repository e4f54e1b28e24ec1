"""`kdfast.prune.Masks`: what lives, as JSON and back, and checked against a model."""

from __future__ import annotations

import json
from typing import Any

import pruning_oracle as oracle
import pytest
import tiny_models
import torch

from kdfast.prune import Masks, apply


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_json_and_back(name: str) -> None:
    model = tiny_models.make(name)
    batch = tiny_models.batch(model)
    for masks in (Masks.full(model), *oracle.patterns(model).values()):
        again = Masks.from_json(masks.to_json())
        again.check(model)
        assert again == masks
        assert (again == Masks.full(model)) is (masks == Masks.full(model))
    apply(model, masks)
    expected = model(**batch).logits
    model = tiny_models.make(name)
    apply(model, again)
    assert torch.equal(model(**batch).logits, expected)


def test_the_plan_lists_what_is_kept() -> None:
    model = tiny_models.make("llama")
    masks = Masks.full(model)
    masks.heads[0][:] = False
    masks.heads[1][[0, 4]] = False
    masks.neurons[1][3:] = False
    masks.layers[2] = False
    plan = json.loads(masks.to_json())
    assert (plan["version"], plan["model_type"]) == (1, "llama")
    groups = [0, 0, 0, 1, 1, 1]
    assert plan["layers"][1] == {
        "lives": True,
        "heads": {"of": 6, "kept": [1, 2, 3, 5]},
        "neurons": {"of": 37, "kept": [0, 1, 2]},
        "groups": groups,
    }
    assert plan["layers"][0]["heads"] == {"of": 6, "kept": []}
    assert plan["layers"][2]["lives"] is False
    assert len(masks.to_json().splitlines()) == 5  # a line for each layer


def changed(path: tuple[Any, ...], value: Any) -> str:
    plan = json.loads(Masks.full(tiny_models.make("bert")).to_json())
    at = plan
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(plan)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "expected version 1, got 2"),
        (("layers", 0, "lives"), 1, "expected lives: true or false, got 1"),
        (
            ("layers", 1, "heads", "kept"),
            [0, 6],
            r"heads of layer 1: numbers from 0 to 5, sorted, each once, got 6 among \[0, 6\]",
        ),
        (("layers", 1, "heads", "kept"), [-1], "heads of layer 1"),
        (("layers", 2, "neurons", "kept"), [3, 1], "neurons of layer 2: numbers from 0 to 36"),
        (("layers", 2, "neurons", "kept"), [1, 1], "neurons of layer 2"),
        (("layers", 2, "neurons", "kept"), [1.0], "expected lists of whole numbers"),
        (("layers", 2, "groups"), "no", "expected lists of whole numbers, got 'no'"),
        (("layers", 0), {}, "KeyError: 'heads'"),
        (("layers",), 3, "TypeError"),
    ],
)
def test_a_wrong_plan_says_what_is_wrong(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^kdfast.prune.Masks.from_json: text: .*{message}"):
        Masks.from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_no_plan_at_all(text: str) -> None:
    with pytest.raises(ValueError, match=r"^kdfast.prune.Masks.from_json: text: expected what Masks.to_json writes"):
        Masks.from_json(text)


def wrong(name: str, masks: Masks) -> None:
    if name == "of layers":
        del masks.heads[-1]
    elif name == "of heads":
        masks.heads[1] = torch.ones(5, dtype=torch.bool)
    elif name == "dtype":
        masks.neurons[1] = torch.ones(37)
    elif name == "device":
        masks.neurons[1] = masks.neurons[1].to("meta")
    elif name == "type":
        masks.layers = [True] * 3  # type: ignore[assignment]
    elif name == "groups":
        masks.groups[2] = torch.tensor([0, 0, 1, 1, 2, 2])
    else:
        masks.model_type = "bert"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("of layers", ValueError, r"masks.heads: expected a tensor for each of 3 layers, got 2 tensors"),
        (
            "of heads",
            ValueError,
            r"masks.heads\[1\]: expected a bool tensor of shape \[6\] on the CPU, got shape \[5\]",
        ),
        (
            "dtype",
            TypeError,
            r"masks.neurons\[1\]: expected a bool tensor of shape \[37\] on the CPU, got torch.float32",
        ),
        ("device", ValueError, r"masks.neurons\[1\]: .* got shape \[37\] on meta"),
        ("type", TypeError, r"masks.layers: expected a bool tensor of shape \[3\] on the CPU, got list"),
        (
            "groups",
            ValueError,
            r"masks.groups\[2\]: expected the model's, \[0, 0, 0, 1, 1, 1\], got \[0, 0, 1, 1, 2, 2\]",
        ),
        ("architecture", ValueError, "masks: expected those of a model of type 'llama', got those of 'bert'"),
    ],
)
def test_masks_of_another_model_are_refused(name: str, kind: type[Exception], message: str) -> None:
    model = tiny_models.make("llama")
    masks = Masks.full(model)
    wrong(name, masks)
    with pytest.raises(kind, match=rf"^kdfast.prune.Masks.check: {message}"):
        masks.check(model)
    with pytest.raises(kind, match=rf"^kdfast.prune.apply: {message}"):
        apply(model, masks)


def test_layers_of_albert_cannot_be_dropped() -> None:
    model = tiny_models.make("albert")
    masks = Masks.full(model)
    assert len(masks.heads) == 2  # four layers, two of which share their weights
    masks.layers[1] = False
    with pytest.raises(ValueError, match=r"masks.layers: expected all True for ALBERT, .* got False at \[1\]"):
        apply(model, masks)


def test_no_masks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^kdfast.prune.apply: masks: expected kdfast.prune.Masks, got list"):
        apply(tiny_models.make("bert"), [])


def test_copies_and_equality() -> None:
    masks = Masks.full(tiny_models.make("llama"))
    for change in (
        lambda m: m.heads[0].__setitem__(0, False),
        lambda m: m.neurons[2].__setitem__(0, False),
        lambda m: m.layers.__setitem__(0, False),
        lambda m: m.heads.pop(),
        lambda m: setattr(m, "model_type", "qwen2"),
    ):
        other = masks.copy()
        assert other == masks
        change(other)
        assert other != masks
    assert masks == Masks.full(tiny_models.make("llama", seed=1))
    assert masks != 3
    with pytest.raises(TypeError):
        hash(masks)


def test_a_short_repr_tells_what_lives() -> None:
    model = tiny_models.make("llama")
    masks = Masks.full(model)
    assert repr(masks) == "Masks(llama: 3 of 3 layers, 18 of 18 heads, 111 of 111 neurons)"
    masks.heads[0][:] = False
    masks.heads[1][1] = False
    masks.neurons[1][:] = False
    masks.layers[2] = False
    expected = "2 of 3 layers, 5 of 18 heads (none in layer 0), 37 of 111 neurons (none in layer 1)"
    assert repr(masks) == f"Masks(llama: {expected})"


def test_a_group_is_dropped_with_its_heads() -> None:
    masks = Masks.full(tiny_models.make("llama"))
    masks.drop_group(1, 0)
    assert masks.heads[1].tolist() == [False] * 3 + [True] * 3
    with pytest.raises(ValueError, match=r"^kdfast.prune.Masks.drop_group: group: expected 0 to 1, got 2"):
        masks.drop_group(1, 2)


def test_another_default_device() -> None:
    model = tiny_models.make("llama")
    batch = tiny_models.batch(model)
    with torch.device("meta"):
        masks = Masks.full(model)
        assert masks.heads[0].is_cpu
        masks.heads[0][[3, 5]] = False
        masks = Masks.from_json(masks.copy().to_json())
        apply(model, masks)
    with oracle.zeroed(tiny := tiny_models.make("llama"), masks):
        torch.testing.assert_close(model(**batch).logits, tiny(**batch).logits, rtol=1e-12, atol=1e-12)
