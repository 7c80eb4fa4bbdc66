"""bench, plan and report as they are typed: one line for what is wrong, exit codes, one JSON object."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from families.measured import synthetic_records

from streamcrypt.bench.records import Cell, Records, RecordsError, read, this_machine, write_json
from streamcrypt.bench.sweep import held_out
from streamcrypt.cli import main
from streamcrypt.plan import REFERENCE, validate
from streamcrypt.plan import predict as planner
from streamcrypt.plan.limits import Prices


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "machine.json"
    write_json(path, synthetic_records())
    return str(path)


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


PLAN = ("plan", "--bytes", "100TB", "--files", "1000000", "--workers", "16")


def test_a_plan_finds_the_hosts_for_a_deadline(capsys, records):
    code, out, _ = run(capsys, *PLAN, "--deadline", "6h", "--records", records, "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["hosts"] > 1
    assert plan["deadline"]["met"]
    assert plan["reference_records"] is False
    assert not any("reference machine" in note for note in plan["notes"])


@pytest.mark.skipif(not REFERENCE.exists(), reason="NO REFERENCE RECORDS: run bench calibrate")
def test_a_plan_before_any_benchmark_says_whose_rates_it_used(capsys):
    code, out, _ = run(capsys, "plan", "--bytes", "1TB", "--files", "1000", "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["reference_records"] is True
    assert "reference machine" in plan["notes"][0]
    code, out, _ = run(capsys, "plan", "--bytes", "1TB", "--files", "1000")
    assert "reference machine" in out


@pytest.mark.skipif(not REFERENCE.exists(), reason="NO REFERENCE RECORDS: run bench calibrate")
@pytest.mark.parametrize("operation", ["encrypt", "decrypt", "verify", "rekey"])
@pytest.mark.parametrize("storage", ["disk", "memory"])
def test_the_reference_covers_every_operation(capsys, operation, storage):
    words = (
        "plan",
        "--bytes",
        "1TB",
        "--files",
        "1000",
        "--operation",
        operation,
        "--storage",
        storage,
        "--json",
    )
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert json.loads(out)["seconds"] > 0


BAD = {
    "negative size": (["--bytes", "-5", "--files", "3"], 2, "-5"),
    "negative size with a unit": (["--bytes", "-5GB", "--files", "3"], 2, "'-5GB' is not a size"),
    "negative deadline": (
        ["--bytes", "5GB", "--files", "3", "--deadline", "-5s"],
        2,
        "'-5s' is not a duration",
    ),
    "no files": (["--bytes", "5MB", "--files", "0"], 2, "at least 1"),
    "nothing said": ([], 2, "--bytes"),
    "quota of zero": (["--bytes", "5MB", "--files", "3", "--kms-quota", "0"], 2, "quota of 0"),
    "no size": (["--bytes", "many", "--files", "3"], 2, "not a size"),
    "deadline without hosts": (
        ["--bytes", "5PB", "--files", "100", "--deadline", "1ms"],
        1,
        "no number of hosts",
    ),
    "deadline with hosts": (
        ["--bytes", "5TB", "--files", "100", "--deadline", "1s", "--hosts", "2"],
        1,
        "met in 0%",
    ),
    "deadline of zero": (["--bytes", "5TB", "--files", "100", "--deadline", "0s"], 2, "above 0"),
    "no listing": (["--listing", "no-such-folder"], 2, "does not exist"),
    "listing of a stream": (["--listing", "-"], 2, "of a folder"),
    "negative price": (["--bytes", "5TB", "--files", "9", "--price-host-hour=-3"], 2, "from 0 to"),
    "price of nothing": (["--bytes", "5TB", "--files", "9", "--price-host-hour", "nan"], 2, "from 0 to"),
    "price beyond all": (["--bytes", "5TB", "--files", "9", "--price-host-hour", "1e308"], 2, "from 0 to"),
    "more frames than a message has": (
        ["--bytes", "5GB", "--files", "1", "--frame-size", "1"],
        2,
        "larger frame",
    ),
    "a cluster that signs": (
        ["--bytes", "5TB", "--files", "9", "--engine", "ray", "--sign"],
        2,
        "does not sign",
    ),
    "too much to play": (
        ["--bytes", "1PB", "--files", "100000000", "--engine", "ray", "--no-cache", "--simulate"],
        2,
        "leave --simulate out",
    ),
    "endless quota": (["--bytes", "5TB", "--files", "9", "--kms-quota", "inf"], 2, "above 0"),
    "endless frame": (["--bytes", "5TB", "--files", "9", "--frame-size", "5GiB"], 2, "at most"),
    "no held-out file": (["--validate", "no-such-file.json"], 2, "held-out"),
    "no such region": (["--bytes", "5TB", "--files", "9", "--region", "mars-1"], 2, "mars-1"),
    "share of the quota": (["--bytes", "5TB", "--files", "9", "--kms-quota-share", "7"], 2, "share"),
    "solve without deadline": (["--bytes", "5TB", "--files", "9", "--solve", "hosts"], 2, "--deadline"),
}


BAD_PRICES = {
    "no such file": (None, "No such file"),
    "not TOML": ("vcpu_hour = ", "TOML"),
    "unknown price": ("coffee = 3", "coffee"),
    "negative": ("vcpu_hour = -1", "0 or more"),
    "no number": ('put_requests = "cheap"', "number of USD"),
    "unknown price of KMS": ("[kms]\ncoffee = 3", "coffee"),
    "KMS is no table": ("kms = 3", "table"),
}


@pytest.mark.parametrize(("text", "said"), BAD_PRICES.values(), ids=BAD_PRICES)
def test_prices_that_are_none_are_one_line(capsys, tmp_path, records, text, said):
    if text is not None:
        (tmp_path / "prices.toml").write_text(text)
    words = ("plan", "--bytes", "1TB", "--files", "9", "--records", records)
    code, _, err = run(capsys, *words, "--prices", tmp_path / "prices.toml")
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_bucket_is_listed_by_our_own_stores(capsys, monkeypatch, records, bucket):
    """Without fsspec or s3fs, by the walk of a job: our own folder and what consoles make are left out."""
    for name in ("fsspec", "s3fs"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, length in (("a", 10), ("deep/er/b", 2000), ("_streamcrypt/manifest", 7), ("empty/", 0)):
        bucket.put(f"data/{name}", bytes(length))
    code, out, err = run(capsys, "plan", "--listing", f"{bucket.url}/data", "--records", records, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert (plan["files"], plan["bytes"]) == (2, 2010)
    assert plan["cost"]["store_requests"] > 0
    for source, said in ((f"{bucket.url}/nothing", "does not exist"), ("ftp://host/data", "s3://")):
        code, _, err = run(capsys, "plan", "--listing", source, "--records", records)
        assert code == 2
        assert said in err
        assert len(err.splitlines()) == 1


@pytest.mark.usefixtures("impatient")
def test_a_bucket_that_is_out_of_reach_is_worth_another_try(capsys, monkeypatch, records, bucket):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    code, _, err = run(capsys, "plan", "--listing", f"{bucket.url}/data", "--records", records)
    assert (code, "try again" in err) == (5, True)


@pytest.mark.parametrize(("words", "code", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_planned_is_one_line(capsys, records, words, code, said):
    got, _, err = run(capsys, "plan", *words, "--records", records)
    assert got == code
    errors = [line for line in err.splitlines() if line.startswith("streamcrypt: error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in err


def test_records_that_are_none_are_refused(capsys, tmp_path):
    path = tmp_path / "old.json"
    for text, said in (
        ('{"schema": 0, "machine": {}, "runs": []}', "measure again"),
        ('{"schema": 1, "runs": []}', "not records"),
        ('{"schema": 1, "machine": {}, "runs": []}', "not a machine"),
    ):
        path.write_text(text)
        code, _, err = run(capsys, "plan", "--bytes", "1TB", "--files", "9", "--records", path)
        assert code == 2
        assert said in err
        assert len(err.splitlines()) == 1


def test_an_empty_listing_is_refused_and_a_real_one_counted(capsys, tmp_path, records):
    code, _, err = run(capsys, "plan", "--listing", tmp_path, "--records", records)
    assert code == 2
    assert "no files" in err
    (tmp_path / "sub").mkdir()
    for number in range(5):
        (tmp_path / "sub" / f"{number}").write_bytes(bytes(1000 * number))
    (tmp_path / "sub" / "link").symlink_to("1")
    code, out, err = run(capsys, "plan", "--listing", tmp_path, "--records", records, "--json")
    assert code == 0
    plan = json.loads(out)
    assert (plan["files"], plan["bytes"]) == (5, 10_000)
    assert "left out, and a job fails on them: 1 names, first: sub/link: is a symbolic link" in err


def test_a_finished_job_is_checked(capsys, tmp_path, records):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"seconds": 1.0, "kms": {"calls": {"GenerateDataKey": 1}}}))
    words = ("plan", "--bytes", "1GB", "--files", "100", "--records", records, "--check", path)
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out)["actual_seconds"] == 1.0
    for given, said in (("[]", "not the JSON report"), ("{}", "not the JSON report"), (None, "No such file")):
        path.unlink()
        if given is not None:
            path.write_text(given)
        code, _, err = run(capsys, *words)
        assert code == 2
        assert err.startswith(f"streamcrypt: error: {path}: {said}")
        assert err.endswith("give what `encrypt --json` printed\n")
        path.touch()


def test_bench_compare_exit_codes(capsys, tmp_path, records):
    assert run(capsys, "bench", "compare", records, records)[0] == 0
    slower = synthetic_records()
    runs = tuple(dataclasses.replace(run, wall_s=run.wall_s * 1.5) for run in slower.runs)
    write_json(tmp_path / "slower.json", Records(slower.machine, runs))
    code, out, _ = run(capsys, "bench", "compare", records, tmp_path / "slower.json", "--json")
    assert code == 1
    assert {cell["verdict"] for cell in json.loads(out)["cells"]} == {"slower"}
    write_json(tmp_path / "nothing.json", Records(slower.machine, ()))
    assert run(capsys, "bench", "compare", records, tmp_path / "nothing.json")[0] == 5
    assert run(capsys, "bench", "compare", records, tmp_path / "absent.json")[0] == 2


def test_a_version_that_fails_is_no_faster_one(capsys, tmp_path, records):
    failed = synthetic_records()
    runs = tuple(dataclasses.replace(run, error="exit 1", wall_s=0.0) for run in failed.runs[:1])
    write_json(tmp_path / "failed.json", Records(failed.machine, (*runs, *failed.runs[1:])))
    code, _, err = run(capsys, "bench", "compare", records, tmp_path / "failed.json")
    assert code == 1
    assert "exit 1" in err


BAD_COMPARISONS = {
    "nothing to compare": ((), "--baseline-ref"),
    "one sweep": (("somewhere",), "two sweeps"),
    "both kinds": (("--baseline-ref", "main", "somewhere"), "no other records"),
    "no folder": (("--baseline-ref", "main"), "--out"),
    "no such version": (("--baseline-ref", "no-such-branch", "--out", "compared"), "no-such-branch"),
}


@pytest.mark.parametrize(("words", "said"), BAD_COMPARISONS.values(), ids=BAD_COMPARISONS)
def test_a_comparison_of_nothing_is_one_line(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "bench", "compare", *words, "--quiet")
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_budget_stops_a_sweep_and_the_same_command_goes_on(capsys, tmp_path):
    words = ("bench", "run", "--axis", "files=2", "--axis", "file_size=1KiB,2KiB", "--axis", "storage=disk")
    words += ("--rounds", "1", "--attempts", "1", "--out", tmp_path / "out", "--work", tmp_path)
    code, _, err = run(capsys, *words, "--budget", "1ms")
    assert "2 runs are left" in err or "1 runs are left" in err
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert len(json.loads(out)["cells"]) == 2


def test_bench_run_and_report(capsys, tmp_path):
    axes = ("--axis", "files=3", "--axis", "file_size=10KiB", "--axis", "workers=1,2")
    words = ("bench", "run", *axes, "--axis", "storage=disk", "--rounds", "1", "--attempts", "1")
    code, out, _ = run(capsys, *words, "--out", tmp_path / "out", "--work", tmp_path, "--quiet", "--json")
    assert code == 0
    assert len(json.loads(out)["cells"]) == 2
    page = tmp_path / "page.html"
    assert run(capsys, "report", tmp_path / "out", "--out", page)[0] == 0
    assert page.read_text().startswith("<!doctype html>")
    code, out, _ = run(capsys, *PLAN, "--records", tmp_path / "out")
    assert code == 2  # two cells are too few to fit


def test_a_sweep_without_yardsticks_has_no_ratio(capsys, tmp_path):
    axes = ("--axis", "files=3", "--axis", "file_size=10KiB", "--axis", "storage=disk", "--no-yardsticks")
    words = ("bench", "run", *axes, "--rounds", "1", "--attempts", "1", "--out", tmp_path / "out")
    code, out, _ = run(capsys, *words, "--work", tmp_path, "--quiet", "--json")
    assert (code, "NaN" in out) == (0, False)
    assert [row["of_copy"] for row in json.loads(out)["cells"]] == [None]
    _, out, _ = run(capsys, *words, "--work", tmp_path, "--quiet")
    assert "–  encrypt, 3 × 10 KiB" in out


def test_what_a_sweep_cannot_measure_is_left_out_by_name(capsys, tmp_path):
    axes = ("--axis", "files=2", "--axis", "file_size=1KiB", "--axis", "storage=disk", "--seed", "5")
    axes += (
        "--axis",
        "operation=encrypt,verify",
        "--axis",
        "engine=copy",
        "--rounds",
        "1",
        "--attempts",
        "1",
    )
    words = ("bench", "run", *axes, "--out", tmp_path / "out", "--work", tmp_path, "--quiet", "--json")
    code, out, err = run(capsys, *words)
    found = json.loads(out)
    assert code == 0
    assert [row["label"].split(",")[:2] for row in found["cells"]] == [["copy", " encrypt"]]
    assert [row["reason"] for row in found["refused"]] == [
        "the engine copy cannot verify; it is measured with encrypt and decrypt"
    ]
    assert err.startswith("left out: copy, verify, 2 × 1 KiB")
    assert [run.cell.seed for run in read(tmp_path / "out").runs] == [5]


def test_axes_are_laid_over_a_preset():
    import argparse

    from streamcrypt.cli import measure

    parser = argparse.ArgumentParser()
    measure._cells(parser)
    plain = measure._sweep_of(parser.parse_args(["--preset", "quick"]))
    words = ["--preset", "quick", "--axis", "engine=streamcrypt,cp", "--axis", "workers=1", "--seed", "3"]
    laid = measure._sweep_of(parser.parse_args(words))
    assert {cell.engine for cell in laid.cells} == {"streamcrypt", "cp"}
    assert {(cell.workers, cell.seed) for cell in laid.cells} == {(1, 3)}
    assert len(laid.cells) == len(plain.cells)  # half as many workers, twice as many engines
    assert (laid.rounds, laid.seed) == (plain.rounds, 3)


SHARES = {"1": "from 0 to below 1", "-0.1": "from 0 to below 1", "many": "not a share"}


@pytest.mark.parametrize(("share", "said"), SHARES.items())
def test_a_share_of_calls_that_is_none(capsys, share, said):
    code, _, err = run(capsys, "bench", "kms", f"--error-rate={share}")
    assert code == 2
    assert said in err


def test_a_plan_as_a_page(capsys, tmp_path, records):
    _, out, _ = run(capsys, *PLAN, "--records", records, "--json")
    (tmp_path / "plan.json").write_text(out)
    assert run(capsys, "report", tmp_path / "plan.json", "--out", tmp_path / "plan.html")[0] == 0
    assert "sliders" in (tmp_path / "plan.html").read_text()
    assert run(capsys, "report", tmp_path / "absent.json", "--out", tmp_path / "x.html")[0] == 2
    before = (tmp_path / "plan.json").read_text()
    code, _, err = run(capsys, "report", tmp_path / "plan.json", "--out", tmp_path / "plan.json")
    assert (code, "name another file" in err) == (2, True)
    assert (tmp_path / "plan.json").read_text() == before
    code, _, err = run(capsys, "report", tmp_path / "plan.json", "--out", tmp_path / "absent" / "x.html")
    assert (code, "cannot be written" in err) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kms", "nothing"), "'nothing' is not a KMS to measure"),
        (("--kms", "aws", "--max-calls", "1"), "--kms aws needs --key"),
        (("--seconds", "0s"), "in 0s nothing is measured"),
        (("--seconds", "-5s"), "'-5s' is not a duration"),
    ],
)
def test_a_kms_that_cannot_be_measured_is_a_usage_error(capsys, words, said):
    code, out, err = run(capsys, "bench", "kms", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_measuring_aws_needs_a_limit(capsys):
    code, _, err = run(capsys, "bench", "kms", "--kms", "aws", "--key", "alias/x")
    assert code == 2
    assert "--max-calls" in err


def test_validating_needs_records_of_this_machine(capsys, tmp_path, records):
    validate.write_held_out(tmp_path / "cells.json", held_out(1), 1)
    code, _, err = run(capsys, "plan", "--validate", tmp_path / "cells.json", "--records", records)
    assert code == 2
    assert "bench calibrate" in err


def test_validating_measures_judges_and_goes_on(capsys, tmp_path):
    """Records of a known law, said to be of this machine: far off, and the table says how far."""
    law = synthetic_records()
    records = Records(this_machine(), law.runs)
    write_json(tmp_path / "machine.json", records)
    limits = (1, 2, None)
    cells = [Cell(files=4, file_size=1000, storage="disk", cache_max_messages=limit) for limit in limits]
    validate.write_held_out(tmp_path / "cells.json", cells, 1)
    words = ("plan", "--validate", tmp_path / "cells.json", "--records", tmp_path / "machine.json")
    words += ("--work", tmp_path, "--out", tmp_path / "out")
    options = {"work": tmp_path, "rounds": 1}
    cut_short = validate.validate(cells, records, tmp_path / "out", budget=0.0, **options)
    assert cut_short["runs_left"] == 3  # nothing is begun when the time is over, in no round
    result = validate.validate(cells, records, tmp_path / "out", **options)
    assert result["planned"] == result["measured"] == 3
    assert result["runs_left"] == 0
    # Four files and the manifest.
    assert sorted(row["calls_measured"] for row in result["rows"]) == [1, 3, 5]
    assert result["summary"]["calls_exact"] == 1.0
    assert "noise floor" in validate.table(result)
    # The command goes on where that stopped, and says what its time did not suffice for.
    code, out, err = run(capsys, *words, "--budget", "1ms", "--json")
    assert code == 0
    assert json.loads(out)["measured"] == 3
    assert "the same command goes on" in err


def test_validating_with_rates_of_the_same_rounds(tmp_path):
    """A fit sees the cells of the calibration and none of those held out; records of before are judged beside."""
    earlier = Records(this_machine(), synthetic_records().runs)
    shapes = ((4, 1000), (40, 1000), (4, 100_000), (40, 100_000))
    rates = [Cell(files=files, file_size=size, storage="disk") for files, size in shapes]
    held_out_cell = Cell(files=20, file_size=50_000, storage="disk", frame_size=4096)
    options = {"work": tmp_path, "rounds": 4, "rates": rates}
    cut_short = validate.validate([held_out_cell], None, tmp_path / "out", budget=0.0, **options)
    assert cut_short["runs_left"] > 0
    assert cut_short["measured"] == 0  # nothing is judged by half of the rates
    result = validate.validate([held_out_cell], earlier, tmp_path / "out", **options)
    assert (result["runs_left"], result["measured"]) == (0, 1)
    by_rates = read(tmp_path / "out" / "machine.json")
    assert {run.cell for run in by_rates.runs} == set(rates)
    assert sorted(run.round for run in by_rates.runs if run.cell == rates[0]) == [0, 3]  # one round in three
    assert sorted(run.round for run in by_rates.runs if run.cell == rates[1]) == [2]
    again = validate.validate([held_out_cell], by_rates, tmp_path / "out", work=tmp_path, rounds=5)
    assert (again["same_rounds"], again["rows"][0]["runs"]) == (True, 5)  # one round more, of the cell alone
    assert not validate.validate([held_out_cell], earlier, tmp_path / "out", work=tmp_path, rounds=5)[
        "same_rounds"
    ]
    (row,) = result["rows"]
    predicted = planner.predict(
        validate.job_of(held_out_cell, by_rates.machine.cores), by_rates
    ).estimate.seconds
    assert row["predicted"] == pytest.approx(predicted)
    assert result["earlier"]["summary"]["plan"]["median"] != result["summary"]["plan"]["median"]
    assert "in the same rounds" in validate.table(result)
    assert "measured before" in validate.table(result)
    with pytest.raises(RecordsError, match="give records"):
        validate.validate([held_out_cell], None, work=tmp_path)


def test_the_page_names_every_limit_and_its_prices_are_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    rows = page.partition("| if `limit` is |")[2].partition("\n\n")[0].splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    job = planner.Job(bytes=1 << 30, files=100)
    jobs = (job, dataclasses.replace(job, engine="ray"))
    assert named == {name for one in jobs for name in planner.evaluate(one, synthetic_records()).parts}
    told = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert told is not None
    (tmp_path / "prices.toml").write_text(told[1])
    assert Prices.read(tmp_path / "prices.toml").vcpu_hour.source == "our contract"
