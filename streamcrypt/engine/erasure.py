"""Erasing by key: a key's deletion is scheduled, and what that does to encrypted trees is shown.

    before   every header of the trees: which messages this key alone opens, which others as well
             the data keys of all the rest are unwrapped, without this key
    then     ScheduleKeyDeletion; from now on KMS refuses the key
    after    the same headers again: the rest still opens, what this key alone opened is refused

A message counts as readable when a data key was unwrapped, its commitment compared, and its header
authenticated; the frames behind it depend on no other key.  Nothing is written but the key's state,
and until the end of the waiting period that can be taken back.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from streamcrypt.engine.job import Failure, Place
from streamcrypt.engine.scan import scan
from streamcrypt.engine.spans import MANIFEST
from streamcrypt.errors import FormatError, KeyAccessError, SourceError, StreamcryptError, TemporaryError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.calls import KmsCalls
from streamcrypt.keys.keyring import (
    HIERARCHY_PROVIDER,
    KMS_PROVIDER,
    KMS_RSA_PROVIDER,
    Keyring,
    MultiKeyring,
    printable,
)
from streamcrypt.keys.kms import KeyArn, KmsKeyring, KmsRsaKeyring
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.reference import kms_options
from streamcrypt.message.header import EncryptedDataKey, Header
from streamcrypt.storage import Tree
from streamcrypt.streams import ReadingRules, located, source_header, unlock
from streamcrypt.tuples import NamedTuple

PENDING: Final = "PendingDeletion"
DELETED: Final = "Deleted"
_GONE: Final = (PENDING, DELETED)


class DoomedKey:
    """The key that is to be deleted, or is: its ARN, its state, its waiting period."""

    def __init__(self, calls: KmsCalls, key_id: str, label: str) -> None:
        """KeyAccessError when it cannot be looked at; StreamcryptError when it is no key that wraps data keys."""
        self._calls = calls
        self.label = printable(label)
        self.deletion_date: str | None = None
        self.pending_window: int | None = None
        try:
            found = calls.call("DescribeKey", self.label, KeyId=key_id)["KeyMetadata"]
        except KeyAccessError as error:
            if error.code != "NotFoundException" or not key_id.startswith("arn:"):
                raise
            self.arn, self.state = KeyArn.parse(key_id), DELETED  # its waiting period is over
            if self.arn.kind != "key":
                raise
            return
        self.arn = KeyArn.parse(str(found["Arn"]))
        self.state = str(found["KeyState"])
        self._take_date(found)
        usage = found.get("KeyUsage") or "ENCRYPT_DECRYPT"
        if usage != "ENCRYPT_DECRYPT":
            raise StreamcryptError(
                f"{self.label}: a key for {usage} wraps no data keys: nothing is erased with it; "
                "streamcrypt kms schedule-key-deletion deletes it"
            )
        replicas = found.get("MultiRegionConfiguration", {}).get("ReplicaKeys", [])
        primary = found.get("MultiRegionConfiguration", {}).get("PrimaryKey", {}).get("Arn")
        others = [one["Arn"] for one in replicas if one["Arn"] != str(self.arn)]
        others += [primary] if primary not in (None, str(self.arn)) else []
        if others:
            raise StreamcryptError(
                f"{self.label}: is one of several multi-Region keys with the same material, so deleting it erases "
                f"nothing; delete the others first, the primary key last: {', '.join(others)}"
            )

    def _take_date(self, found: dict[str, Any]) -> None:
        date = found.get("DeletionDate")
        self.deletion_date = date.isoformat() if date is not None else None

    @property
    def is_local(self) -> bool:
        return self.arn.region == "local"

    def schedule(self, window: int) -> None:
        """Ask for the deletion after ``window`` days (7 to 30)."""
        answer = self._calls.call(
            "ScheduleKeyDeletion", self.label, KeyId=self.arn.id, PendingWindowInDays=window
        )
        self.state = str(answer.get("KeyState", PENDING))
        self.pending_window = window
        self._take_date(answer)

    def materials(self) -> Materials:
        """What this key alone opens; its KMS is asked every time."""
        arn = str(self.arn)
        keyrings = [KmsKeyring(self._calls, arn), KmsRsaKeyring(arn, client=self._calls)]
        return Materials(MultiKeyring(None, keyrings), max_encrypted_data_keys=None)

    def wraps(self, encrypted: EncryptedDataKey) -> bool:
        """Whether this key wrapped a data key, by what the (unauthenticated) header says."""
        return (
            encrypted.provider_id in (KMS_PROVIDER, KMS_RSA_PROVIDER)
            and encrypted.info == str(self.arn).encode()
        )


class Fate(NamedTuple):
    """What becomes of one object: which it is, whether the key opens it, whether others do, and what failed."""

    # "erased", "shared" (other keys open it, too), "untouched", "gone" (its keys were deleted before), or
    # "other" (not a message)
    kind: str
    error: StreamcryptError | None = None


class TreeFate:
    """What becomes of one tree."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.counts = {"erased": 0, "shared": 0, "untouched": 0, "gone": 0, "other": 0}
        self.erased: list[str] = []
        self.shared: list[str] = []
        self.gone: list[str] = []
        self.failed: list[Failure] = []
        self.manifest: str | None = None

    def take(self, name: str, path: str, fate: Fate) -> None:
        if fate.error is not None:
            self.failed.append(Failure(path, located(fate.error, path)))
        if name == MANIFEST:
            self.manifest = fate.kind
            return
        self.counts[fate.kind] += 1
        if fate.kind == "erased":
            self.erased.append(path)
        elif fate.kind == "shared":
            self.shared.append(path)
        elif fate.kind == "gone":
            self.gone.append(path)

    @property
    def uses_key(self) -> bool:
        """Whether anything here is under the key."""
        return bool(self.erased or self.shared) or self.manifest in ("erased", "shared")

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "messages": sum(self.counts.values()) - self.counts["other"],
            "unreadable": self.counts["erased"],
            "also_wrapped_by_others": self.counts["shared"],
            "untouched": self.counts["untouched"],
            "unreadable_before": self.counts["gone"],
            "not_messages": self.counts["other"],
            "manifest": self.manifest
            and ("unreadable" if self.manifest in ("erased", "gone") else "readable"),
        }


