"""Hierarchy keyring: data keys are wrapped locally under a branch key, and KMS wraps the branch key.

    info        branch key id
    ciphertext  salt 16 ‖ IV 12 ‖ version UUID 16 ‖ AES-256-GCM(wrapping key, IV, data key)
    wrapping key = KDF-CTR(HMAC-SHA-256, branch key, "aws-kms-hierarchy", salt, 32 bytes)
    AAD          "aws-kms-hierarchy" ‖ branch key id ‖ version ‖ encryption context

Branch keys lie in a table, each wrapped by KMS under a context made of its own row, so a row that
was changed or moved does not open:

    branch-key-id | type = branch:ACTIVE          | version = branch:version:UUID | enc | …
    branch-key-id | type = branch:version:UUID    |                               | enc | …
    branch-key-id | type = beacon:ACTIVE          |                               | enc | …

One KMS call then serves all messages for as long as a branch key may be kept.

Source: AWS Encryption SDK specification, framework/aws-kms/aws-kms-hierarchical-keyring.md and
framework/branch-key-store.md (hierarchy version 1).
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from streamcrypt.errors import IntegrityError, KeyAccessError, KeyUnavailableError, WrappedKeyError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.calls import KmsCalls, classify, error_code, require_bytes
from streamcrypt.keys.ecdh import kdf_counter
from streamcrypt.keys.keyring import HIERARCHY_PROVIDER, KeyHolder, Keyring, printable
from streamcrypt.keys.kms import KeyArn
from streamcrypt.message.context import serialize_context
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import IV_LENGTH, TAG_LENGTH, AlgorithmSuite
from streamcrypt.system import missing_folders, sync_name
from streamcrypt.tuples import NamedTuple

BRANCH_KEY_LENGTH: Final = 32
DEFAULT_TTL: Final = 600.0  # seconds for which a branch key is kept before KMS is asked again

_SALT_LENGTH: Final = 16
_VERSION_LENGTH: Final = 16
_LABEL: Final = HIERARCHY_PROVIDER.encode()

_ACTIVE: Final = "branch:ACTIVE"
_VERSION_PREFIX: Final = "branch:version:"
_BEACON: Final = "beacon:ACTIVE"
_CONTEXT_PREFIX: Final = "aws-crypto-ec:"

#: A row: its attributes, ``enc`` as bytes and all others as text.
Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BranchKey(KeyHolder):
    """One version of a branch key, in clear."""

    branch_key_id: str
    version: uuid.UUID
    key: bytes = field(repr=False)


class BranchKeyFacts(NamedTuple):
    """What a row of the store says of a branch key, without the key."""

    branch_key_id: str
    version: str
    created: str
    kms_arn: str
    context: dict[str, str]


class BranchKeySource(Protocol):
    """Where the keyring gets branch keys from."""

    @property
    def identity(self) -> Hashable: ...

    def active(self, branch_key_id: str) -> BranchKey: ...

    def version(self, branch_key_id: str, version: uuid.UUID) -> BranchKey: ...


class HierarchyKeyring(Keyring):
    """Wraps under the active version of one branch key, unwraps under any version of it.

    A branch key is kept for ``ttl`` seconds, in ``cache`` where one is given (its own age limit
    counts then); many threads that need it at once ask once.
    """

    def __init__(
        self,
        source: BranchKeySource,
        branch_key_id: str,
        *,
        ttl: float = DEFAULT_TTL,
        cache: DataKeyCache | None = None,
    ) -> None:
        if not branch_key_id:
            raise ValueError("a hierarchy keyring needs the id of a branch key")
        self._source = source
        self._branch_key_id = branch_key_id
        self._cache = cache if cache is not None else DataKeyCache(max_age=ttl)

    @property
    def identity(self) -> Hashable:
        return (HIERARCHY_PROVIDER, self._source.identity, self._branch_key_id)

    def describe(self) -> str:
        return f"branch key {printable(self._branch_key_id)}"

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        branch_key: BranchKey = self._cache.decryption(
            (self.identity, None), lambda: self._source.active(self._branch_key_id)
        )
        salt, iv = os.urandom(_SALT_LENGTH), os.urandom(IV_LENGTH)
        sealed = self._cipher(branch_key, salt).encrypt(iv, data_key, self._aad(branch_key.version, context))
        ciphertext = salt + iv + branch_key.version.bytes + sealed
        return (EncryptedDataKey(HIERARCHY_PROVIDER, self._branch_key_id.encode(), ciphertext),)

    def _matches(self, encrypted: EncryptedDataKey) -> bool:
        return encrypted.provider_id == HIERARCHY_PROVIDER and encrypted.info == self._branch_key_id.encode()

    def _open(self, suite: AlgorithmSuite, context: Mapping[str, str], encrypted: EncryptedDataKey) -> bytes:
        ciphertext = encrypted.ciphertext
        iv_start, version_start = _SALT_LENGTH, _SALT_LENGTH + IV_LENGTH
        sealed_start = version_start + _VERSION_LENGTH
        try:
            if len(ciphertext) != sealed_start + suite.key_length + TAG_LENGTH:
                raise InvalidTag
            version = uuid.UUID(bytes=ciphertext[version_start:sealed_start])
            branch_key: BranchKey = self._cache.decryption(
                (self.identity, version), lambda: self._source.version(self._branch_key_id, version)
            )
            cipher = self._cipher(branch_key, ciphertext[:_SALT_LENGTH])
            aad = self._aad(version, context)
            return cipher.decrypt(ciphertext[iv_start:version_start], ciphertext[sealed_start:], aad)
        except InvalidTag as error:
            raise WrappedKeyError(
                f"{self.describe()}: the wrapped data key does not open; it or the encryption context was altered",
                key=self.describe(),
            ) from error

    @staticmethod
    def _cipher(branch_key: BranchKey, salt: bytes) -> AESGCM:
        return AESGCM(kdf_counter(hashes.SHA256(), branch_key.key, _LABEL, salt, BRANCH_KEY_LENGTH))

    def _aad(self, version: uuid.UUID, context: Mapping[str, str]) -> bytes:
        return _LABEL + self._branch_key_id.encode() + version.bytes + serialize_context(context)


class BranchKeyTable(Protocol):
    """Rows of branch keys."""

    @property
    def identity(self) -> Hashable: ...

    def get(self, branch_key_id: str, kind: str) -> Item | None:
        """One row, or None."""

    def active_rows(self) -> list[Item]:
        """The active row of every branch key, by id."""

    def version_rows(self, branch_key_id: str) -> list[Item]:
        """The rows of a branch key's versions."""

    def write(self, new: Sequence[Item], replaced: Sequence[Item]) -> None:
        """All rows or none: ``new`` must not exist yet, ``replaced`` must.  KeyAccessError otherwise."""


