"""Lets transformers load pruned models (`kdfast.prune.compact`) by `from_pretrained`, once kdfast is imported.

Their config has a record, `quantization_config`: what transformers finds there may prepare a model before its weights are
read, by a class that is registered under the record's name. To import transformers takes seconds, which the operators do
not need: where it is not imported yet, the class is registered as soon as transformers imports its own ones.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "kdfast (pip install kdfast, then import kdfast)"  # transformers prints it where it is not registered
_REGISTRY = "transformers.quantizers.auto"


def begin() -> None:
    """Registers the class now or later."""
    if (auto := sys.modules.get(_REGISTRY)) is not None:
        _register(auto)
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, the way it would be found without this, until it was imported."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)
                sys.meta_path.remove(self)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register(auto: Any) -> None:
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    class Record(auto.QuantizationConfigMixin):  # type: ignore[misc]
        """`quantization_config` of a pruned model, as `kdfast.prune.disk` writes it."""

        def __init__(self, **record: Any) -> None:
            for name, value in record.items():
                setattr(self, name, value)

    class Pruned(auto.HfQuantizer):  # type: ignore[misc]
        """Gives a model the shapes of its record. After that it is one like any other: nothing marks it as quantised, for
        which transformers would refuse to train or to cast it."""

        is_trainable = True

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
            from kdfast.prune import disk  # imports models of transformers, which is half imported when this is made

            disk.rebuild(model, self.quantization_config.to_dict())

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
            from kdfast.prune import disk

            disk.follow_masks(model)
            for name in ("hf_quantizer", "is_quantized", "quantization_method"):
                vars(model).pop(name, None)
            vars(model.config).pop("_is_quantized", None)
            model.config.quantization_config = self.quantization_config.to_dict()

    auto.register_quantization_config(METHOD)(Record)
    auto.register_quantizer(METHOD)(Pruned)
