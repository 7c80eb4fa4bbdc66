"""Against each peer at what it is made for.  A peer that is not installed is skipped by its name.

    PYTHONPATH=peers pytest benchmarks/test_peers.py -p no:xdist -s        (README.md says how peers get there)

    a file      official SDK as documented and tuned by hand, Tink, age and pyrage, rclone crypt, the chunked
                format of `cryptography` (Cobblestone)
    a table     Parquet Modular Encryption, by pyarrow
    tensors     cryptotensors, tensorizer
    samples     litdata

Ours and the peer's take turns in an order that is shuffled each round; the first round warms up.  What
comes back is compared with what went in, once, before anything is timed.  Neither side waits for the
disk (tables: we do, pyarrow does not).  Printed are the median rates, and the median over the rounds of
ours / peer: above 1 we are faster.  STREAMCRYPT_PEER_MB sets the size (default 256),
STREAMCRYPT_PEER_ROUNDS the rounds (5), STREAMCRYPT_BENCH_DIR the place (default: the temporary folder).

Peers differ in what they promise.  age, Cobblestone, rclone and Tink have no key service; age and rclone
use ChaCha20-Poly1305 and XSalsa20-Poly1305 instead of AES; Fernet (litdata) is AES-128-CBC with HMAC.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from suite.common import MiB, incompressible, key_reference, make_files, remove, workspace

import streamcrypt as sc
from streamcrypt.system import page_aligned

SIZE = int(os.environ.get("STREAMCRYPT_PEER_MB", "256")) * MiB
ROUNDS = int(os.environ.get("STREAMCRYPT_PEER_ROUNDS", "5"))

Work = Callable[[Path, Path], object]  # from one path to another


def need(module: str, package: str = "") -> None:
    """Skip, by name, where a peer is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{package or module} is not installed")


def need_program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"the program {name} is not installed")
    return found


def take_turns(what: str, size: int, ways: dict[str, Callable[[], object]], *outputs: Path) -> None:
    """Time every way in turns; print rates, and ours over each other way."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    chance, order = random.Random(1), list(ways)
    for number in range(ROUNDS + 1):
        chance.shuffle(order)
        for name in order:
            for output in outputs:
                remove(output)
            gc.collect()
            started = time.perf_counter()
            result = ways[name]()
            seconds = time.perf_counter() - started
            del result
            if number:
                taken[name].append(seconds)
    rates = ", ".join(f"{name} {size / statistics.median(times) / 1e9:.3f}" for name, times in taken.items())
    print(f"\n{what}: {rates} GB/s", end="")
    for name in ways:
        if name != "ours":
            ratios = sorted(peer / ours for peer, ours in zip(taken[name], taken["ours"], strict=True))
            print(
                f"; ours / {name} {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                end="",
            )
    print()


# -- a file


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with workspace() as folder:
        make_files(folder / "source", 1, SIZE)
        key_reference(folder)
        yield folder


def sdk_documented(place: Path) -> tuple[Work, Work]:
    """The loop of the SDK's documentation: frames of 4 KiB, read in pieces of its default length."""
    return _sdk(place, 4 << 10, 8 << 10)


def sdk_tuned(place: Path) -> tuple[Work, Work]:
    """Frames and pieces of 1 MiB."""
    return _sdk(place, MiB, MiB)


def _sdk(place: Path, frame: int, chunk: int) -> tuple[Work, Work]:
    need("aws_encryption_sdk", "aws-encryption-sdk")
    from ratios import _Sdk

    sdk = _Sdk()
    sdk.use((place / "wrapping.key").read_bytes())
    return (
        lambda source, target: sdk.encrypt_file(source, target, frame, chunk),
        lambda source, target: sdk.decrypt_file(source, target, chunk),
    )


def tink(place: Path) -> tuple[Work, Work]:
    """Streaming AEAD, AES256_GCM_HKDF_1MB, in pieces of 1 MiB."""
    need("tink")
    import tink as library  # type: ignore[import-not-found]  # a peer
    from tink import streaming_aead

    streaming_aead.register()
    template = streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB
    primitive = library.new_keyset_handle(template).primitive(streaming_aead.StreamingAead)

    def encrypt(source: Path, target: Path) -> None:
        with source.open("rb") as reading, target.open("wb") as writing:
            with primitive.new_encrypting_stream(writing, b"") as stream:
                while data := reading.read(MiB):
                    stream.write(data)

    def decrypt(source: Path, target: Path) -> None:
        with source.open("rb") as reading, target.open("wb") as writing:
            with primitive.new_decrypting_stream(reading, b"") as stream:
                while data := stream.read(MiB):
                    writing.write(data)

    return encrypt, decrypt


