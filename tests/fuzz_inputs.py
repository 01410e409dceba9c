"""Bad files for tests/test_fuzz.py: good ones with a few things changed, as damage, carelessness and malice change them."""

import io
import json
import struct
import zipfile
from random import Random
from typing import Any

from hypothesis import strategies as st

# What a JSON value is replaced by: other types, numbers that overflow, text that is half a character or a way out of a folder.
ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "\0", "a\0b", "\ud800", "\ufeff", "a\nb", "\r", "\u2028", "e\u0301", "x" * 5000),
    *("..", ".", "/", "../secret", "../../secret", "/etc/passwd", "~", "-1", "1e3", "nan", "%s%s", "{}", "$HOME", "a/" * 300),
    *([], {}, [[]], [None], {"": None}, [{}], {"prompt": "x"}, [0] * 300),
]
ODD_BYTES = [
    b"",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\r\n",
    b"\n",
    b"\r",
    b"\x1a",
    b"\xed\xa0\x80",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
]
ODD_BYTES += [
    b",",
    b"null",
    b"NaN",
    b"1e999",
    b"-",
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\xe2\x80\xa8",
    b"\\u0000",
    b"\\ud83d",
]
ODD_KEYS = ["", " ", "__class__", "\ud800", "a\nb", "../secret", "a.b", "x" * 500]


def changed_files(files: dict[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    """One of the files by name, and its changed content."""
    names = sorted(files)
    seeds = st.integers(0, 2**24 - 1)  # few enough for hypothesis to draw them evenly: hardly one comes twice
    return st.builds(lambda name, seed: (name, changed(Random(seed), name, files[name])), st.sampled_from(names), seeds)


def changed(random: Random, name: str, data: bytes) -> bytes:
    """`data`, changed in the way in which a file of that name is read."""
    if random.random() < 0.2:
        return changed_bytes(random, data)
    if name.endswith(".json"):
        return changed_json(random, json.loads(data))
    if name.endswith(".jsonl"):
        return changed_json_lines(random, [json.loads(line) for line in data.decode().splitlines()])
    if name.endswith(".safetensors"):
        return changed_safetensors(random, data)
    if name.endswith((".pt", ".pth")):
        return changed_torch_file(random, data)
    return changed_bytes(random, data)


def changed_bytes(random: Random, data: bytes) -> bytes:
    """With up to three changes: bits flipped; parts cut, repeated, replaced, moved; odd bytes in between; or something else entirely."""
    for _ in range(random.randint(1, 3)):
        a = random.randrange(len(data) + 1)
        b = min(len(data), a + random.choice([1, 4, 16, 10**9]))
        kind = random.randrange(10)
        if kind <= 2 and a < len(data):
            data = data[:a] + bytes([data[a] ^ 1 << random.randrange(8)]) + data[a + 1 :]
        elif kind == 3:
            data = data[:a]
        elif kind == 4:
            data = data[:a] + data[b:]
        elif kind == 5:
            data = data[:b] + data[a:b] * random.randint(1, 3) + data[b:]
        elif kind == 6:
            data = data[:a] + random.randbytes(random.randint(1, 32)) + data[b:]
        elif kind == 7:
            data = data[:a] + random.choice(ODD_BYTES) + data[a:]
        elif kind == 8:
            data = data[b:] + data[:a]
        elif random.random() < 0.2:
            data = random.choice([random.choice(ODD_BYTES), random.randbytes(random.randint(1, 200))])
    return data


def changed_value(random: Random, value: Any) -> Any:
    """A JSON value with one change somewhere within: replaced, deleted, repeated, renamed, wrapped."""
    if isinstance(value, dict | list) and value and random.random() < 0.9:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place, copy, kind = random.choice(places), type(value)(value), random.randrange(10)
        if kind == 0:
            del copy[place]
        elif kind == 1 and isinstance(copy, list):
            copy.insert(place, copy[place])
        elif kind == 1:
            copy[random.choice([str(place).upper(), f"{place} ", *ODD_KEYS])] = copy.pop(place)
        elif kind == 2:
            copy[place] = copy[random.choice(places)]
        else:
            copy[place] = changed_value(random, copy[place])
        return copy
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.5:
        return random.choice([value + 1, value - 1, value * 2, value - 0.5 if abs(value) < 1e9 else 0.5, -value, str(value), value * 1000])
    if isinstance(value, str) and random.random() < 0.5:
        return random.choice([value + "x", value[:-1], value.upper(), f" {value}", f"../{value}", f"{value}/..", f"{value}\0", [value]])
    return random.choice([*ODD_VALUES, [value], {"a": value}])


def changed_json(random: Random, value: Any) -> bytes:
    """The text of a JSON value with one to three changes in the value, and now and then in the text as well."""
    for _ in range(random.randint(1, 3)):
        value = changed_value(random, value)
    data = json.dumps(value, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return changed_bytes(random, data) if random.random() < 0.1 else data


def changed_json_lines(random: Random, rows: list) -> bytes:
    """Lines of JSON with changes in a row or two, and now and then in the text around."""
    for _ in range(random.randint(1, 2)):
        place = random.randrange(len(rows))
        rows[place] = changed_value(random, rows[place])
    data = b"".join(json.dumps(row, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass") + b"\n" for row in rows)
    return changed_bytes(random, data) if random.random() < 0.2 else data


def changed_safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with changes in its header, whose length mostly fits."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "cache" in header.get("__metadata__", {}) and random.random() < 0.5:  # what an embedding cache keeps there
        header["__metadata__"] = {"cache": changed_json(random, json.loads(header["__metadata__"]["cache"])).decode("utf-8", "replace")}
        new = json.dumps(header).encode()
    else:
        new = changed_json(random, header)
    claimed = len(new) if random.random() < 0.9 else random.choice([0, 1, len(new) - 1, len(new) + 1, 2**40, 2**64 - 1])
    return struct.pack("<Q", max(0, claimed)) + new + data[8 + length :]


def changed_torch_file(random: Random, data: bytes) -> bytes:
    """A file of `torch.save` with changes in its pickle."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w") as copy:
        for entry in old.infolist():
            content = old.read(entry)
            copy.writestr(entry.filename, changed_bytes(random, content) if entry.filename.endswith("data.pkl") else content)
    return new.getvalue()
