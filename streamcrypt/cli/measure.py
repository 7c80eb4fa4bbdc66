"""bench, plan, report: words to sweeps, jobs and pages.

``add_measure_commands`` gives the parser these commands; each sets ``run``, which takes the parsed
arguments and returns the exit code.  Progress goes to standard error, results to standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamcrypt.cli import output
from streamcrypt.errors import StreamcryptError, TemporaryError
from streamcrypt.units import format_size, parse_duration, parse_size

USAGE_ERROR = 2
# The fields of bench.records.Cell, which is imported only where something is measured.
AXES = (
    "operation", "engine", "files", "file_size", "distribution", "spread", "sizes", "frame_size", "workers", "signed",
    "fsync", "storage", "store_latency", "store_bandwidth", "reader", "cache", "cache_max_age", "cache_max_messages",
    "cache_max_bytes", "kms_latency", "kms_quota", "kms_errors", "seed",
)  # fmt: skip


def add_measure_commands(subparsers: Any) -> None:
    """Add bench, plan and report to an argparse sub-parser collection."""
    _add_bench(subparsers)
    _add_plan(subparsers)
    _add_report(subparsers)


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type whose ValueError's own words reach the user."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


SIZE = _typed(parse_size)
DURATION = _typed(parse_duration)


def _length(text: str) -> float:
    seconds = parse_duration(text)
    if seconds == 0:
        raise ValueError(f"in {text} nothing is measured; write 5s")
    return seconds


def _count(text: str) -> int:
    if not text.strip().lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of calls a second") from error
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            "a quota of 0 calls a second lets no job finish; give your account's (AWS: Service Quotas)"
            if value == 0
            else f"{text} is not a number of calls a second above 0"
        )
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a share; write 0.05 for one call in twenty"
        ) from error
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of the calls, from 0 to below 1")
    return value


def _needing_extras(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command, with one line instead of a traceback where the bench extra is not installed."""

    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("scipy", "psutil"):
                raise
            return _refuse(args, f"this needs {error.name}: pip install 'streamcrypt[bench]'", 1)

    return run


def _refuse(args: argparse.Namespace, what: str, code: int) -> int:
    """Tell why there is no result; with --json, also by the one object that goes to standard output."""
    kind = output.UsageError if code == USAGE_ERROR else StreamcryptError
    return output.fail(kind(what), ("--json",) if args.json else (), args)


def _fail(what: str, code: int) -> int:
    """Tell what is wrong with a result that was written already."""
    print(f"streamcrypt: error: {what}", file=sys.stderr)  # noqa: T201
    return code


