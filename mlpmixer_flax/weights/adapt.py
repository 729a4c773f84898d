"""Adapts weights to the head, channels and resolution of a model; lists everything that does not fit at once."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.config import INIT_HEADS
from mlpmixer_flax.weights.tokens import Grid, Transform, resampled, tiled

Params = Any  # a nested dict of arrays
Shapes = Mapping[str, tuple[int, ...]]
Sizes = Mapping[str, Any]  # as `sizes_of` returns them

# Where a tree of shapes tells the sizes of its model: parameter, number of axes, the axes that tell it.
_SIZES = {
    "patches.size": ("stem/kernel", 4, slice(2)),
    "channels": ("stem/kernel", 4, 2),
    "hidden_dim": ("stem/kernel", 4, 3),
    "tokens": ("MixerBlock_0/token_mixing/Dense_0/kernel", 2, 0),
    "tokens_mlp_dim": ("MixerBlock_0/token_mixing/Dense_0/kernel", 2, 1),
    "channels_mlp_dim": ("MixerBlock_0/channel_mixing/Dense_0/kernel", 2, 1),
    "classes": ("head/kernel", 2, 1),
}
_MUST_BE_EQUAL = ("patches.size", "hidden_dim", "num_blocks", "channels_mlp_dim")
_MAX_MISMATCHES = 12  # lines about parameters; together with the lines about causes an error fits on a screen


class Change(NamedTuple):
    """How one parameter of the weights becomes the model's."""

    shape: tuple[int, ...]  # that the parameter must have in the weights
    transform: Transform


@dataclass(frozen=True)
class Judgement:
    """Whether and how one part of the weights (head, stem, token mixing) fits the model."""

    changes: Mapping[str, Change] = field(default_factory=dict)  # by name, without the block; else unchanged
    note: str = ""  # what is changed, for the user
    problem: str = ""  # why it does not fit, and what to do
    used: bool = True  # False: the model's own parameters are used instead


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
    """Returns weights as the parameters of a model, and sentences that say what was changed.

    With K times the tokens and K times the tokens_mlp_dim, the model computes exactly the mean over K tiles
    (paper, Appendix C); with the same tokens_mlp_dim, token mixing is resampled. For grayscale images, stem
    kernels for 3 channels are summed.

    Args:
      shapes: the shape of every parameter in the weights ("MixerBlock_0/token_mixing/Dense_0/kernel").
      read: takes a name and returns its float32 array; called once per parameter that is used.
      like: the model's parameters, arrays or jax.ShapeDtypeStruct.
      grid: the model's tokens; None = those of a square image.
      source_grid: the same for the weights.
      head: "keep" or "reset" the head of the weights; "auto" = keep it if it has as many classes as the
        model, unless `same_classes` is False. A reset head is the head of `like` if that has arrays, else 0.
      same_classes: whether both have the same class names; None = unknown.
      name: what an error calls the weights.

    Returns:
      A tree like `like`, of float32 numpy arrays; and the sentences.

    Raises:
      UserError: the weights do not fit; raised before anything is read, with every reason.
    """
    if "stem" not in like:
        raise UserError(
            "like has no layer 'stem': give the model's parameters, the tree under variables['params']"
        )
    if head not in INIT_HEADS:
        raise UserError(f"unknown init_head {head!r}: choose one of {', '.join(INIT_HEADS)}")
    leaves: dict[str, Any] = flatten_dict(like, sep="/")
    model = {key: tuple(leaf.shape) for key, leaf in leaves.items()}
    theirs, ours = sizes_of(shapes), sizes_of(model)
    of_head = _judge_head(theirs, ours, head=head, same_classes=same_classes)
    of_stem = _judge_stem(theirs, ours)
    of_tokens = _judge_tokens(theirs, ours, grid=grid, source_grid=source_grid)

    def is_used(key: str) -> bool:
        return of_head.used or not key.startswith("head/")

    given = {key: tuple(shape) for key, shape in shapes.items() if is_used(key)}
    special = {**of_stem.changes, **of_tokens.changes}
    changes = {
        key: special.get(re.sub(r"^MixerBlock_\d+/", "", key), Change(shape, np.asarray))
        for key, shape in model.items()
        if is_used(key)
    }
    problems = [_difference(size, theirs, ours) for size in _MUST_BE_EQUAL]
    problems += [of_tokens.problem, of_stem.problem, of_head.problem]
    lines = [*filter(None, problems), *_mismatches(given, changes, model=model)]
    if lines:
        raise UserError("\n  ".join([f"{name} cannot be adapted to the model:", *lines]))

    adapted = {
        key: changes[key].transform(read(key)) if key in changes else _fresh(leaf)
        for key, leaf in leaves.items()
    }
    notes = [judgement.note for judgement in (of_stem, of_tokens, of_head) if judgement.note]
    return unflatten_dict(adapted, sep="/"), notes


