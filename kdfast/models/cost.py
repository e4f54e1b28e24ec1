"""What a model costs: its parameters, the bytes of its weights, the arithmetic and the time of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdfast.bench import timing
from kdfast.models.inputs import unwrapped


@dataclass(frozen=True)
class Cost:
    """Of a model. parameters: their number, shared ones once. megabytes: 10⁶ bytes of its weights in safetensors.
    gflop: 10⁹ operations of a forward pass, as `flops` counts them. milliseconds: of each of its forward passes."""

    parameters: int
    megabytes: float
    gflop: float
    milliseconds: tuple[float, ...]

    @property
    def ms(self) -> float:
        """The median."""
        return median(self.milliseconds)


def measured(models: Mapping[str, nn.Module], batch: Mapping[str, Any], device: str, repeats: int) -> dict[str, Cost]:
    """What models cost for the same batch; their forward passes as in `latencies_ms`."""
    times = latencies_ms(models, batch, device, repeats)
    return {
        name: Cost(parameters(model), megabytes(model), flops(model, batch) / 1e9, tuple(times[name]))
        for name, model in models.items()
    }


def parameters(model: nn.Module) -> int:
    """How many numbers are trained or could be; shared parameters once, packed ones (4 bits) as what they stand for."""
    return sum(getattr(getattr(p, "quant_state", None), "shape", p.shape).numel() for p in model.parameters())


def megabytes(model: nn.Module) -> float:
    """10⁶ bytes of what `save_pretrained` writes into safetensors, without the header; shared tensors once."""
    weights: Mapping[str, Tensor] = unwrapped(model).state_dict()
    stored = {(x.data_ptr(), x.shape): x.numel() * x.element_size() for x in weights.values()}
    return sum(stored.values()) / 1e6


def flops(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Floating-point operations of a forward pass, 2 for a multiplication with an addition, by torch's counter.

    Matrix products, convolutions and attention are counted, attention also where positions are masked; norms,
    activations, softmax and looking up embeddings are not. Of a compiled model, as it is without the compiler; of a
    quantised one, as it is without quantisation.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    ours = {attention: _of_attention, torch.ops.kdfast.block_sparse_product: _of_blocks}
    counter, inner = FlopCounterMode(display=False, custom_mapping=ours), unwrapped(model)
    # A view of a parameter says that it requires a gradient also where none is recorded, for which the counter looks in
    # vain: a layer without neurons gives its expanded bias.
    weights = {name: parameter.detach() for name, parameter in inner.named_parameters()}
    with evaluating(inner), _plain_products(inner), torch.inference_mode(), counter:
        torch.func.functional_call(inner, weights, (), dict(batch))
    return int(counter.get_total_flops())


@contextmanager
def _plain_products(model: nn.Module) -> Iterator[None]:
    """In its block quantised linear maps multiply by zeros of their shape: of their own operators the counter knows none."""
    whole = [module for module in model.modules() if getattr(module, "is_quantized", False)]
    inside = [module for one in whole for module in one.modules() if isinstance(module, nn.Linear)]
    own = {module: vars(module).get("forward") for module in inside if type(module.weight) is not nn.Parameter}
    for module in own:
        vars(module)["forward"] = partial(_product, module)
    try:
        yield
    finally:
        for module, forward in own.items():
            del vars(module)["forward"]
            if forward is not None:  # accelerate's
                vars(module)["forward"] = forward


def _product(of: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, x.new_zeros(of.out_features, of.in_features))


def _of_attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """torch counts every fused attention but the one of CPUs; from the shapes [B, H, L, d]."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _of_blocks(x: torch.Size, values: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * values.numel()


def latencies_ms(
    models: Mapping[str, nn.Module], batch: Mapping[str, Any], device: str, repeats: int = 15, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of forward passes in evaluation mode, `repeats` of each and more until `seconds` have passed; the
    models take turns."""
    calls = {name: lambda model=model: model(**batch) for name, model in models.items()}
    with evaluating(*models.values()), torch.inference_mode():
        return timing.interleaved(calls, device, rounds=repeats, seconds=seconds, warm=2)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """In its block models are in evaluation mode; then every module is in its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
