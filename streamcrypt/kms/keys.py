"""The operations on keys and aliases: create, describe, list, enable, tag, delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from streamcrypt.kms import audit, managed, material, policy
from streamcrypt.kms.call import Call, timestamp
from streamcrypt.kms.errors import new_uuid, refuse
from streamcrypt.kms.store import Key, Material, key_arn

KEYS_PER_ACCOUNT: Final = 100_000
"""In one Region; AWS managed keys do not count."""
ALIASES_PER_KEY: Final = 50
TAGS_PER_KEY: Final = 50
POLICY_NAME: Final = "default"
NO_CUSTOM_KEY_STORES: Final = "Custom key stores are not supported by the embedded KMS."

Response = dict[str, Any]


# -- creating and describing ---------------------------------------------------------------------


def prepare_create_key(call: Call) -> bytes:
    """Fresh material for CreateKey, made before the transaction: an RSA key takes a second."""
    spec, usage = _spec_and_usage(call.request)
    if _origin(call.request) == "EXTERNAL":
        return b""
    call.authorize_account(conditions=_create_conditions(call.request, spec.name, usage))
    return material.generate(spec)


def create_key(call: Call) -> Response:
    request = call.request
    spec, usage = _spec_and_usage(request)
    origin = _origin(request)
    tags = checked_tags({}, request.get("Tags") or ())
    conditions = _create_conditions(request, spec.name, usage)
    call.authorize_account(conditions=conditions)
    if tags:
        call.authorize_account("kms:TagResource", conditions=tag_conditions(tags))
    multi_region = bool(request.get("MultiRegion"))
    key_id = new_uuid()
    if multi_region:
        key_id = f"mrk-{key_id.replace('-', '')}"
    key = Key(
        account=call.account,
        region=call.region,
        id=key_id,
        created=call.now,
        spec=spec.name,
        usage=usage,
        origin=origin,
        description=request.get("Description", ""),
        key_policy=request.get("Policy") or policy.default_key_policy(call.account),
        tags=tags,
        primary_region=call.region if multi_region else None,
    )
    key.facts = policy.KeyFacts(
        key_arn(key.account, key.region, key.id),
        spec=key.spec,
        usage=key.usage,
        origin=key.origin,
        multi_region=multi_region,
        multi_region_key_type="PRIMARY" if multi_region else None,
        tags=tags,
    )
    if "Policy" in request:
        check_policy(call, key, request["Policy"])
    check_key_quota(call, key.region)
    if origin == "EXTERNAL":
        key.state = "PendingImport"
    else:
        identity = material.material_id(key_id, call.prepared)
        sealed = call.store.seal_material(key.account, key_id, identity, call.prepared)
        key.materials = [Material(identity, call.now, sealed=sealed)]
    call.store.save_key(key)
    call.keys.append(key)
    return {"KeyMetadata": metadata(call, key)}


def check_key_quota(call: Call, region: str) -> None:
    """LimitExceededException when the account has as many keys in the Region as it may have."""
    if call.store.count_keys(call.account, region) >= KEYS_PER_ACCOUNT:
        refuse("LimitExceededException", f"The account has reached its limit of {KEYS_PER_ACCOUNT} KMS keys.")


def check_policy(call: Call, key: Key, text: str) -> None:
    """KmsError unless ``text`` may become the key's policy."""
    bypass = bool(call.request.get("BypassPolicyLockoutSafetyCheck"))
    request = policy.Request(call.caller, "kms:PutKeyPolicy", key=key.facts, time=call.now)
    policy.check_key_policy(text, request, bypass_lockout_check=bypass)


def _spec_and_usage(request: Mapping[str, Any]) -> tuple[material.KeySpec, str]:
    name = request.get("KeySpec") or request.get("CustomerMasterKeySpec") or material.SYMMETRIC
    older = request.get("CustomerMasterKeySpec")
    if older is not None and older != name:
        refuse(
            "ValidationException",
            "You cannot specify KeySpec and CustomerMasterKeySpec in the same request. "
            "CustomerMasterKeySpec is deprecated.",
        )
    spec = material.SPECS[name]
    usage = request.get("KeyUsage")
    if usage is None:
        if name != material.SYMMETRIC:
            refuse(
                "ValidationException",
                "You must specify a KeyUsage value for all KMS keys except for symmetric encryption keys.",
            )
        usage = material.ENCRYPT_DECRYPT
    if usage not in spec.usages:
        refuse("ValidationException", f"KeyUsage {usage} is not compatible with KeySpec {name}")
    return spec, usage


