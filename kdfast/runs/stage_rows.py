"""What stages are trained on that is not the task's own rows: texts without labels, and augmented rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from kdfast.data import masking, tasks, text
from kdfast.data.augment import Augmentation
from kdfast.recipes.classifier import Stage, Texts
from kdfast.results.measure import length
from kdfast.runs import stages
from kdfast.runs.augment import AugmentedRows

SHORTEST = 4  # tokens of a text


class StageRows:
    """Rows of a run's stages. What is not there yet is made when a stage asks for it.

    Args:
        folder: of the run; augmented rows go into `augmented/` there.
        task: of the run.
        tokenizer, max_length: of its rows.
        base: model that stands for one that an augmentation does not name.

    Raises:
        ValueError: a stage that is not finished names a file or model that cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        task: tasks.Task,
        tokenizer: Any,
        max_length: int,
        base: str | Path,
        todo: Iterable[Stage],
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.notes: list[str] = []
        self._made: dict[Texts | Augmentation, Any] = {}
        self._augmented: dict[Augmentation, AugmentedRows] = {}
        for rows in {stage.rows for stage in todo if stages.finished(folder / stage.folder) is None}:
            if isinstance(rows, Texts):
                self._made[rows] = self._blocks(rows.path)
            elif rows is not None:
                self._augmented[rows] = AugmentedRows(rows, task, base, folder / "augmented")

    def of(self, rows: Texts | Augmentation, beside: list[dict[str, Any]], console: Console) -> Any:
        """Rows with `input_ids`, and labels where they have any; `beside` comes with variants of the task's rows."""
        if isinstance(rows, Augmentation) and rows not in self._made:
            made = self._augmented[rows].write(console)
            encoded, _ = tasks.tokenize(made, self.tokenizer, self.max_length)
            self._made[rows] = sorted([*encoded.to_list(), *beside], key=length)
        return self._made[rows]

    def _blocks(self, path: str) -> Any:
        try:
            texts = text.read_texts(Path(path))
            rows = masking.blocks(texts, self.tokenizer, self.max_length, shortest=SHORTEST, tell=self.notes.append)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                raise ValueError(f"general_text {path}: expected a file of text, got {error.strerror}") from None
            raise ValueError(f"general_text {path}: {error}") from None
        return rows
