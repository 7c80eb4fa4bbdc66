"""What doctor looks at.  Every check says what it found and, where something is wrong, what mends it.

Permissions are tried by KMS's dry runs: KMS decides as it would for the real call, and nothing is
encrypted or decrypted.  When it refuses, the words of AccessDeniedException say which kind of policy
is missing; the key policy and the grants, where the caller may read them, say which condition failed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

from streamcrypt import api
from streamcrypt.cli import output
from streamcrypt.engine.journal import is_interrupted
from streamcrypt.errors import KeyAccessError, StreamcryptError, TemporaryError
from streamcrypt.keys.calls import KmsCalls, classify, error_code
from streamcrypt.keys.reference import decrypting_keyring, encrypting_keyring, kms_options, reach_kms
from streamcrypt.kms import ROOT, cost, kms_client
from streamcrypt.kms.policy import (
    Caller,
    Grant,
    KeyFacts,
    Request,
    grant_applies,
    unmet_conditions,
    unmet_constraints,
)
from streamcrypt.message.suites import UNSIGNED
from streamcrypt.storage import TEMPORARY_PREFIX, TEMPORARY_SUFFIX, is_ours

if TYPE_CHECKING:
    from streamcrypt.stores import OpenUpload

Status = Literal["ok", "warning", "failed", "skipped"]
Cause = Literal[
    "", "identity policy", "key policy", "grant", "context", "key state", "network", "credentials"
]

# So many open uploads are shown one by one.
_SHOWN: Final = 5
CLOCK_WARNING: Final = 60.0
CLOCK_LIMIT: Final = 300.0  # SigV4 refuses a request that is five minutes off


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.  ``cause`` says where a refusal comes from, as far as that can be known."""

    name: str
    status: Status
    found: str
    mend: str = ""
    cause: Cause = ""
    code: int = 0
    """The exit code that a failure stands for."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "code"}


def exit_code(checks: Sequence[Check]) -> int:
    """0, or the code of the gravest failure: a key that cannot be used before what is temporary."""
    codes = {check.code or output.FAILED for check in checks if check.status == "failed"}
    for code in (output.NO_KEY, output.TEMPORARY, output.NOT_AUTHENTIC, output.FAILED):
        if code in codes:
            return code
    return output.DONE


# --- keys -----------------------------------------------------------------------------------------


def check_key(
    reference: str, roles: Collection[str], context: Mapping[str, str], *, first: bool = True
) -> list[Check]:
    """Everything about one key; ValueError for what is no key reference."""
    if reference.partition(":")[0] not in ("local", "aws", "arn"):
        return [_check_wrapping(reference, roles, context)]
    calls, key_id = reach_kms(reference)
    try:
        client = calls.client
    except KeyAccessError as error:
        return [Check("kms", "failed", str(error), code=output.NO_KEY)]
    checks = [_check_endpoint(calls, client)]
    described = _ask(client, "describe_key", KeyId=key_id)
    if described.temporary or described.unanswered:
        what = f"{reference}: {calls.name} gave no answer: {described.said}"
        mend = "check network, endpoint and credentials; then try again"
        temporary = described.temporary
        checks.append(
            Check("connection", "failed", what, mend, "network" if temporary else "credentials",
                  output.TEMPORARY if temporary else output.NO_KEY)
        )  # fmt: skip
        return checks
    checks.append(_check_clock(described.response))
    caller = _caller(calls, client, described)
    checks.append(
        Check(
            "identity", "ok" if caller else "skipped", caller or "not known: this KMS does not tell who calls"
        )
    )
    metadata = described.response.get("KeyMetadata") if described.code is None else None
    checks.append(_check_state(reference, key_id, described, metadata))
    if described.code not in (None, "AccessDeniedException") or (
        metadata and metadata["KeyState"] != "Enabled"
    ):
        return checks
    arn = metadata["Arn"] if metadata else key_id
    for operation in _operations(
        roles, first=first, symmetric=not metadata or metadata["KeySpec"] == "SYMMETRIC_DEFAULT"
    ):
        checks.append(_check_permission(client, operation, reference, arn, metadata, context, caller))
    for role, action, found in (
        ("sagemaker", "kms:CreateGrant", "only SageMaker itself can try it: it is for AWS resources alone"),
        ("sagemaker-output", "the artefact", "only S3 itself can try kms:GenerateDataKey and kms:Decrypt for it"),
    ):  # fmt: skip
        if role in roles:
            checks.append(Check(action, "skipped", found, f"its least policy: {_iam_policy(arn, role)}"))
    region = calls.region
    checks.append(_check_quota(region, roles))
    return checks


def _operations(roles: Collection[str], *, first: bool, symmetric: bool) -> list[str]:
    """The operations that the roles call on a key that a local:, aws: or arn: reference names."""
    operations = []
    if {"encrypt", "rekey"} & set(roles):
        operations.append("GenerateDataKey" if first else "Encrypt")
    elif "wrap" in roles:
        operations.append("Encrypt")
    if {"decrypt", "loader", "rekey"} & set(roles) or (first and {"resume", "ray"} & set(roles)):
        operations.append("Decrypt")
    return operations if symmetric else []


def _check_wrapping(reference: str, roles: Collection[str], context: Mapping[str, str]) -> Check:
    """A key without a KMS, or with one behind another form: wrap a random data key and unwrap it."""
    suite = UNSIGNED
    wraps_alone = set(roles) <= {"encrypt", "wrap"}
    try:
        data_key, wrapped = encrypting_keyring(reference).generate(suite, context)
        opened = data_key if wraps_alone else decrypting_keyring(reference).unwrap(suite, context, wrapped)
    except StreamcryptError as error:
        code = output.TEMPORARY if isinstance(error, TemporaryError) else output.NO_KEY
        mend = ""
        cause: Cause = ""
        if isinstance(error, KeyAccessError) and error.code == "AccessDeniedException":
            cause = _cause(str(error))
            # To look, doctor itself wraps before it unwraps.
            tried = "encrypt" if wraps_alone else "encrypt,decrypt"
            mend = f"attach the least policy: {_iam_policy(reference, tried, context)}"
        return Check("key", "failed", str(error), mend, cause, code)
    if opened != data_key:
        raise RuntimeError("internal error: a keyring unwrapped another data key")
    return Check("key", "ok", f"{reference}: wraps{'' if wraps_alone else ' and unwraps'}")


def _iam_policy(key: str, role: str, context: Mapping[str, str] | None = None) -> str:
    """The command that prints the least policy."""
    words = [word for name, value in (context or {}).items() for word in ("--context", f"{name}={value}")]
    return shlex.join(["streamcrypt", "iam-policy", "--key", key, "--for", role, *words])


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back: ``code`` None is success."""

    code: str | None
    said: str
    response: Mapping[str, Any]

    @property
    def unanswered(self) -> bool:
        """No KMS judged the request: no connection, or no credentials that it accepts."""
        return self.code in ("", "UnrecognizedClientException", "InvalidSignatureException", "ExpiredTokenException",
                             "MissingAuthenticationTokenException", "IncompleteSignatureException")  # fmt: skip

    @property
    def temporary(self) -> bool:
        return self.code in ("ThrottlingException", "KMSInternalException", "DependencyTimeoutException",
                             "KeyUnavailableException", "unreachable")  # fmt: skip