def pyrage(place: Path) -> tuple[Work, Work]:
    """age by its Rust library: X25519, ChaCha20-Poly1305 in chunks of 64 KiB."""
    need("pyrage")
    import pyrage as library  # type: ignore[import-not-found]  # a peer

    identity = library.x25519.Identity.generate()
    return (
        lambda source, target: library.encrypt_file(str(source), str(target), [identity.to_public()]),
        lambda source, target: library.decrypt_file(str(source), str(target), [identity]),
    )


def age(place: Path) -> tuple[Work, Work]:
    """The program of the same format, written in Go."""
    program, keygen = need_program("age"), need_program("age-keygen")
    identity = place / "age.key"
    if not identity.exists():
        subprocess.run([keygen, "-o", str(identity)], check=True, capture_output=True)
    found = subprocess.run([keygen, "-y", str(identity)], check=True, capture_output=True, text=True)
    recipient = found.stdout.strip()

    def run(*words: str) -> None:
        subprocess.run([program, *words], check=True)

    return (
        lambda source, target: run("-r", recipient, "-o", str(target), str(source)),
        lambda source, target: run("-d", "-i", str(identity), "-o", str(target), str(source)),
    )


def rclone(place: Path) -> tuple[Work, Work]:
    """A crypt remote over a local folder: XSalsa20-Poly1305 in chunks of 64 KiB."""
    program = need_program("rclone")
    store = place / "rclone"
    obscured = subprocess.run(
        [program, "obscure", "-"], input=os.urandom(24).hex(), check=True, capture_output=True, text=True
    )
    environment = {
        **os.environ,
        "RCLONE_CONFIG": os.devnull,
        "RCLONE_CONFIG_SECRET_TYPE": "crypt",
        "RCLONE_CONFIG_SECRET_REMOTE": str(store),
        "RCLONE_CONFIG_SECRET_PASSWORD": obscured.stdout.strip(),
        "RCLONE_CONFIG_SECRET_FILENAME_ENCRYPTION": "off",
    }

    def run(source: str, target: str) -> None:
        subprocess.run([program, "copyto", "--ignore-times", source, target], check=True, env=environment)

    return (
        lambda source, target: run(str(source), f"secret:{target.name}"),
        lambda source, target: run(f"secret:{source.name}", str(target)),
    )


def cobblestone(place: Path) -> tuple[Work, Work]:
    """`cryptography`'s own chunked format, with buffers of our own."""
    need("cryptography.cobblestone", "a cryptography with Cobblestone")
    from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor

    key = Cobblestone256Encryptor.generate_key()

    def run(make: Any, source: Path, target: Path) -> None:
        worker = make(key, b"")
        # An answer may hold what was left of the chunk before.
        made = bytearray(2 * MiB)
        view, out = page_aligned(MiB), memoryview(made)
        with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
            while count := reading.readinto(view):
                writing.write(out[: worker.update_into(view[:count], made)])
            writing.write(worker.finalize())

    return (
        lambda source, target: run(Cobblestone256Encryptor, source, target),
        lambda source, target: run(Cobblestone256Decryptor, source, target),
    )


FILE_PEERS = {
    "SDK, documented": sdk_documented,
    "SDK, tuned": sdk_tuned,
    "Tink": tink,
    "pyrage": pyrage,
    "age": age,
    "rclone crypt": rclone,
    "Cobblestone": cobblestone,
}


@pytest.mark.parametrize("peer", FILE_PEERS)
def test_a_file(place: Path, peer: str) -> None:
    encrypt, decrypt = FILE_PEERS[peer](place)
    source, keys = place / "source" / "00000", key_reference(place)
    theirs, ours = place / "theirs", place / "ours"
    back, out = place / "back", place / "out"
    for path in (theirs, ours, back, out):
        remove(path)
    encrypt(source, theirs)
    decrypt(theirs, back)
    assert back.read_bytes() == source.read_bytes()

    def our_encrypt(workers: int | None) -> Callable[[], object]:
        return lambda: sc.encrypt(source, out, keys=keys, workers=workers, fsync=False)

    def our_decrypt(workers: int | None) -> Callable[[], object]:
        return lambda: sc.decrypt(ours, back, keys=keys, workers=workers, fsync=False)

    ways = {"ours": our_encrypt(None), "one worker": our_encrypt(1), peer: lambda: encrypt(source, theirs)}
    take_turns(f"encrypt, {SIZE // MiB} MiB", SIZE, ways, out, theirs)
    encrypt(source, theirs)
    sc.encrypt(source, ours, keys=keys, fsync=False)
    ways = {"ours": our_decrypt(None), "one worker": our_decrypt(1), peer: lambda: decrypt(theirs, back)}
    take_turns(f"decrypt, {SIZE // MiB} MiB", SIZE, ways, back)


# -- a table


