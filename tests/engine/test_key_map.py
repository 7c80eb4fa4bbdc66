"""Keys by partition: each file under its own key, one key's loss is one partition's loss, and erasing by key."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from families.partitions import NAMES, RULES
from families.trees import leftovers, make_tree, read_tree

import streamcrypt as sc
from streamcrypt.cli import main
from streamcrypt.engine.spans import MANIFEST
from streamcrypt.message.header import parse_header

FILES = {
    "subject=1/a": 3000, "subject=1/b/c": 10, "subject=2/a": 3000, "subject=2/b": 0, "readme": 5,
    "subject=3/a": 20_000,
}  # fmt: skip


@pytest.fixture
def arns(kms) -> dict[str, str]:
    return {name: kms.describe_key(KeyId=f"alias/{name}")["KeyMetadata"]["Arn"] for name in NAMES}


@pytest.fixture
def tree(kms, tmp_path) -> Path:
    make_tree(tmp_path / "in", FILES)
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys="local:alias/default", key_map=RULES, frame_size=512)
    return tmp_path / "enc"


def wrapped_by(path: Path) -> list[str]:
    header, _ = parse_header(path.read_bytes())
    return [key.info.decode() for key in header.encrypted_data_keys]


def expected(arns: dict[str, str], name: str) -> list[str]:
    if name.startswith("subject=1/"):
        return [arns["one"]]
    if name.startswith("subject=2/"):
        return [arns["two"], arns["backup"]]
    return [arns["default"]]


# ------------------------------------------------------------------------ writing


@pytest.mark.parametrize("workers", [1, 3])
def test_each_file_is_under_its_own_key_and_the_manifest_under_the_job_s(kms, arns, tmp_path, workers):
    make_tree(tmp_path / "in", FILES)
    report = sc.encrypt(
        tmp_path / "in", tmp_path / "enc", keys="local:alias/default", key_map=RULES, workers=workers
    )
    for name in FILES:
        assert wrapped_by(tmp_path / "enc" / name) == expected(arns, name), name
    assert wrapped_by(tmp_path / "enc" / MANIFEST) == [arns["default"]]
    assert report["kms"]["calls"]["GenerateDataKey"] == 3
    assert report.data_keys == 3
    assert report["keys"] == [
        {"key": "local:alias/default", "files": 2, "bytes": 20_005, "data_keys": 1},
        {"key": "local:alias/one", "files": 2, "bytes": 3010, "data_keys": 1},
        {"key": "local:alias/two, local:alias/backup", "files": 2, "bytes": 3000, "data_keys": 1},
    ]
    sc.verify(tmp_path / "enc", against=tmp_path / "in")


def test_the_audit_names_keys_by_their_arns(arns, tree, tmp_path):
    lines: dict[str, dict] = {}
    sc.decrypt(tree, tmp_path / "dec", audit=lambda line: lines.update({line["path"]: line}))
    assert {name: lines[name]["keys"] for name in FILES} == {name: expected(arns, name) for name in FILES}


def test_the_audit_of_a_failure_says_what_is_known_of_the_message(kms, arns, tree, tmp_path):
    """Whoever asks which data a caller was denied finds it there."""
    kms.disable_key(KeyId=arns["one"])
    whole = (tree / "readme").read_bytes()
    (tree / "readme").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (tree / "subject=3/a").write_bytes(b"no message")
    lines: dict[str, dict] = {}
    with pytest.raises(sc.IntegrityError):
        sc.decrypt(tree, tmp_path / "dec", audit=lambda line: lines.update({line["path"]: line}))
    denied, damaged, replaced = (lines[name] for name in ("subject=1/a", "readme", "subject=3/a"))
    assert (denied["outcome"], denied["keys"], denied["bytes"]) == ("KeyAccessError", [arns["one"]], 0)
    assert (damaged["outcome"], damaged["keys"], damaged["bytes"]) == ("IntegrityError", [arns["default"]], 0)
    assert damaged["message_id"] == parse_header(whole)[0].message_id.hex()
    assert (replaced["outcome"], "keys" in replaced) == ("FormatError", False)


def test_names_that_take_turns_do_not_cost_more_data_keys(kms, tmp_path):
    make_tree(tmp_path / "in", {f"{number:03}": 10 for number in range(40)})
    rules = {"*[02468]": "local:alias/one", "*": "local:alias/two"}
    report = sc.encrypt(tmp_path / "in", tmp_path / "enc", keys="local:alias/default", key_map=rules)
    assert report["kms"]["calls"]["GenerateDataKey"] == report.data_keys == 3
    assert [(used["files"], used["data_keys"]) for used in report["keys"]] == [(20, 1), (20, 1)]


def test_rekey_moves_partitions_to_keys_of_their_own(kms, arns, tmp_path):
    make_tree(tmp_path / "in", FILES)
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys="local:alias/default")
    report = sc.rekey(tmp_path / "enc", tmp_path / "new", keys="local:alias/default", key_map=RULES)
    assert sum(used["files"] for used in report["keys"]) == len(FILES)
    for name in FILES:
        assert wrapped_by(tmp_path / "new" / name) == expected(arns, name), name
    sc.verify(tmp_path / "new", against=tmp_path / "in")


def test_a_key_map_is_for_folders(kms, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ValueError, match="folder"):
        sc.encrypt(tmp_path / "file", tmp_path / "enc", keys="local:alias/default", key_map=RULES)


def test_a_key_that_cannot_be_used_fails_its_own_files_only(kms, arns, tmp_path):
    make_tree(tmp_path / "in", FILES)
    kms.disable_key(KeyId=arns["one"])
    rules = {**RULES, "readme": []}
    with pytest.raises(sc.KeyAccessError) as caught:
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys="local:alias/default", key_map=rules)
    report = caught.value.report
    failed = {failure.path: str(failure.error) for failure in report.failed}
    assert set(failed) == {"subject=1/a", "subject=1/b/c", "readme"}
    for name in ("subject=1/a", "subject=1/b/c"):
        assert failed[name].startswith(f"{tmp_path}/in/{name}: local:alias/one: ")
        assert "DisabledException" in failed[name]
    assert "gives it no key" in failed["readme"]
    assert report["kms"]["calls"]["GenerateDataKey"] == 3  # the refused one once, not for each file
    assert set(read_tree(tmp_path / "enc")) == {*FILES, MANIFEST, "_streamcrypt/journal"} - set(failed)
    kms.enable_key(KeyId=arns["one"])
    report = sc.encrypt(
        tmp_path / "in", tmp_path / "enc", keys="local:alias/default", key_map=RULES, resume=True
    )
    assert (report.files, report.skipped) == (3, 3)
    sc.verify(tmp_path / "enc", against=tmp_path / "in")


INTERRUPTED = """
import os, signal, sys
import streamcrypt as sc
from streamcrypt.engine.journal import Journal
write = Journal.write
def killing(self, **options):
    lines = len(self._lines)
    write(self, **options)
    if lines:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.write = killing
