"""Whether the Hub has something."""

from __future__ import annotations


def why_no_answer(info: str, name: str, absent: Exception) -> str | None:
    """Why the Hub does not answer; None where it does, and has the model or dataset.

    Asked once. Where there is no network, the libraries that load from it would ask for half a minute.

    Args:
        info: what `HfApi` is asked: "model_info" or "dataset_info".
        name: on the Hub.
        absent: raised where there is nothing of this name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        getattr(HfApi(), info)(name, timeout=10)
    except (HFValidationError, RepositoryNotFoundError):
        raise absent from None
    except Exception as error:  # in one of the many ways of the libraries below it
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
