"""Backup and restore of an embedded KMS: one file that holds everything, under a passphrase.

A backup is the database with one more row, ``meta.root``: the root key document (rootkey.py); and
where there are branch keys (hierarchy keyring) with another, ``meta.branch_keys``: their database.
Losing a wrapping key loses every message under it, so a backup is refused rather than half
written, and restored only where no KMS is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any, Final

from streamcrypt.errors import DestinationError, KeyAccessError, SourceError
from streamcrypt.kms import rootkey
from streamcrypt.kms.store import BRANCH_KEYS_NAME, DATABASE_NAME, FOLDER_NAME, ROOT_NAME, Store

_ROOT_ROW: Final = "root"
_BRANCH_KEYS_ROW: Final = "branch_keys"


def write_backup(
    store: Store, path: Path, *, passphrase: rootkey.Passphrase | None, overwrite: bool = False
) -> None:
    """Write a consistent copy of the store, also while others use it; on the disk when this returns.

    With ``passphrase`` the root key in it is sealed under that passphrase.  With None it is
    there in clear, and whoever reads the file has every key.
    """
    if path.exists() and not overwrite:
        raise DestinationError(f"{path}: exists already; choose another name, or give --overwrite")
    kind = "file" if passphrase is None else "passphrase"
    document = store.root_document(kind, passphrase or _no_passphrase)
    temporary = path.with_name(f".{path.name}.streamcrypt-{os.getpid()}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        copy = sqlite3.connect(temporary, isolation_level=None)
        with contextlib.closing(copy):
            # Before the keys that wrap them: whatever is in this copy, its wrapping key is in the other.
            branch_keys = _read_database(store.folder / BRANCH_KEYS_NAME)
            store.copy_to(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
            copy.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_ROOT_ROW, json.dumps(document)))
            if branch_keys is not None:
                copy.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_BRANCH_KEYS_ROW, branch_keys))
            _check_integrity(copy, path)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        rootkey.sync_folder(path.absolute().parent)
    except (OSError, sqlite3.Error) as error:
        raise DestinationError(f"{path}: the backup cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    store.mark_backed_up()


def restore_backup(
    path: Path,
    home: Path,
    *,
    passphrase: rootkey.Passphrase | None = None,
    root_key: str = "file",
) -> None:
    """Make the KMS of ``home`` from a backup; there must be none yet.

    ``passphrase`` opens the backup, and seals the new root key when ``root_key`` is "passphrase".
    """
    folder = home / FOLDER_NAME
    if folder.exists():
        raise DestinationError(f"{folder}: there is a KMS here already; restore into another home")
    if not path.is_file():
        raise SourceError(f"{path}: there is no such backup")
    ask = passphrase or rootkey.passphrase_from_environment
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = home / f".{FOLDER_NAME}.restoring-{os.getpid()}"
    temporary.mkdir(mode=0o700)
    try:
        database = temporary / DATABASE_NAME
        os.close(os.open(database, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        shutil.copyfile(path, database)
        store_id, root, branch_keys = _open_backup(database, path, ask)
        if branch_keys is not None:
            _write_database(temporary / BRANCH_KEYS_NAME, branch_keys, path)
        rootkey.write(temporary / ROOT_NAME, rootkey.document(root, store_id, root_key, ask))
        with database.open("rb") as file:
            os.fsync(file.fileno())
        rootkey.sync_folder(temporary)
        temporary.rename(folder)
        rootkey.sync_folder(home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_database(path: Path) -> bytes | None:
    """A consistent copy of a SQLite file, also while others write; None where there is none."""
    if not path.exists():
        return None
    with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
        return connection.serialize()


def _write_database(path: Path, content: bytes, name: Path) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        _check_integrity(connection, name)


def _open_backup(database: Path, name: Path, ask: rootkey.Passphrase) -> tuple[str, bytes, bytes | None]:
    """Store id, root key and branch keys of a copied backup, whose rows of these are then gone."""
    connection = sqlite3.connect(database, isolation_level=None)
    with contextlib.closing(connection):
        try:
            _check_integrity(connection, name)
            rows: dict[str, Any] = dict(connection.execute("SELECT name, value FROM meta").fetchall())
        except sqlite3.Error as error:
            raise SourceError(f"{name}: this is not a backup of the embedded KMS ({error})") from error
        if not {_ROOT_ROW, "store", "root_check"} <= rows.keys():
            raise SourceError(f"{name}: this is not a backup of the embedded KMS")
        try:
            document = json.loads(rows[_ROOT_ROW])
            store_id = str(rows["store"])
            root = rootkey.open_document(document, store_id, ask, name=str(name))
        except (ValueError, KeyError, TypeError) as error:
            raise KeyAccessError(f"{name}: the root key in the backup is damaged") from error
        rootkey.check(root, store_id, bytes(rows["root_check"]), name=str(name))
        connection.execute("PRAGMA secure_delete=ON")
        connection.execute("DELETE FROM meta WHERE name IN (?, ?)", (_ROOT_ROW, _BRANCH_KEYS_ROW))
    return store_id, root, rows.get(_BRANCH_KEYS_ROW)


def _check_integrity(connection: sqlite3.Connection, name: Path) -> None:
    found = connection.execute("PRAGMA integrity_check").fetchone()[0]
    if found != "ok":
        raise SourceError(f"{name}: the database is damaged ({found})")


def _no_passphrase() -> bytes:
    raise RuntimeError("internal error: a root key in clear needs no passphrase")
