"""The root key of a store: 32 random bytes, and the three ways to keep them.

    kms.root    {"version": 1, "kind": …, "store": id of the store it belongs to, …}
      file        "key": the root key in Base64; the file's mode is its protection
      passphrase  "argon2id": costs and salt, "sealed": nonce | AES-256-GCM of the root key
      keystore    "user": the entry of the platform's keystore that holds the root key

Every failure is a KeyAccessError that says what is wrong and what would mend it: never take a
root key that does not pass check().
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Callable
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from streamcrypt.errors import KeyAccessError

KINDS: Final = ("file", "passphrase", "keystore")
LENGTH: Final = 32

_NONCE_LENGTH: Final = 12
_SALT_LENGTH: Final = 16
# RFC 9106's second recommended choice: 64 MiB, three passes, four lanes.
_ITERATIONS: Final = 3
_LANES: Final = 4
_MEMORY_KIB: Final = 64 * 1024
_KEYSTORE_SERVICE: Final = "streamcrypt"
FILE_VARIABLE: Final = "STREAMCRYPT_PASSPHRASE_FILE"

Passphrase = Callable[[], bytes]
FilePath = str | os.PathLike[str]  # `pathlib` is not imported for its own sake: it takes 4 ms


def passphrase_from_environment() -> bytes:
    """The passphrase in the file that STREAMCRYPT_PASSPHRASE_FILE names."""
    name = os.environ.get(FILE_VARIABLE)
    if not name:
        raise KeyAccessError(
            "the root key of this KMS is protected by a passphrase: name the file that holds it in "
            + FILE_VARIABLE
        )
    return read_passphrase_file(name)


def read_passphrase_file(path: FilePath) -> bytes:
    """The passphrase in a file: its bytes without one line end at the end."""
    try:
        with open(path, "rb") as file:
            passphrase = file.read()
    except OSError as error:
        raise KeyAccessError(f"{path}: the passphrase cannot be read ({error.strerror})") from error
    passphrase = passphrase.removesuffix(b"\n").removesuffix(b"\r")
    if not passphrase:
        raise KeyAccessError(f"{path}: the passphrase is empty")
    return passphrase


def document(root: bytes, store_id: str, kind: str, passphrase: Passphrase) -> dict[str, Any]:
    """The document that keeps ``root``; for a keystore, the entry is made as well."""
    made: dict[str, Any] = {"version": 1, "kind": kind, "store": store_id}
    if kind == "file":
        made["key"] = _text(root)
    elif kind == "keystore":
        made["user"] = f"kms-root-{store_id}"
        _write_keystore(made["user"], root)
    elif kind == "passphrase":
        words = passphrase()
        if not words:
            raise KeyAccessError("the passphrase is empty")
        salt, nonce = os.urandom(_SALT_LENGTH), os.urandom(_NONCE_LENGTH)
        wrapping = _stretch(words, salt, _ITERATIONS, _LANES, _MEMORY_KIB)
        made["argon2id"] = {
            "iterations": _ITERATIONS,
            "lanes": _LANES,
            "memory_kib": _MEMORY_KIB,
            "salt": _text(salt),
        }
        made["sealed"] = _text(nonce + AESGCM(wrapping).encrypt(nonce, root, _passphrase_aad(store_id)))
    else:
        raise ValueError(f"{kind!r} is not a kind of root key; it is one of {', '.join(KINDS)}")
    return made


def write(path: FilePath, made: dict[str, Any]) -> None:
    """Write a document with mode 0600; it is on the disk when this returns."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(made, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(os.path.dirname(path))


