"""doctor and iam-policy: what is missing, and the least policy that mends it.

``add_advice_commands`` gives the parser these commands; each sets ``run``, which takes the parsed
arguments and returns the exit code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from streamcrypt.cli import diagnosis, output, permissions
from streamcrypt.cli.permissions import BranchKeyRows, KeyUse
from streamcrypt.keys.kms import KeyArn
from streamcrypt.keys.reference import reach_kms
from streamcrypt.storage import is_store_url


def add_advice_commands(subparsers: Any) -> None:
    """Add doctor and iam-policy to an argparse sub-parser collection."""
    _add_doctor(subparsers)
    _add_iam_policy(subparsers)


def _roles(text: str) -> list[str]:
    roles = [role.strip() for role in text.split(",")]
    unknown = [role for role in roles if role not in permissions.ROLES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(permissions.ROLES)}")
    return roles


class _Roles(argparse._AppendAction):
    """Roles of one word or of several; the first takes the place of the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = None
    ) -> None:
        before = getattr(namespace, self.dest)
        roles = values if before is self.default else [*before, *values]
        setattr(namespace, self.dest, list(dict.fromkeys(roles)))


# --- iam-policy -----------------------------------------------------------------------------------


def _add_iam_policy(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "iam-policy",
        help="the least policy for a job",
        description="Print the least identity policy, key policy or grants for a job.  Nothing is changed; an alias "
        "or key ID is looked up (DescribeKey).  "
        "Example: streamcrypt iam-policy --key arn:aws:kms:… --for loader --context Project=CustomerChurn",
    )
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="REF",
        help="the job's keys: the first makes data keys",
    )
    parser.add_argument(
        "--from-key",
        action="append",
        default=[],
        metavar="REF",
        help="rekey: the keys that open the old messages",
    )
    parser.add_argument("--key-map", metavar="FILE", help="keys by partition, as for encrypt")
    for name, what in (("source", "reads"), ("destination", "writes")):
        parser.add_argument(
            f"--{name}", metavar="s3://…", help=f"what the job {what} on S3; a folder's URL ends in /"
        )
    parser.add_argument(
        "--sign-manifest",
        metavar="REF",
        help="the key that signs the dataset's manifest",
    )
    parser.add_argument(
        "--for",
        dest="roles",
        action=_Roles,
        type=_roles,
        default=["encrypt", "decrypt"],
        metavar="ROLE,…",
        help=f"what the role does: {', '.join(permissions.ROLES)} (default encrypt,decrypt)",
    )
    parser.add_argument(
        "--context",
        action="append",
        type=output.PAIR,
        default=[],
        metavar="NAME=VALUE",
        help="allow only with this pair in the encryption context",
    )
    parser.add_argument("--exact-context", action="store_true", help="and with no other pair")
    parser.add_argument(
        "--via-service",
        action="append",
        default=[],
        metavar="SERVICE.REGION.amazonaws.com",
        help="allow only through this AWS service (s3.us-east-1.amazonaws.com)",
    )
    parser.add_argument(
        "--form",
        choices=["identity", "key-policy", "grants"],
        default="identity",
        help="an identity policy (default), the policy of the key, or CreateGrant requests",
    )
    parser.add_argument("--principal", metavar="ARN", help="the role, for --form key-policy and grants")
    output.add_common(parser)
    parser.set_defaults(run=_iam_policy)