class BranchKeyStore:
    """Branch keys in a table, wrapped by KMS.

    ``reach`` gives the calls to the KMS of a key ARN.  ``logical_name`` is bound to every row, and
    stays when a table is restored under another name.  ``kms_key_arn`` is the one key that may wrap
    branch keys; without it whoever can write the table chooses the key (AWS: discovery).
    """

    def __init__(
        self,
        table: BranchKeyTable,
        reach: Callable[[KeyArn], KmsCalls],
        *,
        logical_name: str,
        kms_key_arn: str | None = None,
    ) -> None:
        if kms_key_arn is not None and KeyArn.parse(kms_key_arn).kind != "key":
            raise ValueError("branch keys are wrapped by a KMS key named by its key ARN, not an alias")
        self._table = table
        self._reach = reach
        self._logical_name = logical_name
        self._kms_key_arn = kms_key_arn

    @property
    def identity(self) -> Hashable:
        return (self._table.identity, self._logical_name, self._kms_key_arn)

    def active(self, branch_key_id: str) -> BranchKey:
        """The version to encrypt with; one call to KMS."""
        return self._open(self._get(branch_key_id, _ACTIVE))

    def version(self, branch_key_id: str, version: uuid.UUID) -> BranchKey:
        """A version by its UUID; one call to KMS."""
        return self._open(self._get(branch_key_id, f"{_VERSION_PREFIX}{version}"))

    def create(self, branch_key_id: str | None = None, context: Mapping[str, str] | None = None) -> str:
        """A new branch key; its id (default: a UUID).  ``context`` is bound to it for good."""
        if self._kms_key_arn is None:
            raise ValueError("making a branch key needs the ARN of the KMS key that wraps it")
        branch_key_id = branch_key_id or str(uuid.uuid4())
        row = {
            "branch-key-id": branch_key_id,
            "type": f"{_VERSION_PREFIX}{uuid.uuid4()}",
            "create-time": _now(),
            "kms-arn": self._kms_key_arn,
            "hierarchy-version": "1",
            **{f"{_CONTEXT_PREFIX}{name}": value for name, value in (context or {}).items()},
        }
        version_row, active_row = self._new_version(row)
        beacon = row | {"type": _BEACON}
        beacon_row = beacon | {"enc": self._generate(beacon)}
        self._table.write(new=[version_row, active_row, beacon_row], replaced=[])
        return branch_key_id

    def facts(self, branch_key_id: str | None = None) -> list[BranchKeyFacts]:
        """What the table says of every active branch key, or of one key's versions, oldest first.

        No key is opened and KMS is not called, so nothing of it is authenticated.
        """
        if branch_key_id is None:
            rows = self._table.active_rows()
        else:
            self._get(branch_key_id, _ACTIVE)
            rows = self._table.version_rows(branch_key_id)
            rows.sort(key=lambda row: str(row.get("create-time")))
        return [_facts(row) for row in rows]

    def rotate(self, branch_key_id: str) -> uuid.UUID:
        """A new active version; older ones go on decrypting."""
        active = self._get(branch_key_id, _ACTIVE)
        self._open(active)  # nothing is derived from a row that is not whole
        row = {name: value for name, value in active.items() if name not in ("version", "enc")}
        version = uuid.uuid4()
        row |= {"type": f"{_VERSION_PREFIX}{version}", "create-time": _now()}
        version_row, active_row = self._new_version(row)
        self._table.write(new=[version_row], replaced=[active_row])
        return version

    def _new_version(self, row: Item) -> tuple[Item, Item]:
        arn = row["kms-arn"]
        active = row | {"type": _ACTIVE, "version": row["type"]}
        blob = self._generate(row)
        response = self._calls(arn).call(
            "ReEncrypt",
            arn,
            CiphertextBlob=blob,
            SourceKeyId=arn,
            SourceEncryptionContext=self._context(row),
            DestinationKeyId=arn,
            DestinationEncryptionContext=self._context(active),
        )
        if response.get("KeyId") != arn or response.get("SourceKeyId") != arn:
            raise IntegrityError(f"{arn}: KMS answered ReEncrypt for another key; the answer is refused")
        active_blob = require_bytes(response, "CiphertextBlob", arn, "ReEncrypt")
        return row | {"enc": blob}, active | {"enc": active_blob}

    def _generate(self, row: Item) -> bytes:
        arn = row["kms-arn"]
        response = self._calls(arn).call(
            "GenerateDataKeyWithoutPlaintext",
            arn,
            KeyId=arn,
            NumberOfBytes=BRANCH_KEY_LENGTH,
            EncryptionContext=self._context(row),
        )
        if response.get("KeyId") != arn:
            raise IntegrityError(f"{arn}: KMS answered for another key; the answer is refused")
        return require_bytes(response, "CiphertextBlob", arn, "GenerateDataKeyWithoutPlaintext")

    def _get(self, branch_key_id: str, kind: str) -> Item:
        row = self._table.get(branch_key_id, kind)
        if row is None:
            raise KeyAccessError(
                f"branch key {printable(branch_key_id)}: the store has no {printable(kind)}; "
                "check the id and the store, or create the branch key",
                key=branch_key_id,
            )
        # A whole row of another branch key, or of another version, opens under its own context.
        if (row.get("branch-key-id"), row.get("type")) != (branch_key_id, kind):
            raise IntegrityError(
                f"branch key {printable(branch_key_id)}: the store holds another key's row as its "
                f"{printable(kind)}: altered"
            )
        return row

    def _open(self, row: Item) -> BranchKey:
        branch_key_id = str(row.get("branch-key-id", ""))
        name = f"branch key {printable(branch_key_id)}"
        # Of the active row the version, of a version's row the type says which version it is.
        kind = str(row.get("version", row.get("type", "")))
        try:
            if not kind.startswith(_VERSION_PREFIX) or row.get("hierarchy-version") != "1":
                raise ValueError("not a branch key")
            version = uuid.UUID(kind.removeprefix(_VERSION_PREFIX))
            arn = KeyArn.parse(str(row["kms-arn"]))
            blob = bytes(row["enc"])
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{name}: its row in the store is malformed") from error
        if self._kms_key_arn is not None and not KeyArn.parse(self._kms_key_arn).matches_multi_region(arn):
            raise KeyAccessError(
                f"{name}: wrapped by {arn}, and only {self._kms_key_arn} is allowed", key=str(arn)
            )
        key_arn = self._kms_key_arn or str(arn)
        response = self._calls(key_arn).call(
            "Decrypt",
            f"{name} ({key_arn})",
            KeyId=key_arn,
            CiphertextBlob=blob,
            EncryptionContext=self._context(row),
        )
        if response.get("KeyId") != key_arn:
            raise IntegrityError(f"{name}: KMS answered Decrypt for another key; the answer is refused")
        key = require_bytes(response, "Plaintext", name, "Decrypt")
        if len(key) != BRANCH_KEY_LENGTH:
            raise IntegrityError(f"{name}: KMS's answer has a wrong length; it is refused")
        return BranchKey(branch_key_id, version, key)

    def _context(self, row: Item) -> dict[str, str]:
        context = {name: str(value) for name, value in row.items() if name != "enc"}
        return context | {"tablename": self._logical_name}

    def _calls(self, arn: str) -> KmsCalls:
        return self._reach(KeyArn.parse(arn))


