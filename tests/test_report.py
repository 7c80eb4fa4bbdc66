"""The HTML page: complete in itself, and its formulas those of the planner, in a real browser."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from families.measured import synthetic_records

from streamcrypt import report
from streamcrypt.bench.records import Record, Records, RecordsError, write_json
from streamcrypt.plan import predict as planner

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)

NODE = shutil.which("node")

JOBS = {
    "many hosts": planner.Job(bytes=12 << 40, files=1 << 20, workers=16, hosts=4),
    "spread sizes": planner.Job(
        bytes=1 << 38, files=30_000, sizes=planner.Sizes.lognormal(1e6, 1.5), workers=2
    ),
    "no cache": planner.Job(bytes=1 << 34, files=20_000, cache=False, kms_quota=300),
    "contexts and age": planner.Job(
        bytes=1 << 36, files=50_000, contexts=7, cache_max_age=2, kms_latency=0.03
    ),
    "byte limit": planner.Job(
        bytes=1 << 36, files=9000, sizes=planner.Sizes.lognormal(1e7, 1), cache_max_bytes=10**9, fsync=False
    ),
    "decrypt": planner.Job(bytes=1 << 36, files=9000, operation="decrypt", cache_max_messages=50),
    "verify": planner.Job(bytes=1 << 36, files=9000, operation="verify", read_bandwidth=5e8),
    "rekey, slow network": planner.Job(bytes=1 << 36, files=9000, operation="rekey", network_bandwidth=2e8),
    "from a bucket, aged keys": planner.Job(
        bytes=1 << 40, files=90_000, object_store=True, cache_max_age=3.0, price_host_hour=2.5, keys=3
    ),
    "more than memory holds": planner.Job(bytes=1 << 40, files=9000, fsync=False),
    "processes, aged keys": planner.Job(bytes=1 << 30, files=30_000, cache_max_age=0.2, workers=2),
}
# What the sliders are set to, as factors of the plan's own values.
MOVES = [
    {},
    {"files": 0.25, "hosts": 3},
    {"kms_latency": 20, "cache_max_messages": 0.001},
    {"kms_quota": 0.01, "frame_size": 0.01},
]


@pytest.fixture(scope="module")
def records() -> Records:
    return synthetic_records()


def test_the_fastest_run_of_a_sweep_is_one_of_ours(records):
    """A copy is a cell of the sweep too, and has a line of its own in the charts."""
    first = next(run for run in records.runs if run.cell.operation == "encrypt")
    copies = [
        dataclasses.replace(
            first,
            cell=dataclasses.replace(first.cell, engine="copy", workers=workers),
            wall_s=first.wall_s / 1000,
        )
        for workers in (1, 2)
    ]
    page = report.records_page(Records(records.machine, (*records.runs, *copies)))
    tile = re.search(r'<div class="label">fastest</div>.*?<div class="note">([^<]*)', page, re.DOTALL)
    assert tile is not None
    assert not tile[1].startswith("copy")
    assert "</i>copy, encrypt" in page


def browse(page: Path, fragment: str, profile: Path) -> tuple[str, str]:
    """The document after its script ran, and what the browser logged."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
         "--enable-logging=stderr", "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--dump-dom", f"{page.as_uri()}#{fragment}"],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: what a browser says of the page is not tested (install chromium)"
)
needs_script = pytest.mark.skipif(
    CHROMIUM is None and NODE is None, reason="NO BROWSER AND NO NODE: the page's script is not tested"
)

# Of a document just what the script touches, where there is no browser.
DOCUMENT = """
const elements = {};
const element = () => ({ style: {}, dataset: {}, elements: {}, handlers: {}, children: [], textContent: "",
  append(...added) {
    for (const one of added) {
      const before = this.children.at(-1);
      if (before) one.previousElementSibling = before;
      this.children.push(one);
      for (const inner of [one, ...one.children || []]) if (inner.name) this.elements[inner.name] = inner;
    }
  },
  addEventListener(name, handler) { this.handlers[name] = handler; },
  dispatchEvent(event) { this.handlers[event.type](); } });
const body = element();
const document = { body, title: "", createElement: element, querySelectorAll: () => [],
  getElementById: (id) => elements[id] ??= element() };
const location = { hash: "#FRAGMENT" }, window = globalThis;
"""