def _origin(request: Mapping[str, Any]) -> str:
    origin: str = request.get("Origin", "AWS_KMS")
    if origin in ("AWS_CLOUDHSM", "EXTERNAL_KEY_STORE") or "CustomKeyStoreId" in request:
        refuse("UnsupportedOperationException", NO_CUSTOM_KEY_STORES)
    return origin


def _create_conditions(request: Mapping[str, Any], spec: str, usage: str) -> dict[str, policy.Value]:
    return {
        "kms:KeySpec": spec,
        "kms:KeyUsage": usage,
        "kms:KeyOrigin": _origin(request),
        "kms:MultiRegion": bool(request.get("MultiRegion")),
        "kms:BypassPolicyLockoutSafetyCheck": bool(request.get("BypassPolicyLockoutSafetyCheck")),
    }


def metadata(call: Call, key: Key) -> Response:
    """KeyMetadata: members that do not apply are absent."""
    spec = material.SPECS[key.spec]
    described: Response = {
        "AWSAccountId": key.account,
        "KeyId": key.id,
        "Arn": key.arn,
        "CreationDate": timestamp(key.created),
        "Enabled": key.state == "Enabled",
        "Description": key.description,
        "KeyUsage": key.usage,
        "KeyState": key.state,
        "Origin": key.origin,
        "KeyManager": key.manager,
        "CustomerMasterKeySpec": key.spec,
        "KeySpec": key.spec,
        material.ALGORITHM_MEMBERS[key.usage]: list(spec.usages[key.usage]),
        "MultiRegion": key.multi_region,
    }
    if key.state == "PendingDeletion" and key.deletion_date is not None:
        described["DeletionDate"] = timestamp(key.deletion_date)
    if key.state == "PendingReplicaDeletion" and key.deletion_window is not None:
        described["PendingDeletionWindowInDays"] = key.deletion_window
    current = key.current
    if current is not None and key.spec == material.SYMMETRIC:
        described["CurrentKeyMaterialId"] = current.id
    if current is not None and current.sealed is not None and current.expiration_model is not None:
        described["ExpirationModel"] = current.expiration_model
        if current.valid_to is not None:
            described["ValidTo"] = timestamp(current.valid_to)
    if key.primary_region is not None:
        described["MultiRegionConfiguration"] = _multi_region(call, key, key.primary_region)
    return described


def _multi_region(call: Call, key: Key, primary_region: str) -> Response:
    def place(region: str) -> Response:
        return {"Arn": key_arn(key.account, region, key.id), "Region": region}

    regions = call.store.key_regions(key.account, key.id)
    return {
        "MultiRegionKeyType": "PRIMARY" if key.region == primary_region else "REPLICA",
        "PrimaryKey": place(primary_region),
        "ReplicaKeys": [place(region) for region in regions if region != primary_region],
    }


def describe_key(call: Call) -> Response:
    key = call.resolve(call.request["KeyId"])
    call.authorize(key, reference=call.request["KeyId"])
    return {"KeyMetadata": metadata(call, key)}


_TRACKED: Final = (
    "Decrypt", "DeriveSharedSecret", "Encrypt", "GenerateDataKey", "GenerateDataKeyPair",
    "GenerateDataKeyPairWithoutPlaintext", "GenerateDataKeyWithoutPlaintext", "GenerateMac", "ReEncrypt",
    "Sign", "Verify", "VerifyMac",
)  # fmt: skip


def get_key_last_usage(call: Call) -> Response:
    key = call.resolve(call.request["KeyId"], aliases=False)
    call.authorize(key)
    marks = ", ".join("?" for _ in _TRACKED)
    rows = call.store.query(
        f"SELECT {', '.join(audit.COLUMNS)} FROM audit WHERE error IS NULL AND operation IN ({marks}) "  # noqa: S608
        "AND instr(key, ?) ORDER BY id DESC LIMIT 1",
        (*_TRACKED, key.arn),
    )
    usage: Response = {}
    if rows:
        event = audit.event(rows[0])
        usage = {
            "Operation": event["eventName"],
            "Timestamp": timestamp(rows[0][1]),
            "CloudTrailEventId": event["eventID"],
            "KmsRequestId": event["requestID"],
        }
    return {
        "KeyId": key.arn,
        "KeyLastUsage": usage,
        # The audit begins with the store, and so before any key.
        "TrackingStartDate": timestamp(key.created),
        "KeyCreationDate": timestamp(key.created),
    }


