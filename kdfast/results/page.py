"""What was measured as a page of HTML that holds all it shows: tables, plots, settings. For light and dark, wide and
narrow."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kdfast.recipes.paths import METRICS
from kdfast.results import plots, tables
from kdfast.results.compare import Comparison, Run
from kdfast.results.tables import LATENCY_32

TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } p, summary { max-width: 48rem; }
.wide { overflow-x: auto; }
table { border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: pre-line; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
tbody th { padding-top: 1rem; }
tbody th span { position: sticky; left: .35rem; display: inline-block; max-width: calc(100vw - 3.2rem); }
tbody tr:hover td { background: linear-gradient(var(--soft), var(--soft)) Canvas; }
.plots { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); }
svg { fill: currentColor; width: 100%; height: auto; }
img { width: 100%; background: white; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media (max-width: 36rem) {
  table { font-size: .8rem; } th, td { padding: .3rem .35rem; }
  td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7.4rem; }
}
@media (prefers-color-scheme: dark) {
  svg { filter: brightness(1.4); } img { filter: invert(.93) hue-rotate(180deg); }
}
</style>
<h1>{{ title }}</h1>
{% for line in said %}<p>{{ line }}</p>
{% endfor %}
{% macro table() %}<div class="wide"><table>
<thead><tr><th>{{ first }}</th>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in rows %}<tr>{% if cells %}<td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}{% else %}<th colspan="{{ headings | length + 1 }}"><span>{{ name }}</span></th>{% endif %}</tr>
{% endfor %}</tbody>
</table></div>
<p>{{ legend }}</p>{% endmacro %}
{% if rows | length <= 20 %}{{ table() }}{% endif %}
<div class="plots">
{% for heading, drawing in drawings %}<section><h2>{{ heading }}</h2>{{ drawing }}</section>
{% endfor %}</div>
{% if rows | length > 20 %}<h2>Table</h2>{{ table() }}{% endif %}
<h2>Settings</h2>
{% for name, settings, versions in runs %}<details><summary>{{ name }}</summary>
<p>{{ versions }}</p>
<div class="wide"><table><tbody>
{% for key, value in settings.items() %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div></details>
{% endfor %}
</html>
"""


def page(comparison: Comparison) -> str:
    """The page of a comparison, which may be of a single run."""
    runs = list({run.folder: run for row in comparison.rows for run in row.runs}.values())
    headings, cells = tables.compared(comparison, all_spreads=True)
    names = [row.name for row in comparison.rows]
    said = [line for run in runs for line in tables.gain(run.models, comparison.metric)] if len(runs) == 1 else []
    return render(
        title=f"{comparison.title}: {runs[0].folder.resolve().name if len(runs) == 1 else f'{len(runs)} runs compared'}",
        said=said,
        headings=headings,
        rows=list(zip(names, cells, strict=True)),
        legend=tables.legend(comparison),
        drawings=[*_drawings(comparison), *(image for run in runs for image in _images(run, len(runs) > 1))],
        runs=[(run.folder.resolve().name, _shown(run.settings), _versions(run)) for run in runs],
    )


def render(
    *,
    title: str,
    headings: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    legend: str,
    drawings: Sequence[tuple[str, Markup]],
    runs: Sequence[tuple[str, dict[str, Any], str]],
    said: Sequence[str] = (),
    first: str = "model",
) -> str:
    """The page of anything that has a table.

    Args:
        rows: name and cells of each; without cells a heading of those below. drawings: heading and image of each.
        runs: name, settings and a line about each. said: lines above the table. first: heading of the names.
    """
    given = dict(locals())
    environment = jinja2.Environment(autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE).render(given)


def _drawings(comparison: Comparison) -> list[tuple[str, Markup]]:
    drawings = [("Quality and speed", svg(lambda path: plots.plot_comparison(path, comparison)))]
    if any({"parameters", LATENCY_32} <= {*row.values} for row in comparison.rows):
        drawings.append(("Size, latency, quality", svg(lambda path: plots.plot_costs(path, comparison))))
    return drawings


def svg(draw: Callable[[Path], None]) -> Markup:
    """A plot in the page's own colours."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder, "plot.svg"))
        text = Path(folder, "plot.svg").read_text()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    return Markup(text.replace("#000000", "currentColor").replace("fill: #ffffff", "fill: none"))


def _images(run: Run, named: bool) -> list[tuple[str, Markup]]:
    """What the run has drawn."""
    found = []
    for path in sorted(run.folder.glob("*.png")):
        title = path.stem.replace("_", " ").capitalize() + f", {run.folder.resolve().name}" * named
        data = base64.b64encode(path.read_bytes()).decode()
        found.append((title, Markup('<img alt="{}" src="data:image/png;base64,{}">').format(title, data)))
    return found


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _versions(run: Run) -> str:
    stored = json.loads((run.folder / METRICS).read_text())
    return ", ".join(f"{name} {version}" for name, version in stored.get("versions", {}).items())
