"""A tiny encoder with its tokenizer, and reviews whose first word tells the label, in place of the demonstration's."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from kdfast.data import demo

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "actor", "scene", "the", "a"]
LAYERS = 6


def make(folder: Path) -> dict[str, Path]:
    """Folders in place of what `kdfast.data.demo.fetch` gives, by requirement."""
    model, reviews = folder / "model", folder / "reviews"
    model.mkdir(parents=True)
    reviews.mkdir()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).bert.save_pretrained(model)
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    generator = torch.Generator().manual_seed(1)
    lines = []
    for i in range(2300):  # movie_reviews keeps 2,000 of them for the test set
        label = i % 2
        first = WORDS[int(torch.randint(3, (), generator=generator)) + 3 * (1 - label)]
        length = int(torch.randint(2, 9, (), generator=generator))
        rest = [WORDS[6 + int(k)] for k in torch.randint(6, (length,), generator=generator)]
        lines.append(f"{i}\t{1.0 if label else -1.0}\t{' '.join([first, *rest])}")
    (reviews / "movie_reviews.tsv").write_text("\n".join(lines))
    lines = []
    for i in range(700):  # product_reviews keeps 500 of them for the test set
        first, second = (int(torch.randint(6, (), generator=generator)) for _ in range(2))
        rating = (1 if first < 3 else -1) * (1 + second / 4)
        lines.append(f"1_{i}\t{rating}\t{WORDS[first]} {WORDS[6 + second]} the a")
    (reviews / "products.tsv").write_text("\n".join(lines))
    return {demo.MINILM.requirement: model, demo.MOVIE_REVIEWS.requirement: reviews}
