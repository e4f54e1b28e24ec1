"""A teacher's outputs, written once and trained from many times (needs `pip install kdfast[train]`).

    from kdfast import teacher_cache

    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]        # or a datasets.Dataset
    teacher_cache.write(teacher, rows, "cache", tokenizer=tokenizer, k=64, temperature=2.0)

    cache = teacher_cache.TeacherCache("cache", tokenizer=tokenizer, temperature=2.0)
    loader = DataLoader(
        cache.beside(rows),                             # row i of the dataset with what the teacher made of it
        batch_size=8,
        shuffle=True,
        num_workers=2,                                  # each worker maps the files for itself
        prefetch_factor=4,
        collate_fn=cache.collator(DataCollatorWithPadding(tokenizer)),
    )
    for batch in loader:
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = kdfast.topk_kl_div(
            logits,
            batch["teacher_topk_logprobs"],
            batch["teacher_topk_indices"],
            temperature=2.0,
            mask=batch["teacher_token_mask"],
        )

In `kdfast.DistillationTrainer` dataset and collator are the same two, without a teacher; the objective
`kdfast.objective.LanguageModel(temperature=2.0)` takes the top-k from the rows, at the cache's temperature. With alpha
< 1 it needs labels: `cache.collator(DataCollatorForLanguageModeling(tokenizer, mlm=False))`. `transformers.Trainer`
itself would drop the teacher's columns: `remove_unused_columns=False`.

A classifier's cache for Patient-KD, `write(..., outputs=("logits", "cls"), layers=(2, 4))`, gives batches
teacher_logits [B, C], teacher_cls_2 and teacher_cls_4 [B, D].

A cache is a folder: `shard-00000.safetensors` and so on, with the rows packed one after another in the dataset's order,
and `manifest.json`, which says what they hold, of which teacher and tokenizer. It is rewritten after each shard, so a
write that was stopped, in whatever way, goes on after its last complete shard. From the shell: `kdfast cache-teacher`.
"""

from __future__ import annotations

from kdfast.teacher_cache._manifest import CacheError, Manifest
from kdfast.teacher_cache._read import TeacherCache
from kdfast.teacher_cache._text import text_rows
from kdfast.teacher_cache._write import write

__all__ = ["CacheError", "Manifest", "TeacherCache", "text_rows", "write"]
