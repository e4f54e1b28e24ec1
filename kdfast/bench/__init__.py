"""Every operator with what tests and benchmarks need of it, and their measuring. May import: ops, nn."""
