"""The signed manifest: origin and completeness for somebody who has nothing but a public key."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from families.processes import child_processes
from families.trees import leftovers, make_tree, read_tree

import streamcrypt as sc
from streamcrypt.cli import main
from streamcrypt.engine.journal import JOURNAL
from streamcrypt.engine.signature import Statement
from streamcrypt.engine.spans import MANIFEST, SIGNATURE, STATEMENT
from streamcrypt.keys.signing import read_public_key_file
from streamcrypt.kms import open_service
from streamcrypt.message.header import parse_header
from streamcrypt.storage import LocalTree
from streamcrypt.streams import OutgoingMessage, seal_message

KEY = "local:alias/data"
SIGNER = "local:alias/signer"
FILES = {"a/x": 5000, "a/y": 5000, "b": 0, "c d/é": 70_000, "large": 3 * 2**20 + 7}


@pytest.fixture
def kms(home: Path):
    service = open_service(home)
    for alias, spec in (("data", {}), ("signer", {"KeySpec": "ECC_NIST_P384", "KeyUsage": "SIGN_VERIFY"})):
        key = service.create_key(**spec)["KeyMetadata"]["KeyId"]
        service.create_alias(AliasName=f"alias/{alias}", TargetKeyId=key)
    return service


def public_pem(kms, alias: str, path: Path) -> Path:
    """The public key as a user gets it: kms get-public-key, then PEM by openssl."""
    der = kms.get_public_key(KeyId=alias)["PublicKey"]
    command = ["openssl", "pkey", "-pubin", "-inform", "DER", "-out", str(path)]
    subprocess.run(command, input=der, check=True)
    return path


@pytest.fixture
def pem(kms, tmp_path) -> Path:
    return public_pem(kms, "alias/signer", tmp_path / "public.pem")


@pytest.fixture
def signed(kms, tmp_path) -> Path:
    make_tree(tmp_path / "in", FILES)
    (tmp_path / "in" / "empty folder").mkdir()
    report = sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest=SIGNER, frame_size=1024)
    assert report["signature"]["algorithm"] == "ECDSA_SHA_384"
    return tmp_path / "enc"


def without_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMCRYPT_HOME", str(tmp_path / "nobody"))


# ------------------------------------------------------------------------ independent check


@pytest.mark.parametrize(
    ("spec", "algorithm", "sha", "options"),
    [
        ("ECC_NIST_P256", None, "sha256", []),
        ("ECC_NIST_P384", None, "sha384", []),
        ("ECC_NIST_P521", None, "sha512", []),
        ("RSA_2048", None, "sha256", ["rsa_padding_mode:pss", "rsa_pss_saltlen:32"]),
        ("RSA_2048", "RSASSA_PSS_SHA_512", "sha512", ["rsa_padding_mode:pss", "rsa_pss_saltlen:64"]),
        ("RSA_2048", "RSASSA_PKCS1_V1_5_SHA_384", "sha384", []),
    ],
)
def test_openssl_and_coreutils_verify_it(home, tmp_path, monkeypatch, spec, algorithm, sha, options):
    service = open_service(home)
    data = service.create_key()["KeyMetadata"]["Arn"]
    signer = service.create_key(KeySpec=spec, KeyUsage="SIGN_VERIFY")["KeyMetadata"]["Arn"]
    pem = public_pem(service, signer, tmp_path / "public.pem")
    contents = make_tree(tmp_path / "in", FILES)
    tree = tmp_path / "enc"
    report = sc.encrypt(
        tmp_path / "in", tree, keys=data, sign_manifest=signer, signing_algorithm=algorithm, frame_size=1024
    )
    assert report["kms"]["calls"]["Sign"] == 2  # one of them a dry run
    command = ["openssl", "dgst", f"-{sha}", "-verify", str(pem), "-signature", str(tree / SIGNATURE)]
    for option in options:
        command += ["-sigopt", option]
    done = subprocess.run([*command, str(tree / STATEMENT)], capture_output=True, text=True, check=False)
    assert done.stdout == "Verified OK\n", done.stderr

    records = [json.loads(line) for line in (tree / STATEMENT).read_bytes().splitlines()]
    assert records[0]["key"] == signer
    listed = {record["name"]: record for record in records if "name" in record}
    assert set(listed) == set(contents)
    sums = "".join(f"{listed[name]['sha256']}  {name}\n" for name in listed)
    sums += f"{records[-2]['sha256']}  {records[-2]['manifest']}\n"
    subprocess.run(["sha256sum", "--check", "--quiet", "-"], cwd=tree, input=sums.encode(), check=True)
    for name, record in listed.items():
        assert record["length"] == (tree / name).stat().st_size
    assert records[-1] == {"files": len(contents), "bytes": sum(r["length"] for r in listed.values())}

    without_keys(monkeypatch, tmp_path)
    told = sc.verify(tree, signed_by=pem)
    assert told.files == len(contents)
    assert told["kms"]["calls"] == {}
    assert told["signature"]["statement"] == hashlib.sha256((tree / STATEMENT).read_bytes()).hexdigest()
    assert told["signature"] == report["signature"]


def test_a_public_key_in_der_serves_as_well(kms, signed, tmp_path):
    der = tmp_path / "public.der"
    der.write_bytes(kms.get_public_key(KeyId="alias/signer")["PublicKey"])
    assert sc.verify(signed, signed_by=der).files == len(FILES)


# ------------------------------------------------------------------------ what it detects


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def swap(tree: Path) -> None:
    (tree / "a/x").rename(tree / "a/z")
    (tree / "a/y").rename(tree / "a/x")
    (tree / "a/z").rename(tree / "a/y")


def link(tree: Path) -> None:
    (tree / "b").rename(tree.parent / "elsewhere")
    (tree / "b").symlink_to(tree.parent / "elsewhere")


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "altered in its header": (lambda t: flip(t / "a/x", 40), {"a/x": "altered"}),
    "altered in its body": (lambda t: flip(t / "large", 2**20), {"large": "altered"}),
    "altered at its end": (lambda t: flip(t / "b"), {"b": "altered"}),
    "truncated": (lambda t: os.truncate(t / "a/y", 4000), {"a/y": "another length"}),
    "extended": (lambda t: (t / "b").write_bytes((t / "b").read_bytes() + b"x"), {"b": "another length"}),
    "removed": (lambda t: (t / "a/x").unlink(), {"a/x": "is missing"}),
    "added": (lambda t: shutil.copy(t / "b", t / "new"), {"new": "it was added"}),
    "renamed": (
        lambda t: (t / "a/x").rename(t / "a/z"),
        {"a/x": "renamed to a/z", "a/z": "under another name: a/x"},
    ),
    "swapped": (swap, {"a/x": "swapped", "a/y": "swapped"}),
    "a link in its place": (link, {"b": "symbolic link"}),
    "the manifest altered": (lambda t: flip(t / MANIFEST), {MANIFEST: "altered"}),
    "the manifest removed": (lambda t: (t / MANIFEST).unlink(), {MANIFEST: "is missing"}),
    "a folder for a file": (lambda t: ((t / "b").unlink(), (t / "b").mkdir()), {"b": "is a folder"}),
}


@pytest.mark.parametrize(("change", "failures"), CHANGES.values(), ids=CHANGES)
def test_every_change_is_found_and_named(signed, pem, tmp_path, monkeypatch, change, failures):
    without_keys(monkeypatch, tmp_path)
    change(signed)
    with pytest.raises(sc.StreamcryptError) as caught:
        sc.verify(signed, signed_by=pem)
    failed = {failure.path: str(failure.error) for failure in caught.value.report.failed}
    assert set(failed) == set(failures)
    for name, reason in failures.items():
        assert reason in failed[name]
        assert failed[name].startswith(f"{signed}/{name}")
    if "b" not in failures or "link" not in failures["b"]:
        assert isinstance(caught.value, sc.IntegrityError)


def test_an_empty_folder_more_or_less_is_nothing(signed, pem):
    (signed / "empty folder").rmdir()
    (signed / "another").mkdir()
    assert sc.verify(signed, signed_by=pem).files == len(FILES)


def test_whatever_happens_to_a_tree_exactly_that_is_named(signed, pem, tmp_path, monkeypatch):
    """Random changes, several at once: the names that fail are those whose bytes are not the signed ones."""
    without_keys(monkeypatch, tmp_path)
    before = {name: data for name, data in read_tree(signed).items() if name not in (STATEMENT, SIGNATURE)}
    found = 0
    for seed in range(60):
        chance = random.Random(seed)
        tree = tmp_path / f"tree {seed}"
        shutil.copytree(signed, tree)
        for _ in range(chance.randint(1, 4)):
            names = [name for name in read_tree(tree) if name not in (STATEMENT, SIGNATURE)]
            one, other = chance.choice(names), chance.choice(names)
            data = bytearray((tree / one).read_bytes())
            change = chance.choice(["flip", "cut", "remove", "add", "rename", "swap", "copy", "extend"])
            if change == "flip":
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            elif change == "cut":
                del data[chance.randrange(len(data)) :]
            elif change == "extend":
                data += chance.randbytes(chance.randint(1, 50))
            elif change == "swap":
                (tree / one).write_bytes((tree / other).read_bytes())
                (tree / other).write_bytes(data)
                continue
            elif change == "copy":
                data = bytearray((tree / other).read_bytes())
            elif change == "add":
                (tree / f"new{chance.randrange(3)}").write_bytes(data)
                continue
            elif change in ("remove", "rename") and one != MANIFEST:
                (tree / one).unlink()
                if change == "rename":
                    (tree / f"new{chance.randrange(3)}").write_bytes(data)
                continue
            (tree / one).write_bytes(data)
        after = {name: data for name, data in read_tree(tree).items() if name not in (STATEMENT, SIGNATURE)}
        expected = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        failed = set()
        try:
            sc.verify(tree, signed_by=pem)
        except sc.IntegrityError as error:
            failed = {failure.path for failure in error.report.failed}
        assert failed == expected, f"seed {seed}"
        found += len(failed)
    assert found > 60


def another_key(tree: Path, kms, tmp_path: Path) -> Path:
    key = kms.create_key(KeySpec="ECC_NIST_P384", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["KeyId"]
    return public_pem(kms, key, tmp_path / "another.pem")


def another_kind(tree: Path, kms, tmp_path: Path) -> Path:
    key = kms.create_key(KeySpec="RSA_2048", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["KeyId"]
    return public_pem(kms, key, tmp_path / "another.pem")


STATEMENTS: dict[str, Callable[[Path], object]] = {
    "a digest": lambda t: flip(t / STATEMENT, -200),
    "a line less": lambda t: (t / STATEMENT).write_bytes(
        b"".join(line for line in (t / STATEMENT).read_bytes().splitlines(True) if b'"b"' not in line)
    ),
    "the algorithm": lambda t: (t / STATEMENT).write_bytes(
        (t / STATEMENT).read_bytes().replace(b"ECDSA_SHA_384", b"ECDSA_SHA_256")
    ),
    "a line more": lambda t: (t / STATEMENT).write_bytes((t / STATEMENT).read_bytes() + b"{}\n"),
    "nothing left": lambda t: (t / STATEMENT).write_bytes(b""),
    "no statement": lambda t: (t / STATEMENT).unlink(),
    "a deep one": lambda t: (t / STATEMENT).write_bytes(b"[" * 4000 + b"\n"),
    "no JSON": lambda t: (t / STATEMENT).write_bytes(b"\xff\xfe"),
    "the signature": lambda t: flip(t / SIGNATURE),
    "an empty signature": lambda t: (t / SIGNATURE).write_bytes(b""),
    "no signature": lambda t: (t / SIGNATURE).unlink(),
}


@pytest.mark.parametrize("change", STATEMENTS.values(), ids=STATEMENTS)
def test_a_statement_that_was_touched_is_refused(signed, pem, change):
    change(signed)
    with pytest.raises(sc.IntegrityError, match="_streamcrypt/manifest"):
        sc.verify(signed, signed_by=pem)


def test_a_statement_that_changes_after_it_was_verified_is_refused(signed, pem):
    with Statement(LocalTree(str(signed)), read_public_key_file(pem)) as statement:
        text = (signed / STATEMENT).read_bytes()
        (signed / STATEMENT).write_bytes(
            text.replace(b'"name":"b"', b'"name":"bb"')
        )  # the same file, in place
        given_out = []
        with pytest.raises(sc.IntegrityError, match="changed after"):
            given_out.extend(listed.name for listed in statement.lines())
        assert given_out == []  # by these names `decrypt --signed-by` publishes files


@pytest.mark.parametrize("other", [another_key, another_kind])
def test_a_statement_of_another_signer_is_refused(signed, kms, tmp_path, other):
    with pytest.raises(sc.IntegrityError, match="signature"):
        sc.verify(signed, signed_by=other(signed, kms, tmp_path))


def test_the_statement_of_another_tree_does_not_fit(signed, pem, tmp_path):
    sc.encrypt(tmp_path / "in", tmp_path / "second", keys=KEY, sign_manifest=SIGNER, frame_size=1024)
    for name in (STATEMENT, SIGNATURE):
        shutil.copy(tmp_path / "second" / name, signed / name)
    with pytest.raises(sc.IntegrityError, match="signed under this name"):
        sc.verify(signed, signed_by=pem)


def forge(path: Path, plaintext: bytes) -> None:
    """What a reader can do who holds the data key: another body under the same header."""
    header, _ = parse_header(path.read_bytes())
    from streamcrypt.keys.materials import Materials
    from streamcrypt.keys.reference import decrypting_keyring
    from streamcrypt.streams import ReadingRules, unlock

    message = unlock(header, Materials(decrypting_keyring(None)), ReadingRules())
    outgoing = OutgoingMessage(
        header.serialize(), header.message_id, message.content_key, message.cipher, header.frame_length, None, None
    )  # fmt: skip
    path.write_bytes(seal_message(outgoing, plaintext))


def test_a_reader_who_forges_under_the_same_header_is_found(signed, pem, tmp_path, monkeypatch):
    """The manifest alone binds a name to a header; the signature covers every byte behind it."""
    forge(signed / "a/x", bytes(5000))
    sc.verify(signed)  # what a manifest cannot know
    with pytest.raises(sc.IntegrityError, match="a/x"):
        sc.verify(signed, signed_by=pem, keys=KEY)
    with pytest.raises(sc.IntegrityError, match=r"a/x.*signed under this name"):
        sc.decrypt(signed, tmp_path / "dec", signed_by=pem)
    assert set(read_tree(tmp_path / "dec")) == set(FILES) - {"a/x"}
    with pytest.raises(sc.IntegrityError, match="a/x"):
        sc.rekey(signed, tmp_path / "rekeyed", keys=KEY, signed_by=pem, sign_manifest=SIGNER)
    assert not (tmp_path / "rekeyed" / STATEMENT).exists()
    without_keys(monkeypatch, tmp_path)
    with pytest.raises(sc.IntegrityError, match="a/x"):
        sc.verify(signed, signed_by=pem)


# ------------------------------------------------------------------------ with keys as well


def test_with_keys_both_are_checked(signed, pem, tmp_path):
    assert sc.verify(signed, against=tmp_path / "in").files == len(FILES)
    told = sc.verify(signed, signed_by=pem, against=tmp_path / "in")
    assert told["kms"]["calls"] == {"Decrypt": 1}
    assert told["signature"]["algorithm"] == "ECDSA_SHA_384"
    sc.decrypt(signed, tmp_path / "dec", signed_by=pem)
    assert read_tree(tmp_path / "dec") == read_tree(tmp_path / "in")
    assert (tmp_path / "dec" / "empty folder").is_dir()


@pytest.mark.parametrize("name", ["a/x", "large"])
def test_decrypt_takes_only_what_was_signed(signed, pem, tmp_path, name):
    sc.encrypt(tmp_path / "in" / name, tmp_path / "again", keys=KEY, frame_size=1024)  # the same plaintext
    shutil.copy(tmp_path / "again", signed / name)
    (signed / "b").unlink()
    shutil.copy(signed / "a/y", signed / "more")
    with pytest.raises(sc.IntegrityError) as caught:
        sc.decrypt(signed, tmp_path / "dec", signed_by=pem)
    failed = {failure.path for failure in caught.value.report.failed}
    assert failed == {name, "b", "more"}
    assert set(read_tree(tmp_path / "dec")) == set(FILES) - {name, "b"}


def test_a_manifest_that_was_replaced_fails_a_signed_decryption(signed, pem, tmp_path):
    flip(signed / MANIFEST)
    with pytest.raises(sc.IntegrityError, match="manifest"):
        sc.decrypt(signed, tmp_path / "dec", signed_by=pem)


def test_a_part_of_a_tree(signed, pem, tmp_path):
    (signed / "b").unlink()
    assert sc.verify(signed, signed_by=pem, include=["a/*"]).files == 2
    assert sc.verify(signed, signed_by=pem, files=["large"]).files == 1
    assert sc.decrypt(signed, tmp_path / "dec", signed_by=pem, exclude=["b"]).files == len(FILES) - 1


# ------------------------------------------------------------------------ every way to write


@pytest.mark.parametrize("sign", [False, True], ids=["unsigned messages", "signed messages"])
def test_rekey_signs_too(signed, pem, tmp_path, monkeypatch, sign):
    target = tmp_path / "rekeyed"
    sc.rekey(signed, target, keys=KEY, signed_by=pem, sign_manifest=SIGNER, sign=sign, frame_size=2000)
    sc.verify(target, against=tmp_path / "in", signed_by=pem)
    without_keys(monkeypatch, tmp_path)
    assert sc.verify(target, signed_by=pem).files == len(FILES)


def test_worker_processes_sign_what_they_made(kms, pem, tmp_path):
    contents = make_tree(tmp_path / "in", {f"f{i}": 9 * 2**17 for i in range(12)})
    children, others = set(), set(child_processes())
    sc.encrypt(
        tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest=SIGNER, workers=2, frame_size=128, fsync=False,
        progress=lambda _: children.update(set(child_processes()) - others),
    )  # fmt: skip
    assert len(children) >= 2, "this job should have taken worker processes"
    assert sc.verify(tmp_path / "enc", signed_by=pem).files == len(contents)
    sc.decrypt(tmp_path / "enc", tmp_path / "dec", signed_by=pem, workers=2, fsync=False)
    assert read_tree(tmp_path / "dec") == contents


def test_a_file_that_would_be_cut_into_spans_is_hashed_in_order(kms, pem, tmp_path, monkeypatch):
    monkeypatch.setattr("streamcrypt.engine.spans.SPLIT_LENGTH", 2**20)
    contents = make_tree(tmp_path / "in", {"large": 3 * 2**20 + 17, "small": 10})
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest=SIGNER, workers=3)
    sc.verify(tmp_path / "enc", signed_by=pem)
    sc.decrypt(tmp_path / "enc", tmp_path / "dec", signed_by=pem, workers=3)
    assert read_tree(tmp_path / "dec") == contents


INTERRUPTED = """
import os, signal, sys
import streamcrypt as sc
from streamcrypt.engine.journal import Journal
write, lines = Journal.write, 0
def counting(self):
    global lines
    lines += len(self._lines)
    write(self)
    if lines >= 10:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.write = counting
