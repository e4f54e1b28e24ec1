"""Every operator with what tests and benchmarks need to know of it. A new operator is one more row."""

from kdfast.bench.registry.divergences import DIVERGENCES
from kdfast.bench.registry.layers import LAYERS
from kdfast.bench.registry.linear import LINEAR
from kdfast.bench.registry.operator import Operator, Sample
from kdfast.bench.registry.pruned import PRUNED

__all__ = ["FAMILIES", "OPERATORS", "Operator", "Sample"]

FAMILIES: dict[str, dict[str, Operator]] = {
    "logits": DIVERGENCES,
    "large vocabularies": LINEAR,
    "layers": LAYERS,
    "parts of linear layers": PRUNED,
}
OPERATORS: dict[str, Operator] = {name: row for family in FAMILIES.values() for name, row in family.items()}
