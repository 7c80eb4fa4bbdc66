"""The store of the embedded KMS: one SQLite database, key material sealed under a root key.

    <home>/kms/kms.sqlite    keys, materials, aliases, grants, principals, audit rows   (0600)
    <home>/kms/kms.root      the root key, or how to come by it                          (0600)
    <home>/kms/branch-keys.sqlite3   not this module's: keys/hierarchy.py keeps branch keys there

Material is sealed with AES-256-GCM under the root key (rootkey.py), bound to store, key and
material id.

Promises: a write that returned is on the disk (WAL, synchronous=FULL, the folder synced);
audit rows are written with synchronous=NORMAL: in order, never torn, and the last ones may be
lost with the power, not with the process.  Two processes may share a store; a forked child
opens its own connection.  A missing or foreign root key, or a missing database beside a root
key, is an error: never begin an empty store where there was one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from streamcrypt.errors import KeyAccessError, StreamcryptError
from streamcrypt.hygiene import lock
from streamcrypt.kms import audit, policy, rootkey
from streamcrypt.kms.errors import new_uuid
from streamcrypt.kms.material import BlobKey, load_private
from streamcrypt.system import missing_folders, sync_name
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION: Final = 1
FOLDER_NAME: Final = "kms"
DATABASE_NAME: Final = "kms.sqlite"
ROOT_NAME: Final = "kms.root"
BRANCH_KEYS_NAME: Final = (
    "branch-keys.sqlite3"  # of hierarchy keyrings (keys/hierarchy.py); backups hold it too
)
_NONCE_LENGTH: Final = 12
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


class Material:
    """One generation of a key's material.  ``sealed`` is None while imported material is absent."""

    __slots__ = (
        "created", "description", "expiration_model", "id", "ordinal", "rotated", "rotation_type", "sealed", "state",
        "valid_to",
    )  # fmt: skip

    def __init__(
        self,
        id: str,
        created: float,
        *,
        state: str = "CURRENT",
        rotated: float | None = None,
        rotation_type: str | None = None,
        expiration_model: str | None = None,
        valid_to: float | None = None,
        description: str | None = None,
        sealed: bytes | None = None,
        ordinal: int = 0,
    ) -> None:
        self.id = id
        self.created = created
        self.state = state
        self.rotated = rotated
        self.rotation_type = rotation_type
        self.expiration_model = expiration_model
        self.valid_to = valid_to
        self.description = description
        self.sealed = sealed
        self.ordinal = ordinal

    def record(self) -> dict[str, Any]:
        """What is stored of it beside the sealed bytes and the order."""
        return {name: getattr(self, name) for name in self.__slots__ if name not in ("sealed", "ordinal")}


class GrantRecord(NamedTuple):
    """A grant with what the evaluator does not need: name and dates."""

    grant: policy.Grant
    created: float
    name: str | None = None
    grantee_service: bool = False
    retiring_service: bool = False


# What is stored of a key beside its account, Region and id.
_KEY_RECORD: Final = (
    "created", "spec", "usage", "origin", "manager", "description", "state", "key_policy", "tags", "deletion_date",
    "deletion_window", "primary_region", "rotation_period", "rotation_next", "rotation_start", "on_demand_rotations",
    "imports",
)  # fmt: skip


