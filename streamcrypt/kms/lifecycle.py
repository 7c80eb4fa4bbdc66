"""The life of a key: enabled, disabled, rotated, deleted, and what time alone does to it.

``settle`` carries out what has become due: the end of a deletion window, an automatic
rotation, the expiry of imported material.  It runs before every call, so that the state a
caller sees is the state of that moment, whether or not a process was running meanwhile.
"""

from __future__ import annotations

import math
from typing import Any, Final

from streamcrypt.kms import audit, material, policy
from streamcrypt.kms.call import Call, timestamp
from streamcrypt.kms.errors import refuse
from streamcrypt.kms.store import Key, Material, Store

DAY: Final = 86400.0
DEFAULT_WINDOW: Final = 30
DEFAULT_ROTATION_PERIOD: Final = 365
ON_DEMAND_ROTATIONS: Final = 25
# RotateKeyOnDemand is refused when an automatic rotation begins within this time.
_CONFLICT: Final = 20 * 60.0

Response = dict[str, Any]


def settle(store: Store, now: float) -> None:
    """Carry out everything that is due."""
    while store.next_due() <= now:
        with store.transaction():
            for account, region, key_id in store.due_keys(now):
                key = store.key(account, region, key_id)
                if key is not None:
                    _settle_key(store, key, now)


def _settle_key(store: Store, key: Key, now: float) -> None:
    if key.state == "PendingDeletion" and key.deletion_date is not None and key.deletion_date <= now:
        store.delete_key(key)
        store.record_event(audit.service_row(key.deletion_date, "DeleteKey", key.arn, region=key.region))
        _release_primary(store, key, key.deletion_date)
        return
    for generation in key.materials:
        if generation.sealed is not None and generation.valid_to is not None and generation.valid_to <= now:
            drop_material(store, key, generation)
    if key.state == "Enabled" and key.rotation_next is not None and key.rotation_next <= now:
        period = (key.rotation_period or DEFAULT_ROTATION_PERIOD) * DAY
        # A key that was not looked at for long rotates once, on the last date that has passed.
        key.rotation_next += math.floor((now - key.rotation_next) / period) * period
        rotate(store, key, key.rotation_next, "AUTOMATIC")
        store.record_event(audit.service_row(key.rotation_next, "RotateKey", key.arn, region=key.region))
        key.rotation_next += period
    store.save_key(key)


def _release_primary(store: Store, deleted: Key, now: float) -> None:
    """Start the window of a primary that waited for its last replica to be deleted."""
    if deleted.primary_region in (None, deleted.region):
        return
    primary = store.key(deleted.account, deleted.primary_region or "", deleted.id)
    if primary is None or primary.state != "PendingReplicaDeletion":
        return
    if store.key_regions(primary.account, primary.id) == [primary.region]:
        primary.state = "PendingDeletion"
        primary.deletion_date = now + (primary.deletion_window or DEFAULT_WINDOW) * DAY
        store.save_key(primary)


def drop_material(store: Store, key: Key, generation: Material) -> None:
    """Forget imported material; the key waits for its import again, unless it is being deleted."""
    generation.sealed = None
    store.forget_material(generation.id)
    if generation.state == "PENDING_ROTATION":
        if not store.imported_elsewhere(key, generation.id):
            key.materials.remove(generation)
    elif key.state in ("Enabled", "Disabled"):
        key.state = "PendingImport"


def rotate(store: Store, key: Key, now: float, rotation_type: str, pending: Material | None = None) -> None:
    """Give the key new material, or make imported ``pending`` material current."""
    if pending is None:
        fresh = material.generate(material.SPECS[key.spec])
        identity = material.material_id(key.id, fresh)
        pending = Material(identity, now, sealed=store.seal_material(key.account, key.id, identity, fresh))
        key.materials.append(pending)
    for generation in key.materials:
        if generation.state == "CURRENT":
            generation.state = "NON_CURRENT"
    pending.state = "CURRENT"
    pending.rotated = now
    pending.rotation_type = rotation_type


# -- enable, disable, delete ---------------------------------------------------------------------


def enable_key(call: Call) -> Response:
    return _set_enabled(call, "Enabled")


def disable_key(call: Call) -> Response:
    return _set_enabled(call, "Disabled")


def _set_enabled(call: Call, state: str) -> Response:
    key = managed_key(call)
    if key.state not in ("Enabled", "Disabled"):
        call.refuse_state(key)
    key.state = state
    call.store.save_key(key)
    return {}


def managed_key(call: Call, conditions: dict[str, policy.Value] | None = None) -> Key:
    """The key that a management operation names, by key id or key ARN, once it is authorized."""
    key = call.resolve(call.request["KeyId"], aliases=False)
    call.authorize(key, conditions=conditions)
    return key


def schedule_key_deletion(call: Call) -> Response:
    window = call.request.get("PendingWindowInDays", DEFAULT_WINDOW)
    if not 7 <= window <= 30:
        bound = "greater than or equal to 7" if window < 7 else "less than or equal to 30"
        refuse(
            "ValidationException",
            f"1 validation error detected: Value '{window}' at 'pendingWindowInDays' failed to satisfy "
            f"constraint: Member must have value {bound}",
        )
    key = managed_key(call, {"kms:ScheduleKeyDeletionPendingWindowInDays": window})
    call.require_not_pending_deletion(key)
    if key.state in ("Creating", "Updating"):
        call.refuse_state(key)
    key.deletion_window = window
    replicas = [r for r in call.store.key_regions(key.account, key.id) if r != key.region]
    response: Response = {"KeyId": key.arn, "PendingWindowInDays": window}
    if replicas and key.primary_region == key.region:
        key.state = "PendingReplicaDeletion"
    else:
        key.state = "PendingDeletion"
        key.deletion_date = call.now + window * DAY
        response["DeletionDate"] = timestamp(key.deletion_date)
    response["KeyState"] = key.state
    call.store.save_key(key)
    return response


