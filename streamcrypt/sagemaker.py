"""SageMaker: encrypted channels into a training container, encrypted artefacts out of it, and its requests.

    channels                what a training job was given: each channel with its mode
      Channel.open          File and FastFile mode: one message of the folder, held against its manifest
      Channel.messages      Pipe mode: the messages of one epoch, in order, held against the manifest
    encrypt_model           the artefact: a folder encrypted into the model directory
    load_weights            at the endpoint: encrypted weights straight to memory
    secure_training_job     a CreateTrainingJob request with its encryption settings filled in
    check_training_job      what such a request lacks

    /opt/ml/input/config/inputdataconfig.json   {"train": {"TrainingInputMode": "File", …}}
    /opt/ml/input/data/train/                   File and FastFile mode (both say "File")
    /opt/ml/input/data/train_0, train_1 …       Pipe mode: a FIFO for each epoch
    /opt/ml/model/                              becomes model.tar.gz; whatever lies there is uploaded

SageMaker's own encryption (volumes, S3) ends where its service holds the key for you: inside the
container, in the bucket of whoever may read it.  Messages stay sealed until this process opens them,
so nothing in the clear may lie in the model directory: ``check_model_dir`` refuses it.

Sources: Amazon SageMaker AI Developer Guide, "How Amazon SageMaker AI Provides Training Information",
"… Processes Training Output", "Run Training and Inference Containers in Internet-Free Mode",
"Protect Data at Rest Using Encryption"; SageMaker API Reference, CreateTrainingJob; SageMaker Training
Toolkit, ENVIRONMENT_VARIABLES.md; dmlc-core, src/recordio.cc.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from streamcrypt import api
from streamcrypt.engine.job import Report
from streamcrypt.engine.manifest import MANIFEST_START, Listed, read_manifest
from streamcrypt.errors import (
    DestinationError,
    FormatError,
    IntegrityError,
    SourceError,
    StreamcryptError,
)
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.kms import KeyArn
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.reference import References, decrypting_keyring
from streamcrypt.message.header import DEFAULT_MAX_ENCRYPTED_DATA_KEYS, Header
from streamcrypt.message.suites import CommitmentPolicy
from streamcrypt.storage import RESERVED_FOLDER, is_ours
from streamcrypt.streams import ReadingRules, located, open_messages

ROOT: Final = "/opt/ml"
_WAIT_STEP: Final = 0.1  # seconds between two looks for a FIFO that SageMaker has not made yet

_MAGIC: Final = 0xCED7230A
_RECORD = struct.Struct("<II")


# --- channels -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Channel:
    """A named input of a training job.

    ``mode`` is ``"File"`` (FastFile too: SageMaker tells the container so) or ``"Pipe"``.  ``path`` is
    the folder of the channel; in Pipe mode the FIFOs are called ``path`` with ``_0``, ``_1`` … behind.
    ``sharded``: SageMaker gave each host its own part of the objects (ShardedByS3Key).  ``recordio``:
    it wraps each object of the pipe in a RecordIO record.
    """

    name: str
    path: Path
    mode: Literal["File", "Pipe"] = "File"
    sharded: bool = False
    recordio: bool = False

    def names(self) -> list[str]:
        """The messages of the folder, relative to it and in order; our own objects are left out."""
        self._expect("File", "a pipe has no names: read its messages")
        found = (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file())
        return sorted(name for name in found if not is_ours(name))

    def open(self, name: str, **options: Any) -> Any:
        """One message of the folder as a file that reads and seeks: plaintext, each frame authenticated.

            with channels()["train"].open("part-0.parquet") as f: table = pq.read_table(f)

        Where the folder has a manifest, the file must be the message that it lists under this name.
        Options are those of ``CryptFileSystem`` (``keys``, ``context``, ``require_manifest`` …).
        """
        from streamcrypt.fs import crypt_filesystem

        self._expect("File", "a pipe does not seek: read its messages")
        filesystem, _ = crypt_filesystem(None, **options)
        return filesystem.open(str(self.path / name))

    def messages(
        self,
        epoch: int = 0,
        *,
        keys: References | None = None,
        context: Mapping[str, str] | None = None,
        require_manifest: bool = False,
        require_signed: bool = False,
        max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
        cache: DataKeyCache | None = None,
        timeout: float = 120.0,
    ) -> Iterator[PipedMessage]:
        """The messages of one epoch of a pipe, each a file that is read in order.

            for message in channels()["train"].messages(epoch): batch = np.load(io.BytesIO(message.read()))

        A message is closed when the next is asked for; what was not read of it has been authenticated
        nevertheless.  SageMaker streams the objects of a prefix one after another, the manifest of an
        encrypted tree among them.  It is not given out: at the end of the epoch the messages that came
        must be those that it lists, or IntegrityError says that some are missing, doubled or added.
        A host of a ``sharded`` channel sees only its part: there additions are found, and what is missing is
        not.  Without a manifest a pipe that ends between two messages looks whole; ``require_manifest``
        refuses that.

        ``timeout``: seconds to wait until SageMaker has made the FIFO of this epoch.  Read the epochs in
        their order, each to its end or closed early.
        """
        self._expect("Pipe", "it is a folder: open its messages by name")
        rules = ReadingRules(
            CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT,
            max_encrypted_data_keys,
            dict(context or {}),
            {},
            require_signed,
        )
        materials = Materials(
            decrypting_keyring(keys),
            cache=cache if cache is not None else DataKeyCache(max_age=86_400.0),
            max_encrypted_data_keys=max_encrypted_data_keys,
        )
        fifo = self.path.with_name(f"{self.path.name}_{epoch}")
        with _open_fifo(fifo, timeout) as pipe:
            readinto: Callable[[memoryview], int] = pipe.readinto
            if self.recordio:
                readinto = _Records(pipe).readinto
            yield from _piped(readinto, materials, rules, fifo, require_manifest, self.sharded)

    def _expect(self, mode: str, why: str) -> None:
        if self.mode != mode:
            raise ValueError(f"channel {self.name} is in {self.mode} mode; {why}")


def channels(root: str | os.PathLike[str] = ROOT) -> dict[str, Channel]:
    """The channels of this training job by name.

    Read from ``inputdataconfig.json`` under ``SM_INPUT_CONFIG_DIR`` or ``root``; the folders from
    ``SM_CHANNEL_NAME`` where the SageMaker Training Toolkit has set them.  SourceError outside a
    training container.
    """
    folder = Path(os.environ.get("SM_INPUT_CONFIG_DIR") or Path(root, "input", "config"))
    path = folder / "inputdataconfig.json"
    try:
        configured = json.loads(path.read_bytes())
        entries = {str(name): dict(entry) for name, entry in configured.items()}
    except OSError as error:
        raise SourceError(
            f"{path}: {error.strerror}; it is there in a SageMaker training container"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: is not the input data configuration of SageMaker") from error
    data = Path(os.environ.get("SM_INPUT_DIR") or Path(root, "input")) / "data"
    return {
        name: Channel(
            name,
            Path(os.environ.get(f"SM_CHANNEL_{name.upper()}") or data / name),
            "Pipe" if entry.get("TrainingInputMode") == "Pipe" else "File",
            sharded=entry.get("S3DistributionType") == "ShardedByS3Key",
            recordio=entry.get("RecordWrapperType") == "RecordIO",
        )
        for name, entry in entries.items()
    }


class PipedMessage(io.BufferedReader):
    """One message of a pipe: its plaintext, read in order.

    ``message_id`` is hexadecimal, ``context`` the encryption context.  Frames are given out as they
    are authenticated; the last of a signed message when its signature holds.
    """

    def __init__(self, header: Header, chunks: Iterator[memoryview], name: str) -> None:
        super().__init__(_Chunks(chunks, name))
        self.message_id = header.message_id.hex()
        self.context = dict(header.context)

    def __repr__(self) -> str:
        return f"<PipedMessage {self.message_id}>"


class _Chunks(io.RawIOBase):
    """An iterator of chunks as a file; a chunk's memory may be used again for the next one."""

    def __init__(self, chunks: Iterator[memoryview], name: str) -> None:
        self._chunks = chunks
        self._name = name
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not len(self._rest):
            try:
                chunk = next(self._chunks, None)
            except StreamcryptError as error:
                raise located(error, self._name) from error.__cause__
            if chunk is None:
                return 0
            self._rest = chunk
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _piped(
    readinto: Callable[[memoryview], int],
    materials: Materials,
    rules: ReadingRules,
    fifo: Path,
    require_manifest: bool,
    sharded: bool,
) -> Iterator[PipedMessage]:
    seen: dict[str, str] = {}
    listed: dict[str, Listed] | None = None
    for header, chunks in _opened(open_messages(readinto, materials, rules), str(fifo)):
        message = PipedMessage(header, chunks, str(fifo))
        if message.peek(len(MANIFEST_START)).startswith(MANIFEST_START):
            files = (line for line in read_manifest(message) if not line.folder and line.failed is None)
            listed = {**(listed or {}), **{line.message_id: line for line in files}}
            continue
        if message.message_id in seen:
            raise IntegrityError(f"{fifo}: message {message.message_id} came twice")
        seen[message.message_id] = header.tag.hex()
        with message:
            yield message
    if listed is None:
        # A shard may lack the manifest, which lies on another host.
        if require_manifest:
            raise IntegrityError(f"{fifo}: no manifest came, and one is required")
        return
    for message_id, tag in seen.items():
        entry = listed.get(message_id)
        if entry is None or entry.header_tag != tag:
            raise IntegrityError(
                f"{fifo}: message {message_id} came, and the manifest does not list it: added"
            )
    missing = [entry.name for message_id, entry in listed.items() if message_id not in seen]
    if missing and not sharded:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise IntegrityError(f"{fifo}: {missing[0]}{more} did not come, and the manifest lists it")


