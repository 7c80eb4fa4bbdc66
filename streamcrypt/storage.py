"""Where bytes lie: folders of named objects that are read at offsets and appear only when whole.

A *tree* is a folder: a local one here, a part of a bucket in stores.py.  Its objects are named by
relative path, '/' between the parts.  A tree is plain data: a worker process gets a copy and opens
its own handles.

    tree.walk(filters)            the objects in a fixed order, with their sizes
    tree.open(name)     Source    read_at(offset, buffer), check_unchanged, close
    tree.create(name)   Target    write_at(offset, bytes), publish, discard

The one thing that must never happen: an object under its final name that is not whole.  A target is
a temporary file beside its final place, or a file without a name in that folder; ``publish`` gives it
its name, and does not replace an existing object unless it was told to.

Paths below the root are opened part by part without following symbolic links, so that nothing
outside the root is ever read or written, whatever happens to the folders meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import IO, Final, Protocol, TypeAlias

from streamcrypt.errors import DestinationError, SourceError, StreamcryptError
from streamcrypt.system import c_call, missing_folders, sync_name
from streamcrypt.tuples import NamedTuple

Buffer: TypeAlias = bytes | bytearray | memoryview
# Size, modification time in ns and inode; of an object in a store its size, 0 and its ETag.
State: TypeAlias = tuple[int, int, int | str]

# Leftovers of a killed job carry this name; whoever holds the lock on one is still writing it.
TEMPORARY_PREFIX: Final = ".streamcrypt-"
TEMPORARY_SUFFIX: Final = ".tmp"
# How the URL of a place in an object store begins (stores.py).
STORE_SCHEMES: Final = ("s3://", "gs://", "az://")
# Our own objects within an encrypted tree: the manifest, a job's journal.
RESERVED_FOLDER: Final = "_streamcrypt"
# A target of more bytes than this has its length set before it is written.
CLAIMED_LENGTH: Final = 2**20
# A folder's descriptor is kept for the files that follow; a few are enough, since names come sorted.
KEPT_FOLDERS: Final = 8
# Folders in one another take a frame of the interpreter's stack each, which has a thousand.
_DEEPEST: Final = 800

_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not hang us
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
_FILE_MODE: Final = 0o600
# A longer write that begins a page is taken in larger blocks of memory, which a virtual machine's host may not hold
# and then has to find: see benchmarks/README.md, "pieces of a write".
_PIECE: Final = 256 << 10
_PAGE: Final = 4096
_RENAME_NOREPLACE: Final = 1  # renameat2(2)
_AT_EMPTY_PATH: Final = 0x1000  # linkat(2)
# A file that has no name until it is linked (Linux): a job that is killed leaves nothing of it.
_NAMELESS_FLAGS: Final = (os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC) if hasattr(os, "O_TMPFILE") else 0
# A file system, or a kernel, that has no such files.
_NO_NAMELESS: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_FOLDER_MODE: Final = 0o700


class Entry(NamedTuple):
    """One object of a tree: its name, and its size in bytes.

    ``problem`` says why the object cannot be read (a symbolic link, a device …); ``folder`` marks an
    empty folder, which is listed so that a tree comes back as it was.  ``state`` is that of the object,
    where a listing tells it, and ``changed`` when it last changed in any way, in ns (see ``Seen``).
    """

    name: str
    size: int
    folder: bool = False
    problem: str | None = None
    state: State | None = None
    changed: int = 0


# As ``Entry._make``, in less than half the time: for every object of a tree.
new_entry: Final[Callable[[tuple[object, ...]], Entry]] = partial(tuple.__new__, Entry)


class Seen(NamedTuple):
    """What a folder tells of a file: its state, and the time of its last change in ns.

    Of a local file that is its ctime, which every write, rename and change of its inode sets to the time
    of the system and which no call sets to another (POSIX.1-2024, XBD 4.12, "File Times Update").
    """

    state: State
    changed: int


class Filters(NamedTuple):
    """Which names of a tree belong to a job: shell patterns on the whole relative name.

    ``*`` stands for any letters, slashes too; ``**/`` for any folders, or none.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def admit(self, name: str) -> bool:
        if self.include and not any(_matches(name, pattern) for pattern in self.include):
            return False
        return not any(_matches(name, pattern) for pattern in self.exclude)


def _matches(name: str, pattern: str, start: int = 0) -> bool:
    """``**/`` before ``start`` stand for some folders, those after it for some or none."""
    if fnmatchcase(name, pattern):
        return True
    place = pattern.find("**/", start)
    return place >= 0 and (
        _matches(name, pattern[:place] + pattern[place + 3 :], place) or _matches(name, pattern, place + 3)
    )


