"""Calls to a KMS: paced, retried, counted, and their errors in our words.

    KmsCalls     one client, in this process, and what is known of its service
    Pace         how fast the service lets us call; shared by all calls to it
    KmsStats     calls, latency, throttles: the "kms" part of a report

A client is anything with boto3's KMS methods: a boto3 client or the embedded KMS's Service.  AWS's
errors (botocore's ClientError) and the embedded KMS's (KmsError) have one shape, ``.response``, and
are treated alike; botocore is never imported here.

Retried until a deadline: throttling, an unreachable service, its own faults.  Everything else is
KMS's considered answer, and asking again would not change it.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm

from streamcrypt.errors import IntegrityError, KeyAccessError, KeyUnavailableError, WrappedKeyError
from streamcrypt.hygiene import forget_variables
from streamcrypt.keys.keyring import printable
from streamcrypt.tuples import NamedTuple

# Seconds from the first attempt of a call after which it has failed: an outage of a minute is waited out,
# with what it takes to notice its end.
DEADLINE: Final = 75.0

_METHODS: Final = {
    "GenerateDataKey": "generate_data_key",
    "GenerateDataKeyWithoutPlaintext": "generate_data_key_without_plaintext",
    "Encrypt": "encrypt",
    "Decrypt": "decrypt",
    "ReEncrypt": "re_encrypt",
    "DescribeKey": "describe_key",
    "GetPublicKey": "get_public_key",
    "DeriveSharedSecret": "derive_shared_secret",
    "Sign": "sign",
    "ScheduleKeyDeletion": "schedule_key_deletion",
}

_THROTTLED: Final = frozenset(
    ("ThrottlingException", "Throttling", "ThrottledException", "TooManyRequestsException", "RequestLimitExceeded",
     "RequestThrottled", "RequestThrottledException", "SlowDown")
)  # fmt: skip
_FAULTS: Final = frozenset(
    ("DependencyTimeoutException", "KMSInternalException", "KeyUnavailableException", "InternalFailure",
     "InternalError", "InternalServerError", "ServiceUnavailable", "RequestTimeout", "RequestTimeoutException")
)  # fmt: skip
_CREDENTIAL_CODES: Final = frozenset(
    ("UnrecognizedClientException", "InvalidSignatureException", "IncompleteSignatureException",
     "MissingAuthenticationTokenException", "ExpiredTokenException", "ExpiredToken", "InvalidClientTokenId",
     "SignatureDoesNotMatch")
)  # fmt: skip


class KmsStats:
    """Calls by operation, their latency in milliseconds, retries and throttles.  Safe in many threads.

    Latencies are of the attempts that were answered; above ``MAX_SAMPLES`` a random sample of them.
    """

    MAX_SAMPLES: Final = 100_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls: dict[str, int] = {}
        self.throttled = 0
        self.retries = 0
        self._samples = array("d")
        self._answered = 0
        self._max = 0.0

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def count(self, operation: str, latency_ms: float | None, *, throttled: bool, retry: bool) -> None:
        """One attempt; ``latency_ms`` is None where no answer came."""
        with self._lock:
            self.calls[operation] = self.calls.get(operation, 0) + 1
            self.throttled += throttled
            self.retries += retry
            if latency_ms is not None:
                self._add_sample(latency_ms)

    def _add_sample(self, latency_ms: float) -> None:
        self._answered += 1
        self._max = max(self._max, latency_ms)
        if len(self._samples) < self.MAX_SAMPLES:
            self._samples.append(latency_ms)
        else:
            from random import randrange

            place = randrange(self._answered)  # noqa: S311 - a sample, no secret
            if place < self.MAX_SAMPLES:
                self._samples[place] = latency_ms

    def merge(self, other: KmsStats) -> None:
        """Add what ``other`` counted (another process, another keyring)."""
        with self._lock:
            for operation, count in other.calls.items():
                self.calls[operation] = self.calls.get(operation, 0) + count
            self.throttled += other.throttled
            self.retries += other.retries
            for sample in other._samples:
                self._add_sample(sample)
            self._max = max(self._max, other._max)

    def take(self) -> KmsStats:
        """What was counted so far; counting then begins again (a worker reports what is new)."""
        taken = KmsStats()
        with self._lock:
            for name, value in self.__dict__.items():
                if name != "_lock":
                    taken.__dict__[name], self.__dict__[name] = value, taken.__dict__[name]
        return taken

    def to_json(self) -> dict[str, Any]:
        """The "kms" object of INTERFACE.md, with ``retries`` added."""
        with self._lock:
            samples = sorted(self._samples)
            latency = {f"p{percent}": _percentile(samples, percent) for percent in (50, 90, 99)}
            latency["max"] = round(self._max, 3)
            return {
                "calls": dict(sorted(self.calls.items())),
                "latency_ms": latency,
                "throttled": self.throttled,
                "retries": self.retries,
            }


def _percentile(ascending: list[float], percent: int) -> float:
    if not ascending:
        return 0.0
    return round(ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)], 3)


class Pace:
    """How fast one service lets us call, learnt from its answers.  One for all threads of the process.

    Unlimited until the service throttles.  Then calls start one after another at ``rate`` a second:
    cut to what was granted when a call is throttled, raised again quickly while well below the rate
    that was too much and slowly (1 % a second) around it.  So a quota is used nearly whole and
    seldom exceeded.  (Additive increase, multiplicative decrease: Chiu and Jain, 1989.)

    When the service cannot be reached, two calls a second go on trying for all; the first success
    lets everybody go.
    """

    _LEAST_CUT: Final = 0.97
    _MOST_CUT: Final = 0.5
    _FIRST_GROWTH: Final = 3.0  # factor a second, until a rate is known that is too much
    _FAST_GROWTH: Final = 1.5  # factor a second
    _RISING_GROWTH: Final = 1.1  # factor a second, above every rate that was too much
    _SLOW_GROWTH: Final = 0.01  # of the ceiling, a second
    _LEAST_RATE: Final = 0.5
    _PROBES_PER_SECOND: Final = 2.0
    _FAILURES_TO_OPEN: Final = 3

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.rate = math.inf
        self._ceiling = math.inf
        self._next = -math.inf
        self._changed_at = clock()
        self._grown_at = self._changed_at
        self._attempts = 0
        self._successes = 0
        self._failures = 0
        self._down_since: float | None = None
        self._turnstile = threading.Lock()
        self._condition = threading.Condition(threading.Lock())

    def wait(self, give_up_at: float) -> bool:
        """Wait for a turn to call; False when none comes before ``give_up_at``."""
        with self._condition:
            if self.slot() <= self._clock():
                self.take()
                return True
        # One thread at a time waits for the next turn, so that a new rate holds for it at once; the
        # others wait behind it.
        if not self._turnstile.acquire(timeout=max(0.0, give_up_at - self._clock())):
            return False
        try:
            with self._condition:
                while (slot := self.slot()) > (now := self._clock()):
                    away_for_long = self._down_since is not None and now - self._down_since > DEADLINE
                    if slot > give_up_at or away_for_long:  # then only the probes go on
                        return False
                    self._condition.wait(slot - now)
                self.take()
                return True
        finally:
            self._turnstile.release()

    def slot(self) -> float:
        """The time from which the next call may start."""
        return -math.inf if self._interval() == 0 else self._next

    def take(self) -> None:
        """Take the next turn."""
        interval = self._interval()
        if interval:
            self._next = max(self._clock(), self._next) + interval

    def _interval(self) -> float:
        if self._down_since is not None:
            return 1 / self._PROBES_PER_SECOND
        return 1 / self.rate  # 0 while unlimited

    def succeeded(self, started: float) -> None:
        """An answer that was not a throttle came to a call that began at ``started``."""
        with self._condition:
            self._failures = 0
            if self._down_since is not None:
                self._down_since = None
                self._next = self._clock()
                self._condition.notify_all()
            if started >= self._changed_at:
                self._attempts += 1
                self._successes += 1
                if self.rate != math.inf:
                    self._grow(self._clock())

    def throttled(self, started: float) -> None:
        """The service throttled a call that began at ``started``."""
        with self._condition:
            self._failures = 0
            if started < self._changed_at:
                return  # it began before the last cut: it says nothing about the rate since
            self._attempts += 1
            now = self._clock()
            if self.rate == math.inf:
                self.rate = (self._successes + 1) / max(now - self._changed_at, 0.02)
            else:
                self._ceiling = self.rate
                # As if one more had succeeded: a few calls don't say much.
                granted = (self._successes + 1) / (self._attempts + 1)
                self.rate *= min(max(granted, self._MOST_CUT), self._LEAST_CUT)
            self.rate = max(self.rate, self._LEAST_RATE)
            self._attempts = self._successes = 0
            self._changed_at = self._grown_at = now
            self._next = now + 1 / self.rate

    def unreachable(self) -> None:
        """No answer came, or a fault of the service."""
        with self._condition:
            self._failures += 1
            if self._failures >= self._FAILURES_TO_OPEN and self._down_since is None:
                self._down_since = self._clock()
                self._next = self._down_since + 1 / self._PROBES_PER_SECOND

    def _grow(self, now: float) -> None:
        seconds = min(max(now - self._grown_at, 0.0), 1.0)
        self._grown_at = max(now, self._grown_at)
        if self._ceiling == math.inf:
            self.rate *= self._FIRST_GROWTH**seconds
        elif self.rate < 0.95 * self._ceiling:
            self.rate *= self._FAST_GROWTH**seconds
        elif self.rate < 1.05 * self._ceiling:
            self.rate += self._SLOW_GROWTH * self._ceiling * seconds
        else:  # nothing was throttled where it was before: the quota has risen
            self.rate *= self._RISING_GROWTH**seconds


# The quota is the service's, so clients of one endpoint share a pace.
_paces_by_endpoint: dict[str, Pace] = {}
_paces_by_client: weakref.WeakKeyDictionary[Any, Pace] = weakref.WeakKeyDictionary()
_paces_lock = threading.Lock()


def pace_of(client: Any) -> Pace:
    """The pace of this client's service."""
    endpoint = endpoint_of(client)
    with _paces_lock:
        if endpoint is not None:
            return _paces_by_endpoint.setdefault(endpoint, Pace())
        return _paces_by_client.setdefault(client, Pace())


