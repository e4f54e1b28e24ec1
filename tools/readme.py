"""Writes the results tables of the README and of recipes' pages from the committed files in benchmarks/results.

python tools/readme.py            rewrites README.md and docs/recipes/fastbert.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdfast.bench import harness

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Something of every kind; all cases are in the committed files.
SHOWN = (
    *("kl_div-64x152064-float32-grad", "kl_div-64x152064-float32-loss", "kl_div-128x128256-bfloat16-grad"),
    *("kl_div-8192x1000-float32-grad", "kl_div-100000x2-float32-grad", "js_div-64x152064-float32-grad"),
    *("kd_loss-64x152064-float32-grad", "topk_kl_div-64x152064-float32-grad"),
    *("linear_kd_loss-512x576x49152-bfloat16-grad", "attention_mse-4x8x12x128x128-float32-grad"),
    *("attention_kl-4x2x12x512x512-float32-grad", "qk_attention_mse-8x12x16x32-float32-grad"),
    *("qk_attention_mse-2x12x2048x64-float32-grad", "qk_relation_kl-2x12x512x64-float32-grad"),
    *("hidden_mse-5x32x128x384-float32-grad", "cosine_distance-5x32x128x768-bfloat16-grad"),
    "cls_distance-12x4x64x384-float32-grad",
)


def operators() -> str:
    """A table per device; of a device's files the latest that has a case."""
    devices: dict[str, tuple[dict[str, harness.Result], list[dict[str, Any]]]] = {}
    for path in sorted(RESULTS.glob("operators-*.json")):
        results, facts = harness.load(path)
        latest, environments = devices.setdefault(facts["device"], ({}, []))
        latest |= {r.case.name: r for r in results}
        environments.append(facts)
    parts = []
    for device, (latest, environments) in devices.items():
        facts = environments[-1]
        threads = f", {facts['threads']} threads, {facts['cpu_variant']}" if "threads" in facts else ""
        dates = " and ".join(dict.fromkeys(facts["date"] for facts in environments))
        title = f"{device}{threads}, torch {facts['torch']}, {dates} (all cases: `benchmarks/results/operators-*.md`):"
        parts.append(f"{title}\n\n{harness.markdown([latest[name] for name in SHOWN if name in latest])}")
    return "\n\n".join(parts)


def vocabulary() -> str:
    """The table that benchmarks/large_vocabulary.py has left beside its latest results."""
    path = max(RESULTS.glob("large-vocabulary-*.md"))
    facts = json.loads(path.with_suffix(".json").read_text())["environment"]
    return (
        f"{facts['device']}, torch {facts['torch']}, {facts['date']}, {facts['dtype']}:\n\n{path.read_text().strip()}"
    )


def pruned() -> str:
    """The table that benchmarks/pruned_encoder.py has left beside its latest results."""
    path = max(RESULTS.glob("pruned-encoder-*.md"))
    facts = json.loads(path.with_suffix(".json").read_text())["environment"]
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    return (
        f"{facts['device']}{threads}, torch {facts['torch']}, {facts['date']}, float32:\n\n{path.read_text().strip()}"
    )


def recipes() -> str:
    """The table that benchmarks/recipes.py has left beside its latest results."""
    path = max(RESULTS.glob("recipes-*.md"))
    facts = json.loads(path.with_suffix(".json").read_text())["environment"]
    return f"{facts['device']}, torch {facts['torch']}, {facts['date']}. {path.read_text().strip()}"


def speeds() -> str:
    """The table of FastBERT's speeds that benchmarks/recipes.py has left beside its latest results."""
    paths = sorted(RESULTS.glob("fastbert-speeds-*.md"))
    if not paths:
        return "Not measured yet."
    facts = json.loads(paths[-1].with_suffix(".json").read_text())["environment"]
    return f"{facts['device']}, torch {facts['torch']}, {facts['date']}. {paths[-1].read_text().strip()}"


Blocks = tuple[tuple[str, Callable[[], str]], ...]
OF_README: Blocks = (
    ("operators", operators),
    ("vocabulary", vocabulary),
    ("recipes", recipes),
    ("pruned", pruned),
)
PAGES: dict[Path, Blocks] = {
    ROOT / "README.md": OF_README,
    ROOT / "docs" / "recipes" / "fastbert.md": (("fastbert-speeds", speeds),),
}


def filled(text: str, blocks: Blocks = OF_README) -> str:
    """The text with the blocks between `<!-- name -->` and `<!-- end -->` made anew."""
    for name, make in blocks:
        block = f"<!-- {name} -->\n{make()}\n<!-- end -->"
        text, found = re.subn(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, block=block: block, text, flags=re.S)
        if found != 1:
            raise ValueError(f"expected one block <!-- {name} -->, got {found}")
    return text


if __name__ == "__main__":
    for page, blocks in PAGES.items():
        page.write_text(filled(page.read_text(), blocks))
