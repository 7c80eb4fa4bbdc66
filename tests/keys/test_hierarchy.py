"""The hierarchy keyring and its branch-key stores: SQLite in the home, DynamoDB (moto's server)."""

from __future__ import annotations

import contextlib
import pickle
import sqlite3
import stat
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from families.aws import aws_client
from families.clock import Clock
from families.keyring import CONTEXT, UNSIGNED, KeyringTests

from streamcrypt.errors import IntegrityError, KeyAccessError, WrappedKeyError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.calls import KmsCalls, KmsStats
from streamcrypt.keys.hierarchy import (
    BranchKeyStore,
    DynamoBranchKeyTable,
    HierarchyKeyring,
    SqliteBranchKeyTable,
)
from streamcrypt.keys.reference import branch_key_store, decrypting_keyring, encrypting_keyring
from streamcrypt.kms import open_service


@pytest.fixture(params=["sqlite", "dynamodb"])
def place(request):
    return request.param


@pytest.fixture
def table(place, request, home):
    if place == "sqlite":
        return SqliteBranchKeyTable(home / "branch-keys.sqlite3")
    request.getfixturevalue("aws")
    client = aws_client("dynamodb")
    table = DynamoBranchKeyTable(lambda: client, f"keys-{uuid.uuid4()}")
    table.create_table()
    return table


@pytest.fixture
def stats():
    return KmsStats()


@pytest.fixture
def store(table, home, stats):
    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    calls = KmsCalls(service, stats=stats)
    return BranchKeyStore(table, lambda arn: calls, logical_name="logical", kms_key_arn=arn)


@pytest.fixture
def branch_key_id(store):
    return store.create(context={"tenant": "a"})


class TestHierarchy(KeyringTests):
    @pytest.fixture(params=["sqlite"])
    def place(self, request):
        return request.param

    @pytest.fixture
    def encrypting(self, store, branch_key_id):
        return HierarchyKeyring(store, branch_key_id)

    @pytest.fixture
    def decrypting(self, store, branch_key_id):
        return HierarchyKeyring(store, branch_key_id)

    def test_another_branch_key_is_not_ours(self, store, encrypting):
        _, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        with pytest.raises(KeyAccessError, match="branch key"):
            HierarchyKeyring(store, store.create()).unwrap(UNSIGNED, CONTEXT, encrypted)

    def test_rotation_keeps_old_versions_readable(self, store, branch_key_id, encrypting, decrypting):
        data_key, old = encrypting.generate(UNSIGNED, CONTEXT)
        version = store.rotate(branch_key_id)
        assert store.active(branch_key_id).version == version
        fresh = HierarchyKeyring(store, branch_key_id)
        _, new = fresh.generate(UNSIGNED, CONTEXT)
        assert new[0].ciphertext[28:44] == version.bytes
        assert old[0].ciphertext[28:44] != version.bytes
        assert fresh.unwrap(UNSIGNED, CONTEXT, old) == data_key
        assert decrypting.unwrap(UNSIGNED, CONTEXT, old) == data_key


def test_active_and_its_version_are_one_key(store, branch_key_id):
    active = store.active(branch_key_id)
    assert store.version(branch_key_id, active.version).key == active.key
    assert len(active.key) == 32
    assert active.key.hex() not in repr(active)
    with pytest.raises(TypeError):
        pickle.dumps(active)


def test_one_kms_call_until_the_ttl_ends(store, branch_key_id, stats):
    clock = Clock()
    keyring = HierarchyKeyring(store, branch_key_id, cache=DataKeyCache(max_age=60, clock=clock))
    before = stats.calls.get("Decrypt", 0)
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: keyring.generate(UNSIGNED, CONTEXT), range(64)))
    assert stats.calls["Decrypt"] - before == 1
    for data_key, encrypted in made:
        assert keyring.unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
    assert stats.calls["Decrypt"] - before == 2  # the active one, and its version
    clock.now += 61
    keyring.generate(UNSIGNED, CONTEXT)
    assert stats.calls["Decrypt"] - before == 3


def test_an_id_is_used_once(store, branch_key_id):
    with pytest.raises(KeyAccessError, match="exists"):
        store.create(branch_key_id)


def test_absent_keys(store, branch_key_id):
    with pytest.raises(KeyAccessError, match="the store has no"):
        store.active("absent")
    with pytest.raises(KeyAccessError, match="the store has no"):
        store.version(branch_key_id, uuid.uuid4())
    with pytest.raises(KeyAccessError, match="the store has no"):
        store.rotate("absent")


def test_another_wrapping_key_is_refused(table, store, branch_key_id, home):
    service = open_service(home)
    other = service.create_key()["KeyMetadata"]["Arn"]
    calls = KmsCalls(service)
    strict = BranchKeyStore(table, lambda arn: calls, logical_name="logical", kms_key_arn=other)
    with pytest.raises(KeyAccessError, match="only"):
        strict.active(branch_key_id)
    open_to_any = BranchKeyStore(table, lambda arn: calls, logical_name="logical")
    assert open_to_any.active(branch_key_id).key == store.active(branch_key_id).key
    with pytest.raises(ValueError, match="ARN"):
        open_to_any.create()


def test_another_logical_name_does_not_open(table, store, branch_key_id, home):
    calls = KmsCalls(open_service(home))
    with pytest.raises(WrappedKeyError):
        BranchKeyStore(table, lambda arn: calls, logical_name="other").active(branch_key_id)


