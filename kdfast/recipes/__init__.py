"""Published distillation systems, each a short file over the operators and the trainer."""
