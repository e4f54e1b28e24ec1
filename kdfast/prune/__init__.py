"""Structured pruning: masks of heads, neurons and layers, models that compute only what lives, smaller models of them.
May import `ops`, `nn`, `data`, `models`."""
