"""iam-policy and doctor: the policy that is printed is enough, one action less is not, and doctor names the cause."""

from __future__ import annotations

import json
import os
import re
import resource as limits
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from families.s3 import Bucket, set_store_environment

from streamcrypt import api
from streamcrypt.cli import diagnosis, main
from streamcrypt.errors import KeyAccessError, SourceError, StreamcryptError
from streamcrypt.keys.calls import KmsCalls
from streamcrypt.keys.ecdh import KmsEcdhKeyring
from streamcrypt.keys.hierarchy import (
    BranchKeyStore,
    DynamoBranchKeyTable,
    HierarchyKeyring,
    SqliteBranchKeyTable,
)
from streamcrypt.keys.kms import KmsDiscoveryKeyring, KmsKeyring, KmsRsaKeyring
from streamcrypt.kms import ROOT, Caller, Service, kms_client, open_service, principals
from streamcrypt.kms.server import Server
from streamcrypt.message.suites import UNSIGNED

USER = "arn:aws:iam::000000000000:user/worker"
ROLE = "arn:aws:iam::000000000000:role/Trainer"
SESSION = "arn:aws:sts::000000000000:assumed-role/Trainer/job-7"
CONTEXT = {"Project": "CustomerChurn", "odd": "${aws:username} *"}
WORDS = [word for name, value in CONTEXT.items() for word in ("--context", f"{name}={value}")]


@pytest.fixture
def service(home: Path) -> Service:
    return open_service(home)


@pytest.fixture
def keys(service: Service) -> list[str]:
    """ARNs: two symmetric keys, of which the first has the alias ``alias/ml``; an RSA key; one for agreement."""
    kinds: list[dict[str, str]] = [
        {},
        {},
        {"KeySpec": "RSA_2048", "KeyUsage": "ENCRYPT_DECRYPT"},
        {"KeySpec": "ECC_NIST_P256", "KeyUsage": "KEY_AGREEMENT"},
    ]
    arns = [service.create_key(**kind)["KeyMetadata"]["Arn"] for kind in kinds]
    service.create_alias(AliasName="alias/ml", TargetKeyId=arns[0].rpartition("/")[2])
    return arns


@pytest.fixture
def dataset(tmp_path: Path, keys: list[str]) -> Path:
    """A tree encrypted by the root user under both keys."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("a", "b"):
        (plain / name).write_bytes(name.encode() * 5000)
    encrypted = tmp_path / "encrypted"
    api.encrypt(plain, encrypted, keys=[f"local:{arn}" for arn in keys[:2]], context=CONTEXT)
    return encrypted


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main(["iam-policy", "--quiet", *words]) == 0
    return json.loads(capsys.readouterr().out)


# --- the policy is enough, and one action less is not ----------------------------------------------


def encrypt(client: Any, keys: list[str], dataset: Path, out: Path, context: dict[str, str]) -> None:
    plain = dataset.parent / "plain"
    api.encrypt(plain, out, keys=[KmsKeyring(client, arn) for arn in keys[:2]], context=context)


def decrypt(client: Any, keys: list[str], dataset: Path, out: Path, context: dict[str, str]) -> None:
    api.decrypt(dataset, out, keys=KmsKeyring(client, keys[0]), context=context)


def decrypt_by_alias(client: Any, keys: list[str], dataset: Path, out: Path, context: dict[str, str]) -> None:
    api.decrypt(dataset, out, keys=KmsKeyring(client, "alias/ml", resolve=True), context=context)


def load(client: Any, keys: list[str], dataset: Path, out: Path, context: dict[str, str]) -> None:
    with api.open(dataset / "a", keys=KmsDiscoveryKeyring(client), context=context) as file:
        assert file.read(1) == b"a"


def rekey(client: Any, keys: list[str], dataset: Path, out: Path, context: dict[str, str]) -> None:
    api.rekey(
        dataset,
        out,
        from_keys=KmsKeyring(client, keys[0]),
        keys=[KmsKeyring(client, keys[1]), KmsKeyring(client, keys[0])],
        context=context,
    )


def begin(work: Callable[..., Any], *places: Any, **options: Any) -> None:
    """The owner's job, which does what it can of two files and keeps its journal."""
    with pytest.raises(SourceError, match="gone"):
        work(*places, files=["a", "gone"], **options)


def resume(client: Any, keys: list[str], dataset: Path, out: Any, context: dict[str, str]) -> None:
    out = f"{out}-{os.urandom(8).hex()}"
    owner, plain = open_service(), dataset.parent / "plain"
    begin(api.encrypt, plain, out, keys=[KmsKeyring(owner, arn) for arn in keys[:2]], context=context)
    mine = [KmsKeyring(client, arn) for arn in keys[:2]]
    report = api.encrypt(plain, out, keys=mine, context=context, resume=True)
    assert (report.skipped, report.files) == (1, 1)


def resume_by_alias(client: Any, keys: list[str], dataset: Path, out: Any, context: dict[str, str]) -> None:
    out = f"{out}-{os.urandom(8).hex()}"
    begin(api.encrypt, dataset.parent / "plain", out, keys="local:alias/ml", context=context)
    mine = KmsKeyring(client, "alias/ml", resolve=True)
    api.encrypt(dataset.parent / "plain", out, keys=mine, context=context, resume=True)


def resume_rekey(client: Any, keys: list[str], dataset: Path, out: Any, context: dict[str, str]) -> None:
    out = f"{out}-{os.urandom(8).hex()}"
    shutil.rmtree(dataset / "_streamcrypt", ignore_errors=True)  # to which "gone" would have been added

    def rings(client: Any) -> dict[str, Any]:
        return {"from_keys": KmsKeyring(client, keys[0]), "keys": KmsKeyring(client, keys[1])}

    begin(api.rekey, dataset, out, context=context, **rings(open_service()))
    report = api.rekey(dataset, out, context=context, resume=True, **rings(client))
    assert (report.skipped, report.files) == (1, 1)


def encrypt_by_rsa(client: Any, keys: list[str], dataset: Path, out: Path, context: dict[str, str]) -> None:
    api.encrypt(dataset.parent / "plain", out, keys=KmsRsaKeyring(keys[2], client=client), context=context)


def decrypt_by_rsa(client: Any, keys: list[str], dataset: Path, out: Path, context: dict[str, str]) -> None:
    owner = KmsRsaKeyring(keys[2], client=open_service())
    blob = api.encrypt_bytes(b"text", keys=owner, context=context)
    api.decrypt_bytes(blob, keys=KmsRsaKeyring(keys[2], client=client), context=context)


def agree(client: Any, keys: list[str], dataset: Path, out: Path, context: dict[str, str]) -> None:
    recipient = ec.generate_private_key(ec.SECP256R1()).public_key()
    keyring = KmsEcdhKeyring(client, keys[3], recipient)
    blob = api.encrypt_bytes(b"text", keys=keyring, context=context)
    assert api.decrypt_bytes(blob, keys=keyring, context=context) == b"text"