def _iam_policy(arguments: argparse.Namespace) -> int:
    context = dict(arguments.context)
    if not (arguments.key or arguments.sign_manifest):
        raise output.UsageError("iam-policy: name the job's keys: --key REF, or --sign-manifest REF")
    try:
        keys = [_key_use(reference) for reference in arguments.key]
        partitions = _partitions(arguments.key_map) if arguments.key_map else []
        from_keys = [_key_use(reference) for reference in arguments.from_key]
        signing_key = (
            KeyUse(_arn_of(arguments.sign_manifest), kind="signing") if arguments.sign_manifest else None
        )
        if arguments.exact_context and not context:
            raise ValueError("--exact-context needs --context")
        if from_keys and "rekey" not in arguments.roles:
            raise ValueError("--from-key belongs to --for rekey")
        if arguments.form != "identity" and not arguments.principal:
            raise ValueError(f"--form {arguments.form} needs --principal")
        by_service = {"sagemaker", "sagemaker-output"} & set(arguments.roles)
        if arguments.form == "grants" and (by_service or arguments.via_service):
            raise ValueError(
                "a grant has no conditions on services; use a policy for sagemaker, sagemaker-output and "
                "--via-service"
            )
        # The keys of each partition stand for those of the job: the first of them makes data keys.
        needed: list[permissions.Permission] = []
        for group in (keys, *partitions):
            found = permissions.permissions(
                arguments.roles,
                group,
                from_keys,
                signing_key=signing_key,
                context=context,
                exact_context=arguments.exact_context,
            )
            needed += [permission for permission in found if permission not in needed]
        if arguments.source or arguments.destination:
            if arguments.form != "identity":
                raise ValueError("--source and --destination are about S3; they go with --form identity")
            partition = next((key.arn.split(":")[1] for key in keys), "aws")
            needed += _of_places(arguments, partition)
        of_kms = [permission for permission in needed if permission.action.startswith("kms:")]
        document: Any
        if arguments.form == "grants":
            document = permissions.grants(of_kms, arguments.principal)
        elif arguments.form == "key-policy":
            arns = {permission.resource for permission in of_kms}
            if len(arns) != 1:
                raise ValueError("a key policy belongs to one key; name one --key at a time")
            made = permissions.statements(of_kms, via_service=arguments.via_service)
            document = permissions.key_policy(made, arguments.principal, KeyArn.parse(arns.pop()).account)
        else:
            document = permissions.identity_policy(
                permissions.statements(needed, via_service=arguments.via_service)
            )
    except ValueError as error:
        raise output.UsageError(f"iam-policy: {error}") from error
    if arguments.json:
        actions = permissions.actions_by_resource(needed)
        output.out(
            json.dumps(
                {"form": arguments.form, "roles": arguments.roles, "actions": actions, "document": document}
            )
        )
    else:
        output.out(json.dumps(document, indent=2))
    if arguments.quiet:
        return 0
    if arguments.form != "identity" and len(of_kms) < len(needed):
        output.say(
            "streamcrypt: the table of the branch key is no matter of KMS; allow it by --form identity"
        )
    if not context and any(key.kind == "kms" for key in (*keys, *from_keys)):
        hint = "no --context: the role may use these keys for every dataset; name the pairs of this one to narrow it"
        output.say(f"streamcrypt: {hint}")
    return 0


def _of_places(arguments: argparse.Namespace, partition: str) -> list[permissions.Permission]:
    needed = []
    if arguments.source:
        needed += permissions.of_source(arguments.source, partition)
    if arguments.destination:
        signed = arguments.sign_manifest is not None
        needed += permissions.of_destination(arguments.destination, partition, signed=signed)
    return needed


def _partitions(path: str) -> list[list[KeyUse]]:
    """The keys of each pattern of a key map that has any."""
    from streamcrypt.keys.partition import read_key_map

    made = []
    for given in read_key_map(path).values():
        references = [given] if isinstance(given, str) else list(cast("Sequence[str]", given))
        if references:
            made.append([_key_use(reference) for reference in references])
    return made


def _key_use(reference: str) -> KeyUse:
    """What a reference needs of its KMS; ValueError where no KMS is concerned."""
    kind, _, rest = reference.partition(":")
    if kind == "kms-rsa":
        key, at, _ = rest.partition("?")[0].partition("@")
        return KeyUse(
            _arn_of(key), _is_key_arn(key.removeprefix("local:")), "kms-rsa", public_key_known=bool(at)
        )
    if kind == "ecdh":
        key = rest.partition("&")[0]
        if key.partition(":")[0] not in ("local", "aws", "arn"):
            raise ValueError(f"{reference}: a key in a file needs no policy")
        return KeyUse(_arn_of(key), kind="ecdh")
    if kind == "hierarchy":
        return _branch_key_use(reference, rest)
    if kind not in ("local", "aws", "arn"):
        raise ValueError(f"{reference}: only keys of a KMS have policies; write a local:, aws: or arn: key")
    return KeyUse(_arn_of(reference), by_arn=_is_key_arn(reference.partition("@")[0].removeprefix("local:")))


def _branch_key_use(reference: str, rest: str) -> KeyUse:
    """A hierarchy: key: the KMS key behind it, and where its branch key lies."""
    branch_key_id, _, place = rest.partition("@")
    where, _, query = place.partition("?")
    options = dict(option.partition("=")[::2] for option in query.split("&"))
    if not options.get("kms"):
        more = f"{reference}{'&' if query else '?'}kms=KEY-ARN"
        raise ValueError(f"{reference}: name the KMS key that wraps the branch key: {more}")
    arn = KeyArn.parse(options["kms"])
    table = where.partition("dynamodb:")[2]
    table_arn = table
    if table and not table.startswith("arn:"):
        region = options.get("region") or arn.region
        table_arn = f"arn:{arn.partition}:dynamodb:{region}:{arn.account}:table/{table}"
    logical_name = options.get("logical") or table or "streamcrypt"
    rows = BranchKeyRows(branch_key_id, logical_name, table_arn)
    return KeyUse(options["kms"], kind="hierarchy", branch_key=rows)


