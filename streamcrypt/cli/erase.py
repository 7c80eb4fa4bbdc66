"""erase: a key's deletion, and what it does to encrypted folders, in words or JSON."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from streamcrypt.cli import output
from streamcrypt.cli.output import COUNT, PAIR, PLACE

if TYPE_CHECKING:
    from streamcrypt.engine.erasure import Erasure

_SHOWN = 20


def add_erase(subparsers: Any) -> None:
    """Add the command; it sets ``run``, which takes the arguments and gives the exit code."""
    parser = subparsers.add_parser(
        "erase",
        help="schedule a key's deletion, and show what it makes unreadable",
        description="Schedule the deletion of a KMS key, list what becomes unreadable in the folders given, and prove "
        "that nothing else does: every other message's data key is unwrapped before and after.  Until the end of the "
        "waiting period the deletion can be taken back (streamcrypt kms cancel-key-deletion).",
        epilog="examples:\n"
        "  streamcrypt erase local:alias/subject-1001 train.enc/ --dry-run\n"
        "  streamcrypt erase local:alias/subject-1001 train.enc/ --pending-window 7\n"
        "  streamcrypt erase arn:aws:kms:… train.enc/ --check",
    )
    parser.add_argument("key", metavar="KEYREF", help="a local:, aws: or arn: key that wraps data keys")
    parser.add_argument(
        "trees", type=PLACE, nargs="*", metavar="TREE", help="an encrypted folder, or a message (also s3://…)"
    )
    parser.add_argument(
        "--pending-window",
        type=COUNT,
        default=30,
        metavar="DAYS",
        help="7 to 30 days of waiting (default: 30)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only list what would become unreadable; schedule nothing"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="schedule nothing: look again, of a key that is scheduled or gone",
    )
    parser.add_argument(
        "--other-key",
        action="append",
        metavar="REF",
        help="opens what other keys wrapped (default: by the ARN)",
    )
    parser.add_argument(
        "--authenticated-context",
        action="append",
        type=PAIR,
        metavar="NAME=VALUE",
        help="pair bound, but not stored",
    )
    parser.add_argument(
        "--lose-manifest",
        action="store_true",
        help="also where a folder's manifest becomes unreadable with some files",
    )
    parser.add_argument(
        "--allow-unproved",
        action="store_true",
        help="also where messages of other keys do not open before either",
    )
    parser.add_argument(
        "--allow-unused",
        action="store_true",
        help="also where no message of the place is under this key",
    )
    parser.add_argument("--workers", type=COUNT, metavar="N", help="how many at a time (default: the cores)")
    output.add_common(parser)
    parser.set_defaults(run=_erase)


def _erase(args: argparse.Namespace) -> int:
    from streamcrypt import api

    done = api.erase(
        args.key,
        *args.trees,
        keys=args.other_key,
        authenticated_context=dict(args.authenticated_context or ()),
        pending_window=args.pending_window,
        check=args.check,
        dry_run=args.dry_run,
        lose_manifest=args.lose_manifest,
        allow_unproved=args.allow_unproved,
        allow_unused=args.allow_unused,
        workers=args.workers,
    )
    if args.json:
        output.out(json.dumps(done.to_json()))
    else:
        _tell(done, quiet=args.quiet)
    return output.DONE


def _tell(done: Erasure, *, quiet: bool) -> None:
    for path in done.unreadable:
        output.out(output.printable(path))
    if quiet:
        return
    gone = "would become unreadable" if done.key.state == "Enabled" else "unreadable"
    for tree in done.trees:
        counts = tree.counts
        output.say(
            f"{tree.path}: messages: {counts['erased']} {gone}, {counts['shared']} also under other keys, "
            f"{counts['untouched']} untouched"
            + (f", {counts['gone']} unreadable before" if counts["gone"] else "")
        )
    for failure in done.failed[:_SHOWN]:
        output.say(f"not proved: {failure.error}")
    if len(done.failed) > _SHOWN:
        output.say(f"not proved: {len(done.failed) - _SHOWN} more; --json lists all")
    if not done.trees:
        output.say("no folder was given: nobody looked at what becomes unreadable")
    elif done.proved:
        output.say("everything else opens: its data keys were unwrapped, its headers authenticated")
    state = done.key.state + (f" on {done.key.deletion_date}" if done.key.deletion_date else "")
    output.say(f"key {done.key.arn}: {state}")
    if done.key.state == "PendingDeletion":
        output.say(f"to take it back: {done.cancel}")
        if done.key.is_local:
            output.say("note: a backup of this KMS that was made before (kms backup) still holds the key")
