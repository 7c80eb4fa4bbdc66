"""The Condition element of a policy, compiled once and asked many times.

    "Condition": {OPERATOR: {KEY: VALUE or [VALUE …], …}, …}

    OPERATOR   [ForAllValues: | ForAnyValue:] NAME [IfExists]
    holds when every OPERATOR and every KEY holds; one VALUE that matches is enough,
    and for a negated NAME (StringNotEquals …) none may match

Each KEY becomes a Test, which says what of a request it reads: tests that read the same are asked
together (policy.py), and equal tests are one object.

A key that is absent from the request fails a positive operator and satisfies a negated one,
``…IfExists`` and ``ForAllValues``.  Names of keys ignore case; values follow the operator.
What AWS leaves open, a multi-valued key without a set operator, is read as the statement that
permits less: an Allow needs every value to pass, a Deny needs one.

Source: IAM User Guide, "IAM JSON policy elements: Condition operators" and "Multivalued context
keys"; AWS KMS Developer Guide, "AWS KMS condition keys".
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import eq, ge, gt, le, lt
from typing import Any, Final

from streamcrypt.kms.errors import KmsError
from streamcrypt.tuples import NamedTuple

Values = str | Sequence[str] | None
Context = Mapping[str, Values]
"""Lower-cased condition key -> the request's value, a tuple of several, or None where the request has none."""
RESOURCE: Final = "resource"
"""Where a Context holds the ARN of the request's resource (no condition key: those have a prefix)."""
Matcher = Callable[[Any], Any]
"""Whether something that was read matches: true or false."""

_VARIABLE = r"\$\{([^}]*)\}"
_LITERAL_VARIABLES: Final = frozenset("*?$")


class Test(NamedTuple):
    """One key of a Condition, or a Resource: what it reads of a request, and whether that passes."""

    keys: tuple[str, ...]
    """The condition key, then those of the policy variables in its values."""
    holds: Callable[[Any], bool]
    """Takes the value of the one key; of several keys a tuple."""
    prepare: Callable[[str], Any] = str
    """How the operator reads a text; what it cannot read is None."""
    matcher_for: Callable[..., Matcher] | None = None
    """Takes what stands for the variables; the quick way for one text, where there is one."""
    negated: bool = False
    """Whether ``holds`` of a text is the opposite of what the matcher says."""


def read(keys: tuple[str, ...], context: Context) -> Any:
    """The value of one key, a tuple of the values of several."""
    return context[keys[0]] if len(keys) == 1 else tuple([context[key] for key in keys])


def all_hold(tests: Iterable[Test], context: Context) -> bool:
    """Whether every test passes."""
    return all(test.holds(read(test.keys, context)) for test in tests)


def malformed(message: str) -> KmsError:
    """The error for a policy that breaks the grammar."""
    return KmsError("MalformedPolicyDocumentException", message)


def compile_conditions(element: object, *, variables: bool, every_value: bool) -> tuple[Test, ...]:
    """The tests that a Condition element stands for: all of its operators and keys must hold.

    ``variables``: ``${aws:username}`` is replaced (policy version 2012-10-17).  ``every_value``:
    how a multi-valued key is read without a set operator.  Raises MalformedPolicyDocumentException.
    """
    if not isinstance(element, dict):
        raise malformed("Condition must be an object.")
    tests = []
    for operator, keys in element.items():
        if not isinstance(keys, dict):
            raise malformed(f"Condition operator {operator} must hold an object of condition keys.")
        for key, values in keys.items():
            texts = _texts(values, f"{operator} of {key}")
            tests.append(_compile_test(operator, key.lower(), texts, variables, every_value))
    return tuple(tests)


def compile_resource(patterns: Sequence[str], *, negated: bool, variables: bool) -> Test | None:
    """The test of Resource (or, negated, NotResource): the ARN that the context holds under RESOURCE.

    None where every resource passes.  "*" in a key policy is the key; an ARN there means the key
    only where it is this one.
    """
    if "*" in patterns and not negated:
        return None
    return _compile_test("ArnNotLike" if negated else "ArnLike", RESOURCE, tuple(patterns), variables, True)


def wildcard_match(pattern: str) -> Matcher:
    """A test for ``*`` (any characters, also none) and ``?`` (one character)."""
    return _matches(_wildcard_regex([pattern]))


@lru_cache(maxsize=1024)
def arn_match(pattern: str) -> Matcher:
    """A test for ARNs: a wildcard stays within its part, but the last part may hold colons.

    A pattern of fewer parts than an ARN has (``*``, ``arn:aws:kms:*``) lets its last part span the rest.
    """
    return _matches(_arn_regex([pattern]))


def _matches(regex: str) -> Matcher:
    return re.compile(regex, re.DOTALL).fullmatch


