"""Names of a Mixer's parameters in every layout, and how to find them among the names in a file."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from mlpmixer_flax import UserError

# Names of every parameter: ours, which are Google's with Linen; Google's before Linen; timm's. * is a block.
OURS, PRE_LINEN, TIMM = range(3)
_BLOCK = ("MixerBlock_{i}", "Mixer/encoderblock_{i}", "blocks.{i}")
_NAMES = [
    tuple(name.replace("*", block) for name, block in zip(row.split(), _BLOCK, strict=True))
    for row in """
stem/kernel                      embedding/kernel                  stem.proj.weight
stem/bias                        embedding/bias                    stem.proj.bias
*/LayerNorm_0/scale              */LayerNorm_0/scale               *.norm1.weight
*/LayerNorm_0/bias               */LayerNorm_0/bias                *.norm1.bias
*/token_mixing/Dense_0/kernel    */token_mixing_phase_0/kernel1    *.mlp_tokens.fc1.weight
*/token_mixing/Dense_0/bias      */token_mixing_phase_0/bias1      *.mlp_tokens.fc1.bias
*/token_mixing/Dense_1/kernel    */token_mixing_phase_0/kernel2    *.mlp_tokens.fc2.weight
*/token_mixing/Dense_1/bias      */token_mixing_phase_0/bias2      *.mlp_tokens.fc2.bias
*/LayerNorm_1/scale              */LayerNorm_1/scale               *.norm2.weight
*/LayerNorm_1/bias               */LayerNorm_1/bias                *.norm2.bias
*/channel_mixing/Dense_0/kernel  */channel_mixing_phase_0/kernel1  *.mlp_channels.fc1.weight
*/channel_mixing/Dense_0/bias    */channel_mixing_phase_0/bias1    *.mlp_channels.fc1.bias
*/channel_mixing/Dense_1/kernel  */channel_mixing_phase_0/kernel2  *.mlp_channels.fc2.weight
*/channel_mixing/Dense_1/bias    */channel_mixing_phase_0/bias2    *.mlp_channels.fc2.bias
pre_head_layer_norm/scale        Mixer/encoder_norm/scale          norm.weight
pre_head_layer_norm/bias         Mixer/encoder_norm/bias           norm.bias
head/kernel                      head/kernel                       head.weight
head/bias                        head/bias                         head.bias
""".strip().splitlines()
]
_ROWS = [{row[column]: row for row in _NAMES} for column in range(3)]
_SEPARATORS = ("/", "/", ".")  # of each column; a file may have the other one
_LEAVES = tuple({re.split("[./]", name)[-1] for row in _NAMES for name in row})
_MAX_PARTS = 8  # a name has at most 5 parts, and some more if PyTorch wraps its layers

# PyTorch's wrappers put a part of their own into the names of what they wrap, which may be a single layer.
_WRAPPERS = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)[./]"
# Parts of names that say what arrays are: an average of the weights over updates; what an optimizer keeps of
# each parameter; what belongs to training and not to a model.
_EMA = r"(?i)(?:.*_)?(?:ema|swa|polyak|shadow|avg|average|averaged)(?:_.*|\d*)"
_OPTIMIZER = (
    r"(?i)(?:opt|optim|optimizers?)(?:_states?|_state_dict)?|param_states|mu|nu|trace|momentum(?:_buffer)?"
    r"|(?:max_)?exp_avg.*|acc_grads|grads?|gradients?|accumulators?"
)
_BOOKKEEPING = (
    r"(?i)(?:global_|num_)?(?:steps?|epochs?|iter|iterations?|updates|count|counter)|n_averaged|decay|state"
    r"|chrono|rngs?|rng_states?|seed|lr|(?:lr_)?schedulers?(?:_states?)?|(?:grad_)?scaler|hyper_parameters"
    r"|loss(?:_fn)?|criterion|metrics?|callbacks"
)
_MAX_GROUPS = 4  # named in a note


@dataclass(frozen=True)
class Found:
    """The parameters of one Mixer among the names in a file."""

    layout: int  # a column of _NAMES
    names: Mapping[str, str]  # our name -> name in the file
    unknown: tuple[str, ...]  # names of the model that no Mixer has, sorted
    note: str  # which names were shortened or set aside; "" if none


def renamed(name: str, source: int, target: int = OURS) -> str | None:
    """Returns a parameter's name in another column of _NAMES; None if the source column does not have it."""
    number = re.search("0|[1-9][0-9]*", name)  # if a name has a block, its first number is the block's
    block = number[0] if number else ""
    row = _ROWS[source].get(name.replace(block, "{i}", 1) if block else name)
    return row[target].replace("{i}", block) if row else None


