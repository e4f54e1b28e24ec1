"""Smaller models in onnxruntime: layers of uneven heads and neurons compute there what they do in torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from kdfast import prune

onnxruntime = pytest.importorskip("onnxruntime")  # of the extra `test`

HEADS = (
    [0, 1, 2, 4],
    [],
    [5],
)  # of each layer; where keys and values are grouped, three read one group and one another
NEURONS = ([*range(0, 37, 3)], [3], [])


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def uneven(name: str) -> Any:
    model = tiny_models.make(name, use_cache=False).float()
    masks = prune.Masks.full(model)
    for mask, living in zip((*masks.heads, *masks.neurons), (*HEADS, *NEURONS), strict=True):
        mask[:] = False
        mask[living] = True
    return prune.compact(model, masks)


def exported(model: nn.Module, batch: dict[str, Tensor], path: Path, dynamo: bool) -> Any:
    """An onnxruntime session of a model, exported with this batch."""
    names = {0: "rows", 1: "tokens"}
    free = {"dynamic_shapes" if dynamo else "dynamic_axes": dict.fromkeys(batch, names)}
    with warnings.catch_warnings():  # torch's own, of what its exporters will be
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, tuple(batch.values()), path, input_names=[*batch], dynamo=dynamo, opset_version=18, **free
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


# torch's exporter, which takes seconds, and its older one: groups of keys that repeat (llama), one map for queries, keys
# and values (gpt2, modernbert) and for both halves of a gated network (modernbert), a bias for each head (mpnet).
@pytest.mark.parametrize(
    ("name", "dynamo"),
    [("bert", True), ("llama", True), ("bert", False), ("gpt2", False), ("modernbert", False), ("mpnet", False)],
)
def test_uneven_heads_compute_what_they_do_in_torch(name: str, dynamo: bool, tmp_path: Path) -> None:
    model = Logits(uneven(name)).eval()
    batch = tiny_models.batch(model.model)
    session = exported(model, batch, tmp_path / "model.onnx", dynamo)
    for given in (batch, tiny_models.batch(model.model, seed=2, rows=5, length=9)):
        expected = model(**given).detach()
        (found,) = session.run(None, {name: x.numpy() for name, x in given.items()})
        counts = given["attention_mask"].bool() if expected.dim() == 3 else slice(None)
        assert expected.std() > 0.01
        torch.testing.assert_close(torch.from_numpy(found)[counts], expected[counts], rtol=0, atol=1e-4)