JOBS: dict[str, tuple[Callable[..., None], Callable[[list[str]], list[str]], dict[int, set[str]]]] = {
    # job, words for iam-policy, actions on each key
    "encrypt for two keys": (
        encrypt,
        lambda k: ["--for", "encrypt", "--key", k[0], "--key", k[1]],
        {0: {"GenerateDataKey"}, 1: {"Encrypt"}},
    ),
    "decrypt": (decrypt, lambda k: ["--for", "decrypt", "--key", k[0]], {0: {"Decrypt"}}),
    "decrypt by alias": (
        decrypt_by_alias,
        lambda k: ["--for", "decrypt", "--key", "local:alias/ml"],
        {0: {"Decrypt", "DescribeKey"}},
    ),
    "loader": (load, lambda k: ["--for", "loader", "--key", "local:alias/ml"], {0: {"Decrypt"}}),
    "rekey": (
        rekey,
        lambda k: ["--for", "rekey", "--from-key", k[0], "--key", k[1], "--key", k[0]],
        {0: {"Decrypt", "Encrypt"}, 1: {"GenerateDataKey"}},
    ),
    "encrypt --resume": (
        resume,
        lambda k: ["--for", "encrypt,resume", "--key", k[0], "--key", k[1]],
        {0: {"GenerateDataKey", "Decrypt"}, 1: {"Encrypt"}},
    ),
    "encrypt --resume by alias": (
        resume_by_alias,
        lambda k: ["--for", "encrypt,resume", "--key", "local:alias/ml"],
        {0: {"GenerateDataKey", "Decrypt", "DescribeKey"}},
    ),
    "rekey --resume": (
        resume_rekey,
        lambda k: ["--for", "rekey,resume", "--from-key", k[0], "--key", k[1]],
        {0: {"Decrypt"}, 1: {"Decrypt", "GenerateDataKey"}},
    ),
    "encrypt for an RSA key": (
        encrypt_by_rsa,
        lambda k: ["--for", "encrypt", "--key", f"kms-rsa:{k[2]}"],
        {2: {"GetPublicKey"}},
    ),
    "decrypt by an RSA key": (
        decrypt_by_rsa,
        lambda k: ["--for", "decrypt", "--key", f"kms-rsa:{k[2]}"],
        {2: {"Decrypt"}},
    ),
    "both by key agreement": (
        agree,
        lambda k: ["--for", "encrypt,decrypt", "--key", f"ecdh:{k[3]}"],
        {3: {"DeriveSharedSecret", "GetPublicKey"}},
    ),
}


def as_user(service: Service, *policies: Any) -> Any:
    """boto3 on the embedded KMS, as a user with these identity policies and nothing else."""
    texts = tuple(json.dumps(policy) for policy in policies)
    return kms_client("local", service=service, caller=Caller(USER, policies=texts))


def without(policy: dict[str, Any], action: str, arn: str) -> dict[str, Any]:
    """The policy with one action less on one key."""
    statements = []
    for statement in policy["Statement"]:
        resources = (
            statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        )
        for resource in resources:
            left = [name for name in statement["Action"] if (name, resource) != (action, arn)]
            if left:
                statements.append({**statement, "Action": left, "Resource": resource})
    return {
        **policy,
        "Statement": statements or [{"Effect": "Allow", "Action": "kms:ListKeys", "Resource": "*"}],
    }


@pytest.mark.parametrize(("job", "words", "expected"), JOBS.values(), ids=JOBS)
def test_identity_policy_is_the_least(
    service: Service,
    keys: list[str],
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    job: Callable[..., None],
    words: Callable[[list[str]], list[str]],
    expected: dict[int, set[str]],
) -> None:
    told = printed(capsys, *words(keys), *WORDS, "--json")
    actions = {
        arn: {f"kms:{name}" for name in expected[number]}
        for number, arn in enumerate(keys)
        if number in expected
    }
    assert {arn: set(found) for arn, found in told["actions"].items()} == actions
    policy = told["document"]
    sids = [statement["Sid"] for statement in policy["Statement"]]
    assert len(set(sids)) == len(sids)
    assert all(sid.isalnum() for sid in sids)  # IAM: letters and digits, unique within a policy
    job(as_user(service, policy), keys, dataset, tmp_path / "done", CONTEXT)
    for arn, found in actions.items():
        for action in sorted(found):
            with pytest.raises(KeyAccessError) as refused:
                job(as_user(service, without(policy, action, arn)), keys, dataset, tmp_path / "not", CONTEXT)
            assert refused.value.code == "AccessDeniedException", (action, arn)
            assert action in str(refused.value)
    with pytest.raises(KeyAccessError):
        job(as_user(service), keys, dataset, tmp_path / "none", CONTEXT)


def asked_of_s3(method: str, target: str) -> tuple[str, str]:
    """The action of a request to S3, and the ARN of what it is about."""
    url = urlsplit(target)
    query, (_, bucket, *key) = parse_qs(url.query, keep_blank_values=True), url.path.split("/", 2)
    name = unquote(key[0]) if key else ""
    if not name:
        action = "ListBucketMultipartUploads" if "uploads" in query else "ListBucket"
    elif "uploadId" in query and method in ("GET", "DELETE"):
        action = "ListMultipartUploadParts" if method == "GET" else "AbortMultipartUpload"
    else:
        action = {"GET": "GetObject", "HEAD": "GetObject", "DELETE": "DeleteObject"}.get(method, "PutObject")
    return f"s3:{action}", f"arn:aws:s3:::{bucket}" + (f"/{name}" if name else "")


def test_a_policy_for_s3_is_what_the_jobs_ask(
    service: Service, keys: list[str], tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
):
    """A store that refuses whatever the policy does not allow; and nearly all that it allows is asked for."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "big").write_bytes(bytes(9 * 2**20))  # a multipart upload
    (tmp_path / "in" / "sub" / "a*b").write_bytes(b"small")
    reference, asked = f"local:{keys[0]}", set[str]()

    def under(*words: str) -> set[str]:
        document = printed(capsys, "--key", reference, *words)
        asked.clear()

        def decide(method: str, target: str) -> int | None:
            action, resource = asked_of_s3(method, target)
            asked.add(action)
            for statement in document["Statement"]:
                resources = statement["Resource"]
                for pattern in resources if isinstance(resources, list) else [resources]:
                    if action in statement["Action"] and fnmatchcase(
                        resource, pattern.replace("${*}", "[*]")
                    ):
                        return None
            return 403

        bucket.proxy.fault = decide
        return {action for statement in document["Statement"] for action in statement["Action"]}

    broken_off = {"s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"}
    for url in (f"{bucket.url}/enc/", f"{bucket.url}/x*y", f"{bucket.url}/deep/object"):
        source = tmp_path / "in" / ("big" if "object" in url else "")
        allowed = under("--for", "encrypt", "--destination", url)
        api.encrypt(source, url, keys=reference)
        if url.endswith("/"):
            api.encrypt(source, url, keys=reference, resume=True)
        assert asked == {action for action in allowed if action.startswith("s3:")} - broken_off
        allowed = under("--for", "decrypt", "--source", url)
        api.decrypt(url, tmp_path / "out" / url.rpartition(bucket.name)[2].strip("/"))
        # An object that is there is found without listing; of one that is not S3 tells only whoever may list.
        unasked = {"s3:ListBucket"} if "object" in url else set()
        assert asked == {action for action in allowed if action.startswith("s3:")} - unasked
        with pytest.raises(SourceError, match="needs s3:GetObject and s3:ListBucket"):
            api.verify(f"{bucket.url}/elsewhere")
        with pytest.raises(StreamcryptError, match="denied access"):
            api.encrypt(source, url, keys=reference, overwrite=True)


@pytest.mark.parametrize(
    "words",
    [
        ["--source", "gs://b/x"],
        ["--destination", "s3:///x"],
        ["--source", "s3://b/x", "--form", "grants", "--principal", ROLE],
    ],
)
def test_no_policy_for_such_a_place(keys: list[str], words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["iam-policy", "--key", f"local:{keys[0]}", *words]) == 2
    assert "S3" in (text := capsys.readouterr().err) or "bucket" in text


@pytest.mark.parametrize(
    ("words", "roles"),
    [
        ([], ["encrypt", "decrypt"]),
        (["--for", "rekey"], ["rekey"]),
        (["--for", "rekey", "--for", "resume"], ["rekey", "resume"]),
        (["--for", "rekey", "resume,rekey"], ["rekey", "resume"]),
    ],
)
def test_roles_given_one_by_one_add_up(
    keys: list[str], words: list[str], roles: list[str], capsys: pytest.CaptureFixture[str]
):
    """The last one alone would be a policy that lacks what the others need."""
    assert main(["iam-policy", "--key", f"local:{keys[0]}", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["roles"] == roles


def test_resuming_in_a_store_takes_the_same(
    service: Service, keys: list[str], dataset: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    """There the journal itself is under the job's key."""
    policy = printed(capsys, "--for", "encrypt,resume", "--key", keys[0], "--key", keys[1], *WORDS)
    resume(as_user(service, policy), keys, dataset, f"{bucket.url}/done", CONTEXT)
    for action, arn in (("kms:Decrypt", keys[0]), ("kms:GenerateDataKey", keys[0]), ("kms:Encrypt", keys[1])):
        with pytest.raises(KeyAccessError, match=action):
            resume(
                as_user(service, without(policy, action, arn)), keys, dataset, f"{bucket.url}/not", CONTEXT
            )