def _say(text: str, *, quiet: bool = False) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def _out(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress")


# -- bench


def _add_bench(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure a sweep of configurations",
        description="Measure encryption on this machine.  Example: streamcrypt bench run --preset quick --out results",
    )
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a sweep, or go on with one",
        description="Run a sweep into a folder.  Example: streamcrypt bench run "
        "--axis frame_size=64KiB,1MiB --axis workers=1,2 --out results",
    )
    run.add_argument("spec", nargs="?", type=Path, help="a TOML file with [axes] (see docs/performance.md)")
    _cells(run)
    run.add_argument("--out", type=Path, required=True, help="folder for the records")
    run.add_argument(
        "--budget",
        type=DURATION,
        help="stop after this time; the same command goes on (default: none; quick 40s)",
    )
    run.add_argument("--no-yardsticks", action="store_true", help="leave out copy, cipher and read alone")
    _common(run)
    run.set_defaults(run=_needing_extras(_bench_run))

    calibrate = commands.add_parser(
        "calibrate",
        help="measure just what a plan needs",
        description="Measure the rates of this machine for `plan`.  "
        "Example: streamcrypt bench calibrate --out machine.json",
    )
    calibrate.add_argument(
        "--out",
        type=Path,
        required=True,
        help="JSON file for the records; an interrupted calibration goes on",
    )
    calibrate.add_argument("--rounds", type=_count, default=1, help="runs of every cell")
    calibrate.add_argument("--storage", default="disk", help="disk, memory, or disk,memory")
    calibrate.add_argument("--work", type=Path, help="folder for test data of storage=disk")
    calibrate.add_argument(
        "--attempts", type=_count, default=3, help="tries of a run that other work disturbs"
    )
    calibrate.add_argument("--timeout", type=DURATION, default=120.0, help="time limit of one run")
    calibrate.add_argument("--budget", type=DURATION, help="stop after this time; the same command goes on")
    _common(calibrate)
    calibrate.set_defaults(run=_needing_extras(_bench_calibrate))

    compare = commands.add_parser(
        "compare",
        help="two sweeps, or two versions, cell by cell",
        description="Compare two sweeps, or this version with another that is measured in turns with it.  "
        "Exit code 0: no regression, 1: something is slower, 5: nothing to tell.  "
        "Example: streamcrypt bench compare --baseline-ref main --out compared",
    )
    compare.add_argument("old", nargs="?", type=Path, help="folder or file of records")
    compare.add_argument("new", nargs="?", type=Path, help="folder or file of records")
    compare.add_argument("--cross-machine", action="store_true", help="compare records of two machines")
    versions = compare.add_argument_group("two versions")
    versions.add_argument(
        "--baseline-ref",
        metavar="REF",
        help="measure this commit, branch or tag of the checkout in turns with it",
    )
    versions.add_argument("--out", type=Path, help="folder for what --baseline-ref measures")
    _cells(versions)
    _common(compare)
    compare.set_defaults(run=_needing_extras(_bench_compare))

    kms = commands.add_parser(
        "kms",
        help="latency of a KMS",
        description="Measure GenerateDataKey.  "
        "Example: streamcrypt bench kms --kms local --latency 10ms --quota 100 --rate 50",
    )
    kms.add_argument(
        "--kms", default="local", help="local, local-boto3, http://HOST:PORT (kms serve), moto, or aws"
    )
    kms.add_argument("--key", help="key to use on aws, or on a server that has one")
    kms.add_argument(
        "--latency", type=DURATION, default=0.0, help="mean latency that --kms local answers with"
    )
    kms.add_argument("--quota", type=_rate, help="calls a second that --kms local lets through")
    kms.add_argument(
        "--error-rate", type=_share, default=0.0, help="share of the calls that --kms local refuses"
    )
    kms.add_argument("--threads", type=_count, default=4, help="callers of the closed loop")
    kms.add_argument("--rate", type=_rate, help="open loop: calls a second, whatever the answers")
    kms.add_argument("--seconds", type=_typed(_length), default=5.0, help="length of the measurement")
    kms.add_argument("--max-calls", type=_count, help="hard stop; must be given for aws")
    _common(kms)
    kms.set_defaults(run=_needing_extras(_bench_kms))


def _cells(parser: Any) -> None:
    """What says which cells are run, and how."""
    parser.add_argument(
        "--preset", choices=["quick", "standard", "full"], help="a sweep that is known (default quick)"
    )
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="NAME=VALUE,…",
        help="an axis and its values: " + ", ".join(AXES),
    )
    parser.add_argument(
        "--design", default="grid", choices=["grid", "one-at-a-time", "lhs"], help="how axes combine"
    )
    parser.add_argument("--count", type=_count, default=40, help="cells of an lhs design")
    parser.add_argument("--rounds", type=_count, help="runs of every cell")
    parser.add_argument("--seed", type=int, help="of data and of the order of cells (default 1)")
    parser.add_argument(
        "--work", type=Path, help="folder for test data of storage=disk (default: the temporary folder)"
    )
    parser.add_argument(
        "--attempts", type=_count, help="tries of a run that other work disturbs (default 3; quick 1)"
    )
    parser.add_argument("--timeout", type=DURATION, help="time limit of one run (default 2m; quick 10s)")