def _ask(client: Any, method: str, **request: Any) -> _Answer:
    try:
        response = getattr(client, method)(**request)
    except Exception as error:
        code = error_code(error)
        if code is not None:
            answer: Mapping[str, Any] = error.response  # type: ignore[attr-defined]  # error_code() saw it
            return _Answer(code, str(answer["Error"].get("Message") or code), answer)
        outcome = classify(error)
        if outcome is None:
            raise
        return _Answer("unreachable" if outcome.unreachable else "", str(error), {})
    return _Answer(None, "", response)


def _check_endpoint(calls: KmsCalls, client: Any) -> Check:
    endpoint = getattr(getattr(client, "meta", None), "endpoint_url", None)
    if endpoint is None:
        return Check("endpoint", "ok", f"{calls.name}, in this process; region {calls.region}")
    parts = urlsplit(endpoint)
    where = f"{endpoint}, region {calls.region}"
    verify = getattr(getattr(getattr(client, "_endpoint", None), "http_session", None), "_verify", True)
    if parts.scheme == "https" and verify is False:
        mend = "remove verify=False; give the server's authority in AWS_CA_BUNDLE"
        return Check("endpoint", "failed", f"{where}: certificates are not checked", mend, "network")
    if parts.scheme == "https":
        kind = "FIPS endpoint, TLS" if "-fips." in endpoint or ".fips." in endpoint else "TLS"
        return Check("endpoint", "ok", f"{where}; {kind}, certificate checked")
    return Check("endpoint", "ok", f"{where}; plain HTTP, to this machine or allowed by name")