def _opened(
    messages: Iterator[tuple[Header, Iterator[memoryview]]], name: str
) -> Iterator[tuple[Header, Iterator[memoryview]]]:
    try:
        yield from messages
    except StreamcryptError as error:
        raise located(error, name) from error.__cause__


def _open_fifo(path: Path, timeout: float) -> io.FileIO:
    """Open a FIFO for reading as soon as it is there."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            if not stat.S_ISFIFO(path.stat().st_mode):
                raise SourceError(f"{path}: is no FIFO; is the channel in Pipe mode?")
            return io.FileIO(path)
        except FileNotFoundError:
            if time.monotonic() >= deadline:
                raise SourceError(
                    f"{path}: SageMaker did not make this pipe within {timeout:g} s; read epochs in their order, "
                    "each to its end or closed"
                ) from None
            time.sleep(_WAIT_STEP)


class _Records:
    """What RecordIO records hold, one after the other.

        magic CE D7 23 0A as u32 LE | flag 3 bits, length 29 bits as u32 LE | data | zeros up to 4 bytes

    A record that holds the magic number at a multiple of four is written in parts (flag 1 first, 2
    middle, 3 last), with the number left out between them.
    """

    def __init__(self, pipe: io.FileIO) -> None:
        self._pipe = io.BufferedReader(pipe, 2**20)
        self._left = 0
        self._padding = 0
        self._inserted = b""
        self._within = False

    def readinto(self, view: memoryview) -> int:
        while not self._left and not self._inserted:
            if not self._next():
                return 0
        if self._inserted:
            count = min(len(view), len(self._inserted))
            view[:count] = self._inserted[:count]
            self._inserted = self._inserted[count:]
            return count
        count = self._pipe.readinto(view[: self._left])
        if not count:
            raise IntegrityError("the pipe ends within a RecordIO record: it was truncated")
        self._left -= count
        return count

    def _next(self) -> bool:
        """Go to the data of the next part; False at the end of the pipe."""
        if len(self._pipe.read(self._padding)) != self._padding:
            raise IntegrityError("the pipe ends within a RecordIO record: it was truncated")
        head = self._pipe.read(_RECORD.size)
        if not head and not self._within:
            return False
        if len(head) != _RECORD.size:
            raise IntegrityError("the pipe ends within a RecordIO record: it was truncated")
        magic, word = _RECORD.unpack(head)
        flag, length = word >> 29, word & (2**29 - 1)
        if magic != _MAGIC or flag > 3 or (flag in (2, 3)) != self._within:
            raise FormatError("the pipe does not hold RecordIO records", recognised=False)
        self._inserted = _RECORD.pack(_MAGIC, 0)[:4] if self._within else b""
        self._within = flag in (1, 2)
        self._left, self._padding = length, -length % 4
        return True


# --- artefacts ------------------------------------------------------------------------------------


def model_dir(root: str | os.PathLike[str] = ROOT) -> Path:
    """``SM_MODEL_DIR``, or ``/opt/ml/model``: what lies there when training ends is uploaded."""
    return Path(os.environ.get("SM_MODEL_DIR") or Path(root, "model"))


def encrypt_model(
    source: str | os.PathLike[str],
    *,
    keys: References,
    context: Mapping[str, str] | None = None,
    root: str | os.PathLike[str] = ROOT,
    **options: Any,
) -> Report:
    """Encrypt the folder ``source`` into the model directory, and make sure that nothing else lies there.

        sagemaker.encrypt_model("/dev/shm/model", keys=KEY_ARN, context={"Model": "churn"})

    ``source`` should be in memory (``/dev/shm``): what a framework saves there is plaintext.  Options
    are those of ``sc.encrypt``.  Weights are better written straight to the model directory, by
    ``tensors.save_file(…, model_dir() / "model.safetensors", keys=…)``.
    """
    folder = model_dir(root)
    report = api.encrypt(source, folder, keys=keys, context=context, **options)
    check_model_dir(folder)
    return report


def check_model_dir(folder: str | os.PathLike[str] | None = None) -> None:
    """DestinationError when a file of the model directory is not a message: it would leave in the clear."""
    folder = Path(folder) if folder is not None else model_dir()
    plain = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != RESERVED_FOLDER and not _is_message(path)
    ]
    if plain:
        more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
        raise DestinationError(
            f"{plain[0]}{more}: not encrypted, and SageMaker uploads what lies in the model directory; "
            "write it elsewhere, or encrypt it"
        )


def _is_message(path: Path) -> bool:
    try:
        api.inspect(path)
    except IntegrityError:
        return False
    return True


def load_weights(
    folder: str | os.PathLike[str] | None = None,
    *,
    device: Any = "cpu",
    keys: References | None = None,
    context: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The weights of the model directory, decrypted straight to memory: for ``model_fn(model_dir)``.

        def model_fn(model_dir):
            model = Net()
            model.load_state_dict(sagemaker.load_weights(model_dir, context={"Model": "churn"}))
            return model

    Takes the one ``*.safetensors`` file of the folder, or its ``*.safetensors.index.json``.  Options are
    those of ``tensors.load_file``.  IntegrityError when anything does not authenticate: then there are
    no weights at all.
    """
    from streamcrypt import tensors

    folder = Path(folder) if folder is not None else model_dir()
    found = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise SourceError(f"{folder}: holds {len(found)} sets of weights (*.safetensors); one is needed")
    return tensors.load_file(found[0], device, keys=keys, context=context, **options)


