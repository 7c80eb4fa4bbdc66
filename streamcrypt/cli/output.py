"""What a person or a program reads of a command: progress, a summary, JSON, and the one error line.

    streamcrypt: error: WHAT: WHY, and what to do

Results go to standard output, messages for people to standard error.  With --json one object is all
that standard output gets; where standard output carries data, the object is the last line of standard
error.  Exit codes are INTERFACE.md's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, NoReturn

from streamcrypt.errors import (
    DestinationError,
    FormatError,
    IntegrityError,
    KeyAccessError,
    StreamcryptError,
    TemporaryError,
)
from streamcrypt.units import format_size, parse_duration, parse_range, parse_size

if TYPE_CHECKING:
    from streamcrypt.engine.job import Progress, Report

DONE, FAILED, USAGE, NOT_AUTHENTIC, NO_KEY, TEMPORARY, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
DEBUG_VARIABLE = "STREAMCRYPT_DEBUG"

_REDRAW = 0.1  # seconds between two drawings of the progress line
_SHOWN_FAILURES = 20

# Codes of a KMS operation's own errors, by what they mean for the caller; others are 1.
_KMS_EXIT_CODES = {
    "ThrottlingException": TEMPORARY,
    "DependencyTimeoutException": TEMPORARY,
    "KMSInternalException": TEMPORARY,
    "KeyUnavailableException": TEMPORARY,
    "InternalFailure": TEMPORARY,
    "AccessDeniedException": NO_KEY,
    "DisabledException": NO_KEY,
    "KMSInvalidStateException": NO_KEY,
    "NotFoundException": NO_KEY,
    "IncorrectKeyException": NO_KEY,
    "InvalidKeyUsageException": NO_KEY,
    "InvalidCiphertextException": NO_KEY,
    "KMSInvalidSignatureException": NOT_AUTHENTIC,
    "KMSInvalidMacException": NOT_AUTHENTIC,
    "ValidationException": USAGE,
}


class UsageError(ValueError):
    """The words of the command line make no command."""


# -- words


def _terminal_width() -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 20:
        return int(columns)
    try:
        return max(os.get_terminal_size(1).columns, 20)
    except OSError:
        return 80


class _Help(argparse.HelpFormatter):
    """Wraps a paragraph; leaves text that has lines of its own as it is."""

    def __init__(
        self,
        prog: str,
        indent_increment: int = 2,
        max_help_position: int = 24,
        width: int | None = None,
    ) -> None:
        # argparse makes a formatter for every option that it is given, and asks shutil for the width,
        # whose import takes as long as all the options.
        super().__init__(prog, indent_increment, max_help_position, width or _terminal_width() - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose repeatable options take several values.

    ``encrypt SOURCE DESTINATION --key A B`` is ``--key A --key B``: a word after such an option's value
    is another value once all positional words are there, and a positional word before that.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        raise UsageError(f"{command + ': ' if command else ''}{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = self._spread(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(words, namespace)
        if unknown:  # said here, by the command that does not know them, and not by the parser above it
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def _spread(self, words: Sequence[str]) -> list[str]:
        positional = [action for action in self._actions if not action.option_strings]
        if any(action.nargs is not None for action in positional):
            return list(words)
        found: list[str] = []
        seen, repeated, rest = 0, "", iter(words)
        for word in rest:
            if word == "--":
                found += [word, *rest]
            elif word.startswith("-") and word != "-":
                name, equals, _ = word.partition("=")
                action = self._option_string_actions.get(name)
                found.append(word)
                if action is not None and action.nargs != 0 and not equals:
                    value = next(rest, None)
                    if value is not None and value[:1] == "-" and value[1:2].isdigit():
                        found[-1] = f"{word}={value}"  # argparse would take -5s for an option
                    elif value is not None:
                        found.append(value)
                repeated = name if isinstance(action, argparse._AppendAction) else ""
            elif repeated and seen >= len(positional):
                found += [repeated, word]
            else:
                seen += 1
                found.append(word)
        return found


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type whose ValueError's own words reach the user."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _parse_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _parse_pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r} is not a pair; write NAME=VALUE")
    return name, value


def _parse_place(text: str) -> str:
    if not text:  # most often a variable of a script that is not set
        raise ValueError("the name is empty")
    from streamcrypt.storage import is_store_url  # start-up: the KMS's commands name no place

    is_store_url(text)  # refuses other URLs
    return text


SIZE, DURATION, RANGE = _typed(parse_size), _typed(parse_duration), _typed(parse_range)
COUNT, PAIR, PLACE = _typed(_parse_count), _typed(_parse_pair), _typed(_parse_place)


def add_common(parser: argparse.ArgumentParser) -> None:
    """--json and --quiet, which every command has."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object on standard output")
    group.add_argument(
        "--quiet", action="store_true", help="no progress and no summary; errors are still told"
    )