sc.encrypt(*sys.argv[1:3], keys=sys.argv[3], sign_manifest=sys.argv[4], frame_size=256, workers=2)
"""


def test_a_resumed_job_signs_what_it_takes_over_only_after_opening_it(kms, pem, tmp_path):
    make_tree(tmp_path / "in", {f"{number:03}": 1000 * number for number in range(40)})
    enc = tmp_path / "enc"
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "in"), str(enc), KEY, SIGNER]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    _, *lines = (enc / JOURNAL).read_bytes().splitlines()
    done = [row[0] for line in lines for row in json.loads(line.partition(b" ")[2])[1]]
    flip(enc / done[-1], -2000)  # in the middle: the header and the final frame still open
    report = sc.encrypt(
        tmp_path / "in", enc, keys=KEY, sign_manifest=SIGNER, frame_size=256, workers=2, resume=True
    )
    assert report.skipped >= 5
    assert report.skipped + report.files == 40
    assert sc.verify(enc, signed_by=pem).files == 40
    sc.verify(enc, against=tmp_path / "in")
    assert not leftovers(enc)


# ------------------------------------------------------------------------ on an object store


def test_a_folder_on_an_object_store(kms, pem, bucket, tmp_path):
    """Signed, verified without a key, decrypted as signed, resumed, replaced and erased there."""
    make_tree(tmp_path / "in", {**FILES, "parts": 9 * 2**20})
    url = f"{bucket.url}/enc"
    rules = {"a/*": "local:alias/other"}
    other = kms.create_key()["KeyMetadata"]["Arn"]
    kms.create_alias(AliasName="alias/other", TargetKeyId=other)
    sc.encrypt(tmp_path / "in", url, keys=KEY, key_map=rules, sign_manifest=SIGNER, workers=2)
    assert sc.verify(url, signed_by=pem).files == len(FILES) + 1
    sc.decrypt(url, tmp_path / "dec", signed_by=pem)
    assert read_tree(tmp_path / "dec") == read_tree(tmp_path / "in")
    whole = bucket.get("enc/parts")
    bucket.put("enc/parts", whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    bucket.put("enc/more")
    with pytest.raises(sc.IntegrityError) as caught:
        sc.verify(url, signed_by=pem)
    assert {failure.path for failure in caught.value.report.failed} == {"parts", "more"}
    bucket.client.delete_object(Bucket=bucket.name, Key="enc/more")
    bucket.put("enc/parts", whole)
    done = sc.erase("local:alias/other", url, dry_run=True)
    assert done.unreadable == [f"{url}/a/x", f"{url}/a/y"]
    (tmp_path / "in" / "link").symlink_to("b")
    with pytest.raises(sc.SourceError):
        sc.encrypt(tmp_path / "in", url, keys=KEY, key_map=rules, sign_manifest=SIGNER, overwrite=True)
    assert not [name for name in bucket.names() if "manifest.s" in name]
    (tmp_path / "in" / "link").unlink()
    report = sc.encrypt(tmp_path / "in", url, keys=KEY, key_map=rules, sign_manifest=SIGNER, resume=True)
    assert report.skipped == len(FILES) + 1
    assert sc.verify(url, signed_by=pem).files == len(FILES) + 1


# ------------------------------------------------------------------------ when there is none


def test_nothing_is_signed_when_a_file_failed_and_an_old_signature_goes(signed, pem, tmp_path):
    (tmp_path / "in" / "link").symlink_to("b")
    with pytest.raises(sc.SourceError):
        sc.encrypt(tmp_path / "in", signed, keys=KEY, sign_manifest=SIGNER, overwrite=True)
    assert not (signed / STATEMENT).exists()
    assert not (signed / SIGNATURE).exists()
    assert not leftovers(signed)
    (tmp_path / "in" / "link").unlink()
    sc.encrypt(tmp_path / "in", signed, keys=KEY, sign_manifest=SIGNER, resume=True)
    sc.verify(signed, signed_by=pem)
    sc.encrypt(tmp_path / "in", signed, keys=KEY, overwrite=True)  # unsigned: the old one would not fit
    with pytest.raises(sc.IntegrityError, match="is missing: the tree has no signed manifest"):
        sc.verify(signed, signed_by=pem)


def test_a_key_that_fails_at_the_end_leaves_a_job_to_resume(kms, pem, tmp_path):
    make_tree(tmp_path / "in", FILES)
    arn = kms.describe_key(KeyId="alias/signer")["KeyMetadata"]["Arn"]
    words = {"keys": KEY, "sign_manifest": SIGNER, "frame_size": 1024}
    with pytest.raises(sc.KeyAccessError, match="DisabledException"):
        sc.encrypt(tmp_path / "in", tmp_path / "enc", progress=lambda _: kms.disable_key(KeyId=arn), **words)
    assert not (tmp_path / "enc" / SIGNATURE).exists()
    assert not leftovers(tmp_path / "enc")
    kms.enable_key(KeyId=arn)
    report = sc.encrypt(tmp_path / "in", tmp_path / "enc", resume=True, **words)
    assert report.skipped == len(FILES)
    assert sc.verify(tmp_path / "enc", signed_by=pem, against=tmp_path / "in").files == len(FILES)


def test_a_folder_without_files_and_a_dry_run(kms, pem, tmp_path):
    (tmp_path / "in" / "nothing").mkdir(parents=True)
    dry = sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest=SIGNER, dry_run=True)
    assert (dry["kms"]["calls"], (tmp_path / "enc").exists()) == ({}, False)
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest=SIGNER)
    assert sc.verify(tmp_path / "enc", signed_by=pem).files == 0
    (tmp_path / "enc" / "new").write_bytes(b"")
    with pytest.raises(sc.IntegrityError, match="added"):
        sc.verify(tmp_path / "enc", signed_by=pem)


def test_a_key_that_cannot_sign_is_found_before_anything_is_written(kms, tmp_path):
    make_tree(tmp_path / "in", {"a": 10})
    kms.create_alias(AliasName="alias/agree", TargetKeyId=kms.create_key(
        KeySpec="ECC_NIST_P256", KeyUsage="KEY_AGREEMENT")["KeyMetadata"]["KeyId"])  # fmt: skip
    disabled = kms.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["Arn"]
    kms.disable_key(KeyId=disabled)
    for reference, reason in (
        (KEY, "no public key"),
        ("local:alias/agree", "not SIGN_VERIFY"),
        ("local:alias/none", "NotFoundException"),
        (disabled, "DisabledException"),
    ):
        with pytest.raises(sc.KeyAccessError, match=reason):
            sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest=reference)
    with pytest.raises(ValueError, match="signs by ECDSA_SHA_384"):
        sc.encrypt(
            tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest=SIGNER, signing_algorithm="ECDSA_SHA_256"
        )  # fmt: skip
    with pytest.raises(ValueError, match="none of"):
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest=SIGNER, signing_algorithm="MD5")
    with pytest.raises(ValueError, match="folder"):
        sc.encrypt(tmp_path / "in" / "a", tmp_path / "enc", keys=KEY, sign_manifest=SIGNER)
    with pytest.raises(ValueError, match="names no key of a KMS"):
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest="raw-aes:a/b@c")
    assert not (tmp_path / "enc").exists()


def test_who_may_not_sign_is_told_before_anything_is_written(kms, tmp_path):
    make_tree(tmp_path / "in", {"a": 10})
    arn = kms.describe_key(KeyId="alias/signer")["KeyMetadata"]["Arn"]
    root = {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "kms:*", "Resource": "*"}
    deny = {"Effect": "Deny", "Principal": {"AWS": "*"}, "Action": "kms:Sign", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [root, deny]})
    kms.put_key_policy(KeyId=arn, PolicyName="default", Policy=policy)
    with pytest.raises(sc.KeyAccessError, match="kms:Sign"):
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEY, sign_manifest=SIGNER)
    assert not (tmp_path / "enc").exists()


def test_what_is_no_public_key(kms, signed, tmp_path):
    (tmp_path / "text").write_text("text")
    curve = kms.create_key(KeySpec="ECC_SECG_P256K1", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["KeyId"]
    for path in (tmp_path / "text", tmp_path / "none", public_pem(kms, curve, tmp_path / "k1.pem")):
        with pytest.raises(sc.KeyAccessError, match=path.name):
            sc.verify(signed, signed_by=path)


# ------------------------------------------------------------------------ the command


def test_the_command(kms, tmp_path, monkeypatch, capsys):
    make_tree(tmp_path / "in", FILES)
    monkeypatch.chdir(tmp_path)
    assert main(["encrypt", "in", "enc", "--key", KEY, "--sign-manifest", SIGNER, "--json"]) == 0
    signature = json.loads(capsys.readouterr().out)["signature"]
    assert signature["key"].startswith("arn:aws:kms:local:")
    assert (
        main(
            ["kms", "get-public-key", "--key-id", "alias/signer", "--output", "text", "--query", "PublicKey"]
        )
        == 0
    )
    Path("public.der").write_bytes(base64.b64decode(capsys.readouterr().out))
    without_keys(monkeypatch, tmp_path)
    assert main(["verify", "enc", "--signed-by", "public.der"]) == 0
    said = capsys.readouterr().err
    assert f"signed by {signature['key']}" in said
    assert main(["verify", "enc", "--signed-by", "public.der", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature"] == signature
    Path("enc/b").rename("enc/moved")
    assert main(["verify", "enc", "--signed-by", "public.der"]) == 3
    said = capsys.readouterr().err
    assert "enc/b: is missing" in said
    assert "enc/moved: was signed under another name: b" in said
