"""Damages the content of files, for fuzz.py: bytes of any file, and values and keys of JSON.

Hypothesis draws values and texts that programs rarely expect; `random` puts them into files, because that is ten times as fast.
"""

import json
from random import Random

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

# What is put into a file in place of some bytes
VALUES = (
    b'NaN -1 0 1e999 1e-320 99999999999999999999 null [] {} "" [[ true / \x1b[31m \\ud800 "\\u0000"'.split()
)
VALUES += [b"\x00", b"\xff\xff\xff\xff", b"\n", b"[" * 500, b"9" * 5000, b"x" * 3000]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def draw(strategy: st.SearchStrategy, count: int) -> list:
    """Returns this many values of a strategy, always the same ones."""
    drawn = []

    @seed(0)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def one(value) -> None:
        drawn.append(value)

    one()
    return drawn


def damage(originals: list[bytes], rng: Random) -> bytes:
    """Returns one of the files with a few changes: of its bytes, or, if it is JSON, every second time of its values."""
    original = rng.choice(originals)
    try:
        content = json.loads(original)
    except ValueError:
        return change_bytes(original, rng)
    return change_bytes(original, rng) if rng.random() < 0.5 else change_values(content, rng)


def change_bytes(original: bytes, rng: Random) -> bytes:
    """Makes one to four changes: bits, bytes, parts that are removed, doubled or replaced."""
    data = bytearray(original)
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["flip", "byte", "cut", "end", "double", "value", "text"])
        at, length = rng.randrange(max(len(data), 1)), rng.randint(1, 40)
        if kind == "flip" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "byte" and data:
            data[at] = rng.randrange(256)
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "end":
            del data[at:]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "value":
            data[at : at + rng.choice([0, 0, 1, 3, 6])] = rng.choice(VALUES)
        elif kind == "text":
            data[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(data)


def change_values(content: object, rng: Random) -> bytes:
    """Returns JSON in which one to three values are replaced, removed or renamed."""
    for _ in range(rng.randint(1, 3)):
        place, inwards = content, rng.randint(0, 2)
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if inwards and isinstance(place[key], (dict, list)) and place[key]:
                place, inwards = place[key], inwards - 1
                continue
            how = rng.choice(["replace", "replace", "remove", "rename"])
            if how == "replace" or isinstance(place, list):
                place[key] = another_value(rng)
            elif how == "remove":
                del place[key]
            else:
                place[rng.choice(TEXTS)] = place.pop(key)
            break
        else:
            content = another_value(rng)
    return json.dumps(content).encode()


def another_value(rng: Random) -> object:
    return json.loads(rng.choice(DRAWN))  # a copy, because it may be changed later


TEXTS = draw(st.text(max_size=8), 1000)
DRAWN = [json.dumps(value) for value in draw(JSON, 2000)]
