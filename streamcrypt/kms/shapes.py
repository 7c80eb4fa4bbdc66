"""KMS's shapes: checks, JSON in, JSON out.

    request   JSON object --read--> dict with bytes and datetime --check--> accepted, or one
              ValidationException that names every violation, in AWS's words
    response  dict with bytes and datetime --write--> JSON object

``model.json`` is AWS's service model of KMS as botocore ships it (Apache-2.0), without its
documentation and without the shapes that no operation uses: a tenth of the size, and a small job
must not wait for the rest (tests/kms/test_shapes.py makes it, and holds it to botocore's).  Each
shape is compiled into closures, because every call passes through them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final, NoReturn

from streamcrypt.kms.errors import refuse
from streamcrypt.tuples import NamedTuple

_MODEL: Final = os.path.join(os.path.dirname(__file__), "model.json")

# Regions outside AWS: the embedded KMS's own.  The model's pattern knows only AWS's names.
LOCAL_REGION: Final = "local"

# Text that is secret, or lets whoever holds it do something.  A violation is told and recorded without it.
_NOT_SHOWN: Final = frozenset(
    {
        "GrantTokenList",
        "GrantTokenType",
        "KeyStorePasswordType",
        "XksProxyAuthenticationRawSecretAccessKeyType",
    }
)

_Check = Callable[[Any, str, list[str]], None]
_Convert = Callable[[Any], Any]


class Option(NamedTuple):
    """A member of a request, as much as a command line needs to know of it."""

    kind: str
    """string, blob, integer, boolean, timestamp, map, list or structure"""
    required: bool
    of: str = ""
    """The kind of a list's members."""
    choices: tuple[str, ...] = ()


class Operation(NamedTuple):
    """One operation of the model: what it accepts and what it gives back."""

    name: str
    members: frozenset[str]
    options: dict[str, Option]
    check: _Check
    read: _Convert
    write: _Convert | None

    def validate(self, request: dict[str, Any]) -> None:
        """TypeError for a wrong Python type or name; ValidationException for a broken constraint."""
        if not request.keys() <= self.members:
            unknown = ", ".join(sorted(request.keys() - self.members))
            raise TypeError(
                f"{self.name} has no parameter {unknown}; it has {', '.join(sorted(self.members))}"
            )
        violations: list[str] = []
        self.check(request, "", violations)
        if violations:
            noun = "validation error" if len(violations) == 1 else "validation errors"
            refuse("ValidationException", f"{len(violations)} {noun} detected: {'; '.join(violations)}")


class _Operations(Mapping[str, Operation]):
    """The operations of a model; each is compiled when it is first asked for."""

    def __init__(self, model: dict[str, Any]) -> None:
        self._shapes = model["shapes"]
        self._descriptions = model["operations"]
        self._compiled: dict[str, Operation] = {}

    def __getitem__(self, name: str) -> Operation:
        operation = self._compiled.get(name)
        if operation is None:
            operation = self._compiled[name] = self._compile(name, self._descriptions[name])
        return operation

    def __iter__(self) -> Iterator[str]:
        return iter(self._descriptions)

    def __len__(self) -> int:
        return len(self._descriptions)

    def _compile(self, name: str, description: dict[str, Any]) -> Operation:
        shapes, input_name = self._shapes, description["input"]["shape"]
        output_name = description.get("output", {}).get("shape")
        return Operation(
            name=name,
            members=frozenset(shapes[input_name]["members"]),
            options=_options(shapes, shapes[input_name]),
            check=_checker(shapes, input_name),
            read=_reader(shapes, input_name),
            write=_writer(shapes, output_name) if output_name else None,
        )


@cache
def operations() -> Mapping[str, Operation]:
    """Every operation of the service model, by AWS's CamelCase name."""
    return _Operations(_load_model())


def _options(shapes: dict[str, Any], structure: dict[str, Any]) -> dict[str, Option]:
    required = structure.get("required", ())
    options = {}
    for name, ref in structure["members"].items():
        shape = shapes[ref["shape"]]
        inner = shapes[shape["member"]["shape"]] if shape["type"] == "list" else shape
        options[name] = Option(
            shape["type"],
            name in required,
            of=inner["type"] if inner is not shape else "",
            choices=tuple(inner.get("enum", ())),
        )
    return options


def _load_model() -> dict[str, Any]:
    with open(_MODEL, "rb") as file:
        model: dict[str, Any] = json.load(file)
    return model


