"""What the tests of the adapters share: a key in this test's home, and small tables."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

KEY = "local:alias/ml"


def make_key(alias: str = "alias/ml") -> str:
    """A key of the embedded KMS under ``alias``; returns its ARN."""
    from streamcrypt.kms import open_service

    service = open_service()
    metadata = service.create_key()["KeyMetadata"]
    service.create_alias(AliasName=alias, TargetKeyId=metadata["KeyId"])
    return str(metadata["Arn"])


def make_table(rows: int = 10_000) -> Any:
    """A table of the types that training data has, with nulls."""
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(7)
    ids = np.arange(rows, dtype=np.int64)
    return pa.table(
        {
            "id": ids,
            "day": pa.array((ids % 365).astype(np.int32)),
            "value": pa.array(random.random(rows), mask=random.random(rows) < 0.05),
            "flag": pa.array((ids % 3 == 0).tolist(), pa.bool_()),
            "name": pa.array([None if i % 11 == 0 else f"row {i % 97}" for i in range(rows)], pa.string()),
            "tags": pa.array([["x"] * (i % 4) for i in range(rows)], pa.list_(pa.string())),
            "when": pa.array(ids * 1_000_000, pa.timestamp("us")),
        }
    )


def kms_calls(home: Path) -> Counter[str]:
    """How often each operation of the home's KMS was called so far, by any process."""
    with contextlib.closing(sqlite3.connect(home / "kms" / "kms.sqlite")) as database:
        return Counter(dict(database.execute("SELECT operation, count(*) FROM audit GROUP BY operation")))


def flip(path: Path, offset: int) -> None:
    """Flip one bit of a file; a negative offset counts from its end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
