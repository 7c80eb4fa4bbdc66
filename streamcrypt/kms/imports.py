"""Imported key material: KMS gives a wrapping key, the caller wraps, KMS unwraps and keeps it.

    import token   nonce 12 | AES-256-GCM of {key, wrapping algorithm, valid to, private wrapping key}

The token carries the private wrapping key itself, sealed under a secret of this store: nothing
is stored until material arrives, and any process of the store can read any token.
"""

from __future__ import annotations

import base64
import json
import os
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap_with_padding

from streamcrypt.kms import lifecycle, material
from streamcrypt.kms.call import Call, timestamp
from streamcrypt.kms.errors import KmsError, refuse
from streamcrypt.kms.policy import Value
from streamcrypt.kms.store import Key, Material

_TOKEN_LIFE: Final = 24 * 3600.0
_LONGEST_VALIDITY: Final = 365 * lifecycle.DAY
_NONCE_LENGTH: Final = 12
_OAEP_OF: Final = {
    "RSAES_OAEP_SHA_1": "RSAES_OAEP_SHA_1",
    "RSAES_OAEP_SHA_256": "RSAES_OAEP_SHA_256",
    "RSA_AES_KEY_WRAP_SHA_1": "RSAES_OAEP_SHA_1",
    "RSA_AES_KEY_WRAP_SHA_256": "RSAES_OAEP_SHA_256",
}

Response = dict[str, Any]


def get_parameters_for_import(call: Call) -> Response:
    algorithm, spec_name = call.request["WrappingAlgorithm"], call.request["WrappingKeySpec"]
    key = lifecycle.managed_key(call, {"kms:WrappingAlgorithm": algorithm, "kms:WrappingKeySpec": spec_name})
    _require_external(key)
    call.require_not_pending_deletion(key)
    if algorithm not in _OAEP_OF or spec_name == "SM2":
        refuse(
            "UnsupportedOperationException",
            f"Wrapping algorithm {algorithm} with key spec {spec_name} is not supported in this region.",
        )
    wrapping = material.generate_private_key(material.SPECS[spec_name])
    valid_to = call.now + _TOKEN_LIFE
    content = {
        "key": key.arn,
        "algorithm": algorithm,
        "valid_to": valid_to,
        "private": base64.b64encode(material.private_der(wrapping)).decode(),
    }
    nonce = os.urandom(_NONCE_LENGTH)
    token = nonce + _token_cipher(call).encrypt(nonce, json.dumps(content).encode(), None)
    return {
        "KeyId": key.arn,
        "ImportToken": token,
        "PublicKey": material.public_der(wrapping),
        "ParametersValidTo": timestamp(valid_to),
    }


def import_key_material(call: Call) -> Response:
    request = call.request
    model = request.get("ExpirationModel", "KEY_MATERIAL_EXPIRES")
    valid_to = request["ValidTo"].timestamp() if "ValidTo" in request else None
    _check_validity(model, valid_to, call.now)
    conditions: dict[str, Value] = {"kms:ExpirationModel": model}
    if valid_to is not None:
        conditions["kms:ValidTo"] = request["ValidTo"]
    key = lifecycle.managed_key(call, conditions)
    _require_external(key)
    call.require_not_pending_deletion(key)
    fresh = _unwrap(call, key)
    identity = material.material_id(key.id, fresh)
    if request.get("KeyMaterialId") not in (None, identity):
        refuse("IncorrectKeyMaterialException", _NOT_THE_SAME)
    generation = _generation_for(call, key, identity)
    generation.sealed = call.store.seal_material(key.account, key.id, identity, fresh)
    generation.expiration_model = model
    generation.valid_to = valid_to if model == "KEY_MATERIAL_EXPIRES" else None
    generation.description = request.get("KeyMaterialDescription", generation.description)
    needed = [m for m in key.materials if m.state != "PENDING_ROTATION"]
    if key.state == "PendingImport" and all(m.sealed is not None for m in needed):
        key.state = "Enabled"
    call.store.save_key(key)
    return {"KeyId": key.arn, "KeyMaterialId": identity}