def test_a_table(place: Path) -> None:
    """Modular encryption by pyarrow (all columns, keys wrapped twice) and whole files by ours."""
    pe = pytest.importorskip("pyarrow.parquet.encryption", reason="pyarrow without modular encryption")
    import base64

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from streamcrypt import parquet

    rows, generator = SIZE // 8 // 16, np.random.default_rng(1)
    table = pa.table({f"x{number}": generator.random(rows) for number in range(16)})
    cipher = AESGCM(bytes(range(32)))

    class Client(pe.KmsClient):
        """A key service in this process: it wraps with AES-256-GCM."""

        def __init__(self, configuration: Any) -> None:
            super().__init__()

        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
            nonce = os.urandom(12)
            sealed = cipher.encrypt(nonce, key_bytes, master_key_identifier.encode())
            return base64.b64encode(nonce + sealed).decode()

        def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
            sealed = base64.b64decode(wrapped_key)
            return cipher.decrypt(sealed[:12], sealed[12:], master_key_identifier.encode())

    factory, connection = pe.CryptoFactory(Client), pe.KmsConnectionConfig()
    configuration = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"columns": table.column_names}, data_key_length_bits=256
    )
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    modular, ours, keys = place / "modular.parquet", place / "ours.parquet", key_reference(place)

    def write_modular() -> None:
        properties = factory.file_encryption_properties(connection, configuration)
        pq.write_table(table, modular, encryption_properties=properties, **options)

    def read_modular() -> Any:
        properties = factory.file_decryption_properties(connection, pe.DecryptionConfiguration())
        return pq.read_table(modular, decryption_properties=properties)

    def write_ours() -> None:
        parquet.write_table(table, ours, keys=keys, **options)

    def read_ours() -> Any:
        return parquet.read_table(ours, keys=keys)

    write_modular()
    write_ours()
    assert read_modular().equals(table)
    assert read_ours().equals(table)
    take_turns("write a table", table.nbytes, {"ours": write_ours, "modular": write_modular})
    take_turns("read a table", table.nbytes, {"ours": read_ours, "modular": read_modular})


# -- tensors


@pytest.mark.parametrize("peer", ["cryptotensors", "tensorizer"])
def test_tensors(place: Path, peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("torch")
    need("safetensors")
    need(peer)
    import test_tensors as tensors

    monkeypatch.setattr(tensors, "SIZE", SIZE)
    folder = place / f"tensors-{peer}"
    folder.mkdir()
    case = tensors.Case(folder)
    save, load = getattr(tensors, peer)(case)
    save()
    loaded = load()
    assert all(loaded[name].equal(tensor) for name, tensor in case.weights.items())
    del loaded
    take_turns("save tensors", case.size, {"ours": case.save_ours, peer: save})
    take_turns("load tensors", case.size, {"ours": case.load_ours, peer: load})
    shutil.rmtree(folder)


# -- samples


# litdata leaves files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_samples(place: Path) -> None:
    """An epoch over samples of 64 KiB in order: litdata's chunks under Fernet, Parquet under ours."""
    need("litdata")
    need("torch")
    import litdata
    import pyarrow as pa
    import pyarrow.parquet as pq
    from litdata.utilities.encryption import FernetEncryption  # type: ignore[import-not-found]  # a peer

    from streamcrypt.torch import ParquetDataset

    count = SIZE // (64 << 10)
    samples = [incompressible(64 << 10, seed=number) for number in range(count)]
    fernet = FernetEncryption(password="benchmark", level="chunk")
    chunks, plain, encrypted = place / "chunks", place / "samples", place / "samples.enc"
    litdata.optimize(
        fn=_sample, inputs=[(samples[number],) for number in range(count)], output_dir=str(chunks),
        chunk_bytes="16MB", encryption=fernet, num_workers=1,
    )  # fmt: skip
    plain.mkdir()
    pq.write_table(
        pa.table({"sample": pa.array(samples, pa.binary())}), plain / "0.parquet", row_group_size=256,
        compression="none",
    )  # fmt: skip
    keys = key_reference(place)
    sc.encrypt(plain, encrypted, keys=keys, fsync=False)

    def theirs() -> int:
        dataset = litdata.StreamingDataset(str(chunks), encryption=fernet)
        return sum(len(dataset[number]) for number in range(len(dataset)))

    def ours() -> int:
        total = 0
        for batch in ParquetDataset(encrypted, keys=keys, columns=["sample"], batch_size=256):
            total += sum(map(len, batch["sample"]))
        return total

    assert theirs() == ours() == count * (64 << 10)
    take_turns("an epoch of samples", SIZE, {"ours": ours, "litdata": theirs})
    gc.collect()


def _sample(parts: tuple[bytes]) -> bytes:
    return parts[0]