def _check_clock(response: Mapping[str, Any], now: float | None = None) -> Check:
    date = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if date is None:
        return Check("clock", "skipped", "the KMS is in this process, or tells no time")
    seconds = datetime.now(UTC).timestamp() if now is None else now
    difference = seconds - parsedate_to_datetime(date).timestamp()
    found = f"this machine's clock differs from the KMS's by {difference:+.0f} s"
    if abs(difference) > CLOCK_LIMIT:
        return Check(
            "clock",
            "failed",
            found,
            "set the clock (chrony, systemd-timesyncd)",
            "credentials",
            output.NO_KEY,
        )
    if abs(difference) > CLOCK_WARNING:
        return Check("clock", "warning", found, "set the clock: from 5 minutes on, requests are refused")
    return Check("clock", "ok", found)


_USER: Final = re.compile(r"User: (\S+) is not authorized")
_SESSION: Final = re.compile(r"arn:([\w-]+):sts::(\d+):assumed-role/([^/]+)/.+")


def _caller(calls: KmsCalls, client: Any, described: _Answer) -> str | None:
    """The caller's ARN, where it can be known."""
    named = _USER.search(described.said)
    if named:
        return named[1]
    if not hasattr(client, "meta"):
        return ROOT.arn
    if calls.region == "local":
        return None
    try:
        import boto3

        return str(boto3.client("sts", region_name=calls.region).get_caller_identity()["Arn"])
    except Exception:  # noqa: BLE001  (STS may be out of reach where KMS is not; then the caller is unknown)
        return None


def _check_state(
    reference: str, key_id: str, described: _Answer, metadata: Mapping[str, Any] | None
) -> Check:
    if metadata is None:
        if described.code == "AccessDeniedException":
            mend = "allow kms:DescribeKey, or name the key by its ARN: decrypting with an alias needs it"
            if key_id.startswith("arn:") and ":key/" in key_id:
                return Check(
                    "key state", "warning", f"not known: {described.said}", "allow kms:DescribeKey to see it"
                )
            return Check("key state", "warning", f"not known: {described.said}", mend)
        mend = "check name, account and Region (kms list-aliases, kms list-keys)"
        return Check(
            "key state", "failed", f"{reference}: {described.said}", mend, "key state", output.NO_KEY
        )
    state, arn = metadata["KeyState"], metadata["Arn"]
    named = f"{key_id} is {arn}; " if key_id != arn else f"{arn}; "
    usable = metadata["KeySpec"] == "SYMMETRIC_DEFAULT"
    found = f"{named}{metadata['KeySpec']}, {metadata.get('KeyUsage', 'usage not told')}, {state}"
    if state == "Enabled" and usable:
        return Check("key state", "ok", found)
    where = kms_options(reference, arn.split(":")[3])
    if state == "Enabled":
        forms = {"ENCRYPT_DECRYPT": f"kms-rsa:{arn}", "KEY_AGREEMENT": f"ecdh:{arn}&recipient=FILE.pem"}
        form = forms.get(metadata.get("KeyUsage", ""))
        mend = "data keys are made by a symmetric key: streamcrypt kms create-key --alias alias/NAME" + where
        if form:
            mend = f"data keys are made by a symmetric key; this one is written {form}"
        return Check("key state", "failed", found, mend, "key state", output.NO_KEY)
    enable = f"streamcrypt kms enable-key --key-id {arn}{where}"
    cancel = f"streamcrypt kms cancel-key-deletion --key-id {arn}{where}"
    mends = {
        "Disabled": enable,
        "PendingDeletion": f"{cancel} && {enable}",
        "PendingImport": "import the key material (ImportKeyMaterial)",
    }
    if "DeletionDate" in metadata:
        found += (
            f"; it will be deleted on {metadata['DeletionDate']:%Y-%m-%d}, and what it wrapped is lost then"
        )
    mend = mends.get(state, "wait until the key is Enabled")
    return Check("key state", "failed", found, mend, "key state", output.NO_KEY)


