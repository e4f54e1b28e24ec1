"""Every operator with what tests and benchmarks need to know of it. A new operator is one more row."""

from kdfast.registry.divergences import DIVERGENCES
from kdfast.registry.layers import LAYERS
from kdfast.registry.linear import LINEAR
from kdfast.registry.operator import Operator, Sample

__all__ = ["OPERATORS", "Operator", "Sample"]

OPERATORS: dict[str, Operator] = DIVERGENCES | LAYERS | LINEAR