def endpoint_of(client: Any) -> str | None:
    """The URL of this client's service; None where it answers in this process."""
    endpoint = getattr(getattr(client, "meta", None), "endpoint_url", None)
    return endpoint if isinstance(endpoint, str) and not endpoint.endswith(".invalid") else None


def _forget_in_child() -> None:
    global _paces_lock
    _paces_lock = threading.Lock()
    _paces_by_endpoint.clear()
    _paces_by_client.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class KmsCalls:
    """Calls through one KMS client.

    ``client`` is a client, or a function that makes one; the function is called again in a forked
    child, which must not share its parent's sockets.  ``name`` says for people which KMS this is.
    Every attempt is counted in ``stats``.
    """

    def __init__(
        self,
        client: Any,
        *,
        stats: KmsStats | None = None,
        name: str = "KMS",
        identity: Hashable = None,
        deadline: float = DEADLINE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._connect: Callable[[], Any] | None = client if not hasattr(client, "decrypt") else None
        self._client = None if self._connect is not None else client
        self._pid = os.getpid()
        self._pace: Pace | None = None
        self.stats = stats if stats is not None else KmsStats()
        self.name = name
        self.identity: Hashable = identity if identity is not None else client
        self._deadline = deadline
        self._clock = clock
        self._sleep = sleep

    @property
    def client(self) -> Any:
        """The client; made on first use."""
        if self._client is None or self._pid != os.getpid():
            if self._connect is not None:
                try:
                    self._client = self._connect()
                except Exception as error:
                    translated = translate(error, "connect", self.name, None)
                    if translated is None:
                        raise
                    raise translated from error
            self._pid = os.getpid()
            self._pace = None
        return self._client

    @property
    def region(self) -> str:
        """The client's region; ``local`` for the embedded KMS."""
        return str(getattr(getattr(self.client, "meta", None), "region_name", None) or "local")

    def call(self, operation: str, key: str, **request: Any) -> dict[str, Any]:
        """KMS's answer to ``operation`` (in AWS's CamelCase); ``key`` names the key in errors.

        KeyUnavailableError when the service throttles or stays out of reach until the deadline;
        WrappedKeyError when a ciphertext does not open; KeyAccessError for every other refusal.
        """
        client = self.client
        pace = self._pace
        if pace is None:
            pace = self._pace = pace_of(client)
        method = getattr(client, _METHODS[operation])
        give_up_at = self._clock() + self._deadline
        retries = 0
        reason: BaseException | None = None
        while pace.wait(give_up_at):
            started = self._clock()
            try:
                response = self._attempt(method, request, give_up_at)
            except Exception as error:
                outcome = classify(error)
                if outcome is None:
                    raise
                throttled, unreachable, answered = outcome
                latency_ms = (self._clock() - started) * 1000 if answered else None
                self.stats.count(operation, latency_ms, throttled=throttled, retry=retries > 0)
                if throttled:
                    pace.throttled(started)
                elif unreachable:
                    if _database_failed(error):  # the embedded KMS's, in this process: it will again
                        forget_variables(error)
                        raise self._unavailable(operation, key, error) from error
                    pace.unreachable()
                else:
                    pace.succeeded(started)
                    forget_variables(error)
                    raise self.refusal(error, operation, key, request.get("EncryptionContext")) from error
                forget_variables(error)
                reason = error
            else:
                # botocore gives nothing but its metadata for an answer that broke off.
                whole = response.keys() > {"ResponseMetadata"} or "ResponseMetadata" not in response
                latency_ms = (self._clock() - started) * 1000 if whole else None
                self.stats.count(operation, latency_ms, throttled=False, retry=retries > 0)
                if whole:
                    pace.succeeded(started)
                    return response
                pace.unreachable()
                reason = ConnectionError("the answer broke off")
            retries += 1
            # Full jitter (M. Brooker, "Exponential Backoff And Jitter", AWS, 2015).
            from random import uniform

            delay = uniform(0, min(1.0, 0.05 * 2**retries))  # noqa: S311 - timing, no secret
            if self._clock() + delay >= give_up_at:
                break
            self._sleep(delay)
        raise self._unavailable(operation, key, reason) from reason

    def _attempt(
        self, method: Callable[..., dict[str, Any]], request: dict[str, Any], give_up_at: float
    ) -> dict[str, Any]:
        """What KMS answers; TimeoutError when the deadline comes before the whole answer.

        A client's own timeouts run from byte to byte, so an answer that drips would hold its caller for as
        long as it likes.  A KMS that is far is therefore asked by a thread, which is then left to itself.
        """
        if endpoint_of(self.client) is None:
            return method(**request)
        found: list[dict[str, Any] | BaseException] = []

        def ask() -> None:
            try:
                found.append(method(**request))
            except BaseException as error:  # noqa: BLE001 - raised again where the call was made
                found.append(error)
            done.set()

        done = threading.Event()
        threading.Thread(target=ask, name="streamcrypt-kms", daemon=True).start()
        if not done.wait(max(0.0, give_up_at - self._clock())):
            raise TimeoutError("no whole answer came before the deadline")
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    def refusal(
        self, error: Exception, operation: str, key: str, context: Mapping[str, str] | None
    ) -> KeyAccessError:
        """``error`` in our words."""
        translated = translate(error, operation, key, context)
        assert translated is not None, "classify() knew the error"
        return translated

    def _unavailable(self, operation: str, key: str, reason: BaseException | None) -> KeyUnavailableError:
        code = error_code(reason) if reason is not None else None
        if code in _THROTTLED:
            what = f"{self.name} throttled {operation} for {self._deadline:.0f} s"
            hint = (
                "try again later, ask for a higher request quota, or reuse data keys (--cache-max-messages)"
            )
        elif reason is not None and _database_failed(reason):
            what = f"{self.name} failed at {operation} ({printable(str(reason))})"
            hint = "see to its disk, then run again with --resume"
        else:
            detail = f" ({code or printable(str(reason))})" if reason is not None else ""
            what = f"{self.name} could not be reached for {operation}{detail}"
            hint = "check the network and the endpoint, then run again with --resume"
        return KeyUnavailableError(f"{key}: {what}; {hint}", code=code, operation=operation, key=key)


def _database_failed(error: BaseException) -> bool:
    sqlite = sys.modules.get("sqlite3")  # loaded if the error came from there
    return sqlite is not None and isinstance(error.__cause__, sqlite.Error)


class Outcome(NamedTuple):
    """What kind of failure a call met."""

    throttled: bool
    unreachable: bool
    answered: bool


def error_code(error: BaseException) -> str | None:
    """KMS's own error code, where ``error`` is an answer of KMS."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and isinstance(response.get("Error"), dict):
        return str(response["Error"].get("Code") or "")
    return None


def classify(error: Exception) -> Outcome | None:
    """The kind of failure, or None for an error that is not KMS's nor botocore's."""
    if isinstance(error, TimeoutError):
        return Outcome(throttled=False, unreachable=True, answered=False)
    code = error_code(error)
    if code is not None:
        response: dict[str, Any] = error.response  # type: ignore[attr-defined]  # error_code() saw it
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _THROTTLED or status == 429:
            return Outcome(throttled=True, unreachable=False, answered=True)
        return Outcome(throttled=False, unreachable=code in _FAULTS or status >= 500, answered=True)
    botocore = sys.modules.get("botocore.exceptions")  # loaded if the error came from there
    if botocore is None or not isinstance(error, botocore.BotoCoreError | botocore.HTTPClientError):
        return None
    certificate = isinstance(error, botocore.SSLError)
    # A refused connection is a ConnectionError, which is no HTTPClientError.
    no_answer = botocore.HTTPClientError | botocore.ConnectionError | botocore.IncompleteReadError
    unreachable = isinstance(error, no_answer) and not certificate
    return Outcome(throttled=False, unreachable=unreachable, answered=False)


def translate(
    error: Exception, operation: str, key: str, context: Mapping[str, str] | None
) -> KeyAccessError | None:
    """A failure of KMS or botocore in our words, with the way out; None for any other error."""
    code = error_code(error)
    if code is None:
        return _translate_local(error, operation, key)
    response: dict[str, Any] = error.response  # type: ignore[attr-defined]  # error_code() saw it
    # Why is said at the end, behind two ARNs.  Ours goes on.
    said = printable(str(response["Error"].get("Message") or ""), limit=1000).removesuffix(".")
    details: dict[str, Any] = {"code": code, "operation": operation, "key": key}
    refused = f"{key}: KMS refused {operation} ({code})"
    if code in ("AccessDeniedException", "AccessDenied"):
        reasons: tuple[str, ...] = getattr(error, "reasons", ())  # of the embedded KMS in this process
        told = "; ".join(
            (said or "access denied", *map(printable, reasons), _access_hint(operation, said, context))
        )
        return KeyAccessError(f"{refused}: {told}", **details)
    if code in ("InvalidCiphertextException", "IncorrectKeyException"):
        if code == "IncorrectKeyException":
            why = "it was wrapped by another key than the one that the message names"
        else:
            why = "the wrapped data key or the encryption context was altered, or is of another message"
        return WrappedKeyError(f"{key}: the wrapped data key does not open ({code}): {why}", **details)
    if code == "DisabledException":
        hint = "enable the key (kms enable-key) or use another"
    elif code == "KMSInvalidStateException" and "deletion" in said:
        hint = "cancel the deletion (kms cancel-key-deletion), then enable the key"
    elif code == "NotFoundException":
        hint = "check the name, the account and the region (kms list-aliases, kms list-keys)"
    elif code == "InvalidKeyUsageException":
        hint = f"use a key whose usage and key spec allow {operation}"
    elif code in _CREDENTIAL_CODES:
        hint = "check the credentials, the region and the clock of this machine"
    elif code in ("InvalidGrantTokenException", "InvalidArnException", "ValidationException"):
        hint = "check the key reference and the grant tokens"
    else:
        hint = "see the KMS API reference for this error"
    return KeyAccessError(f"{refused}: {said or 'no reason given'}; {hint}", **details)


def _access_hint(operation: str, said: str, context: Mapping[str, str] | None) -> str:
    action = {"ReEncrypt": "kms:ReEncryptFrom and kms:ReEncryptTo"}.get(operation, f"kms:{operation}")
    if "explicit deny" in said:
        hint = f"a Deny statement covers {action}: change it, or call as another principal"
    else:
        hint = f"the caller needs {action} on this key by key policy, IAM policy or grant"
    if context:
        pairs = printable(", ".join(f"{name}={value}" for name, value in sorted(context.items())))
        hint += f", under conditions that admit the encryption context {pairs}"
    return hint


def _translate_local(error: Exception, operation: str, key: str) -> KeyAccessError | None:
    """botocore's own errors: no answer came."""
    botocore = sys.modules.get("botocore.exceptions")
    if botocore is None or not isinstance(error, botocore.BotoCoreError | botocore.HTTPClientError):
        return None
    kind = type(error).__name__
    details: dict[str, Any] = {"operation": operation, "key": key}
    if isinstance(error, botocore.NoCredentialsError | botocore.PartialCredentialsError):
        hint = (
            "no AWS credentials found; set AWS_PROFILE or the AWS_* variables (for the embedded KMS: kms env)"
        )
    elif kind in (
        "TokenRetrievalError",
        "SSOTokenLoadError",
        "UnauthorizedSSOTokenError",
        "CredentialRetrievalError",
    ):
        hint = "the AWS credentials could not be fetched or have expired; sign in again (aws sso login)"
    elif isinstance(error, botocore.NoRegionError):
        hint = "no AWS region is set; set AWS_DEFAULT_REGION or give the key's ARN"
    elif isinstance(error, botocore.SSLError):
        hint = (
            "the KMS endpoint's certificate was not accepted; set AWS_CA_BUNDLE if it has its own authority"
        )
    else:
        hint = printable(str(error))
    return KeyAccessError(f"{key}: cannot call KMS ({kind}): {hint}", **details)


def require_public_key(response: Mapping[str, Any], key: str) -> Any:
    """The public key in KMS's answer to GetPublicKey, or IntegrityError."""
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        return load_der_public_key(require_bytes(response, "PublicKey", key, "GetPublicKey"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IntegrityError(
            f"{key}: KMS's answer to GetPublicKey holds no public key; it is refused"
        ) from error


def require_bytes(response: Mapping[str, Any], member: str, key: str, operation: str) -> bytes:
    """A blob of KMS's answer, or IntegrityError where the answer lacks it."""
    value = response.get(member)
    if not isinstance(value, bytes) or not value:
        raise IntegrityError(f"{key}: KMS's answer to {operation} has no {member}; the answer is refused")
    return value
