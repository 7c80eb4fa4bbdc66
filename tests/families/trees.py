"""Trees of files for the engine's tests, and what must hold of one whatever happened."""

from __future__ import annotations

import os
import random
from pathlib import Path

import streamcrypt as sc
from streamcrypt.keys.keyring import Keyring

TEMPORARY = ".streamcrypt-"


def make_tree(root: Path, files: dict[str, int], seed: int = 1) -> dict[str, bytes]:
    """Files of these sizes; returns their contents."""
    rng = random.Random(seed)
    contents = {}
    for name, size in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        contents[name] = rng.randbytes(size)
        path.write_bytes(contents[name])
    return contents


def read_tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def leftovers(root: Path) -> list[str]:
    """Temporary files of ours."""
    return [str(path) for path in root.rglob(f"{TEMPORARY}*")] if root.exists() else []


def assert_nothing_partial(root: Path, contents: dict[str, bytes], keys: str | Keyring) -> int:
    """No name in an encrypted tree holds anything but a whole message of the right file.

    Returns how many there are.  Temporary files may be there; their name says what they are.
    """
    found = 0
    for path in root.rglob("*") if root.exists() else ():
        if not path.is_file() or path.name.startswith(TEMPORARY):
            continue
        name = os.fspath(path.relative_to(root))
        if name == "_streamcrypt/journal":  # a job that has not ended keeps one; it is no message
            continue
        plaintext = sc.decrypt_bytes(path.read_bytes(), keys=keys)
        if name != "_streamcrypt/manifest":
            assert plaintext == contents[name], name
            found += 1
    return found


def assert_nothing_partial_decrypted(root: Path, contents: dict[str, bytes]) -> int:
    """The same of a decrypted tree."""
    found = 0
    for path in root.rglob("*") if root.exists() else ():
        if path == root / "_streamcrypt" / "journal":
            continue
        if path.is_file() and not path.name.startswith(TEMPORARY):
            assert path.read_bytes() == contents[os.fspath(path.relative_to(root))]
            found += 1
    return found