def test_a_policy_with_a_context_serves_that_dataset_only(
    service: Service, keys: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = printed(
        capsys, "--for", "encrypt", "--key", keys[0], "--key", keys[1], "--context", "Project=CustomerChurn"
    )
    client = as_user(service, policy)
    encrypt(client, keys, dataset, tmp_path / "more", {**CONTEXT, "Stage": "2"})
    for number, context in enumerate(({}, {"Project": "Other"}, {"Stage": "CustomerChurn"})):
        with pytest.raises(KeyAccessError) as refused:
            encrypt(client, keys, dataset, tmp_path / f"other{number}", context)
        assert refused.value.code == "AccessDeniedException"


def test_exact_context_admits_no_other_pair_but_the_signature_key(
    service: Service, keys: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--for", "encrypt", "--key", keys[0], "--context", "Project=CustomerChurn", "--exact-context"]
    keyring = KmsKeyring(as_user(service, printed(capsys, *words)), keys[0])
    plain = dataset.parent / "plain" / "a"
    api.encrypt(plain, tmp_path / "exact", keys=keyring, context={"Project": "CustomerChurn"})
    api.encrypt(plain, tmp_path / "signed", keys=keyring, context={"Project": "CustomerChurn"}, sign=True)
    with pytest.raises(KeyAccessError):
        api.encrypt(plain, tmp_path / "more", keys=keyring, context={"Project": "CustomerChurn", "a": "b"})


@pytest.mark.parametrize("caller", [Caller(USER), Caller(SESSION)], ids=["user", "session of the role"])
def test_key_policy_is_enough_for_its_principal_alone(
    service: Service,
    keys: list[str],
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caller: Caller,
) -> None:
    principal = USER if caller.arn == USER else ROLE
    words = ["--for", "decrypt", "--key", keys[0], *WORDS, "--form", "key-policy", "--principal", principal]
    policy = printed(capsys, *words)
    client = kms_client("local", service=service, caller=caller)
    with pytest.raises(KeyAccessError):
        decrypt(client, keys, dataset, tmp_path / "before", CONTEXT)
    service.put_key_policy(KeyId=keys[0], PolicyName="default", Policy=json.dumps(policy))
    decrypt(client, keys, dataset, tmp_path / "out", CONTEXT)
    with pytest.raises(KeyAccessError):
        encrypt(client, keys[:1], dataset, tmp_path / "no", CONTEXT)
    stranger = kms_client("local", service=service, caller=Caller(USER + "2"))
    with pytest.raises(KeyAccessError):
        decrypt(stranger, keys, dataset, tmp_path / "stranger", CONTEXT)


def test_key_policy_of_an_execution_role_is_the_least(
    service: Service, keys: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training job's role: it reads the dataset, writes the model, and SageMaker makes grants for it."""
    via = "sagemaker.local.amazonaws.com"
    common = ["--key", keys[0], "--form", "key-policy", "--principal", ROLE]
    data = printed(capsys, "--for", "loader,encrypt", *WORDS, *common)
    volumes = printed(capsys, "--for", "sagemaker", "--via-service", via, *common)
    (own,) = [one for one in data["Statement"] if one.get("Principal") == {"AWS": ROLE}]
    assert set(own["Action"]) == {"kms:Decrypt", "kms:GenerateDataKey"}
    client = kms_client("local", service=service, caller=Caller(SESSION))
    through = Caller(SESSION, via_service=via)
    grant = {"KeyId": keys[0], "GranteePrincipal": USER, "Operations": ["Decrypt"]}

    def put(action: str | None) -> None:
        """Both policies' statements in the key's one policy, without this action."""
        statements = [*data["Statement"], *(s for s in volumes["Statement"] if s not in data["Statement"])]
        left = [
            {**s, "Action": [a for a in s["Action"] if a != action]} if isinstance(s["Action"], list) else s
            for s in statements
        ]
        whole = {**data, "Statement": [s for s in left if s["Action"]]}
        service.put_key_policy(KeyId=keys[0], PolicyName="default", Policy=json.dumps(whole))

    jobs: dict[str, Callable[[], Any]] = {
        "kms:Decrypt": lambda: load(client, keys, dataset, tmp_path, CONTEXT),
        "kms:GenerateDataKey": lambda: encrypt(
            client, keys[:1], dataset, tmp_path / os.urandom(8).hex(), CONTEXT
        ),
        "kms:CreateGrant": lambda: service.call("CreateGrant", grant, caller=through),
        "kms:DescribeKey": lambda: service.call("DescribeKey", {"KeyId": keys[0]}, caller=through),
    }
    put(None)
    for job in jobs.values():
        job()
    with pytest.raises(Exception, match="AccessDenied"):  # not through SageMaker
        service.call("CreateGrant", grant, caller=Caller(SESSION))
    for action, job in jobs.items():
        put(action)
        with pytest.raises(Exception, match="AccessDenied"):
            job()


def test_grants_are_enough_for_the_execution_role(
    service: Service, keys: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--for",
        "loader,encrypt",
        "--key",
        keys[0],
        "--key",
        keys[1],
        *WORDS,
        "--form",
        "grants",
        "--principal",
        ROLE,
    ]
    requests = printed(capsys, *words)
    assert sorted((request["KeyId"], request["Operations"]) for request in requests) == sorted(
        [(keys[0], ["Decrypt", "GenerateDataKey"]), (keys[1], ["Decrypt", "Encrypt"])]
    )
    client = kms_client("local", service=service, caller=Caller(SESSION))
    for request in requests:
        service.create_grant(**request)
    load(client, keys, dataset, tmp_path, CONTEXT)
    encrypt(client, keys, dataset, tmp_path / "out", CONTEXT)
    with pytest.raises(KeyAccessError):
        encrypt(client, keys, dataset, tmp_path / "other", {"Project": "Other"})


def test_sagemaker_may_make_grants_for_volumes_and_nothing_else(
    service: Service, keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    policy = printed(capsys, "--for", "sagemaker", "--key", keys[0])
    text = json.dumps(policy)
    grant = {"KeyId": keys[0], "GranteePrincipal": ROLE, "Operations": ["Decrypt"]}
    via = Caller(USER, policies=(text,), via_service="sagemaker.local.amazonaws.com")
    assert service.call("CreateGrant", grant, caller=via)["GrantId"]
    assert service.call("DescribeKey", {"KeyId": keys[0]}, caller=via)
    for action, caller in (
        ("CreateGrant", Caller(USER, policies=(text,))),
        ("Decrypt", via),
        ("ListGrants", via),
    ):
        request = {"CreateGrant": grant, "ListGrants": {"KeyId": keys[0]}}.get(
            action, {"CiphertextBlob": b"x" * 200}
        )
        with pytest.raises(Exception, match=r"AccessDenied|InvalidCiphertext"):
            service.call(action, request, caller=caller)
    less = json.dumps(without(policy, "kms:CreateGrant", keys[0]))
    with pytest.raises(Exception, match="AccessDenied"):
        service.call("CreateGrant", grant, caller=Caller(USER, policies=(less,), via_service=via.via_service))


def test_the_artefact_is_stored_under_the_key_by_s3_for_the_role(
    service: Service, keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What S3 asks of KMS in the role's name for an upload in one request, and in parts."""
    policy = printed(capsys, "--for", "sagemaker-output", "--key", keys[0], *WORDS)
    context = {"aws:s3:arn": "arn:aws:s3:::bucket/models/churn-1/output/model.tar.gz"}

    def store(*policies: Any, service_name: str | None = "s3") -> None:
        via = service_name and f"{service_name}.local.amazonaws.com"
        role = Caller(SESSION, policies=tuple(json.dumps(one) for one in policies), via_service=via)
        request = {"KeyId": keys[0], "NumberOfBytes": 32, "EncryptionContext": context}
        blob = service.call("GenerateDataKey", request, caller=role)["CiphertextBlob"]
        service.call("Decrypt", {"CiphertextBlob": blob, "EncryptionContext": context}, caller=role)

    store(policy)
    for action in ("kms:GenerateDataKey", "kms:Decrypt"):
        with pytest.raises(Exception, match=action):
            store(without(policy, action, keys[0]))
    for other in (None, "sagemaker"):
        with pytest.raises(Exception, match="AccessDenied"):
            store(policy, service_name=other)
    # The rest of SageMaker's needs does not do, and both together are what a request with one key takes.
    with pytest.raises(Exception, match="kms:GenerateDataKey"):
        store(printed(capsys, "--for", "sagemaker", "--key", keys[0]))
    both = printed(capsys, "--for", "sagemaker,sagemaker-output", "--key", keys[0])
    assert both["Statement"] == [
        *printed(capsys, "--for", "sagemaker", "--key", keys[0])["Statement"][:1],
        *policy["Statement"],
        *printed(capsys, "--for", "sagemaker", "--key", keys[0])["Statement"][1:],
    ]
    # Another service for the data does not change that of the artefact.
    words = ["--for", "sagemaker-output", "--key", keys[0], "--via-service", "fsx.local.amazonaws.com"]
    assert printed(capsys, *words) == policy


def test_via_service(service: Service, keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--for", "encrypt", "--key", keys[0], "--via-service", "s3.local.amazonaws.com"]
    text = json.dumps(printed(capsys, *words))
    request = {"KeyId": keys[0], "NumberOfBytes": 32}
    through = Caller(USER, policies=(text,), via_service="s3.local.amazonaws.com")
    assert service.call("GenerateDataKey", request, caller=through)["Plaintext"]
    with pytest.raises(Exception, match="AccessDenied"):
        service.call("GenerateDataKey", request, caller=Caller(USER, policies=(text,)))


MISUSE: dict[str, list[str]] = {
    "no KMS key": ["--key", "raw-aes:n/k@file"],
    "unknown role": ["--key", "local:alias/ml", "--for", "delete"],
    "key policy without a principal": ["--key", "local:alias/ml", "--form", "key-policy"],
    "key policy of two keys": [
        "--key", "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        "--key", "arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321",
        "--form", "key-policy", "--principal", ROLE],
    "an artefact by grants": [
        "--key", "local:alias/ml", "--for", "sagemaker-output", "--form", "grants", "--principal", ROLE],
    "resume of nothing": ["--key", "local:alias/ml", "--for", "decrypt,resume"],
    "a cluster that does nothing": ["--key", "local:alias/ml", "--for", "ray"],
    "sagemaker by grants": ["--key", "local:alias/ml", "--for", "sagemaker", "--form", "grants", "--principal", ROLE],
    "exact without a context": ["--key", "local:alias/ml", "--exact-context"],
    "branch keys of a KMS key": ["--key", "local:alias/ml", "--for", "branch-keys"],
    "a branch key of nobody knows which KMS key": ["--key", "hierarchy:tenant-a@dynamodb:Keys"],
    "from-key without rekey": ["--key", "local:alias/ml", "--from-key", "local:alias/ml"],
    "context without a value": ["--key", "local:alias/ml", "--context", "Project"],
}  # fmt: skip


@pytest.mark.parametrize("words", MISUSE.values(), ids=MISUSE)
def test_misuse_is_a_usage_error_in_one_line(
    keys: list[str], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["iam-policy", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("streamcrypt: error: ")
    assert captured.err.count("\n") == 1


def test_an_absent_key_is_exit_code_4(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["iam-policy", "--key", "local:alias/absent"]) == 4
    assert "alias/absent" in capsys.readouterr().err


def test_a_key_arn_of_aws_needs_no_call(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    arn = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    policy = printed(capsys, "--key", arn, "--for", "decrypt")
    assert policy["Statement"] == [
        {"Sid": "StreamcryptKeys", "Effect": "Allow", "Action": ["kms:Decrypt"], "Resource": arn}
    ]


# --- over HTTP, as the user of an access key --------------------------------------------------------


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    server = Server(service, port=0)
    ready: list[str] = []
    listening = threading.Event()

    def tell(url: str) -> None:
        ready.append(url)
        listening.set()

    thread = threading.Thread(target=server.run, kwargs={"ready": tell})
    thread.start()
    assert listening.wait(10)
    yield ready[0]
    server.stop()
    thread.join(10)


@pytest.fixture
def become(service: Service, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Take the place of a user with these identity policies."""

    def become(*policies: Any) -> None:
        texts = [json.dumps(policy) for policy in policies]
        key = principals.access_key(service.store, USER, policies=texts)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key.id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key.secret)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    return become


def test_the_commands_run_under_exactly_the_printed_policy(
    keys: list[str],
    dataset: Path,
    url: str,
    become: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = f"local:{keys[0]}@{url}"
    plain = str(dataset.parent / "plain")
    policy = printed(capsys, "--key", keys[0], "--for", "encrypt,decrypt", *WORDS)
    become(policy)
    assert main(["encrypt", plain, str(tmp_path / "e"), "--key", reference, "--quiet", *WORDS]) == 0
    assert (
        main(["decrypt", str(tmp_path / "e"), str(tmp_path / "d"), "--key", reference, "--quiet", *WORDS])
        == 0
    )
    assert main(["verify", str(tmp_path / "e"), "--key", reference, "--quiet", "--against", plain]) == 0
    become(without(policy, "kms:GenerateDataKey", keys[0]))
    assert main(["encrypt", plain, str(tmp_path / "e2"), "--key", reference, "--quiet", *WORDS]) == 4
    assert "kms:GenerateDataKey" in capsys.readouterr().err
    become(without(policy, "kms:Decrypt", keys[0]))
    assert (
        main(["decrypt", str(tmp_path / "e"), str(tmp_path / "d2"), "--key", reference, "--quiet", *WORDS])
        == 4
    )
    assert "kms:Decrypt" in capsys.readouterr().err


def test_keys_by_partition(
    keys: list[str],
    dataset: Path,
    url: str,
    become: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A key of each pattern makes data keys, and a further one wraps them."""
    first, second, third = (
        f"local:{arn}@{url}" for arn in (keys[0], keys[1], open_service().create_key()["KeyMetadata"]["Arn"])
    )
    rules = tmp_path / "keys.toml"
    rules.write_text(f'"a" = ["{second}", "{third}"]\n"nothing/*" = []\n')
    words = ["--key", first, "--key-map", str(rules)]
    told = printed(capsys, *words, "--for", "encrypt", "--json", *WORDS)
    actions = {
        keys[0]: ["kms:GenerateDataKey"],
        keys[1]: ["kms:GenerateDataKey"],
        third.removeprefix("local:").partition("@")[0]: ["kms:Encrypt"],
    }
    assert told["actions"] == actions

    def encrypt(policy: Any) -> int:
        become(policy)
        out = tmp_path / os.urandom(8).hex()
        return main(["encrypt", str(dataset.parent / "plain"), str(out), *words, "--quiet", *WORDS])

    assert encrypt(told["document"]) == 0
    for arn, (action,) in actions.items():
        assert encrypt(without(told["document"], action, arn)) == 4
        assert action in capsys.readouterr().err


# --- doctor -----------------------------------------------------------------------------------------


def diagnosed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    capsys.readouterr()
    code = main(["doctor", "--json", *words])
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == code
    assert told.get("ok") is (code == 0), told
    return code, {check["name"]: check for check in told["checks"]}


def test_all_is_well(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = diagnosed(capsys, "--key", "local:alias/ml", "--interop", *WORDS)
    assert code == 0
    assert keys[0] in checks["key state"]["found"]
    assert checks["identity"]["found"] == "arn:aws:iam::000000000000:root"
    for name in ("endpoint", "kms:GenerateDataKey", "kms:Decrypt", "interop", "cache", "quota"):
        assert checks[name]["status"] == "ok", checks[name]


def test_a_further_key_alone(
    keys: list[str], url: str, become: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--key", f"local:{keys[0]}@{url}", "--for", "wrap"]
    for action, status in (("kms:GenerateDataKey", "failed"), ("kms:Encrypt", "ok")):
        become(LOOK, allow(action))
        _, checks = diagnosed(capsys, *words)
        assert checks["kms:Encrypt"]["status"] == status
        assert "kms:GenerateDataKey" not in checks


def test_a_session_is_mended_for_its_role(
    service: Service,
    keys: list[str],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A session has another name tomorrow."""
    service.create_grant(KeyId=keys[0], GranteePrincipal=ROLE, Operations=["Encrypt"])
    made = principals.session_key(service.store, SESSION, expires=2**33, policies=[json.dumps(LOOK)])
    for name, value in (
        ("ACCESS_KEY_ID", made.id),
        ("SECRET_ACCESS_KEY", made.secret),
        ("SESSION_TOKEN", made.session_token),
    ):
        monkeypatch.setenv(f"AWS_{name}", str(value))
    words = ["--key", f"local:{keys[0]}@{url}", "--for", "loader"]
    check = diagnosed(capsys, *words)[1]["kms:Decrypt"]
    assert (check["status"], check["cause"]) == ("failed", "grant"), check
    assert f"User: {SESSION}" in check["found"]
    mend = check["mend"]
    for grant in printed(capsys, *shlex.split(mend[mend.index("streamcrypt iam-policy") :])[2:]):
        assert grant["GranteePrincipal"] == ROLE
        service.create_grant(**grant)
    assert diagnosed(capsys, *words)[1]["kms:Decrypt"]["status"] == "ok"


@pytest.mark.parametrize("role", ["resume", "ray"])
def test_what_a_job_asks_besides(
    keys: list[str], url: str, become: Callable[..., None], capsys: pytest.CaptureFixture[str], role: str
) -> None:
    become(LOOK, allow("kms:GenerateDataKey"))
    words = ["--key", f"local:{keys[0]}@{url}", "--for"]
    assert diagnosed(capsys, *words, "encrypt")[0] == 0
    code, checks = diagnosed(capsys, *words, f"encrypt,{role}")
    assert (code, checks["kms:Decrypt"]["status"]) == (4, "failed")


def test_dry_runs_use_nothing(service: Service, keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    diagnosed(capsys, "--key", "local:alias/ml", "--for", "encrypt,decrypt")
    used = service.store.query(
        "SELECT operation, error FROM audit WHERE operation IN ('GenerateDataKey', 'Decrypt')"
    )
    assert used == [("GenerateDataKey", "DryRunOperationException"), ("Decrypt", "DryRunOperationException")]


def allow(action: Any, condition: dict[str, Any] | None = None, effect: str = "Allow") -> dict[str, Any]:
    statement = {"Effect": effect, "Action": action, "Resource": "*"}
    return {
        "Version": "2012-10-17",
        "Statement": [{**statement, "Condition": condition} if condition else statement],
    }


LOOK = allow(["kms:DescribeKey", "kms:GetKeyPolicy", "kms:ListGrants"])
ONLY_ALPHA = {"StringEquals": {"kms:EncryptionContext:Project": "Alpha"}}
ADMIN = {
    "Effect": "Allow",
    "Principal": {"AWS": "arn:aws:iam::000000000000:root"},
    "Action": "kms:*",
    "Resource": "*",
}


def for_user(action: str, condition: dict[str, Any] | None = None, effect: str = "Allow") -> dict[str, Any]:
    made = {
        **allow(action, condition, effect)["Statement"][0],
        "Principal": {"AWS": USER},
        "Sid": "ForTheWorker",
    }
    return {"Version": "2012-10-17", "Statement": [ADMIN, made]}


# identity policies, key policy, grant, context -> what kms:Decrypt says, its cause, a word of the finding
CAUSES: dict[str, tuple[list[Any], Any, dict[str, Any] | None, list[str], str, str, str]] = {
    "allowed": ([LOOK, allow("kms:Decrypt")], None, None, [], "ok", "", "dry run"),
    "no identity policy": ([LOOK], None, None, [], "failed", "identity policy", "no policy of"),
    "deny in an identity policy": (
        [LOOK, allow("kms:*"), allow("kms:Decrypt", effect="Deny")], None, None, [],
        "failed", "identity policy", "Deny"),
    "deny in the key policy": (
        [LOOK, allow("kms:*")], for_user("kms:Decrypt", effect="Deny"), None, [], "failed", "key policy", "Deny"),
    "another context than the key policy's": (
        [LOOK], for_user("kms:Decrypt", ONLY_ALPHA), None, ["--context", "Project=Beta"],
        "failed", "context", "ForTheWorker: StringEquals kms:EncryptionContext:Project"),
    "the key policy's context": (
        [LOOK], for_user("kms:Decrypt", ONLY_ALPHA), None, ["--context", "Project=Alpha"], "ok", "", "dry run"),
    "another condition of the key policy": (
        [LOOK], for_user("kms:Decrypt", {"Bool": {"kms:MultiRegion": True}}), None, [],
        "failed", "key policy", "kms:MultiRegion"),
    "the context takes the permission away": (
        [LOOK, allow("kms:Decrypt", {"Null": {"kms:EncryptionContextKeys": True}})], None, None,
        ["--context", "Project=Beta"], "failed", "context", "without the encryption context"),
    "a grant for another context": (
        [LOOK], None, {"EncryptionContextSubset": {"Project": "Alpha"}}, ["--context", "Project=Beta"],
        "failed", "context", '"Project": "Alpha"'),
    "a grant": ([LOOK], None, {"EncryptionContextSubset": {"Project": "Alpha"}}, ["--context", "Project=Alpha"],
                "ok", "", "dry run"),
    "a grant for another operation": (
        [LOOK], None, {"Operations": ["Encrypt"]}, [], "failed", "grant", "allows Encrypt, and not Decrypt"),
    "nothing may be looked at": ([], None, None, [], "failed", "identity policy", "no policy of"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("own", "key_policy", "constraints", "words", "status", "cause", "finding"), CAUSES.values(), ids=CAUSES
)
def test_doctor_names_the_cause(
    service: Service,
    keys: list[str],
    url: str,
    become: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    own: list[Any],
    key_policy: Any,
    constraints: dict[str, Any] | None,
    words: list[str],
    status: str,
    cause: str,
    finding: str,
) -> None:
    if key_policy is not None:
        service.put_key_policy(KeyId=keys[0], PolicyName="default", Policy=json.dumps(key_policy))
    if constraints is not None:
        operations = constraints.get("Operations", ["Decrypt"])
        rest = {name: value for name, value in constraints.items() if name != "Operations"}
        given = {"Constraints": rest} if rest else {}
        service.create_grant(KeyId=keys[0], GranteePrincipal=USER, Operations=operations, **given)
    become(*own)
    code, checks = diagnosed(capsys, "--key", f"local:{keys[0]}@{url}", "--for", "loader", *words)
    check = checks["kms:Decrypt"]
    assert (check["status"], check["cause"]) == (status, cause), check
    assert finding in check["found"]
    assert code == (0 if status == "ok" else 4)
    if status == "failed":
        assert "kms:Decrypt" in check["found"]
        assert check["mend"]


OTHER_ADMIN = {**ADMIN, "Principal": {"AWS": "arn:aws:iam::000000000000:user/admin"}}
ALPHA = ["--context", "Project=Alpha"]

# What keeps the worker from it -> words of doctor ({0} … are the keys, {url} the server's), the check that
# fails, and how many ways out it prints.
MENDS: dict[str, tuple[Callable[[Service, list[str]], Any], list[Any], list[str], str, int]] = {
    "no identity policy": (lambda s, k: None, [LOOK], ["--for", "decrypt"], "kms:Decrypt", 1),
    "none to make data keys, with a context": (
        lambda s, k: None, [LOOK], ["--for", "encrypt", *WORDS], "kms:GenerateDataKey", 1),
    "none to wrap with the second key": (
        lambda s, k: None, [LOOK, allow("kms:GenerateDataKey")], ["--for", "encrypt", "--key", "local:{1}@{url}"],
        "kms:Encrypt", 1),
    "a key policy without the account": (
        lambda s, k: s.put_key_policy(
            KeyId=k[0], Policy=json.dumps({"Version": "2012-10-17", "Statement": [OTHER_ADMIN]}),
            BypassPolicyLockoutSafetyCheck=True),
        [LOOK], ["--for", "decrypt", *ALPHA], "kms:Decrypt", 2),
    "a grant of something else": (
        lambda s, k: s.create_grant(KeyId=k[0], GranteePrincipal=USER, Operations=["Encrypt"]),
        [LOOK], ["--for", "decrypt"], "kms:Decrypt", 1),
    "a grant for another context": (
        lambda s, k: s.create_grant(
            KeyId=k[0], GranteePrincipal=USER, Operations=["Decrypt"],
            Constraints={"EncryptionContextEquals": {"Project": "Beta"}}),
        [LOOK], ["--for", "decrypt", *ALPHA], "kms:Decrypt", 1),
    "a key that is disabled": (
        lambda s, k: s.disable_key(KeyId=k[0]), [allow("kms:*")], ["--for", "decrypt"], "key state", 1),
    "a key that is to be deleted": (
        lambda s, k: s.schedule_key_deletion(KeyId=k[0]), [allow("kms:*")], ["--for", "decrypt"], "key state", 1),
    "no right to sign": (lambda s, k: None, [LOOK], ["--sign-manifest", "local:{4}@{url}"], "kms:Sign", 1),
    "no right to sign with a public key": (
        lambda s, k: None, [LOOK, allow("kms:GetPublicKey")], ["--sign-manifest", "local:{4}@{url}"], "kms:Sign", 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("cause", "own", "words", "name", "ways", "way"),
    [
        pytest.param(*mend, way, id=f"{about}-{way + 1}")
        for about, mend in MENDS.items()
        for way in range(mend[-1])
    ],
)
def test_every_way_out_that_doctor_prints_is_one(
    service: Service,
    keys: list[str],
    url: str,
    become: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    cause: Callable[[Service, list[str]], Any],
    own: list[Any],
    words: list[str],
    name: str,
    ways: int,
    way: int,
) -> None:
    """The commands are run as printed, what they print is applied, and the finding is gone."""
    keys.append(service.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["Arn"])
    cause(service, keys)
    admin = Caller(OTHER_ADMIN["Principal"]["AWS"]) if name == "kms:Decrypt" and ways == 2 else ROOT
    become(*own)
    words = [word.format(*keys, url=url) if "{url}" in word else word for word in words]
    if "--sign-manifest" not in words:
        words = ["--key", f"local:{keys[0]}@{url}", *words]

    def found() -> dict[str, Any]:
        _, checks = diagnosed(capsys, *words)
        return checks["kms:GetPublicKey"] if name == "kms:Sign" and name not in checks else checks[name]

    before = found()
    assert before["status"] == "failed", before
    assert before["cause"], before
    mends = re.findall(r"streamcrypt (?:[^;&]|&& )*", before["mend"])
    assert len(mends) == ways, mends
    for command in mends[way].split("&&"):
        program, *arguments = shlex.split(command)
        assert program == "streamcrypt"
        if arguments[0] == "kms":
            assert main(arguments) == 0, command
            continue
        document = printed(capsys, *arguments[1:])
        form = arguments[arguments.index("--form") + 1] if "--form" in arguments else "identity"
        if form == "identity":
            become(*own, document)
        elif form == "grants":
            for one in document:
                service.call("CreateGrant", one, caller=admin)
        else:
            policy = json.loads(service.call("GetKeyPolicy", {"KeyId": keys[0]}, caller=admin)["Policy"])
            policy["Statement"].append(document["Statement"][-1])
            service.call("PutKeyPolicy", {"KeyId": keys[0], "Policy": json.dumps(policy)}, caller=admin)
    assert found()["status"] == "ok"


@pytest.mark.parametrize(
    ("operation", "request_", "finding", "mend"),
    [
        ("disable_key", {}, "Disabled", "enable-key"),
        ("schedule_key_deletion", {"PendingWindowInDays": 7}, "will be deleted on", "cancel-key-deletion"),
    ],
)
def test_state_of_the_key(
    service: Service,
    keys: list[str],
    capsys: pytest.CaptureFixture[str],
    operation: str,
    request_: dict[str, Any],
    finding: str,
    mend: str,
) -> None:
    getattr(service, operation)(KeyId=keys[0], **request_)
    code, checks = diagnosed(capsys, "--key", "local:alias/ml")
    assert (code, checks["key state"]["cause"]) == (4, "key state")
    assert finding in checks["key state"]["found"]
    assert mend in checks["key state"]["mend"]


def test_an_asymmetric_key_is_named_as_such(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    arn = service.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]["Arn"]
    code, checks = diagnosed(capsys, "--key", f"local:{arn}")
    assert code == 4
    written = checks["key state"]["mend"].rpartition(" ")[2]
    assert written == f"kms-rsa:{arn}"
    assert diagnosed(capsys, "--key", written)[1]["key"]["status"] == "ok"
    # Keys that wrap nothing have no other form.
    for spec, usage in (("ECC_NIST_P256", "SIGN_VERIFY"), ("HMAC_256", "GENERATE_VERIFY_MAC")):
        arn = service.create_key(KeySpec=spec, KeyUsage=usage)["KeyMetadata"]["Arn"]
        mend = diagnosed(capsys, "--key", f"local:{arn}")[1]["key state"]["mend"]
        command = shlex.split(mend[mend.index("streamcrypt ") :].replace("NAME", spec))
        assert main(command[1:]) == 0
        assert diagnosed(capsys, "--key", f"local:alias/{spec}")[0] == 0


def test_an_absent_alias(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = diagnosed(capsys, "--key", "local:alias/absent")
    assert code == 4
    assert "alias/absent" in checks["key state"]["found"]


def test_a_kms_out_of_reach_is_temporary(
    keys: list[str], url: str, become: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    become()
    code, checks = diagnosed(capsys, "--key", f"local:{keys[0]}@http://127.0.0.1:9")
    assert (code, checks["connection"]["cause"]) == (5, "network")


def test_a_secret_that_is_wrong(
    keys: list[str], url: str, become: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    become(allow("kms:*"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")  # another environment: boto3 clients are shared by it
    code, checks = diagnosed(capsys, "--key", f"local:{keys[0]}@{url}")
    assert (code, checks["connection"]["cause"]) == (4, "credentials")


@pytest.mark.parametrize(
    ("off", "status"), [(0, "ok"), (-59, "ok"), (90, "warning"), (-90, "warning"), (301, "failed")]
)
def test_clock(off: float, status: str) -> None:
    response = {"ResponseMetadata": {"HTTPHeaders": {"date": "Mon, 21 Sep 2026 14:13:20 GMT"}}}
    assert diagnosis._check_clock(response, 1_790_000_000.0 + off).status == status


def test_cache_settings_that_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").write_bytes(bytes(10))
    base = ["--source", str(tmp_path)]
    for words, word in (
        (["--cache-max-messages", "1"], "1 message"),
        (["--cache-max-age", "10ms"], "0.01 s"),
        (["--cache-max-bytes", "1999"], "1 of 2 files"),
    ):
        code, checks = diagnosed(capsys, *base, *words)
        assert (code, checks["cache"]["status"]) == (0, "warning")
        assert word in checks["cache"]["found"]
    assert checks["cache"]["mend"] == "raise --cache-max-bytes to 2000"
    assert diagnosed(capsys, *base, "--cache-max-bytes", "2000")[1]["cache"]["status"] == "ok"


@pytest.mark.parametrize(
    ("url", "leaks"),
    [
        ("filecache::crypt::s3://bucket/x", True),
        ("crypt::filecache::s3://bucket/x", False),
        ("simplecache::zip://a::crypt::file:///x", True),
        ("crypt::s3://bucket/x", False),
        ("filecache::s3://bucket/x", False),
    ],
)
def test_caches_outside_crypt(
    url: str, leaks: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    code, checks = diagnosed(capsys, "--url", url)
    assert code == (1 if leaks else 0)
    if leaks:
        mended = checks["plaintext leak"]["mend"].removeprefix("put the cache below crypt: ")
        assert diagnosed(capsys, "--url", mended)[0] == 0
    if url == "filecache::crypt::s3://bucket/x":
        assert mended == "crypt::filecache::s3://bucket/x"


def test_a_configured_cache_outside_crypt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", str(tmp_path))
    (tmp_path / "conf.json").write_text(json.dumps({"filecache": {"target_protocol": "crypt"}}))
    code, checks = diagnosed(capsys, "--url", "crypt::s3://bucket/x")
    assert code == 1
    assert "filecache" in checks["plaintext leak"]["found"]


def test_leftovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".streamcrypt-0123456789abcdef.tmp").write_bytes(bytes(10))
    code, checks = diagnosed(capsys, "--source", str(tmp_path))
    assert (code, checks["leftovers"]["status"]) == (0, "warning")
    assert "1 temporary" in checks["leftovers"]["found"]
    assert checks["cache"]["found"].startswith("0 files")


def test_a_key_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "key"
    path.write_bytes(bytes(32))
    path.chmod(0o600)
    code, checks = diagnosed(capsys, "--key", f"raw-aes:n/k@{path}")
    assert (code, checks["key"]["status"]) == (0, "ok")
    path.write_bytes(bytes(31))
    assert diagnosed(capsys, "--key", f"raw-aes:n/k@{path}")[0] == 4


def test_a_key_of_another_form_that_may_not_be_used(
    keys: list[str], url: str, become: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    path = tmp_path / "other.pem"
    path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    reference = f"ecdh:local:{keys[3]}@{url}&recipient={path}"
    become(LOOK, allow("kms:GetPublicKey"))
    code, checks = diagnosed(capsys, "--key", reference)
    assert (code, checks["key"]["status"], checks["key"]["cause"]) == (4, "failed", "identity policy")
    mend = checks["key"]["mend"]
    become(LOOK, printed(capsys, *shlex.split(mend[mend.index("streamcrypt iam-policy") :])[2:]))
    assert diagnosed(capsys, "--key", reference)[1]["key"]["status"] == "ok"


def test_text_for_people(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--key", "local:alias/ml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok") and "kms:Decrypt" in line for line in lines)
    assert main(["doctor", "--key", "local:alias/ml", "--quiet"]) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok")]


def test_nothing_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 2
    assert main(["doctor", "--key", "nonsense"]) == 2


# --- what doctor finds beside the permissions ---------------------------------------------------------


REQUESTS: dict[str, dict[str, Any]] = {
    "GenerateDataKey": {"NumberOfBytes": 32},
    "GenerateDataKeyWithoutPlaintext": {"NumberOfBytes": 32},
    "Encrypt": {"Plaintext": b"x"},
    "Decrypt": {},
    "ReEncrypt": {},
    "DescribeKey": {},
    "GetPublicKey": {},
    "DeriveSharedSecret": {"KeyAgreementAlgorithm": "ECDH"},
    "Sign": {"Message": b"x", "SigningAlgorithm": "ECDSA_SHA_256"},
}


@pytest.mark.parametrize("operation", REQUESTS)
def test_a_denial_names_the_missing_action(service: Service, keys: list[str], operation: str) -> None:
    """Of every operation that any command calls."""
    arn, request = keys[0], dict(REQUESTS[operation])
    if operation in ("Decrypt", "ReEncrypt"):
        request["CiphertextBlob"] = service.encrypt(KeyId=arn, Plaintext=b"x")["CiphertextBlob"]
    if operation == "DeriveSharedSecret":
        arn = keys[3]
        request["PublicKey"] = service.get_public_key(KeyId=arn)["PublicKey"]
    request["DestinationKeyId" if operation == "ReEncrypt" else "KeyId"] = arn
    with pytest.raises(KeyAccessError) as refused:
        KmsCalls(as_user(service)).call(operation, arn, **request)
    assert refused.value.code == "AccessDeniedException"
    actions = ("ReEncryptFrom", "ReEncryptTo") if operation == "ReEncrypt" else (operation,)
    assert "because no identity-based policy allows the kms:" in str(refused.value)
    for action in actions:
        assert f"the caller needs kms:{actions[0]}" in str(refused.value)
        assert f"kms:{action}" in str(refused.value)


def test_an_alias_that_may_not_be_looked_up(
    keys: list[str], url: str, become: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    become(allow(["kms:Decrypt", "kms:GenerateDataKey"]))
    code, checks = diagnosed(capsys, "--key", f"local:alias/ml@{url}")
    assert (code, checks["key state"]["status"]) == (0, "warning")
    assert "kms:DescribeKey, or name the key by its ARN" in checks["key state"]["mend"]
    assert checks["kms:Decrypt"]["status"] == "ok"
    become(allow(["kms:Decrypt", "kms:GenerateDataKey", "kms:DescribeKey"]))
    assert diagnosed(capsys, "--key", f"local:alias/ml@{url}")[1]["key state"]["status"] == "ok"


def test_a_kms_of_aws(
    monkeypatch: pytest.MonkeyPatch, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """moto's server: who calls, the clock, the region's quota.  It knows no dry runs, and doctor says so."""
    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_CONFIG_FILE": "no-such-file", "AWS_SHARED_CREDENTIALS_FILE": "no-such-file",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        arn = boto3.session.Session().client("kms").create_key()["KeyMetadata"]["Arn"]
        _, checks = diagnosed(capsys, "--key", arn)
    finally:
        server.stop()
    assert checks["identity"]["found"].startswith("arn:aws:sts::")
    assert "region eu-central-1" in checks["endpoint"]["found"]
    assert checks["clock"]["status"] == "ok"
    assert "eu-central-1" in checks["quota"]["found"]
    assert checks["key state"]["status"] == "ok"
    for action in ("kms:GenerateDataKey", "kms:Decrypt"):
        assert checks[action]["status"] == "warning"
        assert "knows no dry runs" in checks[action]["found"]


@pytest.mark.parametrize(
    ("endpoint", "verify", "status", "word"),
    [
        ("https://kms.eu-west-1.amazonaws.com", True, "ok", "; TLS, certificate checked"),
        ("https://kms-fips.us-east-1.amazonaws.com", True, "ok", "FIPS endpoint, TLS"),
        ("https://kms.eu-west-1.amazonaws.com", False, "failed", "certificates are not checked"),
        ("http://127.0.0.1:8400", True, "ok", "plain HTTP"),
    ],
)
def test_endpoint_and_tls(endpoint: str, verify: bool, status: str, word: str) -> None:
    import boto3

    client = boto3.session.Session().client(
        "kms", region_name="eu-west-1", endpoint_url=endpoint, verify=verify,
        aws_access_key_id="a", aws_secret_access_key="b",
    )  # fmt: skip
    check = diagnosis._check_endpoint(KmsCalls(client), client)
    assert (check.status, word in check.found) == (status, True), check
    assert "eu-west-1" in check.found


@pytest.mark.parametrize(
    ("endpoint", "code", "mend"),
    [("http://127.0.0.1:9", 5, "try again when"), ("https://", 1, "mend the store's settings")],
)
def test_a_store_that_cannot_be_asked_is_no_missing_permission(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, code: int, mend: str
) -> None:
    set_store_environment(monkeypatch, 9)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("STREAMCRYPT_STORE_RETRY_SECONDS", "1s")
    check = diagnosis.check_uploads("s3://bucket/enc")
    assert (check.status, check.code, check.mend.startswith(mend)) == ("failed", code, True), check


def test_plaintext_beside_us(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", "/somewhere/cache")
    found = [check for check in diagnosis.check_plaintext_leaks() if "HF_DATASETS_CACHE" in check.found]
    assert [check.status for check in found] == ["warning"]
    soft, hard = limits.getrlimit(limits.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("core files are off for good in this process")
    limits.setrlimit(limits.RLIMIT_CORE, (hard, hard))
    try:
        assert any("core file" in check.found for check in diagnosis.check_plaintext_leaks())
    finally:
        limits.setrlimit(limits.RLIMIT_CORE, (soft, hard))


def test_interop_without_the_sdk_and_without_the_right(
    keys: list[str], url: str, become: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    become(LOOK)
    check = diagnosis.check_interop(f"local:{keys[0]}@{url}", CONTEXT)
    assert (check.status, "kms:GenerateDataKey" in check.found) == ("failed", True)
    monkeypatch.setitem(sys.modules, "aws_encryption_sdk", None)
    check = diagnosis.check_interop("local:alias/ml", CONTEXT)
    assert (check.status, "aws-encryption-sdk" in check.mend) == ("skipped", True)


def test_what_only_sagemaker_can_try(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = diagnosed(capsys, "--key", "local:alias/ml", "--for", "sagemaker,sagemaker-output")
    assert (code, checks["kms:CreateGrant"]["status"], checks["the artefact"]["status"]) == (
        0,
        "skipped",
        "skipped",
    )
    assert checks["kms:CreateGrant"]["mend"].endswith("--for sagemaker")
    assert checks["the artefact"]["mend"].endswith("--for sagemaker-output")


# --- branch keys --------------------------------------------------------------------------------------


def branch_keys(client: Any, home: Path, arn: str) -> BranchKeyStore:
    calls = KmsCalls(client)
    table = SqliteBranchKeyTable(home / "branch-keys.sqlite3")
    return BranchKeyStore(table, lambda arn: calls, logical_name="logical", kms_key_arn=arn)


@pytest.mark.parametrize("role", ["encrypt", "decrypt", "loader"])
def test_a_hierarchy_key_takes_decrypt_for_its_branch_key_alone(
    service: Service, keys: list[str], home: Path, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    for branch_key_id in ("tenant-a", "tenant-b"):
        branch_keys(service, home, keys[0]).create(branch_key_id)
    reference = f"hierarchy:tenant-a@dynamodb:Keys?logical=logical&kms={keys[0]}"
    told = printed(capsys, "--key", reference, "--for", role, "--json", *WORDS)
    table = "arn:aws:dynamodb:local:000000000000:table/Keys"
    assert told["actions"] == {keys[0]: ["kms:Decrypt"], table: ["dynamodb:GetItem"]}
    policy = told["document"]
    client = as_user(service, policy)
    blob = api.encrypt_bytes(b"text", keys=HierarchyKeyring(branch_keys(client, home, keys[0]), "tenant-a"))
    opened = HierarchyKeyring(branch_keys(client, home, keys[0]), "tenant-a")
    assert api.decrypt_bytes(blob, keys=opened) == b"text"
    for refused, branch_key_id in (
        (client, "tenant-b"),
        (as_user(service, without(policy, "kms:Decrypt", keys[0])), "tenant-a"),
    ):
        with pytest.raises(KeyAccessError) as denied:
            HierarchyKeyring(branch_keys(refused, home, keys[0]), branch_key_id).generate(UNSIGNED, {})
        assert denied.value.code == "AccessDeniedException"
        assert "kms:Decrypt" in str(denied.value)


def test_making_branch_keys(
    service: Service, keys: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = f"hierarchy:tenant-a@local?logical=logical&kms={keys[0]}"
    told = printed(capsys, "--key", reference, "--for", "branch-keys", "--json")
    expected = ["kms:Decrypt", "kms:GenerateDataKeyWithoutPlaintext", "kms:ReEncryptFrom", "kms:ReEncryptTo"]
    assert told["actions"] == {keys[0]: expected}
    policy = told["document"]
    store = branch_keys(as_user(service, policy), home, keys[0])
    store.create("tenant-a")
    store.rotate("tenant-a")
    for action in expected:
        less = branch_keys(as_user(service, without(policy, action, keys[0])), home, keys[0])
        with pytest.raises(KeyAccessError) as refused:
            less.rotate("tenant-a")
        assert action in str(refused.value)
    with pytest.raises(KeyAccessError):
        store.create("tenant-b")


def test_the_table_s_permission_against_a_dynamodb_that_checks_it(
    service: Service, keys: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """moto decides by action and resource; it takes no notice of conditions."""
    import boto3
    from moto.core import set_initial_no_auth_action_count
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()

    def client(name: str, **credentials: str) -> Any:
        owner = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return boto3.session.Session().client(
            name, region_name="eu-central-1", endpoint_url=f"http://{host}:{port}", **(credentials or owner)
        )

    try:
        table = DynamoBranchKeyTable(lambda: client("dynamodb"), "Keys")
        table.create_table()
        calls = KmsCalls(service)
        BranchKeyStore(table, lambda arn: calls, logical_name="Keys", kms_key_arn=keys[0]).create("tenant-a")
        iam = client("iam")
        iam.create_user(UserName="worker")
        made = iam.create_access_key(UserName="worker")["AccessKey"]
        words = [
            "--key",
            f"hierarchy:tenant-a@dynamodb:Keys?region=eu-central-1&kms={keys[0]}",
            "--for",
            "loader",
        ]
        policy = printed(capsys, *words)
        (statement,) = [one for one in policy["Statement"] if one["Action"] == ["dynamodb:GetItem"]]
        assert statement["Resource"] == "arn:aws:dynamodb:eu-central-1:000000000000:table/Keys"
        assert statement["Condition"] == {"ForAllValues:StringEquals": {"dynamodb:LeadingKeys": ["tenant-a"]}}
        anywhere = {**policy, "Statement": [{**statement, "Resource": "*", "Condition": {}}]}
        user = client(
            "dynamodb", aws_access_key_id=made["AccessKeyId"], aws_secret_access_key=made["SecretAccessKey"]
        )
        mine = DynamoBranchKeyTable(lambda: user, "Keys")
        checked = set_initial_no_auth_action_count(0)  # from now on moto decides by the policies

        @checked
        def look() -> Any:
            return mine.get("tenant-a", "branch:ACTIVE")

        iam.put_user_policy(UserName="worker", PolicyName="p", PolicyDocument=json.dumps(anywhere))
        assert look()["kms-arn"] == keys[0]
        less = without(anywhere, "dynamodb:GetItem", "*")
        iam.put_user_policy(UserName="worker", PolicyName="p", PolicyDocument=json.dumps(less))
        with pytest.raises(KeyAccessError, match="the caller needs dynamodb:GetItem on the table"):
            look()
    finally:
        server.stop()


# --- signed manifests ---------------------------------------------------------------------------------


def test_signing_takes_two_actions(
    service: Service,
    keys: list[str],
    dataset: Path,
    url: str,
    become: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signer = service.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["Arn"]
    words = ["--key", keys[0], "--sign-manifest", f"local:{signer}"]
    policy = printed(capsys, *words, "--for", "encrypt", *WORDS)
    plain = str(dataset.parent / "plain")

    def encrypt(out: str) -> int:
        given = [
            "--key",
            f"local:{keys[0]}@{url}",
            "--sign-manifest",
            f"local:{signer}@{url}",
            "--quiet",
            *WORDS,
        ]
        return main(["encrypt", plain, str(tmp_path / out), *given])

    become(policy)
    assert encrypt("signed") == 0
    code, checks = diagnosed(capsys, "--sign-manifest", f"local:{signer}@{url}")
    assert (code, checks["kms:Sign"]["status"]) == (0, "ok")
    for action in ("kms:Sign", "kms:GetPublicKey"):
        become(without(policy, action, signer))
        assert encrypt(f"without {action}") == 4
        assert action in capsys.readouterr().err
        code, checks = diagnosed(capsys, "--sign-manifest", f"local:{signer}@{url}")
        assert (code, checks[action]["status"]) == (4, "failed")
        assert action in checks[action]["found"]


# --- a request to SageMaker ---------------------------------------------------------------------------


def test_a_training_job_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arn = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    request: dict[str, Any] = {
        "TrainingJobName": "churn-1",
        "RoleArn": "arn:aws:iam::111122223333:role/Trainer",
        "OutputDataConfig": {"S3OutputPath": "s3://bucket/models"},
        "VpcConfig": {"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-1"]},
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(request))
    code, checks = diagnosed(capsys, "--training-job", str(path))
    assert (code, checks["training job"]["status"]) == (1, "failed")
    assert "OutputDataConfig.KmsKeyId" in checks["training job"]["found"]
    request["OutputDataConfig"]["KmsKeyId"] = arn
    path.write_text(json.dumps(request))
    code, checks = diagnosed(capsys, "--training-job", str(path))
    assert (code, checks["training job"]["status"]) == (0, "ok")
    path.write_text("[]")
    assert main(["doctor", "--training-job", str(path)]) == 2