class Tampering:
    """A table that hands out altered rows."""

    identity = "tampering"

    def __init__(self, table, change) -> None:
        self.table = table
        self.change = change

    def get(self, branch_key_id, kind):
        row = self.table.get(branch_key_id, kind)
        self.change(row)
        return row


CHANGES = {
    "another id": lambda row: row.update({"branch-key-id": "other"}),
    "another version": lambda row: row.update(version=f"branch:version:{uuid.uuid4()}"),
    "no version": lambda row: row.pop("version"),
    "another time": lambda row: row.update({"create-time": "2020-01-01T00:00:00.000000Z"}),
    "another context": lambda row: row.update({"aws-crypto-ec:tenant": "b"}),
    "no context": lambda row: row.pop("aws-crypto-ec:tenant"),
    "another hierarchy version": lambda row: row.update({"hierarchy-version": "2"}),
    "no key": lambda row: row.pop("enc"),
    "a damaged key": lambda row: row.update(enc=row["enc"][:-1] + bytes([row["enc"][-1] ^ 1])),
    "no ARN": lambda row: row.pop("kms-arn"),
    "a row of another kind": lambda row: row.update(type="beacon:ACTIVE"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_altered_rows_do_not_open(home, change):
    table = SqliteBranchKeyTable(home / "branch-keys.sqlite3")
    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    calls = KmsCalls(service)
    branch_key_id = BranchKeyStore(table, lambda arn: calls, logical_name="x", kms_key_arn=arn).create(
        context={"tenant": "a"}
    )
    altered = BranchKeyStore(Tampering(table, change), lambda arn: calls, logical_name="x")
    with pytest.raises(IntegrityError):
        altered.active(branch_key_id)


def test_a_whole_row_in_another_place_does_not_open(home):
    """Whoever writes to the store could have one tenant's data wrapped for another."""
    path = home / "branch-keys.sqlite3"
    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    calls = KmsCalls(service)
    store = BranchKeyStore(SqliteBranchKeyTable(path), lambda arn: calls, logical_name="x", kms_key_arn=arn)
    ours, theirs = store.create(context={"tenant": "a"}), store.create(context={"tenant": "b"})
    old = store.active(ours).version
    store.rotate(ours)
    new = store.active(ours).version

    def put(row, place):
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            select = "SELECT item FROM branch_keys WHERE branch_key_id = ? AND type = ?"
            (item,) = connection.execute(select, row).fetchone()
            connection.execute(
                "UPDATE branch_keys SET item = ? WHERE branch_key_id = ? AND type = ?", (item, *place)
            )

    put((theirs, "branch:ACTIVE"), (ours, "branch:ACTIVE"))
    with pytest.raises(IntegrityError, match="another key's row"):
        store.active(ours)
    put((ours, f"branch:version:{old}"), (ours, "branch:ACTIVE"))
    with pytest.raises(IntegrityError, match="another key's row"):
        store.active(ours)
    put((ours, f"branch:version:{new}"), (ours, f"branch:version:{old}"))
    with pytest.raises(IntegrityError, match="another key's row"):
        store.version(ours, old)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE branch_keys SET item = '{\"enc\": 1}'")
    with pytest.raises(IntegrityError, match="malformed"):
        store.version(ours, new)


def test_the_file_is_private_and_whole(home):
    path = home / "kms" / "branch-keys.sqlite3"
    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    store = branch_key_store("local", kms_key_arn=arn)
    branch_key_id = store.create()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute("SELECT count(*) FROM branch_keys").fetchone() == (3,)
    connection.close()
    key = store.active(branch_key_id).key
    assert key not in path.read_bytes()
    # A rotation that fails half-way leaves nothing behind.
    service.disable_key(KeyId=arn)
    with pytest.raises(KeyAccessError, match="Disabled"):
        store.rotate(branch_key_id)
    service.enable_key(KeyId=arn)
    assert store.active(branch_key_id).key == key


def test_references(home, aws):
    arn = open_service(home).create_key()["KeyMetadata"]["Arn"]
    local = branch_key_store("local", kms_key_arn=arn).create("tenant-a")
    reference = f"hierarchy:{local}@local"
    data_key, encrypted = encrypting_keyring(reference).generate(UNSIGNED, CONTEXT)
    assert decrypting_keyring(reference).unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
    assert encrypting_keyring(reference).identity == encrypting_keyring(reference).identity

    name = f"keys-{uuid.uuid4()}"
    DynamoBranchKeyTable(lambda: aws_client("dynamodb"), name).create_table()
    key = aws_client("kms").create_key()["KeyMetadata"]["Arn"]
    place = f"dynamodb:{name}?logical=production"
    branch_key_id = branch_key_store(place, kms_key_arn=key).create()
    reference = f"hierarchy:{branch_key_id}@{place}&kms={key}&ttl=5m"
    data_key, encrypted = encrypting_keyring(reference).generate(UNSIGNED, CONTEXT)
    assert decrypting_keyring(reference).unwrap(UNSIGNED, CONTEXT, encrypted) == data_key


def test_a_table_that_is_not_there(aws):
    store = branch_key_store("dynamodb:no-such-table")
    with pytest.raises(KeyAccessError, match="DynamoDB refused GetItem") as caught:
        store.active("id")
    assert caught.value.code == "ResourceNotFoundException"
