"""Records or a plan as one HTML page: self-contained, offline, readable in light and dark.

The page has no request to make and its content security policy forbids any.  Charts are SVG drawn
here.  A plan's page computes again when a slider moves: ``report_assets/plan.js`` is ``plan.closed`` and
``plan.predict`` in JavaScript, and a test holds its figures to Python's.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from streamcrypt.bench.records import OURS, Record, Records, by_cell, median, read, spread
from streamcrypt.bench.sweep import bootstrap_median
from streamcrypt.units import format_size

_SERIES: Final = ("a", "b", "c", "d", "e", "f")  # CSS classes of the palette, in fixed order
_MOST_POINTS: Final = 4000


class ReportError(ValueError):
    """What was given is neither records nor a plan."""


def page_of(source: Path) -> str:
    """The page for a sweep's folder, a file of records, or the JSON of ``plan --json``."""
    if source.is_file() and source.suffix == ".json":
        try:
            document = json.loads(source.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ReportError(f"{source}: not JSON: {error}") from error
        if isinstance(document, dict) and "seconds_interval" in document:
            return plan_page(document)
    return records_page(read(source))


def _asset(name: str) -> str:
    return resources.files("streamcrypt").joinpath("report_assets", name).read_text(encoding="utf-8")


def _page(title: str, body: str, script: str = "") -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    code = f"<script>\n{script}\n</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{code}\n</body>\n</html>\n"
    )


# -- small pieces


def _text(value: object) -> str:
    return html.escape(str(value))


def _tile(label: str, value: str, note: str = "", name: str = "") -> str:
    mark = f' id="{name}"' if name else ""
    note_mark = f' id="{name}-note"' if name else ""
    below = f'<div class="note"{note_mark}>{_text(note)}</div>' if note else ""
    head = f'<div class="label">{_text(label)}</div><div class="value"{mark}>{_text(value)}</div>'
    return f'<div class="tile">{head}{below}</div>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = ()) -> str:
    def cell(tag: str, column: int, value: object) -> str:
        kind = ' class="number"' if column in numeric else ""
        return f"<{tag}{kind}>{_text(value)}</{tag}>"

    top = "".join(cell("th", column, head) for column, head in enumerate(heads))
    lines = "".join(
        "<tr>" + "".join(cell("td", column, value) for column, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.3g} s"
    if value < 7200:
        return f"{value / 60:.3g} min"
    return f"{value / 3600:.3g} h" if value < 259200 else f"{value / 86400:.3g} days"


# -- charts


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round values between low and high."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = max(1, (last - first) // 5)
        found = [10.0**power for power in range(first, last + 1, step)]
        return [tick for tick in found if low * 0.999 <= tick <= high * 1.001] or [low, high]
    span = high - low or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    step_size = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= 5)
    start = math.ceil(low / step_size - 1e-9)
    return [
        start * step_size + i * step_size
        for i in range(8)
        if start * step_size + i * step_size <= high * 1.0001
    ]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.1e}"


def chart(
    series: Sequence[tuple[str, Sequence[tuple[float, float, str]]]],
    *,
    x: str,
    y: str,
    lines: bool = True,
    log_x: bool = False,
    zero: bool = True,
    format_x: Callable[[float], str] = _number,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """Lines or points of several series as SVG; a point is (x, y, words for its tooltip).
    Nothing for no points."""
    points = [point for _, rows in series for point in rows]
    if not points:
        return ""
    width, height, left, right, top, bottom = 640, 330, 72, 22, 30, 62
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    low_x, high_x = min(xs), max(xs)
    if log_x:
        low_x, high_x = low_x / 1.15, high_x * 1.15
    else:
        pad = (high_x - low_x) * 0.04 or 0.5
        low_x, high_x = low_x - pad, high_x + pad
    low_y = 0.0 if zero else min(ys) * 0.95
    high_y = max(ys) * 1.08 or 1.0

    def at_x(value: float) -> float:
        if log_x:
            share = (math.log(value) - math.log(low_x)) / (math.log(high_x) - math.log(low_x))
        else:
            share = (value - low_x) / (high_x - low_x)
        return left + share * (width - left - right)

    def at_y(value: float) -> float:
        return height - bottom - (value - low_y) / (high_y - low_y) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(y)} by {_text(x)}">']
    for tick in _ticks(low_y, high_y, log=False):
        place = at_y(tick)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{place:.1f}" y2="{place:.1f}"/>'
        )
        parts.append(f'<text class="tick end" x="{left - 8}" y="{place + 5:.1f}">{_number(tick)}</text>')
    for tick in x_ticks if x_ticks is not None else _ticks(low_x, high_x, log=log_x):
        parts.append(
            f'<text class="tick mid" x="{at_x(tick):.1f}" y="{height - bottom + 24}">{_text(format_x(tick))}</text>'
        )
    parts.append(
        f'<text class="axis mid" x="{(left + width - right) / 2}" y="{height - 6}">{_text(x)}</text>'
    )
    parts.append(f'<text class="axis" x="4" y="{top - 12}">{_text(y)}</text>')
    for number, (_, rows) in enumerate(series):
        color = _SERIES[number % len(_SERIES)]
        if lines and len(rows) > 1:
            path = " ".join(f"{at_x(px):.1f},{at_y(py):.1f}" for px, py, _ in rows)
            parts.append(f'<polyline class="line {color}" points="{path}"/>')
        for px, py, words in rows[:_MOST_POINTS]:
            parts.append(
                f'<circle class="point {color}" cx="{at_x(px):.1f}" cy="{at_y(py):.1f}" r="5">'
                f"<title>{_text(words)}</title></circle>"
            )
    parts.append("</svg>")
    legend = "".join(
        f'<span><i class="key {_SERIES[number % len(_SERIES)]}"></i>{_text(name)}</span>'
        for number, (name, _) in enumerate(series)
    )
    return (
        f"<figure>{''.join(parts)}"
        f'<figcaption class="legend">{legend if len(series) > 1 else ""}</figcaption></figure>'
    )


