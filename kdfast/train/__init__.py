"""The trainer. May import: objective, teacher_cache, models, data, ops."""
