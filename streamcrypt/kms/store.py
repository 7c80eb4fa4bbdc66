"""The store of the embedded KMS: one SQLite database, key material sealed under a root key.

    <home>/kms/kms.sqlite    keys, materials, aliases, grants, principals, audit rows   (0600)
    <home>/kms/kms.root      the root key, or how to come by it                          (0600)

The root key is 32 random bytes.  kms.root holds it as it is (kind "file"), sealed under a
passphrase (kind "passphrase", Argon2id), or names an entry of the platform's keystore (kind
"keystore").  Material is sealed with AES-256-GCM, bound to store, key and material id.

Promises: a write that returned is on the disk (WAL, synchronous=FULL, the folder synced);
audit rows are written with synchronous=NORMAL: in order, never torn, and the last ones may be
lost with the power, not with the process.  Two processes may share a store; a forked child
opens its own connection.  A missing or foreign root key, or a missing database beside a root
key, is an error: never begin an empty store where there was one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from streamcrypt.errors import KeyAccessError, StreamcryptError
from streamcrypt.kms import audit, policy
from streamcrypt.kms.material import load_private

SCHEMA_VERSION: Final = 1
ROOT_KEY_KINDS: Final = ("file", "passphrase", "keystore")

_ROOT_KEY_LENGTH: Final = 32
_NONCE_LENGTH: Final = 12
_SALT_LENGTH: Final = 16
# RFC 9106's second recommended choice (64 MiB, three passes, four lanes).
_ARGON2: Final = {"iterations": 3, "lanes": 4, "memory_cost": 64 * 1024}
_KEYSTORE_SERVICE: Final = "streamcrypt"
_BUSY_TIMEOUT: Final = 30.0  # seconds that a writer waits for another process

_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE keys (
    account TEXT NOT NULL, region TEXT NOT NULL, id TEXT NOT NULL,
    next_event REAL,                      -- when time alone changes the key: deletion, rotation, expiry
    record TEXT NOT NULL,
    PRIMARY KEY (account, region, id)) WITHOUT ROWID;
CREATE INDEX keys_by_id ON keys (id);
CREATE INDEX keys_by_event ON keys (next_event) WHERE next_event IS NOT NULL;
CREATE TABLE materials (
    account TEXT NOT NULL, key TEXT NOT NULL, ordinal INTEGER NOT NULL,
    record TEXT NOT NULL, sealed BLOB,
    PRIMARY KEY (account, key, ordinal)) WITHOUT ROWID;
CREATE TABLE aliases (
    account TEXT NOT NULL, region TEXT NOT NULL, name TEXT NOT NULL, target TEXT NOT NULL,
    created REAL NOT NULL, updated REAL NOT NULL,
    PRIMARY KEY (account, region, name)) WITHOUT ROWID;
CREATE INDEX aliases_by_target ON aliases (account, region, target);
CREATE TABLE grants (
    account TEXT NOT NULL, region TEXT NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL,
    record TEXT NOT NULL,
    PRIMARY KEY (account, region, key, id)) WITHOUT ROWID;
CREATE INDEX grants_by_id ON grants (id);
CREATE TABLE principals (arn TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE access_keys (
    id TEXT PRIMARY KEY, principal TEXT NOT NULL, session_token TEXT, expires REAL,
    created REAL NOT NULL, sealed BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX access_keys_by_principal ON access_keys (principal);
"""


@dataclass(slots=True)
class Material:
    """One generation of a key's material.  ``sealed`` is None while imported material is absent."""

    id: str
    created: float
    state: str = "CURRENT"
    rotated: float | None = None
    rotation_type: str | None = None
    expiration_model: str | None = None
    valid_to: float | None = None
    description: str | None = None
    sealed: bytes | None = field(default=None, repr=False)
    ordinal: int = 0


@dataclass(frozen=True, slots=True)
class GrantRecord:
    """A grant with what the evaluator does not need: name and dates."""

    grant: policy.Grant
    created: float
    name: str | None = None
    grantee_service: bool = False
    retiring_service: bool = False