class Source(Protocol):
    """An object that is read at offsets.  Errors are SourceError.

    ``state`` is what changes when the object does: size, modification time, identity.
    """

    size: int
    state: State

    def read_at(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` on; returns the bytes read, fewer only at the object's end."""

    def check_unchanged(self) -> None:
        """SourceError when the object changed since it was opened."""

    def close(self) -> None: ...


class Target(Protocol):
    """An object that is being written.  Errors are DestinationError."""

    def state(self) -> State:
        """The object's size, modification time and identity, as a Source of it will have them."""

    def write_at(self, offset: int, data: Buffer) -> None: ...

    def flush(self) -> None:
        """Make what was written durable."""

    def publish(self, *, overwrite: bool) -> State | None:
        """Give the object its final name.  The caller has flushed it, if it is to survive a power loss.

        Returns the object's state where that was not known before.
        """

    def discard(self) -> None:
        """Drop the object; does nothing after ``publish``."""


class Tree(Protocol):
    """A folder of objects.  Reading raises SourceError, writing DestinationError, an outage TemporaryError."""

    @property
    def in_order(self) -> bool:
        """Whether a target must be written from its start to its end; otherwise in pieces, at once."""

    @property
    def root(self) -> str: ...

    def copy(self) -> Tree:
        """The same tree for another thread."""

    def subtree(self, name: str) -> Tree:
        """A folder of this one."""

    def close(self) -> None: ...

    def path(self, name: str) -> str: ...

    def walk(self, filters: Filters | None = None) -> Iterator[Entry]:
        """Every object, names ascending part by part; ours are left out."""

    def is_empty(self) -> bool:
        """Whether nothing lies in it, ours included."""

    def entry(self, name: str) -> Entry: ...

    def state(self, name: str) -> State | None: ...

    def exists(self, name: str) -> bool: ...

    def open(self, name: str) -> Source: ...

    def create(self, name: str, *, size: int | None = None, overwrite: bool = False) -> Target: ...

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""

    def make_folder(self, name: str) -> None: ...

    def remove_leftovers(self, folder: str) -> None: ...

    def sync_folder(self, folder: str) -> None: ...


def is_store_url(text: str) -> bool:
    """Whether a place is in an object store.  ValueError for a URL of anything else, which is no folder's name."""
    if text.startswith(STORE_SCHEMES):
        return True
    scheme, colon, _ = text.partition(":/")  # one slash: so much pathlib leaves of two
    if colon and scheme and "/" not in scheme:
        raise ValueError(
            f"{text}: URLs of places begin with s3://, gs:// and az://; a file or folder is named by its path"
        )
    return False


def check_name(name: str) -> str:
    """``name`` if it is a relative path that stays below its root; StreamcryptError otherwise."""
    # The usual name, without looking at each of its parts: none of them is empty or begins with a dot.
    if (
        name
        and name[0] not in "/."
        and name[-1] != "/"
        and not ("//" in name or "/." in name or "\0" in name)
    ):
        return name
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in name:
        raise StreamcryptError(f"{name!r}: is not a name within a folder")
    return name


def is_ours(name: str) -> bool:
    """Whether a name in a tree is a temporary file or lies in the folder for our own objects."""
    first, _, _ = name.partition("/")
    last = name.rpartition("/")[2]
    return first == RESERVED_FOLDER or (last.startswith(TEMPORARY_PREFIX) and last.endswith(TEMPORARY_SUFFIX))


def sort_key(name: str) -> str:
    """The order in which ``walk`` lists names: part by part, by code points."""
    return name.replace("/", "\0")  # which no name holds


class LocalTree:
    """A local folder.  Not for use by several threads at once: each takes a copy."""

    __slots__ = ("_folders", "_missing", "root")

    def __init__(self, root: str, missing: Sequence[str] = ()) -> None:
        """``missing``: those of root and the folders above it that have yet to be made."""
        self.root = root
        self._missing = missing
        self._folders: dict[str, _Folder] = {}

    def __repr__(self) -> str:
        return f"LocalTree({self.root!r})"

    @property
    def in_order(self) -> bool:
        return False

    def copy(self) -> LocalTree:
        return LocalTree(self.root)

    def subtree(self, name: str) -> LocalTree:
        root = self.path(check_name(name))
        return LocalTree(root, missing_folders(root))

    def __reduce__(self) -> tuple[type[LocalTree], tuple[str]]:
        return LocalTree, (self.root,)

    def close(self) -> None:
        while self._folders:
            self._folders.popitem()[1].release()

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    # -- reading

    def walk(self, filters: Filters | None = None) -> Iterator[Entry]:
        """Every object, folder by folder, names ascending; ours are left out."""
        yield from self._walk("", filters or Filters())

    def _walk(self, folder: str, filters: Filters) -> Iterator[Entry]:
        if folder.count("/") >= _DEEPEST:
            yield Entry(folder, 0, problem=f"lies in more than {_DEEPEST} folders")
            return
        try:
            # Names only: a folder of a million files must not cost a million objects of a kilobyte.
            names = os.listdir(self._folder(folder).descriptor)
        except OSError as error:
            yield Entry(folder, 0, problem=f"cannot be listed: {error.strerror}")
            return
        names.sort()
        prefix = folder + "/" if folder else ""
        if folder and not names:
            yield Entry(folder, 0, folder=True)
        # What is done for every file is what finding out what is done costs (benchmarks/README.md, "resume").
        admit = filters.admit if filters != Filters() else None
        look, is_regular, folders = os.stat, stat.S_ISREG, self._folders
        for name in names:
            path = prefix + name
            if name[0] in "._" and is_ours(path):
                continue
            try:
                known = folders.get(folder) or self._folder(folder)
                status = look(name, dir_fd=known.descriptor, follow_symlinks=False)
                if admit is None and is_regular(status.st_mode):
                    size = status.st_size
                    state = size, status.st_mtime_ns, status.st_ino
                    yield new_entry((path, size, False, None, state, status.st_ctime_ns))
                    continue
            except OSError as error:
                if filters.admit(path):
                    yield Entry(path, 0, problem=f"cannot be read: {error.strerror}")
                continue
            if stat.S_ISDIR(status.st_mode):
                yield from self._walk(path, filters)
            elif filters.admit(path):
                if stat.S_ISREG(status.st_mode):
                    yield Entry(path, status.st_size, False, None, _state(status), status.st_ctime_ns)
                else:
                    yield Entry(path, 0, problem=kind_problem(status.st_mode))

    def is_empty(self) -> bool:
        """Whether nothing lies in the folder, which need not be there."""
        try:
            with os.scandir(self.root) as entries:
                return next(entries, None) is None
        except FileNotFoundError:
            return True
        except OSError as error:
            raise DestinationError(f"{self.root}: cannot be listed: {error.strerror}") from error

    def entry(self, name: str) -> Entry:
        """The object of that name; SourceError when there is none that can be read."""
        folder, _, base = check_name(name).rpartition("/")
        try:
            status = os.stat(base, dir_fd=self._folder(folder).descriptor, follow_symlinks=False)
        except OSError as error:
            raise SourceError(f"{self.path(name)}: cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            return Entry(name, 0, problem=kind_problem(status.st_mode))
        return Entry(name, status.st_size, False, None, _state(status), status.st_ctime_ns)

    def state(self, name: str) -> State | None:
        """The state of the object of that name; None when there is none."""
        found = self.seen(check_name(name))
        return None if found is None else found.state

    def seen(self, name: str) -> Seen | None:
        """The same, and when it last changed.  The name is one that ``walk`` gave, or was checked."""
        folder, _, base = name.rpartition("/")
        try:
            status = os.stat(base, dir_fd=self._folder(folder).descriptor, follow_symlinks=False)
        except OSError:
            return None
        return Seen((status.st_size, status.st_mtime_ns, status.st_ino), status.st_ctime_ns)

    def exists(self, name: str) -> bool:
        folder, _, base = check_name(name).rpartition("/")
        try:
            os.stat(base, dir_fd=self._folder(folder).descriptor, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise DestinationError(f"{self.path(name)}: {error.strerror}") from error
        return True

    def open(self, name: str) -> LocalSource:
        """Open an object for reading."""
        folder, _, base = check_name(name).rpartition("/")
        try:
            parent = self._folder(folder)
            descriptor = os.open(base, _READ_FLAGS, dir_fd=parent.descriptor)
        except OSError as error:
            reason = (
                "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
            )
            raise SourceError(f"{self.path(name)}: {reason}") from error
        return LocalSource(descriptor, self, name, parent, base)

    # -- writing

    def create(self, name: str, *, size: int | None = None, overwrite: bool = False) -> LocalTarget:
        """A new object that will be called ``name``; with ``size`` its room is claimed at once."""
        folder, _, base = check_name(name).rpartition("/")
        try:
            parent = self._folder(folder, create=True)
            # A small file finds out when it is published; a large one had better know before.
            if size is None or size > CLAIMED_LENGTH:
                if not overwrite and _exists(base, parent.descriptor):
                    raise DestinationError(f"{self.path(name)}: exists already; overwrite must be asked for")
            elif not overwrite and (descriptor := _create_nameless(parent.descriptor)) is not None:
                # Only a rename replaces, so what may replace has a temporary name.
                return LocalTarget(descriptor, self, name, parent, base, None)
            return LocalTarget.create(self, name, parent, base, size)
        except OSError as error:
            raise DestinationError(f"{self.path(name)}: cannot be written: {error.strerror}") from error

    def open_part(self, name: str, temporary: str) -> LocalPart:
        """Another handle on a target that is being written, by its temporary name: for one span of it."""
        folder, _, _ = check_name(name).rpartition("/")
        try:
            flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            return LocalPart(os.open(temporary, flags, dir_fd=self._folder(folder).descriptor), self, name)
        except OSError as error:
            raise DestinationError(f"{self.path(name)}: cannot be written: {error.strerror}") from error

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        folder, _, base = check_name(name).rpartition("/")
        try:
            os.unlink(base, dir_fd=self.directory(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise DestinationError(f"{self.path(name)}: cannot be removed: {error.strerror}") from error

    def make_folder(self, name: str) -> None:
        """Make an empty folder; "" is the root."""
        try:
            self._folder(name and check_name(name), create=True)
        except OSError as error:
            raise DestinationError(f"{self.path(name)}: cannot be made: {error.strerror}") from error

    def remove_leftovers(self, folder: str) -> None:
        """Remove temporary files that a killed job left in ``folder``; those of running jobs stay."""
        try:
            parent = self._folder(folder).descriptor
            for name in os.listdir(parent):
                if name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX):
                    _remove_leftover(name, parent)
        except OSError:
            return  # nothing there yet, or not ours to list: creating files will say so

    def sync_folder(self, folder: str) -> None:
        """Make the names in ``folder`` durable, and its own name in its parents."""
        try:
            while True:
                os.fsync(self._folder(folder).descriptor)
                if not folder:
                    break
                folder = folder.rpartition("/")[0]
            while self._missing:
                sync_name(self._missing[0])
                self._missing = self._missing[1:]
        except OSError as error:
            raise DestinationError(f"{self.path(folder)}: cannot be flushed: {error.strerror}") from error

    # -- folders

    def directory(self, folder: str, *, create: bool = False) -> int:
        """A descriptor of a folder, which stays the tree's; OSError when there is none, or a link."""
        return self._folder(folder, create=create).descriptor

    def _folder(self, folder: str, *, create: bool = False) -> _Folder:
        """A folder below the root, reached without following a symbolic link."""
        found = self._folders.get(folder)
        if found is not None:
            return found
        if not folder:
            if create:
                os.makedirs(self.root, _FOLDER_MODE, exist_ok=True)
            descriptor = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        else:
            above, _, base = folder.rpartition("/")
            parent = self._folder(above, create=create).descriptor
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(base, _FOLDER_MODE, dir_fd=parent)
            descriptor = os.open(base, _FOLDER_FLAGS, dir_fd=parent)
        if len(self._folders) >= KEPT_FOLDERS:
            for old in [name for name in self._folders if name and not folder.startswith(name)][:1]:
                self._folders.pop(old).release()
        found = self._folders[folder] = _Folder(descriptor)
        return found


class _Folder:
    """An open folder.  It is closed when nobody holds it: neither its tree nor a file in it."""

    __slots__ = ("_holders", "descriptor")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._holders = 1

    def hold(self) -> _Folder:
        self._holders += 1
        return self

    def release(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            with contextlib.suppress(OSError):  # nothing was written through it
                os.close(self.descriptor)


class LocalSource:
    """A local file that is being read."""

    __slots__ = ("_base", "_descriptor", "_name", "_parent", "_tree", "size", "state")

    def __init__(self, descriptor: int, tree: LocalTree, name: str, parent: _Folder, base: str) -> None:
        self._descriptor = descriptor
        self._tree = tree  # it and the name make a path when there is something to say
        self._name = name
        self._base = base
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise SourceError(f"{tree.path(name)}: {kind_problem(status.st_mode)}")
        self._parent = parent.hold()
        self.size = status.st_size
        self.state = _state(status)

    def read_at(self, offset: int, buffer: memoryview) -> int:
        length = len(buffer)
        try:
            done = os.preadv(self._descriptor, (buffer,), offset)
            while done < length:
                count = os.preadv(self._descriptor, (buffer[done:],), offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise SourceError(f"{self._path}: cannot be read: {error.strerror}") from error
        return done

    @property
    def _path(self) -> str:
        return self._tree.path(self._name)

    def check_unchanged(self) -> None:
        try:
            # What the name leads to: where that is the file that was opened, its state is this one's too.
            unchanged = (
                _state(os.stat(self._base, dir_fd=self._parent.descriptor, follow_symlinks=False))
                == self.state
            )
        except OSError:
            unchanged = False
        if not unchanged:
            raise SourceError(f"{self._path}: changed while it was read; run again when nobody writes to it")

    def close(self) -> None:
        self._parent.release()
        os.close(self._descriptor)


class LocalPart:
    """A handle that writes into a temporary file; it neither publishes nor removes it."""

    __slots__ = ("_descriptor", "_name", "_tree")

    def __init__(self, descriptor: int, tree: LocalTree, name: str) -> None:
        self._descriptor = descriptor
        self._tree = tree
        self._name = name

    @property
    def _path(self) -> str:
        return self._tree.path(self._name)

    def write_at(self, offset: int, data: Buffer) -> None:
        piece = len(data) if offset % _PAGE else _PIECE
        try:
            done = os.pwrite(self._descriptor, memoryview(data)[:piece], offset)
            while done < len(data):
                done += os.pwrite(self._descriptor, memoryview(data)[done : done + piece], offset + done)
        except OSError as error:
            raise DestinationError(f"{self._path}: cannot be written: {error.strerror}") from error

    def flush(self) -> None:
        # A failed fsync is final: the kernel may have dropped the pages, and a second call would succeed.
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise DestinationError(f"{self._path}: cannot be flushed: {error.strerror}") from error

    def state(self) -> State:
        return _state(os.fstat(self._descriptor))

    def close(self) -> None:
        os.close(self._descriptor)


class LocalTarget(LocalPart):
    """A local file that is being written, under a temporary name or under none."""

    __slots__ = ("_base", "_open", "_parent", "_temporary")

    def __init__(
        self, descriptor: int, tree: LocalTree, name: str, parent: _Folder, base: str, temporary: str | None
    ) -> None:
        super().__init__(descriptor, tree, name)
        self._temporary = temporary
        self._parent = parent.hold()
        self._base = base
        self._open = True

    @property
    def temporary(self) -> str:
        """The name by which others can open it meanwhile; a small file has none."""
        assert self._temporary is not None
        return self._temporary

    @classmethod
    def create(cls, tree: LocalTree, name: str, parent: _Folder, base: str, size: int | None) -> LocalTarget:
        """A target under a temporary name."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            temporary = f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}{TEMPORARY_SUFFIX}"
            descriptor = os.open(temporary, flags, _FILE_MODE, dir_fd=parent.descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    break  # a file system without locks: leftovers there are for `doctor` to show
                os.close(descriptor)
                continue  # someone who removes leftovers took it between our two calls
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)
        try:
            if size is not None and size > CLAIMED_LENGTH:
                _claim(descriptor, size)
            return cls(descriptor, tree, name, parent, base, temporary)
        except OSError:
            os.unlink(temporary, dir_fd=parent.descriptor)
            os.close(descriptor)
            raise

    def publish(self, *, overwrite: bool) -> None:
        try:
            if self._temporary is None:
                self._link()
            elif overwrite:
                parent = self._parent.descriptor
                os.rename(self._temporary, self._base, src_dir_fd=parent, dst_dir_fd=parent)
            else:
                self._rename(self._temporary)
        except FileExistsError as error:
            raise DestinationError(f"{self._path}: exists already; overwrite must be asked for") from error
        except OSError as error:
            raise DestinationError(f"{self._path}: cannot be written: {error.strerror}") from error
        self._close()

    def _link(self) -> None:
        """Give a file without a name its own."""
        descriptor, parent = self._descriptor, self._parent.descriptor
        # Linux 6.10 and later let anybody do this to a file that they opened; others go by /proc.
        if c_call("linkat", descriptor, b"", parent, os.fsencode(self._base), _AT_EMPTY_PATH):
            os.link(f"/proc/self/fd/{descriptor}", self._base, dst_dir_fd=parent, follow_symlinks=True)

    def _rename(self, temporary: str) -> None:
        """Give the file its name, but never another file's."""
        parent = self._parent.descriptor
        names = os.fsencode(temporary), os.fsencode(self._base)
        # One change to the folder, whose lock is what workers wait for (benchmarks/README.md, "small files").
        if c_call("renameat2", parent, names[0], parent, names[1], _RENAME_NOREPLACE) == 0:
            return
        # Whatever refused it: a link says why, and is the other call that fails where a rename would replace.
        try:
            os.link(temporary, self._base, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            if _exists(self._base, parent):  # a file system without links: the best that is left
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
            os.rename(temporary, self._base, src_dir_fd=parent, dst_dir_fd=parent)
        else:
            os.unlink(temporary, dir_fd=parent)

    def discard(self) -> None:
        if self._open:
            if self._temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._temporary, dir_fd=self._parent.descriptor)
            self._close()

    def _close(self) -> None:
        self._open = False
        self._parent.release()
        os.close(self._descriptor)


class FileObjectSource:
    """A seekable binary file object as a source; it stays the caller's to close."""

    state: State = (0, 0, 0)

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lock = threading.Lock()
        try:
            self.size = file.seek(0, os.SEEK_END)
        except (OSError, AttributeError) as error:
            raise SourceError(f"{file!r}: is not a binary file that seeks") from error

    def read_at(self, offset: int, buffer: memoryview) -> int:
        done = 0
        try:
            with self._lock:
                self._file.seek(offset)
                while done < len(buffer):
                    data = self._file.read(len(buffer) - done)
                    if not data:
                        break
                    buffer[done : done + len(data)] = data
                    done += len(data)
        except OSError as error:
            raise SourceError(f"{self._file!r}: cannot be read: {error}") from error
        return done

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        pass


def _create_nameless(folder: int) -> int | None:
    """The descriptor of a new file without a name, None where the file system has no such files."""
    if not _NAMELESS_FLAGS or not _has_descriptor_names():
        return None
    try:
        return os.open(".", _NAMELESS_FLAGS, _FILE_MODE, dir_fd=folder)
    except OSError as error:
        if error.errno in _NO_NAMELESS:
            return None
        raise


@cache
def _has_descriptor_names() -> bool:
    """Whether a file without a name can be given one on every kernel."""
    return os.path.isdir("/proc/self/fd")


def _claim(descriptor: int, size: int) -> None:
    """Give a new file its size, and its room on the disk where the file system can: a full disk says so now.

    Writing into room that is claimed costs a third less (benchmarks/README.md, "claimed room"); but a
    tmpfs claims by filling every page with zeros, for no gain.  The system call itself:
    ``os.posix_fallocate`` would write to every block where there is no such call.
    """
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    kind = ctypes.create_string_buffer(_STATFS_ROOM)
    try:
        fallocate = library.fallocate
        in_memory = library.fstatfs(descriptor, kind) == 0 and kind.raw.startswith(_TMPFS_MAGIC)
    except AttributeError:  # not Linux
        in_memory = True
    if in_memory:
        os.ftruncate(descriptor, size)
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(descriptor, 0, 0, size):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            os.ftruncate(descriptor, size)
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


_STATFS_ROOM: Final = 256  # more than any system's struct statfs; it begins with the kind of file system
_TMPFS_MAGIC: Final = (0x01021994).to_bytes(struct.calcsize("l"), sys.byteorder)


def _exists(base: str, parent: int) -> bool:
    try:
        os.stat(base, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _state(status: os.stat_result) -> State:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _remove_leftover(name: str, parent: int) -> None:
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=parent)
    except OSError:
        pass  # locked: a running job is writing it
    finally:
        os.close(descriptor)


def remove_open_temporaries() -> None:
    """Remove the temporary files that this process has open, which then must not go on (Linux)."""
    with contextlib.suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{number}")
                name = os.path.basename(path)
                if name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX):
                    os.unlink(path)


def kind_problem(mode: int) -> str:
    """What something is that is no regular file."""
    kinds: Sequence[tuple[bool, str]] = (
        (stat.S_ISDIR(mode), "is a folder, not a file"),
        (stat.S_ISLNK(mode), "is a symbolic link; links are not followed"),
        (stat.S_ISFIFO(mode), "is a named pipe, not a file"),
        (stat.S_ISSOCK(mode), "is a socket, not a file"),
    )
    return next((text for matches, text in kinds if matches), "is a device, not a file")