# -- checks: Python values against the model's constraints ---------------------------------


def _checker(shapes: dict[str, Any], name: str) -> _Check:
    shape = shapes[name]
    kind = shape["type"]
    if kind == "structure":
        return _structure_checker(shapes, shape)
    if kind == "list":
        return _list_checker(shapes, name)
    if kind == "map":
        return _check_map
    if kind == "string":
        return _string_checker(name, shape)
    if kind == "blob":
        return _blob_checker(shape)
    if kind == "integer":
        return _integer_checker(shape)
    if kind == "boolean":
        return _check_boolean
    if kind == "timestamp":
        return _check_timestamp
    raise RuntimeError(f"internal error: shape {name} has type {kind}")


def _structure_checker(shapes: dict[str, Any], shape: dict[str, Any]) -> _Check:
    members = {name: (_camel(name), _checker(shapes, ref["shape"])) for name, ref in shape["members"].items()}
    required = [(name, _camel(name)) for name in shape.get("required", ())]

    def check(value: Any, path: str, violations: list[str]) -> None:
        if not isinstance(value, dict):
            raise TypeError(f"{path or 'the request'} must be a dict, not {type(value).__name__}")
        for name, camel in required:
            if value.get(name) is None:
                violations.append(
                    f"Value null at '{path}{camel}' failed to satisfy constraint: Member must not be null"
                )
        for name, member in value.items():
            entry = members.get(name)
            if entry is None:
                # A constraint of a grant that is misspelt would be no constraint.
                raise TypeError(
                    f"{path.rstrip('.')} has no member {name}; it has {', '.join(sorted(members))}"
                )
            if member is not None:
                entry[1](member, path + entry[0], violations)

    def nested(value: Any, path: str, violations: list[str]) -> None:
        check(value, path + "." if path else "", violations)

    return nested


def _list_checker(shapes: dict[str, Any], name: str) -> _Check:
    shape = shapes[name]
    check_member = _checker(shapes, shape["member"]["shape"])
    check_length = _length_check(shape, shown=name not in _NOT_SHOWN)
    member_shape = shapes[shape["member"]["shape"]]
    enum = member_shape.get("enum")

    def check(value: Any, path: str, violations: list[str]) -> None:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{path} must be a list, not {type(value).__name__}")
        check_length(len(value), value, path, violations)
        if enum is not None and any(member not in enum for member in value):
            # AWS reports a list of enum values as a whole.
            shown = ", ".join(map(str, value))
            violations.append(
                f"Value '[{shown}]' at '{path}' failed to satisfy constraint: "
                f"Member must satisfy constraint: [Member must satisfy enum value set: [{', '.join(enum)}]]"
            )
            return
        for position, member in enumerate(value, 1):
            check_member(member, f"{path}.{position}.member", violations)

    return check


def _check_map(value: Any, path: str, violations: list[str]) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{path} must be a dict, not {type(value).__name__}")
    for key, member in value.items():
        if not isinstance(key, str) or not isinstance(member, str):
            raise TypeError(f"{path} must map str to str")


def _string_checker(name: str, shape: dict[str, Any]) -> _Check:
    shown = name not in _NOT_SHOWN
    check_length = _length_check(shape, shown=shown)
    bounded = "min" in shape or "max" in shape
    enum = frozenset(shape["enum"]) if "enum" in shape else None
    enum_text = ", ".join(shape.get("enum", ()))
    pattern = shape.get("pattern")
    matches = re.compile(pattern).fullmatch if pattern else None

    def check(value: Any, path: str, violations: list[str]) -> None:
        if not isinstance(value, str):
            raise TypeError(f"{path} must be a str, not {type(value).__name__}")
        if bounded:
            check_length(len(value), value, path, violations)
        if enum is not None and value not in enum:
            violations.append(
                f"Value '{value}' at '{path}' failed to satisfy constraint: "
                f"Member must satisfy enum value set: [{enum_text}]"
            )
        if (
            matches is not None
            and not matches(value)
            and not (name == "RegionType" and value == LOCAL_REGION)
        ):
            violations.append(
                f"{_named(value, shown)} at '{path}' failed to satisfy constraint: "
                f"Member must satisfy regular expression pattern: {pattern}"
            )

    return check


def _blob_checker(shape: dict[str, Any]) -> _Check:
    check_length = _length_check(shape, shown=False)

    def check(value: Any, path: str, violations: list[str]) -> None:
        if not isinstance(value, bytes | bytearray):
            raise TypeError(f"{path} must be bytes, not {type(value).__name__}")
        check_length(len(value), value, path, violations)

    return check


