"""Criteria that ask which units an output map can best do without: OBS (ZipLM), ThiNet, LASSO channel selection, DCP.

With x what the output map reads, W its matrix [out, features] and H = E[x xᵀ] over tokens, all that these need is H: the
error of W' is E‖(W − W')x‖² = tr((W − W') H (W − W')ᵀ), and units that give W_j x_j have the products
Q_jk = E⟨W_j x_j, W_k x_k⟩ = Σ (H ∘ WᵀW) over the features of j and k. `compensate` gives what stays the best weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdfast.prune.criteria.extras import scikit_learn
from kdfast.prune.criteria.registry import criterion
from kdfast.prune.criteria.streams import Streams


@criterion("batches", of=("heads", "neurons"))
def obs(streams: Streams, *, damping: float = 1e-4) -> list[Tensor]:
    """The error by which a layer's output map can do without a unit and all that went before it (Hassibi & Stork, 1993;
    ZipLM, Kurtic et al., 2023).

    With H = 2 E[x xᵀ] + λI, λ = damping · the mean of the diagonal, the unit S with the least ½ tr(W_S ([H⁻¹]_SS)⁻¹
    W_Sᵀ) goes first, the others take its part, W ← W − W_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S:, and H⁻¹ loses S; again until all are
    gone. A score is the sum of the errors up to the unit's turn, so that scores compare layers too.
    """
    return [
        _eliminated(streams.output_weight(layer), 2 * moments.second, streams.size(layer), damping)
        for layer, moments in zip(streams.layers, streams.moments(), strict=True)
    ]


def _eliminated(weight: Tensor, hessian: Tensor, size: int, damping: float) -> Tensor:
    """The error at each unit's turn, [units]."""
    units = len(hessian) // size
    if not units:
        return hessian.new_zeros(0)
    scores, total = hessian.new_zeros(units), 0.0
    weight, inverse = weight.clone(), inverse_of(hessian, damping)
    numbers = torch.arange(units, device=hessian.device)  # of the units that weight and inverse still have
    living = torch.ones(units, dtype=torch.bool, device=hessian.device)
    for left in range(units, 0, -1):
        if 2 * left < len(numbers):  # half of all are zeros by now
            kept = living.repeat_interleave(size)
            weight, inverse, numbers, living = weight[:, kept], inverse[kept][:, kept], numbers[living], living[living]
        errors, inverses = _errors(weight, inverse, living, size)
        first = int(errors.argmin())
        total += float(errors[first])
        scores[numbers[first]], living[first] = total, False
        its = slice(first * size, (first + 1) * size)
        taken = inverses[first] @ inverse[its]
        weight.addmm_(weight[:, its].clone(), taken, alpha=-1)
        inverse.addmm_(inverse[:, its].clone(), taken, alpha=-1)
    return scores


