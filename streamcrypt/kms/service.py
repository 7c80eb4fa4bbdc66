"""The embedded KMS: an operation and a dict in, a dict or a KmsError out.

Every door comes through ``Service.call``: it checks the request against KMS's own shapes, runs
the operation, and writes one audit row, in the same transaction as what the operation changed.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

from streamcrypt.kms import audit, cryptographic, grants, imports, keys, lifecycle, regions, shapes
from streamcrypt.kms.call import Call
from streamcrypt.kms.errors import KmsError, new_uuid
from streamcrypt.kms.policy import ROOT, Caller
from streamcrypt.kms.simulation import Simulation
from streamcrypt.kms.store import Store

Handler = Callable[[Call], dict[str, Any]]

# Operations that only read, or use a key: no transaction but that of their audit row.
_READING: Final[dict[str, Handler]] = {
    "Encrypt": cryptographic.encrypt,
    "Decrypt": cryptographic.decrypt,
    "ReEncrypt": cryptographic.re_encrypt,
    "GenerateDataKey": cryptographic.generate_data_key,
    "GenerateDataKeyWithoutPlaintext": cryptographic.generate_data_key_without_plaintext,
    "GenerateDataKeyPair": cryptographic.generate_data_key_pair,
    "GenerateDataKeyPairWithoutPlaintext": cryptographic.generate_data_key_pair_without_plaintext,
    "GenerateRandom": cryptographic.generate_random,
    "Sign": cryptographic.sign,
    "Verify": cryptographic.verify,
    "GenerateMac": cryptographic.generate_mac,
    "VerifyMac": cryptographic.verify_mac,
    "DeriveSharedSecret": cryptographic.derive_shared_secret,
    "Encapsulate": cryptographic.encapsulate,
    "Decapsulate": cryptographic.decapsulate,
    "GetPublicKey": cryptographic.get_public_key,
    "DescribeKey": keys.describe_key,
    "GetKeyLastUsage": keys.get_key_last_usage,
    "GetKeyPolicy": keys.get_key_policy,
    "ListKeys": keys.list_keys,
    "ListAliases": keys.list_aliases,
    "ListKeyPolicies": keys.list_key_policies,
    "ListResourceTags": keys.list_resource_tags,
    "DescribeCustomKeyStores": keys.describe_custom_key_stores,
    "ConnectCustomKeyStore": keys.use_custom_key_store,
    "DisconnectCustomKeyStore": keys.use_custom_key_store,
    "UpdateCustomKeyStore": keys.use_custom_key_store,
    "DeleteCustomKeyStore": keys.use_custom_key_store,
    "CreateCustomKeyStore": keys.create_custom_key_store,
    "GetKeyRotationStatus": lifecycle.get_key_rotation_status,
    "ListKeyRotations": lifecycle.list_key_rotations,
    "GetParametersForImport": imports.get_parameters_for_import,
    "ListGrants": grants.list_grants,
    "ListRetirableGrants": grants.list_retirable_grants,
}

# Operations that change the store: durable when they return.
_WRITING: Final[dict[str, Handler]] = {
    "CreateKey": keys.create_key,
    "CreateAlias": keys.create_alias,
    "UpdateAlias": keys.update_alias,
    "DeleteAlias": keys.delete_alias,
    "TagResource": keys.tag_resource,
    "UntagResource": keys.untag_resource,
    "UpdateKeyDescription": keys.update_key_description,
    "PutKeyPolicy": keys.put_key_policy,
    "EnableKey": lifecycle.enable_key,
    "DisableKey": lifecycle.disable_key,
    "ScheduleKeyDeletion": lifecycle.schedule_key_deletion,
    "CancelKeyDeletion": lifecycle.cancel_key_deletion,
    "EnableKeyRotation": lifecycle.enable_key_rotation,
    "DisableKeyRotation": lifecycle.disable_key_rotation,
    "RotateKeyOnDemand": lifecycle.rotate_key_on_demand,
    "ImportKeyMaterial": imports.import_key_material,
    "DeleteImportedKeyMaterial": imports.delete_imported_key_material,
    "ReplicateKey": regions.replicate_key,
    "UpdatePrimaryRegion": regions.update_primary_region,
    "CreateGrant": grants.create_grant,
    "RetireGrant": grants.retire_grant,
    "RevokeGrant": grants.revoke_grant,
}

# Reading operations first see what other processes have changed, or, which is cheaper, find out with
# their audit row and are then done again: those that would not take long, and this often.
_SLOW: Final = frozenset(
    {"GenerateDataKeyPair", "GenerateDataKeyPairWithoutPlaintext", "GetParametersForImport"}
)
_TRIES: Final = 3

# What takes long and touches nothing is done before the transaction begins.
_PREPARING: Final[dict[str, Callable[[Call], bytes]]] = {"CreateKey": keys.prepare_create_key}


class Service:
    """The KMS of one store.  Thread-safe.

    Any operation is also a method by boto3's name: ``generate_data_key(KeyId=…, KeySpec=…)``.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        region: str = shapes.LOCAL_REGION,
        grant_delay: float = 0.0,
        simulation: Simulation | None = None,
    ) -> None:
        self.store = store
        self.region = region
        self._clock = clock
        self.grant_delay = grant_delay
        self.simulation = simulation
        self._operations = shapes.operations()

    def __repr__(self) -> str:
        return f"Service({self.store!r})"

    def __reduce__(self) -> Any:
        raise TypeError("a KMS service is not pickled; open it where it is used")

    def close(self) -> None:
        self.store.close()

    def call(
        self,
        operation: str,
        request: Mapping[str, Any],
        *,
        caller: Caller = ROOT,
        region: str | None = None,
        request_id: str | None = None,
        tls: bool | str = False,
        wait: bool = True,
    ) -> dict[str, Any]:
        """Run one operation, by AWS's CamelCase name, in boto3's shapes (bytes, datetime).

        ``region`` is the Region that is asked (default: the service's own), ``request_id`` the
        id under which the audit knows the call, ``tls`` the version of TLS over which it came; ``wait=False``
        leaves a simulated latency to the door.  Raises KmsError as AWS would answer, and
        TypeError for an argument of a wrong type.
        """
        shape = self._operations.get(operation)
        reading, writing = _READING.get(operation), _WRITING.get(operation)
        if shape is None or (reading is None and writing is None):
            raise KmsError("UnknownOperationException", operation_name=operation)
        request_id = request_id or new_uuid()
        call = Call(
            self.store,
            operation,
            {name: value for name, value in request.items() if value is not None},
            caller,
            region or self.region,
            self._clock(),
            grant_delay=self.grant_delay,
        )
        tries = _TRIES if reading is not None and operation not in _SLOW else 0
        simulation = self.simulation
        try:
            while True:
                response, refused = None, None
                generation = self.store.generation
                try:
                    if simulation is not None:
                        simulation.admit(operation)
                        if wait:
                            simulation.wait()
                        simulation = None
                    shape.validate(call.request)
                    if not tries:
                        self.store.refresh()
                    if self.store.next_due() <= call.now:
                        lifecycle.settle(self.store, call.now)
                    if writing is not None:
                        return self._write(writing, call, request_id, tls=tls)
                    assert reading is not None
                    response = self._run(reading, call)
                except KmsError as error:
                    refused = error
                row = _row(call, request_id, response, error=refused, tls=tls)
                if not tries:
                    self.store.record_event(row)
                elif not self.store.record_current(row, generation):
                    # Somebody changed a key meanwhile: this answer may be that of yesterday.
                    tries -= 1
                    call.keys.clear()
                    continue
                if response is not None:
                    return response
                assert refused is not None
                refused.operation_name = operation
                refused.request_id = request_id
                raise refused
        except sqlite3.Error as error:
            raise _internal_error(operation, request_id, error) from error
        except UnicodeEncodeError as error:
            # A lone surrogate: JSON can carry it, no name or context of KMS can.
            raise KmsError("SerializationException", operation_name=operation) from error

    def _write(self, handler: Handler, call: Call, request_id: str, *, tls: bool | str) -> dict[str, Any]:
        prepare = _PREPARING.get(call.operation)
        if prepare is not None:
            call.prepared = prepare(call)
        with self.store.transaction():
            response = self._run(handler, call)
            self.store.record_event(_row(call, request_id, response, tls=tls))
        return response

    @staticmethod
    def _run(handler: Handler, call: Call) -> dict[str, Any]:
        response = handler(call)
        if call.request.get("DryRun"):
            # Within a transaction this also undoes what the operation has written.
            raise KmsError(
                "DryRunOperationException", "The request would have succeeded, but the DryRun option is set."
            )
        return response

    def delay(self) -> float:
        """Seconds of simulated latency for the next call, for a door that waits by itself."""
        return self.simulation.draw() if self.simulation is not None else 0.0

    def generate_data_key(self, **request: Any) -> dict[str, Any]:
        return self.call("GenerateDataKey", request)

    def encrypt(self, **request: Any) -> dict[str, Any]:
        return self.call("Encrypt", request)

    def decrypt(self, **request: Any) -> dict[str, Any]:
        return self.call("Decrypt", request)

    def __getattr__(self, name: str) -> Callable[..., dict[str, Any]]:
        operation = _operation_names().get(name)
        if operation is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

        def method(**request: Any) -> dict[str, Any]:
            return self.call(operation, request)

        return method


def _row(
    call: Call,
    request_id: str,
    response: Mapping[str, Any] | None,
    *,
    error: KmsError | None = None,
    tls: bool | str = False,
) -> audit.Row:
    return audit.row(
        call.now,
        call.operation,
        call.caller,
        call.request,
        response,
        request_id=request_id,
        keys=[key.arn for key in call.keys],
        key_spec=call.keys[0].spec if call.keys else None,
        region=call.region,
        error=error.code if error else None,
        message=error.message if error else None,
        tls=tls,
    )


def _internal_error(operation: str, request_id: str, error: sqlite3.Error) -> KmsError:
    failure = KmsError("KMSInternalException", f"The key store failed: {error}", operation_name=operation)
    failure.request_id = request_id
    return failure


def snake_case(operation: str) -> str:
    """boto3's method name of an operation."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()


@cache
def _operation_names() -> dict[str, str]:
    return {snake_case(name): name for name in (*_READING, *_WRITING)}
