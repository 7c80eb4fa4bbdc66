"""SageMaker's channels as its container sees them, its artefacts, and its requests against boto3's own model."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families.datasets import KEY, flip, kms_calls, make_key

import streamcrypt as sc
from streamcrypt import sagemaker
from streamcrypt.sagemaker import Channel

pytest.importorskip("fsspec", reason="FSSPEC IS MISSING: SageMaker's channels were not tested")

FRAME = 4096
SIZES = {"a": 0, "b/one": 1, "b/two": FRAME, "c": 3 * FRAME + 7, "z": 100_000}
CONTEXT = {"Dataset": "churn"}


def plaintext(name: str) -> bytes:
    return bytes(ord(name[-1]) ^ (i % 251) for i in range(SIZES[name]))


@pytest.fixture
def tree(tmp_path: Path, home: Path) -> Path:
    make_key()
    for name in SIZES:
        path = tmp_path / "plain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plaintext(name))
    sc.encrypt(tmp_path / "plain", tmp_path / "train.enc", keys=KEY, context=CONTEXT, frame_size=FRAME)
    return tmp_path / "train.enc"


def objects(tree: Path) -> list[bytes]:
    """The objects of the prefix in the order in which S3 lists them, the manifest among them."""
    paths = [path for path in tree.rglob("*") if path.is_file()]
    return [
        path.read_bytes()
        for path in sorted(paths, key=lambda path: path.relative_to(tree).as_posix().encode())
    ]


def record(data: bytes) -> bytes:
    """One RecordIO record as dmlc-core writes it: cut where the magic number stands at a multiple of four."""
    magic = struct.pack("<I", 0xCED7230A)
    parts, start = [], 0
    for position in range(0, len(data) // 4 * 4, 4):
        if data[position : position + 4] == magic:
            parts.append(data[start:position])
            start = position + 4
    parts.append(data[start:])
    flags = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    written = b"".join(
        magic + struct.pack("<I", flag << 29 | len(part)) + part
        for flag, part in zip(flags, parts, strict=True)
    )
    return written + bytes(-len(written) % 4)


@contextlib.contextmanager
def pipe(
    folder: Path, data: bytes, *, epoch: int = 0, recordio: bool = False, **options: Any
) -> Iterator[Channel]:
    """A channel whose FIFO somebody fills, as SageMaker does."""
    fifo = folder / f"train_{epoch}"
    os.mkfifo(fifo)

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError):  # the reader had enough
            fifo.write_bytes(data)

    writer = threading.Thread(target=fill)
    writer.start()
    try:
        yield Channel("train", folder / "train", "Pipe", recordio=recordio, **options)
    finally:
        os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))  # a writer that nobody read from ends
        writer.join(20)
        assert not writer.is_alive()
        fifo.unlink()


# --- channels -------------------------------------------------------------------------------------


def configure(root: Path, **entries: dict[str, str]) -> None:
    folder = root / "input" / "config"
    folder.mkdir(parents=True)
    (folder / "inputdataconfig.json").write_text(json.dumps(entries))


def test_channels_as_sagemaker_describes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SM_")]:
        monkeypatch.delenv(name)
    plain = {"S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
    configure(
        tmp_path,
        train={"TrainingInputMode": "File", **plain},
        extra={
            "TrainingInputMode": "Pipe",
            "S3DistributionType": "ShardedByS3Key",
            "RecordWrapperType": "RecordIO",
        },
    )
    data = tmp_path / "input" / "data"
    assert sagemaker.channels(tmp_path) == {
        "train": Channel("train", data / "train"),
        "extra": Channel("extra", data / "extra", "Pipe", sharded=True, recordio=True),
    }
    monkeypatch.setenv("SM_CHANNEL_TRAIN", "/elsewhere/train")  # what the training toolkit sets
    assert sagemaker.channels(tmp_path)["train"].path == Path("/elsewhere/train")
    with pytest.raises(ValueError, match="File mode"):
        next(sagemaker.channels(tmp_path)["train"].messages())
    with pytest.raises(ValueError, match="Pipe mode"):
        sagemaker.channels(tmp_path)["extra"].open("a")


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"train": 1}'])
def test_outside_a_training_container(text: str | None, tmp_path: Path) -> None:
    configure(tmp_path)
    path = tmp_path / "input" / "config" / "inputdataconfig.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(sc.SourceError, match="inputdataconfig"):
        sagemaker.channels(tmp_path)


def test_a_folder_is_read_by_names_and_held_against_its_manifest(tree: Path) -> None:
    channel = Channel("train", tree)
    assert channel.names() == sorted(SIZES)
    for name in SIZES:
        with channel.open(name, context=CONTEXT) as file:
            assert file.read() == plaintext(name)
    with channel.open("z", context=CONTEXT) as file:
        file.seek(-5, 2)
        assert file.read() == plaintext("z")[-5:]
    (tree / "c").write_bytes((tree / "z").read_bytes())
    with pytest.raises(sc.IntegrityError, match="swapped"):
        Channel("train", tree).open("c", context=CONTEXT, skip_instance_cache=True)


# --- pipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recordio", [False, True], ids=["concatenated", "RecordIO"])
def test_an_epoch_of_a_pipe(tree: Path, home: Path, tmp_path: Path, recordio: bool) -> None:
    wrap: Callable[[bytes], bytes] = record if recordio else bytes
    data = b"".join(map(wrap, objects(tree)))
    before = kms_calls(home)["Decrypt"]
    with pipe(tmp_path, data, epoch=3, recordio=recordio) as channel:
        got = []
        for message in channel.messages(3, context=CONTEXT, require_manifest=True):
            assert message.context == CONTEXT
            got.append(message.read())
            assert message.message_id in repr(message)
        assert message.closed
    assert got == [plaintext(name) for name in sorted(SIZES)]
    assert kms_calls(home)["Decrypt"] - before == 1


@pytest.mark.parametrize("options", [{"sign": True}, {"frame_size": 100}], ids=["signed", "many frames"])
def test_messages_in_a_row_with_little_read_of_each(options: Any, home: Path, tmp_path: Path) -> None:
    make_key()
    texts = [bytes([n]) * 5_000 * n for n in range(4)]
    blobs = [sc.encrypt_bytes(text, keys=KEY, **options) for text in texts]
    with pipe(tmp_path, b"".join(blobs)) as channel:
        assert [message.read(7) for message in channel.messages()] == [text[:7] for text in texts]
    # What is not read is authenticated all the same, before the next message is given out.
    damaged = bytearray(b"".join(blobs))
    damaged[-len(blobs[3]) - 200] ^= 1
    got = []
    with pipe(tmp_path, bytes(damaged)) as channel, pytest.raises(sc.IntegrityError):  # noqa: PT012
        for message in channel.messages(require_signed="sign" in options):
            got.append(message.read(7))
    assert got in ([text[:7] for text in texts[:2]], [text[:7] for text in texts[:3]])


def test_a_reader_may_stop_early(tree: Path, tmp_path: Path) -> None:
    with pipe(tmp_path, b"".join(objects(tree))) as channel:
        messages = channel.messages()
        first = next(messages)
        messages.close()
        assert first.closed


DEVIATIONS: dict[str, tuple[Callable[[list[bytes], bytes], list[bytes]], str]] = {
    # the objects and a message of another dataset under the same key -> what comes, and what is said
    "one is missing": (lambda o, other: o[:3] + o[4:], "did not come"),
    "the last is missing": (lambda o, other: o[:-1], "did not come"),
    "one came twice": (lambda o, other: [*o, o[-1]], "twice"),
    "one was added": (lambda o, other: [*o, other], "added"),
    "one was replaced": (lambda o, other: [*o[:-1], other], "added"),
    "cut within a message": (lambda o, other: [*o[:-1], o[-1][:-50]], "does not fit"),
    "cut within a header": (lambda o, other: [*o, other[:40]], "truncated"),
    "something else follows": (lambda o, other: [*o, b"plaintext,1,2\n"], "message"),
    "the manifest is missing": (lambda o, other: [one for one in o if one != o[0]], "no manifest"),
}


@pytest.mark.parametrize(("change", "said"), DEVIATIONS.values(), ids=DEVIATIONS)
def test_what_does_not_fit_the_manifest(
    tree: Path, tmp_path: Path, change: Callable[[list[bytes], bytes], list[bytes]], said: str
) -> None:
    whole = objects(tree)
    assert b"".join(whole).count(whole[0]) == 1
    other = sc.encrypt_bytes(b"another", keys=KEY, context=CONTEXT)
    with (  # noqa: PT012
        pipe(tmp_path, b"".join(change(whole, other))) as channel,
        pytest.raises(sc.IntegrityError, match=said),
    ):
        for message in channel.messages(context=CONTEXT, require_manifest=True):
            message.read()


def test_a_host_of_a_sharded_channel_sees_a_part(tree: Path, tmp_path: Path) -> None:
    part = objects(tree)[:4]
    with pipe(tmp_path, b"".join(part), sharded=True) as channel:
        assert len(list(channel.messages())) == 3
    other = sc.encrypt_bytes(b"another", keys=KEY)
    with (
        pipe(tmp_path, b"".join([*part, other]), sharded=True) as channel,
        pytest.raises(sc.IntegrityError, match="added"),
    ):
        list(channel.messages())


def test_another_context_is_refused_before_any_key_is_asked_for(
    tree: Path, home: Path, tmp_path: Path
) -> None:
    before = kms_calls(home)["Decrypt"]
    with pipe(tmp_path, b"".join(objects(tree))) as channel, pytest.raises(sc.ContextMismatchError):
        next(channel.messages(context={"Dataset": "other"}))
    assert kms_calls(home)["Decrypt"] == before


def test_a_pipe_that_is_made_late_or_never(tree: Path, tmp_path: Path) -> None:
    channel = Channel("late", tmp_path / "late", "Pipe")
    with pytest.raises(sc.SourceError, match="did not make this pipe"):
        next(channel.messages(timeout=0.0))

    def make() -> None:
        os.mkfifo(tmp_path / "late_0")
        (tmp_path / "late_0").write_bytes(b"".join(objects(tree)))

    timer = threading.Timer(0.2, make)
    timer.start()
    assert len(list(channel.messages(timeout=240))) == len(SIZES)
    timer.join(20)
    (tmp_path / "late_1").write_bytes(b"")
    with pytest.raises(sc.SourceError, match="no FIFO"):
        next(channel.messages(1))


MAGIC = struct.pack("<I", 0xCED7230A)
PAYLOADS = [b"", b"a", b"abcd", MAGIC, MAGIC * 3, b"abcd" + MAGIC + b"ef", b"a" + MAGIC, os.urandom(70_001)]


@pytest.mark.parametrize("step", [1, 3, 2**20])
def test_records_as_dmlc_writes_them(tmp_path: Path, step: int) -> None:
    path = tmp_path / "records"
    path.write_bytes(b"".join(map(record, PAYLOADS)))
    with io.FileIO(path) as file:
        records = sagemaker._Records(file)
        view = memoryview(bytearray(step))
        got = b"".join(bytes(view[:count]) for count in iter(lambda: records.readinto(view), 0))
    assert got == b"".join(PAYLOADS)


@pytest.mark.parametrize(
    "data",
    [
        b"not records", record(b"abc")[:-1], record(b"abc")[:9], MAGIC + b"\0", MAGIC + struct.pack("<I", 2 << 29),
        MAGIC + struct.pack("<I", 5 << 29), MAGIC + struct.pack("<I", 1 << 29 | 4) + b"abcd",
    ],
)  # fmt: skip
def test_damaged_records(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "records").write_bytes(data)
    with io.FileIO(tmp_path / "records") as file:
        records = sagemaker._Records(file)
        with pytest.raises(sc.IntegrityError):
            for _ in iter(lambda: records.readinto(memoryview(bytearray(100))), 0):
                pass


# --- artefacts ------------------------------------------------------------------------------------


def test_the_artefact_is_encrypted_or_refused(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_key()
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "opt" / "model"))
    model = sagemaker.model_dir()
    model.mkdir(parents=True)
    saved = tmp_path / "memory"
    saved.mkdir()
    (saved / "config.json").write_text('{"layers": 2}')
    (saved / "empty").write_bytes(b"")
    report = sagemaker.encrypt_model(saved, keys=KEY, context={"Model": "churn"})
    assert report.files == 2
    assert sc.verify(model, against=saved).files == 2
    (model / "vocabulary.txt").write_text("words in the clear")
    with pytest.raises(sc.DestinationError, match=r"vocabulary\.txt: not encrypted"):
        sagemaker.check_model_dir()
    (model / "more.txt").write_text("")
    with pytest.raises(sc.DestinationError, match=r"more\.txt and 1 more"):
        sagemaker.check_model_dir(model)


def test_weights_are_loaded_to_memory(tmp_path: Path, home: Path) -> None:
    tensors = pytest.importorskip("streamcrypt.tensors")
    np = pytest.importorskip("numpy")
    make_key()
    weights = {"w": np.arange(40_000, dtype=np.float32).reshape(200, 200), "b": np.ones(3)}
    with pytest.raises(sc.SourceError, match="0 sets of weights"):
        sagemaker.load_weights(tmp_path)
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several):
        folder.mkdir()
    tensors.save_file(weights, one / "model.safetensors", keys=KEY, context={"Model": "churn"})
    tensors.save_sharded(weights, several, keys=KEY, max_shard_size="100kB")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for folder in (one, several):
        loaded = sagemaker.load_weights(folder, framework="np")
        assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
            name: tensor.tolist() for name, tensor in weights.items()
        }
    # Nothing was written beside them.
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "home" not in str(path)} == {
        path: when for path, when in before.items() if "home" not in str(path)
    }
    with pytest.raises(sc.ContextMismatchError):
        sagemaker.load_weights(one, context={"Model": "other"})
    flip(one / "model.safetensors", -100)
    with pytest.raises(sc.IntegrityError):
        sagemaker.load_weights(one)


# --- requests -------------------------------------------------------------------------------------

ARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
OTHER = "arn:aws:kms:eu-west-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321"
REQUEST: dict[str, Any] = {
    "TrainingJobName": "churn-1",
    "RoleArn": "arn:aws:iam::111122223333:role/Trainer",
    "AlgorithmSpecification": {
        "TrainingImage": "111122223333.dkr.ecr.eu-west-1.amazonaws.com/train:1",
        "TrainingInputMode": "FastFile",
    },
    "InputDataConfig": [
        {
            "ChannelName": "train",
            "DataSource": {
                "S3DataSource": {
                    "S3DataType": "S3Prefix",
                    "S3Uri": "s3://bucket/train.enc/",
                    "S3DataDistributionType": "FullyReplicated",
                }
            },
        }
    ],
    "OutputDataConfig": {"S3OutputPath": "s3://bucket/models"},
    "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 50},
    "VpcConfig": {"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-1"]},
    "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
}


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """REQUEST with members set by dotted names; None takes one away."""
    request = copy.deepcopy(REQUEST)
    for path, value in changes:
        *above, last = path.split(".")
        part: Any = request
        for name in above:
            part = part[int(name)] if name.isdigit() else part.setdefault(name, {})
        part.pop(last, None) if value is None else part.__setitem__(last, value)
    return request


def test_a_request_is_filled_in_and_boto3_accepts_it() -> None:
    import boto3
    from botocore.stub import Stubber

    before = copy.deepcopy(REQUEST)
    made = sagemaker.secure_training_job(REQUEST, key=ARN)
    assert before == REQUEST
    assert made == changed(
        ("OutputDataConfig.KmsKeyId", ARN),
        ("ResourceConfig.VolumeKmsKeyId", ARN),
        ("EnableInterContainerTrafficEncryption", True),
    )
    assert sagemaker.check_training_job(made) == []
    client = boto3.client(
        "sagemaker", region_name="eu-west-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    with Stubber(client) as stub:
        answer = {"TrainingJobArn": "arn:aws:sagemaker:eu-west-1:111122223333:training-job/churn-1"}
        stub.add_response("create_training_job", answer, made)
        assert client.create_training_job(**made) == answer


def test_what_the_request_says_stays() -> None:
    request = changed(("OutputDataConfig.KmsKeyId", OTHER), ("ResourceConfig.InstanceType", "ml.g5.xlarge"))
    made = sagemaker.secure_training_job(request, key=ARN)
    assert made["OutputDataConfig"]["KmsKeyId"] == OTHER
    assert "VolumeKmsKeyId" not in made["ResourceConfig"]  # SageMaker would refuse it
    made = sagemaker.secure_training_job(REQUEST, key=ARN, volume_key=OTHER)
    assert made["ResourceConfig"]["VolumeKmsKeyId"] == OTHER


@pytest.mark.parametrize(
    ("request_", "key", "said"),
    [
        (REQUEST, ARN.replace("key/", "alias/"), "alias"),
        (REQUEST, "alias/ml", "alias"),
        (changed(("EnableInterContainerTrafficEncryption", False)), ARN, "in the clear"),
        (changed(("EnableNetworkIsolation", True)), ARN, "cannot ask KMS"),
        (changed(("TrainingJobName", None)), ARN, 'required parameter in input: "TrainingJobName"'),
        (changed(("ResourceConfig.VolumeSizeInGB", "50")), ARN, "VolumeSizeInGB"),
        (changed(("ResourceConfig.VolumeKmsKey", ARN)), ARN, "VolumeKmsKey"),
    ],
)
def test_what_filling_in_cannot_mend(request_: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sagemaker.secure_training_job(request_, key=key)


SEALED = (
    ("OutputDataConfig.KmsKeyId", ARN),
    ("ResourceConfig.VolumeKmsKeyId", ARN),
    ("EnableInterContainerTrafficEncryption", True),
)
CHANNEL = "InputDataConfig.0"
FINDINGS: dict[str, tuple[tuple[tuple[str, Any], ...], str, str]] = {
    # what is changed, where the finding is, its status
    "no key for the output": ((("OutputDataConfig.KmsKeyId", None),), "OutputDataConfig.KmsKeyId", "failed"),
    "an alias for the output": ((("OutputDataConfig.KmsKeyId", "alias/ml"),), "OutputDataConfig.KmsKeyId", "warning"),
    "a directory bucket": ((("OutputDataConfig.S3OutputPath", "s3://a--euw1-az1--x-s3/m"),),
                           "OutputDataConfig.S3OutputPath", "warning"),
    "no key for the volume": ((("ResourceConfig.VolumeKmsKeyId", None),), "ResourceConfig.VolumeKmsKeyId", "failed"),
    "a key for local storage": ((("ResourceConfig.InstanceType", "ml.p4d.24xlarge"),),
                                "ResourceConfig.VolumeKmsKeyId", "failed"),
    "an instance that is not known": ((("ResourceConfig.InstanceType", "ml.q9.large"),
                                       ("ResourceConfig.VolumeKmsKeyId", None)),
                                      "ResourceConfig.VolumeKmsKeyId", "warning"),
    "a group without a key": ((("ResourceConfig", {"VolumeSizeInGB": 9, "InstanceGroups": [
        {"InstanceGroupName": "a", "InstanceType": "ml.c5.xlarge", "InstanceCount": 1}]}),),
                              "ResourceConfig.VolumeKmsKeyId", "failed"),
    "clear traffic": ((("EnableInterContainerTrafficEncryption", None),),
                      "EnableInterContainerTrafficEncryption", "failed"),
    "network isolation": ((("EnableNetworkIsolation", True),), "EnableNetworkIsolation", "failed"),
    "no VPC": ((("VpcConfig", None),), "VpcConfig", "warning"),
    "gzip": (((f"{CHANNEL}.CompressionType", "Gzip"),), "InputDataConfig[0].CompressionType", "failed"),
    "FastFile of a list": (((f"{CHANNEL}.DataSource.S3DataSource.S3DataType", "ManifestFile"),),
                           "InputDataConfig[0].S3DataType", "failed"),
    "FastFile without a slash": (((f"{CHANNEL}.DataSource.S3DataSource.S3Uri", "s3://bucket/train"),),
                                 "InputDataConfig[0].S3Uri", "warning"),
    "sharded": (((f"{CHANNEL}.DataSource.S3DataSource.S3DataDistributionType", "ShardedByS3Key"),),
                "InputDataConfig[0].S3DataDistributionType", "warning"),
    "checkpoints": ((("CheckpointConfig.S3Uri", "s3://bucket/c"),), "CheckpointConfig", "warning"),
    "Debugger": ((("DebugHookConfig.S3OutputPath", "s3://bucket/d"),), "DebugHookConfig", "warning"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "field", "status"), FINDINGS.values(), ids=FINDINGS)
def test_findings(changes: tuple[tuple[str, Any], ...], field: str, status: str) -> None:
    found = sagemaker.check_training_job(changed(*SEALED, *changes))
    assert [(finding.field, finding.status) for finding in found] == [(field, status)]
    assert found[0].found
    assert found[0].mend


def test_one_instance_has_nobody_to_talk_to() -> None:
    assert not sagemaker.check_training_job(
        changed(*SEALED, ("EnableInterContainerTrafficEncryption", None), ("ResourceConfig.InstanceCount", 1))
    )


def test_the_instances_with_local_storage_are_instances_of_the_service() -> None:
    import botocore.session

    shapes = botocore.session.get_session().get_service_model("sagemaker")
    known = {sagemaker._family(name) for name in shapes.shape_for("TrainingInstanceType").enum}
    assert known >= sagemaker._LOCAL_STORAGE
    unclear = {f for f in known if sagemaker._EBS_ONLY.fullmatch(f) and f in sagemaker._LOCAL_STORAGE}
    assert not unclear