# -- results


def say(text: str) -> None:
    """A line for people, on standard error."""
    if sys.stderr is not None:  # closed by whoever started us
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def standard_output() -> IO[str]:
    """Standard output; DestinationError where whoever started us has closed it."""
    if sys.stdout is None:
        raise DestinationError("standard output: is closed")
    return sys.stdout


def hold_standard_descriptors() -> None:
    """Have 0, 1 and 2 open, so that no file of ours gets the number of a stream that was closed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def out(text: str, stream: IO[str] | None = None) -> None:
    """A line of the result, on standard output."""
    stream = stream or standard_output()
    print(text, file=stream, flush=True)


def json_stream(parsed: argparse.Namespace | None) -> IO[str]:
    """Where the JSON object goes: not into data."""
    destination = getattr(parsed, "destination", None)
    return sys.stderr if destination == "-" else standard_output()


def tell(report: Report, parsed: argparse.Namespace) -> None:
    """A job's report: as JSON when asked for, and in a line for people."""
    if parsed.json:
        out(json.dumps(report.to_json()), json_stream(parsed))
    elif not parsed.quiet:
        say(summary(report))
        for used in report.keys or ():
            say(f"{_files(used['files'])}, {format_size(used['bytes'])}, under {used['key']}")
        if report.signature is not None:
            say("signed by {key} at {time} ({algorithm})".format(**report.signature))
        for advice in report.advice:
            say(f"hint: {advice}")


_DID = {"encrypt": "encrypted", "decrypt": "decrypted", "verify": "verified", "rekey": "rekeyed"}


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def summary(report: Report) -> str:
    """``encrypted 12 files, 1.5 GiB in 0.62 s (2.4 GiB/s), 1 data key``"""
    files = _files(report.files)
    if report.dry_run:
        return f"would have {_DID[report.operation]} {files}; nothing was read or written"
    text = f"{_DID[report.operation]} {files}, {format_size(report.bytes_in)} in {report.seconds:.2f} s"
    text += f" ({format_size(report.bytes_per_second)}/s)"
    if report.data_keys:
        text += f", {report.data_keys} data key{'' if report.data_keys == 1 else 's'}"
    return text + (f", {report.skipped} skipped" if report.skipped else "")


@contextlib.contextmanager
def progress(parsed: argparse.Namespace, total: int | None) -> Iterator[Callable[[Progress], None] | None]:
    """What a job tells its progress to: a line on the terminal, or None where there is none.

    ``total`` is what there is to do, in bytes, where that is known.
    """
    if parsed.quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    started, drawn = time.monotonic(), 0.0

    def draw(state: Progress) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn < _REDRAW:
            return
        drawn = now
        rate = state.bytes / max(now - started, 1e-3)
        text = f"{format_size(state.bytes)}  {format_size(rate)}/s"
        if total:
            share = min(state.bytes / total, 1.0)
            text = f"[{'#' * round(30 * share):30}] {share:4.0%}  {text}"
        else:
            text = f"{state.files} files  {text}"
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()

    try:
        yield draw
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


# -- errors


def printable(text: str) -> str:
    """One line that a terminal shows as it is: what does not print is escaped, escape sequences first."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split())
    )


def exit_code(error: BaseException) -> int:
    """INTERFACE.md's exit code for what was raised."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, TemporaryError):
        return TEMPORARY
    if isinstance(error, KeyAccessError):
        return NO_KEY
    if isinstance(error, IntegrityError):
        # A file that was never a message is the wrong file, not a tampered one.
        return FAILED if isinstance(error, FormatError) and not error.recognised else NOT_AUTHENTIC
    if isinstance(error, StreamcryptError):
        return FAILED
    if isinstance(error, ValueError):
        return USAGE
    if type(error).__module__.startswith("botocore") and not _kms_code(error):
        from streamcrypt.keys.calls import classify

        outcome = classify(error) if isinstance(error, Exception) else None
        return TEMPORARY if outcome is not None and outcome.unreachable else FAILED
    return _KMS_EXIT_CODES.get(_kms_code(error), FAILED)