# --- permissions ----------------------------------------------------------------------------------


def _dry_run(client: Any, operation: str, key_id: str, context: Mapping[str, str]) -> _Answer:
    request: dict[str, Any] = {"KeyId": key_id, "EncryptionContext": dict(context), "DryRun": True}
    if operation == "GenerateDataKey":
        return _ask(client, "generate_data_key", NumberOfBytes=32, **request)
    if operation == "Encrypt":
        return _ask(client, "encrypt", Plaintext=bytes(32), **request)
    return _ask(client, "decrypt", DryRunModifiers=["IGNORE_CIPHERTEXT"], **request)


def _check_permission(
    client: Any,
    operation: str,
    reference: str,
    arn: str,
    metadata: Mapping[str, Any] | None,
    context: Mapping[str, str],
    caller: str | None,
) -> Check:
    name = f"kms:{operation}"
    answer = _dry_run(client, operation, arn, context)
    if answer.code == "DryRunOperationException":
        return Check(name, "ok", f"{reference}: allowed (dry run)")
    if answer.code in (None, "InvalidCiphertextException"):
        # KMS refuses every dry run in the end, and looks at no ciphertext; what imitates it may do neither.
        made = "the call was made" if answer.code is None else "it looked at the empty ciphertext"
        return Check(name, "warning", f"{reference}: not refused, but this KMS knows no dry runs: {made}")
    if answer.temporary:
        return Check(
            name, "failed", f"{reference}: {answer.said}", "try again later", "network", output.TEMPORARY
        )
    if answer.code == "":
        # An older boto3 does not know DryRunModifiers.
        return Check(name, "skipped", f"this boto3 cannot try it: {answer.said}", "update boto3")
    if answer.code != "AccessDeniedException":
        return Check(
            name, "failed", f"{reference}: {answer.code}: {answer.said}", "", "key state", output.NO_KEY
        )
    cause, found, mend = _explain(client, operation, arn, metadata, context, caller, answer.said)
    return Check(name, "failed", f"{reference}: {answer.said}; {found}", mend, cause, output.NO_KEY)


