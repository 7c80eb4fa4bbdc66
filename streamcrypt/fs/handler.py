"""The filesystem for pyarrow, and how a caller's word becomes a filesystem."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.registry import available_protocols
from fsspec.utils import stringify_path

from streamcrypt.fs.crypt import CryptFileSystem

if TYPE_CHECKING:
    import pyarrow.fs


def filesystem(target: Any = None, **options: Any) -> pyarrow.fs.FileSystem:
    """A pyarrow FileSystem over encrypted files.

        dataset = pyarrow.dataset.dataset("train.enc/", filesystem=sc.filesystem())

    ``target`` is what lies below: nothing for local files, a protocol name (``"s3"``), a filesystem of
    fsspec or pyarrow, or a URL or folder, which then is the root that paths are relative to.
    Options are those of ``CryptFileSystem``: ``keys``, ``context``, ``verify_manifest``,
    ``target_options`` …  Pickles without keys.
    """
    from pyarrow.fs import FileSystem, PyFileSystem, SubTreeFileSystem

    fs, root = crypt_filesystem(target, **options)
    whole: FileSystem = PyFileSystem(_handler()(fs))
    return SubTreeFileSystem(root, whole) if root is not None else whole


def crypt_filesystem(target: Any = None, **options: Any) -> tuple[CryptFileSystem, str | None]:
    """The fsspec filesystem for ``target`` (see ``filesystem``), and the path that it names, or None."""
    if isinstance(target, CryptFileSystem):
        if options:
            raise TypeError("a crypt filesystem has its options already")
        return target, None
    if isinstance(target, AbstractFileSystem):
        return CryptFileSystem(fs=target, **options), None
    if target is None or (isinstance(target, str) and target in available_protocols()):
        return CryptFileSystem(
            target_protocol=target or options.pop("target_protocol", None), **options
        ), None
    if isinstance(target, str | os.PathLike):
        return crypt_place(target, **options)
    from pyarrow.fs import FileSystem

    if isinstance(target, FileSystem):
        from fsspec.implementations.arrow import ArrowFSWrapper

        return CryptFileSystem(fs=ArrowFSWrapper(target), **options), None
    raise TypeError(f"a filesystem, protocol, URL or folder is needed, not {type(target).__name__}")


def crypt_place(source: str | os.PathLike[str], **options: Any) -> tuple[CryptFileSystem, str]:
    """The fsspec filesystem of a path or URL, and the path there."""
    url = stringify_path(source)
    if not isinstance(url, str):
        raise TypeError(f"a path or URL is needed, not {type(source).__name__}")
    if "::" not in url and "://" not in url:
        # fsspec takes a chain's word of small letters for a protocol: crypt::train would be one.
        url = os.path.abspath(os.path.expanduser(url))
    if not url.startswith(_URL_STARTS):
        url = f"crypt::{url}"
    below = options.pop("target_options", None)
    if below and "::" not in url:
        options["target_options"] = dict(below)
    elif below:
        # Each part of a chain takes the options under its own protocol's name.
        rest = url.partition("::")[2]
        options[rest.partition("://")[0] if "://" in rest else "file"] = dict(below)
    fs, path = url_to_fs(url, **options)
    return cast(CryptFileSystem, fs), str(fs._strip_protocol(path))


_URL_STARTS: Final = tuple(name + sign for name in CryptFileSystem.protocol for sign in ("::", "://"))


def __getattr__(name: str) -> Any:
    if name == "CryptHandler":  # pickle finds the class by this name
        return _handler()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _handler() -> Any:
    """pyarrow's handler for fsspec, made when pyarrow is first needed."""
    made = globals().get("CryptHandler")
    if made is not None:
        return made
    from pyarrow.fs import FSSpecHandler

    class CryptHandler(FSSpecHandler):  # type: ignore[misc, unused-ignore]  # pyarrow is not annotated
        """What pyarrow asks a filesystem in Python for."""

        fs: CryptFileSystem

        def get_type_name(self) -> str:
            return "crypt"

        def normalize_path(self, path: str) -> str:
            return str(self.fs._strip_protocol(path))

        def __reduce__(self) -> tuple[Any, ...]:
            return _make_handler, (self.fs,)

    CryptHandler.__qualname__ = "CryptHandler"
    return globals().setdefault("CryptHandler", CryptHandler)


def _make_handler(fs: CryptFileSystem) -> Any:
    return _handler()(fs)
