"""Encrypted Parquet: read and written as pyarrow.parquet does, in one of two forms.

    messages    each file is one message (the default): everything is hidden, the footer too, and any
                file of any format is treated alike
    modular     Parquet Modular Encryption (``column_keys=``): the file stays Parquet, its parts are
                sealed under keys of its own, a key per column if wanted; other Parquet readers open it

Both take the same key references (modular.py: how).

Every read checks before it gives: what does not authenticate is an IntegrityError, and a file that is
not encrypted at all is refused as well.

pyarrow and fsspec are imported when one of the functions is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamcrypt.parquet.modular import (
        crypto_factory,
        decryption_config,
        decryption_properties,
        encryption_config,
        encryption_properties,
        key_client,
        polars_decryption,
        polars_encryption,
    )
    from streamcrypt.parquet.tables import (
        ModularHandler,
        dataset,
        open_modular,
        read_table,
        write_dataset,
        write_table,
    )

__all__ = [
    "ModularHandler",
    "crypto_factory",
    "dataset",
    "decryption_config",
    "decryption_properties",
    "encryption_config",
    "encryption_properties",
    "key_client",
    "open_modular",
    "polars_decryption",
    "polars_encryption",
    "read_table",
    "write_dataset",
    "write_table",
]

_MODULAR = (
    "crypto_factory", "decryption_config", "decryption_properties", "encryption_config", "encryption_properties",
    "key_client", "polars_decryption", "polars_encryption",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = import_module("streamcrypt.parquet." + ("modular" if name in _MODULAR else "tables"))
    found = globals()[name] = getattr(home, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
