"""Criteria and schedules over two ranks (gloo), each with its own batches: the scores of all, and the same masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
import transformers
from criteria_oracle import labelled
from ranks import spawn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kdfast import prune
from kdfast.prune import criteria, schedules
from kdfast.prune.select import live_masks

RANKS = 2
KINDS: tuple[Any, ...] = ("heads", "neurons")
# But LASSO's, which needs scikit-learn and reads what ThiNet does.
READING = [name for name, each in criteria.CRITERIA.items() if each.needs in ("batches", "labels") and name != "lasso"]


def batches_of(model: Any) -> list[dict[str, Tensor]]:
    return [labelled(model, seed, rows=rows) for seed, rows in ((1, 3), (2, 5), (3, 2))]


def same_on_all(x: Tensor) -> bool:
    every = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(every, x.contiguous())
    return torch.equal(*every)


# ---- scores ----
def check_scores(rank: int, path: str) -> None:
    """Of uneven batches, and where a rank has none."""
    model = tiny_models.make("bert")
    batches, expected = batches_of(model), torch.load(path)
    ddp = DistributedDataParallel(model)
    for split in ([batches[:1], batches[1:]], [[], batches]):
        for (criterion, of), want in expected.items():
            got = criteria.score(ddp, criterion, of, split[rank])
            for found, exact in zip(got.values.values(), want, strict=True):
                torch.testing.assert_close(
                    found, exact, rtol=1e-7, atol=1e-9 * float(exact.abs().max()), msg=f"{criterion} {of}"
                )
                assert same_on_all(found)
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        criteria.score(ddp, "taylor", "heads", [])


def test_scores(tmp_path: Path) -> None:
    model = tiny_models.make("bert")
    batches, path = batches_of(model), tmp_path / "expected.pt"
    expected = {(name, of): criteria.score(model, name, of, batches).values for name in READING for of in KINDS}
    torch.save({key: [*values.values()] for key, values in expected.items()}, path)
    assert len(expected) == 2 * len(READING) > 20
    spawn(check_scores, RANKS, tmp_path, str(path))


def check_compensation(rank: int, path: str) -> None:
    model = tiny_models.make("bert")
    batches, (masks, expected) = batches_of(model), torch.load(path)
    criteria.compensate(model, prune.Masks.from_json(masks), [batches[:1], batches[1:]][rank])
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_compensation(tmp_path: Path) -> None:
    model = tiny_models.make("bert")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    masks = prune.select(model, [criteria.score(model, "l2", of) for of in KINDS], keep=0.5)
    criteria.compensate(model, masks, batches_of(model))
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
    torch.save((masks.to_json(), model.state_dict()), tmp_path / "expected.pt")
    spawn(check_compensation, RANKS, tmp_path, str(tmp_path / "expected.pt"))


# ---- schedules ----
class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(3, tiny_models.VOCABULARY, (16, 7), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ones = torch.ones(7, dtype=torch.int64)
        return {"input_ids": self.ids[i], "attention_mask": ones, "labels": self.ids[i, 0] % 2}


def train(model: Any, folder: Path, callbacks: list[Any]) -> None:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks).train()


def callbacks_of(schedule: str, model: Any, batches: list[dict[str, Tensor]]) -> list[Any]:
    """The schedule first, then what it needs."""

    def scores(of_model: Any) -> list[prune.Scores]:
        return [criteria.score(of_model, "taylor", of, batches) for of in KINDS]

    if schedule == "soft":
        return [schedules.SoftPruning(scores, keep=0.5)]
    if schedule == "surgery":
        return [schedules.Surgery(decay=0.1)]
    rate = schedules.Cubic(0.5, end=5)
    if schedule == "taylor":
        return [schedules.Pruning(rate, scores)]
    tracker = criteria.track(model, schedule, KINDS)
    own = [schedules.Pruning(rate, lambda _: [tracker.scores(of) for of in KINDS], every=2)]
    return [*own, schedules.Tracking(tracker)]


def check_schedules(rank: int, folder: str) -> None:
    for schedule in ("taylor", "movement", "hard_concrete", "soft", "surgery"):
        model = tiny_models.make("bert")
        batches = batches_of(model)
        callbacks = callbacks_of(schedule, model, [batches[:1], batches[1:]][rank])
        train(model, Path(folder) / schedule, callbacks)
        masks = callbacks[0].masks
        living = torch.cat([*masks.heads, *masks.neurons])
        assert 0 < int(living.sum()) < len(living), schedule
        assert same_on_all(living.to(torch.uint8)), schedule
        assert live_masks(model) == masks, schedule
        for name, x in model.state_dict().items():
            assert same_on_all(x), f"{schedule}: {name}"
        if len(callbacks) > 1:
            tracker = callbacks[1].tracker
            assert all(same_on_all(x) for of in KINDS for x in tracker.values(of)), schedule
            assert any(float(x.abs().max()) > 0 for x in tracker.values("neurons")), schedule


def test_schedules(tmp_path: Path) -> None:
    spawn(check_schedules, RANKS, tmp_path, str(tmp_path))
