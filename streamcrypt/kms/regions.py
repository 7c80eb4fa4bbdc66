"""Multi-Region keys: replicas in other Regions of the same store, and which Region is primary.

Key id, material, spec, usage, origin and rotation are shared; policy, grants, aliases, tags,
description and state are each Region's own.
"""

from __future__ import annotations

import copy
from typing import Any

from streamcrypt.kms import keys, lifecycle, policy
from streamcrypt.kms.call import Call
from streamcrypt.kms.errors import refuse
from streamcrypt.kms.store import Key, key_arn

Response = dict[str, Any]


def replicate_key(call: Call) -> Response:
    request = call.request
    region = request["ReplicaRegion"]
    primary = lifecycle.managed_key(call, {"kms:ReplicaRegion": region})
    if primary.primary_region != primary.region:
        refuse("UnsupportedOperationException", f"{primary.arn} is not a multi-region primary key.")
    call.authorize_account(
        "kms:CreateKey", conditions={"kms:MultiRegion": True, "kms:MultiRegionKeyType": "REPLICA"}
    )
    tags = keys.checked_tags({}, request.get("Tags") or ())
    if tags:
        call.authorize_account("kms:TagResource", conditions=keys.tag_conditions(tags))
    call.require_enabled(primary)
    if region in call.store.key_regions(primary.account, primary.id):
        arn = key_arn(primary.account, region, primary.id)
        refuse("AlreadyExistsException", f"{arn} already exists")
    replica = Key(
        account=primary.account,
        region=region,
        id=primary.id,
        created=call.now,
        spec=primary.spec,
        usage=primary.usage,
        origin=primary.origin,
        description=request.get("Description", ""),
        key_policy=request.get("Policy") or policy.default_key_policy(primary.account),
        tags=tags,
        primary_region=primary.region,
        materials=[copy.copy(generation) for generation in primary.materials],
    )
    arn = key_arn(replica.account, region, replica.id)
    replica.facts = primary.facts._replace(arn=arn, multi_region_key_type="REPLICA", aliases=(), tags=tags)
    if "Policy" in request:
        keys.check_policy(call, replica, request["Policy"])
    keys.check_key_quota(call, region)
    if replica.origin == "EXTERNAL":
        replica.state = "PendingImport"  # the same material is imported once more, into the replica
        for generation in replica.materials:
            generation.sealed = None
    call.store.save_key(replica)
    call.keys.append(replica)
    # AWS answers before the replica is ready.
    described = keys.metadata(call, replica) | {"KeyState": "Creating", "Enabled": False}
    return {
        "ReplicaKeyMetadata": described,
        "ReplicaPolicy": replica.key_policy,
        "ReplicaTags": [{"TagKey": name, "TagValue": value} for name, value in tags.items()],
    }


def update_primary_region(call: Call) -> Response:
    region = call.request["PrimaryRegion"]
    primary = lifecycle.managed_key(call, {"kms:PrimaryRegion": region})
    if primary.primary_region != primary.region:
        refuse("UnsupportedOperationException", f"{primary.arn} is not a multi-region primary key.")
    call.require_enabled(primary)
    if region == primary.region:
        return {}
    successor = call.store.key(primary.account, region, primary.id)
    if successor is None:
        refuse("NotFoundException", f"Key '{key_arn(primary.account, region, primary.id)}' does not exist")
    call.authorize(successor, conditions={"kms:PrimaryRegion": region})
    call.require_enabled(successor)
    for name in ("rotation_period", "rotation_next", "rotation_start", "on_demand_rotations"):
        setattr(successor, name, getattr(primary, name))
    primary.rotation_period = primary.rotation_next = primary.rotation_start = None
    for place in call.store.key_regions(primary.account, primary.id):
        related = {primary.region: primary, region: successor}.get(place) or call.store.key(
            primary.account, place, primary.id
        )
        if related is not None:
            related.primary_region = region
            call.store.save_key(related)
    return {}
