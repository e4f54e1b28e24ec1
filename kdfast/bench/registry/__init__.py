"""Every operator with what tests and benchmarks need to know of it. A new operator is one more row."""

from kdfast.bench.registry.divergences import DIVERGENCES
from kdfast.bench.registry.layers import LAYERS
from kdfast.bench.registry.linear import LINEAR
from kdfast.bench.registry.operator import Operator, Sample
from kdfast.bench.registry.pruned import PRUNED

__all__ = ["OPERATORS", "Operator", "Sample"]

OPERATORS: dict[str, Operator] = DIVERGENCES | LAYERS | LINEAR | PRUNED
