"""The command line: words to a command, an error to one line and an exit code.

    data.py      encrypt decrypt verify rekey inspect cat
    kms.py       kms …
    measure.py   bench plan report
    advice.py    doctor iam-policy
    demo.py      demo
    erase.py     erase
    output.py    progress, JSON, the one error line

The command word decides which module is imported; its parser is built, nothing else.  Each module's
``add_…`` function gives the parser its commands, and every command sets ``run``: parsed arguments to
exit code.
"""

from __future__ import annotations

import io
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

# Command, its module and the function there that adds it, and its line in the help.
_DATA = "streamcrypt.cli.data"
_MEASURE = ("streamcrypt.cli.measure", "add_measure_commands")
_ADVICE = ("streamcrypt.cli.advice", "add_advice_commands")
COMMANDS = {
    "encrypt": ((_DATA, "add_encrypt"), "a file to a message, a folder to a tree of messages"),
    "decrypt": ((_DATA, "add_decrypt"), "a message to a file, a tree of messages to a folder"),
    "verify": ((_DATA, "add_verify"), "read and authenticate everything, write nothing"),
    "rekey": ((_DATA, "add_rekey"), "encrypt again under new data keys, without plaintext on disk"),
    "erase": (("streamcrypt.cli.erase", "add_erase"), "schedule a key's deletion, and show what it makes unreadable"),
    "inspect": ((_DATA, "add_inspect"), "what a message says of itself; no key needed"),
    "cat": ((_DATA, "add_cat"), "plaintext of a message, or of a range of it, to standard output"),
    "kms": (("streamcrypt.cli.kms", "add_kms_commands"), "the embedded KMS, or AWS KMS, by the AWS CLI's names"),
    "bench": (_MEASURE, "measure a sweep of configurations"),
    "plan": (_MEASURE, "predict a job: hosts, time, KMS calls, money"),
    "report": (_MEASURE, "records or a plan as one HTML page"),
    "doctor": (_ADVICE, "which permission or setting is missing"),
    "iam-policy": (_ADVICE, "the least policy for a key and a use"),
    "demo": (("streamcrypt.cli.demo", "add_demo_commands"), "the main job on data that it makes"),
}  # fmt: skip

_EPILOG = """\
examples:
  streamcrypt kms create-key --alias alias/ml
  streamcrypt encrypt train/ train.enc/ --key local:alias/ml --context Project=CustomerChurn
  streamcrypt verify train.enc/
  streamcrypt decrypt train.enc/ train.back/

exit codes: 0 done, 1 failed, 2 usage, 3 did not authenticate, 4 a key could not be used,
5 temporary (worth a retry), 130 interrupted
"""


def run() -> int:
    """The console script: ``main`` in a process of its own.

    Imports make some ten thousand objects that stay; looking through them for garbage, again and again
    and once more at the end, was a sixth of a small command's time (benchmarks/README.md, "start-up").
    The embedded KMS's database is not closed then: its log stays for the next process to write back,
    as SQLite does after a crash.
    """
    import gc

    gc.set_threshold(100_000, 20, 20)
    code = main()
    gc.freeze()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code and never raises."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--version"], ["-V"]):
        from streamcrypt import __version__

        print(f"streamcrypt {__version__}")  # noqa: T201
        return 0
    if arguments is None:  # then the process is ours, and not one that calls us
        from streamcrypt.hygiene import protect_process

        protect_process()
        if isinstance(
            sys.stdout, io.TextIOWrapper
        ):  # a name or a context may be beyond the terminal's letters
            sys.stdout.reconfigure(errors="backslashreplace")
    from streamcrypt.cli import output

    parsed = None
    output.hold_standard_descriptors()
    with output.signals(words, restore=arguments is not None):
        try:
            if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "-V", "--version"):
                raise output.UsageError(
                    f"{words[0]}: options stand after the command; see `streamcrypt --help`"
                )
            parsed = parser_for(words[0] if words else None).parse_args(words)
            code: int = parsed.run(parsed)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001  (the last place: one line and a code)
            return output.fail(error, words, parsed)
    return code


def parser_for(command: str | None) -> argparse.ArgumentParser:
    """The parser that knows one command in full; when the word is none, one that lists them all."""
    from importlib import import_module

    from streamcrypt import __version__
    from streamcrypt.cli.output import Parser

    parser = Parser(
        prog="streamcrypt",
        description="Encrypt files, folders and streams in the AWS Encryption SDK's message format.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", "-V", action="version", version=f"streamcrypt {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    if command in COMMANDS:
        (module, add), _ = COMMANDS[command]
        getattr(import_module(module), add)(subparsers)
    else:
        for name, (_, what) in COMMANDS.items():
            subparsers.add_parser(name, help=what)
    return parser
