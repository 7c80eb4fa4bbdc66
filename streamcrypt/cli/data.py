"""encrypt, decrypt, verify, rekey, inspect, cat: words to a call of streamcrypt.api, a report to text or JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from streamcrypt.cli import output
from streamcrypt.cli.output import COUNT, DURATION, PAIR, PLACE, RANGE, SIZE, UsageError
from streamcrypt.errors import DestinationError, SourceError
from streamcrypt.units import format_size

if TYPE_CHECKING:
    from streamcrypt.api import Inspection

_POLICIES = ("require-encrypt-require-decrypt", "require-encrypt-allow-decrypt")
_READ_LENGTH = 4 * 2**20
_CONTENTS = {
    "framed": "framed",
    "unframed": "not framed",
    "s3-encryption-client": "object of the Amazon S3 Encryption Client",
}


def add_encrypt(subparsers: Any) -> None:
    parser = _job_parser(
        subparsers,
        "encrypt",
        "encrypt a file to a message, or a folder to a tree of messages with a manifest",
        """\
examples:
  streamcrypt encrypt train/ train.enc/ --key local:alias/ml --context Project=CustomerChurn
  tar c photos | streamcrypt encrypt - photos.enc --key local:alias/ml""",
    )
    _add_places(parser)
    _add_keys(
        parser, "wraps the data keys; repeat it for several keys, any one of which decrypts", required=True
    )
    parser.add_argument(
        "--context", action="append", type=PAIR, metavar="NAME=VALUE", help="pair to bind to every message"
    )
    _add_authenticated_context(parser, "pair to bind, but not to store: a reader must supply it")
    _add_writing(parser)
    _add_work(parser)


def add_decrypt(subparsers: Any) -> None:
    parser = _job_parser(
        subparsers,
        "decrypt",
        "decrypt a message to a file, or a tree of messages to a folder",
        """\
examples:
  streamcrypt decrypt train.enc/ train/
  streamcrypt decrypt report.enc - --context Project=CustomerChurn | less""",
    )
    _add_places(parser)
    _add_keys(parser, "only this key may unwrap (default: AWS and local keys by the ARN in the message)")
    _add_reading(parser)
    parser.add_argument("--require-manifest", action="store_true", help="refuse a folder without a manifest")
    _add_signed_by(parser)
    _add_work(parser)


def add_verify(subparsers: Any) -> None:
    parser = _job_parser(
        subparsers,
        "verify",
        "read and authenticate everything, write nothing; a folder also against its manifest",
        """\
examples:
  streamcrypt verify train.enc/
  streamcrypt verify train.enc/ --against train/""",
    )
    parser.add_argument("source", type=PLACE, metavar="SOURCE", help="a message, a folder of messages, or -")
    parser.add_argument(
        "--against",
        type=PLACE,
        metavar="PLAINTEXT",
        help="must also equal this file or folder, byte for byte",
    )
    _add_keys(parser, "only this key may unwrap (default: AWS and local keys by the ARN in the message)")
    _add_reading(parser)
    parser.add_argument(
        "--no-manifest", action="store_true", help="a folder without a manifest: its messages one by one"
    )
    _add_signed_by(parser, "; no key is used then, unless --key or --against asks for it")
    _add_work(parser, writes=False)


def add_rekey(subparsers: Any) -> None:
    parser = _job_parser(
        subparsers,
        "rekey",
        "decrypt and encrypt again under new data keys, in one pass; no plaintext is written",
        """\