class Key:
    """A KMS key in one Region, as it was read.  Shared between threads: never change a cached one.

    ``materials``, ``aliases``, ``grants`` and ``facts`` are loaded beside the record, not part of it.
    ``imports`` says of a multi-Region key which imported material this Region holds, and its expiration model,
    end and description; None before it was first saved so.
    """

    __slots__ = ("account", "aliases", "facts", "grants", "id", "materials", "region", *_KEY_RECORD)

    def __init__(
        self,
        account: str,
        region: str,
        id: str,
        created: float,
        *,
        spec: str = "SYMMETRIC_DEFAULT",
        usage: str = "ENCRYPT_DECRYPT",
        origin: str = "AWS_KMS",
        manager: str = "CUSTOMER",
        description: str = "",
        state: str = "Enabled",
        key_policy: str = "",
        tags: dict[str, str] | None = None,
        deletion_date: float | None = None,
        deletion_window: int | None = None,
        primary_region: str | None = None,
        rotation_period: int | None = None,
        rotation_next: float | None = None,
        rotation_start: float | None = None,
        on_demand_rotations: int = 0,
        imports: dict[str, list[Any]] | None = None,
        materials: list[Material] | None = None,
    ) -> None:
        self.account = account
        self.region = region
        self.id = id
        self.created = created
        self.spec = spec
        self.usage = usage
        self.origin = origin
        self.manager = manager
        self.description = description
        self.state = state
        self.key_policy = key_policy
        self.tags = tags if tags is not None else {}
        self.deletion_date = deletion_date
        self.deletion_window = deletion_window
        self.primary_region = primary_region
        self.rotation_period = rotation_period
        self.rotation_next = rotation_next
        self.rotation_start = rotation_start
        self.on_demand_rotations = on_demand_rotations
        self.imports = imports
        self.materials = materials if materials is not None else []
        self.aliases: tuple[str, ...] = ()
        self.grants: tuple[GrantRecord, ...] = ()
        self.facts = policy.KeyFacts("")

    @property
    def arn(self) -> str:
        return self.facts.arn

    @property
    def multi_region(self) -> bool:
        return self.primary_region is not None

    @property
    def imported_by_region(self) -> bool:
        """Whether each Region of this key imports, deletes and lets expire the one material by itself."""
        return self.multi_region and self.origin == "EXTERNAL"

    @property
    def current(self) -> Material | None:
        """The material that encrypts; None while it is absent."""
        return next((m for m in reversed(self.materials) if m.state == "CURRENT"), None)

    @property
    def next_event(self) -> float | None:
        """When time alone changes this key."""
        # A key that is not enabled keeps its schedule and rotates when it is enabled again.
        events = [
            self.deletion_date if self.state == "PendingDeletion" else None,
            self.rotation_next if self.state == "Enabled" else None,
        ]
        events += [m.valid_to for m in self.materials if m.sealed is not None]
        return min((event for event in events if event is not None), default=None)