class Examination:
    """Reads the headers of trees and opens what other keys than the doomed one can open."""

    def __init__(
        self, key: DoomedKey, keyring: Keyring, rules: ReadingRules, places: Sequence[Place], workers: int
    ) -> None:
        self._key = key
        self._keyring = keyring
        self._rules = rules._replace(max_encrypted_data_keys=None)
        self._places = places
        self._workers = workers

    def look(self, *, refused: bool = False) -> list[TreeFate]:
        """Every message once.  ``refused``: what the key alone opens must be refused, too; it fails otherwise.

        Data keys are asked for anew: none that was unwrapped before the deletion counts afterwards.
        """
        look = _Look(self._key, Materials(self._keyring, cache=DataKeyCache(), max_encrypted_data_keys=None))
        found = []
        for place in self._places:
            fate = TreeFate(place.path)

            def judge(tree: Tree, name: str) -> Fate:
                return look.judge(tree, name, self._rules, refused=refused)

            for name, one in scan(place.tree, self._workers, _names(place), judge):
                fate.take(name, place.tree.path(name), one)
            found.append(fate)
        return found


class _Look:
    """One pass over the trees; several threads use it."""

    def __init__(self, key: DoomedKey, rest: Materials) -> None:
        self._key = key
        self._rest = rest
        self._doomed = key.materials()
        # Of these KMS was asked, and is not asked again.
        self._refused: set[tuple[EncryptedDataKey, ...]] = set()
        self._gone: set[EncryptedDataKey] = set()

    def judge(self, tree: Tree, name: str, rules: ReadingRules, *, refused: bool) -> Fate:
        try:
            source = tree.open(name)
        except SourceError as error:
            return Fate("other", error)
        try:
            header = source_header(source, max_encrypted_data_keys=None)
        except FormatError as error:
            return Fate("other", error if error.recognised else None)
        except StreamcryptError as error:
            return Fate("other", error)
        finally:
            source.close()
        others = tuple(one for one in header.encrypted_data_keys if not self._key.wraps(one))
        doomed = len(others) < len(header.encrypted_data_keys)
        kind = "shared" if doomed else "untouched"
        try:
            opened = self._open(header, others, rules)
        except StreamcryptError as error:
            return Fate(kind, error)
        if not opened:
            if not doomed:
                return Fate("gone")
            return Fate("erased", self._still_opens(header, rules) if refused else None)
        if all(one.provider_id == HIERARCHY_PROVIDER for one in others):
            # The process keeps branch keys for a while, so that it opened proves nothing of KMS.
            return Fate(kind, StreamcryptError(_BRANCH_KEY))
        return Fate(kind)

    def _open(self, header: Header, keys: tuple[EncryptedDataKey, ...], rules: ReadingRules) -> bool:
        """Whether one of these wrapped keys opens the message; False when their KMS keys are all deleted, or to be."""
        failure: StreamcryptError | None = None
        for one in keys:
            if one in self._gone:
                continue
            try:
                unlock(header._replace(encrypted_data_keys=(one,)), self._rest, rules)
            except StreamcryptError as error:
                if _is_gone(error):
                    self._gone.add(one)
                else:
                    failure = failure or error
            else:
                return True
        if failure is not None:
            raise failure
        return False

    def _still_opens(self, header: Header, rules: ReadingRules) -> StreamcryptError | None:
        """An error where KMS does not refuse what only the doomed key wrapped."""
        if header.encrypted_data_keys in self._refused:
            return None
        try:
            unlock(header, self._doomed, rules)
        except TemporaryError as error:
            return StillReadableError(f"whether KMS refuses it is not known: {error}")
        except StreamcryptError:
            self._refused.add(header.encrypted_data_keys)
            return None
        return StillReadableError(f"{self._key.arn}: KMS still opens it; look again with --check in a minute")


