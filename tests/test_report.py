"""`kdfast report`: a page of HTML that needs nothing else."""

from __future__ import annotations

import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import call, classifier_run, refused

from kdfast.bench import harness, plots
from kdfast.bench.peers import measure
from kdfast.recipes import hinton

ROW = {"kl_to_teacher": 0.1, "parameters": 2e7, "latency_ms_batch_1": 4.0, "latency_ms_batch_32": 50.0}
PIXEL = bytes.fromhex("89504e470d0a1a0a0000000d49484452")  # a PNG's beginning


def run(folder: Path, seed: int = 0, accuracy: float = 0.8) -> Path:
    models = {
        "teacher": {**ROW, "accuracy": 0.86, "kl_to_teacher": 0.0},
        "labels_only": {**ROW, "accuracy": 0.78},
        "student": {**ROW, "accuracy": accuracy},
    }
    return classifier_run(folder, hinton.Recipe(seed=seed), **models)


class Page(HTMLParser):
    """Its cells by row, its links, and that every element that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.feed(text)
        assert self.open == ["html"] or self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th", "b", "span"):
            self.rows[-1].append(data)


def reported(folder: Path, monkeypatch: pytest.MonkeyPatch, *runs: Path) -> str:
    """The page."""
    assert call(monkeypatch, "report", *runs, "--output", folder / "report.html") == 0
    return (folder / "report.html").read_text()


def test_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "a <b>run")
    (folder / "learning_curves.png").write_bytes(PIXEL)
    assert call(monkeypatch, "report", folder, "--output", tmp_path / "pages" / "report.html") == 0
    assert capsys.readouterr().out == f"In {tmp_path / 'pages' / 'report.html'}\n"
    text = (tmp_path / "pages" / "report.html").read_text()
    page = Page(text)
    assert "<b>" not in text
    assert "a &lt;b&gt;run" in text
    assert "accuracy 80.0 %, on the labels alone 78.0 % (+2.0 points)" in text
    (student,) = (row for row in page.rows if row[0].endswith("/student"))
    assert student[1:3] == ["80.0", "+2.0"]
    assert ["alpha", "0.9"] in page.rows
    # Nothing from elsewhere: what is referred to is in the page.
    assert any(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"url\((?!#|&quot;#)", text)
    assert text.count("<svg") == 2
    assert "color-scheme: light dark" in text
    assert "width=device-width" in text
    assert "currentColor" in text
    assert "#ffffff" not in text


def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run(tmp_path / f"mine-{seed}", seed, 0.80 + seed / 100) for seed in (0, 1)]
    page = Page(reported(tmp_path, monkeypatch, *runs))
    (student,) = (row for row in page.rows if row[0] == "mine/student")
    assert student[1:4] == ["2", "80.5±0.5", "+2.5±0.5"]


BENCHMARK = max((Path(__file__).parents[1] / "benchmarks" / "results").glob("operators-*.json"))


def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = reported(tmp_path, monkeypatch, BENCHMARK)
    page, (results, facts) = Page(text), harness.load(BENCHMARK)
    assert page.rows[0] == list(harness.HEADER)
    assert [tuple(row) for row in page.rows[1 : 1 + len(results)]] == harness.table(results)
    assert ["threads", str(facts["threads"])] in page.rows
    assert text.count("<svg") == 2
    assert "<h2>Roofline</h2>" in text
    assert "#ffffff" not in text


def test_plots_of_benchmarks_fit_a_phone(tmp_path: Path) -> None:
    """As wide as 390 points of it at twice the pixels, and no taller than a few screens of it."""
    results, facts = harness.load(BENCHMARK)
    for draw in (plots.plot, plots.plot_roofline, plots.plot_sweep):
        draw(results, facts, tmp_path / "plot.png")
        width, height = struct.unpack(">II", (tmp_path / "plot.png").read_bytes()[16:24])
        assert width == 780
        assert 300 < height < 2000
    for committed in BENCHMARK.parent.glob("operators-*.png"):
        assert struct.unpack(">II", committed.read_bytes()[16:24])[0] == 780


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run")
    told = refused(monkeypatch, capsys, "report", folder, "--output", tmp_path)
    assert "expected an HTML file, got a folder" in told
    assert "expected the folder of a run" in refused(monkeypatch, capsys, "report", tmp_path / "none")
    assert not (tmp_path / "report.html").exists()
    other = folder / "metrics.json"
    for files in ((other,), (BENCHMARK, BENCHMARK), (BENCHMARK.with_suffix(".png"),)):
        assert "expected one file of kdfast bench" in refused(monkeypatch, capsys, "report", *files)


PEERS = max((Path(__file__).parents[1] / "benchmarks" / "results").glob("peers-*.json"))


def test_benchmark_beside_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = reported(tmp_path, monkeypatch, PEERS)
    page, (rows, facts) = Page(text), measure.load(PEERS)
    assert page.rows[0] == list(measure.HEADER)
    shown = []
    for title, of_case in measure.by_case(rows).items():
        shown += [[title], *(list(cells) for cells in measure.cells(of_case, str))]
    assert page.rows[1 : 1 + len(shown)] == shown
    best = [
        cell for of in measure.by_case(rows).values() for row in measure.cells(of, "<b>{}</b>".format) for cell in row
    ]
    assert all(f"<td>{cell}</td>" in text for cell in best if cell.startswith("<b>"))
    assert sum(cell.startswith("<b>") for cell in best) >= len(measure.by_case(rows))
    assert "Better than kdfast: " in text
    assert f"trl {facts['peers']['trl']}" in text
    assert text.count("<svg") == 2
    assert "#ffffff" not in text


def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = max(BENCHMARK.parent.glob("sweep-*.json"))
    text = reported(tmp_path, monkeypatch, sweep)
    assert text.count("<svg") == 1
    assert "<h2>Roofline</h2>" not in text


def test_plots_of_peers_fit_a_phone(tmp_path: Path) -> None:
    rows, facts = measure.load(PEERS)
    for quantity in ("milliseconds", "megabytes"):
        plots.plot_peers(rows, facts, tmp_path / "plot.png", quantity)
        width, height = struct.unpack(">II", (tmp_path / "plot.png").read_bytes()[16:24])
        assert width == 780
        assert 300 < height < 2000