def list_keys(call: Call) -> Response:
    limit, after = call.page_limit(default=100, most=1000), call.marker()
    call.authorize_account()
    own = "SELF" in call.request.get("ResourceOwners", ("SELF",))  # nobody shares keys here (AWS RAM)
    ids = call.store.key_ids(call.account, call.region, after, limit + 1) if own else ()
    entries = [
        (key_id, {"KeyId": key_id, "KeyArn": key_arn(call.account, call.region, key_id)}) for key_id in ids
    ]
    return call.page(entries, default=100, most=1000, member="Keys")


# -- aliases -----------------------------------------------------------------------------------------


def create_alias(call: Call) -> Response:
    name = _alias_name(call)
    alias_arn = f"arn:aws:kms:{call.region}:{call.account}:{name}"
    key = call.resolve(call.request["TargetKeyId"], aliases=False)
    call.authorize_account(resource=alias_arn)
    call.authorize(key)
    call.require_not_pending_deletion(key)
    if call.store.alias_target(call.account, call.region, name) is not None:
        refuse("AlreadyExistsException", f"An alias with the name {alias_arn} already exists")
    _check_alias_quota(key)
    call.store.put_alias(call.account, call.region, name, key.id, call.now)
    return {}


def update_alias(call: Call) -> Response:
    name = _alias_name(call)
    alias_arn = f"arn:aws:kms:{call.region}:{call.account}:{name}"
    key = call.resolve(call.request["TargetKeyId"], aliases=False)
    old_id = call.store.alias_target(call.account, call.region, name)
    if old_id is None:
        refuse("NotFoundException", f"Alias {alias_arn} is not found.")
    call.authorize_account(resource=alias_arn)
    old = call.store.key(call.account, call.region, old_id)
    if old is not None:
        call.authorize(old)
    call.authorize(key)
    call.require_not_pending_deletion(key)
    if old is not None and (old.usage != key.usage or _key_type(old) != _key_type(key)):
        refuse(
            "ValidationException",
            f"Alias {alias_arn} cannot be changed from key {old.arn} to key {key.arn} because the keys do not "
            "have the same KeyUsage and the same type",
        )
    if old_id != key.id:
        _check_alias_quota(key)
    call.store.put_alias(call.account, call.region, name, key.id, call.now)
    return {}


def delete_alias(call: Call) -> Response:
    name = _alias_name(call)
    alias_arn = f"arn:aws:kms:{call.region}:{call.account}:{name}"
    target = call.store.alias_target(call.account, call.region, name)
    if target is None:
        refuse("NotFoundException", f"Alias {alias_arn} is not found.")
    call.authorize_account(resource=alias_arn)
    key = call.store.key(call.account, call.region, target)
    if key is not None:
        call.keys.append(key)
        call.authorize(key)
    call.store.delete_alias(call.account, call.region, name)
    return {}


def list_aliases(call: Call) -> Response:
    target = None
    call.authorize_account()
    if "KeyId" in call.request:
        target = call.resolve(call.request["KeyId"], aliases=False).id
    entries: dict[str, Response] = {}
    for service in managed.SERVICES if target is None else ():
        name = managed.PREFIX + service
        entries[name] = {"AliasName": name, "AliasArn": f"arn:aws:kms:{call.region}:{call.account}:{name}"}
    for name, key_id, created, updated in call.store.list_aliases(call.account, call.region):
        if target in (None, key_id):
            entries[name] = {
                "AliasName": name,
                "AliasArn": f"arn:aws:kms:{call.region}:{call.account}:{name}",
                "TargetKeyId": key_id,
                "CreationDate": timestamp(created),
                "LastUpdatedDate": timestamp(updated),
            }
    return call.page(sorted(entries.items()), default=50, most=100, member="Aliases")


def _alias_name(call: Call) -> str:
    name: str = call.request["AliasName"]
    if not name.startswith("alias/"):
        refuse(
            "ValidationException",
            'Alias must start with the prefix "alias/". Please see '
            "https://docs.aws.amazon.com/kms/latest/developerguide/kms-alias.html",
        )
    if name == "alias/":
        refuse("InvalidAliasNameException", f"Invalid alias name {name}")
    if name.startswith(managed.PREFIX):
        refuse("NotAuthorizedException", f"{name} is reserved for AWS managed keys.")
    return name


def _check_alias_quota(key: Key) -> None:
    if len(key.aliases) >= ALIASES_PER_KEY:
        refuse("LimitExceededException", f"{key.arn} has reached its limit of {ALIASES_PER_KEY} aliases.")


def _key_type(key: Key) -> str:
    kind = material.SPECS[key.spec].kind
    return kind if kind in ("symmetric", "hmac") else "asymmetric"


