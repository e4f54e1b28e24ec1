"""Optimizers of smaller models go on where those of the masked ones were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pruned_oracle as oracle
import pytest
import tiny_models
import torch
import transformers as hf
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import kdfast
from kdfast.prune import Masks, compact

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=3e-3),
}


def groups_of(model: nn.Module, other: nn.Parameter) -> list[dict[str, Any]]:
    """As training scripts have them, with a parameter that is not the model's, and names."""
    named = [*model.named_parameters(), ("projection", other)]
    flat = [(name, x) for name, x in named if x.dim() < 2]
    return [{"params": [pair for pair in named if pair not in flat]}, {"params": flat, "weight_decay": 0.0}]


def train(model: Any, optimizer: Any, other: nn.Parameter, steps: range) -> None:
    for step in steps:
        batch = tiny_models.batch(model, seed=step, rows=2, length=5)
        labels = batch["input_ids"] if model.config.model_type in tiny_models.CAUSAL else batch["input_ids"][:, 0] % 2
        optimizer.zero_grad()
        (model(**batch, labels=labels).loss + (other**2).sum()).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "AdamW"), ("gpt2", "AdamW"), ("llama", "AdamW"), ("albert", "SGD"), ("bert", "NAdam")],
)
def test_goes_on_as_the_masked_model_does(name: str, kind: str) -> None:
    """100 steps: Adam's moments, step counters and settings are those of the weights that are left."""
    model = tiny_models.make(name)
    masks = oracle.random_masks(model)
    masks.heads[0][:] = False
    masks.neurons[1][:] = False
    masks.layers[-1] = name == "albert"
    kdfast.prune.apply(model, masks)
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = OPTIMIZERS[kind](groups_of(model, other))
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, other, range(3))
    scheduler.step()

    start = other.detach().clone()
    smaller, theirs = compact(model, masks, optimizer)
    assert type(theirs) is type(optimizer)
    whole_state = {id(x): state for x, state in optimizer.state.items()}
    train(model, optimizer, other, range(3, 103))
    trained = other.detach().clone()
    other.data.copy_(start)
    train(smaller, theirs, other, range(3, 103))
    torch.testing.assert_close(other.detach(), trained, rtol=0, atol=0)
    assert whole_state == {id(x): state for x, state in optimizer.state.items()}
    expected = compact(model, masks).state_dict()
    first = next(iter(expected))
    close = 1e-5 if name == "llama" else 1e-9  # llama rounds to float32 inside
    torch.testing.assert_close(smaller.state_dict(), expected, rtol=close, atol=close)
    assert (expected[first] - compact(tiny_models.make(name), masks).state_dict()[first]).abs().max() > 1e-3


def test_groups_names_and_schedules_come_along() -> None:
    model = tiny_models.make("llama")
    masks = oracle.random_masks(model)
    masks.layers[0] = False
    masks.heads[1][:] = False
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW(groups_of(model, other), lr=0.1)
    optimizer.add_param_group({"params": [("alone", nn.Parameter(torch.ones(2)))], "lr": torch.tensor(0.3)})
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, other, range(1))
    scheduler.step()
    smaller, theirs = compact(model, masks, optimizer)
    mine = dict(smaller.named_parameters())
    for group, before in zip(theirs.param_groups, optimizer.param_groups, strict=True):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameter is mine.get(name, before["params"][-1])
        settings = [{name: x for name, x in one.items() if not name.startswith("param")} for one in (group, before)]
        assert settings[0] == settings[1]
    assert {*theirs.param_groups[0]["param_names"], *theirs.param_groups[1]["param_names"]} == {*mine, "projection"}
    assert theirs.param_groups[0]["lr"] == 0.05
    assert {*theirs.state} == {*mine.values(), other}
    assert theirs.param_groups[2]["lr"] is not optimizer.param_groups[2]["lr"]
    scheduler.optimizer = theirs
    theirs.step()
    scheduler.step()
    assert theirs.param_groups[0]["lr"] == pytest.approx(0.1 / 3)
    theirs.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("of", ["torch", "transformers"])
def test_factored_moments_are_cut_on_their_side(of: str) -> None:
    """Of matrices, square ones too, where a vector of either side has the same length."""
    model = tiny_models.make("bert", intermediate_size=48).float()
    masks = oracle.random_masks(model)
    make = torch.optim.Adafactor if of == "torch" else hf.Adafactor
    optimizer = make(model.parameters(), lr=1e-3, **({} if of == "torch" else {"relative_step": False}))
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    smaller, theirs = compact(model, masks, optimizer)
    rows, columns = ("row_var", "col_var") if of == "torch" else ("exp_avg_sq_row", "exp_avg_sq_col")
    for name, index in oracle.left(model, masks).items():
        if not name.endswith("weight"):
            continue
        before = optimizer.state[model.get_parameter(name)]
        after = theirs.state[smaller.get_parameter(name)]
        for side, moment in ((0, rows), (1, columns)):
            expected = before[moment].flatten()[index[side]] if side in index else before[moment].flatten()
            torch.testing.assert_close(after[moment].flatten(), expected, rtol=0, atol=0)
            assert after[moment].dim() == before[moment].dim()
            assert len(expected) == smaller.get_parameter(name).shape[side]
    for parameter in smaller.parameters():
        parameter.grad = torch.rand_like(parameter)
    theirs.step()


class Odd(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["blocks"] = [torch.zeros(parameter.numel() // 2)]


def test_state_of_unknown_shape_is_refused() -> None:
    model = tiny_models.make("bert")
    masks = oracle.random_masks(model)
    odd = Odd(model.parameters(), lr=0.1)
    odd.step()
    with pytest.raises(
        ValueError,
        match=r"kdfast.prune.compact: optimizer: blocks of bert.encoder.layer.0.attention.self.query.weight: expected the "
        r"parameter's shape \[48, 48\], its rows, its columns or one number, got shape \[1152\]",
    ):
        compact(model, masks, odd)
    compact(model, Masks.full(model), odd)
    for wrong in (torch.optim.LBFGS(model.parameters()), "adam"):
        with pytest.raises(
            TypeError, match=r"kdfast.prune.compact: optimizer: expected an optimizer of torch with state"
        ):
            compact(model, masks, wrong)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = tiny_models.make("bert"), tiny_models.make("bert")
    expected = "optimizer: expected one that trains model, got one that has none of its parameters"
    with pytest.raises(ValueError, match=f"kdfast.prune.compact: {expected}"):
        compact(model, Masks.full(model), torch.optim.AdamW(other.parameters()))
