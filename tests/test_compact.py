"""Smaller models compute what masked ones do, with the same gradients, of every architecture."""

from __future__ import annotations

import copy
from typing import Any

import pruned_oracle as oracle
import pytest
import tiny_models
import torch
import transformers as hf
from torch import Tensor, nn

import kdfast
from kdfast.prune import Masks, compact
from kdfast.prune.layers import layers_of
from kdfast.prune.modules import RepeatedHeads, WithoutHeads


def halves(model: nn.Module) -> Masks:
    """Of groups that are left one is read by two heads, the other by one."""
    return oracle.random_masks(model)


def nothing(model: nn.Module) -> Masks:
    """A layer without heads, one without neurons, one without both and one as it was."""
    masks = oracle.random_masks(model)
    masks.heads[0][:] = False
    masks.neurons[1][:] = False
    if len(masks.heads) > 2:
        masks.heads[2][:] = False
        masks.neurons[2][:] = False
    return masks


def layers(model: nn.Module) -> Masks:
    """The first layer is gone."""
    masks = oracle.random_masks(model)
    masks.layers[0] = model.config.model_type == "albert"  # whose layers share their weights
    return masks


CASES = (halves, nothing, layers)
EXACT = ("bert", "roberta", "distilbert", "electra", "albert", "mpnet", "gpt2")  # in float64; others round to float32


def old_name(name: str, smaller: nn.Module, masks: Masks) -> str:
    """A parameter's name in the whole model, where layers have other numbers."""
    kept = masks.layers.nonzero().flatten().tolist()
    for mine, (layer, i) in enumerate(zip(layers_of(smaller), kept, strict=True)):
        if name.startswith(f"{layer.name}."):
            return f"{layer.name.removesuffix(str(mine))}{i}{name.removeprefix(layer.name)}" if mine != i else name
    return name


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits
    if logits.dim() == 3:
        logits = logits * batch["attention_mask"][..., None]
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)).sum()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_computes_what_the_masked_model_does(name: str, case: Any) -> None:
    model = tiny_models.make(name)
    batch, masks, before = tiny_models.batch(model), case(model), copy.deepcopy(model.state_dict())
    whole, smaller = oracle.masked(model, masks), compact(model, masks)
    close = dict.fromkeys(("rtol", "atol"), 1e-10 if name in EXACT else 1e-5)
    expected, got = loss_of(whole, batch), loss_of(smaller, batch)
    torch.testing.assert_close(got, expected, **close)
    expected.backward()
    got.backward()
    theirs, left = dict(whole.named_parameters()), oracle.left(model, masks)
    for mine, parameter in smaller.named_parameters():
        full = old_name(mine, smaller, masks)
        wanted = oracle.taken(theirs[full].grad, left.get(full, {}))
        assert parameter.grad is not None, mine
        assert (parameter.grad - wanted).abs().max() <= close["atol"] * (1 + wanted.abs().max()), mine
        assert parameter.numel()
    assert expected.abs() > 1e-3
    assert sum(x.numel() for x in smaller.parameters()) < 0.9 * sum(x.numel() for x in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)  # the original is what it was
    torch.testing.assert_close(model(**batch).logits, tiny_models.make(name)(**batch).logits, rtol=0, atol=0)
