"""``streamcrypt kms …``: KMS's operations by the AWS CLI's names and options, out of one table.

The table is KMS's own service model: an operation is a command (``GenerateDataKey``:
``generate-data-key``), a member an option (``KeyId``: ``--key-id``), a shape the way its words
are read.  Beside it stand the commands of the embedded KMS itself: serve, env, audit, cost,
backup, restore.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from streamcrypt.cli.output import COUNT, INTERRUPTED, UsageError
from streamcrypt.errors import (
    IntegrityError,
    KeyAccessError,
    KeyUnavailableError,
    SourceError,
    StreamcryptError,
)
from streamcrypt.kms import shapes
from streamcrypt.kms.errors import KmsError
from streamcrypt.units import parse_duration

# Operations with a line of help of their own; the rest of the model is there as well.
_HELP: Final = {
    "CancelKeyDeletion": "take back a scheduled deletion; the key is then disabled",
    "CreateAlias": "give a key a name",
    "CreateGrant": "let a principal use a key for some operations",
    "CreateKey": "make a key; --alias names it at once",
    "Decrypt": "decrypt a ciphertext blob",
    "DeleteAlias": "remove a name of a key",
    "DeriveSharedSecret": "agree on a secret with another public key",
    "DescribeKey": "everything about a key",
    "DisableKey": "stop a key from being used",
    "DisableKeyRotation": "stop automatic rotation",
    "EnableKey": "let a disabled key be used again",
    "EnableKeyRotation": "rotate a key automatically",
    "Encrypt": "encrypt up to 4096 bytes",
    "GenerateDataKey": "a data key, in clear and encrypted",
    "GetKeyPolicy": "the policy of a key",
    "GetPublicKey": "the public half of an asymmetric key",
    "ListAliases": "the names of keys",
    "ListGrants": "the grants on a key",
    "ListKeys": "the keys of the account",
    "PutKeyPolicy": "replace the policy of a key",
    "ReEncrypt": "decrypt and encrypt again, without showing the plaintext",
    "RevokeGrant": "take back a grant",
    "RotateKeyOnDemand": "give a key new material now",
    "ScheduleKeyDeletion": "delete a key after 7 to 30 days",
    "Sign": "sign a message or a digest",
    "UpdateAlias": "point a name to another key",
    "Verify": "verify a signature",
}
# Custom key stores live in CloudHSM or outside AWS; there is nothing of them here.
_LEFT_OUT: Final = re.compile(r"CustomKeyStore")
_BLOBS_OF_TEXT: Final = ("file://", "fileb://")

# The caller's own mistakes: not a key that could not be used.
_BAD_REQUESTS: Final = frozenset(
    {
        "AlreadyExistsException", "DryRunOperationException", "InvalidAliasNameException",
        "InvalidMarkerException", "LimitExceededException", "MalformedPolicyDocumentException",
        "SerializationException", "TagException", "UnknownOperationException",
        "UnsupportedOperationException", "ValidationException",
    }
)  # fmt: skip


def add_kms_commands(subparsers: Any) -> None:
    """Register ``kms`` and its commands; each sets ``run``, which takes the arguments and gives the exit code."""
    parser = subparsers.add_parser(
        "kms",
        help="keys of the embedded KMS, or of AWS KMS, by the AWS CLI's names",
        description="KMS by the AWS CLI's names and options, on the embedded KMS or (--kms aws) on AWS KMS.",
        epilog="example: streamcrypt kms create-key --alias alias/ml --description 'KMS key for ML models'",
    )
    commands = parser.add_subparsers(dest="kms_command", metavar="COMMAND", required=True)
    for name in shapes.operations():
        if not _LEFT_OUT.search(name):
            _add_operation(commands, name)
    _add_branch_keys(commands)
    _add_serve(commands)
    _add_env(commands)
    _add_audit(commands)
    _add_cost(commands)
    _add_backup(commands)
    _add_restore(commands)


# -- one command for one operation ---------------------------------------------------------------


def _add_operation(commands: Any, name: str) -> None:
    operation = shapes.operations()[name]
    command = _kebab(name)
    required = " ".join(f"--{_kebab(m)} …" for m, shape in operation.options.items() if shape.required)
    parser = commands.add_parser(
        command,
        help=_HELP.get(name, f"KMS {name}"),
        description=f"KMS {name}: {_HELP.get(name, 'see the KMS API reference')}.",
        epilog=f"example: streamcrypt kms {command} {required}".rstrip(),
    )
    for member, shape in operation.options.items():
        _add_option(parser, member, shape)
    parser.add_argument(
        "--cli-input-json",
        action=_WholeRequest,
        metavar="JSON",
        help="the request as JSON, or file://FILE; options beside it win",
    )
    if "Marker" in operation.options:
        parser.add_argument(
            "--no-paginate",
            dest="paginate",
            action="store_false",
            help="only the first page, as also with --limit and --marker",
        )
        group = parser.add_argument_group("a part of the list, as the AWS CLI cuts it")
        group.add_argument(
            "--max-items",
            type=COUNT,
            metavar="N",
            help="so many at most; NextToken says where the rest begins",
        )
        group.add_argument("--starting-token", metavar="TOKEN", help="go on where this NextToken says")
        group.add_argument("--page-size", type=COUNT, metavar="N", help="ask for so many at a time")
    if name == "CreateKey":
        parser.add_argument("--alias", metavar="alias/NAME", help="also make this alias for the new key")
    parser.add_argument(
        "--kms",
        default="local",
        metavar="KMS",
        help="local (default), local@http://HOST:PORT, or aws",
    )
    parser.add_argument("--region", help="the Region to ask (default: local, or AWS's configuration)")
    parser.add_argument("--output", choices=("json", "text"), default="json", help="default: json")
    parser.add_argument("--query", metavar="JMESPATH", help="print only this part of the answer")
    parser.add_argument(
        "--cli-binary-format",
        choices=("base64", "raw-in-base64-out"),
        default="base64",
        help="how blobs on the command line are read (fileb://FILE is always its bytes; default: base64)",
    )
    _add_common(parser)
    parser.set_defaults(run=_run_operation, operation=name)


class _WholeRequest(argparse.Action):
    """A request in one piece: what must be given may stand there."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = None
    ) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            action.required = False


