"""Modular Parquet files between us and Spark, both ways.

pyspark is not in the default install (500 MB): pip install pyspark, and a JDK of 17 or newer.  Spark's key
tools want a KmsClient in Java: ``CLIENT`` is one for raw AES keys, written from what parquet/modular.py and
the AWS Encryption SDK's specification say, and it is compiled here.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families.datasets import flip, make_table

import streamcrypt as sc
from streamcrypt import parquet

pyspark = pytest.importorskip(
    "pyspark", reason="PYSPARK IS MISSING: modular files were not exchanged with Spark"
)
if shutil.which("javac") is None:
    pytest.skip("A JDK IS MISSING: modular files were not exchanged with Spark", allow_module_level=True)

pytestmark = pytest.mark.timeout(900)  # a JVM on a busy machine

CLIENT = """
import java.nio.ByteBuffer;
import java.util.Base64;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import javax.crypto.Cipher;
import javax.crypto.spec.GCMParameterSpec;
import javax.crypto.spec.SecretKeySpec;
import org.apache.hadoop.conf.Configuration;
import org.apache.parquet.crypto.keytools.KmsClient;

public class RawAesClient implements KmsClient {
    private static final Pattern KEY = Pattern.compile("\\\\[\\"(.*?)\\",\\"(.*?)\\",\\"(.*?)\\"\\\\]");
    private Configuration configuration;

    public void initialize(Configuration configuration, String id, String url, String token) {
        this.configuration = configuration;
    }

    private byte[] run(int mode, String name, byte[] iv, byte[] data) {
        try {
            byte[] key = Base64.getDecoder().decode(configuration.get("test.key." + name));
            Cipher cipher = Cipher.getInstance("AES/GCM/NoPadding");
            cipher.init(mode, new SecretKeySpec(key, "AES"), new GCMParameterSpec(128, iv));
            return cipher.doFinal(data);
        } catch (Exception error) {
            throw new RuntimeException("the key does not open: " + error);
        }
    }

    public String wrapKey(byte[] key, String name) {
        byte[] iv = new byte[12];
        new java.security.SecureRandom().nextBytes(iv);
        byte[] info = ByteBuffer.allocate(name.length() + 20).put(name.getBytes()).putInt(128).putInt(12).put(iv).array();
        Base64.Encoder text = Base64.getEncoder();
        String sealed = text.encodeToString(run(Cipher.ENCRYPT_MODE, name, iv, key));
        return text.encodeToString(("{\\"version\\":1,\\"context\\":{},\\"keys\\":[[\\"ns\\",\\""
            + text.encodeToString(info) + "\\",\\"" + sealed + "\\"]]}").getBytes());
    }

    public byte[] unwrapKey(String wrapped, String name) {
        Matcher found = KEY.matcher(new String(Base64.getDecoder().decode(wrapped)));
        if (!found.find()) throw new RuntimeException("no key");
        byte[] info = Base64.getDecoder().decode(found.group(2));
        byte[] iv = java.util.Arrays.copyOfRange(info, info.length - 12, info.length);
        return run(Cipher.DECRYPT_MODE, new String(info, 0, info.length - 20), iv, Base64.getDecoder().decode(found.group(3)));
    }
}
"""  # noqa: E501

TABLE = make_table(3000).select(["id", "day", "value", "flag", "name", "tags"])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """References of two raw AES keys by their names."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("footer", "pii"):
        (folder / name).write_bytes(os.urandom(32))
        (folder / name).chmod(0o600)
    return {name: f"raw-aes:ns/{name}@{folder / name}" for name in ("footer", "pii")}


