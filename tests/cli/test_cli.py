"""The command line from outside: interrupts, streams, terminals, start-up; and from inside: errors and codes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import streamcrypt as sc
from streamcrypt.cli import main, output
from streamcrypt.errors import (
    ContextMismatchError,
    DestinationError,
    FormatError,
    IntegrityError,
    KeyAccessError,
    KeyUnavailableError,
    LimitExceededError,
    SourceError,
    TemporaryError,
    WrappedKeyError,
)
from streamcrypt.kms import open_service
from streamcrypt.kms.errors import KmsError

COMMAND = os.path.join(os.path.dirname(sys.executable), "streamcrypt")
KEY = "local:alias/test"
MIB = 2**20


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a home with one key."""
    service = open_service(home)
    key = service.call("CreateKey", {})["KeyMetadata"]["KeyId"]
    service.call("CreateAlias", {"AliasName": "alias/test", "TargetKeyId": key})
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


# -- errors to words and codes

CODES = {
    0: [SystemExit(0), SystemExit(None)],
    1: [
        SourceError("x"),
        DestinationError("x"),
        LimitExceededError("x"),
        FormatError("x", recognised=False),
        sc.StreamcryptError("x"),
        OSError(28, "No space left on device", "f"),
        ImportError("streamcrypt.torch needs torch: pip install 'streamcrypt[torch]'"),
        KeyError("x"),
        TypeError("x"),
        MemoryError(),
        KmsError("AlreadyExistsException", "x"),
    ],
    2: [ValueError("x"), output.UsageError("x"), KmsError("ValidationException", "x")],
    3: [IntegrityError("x"), FormatError("x"), KmsError("KMSInvalidSignatureException")],
    4: [
        KeyAccessError("x", code="AccessDeniedException"),
        ContextMismatchError("x"),
        WrappedKeyError("x"),
        KmsError("NotFoundException", "x"),
        KmsError("KMSInvalidStateException", "x"),
    ],
    5: [TemporaryError("x"), KeyUnavailableError("x"), KmsError("ThrottlingException")],
    130: [KeyboardInterrupt()],
}


