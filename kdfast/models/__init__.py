"""transformers' models as kdfast reads, loads and makes them. May import: bench, data, ops."""
