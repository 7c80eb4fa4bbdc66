"""``CryptFileSystem``: the messages of another filesystem as the files that they hold."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import IO, Any, Final, cast

from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec import filesystem as fsspec_filesystem
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import available_protocols
from fsspec.utils import stringify_path

from streamcrypt.engine.manifest import Listed, read_manifest
from streamcrypt.errors import DestinationError, FormatError, IntegrityError, StreamcryptError
from streamcrypt.fs.below import RemoteSource, RemoteTarget
from streamcrypt.fs.files import (
    PARALLEL_LENGTH,
    CompressedWriter,
    CryptFile,
    CryptWriter,
    LateTarget,
    SourceOfFile,
    Span,
)
from streamcrypt.fs.process import data_keys, pool
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.reference import decrypting_keyring, encrypting_keyring
from streamcrypt.kms import default_home
from streamcrypt.message.context import check_caller_context
from streamcrypt.message.frames import UNFRAMED_PREFIX, unframed_length
from streamcrypt.message.header import DEFAULT_MAX_ENCRYPTED_DATA_KEYS
from streamcrypt.message.suites import MAX_WRITTEN_FRAME_LENGTH, SIGNED, UNSIGNED, CommitmentPolicy
from streamcrypt.storage import (
    RESERVED_FOLDER,
    Buffer,
    FileObjectSource,
    LocalTree,
    Source,
    Target,
    is_ours,
)
from streamcrypt.streams import (
    DEFAULT_FRAME_LENGTH,
    DecryptingFile,
    EncryptingFile,
    OutgoingMessage,
    ReadingRules,
    header_template,
    located,
    open_stream,
    read_bytes,
    source_geometry,
    source_header,
)
from streamcrypt.system import sync_name
from streamcrypt.units import parse_size

_SPAN_LENGTH: Final = 8 * 2**20
# One ranged request to an object store.
_REMOTE_SPAN_LENGTH: Final = 8 * 2**20
_REQUESTS_AT_ONCE: Final = 16
_MESSAGES_AT_ONCE: Final = 64
_REMEMBERED_SIZES: Final = 100_000

# What other filesystems call the things that change when a file does.
_MARKS: Final = (
    "size", "mtime", "ino", "ETag", "etag", "LastModified", "last_modified", "updated", "generation",
    "created", "md5Hash", "content_md5", "VersionId",
)  # fmt: skip

_TEXT_OPTIONS: Final = ("encoding", "errors", "newline")

# What every filesystem of fsspec takes.
_FSSPEC_OPTIONS: Final = frozenset(
    ("use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "asynchronous", "loop")
)

Info = dict[str, Any]


class PlaintextOnDiskWarning(UserWarning):
    """A caching filesystem outside ``crypt`` keeps decrypted files on disk."""


class _FileSystemType(type(AbstractFileSystem)):  # type: ignore[misc]  # fsspec is not annotated
    """fsspec gives one instance for equal arguments; this adds to what makes arguments equal."""

    @property
    def surroundings(cls) -> tuple[str | None, ...]:
        """Where keys would be looked for: the same reference means another key elsewhere."""
        return (str(default_home().absolute()), *(os.environ.get(name) for name in _KEY_VARIABLES))

    def __call__(cls, *args: Any, **options: Any) -> Any:
        keys = options.get("keys")
        if keys is not None and not _is_plain(keys):
            raise TypeError(
                "keys of a filesystem are key references: a filesystem travels to other processes"
            )
        made = super().__call__(*args, **options)
        made.check_caller()
        return made


_KEY_VARIABLES: Final = ("AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL")


def _is_plain(keys: object) -> bool:
    return isinstance(keys, str) or (
        isinstance(keys, list | tuple) and all(isinstance(key, str) for key in keys)
    )


class CryptFileSystem(ChainedFileSystem, metaclass=_FileSystemType):  # type: ignore[misc]  # not annotated
    """Messages of another filesystem, read and written as the files that they hold.

    The filesystem below is ``fs``, or made from ``target_protocol`` and ``target_options`` (by
    default local files); a chained URL sets these.

    ``keys``: key references; they wrap the data keys of what is written, and limit which may unwrap.
    Without them, AWS and local keys are found by the ARN in the message, and nothing can be written.
    ``context``: pairs to bind when writing, and that must be there when reading.
    ``verify_manifest``: where a folder above a file holds a manifest, the file must be the message
    that it lists; ``require_manifest`` refuses files without one.  Other options are those of
    ``sc.open``.  ``threads`` open the frames of one large read (default: the cores, at most 8).
    """

    protocol = ("crypt", "streamcrypt")
    _extra_tokenize_attributes = ("surroundings",)
    _strip_tokenize_options = ("fo",)

    def __init__(
        self,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        fs: AbstractFileSystem | None = None,
        fo: str | None = None,
        *,
        keys: str | Sequence[str] | None = None,
        context: Mapping[str, str] | None = None,
        authenticated_context: Mapping[str, str] | None = None,
        commitment_policy: CommitmentPolicy | str = CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT,
        max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
        require_signed: bool = False,
        sign: bool = False,
        frame_size: int | str = DEFAULT_FRAME_LENGTH,
        cache_max_age: float = 300.0,
        verify_manifest: bool = True,
        require_manifest: bool = False,
        no_plaintext_on_disk: bool = False,
        fsync: bool = True,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        if self._cached:
            return  # fsspec calls this again for an instance that it keeps
        for name in options.keys() - _FSSPEC_OPTIONS:
            raise TypeError(
                f"crypt has no option {name!r}; those of the filesystem below go under its name, as s3={{…}}, "
                "or into target_options"
            )
        super().__init__(**options)
        if fs is not None and target_protocol is not None:
            raise ValueError("give the filesystem below as fs= or as target_protocol=, not both")
        if fs is None:
            fs = fsspec_filesystem(target_protocol or "file", **(target_options or {}))
        self.fs = fs
        self.is_local = isinstance(fs, LocalFileSystem)
        self.root_marker = fs.root_marker
        self.sep = fs.sep
        self.no_plaintext_on_disk = no_plaintext_on_disk
        self.threads = threads or min(8, os.cpu_count() or 1)
        self._keys = keys
        self.context = dict(context or {})
        self._authenticated_context = dict(authenticated_context or {})
        check_caller_context({**self.context, **self._authenticated_context})
        self._rules = ReadingRules(
            CommitmentPolicy(commitment_policy),
            max_encrypted_data_keys,
            self.context,
            self._authenticated_context,
            require_signed,
        )
        self._max_encrypted_data_keys = max_encrypted_data_keys
        self._suite = SIGNED if sign else UNSIGNED
        self._frame_length = parse_size(frame_size)
        if not 1 <= self._frame_length <= MAX_WRITTEN_FRAME_LENGTH:
            raise ValueError(f"frame size {frame_size}: it must be 1 to {MAX_WRITTEN_FRAME_LENGTH} bytes")
        self._cache_max_age = cache_max_age
        self._verify_manifest = verify_manifest
        self._require_manifest = require_manifest
        self._durable = fsync
        self._lock = threading.RLock()
        self._reading: Materials | None = None
        self._writing: Materials | None = None
        self._sizes: dict[str, tuple[object, int]] = {}
        self._manifests: dict[str, dict[str, Listed] | None] = {}
        self._warned = False
        of_class = type(self)._strip_protocol

        def strip_protocol(path: Any) -> Any:
            path = of_class(path)
            if isinstance(path, list):
                return [strip_protocol(one) for one in path]
            if self.is_local and path and path[0] not in "/~" and not os.path.exists(path):
                # Libraries that take URLs apart (Hugging Face) lose the third slash of crypt:///data.
                path = f"/{path}" if os.path.exists(f"/{path}") else path
            return self.fs._strip_protocol(path)

        # The class does not know the filesystem below, whose forms of a path are to be taken as well.
        self.__dict__["_strip_protocol"] = strip_protocol

    # -- paths

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        """The path in the filesystem below, of any form: chained URL, ``crypt://`` URL, or path."""
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        text = str(stringify_path(path))
        for protocol in cls.protocol:
            if text.startswith(f"{protocol}://::"):
                return _chained_path(text[len(protocol) + 5 :])
            if text.startswith(f"{protocol}::"):
                return _chained_path(text[len(protocol) + 2 :])
            if text.startswith(f"{protocol}://"):
                text = text[len(protocol) + 3 :].partition("::")[0]
                break
        return text.rstrip("/") or ("/" if text.startswith("/") else "")

    def unstrip_protocol(self, name: str) -> str:
        # Not a chain: DuckDB and others look for "protocol://" and come back to this instance.
        return f"{self.protocol[0]}://{self._strip_protocol(name)}"

    def _parent(self, path: str) -> str:  # type: ignore[override, unused-ignore]
        return str(self.fs._parent(self._strip_protocol(path)))

    # -- what there is

    def info(self, path: str, **options: Any) -> Info:
        info = self.fs.info(self._strip_protocol(path), **options)
        return self._with_plaintext_size(info, strict=True)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        infos = [
            info for info in self.fs.ls(self._strip_protocol(path), detail=True, **options) if _shown(info)
        ]
        return self._with_plaintext_sizes(infos) if detail else [info["name"] for info in infos]

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        **options: Any,
    ) -> Any:
        root = self._strip_protocol(path)
        found = self.fs.find(root, maxdepth=maxdepth, withdirs=withdirs, detail=True, **options)
        found = {name: info for name, info in found.items() if not _hidden_below(name, root)}
        if not detail:
            return list(found)
        return dict(zip(found, self._with_plaintext_sizes(found.values()), strict=True))

    def glob(self, path: str, maxdepth: int | None = None, **options: Any) -> Any:
        detail = options.pop("detail", False)
        found = self.fs.glob(self._strip_protocol(path), maxdepth=maxdepth, detail=True, **options)
        found = {name: info for name, info in found.items() if not _hidden_below(name, "")}
        if not detail:
            return list(found)
        return dict(zip(found, self._with_plaintext_sizes(found.values()), strict=True))

    def walk(
        self, path: str, maxdepth: int | None = None, topdown: bool = True, **options: Any
    ) -> Iterator[tuple[str, Any, Any]]:
        detail = options.pop("detail", False)
        walked = self.fs.walk(
            self._strip_protocol(path), maxdepth=maxdepth, topdown=topdown, detail=True, **options
        )
        for folder, folders, files in walked:
            if not topdown and _hidden_below(folder, ""):
                continue
            for names in (folders, files):  # in place, so that what is hidden is not walked into
                for name in [name for name in names if _hidden_name(name)]:
                    del names[name]
            if detail:
                yield (
                    folder,
                    folders,
                    dict(zip(files, self._with_plaintext_sizes(files.values()), strict=True)),
                )
            else:
                kept = list(folders)
                yield folder, kept, list(files)
                for name in set(folders) - set(kept):  # the caller prunes by removing names
                    del folders[name]

    def exists(self, path: str, **options: Any) -> bool:
        return bool(self.fs.exists(self._strip_protocol(path), **options))

    def lexists(self, path: str, **options: Any) -> bool:
        return bool(self.fs.lexists(self._strip_protocol(path), **options))

    def isdir(self, path: str) -> bool:
        return bool(self.fs.isdir(self._strip_protocol(path)))

    def isfile(self, path: str) -> bool:
        return bool(self.fs.isfile(self._strip_protocol(path)))

    def created(self, path: str) -> Any:
        return self.fs.created(self._strip_protocol(path))

    def modified(self, path: str) -> Any:
        return self.fs.modified(self._strip_protocol(path))

    def ukey(self, path: str) -> str:
        return str(self.fs.ukey(self._strip_protocol(path)))

    def checksum(self, path: str) -> Any:
        return self.fs.checksum(self._strip_protocol(path))

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget sizes and manifests, and what the filesystem below keeps."""
        with self._lock:
            if path is None:
                self._sizes.clear()
            else:
                self._sizes.pop(self._strip_protocol(path), None)
            self._manifests.clear()
        self.fs.invalidate_cache(self._strip_protocol(path) if path is not None else None)
        super().invalidate_cache(path)

    # -- what changes names only: a message does not depend on its name

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        self.fs.mkdir(self._strip_protocol(path), create_parents=create_parents, **options)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.fs.makedirs(self._strip_protocol(path), exist_ok=exist_ok)

    def rmdir(self, path: str) -> None:
        self.fs.rmdir(self._strip_protocol(path))

    def rm_file(self, path: str) -> None:
        self.fs.rm_file(self._strip_protocol(path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        # Below, so that a folder goes with all that is in it, our own objects too.
        self.fs.rm(self._strip_protocol(path), recursive=recursive, maxdepth=maxdepth)

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        """Copy a message as it is; it is neither opened nor sealed again."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        if not self.fs.async_impl:
            self.fs.makedirs(self.fs._parent(path2), exist_ok=True)
        self.fs.cp_file(path1, path2, **options)

    def mv(
        self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **options: Any
    ) -> None:
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        self.fs.mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **options)

    def touch(self, path: str, truncate: bool = True, **options: Any) -> None:
        """An empty message; with ``truncate=False`` an existing one only gets a new time."""
        if not truncate and self.exists(path):
            self.fs.touch(self._strip_protocol(path), truncate=False, **options)
        else:
            self.pipe_file(path, b"")

    # -- reading

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        path = self._strip_protocol(path)
        if mode == "rb":
            return CryptFile(self, path, self._open_message(path))
        if mode not in ("wb", "xb"):
            raise ValueError(
                f"mode {mode!r}: a message is opened with 'rb', 'wb' or 'xb'; it is not changed in place"
            )
        return CryptWriter(
            self, path, self._begin_writing(path, overwrite=mode == "wb", autocommit=autocommit)
        )

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        compression: str | None = None,
        **options: Any,
    ) -> Any:
        if compression is None or "r" in mode:
            return super().open(path, mode, block_size=block_size, compression=compression, **options)
        from fsspec.compression import compr
        from fsspec.core import get_compression

        text = {} if "b" in mode else {n: options.pop(n) for n in _TEXT_OPTIONS if n in options}
        file = super().open(path, mode.replace("t", "").rstrip("b") + "b", block_size=block_size, **options)
        method = get_compression(self._strip_protocol(path), compression)
        whole = CompressedWriter(file, compr[method](file, mode="w")) if method is not None else file
        return whole if "b" in mode else io.TextIOWrapper(whole, **text)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        with self._open(path) as file:
            start, end = _bounds(start, end, file.size)
            return cast(bytes, file.read_at(start, end - start))

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **options: Any,
    ) -> list[Any]:
        """Many ranges of many files; each frame is opened once, in threads.

        With ``on_error="return"`` a range that fails is its exception.  ``max_gap`` changes nothing.
        """
        if not isinstance(paths, list):
            raise TypeError("paths is a list")
        starts = starts if isinstance(starts, list) else [starts] * len(paths)
        ends = ends if isinstance(ends, list) else [ends] * len(paths)
        if not len(paths) == len(starts) == len(ends):
            raise ValueError("paths, starts and ends are of one length")
        wanted: dict[str, list[tuple[int, int | None, int | None]]] = {}
        for index, (path, start, end) in enumerate(zip(paths, starts, ends, strict=True)):
            wanted.setdefault(self._strip_protocol(path), []).append((index, start, end))
        results: list[Any] = [b""] * len(paths)
        names = list(wanted)
        for first in range(0, len(names), _MESSAGES_AT_ONCE):
            self._cat_ranges(
                {name: wanted[name] for name in names[first : first + _MESSAGES_AT_ONCE]}, results
            )
        if on_error != "return":
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        return results

    def _cat_ranges(
        self, wanted: Mapping[str, list[tuple[int, int | None, int | None]]], results: list[Any]
    ) -> None:
        opened = {path: pool().submit(self._open_message, path) for path in wanted}
        wait(opened.values())
        tasks: list[tuple[Future[None], list[int]]] = []
        cuts: list[tuple[int, memoryview, int, int]] = []
        with contextlib.ExitStack() as stack:
            for path, ranges in wanted.items():
                try:
                    message = stack.enter_context(opened[path].result())
                except Exception as error:  # noqa: BLE001 - fsspec's contract: the error is the result
                    for index, _, _ in ranges:
                        results[index] = error
                    continue
                bounds = [(index, *_bounds(start, end, message.size)) for index, start, end in ranges]
                for begin, stop, members in _runs(message, bounds):
                    run = memoryview(bytearray(stop - begin))
                    cuts += [(index, run, start - begin, end - begin) for index, start, end in members]
                    for fill in self._spans(message, begin, run, len(run)):
                        tasks.append((pool().submit(fill), [index for index, _, _ in members]))
            wait([task for task, _ in tasks])
        for index, run, start, end in cuts:
            results[index] = bytes(run[start:end])
        for task, indices in tasks:
            failure = task.exception()
            for index in indices if failure is not None else ():
                results[index] = failure

    def fill(self, message: SourceOfFile, runs: Sequence[tuple[int, memoryview]]) -> None:
        """Open plaintext straight into memory that only the caller sees, in threads if it is much.

        Each run is an offset and the memory for what is there.
        """
        total = sum(len(view) for _, view in runs)
        todo = deque(span for offset, view in runs for span in self._spans(message, offset, view, total))

        def work() -> None:
            try:
                while (span := _next(todo)) is not None:
                    span()
            except BaseException:
                todo.clear()  # the others need not go on
                raise

        threads = self.threads if self.is_local else _REQUESTS_AT_ONCE
        helpers = [pool().submit(work) for _ in range(min(len(todo), threads) - 1)]
        try:
            work()
        finally:
            wait(helpers)  # also when one fails: no thread may write into the memory after this
        for helper in helpers:
            helper.result()

    def _spans(
        self, message: SourceOfFile, offset: int, view: memoryview, total: int
    ) -> Iterator[Callable[[], None]]:
        """Calls that together fill ``view``, each in any thread; ``total``: what is filled at the same time."""
        reader = message.frame_reader()
        local = self.is_local
        if reader is None or total < PARALLEL_LENGTH or (local and self.threads == 1):
            yield lambda: message.fill(offset, view)
            return
        frame_length = reader.geometry.frame_length
        # Local ones so short that no thread waits long for the last one.
        span = min(_SPAN_LENGTH, -(-total // (4 * self.threads))) if local else _REMOTE_SPAN_LENGTH
        span = -(-span // frame_length) * frame_length
        position, end = offset, offset + len(view)
        while position < end:
            stop = min(position - position % frame_length + span, end)
            yield Span(message, position, view[position - offset : stop - offset])
            position = stop

    def _open_message(self, path: str) -> SourceOfFile:
        """The message at ``path``, its header, final frame and place in the manifest checked."""
        self.check_caller()
        source = self._source(path)
        message = SourceOfFile(source, self._materials_for_reading(), self._rules, name=path)
        try:
            self._check_listed(path, message, source.size)
        except BaseException:
            message.close()
            raise
        return message

    def open_object(self, file: IO[bytes]) -> CryptFile:
        """The message in a binary file that seeks, by the rules of this filesystem; no manifest is asked."""
        source = FileObjectSource(file)
        name = str(getattr(file, "name", ""))
        message = SourceOfFile(source, self._materials_for_reading(), self._rules, name=name)
        return CryptFile(self, name, message)

    def open_in_order(self, file: IO[bytes]) -> Iterator[memoryview]:
        """The plaintext of a message that arrives in order; see ``streams.open_stream``."""
        readinto = getattr(file, "readinto", None)

        def read_into(view: memoryview) -> int:
            if readinto is not None:
                return readinto(view) or 0
            data = file.read(len(view))
            view[: len(data)] = data
            return len(data)

        return open_stream(read_into, self._materials_for_reading(), self._rules)

    def _source(self, path: str, info: Info | None = None) -> Source:
        if self.is_local:
            # A link that the caller names is followed; LocalTree itself follows none.
            folder, name = os.path.split(os.path.realpath(path))
            if not os.path.exists(path):
                raise FileNotFoundError(path)
            if os.path.isdir(path):
                raise IsADirectoryError(path)
            tree = LocalTree(folder)
            try:
                return tree.open(name)
            finally:
                tree.close()
        info = info or self.fs.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(path)
        return RemoteSource(self.fs, path, info["size"])

    def _materials_for_reading(self) -> Materials:
        with self._lock:
            if self._reading is None:
                self._reading = Materials(
                    decrypting_keyring(self._keys),
                    cache=data_keys(self._cache_max_age),
                    max_encrypted_data_keys=self._max_encrypted_data_keys,
                )
            return self._reading

    # -- writing

    def pipe_file(self, path: str, value: Buffer, mode: str = "overwrite", **options: Any) -> None:
        with self.open(path, "xb" if mode == "create" else "wb", **options) as file:
            file.write(value)

    def put_file(
        self, lpath: Any, rpath: str, callback: Any = None, mode: str = "overwrite", **options: Any
    ) -> None:
        extra = {} if callback is None else {"callback": callback}
        super().put_file(lpath, self._strip_protocol(rpath), mode=mode, **extra, **options)

    def get_file(self, rpath: str, lpath: Any, *args: Any, **options: Any) -> Any:
        """Decrypt one file to a local one."""
        if self.no_plaintext_on_disk:
            raise DestinationError(
                f"{lpath}: would hold plaintext on disk, and no_plaintext_on_disk is set; read the file instead"
            )
        return super().get_file(self._strip_protocol(rpath), lpath, *args, **options)

    def _begin_writing(
        self, path: str, *, overwrite: bool, autocommit: bool
    ) -> Callable[[int | None], tuple[EncryptingFile, LateTarget]]:
        """What begins the message once its length is known, or known to be large (None)."""
        if self._keys is None:
            raise ValueError("writing needs keys=; name the key that is to wrap the data keys")
        if not overwrite and self.exists(path):
            raise FileExistsError(path)
        if self.isdir(path):
            raise IsADirectoryError(path)
        materials = self._materials_for_writing()

        def begin(length: int | None) -> tuple[EncryptingFile, LateTarget]:
            full = {**self.context, **self._authenticated_context}
            found = materials.for_encryption(self._suite, full, length)
            template = header_template(found, self._frame_length, self._authenticated_context)
            message = OutgoingMessage.begin(found, template, self._frame_length)
            target = LateTarget(
                self.target(path, overwrite=overwrite),
                autocommit=autocommit,
                sync_name=lambda: self.sync_name(path),
            )
            file = EncryptingFile(target, message, overwrite=overwrite, durable=self._durable, name=path)
            return file, target

        return begin

    def _materials_for_writing(self) -> Materials:
        with self._lock:
            if self._writing is None:
                assert self._keys is not None
                self._writing = Materials(
                    encrypting_keyring(self._keys),
                    cache=data_keys(self._cache_max_age),
                    max_encrypted_data_keys=self._max_encrypted_data_keys,
                )
            return self._writing

    def target(self, path: str, *, overwrite: bool) -> Target:
        """An object below that is written as it is, and appears when it is published."""
        if self.is_local:
            folder, name = os.path.split(path)
            tree = LocalTree(os.path.realpath(folder))
            try:
                return tree.create(name, overwrite=overwrite)
            finally:
                tree.close()
        return RemoteTarget(self.fs, path)

    def sync_name(self, path: str) -> None:
        """Make the name of a file that was written durable, where that was asked for."""
        if self.is_local and self._durable:
            folder, name = os.path.split(path)
            try:
                sync_name(os.path.join(os.path.realpath(folder), name))
            except OSError as error:
                raise DestinationError(f"{path}: its name cannot be flushed: {error.strerror}") from error

    def forget(self, path: str) -> None:
        """A file was written: what was known of its name no longer holds."""
        with self._lock:
            self._sizes.pop(path, None)
        self.fs.invalidate_cache(self.fs._parent(path))

    # -- sizes

    def _with_plaintext_sizes(self, infos: Iterable[Info]) -> list[Info]:
        infos = list(infos)
        if sum(info.get("type") == "file" for info in infos) < 2:
            return [self._with_plaintext_size(info) for info in infos]
        return list(pool().map(self._with_plaintext_size, infos))

    def _with_plaintext_size(self, info: Info, *, strict: bool = False) -> Info:
        """``info`` with the size of the plaintext, as the header says: opening the file authenticates it.

        A file that is no message keeps its size; one that is damaged has none (``strict``: raises).
        """
        if info.get("type") != "file":
            return info
        name, marks = info["name"], tuple(info.get(mark) for mark in _MARKS)
        with self._lock:
            known = self._sizes.get(name)
        info = {**info, "message_size": info["size"]}
        if known is not None and known[0] == marks:
            info["size"] = known[1]
            return info
        try:
            with contextlib.closing(self._source(name, info)) as source:
                info["size"] = _plaintext_size(source)
        except FormatError as error:
            if error.recognised and strict:
                raise
            info["encrypted"] = False
            return info
        except StreamcryptError:
            if strict:
                raise
            info["size"] = None
            return info
        with self._lock:
            if len(self._sizes) >= _REMEMBERED_SIZES:
                self._sizes.clear()
            self._sizes[name] = marks, info["size"]
        return info

    # -- the manifest

    def _check_listed(self, path: str, message: DecryptingFile, message_length: int) -> None:
        """IntegrityError unless the manifest above ``path``, where there is one, lists this message."""
        if not self._verify_manifest or f"/{RESERVED_FOLDER}/" in f"/{path}":
            return
        for fresh in (False, True):
            found = self._manifest_above(path, fresh=fresh)
            if found is None:
                if self._require_manifest:
                    raise IntegrityError(f"{path}: no manifest lists it, and require_manifest is set")
                return
            root, listing = found
            listed = listing.get(path[len(root) :].lstrip("/"))
            try:
                if listed is None or listed.failed is not None:
                    raise IntegrityError("is not listed in the manifest: added later, or renamed")
                listed.check(message.header, message_length)
            except IntegrityError as error:
                if fresh:  # the tree may have been encrypted again since the manifest was read
                    raise IntegrityError(
                        f"{path}: {error}; verify_manifest=False reads what the manifest of {root} does not list"
                    ) from None
            else:
                return

    def _manifest_above(self, path: str, *, fresh: bool) -> tuple[str, dict[str, Listed]] | None:
        folder = path
        while (above := str(self.fs._parent(folder))) != folder:
            folder = above
            if not folder.strip("/"):
                break
            with self._lock:
                known = folder in self._manifests
                listing = self._manifests.get(folder)
            if not known or (fresh and listing is not None):
                listing = self._read_manifest(folder)
                with self._lock:
                    self._manifests[folder] = listing
            if listing is not None:
                return folder, listing
        return None

    def _read_manifest(self, folder: str) -> dict[str, Listed] | None:
        path = f"{folder}/{RESERVED_FOLDER}/manifest"
        try:
            if not self.fs.isfile(path):
                return None
        except PermissionError:
            return None
        try:
            with self._open_message(path) as file:
                return {listed.name: listed for listed in read_manifest(io.BytesIO(file.read()))}
        except StreamcryptError as error:
            raise located(error, path) from error.__cause__

    # -- plaintext on disk

    def check_caller(self) -> None:
        """Warn, or refuse, when a caching filesystem is about to keep our plaintext on disk."""
        if not _called_by_a_cache():
            return
        if self.no_plaintext_on_disk:
            raise DestinationError(
                "a caching filesystem outside crypt would keep plaintext on disk, and no_plaintext_on_disk is "
                "set; put it inside: crypt::simplecache::URL keeps ciphertext"
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a caching filesystem outside crypt keeps plaintext on disk; crypt::simplecache::URL keeps "
                "ciphertext, and no_plaintext_on_disk=True refuses this",
                PlaintextOnDiskWarning,
                stacklevel=3,
            )


def _chained_path(rest: str) -> str:
    """The path that a chain leads to: that of its first part which has one."""
    parts = rest.split("::")
    for number, part in enumerate(parts):
        protocol, separator, path = part.partition("://")
        if not separator:
            if part in available_protocols() and number + 1 < len(parts):
                continue
            return part
        if path or number + 1 == len(parts):
            return str(get_filesystem_class(protocol)._strip_protocol(part))
    return ""


def _hidden_name(name: str) -> bool:
    return name == RESERVED_FOLDER or is_ours(name)


def _hidden_below(path: str, root: str) -> bool:
    """Whether a path, below ``root``, is one of our own objects or lies in their folder."""
    return any(_hidden_name(part) for part in path[len(root) :].split("/"))


def _shown(info: Info) -> bool:
    return not _hidden_name(str(info["name"]).rstrip("/").rpartition("/")[2])


def _plaintext_size(source: Source) -> int:
    header = source_header(source, max_encrypted_data_keys=None)
    if header.framed:
        return source_geometry(source, header).plaintext_length
    start = read_bytes(source, header.length, UNFRAMED_PREFIX)
    if len(start) < UNFRAMED_PREFIX:
        raise IntegrityError("the body is cut short: the message is truncated")
    return unframed_length(start)


def _next(todo: deque[Callable[[], None]]) -> Callable[[], None] | None:
    """One of what several threads take from; None when nothing is left."""
    try:
        return todo.popleft()
    except IndexError:
        return None


def _bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    """A range as Python's slices have it: from the end where negative, cut to the file."""
    start, end, _ = slice(start, end).indices(size)
    return start, max(start, end)


def _runs(
    message: DecryptingFile, bounds: Iterable[tuple[int, int, int]]
) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Runs of whole frames that together hold all ``bounds``, no frame in two: begin, stop, their bounds."""
    reader = message.frame_reader()
    frame_length = reader.geometry.frame_length if reader is not None else max(1, message.size)
    begin = stop = 0
    members: list[tuple[int, int, int]] = []
    for bound in sorted(bounds, key=lambda bound: bound[1]):
        _, start, end = bound
        first = start - start % frame_length
        if members and first >= stop:
            yield begin, stop, members
            members = []
        if not members:
            begin = stop = first
        stop = max(stop, min(-(-end // frame_length) * frame_length, message.size))
        members.append(bound)
    if members:
        yield begin, stop, members


def _called_by_a_cache() -> bool:
    cached = sys.modules.get("fsspec.implementations.cached")
    if cached is None:
        return False
    frame = sys._getframe(2)
    for _ in range(12):
        if isinstance(frame.f_locals.get("self"), cached.CachingFileSystem):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