def _facts(row: Item) -> BranchKeyFacts:
    return BranchKeyFacts(
        str(row.get("branch-key-id", "")),
        str(row.get("version", row.get("type", ""))).removeprefix(_VERSION_PREFIX),
        str(row.get("create-time", "")),
        str(row.get("kms-arn", "")),
        {
            name.removeprefix(_CONTEXT_PREFIX): str(value)
            for name, value in row.items()
            if name.startswith(_CONTEXT_PREFIX)
        },
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class SqliteBranchKeyTable:
    """Branch keys in one SQLite file, mode 0600.  Two processes may use it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def identity(self) -> Hashable:
        return ("sqlite", str(self._path.absolute()))

    def get(self, branch_key_id: str, kind: str) -> Item | None:
        if not self._path.exists():
            return None
        with self._connection() as connection:
            found = connection.execute(
                "SELECT item FROM branch_keys WHERE branch_key_id = ? AND type = ?", (branch_key_id, kind)
            ).fetchone()
        return None if found is None else self._row(found[0])

    def active_rows(self) -> list[Item]:
        return self._rows("type = ? ORDER BY branch_key_id", (_ACTIVE,))

    def version_rows(self, branch_key_id: str) -> list[Item]:
        # A range, not LIKE: an index serves it, and no id has a wildcard.
        after = _VERSION_PREFIX[:-1] + ";"
        return self._rows(
            "branch_key_id = ? AND type > ? AND type < ?", (branch_key_id, _VERSION_PREFIX, after)
        )

    def _rows(self, condition: str, values: Sequence[str]) -> list[Item]:
        if not self._path.exists():
            return []
        with self._connection() as connection:
            found = connection.execute(
                f"SELECT item FROM branch_keys WHERE {condition}",  # noqa: S608 - a constant of this class
                values,
            ).fetchall()
        return [self._row(text) for (text,) in found]

    @staticmethod
    def _row(text: str) -> Item:
        try:
            row: Item = json.loads(text)
            row["enc"] = base64.b64decode(row["enc"])
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError("a row of the branch-key store is malformed") from error
        return row

    def write(self, new: Sequence[Item], replaced: Sequence[Item]) -> None:
        missing = missing_folders(str(self._path.parent.absolute()))
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in missing:
            sync_name(folder)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        with self._connection() as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS branch_keys (branch_key_id TEXT, type TEXT, item TEXT NOT NULL, "
                "PRIMARY KEY (branch_key_id, type)) WITHOUT ROWID"
            )
            try:
                for row in new:
                    connection.execute("INSERT INTO branch_keys VALUES (?, ?, ?)", self._columns(row))
                for row in replaced:
                    name, kind, item = self._columns(row)
                    connection.execute(
                        "UPDATE branch_keys SET item = ? WHERE branch_key_id = ? AND type = ?",
                        (item, name, kind),
                    )
                    if connection.execute("SELECT changes()").fetchone()[0] != 1:
                        raise KeyAccessError(f"branch key {printable(name)}: gone from the store meanwhile")
            except sqlite3.IntegrityError as error:
                name = printable(new[0]["branch-key-id"])
                raise KeyAccessError(f"branch key {name}: exists already; choose another id") from error

    @staticmethod
    def _columns(row: Item) -> tuple[str, str, str]:
        item = row | {"enc": base64.b64encode(row["enc"]).decode()}
        return row["branch-key-id"], row["type"], json.dumps(item, sort_keys=True)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection with one transaction: committed at the end, rolled back by an exception."""
        try:
            with contextlib.closing(
                sqlite3.connect(self._path, timeout=30, isolation_level=None)
            ) as connection:
                # A transaction ends when its journal is gone: with FULL a power loss may bring the journal
                # back, and take away what was returned.
                connection.execute("PRAGMA synchronous = EXTRA")
                connection.execute("BEGIN IMMEDIATE")
                with connection:
                    yield connection
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise KeyAccessError(f"{self._path}: the branch-key store cannot be used ({error})") from error


class DynamoBranchKeyTable:
    """Branch keys in a DynamoDB table of AWS's branch key store schema.

    ``client`` is a boto3 DynamoDB client.  Other implementations of the hierarchy keyring read what
    this one writes, and the reverse.
    """

    def __init__(self, connect: Callable[[], Any], table: str, *, identity: Hashable = None) -> None:
        self._connect = connect
        self._table = table
        self._identity = identity

    @property
    def identity(self) -> Hashable:
        return ("dynamodb", self._table, self._identity)

    @property
    def name(self) -> str:
        """The name of the DynamoDB table."""
        return self._table

    def get(self, branch_key_id: str, kind: str) -> Item | None:
        key = {"branch-key-id": {"S": branch_key_id}, "type": {"S": kind}}
        response = self._call("GetItem", "get_item", TableName=self._table, Key=key, ConsistentRead=True)
        found = response.get("Item")
        return None if found is None else _from_dynamo(found)

    def active_rows(self) -> list[Item]:
        # The key store's schema has no index on the type, so the table is read.
        rows = self._pages(
            "Scan",
            "scan",
            FilterExpression="#type = :active",
            ExpressionAttributeNames={"#type": "type"},
            ExpressionAttributeValues={":active": {"S": _ACTIVE}},
        )
        return sorted(rows, key=lambda row: str(row["branch-key-id"]))

    def version_rows(self, branch_key_id: str) -> list[Item]:
        return self._pages(
            "Query",
            "query",
            KeyConditionExpression="#id = :id AND begins_with(#type, :version)",
            ExpressionAttributeNames={"#id": "branch-key-id", "#type": "type"},
            ExpressionAttributeValues={":id": {"S": branch_key_id}, ":version": {"S": _VERSION_PREFIX}},
        )

    def _pages(self, operation: str, method: str, **request: Any) -> list[Item]:
        rows: list[Item] = []
        while True:
            response = self._call(operation, method, TableName=self._table, ConsistentRead=True, **request)
            rows += [_from_dynamo(item) for item in response.get("Items", ())]
            if not response.get("LastEvaluatedKey"):
                return rows
            request["ExclusiveStartKey"] = response["LastEvaluatedKey"]

    def write(self, new: Sequence[Item], replaced: Sequence[Item]) -> None:
        puts = [(row, "attribute_not_exists") for row in new] + [
            (row, "attribute_exists") for row in replaced
        ]
        items = [
            {
                "Put": {
                    "TableName": self._table,
                    "Item": _to_dynamo(row),
                    "ConditionExpression": f"{condition}(#id)",
                    "ExpressionAttributeNames": {"#id": "branch-key-id"},
                }
            }
            for row, condition in puts
        ]
        self._call("TransactWriteItems", "transact_write_items", TransactItems=items)

    def create_table(self) -> None:
        """Make the table, with billing by request; it must not exist."""
        names = ("branch-key-id", "type")
        self._call(
            "CreateTable",
            "create_table",
            TableName=self._table,
            AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in names],
            KeySchema=[
                {"AttributeName": n, "KeyType": k} for n, k in zip(names, ("HASH", "RANGE"), strict=True)
            ],
            BillingMode="PAY_PER_REQUEST",
        )

    def _call(self, operation: str, method: str, **request: Any) -> dict[str, Any]:
        where = f"branch-key table {printable(self._table)}"
        try:
            response: dict[str, Any] = getattr(self._connect(), method)(**request)
        except Exception as error:
            outcome = classify(error)
            if outcome is None:
                raise
            code = error_code(error)
            if outcome.throttled or outcome.unreachable:
                raise KeyUnavailableError(
                    f"{where}: DynamoDB did not answer {operation} ({code or type(error).__name__}); try again",
                    code=code,
                    operation=operation,
                    key=self._table,
                ) from error
            if code == "TransactionCanceledException":
                why, hint = "a branch key of that id exists, or is gone", "choose another id, or try again"
            else:
                # IAM knows a transaction by what it does: each of ours puts rows.
                action = "PutItem" if operation == "TransactWriteItems" else operation
                why, hint = printable(str(error)), f"the caller needs dynamodb:{action} on the table"
            raise KeyAccessError(
                f"{where}: DynamoDB refused {operation}: {why}; {hint}",
                code=code,
                operation=operation,
                key=self._table,
            ) from error
        return response


def _from_dynamo(item: Mapping[str, Mapping[str, Any]]) -> Item:
    return {name: next(iter(value.values())) for name, value in item.items()}


def _to_dynamo(row: Item) -> dict[str, dict[str, Any]]:
    kinds = {"enc": "B", "hierarchy-version": "N"}
    return {name: {kinds.get(name, "S"): value} for name, value in row.items()}
