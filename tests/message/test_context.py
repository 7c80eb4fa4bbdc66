"""Encryption context: one encoding, and what deviates from it."""

from __future__ import annotations

import pytest
from families import craft
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcrypt.errors import FormatError, LimitExceededError
from streamcrypt.message.context import check_caller_context, parse_context, serialize_context

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.dictionaries(texts, texts, max_size=8))
@settings(deadline=None)
def test_round_trip(context):
    serialized = serialize_context(context)
    assert parse_context(serialized) == context
    assert serialized == craft.context_bytes(context)
    assert serialize_context(dict(reversed(context.items()))) == serialized  # order does not matter


@given(st.binary(max_size=80))
@settings(deadline=None, max_examples=300)
def test_any_bytes(data):
    try:
        context = parse_context(data)
    except FormatError:
        return
    assert len(serialize_context(context)) == len(data)  # sorted or not, nothing else is in there


ENCODINGS = {
    "empty": ({}, ""),
    "empty strings": ({"": ""}, "0001 0000 0000"),
    "one": ({"k": "v"}, "0001 0001 6b 0001 76"),
    "sorted": ({"b": "", "a": ""}, "0002 0001 61 0000 0001 62 0000"),
    # By UTF-8 bytes, not by UTF-16 units: U+FB00 (ef ac 80) before U+1F600 (f0 9f 98 80).
    "by bytes": ({"\U0001f600": "", "\ufb00": ""}, "0002 0003 efac80 0000 0004 f09f9880 0000"),
    # Unicode normal forms are different names: no normalisation happens.
    "normal forms": ({"\u00e9": "1", "e\u0301": "2"}, "0002 0003 65cc81 0001 32 0002 c3a9 0001 31"),
}


@pytest.mark.parametrize(("context", "encoding"), ENCODINGS.values(), ids=ENCODINGS)
def test_the_one_encoding(context, encoding):
    assert serialize_context(context) == bytes.fromhex(encoding)
    assert parse_context(bytes.fromhex(encoding)) == context


REFUSED = {
    "count of zero": "0000",
    "one byte": "00",
    "a pair that is not there": "0001",
    "fewer pairs than counted": "0002 0001 6b 0001 76",
    "more pairs than counted": "0001 0001 6b 0001 76 0001 6c 0001 76",
    "name cut short": "0001 0005 6b",
    "value cut short": "0001 0001 6b 0002 76",
    "length field cut short": "0001 0001 6b 00",
    "one byte left over": "0001 0001 6b 0001 76 00",
    "repeated name": "0002 0001 6b 0001 76 0001 6b 0001 77",
    "repeated pair": "0002 0001 6b 0001 76 0001 6b 0001 76",
    "name not UTF-8": "0001 0001 ff 0000",
    "value not UTF-8": "0001 0001 6b 0001 80",
    "overlong UTF-8": "0001 0002 c080 0000",
    "surrogate": "0001 0003 eda080 0000",
}


@pytest.mark.parametrize("encoding", REFUSED.values(), ids=REFUSED)
def test_refused_encodings(encoding):
    with pytest.raises(FormatError):
        parse_context(bytes.fromhex(encoding))


def test_unsorted_pairs_are_read():
    """Three official vectors hold them."""
    assert list(parse_context(craft.context_bytes([("b", "1"), ("a", "2")]))) == ["b", "a"]


def test_limits():
    largest = {"k": "v" * (65_535 - 2 - 4 - 1)}
    assert len(serialize_context(largest)) == 65_535
    for too_much in (
        {"k": "v" * (65_535 - 2 - 4)},
        {"k": "v" * 65_536},
        {"n" * 65_536: ""},
        {f"{i}": "" for i in range(65_536)},
    ):
        with pytest.raises(LimitExceededError):
            serialize_context(too_much)
        with pytest.raises(LimitExceededError):
            check_caller_context(too_much)


WRONG = {
    "reserved prefix": ({"aws-crypto-x": "v"}, ValueError),
    "the public key itself": ({"aws-crypto-public-key": "v"}, ValueError),
    "number": ({"k": 1}, TypeError),
    "bytes": ({b"k": "v"}, TypeError),
    "none": ({"k": None}, TypeError),
    "lone surrogate": ({"k": "\ud800"}, ValueError),
    "lone surrogate in a name": ({"\udfff": "v"}, ValueError),
}


@pytest.mark.parametrize(("context", "error"), WRONG.values(), ids=WRONG)
def test_a_caller_s_mistakes(context, error):
    with pytest.raises(error):
        check_caller_context(context)


@pytest.mark.parametrize(
    "context", [{}, {"aws-crypt": ""}, {"AWS-CRYPTO-x": ""}, {"a": "aws-crypto-"}, {"": ""}]
)
def test_what_a_caller_may_write(context):
    checked = check_caller_context(context)
    assert checked == context
    assert checked is not context