def _errors(weight: Tensor, inverse: Tensor, living: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """½ tr(W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ) of each unit, infinite for what does not live, and ([H⁻¹]_SS)⁻¹."""
    units = len(living)
    if size == 1:
        inverses = inverse.diagonal().reciprocal()
        errors = weight.square().sum(0) * inverses / 2
        return errors.masked_fill(~living, torch.inf), inverses.view(units, 1, 1)
    of_units = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    eye = torch.eye(size, dtype=weight.dtype, device=weight.device)
    inverses = torch.linalg.inv(torch.where(living[:, None, None], of_units, eye))
    columns = weight.view(len(weight), units, size).transpose(0, 1)
    errors = ((columns @ inverses) * columns).sum((1, 2)) / 2
    return errors.masked_fill(~living, torch.inf), inverses


def inverse_of(hessian: Tensor, damping: float) -> Tensor:
    """(H + λI)⁻¹, λ = damping · the mean of the diagonal."""
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damping)))


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + λI, λ = damping · the mean of the diagonal."""
    extra = damping * hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    return hessian + extra * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


@criterion("batches", of=("heads", "neurons"))
def thinet(streams: Streams) -> list[Tensor]:
    """When a unit is dropped, as a share of all, by a greedy choice of the set T with the least E‖Σ_{j∈T} W_j x_j‖²
    (Luo et al., 2017); of one layer, without a meaning between layers."""
    return [_greedy(q) for q in _quadratics(streams)]


def _greedy(quadratic: Tensor) -> Tensor:
    increase, order = quadratic.diagonal().clone(), quadratic.new_empty(len(quadratic))
    for place in range(len(order)):
        first = int(increase.argmin())
        order[first] = place / len(order)
        increase += 2 * quadratic[first]
        increase[first] = torch.inf  # and stays so
    return order


@criterion("batches", of=("heads", "neurons"))
def lasso(streams: Streams) -> list[Tensor]:
    """The λ down to which β_j = 0 in the minimum over β of ½ E‖Σ_j (1 − β_j) W_j x_j‖² + λ‖β‖₁ (He et al., 2017): what is
    needed at large λ matters most. By scikit-learn's path of least angles; a head has one β for all its slots. Weights
    are reconstructed by `compensate`."""
    path = scikit_learn("sklearn.linear_model").lars_path_gram
    return [_entered(q, path) for q in _quadratics(streams)]


def _entered(q: Tensor, path: Any) -> Tensor:
    if not len(q):
        return q.flatten()
    gram = q.double().cpu()
    scale = gram.sum(1).abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # the path ends at an absolute λ
    gram /= scale
    alphas, _, coefficients = path(gram.sum(1).numpy(), gram.numpy(), n_samples=1, method="lasso")
    knots, beta = torch.tensor(alphas), torch.tensor(coefficients)
    entered = torch.where(beta[:, 1:] != 0, knots[:-1], 0).amax(1)  # the knot behind which it is not zero
    return (scale * entered).to(q)


@criterion("labels", of=("heads", "neurons"))
def dcp(streams: Streams, *, balance: float = 1.0) -> list[Tensor]:
    """When a unit is chosen, by the largest ‖∂(½ E‖(W − W_A)x‖² + balance · L)/∂W_j‖_F² with the columns W_A of those
    that are chosen so far (discrimination-aware channel pruning, Zhuang et al., 2018); of one layer, without a meaning
    between layers.

    L is the loss that is given or the model's own, of the whole model, where the authors add classifiers at some layers:
    a `loss` by a branch of `kdfast.early_exit` is that. Batches are read twice.
    """
    count = streams.keep_batches()
    gradients = [torch.zeros_like(streams.output_weight(layer)) for layer in streams.layers]
    for gradient in streams.gradients():
        for total, layer in zip(gradients, streams.layers, strict=True):
            total += streams.output_weight(layer, gradient)
    scale = balance / streams.over_ranks(gradients, count)
    return [
        _discriminating(streams.output_weight(layer), moments.second, scale * gradient, streams.size(layer))
        for layer, gradient, moments in zip(streams.layers, gradients, streams.moments(), strict=True)
    ]


def _discriminating(weight: Tensor, second: Tensor, of_loss: Tensor, size: int) -> Tensor:
    units = len(second) // size
    order = second.new_zeros(units)
    joint = of_loss - weight @ second  # with nothing chosen
    for place in range(units):
        norms = joint.view(len(joint), units, size).square().sum((0, 2))
        best = int(norms.masked_fill(order > 0, -1).argmax())
        order[best] = 1 - place / units
        its = slice(best * size, (best + 1) * size)
        joint.addmm_(weight[:, its], second[its])
    return order


def _quadratics(streams: Streams) -> Iterator[Tensor]:
    """Q of every layer, [units, units]: the mean over tokens of the products of what units add to the output."""
    for layer, moments in zip(streams.layers, streams.moments(), strict=True):
        weight, units, size = streams.output_weight(layer), streams.units(layer), streams.size(layer)
        yield (moments.second * (weight.mT @ weight)).view(units, size, units, size).sum((1, 3))
