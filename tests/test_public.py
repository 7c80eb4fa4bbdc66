"""What is public, by list: a name that comes or goes is a decision, and is written here."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from families.keyrings import CRAFT_KEYRING

import streamcrypt as sc
from streamcrypt import errors

PUBLIC = {
    "encrypt", "decrypt", "verify", "rekey", "inspect", "open", "encrypt_bytes", "decrypt_bytes", "erase",
    "DataKeyCache", "kms_client", "Report", "Failure", "Progress", "Inspection",
    "StreamcryptError", "IntegrityError", "FormatError", "KeyAccessError", "WrappedKeyError",
    "ContextMismatchError", "TemporaryError", "KeyUnavailableError", "LimitExceededError",
    "SourceError", "DestinationError",
}  # fmt: skip
# Named by the interface and added with the adapters.
LATER = {"filesystem"}


def test_the_public_names():
    assert set(sc.__all__) >= PUBLIC
    assert set(sc.__all__) - PUBLIC <= LATER
    for name in sc.__all__:
        assert getattr(sc, name) is not None
        assert name in dir(sc)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(sc, "no_such_name")


def test_every_error_is_of_one_family():
    for name in dir(errors):
        error = getattr(errors, name)
        if isinstance(error, type) and issubclass(error, Exception):
            assert issubclass(error, sc.StreamcryptError)


def test_what_the_interface_says_of_the_errors():
    assert issubclass(sc.FormatError, sc.IntegrityError)
    assert issubclass(sc.ContextMismatchError, sc.KeyAccessError)
    assert sc.KeyAccessError("x", code="DisabledException").code == "DisabledException"


def test_a_report_is_read_by_the_names_of_its_json():
    for found in (sc.Report("encrypt"), sc.inspect(io.BytesIO(sc.encrypt_bytes(b"x", keys=CRAFT_KEYRING)))):
        assert {name: found[name] for name in found} == found.to_json()
        assert next(iter(found)) in found
        assert "no such member" not in found
        with pytest.raises(KeyError):
            found["no such member"]


def test_importing_costs_no_heavy_library():
    """Not boto3, not pyarrow, not numpy, not cryptography: they come when they are used."""
    code = (
        "import sys, streamcrypt; "
        "print([m for m in ('boto3', 'botocore', 'pyarrow', 'numpy', 'torch', 'ray', 'cryptography') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_an_adapter_costs_no_library_that_it_serves():
    heavy = ("pyarrow", "pandas", "fsspec", "safetensors", "torch", "ray", "boto3")
    code = (
        "import sys; from streamcrypt import arrow, parquet, ray, tensors, torch; "
        f"print([m for m in {heavy} if m in sys.modules]); "
        "print(arrow.read_table.__module__, parquet.read_table.__name__, 'dataset' in dir(parquet))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "streamcrypt.arrow read_table True"]


def test_importing_asks_nothing_of_the_network():
    """Whichever module is imported (RELIABILITY 34)."""
    code = """
import importlib, pkgutil, sys
asked, name = set(), "streamcrypt"
sys.addaudithook(
    lambda event, words: event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
    and asked.add((name, event, str(words[-1])))
)
import streamcrypt
names = [found.name for found in pkgutil.walk_packages(streamcrypt.__path__, "streamcrypt.")]
for name in names:
    if not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            if error.name is None or error.name.startswith("streamcrypt"):
                raise
print(len(names), asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, _, asked = done.stdout.strip().rpartition("\n")[2].partition(" ")
    assert int(count) > 80
    assert asked == "set()"


def test_submodules_do_not_carry_the_name_of_a_function():
    """Or importing one would replace the other."""
    from pathlib import Path

    modules = {path.stem for path in Path(sc.__file__).parent.iterdir()}
    assert not modules & {"open", "inspect", "verify", "encrypt", "decrypt", "rekey", "filesystem"}
