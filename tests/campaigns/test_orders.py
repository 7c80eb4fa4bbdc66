"""The tests themselves in any order and in odd surroundings, and jobs whose clock jumps (RELIABILITY 35)."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from families.trees import leftovers, make_tree, read_tree

import streamcrypt as sc
from streamcrypt.kms import open_service

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]

REPOSITORY = Path(sc.__file__).parents[1]
VECTORS = os.environ.get("STREAMCRYPT_VECTORS", REPOSITORY.parent / "shared" / "vectors")
# Every layer, without the readers, whose libraries take longer to load than the tests to run.
MODULES = (
    "tests/message/test_header.py", "tests/message/test_frames.py", "tests/message/test_context.py",
    "tests/message/test_commitment.py", "tests/keys/test_data_key_cache.py", "tests/keys/test_materials.py",
    "tests/keys/test_raw_keyrings.py", "tests/keys/test_reference.py", "tests/keys/test_hygiene.py",
    "tests/kms/test_store.py", "tests/kms/test_policy.py", "tests/kms/test_audit.py",
    "tests/engine/test_streams.py", "tests/engine/test_resume.py", "tests/cli/test_cli.py",
)  # fmt: skip
SURROUNDINGS = (
    {},
    {"LC_ALL": "C"},
    {"TZ": "Pacific/Kiritimati"},
    {"TZ": "America/St_Johns", "LC_ALL": "POSIX"},
    {"HOME": "/nonexistent/home"},
    {"PYTHONHASHSEED": "0"},
    {"PYTHONDEVMODE": "1"},
)

FAKETIME = next(Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1"), None)


def test_fifty_orders(campaign, tmp_path):
    run = campaign("35")
    rng = random.Random(run.seed)
    passed = 0
    for number in range(run.number(50)):
        seed, surroundings = rng.randrange(2**31), SURROUNDINGS[number % len(SURROUNDINGS)]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--shuffle={seed}"]
        command += [f"--basetemp={tmp_path / 'tests'}", *MODULES]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "STREAMCRYPT_VECTORS": str(VECTORS)}
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment | surroundings, capture_output=True, text=True
        )
        failure = None
        if done.returncode != 0:
            failure = f"seed {seed} with {surroundings}: {done.stdout[-2000:]}"
        passed += sum(map(int, re.findall(r"(\d+) passed", done.stdout)))
        run.trial(failure, seed=seed, surroundings=surroundings)
    run.notes = {"tests_passed": passed}
    run.finish()


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
def test_clocks_that_jump(campaign, home, tmp_path):
    """The wall clock jumps by up to ten years, every few milliseconds and in each process, while a tree is
    encrypted, killed, resumed, resumed once more and decrypted.

    The clock that measures spans does not jump, and so neither does the age of a data key.
    """
    run = campaign("35")
    rng = random.Random(run.seed)
    contents = make_tree(tmp_path / "in", {f"{n % 5}/f{n:03}": 10_000 + n for n in range(300)})
    service = open_service(home)
    service.create_alias(AliasName="alias/one", TargetKeyId=service.create_key()["KeyMetadata"]["KeyId"])
    service.close()
    encrypted, plain, setting = tmp_path / "enc", tmp_path / "dec", tmp_path / "setting"
    setting.write_text("+0\n")
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(setting),
        "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",  # a clock that jumps takes no time of a file along
    }  # fmt: skip
    over, jumps = threading.Event(), 0

    def jump():
        nonlocal jumps
        chance = random.Random(run.seed)
        while not over.wait(chance.uniform(0, 0.01)):
            setting.with_name("next").write_text(f"{chance.uniform(-3e8, 3e8):+.3f}\n")
            setting.with_name("next").rename(setting)
            jumps += 1

    def command(*words, kill_after=None):
        """The report; an empty one of a run that was killed."""
        started = subprocess.Popen(
            [sys.executable, "-m", "streamcrypt", *map(str, words), "--workers", "2", "--json"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            out, err = started.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            started.kill()
            out, err = started.communicate()
            for left in Path("/dev/shm").glob(f"*faketime_s*_{started.pid}"):  # libfaketime's own
                left.unlink()
        if started.returncode < 0:
            return {}
        if started.returncode:
            raise AssertionError(f"{words[0]} ended with {started.returncode}: {err}")
        return json.loads(out)

    jumping = threading.Thread(target=jump)
    jumping.start()
    interrupted, usual = 0, 1.0
    try:
        for number in range(run.number(50)):
            shutil.rmtree(encrypted, ignore_errors=True)
            shutil.rmtree(plain, ignore_errors=True)
            key, failure, reports = ("--key", "local:alias/one"), None, []
            try:
                if number:
                    reports.append(
                        command(
                            "encrypt", tmp_path / "in", encrypted, *key, kill_after=rng.uniform(0.3, usual)
                        )
                    )
                started = time.monotonic()
                resume = ("encrypt", tmp_path / "in", encrypted, *key, "--resume")
                reports += [command(*resume), command(*resume)]
                if not number:
                    usual = time.monotonic() - started
                if reports[-1]["skipped"] != len(contents):
                    failure = "a finished job was not found done"
                if any(report.get("data_keys", 0) > 1 for report in reports):
                    failure = "a data key was taken to have aged"
                sc.verify(encrypted, against=tmp_path / "in", keys="local:alias/one")
                command("decrypt", encrypted, plain, "--key", "local:alias/one")
                found = read_tree(plain)
                if found != contents:
                    failure = "decrypted to something else"
                if leftovers(tmp_path):
                    failure = "temporary files were left"
            except BaseException as error:
                failure = f"{type(error).__name__}: {error}"
            interrupted += {} in reports
            run.trial(failure, interrupted={} in reports)
    finally:
        over.set()
        jumping.join()
    run.notes = {"jumps": jumps, "interrupted": interrupted}
    run.finish()
