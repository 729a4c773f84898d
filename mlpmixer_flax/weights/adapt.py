"""Weights fitted to a model: to its head, channels and resolution; what cannot be is all said at once."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mlpmixer_flax import UserError

Params = Any  # a nested dict of arrays
Shapes = Mapping[str, tuple[int, ...]]
Transform = Callable[[np.ndarray], np.ndarray]
Changes = dict[str, tuple[tuple[int, ...], Transform]]  # shape in the weights, and what is done to it
Grid = tuple[int, int]  # rows and columns of tokens

HEADS = ("auto", "keep", "reset")

# Where a tree of shapes says how large its model is: parameter, number of axes, the axes that say it.
_SIZES = {
    "patches.size": ("stem/kernel", 4, slice(2)),
    "channels": ("stem/kernel", 4, 2),
    "hidden_dim": ("stem/kernel", 4, 3),
    "tokens": ("MixerBlock_0/token_mixing/Dense_0/kernel", 2, 0),
    "tokens_mlp_dim": ("MixerBlock_0/token_mixing/Dense_0/kernel", 2, 1),
    "channels_mlp_dim": ("MixerBlock_0/channel_mixing/Dense_0/kernel", 2, 1),
    "classes": ("head/kernel", 2, 1),
}
_TO_BE_EQUAL = ("patches.size", "hidden_dim", "num_blocks", "channels_mlp_dim")
_MAX_COMPLAINTS = 12  # lines about parameters; with those about causes an error fits a screen


def adapt(
    shapes: Shapes,
    read: Callable[[str], np.ndarray],
    like: Params,
    *,
    grid: Grid | None = None,
    source_grid: Grid | None = None,
    head: str = "auto",
    same_classes: bool | None = None,
    name: str = "the weights",
) -> tuple[Params, list[str]]:
    """Weights as the parameters of a model, and sentences about what was changed on the way.

    `shapes` has the shape of every name in the weights ("MixerBlock_0/token_mixing/Dense_0/kernel"). `read`
    takes a name to its float32 array; it is called once for each parameter that is used. `like` is the
    model's tree, of arrays or jax.ShapeDtypeStruct; the result is its like in float32 numpy arrays.

    `grid` and `source_grid` are the tokens of the model and of the weights; None = those of a square image.
    With K times the tokens and K times the tokens_mlp_dim, the model computes exactly the mean over K tiles
    (paper, Appendix C); with the same tokens_mlp_dim, token mixing is resampled. Stem kernels for 3 channels
    are summed for grayscale images. `head` "keep" or "reset" the weights' head; "auto" = keep it if it has as
    many classes, unless `same_classes` is False. A reset head is that of `like`, where this has arrays, or 0.

    Raises UserError, before anything is read, with all that doesn't fit; it calls the weights by `name`.
    """
    if "stem" not in like:
        raise UserError(
            "like has no layer 'stem': give the model's parameters, the tree under variables['params']"
        )
    if head not in HEADS:
        raise UserError(f"unknown init_head {head!r}: choose one of {', '.join(HEADS)}")
    leaves = flatten_dict(like, sep="/")
    model = {key: tuple(leaf.shape) for key, leaf in leaves.items()}
    theirs, ours = sizes_of(shapes), sizes_of(model)
    keep, head_note, head_problem = _judge_head(theirs, ours, head=head, same_classes=same_classes)
    stem, stem_note, stem_problem = _judge_stem(theirs, ours)
    tokens, token_note, token_problem = _judge_tokens(theirs, ours, grid=grid, source_grid=source_grid)

    given = {key: tuple(shape) for key, shape in shapes.items() if keep or not _is_head(key)}
    changes = {
        key: (stem | tokens).get(re.sub(r"^MixerBlock_\d+/", "", key), (shape, np.asarray))
        for key, shape in model.items()
        if keep or not _is_head(key)
    }
    problems = [_difference(size, theirs, ours) for size in _TO_BE_EQUAL]
    problems += [token_problem, stem_problem, head_problem]
    lines = [*filter(None, problems), *_complaints(given, changes, model=model)]
    if lines:
        raise UserError("\n  ".join([f"{name} cannot be fitted to the model:", *lines]))

    fitted = {
        key: changes[key][1](read(key)) if key in changes else _fresh(leaf) for key, leaf in leaves.items()
    }
    return unflatten_dict(fitted, sep="/"), [*filter(None, [stem_note, token_note, head_note])]


def _fresh(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return np.zeros(leaf.shape, np.float32)
    return np.array(leaf, np.float32)


def _is_head(key: str) -> bool:
    return key.startswith("head/")


def sizes_of(shapes: Shapes) -> dict[str, Any]:
    """What the shapes say of their model, by the keys of _SIZES and "num_blocks", where they do."""
    sizes = {}
    for size, (parameter, num_axes, axes) in _SIZES.items():
        shape = tuple(shapes.get(parameter, ()))
        if len(shape) == num_axes:
            sizes[size] = shape[axes]
    blocks = {key.split("/")[0] for key in shapes if key.startswith("MixerBlock_")}
    return {**sizes, "num_blocks": len(blocks)} if blocks else sizes


def _judge_head(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], *, head: str, same_classes: bool | None
) -> tuple[bool, str, str]:
    """(whether the weights' head is kept, a note, a problem)"""
    count, wanted = theirs.get("classes"), ours.get("classes")
    if wanted is None:
        return False, "", ""
    if head == "reset":
        return False, "head: new, as asked for", ""
    if count is None:
        reason = "the weights have none"
    elif count != wanted:
        reason = f"the weights have {count:,} classes and the model {wanted:,}"
    elif same_classes is False and head == "auto":
        reason = f"the weights' {count:,} classes have other names than the model's"
    else:
        return True, f"head: kept, {count:,} classes", ""
    if head == "keep":
        return False, "", f"the head cannot be kept, since {reason}: set init_head to 'auto' or 'reset'"
    return False, f"head: new, since {reason}", ""


def _judge_stem(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[Changes, str, str]:
    """(changes, a note, a problem)"""
    channels, wanted = theirs.get("channels"), ours["channels"]
    if channels in (None, wanted):
        return {}, "", ""
    if (channels, wanted) != (3, 1):
        problem = f"the model takes {wanted} channels, the weights {channels}: choose other images or weights"
        return {}, "", problem
    source = (*ours["patches.size"], channels, ours["hidden_dim"])
    return (
        {"stem/kernel": (source, lambda kernel: kernel.sum(2, keepdims=True))},
        f"stem: kernels summed over {channels} channels for grayscale images",
        "",
    )


def _judge_tokens(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], *, grid: Grid | None, source_grid: Grid | None
) -> tuple[Changes, str, str]:
    """(changes, a note, a problem)"""
    problem = _difference("tokens_mlp_dim", theirs, ours)
    if theirs.get("patches.size") != ours["patches.size"] or "tokens" not in theirs:
        return {}, "", problem  # with the right patches the model has other tokens
    if (theirs["tokens"], source_grid) == (ours["tokens"], grid):
        return {}, "", problem
    source, target = _grid(theirs, source_grid), _grid(ours, grid)
    if not source or not target:
        problem = (
            f"{theirs['tokens']:,} tokens of the weights and {ours['tokens']:,} of the model do not go with "
            f"source_grid={source_grid} and grid={grid} (None = a square image's): give rows and columns"
        )
        return {}, "", problem
    if source == target:
        return {}, "", problem
    tiles = target[0] // source[0], target[1] // source[1]
    divides = (tiles[0] * source[0], tiles[1] * source[1]) == target
    if divides and ours["tokens_mlp_dim"] == math.prod(tiles) * theirs["tokens_mlp_dim"]:
        transforms, how = _tiled(source, tiles), "exact for tiles (Appendix C)"
    elif not problem:
        transforms, how = _resampled(source, target), "resampled (approximate)"
    else:
        return {}, "", _resolution_problem(theirs, ours, source=source, target=target, divides=divides)
    count, width = theirs["tokens"], theirs["tokens_mlp_dim"]
    in_weights = {
        "Dense_0/kernel": (count, width),
        "Dense_0/bias": (width,),
        "Dense_1/kernel": (width, count),
        "Dense_1/bias": (count,),
    }
    changes = {f"token_mixing/{part}": (in_weights[part], change) for part, change in transforms.items()}
    return changes, f"token mixing: {_cross(source)} to {_cross(target)} tokens, {how}", ""


def _resolution_problem(theirs, ours, *, source: Grid, target: Grid, divides: bool) -> str:
    def where(sizes, grid):
        image_px = grid[0] * patch[0], grid[1] * patch[1]
        return f"{sizes['tokens']} tokens ({_cross(grid)}: {side(image_px)} px /{side(patch)})"

    def side(pair):
        return pair[0] if pair[0] == pair[1] else _cross(pair)

    patch, width = ours["patches.size"], theirs["tokens_mlp_dim"]
    exact = f"{ours['tokens'] // theirs['tokens'] * width} (exact) or " if divides else ""
    problem = (
        f"these weights are for {where(theirs, source)} with tokens_mlp_dim {width}, the model has "
        f"{where(ours, target)} with {ours['tokens_mlp_dim']}: "
        f"set model.tokens_mlp_dim to {exact}{width} (resampled)"
    )
    height_px, width_px = source[0] * patch[0], source[1] * patch[1]
    if height_px == width_px:
        problem += f", or to {width} and preprocess.image_size_px to {height_px} (unchanged)"
    return problem


def _cross(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _grid(sizes: Mapping[str, Any], given: Grid | None) -> Grid | None:
    """Rows and columns of the tokens, of a square image where none are given; None if they aren't as many."""
    height, width = sizes["patches.size"]
    side_px = math.isqrt(sizes["tokens"] * height * width)
    rows, columns = given or (side_px // height, side_px // width)
    return (rows, columns) if min(rows, columns) > 0 and rows * columns == sizes["tokens"] else None


def _tiled(source: Grid, tiles: Grid) -> dict[str, Transform]:
    """Token mixing of a larger image as that of its tiles, each on its own (paper, Appendix C).

    Kernels become block-diagonal, a block a tile. An image's features are then the mean of its tiles'.
    """
    tokens = np.arange(math.prod(tiles) * math.prod(source)).reshape(*tiles, *source)
    raster = tokens.swapaxes(1, 2).ravel()  # blocks go tile by tile, tokens row by row
    diagonal = np.eye(math.prod(tiles), dtype=np.float32)
    return {
        "Dense_0/kernel": lambda kernel: np.kron(diagonal, kernel)[raster],
        "Dense_0/bias": lambda bias: np.tile(bias, len(diagonal)),
        "Dense_1/kernel": lambda kernel: np.kron(diagonal, kernel)[:, raster],
        "Dense_1/bias": lambda bias: np.tile(bias, len(diagonal))[raster],
    }


def _resampled(source: Grid, target: Grid) -> dict[str, Transform]:
    """Token mixing on another grid: tokens are resized to the old one, mixed as before, and resized back.

    Both ways bicubic, antialiased where it shrinks; being linear, this becomes part of the kernels. Tokens
    that are all the same give the hidden activations they gave before, whatever their number.
    """
    # On a CIFAR-10 run of 8x8 tokens, brought to 6x6 to 16x16 and not trained further, bilinear came within a
    # point of accuracy; the pseudo-inverse of `back` for `there` (arXiv 2212.08013) lost 1 to 3 points.

    def resize(old: Grid, new: Grid) -> np.ndarray:
        """The matrix (new tokens, old tokens)."""
        axes = [
            jax.image.resize(np.eye(n, dtype=np.float32), (m, n), "bicubic")
            for n, m in zip(old, new, strict=True)
        ]
        return np.kron(*axes)

    there, back = resize(target, source), resize(source, target)
    return {
        "Dense_0/kernel": lambda kernel: there.T @ kernel,
        "Dense_1/kernel": lambda kernel: kernel @ back.T,
        "Dense_1/bias": lambda bias: back @ bias,
    }


def _difference(size: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """A sentence with the remedy, where the weights tell the size and differ in it."""
    if size not in theirs or theirs[size] == ours[size]:
        return ""
    return f"model.{size} is {ours[size]}, the weights have {theirs[size]}: set it to {theirs[size]}"


def _complaints(given: Shapes, changes: Changes, *, model: Shapes) -> list[str]:
    """Lines on parameters of one side only, then on those of another shape; blocks share equal ones."""
    complaints = {key: "missing in the weights" for key in _outermost(changes, given)}
    complaints |= {key: "unexpected, not in the model" for key in _outermost(given, changes)}
    for key, (shape, _) in changes.items():
        if given.get(key, shape) != shape:
            complaints[key] = f"weights {given[key]}, model {model[key]}"
    blocks: dict[tuple[str, ...], list[str]] = {}
    for key, complaint in complaints.items():
        layer, slash, rest = key.partition("/")
        kind, number = re.fullmatch(r"(.*?)(\d{0,9})", layer).groups()
        blocks.setdefault((kind, slash + rest, complaint), []).append(number)
    lines = [
        f"{kind}{_numbers(numbers)}{rest}{f' ({len(numbers)}x)' if len(numbers) > 1 else ''}: {complaint}"
        for (kind, rest, complaint), numbers in blocks.items()
    ]
    left_out = len(lines) - _MAX_COMPLAINTS
    return [*lines[:_MAX_COMPLAINTS], f"and {left_out} lines more"] if left_out > 0 else lines


def _outermost(keys: Iterable[str], others: Collection[str]) -> list[str]:
    """Those keys that aren't among the others; just their layer, where the others have nothing of it."""
    layers = {key.split("/")[0] for key in others}
    absent = [(key, key.split("/")[0]) for key in keys if key not in others]
    return list(dict.fromkeys(key if layer in layers else layer for key, layer in absent))


def _numbers(numbers: list[str]) -> str:
    """As "3", "0..11" or "0,2,5"; "" for a layer without one."""
    ordered = sorted(numbers, key=lambda number: int(number or 0))
    first, last = ordered[0], ordered[-1]
    adjoining = len(ordered) > 1 and int(last) - int(first or 0) == len(ordered) - 1
    return f"{first}..{last}" if adjoining else ",".join(ordered)
