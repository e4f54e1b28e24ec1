"""What other libraries show beside a command's own."""

from __future__ import annotations

import datasets
import transformers


def quiet() -> None:
    """No warnings of transformers, and no progress bars but kdfast's."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
