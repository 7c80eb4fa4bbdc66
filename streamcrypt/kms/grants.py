"""Grants: create, list, retire, revoke."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, Final

from streamcrypt.kms import lifecycle, policy
from streamcrypt.kms.call import Call, timestamp
from streamcrypt.kms.errors import refuse
from streamcrypt.kms.store import GrantRecord, Key

GRANTS_PER_KEY: Final = 50_000
_GRANT_ID: Final = "[0-9a-f]{64}"

Response = dict[str, Any]


def create_grant(call: Call) -> Response:
    request = call.request
    record = _wanted(call)
    key = call.resolve(request["KeyId"], aliases=False)
    call.authorize(key, new_grant=record.grant)
    call.require_enabled(key)
    policy.check_new_grant(record.grant, key.facts)
    if record.name is not None:
        # The same name with the same content is the same grant, with another token.
        for existing in key.grants:
            if _same(existing, record):
                grant_id = existing.grant.grant_id
                return {"GrantId": grant_id, "GrantToken": call.new_grant_token(grant_id)}
    if len(key.grants) >= GRANTS_PER_KEY:
        refuse("LimitExceededException", f"{key.arn} has reached its limit of {GRANTS_PER_KEY} grants.")
    call.store.put_grant(key, record)
    grant_id = record.grant.grant_id
    return {"GrantId": grant_id, "GrantToken": call.new_grant_token(grant_id)}


def _wanted(call: Call) -> GrantRecord:
    """The grant that the request describes."""
    request = call.request
    grantee = request.get("GranteePrincipal") or request.get("GranteeServicePrincipal")
    if grantee is None or ("GranteePrincipal" in request and "GranteeServicePrincipal" in request):
        refuse("ValidationException", "Specify either GranteePrincipal or GranteeServicePrincipal.")
    if "RetiringPrincipal" in request and "RetiringServicePrincipal" in request:
        refuse("ValidationException", "Specify either RetiringPrincipal or RetiringServicePrincipal.")
    retiring = request.get("RetiringPrincipal") or request.get("RetiringServicePrincipal")
    constraints = request.get("Constraints") or {}
    if "GranteeServicePrincipal" in request and ("SourceArn" not in constraints or retiring is None):
        refuse(
            "ValidationException",
            "A grant to a service principal needs a SourceArn constraint and a retiring principal.",
        )
    grant = policy.Grant(
        grant_id=os.urandom(32).hex(),
        grantee=grantee,
        operations=frozenset(request["Operations"]),
        retiring=retiring,
        issuing_account=call.account,
        equals=constraints.get("EncryptionContextEquals"),
        subset=constraints.get("EncryptionContextSubset"),
        source_arn=constraints.get("SourceArn"),
    )
    return GrantRecord(
        grant,
        call.now,
        name=request.get("Name"),
        grantee_service="GranteeServicePrincipal" in request,
        retiring_service="RetiringServicePrincipal" in request,
    )


def _same(existing: GrantRecord, wanted: GrantRecord) -> bool:
    grant = existing.grant._replace(grant_id=wanted.grant.grant_id)
    return existing._replace(grant=grant, created=wanted.created) == wanted


def list_grants(call: Call) -> Response:
    request = call.request
    key = call.resolve(request["KeyId"], aliases=False)
    call.authorize(key)
    grant_id = request.get("GrantId")
    if grant_id is not None and not re.fullmatch(_GRANT_ID, grant_id):
        refuse("InvalidGrantIdException", f"Invalid grant id {grant_id}")
    grantee = request.get("GranteePrincipal") or request.get("GranteeServicePrincipal")
    found = (
        (key, record)
        for record in key.grants
        if grant_id in (None, record.grant.grant_id) and grantee in (None, record.grant.grantee)
    )
    return _page(call, found)


def list_retirable_grants(call: Call) -> Response:
    request = call.request
    retiring = request.get("RetiringPrincipal") or request.get("RetiringServicePrincipal")
    if retiring is None:
        refuse("ValidationException", "Specify either RetiringPrincipal or RetiringServicePrincipal.")
    call.authorize_account()
    found = []
    for account, region, key_id in call.store.keys_with_grants():
        key = call.store.key(account, region, key_id) if region == call.region else None
        if key is not None:
            found += [(key, record) for record in key.grants if record.grant.retiring == retiring]
    return _page(call, found)


def _page(call: Call, found: Iterable[tuple[Key, GrantRecord]]) -> Response:
    entries = sorted(((record.grant.grant_id, _entry(key, record)) for key, record in found), key=_by_id)
    return call.page(entries, default=50, most=100, member="Grants")


def _by_id(entry: tuple[str, Response]) -> str:
    return entry[0]


def _entry(key: Key, record: GrantRecord) -> Response:
    grant = record.grant
    entry: Response = {
        "KeyId": key.arn,
        "GrantId": grant.grant_id,
        "CreationDate": timestamp(record.created),
        "GranteeServicePrincipal" if record.grantee_service else "GranteePrincipal": grant.grantee,
        "IssuingAccount": f"arn:aws:iam::{grant.issuing_account}:root",
        "Operations": sorted(grant.operations),
    }
    if record.name is not None:
        entry["Name"] = record.name
    if grant.retiring is not None:
        member = "RetiringServicePrincipal" if record.retiring_service else "RetiringPrincipal"
        entry[member] = grant.retiring
    constraints: Response = {}
    if grant.equals is not None:
        constraints["EncryptionContextEquals"] = dict(grant.equals)
    if grant.subset is not None:
        constraints["EncryptionContextSubset"] = dict(grant.subset)
    if grant.source_arn is not None:
        constraints["SourceArn"] = grant.source_arn
    if constraints:
        entry["Constraints"] = constraints
    return entry


def revoke_grant(call: Call) -> Response:
    key = lifecycle.managed_key(call)
    grant_id = call.request["GrantId"]
    _find(key, grant_id)
    call.store.delete_grant(key, grant_id)
    return {}


def retire_grant(call: Call) -> Response:
    request = call.request
    token = request.get("GrantToken")
    if token is not None:
        if "KeyId" in request or "GrantId" in request:
            refuse("ValidationException", "Specify either GrantToken, or KeyId and GrantId.")
        key, record = _by_token(call, token)
    else:
        if "KeyId" not in request or "GrantId" not in request:
            refuse("ValidationException", "Specify either GrantToken, or KeyId and GrantId.")
        if not request["KeyId"].startswith("arn:"):
            refuse("InvalidArnException", f"Invalid arn {request['KeyId']}")
        key = call.resolve(request["KeyId"], aliases=False)
        record = _find(key, request["GrantId"])
    if not policy.may_retire(call.caller, record.grant, key.arn):
        refuse(
            "AccessDeniedException",
            f"User: {call.caller.arn} is not authorized to perform: kms:RetireGrant on resource: {key.arn}",
        )
    call.store.delete_grant(key, record.grant.grant_id)
    return {}


def _by_token(call: Call, token: str) -> tuple[Key, GrantRecord]:
    grant_id = call.read_grant_token(token)
    place = call.store.key_of_grant(grant_id)
    key = call.store.key(*place) if place is not None else None
    if key is None:
        refuse("NotFoundException", f"Grant ID {grant_id} not found")
    call.keys.append(key)
    return key, _find(key, grant_id)


def _find(key: Key, grant_id: str) -> GrantRecord:
    if not re.fullmatch(_GRANT_ID, grant_id):
        refuse("InvalidGrantIdException", f"Invalid grant id {grant_id}")
    record = next((record for record in key.grants if record.grant.grant_id == grant_id), None)
    if record is None:
        refuse("NotFoundException", f"Grant ID {grant_id} not found")
    return record
