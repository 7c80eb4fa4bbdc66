"""What a log of KMS events tells: who used which dataset, what it cost, and what is odd.

A dataset is known by its encryption context: that is what binds a data key to it, and what
CloudTrail shows in clear.  Events are CloudTrail's, of AWS or of the embedded KMS alike.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from streamcrypt.kms import audit, cost

_READING: Final = frozenset({"Decrypt", "ReEncrypt"})
_WRITING: Final = frozenset(
    {
        "GenerateDataKey", "GenerateDataKeyWithoutPlaintext", "GenerateDataKeyPair",
        "GenerateDataKeyPairWithoutPlaintext", "Encrypt", "ReEncrypt",
    }
)  # fmt: skip
_DENIED: Final = frozenset({"AccessDenied", "AccessDeniedException"})
_UNUSABLE: Final = frozenset({"DisabledException", "KMSInvalidStateException"})
_NOT_FAILED: Final = frozenset({None, "DryRunOperationException"})
# A signed message of the Encryption SDK carries its own public key in the context: no dataset's name.
_OWN_PAIRS: Final = frozenset({"aws-crypto-public-key"})


def summary(
    events: Iterable[Mapping[str, Any]],
    *,
    known: Sequence[Mapping[str, str]] = (),
    prices: cost.Prices = cost.PRICES,
) -> dict[str, Any]:
    """``events`` (a number), ``from`` and ``to``, ``datasets``, ``principals``, ``cost`` and ``anomalies``.

    ``known`` are the encryption contexts of the datasets there are: one that holds none of them is
    odd.  Without, one is odd when it is decrypted, the log has encryptions, and none with it.
    """
    events = sorted(_once(events), key=audit.time_of)
    times = [str(event["eventTime"]) for event in events if event.get("eventTime")]
    calls = cost.calls_of(events)
    bill = cost.bill(calls, prices=prices)
    return {
        "events": len(events),
        "from": times[0] if times else None,
        "to": times[-1] if times else None,
        "datasets": _datasets(events),
        "principals": _principals(events, bill),
        "cost": {
            name: bill[name] for name in ("currency", "prices", "requests", "free_requests", "kms_requests")
        },
        "anomalies": [
            *_denied(events),
            *_unknown_contexts(events, known),
            *_not_opened(events),
            *_deletions(events),
            *_unusable(events),
            *_throttled(events),
        ],
    }


def _once(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each event once: two trails of an account, or a file given twice, deliver it twice."""
    unique: dict[str, Mapping[str, Any]] = {}
    for number, event in enumerate(events):
        unique.setdefault(str(event.get("eventID") or f"event {number}"), event)
    return list(unique.values())


def context_name(context: Mapping[str, str]) -> str:
    """An encryption context as one line; equal contexts have equal lines."""
    pairs = {name: value for name, value in context.items() if name not in _OWN_PAIRS}
    return json.dumps(pairs, sort_keys=True, ensure_ascii=False)


def _succeeded(event: Mapping[str, Any]) -> bool:
    return event.get("errorCode") is None