def _explain(
    client: Any,
    operation: str,
    arn: str,
    metadata: Mapping[str, Any] | None,
    context: Mapping[str, str],
    caller: str | None,
    said: str,
) -> tuple[Cause, str, str]:
    """Where a denial comes from, what is known of it, and what mends it."""
    action = f"kms:{operation}"
    named = _USER.search(said)
    who = named[1] if named else caller or "the caller"
    principal = shlex.quote(_lasting(who) if who.startswith("arn:") else "ARN-OF-THE-CALLER")
    role = {"Decrypt": "decrypt", "Encrypt": "wrap"}.get(operation, "encrypt")
    allow = _iam_policy(arn, role, context)
    if "explicit deny" in said:
        cause: Cause = "key policy" if "resource-based" in said else "identity policy"
        return (
            cause,
            f"a Deny statement of a {cause} covers {action}",
            f"narrow that Deny so that it spares {who}",
        )
    if context and _dry_run(client, operation, arn, {}).code == "DryRunOperationException":
        pairs = ", ".join(f"{name}={value}" for name, value in context.items())
        return (
            "context",
            f"without the encryption context {pairs} it is allowed",
            "allow these pairs in the condition",
        )
    unmet, constraints, lacking = _unmet(client, operation, arn, metadata, context, who)
    if constraints:
        cause = "context" if not unmet else "grant"
        return (
            cause,
            "; ".join(constraints),
            f"use the grant's encryption context (--context), or create another one: {allow} --form grants "
            f"--principal {principal}",
        )
    if unmet:
        cause = "context" if all("kms:EncryptionContext" in reason for reason in unmet) else "key policy"
        mend = (
            "give the context that the statement asks for (--context)"
            if cause == "context"
            else "meet the condition"
        )
        return cause, f"the key policy has a condition: {'; '.join(unmet)}", mend
    if lacking:
        return (
            "grant",
            "; ".join(lacking),
            f"create a grant of {operation} as well: {allow} --form grants --principal {principal}",
        )
    if "identity-based" in said:
        found = f"the key policy leaves it to IAM, and no policy of {who} allows {action}"
        if not context:
            found += "; a policy with a condition on the encryption context reads the same without --context"
        return "identity policy", found, f"attach the least policy: {allow}"
    if "resource-based policies allow" in said:
        found = "the key is of another account: it does not exist there, or its key policy does not allow this account"
        return "key policy", found, f"its owner must allow it: {allow} --form grants --principal {principal}"
    found = f"the key policy names neither {who} nor its account, and no grant does"
    mend = (
        f"add the last statement of this to the key policy: {allow} --form key-policy --principal {principal}"
    )
    return "key policy", found, f"{mend}; or create a grant: {allow} --form grants --principal {principal}"


def _cause(said: str) -> Cause:
    """What AccessDeniedException itself says of where the refusal comes from."""
    if "identity-based policy" in said:
        return "identity policy"
    return "key policy" if "resource-based polic" in said else ""


def _lasting(arn: str) -> str:
    """The role of a session, which will have another name tomorrow; any other caller itself."""
    session = _SESSION.fullmatch(arn)
    return f"arn:{session[1]}:iam::{session[2]}:role/{session[3]}" if session else arn


def _unmet(
    client: Any,
    operation: str,
    arn: str,
    metadata: Mapping[str, Any] | None,
    context: Mapping[str, str],
    caller: str,
) -> tuple[list[str], list[str], list[str]]:
    """What fails, where the caller may read it: conditions of the key policy, constraints of grants, and
    grants that list other operations only."""
    if not caller.startswith("arn:"):
        return [], [], []
    spec, usage = (
        (metadata["KeySpec"], metadata.get("KeyUsage", "ENCRYPT_DECRYPT"))
        if metadata
        else ("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT")
    )
    request = Request(
        Caller(caller),
        f"kms:{operation}",
        KeyFacts(arn, spec=spec, usage=usage, origin=metadata["Origin"] if metadata else "AWS_KMS"),
        encryption_context=context,
        conditions={"kms:EncryptionAlgorithm": "SYMMETRIC_DEFAULT"},
    )
    policy = _ask(client, "get_key_policy", KeyId=arn, PolicyName="default")
    unmet = []
    if policy.code is None:
        try:
            unmet = unmet_conditions(request, policy.response["Policy"])
        except Exception as error:
            if error_code(error) is None:  # a grammar of AWS's that we do not know is no finding
                raise
    listed = _ask(client, "list_grants", KeyId=arn)
    grants = [_grant(entry) for entry in listed.response.get("Grants", ())] if listed.code is None else []
    lacking = [
        f"grant {grant.grant_id[:12]}… allows {', '.join(sorted(grant.operations))}, and not {operation}"
        for grant in grants
        if operation not in grant.operations
        and grant_applies(grant._replace(operations=grant.operations | {operation}), request)
    ]
    return unmet, unmet_constraints(request, grants), lacking