def find_parameters(names: Collection[str], file: str) -> Found | None:
    """Finds a Mixer's parameters among all names in a file; None if there are none.

    The names may have a prefix of another program, the same for all of them: "params/", "model.". Weights
    are taken before their moving average (EMA), and neither is mixed with the other. An optimizer's copies
    of the parameters are never taken. Names outside the model are set aside.

    Raises:
      UserError: several sets of names are equally good; the message contains `file`.
    """
    sets: dict[tuple[str, int], dict[str, str]] = {}  # prefix and layout -> our name -> name in the file
    for name in names:
        for prefix, layout, ours in _readings(name):
            twin = sets.setdefault((prefix, layout), {}).setdefault(ours, name)
            if twin != name:
                raise UserError(
                    f"{file} has {ours} twice, as {twin!r:.80} and {name!r:.80}: remove one of them"
                )
    candidates = {key: found for key, found in sets.items() if not _is_optimizer(key[0])}
    if not candidates:
        return None
    most = max(map(len, candidates.values()))
    # Of one prefix, the first layout: a head has the same names in both of Google's layouts.
    best = {prefix: layout for (prefix, layout), found in [*candidates.items()][::-1] if len(found) == most}
    chosen = sorted([prefix for prefix in best if not _is_ema(prefix)] or best)
    if len(chosen) > 1:
        listed = ", ".join(f"{prefix!r:.60}" for prefix in chosen[:3])
        raise UserError(
            f"{file} holds {len(chosen)} sets of Mixer weights, under {listed}: write the one that you want to a "
            "file of its own"
        )
    prefix, layout = chosen[0], best[chosen[0]]
    own = candidates[prefix, layout]
    copies = {
        name
        for (other, _), found in sets.items()
        if _is_optimizer(other) or (_is_ema(other) and not _is_ema(prefix))
        for name in found.values()
    }
    others = sorted(set(names) - set(own.values()))
    aside = [name for name in others if name in copies or _is_outside(name, prefix)]
    return Found(layout, own, tuple(sorted(set(others) - set(aside))), _note(prefix, aside))


def _readings(name: str) -> Iterator[tuple[str, int, str]]:
    """Yields (prefix, layout, our name) for every layout in which the end of a name is a parameter's."""
    if not name.endswith(_LEAVES):
        return
    starts = [0, *(match.end() for match in re.finditer("[./]", name))][-_MAX_PARTS:]
    for layout, separator in enumerate(_SEPARATORS):
        # The shortest end first, so that wrappers around the whole model are part of the prefix.
        for start in reversed(starts):
            end = re.sub("[./]", separator, re.sub(rf"(?<=[./]){_WRAPPERS}", "", name[start:]))
            if ours := renamed(end, layout):
                yield name[:start], layout, ours
                break


def _parts(prefix: str) -> list[str]:
    return [part for part in re.split("[./]", prefix) if part]


def _is_optimizer(prefix: str) -> bool:
    prefix = re.sub(r"^(opt|optimizer)[./]target[./]", "", prefix)  # where flax.optim kept the parameters
    return any(re.fullmatch(_OPTIMIZER, part) for part in _parts(prefix))


def _is_ema(prefix: str) -> bool:
    return any(re.fullmatch(_EMA, part) for part in _parts(prefix))


def _is_outside(name: str, prefix: str) -> bool:
    """Returns whether a name is not part of the model whose names have this prefix."""
    if not name.startswith(prefix):
        return True
    first = _parts(name.removeprefix(prefix))[:1]
    return any(re.fullmatch(pattern, part) for part in first for pattern in (_EMA, _OPTIMIZER, _BOOKKEEPING))


def _note(prefix: str, aside: list[str]) -> str:
    """Returns the sentence that tells the user about a prefix and names that are set aside."""
    average = "an average over updates (EMA)"
    sentences = []
    if prefix:
        sentences.append(f"the weights are those under {prefix!r:.60}" + f", {average}" * _is_ema(prefix))
    inside = [name.removeprefix(prefix) for name in aside]  # an EMA may be under the prefix too
    groups = Counter(
        repr(name)[1:-1] if not name.isprintable() else (_parts(name) or [name])[0] for name in inside
    )
    if groups:
        listed = [f"{group:.40} ({count:,})" for group, count in groups.most_common(_MAX_GROUPS)]
        more = [f"and {len(groups) - _MAX_GROUPS} more groups"] if len(groups) > _MAX_GROUPS else []
        sentences.append(f"other arrays of the file are not used: {', '.join(listed + more)}")
    averages = [group for group in groups if _is_ema(group) and groups[group] > 1]
    if averages:
        sentences.append(f"{averages[0]:.40} is {average}: to use it, write it to a file of its own")
    return "; ".join(sentences)
