"""kvm.monitor.json_stream: QEMU's JSON, byte by byte; the expected errors are those of a real QEMU 10.0."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.monitor import json_stream
from kvm.monitor.json_stream import INCOMPLETE, JsonError, JsonStream, dump


def outcomes(stream):
    """Everything *stream* has to say by now: values, and the texts of errors."""
    found = []
    while True:
        try:
            value = stream.next_value()
        except JsonError as error:
            found.append(str(error))
            continue
        if value is INCOMPLETE:
            return found
        found.append(value)


def read(*chunks):
    stream = JsonStream()
    found = []
    for chunk in chunks:
        stream.feed(chunk)
        found += outcomes(stream)
    return found


def error(text):
    return f"JSON parse error, {text}"


EXPECTING = error("expecting value")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'{"a":1}', [{"a": 1}]),
        (b"{'a':'it\\'s \"x\"'}", [{"a": 'it\'s "x"'}]),
        (b'{"a":"it\\\'s"}', [{"a": "it's"}]),
        (b'{"a":1}{"b":2} \r\n\t {"c":3}', [{"a": 1}, {"b": 2}, {"c": 3}]),
        (b'[1,2.5,-3,1e3,1.50,true,false,null,{"b":[]}]', [[1, 2.5, -3, 1000.0, 1.5, True, False, None, {"b": []}]]),
        (b"[18446744073709551615,18446744073709551616]", [[18446744073709551615, 18446744073709551616.0]]),
        (b"[-9223372036854775808,-9223372036854775809]", [[-9223372036854775808, -9223372036854775809.0]]),
        (b'["\\b\\f\\n\\r\\t\\/\\\\"]', [["\b\f\n\r\t/\\"]]),
        (b'["\\u00e9\\ud83d\\ude00 \xc3\xa9 \xf0\x9f\x98\x80 \x7f"]', [["\u00e9\U0001f600 \u00e9 \U0001f600 \x7f"]]),
        (b'["\xc0\x80","\\u0000"]', [["\0", "\0"]]),
        (b'{"a":1}}{"b":2}', [{"a": 1}, EXPECTING, {"b": 2}]),
        (b"query-name [", [error("invalid keyword 'query'"), error("stray '-n'")]),
        (b"1 null [] true ", [1, None, [], True]),
        (b'#abc "x" 12 true\t\r\n\x01\xff 5 [1]', [error(f"stray '{c}'") for c in "#\x01\ufffd"] + [[1]]),
        (b'{"a" "b"}', [error("missing : in object pair")]),
        (b'{"a"}', [error("missing : in object pair")]),
        (b'{"a":1,"a":2}', [error("duplicate key")]),
        (b'{"a":}', [EXPECTING]),
        (b'{"a":1,}', [EXPECTING]),
        (b"{,}", [EXPECTING]),
        (b"{1:2}", [error("key is not a string in object")]),
        (b"[1,]", [EXPECTING]),
        (b"[,]", [EXPECTING]),
        (b"[1 2]", [error("expected separator in list")]),
        (b'{"a":1 "b":2}', [error("expected separator in dict")]),
        (b'{"a":01}', [error("stray '01'"), EXPECTING]),
        (b'{"a":1.}', [error("stray '1.}'")]),
        (b'{"a":-}', [error("stray '-}'")]),
        (b'{"a":1e}', [error("stray '1e}'")]),
        (b'{"a":tru}', [error("invalid keyword 'tru'")]),
        (b'{"a":nan}', [error("invalid keyword 'nan'")]),
        (b'{"a":%d}', [error("stray '%'"), EXPECTING]),
        (b'["\\x"]', [error("invalid escape sequence in string")]),
        (b'["\\ud800"]', [error("\\ud800 is not a valid Unicode character")]),
        (b'["\\uDE00"]', [error("\\uDE00 is not a valid Unicode character")]),
        (b'["\\ud83d\\u0041"]', [error("\\ud83d is not a valid Unicode character")]),
        (b'["\\u12g4"]', [error("\\u12g4 is not a valid Unicode character")]),
        (b'["\\ufffe"]', [error("\\ufffe is not a valid Unicode character")]),
        (b'["\xc3("]', [error("invalid UTF-8 sequence in string")]),
        (b'["\xed\xa0\x80"]', [error("invalid UTF-8 sequence in string")]),
        (b'["\xf5"]', [error("invalid UTF-8 sequence in string")]),
        (b'["\xff"]', [error("stray '\"\ufffd'"), EXPECTING]),
        (b'["a\tb"]', [error("stray '\"a\t'"), EXPECTING]),
        (b'["a\\\nb"]', [error("stray '\"a\\\n'"), EXPECTING]),
        (b"{]", [EXPECTING]),
        (b"[}", [EXPECTING]),
        (b"{[}]", [EXPECTING]),
        (b":", [EXPECTING]),
        (b'\xef\xbb\xbf{"a":1}', [error("stray '\ufffd'"), {"a": 1}]),
        (b'[1 \x02 foo\n{"a":1}', [error("stray '\x02'"), {"a": 1}]),
        (b"[1e400]", [error("number out of range")]),
    ],
)
@pytest.mark.parametrize("cut", ["whole", "bytes"])
def test_what_comes_out_of_bytes(text, found, cut):
    chunks = [text] if cut == "whole" else [text[i : i + 1] for i in range(len(text))]
    assert read(*chunks) == found


def test_an_object_is_there_with_its_last_byte():
    assert read(b'{"a":12', b"34", b"}") == [{"a": 1234}]


def test_a_number_ends_only_with_the_byte_behind_it():
    assert read(b"1", b"2") == []
    assert read(b"1", b"2 ") == [12]


def test_an_unfinished_value_at_the_end_is_an_error():
    stream = JsonStream()
    stream.feed(b'{"a":')
    assert stream.next_value() is INCOMPLETE
    with pytest.raises(JsonError, match="premature EOI"):
        stream.finish()


def test_1024_open_brackets_are_fine_and_one_more_is_not():
    deep = b"[" * 1024 + b"]" * 1024
    (value,) = read(deep)
    assert dump(value) == deep + b"\r\n"
    assert read(b"{'a':" * 1025)[0] == "JSON nesting depth limit exceeded"
    found = read(b"[" + deep, b"\xff", b'{"a":1}')
    assert found[0] == "JSON nesting depth limit exceeded"
    assert found[-1] == {"a": 1}


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ("MAX_TOKENS", b"[" + b"1," * 40),
        ("MAX_SIZE", b'["' + b"a" * 40 + b'",1'),
        ("MAX_SIZE", b'["' + b"a" * 40),
        ("MAX_WORD", b"[" + b"1" * 40),
        ("MAX_WORD", b"[" + b"a" * 40),
    ],
)
def test_a_value_beyond_a_limit_is_dropped_and_the_next_one_read(monkeypatch, limit, text):
    monkeypatch.setattr(json_stream, limit, 32)
    found = read(text, b"\xff\xff", b'{"a":1}')
    assert "limit exceeded" in found[0]
    assert found[-1] == {"a": 1}


def test_a_long_string_in_small_pieces_is_looked_at_once(monkeypatch):
    class Counting:
        looked_at = 0

        def match(self, buffer, start):
            Counting.looked_at += len(buffer) - start
            return body.match(buffer, start)

    body = json_stream.STRING_BODY[ord('"')]
    monkeypatch.setitem(json_stream.STRING_BODY, ord('"'), Counting())
    assert read(b'"', *[b"a" * 64] * 1000, b'"') == ["a" * 64000]
    assert Counting.looked_at <= 64002


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cn"))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc\u00e9", max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(JSON_VALUES, st.booleans())
def test_what_is_written_is_read_back_by_anybody(value, pretty):
    line = dump(value, pretty)
    assert line.endswith(b"\r\n")
    assert all(byte < 127 for byte in line)
    assert json.loads(line) == value
    assert read(line) == [value]


@given(JSON_VALUES, st.lists(st.integers(0, 400), max_size=8))
def test_it_does_not_matter_how_a_client_cuts_its_bytes(value, cuts):
    line = json.dumps([value], ensure_ascii=False).encode()
    places = sorted({0, len(line), *(cut % (len(line) + 1) for cut in cuts)})
    assert read(*(line[start:end] for start, end in itertools.pairwise(places))) == [[value]]


@given(st.binary(max_size=200))
def test_garbage_yields_errors_and_nothing_else(data):
    found = read(data, b'\xff\xff]}{"a":1}')
    assert found[-1] == {"a": 1}


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"a": 1, "b": [True, None]}, b'{"a": 1, "b": [true, null]}'),
        ({}, b"{}"),
        ([[], {}], b"[[], {}]"),
        ('\u00e9\U0001f600\x7f\x1f/"\\', rb'"\u00E9\uD83D\uDE00\u007F\u001F/\"\\"'),
        (0.1, b"0.10000000000000001"),
        (1000.0, b"1000"),
        (1e22, b"1e+22"),
        ("\udc80", rb'"\uFFFD"'),
    ],
)
def test_output_looks_like_that_of_qemu(value, line):
    assert dump(value) == line + b"\r\n"


def test_pretty_output_looks_like_that_of_qemu():
    assert dump({"return": {}, "id": [1, {"a": 2}]}, pretty=True) == (
        b'{\r\n    "return": {\r\n    },\r\n    "id": [\r\n        1,\r\n        {\r\n            "a": 2\r\n'
        b"        }\r\n    ]\r\n}\r\n"
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan"), b"bytes", object()])
def test_what_is_no_json_is_not_written(value):
    with pytest.raises(TypeError):
        dump({"a": value})