def cancel_key_deletion(call: Call) -> Response:
    key = managed_key(call)
    if key.state not in ("PendingDeletion", "PendingReplicaDeletion"):
        refuse("KMSInvalidStateException", f"{key.arn} is not pending deletion.")
    key.state = "Disabled"
    key.deletion_date = key.deletion_window = None
    if key.origin == "EXTERNAL" and any(m.sealed is None for m in key.materials or [Material("", 0.0)]):
        key.state = "PendingImport"
    call.store.save_key(key)
    return {"KeyId": key.arn}


# -- rotation ------------------------------------------------------------------------------------


def enable_key_rotation(call: Call) -> Response:
    period = call.request.get("RotationPeriodInDays", DEFAULT_ROTATION_PERIOD)
    key = managed_key(call, {"kms:RotationPeriodInDays": period})
    _require_automatic_rotation(call, key)
    call.require_enabled(key)
    if key.rotation_period != period:
        key.rotation_start = call.now
        key.rotation_next = call.now + period * DAY
    key.rotation_period = period
    call.store.save_key(key)
    return {}


def disable_key_rotation(call: Call) -> Response:
    key = managed_key(call)
    _require_automatic_rotation(call, key)
    call.require_enabled(key)
    key.rotation_period = key.rotation_next = key.rotation_start = None
    call.store.save_key(key)
    return {}


def _require_automatic_rotation(call: Call, key: Key) -> None:
    if key.origin != "AWS_KMS":
        refuse(
            "UnsupportedOperationException",
            f"{key.arn} origin is {key.origin} which is not valid for this operation.",
        )
    call.require_not_pending_deletion(key)
    if key.spec != material.SYMMETRIC:
        refuse("UnsupportedOperationException")
    _require_primary(key)


def _require_primary(key: Key) -> None:
    if key.primary_region not in (None, key.region):
        refuse("UnsupportedOperationException", f"{key.arn} is not a multi-region primary key.")


def get_key_rotation_status(call: Call) -> Response:
    key = call.resolve(call.request["KeyId"], aliases=False)
    call.authorize(key)
    if key.spec != material.SYMMETRIC:
        refuse("UnsupportedOperationException")
    call.require_not_pending_deletion(key)
    if key.state == "PendingImport":
        refuse(
            "UnsupportedOperationException",
            f"{key.arn} origin is {key.origin} which is not valid for this operation.",
        )
    schedule = key
    if key.primary_region not in (None, key.region):
        # Rotation is a shared property: a replica answers with its primary's.
        schedule = call.store.key(key.account, key.primary_region or "", key.id) or key
    response: Response = {"KeyId": key.arn, "KeyRotationEnabled": schedule.rotation_period is not None}
    if schedule.rotation_period is not None and schedule.rotation_next is not None:
        response["RotationPeriodInDays"] = schedule.rotation_period
        response["NextRotationDate"] = timestamp(schedule.rotation_next)
    return response


def rotate_key_on_demand(call: Call) -> Response:
    key = managed_key(call)
    call.require_enabled(key)
    if key.spec != material.SYMMETRIC:
        refuse("UnsupportedOperationException")
    _require_primary(key)
    if key.on_demand_rotations >= ON_DEMAND_ROTATIONS:
        refuse(
            "LimitExceededException",
            "The on-demand rotations limit has been reached for the given keyId. No more on-demand rotations "
            f"can be performed for this key: {key.arn}",
        )
    pending = None
    if key.origin == "EXTERNAL":
        pending = next((m for m in key.materials if m.state == "PENDING_ROTATION"), None)
        if pending is None or pending.sealed is None:
            refuse(
                "KMSInvalidStateException",
                f"No available key material pending rotation for the key: {key.arn}.",
            )
    if key.rotation_next is not None and key.rotation_next - call.now < _CONFLICT:
        refuse(
            "ConflictException",
            f"An automatic rotation of {key.arn} is in progress or begins within the next 20 minutes.",
        )
    rotate(call.store, key, call.now, "ON_DEMAND", pending)
    key.on_demand_rotations += 1
    call.store.save_key(key)
    return {"KeyId": key.arn}


def list_key_rotations(call: Call) -> Response:
    key = managed_key(call)
    if key.spec != material.SYMMETRIC:
        refuse("UnsupportedOperationException")
    everything = call.request.get("IncludeKeyMaterial") == "ALL_KEY_MATERIAL"
    entries = []
    for number, generation in enumerate(key.materials):
        if generation.rotated is None and not everything:
            continue
        entries.append((f"{number:08d}", _rotation_entry(key, generation, everything)))
    return call.page(entries, default=100, most=1000, member="Rotations")


def _rotation_entry(key: Key, generation: Material, everything: bool) -> Response:
    entry: Response = {"KeyId": key.arn, "KeyMaterialId": generation.id}
    if everything:
        entry["KeyMaterialState"] = generation.state
    if generation.rotated is not None:
        entry["RotationDate"] = timestamp(generation.rotated)
        entry["RotationType"] = generation.rotation_type
    if key.origin == "EXTERNAL":
        entry["ImportState"] = "IMPORTED" if generation.sealed is not None else "PENDING_IMPORT"
        if generation.expiration_model is not None:
            entry["ExpirationModel"] = generation.expiration_model
        if generation.valid_to is not None:
            entry["ValidTo"] = timestamp(generation.valid_to)
        if generation.description is not None:
            entry["KeyMaterialDescription"] = generation.description
    return entry
