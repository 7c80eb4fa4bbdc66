"""Modular files between us, pyarrow and Polars; and what a damaged footer is taken for."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from families.datasets import KEY, flip, make_key, make_table

import streamcrypt as sc
from streamcrypt import parquet
from streamcrypt.parquet.footer import read_footer, read_struct

polars = pytest.importorskip("polars", reason="POLARS IS MISSING: modular files were not read by it")
if not hasattr(polars, "ParquetDecryptionProperties"):
    pytest.skip("POLARS IS TOO OLD: it opens no modular files", allow_module_level=True)

PII = "local:alias/pii"


@pytest.fixture
def keys(home: Path) -> str:
    make_key()
    make_key("alias/pii")
    return KEY


def table() -> pa.Table:
    return make_table(3000).select(["id", "value", "name", "tags"])


@pytest.mark.parametrize("plaintext_footer", [False, True])
@pytest.mark.parametrize("column_keys", [{}, {PII: ["name"]}, {PII: ["tags"], KEY: ["id"]}])
def test_polars_reads_what_we_write(
    keys: str, tmp_path: Path, column_keys: dict, plaintext_footer: bool
) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(table(), path, keys=keys, column_keys=column_keys, plaintext_footer=plaintext_footer)
    expected = polars.from_arrow(table())
    assert polars.read_parquet(path, decryption=parquet.polars_decryption(path)).equals(expected)
    with path.open("rb") as file:
        properties = parquet.polars_decryption(file)
    assert (
        polars.scan_parquet(path, decryption=properties).select("id").collect().equals(expected.select("id"))
    )


def test_polars_without_the_key_of_a_column(keys: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(table(), path, keys=keys, column_keys={PII: ["name"]})
    properties = parquet.polars_decryption(path, KEY)
    assert polars.read_parquet(path, columns=["id"], decryption=properties).height == 3000
    with pytest.raises(polars.exceptions.PolarsError):
        polars.read_parquet(path, columns=["name"], decryption=properties)
    with pytest.raises(sc.KeyAccessError):
        parquet.polars_decryption(path, PII)


@pytest.mark.parametrize("double_wrapping", [False, True])
@pytest.mark.parametrize(
    "bits",
    [128, 256],  # Polars knows no others
)
def test_polars_reads_what_pyarrow_writes_with_our_client(
    keys: str, tmp_path: Path, bits: int, double_wrapping: bool
) -> None:
    path = tmp_path / "t.parquet"
    config = pe.EncryptionConfiguration(
        "f", column_keys={"c": ["name"]}, data_key_length_bits=bits, double_wrapping=double_wrapping
    )
    factory = parquet.crypto_factory(names={"f": KEY, "c": PII})
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
    pq.write_table(table(), path, encryption_properties=properties)
    frame = polars.read_parquet(path, decryption=parquet.polars_decryption(path))
    assert frame.equals(polars.from_arrow(table()))


def test_what_polars_writes_with_our_keys(keys: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    expected = polars.from_arrow(table())
    expected.write_parquet(path, encryption=parquet.polars_encryption(KEY, context={"Project": "Churn"}))
    assert path.read_bytes()[:4] == path.read_bytes()[-4:] == b"PARE"
    decryption = parquet.polars_decryption(path, context={"Project": "Churn"})
    assert polars.read_parquet(path, decryption=decryption).equals(expected)
    assert polars.from_arrow(parquet.read_table(path)).equals(expected)
    assert parquet.read_table(path, columns=["name"], keys=[PII, KEY]).num_rows == 3000
    with pytest.raises(sc.KeyAccessError):
        parquet.read_table(path, keys=PII)
    with pytest.raises(sc.ContextMismatchError):
        parquet.polars_decryption(path, context={"Project": "Other"})
    flip(path, path.stat().st_size // 2)
    with pytest.raises(sc.IntegrityError):
        parquet.read_table(path)


def test_polars_refuses_what_was_altered(keys: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(table(), path, keys=keys, column_keys={PII: ["name"]})
    expected = polars.from_arrow(table())
    whole = path.read_bytes()
    for place in random.Random(2).sample(range(4, len(whole)), 40):
        path.write_bytes(whole)
        flip(path, place)
        try:
            frame = polars.read_parquet(path, decryption=parquet.polars_decryption(path))
        except (sc.StreamcryptError, polars.exceptions.PolarsError, OSError):
            continue
        # The magic of the file's first bytes is nobody's; all else is authenticated.
        assert frame.equals(expected)


def test_any_bytes_are_a_footer_or_an_integrity_error(keys: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(table(), path, keys=keys, column_keys={PII: ["name"]}, plaintext_footer=True)
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    rng = random.Random(4)
    for _ in range(2000):
        footer = bytearray(whole[-8 - length :])
        for _ in range(rng.randrange(1, 4)):
            footer[rng.randrange(len(footer))] = rng.randrange(256)
        if rng.random() < 0.3:
            del footer[rng.randrange(len(footer)) : -8]
        try:
            read_footer(io.BytesIO(bytes(footer)), "t")
        except sc.IntegrityError:
            continue
    with pytest.raises(sc.IntegrityError):
        read_struct(b"\x1c" * 5000)  # nested without end