def _kms_code(error: BaseException) -> str:
    """The code of a KMS operation's error, be it the embedded KMS's or botocore's; "" for others."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _is_broken_pipe(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, BrokenPipeError):
        error = error.__cause__
    return error is not None


def _words_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: files that were finished are there, nothing partial is left; run it again"
    if isinstance(error, StreamcryptError | ValueError | ImportError) or _kms_code(error):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory: use fewer --workers or a smaller --frame-size"
    if type(error).__module__.startswith("botocore"):
        return f"AWS: {error}"
    # Not the error's own text: nobody has looked at what it may contain.
    return f"internal error: {type(error).__name__}; please report it, with what {DEBUG_VARIABLE}=1 shows"


def fail(error: BaseException, words: Sequence[str], parsed: argparse.Namespace | None = None) -> int:
    """Tell what went wrong, in one line and, if asked for, as JSON; returns the exit code."""
    if isinstance(error, SystemExit):  # --help and --version end this way
        return error.code if isinstance(error.code, int) else DONE
    if _is_broken_pipe(error):
        # Whoever read has what they wanted.  What is still buffered must not fail again at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    code, text = exit_code(error), printable(_words_of(error))
    report = getattr(error, "report", None)
    if os.environ.get(DEBUG_VARIABLE):
        import traceback

        traceback.print_exception(error)  # frames and lines, never the values in them
    told = getattr(error, "gravest", error)
    others = [failure for failure in report.failed if failure.error is not told] if report is not None else []
    for failure in others[:_SHOWN_FAILURES]:
        say(f"failed: {failure.error}")
    if len(others) > _SHOWN_FAILURES:
        say(f"failed: {len(others) - _SHOWN_FAILURES} more; --json lists all")
    with contextlib.suppress(OSError):
        say(f"streamcrypt: error: {text}")
    if "--json" in words:
        with contextlib.suppress(OSError, DestinationError):
            out(json.dumps(_failure_object(report, parsed, code, text)), json_stream(parsed))
    return code


def _failure_object(
    report: Report | None, parsed: argparse.Namespace | None, code: int, text: str
) -> dict[str, Any]:
    """The command's own object where it has one for failures, with ``error`` and ``exit_code`` added."""
    command = getattr(parsed, "command", None)
    if report is None and command in _DID:
        from streamcrypt.engine.job import Report

        report = Report(command)
    found: dict[str, Any] = report.to_json() if report is not None else {}
    if not found.get("failed"):
        place = getattr(parsed, "source", None) or getattr(parsed, "message", None) or ""
        found["failed"] = [{"path": str(place), "error": text}]
    return found | {"error": text, "exit_code": code}


# -- signals


# What an interrupted command may take to clean up before it is ended, in seconds; and after which part
# of that a second signal ends it at once.
_GRACE = 5.0
_DEAF = 1.0


class _Guard:
    """Ends this process when it was told to stop and something does not let it.

    A request to a store that accepts and does not answer holds the thread that made it in the library,
    where no handler runs; the interpreter writes a byte to its wake-up descriptor all the same.
    """

    def __init__(self, words: Sequence[str]) -> None:
        import threading

        self._words = words
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._lock = threading.Lock()
        self._is_told = False
        self._is_over = False
        threading.Thread(target=self._wait, name="streamcrypt-guard", daemon=True).start()

    def close(self, *, interrupted: bool) -> None:
        """The command has ended; one that was interrupted has said so, and may yet hang on its way out."""
        with self._lock:
            self._is_told = True
            self._is_over = not interrupted

    def _wait(self) -> None:
        import select

        from streamcrypt.storage import remove_open_temporaries

        os.read(self._reader, 1)
        time.sleep(_DEAF)
        os.set_blocking(self._reader, False)
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 100)
        select.select([self._reader], [], [], _GRACE - _DEAF)
        with self._lock:
            if self._is_over:
                return
            remove_open_temporaries()
            if not self._is_told:
                fail(KeyboardInterrupt(), self._words)
            os._exit(INTERRUPTED)


@contextlib.contextmanager
def signals(words: Sequence[str], *, restore: bool) -> Iterator[None]:
    """Within it SIGTERM and SIGHUP stop a command as Ctrl-C does.

    A second one does not stop the cleaning up, nor does one that comes after the work; with
    ``restore`` the handlers of before are put back then, for a caller whose process goes on.  A command
    that speaks to a store, which may never answer, is given a few seconds.
    """
    listening = True
    guard = None

    def stop(number: int, frame: object) -> None:
        nonlocal listening
        if listening:
            listening = False
            raise KeyboardInterrupt

    before = {}
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is not signal.SIG_IGN:  # nohup, or a background job of a script
            with contextlib.suppress(ValueError):  # not the main thread: whoever called keeps their signals
                before[name] = signal.signal(name, stop)
    if before and not restore and any("://" in word for word in words):
        guard = _Guard(words)
    try:
        yield
    finally:
        if guard is not None:
            guard.close(interrupted=not listening)
        listening = False
        for name, handler in before.items():
            # The interpreter, when it ends, gives a signal back its default unless it is ignored.
            signal.signal(name, handler if restore else signal.SIG_IGN)
