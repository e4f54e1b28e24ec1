"""Narrower hidden states, against models whose norms see only what is left."""

from __future__ import annotations

import copy
from pathlib import Path
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

NARROW = tuple(name for name in tiny_models.NAMES if not name.startswith("gemma"))
LIVE = 30  # of 48: a multiple of the six heads


def masks_of(model: Any) -> Masks:
    masks = oracle.random_masks(model)
    masks.hidden = torch.zeros(model.config.hidden_size, dtype=torch.bool)
    masks.hidden[torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(3))[:LIVE]] = True
    return masks


class OfLiving(nn.Module):
    """A norm over some of the numbers of a hidden state, zeros in place of the others."""

    def __init__(self, norm: nn.Module, live: Tensor) -> None:
        super().__init__()
        self.norm, self.live = copy.deepcopy(norm), live
        for name, parameter in norm.named_parameters():
            setattr(self.norm, name, nn.Parameter(parameter.detach()[live]))
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.normalized_shape = (int(live.sum()),)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden).masked_scatter(self.live, self.norm(hidden[..., self.live]))


def by_hand(model: nn.Module, masks: Masks) -> Any:
    """Everything dead along the width is zero in what adds to hidden states, and norms do not see it."""
    whole, width = oracle.masked(model, masks), len(masks.hidden)
    for layer in layers_of(whole):
        for name in (layer.adapter.output, layer.adapter.contract):
            linear: Any = layer.module.get_submodule(name)
            with torch.no_grad():
                (linear.weight if isinstance(linear, nn.Linear) else linear.weight.mT)[~masks.hidden] = 0
                if linear.bias is not None:
                    linear.bias[~masks.hidden] = 0
    for name, module in [*whole.named_modules()]:
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            if len(module.weight) == width:
                whole.set_submodule(name, OfLiving(module, masks.hidden))
        elif getattr(module, "embedding_dim", 0) == width or name.endswith(("_in", "_project")):
            with torch.no_grad():
                if isinstance(module, nn.Embedding):
                    module.weight[:, ~masks.hidden] = 0
                else:
                    module.weight[~masks.hidden], module.bias[~masks.hidden] = 0, 0
    return whole


@pytest.mark.parametrize("name", NARROW)
def test_computes_what_is_left_and_is_loaded_again(name: str, tmp_path: Path) -> None:
    model = tiny_models.make(name, kind=hf.AutoModel)
    masks, batch = masks_of(model), tiny_models.batch(model)
    smaller = compact(model, masks)
    expected = by_hand(model, masks)(**batch)[0][..., masks.hidden]
    got = smaller(**batch)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.1
    assert smaller.config.hidden_size == LIVE
    smaller.save_pretrained(tmp_path)
    loaded = hf.AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch)[0], got)
    assert {n: x.shape for n, x in loaded.state_dict().items()} == {n: x.shape for n, x in smaller.state_dict().items()}
    again = Masks.full(loaded)
    again.hidden = torch.arange(LIVE) >= 6
    again.heads[0][0] = False
    assert compact(loaded, again)(**batch)[0].shape[-1] == LIVE - 6


