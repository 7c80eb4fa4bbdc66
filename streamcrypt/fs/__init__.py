"""Encrypted files behind other libraries' file systems.

    crypt::s3://bucket/train.enc/part-0.parquet     fsspec: chained onto any filesystem
    crypt:///data/train.enc/part-0.parquet          on local files, or on ``target_protocol``
    filesystem(...)                                 the same as a pyarrow FileSystem

Each file is one message.  Names stay as they are, sizes are those of the plaintext, and our own
objects (the manifest, unfinished files) are not listed.  A read opens only the frames that it covers.

KMS calls: all filesystems of a process read through one DataKeyCache (for each ``cache_max_age``), so
a run makes one Decrypt per distinct data key and process, within that age.  A pickled filesystem
carries its options and nothing secret; the process that unpickles it asks for data keys itself.

What must never happen: plaintext that has not been authenticated reaches a reader, or plaintext
reaches a disk unasked.  A caching filesystem outside ours (``simplecache::crypt::…``) would do the
latter: it warns, and ``no_plaintext_on_disk=True`` refuses it.  Inside (``crypt::simplecache::…``)
it keeps only ciphertext.
"""

from __future__ import annotations

try:
    import fsspec  # noqa: F401 - only to say what is missing
except ImportError as error:  # pragma: no cover - a test starts an interpreter without fsspec
    raise ImportError("streamcrypt.fs needs fsspec: pip install 'streamcrypt[fsspec]'") from error

from streamcrypt.fs.crypt import CryptFileSystem, PlaintextOnDiskWarning
from streamcrypt.fs.files import CryptFile, CryptWriter, TargetFile
from streamcrypt.fs.handler import crypt_filesystem, crypt_place, filesystem

__all__ = [
    "CryptFile",
    "CryptFileSystem",
    "CryptWriter",
    "PlaintextOnDiskWarning",
    "TargetFile",
    "crypt_filesystem",
    "crypt_place",
    "filesystem",
]