def _sweep_of(args: argparse.Namespace) -> Any:
    from streamcrypt.bench import sweep
    from streamcrypt.bench.records import Cell

    axes: dict[str, list[Any]] = {}
    for text in args.axis:
        name, equals, values = text.partition("=")
        if not equals:
            raise sweep.SweepError(f"--axis {text}: write NAME=VALUE,VALUE")
        axes[name] = [sweep.parse_value(name, value) for value in values.split(",")]
    seed = {} if args.seed is None else {"seed": args.seed}
    if getattr(args, "spec", None) is not None:
        if args.axis or args.preset:
            raise sweep.SweepError("a TOML file has its own axes; leave out --axis and --preset")
        found = sweep.from_toml(args.spec)
    elif axes and args.preset is None:
        found = sweep.design(
            args.design, axes, Cell(**seed), rounds=args.rounds or 5, seed=args.seed or 1, count=args.count
        )
    else:
        found = sweep.preset(args.preset or "quick")
        # Each configuration of the preset with every combination of the axes given.
        cells = {made.hash: made for cell in found.cells for made in sweep.grid(axes, cell)}
        found = dataclasses.replace(found, cells=tuple(cells.values()))
    if seed:
        cells = {made.hash: made for made in (dataclasses.replace(cell, **seed) for cell in found.cells)}
        found = sweep.Sweep(found.cells if "seed" in axes else tuple(cells.values()), found.rounds, **seed)
    return dataclasses.replace(found, rounds=args.rounds or found.rounds)


def _possible(planned: Any) -> tuple[Any, list[dict[str, str]]]:
    """What can be measured here; of the rest each configuration with its reason, said and given."""
    from streamcrypt.bench import sweep

    planned, refused = sweep.possible(planned)
    for cell, reason in refused:
        _say(f"left out: {cell.label()}: {reason}")
    return planned, [{"cell": cell.hash, "label": cell.label(), "reason": reason} for cell, reason in refused]


def _bench_run(args: argparse.Namespace) -> int:
    from streamcrypt.bench import measure, sweep
    from streamcrypt.bench.records import RecordsError

    try:
        planned, refused = _possible(_sweep_of(args))
        _say(f"{len(planned.cells)} configurations × {planned.rounds} rounds", quiet=args.quiet)
        records = sweep.run(
            planned,
            args.out,
            work=args.work,
            timeout=args.timeout or (_QUICK_TIMEOUT if _is_quick(args) else _TIMEOUT),
            yardsticks=not args.no_yardsticks,
            budget=args.budget or (_QUICK_BUDGET if _is_quick(args) else None),
            attempts=args.attempts or (1 if _is_quick(args) else sweep.ATTEMPTS),
            progress=None if args.quiet else _progress,
        )
    except sweep.SweepError as error:
        return _refuse(args, str(error), USAGE_ERROR)
    except (RecordsError, measure.MeasureError, OSError) as error:
        return _refuse(args, str(error), 1)
    _say_rest(planned, records, quiet=args.quiet)
    return _tell(records, args, refused)


# A quick sweep takes less than a minute on any machine: its last run begins before the budget is spent.
_QUICK_BUDGET = 40.0
_QUICK_TIMEOUT = 10.0
_TIMEOUT = 120.0


def _is_quick(args: argparse.Namespace) -> bool:
    return args.preset in (None, "quick") and not args.axis and getattr(args, "spec", None) is None


def _say_rest(planned: Any, records: Any, *, quiet: bool) -> None:
    left = len(planned.cells) * planned.rounds - len(records.runs)
    if left > 0:
        _say(f"the time is over, {left} runs are left; the same command goes on", quiet=quiet)


def _progress(done: int, total: int, record: Any) -> None:
    what = record.error or f"{record.wall_s:.3f} s, {format_size(record.rate)}/s"
    noise = f"  noisy: {', '.join(record.noise)}" if record.noise else ""
    _say(f"[{done}/{total}] {record.cell.label()}: {what}{noise}")


def _tell(records: Any, args: argparse.Namespace, refused: list[dict[str, str]] | None = None) -> int:
    from streamcrypt.bench import sweep

    rows = sweep.summary(records)
    failed = [run for run in records.runs if run.error]
    if args.json:
        failures = [{"cell": run.cell.hash, "error": run.error} for run in failed]
        machine = {"id": records.machine.id, "name": records.machine.name}
        found = {"machine": machine, "cells": rows, "failed": failures, "refused": refused or []}
        _out(json.dumps(found))
    else:
        for row in rows:
            of_copy = "–" if row["of_copy"] is None else f"{row['of_copy']:.2f} of {row['yardstick']}"
            _out(
                f"{row['seconds']:9.3f} s  {format_size(row['bytes_per_second']):>10}/s  ±{row['spread']:4.0%}  "
                f"{of_copy}  {row['label']}"
            )
    if failed:
        return _fail(f"{len(failed)} of {len(records.runs)} runs failed, first: {failed[0].error}", 1)
    return 0 if rows else _fail("nothing was measured", 5)