def _datasets(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each context who decrypted and who encrypted with it, how often, and when last."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        operation = event.get("eventName")
        if not _succeeded(event) or operation not in _READING | _WRITING:
            continue
        principal = audit.principal_of(event)
        for side, context in _sides(event):
            entry = found.setdefault(
                context_name(context),
                {
                    "context": {name: value for name, value in context.items() if name not in _OWN_PAIRS},
                    "decrypted_by": Counter(), "encrypted_by": Counter(), "keys": set(),
                },
            )  # fmt: skip
            entry[side][principal] += 1
            entry["keys"].update(audit.keys_of(event))
            entry["last"] = event.get("eventTime")
    return [
        {
            **entry,
            "decrypted_by": dict(entry["decrypted_by"].most_common()),
            "encrypted_by": dict(entry["encrypted_by"].most_common()),
            "keys": sorted(entry["keys"]),
        }
        for _, entry in sorted(
            found.items(), key=lambda item: (-sum(item[1]["decrypted_by"].values()), item[0])
        )
    ]


def _sides(event: Mapping[str, Any]) -> list[tuple[str, Mapping[str, str]]]:
    """The contexts of a call, each with what was done under it."""
    parameters = event.get("requestParameters") or {}
    if event.get("eventName") == "ReEncrypt":
        return [
            ("decrypted_by", parameters.get("sourceEncryptionContext") or {}),
            ("encrypted_by", parameters.get("destinationEncryptionContext") or {}),
        ]
    side = "decrypted_by" if event.get("eventName") == "Decrypt" else "encrypted_by"
    return [(side, parameters.get("encryptionContext") or {})]


def _principals(events: Sequence[Mapping[str, Any]], bill: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls: dict[str, Counter[str]] = defaultdict(Counter)
    failed: Counter[str] = Counter()
    for event in events:
        principal = audit.principal_of(event)
        calls[principal][str(event.get("eventName"))] += 1
        failed[principal] += event.get("errorCode") not in _NOT_FAILED
    return [
        {
            "principal": principal,
            "calls": dict(counted.most_common()),
            "failed": failed[principal],
            "usd": bill["by_principal"].get(principal, {"usd": 0.0})["usd"],
        }
        for principal, counted in sorted(calls.items(), key=lambda item: (-item[1].total(), item[0]))
    ]


# --- what is odd ----------------------------------------------------------------------------------


def _grouped(events: Iterable[Mapping[str, Any]], kind: str, words: str) -> list[dict[str, Any]]:
    """One anomaly for equal principal, operation and key, with the number of events and the last one's words."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        key = next(iter(audit.keys_of(event)), "")
        groups[audit.principal_of(event), str(event.get("eventName")), key].append(event)
    return [
        {
            "kind": kind, "principal": principal, "operation": operation, "key": key, "count": len(group),
            "last": group[-1].get("eventTime"), "code": group[-1].get("errorCode"),
            "message": group[-1].get("errorMessage") or words,
        }
        for (principal, operation, key), group in sorted(groups.items())
    ]  # fmt: skip


def _denied(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    denied = [event for event in events if event.get("errorCode") in _DENIED]
    return _grouped(denied, "denied", "access denied")


def _not_opened(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    words = "the ciphertext or its encryption context was altered, or is of another dataset"
    failed = [event for event in events if event.get("errorCode") == "InvalidCiphertextException"]
    return _grouped(failed, "not-opened", words)


def _unusable(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    failed = [event for event in events if event.get("errorCode") in _UNUSABLE]
    return _grouped(failed, "key-unusable", "the key was disabled or pending deletion")


def _throttled(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    failed = [event for event in events if event.get("errorCode") == "ThrottlingException"]
    return _grouped(failed, "throttled", "the request quota was reached")


def _unknown_contexts(
    events: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    written: set[str] = set()
    read: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if not _succeeded(event) or event.get("eventName") not in _READING | _WRITING:
            continue
        for side, context in _sides(event):
            if known:
                if not any(pairs.items() <= context.items() for pairs in known):
                    read[context_name(context)].append(event)
            elif side == "encrypted_by":
                written.add(context_name(context))
            else:
                read[context_name(context)].append(event)
    if not known and not written:
        return []  # a log of readers only says nothing about what was written
    return [
        {
            "kind": "unknown-context", "context": json.loads(name), "count": len(group),
            "principals": sorted({audit.principal_of(event) for event in group}),
            "last": group[-1].get("eventTime"),
            "message": "not the context of a known dataset" if known else "decrypted, but never encrypted in this log",
        }
        for name, group in sorted(read.items())
        if name not in written
    ]  # fmt: skip


def _deletions(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keys whose deletion is scheduled and not cancelled, and who used them in this log."""
    scheduled: dict[str, Mapping[str, Any]] = {}
    used: dict[str, Counter[str]] = defaultdict(Counter)
    for event in events:
        operation = event.get("eventName")
        if not _succeeded(event):
            continue
        for key in audit.keys_of(event):
            if operation == "ScheduleKeyDeletion":
                scheduled[key] = event
            elif operation in ("CancelKeyDeletion", "DeleteKey"):
                scheduled.pop(key, None)
            elif operation in _READING | _WRITING:
                used[key][audit.principal_of(event)] += 1
    return [
        {
            "kind": "key-deletion", "key": key, "principal": audit.principal_of(event), "last": event.get("eventTime"),
            "deletion_date": (event.get("responseElements") or {}).get("deletionDate"),
            "used_by": dict(used[key].most_common()),
            "message": "this key is about to be deleted, and what it wrapped becomes unreadable",
        }
        for key, event in sorted(scheduled.items())
    ]  # fmt: skip
