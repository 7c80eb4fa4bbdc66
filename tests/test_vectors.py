"""The published vectors through every way in, with the outcome that their manifest states.

bytes      sc.decrypt_bytes
stream     streams.open_stream, by drops
seekable   sc.open, read at random, the signature of a signed message checked
engine     sc.decrypt of a folder of messages by threads and by worker processes
inspect    sc.inspect, without a key
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import vectors as published
from families.keyrings import keyring_of
from families.processes import child_processes
from families.sources import dribble
from families.vectors import Vector, vectors_with

import streamcrypt as sc
from streamcrypt.errors import KeyAccessError, LimitExceededError
from streamcrypt.keys.materials import Materials
from streamcrypt.message.header import parse_header
from streamcrypt.message.suites import CommitmentPolicy
from streamcrypt.streams import ReadingRules, open_stream

REFUSALS = (sc.IntegrityError, LimitExceededError, KeyAccessError)


def options(vector: Vector) -> dict[str, object]:
    """The keywords of every reading function."""
    policy = vector.options.get("commitment-policy", "REQUIRE_ENCRYPT_ALLOW_DECRYPT")
    found: dict[str, object] = {
        "keys": keyring_of(vector.keyring),
        "commitment_policy": CommitmentPolicy[policy],
        "max_encrypted_data_keys": vector.options.get("max-encrypted-data-keys"),
    }
    if vector.supplied_context:
        # All pairs that the caller supplies: those that are stored must be equal, the others are
        # authenticated only.
        found["authenticated_context"] = vector.supplied_context
    return found


def by_bytes(vector: Vector) -> bytes:
    return sc.decrypt_bytes(vector.message, **options(vector))


def by_stream(vector: Vector, step: int = 61) -> bytes:
    words = options(vector)
    rules = ReadingRules(
        words["commitment_policy"],
        words["max_encrypted_data_keys"],
        authenticated_context=vector.supplied_context,
    )
    materials = Materials(words["keys"], max_encrypted_data_keys=words["max_encrypted_data_keys"])
    return b"".join(bytes(chunk) for chunk in open_stream(dribble(vector.message, step), materials, rules))


def by_seeking(vector: Vector) -> bytes:
    with sc.open(vector.path, **options(vector)) as file:
        if file.header.suite.signed:
            file.verify_signature()
        rng = random.Random(file.size)
        plaintext = bytearray(file.size)
        cuts = sorted({0, file.size, *(rng.randrange(file.size + 1) for _ in range(8))})
        pieces = list(itertools.pairwise(cuts))
        rng.shuffle(pieces)
        for start, stop in pieces:
            file.seek(start)
            plaintext[start:stop] = file.read(stop - start)
        assert file.seek(0, os.SEEK_END) == file.size
        assert file.read() == b""
        return bytes(plaintext)


WAYS_IN = {"bytes": by_bytes, "stream": by_stream, "seekable": by_seeking}


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
@pytest.mark.parametrize("vector", vectors_with("plaintext"), ids=repr)
def test_plaintext(vector, way):
    assert way(vector) == vector.plaintext


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
@pytest.mark.parametrize("vector", vectors_with("error"), ids=repr)
def test_error(vector, way):
    with pytest.raises(REFUSALS):
        way(vector)


@pytest.mark.parametrize("vector", vectors_with("error"), ids=repr)
def test_an_error_gives_out_no_plaintext_that_is_not_authentic(vector):
    """By stream: what came before the refusal is whole frames of the crafted plaintext, or nothing."""
    words = options(vector)
    rules = ReadingRules(
        words["commitment_policy"],
        words["max_encrypted_data_keys"],
        authenticated_context=vector.supplied_context,
    )
    materials = Materials(words["keys"], max_encrypted_data_keys=words["max_encrypted_data_keys"])
    out = b""
    with pytest.raises(REFUSALS):  # noqa: PT012
        for chunk in open_stream(dribble(vector.message, 100), materials, rules):
            out += bytes(chunk)
    if out:
        header, _ = parse_header(vector.message, max_encrypted_data_keys=None)
        assert len(out) % header.frame_length == 0


@pytest.mark.parametrize("vector", vectors_with("plaintext", "inspect-only"), ids=repr)
def test_inspect(vector):
    seen, test = sc.inspect(vector.path), vector.test
    assert seen["suite"] == f"0x{test['suite']}"
    assert seen["content"] == test["content"]
    assert seen["frame_length"] == test["frame-length"]
    assert seen["plaintext_size"] == test["plaintext-size"]
    assert seen["encryption_context"] == test["encryption-context"]
    assert [key["provider_id"] for key in seen["encrypted_data_keys"]] == test["encrypted-data-keys"]
    assert seen["header_length"] == test["header-length"]
    assert seen["message_size"] == vector.path.stat().st_size
    assert seen["authenticated"] is False


@pytest.mark.parametrize("workers", [1, 2])
def test_engine(vectors, tmp_path, workers):
    """Every vector whose options need no words of its own, as one tree per keyring."""
    groups: dict[str, list[Vector]] = {}
    for vector in vectors_with("plaintext", "error"):
        if not vector.options and not vector.supplied_context:
            groups.setdefault(repr(sorted(vector.keyring.items())), []).append(vector)
    decrypted = 0
    for number, group in enumerate(groups.values()):
        source, target = tmp_path / f"{number}.enc", tmp_path / f"{number}"
        source.mkdir()
        for vector in group:
            shutil.copyfile(vector.path, source / vector.name)
        words = options(group[0]) | {"workers": workers}
        refused = {vector.name for vector in group if vector.expect == "error"}
        if refused:
            with pytest.raises(REFUSALS) as caught:
                sc.decrypt(source, target, **words)
            failed = {failure.path for failure in caught.value.report.failed}
        else:
            failed = {failure.path for failure in sc.decrypt(source, target, **words).failed}
        assert failed == refused
        for vector in group:
            if vector.name in refused:
                assert not (target / vector.name).exists()
            else:
                assert (target / vector.name).read_bytes() == vector.plaintext
                decrypted += 1
    assert decrypted > 200


def test_engine_by_processes(vectors, tmp_path):
    """The same code in worker processes: raw AES vectors, positive and negative, so often that they pay."""
    chosen = [v for v in vectors_with("plaintext", "error") if not v.options and not v.supplied_context]
    keyring = next(v.keyring for v in chosen if v.name == "craft-0178-frame-1")
    group = [v for v in chosen if v.keyring == keyring]
    copies = 1 + 5_500 // len(group)
    for copy in range(copies):
        (tmp_path / "in" / f"{copy}").mkdir(parents=True)
        for vector in group:
            os.link(vector.path, tmp_path / "in" / f"{copy}" / vector.name)
    children = set()
    with pytest.raises(REFUSALS) as caught:
        sc.decrypt(
            tmp_path / "in",
            tmp_path / "out",
            keys=keyring_of(keyring),
            commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_ALLOW_DECRYPT,
            max_encrypted_data_keys=None,
            workers=2,
            fsync=False,
            progress=lambda _: children.update(child_processes()),
        )
    assert len(children) >= 2
    refused = {v.name for v in group if v.expect == "error"}
    assert {f.path for f in caught.value.report.failed} == {
        f"{c}/{n}" for c in range(copies) for n in refused
    }
    for vector in group:
        if vector.expect == "plaintext":
            assert (tmp_path / "out" / "0" / vector.name).read_bytes() == vector.plaintext


def test_command_line(vectors, tmp_path):
    """``streamcrypt decrypt --json`` of a folder of messages, for the keys that most vectors have."""
    groups: dict[str, list[Vector]] = {}
    for vector in vectors_with("plaintext", "error"):
        if (
            vector.keyring["type"] in ("raw-aes", "raw-rsa")
            and not vector.options
            and not vector.supplied_context
        ):
            groups.setdefault(repr(sorted(vector.keyring.items())), []).append(vector)
    largest = sorted(groups.values(), key=len, reverse=True)[:8]  # a process each
    for number, group in enumerate(largest):
        keyring, source = group[0].keyring, tmp_path / f"{number}.enc"
        source.mkdir()
        for vector in group:
            shutil.copyfile(vector.path, source / vector.name)
        key = tmp_path / f"{number}.key"
        name = f"{keyring['namespace']}/{keyring['name']}"
        if keyring["type"] == "raw-aes":
            key.write_bytes(published.symmetric_key(keyring["key"]))
            reference = f"raw-aes:{name}@{key}"
        else:
            key.write_text(published.keys()[keyring["key"]]["private-pem"])
            reference = f"raw-rsa:{name}@{key}?padding={keyring['padding']}"
        key.chmod(0o600)
        words = ["decrypt", source, tmp_path / f"{number}", "--key", reference, "--json", "--no-fsync"]
        words += [
            "--commitment-policy",
            "require-encrypt-allow-decrypt",
            "--max-encrypted-data-keys",
            "65535",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "streamcrypt", *map(str, words)],
            capture_output=True,
            env=os.environ | {"PYTHONPATH": str(Path(sc.__file__).parents[1])},
        )
        refused = {vector.name for vector in group if vector.expect == "error"}
        report = json.loads(done.stdout)
        assert done.returncode in ((3, 4) if refused else (0,)), done.stderr
        assert {failure["path"] for failure in report["failed"]} == refused
        for vector in group:
            path = tmp_path / f"{number}" / vector.name
            if vector.name in refused:
                assert not path.exists()
            else:
                assert path.read_bytes() == vector.plaintext


def test_vectors_are_here(vectors):
    assert len(vectors_with("plaintext", "error", "inspect-only")) >= 515
    assert published.FOLDER.is_dir()
