"""The public functions: each reads as the story of its command.

    encrypt decrypt verify rekey     files, folders, streams; they return a Report or raise
    erase                            a key's deletion, and what it does to encrypted folders
    inspect                          what a message says of itself, without a key
    open                             one message as a file object
    encrypt_bytes decrypt_bytes      one message in memory

Words that recur:

    keys        a key reference or Keyring, or several (INTERFACE: "Key references"); to decrypt, None
                finds AWS and local keys by the ARN in the message
    context     encryption context: to encrypt, the pairs to bind; to read, pairs that must be there
    cache       a DataKeyCache to share between calls; None: one for this call; False: none
    frame_size  plaintext bytes of a frame, a number or "1MiB"
    engine      "local", or "ray": the same tasks on the Ray cluster at ``address`` (engine/remote.py)
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, Literal, cast, overload

from streamcrypt.engine import run
from streamcrypt.engine.job import (
    STORE_WORKERS,
    Failure,
    Job,
    Place,
    Progress,
    Report,
    default_workers,
    observers,
    peak_memory,
    processor_seconds,
)
from streamcrypt.engine.journal import is_interrupted
from streamcrypt.errors import DestinationError, FormatError, IntegrityError, SourceError, StreamcryptError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.calls import KmsStats
from streamcrypt.keys.keyring import describe_wrapped_key
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.reference import References, decrypting_keyring, encrypting_keyring
from streamcrypt.message.context import check_caller_context
from streamcrypt.message.frames import UNFRAMED_PREFIX, unframed_length
from streamcrypt.message.header import DEFAULT_MAX_ENCRYPTED_DATA_KEYS
from streamcrypt.message.suites import MAX_WRITTEN_FRAME_LENGTH, SIGNED, UNSIGNED, CommitmentPolicy
from streamcrypt.storage import (
    Entry,
    FileObjectSource,
    Filters,
    LocalTree,
    Source,
    is_store_url,
    kind_problem,
)
from streamcrypt.streams import (
    DEFAULT_FRAME_LENGTH,
    DecryptingFile,
    EncryptingFile,
    OutgoingMessage,
    ReadingRules,
    header_template,
    naming,
    octets_of,
    open_message,
    read_bytes,
    seal_message,
    source_geometry,
    source_header,
)
from streamcrypt.system import missing_folders
from streamcrypt.units import parse_size

if TYPE_CHECKING:
    from streamcrypt.engine.erasure import Erasure
    from streamcrypt.keys.partition import KeyMap
    from streamcrypt.keys.signing import PublicKey, SigningKey
    from streamcrypt.s3client import ClientObject
    from streamcrypt.stores import StoreTree

Path = str | os.PathLike[str]
Cache = DataKeyCache | Literal[False] | None
Policy = CommitmentPolicy | str

_STRICT = CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT


def encrypt(
    source: Path,
    destination: Path,
    *,
    keys: References,
    context: Mapping[str, str] | None = None,
    authenticated_context: Mapping[str, str] | None = None,
    sign: bool = False,
    frame_size: int | str = DEFAULT_FRAME_LENGTH,
    key_map: Path | Mapping[str, References] | None = None,
    sign_manifest: str | None = None,
    signing_algorithm: str | None = None,
    workers: int | None = None,
    cache: Cache = None,
    engine: str = "local",
    address: str | None = None,
    max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
    overwrite: bool = False,
    resume: bool = False,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    files: str | Iterable[str] | None = None,
    dry_run: bool = False,
    fsync: bool = True,
    progress: Callable[[Progress], None] | None = None,
    audit: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Encrypt a file to a message, or a folder to a tree of messages with a manifest.

    Every message appears under its name only when it is whole.  In a folder one file that fails does
    not stop the others; at the end the gravest failure is raised, and its ``report`` names them all.

        report = sc.encrypt("train/", "train.enc/", keys="local:alias/ml", context={"Project": "Churn"})

    ``authenticated_context``: pairs that are bound to the messages but not stored in them; a reader
    must supply them.  ``files``: names within the folder to take, instead of all.  ``fsync=False``
    gives up durability across a power loss.  ``key_map``: a file, or patterns and references, that gives
    files keys of their own (keys/partition.py).  ``sign_manifest``: a key of a KMS that signs the whole
    folder (engine/signature.py); ``signing_algorithm`` chooses among those of an RSA key.  Raises
    StreamcryptError and its family; ValueError or TypeError for bad arguments, before anything is touched.
    """
    calls = _Calls(cache, engine, address)
    job = Job(
        "encrypt",
        _source(source),
        _destination(destination),
        writing=calls.writing(keys, max_encrypted_data_keys),
        resuming=calls.reading(keys, None) if resume else None,
        context=_own_context(context, authenticated_context),
        authenticated_context=dict(authenticated_context or {}),
        suite=SIGNED if sign else UNSIGNED,
        frame_length=_frame_length(frame_size),
        workers=_workers(workers, source, destination),
        overwrite=overwrite,
        resume=resume,
        durable=fsync,
        filters=Filters(_several(include), _several(exclude)),
        names=_names(files),
        dry_run=dry_run,
        progress=progress,
        audit=audit,
        key_map=calls.key_map(key_map, keys, max_encrypted_data_keys),
        signing=calls.signing(sign_manifest, signing_algorithm),
    )
    return calls.report(job, run.encrypt)


