"""Bad input, as a person meets it: one line that says what and why, and the right exit code."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import craft
from families.craft import Draft

import streamcrypt as sc
from streamcrypt.kms import open_service

REPOSITORY = Path(sc.__file__).parents[1]
RAW = "raw-aes:tests/aes-256@{folder}/key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sources and messages, good and bad; no test changes them."""
    root = tmp_path_factory.mktemp("bad input")
    (root / "key").write_bytes(craft.WRAPPING_KEY)
    (root / "other").write_bytes(bytes(32))
    for name in ("key", "other"):
        (root / name).chmod(0o600)
    os.environ["STREAMCRYPT_HOME"] = str(root / "home")
    arn = open_service(root / "home").create_key()["KeyMetadata"]["Arn"]
    del os.environ["STREAMCRYPT_HOME"]
    (root / "arn").write_text(arn)
    (root / "plain").write_bytes(b"plaintext\n" * 100)
    (root / "tree").mkdir()
    (root / "tree" / "a").write_bytes(b"a")
    parts = craft.assemble(Draft(0x0478, b"x" * 100, 32))
    message = parts.join()
    files = {
        "good.enc": message,
        "signed.enc": craft.assemble(Draft(0x0578, b"x" * 100, 32)).join(),
        "legacy.enc": craft.assemble(Draft(0x0178, b"x" * 100, 32)).join(),
        "many keys.enc": craft.assemble(Draft(edks=[("a", b"b", b"c")] * 11)).join(),
        "empty": b"",
        "text": b"hello, world\n",
        "parquet": b"PAR1" + bytes(100),
        "base64": base64.b64encode(message),
        "flipped.enc": message[:-20] + bytes((message[-20] ^ 1,)) + message[-19:],
        "header.enc": message[:10] + bytes((message[10] ^ 1,)) + message[11:],
        "cut.enc": message[:-1],
        "cut in header.enc": message[:50],
        "longer.enc": message + b"\0",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    os.mkfifo(root / "pipe")
    (root / "dangling").symlink_to("nothing")
    (root / "device").symlink_to("/dev/null")
    (root / "open file").symlink_to("/proc/self/fd/1")
    return root


def run(folder: Path, *words: str, stdin: bytes = b"", **options) -> subprocess.CompletedProcess[bytes]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "STREAMCRYPT"))
    }
    environment |= {"STREAMCRYPT_HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "streamcrypt", *words]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=240, **options)


def sources(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and folder / "home" not in path.parents]


KEY = "raw-aes:tests/aes-256@key"
OTHER = "raw-aes:tests/aes-256@other"
ELSE = "raw-aes:tests/somewhere@key"

# command line -> exit code, and what the one line must mention
CASES = {
    "not a message": (["decrypt", "text", "OUT", "--key", KEY], 1, "not a message"),
    "another kind of file": (["decrypt", "parquet", "OUT", "--key", KEY], 1, "not a message"),
    "an empty file": (["decrypt", "empty", "OUT", "--key", KEY], 1, "empty"),
    "Base64": (["decrypt", "base64", "OUT", "--key", KEY], 1, "Base64"),
    "inspect text": (["inspect", "text"], 1, "text: not a message"),
    "inspect Base64": (["inspect", "base64"], 1, "Base64"),
    "cat text": (["cat", "text", "--key", KEY], 1, "not a message"),
    "a folder where a file is meant": (["inspect", "tree"], 1, "folder"),
    "cat a folder": (["cat", "tree", "--key", KEY], 1, "folder"),
    "no such file": (["decrypt", "nowhere", "OUT", "--key", KEY], 1, "nowhere"),
    "no such file to encrypt": (["encrypt", "nowhere", "OUT", "--key", KEY], 1, "nowhere"),
    "a dangling link": (["encrypt", "dangling", "OUT", "--key", KEY], 1, "dangling"),
    "a named pipe": (["encrypt", "pipe", "OUT", "--key", KEY], 1, "named pipe"),
    "destination exists": (["encrypt", "plain", "good.enc", "--key", KEY], 1, "exists already"),
    "destination exists, decrypting": (["decrypt", "good.enc", "plain", "--key", KEY], 1, "exists already"),
    "destination is a folder": (["encrypt", "plain", "tree", "--key", KEY], 1, "folder"),
    "destination is a pipe": (["decrypt", "good.enc", "pipe", "--key", KEY, "--overwrite"], 1, "named pipe"),
    "destination is a device": (["decrypt", "good.enc", "/dev/null", "--key", KEY, "--overwrite"], 1, "device"),
    "destination is a link to a device": (["decrypt", "good.enc", "device", "--key", KEY, "--overwrite"], 1, "device"),
    "destination is the output": (["decrypt", "good.enc", "open file", "--key", KEY, "--overwrite"], 1, "written -"),
    "destination named as a folder": (["encrypt", "plain", "new/", "--key", KEY], 1, "name the file"),
    "destination is the source": (["encrypt", "plain", "plain", "--key", KEY, "--overwrite"], 1, "source itself"),
    "destination within the source": (["encrypt", "tree", "tree/enc", "--key", KEY], 1, "within"),
    "no folder for the destination": (["encrypt", "plain", "plain/x", "--key", KEY], 1, "plain/x"),
    "flipped bit": (["decrypt", "flipped.enc", "OUT", "--key", KEY], 3, "did not authenticate"),
    "flipped bit, verify": (["verify", "flipped.enc", "--key", KEY], 3, "did not authenticate"),
    "flipped bit, cat": (["cat", "flipped.enc", "--key", KEY], 3, "flipped.enc: the final frame did not authenticate"),
    "flipped bit in the header": (["decrypt", "header.enc", "OUT", "--key", KEY], 3, "header.enc"),
    "truncated": (["decrypt", "cut.enc", "OUT", "--key", KEY], 3, "does not fit the message"),
    "truncated in its header": (["decrypt", "cut in header.enc", "OUT", "--key", KEY], 3, "truncated"),
    "extended": (["decrypt", "longer.enc", "OUT", "--key", KEY], 3, "longer.enc"),
    "commitment policy": (["decrypt", "legacy.enc", "OUT", "--key", KEY], 3, "require-encrypt-allow-decrypt"),
    "too many wrapped keys": (["decrypt", "many keys.enc", "OUT", "--key", KEY], 1, "limit is 10"),
    "wrong bytes of the key": (["decrypt", "good.enc", "OUT", "--key", OTHER], (3, 4), "key"),
    "another key": (["decrypt", "good.enc", "OUT", "--key", ELSE], 4, "tests/aes-256"),
    "key file missing": (["decrypt", "good.enc", "OUT", "--key", "raw-aes:a/b@no"], (2, 4), "no"),
    "local key missing": (["encrypt", "plain", "OUT", "--key", "local:alias/nobody"], 4, "alias/nobody"),
    "key that is no reference": (["encrypt", "plain", "OUT", "--key", "nonsense"], 2, "nonsense"),
    "wrong context": (["decrypt", "good.enc", "OUT", "--key", KEY, "--context", "k=w"], 4, "context"),
    "missing context": (["verify", "good.enc", "--key", KEY, "--context", "a=b"], 4, "context"),
    "reserved context": (["encrypt", "plain", "OUT", "--key", KEY, "--context", "aws-crypto-x=1"], 2, "reserved"),
    "no key to encrypt": (["encrypt", "plain", "OUT"], 2, "--key"),
    "frame size 0": (["encrypt", "plain", "OUT", "--key", KEY, "--frame-size", "0"], 2, "frame size"),
    "frame size that is none": (["encrypt", "plain", "OUT", "--key", KEY, "--frame-size", "big"], 2, "big"),
    "range that is none": (["cat", "good.enc", "--key", KEY, "--range", "9:3"], 2, "range"),
    "unknown command": (["encipher", "plain"], 2, "encipher"),
    "unknown option": (["inspect", "good.enc", "--keyy", "x"], 2, "keyy"),
    "tree without manifest": (["verify", "tree", "--key", KEY], 3, "manifest"),
    "manifest required": (
        ["decrypt", "tree", "OUT", "--key", KEY, "--require-manifest"], 3, "leave out --require-manifest",
    ),
    "a pipe by its name": (["encrypt", "/dev/stdin", "OUT", "--key", KEY], 1, "written -"),
    "standard input to compare with": (["verify", "good.enc", "--key", KEY, "--against", "-"], 2, "standard input"),
    "a URL of no store": (["encrypt", "plain", "http://host/plain", "--key", KEY], 2, "s3://, gs:// and az://"),
    "a URL to compare with": (["verify", "good.enc", "--key", KEY, "--against", "ftp://h/x"], 2, "--against"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "code", "mentions"), CASES.values(), ids=CASES)
def test_bad_input(folder, tmp_path, words, code, mentions):
    out = tmp_path / "out"
    words = [str(out) if word == "OUT" else word for word in words]
    before = {path: path.stat().st_mtime_ns for path in sources(folder)}
    result = run(folder, *words, cwd=folder)
    error = result.stderr.decode()
    assert result.returncode in (code if isinstance(code, tuple) else (code,)), error
    assert mentions in error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("streamcrypt: error: "), error
    if result.returncode != 2:
        assert len(error.splitlines()) == 1, error
    assert not out.exists()
    assert not list(tmp_path.iterdir())
    assert {p: p.stat().st_mtime_ns for p in sources(folder)} == before


@pytest.mark.parametrize(
    "url",
    [
        "https://host/x",
        "gcs://b/x",
        "hdfs://host/x",
        "file:///tmp/x",
        "crypt::s3://b/x",
        "S3://b/x",
        "s3:/b/x",
    ],
)
def test_a_url_of_no_store_never_becomes_a_folder(folder, tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_bytes(b"plain")
    key = f"raw-aes:tests/aes-256@{folder / 'key'}"
    good = folder / "good.enc"
    calls = (
        lambda place: sc.encrypt("plain", place, keys=key),
        lambda place: sc.encrypt(place, "out", keys=key),
        lambda place: sc.decrypt(good, place, keys=key),
        lambda place: sc.verify(good, against=place, keys=key),
        lambda place: sc.rekey(good, place, keys=key, from_keys=key),
        lambda place: sc.open(place, "wb", keys=key),
        sc.open,
        sc.inspect,
    )
    for place in (url, Path(url)):
        for call in calls:
            with pytest.raises(ValueError, match="begin with s3://, gs:// and az://"):
                call(place)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    (tmp_path / "http:").mkdir()  # such a folder is named by its path
    sc.encrypt("plain", "./http:/x", keys=key)
    assert sc.open("./http:/x", keys=key).read() == b"plain"


def test_a_message_is_not_written_to_a_folder(folder, tmp_path):
    with pytest.raises(sc.StreamcryptError, match="is a folder; name the file"):
        sc.open(tmp_path, "wb", keys=f"raw-aes:tests/aes-256@{folder / 'key'}")
    assert not list(tmp_path.iterdir())


def test_a_damaged_message_on_a_pipe(folder):
    """To standard output goes what was authenticated and no more."""
    good = (folder / "good.enc").read_bytes()
    result = run(folder, "decrypt", "-", "-", "--key", KEY, stdin=good, cwd=folder)
    assert (result.returncode, result.stdout) == (0, b"x" * 100)
    for data, code in ((good[:-1], 3), (good + b"\0", 3), (b"hello", 1), (b"", 1)):
        result = run(folder, "decrypt", "-", "-", "--key", KEY, stdin=data, cwd=folder)
        assert result.returncode == code
        assert result.stdout in (b"", b"x" * 32, b"x" * 64, b"x" * 96)
        assert len(result.stderr.decode().splitlines()) == 1


def test_a_full_disk(folder, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        environment = os.environ | {"STREAMCRYPT_HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)}
        result = subprocess.run(
            [sys.executable, "-m", "streamcrypt", "decrypt", "good.enc", "-", "--key", KEY],
            stdout=full, stderr=subprocess.PIPE, env=environment, cwd=folder, timeout=240,
        )  # fmt: skip
    assert result.returncode == 1
    assert b"No space left" in result.stderr
    assert len(result.stderr.decode().splitlines()) == 1


def test_an_unreadable_source(folder, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    secret.chmod(0)
    result = run(folder, "encrypt", str(secret), str(tmp_path / "out"), "--key", KEY, cwd=folder)
    assert result.returncode == 1
    assert b"Permission denied" in result.stderr
