"""What a power loss would leave of a folder: the writes of a process, recorded by strace, replayed up to a
moment, with what no flush had reached taken away.

    recording = record(command, folder)        events, and the lines that the process told, in their order
    recording.image(folder, event, losing)     the folder's files after a power loss before that event

A file system promises the bytes of a file after its fsync, and a name after the fsync of its folder; what
was not flushed may be lost whole, kept whole, or kept in part and torn (POSIX; Pillai et al., "All File
Systems Are Not Created Equal", OSDI 2014).
"""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

CALLS = "openat,pwrite64,write,ftruncate,fsync,fdatasync,rename,unlink,unlinkat"
SECTOR = 512

_CALL = re.compile(r"(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)(?:<[^>]*>)?")
_DESCRIPTOR = re.compile(r"(\d+|AT_FDCWD)<([^>]*)>")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


class Event(NamedTuple):
    """What a process did: to a file or the folder, or what it told."""

    kind: str
    name: str = ""
    """Of a file in the folder; of a new name the old one stands in ``data``."""
    data: bytes = b""
    offset: int = 0


class Recording(NamedTuple):
    """The events of one process."""

    events: list[Event]

    def told(self, until: int) -> list[list[str]]:
        """The lines told before an event, each a JSON array."""
        lines = b"".join(event.data for event in self.events[:until] if event.kind == "told").splitlines()
        return [json.loads(line) for line in lines]

    def image(self, folder: Path, until: int, losing: str, seed: int = 0) -> None:
        """Write the files as a power loss before event ``until`` leaves them.

        ``losing``: "all" that was not flushed, "none" of it, or "some", chosen by ``seed``.
        """
        chance = random.Random(f"{until} {seed}")
        files: dict[str, _File] = {}
        names: dict[str, _File] = {}  # as they are on the disk
        waiting: list[tuple[str, _File | None]] = []  # names given and taken since the folder's last flush
        for event in self.events[:until]:
            if event.kind == "create":
                files[event.name] = _File()
                waiting.append((event.name, files[event.name]))
            elif event.kind == "rename":
                moved = files[event.name] = files.pop(event.data.decode())
                waiting += [(event.name, moved), (event.data.decode(), None)]
            elif event.kind == "unlink":
                del files[event.name]
                waiting.append((event.name, None))
            elif event.kind == "flush folder":
                _apply(names, waiting)
                waiting = []
            elif event.kind == "flush":
                files[event.name].flush()
            elif event.kind in ("write", "truncate"):
                files[event.name].pending.append(event)
        kept = {"all": 0, "none": len(waiting), "some": chance.randint(0, len(waiting))}[losing]
        _apply(names, waiting[:kept])
        for name, file in names.items():
            path = folder / name
            path.write_bytes(file.after_loss(losing, chance))
            path.chmod(0o600)


def _apply(names: dict[str, _File], changes: list[tuple[str, _File | None]]) -> None:
    for name, file in changes:
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file


class _File:
    def __init__(self) -> None:
        self.content = bytearray()
        self.pending: list[Event] = []

    def flush(self) -> None:
        for event in self.pending:
            _change(self.content, event)
        self.pending = []

    def after_loss(self, losing: str, chance: random.Random) -> bytes:
        left = bytearray(self.content)
        for event in self.pending:
            if losing == "none" or (losing == "some" and chance.random() < 0.5):
                if losing == "some" and event.kind == "write" and chance.random() < 0.3:  # torn
                    sectors = len(event.data) // SECTOR
                    event = event._replace(data=event.data[: SECTOR * chance.randint(0, sectors)])
                _change(left, event)
        return bytes(left)


def _change(content: bytearray, event: Event) -> None:
    if event.kind == "truncate":
        del content[event.offset :]
        content.extend(bytes(event.offset - len(content)))
        return
    content.extend(bytes(max(0, event.offset - len(content))))
    content[event.offset : event.offset + len(event.data)] = event.data


def record(command: list[str], folder: Path, log: Path, **options: Any) -> Recording:
    """Run ``command`` under strace and give what it did to the files of ``folder``, and told."""
    done = subprocess.run(
        ["strace", "-qq", "-f", "-y", "-xx", "-s", "2000000", "-e", f"trace={CALLS}", "-o", str(log), *command],
        capture_output=True, check=False, timeout=240, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    events: list[Event] = []
    known: set[str] = set()
    positions: dict[int, int] = {}
    for line in log.read_text().splitlines():
        assert "unfinished" not in line, "the process has threads: its calls are not in one order"
        if (match := _CALL.fullmatch(line.rstrip())) and not match[3].startswith("-"):
            _event(match[1], match[2], int(match[3]), str(folder), events, known, positions)
    assert b"".join(event.data for event in events if event.kind == "told") == done.stdout
    return Recording(events)


def _event(
    call: str,
    words: str,
    result: int,
    folder: str,
    events: list[Event],
    known: set[str],
    positions: dict[int, int],
) -> None:
    texts = [bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(words)]
    if call in ("openat", "rename", "unlink", "unlinkat"):
        paths = [text.decode() for text in texts]
        if not all(path.startswith(folder + "/") for path in paths):
            return
        names = [path[len(folder) + 1 :] for path in paths]
        if call == "openat":
            positions[result] = 0
            if names[0] not in known and "O_CREAT" in words:
                known.add(names[0])
                events.append(Event("create", names[0]))
        elif call == "rename":
            known.discard(names[0])
            known.add(names[1])
            events.append(Event("rename", names[1], names[0].encode()))
        elif names[0] in known:
            known.discard(names[0])
            events.append(Event("unlink", names[0]))
        return
    descriptor = _DESCRIPTOR.match(words)
    if descriptor is None:
        return
    number, path = int(descriptor[1]), _path(descriptor[2])
    if call == "write" and number == 1:
        events.append(Event("told", data=texts[0]))
    if path == folder and call in ("fsync", "fdatasync"):
        events.append(Event("flush folder"))
    if not path.startswith(folder + "/"):
        return
    name = path[len(folder) + 1 :]
    if name.endswith("-shm"):
        return  # shared memory: made anew by who opens the database first
    if call in ("fsync", "fdatasync"):
        events.append(Event("flush", name))
    elif call == "ftruncate":
        events.append(Event("truncate", name, offset=int(words.rpartition(",")[2])))
    elif call == "pwrite64":
        events.append(Event("write", name, texts[0], int(words.rpartition(",")[2])))
    else:
        events.append(Event("write", name, texts[0], positions[number]))
        positions[number] += result


def _path(text: str) -> str:
    """A path as strace shows it beside a descriptor, escaped or not."""
    return bytes.fromhex(text.replace("\\x", "")).decode() if text.startswith("\\x") else text
