"""Erasing by key: what becomes unreadable is listed, what does not is proved, and nothing is done by halves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from families.kms import FakeClock
from families.partitions import RULES
from families.trees import make_tree

import streamcrypt as sc
from streamcrypt.cli import main
from streamcrypt.engine.spans import MANIFEST
from streamcrypt.kms import open_service

FILES = {"subject=1/a": 3000, "subject=1/b": 10, "subject=2/a": 3000, "readme": 5}
ONE = "local:alias/one"


@pytest.fixture
def tree(kms, tmp_path) -> Path:
    make_tree(tmp_path / "in", FILES)
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys="local:alias/default", key_map=RULES, frame_size=512)
    return tmp_path / "enc"


def state(kms, name: str) -> str:
    return kms.describe_key(KeyId=f"alias/{name}")["KeyMetadata"]["KeyState"]


def arn(kms, name: str) -> str:
    return kms.describe_key(KeyId=f"alias/{name}")["KeyMetadata"]["Arn"]


@pytest.mark.parametrize("workers", [1, 4])
def test_what_one_key_opens_is_listed_and_the_rest_is_proved(kms, tree, tmp_path, workers):
    done = sc.erase(ONE, tree, pending_window=7, workers=workers)
    assert state(kms, "one") == "PendingDeletion"
    assert done.unreadable == [f"{tree}/subject=1/a", f"{tree}/subject=1/b"]
    told = done.to_json()
    assert (told["scheduled"], told["proved"], told["failed"]) == (True, True, [])
    assert (told["key"], told["state"], told["pending_window_days"]) == (
        arn(kms, "one"),
        "PendingDeletion",
        7,
    )
    assert told["trees"] == [
        {
            "path": str(tree), "messages": 4, "unreadable": 2, "also_wrapped_by_others": 0, "untouched": 2,
            "unreadable_before": 0, "not_messages": 0, "manifest": "readable",
        }
    ]  # fmt: skip
    with pytest.raises(sc.KeyAccessError):
        sc.decrypt(tree, tmp_path / "dec")
    assert {path.name for path in (tmp_path / "dec").rglob("*") if path.is_file()} >= {"readme", "a"}
    assert not (tmp_path / "dec" / "subject=1").exists()


def test_it_can_be_taken_back_as_it_says(kms, tree, tmp_path, capsys):
    cancel = sc.erase(ONE, tree).cancel
    assert main(cancel.split()[1:]) == 0
    kms.enable_key(KeyId=arn(kms, "one"))
    assert sc.verify(tree, against=tmp_path / "in").files == len(FILES)


def test_what_other_keys_wrap_too_stays_readable(kms, tree):
    done = sc.erase("local:alias/two", tree)
    assert done.unreadable == []
    assert done.to_json()["also_wrapped_by_others"] == [f"{tree}/subject=2/a"]
    assert done.proved
    # Its other key is about to be deleted: now this one is the only one that opens it.
    done = sc.erase("local:alias/backup", tree)
    assert done.unreadable == [f"{tree}/subject=2/a"]
    assert done.to_json()["also_wrapped_by_others"] == []
    assert done.proved
    # What was erased before is no obstacle to the next one.
    done = sc.erase(ONE, tree)
    assert (done.proved, done.to_json()["trees"][0]["unreadable_before"]) == (True, 1)


def test_a_dry_run_schedules_nothing(kms, tree):
    done = sc.erase(ONE, tree, dry_run=True)
    assert len(done.unreadable) == 2
    assert (done.scheduled, done.proved) == (False, None)
    assert state(kms, "one") == "Enabled"


def test_nothing_is_scheduled_where_a_message_of_another_key_does_not_open(kms, tree):
    kms.disable_key(KeyId=arn(kms, "default"))
    with pytest.raises(sc.KeyAccessError, match=r"nothing was scheduled.*--other-key"):
        sc.erase(ONE, tree)
    assert state(kms, "one") == "Enabled"
    done = sc.erase(ONE, tree, allow_unproved=True)
    assert state(kms, "one") == "PendingDeletion"
    assert done.proved is False
    assert {failure.path for failure in done.failed} == {f"{tree}/readme", f"{tree}/{MANIFEST}"}


def test_a_tree_does_not_lose_its_manifest_by_the_way(kms, tree, tmp_path):
    with pytest.raises(sc.StreamcryptError, match="its manifest is under local:alias/default alone"):
        sc.erase("local:alias/default", tree)
    assert state(kms, "default") == "Enabled"
    # A tree that goes as a whole may.
    sc.encrypt(tmp_path / "in", tmp_path / "whole", keys=ONE)
    done = sc.erase(ONE, tmp_path / "whole")
    assert (len(done.unreadable), done.to_json()["trees"][0]["manifest"]) == (len(FILES), "unreadable")
    done = sc.erase("local:alias/default", tmp_path / "enc", lose_manifest=True)
    assert done.unreadable == [f"{tree}/readme"]


def test_a_key_that_nothing_there_is_under_is_more_likely_a_mistake(kms, tree, capsys):
    unused = kms.create_key()["KeyMetadata"]["Arn"]
    with pytest.raises(sc.StreamcryptError, match=r"no message in .*nothing was scheduled.*--allow-unused"):
        sc.erase(f"local:{unused}", tree, tree / "readme")
    assert kms.describe_key(KeyId=unused)["KeyMetadata"]["KeyState"] == "Enabled"
    done = sc.erase(f"local:{unused}", tree, dry_run=True)  # which tells, and schedules nothing anyway
    assert done.unreadable == []
    # One place of several is enough, and so is a message that other keys open, too.
    done = sc.erase("local:alias/two", tree / "readme", tree / "subject=2")
    assert (done.scheduled, done.unreadable) == (True, [])
    assert main(["erase", f"local:{unused}", str(tree)]) == 1
    assert "--allow-unused" in capsys.readouterr().err
    assert main(["erase", f"local:{unused}", str(tree), "--allow-unused"]) == 0
    assert kms.describe_key(KeyId=unused)["KeyMetadata"]["KeyState"] == "PendingDeletion"
    # Nobody looked, so nobody can tell.
    assert sc.erase(kms.create_key()["KeyMetadata"]["Arn"]).scheduled


def test_check_looks_again_while_the_key_waits_and_when_it_is_gone(home, tmp_path):
    clock = FakeClock()
    service = open_service(home, clock=clock)
    doomed = service.create_key()["KeyMetadata"]["Arn"]
    other = service.create_key()["KeyMetadata"]["Arn"]
    make_tree(tmp_path / "in", FILES)
    tree = tmp_path / "enc"
    sc.encrypt(tmp_path / "in", tree, keys=other, key_map={"subject=1/*": doomed})
    with pytest.raises(sc.StreamcryptError, match="is Enabled: its deletion is not scheduled"):
        sc.erase(doomed, tree, check=True)
    sc.erase(doomed, tree, pending_window=7)
    done = sc.erase(doomed, tree, check=True)
    assert (done.scheduled, done.proved, done.key.state) == (False, True, "PendingDeletion")
    clock.pass_days(8)
    done = sc.erase(doomed, tree, check=True)
    assert (done.proved, done.key.state, len(done.unreadable)) == (True, "Deleted", 2)
    service.disable_key(KeyId=other)
    with pytest.raises(sc.KeyAccessError, match="DisabledException") as caught:
        sc.erase(doomed, tree, check=True)
    failed = {failure.path for failure in caught.value.report.failed}
    assert failed == {f"{tree}/{name}" for name in ("readme", "subject=2/a", MANIFEST)}


def test_a_message_whose_header_was_altered_is_not_proved(kms, tree):
    data = bytearray((tree / "readme").read_bytes())
    data[10] ^= 1
    (tree / "readme").write_bytes(data)
    with pytest.raises(sc.IntegrityError, match="nothing was scheduled"):
        sc.erase(ONE, tree)
    assert state(kms, "one") == "Enabled"


def test_what_is_no_message_is_counted_and_a_single_message_will_do(kms, tree, tmp_path):
    (tree / "notes.txt").write_text("notes")
    done = sc.erase(ONE, tree, tree / "subject=1" / "a", dry_run=True)
    assert done.to_json()["trees"][0]["not_messages"] == 1
    assert done.unreadable.count(f"{tree}/subject=1/a") == 2


def test_what_a_branch_key_wraps_is_never_taken_for_proved(kms, tree, tmp_path):
    """The message names the branch key; which KMS key is behind that only its store knows."""
    words = ["kms", "create-branch-key", "--key-id", "alias/one", "--branch-key-id", "tenant", "--quiet"]
    assert main([*words, "--json"]) == 0
    sc.encrypt(tmp_path / "in" / "readme", tree / "branch", keys="hierarchy:tenant@local")
    with pytest.raises(sc.KeyAccessError, match="branch key tenant"):
        sc.erase(ONE, tree)
    others = ["hierarchy:tenant@local", "local:alias/default", "local:alias/two"]
    with pytest.raises(sc.StreamcryptError, match=r"wrapped by a branch key.*nothing was scheduled"):
        sc.erase(ONE, tree, keys=others)
    assert state(kms, "one") == "Enabled"
    done = sc.erase(ONE, tree, keys=others, allow_unproved=True)
    assert (done.proved, [failure.path for failure in done.failed]) == (False, [f"{tree}/branch"])


def test_keys_with_which_nothing_is_erased(kms, tree):
    signer = kms.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["Arn"]
    with pytest.raises(sc.StreamcryptError, match="wraps no data keys"):
        sc.erase(signer, tree)
    primary = kms.create_key(MultiRegion=True)["KeyMetadata"]["Arn"]
    kms.replicate_key(KeyId=primary, ReplicaRegion="eu-west-1")
    with pytest.raises(sc.StreamcryptError, match="multi-Region"):
        sc.erase(primary, tree)
    with pytest.raises(sc.KeyAccessError, match="NotFoundException"):
        sc.erase("local:alias/none", tree)
    with pytest.raises(ValueError, match="names no key of a KMS"):
        sc.erase("raw-aes:a/b@c", tree)
    with pytest.raises(ValueError, match="7 to 30"):
        sc.erase(ONE, tree, pending_window=31)


def test_the_command(kms, tree, monkeypatch, capsys):
    monkeypatch.chdir(tree.parent)
    assert main(["erase", ONE, "enc", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"{tree}/subject=1/a", f"{tree}/subject=1/b"]
    assert "messages: 2 would become unreadable, 0 also under other keys, 2 untouched" in told.err
    shutil.copytree("enc", "copy")
    assert main(["erase", ONE, "enc", "copy", "--pending-window", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["unreadable"] for one in found["trees"]] == [2, 2]
    assert found["cancel"] == f"streamcrypt kms cancel-key-deletion --key-id {arn(kms, 'one')}"
    assert main(["erase", ONE, "enc", "--check"]) == 0
    said = capsys.readouterr().err
    assert "everything else opens" in said
    assert "PendingDeletion on 20" in said
    assert "kms backup" in said
    kms.disable_key(KeyId=arn(kms, "default"))
    assert main(["erase", ONE, "enc", "--check", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert len(found["failed"]) == 2
    assert found["exit_code"] == 4
    assert main(["erase", ONE, "enc", "--pending-window", "3"]) == 2
