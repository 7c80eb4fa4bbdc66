"""AWS JSON 1.1: the body of a request to an operation, its response to a body.

request   X-Amz-Target: TrentService.Encrypt      {"KeyId": "alias/ml", "Plaintext": "<Base64>"}
response  200                                     {"CiphertextBlob": "<Base64>", "KeyId": "arn:…"}
error     400 or 500                              {"__type": "NotFoundException", "message": "…"}
"""

from __future__ import annotations

import json
from typing import Final

from streamcrypt.kms import shapes
from streamcrypt.kms.errors import KmsError, new_uuid
from streamcrypt.kms.policy import Caller
from streamcrypt.kms.service import Service
from streamcrypt.tuples import NamedTuple

TARGET_PREFIX: Final = "TrentService."
CONTENT_TYPE: Final = "application/x-amz-json-1.1"


class Answer(NamedTuple):
    """What goes back over the wire.  The body may hold a plaintext data key: it is not shown."""

    status: int
    request_id: str
    body: bytes

    def __repr__(self) -> str:
        return f"<Answer {self.status} {self.request_id}>"


def answer(
    service: Service,
    target: str,
    body: bytes,
    *,
    caller: Caller,
    region: str,
    tls: bool | str = False,
    wait: bool = True,
) -> Answer:
    """Run the operation that ``target`` names on a JSON body."""
    request_id = new_uuid()
    operation = target.removeprefix(TARGET_PREFIX)
    try:
        shape = shapes.operations().get(operation)
        if shape is None or not target.startswith(TARGET_PREFIX):
            raise KmsError("UnknownOperationException")
        request = shape.read(_parse(body))
        response = service.call(
            operation, request, caller=caller, region=region, request_id=request_id, tls=tls, wait=wait
        )
    except KmsError as error:
        return refusal(error, request_id)
    written = json.dumps(shape.write(response)).encode() if shape.write is not None else b""
    return Answer(200, request_id, written)


def refusal(error: KmsError, request_id: str | None = None) -> Answer:
    """An error as its HTTP answer."""
    document = {"__type": error.code}
    if error.message is not None:
        document["message"] = error.message
    return Answer(error.status, request_id or new_uuid(), json.dumps(document).encode())


def _parse(body: bytes) -> object:
    try:
        return json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise KmsError("SerializationException") from error
