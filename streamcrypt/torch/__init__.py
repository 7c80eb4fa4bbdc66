"""Encrypted Parquet for torch's DataLoader.

    ParquetDataset      an IterableDataset: shards for ranks and workers, shuffle, batches, state_dict

Random access to the rows of tensors is ``streamcrypt.tensors.RowDataset``.  torch is imported when
the class is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamcrypt.torch.datasets import ParquetDataset

__all__ = ["ParquetDataset"]


def __getattr__(name: str) -> Any:
    if name != "ParquetDataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from streamcrypt.torch.datasets import ParquetDataset
    except ImportError as error:
        raise ImportError(
            f"streamcrypt.torch needs {error.name or 'torch'}: pip install 'streamcrypt[torch]'"
        ) from error
    return ParquetDataset
