"""Random damage to JSON texts and bytes. Everything is drawn from one random.Random, so its seed repeats it."""

import json


def split(text):
    """The words of a text."""
    return text.split()


NUMBERS = (
    *split("0 -0 -1 1 2 3 15 16 17 255 256 4096 1.0 0.5 1e2 1e-400 01 1e400 -1e400 NaN Infinity -Infinity"),
    *split("4294967296 9223372036854775807 9223372036854775808 18446744073709551615 18446744073709551616"),
    *("1" + "0" * 30, "9" * 400, "9" * 5000, "0." + "3" * 400),
)

WORDS = (
    *("", " ", ".", "..", "a", "é", "重み", "%s", "{}", "../a", "C:\\a", "a" * 2000),
    *("\x00", "\n", "\x1b[31m", "\u202e"),
    *split("F32 BF16 F8_E4M3 F8_E5M2 F4 F6_E2M3 U8 BOOL F128 f32 C64 dtype shape data_offsets __metadata__"),
    *split("float8_e4m3fn float8_e5m2 nvfp4 mxfp8 int8_tensorwise weight scaled_fp8 comfy_quant format layers"),
    *split("_quantization_metadata full_precision_matrix_mult weight_map version width rows amax"),
    *split("stochastic_fp8 stochastic_fp8_calibration"),
)

VALUES = (
    *NUMBERS,
    *map(json.dumps, WORDS),
    *("", "[" + "0," * 99 + "0]", *split("null true false [] {} [[]] [0,0] [null] [1e999] [-1] [true]")),
    *split('{"format":[]} {"format":{}} {"format":null} {"format":"float8_e4m3fn"} {"a":1,"a":2} {"":0}'),
    *split(r""" "\ud800" "\udc00\ud800" "\x" "\u12" " 'a' [ ] { } , : """),
    *("[" * 50, "[" * 5000, '{"a":' * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 2000 + "0" + "}" * 2000),
)
"""Texts to put in place of a value. Some are not JSON."""

BYTES = (b"\xff", b"\x00", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\xc0\xaf", b'"')
"""Bytes to put in place of others: most of them are not UTF-8."""


class Document:
    """The JSON text of a value, with the places of its values, keys and members (elements count as members)."""

    def __init__(self, value):
        self.text = ""
        self.values, self.keys, self.members = [], [], []
        self._write(value)

    def _write(self, value):
        start = len(self.text)
        if isinstance(value, (dict, list)):
            self.text += "{" if isinstance(value, dict) else "["
            for index, item in enumerate(value):
                self.text += "," * bool(index)
                member = len(self.text)
                if isinstance(value, dict):
                    self.text += json.dumps(item)
                    self.keys.append((member, len(self.text)))
                    self.text += ":"
                    item = value[item]
                self._write(item)
                self.members.append((member, len(self.text)))
            self.text += "}" if isinstance(value, dict) else "]"
        else:
            self.text += json.dumps(value)
        self.values.append((start, len(self.text)))

    def damaged(self, rng):
        """The text with one to three changes, most of which leave it JSON."""
        edits = sorted((self._edit(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))), reverse=True)
        text, until = self.text, len(self.text) + 1
        for start, end, replacement in edits:
            if end <= until:
                text, until = text[:start] + replacement + text[end:], start
        return text

    def _edit(self, rng):
        """One change: (start, end, replacement)."""
        start, end = rng.choice(self.values)
        kind = rng.randrange(8)
        if kind < 2 or not self.keys:
            return start, end, rng.choice(VALUES)
        if kind == 2:
            return start, end, self._copy(rng, self.values)
        if kind == 3:
            return start, end, _near(rng, self.text[start:end])
        if kind == 4:
            new = self._copy(rng, self.keys) if rng.random() < 0.5 else json.dumps(rng.choice(WORDS))
            return (*rng.choice(self.keys), new)
        start, end = rng.choice(self.members)
        if kind == 5:  # gone, with the comma before it, after it, or neither
            return start - (self.text[start - 1] == ","), end + rng.randrange(2), ""
        if kind == 6:  # a second time
            return end, end, "," + self.text[start:end]
        return end, end, "," + self._copy(rng, self.members)

    def _copy(self, rng, places):
        start, end = rng.choice(places)
        return self.text[start:end]


def _near(rng, text):
    """A value near this one: a number a little off, a word with another letter."""
    if text.lstrip("-").isdigit():
        return str(rng.choice((int(text) + 1, int(text) - 1, 2 * int(text), -int(text), 10 * int(text))))
    at = rng.randrange(len(text))
    return text[:at] + chr(rng.randrange(32, 127)) + text[at + 1 :]


def damaged_bytes(rng, data):
    """The bytes with one change: bits, a byte, a piece gone, doubled or moved, a cut."""
    at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
    length = rng.choice((1, 2, 8, 64))
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.choice(BYTES) + data[at + length :]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    if kind == 4:
        return data[:at]
    return data[:at] + rng.choice((b" ", b"\t\n", b",", b"0", b"9" * 100, rng.randbytes(length))) + data[at:]