@dataclass(slots=True)
class Key:
    """A KMS key in one Region, as it was read.  Shared between threads: never change a cached one."""

    account: str
    region: str
    id: str
    created: float
    spec: str = "SYMMETRIC_DEFAULT"
    usage: str = "ENCRYPT_DECRYPT"
    origin: str = "AWS_KMS"
    manager: str = "CUSTOMER"
    description: str = ""
    state: str = "Enabled"
    policy: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    deletion_date: float | None = None
    deletion_window: int | None = None
    primary_region: str | None = None
    rotation_period: int | None = None
    rotation_next: float | None = None
    rotation_start: float | None = None
    on_demand_rotations: int = 0
    # Loaded beside the record, not part of it.
    materials: list[Material] = field(default_factory=list)
    aliases: tuple[str, ...] = ()
    grants: tuple[GrantRecord, ...] = ()
    facts: policy.KeyFacts = field(default_factory=lambda: policy.KeyFacts(""))

    @property
    def arn(self) -> str:
        return self.facts.arn

    @property
    def multi_region(self) -> bool:
        return self.primary_region is not None

    @property
    def current(self) -> Material | None:
        """The material that encrypts; None while it is absent."""
        return next((m for m in reversed(self.materials) if m.state == "CURRENT"), None)

    @property
    def next_event(self) -> float | None:
        """When time alone changes this key."""
        events = [self.deletion_date if self.state == "PendingDeletion" else None]
        events.append(self.rotation_next)
        events += [m.valid_to for m in self.materials if m.sealed is not None]
        return min((event for event in events if event is not None), default=None)


_KEY_RECORD: Final = tuple(
    f.name
    for f in fields(Key)
    if f.name not in {"account", "region", "id", "materials", "aliases", "grants", "facts"}
)


@dataclass(frozen=True, slots=True)
class AccessKey:
    """An access key of a principal."""

    id: str
    secret: str = field(repr=False)
    caller: policy.Caller
    session_token: str | None = field(default=None, repr=False)
    expires: float | None = None

    def __reduce__(self) -> Any:
        raise TypeError("an access key is not pickled: it holds a secret")


def key_arn(account: str, region: str, key_id: str) -> str:
    return f"arn:aws:kms:{region}:{account}:key/{key_id}"