def _grant(entry: Mapping[str, Any]) -> Grant:
    constraints = entry.get("Constraints", {})
    return Grant(
        entry["GrantId"],
        entry.get("GranteePrincipal", ""),
        frozenset(entry["Operations"]),
        equals=constraints.get("EncryptionContextEquals"),
        subset=constraints.get("EncryptionContextSubset"),
    )


def _check_quota(region: str, roles: Collection[str]) -> Check:
    operation = "GenerateDataKey" if {"encrypt", "rekey"} & set(roles) else "Decrypt"
    found = cost.quota(operation, region=region)
    if region == "local":
        return Check("quota", "ok", "the embedded KMS has none")
    return Check(
        "quota", "ok",
        f"{operation}: {found.per_second:,.0f}/s by default for the account in {region} ({cost.QUOTAS_DATE}), shared "
        "with every AWS service there; the account's own value is in Service Quotas",
    )  # fmt: skip


def check_signing(reference: str) -> Check:
    """Whether a key can sign manifests: its kind, and kms:GetPublicKey and kms:Sign by a dry run."""
    from streamcrypt.keys.signing import SigningKey

    key = SigningKey(reference)
    try:
        key.prepare()
    except StreamcryptError as error:
        code = output.TEMPORARY if isinstance(error, TemporaryError) else output.NO_KEY
        action = (
            f"kms:{error.operation}" if isinstance(error, KeyAccessError) and error.operation else "kms:Sign"
        )
        denied = isinstance(error, KeyAccessError) and error.code == "AccessDeniedException"
        # By its ARN where that is known: who is denied may not look it up.
        named = shlex.quote(key.arn or reference)
        mend = f"attach the least policy: streamcrypt iam-policy --sign-manifest {named}" if denied else ""
        return Check(action, "failed", str(error), mend, _cause(str(error)) if denied else "", code)
    return Check("kms:Sign", "ok", f"{reference}: signs by {key.algorithm} (dry run)")


# --- a request to SageMaker -----------------------------------------------------------------------


def check_training_job(path: Path) -> list[Check]:
    """The CreateTrainingJob request in a JSON file; ValueError when there is none."""
    from streamcrypt.sagemaker import check_training_job

    try:
        request = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a request in JSON ({error})") from error
    if not isinstance(request, dict):
        raise ValueError(f"{path}: not a request in JSON")
    found = check_training_job(request)
    if not found:
        return [Check("training job", "ok", "output, volume and traffic between containers are encrypted")]
    return [
        Check("training job", finding.status, f"{finding.field}: {finding.found}", finding.mend)
        for finding in found
    ]


# --- the official SDK -----------------------------------------------------------------------------