def scripted(page: str, code: str, fragment: str, folder: Path) -> str:
    """The document's title after the page's script and ``code``: in a browser, or else in node."""
    if CHROMIUM is None:
        assert NODE is not None
        script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
        assert script is not None
        file = folder / "page.js"
        # Strict, as the page's own script says; what prints is not of it.
        whole = f"{DOCUMENT.replace('FRAGMENT', fragment)}{script[1]}\n{code}\nconsole.log(document.title);"
        file.write_text(f'"use strict";\n{whole}')
        done = subprocess.run([NODE, file], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout
    (folder / "page.html").write_text(page.replace("</script>", f"{code}\n</script>"))
    document, log = browse(folder / "page.html", fragment, folder / "profile")
    assert ":CONSOLE" not in log, log
    title = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
    assert title is not None
    return html.unescape(title[1])


@needs_script
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_the_page_computes_what_python_computes(job, records, tmp_path):
    found = planner.predict(job, records, trials=50)
    plan = found.to_json()
    # One page, all moves: the script answers them at once in the document's title.
    moves = []
    for move in MOVES:
        start = plan["page"]["start"]
        moves.append({name: _moved(name, start[name], factor) for name, factor in move.items()})
    asked = f"document.title = JSON.stringify({json.dumps(moves)}.map(streamcryptEstimate));"
    answers = json.loads(scripted(report.plan_page(plan), asked, "hosts=2", tmp_path))
    for move, answer in zip(moves, answers, strict=True):
        # The link set hosts=2 before; a move may set it again.
        changed = {"hosts": 2, **{name: value for name, value in move.items() if name != "kms_quota"}}
        quota = move.get("kms_quota", found.quota.per_second)
        expected = planner.evaluate(
            dataclasses.replace(job, **changed, kms_quota=quota), records, workers=found.workers
        )
        assert answer["seconds"] == pytest.approx(expected.seconds, rel=1e-9)
        assert answer["calls"] == pytest.approx(expected.calls, rel=1e-9)
        assert answer["limit"] == expected.limit
        assert answer["parts"] == pytest.approx(expected.parts, rel=1e-9)
        assert answer["cost"] == pytest.approx(expected.cost, rel=1e-9)


def _moved(name, value, factor):
    return (
        value * factor
        if name in ("kms_latency", "kms_quota", "cache_max_age")
        else max(1, round(value * factor))
    )


@needs_script
@pytest.mark.parametrize("slider", ["hosts", "files"])
def test_a_moved_slider_changes_the_figures(slider, records, tmp_path):
    job = dataclasses.replace(JOBS["many hosts"], object_store=True)
    plan = planner.predict(job, records, trials=50).to_json()
    moved = f"""
        const slider = form.elements.{slider}; slider.value = 1000; slider.dispatchEvent(new Event('input'));
        const shown = (name) => document.getElementById(name).textContent;
        document.title = JSON.stringify([job.{slider}, document.body.dataset, shown('cost'), shown('cost-note')]);
    """
    value, data, cost, note = json.loads(scripted(report.plan_page(plan), moved, "", tmp_path))
    assert value == {"hosts": 256, "files": 1 << 26}[slider]
    expected = planner.evaluate(
        dataclasses.replace(job, **{slider: value}), records, workers=plan["workers_per_host"]
    )
    assert float(data["seconds"]) == pytest.approx(expected.seconds, rel=1e-9)
    assert float(data["cost"]) == pytest.approx(expected.cost["total"], rel=1e-9)
    assert cost == f"{expected.cost['total']:.2f} USD" != f"{plan['cost']['total']:.2f} USD"
    assert note == report._cost_note(expected.cost)
    if slider == "hosts":
        assert float(data["seconds"]) < plan["seconds"]


@needs_browser
@pytest.mark.parametrize("kind", ["plan", "records"])
def test_no_console_error_and_no_request(kind, records, tmp_path):
    page = tmp_path / "page.html"
    found = planner.predict(JOBS["many hosts"], records, trials=50)
    page.write_text(report.plan_page(found.to_json()) if kind == "plan" else report.records_page(records))
    _, log = browse(page, "", tmp_path / "profile")
    assert ":CONSOLE" not in log, log


@needs_browser
def test_the_browser_does_report_errors_and_refused_requests(records, tmp_path):
    """Or the test above would see nothing wrong with anything."""
    page = tmp_path / "page.html"
    whole = report.records_page(records)
    page.write_text(whole.replace("</main>", "</main><script>undefinedName()</script>"))
    assert ":CONSOLE" in browse(page, "", tmp_path / "profile")[1]
    page.write_text(whole.replace("</main>", '</main><img src="http://127.0.0.1:9/x.png">'))
    assert ":CONSOLE" in browse(page, "", tmp_path / "profile")[1]


@pytest.mark.parametrize("kind", ["plan", "records"])
def test_the_page_is_one_small_file(kind, records):
    found = planner.predict(JOBS["many hosts"], records, trials=50)
    page = report.plan_page(found.to_json()) if kind == "plan" else report.records_page(records)
    assert len(page.encode()) < 2_000_000
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", page)
    assert "prefers-color-scheme: dark" in page


def test_words_from_records_are_escaped(records):
    evil = "</script><script>alert(1)</script>"
    run = dataclasses.replace(records.runs[0], error=evil)
    page = report.records_page(Records(dataclasses.replace(records.machine, cpu=evil), (*records.runs, run)))
    assert evil not in page
    plan = planner.predict(JOBS["many hosts"], records, trials=50).to_json()
    plan["notes"].append(evil)
    assert evil not in report.plan_page(plan)


def test_what_is_neither_records_nor_a_plan_is_refused(records, tmp_path):
    for name, text, error in [
        ("broken.json", "{", report.ReportError),
        ("other.json", '{"a": 1}', RecordsError),
        ("half.json", '{"seconds_interval": [1, 2]}', report.ReportError),
        ("none.json", json.dumps({"schema": 99, "machine": {}, "runs": []}), RecordsError),
    ]:
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(error):
            report.page_of(path)
    with pytest.raises(RecordsError):
        report.page_of(tmp_path / "absent.json")


def test_records_without_a_good_run_are_refused(records, tmp_path):
    failed: tuple[Record, ...] = (dataclasses.replace(records.runs[0], error="it broke"),)
    path = tmp_path / "records.json"
    write_json(path, Records(records.machine, failed))
    with pytest.raises(report.ReportError, match="nothing to show"):
        report.page_of(path)