class StillReadableError(StreamcryptError):
    """A message that was to be unreadable opens."""


def _is_gone(error: StreamcryptError) -> bool:
    """Whether the KMS key of a wrapped key is deleted already, or about to be."""
    if not isinstance(error, KeyAccessError):
        return False
    if error.code == "KMSInvalidStateException":
        return "pending deletion" in str(error)
    return error.code == "NotFoundException"


_BRANCH_KEY: Final = (
    "is wrapped by a branch key; which KMS key wraps that is not said by the message, but by its store"
)


def _names(place: Place) -> Iterator[str]:
    if place.name is not None:
        return iter((place.name,))
    manifest = (MANIFEST,) if place.tree.exists(MANIFEST) else ()
    return itertools.chain(manifest, (entry.name for entry in place.tree.walk() if not entry.folder))


class Erasure:
    """What was done: the key, the fate of every tree, and what could not be proved."""

    def __init__(self, key: DoomedKey, trees: list[TreeFate], *, scheduled: bool) -> None:
        self.key = key
        self.trees = trees
        self.scheduled = scheduled
        self.proved: bool | None = None
        self.failed = [failure for tree in trees for failure in tree.failed]

    @property
    def unreadable(self) -> list[str]:
        """The messages that only this key opens."""
        return [path for tree in self.trees for path in tree.erased]

    @property
    def cancel(self) -> str:
        """The command that takes the deletion back."""
        where = kms_options(self.key.label, self.key.arn.region)
        return f"streamcrypt kms cancel-key-deletion --key-id {self.key.arn}{where}"

    def to_json(self) -> dict[str, Any]:
        return {
            "operation": "erase",
            "key": str(self.key.arn),
            "state": self.key.state,
            "scheduled": self.scheduled,
            "pending_window_days": self.key.pending_window,
            "deletion_date": self.key.deletion_date,
            "cancel": self.cancel if self.key.state != DELETED else None,
            "trees": [tree.to_json() for tree in self.trees],
            "unreadable": self.unreadable,
            "also_wrapped_by_others": [path for tree in self.trees for path in tree.shared],
            "proved": self.proved,
            "failed": [{"path": failure.path, "error": str(failure.error)} for failure in self.failed],
        }