def check_interop(reference: str, context: Mapping[str, str]) -> Check:
    """Write a message and let the installed AWS Encryption SDK open it, and the other way round."""
    name = "interop"
    try:
        # The SDK ships no types.
        import aws_encryption_sdk
        from aws_cryptographic_material_providers.mpl import AwsCryptographicMaterialProviders  # type: ignore[import-untyped]
        from aws_cryptographic_material_providers.mpl.config import MaterialProvidersConfig  # type: ignore[import-untyped]
        from aws_cryptographic_material_providers.mpl.models import CreateAwsKmsKeyringInput  # type: ignore[import-untyped]
    except ImportError as error:
        mend = "pip install 'aws-encryption-sdk[MPL]'"
        return Check(name, "skipped", f"the AWS Encryption SDK is not installed ({error.name})", mend)
    if reference.partition(":")[0] not in ("local", "aws", "arn"):
        return Check(name, "skipped", f"{reference}: only keys of a KMS are tried with the SDK")
    plaintext = os.urandom(70_000)
    try:
        ours = api.encrypt_bytes(plaintext, keys=reference, context=context, frame_size=4096)
        calls, key_id = reach_kms(reference)
        arn = calls.call("DescribeKey", reference, KeyId=key_id)["KeyMetadata"]["Arn"]
        client = calls.client if hasattr(calls.client, "meta") else kms_client("local")
        sdk = aws_encryption_sdk.EncryptionSDKClient()
        providers = AwsCryptographicMaterialProviders(config=MaterialProvidersConfig())
        keyring = providers.create_aws_kms_keyring(
            CreateAwsKmsKeyringInput(kms_key_id=arn, kms_client=client)
        )
        opened, header = sdk.decrypt(source=ours, keyring=keyring)
        theirs, _ = sdk.encrypt(source=plaintext, keyring=keyring, encryption_context=dict(context))
        read = api.decrypt_bytes(theirs, keys=reference, context=context)
    except StreamcryptError as error:
        code = output.TEMPORARY if isinstance(error, TemporaryError) else output.NO_KEY
        return Check(
            name, "failed", str(error), code=code if isinstance(error, KeyAccessError) else output.FAILED
        )
    except Exception as error:  # noqa: BLE001  (whatever the other implementation raises is the finding)
        return Check(
            name, "failed", f"the AWS Encryption SDK refused the message: {type(error).__name__}: {error}"
        )
    stored = {pair: header.encryption_context.get(pair) for pair in context}
    if opened != plaintext or read != plaintext or stored != dict(context):
        return Check(name, "failed", "the AWS Encryption SDK read another plaintext or context")
    version = getattr(aws_encryption_sdk, "__version__", None) or aws_encryption_sdk.identifiers.__version__
    return Check(
        name, "ok", f"aws-encryption-sdk {version} opens what streamcrypt writes, and the other way round"
    )


# --- cache, leaks, leftovers ----------------------------------------------------------------------


def check_cache(
    source: Path | None, *, max_age: float, max_messages: int, max_bytes: int, enabled: bool = True
) -> list[Check]:
    """Settings with which no data key is ever used twice."""
    if not enabled:
        return [Check("cache", "ok", "off: one KMS call for every message")]
    if max_messages == 1:
        return [
            Check("cache", "warning", "a data key may serve 1 message: every file takes a KMS call",
                  "raise --cache-max-messages, or say --no-cache if that is meant")
        ]  # fmt: skip
    if max_age < 1:
        return [
            Check("cache", "warning", f"a data key is dropped after {max_age:g} s, often before the next file begins",
                  "raise --cache-max-age")
        ]  # fmt: skip
    if source is None:
        return [Check("cache", "ok", "the settings let data keys be reused")]
    sizes = [path.stat().st_size for path in _files(source)]
    too_large = sum(size * 2 > max_bytes for size in sizes)
    if sizes and too_large:
        found = f"{too_large} of {len(sizes)} files are over half of --cache-max-bytes: no two of them share a data key"
        return [Check("cache", "warning", found, f"raise --cache-max-bytes to {2 * max(sizes)}")]
    return [Check("cache", "ok", f"{len(sizes)} files may share data keys")]


_CACHING: Final = frozenset({"filecache", "simplecache", "blockcache", "cached"})


def check_plaintext_leaks(urls: Sequence[str] = ()) -> list[Check]:
    """Places where plaintext or keys would come to lie on a disk."""
    checks = []
    for url in urls:
        chain = [part.partition("://")[0] for part in url.split("::")]
        if "crypt" in chain and _CACHING & set(chain[: chain.index("crypt")]):
            inner = "::".join(part for part in url.split("::") if part.partition("://")[0] not in _CACHING)
            cache = next(part for part in chain if part in _CACHING)
            mend = f"put the cache below crypt: {inner.replace('crypt::', f'crypt::{cache}::', 1)}"
            checks.append(
                Check("plaintext leak", "failed", f"{url}: {cache} keeps decrypted files on disk", mend)
            )
    for place, cache in _configured_caches():
        checks.append(
            Check("plaintext leak", "failed", f"{place}: {cache} is set to cache what crypt decrypts",
                  "set crypt's target_protocol to the cache instead")
        )  # fmt: skip
    datasets = os.environ.get("HF_DATASETS_CACHE")
    if datasets:
        checks.append(
            Check("plaintext leak", "warning", f"HF_DATASETS_CACHE={datasets}: load_dataset writes plaintext there",
                  "load with streaming=True, or put that folder on an encrypted or in-memory file system")
        )  # fmt: skip
    limit = _core_limit()
    if limit:
        checks.append(
            Check("plaintext leak", "warning", "a crash would write a core file with keys and plaintext",
                  "ulimit -c 0")
        )  # fmt: skip
    return checks or [Check("plaintext leak", "ok", "no cache outside crypt, no core files")]


