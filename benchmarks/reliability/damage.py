"""Damages the content of files, for fuzz.py: bytes of any file, and values and keys of JSON."""

import json

from hypothesis import strategies as st

# What is put into a file in place of some bytes
VALUES = (
    b'NaN -1 0 1e999 1e-320 99999999999999999999 null [] {} "" [[ true / \x1b[31m \\ud800 "\\u0000"'.split()
)
VALUES += [b"\x00", b"\xff\xff\xff\xff", b"\n", b"[" * 500, b"9" * 5000, b"x" * 3000]


@st.composite
def damaged(draw, originals: list[bytes]) -> bytes:
    """Returns a file with one to four changes: bits, bytes, parts that are removed, doubled or replaced."""
    data = bytearray(draw(st.sampled_from(originals)))
    for kind in draw(
        st.lists(st.sampled_from("flip byte cut end double value text".split()), min_size=1, max_size=4)
    ):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 40))
        if kind == "flip" and data:
            data[at] ^= 1 << (length % 8)
        elif kind == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "end":
            del data[at:]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "value":
            data[at : at + draw(st.sampled_from([0, 0, 1, 3, 6]))] = draw(st.sampled_from(VALUES))
        elif kind == "text":
            data[at:at] = draw(st.text(max_size=8)).encode("utf-8", "surrogatepass")
    return bytes(data)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def changed_json(draw, originals: list[bytes]) -> bytes:
    """Returns valid JSON in which one to three values are replaced, removed or renamed."""
    content = json.loads(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        place, steps = content, draw(st.integers(0, 2))
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if steps and isinstance(place[key], (dict, list)) and place[key]:
                place, steps = place[key], steps - 1
                continue
            how = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
            if how == "replace" or isinstance(place, list):
                place[key] = draw(JSON)
            elif how == "remove":
                del place[key]
            else:
                place[draw(st.text(max_size=8))] = place.pop(key)
            break
        else:
            content = draw(JSON)
    return json.dumps(content).encode()


def inputs(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    try:
        for original in originals:
            json.loads(original)
    except ValueError:
        return damaged(originals)
    return st.one_of(damaged(originals), changed_json(originals))
