"""Mutants: each takes one protection out of a copy of the package, and its test must turn red.

The list is written by hand, one for each detector that the reliability table relies on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import streamcrypt as sc

REPOSITORY = Path(sc.__file__).parents[1]
VECTORS = os.environ.get("STREAMCRYPT_VECTORS", REPOSITORY.parent / "shared" / "vectors")


class Mutant(NamedTuple):
    item: str
    file: str
    old: str
    new: str
    tests: str
    keyword: str = ""
    marker: str = ""


MUTANTS = {
    "tag of a regular frame not checked": Mutant(
        "1", "message/frames.py",
        'raise IntegrityError(f"frame {index} did not authenticate") from None', "pass",
        "tests/message/test_frames.py", "leaves_nothing",
    ),
    "tag of the final frame not checked": Mutant(
        "1", "message/frames.py",
        'raise IntegrityError("the final frame did not authenticate") from None', "pass",
        "tests/message/test_tampering.py", "flipped_bit",
    ),
    "tag of the header not checked": Mutant(
        "1", "message/header.py", "aead.decrypt(header.iv, header.tag, header.body + unstored)", "pass",
        "tests/message/test_tampering.py", "flipped_bit",
    ),
    "headers of small messages of a store not compared": Mutant(
        "1", "engine/worker.py", "if not bytes_eq(bytes(message[: len(header)]), header):", "if False:",
        "tests/engine/test_stores.py", "answer_as_from_a_disk",
    ),
    "plaintext left in the buffer when a tag fails": Mutant(
        "7", "message/frames.py", "target[:] = bytes(len(target))", "pass",
        "tests/message/test_frames.py", "leaves_nothing",
    ),
    "a caller's buffer decrypted into directly": Mutant(
        "7", "streams.py", "part[:] = self._private(self._position + start, len(part))",
        "self._fill(self._position + start, part)",
        "tests/engine/test_streams.py", "never_shows",
    ),
    "frame number not in the AAD": Mutant(
        "2", "message/frames.py", "aad + pack_aad(index, frame_length),\n                    target,",
        "aad + pack_aad(1, frame_length),\n                    target,",
        "tests/message/test_frames.py", "specification_s",
    ),
    "bytes after an unsigned message accepted": Mutant(
        "2", "streams.py", "if alone and len(rest) > body_end:", "if False:",
        "tests/engine/test_streams.py", "bytes_after",
    ),
    "bytes after a footer accepted": Mutant(
        "2", "message/footer.py", "if length != len(footer):", "if False:",
        "tests/message/test_frames.py", "damaged_footers",
    ),
    "claimed lengths trusted": Mutant(
        "4", "streams.py", "room = min(missing, max(self._STEP, self._length))", "room = missing",
        "tests/engine/test_streams.py", "claimed_lengths",
    ),
    "one wrapped key too many": Mutant(
        "4", "message/header.py", "count > limit:", "count > limit + 1:",
        "tests/message/test_header.py", "too_many_keys",
    ),
    "commitment not compared": Mutant(
        "5", "message/derive.py", "if header.suite.committing and not", "if False and not",
        "tests/message/test_commitment.py",
    ),
    "commitment policy not checked": Mutant(
        "5", "message/suites.py", "if self is CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT and", "if False and",
        "tests/message/test_commitment.py",
    ),
    "signature not verified": Mutant(
        "6", "message/footer.py", 'raise IntegrityError("the signature of the message does not hold") from None',
        "pass", "tests/message/test_tampering.py", "signature or flipped_bit",
    ),
    "repeated context name accepted": Mutant(
        "8", "message/context.py", "if name in context:", "if False:", "tests/message/test_context.py",
    ),
    "message not held against its manifest": Mutant(
        "9", "engine/run.py", "                listed.check(header, source.size)", "                pass",
        "tests/engine/test_engine.py", "changed_as_a_whole",
    ),
    "links followed within a tree": Mutant(
        "11", "storage.py", "_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW",
        "_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC",
        "tests/engine/test_engine.py", "link_is_not_followed",
    ),
    "a failed write published": Mutant(
        "14", "streams.py", "self.discard()  # what is missing now can never be made good", "pass  # what",
        "tests/engine/test_streams.py", "never_published",
    ),
    "file not flushed before it gets its name": Mutant(
        "16", "storage.py", "            os.fsync(self._descriptor)", "            pass",
        "tests/campaigns/test_syscalls.py", "order_of_writes", "campaign",
    ),
    "folder not flushed after its files got their names": Mutant(
        "16", "storage.py", "os.fsync(self._folder(folder).descriptor)", "self._folder(folder)",
        "tests/campaigns/test_syscalls.py", "order_of_writes", "campaign",
    ),
    "cache limit off by one where several are counted": Mutant(
        "21", "keys/cache.py", "if entry.messages >= self._max_messages or",
        "if entry.messages > self._max_messages or",
        "tests/keys/test_data_key_cache.py", "several_messages",
    ),
    "small file not held against its source": Mutant(
        "29", "engine/worker.py", "source.check_unchanged()\n                outcome.", "outcome.",
        "tests/engine/test_engine.py", "small_source_that_changes",
    ),
    "cache limit off by one": Mutant(
        "21", "keys/cache.py", "if entry.messages > self._max_messages:",
        "if entry.messages > self._max_messages + 1:",
        "tests/engine/test_engine.py", "exactly_the_keys",
    ),
    "message id not random": Mutant(
        "22", "streams.py", "os.urandom(", "bytes(", "tests/engine/test_engine.py", "content_key",
    ),
    "files readable by others": Mutant(
        "26", "storage.py", "_FILE_MODE: Final = 0o600", "_FILE_MODE: Final = 0o644",
        "tests/engine/test_engine.py", "modes",
    ),
    "a data key shown by its repr": Mutant(
        "24", "keys/keyring.py", 'return "<data key>"', "return bytes.__repr__(self)",
        "tests/keys/test_canaries.py", "another",
    ),
    "variables left in the frames of a refusal": Mutant(
        "24", "hygiene.py", "step.tb_frame.clear()", "pass", "tests/keys/test_canaries.py", "variables",
    ),
    "botocore's debug log left as it is": Mutant(
        "24", "kms/redaction.py", "if any(member in message", "if False and any(member in message",
        "tests/keys/test_canaries.py", "jobs",
    ),
    "core dumps left to the limit alone": Mutant(
        "25", "hygiene.py", 'c_call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)', "pass",
        "tests/keys/test_hygiene.py", "leaves_no_core",
    ),
    "the limit of core dumps left as it is": Mutant(
        "25", "hygiene.py", "resource.setrlimit(resource.RLIMIT_CORE, (0,", "(lambda *_: None)(0, (0,",
        "tests/keys/test_hygiene.py", "leave_no_core or leaves_no_core",
    ),
    "keys left to the swap": Mutant(
        "25", "hygiene.py", 'c_call("mlock", secret', 'c_call("munlock", secret',
        "tests/keys/test_hygiene.py", "locks_its_data_key or locked_pages",
    ),
    "no deadline for an answer that drips": Mutant(
        "18", "keys/calls.py", "done.wait(max(0.0, give_up_at - self._clock()))", "done.wait()",
        "tests/keys/test_outages.py", "temporary and drip",
    ),
    "answers of KMS for another key accepted": Mutant(
        "19", "keys/kms.py", 'if response.get("KeyId") != key_arn:', "if False:",
        "tests/keys/test_kms_keyrings.py", "wrong_answers",
    ),
    "plain HTTP to another machine allowed": Mutant(
        "20", "keys/reference.py", "if plaintext_allowed or", "if True or", "tests/keys/test_reference.py", "http",
    ),
    "a new key not flushed": Mutant(
        "31", "kms/store.py", 'execute("PRAGMA synchronous=FULL")', 'execute("PRAGMA synchronous=NORMAL")',
        "tests/kms/test_durability.py", "power_loss",
    ),
    "the folder not flushed after a branch key": Mutant(
        "31", "keys/hierarchy.py", "PRAGMA synchronous = EXTRA", "PRAGMA synchronous = FULL",
        "tests/kms/test_durability.py", "power_loss",
    ),
    "a key that another process changed used as it was": Mutant(
        "31", "kms/store.py", ".rowcount == 1:", ".rowcount <= 1:", "tests/kms/test_store.py", "another_process",
    ),
    "the root key of another store taken": Mutant(
        "32", "kms/rootkey.py", 'if found["store"] != store_id:', "if False:",
        "tests/kms/test_store.py", "wrong_root_key",
    ),
    "a new store made where one was": Mutant(
        "32", "kms/store.py",
        "            if os.path.exists(self._root_path):\n                raise KeyAccessError(\n"
        '                    f"{self._path}: the database is missing',
        "            if False:\n                raise KeyAccessError(\n"
        '                    f"{self._path}: the database is missing',
        "tests/kms/test_store.py", "wrong_root_key",
    ),
    "the signature of a manifest not verified": Mutant(
        "10", "keys/signing.py", 'raise IntegrityError("the signature does not verify with the key given") from None',
        "pass", "tests/engine/test_signature.py", "touched",
    ),
    "a signed manifest that is read twice not compared": Mutant(
        "10", "engine/signature.py", "if hashlib.sha256(block).digest() != next(digests, None):", "if False:",
        "tests/engine/test_signature.py", "changes_after",
    ),
    "the digest of a message that is decrypted not compared": Mutant(
        "9", "engine/worker.py", "signed.check(task.sha256)", "pass",
        "tests/engine/test_signature.py", "forges_under",
    ),
    "what a resumed job signs not opened first": Mutant(
        "9", "engine/signature.py", "    for _ in SequentialReader(hashing, message).chunks():\n        pass",
        "    buffer = memoryview(bytearray(source.size))\n    hashing.read_at(0, buffer)",
        "tests/engine/test_signature.py", "takes_over_only",
    ),
    "what is signed not complete": Mutant(
        "9", "engine/signature.py", "missing.append(line)", "pass", "tests/engine/test_signature.py", "every_change",
    ),
    "another pattern of a key map than the first": Mutant(
        "8", "keys/partition.py", "if found is not None and (best is None or found[0] < best[0]):",
        "if found is not None:", "tests/keys/test_partition.py", "first_pattern",
    ),
    "a key deleted although others could not be proved": Mutant(
        "18", "engine/erasure.py", "if unproved and not allow_unproved:", "if False:",
        "tests/engine/test_erasure.py", "nothing_is_scheduled",
    ),
    "what an erased key still opens not asked": Mutant(
        "18", "engine/erasure.py", "key.schedule(window)", "key.state = PENDING",
        "tests/engine/test_erasure.py", "one_key_opens",
    ),
    "an object of a store taken over whatever its ETag": Mutant(
        "28", "engine/run.py", "proved and finished is not None and finished.made == made",
        "proved and finished is not None",
        "tests/engine/test_resume_stores.py", "altered_or_swapped",
    ),
    "a finished file taken over although it changed since": Mutant(
        "12", "engine/run.py", "finished is not None and found.changed <= finished.noted", "finished is not None",
        "tests/engine/test_resume.py", "looks_as_before",
    ),
    "a line of the journal believed whoever wrote it": Mutant(
        "12", "engine/journal.py", "return bytes_eq(self.next(text), tag)", "return bool(self.next(text))",
        "tests/engine/test_resume.py", "somebody_else_altered",
    ),
    "a finished folder of other sources taken for this job's": Mutant(
        "12", "engine/complete.py", "if not ending.sources or ending.sources != _sources(job):", "if False:",
        "tests/engine/test_resume.py", "other_sources_or_settings",
    ),
    "a finished folder found done although it changed since": Mutant(
        "12", "engine/complete.py", "if latest > ending.time:", "if False:",
        "tests/engine/test_resume.py", "was_altered",
    ),
    "a single file of another source found done": Mutant(
        "12", "engine/complete.py", "there is not None and there == _digest_of_source(job)", "there is not None",
        "tests/engine/test_resume.py", "own_is_not_replaced",
    ),
    "any message taken for a part of a journal": Mutant(
        "28", "engine/journal.py", "if header.frame_length != _PART_FRAME_LENGTH:", "if False:",
        "tests/engine/test_resume_stores.py", "somebody_else_wrote",
    ),
    "uploads of others aborted": Mutant(
        "28", "stores.py", "if ended or record.writer in of:", "if True:",
        "tests/engine/test_resume_stores.py", "open_uploads",
    ),
    "tag of an object of the S3 Encryption Client not checked": Mutant(
        "1", "s3client.py",
        'raise IntegrityError("the object did not authenticate: it was altered or truncated") from None', "pass",
        "tests/engine/test_s3client.py", "no_altered_bit",
    ),
    "commitment of such an object not compared": Mutant(
        "5", "s3client.py", "if not hmac.compare_digest(commitment, envelope.commitment):", "if False:",
        "tests/engine/test_s3client.py", "no_altered_bit",
    ),
    "the algorithm of such an object not bound to its key": Mutant(
        "6", "s3client.py", "if envelope.context.get(_ALGORITHM_PAIR) != algorithm:", "if False:",
        "tests/engine/test_s3client.py", "does_not_commit",
    ),
    "what is read again not held against what was authenticated": Mutant(
        "7", "s3client.py", "if not hmac.compare_digest(_digest(block), self._digests[index]):", "if False:",
        "tests/engine/test_s3client.py", "other_bytes",
    ),
    "changed sources not noticed": Mutant(
        "29", "storage.py", "        if not unchanged:", "        if False:",
        "tests/engine/test_engine.py", "source_that_changes",
    ),
}  # fmt: skip


def outcome(folder: Path, mutant: Mutant) -> int:
    """pytest's exit status for the mutant's tests within a copy: 0 passed, 1 failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.tests]
    command += ["-k", mutant.keyword] if mutant.keyword else []
    command += ["-m", mutant.marker] if mutant.marker else []
    environment = os.environ | {"PYTHONPATH": str(folder), "STREAMCRYPT_VECTORS": str(VECTORS)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    for name in ("streamcrypt", "tests"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def test_the_line_of_every_mutant_is_there_once():
    """In the default run: what a campaign changes next week is changed in the code today."""
    lost = [
        name
        for name, mutant in MUTANTS.items()
        if (REPOSITORY / "streamcrypt" / mutant.file).read_text().count(mutant.old) != 1
    ]
    assert lost == []


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_every_mutant_is_caught(campaign, copy):
    run = campaign("5")
    healthy = {}
    chosen = list(MUTANTS.items())[: run.number(len(MUTANTS))]
    for name, mutant in chosen:
        path = copy / "streamcrypt" / mutant.file
        source = path.read_text()
        key = (mutant.tests, mutant.keyword)
        if key not in healthy:
            healthy[key] = outcome(copy, mutant)
        failure = None
        if healthy[key] != 0:
            failure = f"{name}: its test is red without it"
        else:
            path.write_text(source.replace(mutant.old, mutant.new))
            status = outcome(copy, mutant)
            path.write_text(source)
            if status != 1:
                failure = f"{name}: not caught (pytest ended with {status})"
        run.trial(failure, mutant=name, item=mutant.item)
    run.finish()
