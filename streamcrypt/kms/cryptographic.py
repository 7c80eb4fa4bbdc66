"""The operations that use keys: encrypt, data keys, signatures, MACs, agreement, random bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from streamcrypt.kms import material
from streamcrypt.kms.call import Call
from streamcrypt.kms.errors import refuse
from streamcrypt.kms.material import (
    ENCAPSULATE_DECAPSULATE,
    ENCRYPT_DECRYPT,
    GENERATE_VERIFY_MAC,
    KEY_AGREEMENT,
    SIGN_VERIFY,
    SYMMETRIC,
)
from streamcrypt.kms.policy import Value
from streamcrypt.kms.store import Key

_DATA_KEY_LENGTHS: Final = {"AES_256": 32, "AES_128": 16}

Response = dict[str, Any]


def encrypt(call: Call) -> Response:
    request = call.request
    algorithm = request.get("EncryptionAlgorithm", SYMMETRIC)
    context = request.get("EncryptionContext") or {}
    key = _usable(call, request["KeyId"], ENCRYPT_DECRYPT, {"kms:EncryptionAlgorithm": algorithm}, context)
    call.require_algorithm(key, algorithm)
    blob = _encrypt_under(call, key, algorithm, bytes(request["Plaintext"]), context)
    return {"CiphertextBlob": blob, "KeyId": key.arn, "EncryptionAlgorithm": algorithm}


def decrypt(call: Call) -> Response:
    request = call.request
    algorithm = request.get("EncryptionAlgorithm", SYMMETRIC)
    _refuse_recipient(request)
    key, plaintext, material_id = _open_source(
        call,
        blob=request.get("CiphertextBlob"),
        reference=request.get("KeyId"),
        algorithm=algorithm,
        context=request.get("EncryptionContext") or {},
        action="kms:Decrypt",
    )
    response = {"KeyId": key.arn, "Plaintext": plaintext, "EncryptionAlgorithm": algorithm}
    if material_id is not None:
        response["KeyMaterialId"] = material_id
    return response


def re_encrypt(call: Call) -> Response:
    request = call.request
    source_algorithm = request.get("SourceEncryptionAlgorithm", SYMMETRIC)
    algorithm = request.get("DestinationEncryptionAlgorithm", SYMMETRIC)
    context = request.get("DestinationEncryptionContext") or {}
    destination = call.resolve(request["DestinationKeyId"], action="kms:ReEncryptTo")
    source, plaintext, material_id = _open_source(
        call,
        blob=request.get("CiphertextBlob"),
        reference=request.get("SourceKeyId"),
        algorithm=source_algorithm,
        context=request.get("SourceEncryptionContext") or {},
        action="kms:ReEncryptFrom",
        destination=destination,
    )
    # The audit row names the source before the destination.
    call.keys.reverse()
    same = source.arn == destination.arn
    call.authorize(
        destination,
        "kms:ReEncryptTo",
        context=context,
        conditions={"kms:EncryptionAlgorithm": algorithm, "kms:ReEncryptOnSameKey": same},
        reference=request["DestinationKeyId"],
    )
    call.require_enabled(destination)
    call.require_usage(destination, ENCRYPT_DECRYPT)
    call.require_algorithm(destination, algorithm)
    blob = _encrypt_under(call, destination, algorithm, plaintext, context)
    response = {
        "CiphertextBlob": blob,
        "SourceKeyId": source.arn,
        "KeyId": destination.arn,
        "SourceEncryptionAlgorithm": source_algorithm,
        "DestinationEncryptionAlgorithm": algorithm,
    }
    if material_id is not None:
        response["SourceKeyMaterialId"] = material_id
    if algorithm == SYMMETRIC:
        response["DestinationKeyMaterialId"] = call.current_material(destination).id
    return response


def generate_data_key(call: Call) -> Response:
    response, plaintext = _generate_data_key(call)
    response["Plaintext"] = plaintext
    return response


def generate_data_key_without_plaintext(call: Call) -> Response:
    return _generate_data_key(call)[0]


def _generate_data_key(call: Call) -> tuple[Response, bytes]:
    request = call.request
    spec, length = request.get("KeySpec"), request.get("NumberOfBytes")
    if (spec is None) == (length is None):
        refuse("ValidationException", "Please specify either number of bytes or key spec.")
    _refuse_recipient(request)
    context = request.get("EncryptionContext") or {}
    key = _usable(call, request["KeyId"], ENCRYPT_DECRYPT, {"kms:EncryptionAlgorithm": SYMMETRIC}, context)
    call.require_algorithm(key, SYMMETRIC)
    current = call.current_material(key)
    blob_key = call.store.blob_key(key, current)
    plaintext, blob = blob_key.generate(length or _DATA_KEY_LENGTHS[spec or ""], context)
    return {"CiphertextBlob": blob, "KeyId": key.arn, "KeyMaterialId": current.id}, plaintext


def generate_data_key_pair(call: Call) -> Response:
    _refuse_recipient(call.request)
    response, private = _generate_data_key_pair(call)
    response["PrivateKeyPlaintext"] = private
    return response


def generate_data_key_pair_without_plaintext(call: Call) -> Response:
    return _generate_data_key_pair(call)[0]


def _generate_data_key_pair(call: Call) -> tuple[Response, bytes]:
    request = call.request
    spec = material.SPECS[request["KeyPairSpec"]]
    context = request.get("EncryptionContext") or {}
    conditions: dict[str, Value] = {"kms:EncryptionAlgorithm": SYMMETRIC, "kms:DataKeyPairSpec": spec.name}
    key = _usable(call, request["KeyId"], ENCRYPT_DECRYPT, conditions, context)
    call.require_algorithm(key, SYMMETRIC)
    pair = material.generate_private_key(spec)
    private = material.private_der(pair)
    current = call.current_material(key)
    blob = call.store.blob_key(key, current).seal(private, context)
    response = {
        "PrivateKeyCiphertextBlob": blob,
        "PublicKey": material.public_der(pair),
        "KeyId": key.arn,
        "KeyPairSpec": spec.name,
        "KeyMaterialId": current.id,
    }
    return response, private


def generate_random(call: Call) -> Response:
    length = call.request.get("NumberOfBytes")
    if length is None:
        refuse("ValidationException", "NumberOfBytes is required.")
    _refuse_recipient(call.request)
    call.authorize_account()
    if "CustomKeyStoreId" in call.request:
        refuse("CustomKeyStoreNotFoundException", f"{call.request['CustomKeyStoreId']} does not exist.")
    return {"Plaintext": os.urandom(length)}


def sign(call: Call) -> Response:
    request = call.request
    algorithm, message_type = request["SigningAlgorithm"], request.get("MessageType", "RAW")
    key = _signing_key(call, algorithm, message_type)
    signature = material.sign(algorithm, _private(call, key), bytes(request["Message"]), message_type)
    return {"KeyId": key.arn, "Signature": signature, "SigningAlgorithm": algorithm}


def verify(call: Call) -> Response:
    request = call.request
    algorithm, message_type = request["SigningAlgorithm"], request.get("MessageType", "RAW")
    key = _signing_key(call, algorithm, message_type)
    message, signature = bytes(request["Message"]), bytes(request["Signature"])
    material.verify(algorithm, _private(call, key), message, message_type, signature)
    return {"KeyId": key.arn, "SignatureValid": True, "SigningAlgorithm": algorithm}


def _signing_key(call: Call, algorithm: str, message_type: str) -> Key:
    conditions: dict[str, Value] = {"kms:SigningAlgorithm": algorithm, "kms:MessageType": message_type}
    key = _usable(call, call.request["KeyId"], SIGN_VERIFY, conditions)
    call.require_algorithm(key, algorithm)
    return key


def generate_mac(call: Call) -> Response:
    request = call.request
    algorithm = request["MacAlgorithm"]
    key = _usable(call, request["KeyId"], GENERATE_VERIFY_MAC, {"kms:MacAlgorithm": algorithm})
    call.require_algorithm(key, algorithm)
    mac = material.mac(algorithm, call.open(key), bytes(request["Message"]))
    return {"Mac": mac, "MacAlgorithm": algorithm, "KeyId": key.arn}


def verify_mac(call: Call) -> Response:
    request = call.request
    algorithm = request["MacAlgorithm"]
    key = _usable(call, request["KeyId"], GENERATE_VERIFY_MAC, {"kms:MacAlgorithm": algorithm})
    call.require_algorithm(key, algorithm)
    material.verify_mac(algorithm, call.open(key), bytes(request["Message"]), bytes(request["Mac"]))
    return {"KeyId": key.arn, "MacValid": True, "MacAlgorithm": algorithm}


def derive_shared_secret(call: Call) -> Response:
    request = call.request
    algorithm = request["KeyAgreementAlgorithm"]
    _refuse_recipient(request)
    key = _usable(call, request["KeyId"], KEY_AGREEMENT, {"kms:KeyAgreementAlgorithm": algorithm})
    call.require_algorithm(key, algorithm)
    secret = material.derive_shared_secret(_private(call, key), bytes(request["PublicKey"]))
    return {
        "KeyId": key.arn,
        "SharedSecret": secret,
        "KeyAgreementAlgorithm": algorithm,
        "KeyOrigin": key.origin,
    }


def encapsulate(call: Call) -> Response:
    request = call.request
    algorithm = request["EncapsulationAlgorithm"]
    key = _usable(call, request["KeyId"], ENCAPSULATE_DECAPSULATE, {"kms:EncapsulationAlgorithm": algorithm})
    secret, blob = material.encapsulate(_private(call, key))
    return {
        "KeyId": key.arn,
        "SharedSecret": secret,
        "SharedSecretCiphertextBlob": blob,
        "EncapsulationAlgorithm": algorithm,
    }


def decapsulate(call: Call) -> Response:
    request = call.request
    algorithm = request["EncapsulationAlgorithm"]
    key = _usable(call, request["KeyId"], ENCAPSULATE_DECAPSULATE, {"kms:EncapsulationAlgorithm": algorithm})
    secret = material.decapsulate(_private(call, key), bytes(request["SharedSecretCiphertextBlob"]))
    return {"KeyId": key.arn, "SharedSecret": secret, "EncapsulationAlgorithm": algorithm}


def get_public_key(call: Call) -> Response:
    key = call.resolve(call.request["KeyId"])
    call.authorize(key, reference=call.request["KeyId"])
    call.require_enabled(key)
    spec = material.SPECS[key.spec]
    if not spec.public:
        refuse("UnsupportedOperationException")
    return {
        "KeyId": key.arn,
        "PublicKey": material.public_der(_private(call, key)),
        "CustomerMasterKeySpec": key.spec,
        "KeySpec": key.spec,
        "KeyUsage": key.usage,
        material.ALGORITHM_MEMBERS[key.usage]: list(spec.usages[key.usage]),
    }


# -- shared steps ----------------------------------------------------------------------------


def _usable(
    call: Call,
    reference: str,
    usage: str,
    conditions: Mapping[str, Value],
    context: Mapping[str, str] | None = None,
) -> Key:
    """The key that the request names, once authorization, state and usage allow this call."""
    key = call.resolve(reference)
    call.authorize(key, context=context, conditions=conditions, reference=reference)
    call.require_enabled(key)
    call.require_usage(key, usage)
    return key


def _open_source(
    call: Call,
    *,
    blob: bytes | bytearray | None,
    reference: str | None,
    algorithm: str,
    context: Mapping[str, str],
    action: str,
    destination: Key | None = None,
) -> tuple[Key, bytes, str | None]:
    """Decrypt's half of Decrypt and ReEncrypt: the key, the plaintext, the material that opened it."""
    request = call.request
    ignored = "IGNORE_CIPHERTEXT" in (request.get("DryRunModifiers") or ()) and bool(request.get("DryRun"))
    if blob is None and not ignored:
        refuse(
            "ValidationException",
            "1 validation error detected: Value at 'ciphertextBlob' failed to satisfy constraint: "
            "Member must not be null",
        )
    if reference is None and (ignored or algorithm != SYMMETRIC):
        refuse("ValidationException", "The request must name the key that encrypted the ciphertext.")
    header = None
    if reference is not None:
        key = call.resolve(reference, action=action)
    else:
        header = material.parse_blob(bytes(blob or b""))
        key = call.key_of_blob(header.key_id, action)
    conditions: dict[str, Value] = {"kms:EncryptionAlgorithm": algorithm}
    if destination is not None:
        conditions["kms:ReEncryptOnSameKey"] = key.arn == destination.arn
    call.authorize(
        key,
        action,
        context=context,
        conditions=conditions,
        reference=reference,
        by_ciphertext=reference is None,
    )
    if algorithm == SYMMETRIC and not ignored:
        header = header or material.parse_blob(bytes(blob or b""))
        if header.key_id != key.id:
            refuse(
                "IncorrectKeyException",
                "The key ID in the request does not identify a CMK that can perform this operation.",
            )
    call.require_enabled(key)
    call.require_usage(key, ENCRYPT_DECRYPT)
    call.require_algorithm(key, algorithm)
    if ignored:
        return key, b"", None
    ciphertext = bytes(blob or b"")
    if header is None:
        _refuse_context(key, context)
        return key, material.rsa_decrypt(algorithm, _private(call, key), ciphertext), None
    generation = next((m for m in key.materials if m.id == header.material_id), None)
    if generation is None:
        refuse("InvalidCiphertextException")
    if generation.sealed is None:
        refuse("KMSInvalidStateException", f"{key.arn} is pending import.")
    return key, call.store.blob_key(key, generation).open(ciphertext, context), generation.id


def _encrypt_under(
    call: Call, key: Key, algorithm: str, plaintext: bytes, context: Mapping[str, str]
) -> bytes:
    if algorithm == SYMMETRIC:
        return call.store.blob_key(key, call.current_material(key)).seal(plaintext, context)
    _refuse_context(key, context)
    return material.rsa_encrypt(material.SPECS[key.spec], algorithm, _private(call, key), plaintext)


def _private(call: Call, key: Key) -> Any:
    return call.store.private_key(key, call.current_material(key))


def _refuse_context(key: Key, context: Mapping[str, str]) -> None:
    if context:
        refuse("ValidationException", f"EncryptionContext is not supported with key spec {key.spec}.")


def _refuse_recipient(request: Mapping[str, Any]) -> None:
    if request.get("Recipient") is not None:
        # An attestation document of a Nitro enclave: there is none to attest here.
        refuse("UnsupportedOperationException", "Recipient is not supported by the embedded KMS.")