class Store:
    """The database of one home, opened by this process.  Thread-safe; close() when done.

    ``root_key`` is the kind of root key that a *new* store gets; an existing one knows its own.
    ``passphrase`` gives the passphrase when one is needed; without it, the file that
    STREAMCRYPT_PASSPHRASE_FILE names is read.
    """

    def __init__(
        self,
        home: Path,
        *,
        root_key: str = "file",
        passphrase: Callable[[], bytes] | None = None,
        create: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if root_key not in ROOT_KEY_KINDS:
            raise ValueError(
                f"{root_key!r} is not a kind of root key; it is one of {', '.join(ROOT_KEY_KINDS)}"
            )
        self.folder = home / "kms"
        self.path = self.folder / "kms.sqlite"
        self.clock = clock
        self._root_path = self.folder / "kms.root"
        self._new_root_path = self.folder / "kms.root.new"
        self._kind = root_key
        self._passphrase = passphrase
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._depth = 0
        self._data_version = -1
        self._generation = -1
        self._keys: dict[tuple[str, str, str], Key] = {}
        self._alias_targets: dict[tuple[str, str, str], str | None] = {}
        self._open_materials: dict[str, bytes] = {}
        self._private_keys: dict[str, Any] = {}
        self._prepare_folder(create)
        self._connect()
        self._root, self.id = self._open_root(create)
        self._seal = AESGCM(self._root)
        _stores.add(self)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def __reduce__(self) -> Any:
        raise TypeError("a store is not pickled: it holds key material; open it where it is used")

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._open_materials.clear()
            self._private_keys.clear()

    # -- files ---------------------------------------------------------------------------

    def _prepare_folder(self, create: bool) -> None:
        if not self.folder.exists():
            if not create:
                raise StreamcryptError(f"{self.folder}: there is no embedded KMS here")
            try:
                self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.folder.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise StreamcryptError(
                    f"{self.folder}: cannot be made ({error.strerror}); set STREAMCRYPT_HOME"
                ) from error
            _sync_folder(self.folder.parent)
        for path in (self.folder, self.path, self._root_path):
            if path.exists() and path.stat().st_mode & 0o077:
                raise KeyAccessError(
                    f"{path}: other users may read it; make it private first: chmod go= {path}"
                )
        if not self.path.exists():
            if self._root_path.exists():
                raise KeyAccessError(
                    f"{self.path}: the database is missing although its root key {self._root_path.name} is here; "
                    "put the database back, or restore a backup into another home"
                )
            # SQLite gives its -wal and -shm files the mode of the database.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            _sync_folder(self.folder)

    def _connect(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(
                self.path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA foreign_keys=ON")
        except sqlite3.Error as error:
            raise StreamcryptError(f"{self.path}: cannot be opened ({error})") from error
        self._connection = connection
        self._data_version = self._generation = -1
        self._keys.clear()
        self._alias_targets.clear()
        return connection

    def _db(self) -> sqlite3.Connection:
        return self._connection if self._connection is not None else self._connect()

    def _after_fork(self) -> None:
        # The child neither uses nor closes its parent's connection: closing would drop the
        # parent's locks on the database.
        if self._connection is not None:
            _abandoned.append(self._connection)
        self._connection = None
        self._lock = threading.RLock()
        self._depth = 0

    # -- the root key --------------------------------------------------------------------

    def _open_root(self, create: bool) -> tuple[bytes, str]:
        try:
            version = self._db().execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise StreamcryptError(
                f"{self.path}: not a database of the embedded KMS ({error}); restore a backup"
            ) from error
        if version == 0:
            if not create:
                raise StreamcryptError(f"{self.path}: there is no embedded KMS here")
            self._create()
        elif version > SCHEMA_VERSION:
            raise StreamcryptError(
                f"{self.path}: made by a newer streamcrypt (schema {version}, this one knows {SCHEMA_VERSION})"
            )
        store_id = self._meta("store")
        check = self._meta("root_check")
        if store_id is None or check is None:
            raise StreamcryptError(f"{self.path}: the database is damaged; restore a backup")
        root = self._read_root(str(store_id), bytes(check))
        return root, str(store_id)

    def _create(self) -> None:
        """Make the tables and the root key; in whatever order a crash falls, the next opening finishes."""
        with self._lock, _durable(self._db()) as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] != 0:
                return  # another process was faster
            if self._root_path.exists():
                raise KeyAccessError(
                    f"{self.path}: the database is empty although its root key {self._root_path.name} is here; "
                    "put the database back, or restore a backup into another home"
                )
            store_id = str(uuid.uuid4())
            root = os.urandom(_ROOT_KEY_LENGTH)
            self.write_root(root, store_id, self._kind, self._new_root_path)
            for statement in (*_SCHEMA.split(";"), *audit.SCHEMA.split(";")):
                connection.execute(statement)
            nonce = os.urandom(_NONCE_LENGTH)
            check = nonce + AESGCM(root).encrypt(nonce, b"", _check_aad(store_id))
            self._set_meta("store", store_id)
            self._set_meta("root_check", check)
            self._set_meta("created", self.clock())
            self._set_meta("generation", 0)
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION:d}")

    def _read_root(self, store_id: str, check: bytes) -> bytes:
        # A crash between the commit of _create and this rename leaves the new name behind.
        if self._new_root_path.exists() and not self._root_path.exists():
            with contextlib.suppress(FileNotFoundError):  # another process renamed it
                root = self._load_root(self._new_root_path, store_id)
                _check_root(root, store_id, check, self._new_root_path)
                self._new_root_path.rename(self._root_path)
                _sync_folder(self.folder)
        if not self._root_path.exists():
            raise KeyAccessError(
                f"{self._root_path}: the root key of this KMS is missing; without it no key can be used. "
                "Put it back, or restore a backup"
            )
        root = self._load_root(self._root_path, store_id)
        _check_root(root, store_id, check, self._root_path)
        return root

    def _load_root(self, path: Path, store_id: str) -> bytes:
        try:
            document = json.loads(path.read_text())
            kind, owner = document["kind"], document["store"]
        except (ValueError, KeyError, TypeError) as error:
            raise KeyAccessError(f"{path}: this is not a root key of the embedded KMS") from error
        if owner != store_id:
            raise KeyAccessError(
                f"{path}: this root key belongs to another KMS (store {owner}), not to this database "
                f"(store {store_id}); put the right one back"
            )
        try:
            if kind == "file":
                return base64.b64decode(document["key"], validate=True)
            if kind == "keystore":
                return _read_keystore(document["user"])
            if kind == "passphrase":
                return _open_with_passphrase(document, self._ask_passphrase())
        except (ValueError, KeyError) as error:
            raise KeyAccessError(
                f"{path}: the root key is damaged; put it back, or restore a backup"
            ) from error
        except InvalidTag as error:
            raise KeyAccessError(f"{path}: the passphrase is wrong") from error
        raise KeyAccessError(f"{path}: root key of the unknown kind {kind!r}")

    def _ask_passphrase(self) -> bytes:
        if self._passphrase is not None:
            return self._passphrase()
        name = os.environ.get("STREAMCRYPT_PASSPHRASE_FILE")
        if name is None:
            raise KeyAccessError(
                "the root key of this KMS is protected by a passphrase: name the file that holds it in "
                "STREAMCRYPT_PASSPHRASE_FILE"
            )
        return read_passphrase_file(Path(name))

    def write_root(self, root: bytes, store_id: str, kind: str, path: Path) -> None:
        """Write a root key document; it is on the disk when this returns."""
        document: dict[str, Any] = {"version": 1, "kind": kind, "store": store_id}
        if kind == "file":
            document["key"] = base64.b64encode(root).decode()
        elif kind == "keystore":
            document["user"] = f"kms-root-{store_id}"
            _write_keystore(document["user"], root)
        else:
            document |= seal_with_passphrase(root, store_id, self._ask_passphrase())
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.folder)

    # -- transactions ----------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable write: on the disk when the block has ended, nothing of it when it raised.

        Within another transaction it is a part of that one.
        """
        with self._lock:
            if self._depth:
                yield self._db()
                return
            self._depth += 1
            try:
                with _durable(self._db()) as connection:
                    self._refresh()
                    yield connection
            finally:
                self._depth -= 1
                self._keys.clear()
                self._alias_targets.clear()

    def changed(self) -> None:
        """Tell other processes, within a transaction, that keys, aliases or principals changed."""
        self._db().execute("UPDATE meta SET value = value + 1 WHERE name = 'generation'")

    def record_event(self, row: Sequence[Any]) -> None:
        """Append an audit row; within transaction() it is part of it."""
        with self._lock:
            if row:
                self._db().execute(audit.INSERT, row)

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db().execute(sql, parameters).fetchall()

    def _refresh(self) -> None:
        """Drop what was read before another process changed it.

        data_version tells cheaply that somebody else wrote; most of that is audit rows, so
        the generation decides.
        """
        version = self._db().execute("PRAGMA data_version").fetchone()[0]
        if version == self._data_version:
            return
        generation = self._db().execute("SELECT value FROM meta WHERE name = 'generation'").fetchone()[0]
        self._data_version = version
        if generation != self._generation:
            self._generation = generation
            self._keys.clear()
            self._alias_targets.clear()

    def _meta(self, name: str) -> Any:
        rows = self.query("SELECT value FROM meta WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def _set_meta(self, name: str, value: Any) -> None:
        self._db().execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # -- keys --------------------------------------------------------------------------------

    def key(self, account: str, region: str, key_id: str) -> Key | None:
        """The key as every process sees it now."""
        with self._lock:
            self._refresh()
            key = self._keys.get((account, region, key_id))
            if key is None:
                key = self._load_key(account, region, key_id)
                if key is not None and not self._depth:
                    self._keys[account, region, key_id] = key
            return key

    def key_regions(self, account: str, key_id: str) -> list[str]:
        """The Regions that hold this key (several for a multi-Region key)."""
        rows = self.query(
            "SELECT region FROM keys WHERE id = ? AND account = ? ORDER BY region", (key_id, account)
        )
        return [row[0] for row in rows]

    def owners(self, key_id: str) -> list[str]:
        """The accounts that hold a key of this id (one, or none)."""
        return [row[0] for row in self.query("SELECT DISTINCT account FROM keys WHERE id = ?", (key_id,))]

    def key_ids(self, account: str, region: str, after: str, limit: int) -> list[str]:
        rows = self.query(
            "SELECT id FROM keys WHERE account = ? AND region = ? AND id > ? ORDER BY id LIMIT ?",
            (account, region, after, limit),
        )
        return [row[0] for row in rows]

    def due_keys(self, now: float) -> list[tuple[str, str, str]]:
        """Keys that time has changed: account, region, id."""
        rows = self.query("SELECT account, region, id FROM keys WHERE next_event <= ?", (now,))
        return [(row[0], row[1], row[2]) for row in rows]

    def _load_key(self, account: str, region: str, key_id: str) -> Key | None:
        rows = self.query(
            "SELECT record FROM keys WHERE account = ? AND region = ? AND id = ?", (account, region, key_id)
        )
        if not rows:
            return None
        key = Key(account=account, region=region, id=key_id, **json.loads(rows[0][0]))
        for ordinal, record, sealed in self.query(
            "SELECT ordinal, record, sealed FROM materials WHERE account = ? AND key = ? ORDER BY ordinal",
            (account, key_id),
        ):
            key.materials.append(Material(ordinal=ordinal, sealed=sealed, **json.loads(record)))
        key.aliases = tuple(
            row[0]
            for row in self.query(
                "SELECT name FROM aliases WHERE account = ? AND region = ? AND target = ? ORDER BY name",
                (account, region, key_id),
            )
        )
        key.grants = tuple(
            _read_grant(row[0])
            for row in self.query(
                "SELECT record FROM grants WHERE account = ? AND region = ? AND key = ? ORDER BY id",
                (account, region, key_id),
            )
        )
        kind = None
        if key.primary_region is not None:
            kind = "PRIMARY" if key.primary_region == region else "REPLICA"
        key.facts = policy.KeyFacts(
            key_arn(account, region, key_id),
            spec=key.spec,
            usage=key.usage,
            origin=key.origin,
            multi_region=key.multi_region,
            multi_region_key_type=kind,
            aliases=key.aliases,
            tags=key.tags,
        )
        return key

    def save_key(self, key: Key) -> None:
        """Write the key's record and materials, within a transaction."""
        record = {name: getattr(key, name) for name in _KEY_RECORD}
        connection = self._db()
        connection.execute(
            "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?)",
            (key.account, key.region, key.id, key.next_event, json.dumps(record)),
        )
        for ordinal, material in enumerate(key.materials):
            values = asdict(material)
            sealed = values.pop("sealed")
            del values["ordinal"]
            connection.execute(
                "INSERT OR REPLACE INTO materials VALUES (?, ?, ?, ?, ?)",
                (key.account, key.id, ordinal, json.dumps(values), sealed),
            )
        self.changed()

    def delete_key(self, key: Key) -> None:
        """Remove the key with its aliases and grants, and its material with the last Region."""
        where = (key.account, key.region, key.id)
        connection = self._db()
        connection.execute("DELETE FROM keys WHERE account = ? AND region = ? AND id = ?", where)
        connection.execute("DELETE FROM aliases WHERE account = ? AND region = ? AND target = ?", where)
        connection.execute("DELETE FROM grants WHERE account = ? AND region = ? AND key = ?", where)
        if not self.key_regions(key.account, key.id):
            connection.execute("DELETE FROM materials WHERE account = ? AND key = ?", (key.account, key.id))
            for material in key.materials:
                self.forget_material(material.id)
        self.changed()

    # -- material ------------------------------------------------------------------------------

    def seal_material(self, account: str, key_id: str, material_id: str, material: bytes) -> bytes:
        nonce = os.urandom(_NONCE_LENGTH)
        return nonce + self._seal.encrypt(nonce, material, self._material_aad(account, key_id, material_id))

    def open_material(self, key: Key, material: Material) -> bytes:
        """The material in clear; KeyAccessError when it was altered in the database."""
        opened = self._open_materials.get(material.id)
        if opened is None:
            if material.sealed is None:
                raise RuntimeError("internal error: material is absent")
            nonce, sealed = material.sealed[:_NONCE_LENGTH], material.sealed[_NONCE_LENGTH:]
            aad = self._material_aad(key.account, key.id, material.id)
            try:
                opened = self._seal.decrypt(nonce, sealed, aad)
            except InvalidTag as error:
                raise KeyAccessError(
                    f"{key.arn}: its material in {self.path} was altered; restore a backup"
                ) from error
            self._open_materials[material.id] = opened
        return opened

    def private_key(self, key: Key, generation: Material) -> Any:
        """The private key object of an asymmetric key; parsed once, because parsing RSA is slow."""
        private = self._private_keys.get(generation.id)
        if private is None:
            private = load_private(self.open_material(key, generation))
            self._private_keys[generation.id] = private
        return private

    def forget_material(self, material_id: str) -> None:
        self._open_materials.pop(material_id, None)
        self._private_keys.pop(material_id, None)

    def _material_aad(self, account: str, key_id: str, material_id: str) -> bytes:
        return f"streamcrypt kms material 1|{self.id}|{account}|{key_id}|{material_id}".encode()

    def secret(self, purpose: bytes) -> bytes:
        """A secret of this store for one purpose: the key of grant tokens, of import tokens."""
        info = b"streamcrypt kms secret 1|" + self.id.encode() + b"|" + purpose
        return HKDFExpand(algorithm=hashes.SHA256(), length=_ROOT_KEY_LENGTH, info=info).derive(self._root)

    # -- aliases ---------------------------------------------------------------------------------

    def alias_target(self, account: str, region: str, name: str) -> str | None:
        """The id of the key that ``alias/…`` names."""
        with self._lock:
            self._refresh()
            place = (account, region, name)
            if place in self._alias_targets:
                return self._alias_targets[place]
            rows = self.query(
                "SELECT target FROM aliases WHERE account = ? AND region = ? AND name = ?", place
            )
            target: str | None = rows[0][0] if rows else None
            if not self._depth and target is not None:
                self._alias_targets[place] = target
            return target

    def put_alias(self, account: str, region: str, name: str, target: str, now: float) -> None:
        self._db().execute(
            "INSERT INTO aliases VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (account, region, name) "
            "DO UPDATE SET target = excluded.target, updated = excluded.updated",
            (account, region, name, target, now, now),
        )
        self.changed()

    def delete_alias(self, account: str, region: str, name: str) -> None:
        self._db().execute(
            "DELETE FROM aliases WHERE account = ? AND region = ? AND name = ?", (account, region, name)
        )
        self.changed()

    def list_aliases(self, account: str, region: str) -> list[tuple[str, str, float, float]]:
        """Name, target, created, updated; by name."""
        rows = self.query(
            "SELECT name, target, created, updated FROM aliases WHERE account = ? AND region = ? ORDER BY name",
            (account, region),
        )
        return [(row[0], row[1], row[2], row[3]) for row in rows]

    # -- grants ------------------------------------------------------------------------------------

    def put_grant(self, key: Key, record: GrantRecord) -> None:
        grant = asdict(record.grant) | {"operations": sorted(record.grant.operations)}
        text = json.dumps(asdict(record) | {"grant": grant})
        self._db().execute(
            "INSERT OR REPLACE INTO grants VALUES (?, ?, ?, ?, ?)",
            (key.account, key.region, key.id, record.grant.grant_id, text),
        )
        self.changed()

    def delete_grant(self, key: Key, grant_id: str) -> None:
        self._db().execute(
            "DELETE FROM grants WHERE account = ? AND region = ? AND key = ? AND id = ?",
            (key.account, key.region, key.id, grant_id),
        )
        self.changed()

    def keys_with_grants(self) -> list[tuple[str, str, str]]:
        rows = self.query("SELECT DISTINCT account, region, key FROM grants")
        return [(row[0], row[1], row[2]) for row in rows]