# The same test stands in many statements: compiled once it is one object, and is asked once.
@lru_cache(maxsize=4096)
def _compile_test(
    operator: str, key: str, values: tuple[str, ...], variables: bool, every_value: bool
) -> Test:
    quantifier, colon, name = operator.rpartition(":")
    if colon and quantifier not in ("ForAllValues", "ForAnyValue"):
        raise malformed(f"Unknown condition operator {operator}.")
    name, if_exists = (name.removesuffix("IfExists"), True) if name.endswith("IfExists") else (name, False)
    if name == "Null":
        if if_exists or colon:
            raise malformed(f"Condition operator {operator} does not exist.")
        wanted = {_parsed(_bool, value) for value in values}
        return Test((key,), lambda given: (given is None) in wanted)
    try:
        prepare, matcher_of, negated = _OPERATORS[name]
    except KeyError:
        raise malformed(f"Unknown condition operator {operator}.") from None
    # An operator without a set prefix asks one value; ours asks all (Allow) or any (Deny).
    ask = any if quantifier == "ForAnyValue" or (not quantifier and not every_value) else all
    when_absent = if_exists or quantifier == "ForAllValues" or (negated and not quantifier)
    templates = [_parse_template(value) for value in values] if variables else [[value] for value in values]
    fixed = [
        [part for part in template if isinstance(part, str)]
        for template in templates
        if not any(isinstance(part, _Variable) for part in template)
    ]
    matches = matcher_of(fixed)  # refuses now what can be refused now: the values without variables

    def holds_by(matches: Matcher, given: Values) -> bool:
        if given is None:
            return when_absent
        prepared = map(prepare, (given,) if isinstance(given, str) else given)
        return ask((value is not None and bool(matches(value))) is not negated for value in prepared)

    if len(fixed) == len(templates):
        return Test((key,), lambda given: holds_by(matches, given), prepare, lambda: matches, negated)

    parts = (part for template in templates for part in template)
    named = tuple(dict.fromkeys(part.key for part in parts if isinstance(part, _Variable)))

    @lru_cache(maxsize=64)
    def matcher_for(*replacements: Values) -> Matcher:
        having = dict(zip(named, replacements, strict=True))
        resolved = [_resolve(template, having) for template in templates]
        return matcher_of([text for text in resolved if text is not None])

    def holds(given: tuple[Values, ...]) -> bool:
        return holds_by(matcher_for(*given[1:]), given[0])

    return Test((key, *named), holds, prepare, matcher_for, negated)


def _texts(values: Any, where: str) -> tuple[str, ...]:
    texts = []
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, bool):
            texts.append("true" if value else "false")
        elif isinstance(value, str | int | float):
            texts.append(str(value))
        else:
            raise malformed(f"A value of {where} is neither text, number nor boolean.")
    return tuple(texts)


# --- values with variables ------------------------------------------------------------------------
# A template is a list of parts.  A str part may hold wildcards; a _Literal is text in which they
# mean themselves: ``${*}``, and what a variable stood for, so that no caller brings a wildcard in.


class _Literal(str):
    """Text whose ``*`` and ``?`` are no wildcards."""

    __slots__ = ()


class _Variable:
    """``${key}`` or ``${key, 'default'}``."""

    __slots__ = ("default", "key")

    def __init__(self, text: str) -> None:
        key, comma, default = text.partition(",")
        default = default.strip()
        self.key = key.strip().lower()
        self.default = _Literal(default[1:-1]) if comma and len(default) >= 2 else None


def _parse_template(value: str) -> list[str | _Variable]:
    parts: list[str | _Variable] = []
    position = 0
    for match in re.finditer(_VARIABLE, value):
        if match.start() > position:
            parts.append(value[position : match.start()])
        name = match[1]
        parts.append(_Literal(name) if name in _LITERAL_VARIABLES else _Variable(name))
        position = match.end()
    if position < len(value) or not parts:
        parts.append(value[position:])
    return parts


def _resolve(template: Sequence[str | _Variable], context: Context) -> list[str] | None:
    """The template with its variables replaced; None (it matches nothing) where the request lacks one."""
    resolved: list[str] = []
    for part in template:
        if isinstance(part, str):
            resolved.append(part)
            continue
        value = context[part.key]
        text = _Literal(value) if isinstance(value, str) else part.default
        if text is None:
            return None
        resolved.append(text)
    return resolved


# --- operators ------------------------------------------------------------------------------------
# Each reads a text of the request, takes the policy's values, as lists of parts, and gives the test of what
# was read.

Parts = list[str]
_Operator = tuple[Callable[[str], Any], Callable[[list[Parts]], Matcher], bool]


def _equals(values: list[Parts]) -> Matcher:
    return frozenset("".join(parts) for parts in values).__contains__


def _equals_ignoring_case(values: list[Parts]) -> Matcher:
    return frozenset("".join(parts).casefold() for parts in values).__contains__


