"""The command `kdfast`, and nothing that Python code needs. May import: runs, results, bench, recipes, teacher_cache,
models, data, ops."""
