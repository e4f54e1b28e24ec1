"""Models and tokenizers of folders and of the Hub, or one line that tells why not."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto import modeling_auto as auto
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE

from kdfast._from_pretrained import METHOD
from kdfast.data import tasks
from kdfast.data.files import why_not_readable
from kdfast.data.hub import first_line, why_no_answer
from kdfast.models import pairing
from kdfast.models.early_exit import EarlyExit, saved_in

PLACES = "a folder or a name on the Hub"  # of models
QUANTISERS = ("torchao", "bitsandbytes")  # packages whose models are run
# What loads language models: what these are, the recipe that distils them, and their classes. BART's encoder-decoder is
# among the masked language models too.
LANGUAGE = {
    "AutoModelForSeq2SeqLM": ("an encoder-decoder", "seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "AutoModelForCausalLM": ("a causal language model", "causal-lm", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "AutoModelForMaskedLM": ("a masked language model", "distilbert", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
}
UNKNOWN = "Unrecognized configuration class"  # how transformers tells of a model that is none of a class's
UNREADABLE = "automatic conversion of the weights"  # and of weights that its report above, in many lines, is about
# And of a tokenizer whose class makes up no vocabulary where there is no file of it; the last is Pegasus.
NO_FILE = (
    *("instantiate the backend tokenizer", "not NoneType", "has no attribute 'readlines'", "path 'None'"),
    "('<unk>', 0.0) is not in list",
)


def classifier(task: tasks.Task, argument: str, source: str | Path, *, quantised: bool = False) -> Any:
    """A classifier whose classes are the task's, in the same order: other orders are common, and silent otherwise.

    Args:
        task: what it is to be a classifier, or regressor, of.
        argument: how messages call it.
        source: folder or Hub name; the folder of an `EarlyExit` too.
        quantised: as of `pretrained`.

    Raises:
        ValueError: it cannot be loaded, has no head, another number of classes or another order of them.
    """
    who = _readable(argument, source)
    if Path(source).is_dir() and saved_in(source):
        model, loading = pretrained(EarlyExit, argument, source, dtype=torch.float32), {}
    else:
        options: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32, "quantised": quantised}
        model, loading = pretrained(AutoModelForSequenceClassification, argument, source, **options)
    if absent := sorted(loading.get("missing_keys", ())):
        raise ValueError(f"{who}: expected a classifier, got a model without weights for {', '.join(absent[:4])}")
    if (found := model.config.num_labels) != (count := max(1, len(task.names))):
        raise ValueError(f"{who}: expected {count} classes, as the data has, got {found}")
    pairing.check_names(who, model.config, task.names)
    model.config.problem_type = task.head["problem_type"]  # many do not tell theirs
    return model


def load_tokenizer(argument: str, source: str | Path) -> Any:
    """The tokenizer of a model. Without one, or without its vocabulary, transformers makes up one that knows no word.

    Raises:
        ValueError: it cannot be loaded, or is such a one.
    """
    who = _readable(argument, source)
    if (Path(source) / "config.yaml").is_file() and not (Path(source) / "config.json").is_file():
        inside = [str(path.parent) for path in sorted(Path(source).glob("*/config.json"))]
        hint = f"; its models are {', '.join(inside)}" if inside else ""
        raise ValueError(f"{who}: expected a model, got the folder of a run{hint}")
    try:
        tokenizer = pretrained(AutoTokenizer, argument, source)
    except (AttributeError, TypeError, ValueError) as error:
        if not any(words in str(error) for words in NO_FILE):
            raise
        got = _lack(source)
    else:
        if not _knows_no_word(tokenizer):
            return tokenizer
        names = (FULL_TOKENIZER_FILE, tokenizer.vocab_files_names.get("vocab_file"))
        got = _lack(source, [name for name in names if name])
    raise ValueError(f"{who}: expected a model with a tokenizer, got {got}")


def _knows_no_word(tokenizer: Any) -> bool:
    """Whether it has nothing but special and added tokens and what its class makes up of no file: of T5 and its like
    one token more. Of some classes the whole vocabulary is in no file (ByT5: bytes)."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        return True
    if not tokenizer.vocab_files_names:
        return False
    try:
        empty = type(tokenizer)()
    except (TypeError, ValueError):  # its class makes up none
        return False
    # The class's too: a configuration with special tokens of its own lets T5's <extra_id_0> be none.
    special = {*tokenizer.all_special_tokens, *empty.all_special_tokens, *tokenizer.get_added_vocab()}
    words = set(tokenizer.get_vocab()) - special
    return len(words) <= 1 and words <= set(empty.get_vocab())