# -- custom key stores: there are none -----------------------------------------------------------------


def describe_custom_key_stores(call: Call) -> Response:
    call.authorize_account()
    for member in ("CustomKeyStoreId", "CustomKeyStoreName"):
        if member in call.request:
            refuse("CustomKeyStoreNotFoundException", f"{call.request[member]} does not exist.")
    return call.page([], default=1000, most=1000, member="CustomKeyStores")


def use_custom_key_store(call: Call) -> Response:
    """Connect, disconnect, update or delete one."""
    call.authorize_account()
    refuse("CustomKeyStoreNotFoundException", f"{call.request['CustomKeyStoreId']} does not exist.")


def create_custom_key_store(call: Call) -> Response:
    call.authorize_account()
    refuse("UnsupportedOperationException", NO_CUSTOM_KEY_STORES)


# -- tags ----------------------------------------------------------------------------------------------


def tag_resource(call: Call) -> Response:
    added = call.request["Tags"]
    key = call.resolve(call.request["KeyId"], aliases=False)
    call.authorize(key, conditions=tag_conditions({tag["TagKey"]: tag["TagValue"] for tag in added}))
    call.require_not_pending_deletion(key)
    key.tags = checked_tags(key.tags, added)
    call.store.save_key(key)
    return {}


def untag_resource(call: Call) -> Response:
    names = call.request["TagKeys"]
    key = call.resolve(call.request["KeyId"], aliases=False)
    call.authorize(key, conditions={"aws:TagKeys": list(names)})
    call.require_not_pending_deletion(key)
    key.tags = {name: value for name, value in key.tags.items() if name not in names}
    call.store.save_key(key)
    return {}


def list_resource_tags(call: Call) -> Response:
    key = call.resolve(call.request["KeyId"], aliases=False)
    call.authorize(key)
    entries = [(name, {"TagKey": name, "TagValue": key.tags[name]}) for name in sorted(key.tags)]
    return call.page(entries, default=50, most=50, member="Tags")


def checked_tags(existing: Mapping[str, str], added: Any) -> dict[str, str]:
    """The tags afterwards; TagException as AWS answers."""
    names = [tag["TagKey"] for tag in added]
    if len(set(names)) != len(names):
        refuse("TagException", "Duplicate tag keys")
    if any(name.lower().startswith("aws:") for name in names):
        refuse("TagException", "Tags beginning with aws: are reserved")
    tags = dict(existing) | {tag["TagKey"]: tag["TagValue"] for tag in added}
    if len(tags) > TAGS_PER_KEY:
        refuse("TagException", "Too many tags")
    return tags


def tag_conditions(tags: Mapping[str, str]) -> dict[str, policy.Value]:
    conditions: dict[str, policy.Value] = {f"aws:RequestTag/{name}": value for name, value in tags.items()}
    conditions["aws:TagKeys"] = list(tags)
    return conditions


# -- description and policy --------------------------------------------------------------------


def update_key_description(call: Call) -> Response:
    key = call.resolve(call.request["KeyId"], aliases=False)
    call.authorize(key)
    call.require_not_pending_deletion(key)
    key.description = call.request["Description"]
    call.store.save_key(key)
    return {}


def get_key_policy(call: Call) -> Response:
    name = call.request.get("PolicyName", POLICY_NAME)
    key = call.resolve(call.request["KeyId"], aliases=False)
    call.authorize(key, conditions={"kms:PolicyName": name})
    _check_policy_name(name)
    return {"Policy": key.key_policy, "PolicyName": POLICY_NAME}


def put_key_policy(call: Call) -> Response:
    name = call.request.get("PolicyName", POLICY_NAME)
    key = call.resolve(call.request["KeyId"], aliases=False)
    bypass = bool(call.request.get("BypassPolicyLockoutSafetyCheck"))
    call.authorize(key, conditions={"kms:PolicyName": name, "kms:BypassPolicyLockoutSafetyCheck": bypass})
    _check_policy_name(name)
    check_policy(call, key, call.request["Policy"])
    key.key_policy = call.request["Policy"]
    call.store.save_key(key)
    return {}


def list_key_policies(call: Call) -> Response:
    key = call.resolve(call.request["KeyId"], aliases=False)
    call.authorize(key)
    return call.page([(POLICY_NAME, POLICY_NAME)], default=100, most=1000, member="PolicyNames")


def _check_policy_name(name: str) -> None:
    if name != POLICY_NAME:
        refuse("NotFoundException", "No such policy exists")