class AccessKey:
    """An access key of a principal."""

    __slots__ = ("caller", "expires", "id", "secret", "session_token")

    def __init__(
        self,
        id: str,
        secret: str,
        caller: policy.Caller,
        session_token: str | None = None,
        expires: float | None = None,
    ) -> None:
        self.id = id
        self.secret = secret
        self.caller = caller
        self.session_token = session_token
        self.expires = expires

    def __repr__(self) -> str:
        return f"<AccessKey {self.id}>"

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
        home: rootkey.FilePath,
        *,
        root_key: str = "file",
        passphrase: Callable[[], bytes] | None = None,
        create: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if root_key not in rootkey.KINDS:
            raise ValueError(f"{root_key!r} is no kind of root key; it is one of {', '.join(rootkey.KINDS)}")
        self._folder = os.path.join(home, FOLDER_NAME)
        self._path = os.path.join(self._folder, DATABASE_NAME)
        self.clock = clock
        self._root_path = os.path.join(self._folder, ROOT_NAME)
        self._new_root_path = f"{self._root_path}.new"
        self._kind = root_key
        self._passphrase = passphrase or rootkey.passphrase_from_environment
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._depth = 0
        self._data_version = -1
        self._generation = -1
        self._keys: dict[tuple[str, str, str], Key] = {}
        self._alias_targets: dict[tuple[str, str, str], str | None] = {}
        self._access_keys: dict[str, AccessKey] = {}
        self._next_due: float | None = None
        self._open_materials: dict[str, bytes] = {}
        self._private_keys: dict[str, Any] = {}
        self._blob_keys: dict[str, BlobKey] = {}
        try:
            self._prepare_folder(create)
            self._connect()
            self._root, self.id = self._open_root(create)
            self._seal = AESGCM(self._root)
            self.refresh()
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise StreamcryptError(f"{self._folder}: the embedded KMS cannot be opened ({error})") from error
        _stores.add(self)

    @property
    def folder(self) -> Path:
        from pathlib import Path

        return Path(self._folder)

    @property
    def path(self) -> Path:
        """The database."""
        return self.folder / DATABASE_NAME

    def __repr__(self) -> str:
        return f"Store({self._path!r})"

    def __reduce__(self) -> Any:
        raise TypeError("a store is not pickled: it holds key material; open it where it is used")

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._open_materials.clear()
            self._private_keys.clear()
            self._blob_keys.clear()

    def __del__(self) -> None:
        # Nobody need close a KMS that was merely used, and from 3.13 on Python warns of such a database.
        if (connection := getattr(self, "_connection", None)) is not None:
            connection.close()

    # -- files ---------------------------------------------------------------------------

    def _prepare_folder(self, create: bool) -> None:
        if not os.path.exists(self._folder):
            if not create:
                raise StreamcryptError(f"{self._folder}: there is no embedded KMS here")
            missing = missing_folders(os.path.abspath(self._folder))
            try:
                os.makedirs(os.path.dirname(self._folder), mode=0o700, exist_ok=True)
                os.makedirs(self._folder, mode=0o700, exist_ok=True)
            except OSError as error:
                raise StreamcryptError(
                    f"{self._folder}: cannot be made ({error.strerror}); set STREAMCRYPT_HOME"
                ) from error
            for path in missing:
                sync_name(path)
        for path in (self._folder, self._path, self._root_path):
            if os.path.exists(path) and os.stat(path).st_mode & 0o077:
                raise KeyAccessError(
                    f"{path}: other users may read it; make it private first: chmod go= {path}"
                )
        if not os.path.exists(self._path):
            if os.path.exists(self._root_path):
                raise KeyAccessError(
                    f"{self._path}: the database is missing although its root key {ROOT_NAME} is here; "
                    "put the database back, or restore a backup into another home"
                )
            # SQLite gives its -wal and -shm files the mode of the database.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            rootkey.sync_folder(self._folder)

    def _connect(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(
                self._path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            # 16 MiB of log between checkpoints: each one waits for the disk.
            connection.execute("PRAGMA wal_autocheckpoint=4000")
        except sqlite3.Error as error:
            raise StreamcryptError(f"{self._path}: cannot be opened ({error})") from error
        self._connection = connection
        self._data_version = self._generation = -1
        self._forget()
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
                f"{self._path}: not a database of the embedded KMS ({error}); restore a backup"
            ) from error
        if version == 0:
            if not create:
                raise StreamcryptError(f"{self._path}: there is no embedded KMS here")
            self._create()
        elif version > SCHEMA_VERSION:
            raise StreamcryptError(
                f"{self._path}: made by a newer streamcrypt (schema {version}, this one knows {SCHEMA_VERSION})"
            )
        store_id = self._meta("store")
        check = self._meta("root_check")
        if store_id is None or check is None:
            raise StreamcryptError(f"{self._path}: the database is damaged; restore a backup")
        root = self._read_root(str(store_id), bytes(check))
        return root, str(store_id)

    def _create(self) -> None:
        """Make the tables and the root key; in whatever order a crash falls, the next opening finishes."""
        with self._lock, _durable(self._db()) as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] != 0:
                return  # another process was faster
            if os.path.exists(self._root_path):
                raise KeyAccessError(
                    f"{self._path}: the database is empty although its root key {ROOT_NAME} is here; "
                    "put the database back, or restore a backup into another home"
                )
            store_id = new_uuid()
            root = os.urandom(rootkey.LENGTH)
            made = rootkey.document(root, store_id, self._kind, self._passphrase)
            rootkey.write(self._new_root_path, made)
            for statement in (*_SCHEMA.split(";"), *audit.SCHEMA.split(";")):
                connection.execute(statement)
            self._set_meta("store", store_id)
            self._set_meta("root_check", rootkey.make_check(root, store_id))
            self._set_meta("created", self.clock())
            self._set_meta("generation", 0)
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION:d}")

    def _read_root(self, store_id: str, check: bytes) -> bytes:
        # A crash between the commit of _create and this rename leaves the new name behind.
        if os.path.exists(self._new_root_path) and not os.path.exists(self._root_path):
            with contextlib.suppress(FileNotFoundError):  # another process renamed it
                root = self._load_root(self._new_root_path, store_id, check)
                os.rename(self._new_root_path, self._root_path)
                rootkey.sync_folder(self._folder)
                return root
        try:
            return self._load_root(self._root_path, store_id, check)
        except FileNotFoundError as error:
            raise KeyAccessError(
                f"{self._root_path}: the root key of this KMS is missing; without it no key can be used. "
                "Put it back, or restore a backup"
            ) from error

    def _load_root(self, path: str, store_id: str, check: bytes) -> bytes:
        found = rootkey.read(path)
        root = rootkey.open_document(found, store_id, self._passphrase, name=path)
        rootkey.check(root, store_id, check, name=path)
        lock(root)
        return root

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
            except BaseException:
                self._data_version = self._generation = -1  # what changed() counted is undone
                raise
            finally:
                self._depth -= 1
                self._forget()

    def changed(self) -> None:
        """Tell other processes, within a transaction, that keys, aliases or principals changed."""
        self._db().execute("UPDATE meta SET value = value + 1 WHERE name = 'generation'")
        self._generation += 1

    def record_event(self, row: Sequence[Any]) -> None:
        """Append an audit row; within transaction() it is part of it."""
        with self._lock:
            self._db().execute(audit.INSERT, row)

    @property
    def generation(self) -> int:
        """Counts changes of keys, aliases and principals, as far as this process knows of them."""
        return self._generation

    def record_current(self, row: Sequence[Any], generation: int) -> bool:
        """Append an audit row if keys, aliases and principals are still those of ``generation``.

        False: somebody has changed them, nothing was appended, and what was known is dropped.  So what
        a call was answered with held at the moment of its row, for the price of the row alone.
        """
        with self._lock:
            if self._db().execute(_INSERT_IF_CURRENT, (*row, generation)).rowcount == 1:
                return True
            self._data_version = -1
            self._refresh()
            return False

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db().execute(sql, parameters).fetchall()

    def refresh(self) -> None:
        """See what other processes have changed."""
        with self._lock:
            self._refresh()

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
            self._forget()

    def _forget(self) -> None:
        self._keys.clear()
        self._alias_targets.clear()
        self._access_keys.clear()
        self._next_due = None

    def _meta(self, name: str) -> Any:
        rows = self.query("SELECT value FROM meta WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def _set_meta(self, name: str, value: Any) -> None:
        self._db().execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # -- keys --------------------------------------------------------------------------------

    def key(self, account: str, region: str, key_id: str) -> Key | None:
        """The key as it was at the last refresh()."""
        with self._lock:
            if self._depth:
                # A writer changes what it reads: its own copy, never one that others hold.
                return self._load_key(account, region, key_id)
            key = self._keys.get((account, region, key_id))
            if key is None:
                key = self._load_key(account, region, key_id)
                if key is not None:
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

    def count_keys(self, account: str, region: str) -> int:
        """The customer's keys in a Region."""
        rows = self.query(
            "SELECT (SELECT COUNT(*) FROM keys WHERE account = :account AND region = :region) - "
            "(SELECT COUNT(*) FROM aliases WHERE account = :account AND region = :region AND name GLOB 'alias/aws/*')",
            {"account": account, "region": region},
        )
        return int(rows[0][0])

    def all_keys(self) -> list[Key]:
        """Every key of every account and Region."""
        with self._lock:
            places = self.query("SELECT account, region, id FROM keys ORDER BY account, region, id")
            return [key for place in places if (key := self.key(*place)) is not None]

    def next_due(self) -> float:
        """When time alone changes a key for the next time; infinity when never."""
        with self._lock:
            if self._next_due is None:
                found = self.query("SELECT MIN(next_event) FROM keys")[0][0]
                self._next_due = math.inf if found is None else float(found)
            return self._next_due

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
        imports = key.imports
        if imports is None and key.imported_by_region and key.state == "PendingImport":
            imports = {}
        for material in key.materials:
            if imports is None:
                break
            held = imports.get(material.id)
            if held is None:
                material.sealed, held = None, [None, None, None]
            material.expiration_model, material.valid_to, material.description = held
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
        if key.imported_by_region:
            key.imports = {
                m.id: [m.expiration_model, m.valid_to, m.description]
                for m in key.materials
                if m.sealed is not None
            }
        record = {name: getattr(key, name) for name in _KEY_RECORD}
        if key.imports is None:
            del record["imports"]
        connection = self._db()
        connection.execute(
            "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?)",
            (key.account, key.region, key.id, key.next_event, json.dumps(record)),
        )
        self._save_materials(key)
        self.changed()

    def _save_materials(self, key: Key) -> None:
        elsewhere = self._imported_elsewhere(key)
        connection = self._db()
        connection.execute("DELETE FROM materials WHERE account = ? AND key = ?", (key.account, key.id))
        for ordinal, material in enumerate(key.materials):
            sealed = material.sealed if material.sealed is not None else elsewhere.get(material.id)
            connection.execute(
                "INSERT INTO materials VALUES (?, ?, ?, ?, ?)",
                (key.account, key.id, ordinal, json.dumps(material.record()), sealed),
            )

    def _imported_elsewhere(self, key: Key) -> dict[str, bytes]:
        """The sealed material that other Regions of a multi-Region key hold, by its id."""
        if not key.imported_by_region:
            return {}
        regions = [region for region in self.key_regions(key.account, key.id) if region != key.region]
        others = [self._load_key(key.account, region, key.id) for region in regions]
        materials = [material for other in others if other is not None for material in other.materials]
        return {m.id: m.sealed for m in materials if m.sealed is not None}

    def imported_elsewhere(self, key: Key, material_id: str) -> bool:
        """Whether another Region of this key holds imported material."""
        return material_id in self._imported_elsewhere(key)

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
        elif key.imported_by_region:
            for material in key.materials:
                material.sealed = None
            self._save_materials(key)
        self.changed()

    # -- material ------------------------------------------------------------------------------

    def seal_material(self, account: str, key_id: str, material_id: str, material: bytes) -> bytes:
        return self._sealed(material, self._material_aad(account, key_id, material_id))

    def open_material(self, key: Key, material: Material) -> bytes:
        """The material in clear; KeyAccessError when it was altered in the database."""
        opened = self._open_materials.get(material.id)
        if opened is None:
            if material.sealed is None:
                raise RuntimeError("internal error: material is absent")
            aad = self._material_aad(key.account, key.id, material.id)
            opened = self._unsealed(material.sealed, aad, key.arn)
            lock(opened)
            self._open_materials[material.id] = opened
        return opened

    def private_key(self, key: Key, generation: Material) -> Any:
        """The private key object of an asymmetric key; parsed once, because parsing RSA is slow."""
        private = self._private_keys.get(generation.id)
        if private is None:
            private = load_private(self.open_material(key, generation))
            self._private_keys[generation.id] = private
        return private

    def blob_key(self, key: Key, generation: Material) -> BlobKey:
        """What seals and opens the blobs of a symmetric key."""
        found = self._blob_keys.get(generation.id)
        if found is None:
            found = BlobKey(key.id, generation.id, self.open_material(key, generation))
            self._blob_keys[generation.id] = found
        return found

    def forget_material(self, material_id: str) -> None:
        self._open_materials.pop(material_id, None)
        self._private_keys.pop(material_id, None)
        self._blob_keys.pop(material_id, None)

    def _material_aad(self, account: str, key_id: str, material_id: str) -> bytes:
        return f"streamcrypt kms material 1|{self.id}|{account}|{key_id}|{material_id}".encode()

    def secret(self, purpose: bytes) -> bytes:
        """A secret of this store for one purpose: the key of grant tokens, of import tokens."""
        info = b"streamcrypt kms secret 1|" + self.id.encode() + b"|" + purpose
        return HKDFExpand(algorithm=hashes.SHA256(), length=rootkey.LENGTH, info=info).derive(self._root)

    # -- aliases ---------------------------------------------------------------------------------

    def alias_target(self, account: str, region: str, name: str) -> str | None:
        """The id of the key that ``alias/…`` names, as it was at the last refresh()."""
        with self._lock:
            place = (account, region, name)
            if not self._depth and place in self._alias_targets:
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
        grant = record.grant._asdict() | {"operations": sorted(record.grant.operations)}
        text = json.dumps(record._asdict() | {"grant": grant})
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

    def key_of_grant(self, grant_id: str) -> tuple[str, str, str] | None:
        """Account, Region and id of the key on which a grant was made."""
        rows = self.query("SELECT account, region, key FROM grants WHERE id = ?", (grant_id,))
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else None

    def keys_with_grants(self) -> list[tuple[str, str, str]]:
        rows = self.query("SELECT DISTINCT account, region, key FROM grants")
        return [(row[0], row[1], row[2]) for row in rows]

    # -- principals and their access keys ----------------------------------------------------

    def principal(self, arn: str) -> dict[str, Any] | None:
        rows = self.query("SELECT record FROM principals WHERE arn = ?", (arn,))
        record: dict[str, Any] | None = json.loads(rows[0][0]) if rows else None
        return record

    def put_principal(self, arn: str, record: dict[str, Any]) -> None:
        self._db().execute("INSERT OR REPLACE INTO principals VALUES (?, ?)", (arn, json.dumps(record)))
        self.changed()

    def put_access_key(self, key: AccessKey, now: float) -> None:
        sealed = self._sealed(key.secret.encode(), self._access_key_aad(key.id))
        self._db().execute(
            "INSERT INTO access_keys VALUES (?, ?, ?, ?, ?, ?)",
            (key.id, key.caller.arn, key.session_token, key.expires, now, sealed),
        )
        self.changed()

    def access_keys_of(self, arn: str) -> list[str]:
        """The ids of a principal's long-lived access keys, oldest first."""
        rows = self.query(
            "SELECT id FROM access_keys WHERE principal = ? AND session_token IS NULL ORDER BY created",
            (arn,),
        )
        return [row[0] for row in rows]

    def access_key(self, access_key_id: str) -> AccessKey | None:
        """The access key with its secret and its principal's policies, as every process sees it now."""
        with self._lock:
            self._refresh()
            found = self._access_keys.get(access_key_id)
            if found is None:
                found = self._load_access_key(access_key_id)
                if found is not None:
                    self._access_keys[access_key_id] = found
            return found

    def _load_access_key(self, access_key_id: str) -> AccessKey | None:
        rows = self.query(
            "SELECT principal, session_token, expires, sealed FROM access_keys WHERE id = ?", (access_key_id,)
        )
        if not rows:
            return None
        arn, token, expires, sealed = rows[0]
        record = self.principal(arn) or {}
        caller = policy.Caller(
            arn,
            policies=tuple(record.get("policies", ())),
            role=record.get("role"),
            access_key_id=access_key_id,
            tags=record.get("tags", {}),
        )
        secret = self._unsealed(sealed, self._access_key_aad(access_key_id), f"access key {access_key_id}")
        return AccessKey(access_key_id, secret.decode(), caller, token, expires)

    def _access_key_aad(self, access_key_id: str) -> bytes:
        return f"streamcrypt kms access key 1|{self.id}|{access_key_id}".encode()

    # -- backup --------------------------------------------------------------------------------

    def root_document(self, kind: str, passphrase: rootkey.Passphrase) -> dict[str, Any]:
        """The root key as a document of another kind, for a backup."""
        return rootkey.document(self._root, self.id, kind, passphrase)

    def copy_to(self, target: sqlite3.Connection) -> None:
        """A consistent copy of the database, also while others write."""
        with self._lock:
            self._db().backup(target)

    @property
    def backed_up(self) -> bool:
        return self._meta("backed_up") is not None

    def mark_backed_up(self) -> None:
        with self.transaction():
            self._set_meta("backed_up", self.clock())

    # -- sealing -----------------------------------------------------------------------------

    def _sealed(self, secret: bytes, aad: bytes) -> bytes:
        nonce = os.urandom(_NONCE_LENGTH)
        return nonce + self._seal.encrypt(nonce, secret, aad)

    def _unsealed(self, sealed: bytes, aad: bytes, name: str) -> bytes:
        try:
            return self._seal.decrypt(sealed[:_NONCE_LENGTH], sealed[_NONCE_LENGTH:], aad)
        except InvalidTag as error:
            raise KeyAccessError(
                f"{name}: its secret in {self._path} was altered; restore a backup"
            ) from error


_INSERT_IF_CURRENT: Final = (
    f"{audit.INTO} SELECT ?, ?, ?, ?, ?, ? "  # noqa: S608 - constants of ours
    "WHERE (SELECT value FROM meta WHERE name = 'generation') = ?"
)


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


# -- fork ------------------------------------------------------------------------------------------

_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_abandoned: list[sqlite3.Connection] = []


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