@contextlib.contextmanager
def _durable(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("PRAGMA synchronous=FULL")
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    finally:
        connection.execute("PRAGMA synchronous=NORMAL")


def _read_grant(text: str) -> GrantRecord:
    values = json.loads(text)
    grant = values.pop("grant")
    grant["operations"] = frozenset(grant["operations"])
    return GrantRecord(grant=policy.Grant(**grant), **values)


# -- root key documents --------------------------------------------------------------------------


def seal_with_passphrase(root: bytes, store_id: str, passphrase: bytes) -> dict[str, Any]:
    """The members of a root key document of kind "passphrase"."""
    if not passphrase:
        raise KeyAccessError("the passphrase is empty")
    salt, nonce = os.urandom(_SALT_LENGTH), os.urandom(_NONCE_LENGTH)
    wrapping = Argon2id(salt=salt, length=_ROOT_KEY_LENGTH, **_ARGON2).derive(passphrase)
    sealed = nonce + AESGCM(wrapping).encrypt(nonce, root, _passphrase_aad(store_id))
    return {
        "argon2id": _ARGON2 | {"salt": base64.b64encode(salt).decode()},
        "sealed": base64.b64encode(sealed).decode(),
    }


def _open_with_passphrase(document: dict[str, Any], passphrase: bytes) -> bytes:
    costs = {name: int(document["argon2id"][name]) for name in _ARGON2}
    # The document is not authenticated before the passphrase is stretched: bound the work.
    if not 1 <= costs["iterations"] <= 64 or not 1 <= costs["lanes"] <= 64 or costs["memory_cost"] > 4 << 20:
        raise ValueError("cost parameters out of bounds")
    salt = base64.b64decode(document["argon2id"]["salt"], validate=True)
    sealed = base64.b64decode(document["sealed"], validate=True)
    wrapping = Argon2id(salt=salt, length=_ROOT_KEY_LENGTH, **costs).derive(passphrase)
    aad = _passphrase_aad(document["store"])
    return AESGCM(wrapping).decrypt(sealed[:_NONCE_LENGTH], sealed[_NONCE_LENGTH:], aad)


def read_passphrase_file(path: Path) -> bytes:
    """The passphrase in a file: its bytes without one line end; KeyAccessError when it cannot be read."""
    try:
        passphrase = path.read_bytes()
    except OSError as error:
        raise KeyAccessError(f"{path}: the passphrase cannot be read ({error.strerror})") from error
    passphrase = passphrase.removesuffix(b"\n").removesuffix(b"\r")
    if not passphrase:
        raise KeyAccessError(f"{path}: the passphrase is empty")
    return passphrase


def _check_root(root: bytes, store_id: str, check: bytes, path: Path) -> None:
    try:
        AESGCM(root).decrypt(check[:_NONCE_LENGTH], check[_NONCE_LENGTH:], _check_aad(store_id))
    except (InvalidTag, ValueError) as error:
        raise KeyAccessError(
            f"{path}: this is not the root key of this database; put the right one back"
        ) from error


def _check_aad(store_id: str) -> bytes:
    return b"streamcrypt kms root check 1|" + store_id.encode()


def _passphrase_aad(store_id: str) -> bytes:
    return b"streamcrypt kms root passphrase 1|" + store_id.encode()


def _keystore() -> Any:
    try:
        import keyring
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
        keyring.set_password(_KEYSTORE_SERVICE, user, base64.b64encode(root).decode())
    except keyring.errors.KeyringError as error:
        raise KeyAccessError(f"the platform's keystore refused ({error}); unlock it") from error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- fork ------------------------------------------------------------------------------------------

_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_abandoned: list[sqlite3.Connection] = []


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