def bars(rows: Sequence[tuple[str, float, str]], *, signed: bool = False, name: str = "") -> str:
    """Horizontal bars: (label, value, words); ``signed`` has zero in the middle."""
    most = max((abs(value) for _, value, _ in rows), default=0.0) or 1.0
    lines = []
    for label, value, words in rows:
        share = abs(value) / most * (50 if signed else 100)
        side = f"left:{50 - share if value < 0 else 50}%" if signed else "left:0"
        kind = "b" if signed and value < 0 else "a"
        lines.append(
            f'<div class="bar" data-name="{_text(label)}"><span class="label">{_text(label)}</span>'
            f'<span class="track{" signed" if signed else ""}">'
            f'<i class="{kind}" style="{side};width:{share:.2f}%"></i></span>'
            f'<span class="figure">{_text(words)}</span></div>'
        )
    mark = f' id="{name}"' if name else ""
    return f'<div class="bars"{mark}>{"".join(lines)}</div>'


# -- records


def records_page(records: Records) -> str:
    """A sweep: what was measured on which machine, how fast, how sure."""
    runs = records.usable()
    if not runs:
        raise ReportError("the records hold no run that ended well; nothing to show")
    machine = records.machine
    groups = by_cell(runs)
    noisy = sum(1 for run in runs if run.noise)
    failed = [run for run in records.runs if run.error is not None]
    repeated = [spread([run.wall_s for run in group]) for group in groups.values() if len(group) > 1]
    best = max([run for run in runs if run.cell.engine == OURS] or runs, key=lambda run: run.rate)
    body = [
        "<header><h1>Measured on this machine</h1>",
        f'<p class="note">{_text(machine.name)} · {_text(machine.kernel)} · Python {_text(machine.python)} · '
        f"{_text(machine.openssl)} · {_text(records.date)}</p></header>",
        '<section class="tiles">',
        _tile("configurations", str(len(groups)), f"{len(runs)} runs"),
        _tile("fastest", f"{best.rate / 1e9:.2f} GB/s", best.cell.label()),
        _tile("noise", f"{median(repeated):.1%}", "median absolute deviation of repeated runs")
        if repeated
        else _tile("noise", "unknown", "no configuration was run twice"),
        _tile("noisy runs", str(noisy), "kept and marked, never dropped"),
        _tile("failed runs", str(len(failed)), failed[0].error or "" if failed else ""),
        "</section>",
        '<section class="two">',
        _titled("Rate by frame length", _by_axis(groups, "frame_size", "frame length", log=True)),
        _titled("Rate by workers", _by_axis(groups, "workers", "workers", log=False)),
        _titled("KMS latency", _latency_chart(runs)),
        _titled(
            "Runs in their order", _drift_chart(records, groups), "A slope is drift, a step is another job."
        ),
        "</section>",
        "<section><h2>Every configuration</h2>",
        _cells_table(groups),
        "</section>",
    ]
    return _page("streamcrypt bench", "\n".join(body))


def _titled(title: str, drawing: str, note: str = "") -> str:
    words = f'<p class="note">{_text(note)}</p>' if note else ""
    return f"<div><h2>{_text(title)}</h2>{words}{drawing}</div>" if drawing else ""