def _configured_caches() -> list[tuple[str, str]]:
    """fsspec configuration files in which a cache stands over crypt."""
    folder = Path(os.environ.get("FSSPEC_CONFIG_DIR", Path.home() / ".config" / "fsspec"))
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            settings = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # fsspec will say so itself
        if not isinstance(settings, dict):
            continue
        for protocol, options in settings.items():
            if (
                protocol in _CACHING
                and isinstance(options, dict)
                and options.get("target_protocol") == "crypt"
            ):
                found.append((str(path), protocol))
    return found


def _core_limit() -> int:
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrlimit(resource.RLIMIT_CORE)[0]


def check_leftovers(source: Path) -> Check:
    """Temporary files that a killed job left."""
    left = [path for path in _files(source, ours=True) if _is_temporary(path)]
    if not left:
        return Check("leftovers", "ok", f"{source}: none")
    size = sum(path.stat().st_size for path in left)
    found = f"{source}: {len(left)} temporary files of jobs that were killed or still run, {size:,} bytes ({left[0]} …)"
    return Check(
        "leftovers", "warning", found, "when no job runs: run the job again, it removes them; or delete them"
    )


def check_uploads(url: str) -> Check:
    """Multipart uploads below a place in a store that no one completed: whose, since when, and how to abort them."""
    from streamcrypt.stores import StoreTree

    tree = StoreTree(url)
    try:
        uploads = list(tree.open_uploads())
        interrupted = is_interrupted(tree)
    except StreamcryptError as error:
        code, mend = (
            output.FAILED,
            "mend the store's settings: docs/object-stores.md says where they come from",
        )
        if isinstance(error, TemporaryError):
            code, mend = output.TEMPORARY, "try again when the store can be reached"
        elif "denied access" in str(error):
            mend = "allow s3:ListBucketMultipartUploads and s3:ListBucket"
        return Check("leftovers", "failed", str(error), mend, code=code)
    journal = "; the journal of a job that did not finish, or still runs" if interrupted else ""
    if not uploads:
        return Check("leftovers", "ok" if not interrupted else "warning", f"{url}: no open uploads{journal}",
                     "when no job runs: the same command with --resume goes on" if interrupted else "")  # fmt: skip
    ours = [upload for upload in uploads if upload.writer is not None]
    found = f"{url}: {len(uploads)} open multipart uploads, {len(ours)} of streamcrypt{journal}"
    for upload in uploads[:_SHOWN]:
        found += (
            f"; {upload.path} of {_whose(upload)}, begun {upload.begun:%Y-%m-%d %H:%M}, id {upload.upload_id}"
        )
    bucket, _, key = uploads[0].path.removeprefix("s3://").partition("/")
    mend = (
        "when no job runs: run the job again with --resume, it aborts its own; or one by one, "
        f"aws s3api abort-multipart-upload --bucket {bucket} --key {shlex.quote(key)} "
        f"--upload-id {uploads[0].upload_id}"
    )
    return Check("leftovers", "warning", found, mend)


def _whose(upload: OpenUpload) -> str:
    if upload.writer is None:
        return "somebody else"
    return f"a process of {upload.writer.host.partition(' ')[0]}{' that has ended' if upload.ended else ''}"


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(TEMPORARY_PREFIX) and path.name.endswith(TEMPORARY_SUFFIX)


def _files(source: Path, *, ours: bool = False) -> list[Path]:
    if source.is_file():
        return [source]
    found = [path for path in source.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(path for path in found if ours or not is_ours(str(path.relative_to(source))))
