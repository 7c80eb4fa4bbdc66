"""Records come back as they were; sweeps have the cells, the order and the continuation that they promise."""

import dataclasses
import json
import random

import pytest
from families.measured import MACHINE, synthetic_records, synthetic_run

from streamcrypt.bench import data, sweep
from streamcrypt.bench.records import (
    Cell,
    Machine,
    Record,
    Records,
    RecordsError,
    append_line,
    median,
    read,
    read_lines,
    spread,
    this_machine,
    write_json,
    write_parquet,
)

MIB = 1 << 20
FULL = Record(
    session="s", round=3, cell=Cell(kms_quota=5.0, sizes=(4, 6), signed=True), started="2026-01-01T00:00:00+00:00",
    wall_s=1.5, cpu_s=2.5, bytes_in=10, bytes_out=20, files=3, frames=4, kms_calls={"GenerateDataKey": 2},
    kms_latency_ms=[1.0, 2.5], kms_wait_s=0.1, throttled=1, cache_hits=2, cache_misses=1, evictions={"age": 1},
    peak_rss=5, kms_failed=3, yardstick_s={"copy": 0.5}, noise=["steal 3%"], error=None,
)  # fmt: skip
FAILED = dataclasses.replace(FULL, round=4, error="exit 1: no", kms_latency_ms=[], noise=[])


@pytest.mark.parametrize(("write", "name"), [(write_json, "r.json"), (write_parquet, "r.parquet")])
def test_records_come_back_as_they_were(write, name, tmp_path):
    records = Records(MACHINE, (FULL, FAILED))
    write(tmp_path / name, records)
    assert read(tmp_path / name) == records


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_line(path, FULL)
    append_line(path, FAILED)
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert read_lines(path) == [FULL]


