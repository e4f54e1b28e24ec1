"""TRL's trainers with kdfast under them: the same losses, gradients and metrics as without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from language_models import PAD, VOCABULARY
from other_libraries import same
from ranks import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kdfast.integrations import trl as ours
from kdfast.integrations.trl import use_kdfast

trl = pytest.importorskip("trl")
distillation = pytest.importorskip("trl.trainer.distillation_trainer")
from trl_trainers import distillation_trainer, gkd_trainer, run  # noqa: E402  (imports trl)

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own: of what is experimental, of this setting of GKD
WEIGHTED = {"loss", "grad_norm", "entropy", "eval_loss", "eval_entropy"}
BATCHES = pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["mean", "number", "tensor"])


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (distillation_trainer, {"beta": 1.0}),
        (distillation_trainer, {"beta": 0.3, "temperature": 1.5}),
        (gkd_trainer, {"beta": 0.3, "lmbda": 0.5, "temperature": 0.9}),
        (gkd_trainer, {"beta": 0.0, "lmbda": 0.0}),
    ],
    ids=["distillation, reverse KL", "distillation, JSD", "GKD, JSD, half on-policy", "GKD, KL"],
)
def test_training_is_the_same(make: Any, more: dict[str, Any], tmp_path: Path) -> None:
    compare_training(make, more, tmp_path)


def compare_training(make: Any, more: dict[str, Any], folder: Path) -> None:
    """Every number that is logged, and how far every weight has moved."""
    theirs, weights = run(make(folder, **more))
    trainer = make(folder, **more)
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    assert use_kdfast(trainer) is trainer
    mine, own = run(trainer)
    assert [entry.keys() for entry in mine] == [entry.keys() for entry in theirs]
    compared = 0
    for entry, its in zip(mine, theirs, strict=True):
        for name in WEIGHTED & entry.keys():
            assert entry[name] == pytest.approx(its[name], rel=1e-5), name
            assert its[name] > 1e-4
            compared += 1
    assert compared >= 7
    for name, x in own.items():
        moved = weights[name] - before[name]
        assert float((x - weights[name]).norm()) <= 1e-4 * float(moved.norm()) + 1e-7, name
    assert float((weights["lm_head.weight"] - before["lm_head.weight"]).norm()) > 1e-2


def test_only_this_trainer_changes(tmp_path: Path) -> None:
    used, other = (distillation_trainer(tmp_path) for _ in range(2))
    use_kdfast(used)
    assert used._compute_loss.__func__.__globals__[ours.OF_HIDDEN] is ours._of_hidden
    assert "_compute_loss" not in vars(other)
    assert other._compute_loss.__func__.__globals__[ours.OF_HIDDEN] is distillation._chunked_divergence_loss


@BATCHES
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 2.5, "biased": True},
        {"student_logit_scale": 0.125, "teacher_logit_scale": 0.3, "biased": True},
        {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 5.0, "student_logit_scale": 0.5},
    ],
    ids=["plain", "temperature", "scales", "soft-caps"],
)
def test_loss_of_hidden_states(more: dict[str, Any], beta: float, num_items: Any) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((3, 7, 16), (50, 16), (50,)))
    teacher = torch.randn(3, 7, 24), torch.randn(50, 24)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [0] * 7])
    more = {**more, "num_items_in_batch": num_items}
    if more.pop("biased", False):
        more |= {"student_lm_head_bias": bias, "teacher_lm_head_bias": torch.randn(50)}

    def of(function: Any) -> Any:
        return function(hidden, teacher[0], weight, teacher[1], mask, beta, **more)

    inputs = [hidden, weight, *([bias] if "student_lm_head_bias" in more else [])]
    same(lambda: of(ours._of_hidden)[0], lambda: of(distillation._chunked_divergence_loss)[0], inputs)
    (_, entropy, tokens), (_, its, number) = of(ours._of_hidden), of(distillation._chunked_divergence_loss)
    assert tokens == number == 10
    assert not entropy.requires_grad
    assert 1 < float(its) < 10 * math.log(50)
    torch.testing.assert_close(entropy, its, rtol=1e-5, atol=1e-5)


def test_loss_where_nothing_counts() -> None:
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss, entropy, tokens = ours._of_hidden(hidden, hidden, weight, weight, torch.zeros(2, 3), 0.5)
    loss.backward()
    assert (loss, entropy, tokens) == (0, 0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_autocast() -> None:
    """Hidden states in bfloat16 beside weights in float32: both products are made in bfloat16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16).bfloat16().requires_grad_(), torch.randn(50, 16, requires_grad=True)
    teacher, mask = (torch.randn(2, 9, 24).bfloat16(), torch.randn(50, 24)), torch.ones(2, 9)

    def of(function: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(hidden, teacher[0], weight, teacher[1], mask, 0.5)[0]

    value, gradients = of(ours._of_hidden), []
    for function in (ours._of_hidden, distillation._chunked_divergence_loss):
        gradients.append(torch.autograd.grad(of(function), (hidden, weight)))
    torch.testing.assert_close(value, of(distillation._chunked_divergence_loss), rtol=1e-5, atol=0)
    for mine, its in zip(*gradients, strict=True):
        assert mine.dtype == its.dtype
        assert 0.0 < float((mine - its).float().norm()) + 1e-9 < 0.02 * float(its.float().norm())


@pytest.mark.parametrize("outputs", [False, True], ids=["", "outputs asked for"])
def test_cohere_in_gkd(outputs: bool, tmp_path: Path) -> None:
    """Logits with a scale; and outputs, which evaluations ask for, make logits as TRL does."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "logit_scale": 0.5}
    config = hf.CohereConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, intermediate_size=48, pad_token_id=PAD, initializer_range=0.3, **sizes
    )  # fmt: skip
    trainer = gkd_trainer(tmp_path, beta=0.5)
    student, trainer.teacher_model = hf.CohereForCausalLM(config), hf.CohereForCausalLM(config)
    batch = {name: x.clone() for name, x in next(iter(trainer.get_train_dataloader())).items()}
    inputs = [student.model.layers[0].mlp.up_proj.weight, student.lm_head.weight]

    def loss() -> Any:
        value = trainer.compute_loss(student, batch, outputs, 9)
        return value[0] if outputs else value

    theirs = loss()
    expected = torch.autograd.grad(theirs, inputs)
    use_kdfast(trainer)
    assert "compute_loss" in vars(trainer)
    mine = loss()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    for got, its in zip(torch.autograd.grad(mine, inputs), expected, strict=True):
        assert float(its.norm()) > 1e-4
        assert float((got - its).norm()) < 1e-5 * float(its.norm())
    if outputs:
        assert trainer.compute_loss(student, batch, True)[1].logits.shape[-1] == VOCABULARY


def test_other_trainers_are_refused(tmp_path: Path) -> None:
    class Mine(trl.DistillationTrainer):  # type: ignore[misc]
        def _compute_loss(self, *arguments: Any) -> Any:
            return None

    trainer = distillation_trainer(tmp_path)
    trainer.__class__ = Mine
    with pytest.raises(
        TypeError, match="trainer: expected one with the _compute_loss of trl's DistillationTrainer, got Mine"
    ):
        use_kdfast(trainer)
    with pytest.raises(TypeError, match=r"use_kdfast: trainer: expected a trl.DistillationTrainer or a .*, got Linear"):
        use_kdfast(nn.Linear(1, 1))


# ---- ranks ----
def check_on_rank(rank: int, folder: Path) -> None:
    check_shards(rank)
    assert dist.get_world_size() == 2
    compare_training(distillation_trainer, {"beta": 0.3}, folder)
    compare_training(gkd_trainer, {"beta": 0.3, "lmbda": 0.0}, folder)


def check_shards(rank: int) -> None:
    """Output embeddings in shards, as fully_shard has them, and each rank's own hidden states."""
    torch.manual_seed(0)
    weight, teacher = torch.randn(50, 16) / 4, (torch.randn(50, 24) / 4, torch.randn(2, 5, 24))
    torch.manual_seed(rank)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    mesh, mask = init_device_mesh("cpu", (2,)), torch.ones(2, 5)
    gradients = []
    for function in (ours._of_hidden, distillation._chunked_divergence_loss):
        shards = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        loss, *_ = function(hidden, teacher[1], shards, distribute_tensor(teacher[0], mesh, [Shard(0)]), mask, 0.5)
        gradients.append((loss.detach(), *torch.autograd.grad(loss, (hidden, shards))))
    for mine, its in zip(*gradients, strict=True):
        mine, its = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (mine, its))
        assert float(its.norm()) > 1e-3
        assert float((mine - its).norm()) < 1e-5 * float(its.norm())


def test_two_ranks(tmp_path: Path) -> None:
    """DDP; and output embeddings in shards."""
    spawn(check_on_rank, 2, tmp_path, tmp_path)