def _add_option(parser: argparse.ArgumentParser, member: str, shape: shapes.Option) -> None:
    flag = f"--{_kebab(member)}"
    kind = shape.kind
    if kind == "boolean":
        parser.add_argument(
            flag, dest=member, action=argparse.BooleanOptionalAction, required=shape.required, help=member
        )
        return
    options: dict[str, Any] = {"dest": member, "required": shape.required}
    if kind == "list":
        options |= {"nargs": "+", "metavar": "NAME=VALUE,…" if shape.of == "structure" else "VALUE"}
    elif kind == "blob":
        options["metavar"] = "fileb://FILE"
    elif kind in ("map", "structure"):
        options["metavar"] = "NAME=VALUE,…"
    else:
        options["metavar"] = {"integer": "N", "timestamp": "TIME"}.get(kind, "TEXT")
    words = {
        "blob": "bytes: fileb://FILE, or Base64",
        "map": "pairs NAME=VALUE,…, or JSON",
        "structure": "members NAME=VALUE,…, or JSON",
        "timestamp": "a time in ISO 8601 or Unix seconds",
    }
    text = words.get(kind, member)
    if shape.choices:
        text = f"one of {', '.join(shape.choices)}"
    parser.add_argument(flag, help=text, **options)


def _kebab(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def _run_operation(args: argparse.Namespace) -> int:
    name: str = args.operation
    request = _whole_request(name, args.cli_input_json) if args.cli_input_json is not None else {}
    for member, shape in shapes.operations()[name].options.items():
        given = getattr(args, member)
        if given is not None:
            request[member] = _value(member, shape, given, raw=args.cli_binary_format != "base64")
    try:
        shapes.operations()[name].validate(request)
    except TypeError as error:
        raise UsageError(f"kms {_kebab(name)}: {error}") from error
    except KmsError:
        pass  # for the KMS to say
    call = _caller(args)
    if any(
        getattr(args, option, None) is not None for option in ("max_items", "page_size", "starting_token")
    ):
        response = _part_of_list(call, name, request, args)
    else:
        whole = getattr(args, "paginate", False) and not {"Marker", "Limit"} & request.keys()
        response = _every_page(call, name, request) if whole else call(name, request)
    if getattr(args, "alias", None):
        key_id = response["KeyMetadata"]["KeyId"]
        try:
            call("CreateAlias", {"AliasName": args.alias, "TargetKeyId": key_id})
        except StreamcryptError as error:
            left = "but not its alias"
            with contextlib.suppress(StreamcryptError):  # nobody would look for a key without a name
                call("ScheduleKeyDeletion", {"KeyId": key_id, "PendingWindowInDays": 7})
                left = "and is scheduled for deletion, since its alias was not"
            raise type(error)(f"key {key_id} was made, {left}: {error}") from error
    if name == "CreateKey" and args.kms == "local" and not args.quiet:
        _remind_of_backup()
    _print_response(response, args)
    return 0


def _whole_request(name: str, text: str) -> dict[str, Any]:
    option, operation = "--cli-input-json", shapes.operations()[name]
    given = _json(option, _file_text(option, text))
    if not isinstance(given, dict):
        raise UsageError(f"{option}: not a JSON object")
    try:
        request: dict[str, Any] = operation.read(given)
    except KmsError as error:
        raise UsageError(f"{option}: a member is of another type; bytes are Base64, times seconds") from error
    if unknown := next(_left_out(given, request), None):
        raise UsageError(f"{option}: {name} has no member {unknown}")
    return request


def _left_out(given: Any, read: Any) -> Iterator[str]:
    """The members that a shape's reader, which takes what it knows, has passed over."""
    if isinstance(given, dict):
        for name, value in given.items():
            if name in read:
                yield from (f"{name}.{inner}" for inner in _left_out(value, read[name]))
            elif value is not None:
                yield name
    elif isinstance(given, list):
        for one, other in zip(given, read, strict=True):
            yield from _left_out(one, other)


def _every_page(
    call: Callable[[str, dict[str, Any]], dict[str, Any]], name: str, request: dict[str, Any]
) -> dict[str, Any]:
    """A whole list, as the AWS CLI gives it."""
    page = call(name, request)
    whole = dict(page)
    while page.get("Truncated"):
        page = call(name, {**request, "Marker": page["NextMarker"]})
        whole |= {member: whole[member] + found for member, found in page.items() if isinstance(found, list)}
    return {member: found for member, found in whole.items() if member not in ("Truncated", "NextMarker")}


def _part_of_list(
    call: Callable[[str, dict[str, Any]], dict[str, Any]],
    name: str,
    request: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """A list as the AWS CLI cuts it; its token is the CLI's own: a marker, and how much of that page was told."""
    if {"Marker", "Limit"} & request.keys() or not args.paginate:
        raise UsageError(
            "--max-items, --page-size and --starting-token cut the list themselves; leave the others out"
        )
    if args.page_size is not None:
        request["Limit"] = args.page_size
    told = 0
    if args.starting_token is not None:
        try:
            token = json.loads(base64.b64decode(args.starting_token, validate=True))
            told = int(token.pop("boto_truncate_amount", 0))
            request |= {"Marker": str(token["Marker"])} if token["Marker"] is not None else {}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError("--starting-token: not a NextToken of such a list") from error
    items: list[Any] = []
    while True:
        page = call(name, request)
        (member,) = (key for key, value in page.items() if isinstance(value, list))
        rest, left = page[member][told:], math.inf if args.max_items is None else args.max_items - len(items)
        if len(rest) > left or (len(rest) == left and page.get("Truncated")):
            token = {"Marker": request.get("Marker"), "boto_truncate_amount": told + int(left)}
            text = base64.b64encode(json.dumps(token).encode()).decode()
            return {member: items + rest[: int(left)], "NextToken": text}
        items += rest
        if not page.get("Truncated"):
            return {member: items}
        request["Marker"], told = page["NextMarker"], 0


def _caller(args: argparse.Namespace) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """How this command calls KMS; errors come back as ours."""
    if args.kms == "local":
        from streamcrypt.kms import open_service

        service = open_service()

        def call_service(name: str, request: dict[str, Any]) -> dict[str, Any]:
            try:
                return service.call(name, request, region=args.region)
            except KmsError as error:
                raise _translated(error, name, request) from error

        return call_service
    from botocore.exceptions import BotoCoreError, ClientError

    from streamcrypt.kms import kms_client
    from streamcrypt.kms.service import snake_case

    try:
        client = kms_client(args.kms, **({"region_name": args.region} if args.region else {}))
    except ValueError as error:
        raise UsageError(str(error)) from error
    except BotoCoreError as error:
        raise _translated(error, "connect", {}) from error

    def call_client(name: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            response: dict[str, Any] = getattr(client, snake_case(name))(**request)
        except (ClientError, BotoCoreError) as error:
            raise _translated(error, name, request) from error
        response.pop("ResponseMetadata", None)
        return response

    return call_client


def _translated(error: Exception, operation: str, request: Mapping[str, Any]) -> StreamcryptError:
    from streamcrypt.keys.calls import classify, translate

    response: dict[str, Any] = getattr(error, "response", {})
    code = response.get("Error", {}).get("Code", "")
    said = response.get("Error", {}).get("Message", "")
    if code in _BAD_REQUESTS:
        return StreamcryptError(f"kms {_kebab(operation)}: {said or code} ({code})")
    named = request.get("KeyId") or request.get("DestinationKeyId") or request.get("TargetKeyId")
    unnamed = "the key of the ciphertext" if "CiphertextBlob" in request else f"kms {_kebab(operation)}"
    key = str(named or request.get("AliasName") or unnamed)
    if code in ("ThrottlingException", "KMSInternalException", "DependencyTimeoutException"):
        return KeyUnavailableError(
            f"{key}: {said.removesuffix('.') or code}; try again", code=code, operation=operation, key=key
        )
    if type(error).__name__ == "ParamValidationError":  # boto3 checks lengths and ranges as KMS does
        return StreamcryptError(f"kms {_kebab(operation)}: {str(error).partition(chr(10))[2] or error}")
    outcome = classify(error)
    if not code and outcome is not None and outcome.unreachable:
        return KeyUnavailableError(
            f"kms {_kebab(operation)}: {error}; check the network and the endpoint, then try again",
            operation=operation,
        )
    if code in ("KMSInvalidSignatureException", "KMSInvalidMacException"):
        what = "MAC" if operation == "VerifyMac" else "signature"
        return IntegrityError(
            f"{key}: the {what} does not hold ({code}): it, the message or the key is another"
        )
    found = translate(error, operation, key, request.get("EncryptionContext"))
    return found if found is not None else StreamcryptError(f"kms {_kebab(operation)}: {error}")


# -- words to values -------------------------------------------------------------------------------


def _value(member: str, shape: shapes.Option, given: Any, *, raw: bool) -> Any:
    option = f"--{_kebab(member)}"
    if shape.kind == "boolean":
        return given
    if shape.kind == "list":
        return _list(option, shape, given)
    text: str = given
    if shape.kind == "blob":
        return _blob(option, text, raw=raw)
    text = _file_text(option, text)
    if shape.kind == "integer":
        if not re.fullmatch(r"-?[0-9]+", text):
            raise UsageError(f"{option}: {text!r} is not a whole number")
        return int(text)
    if shape.kind == "timestamp":
        return _time(option, text)
    if shape.kind in ("map", "structure"):
        return _pairs(option, text, structure=shape.kind == "structure")
    return text


def _blob(option: str, text: str, *, raw: bool) -> bytes:
    if text.startswith("fileb://"):
        return _read(option, text.removeprefix("fileb://"))
    if text.startswith("file://"):
        text, raw = _read(option, text.removeprefix("file://")).decode("utf-8", "replace").strip(), raw
    if raw:
        return text.encode()
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise UsageError(
            f"{option}: not Base64; give fileb://FILE, or --cli-binary-format raw-in-base64-out"
        ) from error


def _file_text(option: str, text: str) -> str:
    for prefix in _BLOBS_OF_TEXT:
        if text.startswith(prefix):
            try:
                return _read(option, text.removeprefix(prefix)).decode()
            except UnicodeDecodeError as error:
                raise UsageError(f"{option}: {text.removeprefix(prefix)} is not text in UTF-8") from error
    return text


def _read(option: str, name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).expanduser().read_bytes()
    except OSError as error:
        raise SourceError(f"{option}: {name} cannot be read ({error.strerror})") from error


def _list(option: str, shape: shapes.Option, given: Sequence[str]) -> list[Any]:
    if len(given) == 1 and given[0].lstrip().startswith(("[", "file://")):
        found = _json(option, _file_text(option, given[0]))
        if not isinstance(found, list):
            raise UsageError(f"{option}: not a JSON list")
        return found
    if shape.of == "structure":
        return [_pairs(option, text, structure=True) for text in given]
    # The AWS CLI takes both: --operations Encrypt Decrypt, and Encrypt,Decrypt.
    return [word for text in given for word in text.split(",") if word]


def _pairs(option: str, text: str, *, structure: bool) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        found = _json(option, text)
        if not isinstance(found, dict):
            raise UsageError(f"{option}: not a JSON object")
        return found
    pairs: dict[str, Any] = {}
    for pair in _split(text):
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"{option}: {pair!r} is not NAME=VALUE")
        if name in pairs:
            raise UsageError(f"{option}: two values of {name}")
        if structure and value.startswith("{") and value.endswith("}"):
            pairs[name] = _pairs(option, value[1:-1], structure=False)
        else:
            pairs[name] = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    return pairs


def _split(text: str) -> Iterator[str]:
    """At commas, but not within braces or quotes: ``EncryptionContextSubset={a=b,c=d}``, ``a="b,c"``."""
    depth = start = 0
    quoted = False
    for position, character in enumerate(text):
        if character == '"' and (quoted or text[position - 1 : position] == "="):
            quoted = not quoted
        if quoted:
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    if text[start:]:
        yield text[start:]


def _json(option: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option}: not JSON ({error})") from error


def _time(option: str, text: str) -> datetime:
    try:
        if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
            return datetime.fromtimestamp(float(text), UTC)
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"{option}: {text!r} is not a time; write 2026-12-31T12:00:00Z") from error
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


# -- values to words -------------------------------------------------------------------------------


def _print_response(response: dict[str, Any], args: argparse.Namespace) -> None:
    shown: Any = _plain(response)
    if args.query:
        shown = _queried(shown, args.query)
    if args.output == "text" and not args.json:
        for line in _text_lines(shown):
            _out(line)
    elif shown not in ({}, None) or args.json or args.query:
        _out(json.dumps(shown, indent=4, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _queried(shown: Any, query: str) -> Any:
    if re.fullmatch(r"\w+", query, re.ASCII):
        return shown.get(query)
    import jmespath  # type: ignore[import-untyped]  # boto3 brings it; it has no stubs
    import jmespath.exceptions  # type: ignore[import-untyped]

    try:
        return jmespath.search(query, shown)
    except jmespath.exceptions.JMESPathError as error:
        raise UsageError(f"--query: {error}") from error


def _text_lines(shown: Any, name: str = "") -> Iterator[str]:
    """The AWS CLI's text form: a line of scalars, then a line for each nested object, its name in front."""
    if isinstance(shown, list):
        if shown and all(not isinstance(inner, dict | list) for inner in shown):
            if name:
                yield from (f"{name}\t{_scalar(inner)}" for inner in shown)
            else:
                yield "\t".join(map(_scalar, shown))
            return
        for inner in shown:
            yield from _text_lines(inner, name)
        return
    if not isinstance(shown, dict):
        yield _scalar(shown)
        return
    scalars = [_scalar(shown[key]) for key in sorted(shown) if not isinstance(shown[key], dict | list)]
    if scalars:
        yield "\t".join(([name] if name else []) + scalars)
    for key in sorted(shown):
        if isinstance(shown[key], dict | list):
            yield from _text_lines(shown[key], key.upper())


def _scalar(value: Any) -> str:
    return "None" if value is None else str(value)


def _remind_of_backup() -> None:
    from streamcrypt.kms import open_service

    if not open_service().store.backed_up:
        _say(
            "streamcrypt: note: losing this KMS loses every message under its keys; streamcrypt kms backup FILE"
        )


def _out(text: str) -> None:
    if sys.stdout.isatty():
        # Descriptions, contexts and messages may be another's: none of them writes to a terminal what it obeys.
        text = "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)
    print(text, flush=True)  # noqa: T201


def _escaped(character: str) -> str:
    """As JSON writes it, so that what is JSON stays it."""
    return json.dumps(character)[1:-1] if not character.isascii() else f"\\u{ord(character):04x}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quiet", action="store_true", help="no messages on standard error")


# -- branch keys of hierarchy keyrings -----------------------------------------------------------------


def _add_branch_keys(commands: Any) -> None:
    create = commands.add_parser(
        "create-branch-key",
        help="make a branch key, under which a hierarchy keyring wraps data keys",
        description="Make a branch key, wrapped by a KMS key; prints its id and the key reference that names it.",
        epilog="example: streamcrypt kms create-branch-key --key-id alias/ml --branch-key-id tenant-a",
    )
    create.add_argument("--branch-key-id", metavar="ID", help="the id (default: a UUID)")
    create.add_argument(
        "--encryption-context", metavar="NAME=VALUE,…", help="pairs that are bound to the branch key for good"
    )
    _add_branch_key_options(
        create, wrapping_key="the symmetric KMS key that wraps it: id, alias or ARN", needed=True
    )
    create.set_defaults(run=_run_create_branch_key)

    rotate = commands.add_parser(
        "version-branch-key",
        help="rotate a branch key: a new version encrypts, older ones go on decrypting",
        description="Rotate a branch key: a new version becomes active, older versions go on decrypting.",
        epilog="example: streamcrypt kms version-branch-key --branch-key-id tenant-a",
    )
    rotate.add_argument("--branch-key-id", metavar="ID", required=True, help="the branch key")
    _add_branch_key_options(rotate, wrapping_key="refuse a branch key that another KMS key wraps")
    rotate.set_defaults(run=_run_version_branch_key)

    listing = commands.add_parser(
        "list-branch-keys",
        help="the branch keys of a store, or the versions of one",
        description="List the branch keys of a store with their active version, or all versions of one.",
        epilog="example: streamcrypt kms list-branch-keys --store dynamodb:BranchKeys",
    )
    listing.add_argument("--branch-key-id", metavar="ID", help="list the versions of this one")
    _add_branch_key_options(listing)
    listing.set_defaults(run=_run_list_branch_keys)

    table = commands.add_parser(
        "create-branch-key-store",
        help="make the DynamoDB table of a branch-key store",
        description="Make a DynamoDB table with the schema of AWS's key store, billed by request.",
        epilog="example: streamcrypt kms create-branch-key-store --store dynamodb:BranchKeys",
    )
    _add_branch_key_options(table)
    table.set_defaults(run=_run_create_branch_key_store)


def _add_branch_key_options(
    parser: argparse.ArgumentParser, *, wrapping_key: str | None = None, needed: bool = False
) -> None:
    parser.add_argument(
        "--store", default="local", metavar="STORE",
        help="local (default, in this home), or dynamodb:TABLE[?logical=NAME&region=REGION]",
    )  # fmt: skip
    if wrapping_key is not None:
        parser.add_argument("--key-id", metavar="KEY", required=needed, help=wrapping_key)
        parser.add_argument(
            "--kms", choices=("local", "aws"), default="local",
            help="where --key-id is an alias or id of; an ARN says it itself (default: local)",
        )  # fmt: skip
        parser.add_argument(
            "--region", help="the Region of that KMS (default: local, or AWS's configuration)"
        )
    _add_common(parser)


def _wrapping_key(args: argparse.Namespace) -> str | None:
    """The ARN of the KMS key that --key-id names."""
    key: str | None = args.key_id
    if key is None or (key.startswith("arn:") and ":key/" in key):
        return key
    arn: str = _caller(args)("DescribeKey", {"KeyId": key})["KeyMetadata"]["Arn"]
    return arn


def _run_create_branch_key(args: argparse.Namespace) -> int:
    from streamcrypt.keys.reference import branch_key_store

    context = _pairs("--encryption-context", args.encryption_context or "", structure=False)
    store = branch_key_store(args.store, kms_key_arn=_wrapping_key(args))
    branch_key_id = store.create(args.branch_key_id, context)
    _print_branch_key(args, branch_key_id, store.active(branch_key_id).version)
    return 0


def _run_version_branch_key(args: argparse.Namespace) -> int:
    from streamcrypt.keys.reference import branch_key_store

    store = branch_key_store(args.store, kms_key_arn=_wrapping_key(args))
    _print_branch_key(args, args.branch_key_id, store.rotate(args.branch_key_id))
    return 0


def _print_branch_key(args: argparse.Namespace, branch_key_id: str, version: object) -> None:
    reference = f"hierarchy:{branch_key_id}@{args.store}"
    made = {"BranchKeyId": branch_key_id, "Version": str(version), "KeyReference": reference}
    _out(json.dumps(made, indent=4, ensure_ascii=False))


def _run_list_branch_keys(args: argparse.Namespace) -> int:
    from streamcrypt.keys.reference import branch_key_store

    found = [
        {
            "BranchKeyId": facts.branch_key_id,
            "Version": facts.version,
            "CreateTime": facts.created,
            "KmsArn": facts.kms_arn,
            "EncryptionContext": facts.context,
        }
        for facts in branch_key_store(args.store).facts(args.branch_key_id)
    ]
    _out(json.dumps({"BranchKeys": found}, indent=4, ensure_ascii=False))
    return 0


def _run_create_branch_key_store(args: argparse.Namespace) -> int:
    from streamcrypt.keys.reference import make_branch_key_table

    table = make_branch_key_table(args.store)
    _out(json.dumps({"TableName": table}, indent=4))
    return 0


# -- serve and env -----------------------------------------------------------------------------------


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; write a number from 0 to 65535")
    return int(text)


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="the embedded KMS over HTTP, for boto3, the AWS CLI and any AWS SDK",
        description="Serve the embedded KMS over HTTP.  Prints its URL when it listens.",
        epilog="example: streamcrypt kms serve --port 8400",
    )
    parser.add_argument("--host", default="127.0.0.1", help="loopback, unless TLS is on (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8400, help="0 takes a free one (default: 8400)")
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE.pem", help="serve TLS with this certificate chain"
    )
    parser.add_argument("--private-key", type=Path, metavar="FILE.pem", help="the certificate's private key")
    parser.add_argument(
        "--latency",
        metavar="DURATION[,DURATION]",
        help="answer this late: always, or median and 99th percentile",
    )
    parser.add_argument("--throttle", type=float, metavar="N", help="refuse more than N calls a second")
    parser.add_argument(
        "--errors", type=float, default=0.0, metavar="SHARE", help="refuse this share of the calls"
    )
    parser.add_argument(
        "--grant-delay", type=parse_duration, default=0.0, metavar="DURATION",
        help="a new grant works this late without its token, as on AWS (default: at once)",
    )  # fmt: skip
    _add_common(parser)
    parser.set_defaults(run=_run_serve)


def _run_serve(args: argparse.Namespace) -> int:
    from streamcrypt.hygiene import lock_process
    from streamcrypt.kms import open_service
    from streamcrypt.kms.server import Server
    from streamcrypt.kms.simulation import Simulation, parse_latency

    lock_process()
    service = open_service()
    try:
        if args.latency or args.throttle is not None or args.errors:
            latency = parse_latency(args.latency) if args.latency else None
            service.simulation = Simulation(latency=latency, rate=args.throttle, errors=args.errors)
        service.grant_delay = args.grant_delay
        server = Server(
            service,
            host=args.host,
            port=args.port,
            certificate=args.certificate,
            private_key=args.private_key,
        )
    except ValueError as error:
        raise UsageError(f"kms serve: {error}") from error
    except OSError as error:  # ssl.SSLError is one
        raise SourceError(f"kms serve: the certificate cannot be used ({error})") from error
    try:
        server.run(ready=lambda url: _out(json.dumps({"url": url}) if args.json else url), signals=True)
    except OSError as error:
        raise StreamcryptError(
            f"kms serve: cannot listen on {args.host} port {args.port} ({error.strerror}); choose another --port"
        ) from error
    return INTERRUPTED if server.interrupted else 0


def _add_env(commands: Any) -> None:
    parser = commands.add_parser(
        "env",
        help="the variables that point an AWS client at kms serve",
        description="Print AWS_ENDPOINT_URL_KMS and the credentials of a principal, made when there are none.",
        epilog='example: eval "$(streamcrypt kms env)"',
    )
    parser.add_argument(
        "--user", metavar="NAME", help="a user, or a principal's ARN (default: the account's root)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=_port, default=8400, help="default: 8400")
    parser.add_argument("--url", help="the whole URL instead of --host and --port (https://…)")
    parser.add_argument(
        "--policy", action="append", metavar="file://FILE", help="an identity policy of the user (repeatable)"
    )
    _add_common(parser)
    parser.set_defaults(run=_run_env)


def _run_env(args: argparse.Namespace) -> int:
    from streamcrypt.kms import open_service, principals

    try:
        arn = principals.principal_arn(args.user)
    except ValueError as error:
        raise UsageError(f"--user: {error}") from error
    policies = None
    if args.policy is not None:
        policies = [_file_text("--policy", text) for text in args.policy]
    try:
        key = principals.access_key(open_service().store, arn, policies=policies)
    except KmsError as error:
        raise StreamcryptError(f"--policy: {error.message} ({error.code})") from error
    variables = {
        "AWS_ENDPOINT_URL_KMS": args.url or f"http://{args.host}:{args.port}",
        "AWS_ACCESS_KEY_ID": key.id,
        "AWS_SECRET_ACCESS_KEY": key.secret,
        "AWS_DEFAULT_REGION": shapes.LOCAL_REGION,
    }
    if args.json:
        _out(json.dumps(variables))
        return 0
    for name, value in variables.items():
        _out(f"export {name}={shlex.quote(value)}")
    if not key.caller.policies and not arn.endswith(":root") and not args.quiet:
        _say(
            f"streamcrypt: note: {arn} has no identity policy: key policies and grants say what it may do (--policy)"
        )
    return 0


# -- audit and cost --------------------------------------------------------------------------------------


def _add_audit(commands: Any) -> None:
    parser = commands.add_parser(
        "audit",
        help="what was called, by whom, with which key: CloudTrail's events",
        description="Print events in CloudTrail's shape, oldest first, one JSON object a line.",
        epilog="example: streamcrypt kms audit --operation Decrypt --error '*' --since 1h",
    )
    _add_filter(parser)
    parser.add_argument(
        "--cloudtrail",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="CloudTrail logs (JSON, gzip, folders): who used which dataset, calls and cost, what is odd",
    )
    parser.add_argument("--summary", action="store_true", help="the same of the recorded events")
    parser.add_argument(
        "--known-context",
        action="append",
        default=[],
        metavar="NAME=VALUE,…",
        help="the context of a dataset that exists; any other is reported (repeatable)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the newest N only")
    parser.add_argument("--follow", action="store_true", help="wait for more, until interrupted")
    _add_common(parser)
    parser.set_defaults(run=_run_audit)


def _add_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", metavar="TIME", help="not before: a time, or a duration ago (1h)")
    parser.add_argument("--until", metavar="TIME", help="before: a time, or a duration ago")
    parser.add_argument("--principal", metavar="ARN", help="the caller's ARN, or a part of it")
    parser.add_argument("--operation", metavar="NAME", help="Decrypt, GenerateDataKey …")
    parser.add_argument("--key", metavar="KEY", help="a key's ARN or id")
    parser.add_argument(
        "--context",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a pair of the encryption context",
    )
    parser.add_argument("--error", metavar="CODE", help="an error code; '*' for any error, '' for success")
    parser.add_argument(
        "--file",
        action="append",
        type=Path,
        metavar="FILE",
        help="CloudTrail files instead of the store (repeatable)",
    )


def _filter(args: argparse.Namespace) -> Any:
    from streamcrypt.kms.audit import Filter

    return Filter(
        since=_moment("--since", args.since),
        until=_moment("--until", args.until),
        principal=args.principal,
        operation=args.operation,
        key=args.key,
        context={
            n: v for pair in args.context for n, v in _pairs("--context", pair, structure=False).items()
        },
        error=args.error,
    )


def _moment(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        if not re.fullmatch(r"[0-9]{9,}(\.[0-9]+)?", text):
            return time.time() - parse_duration(text)
    except ValueError:
        pass
    return _time(option, text).timestamp()


def _run_audit(args: argparse.Namespace) -> int:
    from streamcrypt.kms import audit, open_service

    wanted = _filter(args)
    files = [*(args.file or ()), *(args.cloudtrail or ())]
    if files:
        events = [event for event in audit.read_cloudtrail(files) if wanted.matches(event)]
        if args.cloudtrail or args.summary:
            _print_summary(events, args)
        else:
            _print_events(events[-args.limit :] if args.limit else events, args)
        return 0
    store = open_service(create=False).store
    if args.summary:
        _print_summary([audit.event(row) for row in store.query(*wanted.select(limit=args.limit))], args)
        return 0
    last = store.query("SELECT COALESCE(MAX(id), 0) FROM audit")[0][0]
    _print_events([audit.event(row) for row in store.query(*wanted.select(limit=args.limit))], args)
    if args.follow:
        try:
            for event in audit.follow(
                lambda after: store.query(*wanted.select(after=after)), _pause, after=last
            ):
                _out(json.dumps(event, ensure_ascii=False))
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


def _print_summary(events: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Who used which dataset, what it cost, what is odd."""
    from streamcrypt.kms import trail

    known = [_pairs("--known-context", text, structure=False) for text in args.known_context]
    found = trail.summary(events, known=known)
    if args.json:
        _out(json.dumps(found, ensure_ascii=False))
        return
    _out(f"{found['events']} events from {found['from'] or '-'} to {found['to'] or '-'}")
    for dataset in found["datasets"]:
        _out(f"\ndataset {trail.context_name(dataset['context'])}")
        for what in ("decrypted_by", "encrypted_by"):
            for principal, count in dataset[what].items():
                _out(f"  {what.replace('_', ' ')} {principal}: {count}")
    _out("")
    for entry in found["principals"]:
        calls = ", ".join(f"{name} {count}" for name, count in entry["calls"].items())
        _out(
            f"principal {entry['principal'] or '-'}: {calls}; {entry['failed']} failed; USD {entry['usd']:.4f}"
        )
    _out(
        f"requests cost USD {found['cost']['kms_requests']:.4f} at prices of {found['cost']['prices']['date']}"
    )
    for odd in found["anomalies"]:
        what = odd.get("key") or trail.context_name(odd.get("context", {}))
        who = odd.get("principal") or ", ".join(odd.get("principals", []))
        _out(f"odd: {odd['kind']}: {who}: {odd.get('operation', '')} {what}: {odd['message']}")


def _print_events(events: list[dict[str, Any]], args: argparse.Namespace) -> None:
    if args.json and not args.follow:
        _out(json.dumps({"Records": events}, ensure_ascii=False))  # CloudTrail's own file format
        return
    for event in events:
        _out(json.dumps(event, ensure_ascii=False))


def _pause() -> bool:
    """Wait before the next look at the store; there always is one."""
    time.sleep(0.5)
    return True


def _add_cost(commands: Any) -> None:
    parser = commands.add_parser(
        "cost",
        help="what the recorded calls and the keys would cost on AWS",
        description="Price the recorded calls and the keys with a dated price table.",
        epilog="example: streamcrypt kms cost --since 30d --json",
    )
    _add_filter(parser)
    parser.add_argument(
        "--prices", type=Path, metavar="FILE", help="a price table in JSON that replaces ours"
    )
    _add_common(parser)
    parser.set_defaults(run=_run_cost)


def _run_cost(args: argparse.Namespace) -> int:
    from streamcrypt.kms import audit, cost, open_service

    wanted = _filter(args)
    prices = cost.PRICES
    if args.prices is not None:
        prices = cost.Prices.from_json(_json("--prices", _file_text("--prices", f"file://{args.prices}")))
    keys: list[cost.KeyUse] = []
    if args.file:
        events = [event for event in audit.read_cloudtrail(args.file) if wanted.matches(event)]
    else:
        store = open_service(create=False).store
        events = [audit.event(row) for row in store.query(*wanted.select())]
        for key in store.all_keys():
            if key.manager == "CUSTOMER":
                begun = max(key.created, wanted.since or 0.0)
                months = max((wanted.until or time.time()) - begun, 0.0) / _MONTH
                rotations = sum(1 for m in key.materials if m.rotated is not None)
                keys.append(cost.KeyUse(key.arn, months, rotations))
    bill = cost.bill(cost.calls_of(events), keys, prices)
    if args.json:
        _out(json.dumps(bill))
        return 0
    _out(f"requests   {bill['requests']:>12,}   {bill['currency']} {bill['kms_requests']:.4f}")
    _out(f"keys       {len(keys):>12,}   {bill['currency']} {bill['kms_keys']:.4f}")
    _out(f"total                     {bill['currency']} {bill['total']:.4f}")
    for operation, entry in sorted(bill["by_operation"].items()):
        _out(f"  {operation}: {json.dumps(entry)}")
    _out(f"prices of {bill['prices']['date']} ({bill['prices']['source']})")
    return 0


_MONTH: Final = 730 * 3600.0  # AWS's month, in seconds


# -- backup and restore -------------------------------------------------------------------------------------


def _add_backup(commands: Any) -> None:
    parser = commands.add_parser(
        "backup",
        help="copy every key into one file, under a passphrase",
        description="Write a consistent copy of the embedded KMS into one file, also while it is in use.",
        epilog="example: streamcrypt kms backup kms.backup --passphrase-file passphrase.txt",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the backup, which must not exist yet")
    parser.add_argument(
        "--passphrase-file", type=Path, metavar="FILE",
        help="the passphrase that opens the backup (default: the file in STREAMCRYPT_PASSPHRASE_FILE)",
    )  # fmt: skip
    parser.add_argument(
        "--root-key-in-clear", action="store_true", help="no passphrase: whoever reads the file has every key"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    _add_common(parser)
    parser.set_defaults(run=_run_backup)


def _passphrase(args: argparse.Namespace) -> Callable[[], bytes]:
    from streamcrypt.kms import rootkey

    if args.passphrase_file is not None:
        return lambda: rootkey.read_passphrase_file(args.passphrase_file)

    def from_environment() -> bytes:
        if not os.environ.get(rootkey.FILE_VARIABLE):
            in_clear = ", or give --root-key-in-clear" if "root_key_in_clear" in args else ""
            raise KeyAccessError(
                f"{args.file}: a backup is sealed under a passphrase: name the file that holds it with "
                f"--passphrase-file or in {rootkey.FILE_VARIABLE}{in_clear}"
            )
        return rootkey.passphrase_from_environment()

    return from_environment


def _run_backup(args: argparse.Namespace) -> int:
    from streamcrypt.kms import open_service
    from streamcrypt.kms.backup import write_backup

    passphrase = None if args.root_key_in_clear else _passphrase(args)
    write_backup(open_service(create=False).store, args.file, passphrase=passphrase, overwrite=args.overwrite)
    if args.json:
        _out(json.dumps({"file": str(args.file), "bytes": args.file.stat().st_size}))
    elif not args.quiet:
        _say(f"streamcrypt: {args.file} holds every key of this KMS")
    return 0


def _add_restore(commands: Any) -> None:
    parser = commands.add_parser(
        "restore",
        help="make a KMS from a backup",
        description="Make the embedded KMS of this home from a backup; there must be none yet.",
        epilog="example: STREAMCRYPT_HOME=~/restored streamcrypt kms restore kms.backup --passphrase-file p.txt",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a backup")
    parser.add_argument("--passphrase-file", type=Path, metavar="FILE", help="the passphrase of the backup")
    parser.add_argument(
        "--root-key", choices=("file", "passphrase", "keystore"), default="file",
        help="how the restored KMS keeps its root key (default: file)",
    )  # fmt: skip
    _add_common(parser)
    parser.set_defaults(run=_run_restore)


def _run_restore(args: argparse.Namespace) -> int:
    from streamcrypt.kms import default_home
    from streamcrypt.kms.backup import restore_backup

    home = default_home()
    restore_backup(args.file, home, passphrase=_passphrase(args), root_key=args.root_key)
    if args.json:
        _out(json.dumps({"home": str(home)}))
    elif not args.quiet:
        _say(f"streamcrypt: the KMS is restored in {home}")
    return 0