@pytest.mark.parametrize(
    ("code", "error"), [(code, error) for code, errors in CODES.items() for error in errors], ids=str
)
def test_exit_codes(code: int, error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert output.fail(error, []) == code
    told = capsys.readouterr()
    assert told.out == ""
    if code:
        assert told.err.startswith("streamcrypt: error: ")
        assert told.err.count("\n") == 1


def test_an_internal_error_hides_its_values_and_says_how_to_see_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(output.DEBUG_VARIABLE, raising=False)
    output.fail(KeyError(b"secret plaintext"), [])
    told = capsys.readouterr().err
    assert (
        told
        == "streamcrypt: error: internal error: KeyError; please report it, with what STREAMCRYPT_DEBUG=1 shows\n"
    )


def test_debugging_shows_the_traceback_but_no_locals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a").write_bytes(b"SECRET-PLAINTEXT")
    environment = os.environ | {output.DEBUG_VARIABLE: "1"}
    done = subprocess.run(
        [COMMAND, "decrypt", "a", "b"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "SECRET-PLAINTEXT" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("streamcrypt: error: ")


def test_a_name_with_a_line_break_makes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    output.fail(SourceError("a\nstreamcrypt: error: forged\x1b[2J: does not exist"), [])
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "\x1b" not in told


# -- JSON

REPORT = {
    "operation", "files", "bytes_in", "bytes_out", "seconds", "bytes_per_second", "cpu_seconds",
    "peak_memory", "workers", "data_keys", "cache", "skipped", "failed", "kms", "advice",
}  # fmt: skip


def run_json(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main([*words, "--json"])
    given = capfd.readouterr().out
    assert given.count("\n") == 1
    found = json.loads(given)
    assert isinstance(found, dict)
    return code, found


def shape(value: Any) -> Any:
    return {name: shape(member) for name, member in value.items()} if isinstance(value, dict) else type(value)


def test_the_report_has_the_documented_shape_on_success_and_on_failure(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "t").mkdir()
    (folder / "t" / "a").write_bytes(bytes(100_000))
    code, encrypted = run_json(capfd, "encrypt", "t", "t.enc", "--key", KEY, "--no-cache")
    assert (code, encrypted["files"], encrypted["bytes_in"]) == (0, 1, 100_000)
    assert encrypted.keys() >= REPORT
    assert encrypted["cpu_seconds"] > 0
    assert encrypted["peak_memory"] > 10_000_000
    for words in (["verify", "t.enc"], ["decrypt", "t.enc", "back"], ["rekey", "t.enc", "new", "--key", KEY]):
        code, found = run_json(capfd, *words)
        assert (code, found["files"], found["failed"]) == (0, 1, [])
        assert found.keys() >= REPORT
        assert shape(found["cache"]) == shape(encrypted["cache"])
        assert found["kms"].keys() == {"calls", "latency_ms", "throttled", "retries"}
        assert found["kms"]["latency_ms"].keys() == {"p50", "p90", "p99", "max"}

    # Failed before it began, and failed in a file.
    code, found = run_json(capfd, "decrypt", "missing", "x")
    assert (code, found["exit_code"], found["files"]) == (1, 1, 0)
    assert found["failed"] == [{"path": "missing", "error": "missing: does not exist"}]
    assert shape(found["cache"]) == shape(encrypted["cache"])
    (folder / "t.enc" / "a").write_bytes(b"no message")
    code, found = run_json(capfd, "verify", "t.enc")
    assert (code, found["exit_code"]) == (3, 3)  # the manifest lists a message there
    assert [failure["path"] for failure in found["failed"]] == ["a"]
    assert found.keys() >= REPORT | {"error", "exit_code"}
    # Of several, each has its own error; how many they are is said of the whole.
    (folder / "t.enc" / "b").write_bytes(b"added")
    code, found = run_json(capfd, "verify", "t.enc")
    assert {failure["path"] for failure in found["failed"]} == {"a", "b"}
    assert [failure["error"] for failure in found["failed"] if "files failed" in failure["error"]] == []
    assert found["error"].endswith("(2 of 2 files failed)")
    with pytest.raises(sc.IntegrityError, match="2 of 2 files failed") as caught:
        sc.verify("t.enc")
    assert not any("files failed" in str(failure.error) for failure in caught.value.report.failed)  # type: ignore[attr-defined]
    assert main(["verify", "t.enc"]) == 3
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_inspect_and_usage_errors_are_json_too(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "a").write_bytes(bytes(3 * MIB))
    assert main(["encrypt", "a", "a.enc", "--key", KEY, "--context", "A=1", "B=2", "--quiet"]) == 0
    code, found = run_json(capfd, "inspect", "a.enc")
    assert code == 0
    assert (found["encryption_context"], found["frames"], found["plaintext_size"]) == (
        {"A": "1", "B": "2"},
        4,
        3 * MIB,
    )
    code, found = run_json(capfd, "encrypt", "a")
    assert (code, found["exit_code"]) == (2, 2)
    code, found = run_json(capfd, "inspect", "missing")
    assert (code, found["exit_code"], found["failed"][0]["path"]) == (1, 1, "missing")
    for words in (
        ("plan",),
        ("report", "missing", "--out", "page.html"),
        ("bench", "compare", "missing", "missing"),
        ("bench", "kms", "--kms", "aws"),
        ("kms", "env", "--user", "a b"),
    ):
        code, found = run_json(capfd, *words)
        assert (code, found["exit_code"]) == (2, 2), words
        assert found["failed"][0]["error"] == found["error"], words


# -- one message


def test_cat_reads_only_the_frames_that_cover_the_range(folder: Path, tmp_path: Path) -> None:
    plaintext = os.urandom(40 * 64 * 1024)
    (folder / "a").write_bytes(plaintext)
    assert main(["encrypt", "a", "a.enc", "--key", KEY, "--frame-size", "64KiB", "--quiet"]) == 0
    # Any frame but the second and the final one is destroyed: reading it would fail.
    message = bytearray((folder / "a.enc").read_bytes())
    header = sc.inspect(folder / "a.enc").header_length
    frame = 4 + 12 + 64 * 1024 + 16
    for index in range(40):
        if index != 1:
            message[header + index * frame + 16 + 5] ^= 1
    (folder / "a.enc").write_bytes(message)
    done = subprocess.run(
        [COMMAND, "cat", "a.enc", "--range", "64KiB:128KiB"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == plaintext[64 * 1024 : 128 * 1024]
    assert subprocess.run([COMMAND, "cat", "a.enc"], capture_output=True, check=False).returncode == 3


# -- streams


def test_a_dry_run_of_a_stream_uses_no_key_and_writes_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a").write_bytes(b"plaintext")
    assert main(["encrypt", "a", "a.enc", "--key", KEY, "--quiet"]) == 0
    for words in (
        ("encrypt", "-", "new", "--key", KEY),
        ("encrypt", "a", "-", "--key", KEY),
        ("decrypt", "-", "new"),
        ("decrypt", "a.enc", "-"),
        ("rekey", "-", "-", "--key", KEY),
    ):
        with open(folder / "a.enc", "rb") as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            assert main([*words, "--dry-run", "--json"]) == 0, words
            assert stdin.tell() == 0, words
        told = capfd.readouterr()
        found = json.loads(told.err if "-" in words[2] else told.out)
        assert (found["dry_run"], found["files"], found["kms"]["calls"]) == (True, 1, {}), words
        assert not (folder / "new").exists(), words
        assert told.out == "" or words[2] != "-", words


def peak_memory(command: list[str], length: int) -> tuple[int, int]:
    """Peak resident bytes of a command that is fed ``length`` zeros, and how many bytes it wrote."""
    peak = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def feed() -> None:
            nonlocal peak
            block = bytes(MIB)
            with process.stdin as pipe:  # type: ignore[union-attr]
                for _ in range(length // MIB):
                    pipe.write(block)
                # Not getrusage: its figure begins with that of the process that forked.
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                peak = int(status.split("VmHWM:")[1].split()[0]) * 1024

        feeder = threading.Thread(target=feed)
        feeder.start()
        written = 0
        while block := process.stdout.read(MIB):
            written += len(block)
        feeder.join()
    assert process.returncode == 0
    return peak, written


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_streams_pass_in_constant_memory(folder: Path) -> None:
    command = [COMMAND, "encrypt", "-", "-", "--key", KEY, "--quiet"]
    small, _ = peak_memory(command, 16 * MIB)
    large, written = peak_memory(command, 256 * MIB)
    assert written > 256 * MIB
    assert large < small + 16 * MIB
    assert large < 150 * MIB


# -- interrupts


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
@pytest.mark.parametrize("command", ["encrypt", "decrypt"])
def test_an_interrupt_leaves_nothing_partial(folder: Path, command: str, number: signal.Signals) -> None:
    (folder / "plain").write_bytes(os.urandom(8 * MIB))
    assert main(["encrypt", "plain", "message", "--key", KEY, "--quiet"]) == 0
    data = (folder / {"encrypt": "plain", "decrypt": "message"}[command]).read_bytes()
    keys = ["--key", KEY] if command == "encrypt" else []
    with subprocess.Popen(
        [COMMAND, command, "-", "out", *keys],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test run under nohup, or in the background of a shell, hands down signals that are ignored.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        # All of it but the end: when the pipe has taken this, the command is in the middle of its work.
        process.stdin.write(data[:-1000])
        process.stdin.flush()
        assert [name for name in os.listdir() if name.startswith(".streamcrypt-")], "it has begun"
        process.send_signal(number)
        told = process.stderr.read().decode()
        assert process.wait(30) == 130
    assert told.startswith("streamcrypt: error: interrupted: ")
    assert told.count("\n") == 1
    assert sorted(os.listdir()) == ["message", "plain"]


def test_an_interrupted_folder_holds_whole_files_and_is_resumed(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "t").mkdir()
    for index in range(3000):
        (folder / "t" / f"{index:04}").write_bytes(bytes(10_000))
    with subprocess.Popen(
        [COMMAND, "encrypt", "t", "t.enc", "--key", KEY, "--workers", "2"], stderr=subprocess.PIPE
    ) as process:
        # Lists of 64 files go to the workers; a file counts as finished when its list came back.
        while len(list((folder / "t.enc").glob("[0-9]*"))) < 600:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        told = process.stderr.read().decode()
        assert process.wait(30) == 130, told
    assert told.count("\n") == 1
    made = [
        path
        for path in (folder / "t.enc").rglob("*")
        if path.is_file() and path.parent.name != "_streamcrypt"
    ]
    assert 600 <= len(made) < 3000
    for path in made:
        assert not path.name.startswith(".streamcrypt-")
        assert sc.inspect(path).plaintext_size == 10_000
    assert main(["verify", "t.enc", "--no-manifest", "--quiet"]) == 0

    # Without --resume what is there is not touched; with it the rest is done.
    assert main(["encrypt", "t", "t.enc", "--key", KEY, "--quiet"]) == 1
    capfd.readouterr()
    code, found = run_json(capfd, "encrypt", "t", "t.enc", "--key", KEY, "--resume")
    assert (code, found["files"] + found["skipped"]) == (0, 3000)
    assert 64 <= found["skipped"] <= len(made)
    assert main(["verify", "t.enc", "--against", "t", "--quiet"]) == 0


# -- the terminal


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Run with standard error on a terminal; its exit code, and what the terminal got."""
    main_end, other_end = pty.openpty()
    with subprocess.Popen(command, stderr=other_end, stdout=subprocess.DEVNULL) as process:
        os.close(other_end)
        shown = b""
        try:
            while block := os.read(main_end, 4096):
                shown += block
        except OSError:
            pass  # the other end is closed
    os.close(main_end)
    return process.returncode, shown.decode()


def test_progress_is_drawn_on_a_terminal_only(folder: Path) -> None:
    (folder / "a").write_bytes(bytes(64 * MIB))
    command = [COMMAND, "encrypt", "a", "a.enc", "--key", KEY, "--overwrite"]
    code, shown = on_a_terminal(command)
    assert code == 0
    assert "%" in shown
    assert shown.rstrip().splitlines()[-1].lstrip("\r\x1b[K").startswith("encrypted 1 file")
    code, shown = on_a_terminal([*command, "--quiet"])
    assert (code, shown) == (0, "")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr
    assert done.stderr.count("\n") == 1


# -- start-up

HEAVY = {
    "boto3",
    "botocore",
    "pyarrow",
    "numpy",
    "pandas",
    "fsspec",
    "ray",
    "torch",
    "asyncio",
    "ssl",
    "urllib.request",
}


def imported_by(*words: str) -> set[str]:
    code = f"import sys; from streamcrypt.cli import main; main({list(words)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_version_imports_next_to_nothing(home: Path) -> None:
    modules = imported_by("--version")
    assert not modules & (HEAVY | {"argparse", "cryptography", "sqlite3", "dataclasses", "re", "json"})
    assert {name for name in modules if name.startswith("streamcrypt")} == {"streamcrypt", "streamcrypt.cli"}


def test_a_small_job_imports_nothing_heavy(folder: Path) -> None:
    (folder / "a").write_bytes(bytes(1024))
    modules = imported_by("encrypt", "a", "a.enc", "--key", KEY, "--quiet")
    assert not modules & HEAVY
    unneeded = {
        "subprocess", "multiprocessing", "socket", "ctypes", "logging", "shutil", "hashlib",
        "streamcrypt.keys.ecdh", "streamcrypt.keys.hierarchy", "cryptography.hazmat.primitives.serialization",
    }  # fmt: skip
    assert not modules & unneeded


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"streamcrypt {sc.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "streamcrypt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"streamcrypt {sc.__version__}\n"


# -- demo


def test_demo_runs_the_main_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code, figures = run_json(capfd, "demo", "--size", "1MiB")
    assert code == 0
    assert figures["read_back"]["same"] is True
    assert figures["rows"] >= 336_776
    assert figures["files"] == figures["encrypt"]["files"] == figures["verify"]["files"] >= 12
    assert figures["encrypt"]["kms"]["calls"] == {"GenerateDataKey": 1}
    assert figures["copy"]["seconds"] > 0
    assert os.listdir(tmp_path) == []
    code, figures = run_json(capfd, "demo", "--size", "1MiB", "--keep")
    assert sorted(os.listdir(figures["folder"])) == ["flights", "flights.enc", "home"]
