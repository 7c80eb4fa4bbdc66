"""The command in odd surroundings: locale, time zone, home, current folder (RELIABILITY 35)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import streamcrypt as sc

REPOSITORY = str(Path(sc.__file__).parents[1])

# What is set, or taken away (None).
SURROUNDINGS: dict[str, dict[str, str | None]] = {
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX without UTF-8 output": {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
    "an unknown locale": {"LC_ALL": "xx_YY.nonsense", "LANG": "xx"},
    "far east": {"TZ": "Pacific/Kiritimati"},
    "no such time zone": {"TZ": "nonsense"},
    "no home": {"HOME": None, "XDG_DATA_HOME": None, "LOGNAME": None, "USER": None},
    "a home that is not there": {"HOME": "/nonexistent/home", "XDG_CONFIG_HOME": "/nonexistent/config"},
    "no temporary folder": {"TMPDIR": "/nonexistent/tmp"},
    "no path": {"PATH": None},
    "every warning an error": {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"},
    "a terminal of one column": {"COLUMNS": "1", "LINES": "1", "TERM": "dumb"},
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_there_and_back(surroundings: dict[str, str | None], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": REPOSITORY}
    for name, value in surroundings.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    (tmp_path / "key").write_bytes(os.urandom(32))
    (tmp_path / "key").chmod(0o600)
    names = ["plain", "nañdú 𝄞.bin", os.fsdecode(b"not utf-8 \xff\xfe")]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    nowhere.chmod(0o500)

    def command(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "streamcrypt", *words, "--key", f"raw-aes:t/k@{tmp_path / 'key'}"],
            env=environment,
            cwd=nowhere,
            capture_output=True,
        )

    for words in (
        ("encrypt", f"{tmp_path}/in", f"{tmp_path}/enc", "--context", "Place=Cologne"),
        ("verify", f"{tmp_path}/enc", "--against", f"{tmp_path}/in"),
        ("decrypt", f"{tmp_path}/enc", f"{tmp_path}/dec", "--context", "Place=Cologne"),
    ):
        done = command(*words)
        assert done.returncode == 0, done.stderr.decode()
    for name in names:
        plain = (tmp_path / "dec" / name).read_bytes()
        assert plain == name.encode("utf-8", "surrogateescape")
    message = sc.encrypt_bytes(b"", keys=f"raw-aes:t/k@{tmp_path / 'key'}", context={"Ort": "Köln 𝄞"})
    (tmp_path / "message").write_bytes(message)
    shown = subprocess.run(
        [sys.executable, "-m", "streamcrypt", "inspect", tmp_path / "message"],
        env=environment,
        capture_output=True,
    )
    assert shown.returncode == 0, shown.stderr.decode()
    assert b"Ort=K" in shown.stdout
    failed = command("decrypt", f"{tmp_path}/in/{names[1]}", f"{tmp_path}/no")
    assert failed.returncode == 1
    assert failed.stderr.count(b"\n") == 1
    assert failed.stderr.startswith(b"streamcrypt: error: ")
