"""Keys by partition: which key each file of a job gets, by its name.

A key map is a TOML file of shell patterns and key references, or JSON lines:

    "country=DE/*" = "local:alias/de"                        one key
    "country=FR/*" = ["local:alias/fr", "local:alias/backup"]  several: any one decrypts
    "drafts/*" = []                                          none: such a file is an error

    {"pattern": "country=DE/*", "key": "local:alias/de"}     the same, a line each

The first pattern that matches the whole relative name wins; ``*`` also matches ``/``.  A name that
none matches gets the job's own key, as the manifest does.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from streamcrypt.errors import KeyAccessError, SourceError, TemporaryError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.calls import KmsStats
from streamcrypt.keys.keyring import Keyring, printable
from streamcrypt.keys.materials import EncryptionMaterials, Materials
from streamcrypt.keys.reference import References, decrypting_keyring, encrypting_keyring
from streamcrypt.message.suites import AlgorithmSuite


def read_key_map(path: str | os.PathLike[str]) -> dict[str, References]:
    """Patterns and references of a key-map file, in its order.

    SourceError when it cannot be read, ValueError when it is no key map.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
    except OSError as error:
        raise SourceError(f"{name}: the key map cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: the key map is not UTF-8") from error
    try:
        return _checked(_json_pairs(text) if text.lstrip().startswith("{") else _toml_pairs(text))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _toml_pairs(text: str) -> Iterator[tuple[str, Any]]:
    import tomllib

    try:
        yield from tomllib.loads(text).items()
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f'is not a key map ({error}); write "PATTERN" = "REFERENCE"') from error


def _json_pairs(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or record.keys() != {"pattern", "key"}:
            raise ValueError(f'line {number}: write {{"pattern": "PATTERN", "key": "REFERENCE"}}')
        yield record["pattern"], record["key"]


def _checked(pairs: Iterator[tuple[str, Any]]) -> dict[str, References]:
    found: dict[str, References] = {}
    for pattern, given in pairs:
        if not isinstance(pattern, str):
            raise ValueError("a pattern is a string")
        if pattern in found:
            raise ValueError(f"the pattern {pattern!r} stands twice")
        references = [given] if isinstance(given, str) else given
        if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
            raise ValueError(
                f"{pattern!r}: a key reference or a list of them; patterns go in quotation marks"
            )
        found[pattern] = given
    return found


class Partition:
    """The files of one pattern: what they are encrypted with, and how much there was of them.

    ``files``, ``bytes`` (of plaintext) and ``data_keys`` are counted by whoever uses it.
    """

    def __init__(self, references: References, materials: Materials, limit: int | None) -> None:
        self.label = _label(references)
        self.references = references
        self.files = 0
        self.bytes = 0
        self.data_keys = 0
        self._materials = materials
        self._limit = limit
        self._resuming: Materials | None = None
        self._wrapped: object = None
        self._refused: KeyAccessError | None = None

    def for_encryption(
        self, suite: AlgorithmSuite, context: Mapping[str, str], plaintext_length: int
    ) -> EncryptionMaterials:
        """As Materials does; a key that could not be used is not asked for again."""
        if self._refused is not None:
            raise copy.copy(self._refused)
        try:
            found = self._materials.for_encryption(suite, context, plaintext_length)
        except KeyAccessError as error:
            if not isinstance(error, TemporaryError):
                self._refused = copy.copy(error)
            raise
        if found.encrypted_data_keys is not self._wrapped:
            self._wrapped = found.encrypted_data_keys
            self.data_keys += 1
        return found

    @property
    def resuming(self) -> Materials:
        """What opens the messages that this partition's keys wrapped."""
        if self._resuming is None:
            self._resuming = Materials(
                decrypting_keyring(self.references), max_encrypted_data_keys=self._limit
            )
        return self._resuming

    def to_json(self) -> dict[str, Any]:
        return {"key": self.label, "files": self.files, "bytes": self.bytes, "data_keys": self.data_keys}


def _label(references: References) -> str:
    given = [references] if isinstance(references, str | Keyring) else references
    return ", ".join(one if isinstance(one, str) else one.describe() for one in given)


class KeyMap:
    """The partitions of a job.  All keyrings are made at once, so that a bad reference shows before any work."""

    def __init__(
        self,
        rules: Mapping[str, References],
        default: References,
        *,
        stats: KmsStats | None = None,
        cache: DataKeyCache | None = None,
        limit: int | None = None,
    ) -> None:
        self._limit = limit
        self._described = [[pattern, _label(references)] for pattern, references in rules.items()]
        self._described.append(["", _label(default)])
        self._by_references: dict[Any, Partition] = {}

        def partition(references: References) -> Partition | None:
            if not isinstance(references, str | Keyring):
                references = tuple(references)
                if not references:
                    return None
            known = self._by_references.get(references)
            if known is None:
                keyring = encrypting_keyring(references, stats=stats)
                materials = Materials(keyring, cache=cache, max_encrypted_data_keys=limit)
                known = self._by_references[references] = Partition(references, materials, limit)
            return known

        self._default = partition(default)
        # ``folder/*`` is what most patterns are; there may be one for each of many subjects, so these are
        # looked up by folder.  The other patterns are tried one by one.
        self._folders: dict[str, tuple[int, Partition | None]] = {}
        self._patterns: list[tuple[int, str, Partition | None]] = []
        for number, (pattern, references) in enumerate(rules.items()):
            found = partition(references)
            if pattern.endswith("/*") and not any(mark in pattern[:-1] for mark in "*?["):
                self._folders.setdefault(pattern[:-2], (number, found))
            else:
                self._patterns.append((number, pattern, found))

    @property
    def references(self) -> list[str | Keyring]:
        """Every key of the map, and the job's own."""
        found: list[str | Keyring] = []
        for references in self._by_references:
            found += [references] if isinstance(references, str | Keyring) else references
        return list(dict.fromkeys(found))

    def describe(self) -> str:
        """The patterns and their keys for people."""
        return "; ".join(f"{pattern or 'others'}: {keys}" for pattern, keys in self._described)

    def of(self, name: str) -> Partition:
        """The partition of a file; KeyAccessError where the map says that it has no key."""
        best: tuple[int, Partition | None] | None = None
        slash = name.find("/")
        while slash > 0:
            found = self._folders.get(name[:slash])
            if found is not None and (best is None or found[0] < best[0]):
                best = found
            slash = name.find("/", slash + 1)
        for number, pattern, partition in self._patterns:
            if best is not None and number > best[0]:
                break
            if fnmatchcase(name, pattern):
                best = number, partition
                break
        chosen = self._default if best is None else best[1]
        if chosen is None:
            raise KeyAccessError(f"{printable(name)}: the key map gives it no key")
        return chosen

    def to_json(self) -> list[dict[str, Any]]:
        """Files, bytes and data keys for each key that was used."""
        return [partition.to_json() for partition in self._by_references.values() if partition.files]