def _bench_calibrate(args: argparse.Namespace) -> int:
    from streamcrypt.bench import measure, sweep
    from streamcrypt.bench.records import RecordsError, usable_cores, write_json

    storages = args.storage.split(",")
    planned = dataclasses.replace(sweep.calibration(storages, cores=usable_cores()), rounds=args.rounds)
    # Runs are kept beside the file until it is written: an interrupted calibration goes on.
    kept = args.out.with_name(args.out.name + ".runs")
    if not args.out.parent.is_dir():
        return _refuse(args, f"{args.out}: there is no folder {args.out.parent}", USAGE_ERROR)
    try:
        if kept.exists():
            _say(f"goes on with the runs in {kept}; remove it to begin anew", quiet=args.quiet)
        records = sweep.run(
            planned,
            kept,
            work=args.work,
            timeout=args.timeout,
            yardsticks=False,
            budget=args.budget,
            attempts=args.attempts,
            progress=None if args.quiet else _progress,
        )
        if len(records.runs) < len(planned.cells) * planned.rounds:
            _say_rest(planned, records, quiet=args.quiet)
            return _refuse(args, f"not calibrated yet: {args.out} is written at the end", 1)
        write_json(args.out, records)
        shutil.rmtree(kept)
    except (sweep.SweepError, RecordsError, measure.MeasureError, OSError) as error:
        return _refuse(args, str(error), 1)
    _say(f"wrote {args.out}: {records.machine.name}, {len(records.runs)} runs", quiet=args.quiet)
    return _tell(records, args)


def _bench_compare(args: argparse.Namespace) -> int:
    from streamcrypt.bench import measure, records, sweep

    try:
        if args.baseline_ref is not None:
            old, new = _versions(args)
        elif args.old is None or args.new is None:
            return _refuse(args, "give two sweeps to compare, or --baseline-ref and --out", USAGE_ERROR)
        else:
            old, new = records.read(args.old), records.read(args.new)
        found = sweep.compare(old, new, cross_machine=args.cross_machine)
    except (records.RecordsError, sweep.SweepError) as error:
        return _refuse(args, str(error), USAGE_ERROR)
    except (measure.MeasureError, OSError) as error:
        return _refuse(args, str(error), 1)
    failed = [run for run in (*old.runs, *new.runs) if run.error is not None]
    code = sweep.compare_exit_code(found)
    if args.json:
        _out(json.dumps({"cells": [one.to_json() for one in found], "exit_code": code}))
    else:
        for one in sorted(found, key=lambda one: -abs(one.ratio - 1)):
            low, high = one.interval
            _out(
                f"{one.ratio:6.3f}  [{low:.3f}, {high:.3f}] {one.interval_kind:7}  {one.verdict:12} {one.cell.label()}"
            )
    if not found:
        why = f" (first failure: {failed[0].error})" if failed else ""
        return _fail(f"the two have no configuration and round in common; nothing was compared{why}", code)
    if failed:  # a version that cannot do it is no faster one
        return _fail(f"{len(failed)} runs failed, first: {failed[0].cell.label()}: {failed[0].error}", 1)
    if code == 5:
        _say("too noisy to tell: repeat on a quiet machine, with more rounds")
    return code


def _versions(args: argparse.Namespace) -> Any:
    """The records of another version and of this one, measured in turns."""
    from streamcrypt.bench import sweep

    if args.old is not None or args.out is None:
        raise sweep.SweepError(
            "--baseline-ref measures two versions into --out FOLDER; it takes no other records"
        )
    planned, _ = _possible(_sweep_of(args))
    if args.rounds is None:
        planned = dataclasses.replace(planned, rounds=max(planned.rounds, 5))
    _say(f"{len(planned.cells)} configurations × {planned.rounds} rounds × 2 versions", quiet=args.quiet)
    with sweep.checkout(args.baseline_ref) as baseline:
        return sweep.run_against(
            planned,
            baseline,
            args.out,
            work=args.work,
            timeout=args.timeout or _TIMEOUT,
            attempts=args.attempts or sweep.ATTEMPTS,
            progress=None if args.quiet else _progress,
        )