def read(path: FilePath) -> dict[str, Any]:
    """The document in a file; FileNotFoundError where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found["kind"], str) or not isinstance(found["store"], str):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise KeyAccessError(f"{path}: this is not a root key of the embedded KMS") from error
    checked: dict[str, Any] = found
    return checked


def open_document(found: dict[str, Any], store_id: str, passphrase: Passphrase, *, name: str) -> bytes:
    """The root key that a document keeps for this store; ``name`` is what an error calls it."""
    kind = found["kind"]
    if found["store"] != store_id:
        raise KeyAccessError(
            f"{name}: this root key belongs to another KMS (store {found['store']}), not to this database "
            f"(store {store_id}); put the right one back"
        )
    try:
        if kind == "file":
            return base64.b64decode(found["key"], validate=True)
        if kind == "keystore":
            return _read_keystore(found["user"])
        if kind == "passphrase":
            return _open_sealed(found, passphrase)
    except InvalidTag as error:
        raise KeyAccessError(f"{name}: the passphrase is wrong") from error
    except (ValueError, KeyError, TypeError) as error:
        raise KeyAccessError(f"{name}: the root key is damaged; put it back, or restore a backup") from error
    raise KeyAccessError(f"{name}: a root key of the unknown kind {kind!r}")


def _open_sealed(found: dict[str, Any], passphrase: Passphrase) -> bytes:
    costs = found["argon2id"]
    iterations, lanes, memory = int(costs["iterations"]), int(costs["lanes"]), int(costs["memory_kib"])
    # Nothing here is authenticated before the passphrase was stretched: bound the work.
    if not (1 <= iterations <= 64 and 1 <= lanes <= 64 and memory <= 4 * 2**20):
        raise ValueError("cost parameters out of bounds")
    salt, sealed = (base64.b64decode(text, validate=True) for text in (costs["salt"], found["sealed"]))
    cipher = AESGCM(_stretch(passphrase(), salt, iterations, lanes, memory))
    return cipher.decrypt(sealed[:_NONCE_LENGTH], sealed[_NONCE_LENGTH:], _passphrase_aad(found["store"]))


def _stretch(passphrase: bytes, salt: bytes, iterations: int, lanes: int, memory_kib: int) -> bytes:
    return Argon2id(
        salt=salt, length=LENGTH, iterations=iterations, lanes=lanes, memory_cost=memory_kib
    ).derive(passphrase)


def make_check(root: bytes, store_id: str) -> bytes:
    """What the database keeps, so that it knows its root key."""
    nonce = os.urandom(_NONCE_LENGTH)
    return nonce + AESGCM(root).encrypt(nonce, b"", _check_aad(store_id))


def check(root: bytes, store_id: str, made: bytes, *, name: str) -> None:
    """KeyAccessError unless ``root`` is the root key for which make_check() was called."""
    try:
        AESGCM(root).decrypt(made[:_NONCE_LENGTH], made[_NONCE_LENGTH:], _check_aad(store_id))
    except (InvalidTag, ValueError) as error:
        raise KeyAccessError(
            f"{name}: this is not the root key of this database; put the right one back"
        ) from error


def sync_folder(path: FilePath) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_aad(store_id: str) -> bytes:
    return b"streamcrypt kms root check 1|" + store_id.encode()


def _passphrase_aad(store_id: str) -> bytes:
    return b"streamcrypt kms root passphrase 1|" + store_id.encode()


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


# -- the platform's keystore ---------------------------------------------------------------------


def _keystore() -> Any:
    try:
        import keyring
        import keyring.errors
    except ImportError as error:
        raise ImportError(
            "a root key in the platform's keystore needs keyring: pip install 'streamcrypt[keystore]'"
        ) from error
    return keyring


def _read_keystore(user: str) -> bytes:
    keyring = _keystore()
    try:
        secret = keyring.get_password(_KEYSTORE_SERVICE, user)
    except keyring.errors.KeyringError as error:
        raise KeyAccessError(f"the platform's keystore refused ({error}); unlock it") from error
    if secret is None:
        raise KeyAccessError(
            f"the platform's keystore has no entry {user} of {_KEYSTORE_SERVICE}; put it back"
        )
    return base64.b64decode(secret, validate=True)


def _write_keystore(user: str, root: bytes) -> None:
    keyring = _keystore()
    try:
        keyring.set_password(_KEYSTORE_SERVICE, user, _text(root))
    except keyring.errors.KeyringError as error:
        raise KeyAccessError(f"the platform's keystore refused ({error}); unlock it") from error