# --- requests -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a request: where, how bad, and what mends it.

    ``failed``: data would lie or travel unprotected, or SageMaker would refuse the request, or the job
    could not decrypt.  ``warning``: it depends on something that the request does not say.
    """

    field: str
    status: Literal["failed", "warning"]
    found: str
    mend: str


# Instances whose storage is NVMe on the machine: sealed by hardware, and a request that names a key for
# it is refused.  Source: SageMaker API Reference, ResourceConfig (VolumeKmsKeyId, VolumeSizeInGB); EC2
# User Guide, "Instance store volumes".
_LOCAL_STORAGE: Final = frozenset(
    {
        "g4dn",
        "g5",
        "g6",
        "g6e",
        "p3dn",
        "p4d",
        "p4de",
        "p5",
        "p5e",
        "p5en",
        "p6-b200",
        "r5d",
        "trn1",
        "trn1n",
        "trn2",
    }
)
_EBS_ONLY: Final = re.compile(r"(?:[cmrt]\d+(?!\w*d)\w*|p2|p3)(?:-flex)?")


def secure_training_job(
    request: Mapping[str, Any], *, key: str, volume_key: str | None = None
) -> dict[str, Any]:
    """A CreateTrainingJob request with what encryption needs filled in: for ``create_training_job(**…)``.

        request = sagemaker.secure_training_job(request, key="arn:aws:kms:eu-west-1:111122223333:key/…")
        boto3.client("sagemaker").create_training_job(**request)

    ``key`` (an ARN) becomes ``OutputDataConfig.KmsKeyId`` and, unless ``volume_key`` names another,
    ``ResourceConfig.VolumeKmsKeyId``; traffic between containers is encrypted.  What the request says
    already stays.  ValueError when it does not fit boto3's model of the service, or when
    ``check_training_job`` finds a failure that filling in cannot mend.
    """
    for name in (key, volume_key):
        if name is not None and KeyArn.parse(name).kind != "key":
            raise ValueError(f"{name}: SageMaker needs the ARN of a key, not of an alias")
    made = copy.deepcopy(dict(request))
    made.setdefault("EnableInterContainerTrafficEncryption", True)
    _fill(made, "OutputDataConfig", "KmsKeyId", key)
    if "ResourceConfig" in made and not any(_has_local_storage(kind) for kind, _ in _instances(made)):
        _fill(made, "ResourceConfig", "VolumeKmsKeyId", volume_key or key)
    failed = [finding for finding in check_training_job(made) if finding.status == "failed"]
    if failed:
        raise ValueError("; ".join(f"{finding.field}: {finding.found}; {finding.mend}" for finding in failed))
    return made


def _fill(request: dict[str, Any], part: str, member: str, value: str) -> None:
    if isinstance(request.get(part), dict):
        request[part].setdefault(member, value)


def check_training_job(request: Mapping[str, Any]) -> list[Finding]:
    """What a CreateTrainingJob request lacks so that data stay encrypted, and that the job can decrypt.

    The gravest first.  A request that does not fit boto3's model of the service gives just that.
    """
    invalid = _invalid(request)
    if invalid:
        return [Finding("request", "failed", text, "see the SageMaker API Reference") for text in invalid]
    found = [
        *_check_storage(request),
        *_check_network(request),
        *_check_channels(request),
        *_check_extras(request),
    ]
    return sorted(found, key=lambda finding: finding.status)


def _invalid(request: Mapping[str, Any]) -> list[str]:
    from botocore.validate import ParamValidator

    report = ParamValidator().validate(dict(request), _request_shape())
    return report.generate_report().splitlines() if report.has_errors() else []


@cache
def _request_shape() -> Any:
    """boto3's own model of the request."""
    import botocore.session

    model = botocore.session.get_session().get_service_model("sagemaker")
    return model.operation_model("CreateTrainingJob").input_shape


