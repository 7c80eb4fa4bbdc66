"""The tests themselves: in any order, in odd surroundings (RELIABILITY 35)."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamcrypt as sc

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
