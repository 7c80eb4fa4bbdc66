"""Campaigns on bytes and trees: fuzzed headers, flipped bits, files that were moved about (RELIABILITY 1, 3, 7, 9)."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest
from families import craft, fuzz
from families.craft import Draft
from families.keyrings import CRAFT_KEYRING
from families.sources import MemorySource, dribble
from families.trees import make_tree, read_tree
from families.vectors import VECTORS

import streamcrypt as sc
from streamcrypt.engine.spans import MANIFEST
from streamcrypt.errors import StreamcryptError
from streamcrypt.keys.materials import Materials
from streamcrypt.message.suites import CommitmentPolicy
from streamcrypt.streams import DecryptingFile, ReadingRules, open_message, open_stream

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]

MATERIALS = Materials(CRAFT_KEYRING)
RULES = ReadingRules(commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_ALLOW_DECRYPT)


def test_million_fuzzed_headers(campaign):
    """A value or FormatError/LimitExceededError, in under 50 ms of processor time each."""
    run = campaign("3")
    rng = random.Random(run.seed)
    seeds = fuzz.seeds() + [
        v.message[: v.test["header-length"]] for v in VECTORS.values() if "header-length" in v.test
    ]
    slowest, accepted = 0.0, 0
    for _ in range(run.number(1_000_000)):
        data = fuzz.random_mutation(rng, rng.choice(seeds))
        started = time.thread_time()
        failure = None
        try:
            accepted += fuzz.header_or_refusal(data, rng.choice((None, 10))) is not None
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}; {data.hex()}"
        elapsed = time.thread_time() - started
        slowest = max(slowest, elapsed)
        if elapsed > 0.05:
            failure = f"{elapsed:.3f} s for {data.hex()}"
        run.trial(failure, quiet=True)
    run.notes = {"seeds": len(seeds), "accepted": accepted, "slowest_ms": round(slowest * 1000, 2)}
    run.finish()


def whole(message):
    open_message(message, MATERIALS, RULES)


def streamed(message):
    for _ in open_stream(dribble(message, 500), MATERIALS, RULES):
        pass


def seekable(message):
    with DecryptingFile(MemorySource(message), MATERIALS, RULES) as file:
        if file.header.suite.signed:
            file.verify_signature()
        file.read()


def test_random_flips(campaign):
    """10^5 flipped bits in messages of all suites, framed and unframed, through three ways in."""
    run = campaign("1")
    rng = random.Random(run.seed)
    messages = [
        craft.assemble(Draft(suite_id, os.urandom(size), frame_length)).join()
        for suite_id in craft.SUITES
        for frame_length in (0, 128, 4096)
        for size in (0, 1000, 5000)
    ]
    ways = (whole, streamed, seekable)
    classes: dict[str, int] = {}
    for number in range(run.number(100_000)):
        message = bytearray(rng.choice(messages))
        bit = rng.randrange(8 * len(message))
        message[bit // 8] ^= 1 << bit % 8
        failure = None
        try:
            ways[number % 3](bytes(message))
        except StreamcryptError as error:
            classes[type(error).__name__] = classes.get(type(error).__name__, 0) + 1
        except BaseException as error:
            failure = f"{type(error).__name__} for bit {bit} of {bytes(message).hex()}"
        else:
            failure = f"accepted: bit {bit} of {bytes(message).hex()}"
        run.trial(failure, quiet=True)
    run.notes = {"classes": classes}
    run.finish()


def test_flips_in_a_large_message(campaign):
    """Flipped bits in 100 MiB, found by verifying the frame that holds them."""
    run = campaign("1")
    rng = random.Random(run.seed)
    plaintext = bytes(100 * 2**20)
    message = craft.assemble(Draft(0x0478, plaintext, 2**20)).join()
    data = bytearray(message)
    source = MemorySource(b"")
    source.data, source.size = data, len(data)  # type: ignore[assignment]  # changed under the reader
    header_length = len(message) - 100 * (2**20 + 32) - 40
    for _ in range(run.number(2_000)):
        bit = rng.randrange(8 * header_length, 8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        failure = None
        frame = (bit // 8 - header_length) // (2**20 + 32)
        try:
            with DecryptingFile(source, MATERIALS, RULES) as file:
                file.read_at(min(frame * 2**20, len(plaintext) - 1), 1)
        except StreamcryptError:
            pass
        except BaseException as error:
            failure = f"{type(error).__name__} for bit {bit}"
        else:
            failure = f"accepted: bit {bit}"
        data[bit // 8] ^= 1 << bit % 8
        run.trial(failure, quiet=True)
    run.finish()


CHANGES = (
    "remove", "swap", "copy", "rename", "move", "older", "another's", "cut", "extend", "flip", "link", "manifest",
)  # fmt: skip


def change(rng: random.Random, root: Path, other: Path) -> str:
    """Do to a tree what whoever has the storage can do; returns what it was."""
    names = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    one, two = rng.choice(names), rng.choice(names)
    data = {path: bytearray(path.read_bytes()) for path in (one, two)}
    what = rng.choice(CHANGES)
    made = {one: data[one]}
    if what == "remove":
        made = {}
    elif what == "swap":
        made = {one: data[two], two: data[one]}
    elif what in ("copy", "rename"):
        made = {one.with_name(f"new{rng.randrange(4)}"): data[one]} | (made if what == "copy" else {})
    elif what == "move":
        made = {root / "folder" / one.name: data[one]}
    elif what == "older":
        if (other / one.relative_to(root)).exists():
            made = {one: bytearray((other / one.relative_to(root)).read_bytes())}
    elif what == "another's":
        made = {
            one: bytearray(rng.choice([path for path in other.rglob("*") if path.is_file()]).read_bytes())
        }
    elif what == "cut":
        del data[one][rng.randrange(len(data[one])) :]
    elif what == "extend":
        data[one] += rng.randbytes(rng.randrange(1, 50))
    elif what == "flip":
        data[one][rng.randrange(len(data[one]))] ^= 1 << rng.randrange(8)
    elif what == "manifest":
        made[root / MANIFEST] = bytearray((other / MANIFEST).read_bytes())
    one.unlink()
    if what == "link" and one != two:
        one.symlink_to(two)
        return what
    for path, content in made.items():
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content or b"x")
    return what


def test_trees_that_were_changed(campaign, tmp_path):
    """One to four changes to a tree, its manifest's replacement by another tree's among them: verify and
    decrypt name exactly the files that are not what the manifest says, and nothing of these is written."""
    run = campaign("9")
    rng = random.Random(run.seed)
    keys = CRAFT_KEYRING
    files = {name: 100 + number for number, name in enumerate(("a", "b", "c", "d/e", "d/f", "d/g/h"))}
    contents = make_tree(tmp_path / "in", files)
    for tree in ("one", "two"):
        sc.encrypt(tmp_path / "in", tmp_path / tree, keys=keys, fsync=False)
    written = {tree: read_tree(tmp_path / tree) for tree in ("one", "two")}
    tried: dict[str, int] = {}
    whole = 0
    target, plain = tmp_path / "changed", tmp_path / "plain"
    for _ in range(run.number(1_000)):
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(plain, ignore_errors=True)
        shutil.copytree(tmp_path / "one", target)
        changes = []
        for _ in range(rng.randint(1, 4)):
            if len(read_tree(target)) > 1:
                changes.append(change(rng, target, tmp_path / "two"))
        for what in changes:
            tried[what] = tried.get(what, 0) + 1
        found = read_tree(target)
        found |= {str(path.relative_to(target)): b"link" for path in target.rglob("*") if path.is_symlink()}
        manifest = found.pop(MANIFEST)
        right = dict(written["one" if manifest == written["one"][MANIFEST] else "two"])
        del right[MANIFEST]
        wrong = {name for name in {*found, *right} if found.get(name) != right.get(name)}
        failure = None
        for act in (
            lambda: sc.verify(target, keys=keys),
            lambda: sc.decrypt(target, plain, keys=keys, fsync=False),
        ):
            named: set[str] = set()
            try:
                act()
            except StreamcryptError as error:
                named = {failed.path for failed in error.report.failed}
            except BaseException as error:
                named = {f"{type(error).__name__}: {error}"}
            if named != wrong:
                failure = f"after {changes}: named {sorted(named)}, wrong are {sorted(wrong)}"
        decrypted = read_tree(plain)
        decrypted.pop("_streamcrypt/journal", None)  # of a job that may go on when what is a link is a file
        if decrypted != {name: data for name, data in contents.items() if name not in wrong}:
            failure = failure or f"after {changes}: decrypted {sorted(decrypted)}"
        whole += not wrong
        run.trial(failure, changes=changes)
    run.notes = {"changes": tried, "left_as_they_were": whole}
    run.finish()