def _is_key_arn(text: str) -> bool:
    return text.startswith("arn:") and KeyArn.parse(text).kind == "key"


def _arn_of(reference: str) -> str:
    text = reference.partition("@")[0].partition("?")[0].removeprefix("local:").removeprefix("aws:")
    if _is_key_arn(text):
        return text
    calls, key_id = reach_kms(reference)
    return str(calls.call("DescribeKey", reference, KeyId=key_id)["KeyMetadata"]["Arn"])


# --- doctor ---------------------------------------------------------------------------------------


def _add_doctor(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="find which permission or setting is missing",
        description="Check keys, permissions (by dry runs), endpoint, clock, cache settings, leaks and leftovers.  "
        "Example: streamcrypt doctor --key local:alias/ml --context Project=CustomerChurn --interop",
    )
    parser.add_argument("--key", action="append", default=[], metavar="REF", help="the job's keys")
    parser.add_argument("--sign-manifest", metavar="REF", help="the key that signs the manifest")
    parser.add_argument(
        "--training-job", type=Path, metavar="FILE", help="a CreateTrainingJob request of SageMaker, in JSON"
    )
    parser.add_argument(
        "--for",
        dest="roles",
        action=_Roles,
        type=_roles,
        default=["encrypt", "decrypt"],
        metavar="ROLE,…",
        help=f"what the job does: {', '.join(permissions.ROLES)} (default encrypt,decrypt)",
    )
    parser.add_argument(
        "--context",
        action="append",
        type=output.PAIR,
        default=[],
        metavar="NAME=VALUE",
        help="encryption context",
    )
    parser.add_argument(
        "--source",
        type=output.PLACE,
        help="a dataset, in a folder or a store: looks for leftovers, and for what defeats the cache",
    )
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        help="an fsspec URL that is read: looks for caches that keep plaintext",
    )
    parser.add_argument(
        "--cache-max-age", type=output.DURATION, default=300.0, metavar="DURATION", help="as for encrypt"
    )
    parser.add_argument(
        "--cache-max-messages", type=output.COUNT, default=100_000, metavar="N", help="as for encrypt"
    )
    parser.add_argument(
        "--cache-max-bytes", type=output.SIZE, default=2**40, metavar="SIZE", help="as for encrypt"
    )
    parser.add_argument("--no-cache", action="store_true", help="as for encrypt")
    parser.add_argument(
        "--interop",
        action="store_true",
        help="write a message and open it with the installed AWS Encryption SDK",
    )
    output.add_common(parser)
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    if not (
        arguments.key
        or arguments.sign_manifest
        or arguments.source
        or arguments.url
        or arguments.training_job
    ):
        raise output.UsageError("doctor: nothing to look at; give --key, --source, --url or --training-job")
    context = dict(arguments.context)
    checks: list[diagnosis.Check] = []
    try:
        for number, reference in enumerate(arguments.key):
            checks += diagnosis.check_key(reference, arguments.roles, context, first=number == 0)
            if arguments.interop:
                checks.append(diagnosis.check_interop(reference, context))
        if arguments.sign_manifest:
            checks.append(diagnosis.check_signing(arguments.sign_manifest))
        if arguments.training_job:
            checks += diagnosis.check_training_job(arguments.training_job)
    except ValueError as error:
        raise output.UsageError(f"doctor: {error}") from error
    in_a_store = arguments.source is not None and is_store_url(arguments.source)
    folder = None if arguments.source is None or in_a_store else Path(arguments.source)
    checks += diagnosis.check_cache(
        folder,
        max_age=arguments.cache_max_age,
        max_messages=arguments.cache_max_messages,
        max_bytes=arguments.cache_max_bytes,
        enabled=not arguments.no_cache,
    )
    checks += diagnosis.check_plaintext_leaks(arguments.url)
    if in_a_store:
        checks.append(diagnosis.check_uploads(arguments.source))
    if folder is not None:
        checks.append(diagnosis.check_leftovers(folder))
    code = diagnosis.exit_code(checks)
    if arguments.json:
        output.out(
            json.dumps({"ok": code == 0, "exit_code": code, "checks": [check.to_json() for check in checks]})
        )
    else:
        _print_checks(checks, quiet=arguments.quiet)
    return code


def _print_checks(checks: Sequence[diagnosis.Check], *, quiet: bool) -> None:
    for check in checks:
        if quiet and check.status in ("ok", "skipped"):
            continue
        output.out(f"{check.status:8} {check.name}: {check.found}")
        if check.mend:
            output.out(f"{'':8} -> {check.mend}")