def _integer_checker(shape: dict[str, Any]) -> _Check:
    low, high = shape.get("min"), shape.get("max")

    def check(value: Any, path: str, violations: list[str]) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{path} must be an int, not {type(value).__name__}")
        if low is not None and value < low:
            violations.append(
                f"Value '{value}' at '{path}' failed to satisfy constraint: "
                f"Member must have value greater than or equal to {low}"
            )
        if high is not None and value > high:
            violations.append(
                f"Value '{value}' at '{path}' failed to satisfy constraint: "
                f"Member must have value less than or equal to {high}"
            )

    return check


def _check_boolean(value: Any, path: str, violations: list[str]) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{path} must be a bool, not {type(value).__name__}")


def _check_timestamp(value: Any, path: str, violations: list[str]) -> None:
    if not isinstance(value, datetime):
        raise TypeError(f"{path} must be a datetime, not {type(value).__name__}")


def _length_check(shape: dict[str, Any], *, shown: bool = True) -> Callable[[int, Any, str, list[str]], None]:
    low, high = shape.get("min", 0), shape.get("max")

    def check(length: int, value: Any, path: str, violations: list[str]) -> None:
        if length < low:
            bound = f"greater than or equal to {low}"
        elif high is not None and length > high:
            bound = f"less than or equal to {high}"
        else:
            return
        if isinstance(value, list | tuple):
            value = f"[{', '.join(map(str, value))}]"
        violations.append(
            f"{_named(value, shown)} at '{path}' failed to satisfy constraint: Member must have length {bound}"
        )

    return check


def _named(value: Any, shown: bool) -> str:
    return f"Value '{value}'" if shown else "Value"


def _camel(name: str) -> str:
    return name[0].lower() + name[1:]


# -- JSON in ---------------------------------------------------------------------------------


def _reader(shapes: dict[str, Any], name: str) -> _Convert:
    shape = shapes[name]
    kind = shape["type"]
    if kind == "structure":
        members = {member: _reader(shapes, ref["shape"]) for member, ref in shape["members"].items()}

        def read_structure(value: Any) -> dict[str, Any]:
            if not isinstance(value, dict):
                _wrong_type()
            return {
                key: members[key](member)
                for key, member in value.items()
                if key in members and member is not None
            }

        return read_structure
    if kind == "list":
        read_member = _reader(shapes, shape["member"]["shape"])

        def read_list(value: Any) -> list[Any]:
            if not isinstance(value, list):
                _wrong_type()
            return [read_member(member) for member in value]

        return read_list
    return _READERS[kind]


def _read_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(member, str) for member in value.values()):
        _wrong_type()
    checked: dict[str, str] = value
    return checked


def _read_string(value: Any) -> str:
    if not isinstance(value, str):
        _wrong_type()
    return value


def _read_blob(value: Any) -> bytes:
    if not isinstance(value, str):
        _wrong_type()
    try:
        return binascii.a2b_base64(value.encode("ascii"), strict_mode=True)
    except ValueError:
        _wrong_type()


def _read_integer(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():  # not of infinity, nor of what is no number
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        _wrong_type()
    return value


def _read_boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        _wrong_type()
    return value


def _read_timestamp(value: Any) -> datetime:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _wrong_type()
    try:
        return datetime.fromtimestamp(value, UTC)
    except (OverflowError, ValueError, OSError):
        _wrong_type()


def _wrong_type() -> NoReturn:
    refuse("SerializationException")


_READERS: Final[dict[str, _Convert]] = {
    "map": _read_map,
    "string": _read_string,
    "blob": _read_blob,
    "integer": _read_integer,
    "boolean": _read_boolean,
    "timestamp": _read_timestamp,
}


# -- JSON out --------------------------------------------------------------------------------


def _writer(shapes: dict[str, Any], name: str) -> _Convert:
    shape = shapes[name]
    kind = shape["type"]
    if kind == "structure":
        members = {member: _writer(shapes, ref["shape"]) for member, ref in shape["members"].items()}
        return lambda value: {key: members[key](member) for key, member in value.items()}
    if kind == "list":
        write_member = _writer(shapes, shape["member"]["shape"])
        return lambda value: [write_member(member) for member in value]
    if kind == "blob":
        return lambda value: base64.b64encode(value).decode("ascii")
    if kind == "timestamp":
        return datetime.timestamp
    return lambda value: value
