"""Suggests what the user meant by a name of weights that does not exist or cannot be read."""

import difflib
import re
from collections.abc import Iterable

from mlpmixer_flax.remote import copy_of
from mlpmixer_flax.weights.catalog import PUBLISHED

_LISTED = "python -m mlpmixer_flax.pretrained lists"
LIST = f"{_LISTED} all names"
_GOOGLE = "https://storage.googleapis.com/"
_SIZE = r"(?:\A|(?<=mixer)|(?<![a-z]))([bslh])[-_/ ]?(8|14|16|32)(?!\d)"  # in lower case: b16, B_16, B/16
# Words of published names besides the size. The letters of a name that does not mean one are not made of them.
_WORDS = r"mixer|mlp|google|timm|hf|hub|imagenet|in\d|i\d|gsam|sam|miil|goog|ft|k|px|npz|safetensors|config|model|weights"
_HINTS = ("21k", "1k", "gsam", "sam", "miil", "goog_", "224", "ft_")
_MAX_NAMES = 3


def for_address(source: str) -> str:
    """Returns what to give instead of an address of a kind that is not read; "" for all other sources."""
    hub = re.fullmatch(
        r"(?i)(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?"
        r"(?:/(?:tree|blob|raw|resolve)/([^/?#]+).*)?(?:[?#].*)?|hf://([\w.-]+/[\w.-]+?)/?",
        source,
    )
    if hub and not re.search("(?i)^https?://.*/resolve/", source):  # that one is a file's own address
        revision = f"@{hub[2]}" if hub[2] not in (None, "main") else ""
        return f"give hf-hub:{hub[1] or hub[3]}{revision}"
    if source.startswith("gs://"):
        path = source.removeprefix("gs://")
        names = _near(path.removeprefix("mixer_models/")) if path.startswith("mixer_models/") else []
        published = [name for name in PUBLISHED if PUBLISHED[name].url == f"{_GOOGLE}{path}"] or names
        if published:
            return f"give its published name, {_or(published)}"
    if source.startswith("file://"):
        return f"give its path, {source.removeprefix('file://')}"
    if source.startswith("local-dir:"):
        return f"give its path, {source.removeprefix('local-dir:')}"
    if re.match(r"(?!https?:)[a-z][a-z0-9+.-]+://", source, re.IGNORECASE) and not copy_of(source):
        return "copy the file here and give its path, or give an https URL"
    return ""


def for_name(source: str) -> str:
    """Returns a hint for a name that is nothing that exists: similar published names, or where all are listed."""
    if near := _near(source):
        others = [f"another name that {_LISTED}"] if len(near) > _MAX_NAMES else []
        return f"did you mean {_or(near[:_MAX_NAMES] + others)}?"
    if size := _size_meant(source):
        letter, patch = size
        return f"no weights of Mixer-{letter.upper()}/{patch} are published; {LIST}"
    if re.fullmatch(r"timm/[\w.-]+(@[\w./-]+)?", source):
        return f"did you mean hf-hub:{source}?"
    return LIST


def _near(source: str) -> list[str]:
    """Returns the published names that a name may mean."""
    plain = _plain(source)
    ends = [name for name in PUBLISHED if _plain(name).endswith(plain)]
    if size := _size_meant(source):
        same_size = [name for name in PUBLISHED if PUBLISHED[name].size == "".join(size)]
        hints = [
            hint for hint in _HINTS if hint in source.lower().replace("-21k", "21k").replace("-1k", "1k")
        ]
        shared = {name: sum(hint in name for hint in hints) for name in ends or same_size}
        return [name for name, count in shared.items() if count == max(shared.values())]
    return difflib.get_close_matches(source, PUBLISHED, n=2, cutoff=0.6)


def _size_meant(source: str) -> tuple[str, str] | None:
    """Returns letter and patch, ("b", "16"), if a name has a Mixer's size and no word that published names lack."""
    text = source.lower()
    size = re.search(_SIZE, text)
    rest = re.sub(_WORDS, "", text[: size.start()] + " " + text[size.end() :]) if size else ""
    return (size[1], size[2]) if size and not re.search("[a-z]", rest) else None


def _plain(name: str) -> str:
    return re.sub(r"\.(npz|safetensors)$|[^a-z0-9]", "", name.lower())


def _or(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