@pytest.fixture(scope="module")
def spark(keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from pyspark.sql import SparkSession

    folder = tmp_path_factory.mktemp("spark")
    (folder / "RawAesClient.java").write_text(CLIENT)
    jars = Path(pyspark.__file__).parent / "jars"
    subprocess.run(
        ["javac", "-cp", f"{jars}/*", "-d", folder, folder / "RawAesClient.java"],
        check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    builder = (
        SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", "1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.extraClassPath", str(folder))
        .config("spark.sql.warehouse.dir", str(folder / "warehouse"))
        .config("spark.hadoop.parquet.encryption.kms.client.class", "RawAesClient")
    )
    for name, value in {
        "parquet.crypto.factory.class": "org.apache.parquet.crypto.keytools.PropertiesDrivenCryptoFactory",
        **{
            f"test.key.{name}": base64.b64encode(key_of(reference)).decode()
            for name, reference in keys.items()
        },
    }.items():
        builder = builder.config(f"spark.hadoop.{name}", value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()
    gateway = pyspark.SparkContext._gateway
    gateway.shutdown()
    gateway.proc.stdin.close()  # tells the process to end
    gateway.proc.wait(60)
    pyspark.SparkContext._gateway = pyspark.SparkContext._jvm = None


def key_of(reference: str) -> bytes:
    return Path(reference.partition("@")[2]).read_bytes()


def rows(frame: Any) -> list[dict[str, Any]]:
    return [row.asDict(recursive=True) for row in frame.orderBy("id").collect()]


@pytest.mark.parametrize("plaintext_footer", [False, True], ids=["sealed footer", "plain footer"])
@pytest.mark.parametrize("columns", [None, ["name"], ["tags", "id"]], ids=["one key", "column", "columns"])
def test_spark_reads_what_we_write(
    spark: Any, keys: dict[str, str], tmp_path: Path, columns: list[str] | None, plaintext_footer: bool
) -> None:
    path = tmp_path / "t.parquet"
    column_keys = {keys["pii"]: columns} if columns else {}
    parquet.write_table(
        TABLE,
        path,
        keys=keys["footer"],
        column_keys=column_keys,
        plaintext_footer=plaintext_footer,
        row_group_size=700,
    )
    assert rows(spark.read.parquet(str(path))) == TABLE.to_pylist()
    assert spark.read.parquet(str(path)).where("id < 10").count() == 10


def test_spark_reads_a_tree_that_we_write(spark: Any, keys: dict[str, str], tmp_path: Path) -> None:
    parquet.write_dataset(
        TABLE, tmp_path / "t", keys=keys["footer"], column_keys={keys["pii"]: ["name"]},
        partitioning=["flag"], partitioning_flavor="hive", max_rows_per_file=500, max_rows_per_group=250,
    )  # fmt: skip
    frame = spark.read.parquet(str(tmp_path / "t"))
    assert rows(frame.select("id", "name")) == TABLE.select(["id", "name"]).to_pylist()


def written_by_spark(spark: Any, folder: Path, table: pa.Table = TABLE, **options: str) -> Path:
    """The one file that Spark writes with these options of parquet.encryption."""
    pq.write_table(table, folder / "plain.parquet")
    frame = spark.read.parquet(str(folder / "plain.parquet"))
    writer = frame.coalesce(1).write.mode("overwrite")
    for name, value in options.items():
        writer = writer.option("parquet.encryption." + name.replace("_", "."), value)
    writer.parquet(str(folder / "out"))
    [file] = (folder / "out").glob("*.parquet")
    return file


WAYS = {
    "one key": {"uniform_key": "footer"},
    "column": {"footer_key": "footer", "column_keys": "pii:name"},
    "columns, plain footer": {
        "footer_key": "footer", "column_keys": "pii:name,tags.list.element;footer:id", "plaintext_footer": "true"
    },
    "single wrapping": {"uniform_key": "footer", "double_wrapping": "false"},
    "256 bits": {"footer_key": "footer", "column_keys": "pii:name", "data_key_length_bits": "256"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_we_read_what_spark_writes(spark: Any, keys: dict[str, str], tmp_path: Path, way: str) -> None:
    path = written_by_spark(spark, tmp_path, **WAYS[way])
    plain_footer = {"plaintext_footer": True} if "plain footer" in way else {}
    both = list(keys.values())
    assert parquet.read_table(path, keys=both, **plain_footer).sort_by("id").equals(TABLE)
    assert parquet.dataset(path, keys=both, **plain_footer).to_table().sort_by("id").equals(TABLE)
    some = parquet.read_table(path, keys=keys["footer"], columns=["id", "value"], **plain_footer)
    assert some.sort_by("id").equals(TABLE.select(["id", "value"]))
    if "column" in way:
        with pytest.raises(sc.KeyAccessError):
            parquet.read_table(path, keys=keys["footer"], **plain_footer)


def test_polars_reads_what_spark_writes(spark: Any, keys: dict[str, str], tmp_path: Path) -> None:
    polars = pytest.importorskip("polars", reason="POLARS IS MISSING: it did not read Spark's files")
    path = written_by_spark(spark, tmp_path, footer_key="footer", column_keys="pii:name")
    decryption = parquet.polars_decryption(path, list(keys.values()))
    assert polars.read_parquet(path, decryption=decryption).sort("id").equals(polars.from_arrow(TABLE))


def test_pages_of_spark_that_nothing_authenticates_are_refused(
    spark: Any, keys: dict[str, str], tmp_path: Path
) -> None:
    path = written_by_spark(spark, tmp_path, uniform_key="footer", algorithm="AES_GCM_CTR_V1")
    with pytest.raises(sc.FormatError, match="nothing authenticates its pages"):
        parquet.read_table(path, keys=keys["footer"])


def test_a_flipped_bit_of_either(spark: Any, keys: dict[str, str], tmp_path: Path) -> None:
    theirs = written_by_spark(spark, tmp_path, uniform_key="footer")
    flip(theirs, theirs.stat().st_size // 3)
    with pytest.raises(sc.IntegrityError):
        parquet.read_table(theirs, keys=keys["footer"])
    ours = tmp_path / "ours.parquet"
    parquet.write_table(TABLE, ours, keys=keys["footer"], column_keys={})
    flip(ours, ours.stat().st_size // 3)
    with pytest.raises(Exception, match=re.compile("tag mismatch|decrypt", re.IGNORECASE)):
        spark.read.parquet(str(ours)).collect()


def test_spark_without_the_key(spark: Any, keys: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(os.urandom(32))
    (tmp_path / "other").chmod(0o600)
    path = tmp_path / "t.parquet"
    parquet.write_table(TABLE, path, keys=f"raw-aes:ns/footer@{tmp_path}/other", column_keys={})
    with pytest.raises(Exception, match="the key does not open"):
        spark.read.parquet(str(path)).collect()