def _series_name(run: Record) -> str:
    cell = run.cell
    engine = f"{cell.engine}, " if cell.engine != OURS else ""
    kind = f"{engine}{cell.operation}{', signed' if cell.signed else ''}"
    return kind + (f", {cell.storage}{' + fsync' if cell.fsync else ''}" if cell.storage != "memory" else "")


def _by_axis(groups: dict[str, list[Record]], axis: str, label: str, *, log: bool) -> str:
    """Median GB/s over one axis: a line per kind, of the cells that are alike in all else, largest set first."""
    families: dict[tuple[Any, ...], list[list[Record]]] = {}
    for group in groups.values():
        cell = group[0].cell
        if cell.kms_latency or cell.kms_quota:
            continue
        rest = tuple((name, getattr(cell, name)) for name in cell.__slots__ if name not in (axis, "seed"))
        families.setdefault(rest, []).append(group)
    chosen: dict[str, list[list[Record]]] = {}
    for alike in families.values():
        name = _series_name(alike[0][0])
        if len(alike) > 1 and _weight(alike) > _weight(chosen.get(name, [])):
            chosen[name] = alike
    series = []
    values: set[float] = set()
    for name, alike in sorted(chosen.items())[: len(_SERIES)]:
        points = []
        for group in sorted(alike, key=lambda group: float(getattr(group[0].cell, axis))):
            rate = median([run.rate for run in group]) / 1e9
            value = float(getattr(group[0].cell, axis))
            values.add(value)
            points.append((value, rate, f"{group[0].cell.label()}: {rate:.3f} GB/s, {len(group)} runs"))
        series.append((name, points))
    return chart(
        series,
        x=label,
        y="GB/s",
        log_x=log,
        format_x=(lambda value: format_size(value)) if log else _number,
        x_ticks=sorted(values),
    )


def _weight(alike: Sequence[list[Record]]) -> tuple[int, int]:
    """More points on the axis first, then more bytes: small files say little about a rate."""
    return len(alike), max((group[0].bytes_in for group in alike), default=0)


def _latency_chart(runs: Sequence[Record]) -> str:
    """Percentiles on an axis of nines."""
    series: dict[str, list[float]] = {}
    for run in runs:
        if run.kms_latency_ms:
            asked = (
                f"{run.cell.kms_latency * 1000:g} ms asked"
                if run.cell.kms_latency
                else "embedded, no latency"
            )
            series.setdefault(asked, []).extend(run.kms_latency_ms)
    drawn = []
    for name, samples in sorted(series.items())[: len(_SERIES)]:
        ordered = sorted(samples)
        points = []
        for nines in (0.30103, 1.0, 2.0, 3.0):
            fraction = 1 - 10**-nines
            if len(ordered) * (1 - fraction) >= 1:
                value = ordered[math.ceil(fraction * len(ordered)) - 1]
                points.append(
                    (nines, value, f"{name}: p{fraction * 100:g} {value:.3f} ms of {len(ordered)} calls")
                )
        drawn.append((f"{name} ({len(ordered)} calls)", points))
    labels = {0.30103: "p50", 1.0: "p90", 2.0: "p99", 3.0: "p99.9"}
    return chart(
        [row for row in drawn if row[1]],
        x="percentile",
        y="ms",
        x_ticks=list(labels),
        format_x=lambda value: labels.get(value, ""),
    )


def _drift_chart(records: Records, groups: dict[str, list[Record]]) -> str:
    middles = {name: median([run.wall_s for run in group]) for name, group in groups.items()}
    quiet: list[tuple[float, float, str]] = []
    loud: list[tuple[float, float, str]] = []
    for number, run in enumerate(records.usable()):
        ratio = run.wall_s / middles[run.cell.hash]
        words = f"run {number + 1}: {run.cell.label()}, × {ratio:.3f}"
        (loud if run.noise else quiet).append((float(number + 1), ratio, f"{words} {', '.join(run.noise)}"))
    series = [("quiet", quiet)] + ([("marked noisy", loud)] if loud else [])
    return chart(series, x="run", y="× median", lines=False)


def _cells_table(groups: dict[str, list[Record]]) -> str:
    rows = []
    for group in groups.values():
        walls = [run.wall_s for run in group]
        (low, high), kind = bootstrap_median(walls)
        copies = [run.yardstick for run in group if run.yardstick]
        ratio = f"{median(copies) / median(walls):.2f}" if copies else "–"
        rows.append(
            (
                group[0].cell.label(),
                len(group),
                f"{median(walls):.3f}",
                f"{low:.3f} – {high:.3f} ({kind})",
                f"{median([run.rate for run in group]) / 1e9:.3f}",
                ratio,
                f"{median([float(run.calls) for run in group]):.0f}",
                f"{max(run.peak_rss for run in group) / 1e6:.0f}",
                sum(1 for run in group if run.noise) or "",
            )
        )
    heads = [
        "configuration",
        "runs",
        "seconds",
        "interval of the median",
        "GB/s",
        "of copy",
        "KMS calls",
        "peak MB",
        "noisy",
    ]
    return _table(heads, rows, numeric=range(1, 9))


