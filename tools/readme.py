"""Writes the README's results tables from the committed files: benchmarks/results/*.json and *-hinton.json.

python tools/readme.py            rewrites README.md
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from kdfast import bench
from kdfast.registry.divergences import DIVERGENCES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HINTON = {"teacher": "teacher, 6 layers", "labels_only": "student, labels alone", "student": "student, distilled"}


def in_readme(case: bench.Case) -> bool:
    """Of `kl_div` a few widths, of the other divergences the large vocabulary; all cases are in the JSON."""
    if case.operator not in DIVERGENCES:
        return case.gradient
    wide = case.shape == (64, 152064)
    if case.operator != "kl_div":
        return wide and case.gradient
    return wide or case.shape[0] == 128 or (case.dtype == "float32" and case.shape != (1, 152064))


def operators() -> str:
    """A table per device; of a device's files the latest."""
    latest: dict[str, Path] = {}
    for path in sorted(RESULTS.glob("operators-*.json")):
        latest[bench.load(path)[1]["device"]] = path
    parts = []
    for device, path in latest.items():
        results, facts = bench.load(path)
        threads = f", {facts['threads']} threads, {facts['cpu_variant']}" if "threads" in facts else ""
        parts.append(
            f"{device}{threads}, torch {facts['torch']}, {facts['date']}:\n\n{bench.markdown([r for r in results if in_readme(r.case)])}"
        )
    return "\n\n".join(parts)


def hinton() -> str:
    models = json.loads((RESULTS / "hinton.json").read_text())["models"]
    rows = [
        "| | accuracy | KL to teacher (T=2) | agreement | parameters | ms, batch 32 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, title in HINTON.items():
        m = models[name]
        rows.append(
            f"| {title} | {100 * m['accuracy']:.1f} % | {m['kl_to_teacher']:.4f} | {100 * m['agreement']:.1f} % "
            f"| {m['parameters'] / 1e6:.1f} M | {m['latency_ms_batch_32']:.0f} |"
        )
    return "\n".join(rows)


def filled(text: str) -> str:
    """README text with the blocks between `<!-- name -->` and `<!-- end -->` made anew."""
    for name, make in (("operators", operators), ("hinton", hinton)):
        block = f"<!-- {name} -->\n{make()}\n<!-- end -->"
        text, found = re.subn(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, block=block: block, text, flags=re.S)
        if found != 1:
            raise ValueError(f"README.md: expected one block <!-- {name} -->, got {found}")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