example:
  streamcrypt rekey train.enc/ train.new/ --key local:alias/ml-2027 --from-key local:alias/ml""",
    )
    _add_places(parser)
    _add_keys(parser, "wraps the new data keys; repeat it for several keys", required=True)
    parser.add_argument(
        "--from-key",
        action="append",
        metavar="REF",
        help="opens the old messages (default: found by the ARN in them)",
    )
    _add_reading(parser)
    parser.add_argument(
        "--new-context",
        action="append",
        type=PAIR,
        metavar="NAME=VALUE",
        help="pair for the new messages (default: those of --context; others are not carried over)",
    )
    parser.add_argument("--require-manifest", action="store_true", help="refuse a folder without a manifest")
    _add_signed_by(parser)
    _add_writing(parser)
    _add_work(parser)


def add_inspect(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="what a message says of itself; no key needed",
        description="Show suite, message id, encryption context, wrapped keys, frame geometry and plaintext size "
        "of a message.  Nothing of it is authenticated: no key is used.",
        epilog="example:\n  streamcrypt inspect train.enc/part-0.parquet",
    )
    parser.add_argument("message", type=PLACE, metavar="MESSAGE", help="a file that holds a message")
    output.add_common(parser)
    parser.set_defaults(run=_inspect)


def add_cat(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "cat",
        help="plaintext of a message, or of a range of it, to standard output",
        description="Write the plaintext of a message to standard output, or of a range of it: only the frames "
        "that cover the range are read.  With --json the object is the last line of standard error.",
        epilog="examples:\n  streamcrypt cat notes.enc\n"
        "  streamcrypt cat train.enc/part-0.parquet --range 0:64KiB | xxd | head",
    )
    parser.add_argument("message", type=PLACE, metavar="MESSAGE", help="a file that holds a message")
    parser.add_argument(
        "--range",
        type=RANGE,
        default=(0, None),
        metavar="START:END",
        help="bytes of the plaintext, from START up to but without END",
    )
    _add_keys(parser, "only this key may unwrap (default: AWS and local keys by the ARN in the message)")
    _add_reading(parser)
    parser.add_argument(
        "--verify-signature", action="store_true", help="read all of it first, and check its signature"
    )
    output.add_common(parser)
    parser.set_defaults(run=_cat, destination="-")


def _job_parser(subparsers: Any, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=examples
    )
    parser.set_defaults(run=_JOBS[name])
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    place = "a file, a folder, - or an object-store URL"
    parser.add_argument("source", type=PLACE, metavar="SOURCE", help=f"{place} (- is standard input)")
    parser.add_argument(
        "destination", type=PLACE, metavar="DESTINATION", help=f"{place} (- is standard output)"
    )


def _add_keys(parser: argparse.ArgumentParser, what: str, *, required: bool = False) -> None:
    parser.add_argument("--key", action="append", required=required, metavar="REF", help=what)


def _add_authenticated_context(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--authenticated-context", action="append", type=PAIR, metavar="NAME=VALUE", help=what
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is accepted")
    group.add_argument(
        "--context",
        action="append",
        type=PAIR,
        metavar="NAME=VALUE",
        help="pair that must be in every message",
    )
    group.add_argument(
        "--authenticated-context",
        action="append",
        type=PAIR,
        metavar="NAME=VALUE",
        help="pair that was bound without being stored",
    )
    group.add_argument(
        "--commitment-policy",
        choices=_POLICIES,
        default=_POLICIES[0],
        help="whether messages without key commitment are read (default: %(default)s)",
    )
    group.add_argument("--require-signed", action="store_true", help="refuse messages without a signature")
    _add_key_limit(group)


def _add_signed_by(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--signed-by",
        metavar="PUBLIC.pem",
        help="a folder must be what its signed manifest lists, signed by this key" + more,
    )


def _add_key_limit(group: Any) -> None:
    group.add_argument(
        "--max-encrypted-data-keys",
        type=COUNT,
        default=10,
        metavar="N",
        help="wrapped keys that a message may carry (default: 10)",
    )


def _add_writing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("messages")
    group.add_argument(
        "--frame-size", type=SIZE, default=2**20, metavar="SIZE", help="plaintext of a frame (default: 1MiB)"
    )
    group.add_argument(
        "--sign", action="store_true", help="suite 0x0578: with a signature of each message (default: 0x0478)"
    )
    group = parser.add_argument_group("a folder as a whole")
    group.add_argument(
        "--key-map",
        metavar="FILE",
        help='keys by file name: "PATTERN" = "REF" lines; others, and the manifest: --key',
    )
    group.add_argument(
        "--sign-manifest", metavar="REF", help="sign all of it with this KMS key, for verify --signed-by"
    )
    group.add_argument(
        "--signing-algorithm", metavar="NAME", help="for an RSA key (default: RSASSA_PSS_SHA_256)"
    )
    if parser.prog.endswith("encrypt"):
        _add_key_limit(group)
        # A message without commitment is never written, so both policies encrypt alike.
        group.add_argument(
            "--commitment-policy",
            choices=_POLICIES,
            default=_POLICIES[0],
            help="both write messages with key commitment",
        )


def _add_work(parser: argparse.ArgumentParser, *, writes: bool = True) -> None:
    group = parser.add_argument_group("which files of a folder")
    group.add_argument(
        "--include", action="append", metavar="GLOB", help="only names that match one of these"
    )
    group.add_argument("--exclude", action="append", metavar="GLOB", help="no names that match one of these")
    group.add_argument(
        "--files-from", metavar="FILE", help="only the names in FILE, one a line (-: standard input)"
    )
    group = parser.add_argument_group("work")
    group.add_argument(
        "--workers",
        type=COUNT,
        metavar="N",
        help="how many at a time (default: the cores; with an object store at least 8)",
    )
    if writes:
        group.add_argument("--overwrite", action="store_true", help="replace what is there")
        group.add_argument("--resume", action="store_true", help="go on with a job that was stopped")
        group.add_argument(
            "--dry-run", action="store_true", help="say what would be done; no key is used, nothing written"
        )
        group.add_argument(
            "--no-fsync", action="store_true", help="faster; a power loss may undo what was reported as done"
        )
    group.add_argument("--audit", metavar="FILE", help="append a JSON line for each object; no secret in it")
    group.add_argument("--engine", choices=["local", "ray"], help="where the workers run (default: local)")
    group.add_argument("--address", metavar="ADDRESS", help="of the Ray cluster")
    group = parser.add_argument_group("data-key cache")
    group.add_argument(
        "--cache-max-age",
        type=DURATION,
        metavar="DURATION",
        help="a data key is used this long (default: 5m)",
    )
    group.add_argument(
        "--cache-max-messages", type=COUNT, metavar="N", help="messages under one data key (default: 100000)"
    )
    group.add_argument(
        "--cache-max-bytes", type=SIZE, metavar="SIZE", help="plaintext under one data key (default: 1TiB)"
    )
    group.add_argument("--no-cache", action="store_true", help="a data key for every message")
    output.add_common(parser)


# -- the jobs


def _encrypt(args: argparse.Namespace) -> int:
    from streamcrypt import api

    return _job(args, api.encrypt, **_making(args), **_writing(args))


def _decrypt(args: argparse.Namespace) -> int:
    from streamcrypt import api

    return _job(
        args,
        api.decrypt,
        require_manifest=args.require_manifest,
        signed_by=args.signed_by,
        **_reading(args),
        **_writing(args),
    )


def _verify(args: argparse.Namespace) -> int:
    from streamcrypt import api

    return _job(
        args,
        api.verify,
        against=args.against,
        require_manifest=not args.no_manifest,
        signed_by=args.signed_by,
        **_reading(args),
    )


def _rekey(args: argparse.Namespace) -> int:
    from streamcrypt import api

    return _job(
        args,
        api.rekey,
        from_keys=args.from_key,
        new_context=_pairs(args.new_context, "--new-context"),
        require_manifest=args.require_manifest,
        signed_by=args.signed_by,
        **_reading(args),
        **_making(args),
        **_writing(args),
    )


_JOBS = {"encrypt": _encrypt, "decrypt": _decrypt, "verify": _verify, "rekey": _rekey}


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    return {"commitment_policy": args.commitment_policy, "require_signed": args.require_signed}


def _making(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "sign": args.sign,
        "frame_size": args.frame_size,
        "key_map": args.key_map,
        "sign_manifest": args.sign_manifest,
        "signing_algorithm": args.signing_algorithm,
    }


def _writing(args: argparse.Namespace) -> dict[str, Any]:
    return {"overwrite": args.overwrite, "dry_run": args.dry_run, "fsync": not args.no_fsync}


def _job(args: argparse.Namespace, call: Callable[..., Any], **options: Any) -> int:
    """Run one job with the options that all four commands have; what goes wrong is raised."""
    options |= {
        "keys": args.key,
        "context": _pairs(args.context, "--context"),
        "authenticated_context": _pairs(args.authenticated_context, "--authenticated-context"),
        "max_encrypted_data_keys": args.max_encrypted_data_keys,
        "workers": args.workers,
        "cache": _cache(args),
        "include": args.include or (),
        "exclude": args.exclude or (),
        "files": _names_from(args.files_from),
    }
    options |= _not_everywhere(args, call)
    places = [args.source, args.destination] if "destination" in args else [args.source]
    with _audit(args.audit) as audit, output.progress(args, _length(args.source)) as progress:
        report = call(*places, progress=progress, audit=audit, **options)
    output.tell(report, args)
    return output.DONE


def _not_everywhere(args: argparse.Namespace, call: Callable[..., Any]) -> dict[str, Any]:
    """Options that go to the call only when they are given; UsageError for one that it does not have."""
    given = {
        name: value
        for name, value in (
            ("resume", getattr(args, "resume", False)),
            ("engine", args.engine if args.engine != "local" else None),
            ("address", args.address),
        )
        if value
    }
    for name in given:
        if name not in (call.__kwdefaults__ or {}):
            raise UsageError(f"{args.command}: --{name} is not available for this command")
    return given


def _pairs(pairs: list[tuple[str, str]] | None, option: str) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for name, value in pairs or ():
        if found.setdefault(name, value) != value:
            raise UsageError(f"{option} {name}: two values; a name has one value")
    return found if pairs is not None else None


def _cache(args: argparse.Namespace) -> Any:
    limits = {
        name: value
        for name, value in (
            ("max_age", args.cache_max_age),
            ("max_messages", args.cache_max_messages),
            ("max_bytes", args.cache_max_bytes),
        )
        if value is not None
    }
    if args.no_cache:
        if limits:
            raise UsageError(f"{args.command}: --no-cache leaves no limits to set; give one or the other")
        return False
    if not limits:
        return None
    from streamcrypt.keys.cache import DataKeyCache

    return DataKeyCache(**limits)


def _names_from(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        if path == "-":
            text = os.fsdecode(sys.stdin.buffer.read())
        else:
            with open(path, "rb") as file:
                text = os.fsdecode(file.read())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    return [line for line in text.split("\n") if line]


@contextlib.contextmanager
def _audit(path: str | None) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """What takes the lines of the audit file; it is appended to, and only its owner reads it."""
    if path is None:
        yield None
        return

    def write(line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(0, "a line was cut short")
        except OSError as error:
            raise DestinationError(f"{path}: the audit file cannot be written: {error.strerror}") from error

    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DestinationError(f"{path}: the audit file cannot be written: {error.strerror}") from error
    try:
        yield write
    finally:
        os.close(descriptor)


def _length(source: str) -> int | None:
    """Bytes of a single file, for the progress bar; a folder is not walked for it."""
    try:
        return os.path.getsize(source) if os.path.isfile(source) else None
    except OSError:
        return None


# -- one message


def _inspect(args: argparse.Namespace) -> int:
    from streamcrypt import api

    found = api.inspect(args.message)
    output.out(json.dumps(found.to_json()) if args.json else "\n".join(_lines(found)))
    return output.DONE


def _lines(found: Inspection) -> Iterator[str]:
    def line(name: str, text: str) -> str:
        return f"{name:16}{output.printable(text)}"

    properties = [
        _CONTENTS[found.content],
        "signed" if found.signed else "not signed",
        "key commitment" if found.committing else "no key commitment",
    ]
    yield line("message", found.path)
    yield line("suite", f"{found.suite}, version {found.version}: {', '.join(properties)}")
    yield line("message id", found.message_id)
    for name, value in found.encryption_context.items():
        yield line("context", f"{name}={value}")
    for key in found.encrypted_data_keys:
        yield line("wrapped key", f"{key['provider_id']}: {key['key']}")
    yield line("plaintext", f"{found.plaintext_size} bytes ({format_size(found.plaintext_size)})")
    if found.content == "framed":
        yield line(
            "frames", f"{found.frames} of {found.frame_length} bytes ({format_size(found.frame_length)})"
        )
    yield line("length", f"{found.message_size} bytes, of which the header takes {found.header_length}")
    yield "no key was used: none of this is authenticated"


def _cat(args: argparse.Namespace) -> int:
    from streamcrypt import api

    start, end = args.range
    with api.open(
        args.message,
        keys=args.key,
        context=_pairs(args.context, "--context"),
        authenticated_context=_pairs(args.authenticated_context, "--authenticated-context"),
        commitment_policy=args.commitment_policy,
        max_encrypted_data_keys=args.max_encrypted_data_keys,
        require_signed=args.require_signed,
        verify_signature=args.verify_signature,
    ) as message:
        message.seek(start)
        written = 0
        buffer = memoryview(bytearray(_READ_LENGTH))
        while end is None or start + written < end:
            room = buffer if end is None else buffer[: end - start - written]
            count = message.readinto(room)
            if not count:
                break
            _write_all(room[:count])
            written += count
    if args.json:
        output.out(json.dumps({"start": start, "bytes": written}), sys.stderr)
    return output.DONE


def _write_all(data: memoryview) -> None:
    """To standard output, unbuffered: what arrived at the reader is what was authenticated so far."""
    descriptor = output.standard_output().fileno()
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        raise DestinationError(f"standard output: cannot be written: {error.strerror}") from error