# -- plan


def plan_page(plan: dict[str, Any]) -> str:
    """A plan with sliders.  ReportError when it is not the whole object of ``plan --json``."""
    try:
        return _plan_page(plan)
    except (KeyError, TypeError) as error:
        raise ReportError(f"not the JSON of `streamcrypt plan --json` of this version: {error}") from error


def _cost_note(cost: dict[str, Any]) -> str:
    store = f", store {cost['store_requests']:.2f}" if cost["store_requests"] else ""
    return f"compute {cost['compute']:.2f}, KMS {cost['kms_requests'] + cost['kms_keys']:.2f}{store}"


def _plan_page(plan: dict[str, Any]) -> str:
    low, high = plan["seconds_interval"]
    operation, calls = next(iter(plan["kms"]["calls"].items()))
    cost = plan["cost"]
    parts = sorted(plan["limits"].items(), key=lambda item: -item[1])
    part_bars = [(name, value, _seconds(value)) for name, value in parts]
    sensitivity = [
        (name, value, f"{value:+.2f}") for name, value in plan["sensitivity"].items() if abs(value) > 0.005
    ]
    what_if = [
        (one["change"], _seconds(one["seconds"]), f"× {one['ratio']:.3g}", f"{one['calls']:,}", one["limit"])
        for one in plan["what_if"]
    ]
    deadline = plan["deadline"]
    verdict = ""
    if deadline is not None:
        met = "met" if deadline["met"] else "not met"
        verdict = _tile(
            "deadline",
            f"{_seconds(deadline['seconds'])}: {met}",
            f"in {deadline['share_of_trials']:.0%} of trials",
        )
    live = plan["page"]["live"]
    noise = "unknown" if plan["records"]["noise"] is None else format(plan["records"]["noise"], ".1%")
    body = [
        f"<header><h1>Plan: {_text(plan['operation'])} {_text(format_size(plan['bytes']))}, "
        f"{plan['files']:,} files</h1>",
        f'<p class="note">From rates measured on {_text(plan["records"]["machine"])}, '
        f"{_text(plan['records']['date'])}; "
        f"noise {noise}.</p></header>",
        '<section class="tiles">',
        _tile("time", _seconds(plan["seconds"]), f"80 %: {_seconds(low)} – {_seconds(high)}", "seconds"),
        _tile("limit", plan["limit"], "the resource that decides", "limit"),
        _tile(
            operation,
            f"{calls:,}",
            f"quota {plan['kms']['quota_per_second']:,.6g}/s",
            "calls",
        ),
        _tile(
            "cost",
            f"{cost['total']:.2f} USD",
            _cost_note(cost),
            "cost",
        ),
        verdict,
        "</section>",
    ]
    if live:
        body += [
            '<section><h2>Change it</h2><p class="note">'
            "Computed in this page by the same formulas; the interval above is that of the plan as made.</p>",
            '<form id="sliders"></form></section>',
        ]
    body += [
        '<section class="two"><div><h2>Seconds that each resource alone would need</h2>',
        bars(part_bars, name="parts"),
        "</div><div><h2>What moves the time</h2>",
        '<p class="note">Elasticity: −1, twice as much of it halves the time; +1, doubles it.</p>',
        bars(sensitivity, signed=True),
        "</div></section>",
        "<section><h2>What if</h2>",
        _table(["change", "time", "ratio", "KMS calls", "limit"], what_if, numeric=(1, 2, 3)),
        "</section>",
    ]
    if plan["notes"]:
        body.append(
            "<section><h2>Notes</h2><ul>"
            + "".join(f"<li>{_text(note)}</li>" for note in plan["notes"])
            + "</ul></section>"
        )
    inputs = [(name, value) for name, value in plan["inputs"].items() if value is not None]
    body.append(
        f"<section><details><summary>Inputs</summary>{_table(['input', 'value'], inputs)}</details></section>"
    )
    # JSON inside a script: no "</script>" and no line separators that JavaScript ends a line at.
    data = json.dumps(plan).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    script = f"const PLAN = {data};\n{_asset('plan.js')}" if live else ""
    return _page("streamcrypt plan", "\n".join(body), script)