def decrypt(
    source: Path,
    destination: Path,
    *,
    keys: References | None = None,
    context: Mapping[str, str] | None = None,
    authenticated_context: Mapping[str, str] | None = None,
    commitment_policy: Policy = _STRICT,
    max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
    require_signed: bool = False,
    require_manifest: bool = False,
    signed_by: Path | None = None,
    workers: int | None = None,
    cache: Cache = None,
    engine: str = "local",
    address: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    files: str | Iterable[str] | None = None,
    dry_run: bool = False,
    fsync: bool = True,
    progress: Callable[[Progress], None] | None = None,
    audit: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Decrypt a message to a file, or a tree of messages to a folder.

    A file appears only when all of its message has been authenticated, the signature of a signed one
    included.  A tree with a manifest must be what its manifest lists: what is missing, swapped or
    added fails; ``require_manifest`` refuses a tree without one.  ``context`` names pairs that must
    stand in every message.  ``signed_by``, the file of a public key: the tree must be what its signed
    manifest lists, byte for byte, and that be signed by this key.  Raises as ``encrypt`` does.
    """
    calls = _Calls(cache, engine, address)
    job = Job(
        "decrypt",
        _source(source),
        _destination(destination),
        reading=calls.reading(keys, max_encrypted_data_keys),
        rules=_rules(
            context, authenticated_context, commitment_policy, max_encrypted_data_keys, require_signed
        ),
        workers=_workers(workers, source, destination),
        overwrite=overwrite,
        resume=resume,
        durable=fsync,
        require_manifest=require_manifest,
        filters=Filters(_several(include), _several(exclude)),
        names=_names(files),
        dry_run=dry_run,
        progress=progress,
        audit=audit,
        signed_by=_signer(signed_by),
    )
    return calls.report(job, run.decrypt)


def verify(
    source: Path,
    *,
    against: Path | None = None,
    keys: References | None = None,
    context: Mapping[str, str] | None = None,
    authenticated_context: Mapping[str, str] | None = None,
    commitment_policy: Policy = _STRICT,
    max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
    require_signed: bool = False,
    require_manifest: bool = True,
    signed_by: Path | None = None,
    workers: int | None = None,
    cache: Cache = None,
    engine: str = "local",
    address: str | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    files: str | Iterable[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    audit: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Read and authenticate everything, write nothing.

    A folder is also held against its manifest: nothing missing, swapped, truncated or added.  With
    ``against``, a plaintext file or folder, every message must equal it byte for byte.  With
    ``signed_by``, the file of a public key, and nothing that needs the messages opened (``keys``,
    ``against``, ``context`` …), no key is used and no KMS called: the tree is held against its signed
    manifest.  Returns only when all holds; raises IntegrityError (or what kept it from looking) otherwise.
    """
    calls = _Calls(cache, engine, address)
    opened = keys is not None or against is not None or context or authenticated_context or require_signed
    job = Job(
        "verify",
        _source(source),
        against=_source(against) if against is not None else None,
        reading=calls.reading(keys, max_encrypted_data_keys),
        rules=_rules(
            context, authenticated_context, commitment_policy, max_encrypted_data_keys, require_signed
        ),
        workers=_workers(workers, source, against),
        require_manifest=require_manifest,
        filters=Filters(_several(include), _several(exclude)),
        names=_names(files),
        progress=progress,
        audit=audit,
        signed_by=_signer(signed_by),
    )
    if signed_by is not None and not opened:
        return calls.report(job._replace(reading=None), _verify_signature)
    return calls.report(job, run.verify)


def rekey(
    source: Path,
    destination: Path,
    *,
    keys: References,
    from_keys: References | None = None,
    context: Mapping[str, str] | None = None,
    authenticated_context: Mapping[str, str] | None = None,
    new_context: Mapping[str, str] | None = None,
    commitment_policy: Policy = _STRICT,
    max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
    require_signed: bool = False,
    require_manifest: bool = False,
    signed_by: Path | None = None,
    sign: bool = False,
    frame_size: int | str = DEFAULT_FRAME_LENGTH,
    key_map: Path | Mapping[str, References] | None = None,
    sign_manifest: str | None = None,
    signing_algorithm: str | None = None,
    workers: int | None = None,
    cache: Cache = None,
    engine: str = "local",
    address: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    files: str | Iterable[str] | None = None,
    dry_run: bool = False,
    fsync: bool = True,
    progress: Callable[[Progress], None] | None = None,
    audit: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Decrypt and encrypt again under new data keys in one pass; no plaintext is written.

    ``from_keys`` opens the old messages (None: found by the ARN in them), ``keys`` wraps the new data
    keys.  ``context`` names pairs that the old messages must hold; the new ones get ``new_context``,
    or those same pairs when it is None.  ``key_map``, ``sign_manifest`` and ``signed_by`` are those of
    ``encrypt`` and ``decrypt``.  Raises as these do.
    """
    calls = _Calls(cache, engine, address)
    job = Job(
        "rekey",
        _source(source),
        _destination(destination),
        reading=calls.reading(from_keys, max_encrypted_data_keys),
        writing=calls.writing(keys, max_encrypted_data_keys),
        resuming=calls.reading(keys, None) if resume else None,
        rules=_rules(
            context, authenticated_context, commitment_policy, max_encrypted_data_keys, require_signed
        ),
        context=_own_context(new_context if new_context is not None else context, None),
        suite=SIGNED if sign else UNSIGNED,
        frame_length=_frame_length(frame_size),
        workers=_workers(workers, source, destination),
        overwrite=overwrite,
        resume=resume,
        durable=fsync,
        require_manifest=require_manifest,
        filters=Filters(_several(include), _several(exclude)),
        names=_names(files),
        dry_run=dry_run,
        progress=progress,
        audit=audit,
        key_map=calls.key_map(key_map, keys, max_encrypted_data_keys),
        signing=calls.signing(sign_manifest, signing_algorithm),
        signed_by=_signer(signed_by),
    )
    return calls.report(job, run.rekey)


def erase(
    key: str,
    *trees: Path,
    keys: References | None = None,
    authenticated_context: Mapping[str, str] | None = None,
    pending_window: int = 30,
    check: bool = False,
    dry_run: bool = False,
    lose_manifest: bool = False,
    allow_unproved: bool = False,
    allow_unused: bool = False,
    workers: int | None = None,
) -> Erasure:
    """Schedule the deletion of a KMS key, and show what becomes unreadable in ``trees`` and that nothing else does.

    ``pending_window``: days (7 to 30) in which it can be taken back (``Erasure.cancel``).  ``keys`` open
    what other keys wrapped (None: found by the ARN).  ``check`` schedules nothing and looks at a key that
    is scheduled or gone already; ``dry_run`` only tells what would become unreadable.  ``lose_manifest``,
    ``allow_unproved`` and ``allow_unused`` go on where it refuses (engine/erasure.py).  Raises KeyAccessError when a
    message does not open that should.
    """
    from streamcrypt.engine import erasure
    from streamcrypt.keys.reference import reach_kms

    if not 7 <= pending_window <= 30:
        raise ValueError(f"a waiting period of {pending_window} days: KMS takes 7 to 30")
    calls, key_id = reach_kms(key)
    with contextlib.ExitStack() as cleanup:
        places = [_source(tree) for tree in trees]
        for place in places:
            if place.is_stream:
                raise ValueError("headers are read from files and folders, not from standard input")
            cleanup.callback(place.tree.close)
        rules = _rules(
            None, authenticated_context, CommitmentPolicy.REQUIRE_ENCRYPT_ALLOW_DECRYPT, None, False
        )
        doomed = erasure.DoomedKey(calls, key_id, key)
        look = erasure.Examination(doomed, decrypting_keyring(keys), rules, places, _workers(workers, *trees))
        return erasure.erase(
            doomed,
            look,
            window=pending_window,
            check=check,
            dry_run=dry_run,
            lose_manifest=lose_manifest,
            allow_unproved=allow_unproved,
            allow_unused=allow_unused,
        )


class Inspection:
    """What a message says of itself.  Nothing of it is authenticated: no key was used.

    Lengths and sizes are in bytes; ``frames`` and ``plaintext_size`` come from the message's length.
    """

    def __init__(
        self,
        *,
        path: str,
        suite: str,
        version: int,
        committing: bool,
        signed: bool,
        message_id: str,
        encryption_context: dict[str, str],
        encrypted_data_keys: list[dict[str, str]],
        content: str,
        frame_length: int,
        frames: int,
        plaintext_size: int,
        header_length: int,
        message_size: int,
    ) -> None:
        self.path = path
        self.suite = suite
        self.version = version
        self.committing = committing
        self.signed = signed
        self.message_id = message_id
        self.encryption_context = encryption_context
        self.encrypted_data_keys = encrypted_data_keys
        self.content = content
        self.frame_length = frame_length
        self.frames = frames
        self.plaintext_size = plaintext_size
        self.header_length = header_length
        self.message_size = message_size
        self.authenticated = False

    def __repr__(self) -> str:
        return f"<Inspection {self.to_json()}>"

    def __getitem__(self, name: str) -> Any:
        return self.to_json()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def inspect(path: Path | IO[bytes]) -> Inspection:
    """What a message says of itself: suite, context, wrapped keys, geometry.  No key is needed.

    FormatError when it is not a message; IntegrityError when its length fits no message.
    """
    with contextlib.closing(_open_source(path)) as source, naming(_name(path)):
        try:
            header = source_header(source, max_encrypted_data_keys=None)
        except FormatError:
            found = _client_object(path)
            if found is None:
                raise
            with contextlib.closing(found):
                return _inspect_client_object(found)
        if header.framed:
            geometry = source_geometry(source, header)
            frames, size = geometry.frames, geometry.plaintext_length
        else:
            frames, size = 0, _unframed_size(source, header.length)
        return Inspection(
            path=_name(path),
            suite=header.suite.name,
            version=header.suite.version,
            committing=header.suite.committing,
            signed=header.suite.signed,
            message_id=header.message_id.hex(),
            encryption_context=dict(header.context),
            encrypted_data_keys=[
                {"provider_id": key.provider_id, "key": describe_wrapped_key(key), "info": key.info.hex()}
                for key in header.encrypted_data_keys
            ],
            content="framed" if header.framed else "unframed",
            frame_length=header.frame_length,
            frames=frames,
            plaintext_size=size,
            header_length=header.length,
            message_size=source.size,
        )


def _inspect_client_object(found: ClientObject) -> Inspection:
    envelope = found.envelope
    return Inspection(
        path=found.path,
        suite=envelope.algorithm,
        version=envelope.version,
        committing=envelope.committing,
        signed=False,
        message_id=envelope.message_id.hex(),
        encryption_context=dict(envelope.context),
        encrypted_data_keys=[{"provider_id": "kms+context", "key": "not named", "info": ""}],
        content="s3-encryption-client",
        frame_length=0,
        frames=0,
        plaintext_size=found.size,
        header_length=0,
        message_size=found.source.size,
    )


@overload
def open(path: Path | IO[bytes], mode: Literal["rb"] = "rb", **options: Any) -> DecryptingFile: ...
@overload
def open(path: Path, mode: Literal["wb", "xb"], **options: Any) -> EncryptingFile: ...
def open(path: Path | IO[bytes], mode: str = "rb", **options: Any) -> DecryptingFile | EncryptingFile:
    """One message as a file object: ``"rb"`` reads plaintext and seeks, ``"wb"`` and ``"xb"`` write a message.

        with sc.open("train.enc/part-0.parquet") as f: table = pq.read_table(f)
        with sc.open("out.bin", "wb", keys="local:alias/ml") as f: f.write(data)

    Reading takes ``keys``, ``context``, ``authenticated_context``, ``commitment_policy``,
    ``max_encrypted_data_keys``, ``require_signed``, ``verify_signature`` (read all of it first and
    check the signature) and ``cache``; it also takes a seekable binary file that holds a message.
    Writing takes ``keys``, ``context``, ``authenticated_context``, ``sign``, ``frame_size``,
    ``cache``, ``max_encrypted_data_keys`` and ``fsync``; the message appears when the file is closed
    cleanly, ``"wb"`` replaces what is there and ``"xb"`` refuses to.
    """
    if mode == "rb":
        return _open_reader(path, **options)
    if mode not in ("wb", "xb"):
        raise ValueError(f"mode {mode!r}: a message is opened with 'rb', 'wb' or 'xb'")
    if not isinstance(path, str | os.PathLike):
        raise TypeError("a message is written to a path")
    return _open_writer(path, overwrite=mode == "wb", **options)


def _open_reader(
    path: Path | IO[bytes],
    *,
    keys: References | None = None,
    context: Mapping[str, str] | None = None,
    authenticated_context: Mapping[str, str] | None = None,
    commitment_policy: Policy = _STRICT,
    max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
    require_signed: bool = False,
    verify_signature: bool = False,
    cache: Cache = None,
) -> DecryptingFile:
    rules = _rules(
        context,
        authenticated_context,
        commitment_policy,
        max_encrypted_data_keys,
        require_signed or verify_signature,
    )
    materials = Materials(
        decrypting_keyring(keys), cache=cache or None, max_encrypted_data_keys=max_encrypted_data_keys
    )
    try:
        file = DecryptingFile(_open_source(path), materials, rules, name=_name(path))
    except FormatError:
        found = _client_object(path)
        if found is None:
            raise
        from streamcrypt.s3client import ClientFile

        with naming(_name(path)):
            file = ClientFile(found, materials, rules, name=_name(path))
    if verify_signature:
        try:
            file.verify_signature()
        except BaseException:
            file.close()
            raise
    return file


def _open_writer(
    path: Path,
    *,
    overwrite: bool,
    keys: References,
    context: Mapping[str, str] | None = None,
    authenticated_context: Mapping[str, str] | None = None,
    sign: bool = False,
    frame_size: int | str = DEFAULT_FRAME_LENGTH,
    max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
    fsync: bool = True,
    cache: Cache = None,
) -> EncryptingFile:
    materials = Materials(
        encrypting_keyring(keys), cache=cache or None, max_encrypted_data_keys=max_encrypted_data_keys
    )
    message = _begin(materials, context, authenticated_context, sign, _frame_length(frame_size), None)
    place = _destination(path)
    if place.is_stream:
        raise DestinationError(
            "standard output is no file to be made; write to it with `streamcrypt encrypt - -`"
        )
    if place.name is None:
        raise DestinationError(f"{_name(path)}: is a folder; name the file to be made")
    target = place.tree.create(place.name, overwrite=overwrite)
    place.tree.close()
    return EncryptingFile(
        target,
        message,
        overwrite=overwrite,
        durable=fsync,
        name=_name(path),
        sync_name=lambda: _sync_root(place),
    )


def _sync_root(place: Place) -> None:
    with contextlib.closing(place.tree):
        place.tree.sync_folder("")


def encrypt_bytes(
    plaintext: bytes | bytearray | memoryview,
    *,
    keys: References,
    context: Mapping[str, str] | None = None,
    authenticated_context: Mapping[str, str] | None = None,
    sign: bool = False,
    frame_size: int | str = DEFAULT_FRAME_LENGTH,
    cache: Cache = None,
    max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
) -> bytes:
    """The message for a plaintext in memory.  Without ``cache`` every message has its own data key."""
    view = octets_of(plaintext)
    materials = Materials(
        encrypting_keyring(keys), cache=cache or None, max_encrypted_data_keys=max_encrypted_data_keys
    )
    return seal_message(
        _begin(materials, context, authenticated_context, sign, _frame_length(frame_size), len(view)), view
    )


def decrypt_bytes(
    message: bytes | bytearray | memoryview,
    *,
    keys: References | None = None,
    context: Mapping[str, str] | None = None,
    authenticated_context: Mapping[str, str] | None = None,
    commitment_policy: Policy = _STRICT,
    max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
    require_signed: bool = False,
    cache: Cache = None,
) -> bytes:
    """The plaintext of a message in memory: all of it, or IntegrityError (FormatError, KeyAccessError …)."""
    materials = Materials(
        decrypting_keyring(keys), cache=cache or None, max_encrypted_data_keys=max_encrypted_data_keys
    )
    rules = _rules(context, authenticated_context, commitment_policy, max_encrypted_data_keys, require_signed)
    whole = message if isinstance(message, bytes) else memoryview(message).cast("B")
    return open_message(whole, materials, rules)


# ---------------------------------------------------------------------------------------------


class _Calls:
    """What one call asks of key services: its cache and its counts."""

    def __init__(self, cache: Cache, engine: str = "local", address: str | None = None) -> None:
        if engine not in ("local", "ray"):
            raise ValueError(f"engine {engine!r}: it is 'local' or 'ray'")
        if address is not None and engine == "local":
            raise ValueError("address: is that of a Ray cluster and goes with engine='ray'")
        self._engine = engine
        self._address = address
        self._reading: References | None = None
        self._writing: References | None = None
        self.cache = DataKeyCache() if cache is None else cache or None
        self.stats = KmsStats()
        self._before = self.cache.stats() if self.cache is not None else None

    def reading(self, keys: References | None, limit: int | None) -> Materials:
        self._reading = keys
        return Materials(
            decrypting_keyring(keys, stats=self.stats), cache=self.cache, max_encrypted_data_keys=limit
        )

    def writing(self, keys: References, limit: int | None) -> Materials:
        self._writing = keys
        return Materials(
            encrypting_keyring(keys, stats=self.stats), cache=self.cache, max_encrypted_data_keys=limit
        )

    def key_map(
        self, key_map: Path | Mapping[str, References] | None, keys: References, limit: int | None
    ) -> KeyMap | None:
        if key_map is None:
            return None
        from streamcrypt.keys.partition import KeyMap, read_key_map

        rules = read_key_map(key_map) if isinstance(key_map, str | os.PathLike) else key_map
        found = KeyMap(rules, keys, stats=self.stats, cache=self.cache, limit=limit)
        self._writing = found.references
        return found

    def signing(self, key: str | None, algorithm: str | None) -> SigningKey | None:
        if key is None:
            if algorithm is not None:
                raise ValueError("signing_algorithm goes with sign_manifest")
            return None
        from streamcrypt.keys.signing import SigningKey

        return SigningKey(key, algorithm, stats=self.stats)

    def report(self, job: Job, work: Callable[[Job], Report]) -> Report:
        """Run the job and complete its report; raises the gravest failure."""
        with contextlib.ExitStack() as watched:
            told = [watched.enter_context(observe(job)) for observe in observers]
            before = processor_seconds()
            try:
                report = self._completed(job, work)
            except StreamcryptError as error:  # before there was anything to report of single files
                report = Report(job.operation, job.workers, dry_run=job.dry_run)
                report.failed.append(Failure(job.source.path, error))
                report.kms = self.stats.to_json()
                error.report = report  # type: ignore[attr-defined]  # as Report.raise_for_failures does
                raise
            report.cpu_seconds, report.peak_memory = processor_seconds() - before, peak_memory()
            for tell in told:
                tell(report)
            report.raise_for_failures()
        return report

    def _completed(self, job: Job, work: Callable[[Job], Report]) -> Report:
        job = _placed(job)
        if job.key_map is not None and job.resume:  # what was begun under an older map may be replaced
            keyring = decrypting_keyring(job.key_map.references, stats=self.stats)
            job = job._replace(resuming=Materials(keyring, cache=self.cache, max_encrypted_data_keys=None))
        if job.signing is not None and not job.dry_run:
            job.signing.prepare()
        opens = job.reading is not None or job.writing is not None
        to_a_stream = job.destination is not None and job.destination.is_stream
        if self._engine == "ray" and (job.source.is_stream or to_a_stream):
            raise ValueError("a stream goes through one process; leave out engine ray for it")
        if self._engine == "ray" and opens and not job.dry_run:
            from streamcrypt.engine.remote import Cluster  # start-up: only a cluster needs it

            work = Cluster(self._address, self._reading, self._writing, self.stats, self.cache).run
        client_object = None
        if job.reading is not None and job.source.name is not None:
            client_object = _client_object(job.source.path)
        if job.source.is_stream or to_a_stream or client_object is not None:
            from streamcrypt.engine import pipes

            report = pipes.run(job, client_object)
        else:
            try:
                found = None
                if job.resume and not job.dry_run:
                    from streamcrypt.engine import complete  # few jobs go on

                    found = complete.completed(job)
                    if job.source.name is not None:  # nothing of a single file is there to go on with
                        job = job._replace(resume=False)
                report = found or work(job)
            except OSError as error:
                # Reads and writes are translated where they are made.  What is left are calls that all
                # but never fail, such as a close; whatever was not published by then never will be.
                path = error.filename or job.source.path
                raise StreamcryptError(f"{path}: the job was broken off: {error.strerror}") from error
        report.kms = self.stats.to_json()
        if self.cache is not None and self._before is not None:
            report.cache = _difference(self.cache.stats(), self._before)
            report.advice = list(self.cache.advice())
        if job.key_map is not None:
            report.keys = job.key_map.to_json()
        if job.writing is None and opens:  # data keys that were unwrapped
            report.data_keys = report.cache["misses"] if report.cache else report.files
        return report


def _difference(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _difference(value, before[name]) if isinstance(value, dict) else value - before[name]
        for name, value in now.items()
    }


def _signer(signed_by: Path | None) -> PublicKey | None:
    if signed_by is None:
        return None
    from pathlib import Path as FilePath

    from streamcrypt.keys.signing import read_public_key_file

    return read_public_key_file(FilePath(signed_by))


def _verify_signature(job: Job) -> Report:
    from streamcrypt.engine import signature  # few jobs verify one

    return signature.verify(job)


def _begin(
    materials: Materials,
    context: Mapping[str, str] | None,
    authenticated_context: Mapping[str, str] | None,
    sign: bool,
    frame_length: int,
    plaintext_length: int | None,
) -> OutgoingMessage:
    full = _full_context(context, authenticated_context)
    found = materials.for_encryption(SIGNED if sign else UNSIGNED, full, plaintext_length)
    template = header_template(found, frame_length, authenticated_context)
    return OutgoingMessage.begin(found, template, frame_length)


def _rules(
    context: Mapping[str, str] | None,
    authenticated_context: Mapping[str, str] | None,
    commitment_policy: Policy,
    max_encrypted_data_keys: int | None,
    require_signed: bool,
) -> ReadingRules:
    return ReadingRules(
        CommitmentPolicy(commitment_policy),
        max_encrypted_data_keys,
        dict(context or {}),
        dict(authenticated_context or {}),
        require_signed,
    )


def _own_context(
    context: Mapping[str, str] | None, authenticated_context: Mapping[str, str] | None
) -> dict[str, str]:
    """The caller's context, refused before any file or key is touched when it cannot be written."""
    check_caller_context(_full_context(context, authenticated_context))
    return dict(context or {})


def _full_context(
    context: Mapping[str, str] | None, authenticated_context: Mapping[str, str] | None
) -> dict[str, str]:
    stored, unstored = dict(context or {}), dict(authenticated_context or {})
    for name in stored.keys() & unstored.keys():
        raise ValueError(
            f"encryption context name {name!r} is both stored and authenticated only; a pair is one"
        )
    return stored | unstored


def _several(names: str | Iterable[str]) -> tuple[str, ...]:
    """One name, or several: a word must not be taken for its letters, of which one may be a ``*``."""
    return (names,) if isinstance(names, str) else tuple(names)


def _names(files: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Names within a folder, also as ``find .`` prints them."""
    return None if files is None else tuple(name.removeprefix("./") for name in _several(files))


def _frame_length(frame_size: int | str) -> int:
    length = parse_size(frame_size)
    if not 1 <= length <= MAX_WRITTEN_FRAME_LENGTH:
        raise ValueError(f"frame size {frame_size}: it must be 1 to {MAX_WRITTEN_FRAME_LENGTH} bytes")
    return length


def _workers(workers: int | None, *places: Path | None) -> int:
    if workers is None:
        cores = default_workers()
        on_a_store = any(place is not None and is_store_url(os.fspath(place)) for place in places)
        return max(cores, STORE_WORKERS) if on_a_store else cores
    if workers < 1:
        raise ValueError(f"{workers} workers: it must be at least 1")
    return workers


def _name(path: Path | IO[bytes]) -> str:
    return os.fspath(path) if isinstance(path, str | os.PathLike) else str(getattr(path, "name", ""))


# -- places


def _in_store(url: str) -> tuple[StoreTree, Place]:
    """What a URL names: as a folder, and as an object of the folder above it, unless it ends in '/'."""
    from streamcrypt.stores import StoreTree, split_url  # start-up: only who has a URL needs it

    folder = StoreTree(url)
    if not split_url(url)[2] or url.endswith("/"):
        return folder, Place(folder)
    return folder, Place(*folder.above())


def _source(path: Path) -> Place:
    """Where a path points to; SourceError when there is nothing."""
    text = os.fspath(path)
    if text == "-":
        return Place(LocalTree(""), "-", is_stream=True)
    if is_store_url(text):
        folder, place = _in_store(text)
        if place.name is not None and place.tree.exists(place.name):
            return place
        if folder.is_empty():
            raise SourceError(f"{text}: does not exist")
        return Place(folder)
    full = os.path.realpath(text)  # a link that the user names is followed; links within a folder are not
    if os.path.isdir(full):
        return Place(LocalTree(full))
    if not os.path.lexists(full):
        if os.path.exists(text):  # /dev/stdin, /dev/fd/63: what is behind it has no name
            raise SourceError(f"{text}: is a pipe, not a file; a pipe is read as standard input, written -")
        raise SourceError(f"{text}: does not exist")
    return Place(LocalTree(os.path.dirname(full)), os.path.basename(full))


def entries(path: Path) -> Iterator[Entry]:
    """What a job would find at ``path``, by names and sizes; SourceError when there is nothing."""
    place = _source(path)
    return iter((place.tree.entry(place.name),)) if place.name is not None else place.tree.walk()


def _destination(path: Path) -> Place:
    """The name of something that is to be made, in its folder."""
    text = os.fspath(path)
    if text == "-":
        return Place(LocalTree(""), "-", is_stream=True)
    if is_store_url(text):
        folder, place = _in_store(text)
        return place if place.name is None or folder.is_empty() else Place(folder)
    full = os.path.abspath(text)
    if os.path.isdir(full) or text.endswith("/"):
        return Place(_tree_to_write(full))
    with contextlib.suppress(OSError):
        mode = os.lstat(full).st_mode
        if stat.S_ISLNK(mode):
            if os.readlink(full).startswith("/proc/"):  # /dev/stdout
                raise DestinationError(
                    f"{full}: is an open file of this process; standard output is written -"
                )
            mode = os.stat(full).st_mode
        if not stat.S_ISREG(mode):  # /dev/null, say, is not to be replaced
            raise DestinationError(f"{full}: {kind_problem(mode)}")
    return Place(_tree_to_write(os.path.dirname(full)), os.path.basename(full))


def _tree_to_write(folder: str) -> LocalTree:
    root = os.path.realpath(folder)
    return LocalTree(root, missing_folders(root))


def _placed(job: Job) -> Job:
    """The job with its places made to fit each other; DestinationError or SourceError when they cannot."""
    source, destination, against = job.source, job.destination, job.against
    whole_tree = source.name is None
    for asked, what in (
        (job.key_map, "a key map gives keys to the files of a folder"),
        (job.signing, "a signed manifest is that of a folder"),
        (job.signed_by, "a signed manifest is that of a folder"),
    ):
        if asked is not None and not whole_tree:
            raise ValueError(f"{source.path}: {what}, and this is none")
    if against is not None and against.is_stream:
        raise ValueError("what a message is compared with is a file or a folder, not standard input")
    if against is not None and (against.name is None) != whole_tree:
        raise SourceError(f"{against.path}: a file is compared with a file, a folder with a folder")
    if destination is None or destination.is_stream:
        if destination is not None and whole_tree:
            raise DestinationError(f"{source.path}: a folder does not fit standard output; name a folder")
        return job
    if not whole_tree:
        if destination.name is None:
            raise DestinationError(f"{destination.path}: is a folder; name the file to be made")
        if not source.is_stream and source.path in (destination.path, os.path.realpath(destination.path)):
            raise DestinationError(f"{destination.path}: is the source itself")
        # Before any key is asked for; and there are stores that pass over the condition of a PUT.
        if not (job.overwrite or job.resume) and destination.tree.exists(destination.name):
            raise DestinationError(f"{destination.path}: exists already; overwrite must be asked for")
        return job
    if destination.name is not None:
        if destination.tree.exists(destination.name):
            raise DestinationError(f"{destination.path}: is not a folder, and the source is one")
        above, destination = destination.tree, Place(destination.tree.subtree(destination.name))
        above.close()
    elif not (job.overwrite or job.resume) and not destination.tree.is_empty():
        interrupted = is_interrupted(destination.tree)
        reason = "holds an interrupted job; resume goes on with it" if interrupted else "is not empty"
        raise DestinationError(
            f"{destination.path}: exists already and {reason}; overwrite must be asked for"
        )
    inner, outer = destination.path + "/", source.path + "/"
    if inner.startswith(outer) or outer.startswith(inner):
        raise DestinationError(f"{destination.path}: lies within the source, or the source in it")
    return job._replace(destination=destination)


def _open_source(path: Path | IO[bytes]) -> Source:
    if not isinstance(path, str | os.PathLike):
        return FileObjectSource(path)
    # An object is opened without looking first what is there: that would be another request.
    place = _in_store(os.fspath(path))[1] if is_store_url(os.fspath(path)) else _source(path)
    if place.name is None:
        raise SourceError(f"{_name(path)}: is a folder, not a file")
    if place.is_stream:
        raise SourceError("standard input does not seek; decrypt it with `streamcrypt decrypt - -`")
    try:
        return place.tree.open(place.name)
    finally:
        place.tree.close()


def _client_object(path: Path | IO[bytes]) -> ClientObject | None:
    """What the Amazon S3 Encryption Client wrote, where that is no message; None for everything else."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith("s3://"):
        return None
    from streamcrypt.s3client import find  # start-up: only who has a URL needs it

    place = _in_store(os.fspath(path))[1]
    return find(cast("StoreTree", place.tree), place.name) if place.name is not None else None


def _unframed_size(source: Source, header_length: int) -> int:
    start = read_bytes(source, header_length, UNFRAMED_PREFIX)
    if len(start) < UNFRAMED_PREFIX:
        raise IntegrityError("the body is cut short: the message is truncated")
    return unframed_length(start)