REFUSED = {
    "another schema": ('{"schema": 99, "machine": {}, "runs": []}', "schema 99"),
    "not JSON": ("{", "not records"),
    "something else": ("[1]", "not records"),
    "a field too many": (None, "unexpected"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_other_files_are_refused_in_one_line(text, words, tmp_path):
    path = tmp_path / "r.json"
    if text is None:
        document = {"schema": 1, "machine": MACHINE.to_json(), "runs": [{**FULL.to_json(), "more": 1}]}
        text = json.dumps(document)
    path.write_text(text)
    with pytest.raises(RecordsError, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "r.parquet"
    path.write_bytes(b"nothing")
    with pytest.raises(RecordsError):
        read(path)


def test_the_fingerprint_names_no_one():
    import getpass
    import os
    import socket

    machine = this_machine()
    text = json.dumps(machine.to_json())
    for private in (socket.gethostname(), os.getcwd(), os.path.expanduser("~/")):
        assert private not in text
    assert getpass.getuser() not in text or getpass.getuser() in ("root", "user")
    assert machine.cores >= 1
    assert Machine.from_json(json.loads(text)) == machine
    assert machine.id == dataclasses.replace(machine, kernel="another").id


def test_statistics():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([1.0, 2.0]) == 1.5
    assert median([]) == 0.0
    assert spread([1.0, 1.0, 1.1]) == 0.0
    assert spread([0.9, 1.0, 1.1]) == pytest.approx(0.1)


DISTRIBUTIONS = [("constant", 0.0), ("lognormal", 1.0), ("pareto", 2.5)]


@pytest.mark.parametrize(("name", "spread_of"), DISTRIBUTIONS)
def test_sizes_have_their_mean_and_their_seed(name, spread_of):
    found = data.sizes(200, 5000, name, spread_of, seed=3)
    assert sum(found) == 200 * 5000
    assert min(found) >= 0
    assert found == data.sizes(200, 5000, name, spread_of, seed=3)
    assert (found == data.sizes(200, 5000, name, spread_of, seed=4)) == (name == "constant")


OWN = {
    "a list": ("1KiB+3KiB", ("own", 2048, 0.0, (1024, 3072))),
    "a list in TOML": (["1KiB", 10], ("own", 517, 0.0, (10, 1024))),
    "lognormal": ("lognormal:4MiB:1.2", ("lognormal", 4 * MIB, 1.2, None)),
    "constant": ("constant:5", ("constant", 5, 0.0, None)),
}


@pytest.mark.parametrize(("given", "fields"), OWN.values(), ids=OWN)
def test_sizes_that_somebody_gives(given, fields):
    found = data.own_sizes(given)
    assert (found["distribution"], found["file_size"], found["spread"], found["sizes"]) == fields


def test_sizes_of_a_listing(tmp_path):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for name, length in (("a", 10), ("b", 300), ("below/c", 2000)):
        (tmp_path / "folder" / name).write_bytes(bytes(length))
    (tmp_path / "listing").write_text("2000\n10\n\n300 \n")
    for source in ("folder", "listing"):
        assert data.own_sizes(f"@{tmp_path / source}")["sizes"] == (10, 300, 2000)
    many = tmp_path / "many"
    many.write_text("\n".join(str(size) for size in range(5000)))
    kept = data.own_sizes(f"@{many}")
    assert len(kept["sizes"]) == 1000
    assert kept["file_size"] == pytest.approx(2500, rel=0.01)


def test_own_sizes_are_spread_evenly_over_the_files():
    cell = Cell(files=8, **data.own_sizes("1+5+100+900"))
    assert sorted(data.sizes_of(cell)) == [1, 1, 5, 5, 100, 100, 900, 900]
    assert data.sizes_of(cell) == data.sizes_of(Cell(files=8, **data.own_sizes("900+5+1+100")))
    assert data.sizes_of(dataclasses.replace(cell, seed=2)) != data.sizes_of(cell)
    assert data.sizes_of(dataclasses.replace(cell, files=2)) in ([5, 900], [900, 5])


@pytest.mark.parametrize("given", ["", "large", "1KiB+-5", "lognormal:4MiB", "constant:1:2", "@nowhere", []])
def test_sizes_that_are_none(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sweep.SweepError, match="axis sizes: ") as caught:
        sweep.parse_value("sizes", given)
    assert "\n" not in str(caught.value)


def test_sizes_are_an_axis_like_the_others(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(
        "seed = 7\n[base]\nfiles = 2\n[axes]\nsizes = [['1KiB', '3KiB'], 'lognormal:1MiB:2']\nworkers = [1, 2]"
    )
    found = sweep.from_toml(path)
    assert {(cell.distribution, cell.spread, cell.workers) for cell in found.cells} == {
        ("own", 0.0, 1), ("own", 0.0, 2), ("lognormal", 2.0, 1), ("lognormal", 2.0, 2),
    }  # fmt: skip
    assert (found.seed, {cell.seed for cell in found.cells}) == (7, {7})
    assert len({cell.label() for cell in found.cells}) == 4
    path.write_text("[axes]\nsizes = ['1+2']\nfile_size = [5]")
    with pytest.raises(sweep.SweepError, match="file_size already"):
        sweep.from_toml(path)


def test_the_command_names_every_axis():
    from streamcrypt.cli.measure import AXES

    assert set(AXES) == {field.name for field in dataclasses.fields(Cell)}
    assert len(AXES) == len(set(AXES))


def test_plans_are_made_from_jobs_on_files_alone():
    cells = [Cell(), Cell(engine="cp"), Cell(storage="store"), Cell(operation="epoch"), Cell(kms_errors=0.1)]
    runs = tuple(dataclasses.replace(FULL, cell=cell) for cell in cells)
    assert Records(MACHINE, runs).of_jobs().runs == runs[:1]


def test_a_cell_of_an_older_version_is_the_same_cell():
    """The reference records and the held-out configurations were written before some of the fields."""
    old = {"operation": "decrypt", "files": 3, "kms_latency": 0.5, "cache": True}
    assert Cell(**old) == Cell(operation="decrypt", files=3, kms_latency=0.5)
    cell = Cell(files=2, sizes=(1, 2), distribution="own")
    assert Cell(**json.loads(json.dumps(dataclasses.asdict(cell)))) == cell


def test_test_data_is_seeded_and_does_not_compress(tmp_path):
    import zlib

    lengths = [0, 1, 7, 8, 9, 100_000, 300_000]
    assert data.write(tmp_path / "a", lengths, 1) == sum(lengths)
    data.write(tmp_path / "b", lengths, 1)
    contents = [path.read_bytes() for path in sorted((tmp_path / "a").iterdir())]
    assert [len(content) for content in contents] == lengths
    assert contents == [path.read_bytes() for path in sorted((tmp_path / "b").iterdir())]
    assert len(zlib.compress(contents[-1])) > 0.99 * lengths[-1]
    assert len({content for content in contents if len(content) >= 8}) == 4


def test_designs():
    axes = {"workers": [1, 2, 4], "frame_size": [4096, MIB], "signed": [False, True]}
    assert len(sweep.grid(axes)) == 12
    singles = sweep.one_at_a_time(axes)
    assert len(singles) == 1 + 2 + 1 + 1
    assert singles[0] == Cell(workers=1, frame_size=4096, signed=False)
    drawn = sweep.latin_hypercube(axes, 12, 5)
    assert drawn == sweep.latin_hypercube(axes, 12, 5)
    assert {cell.workers for cell in drawn} == {1, 2, 4}


@pytest.mark.parametrize("name", ["quick", "standard", "full"])
def test_presets_have_distinct_cells(name):
    cells = sweep.preset(name).cells
    assert len({cell.hash for cell in cells}) == len(cells) > 5


def test_a_sweep_from_toml(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(
        'design = "grid"\nrounds = 2\nseed = 9\n[base]\nfile_size = "2MiB"\n'
        '[axes]\nframe_size = ["64KiB", "1MiB"]\nkms_latency = ["5ms"]\ncache_max_messages = ["none", 3]\n'
    )
    found = sweep.from_toml(path)
    assert found.rounds == 2
    assert {(cell.frame_size, cell.cache_max_messages) for cell in found.cells} == {
        (65536, None), (65536, 3), (MIB, None), (MIB, 3),
    }  # fmt: skip
    assert all(cell.file_size == 2 * MIB and cell.kms_latency == 0.005 for cell in found.cells)


BAD_TOML = {
    "no axes": ("rounds = 1", "no .axes."),
    "unknown axis": ("[axes]\nspeed = [1]", "'speed' is not an axis"),
    "unknown word": ("fast = true\n[axes]\nworkers = [1]", "unknown fast"),
    "not TOML": ("[axes", "sweep.toml"),
    "negative": ("[axes]\nworkers = [-1]", "negative"),
    "no rounds": ("rounds = 0\n[axes]\nworkers = [1]", "rounds is 0"),
    "no size": ("[axes]\nframe_size = ['big']", "not a size"),
    "no quota": ("[axes]\nkms_quota = [0]", "kms_quota: 0 lets no job finish"),
    "no bandwidth": ("[axes]\nstore_bandwidth = [0]", "store_bandwidth: 0 lets no job finish"),
    "no messages": ("[axes]\ncache_max_messages = [0]", "not at least 1"),
    "no number": ("[axes]\nworkers = ['x']", "workers: 'x' is not a whole number"),
    "not finite": ("[axes]\nkms_quota = [nan]", "kms_quota: nan is not a number"),
    "every call fails": ("[axes]\nkms_errors = [1.0]", "below 1"),
    "rounds in words": ("rounds = 'many'\n[axes]\nworkers = [1]", "whole numbers"),
    "design": ("design = 'random'\n[axes]\nworkers = [1]", "not a design"),
}


@pytest.mark.parametrize(("text", "words"), BAD_TOML.values(), ids=BAD_TOML)
def test_a_bad_sweep_is_refused_in_one_line(text, words, tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    with pytest.raises(sweep.SweepError, match=words):
        sweep.from_toml(path)


def test_every_round_has_all_cells_in_its_own_order():
    planned = sweep.preset("quick")
    first, second = sweep.order(planned, 0), sweep.order(planned, 1)
    assert sorted(cell.hash for cell in first) == sorted(cell.hash for cell in second)
    assert first != second
    assert first == sweep.order(planned, 0)


def _session(factor, noise, rounds=9, seed=1):
    rng = random.Random(seed)
    cells = sweep.preset("quick").cells
    runs = []
    for number in range(rounds):
        for cell in cells:
            run = synthetic_run(cell, number, rng, noise=noise)
            runs.append(dataclasses.replace(run, wall_s=run.wall_s * factor))
    return Records(MACHINE, tuple(runs))


VERDICTS = {
    "ten percent slower": (1.1, 0.005, "slower", 1),
    "ten percent faster": (0.9, 0.005, "faster", 0),
    "one percent slower is no finding": (1.01, 0.005, "no evidence", 0),
    "the same": (1.0, 0.005, "no evidence", 0),
    "noise hides it": (1.02, 0.3, "too noisy", 5),
}


@pytest.mark.parametrize(("factor", "noise", "said", "code"), VERDICTS.values(), ids=VERDICTS)
def test_two_sweeps_compared(factor, noise, said, code):
    found = sweep.compare(_session(1.0, noise), _session(factor, noise, seed=2))
    assert len(found) == len(sweep.preset("quick").cells)
    verdicts = [one.verdict for one in found]
    assert verdicts.count(said) >= 0.75 * len(verdicts)
    if noise < 0.1:
        assert set(verdicts) == {said}
        assert sweep.compare_exit_code(found) == code


def test_a_slower_minute_is_no_regression_when_the_yardstick_slowed_too():
    old, new = _session(1.0, 0.005), _session(1.3, 0.005, seed=2)
    slowed = tuple(
        dataclasses.replace(run, yardstick_s={"copy": run.yardstick_s["copy"] * 1.3}) for run in new.runs
    )
    found = sweep.compare(old, Records(MACHINE, slowed))
    assert {one.verdict for one in found} == {"no evidence"}


def test_comparing_nothing_is_a_failure():
    assert sweep.compare_exit_code([]) == 5
    one_run = Records(MACHINE, _session(1.0, 0.0, rounds=1).runs)
    slower = Records(MACHINE, _session(2.0, 0.0, rounds=1).runs)
    assert sweep.compare_exit_code(sweep.compare(one_run, slower)) == 5  # one run proves nothing


def test_other_machines_are_compared_only_when_asked():
    old = _session(1.0, 0.005)
    other = Records(dataclasses.replace(MACHINE, cpu="Another"), old.runs)
    with pytest.raises(RecordsError, match="--cross-machine"):
        sweep.compare(old, other)
    assert sweep.compare(old, other, cross_machine=True)


def test_a_summary_has_a_row_for_every_cell():
    records = synthetic_records()
    rows = sweep.summary(records)
    assert len(rows) == len({run.cell.hash for run in records.runs})
    assert all(row["seconds"] > 0 and row["of_copy"] == pytest.approx(0.7, rel=0.1) for row in rows)