def delete_imported_key_material(call: Call) -> Response:
    key = lifecycle.managed_key(call)
    _require_external(key)
    call.require_not_pending_deletion(key)
    wanted = call.request.get("KeyMaterialId")
    generation = key.current
    if wanted is not None:
        generation = next((m for m in key.materials if m.id == wanted), None)
        if generation is None:
            refuse("NotFoundException", f"Key material {wanted} of {key.arn} does not exist")
    response: Response = {"KeyId": key.arn}
    if generation is not None:
        response["KeyMaterialId"] = generation.id
        lifecycle.drop_material(call.store, key, generation)
        call.store.save_key(key)
    return response


_NOT_THE_SAME: Final = (
    "The key material in the request is not the key material that was previously imported into this KMS key."
)


def _require_external(key: Key) -> None:
    if key.origin != "EXTERNAL":
        refuse(
            "UnsupportedOperationException",
            f"{key.arn} origin is {key.origin} which is not valid for this operation.",
        )


def _check_validity(model: str, valid_to: float | None, now: float) -> None:
    if model == "KEY_MATERIAL_EXPIRES" and valid_to is None:
        refuse(
            "ValidationException",
            "A validTo date must be set if the ExpirationModel is KEY_MATERIAL_EXPIRES",
        )
    if model == "KEY_MATERIAL_DOES_NOT_EXPIRE" and valid_to is not None:
        refuse(
            "ValidationException",
            "A validTo date must not be set if the ExpirationModel is KEY_MATERIAL_DOES_NOT_EXPIRE",
        )
    if valid_to is not None and not now < valid_to <= now + _LONGEST_VALIDITY:
        refuse("ValidationException", "The validTo date must be in the future, and at most 365 days from now")


def _generation_for(call: Call, key: Key, identity: str) -> Material:
    """Where the material belongs: the first, one that was there before, or the next one to rotate to."""
    existing = next((m for m in key.materials if m.id == identity), None)
    default = "EXISTING_KEY_MATERIAL" if key.materials else "NEW_KEY_MATERIAL"
    wanted = call.request.get("ImportType", default)
    if wanted == "EXISTING_KEY_MATERIAL":
        if existing is None:
            refuse("IncorrectKeyMaterialException", _NOT_THE_SAME)
        return existing
    if existing is not None:
        refuse("IncorrectKeyMaterialException", "The key material was already imported into this KMS key.")
    state = "CURRENT"
    if key.materials:
        if key.spec != material.SYMMETRIC:
            refuse("IncorrectKeyMaterialException", _NOT_THE_SAME)
        if any(m.state == "PENDING_ROTATION" for m in key.materials):
            refuse("KMSInvalidStateException", f"{key.arn} has key material pending rotation already.")
        state = "PENDING_ROTATION"
    generation = Material(identity, call.now, state=state)
    key.materials.append(generation)
    return generation


def _unwrap(call: Call, key: Key) -> bytes:
    content = _read_token(call, key)
    private = material.load_private(base64.b64decode(content["private"]))
    algorithm, wrapped = content["algorithm"], bytes(call.request["EncryptedKeyMaterial"])
    oaep = _OAEP_OF[algorithm]
    if not algorithm.startswith("RSA_AES_KEY_WRAP"):
        return material.import_material(
            material.SPECS[key.spec], material.rsa_decrypt(oaep, private, wrapped)
        )
    # PKCS#11's CKM_RSA_AES_KEY_WRAP: an AES key under RSA, then the material under RFC 5649.
    length = private.key_size // 8
    wrapping = material.rsa_decrypt(oaep, private, wrapped[:length])
    try:
        opened = aes_key_unwrap_with_padding(wrapping, wrapped[length:])
    except (InvalidUnwrap, ValueError) as error:
        raise KmsError("InvalidCiphertextException") from error
    return material.import_material(material.SPECS[key.spec], opened)


def _read_token(call: Call, key: Key) -> dict[str, Any]:
    token = bytes(call.request["ImportToken"])
    try:
        opened = _token_cipher(call).decrypt(token[:_NONCE_LENGTH], token[_NONCE_LENGTH:], None)
    except (InvalidTag, ValueError) as error:
        raise KmsError("InvalidImportTokenException") from error
    content: dict[str, Any] = json.loads(opened)
    if content["key"] != key.arn:
        refuse("InvalidImportTokenException")
    if content["valid_to"] <= call.now:
        refuse("ExpiredImportTokenException")
    return content


def _token_cipher(call: Call) -> AESGCM:
    return AESGCM(call.store.secret(b"import token"))