def erase(
    key: DoomedKey,
    examination: Examination,
    *,
    window: int,
    check: bool = False,
    dry_run: bool = False,
    lose_manifest: bool = False,
    allow_unproved: bool = False,
    allow_unused: bool = False,
) -> Erasure:
    """Schedule the key's deletion and show what it does; ``check`` only shows, of a key that is scheduled or gone.

    Nothing is scheduled when a message of another key cannot be opened, since nothing could be proved
    of it (``allow_unproved`` goes on), when no message of the trees is under the key, which is more likely a
    mistaken key than an erasure (``allow_unused`` goes on), or when a tree would lose its manifest but not
    all of its messages (``lose_manifest`` goes on).  With ``dry_run`` nothing is scheduled at all.
    """
    if check or key.state in _GONE:
        if key.state not in _GONE:
            raise StreamcryptError(
                f"{key.label}: is {key.state}: its deletion is not scheduled, so nothing is erased; leave out --check"
            )
        done = Erasure(key, examination.look(refused=True), scheduled=False)
        done.proved = not done.failed
        if done.failed:
            raise _with_report(done.failed[0].error, str(done.failed[0].error), done)
        return done
    before = examination.look()
    if dry_run:
        return Erasure(key, before, scheduled=False)
    unproved = {failure.path: failure for tree in before for failure in tree.failed}
    if unproved and not allow_unproved:
        first = next(iter(unproved.values()))
        raise _with_report(
            first.error,
            f"{first.error}; nothing was scheduled, because {len(unproved)} of the messages that other keys wrap "
            "cannot be opened now, so that nothing could be proved of them: give their keys (--other-key), or "
            "--allow-unproved",
            Erasure(key, before, scheduled=False),
        )
    if before and not allow_unused and not any(tree.uses_key for tree in before):
        raise StreamcryptError(
            f"{key.label}: no message in {', '.join(tree.path for tree in before)} is under it; nothing was scheduled. "
            "Is it the right key (streamcrypt inspect names the keys of a message), and the right place?  "
            "--allow-unused deletes it all the same"
        )
    for tree in before:
        if (
            tree.manifest == "erased"
            and tree.counts["shared"] + tree.counts["untouched"]
            and not lose_manifest
        ):
            raise StreamcryptError(
                f"{tree.path}: its manifest is under {key.label} alone, and without it nothing proves that the tree "
                "is complete; nothing was scheduled.  Rekey the tree first (streamcrypt rekey … --key ANOTHER "
                "--key-map FILE), or --lose-manifest"
            )
    key.schedule(window)
    after = examination.look(refused=True)
    done = Erasure(key, after, scheduled=True)
    # On AWS a few seconds may pass until every host of KMS knows of the deletion: what still opens is
    # told, but it is no sign that anything else was lost.
    lost = [f for f in done.failed if f.path not in unproved and not isinstance(f.error, StillReadableError)]
    gone = {path for tree in before for path in tree.gone}
    for path in (path for tree in after for path in tree.gone if path not in gone):
        lost.append(Failure(path, KeyAccessError(f"{path}: its key was deleted by somebody else meanwhile")))
    done.proved = not lost and not done.failed
    if lost:
        raise _with_report(
            lost[0].error,
            f"{lost[0].error}; it opened before the deletion was scheduled ({len(lost)} such in all): take it back "
            f"with {done.cancel}",
            done,
        )
    return done


def _with_report(error: StreamcryptError, text: str, done: Erasure) -> StreamcryptError:
    """The error with more to say, and with what was found as its ``report``."""
    raised = copy.copy(error)
    raised.args = (text,)
    raised.report = done  # type: ignore[attr-defined]  # for the caller who wants all of them
    return raised