def _like(values: list[Parts]) -> Matcher:
    return _matches("|".join(_wildcard_regex(parts) for parts in values)) if values else _nothing


def _arn_like(values: list[Parts]) -> Matcher:
    return _matches("|".join(_arn_regex(parts) for parts in values)) if values else _nothing


def _nothing(text: str) -> bool:
    return False


def _wildcard_regex(parts: Parts) -> str:
    segments = [""]
    for part in parts:
        if isinstance(part, _Literal):
            segments[-1] += re.escape(part)
            continue
        first, *others = (re.escape(text).replace(r"\?", ".") for text in part.split("*"))
        segments[-1] += first
        segments += others
    return _joined(segments, ["."] * (len(segments) - 1))


def _arn_regex(parts: Parts) -> str:
    last = min(5, sum(part.count(":") for part in parts))  # an ARN has six parts, five colons
    colons = 0
    segments, stars = [""], []
    for part in parts:
        literal = isinstance(part, _Literal)
        for character in part:
            colons += character == ":"
            any_of = "." if colons >= last else "[^:]"
            if literal or character not in "*?":
                segments[-1] += re.escape(character)
            elif character == "?":
                segments[-1] += any_of
            else:
                segments.append("")
                stars.append(any_of)
    return _joined(segments, stars)


def _joined(segments: list[str], stars: list[str]) -> str:
    """The regular expression of segments with a star between each two.

    What stands between two stars is taken where it is found first, for good (an atomic group): no
    later place could fit where this one does not, and trying them all would take as long as whoever
    wrote the pattern likes.
    """
    head, *middle = segments
    if not middle:
        return head
    *middle, tail = middle
    between = (f"(?>{star}*?{segment})" for star, segment in zip(stars, middle, strict=False) if segment)
    return f"{head}{''.join(between)}{stars[-1]}*{tail}"


def _compare(
    parse: Callable[[str], Any], holds: Callable[[Any, Any], bool], negated: bool = False
) -> _Operator:
    """Operators on parsed values.  A bad value of the policy is malformed; one of the request matches nothing."""

    @lru_cache(maxsize=256)
    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            return None

    def matcher_of(values: list[Parts]) -> Matcher:
        wanted = [_parsed(parse, "".join(parts)) for parts in values]
        if len(wanted) == 1:
            (only,) = wanted
            return lambda given: holds(given, only)
        return lambda given: any(holds(given, value) for value in wanted)

    return parsed, matcher_of, negated


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        raise malformed(f"Invalid condition value {text!r}.") from None


def _bool(text: str) -> bool:
    lower = text.lower()
    if lower not in ("true", "false"):
        raise ValueError(text)
    return lower == "true"


def _seconds(text: str) -> float:
    """Unix seconds from ISO 8601 (UTC where no zone is given) or from seconds."""
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _binary(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(text) from error


def _network(text: str) -> tuple[int, int, int]:
    """IP version, first and last address of a network or of one address."""
    import ipaddress

    network = ipaddress.ip_network(text, strict=False)
    return network.version, int(network.network_address), int(network.broadcast_address)


def _within(given: tuple[int, int, int], network: tuple[int, int, int]) -> bool:
    return given[0] == network[0] and network[1] <= given[1] and given[2] <= network[2]


# name -> (how to read a text, how to make the test, negated)
_OPERATORS: Final[dict[str, _Operator]] = {
    "StringEquals": (str, _equals, False),
    "StringNotEquals": (str, _equals, True),
    "StringEqualsIgnoreCase": (str.casefold, _equals_ignoring_case, False),
    "StringNotEqualsIgnoreCase": (str.casefold, _equals_ignoring_case, True),
    "StringLike": (str, _like, False),
    "StringNotLike": (str, _like, True),
    "NumericEquals": _compare(float, eq),
    "NumericNotEquals": _compare(float, eq, True),
    "NumericLessThan": _compare(float, lt),
    "NumericLessThanEquals": _compare(float, le),
    "NumericGreaterThan": _compare(float, gt),
    "NumericGreaterThanEquals": _compare(float, ge),
    "DateEquals": _compare(_seconds, eq),
    "DateNotEquals": _compare(_seconds, eq, True),
    "DateLessThan": _compare(_seconds, lt),
    "DateLessThanEquals": _compare(_seconds, le),
    "DateGreaterThan": _compare(_seconds, gt),
    "DateGreaterThanEquals": _compare(_seconds, ge),
    "Bool": _compare(_bool, eq),
    "BinaryEquals": _compare(_binary, eq),
    "IpAddress": _compare(_network, _within),
    "NotIpAddress": _compare(_network, _within, True),
    # IAM User Guide: "The ArnEquals and ArnLike condition operators behave identically."
    "ArnEquals": (str, _arn_like, False),
    "ArnLike": (str, _arn_like, False),
    "ArnNotEquals": (str, _arn_like, True),
    "ArnNotLike": (str, _arn_like, True),
}