def sliced(state: dict[str, Tensor], masks: Masks, head: list[int], neuron: list[int]) -> dict[str, Tensor]:
    """A BERT's or a Llama's state by the names of its parameters; the same heads and neurons in all layers."""
    hidden, size = masks.hidden.nonzero().flatten().tolist(), 8
    rows = [h * size + j for h in head for j in range(size)]
    made = {}
    for name, x in state.items():
        kind = name.rpartition(".")[0].rpartition(".")[2]
        if "layer" not in name or kind in ("LayerNorm", "input_layernorm", "post_attention_layernorm"):
            # embeddings, norms, poolers and heads, but for what is by word or by class
            x = x[hidden] if x.dim() == 1 and len(x) == tiny_models.WIDTH else x
            x = x[:, hidden] if x.dim() == 2 else x
            x = x[hidden] if name in ("cls.predictions.transform.dense.weight",) else x
        elif kind in ("query", "key", "value", "q_proj", "k_proj", "v_proj"):
            x = x[rows][:, hidden] if x.dim() == 2 else x[rows]
        elif kind in ("gate_proj", "up_proj") or "intermediate" in name:
            x = x[neuron][:, hidden] if x.dim() == 2 else x[neuron]
        else:
            taken = rows if "attention" in name or kind == "o_proj" else neuron
            x = x[hidden][:, taken] if x.dim() == 2 else x[hidden]
        made[name] = x
    return made


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_is_what_the_class_makes_of_weights_cut_by_hand(name: str, tmp_path: Path) -> None:
    """With five of six heads and 40 of 48 numbers, a plain BERT with heads of 8."""
    kind = hf.AutoModelForMaskedLM if name == "bert" else hf.AutoModelForCausalLM
    grouped = {} if name == "bert" else {"num_key_value_heads": 6}
    model = tiny_models.make(name, kind=kind, tie_word_embeddings=True, **grouped)
    masks, heads, neurons = Masks.full(model), [0, 1, 3, 4, 5], [*range(20), 30]
    masks.hidden = torch.ones(48, dtype=torch.bool)
    masks.hidden[[0, 7, 11, 20, 21, 22, 40, 47]] = False
    for of_heads, of_neurons in zip(masks.heads, masks.neurons, strict=True):
        of_heads[2] = False
        of_neurons[[i for i in range(len(of_neurons)) if i not in neurons]] = False
    config = copy.deepcopy(model.config)
    config.hidden_size, config.num_attention_heads, config.intermediate_size = 40, 5, len(neurons)
    if name == "llama":
        config.num_key_value_heads, config.head_dim = 5, 8
    by_class = type(model)(config).double().eval()
    by_class.load_state_dict(sliced(model.state_dict(), masks, heads, neurons))
    smaller = compact(model, masks)
    batch = tiny_models.batch(model)
    torch.testing.assert_close(smaller(**batch).logits, by_class(**batch).logits, rtol=1e-9, atol=1e-9)
    assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight
    assert not hasattr(smaller.config, "quantization_config")
    assert {**vars(smaller.config)} == {**vars(config)}
    smaller.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, smaller(**batch).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_heads_of_every_kind_and_the_optimizer_come_along() -> None:
    for kind in (hf.AutoModelForSequenceClassification, hf.AutoModelForTokenClassification, hf.AutoModelForMaskedLM):
        for name in ("electra", "roberta", "modernbert", "distilbert"):
            same = {"embedding_size": tiny_models.WIDTH} if name == "electra" else {}
            model = tiny_models.make(name, kind=kind, **same)
            optimizer = torch.optim.AdamW(model.parameters())
            batch = tiny_models.batch(model)
            model(**batch).logits.sum().backward()
            optimizer.step()
            smaller, theirs = compact(model, masks_of(model), optimizer)
            smaller(**batch).logits.sum().backward()
            theirs.step()
            assert all(x.shape == theirs.state[x]["exp_avg"].shape for x in smaller.parameters() if x in theirs.state)
            assert getattr(smaller.config, "embedding_size", LIVE) == LIVE
            assert f"{LIVE}" in repr(smaller)
            assert f"={tiny_models.WIDTH}" not in repr(smaller)


def test_errors_and_plans() -> None:
    model = tiny_models.make("bert")
    masks = masks_of(model)
    assert Masks.from_json(masks.to_json()) == masks
    assert masks != oracle.random_masks(model)
    assert masks.copy() == masks
    assert "30 of 48 hidden" in repr(masks)
    with pytest.raises(ValueError, match=r"kdfast.prune.apply: masks.hidden: expected None or all True"):
        kdfast.prune.apply(model, masks)
    masks.hidden[masks.hidden.nonzero()[0]] = False
    with pytest.raises(
        ValueError, match=r"kdfast.prune.compact: masks.hidden: expected a width that BertModel takes .*29"
    ):
        compact(model, masks)
    masks.hidden[:] = False
    with pytest.raises(ValueError, match=r"kdfast.prune.compact: masks.hidden: expected at least one that is True"):
        compact(model, masks)
    masks.hidden = torch.ones(47, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"kdfast.prune.compact: masks.hidden: expected a bool tensor of shape \[48\]"):
        compact(model, masks)
    gemma = tiny_models.make("gemma")
    with pytest.raises(ValueError, match=r"kdfast.prune.compact: masks.hidden: expected None for Gemma"):
        compact(gemma, masks_of(gemma))
    model.bert.own = nn.Linear(48, 48)
    with pytest.raises(ValueError, match=r"model: expected the parameters that BertForSequenceClassification makes"):
        compact(model, masks_of(model))