sc.encrypt(*sys.argv[1:3], keys="local:alias/default", key_map={"subject=1/*": "local:alias/one"}, workers=1)
"""


def test_a_resumed_job_leaves_no_file_under_the_key_of_an_older_map(kms, arns, tmp_path):
    make_tree(tmp_path / "in", FILES)
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "in"), str(tmp_path / "enc")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    rules = {
        "subject=1/*": "local:alias/two",
        "subject=2/*": "local:alias/backup",
        "other/*": "local:alias/one",
    }
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys="local:alias/default", key_map=rules, resume=True)
    assert wrapped_by(tmp_path / "enc" / "subject=1/a") == [arns["two"]]
    assert wrapped_by(tmp_path / "enc" / "subject=2/a") == [arns["backup"]]
    sc.verify(tmp_path / "enc", against=tmp_path / "in")
    assert not leftovers(tmp_path)


# ------------------------------------------------------------------------ reading what is left


def test_one_partition_s_key_is_gone_and_the_others_decrypt(kms, arns, tree, tmp_path, capsys):
    kms.schedule_key_deletion(KeyId=arns["one"], PendingWindowInDays=7)
    with pytest.raises(sc.KeyAccessError) as caught:
        sc.decrypt(tree, tmp_path / "dec")
    report = caught.value.report
    assert {failure.path for failure in report.failed} == {"subject=1/a", "subject=1/b/c"}
    for failure in report.failed:
        assert arns["one"] in str(failure.error)
        assert "pending deletion" in str(failure.error)
    assert report["kms"]["calls"]["Decrypt"] == 3  # one for each data key, the refused one too
    written = {name for name in read_tree(tmp_path / "dec") if not name.startswith("_streamcrypt/")}
    assert written == set(FILES) - {"subject=1/a", "subject=1/b/c"}
    assert main(["verify", str(tree), "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert [failed["path"] for failed in told["failed"]] == ["subject=1/a", "subject=1/b/c"]
    assert (told["files"], told["exit_code"]) == (4, 4)
    # What is also wrapped by another key goes on being read.
    kms.schedule_key_deletion(KeyId=arns["two"], PendingWindowInDays=7)
    assert sc.decrypt(tree, tmp_path / "rest", exclude=["subject=1/*"]).files == 4


def test_the_command_takes_a_key_map(kms, arns, tmp_path, monkeypatch, capsys):
    make_tree(tmp_path / "in", FILES)
    monkeypatch.chdir(tmp_path)
    Path("keys.toml").write_text('"subject=1/*" = "local:alias/one"\n')
    assert main(["encrypt", "in", "enc", "--key", "local:alias/default", "--key-map", "keys.toml"]) == 0
    said = capsys.readouterr().err
    assert "2 files, 2.939 KiB, under local:alias/one" in said
    assert wrapped_by(Path("enc/subject=1/a")) == [arns["one"]]
    Path("keys.toml").write_text("subject=1/* = x")
    assert main(["encrypt", "in", "other", "--key", "local:alias/default", "--key-map", "keys.toml"]) == 2
    assert "keys.toml: is not a key map" in capsys.readouterr().err
    assert not Path("other").exists()
