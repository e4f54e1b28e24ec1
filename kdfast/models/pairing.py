"""Whether models, tokenizers and rows belong together: tokens, positions, padding, and the order of classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

OF_OTHER_TOKENS = "; multi-teacher, of one teacher or more, compares whole sequences of other tokens"  # classifiers


def check_tokens(named: str, tokenizer: Any, teachers: Any, remedy: str = "") -> None:
    """A student, or its base, reads the teacher's tokens: each must be of the same number in its own tokenizer.

    Vocabularies of equal size may have nothing in common. Truncation, padding and the order of rules are not compared:
    rows are made by the teacher's tokenizer alone, which is saved with the student.

    Args:
        named: what messages call the model that `tokenizer` is of.
        tokenizer, teachers: of transformers.
        remedy: what else the recipe's user may do, for the end of the message.

    Raises:
        ValueError: a token of the teacher's has another number, or none.
    """
    own = tokenizer.get_vocab()
    differing = sorted((number, token) for token, number in teachers.get_vocab().items() if own.get(token) != number)
    if differing:
        number, token = differing[0]
        raise ValueError(
            f"{named}: expected the teacher's tokenizer, in which {token!r} is token {number}, got one in which it is "
            f"{own.get(token, 'none')} ({len(differing):,} tokens differ){remedy}"
        )


def positions(model: Any) -> int | None:
    """The most tokens that a model takes; None where there is no such limit (T5, XLNet, ALiBi, DeBERTa)."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    relative = getattr(config, "alibi", False) or not getattr(config, "position_biased_input", True)
    if limit is None or limit < 1 or relative:
        return None
    table = _counted_from_padding(model)
    return int(limit if table is None else table.num_embeddings - 1 - table.padding_idx)


def _counted_from_padding(model: Any) -> Any:
    """The position embeddings of RoBERTa and its relatives, who begin behind the number of their padding;
    None of others."""
    for name, part in model.base_model.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return part
    return None


def check_length(named: str, model: Any, max_length: int, argument: str = "max_length") -> None:
    """
    Raises:
        ValueError: rows of `max_length` tokens have more than the model's `positions`.
    """
    limit = positions(model)
    if limit is not None and max_length > limit:
        raise ValueError(f"{argument}: expected at most {limit}, the positions of {named}, got {max_length}")


def pad_alike(named: str, model: Any, tokenizer: Any) -> None:
    """Gives the model's config the padding token of the tokenizer that batches are padded with.

    Classifiers of decoders read the last token that is not the config's padding: without one they take single rows
    only, with another one they read padding.

    Raises:
        ValueError: the tokenizer has none, or one that the model has no embedding of.
    """
    pad = tokenizer.pad_token_id
    if pad is None:
        raise ValueError(
            f"{named}: expected a tokenizer with a pad token, got one without; set its pad_token, to its eos_token "
            "say, and save it beside the model"
        )
    check_ids(named, model, [{"input_ids": [pad]}])
    config = model.config.get_text_config()
    if config.pad_token_id is None or _counted_from_padding(model) is None:
        config.pad_token_id = pad


def check_ids(named: str, model: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """
    Raises:
        ValueError: `input_ids` of a row has a number that the model has no embedding of.
    """
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)  # none of models of characters, say
    largest = max((max(row["input_ids"]) for row in rows), default=0)
    if known is not None and largest >= known:
        raise ValueError(
            f"{named}: expected a tokenizer of the {known} tokens that it knows, got one that made {largest}"
        )


def _classes(config: Any) -> list[str]:
    """Class names in the order of their numbers, in lower case; transformers' LABEL_1, which says nothing, is 1."""
    return [str(name).lower().removeprefix("label_") for _, name in sorted(config.id2label.items())]


def _turned(classes: Sequence[str], others: Sequence[str]) -> bool:
    return list(classes) != list(others) and sorted(classes) == sorted(others)


def check_names(named: str, config: Any, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a model has the classes of the data, `names`, in another order.
    """
    theirs, ours = _classes(config), [name.lower() for name in names]
    if _turned(theirs, ours):
        raise ValueError(
            f"{named}: expected the classes in the data's order, {', '.join(ours)}, got {', '.join(theirs)}"
        )


def matched_by_number(named: str, config: Any, names: Sequence[str]) -> str | None:
    """What to tell of a model whose classes have other names than the data's,
    so that nothing shows whether they are the same.

    None where they have the same, or either has mere numbers that agree.
    """
    own = [str(name) for _, name in sorted(config.id2label.items())]
    if not names or _classes(config) == [name.lower() for name in names]:
        return None
    pairs = [f"{ours} = {theirs}" for ours, theirs in zip(names, own, strict=False)]
    told = ", ".join(pairs[:4] + ["…"] * (len(pairs) > 4))
    return f"the data's classes are matched with those of {named} by their numbers alone: {told}"


def check_same_classes(who: str, student: Any, teacher: Any) -> None:
    """A student's logits are compared with its teacher's column by column.

    Args:
        who: what the message begins with.
        student, teacher: models or their configs; others than transformers' tell nothing of their classes.

    Raises:
        ValueError: both have the same names of classes in another order.
    """
    configs = [getattr(one, "config", one) for one in (student, teacher)]
    if not all(hasattr(config, "id2label") for config in configs):
        return
    own, theirs = map(_classes, configs)
    if _turned(own, theirs):
        raise ValueError(
            f"{who}: expected the classes (id2label of its config) in the teacher's order, {', '.join(theirs)}, got "
            f"{', '.join(own)}"
        )


def take_order(student: Any, own: Any, teacher: Any) -> None:
    """Puts the classes of a student's head into the teacher's order, where they are the same by name.

    Args:
        student: a model whose head's last linear map has a row for each class.
        own, teacher: the configs that name the student's classes as they are stored, and the teacher's.
    """
    mine, theirs = _classes(own), _classes(teacher)
    if not _turned(mine, theirs):
        return
    inside = f"{student.base_model_prefix}."
    maps = [m for name, m in student.named_modules() if isinstance(m, nn.Linear) and not name.startswith(inside)]
    order = torch.tensor([mine.index(name) for name in theirs], device=student.device)
    for rows in (maps[-1].weight, maps[-1].bias):
        if rows is not None:
            rows.data = rows.data[order]