def _fresh(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return np.zeros(leaf.shape, np.float32)
    return np.array(leaf, np.float32)


def sizes_of(shapes: Shapes) -> dict[str, Any]:
    """Returns the sizes of a model that the shapes of its parameters tell.

    The keys are those of _SIZES and "num_blocks"; a size that the shapes do not tell is left out.
    """
    sizes = {}
    for size, (parameter, num_axes, axes) in _SIZES.items():
        shape = tuple(shapes.get(parameter, ()))
        if len(shape) == num_axes:
            sizes[size] = shape[axes]
    blocks = {key.split("/")[0] for key in shapes if key.startswith("MixerBlock_")}
    return {**sizes, "num_blocks": len(blocks)} if blocks else sizes


def _judge_head(theirs: Sizes, ours: Sizes, *, head: str, same_classes: bool | None) -> Judgement:
    count, wanted = theirs.get("classes"), ours.get("classes")
    if wanted is None:
        return Judgement(used=False)
    if head == "reset":
        return Judgement(used=False, note="head: new, as asked for")
    if count is None:
        reason = "the weights have none"
    elif count != wanted:
        reason = f"the weights have {count:,} classes and the model {wanted:,}"
    elif same_classes is False and head == "auto":
        reason = f"the weights' {count:,} classes have other names than the model's"
    else:
        return Judgement(note=f"head: kept, {count:,} classes")
    if head == "keep":
        problem = f"the head cannot be kept, since {reason}: set init_head to 'auto' or 'reset'"
        return Judgement(used=False, problem=problem)
    return Judgement(used=False, note=f"head: new, since {reason}")


def _judge_stem(theirs: Sizes, ours: Sizes) -> Judgement:
    channels, wanted = theirs.get("channels"), ours["channels"]
    if channels in (None, wanted):
        return Judgement()
    if (channels, wanted) != (3, 1):
        return Judgement(
            problem=f"the model takes {wanted} channels, the weights {channels}: choose other images or weights"
        )
    shape = (*ours["patches.size"], channels, ours["hidden_dim"])
    return Judgement(
        changes={"stem/kernel": Change(shape, lambda kernel: kernel.sum(2, keepdims=True))},
        note=f"stem: kernels summed over {channels} channels for grayscale images",
    )


def _judge_tokens(theirs: Sizes, ours: Sizes, *, grid: Grid | None, source_grid: Grid | None) -> Judgement:
    problem = _difference("tokens_mlp_dim", theirs, ours)
    if theirs.get("patches.size") != ours["patches.size"] or "tokens" not in theirs:
        return Judgement(problem=problem)  # with the right patches the model has other tokens
    if (theirs["tokens"], source_grid) == (ours["tokens"], grid):
        return Judgement(problem=problem)
    source, target = _grid(theirs, source_grid), _grid(ours, grid)
    if not source or not target:
        return Judgement(
            problem=f"{theirs['tokens']:,} tokens of the weights and {ours['tokens']:,} of the model do not "
            f"match source_grid={source_grid} and grid={grid} (None = a square image): give rows and columns"
        )
    if source == target:
        return Judgement(problem=problem)
    tiles = target[0] // source[0], target[1] // source[1]
    divides = (tiles[0] * source[0], tiles[1] * source[1]) == target
    if divides and ours["tokens_mlp_dim"] == math.prod(tiles) * theirs["tokens_mlp_dim"]:
        transforms, how = tiled(source, tiles), "exact for tiles (Appendix C)"
    elif not problem:
        transforms, how = resampled(source, target), "resampled (approximate)"
    else:
        return Judgement(
            problem=_resolution_problem(theirs, ours, source=source, target=target, divides=divides)
        )
    count, width = theirs["tokens"], theirs["tokens_mlp_dim"]
    in_weights = {
        "Dense_0/kernel": (count, width),
        "Dense_0/bias": (width,),
        "Dense_1/kernel": (width, count),
        "Dense_1/bias": (count,),
    }
    return Judgement(
        changes={f"token_mixing/{part}": Change(in_weights[part], to) for part, to in transforms.items()},
        note=f"token mixing: {_cross(source)} to {_cross(target)} tokens, {how}",
    )


def _resolution_problem(theirs: Sizes, ours: Sizes, *, source: Grid, target: Grid, divides: bool) -> str:
    """Returns the sentence for a tokens_mlp_dim that suits neither way to change the resolution."""
    patch, width = ours["patches.size"], theirs["tokens_mlp_dim"]

    def where(sizes: Sizes, grid: Grid) -> str:
        image_px = grid[0] * patch[0], grid[1] * patch[1]
        return f"{sizes['tokens']} tokens ({_cross(grid)}: {side(image_px)} px /{side(patch)})"

    def side(pair: tuple[int, int]) -> str:
        return str(pair[0]) if pair[0] == pair[1] else _cross(pair)

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


def _grid(sizes: Sizes, given: Grid | None) -> Grid | None:
    """Returns the given grid, else that of a square image; None if it has another number of tokens."""
    height, width = sizes["patches.size"]
    side_px = math.isqrt(sizes["tokens"] * height * width)
    rows, columns = given or (side_px // height, side_px // width)
    return (rows, columns) if min(rows, columns) > 0 and rows * columns == sizes["tokens"] else None


def _difference(size: str, theirs: Sizes, ours: Sizes) -> str:
    """Returns a sentence with the remedy if the weights have another size than the model, else ""."""
    if size not in theirs or theirs[size] == ours[size]:
        return ""
    return f"model.{size} is {ours[size]}, the weights have {theirs[size]}: set it to {theirs[size]}"


def _mismatches(given: Shapes, changes: Mapping[str, Change], *, model: Shapes) -> list[str]:
    """Returns lines about parameters that only one side has, then about those of another shape.

    Blocks with the same mismatch share a line.
    """
    mismatches = {key: "missing in the weights" for key in _outermost(changes, given)}
    mismatches |= {key: "unexpected, not in the model" for key in _outermost(given, changes)}
    for key, (shape, _) in changes.items():
        if given.get(key, shape) != shape:
            mismatches[key] = f"weights {given[key]}, model {model[key]}"
    blocks: dict[tuple[str, str, str], list[str]] = {}
    for key, mismatch in mismatches.items():
        layer, slash, rest = key.partition("/")
        kind = re.sub(r"\d{1,9}\Z", "", layer)
        blocks.setdefault((kind, slash + rest, mismatch), []).append(layer.removeprefix(kind))
    lines = [
        f"{kind}{_numbers(numbers)}{rest}{f' ({len(numbers)}x)' if len(numbers) > 1 else ''}: {mismatch}"
        for (kind, rest, mismatch), numbers in blocks.items()
    ]
    left_out = len(lines) - _MAX_MISMATCHES
    return [*lines[:_MAX_MISMATCHES], f"and {left_out} lines more"] if left_out > 0 else lines


def _outermost(keys: Iterable[str], others: Collection[str]) -> list[str]:
    """Returns the keys that are not among the others; only their layer if the others have nothing of it."""
    layers = {key.split("/")[0] for key in others}
    absent = [(key, key.split("/")[0]) for key in keys if key not in others]
    return list(dict.fromkeys(key if layer in layers else layer for key, layer in absent))


def _numbers(numbers: list[str]) -> str:
    """Returns "3", "0..11" or "0,2,5"; "" for a layer without a number."""
    ordered = sorted(numbers, key=lambda number: int(number or 0))
    first, last = ordered[0], ordered[-1]
    adjoining = len(ordered) > 1 and int(last or 0) - int(first or 0) == len(ordered) - 1
    return f"{first}..{last}" if adjoining else ",".join(ordered)