def _lack(source: str | Path, files: Sequence[str] = ()) -> str:
    """What a model has in place of a tokenizer. files: names of those that its vocabulary may be in, where known."""
    if here := [name for name in files if (Path(source) / name).is_file()]:
        return f"one that knows no word ({here[0]}); save the right one beside the model"
    if (Path(source) / TOKENIZER_CONFIG_FILE).is_file():
        its = f"its vocabulary ({' or '.join(files)})" if files else "its vocabulary"
        return f"{TOKENIZER_CONFIG_FILE} without {its}; save the whole tokenizer beside the model"
    return "one without; save it beside the model"


def pretrained(kind: Any, argument: str, source: str | Path, *, quantised: bool = False, **options: Any) -> Any:
    """`kind.from_pretrained`, with the argument named where it fails.

    Args:
        kind, argument, source, options: of what is loaded, how messages call it, from where, and how.
        quantised: whether its weights may be quantised, by one of `QUANTISERS`: of models that are only run.

    Raises:
        ValueError: it cannot be loaded, or is a model whose weights are quantised.
    """
    who = _readable(argument, source)
    unreachable = None if Path(source).is_dir() else _why_no_answer(who, source)
    if hasattr(kind, "from_config"):  # of models, not of configurations or tokenizers
        _check_not_quantised(who, _loaded(AutoConfig, who, source, unreachable), quantised)
    return _loaded(kind, who, source, unreachable, **options)


def _loaded(kind: Any, who: str, source: str | Path, unreachable: str | None, **options: Any) -> Any:
    # Without the Hub, what was downloaded before is still there.
    here = {"local_files_only": True} if unreachable else {}
    try:
        return kind.from_pretrained(source, **options, **here)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if unreachable and isinstance(error, OSError):
            got = f"no folder, and no answer from the Hub ({unreachable})"
            raise ValueError(f"{who}: expected {PLACES}, got {got}") from None
        got = first_line(error)
        if got.startswith(UNKNOWN):
            raise _of_another_kind(kind, who, AutoConfig.from_pretrained(source, **here)) from None
        if UNREADABLE in got:
            got = "weights that it cannot put together; torchao's of BART and its relatives it cannot, bitsandbytes' it can"
        raise ValueError(f"{who}: expected what transformers loads, got {_locked(source) or got}") from None


def _locked(source: str | Path) -> str | None:
    """A file of a folder that may not be read: of weights safetensors says that there are none."""
    locked = [path.name for path in sorted(Path(source).glob("*")) if not os.access(path, os.R_OK)]
    return f"{locked[0]}, which may not be read" if locked else None


def language_model(saved_as: str) -> tuple[str, str] | None:
    """What a class of transformers' language models is, and the recipe that distils it."""
    return next(((what, recipe) for what, recipe, models in LANGUAGE.values() if saved_as in models.values()), None)


def _of_another_kind(kind: Any, who: str, config: Any) -> ValueError:
    name, saved_as = kind.__name__, (config.architectures or [config.model_type])[0]
    expected = f"{LANGUAGE[name][0]} ({name})" if name in LANGUAGE else f"what {name} loads"
    other = language_model(saved_as)
    hint = f", {other[0]}, which {other[1]} distils" if other else ""
    return ValueError(f"{who}: expected {expected}, got {saved_as}{hint}")


def _check_not_quantised(who: str, config: Any, may_be: bool) -> None:
    """Before weights are loaded, which needs the library of the quantisation, and may end in a crash of it."""
    if (found := getattr(config, "quantization_config", None)) is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        method = getattr(method, "value", method)
        if method == METHOD:  # smaller, not quantised
            return
        if may_be and method in QUANTISERS:
            if find_spec(method) is None:
                raise ValueError(f"{who}: expected {method}, which quantised it, to be installed, got none")
            logging.getLogger(method).setLevel(logging.ERROR)  # bitsandbytes tells of products that they are of 16 bits
            return
        raise ValueError(
            f"{who}: expected weights that are not quantised, got {method} "
            "(quantization_config in its config.json); load it, dequantise it and save that"
        )


def _why_no_answer(who: str, source: str | Path) -> str | None:
    """Why the Hub gives nothing, of what may be a name there; what is only a path is refused."""
    if Path(source).is_file():
        raise ValueError(f"{who}: expected {PLACES}, got a file")
    if str(source).startswith((os.sep, ".", "~")) or str(source).count(os.sep) > 1:
        raise ValueError(f"{who}: expected the folder of a model, got no folder")
    absent = ValueError(f"{who}: expected {PLACES}, got no folder, and no model that you may read on the Hub")
    return why_no_answer("model_info", str(source), absent)


def _readable(argument: str, source: str | Path) -> str:
    """What messages call a model that can be read, or that is on the Hub."""
    who = named(argument, source)
    if reason := why_not_readable(source):
        raise ValueError(f"{who}: expected a folder that can be read, got {reason}")
    return who


def named(argument: str, source: str | Path) -> str:
    """What messages call a model: once where both are the same, as `evaluate` has it of one in the working folder."""
    return argument if argument == str(source) else f"{argument} {source}"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