def _instances(request: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Instance types with how many there are of each."""
    resources = request.get("ResourceConfig", {})
    parts = resources.get("InstanceGroups") or [resources]
    return [(part["InstanceType"], part.get("InstanceCount", 1)) for part in parts if "InstanceType" in part]


def _family(instance: str) -> str:
    return instance.removeprefix("ml.").partition(".")[0]


def _has_local_storage(instance: str) -> bool:
    return _family(instance) in _LOCAL_STORAGE


def _check_storage(request: Mapping[str, Any]) -> Iterator[Finding]:
    output = request["OutputDataConfig"]
    if not output.get("KmsKeyId"):
        yield Finding(
            "OutputDataConfig.KmsKeyId", "failed", "missing: S3 seals the artefact under the account's default key",
            "name the ARN of your key",
        )  # fmt: skip
    elif not output["KmsKeyId"].startswith("arn:"):
        yield Finding(
            "OutputDataConfig.KmsKeyId", "warning", "a key ID or alias: the execution role then needs kms:Encrypt too",
            "name the key by its ARN",
        )  # fmt: skip
    if output.get("S3OutputPath", "").partition("://")[2].partition("/")[0].endswith("--x-s3"):
        yield Finding(
            "OutputDataConfig.S3OutputPath", "warning", "a directory bucket: SageMaker cannot use a KMS key there",
            "choose a general purpose bucket",
        )  # fmt: skip
    volume_key = request.get("ResourceConfig", {}).get("VolumeKmsKeyId")
    for instance, _ in _instances(request):
        if _has_local_storage(instance):
            if volume_key:
                yield Finding(
                    "ResourceConfig.VolumeKmsKeyId", "failed",
                    f"{instance} has local storage, which its hardware seals: SageMaker refuses a key for it",
                    "leave the key out",
                )  # fmt: skip
        elif not volume_key and _EBS_ONLY.fullmatch(_family(instance)):
            yield Finding(
                "ResourceConfig.VolumeKmsKeyId", "failed",
                f"missing: the volume of {instance} is sealed under a key that SageMaker makes and you do not control",
                "name the ARN of your key",
            )  # fmt: skip
        elif not volume_key:
            yield Finding(
                "ResourceConfig.VolumeKmsKeyId", "warning",
                f"missing, and not known here: whether {instance} has local storage",
                "name your key unless the instance has local storage",
            )  # fmt: skip


def _check_network(request: Mapping[str, Any]) -> Iterator[Finding]:
    hosts = sum(count for _, count in _instances(request))
    if hosts > 1 and not request.get("EnableInterContainerTrafficEncryption"):
        yield Finding(
            "EnableInterContainerTrafficEncryption", "failed",
            f"{hosts} instances exchange gradients and weights in the clear", "set it to true",
        )  # fmt: skip
    if request.get("EnableNetworkIsolation"):
        yield Finding(
            "EnableNetworkIsolation", "failed",
            "the container gets no network and no AWS credentials, so it cannot ask KMS to unwrap a data key",
            "leave it out; a VpcConfig whose subnets reach nothing but the endpoints of KMS and S3 isolates as well",
        )  # fmt: skip
    elif "VpcConfig" not in request:
        yield Finding(
            "VpcConfig", "warning", "missing: the container reaches KMS, and anything else, through the internet",
            "name subnets with interface endpoints for KMS and S3",
        )  # fmt: skip


def _check_channels(request: Mapping[str, Any]) -> Iterator[Finding]:
    default = request.get("AlgorithmSpecification", {}).get("TrainingInputMode", "File")
    for number, channel in enumerate(request.get("InputDataConfig", ())):
        where = f"InputDataConfig[{number}]"
        mode = channel.get("InputMode", default)
        source = channel.get("DataSource", {}).get("S3DataSource", {})
        if channel.get("CompressionType", "None") != "None":
            yield Finding(
                f"{where}.CompressionType", "failed", "a message is not gzip: SageMaker could not unpack it",
                "leave it out; compress before you encrypt",
            )  # fmt: skip
        if mode == "FastFile" and source.get("S3DataType", "S3Prefix") != "S3Prefix":
            yield Finding(
                f"{where}.S3DataType", "failed", "FastFile mode takes a prefix", "set it to S3Prefix"
            )
        if mode == "FastFile" and not source.get("S3Uri", "/").endswith("/"):
            yield Finding(
                f"{where}.S3Uri", "warning", "FastFile mode: without / at its end a prefix may be ambiguous",
                "end it with /",
            )  # fmt: skip
        if source.get("S3DataDistributionType") == "ShardedByS3Key":
            yield Finding(
                f"{where}.S3DataDistributionType", "warning",
                "each host gets a part: no host can see that the dataset is whole",
                "use FullyReplicated, or run `streamcrypt verify` on the dataset before the job",
            )  # fmt: skip


def _check_extras(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Ways out of the container for which there is no key setting."""
    ways: Sequence[tuple[str, str, str]] = (
        ("CheckpointConfig", "checkpoints are uploaded as they lie", "write them as messages (docs/loaders.md)"),
        ("DebugHookConfig", "Debugger uploads tensors in the clear", "leave it out, or give the bucket a default key"),
        ("TensorBoardOutputConfig", "summaries are uploaded as they lie", "give the bucket a default key"),
    )  # fmt: skip
    for field, found, mend in ways:
        if request.get(field):
            yield Finding(field, "warning", f"{found}; the request has no key for them", mend)