def _bench_kms(args: argparse.Namespace) -> int:
    from streamcrypt.bench import latency

    if args.kms == "aws" and args.max_calls is None:
        return _refuse(args, "measuring AWS KMS costs money: give --max-calls", USAGE_ERROR)
    try:
        result = latency.measure(
            args.kms,
            key=args.key,
            latency=args.latency,
            quota=args.quota,
            errors=args.error_rate,
            threads=args.threads,
            rate=args.rate,
            seconds=args.seconds,
            max_calls=args.max_calls,
        )
    except latency.LatencyError as error:
        return _refuse(args, str(error), USAGE_ERROR if isinstance(error, latency.NoSuchKmsError) else 1)
    if args.json:
        _out(json.dumps(result))
    else:
        for series in ("service_ms", "response_ms"):
            figures = result[series]
            _out(f"{series:12} " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
        _out(
            f"{result['calls']} calls, {result['per_second']:.1f}/s, "
            f"{result['throttled']} throttled, {result['failed']} failed"
        )
    return 0 if result["calls"] else _fail("no call was answered", 5)


# -- plan


def _add_plan(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="predict a job: hosts, time, KMS calls, money",
        description="Predict a job from measured rates.  "
        "Example: streamcrypt plan --bytes 100TB --files 1000000 --deadline 6h",
    )
    job = parser.add_argument_group("job")
    job.add_argument("--bytes", type=SIZE, help="plaintext in all")
    job.add_argument("--files", type=_count, help="how many files")
    job.add_argument("--listing", help="take bytes, files and sizes from this folder or object-store URL")
    job.add_argument(
        "--sigma", type=float, help="file sizes are lognormal with this sigma (default: all equal)"
    )
    job.add_argument(
        "--operation",
        default="encrypt",
        choices=["encrypt", "decrypt", "verify", "rekey"],
        help="default encrypt",
    )
    job.add_argument(
        "--deadline", type=DURATION, help="how long it may take; finds the hosts unless they are given"
    )
    job.add_argument("--hosts", type=_count, help="how many machines")
    job.add_argument(
        "--engine",
        default="local",
        choices=["local", "ray"],
        help="each host a job of its own (local), or one job on a Ray cluster of the hosts",
    )
    job.add_argument(
        "--workers", type=_count, help="workers on each (default: as the records' machine has cores)"
    )
    job.add_argument("--cores", type=_count, help="cores of each machine")
    job.add_argument("--frame-size", type=SIZE, default=1 << 20, help="plaintext of a frame (default 1MiB)")
    job.add_argument("--sign", action="store_true", help="suite 0x0578")
    job.add_argument("--no-fsync", action="store_true", help="as for encrypt")
    job.add_argument(
        "--storage", default="disk", choices=["disk", "memory"], help="whose measured rates to use"
    )
    job.add_argument("--contexts", type=_count, default=1, help="distinct encryption contexts")
    cache = parser.add_argument_group("data-key cache")
    cache.add_argument("--cache-max-age", type=DURATION, help="as for encrypt")
    cache.add_argument("--cache-max-messages", type=_count, help="as for encrypt")
    cache.add_argument("--cache-max-bytes", type=SIZE, help="as for encrypt")
    cache.add_argument("--no-cache", action="store_true", help="as for encrypt")
    cache.add_argument(
        "--cache-sharing",
        default="shared",
        choices=["shared", "private"],
        help="one for a host, or one for a worker",
    )
    kms = parser.add_argument_group("KMS")
    kms.add_argument("--kms-latency", type=DURATION, help="mean of one call (default 10ms)")
    kms.add_argument("--kms-quota", type=_rate, help="calls a second that the job may use")
    kms.add_argument(
        "--kms-quota-share", type=float, default=0.5, help="share of the Region's default quota (default 0.5)"
    )
    kms.add_argument("--region", help="AWS Region, for its default quota")
    kms.add_argument("--data-keys", type=_count, help="decrypting: data keys of the dataset")
    rates = parser.add_argument_group("rates and prices")
    rates.add_argument(
        "--records", type=Path, help="records of `bench calibrate` or of a sweep (default: those shipped)"
    )
    for name in ("read", "write", "network"):
        rates.add_argument(f"--{name}-bandwidth", type=SIZE, help="bytes a second of one host")
    rates.add_argument("--price-host-hour", type=float, help="USD")
    rates.add_argument(
        "--prices",
        type=Path,
        metavar="FILE",
        help="TOML or JSON file of prices that replace ours (docs/planning.md)",
    )
    what = parser.add_argument_group("what to do")
    what.add_argument(
        "--solve", choices=["hosts", "workers", "deadline", "cache"], help="find the least that will do"
    )
    what.add_argument(
        "--simulate", action="store_true", help="with --engine ray: also play the job, list by list"
    )
    what.add_argument("--check", type=Path, help="compare the plan with the JSON report of the finished job")
    what.add_argument(
        "--validate", type=Path, metavar="HELD_OUT", help="measure these configurations and compare"
    )
    what.add_argument(
        "--calibrate",
        action="store_true",
        help="with --validate: measure the rates in the same rounds, into OUT/machine.json; --records, if given, are "
        "judged beside",
    )
    what.add_argument(
        "--out", type=Path, help="folder for what --validate measures; goes on where it stopped"
    )
    what.add_argument(
        "--rounds",
        type=_count,
        default=10,
        help="with --validate: runs of every configuration (default 10, for its noise floor); of those of the rates a "
        "third",
    )
    what.add_argument(
        "--attempts",
        type=_count,
        default=3,
        help="with --validate: a noisy run is repeated up to so many times",
    )
    what.add_argument("--work", type=Path, help="folder for test data of --validate")
    what.add_argument("--budget", type=DURATION, default=7200.0, help="time for --validate (default 2h)")
    _common(parser)
    parser.set_defaults(run=_needing_extras(_plan))


def _records_of(path: Path | None) -> tuple[Any, bool]:
    """The records to plan from, and whether they are those that are shipped."""
    from streamcrypt.bench import records
    from streamcrypt.plan import REFERENCE

    found = records.read(REFERENCE) if path is None else records.read(path)
    return found.of_jobs(), path is None


def _listing(source: str) -> tuple[int, int, Any]:
    """Bytes, files and sizes of what a folder or an object-store URL names, as a job would find it."""
    from streamcrypt import api
    from streamcrypt.plan.predict import PlanError, Sizes
    from streamcrypt.storage import STORE_SCHEMES

    if source == "-" or ("://" in source and not source.startswith(STORE_SCHEMES)):
        raise PlanError(f"{source}: a listing is of a folder or of a {', '.join(STORE_SCHEMES)} URL")
    try:
        sizes, left_out = [], []
        for entry in api.entries(source):
            if entry.problem is not None:
                left_out.append(entry)
            elif not entry.folder:
                sizes.append(entry.size)
    except TemporaryError:
        raise
    except (StreamcryptError, ImportError) as error:
        raise PlanError(str(error)) from error
    if left_out:
        first = f"{output.printable(left_out[0].name)}: {left_out[0].problem}"
        _say(f"left out, and a job fails on them: {len(left_out)} names, first: {first}")
    return sum(sizes), len(sizes), Sizes.listing(sizes)


def _job_of(args: argparse.Namespace) -> Any:
    from streamcrypt.plan import limits
    from streamcrypt.plan import predict as planner

    sizes = None
    total, files = args.bytes, args.files
    if args.listing is not None:
        listed_bytes, listed_files, sizes = _listing(args.listing)
        total, files = total if total is not None else listed_bytes, files or listed_files
    if total is None or files is None:
        raise planner.PlanError("say how much there is: --bytes and --files, or --listing")
    if args.sigma is not None:
        if not 0 <= args.sigma <= 5:
            raise planner.PlanError(f"--sigma {args.sigma:g}: a lognormal spread between 0 and 5")
        sizes = planner.Sizes.lognormal(total / files, args.sigma)
    given = {
        "cache_max_age": args.cache_max_age,
        "cache_max_messages": args.cache_max_messages,
        "cache_max_bytes": args.cache_max_bytes,
        "kms_latency": args.kms_latency,
        "hosts": args.hosts,
    }
    return planner.Job(
        bytes=total,
        files=files,
        sizes=sizes,
        operation=args.operation,
        signed=args.sign,
        frame_size=args.frame_size,
        workers=args.workers,
        cores=args.cores,
        fsync=not args.no_fsync,
        storage=args.storage,
        cache=not args.no_cache,
        sharing=args.cache_sharing,
        contexts=args.contexts,
        data_keys=args.data_keys,
        kms_quota=args.kms_quota,
        kms_quota_share=args.kms_quota_share,
        region=args.region,
        read_bandwidth=args.read_bandwidth,
        write_bandwidth=args.write_bandwidth,
        network_bandwidth=args.network_bandwidth,
        deadline=args.deadline,
        price_host_hour=args.price_host_hour,
        prices=limits.PRICES if args.prices is None else limits.Prices.read(args.prices),
        engine=args.engine,
        object_store=bool(args.listing and "://" in args.listing),
        **{name: value for name, value in given.items() if value is not None},
    )


def _plan(args: argparse.Namespace) -> int:
    from streamcrypt.bench.records import RecordsError
    from streamcrypt.plan import predict as planner
    from streamcrypt.plan.model import ModelError
    from streamcrypt.plan.simulate import MOST_CALLS

    try:
        records, shipped = _records_of(args.records)
        if args.validate is not None:
            return _validate(args, records)
        job = _job_of(args)
        if args.simulate and args.engine != "ray":
            raise planner.PlanError("--simulate plays a job on a cluster; it goes with --engine ray")
        if args.check is not None:
            return _check(args, job, records)
        solved = args.solve
        if solved is None and args.deadline is not None and args.hosts is None:
            solved = "hosts"
        try:
            found = planner.solve(solved, job, records) if solved else planner.predict(job, records)
        except planner.PlanError as error:
            # Inputs were checked when the Job was made: what is left is a deadline that nothing meets.
            return _refuse(args, str(error), 1 if job.deadline is not None else USAGE_ERROR)
        if args.simulate and found.estimate.calls > MOST_CALLS:
            raise planner.PlanError(
                f"--simulate plays up to {MOST_CALLS:,} calls of the KMS, this job makes {found.estimate.calls:,.0f}; "
                "let a data key serve more messages, or leave --simulate out"
            )
    except (planner.PlanError, RecordsError, ModelError, ValueError) as error:
        return _refuse(args, str(error), USAGE_ERROR)
    from streamcrypt.bench.records import this_machine

    if not shipped and records.machine.id != this_machine().id:
        found.notes.insert(0, f"the records are of another machine than this one: {records.machine.name}")
    if shipped:
        found.notes.insert(
            0,
            f"rates are those of the reference machine ({records.machine.name}, {records.date}), not of yours; "
            "`streamcrypt bench calibrate` measures yours in a few minutes",
        )
    simulated = _simulated(found.job, records) if args.simulate else None
    if args.json:
        _out(json.dumps(found.to_json() | {"reference_records": shipped, "simulated": simulated}))
    else:
        _out(planner.describe_plan(found))
        if simulated is not None:
            _out(_describe_simulated(simulated))
    if not found.feasible:
        share = found.meets_deadline or 0.0
        return _fail(
            f"the deadline of {args.deadline:g} s is met in {share:.0%} of trials; "
            "add hosts (--solve hosts), allow more time, or see the limit above",
            1,
        )
    return 0


def _simulated(job: Any, records: Any) -> dict[str, Any]:
    """The job on a cluster, played list by list."""
    from streamcrypt.plan import predict as planner
    from streamcrypt.plan.cluster import START
    from streamcrypt.plan.simulate import simulate_cluster

    load = planner.cluster_load(job, records)
    outcome, sent = simulate_cluster(load)
    return {
        "seconds": START + outcome.seconds,
        "lists": load.lists,
        "workers": load.all_workers,
        "driver_busy": outcome.driver_seconds / outcome.seconds,
        "workers_busy": outcome.worker_seconds / outcome.seconds,
        "driver_calls": outcome.driver_calls,
        "worker_calls": outcome.worker_calls,
        "peak_per_second": outcome.peak_per_second,
        "quota_per_second": load.quota,
        "last_call": float(sent[-1]) if len(sent) else 0.0,
    }


def _describe_simulated(found: dict[str, Any]) -> str:
    return (
        f"  simulated    {found['seconds']:,.4g} s: {found['lists']:,} lists on {found['workers']:,} workers; "
        f"the driver is busy {found['driver_busy']:.0%} of the time, the workers {found['workers_busy']:.0%}\n"
        f"               {found['driver_calls']:,} KMS calls of the driver, {found['worker_calls']:,} of the "
        f"workers, at most {found['peak_per_second']:,.0f} in a second (quota {found['quota_per_second']:,.6g}/s "
        f"after as many at once), the last after {found['last_call']:,.3g} s"
    )


def _check(args: argparse.Namespace, job: Any, records: Any) -> int:
    from streamcrypt.plan import predict as planner

    try:
        report = json.loads(args.check.read_text(encoding="utf-8"))
        result = planner.check(report, job, records)
    except OSError as error:
        return _refuse(
            args, f"{args.check}: {error.strerror}; give what `encrypt --json` printed", USAGE_ERROR
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return _refuse(
            args,
            f"{args.check}: not the JSON report of a job; give what `encrypt --json` printed",
            USAGE_ERROR,
        )
    if args.json:
        _out(json.dumps(result))
    else:
        _out(
            f"predicted {result['predicted_seconds']:.3f} s, took {result['actual_seconds']:.3f} s "
            f"(× {result['ratio']:.2f}); KMS calls {result['predicted_calls']} predicted, {result['actual_calls']} made"
        )
    if result["drifted"]:
        _say("more than 15 % away: measure the machine again with `streamcrypt bench calibrate`")
    return 0


def _validate(args: argparse.Namespace, records: Any) -> int:
    from streamcrypt.bench import measure, sweep
    from streamcrypt.bench.records import RecordsError, usable_cores
    from streamcrypt.plan import validate

    try:
        cells = validate.read_held_out(args.validate)
    except sweep.SweepError as error:
        return _refuse(args, str(error), USAGE_ERROR)
    rates: tuple[Any, ...] = ()
    if args.calibrate:
        rates = sweep.calibration(sorted({cell.storage for cell in cells}), cores=usable_cores()).cells
    try:
        result = validate.validate(
            cells,
            None if args.calibrate and args.records is None else records,
            args.out,
            rates=rates,
            rounds=args.rounds,
            attempts=args.attempts,
            work=args.work,
            budget=args.budget,
            progress=None if args.quiet else _progress,
        )
    except RecordsError as error:
        return _refuse(args, str(error), USAGE_ERROR)
    except (sweep.SweepError, measure.MeasureError, OSError) as error:
        return _refuse(args, str(error), 1)
    if result["runs_left"]:
        again = "the same command goes on" if args.out is not None else "give --out, and a longer --budget"
        _say(f"the time is over, {result['runs_left']} runs are left; {again}")
    _out(json.dumps(result) if args.json else validate.table(result))
    return 0 if result["measured"] else _fail("nothing was measured", 5)


# -- report


def _add_report(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="records or a plan as one HTML page",
        description="Write one self-contained page.  Example: streamcrypt report results --out report.html",
    )
    parser.add_argument("source", type=Path, help="a sweep's folder, records, or the JSON of `plan --json`")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file")
    _common(parser)
    parser.set_defaults(run=_needing_extras(_report))


def _report(args: argparse.Namespace) -> int:
    from streamcrypt import report
    from streamcrypt.bench.records import RecordsError

    try:
        page = report.page_of(args.source)
        if args.out.exists() and args.out.samefile(args.source):
            raise report.ReportError(f"{args.out}: is what the page is made of; name another file")
    except (RecordsError, OSError, report.ReportError) as error:
        return _refuse(args, str(error), USAGE_ERROR)
    try:
        args.out.write_text(page, encoding="utf-8")
    except OSError as error:
        return _refuse(args, f"{args.out}: cannot be written: {error.strerror}", 1)
    if args.json:
        _out(json.dumps({"out": str(args.out), "bytes": len(page.encode())}))
    else:
        _say(f"wrote {args.out} ({format_size(len(page.encode()))})", quiet=args.quiet)
    return 0
