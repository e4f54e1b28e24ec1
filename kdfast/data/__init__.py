"""What models are trained on: files, datasets of the Hub, tasks, texts, the demonstration's. May import: ops."""
