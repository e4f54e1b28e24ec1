"""Writes the results tables of README and documentation from the committed files in benchmarks/results.

python tools/readme.py            rewrites README.md, docs/results.md and pages of docs/recipes
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
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


def peers() -> str:
    """Of each device the newest table that `kdfast bench --peers` has left."""
    found: dict[str, str] = {}
    for path in sorted(RESULTS.glob("peers-*.md")):
        facts = json.loads(path.with_suffix(".json").read_text())["environment"]
        threads = f", {facts['threads']} threads, {facts['cpu_variant']}" if "threads" in facts else ""
        versions = ", ".join(f"{name} {version}" for name, version in facts["peers"].items())
        measured = f"{facts['device']}{threads}, {facts['date']}, torch {facts['torch']}, {versions}:"
        found[facts["device"]] = f"{measured}\n\n{path.read_text().strip()}"
    return "\n\n".join(found.values())


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


def tables(name: str) -> list[tuple[str, str]]:
    """Of a name's tables that benchmarks/recipes.py or benchmarks/pruning.py has left the newest of each device, the newest
    last: what it was measured on, and the text."""
    found: dict[str, tuple[str, str, str]] = {}
    for path in RESULTS.glob(f"{name}-*.md"):
        facts = json.loads(path.with_suffix(".json").read_text())["environment"]
        measured = f"{facts['device']}, torch {facts['torch']}, {facts['date']}. "
        one = (facts["date"], measured, path.read_text().strip())
        found[facts["device"]] = max(one, found.get(facts["device"], one))
    return [one[1:] for one in sorted(found.values())]


def left(name: str) -> str:
    """A table per device."""
    return "\n\n".join("".join(one) for one in tables(name)) or "Not measured yet."


def rows_of(*beginnings: str) -> str:
    """Of the recipes' newest table the teacher, Hinton's and those whose names begin so."""
    known = ("model", "---", "teacher", "hinton", *beginnings)
    measured, text = [("", ""), *tables("recipes")][-1]
    lines = [line for line in text.splitlines() if not line.startswith("|") or line[2:].startswith(known)]
    if not any(line[2:].startswith(beginnings) for line in lines):
        return "Not measured yet."
    return measured + "\n".join(lines)


def tinybert_step() -> str:
    """What benchmarks/tinybert_step.py has left: a row for each length and way."""
    path = max(RESULTS.glob("tinybert-step-*.json"))
    made = json.loads(path.read_text())
    facts, names = made["environment"], ("step ms", "losses ms", "step peak MB", "losses peak MB")
    lines = [["tokens", "padded", "way", *names], ["---:", "---", "---", *["---:"] * len(names)]]
    lines += [
        [str(row["length"]), "yes" if row["padded"] else "no", row["way"], *(f"{row[name]:.0f}" for name in names)]
        for row in made["results"]
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}:\n\n{table}"


Blocks = tuple[tuple[str, Callable[[], str]], ...]
FEW: Blocks = (("few-labels", partial(left, "few-labels")),)
OF_RECIPES = ROOT / "docs" / "recipes"
PAGES: dict[Path, Blocks] = {
    ROOT / "README.md": FEW,
    ROOT / "docs" / "results.md": (
        ("operators", operators),
        ("peers", peers),
        ("vocabulary", vocabulary),
        ("recipes", partial(left, "recipes")),
        *FEW,
        ("pruned", pruned),
    ),
    ROOT / "docs" / "pruning.md": (("pruning", partial(left, "pruning")),),
    OF_RECIPES / "fastbert.md": (("fastbert-speeds", partial(left, "fastbert-speeds")),),
    OF_RECIPES / "dynabert.md": (("dynabert-sizes", partial(left, "dynabert-sizes")),),
    **{
        OF_RECIPES / f"{name.replace('-', '_')}.md": ((f"recipes {name}", partial(rows_of, *beginnings)),)
        for name, beginnings in {
            "adversarial": ("adversarial",),
            "dynamic": ("dynamic",),
            "multi-task": ("multi-task", "task_movie"),
            "multi-teacher": ("multi-teacher",),
            "self-distillation": ("self-distillation",),
        }.items()
    },
    OF_RECIPES / "tinybert.md": (
        ("recipes tinybert", partial(rows_of, "tinybert", "labels-pretrained-start")),
        ("tinybert-step", tinybert_step),
    ),
}


def filled(text: str, blocks: Blocks) -> str:
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
