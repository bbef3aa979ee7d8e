"""Checkpoints: `checkpoints/step_XXXXXXXX.safetensors`, whole or not at all; the last two stay.

    save(folder, step, tensors, facts)
    newest_common({folder: config_hash})                 # the newest state that all folders of a command hold
    step_to_go_on_at(folders)                            # of which step it would be, from headers alone

A checkpoint holds tensors, and in its header the other facts as JSON and a sha256 over both (files.header).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sae_separation import ranks
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.files import Unusable, header, read_facts, read_tensors, write_whole
from sae_separation.run_folder import WRITTEN, written

FORMAT = "orthogonal-sae-checkpoint-2"


KEPT = 2


@dataclass
class Position:
    """Where training stands: steps done, the stream's block and the batch in it that come next, seconds of
    training and of all work, checkpoints written, whether training is over, the names of the folders that are
    trained together, and passes begun over each text."""

    step: int = 0
    block: int = 0
    batch: int = 0
    train_seconds: float = 0.0
    used_seconds: float = 0.0
    written: int = 0
    over: bool = False
    together: tuple[str, ...] = ()
    passes: dict[str, int] = field(default_factory=dict)


def under(prefix: str, tensors: dict) -> dict:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def path_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, usable or not, in order."""
    there = written(folder / "checkpoints", "checkpoints")
    found = (re.fullmatch(WRITTEN["checkpoints"], path.name) for path in there)
    return sorted(int(m[1]) for m in found if m)


def save(folder: Path, step: int, tensors: dict, facts: dict):
    """Write one checkpoint; the last KEPT stay. Raises RunFailed, the older ones intact."""
    from safetensors.torch import save as to_bytes

    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_whole(path_of(folder, step), to_bytes(tensors, header(FORMAT, tensors, facts)))
    for old in steps_in(folder)[:-KEPT]:
        path_of(folder, old).unlink(missing_ok=True)


def read(folder: Path, step: int, config_hash: str) -> tuple[dict, dict]:
    """Tensors (on the CPU) and facts of a checkpoint of the run with this `config_hash`. Raises Unusable."""
    path = path_of(folder, step)
    tensors, facts = read_tensors(path, FORMAT, "a checkpoint")
    if facts.get("config_hash") != config_hash:
        raise Unusable(f"{path} was made with other settings, LM or text")
    return tensors, facts


def facts_of(folder: Path, step: int) -> dict:
    """The facts of a checkpoint; whether it is whole is not looked at. Raises Unusable."""
    return read_facts(path_of(folder, step), FORMAT, "a checkpoint")


def newest_common(config_hash: dict[Path, str]) -> list[tuple[dict, dict]] | None:
    """Tensors and facts of the newest step for which every folder (with its run's config hash) holds a
    usable checkpoint; newer ones are removed.

    None to start anew: there is no checkpoint, or a first one that was not yet in every folder. A warning
    names each unusable checkpoint. Raises WrongRequest when there are checkpoints and none will do:
    nothing is thrown away unasked.
    """
    there = {folder: steps_in(folder) for folder in config_hash}
    if not any(there.values()):
        return None
    messages, found = [], None

    def usable(*wanted: tuple[Path, int]) -> list[tuple[dict, dict]] | None:
        try:
            return [read(folder, step, config_hash[folder]) for folder, step in wanted]
        except Unusable as why:
            messages.append(str(why))
            print(f"warning: {why}")

    for common in sorted(set.intersection(*map(set, there.values())), reverse=True):
        found = usable(*((folder, common) for folder in config_hash))
        if found:
            break
    # a first checkpoint that was being written when the process died may be missing in some folders, and
    # little is lost
    else:
        common = -1
        last = ((folder, steps[-1]) for folder, steps in there.items() if steps)
        newest = None if messages else usable(*last)
        if newest is None or not is_first([facts for _, facts in newest], there):
            raise none_in_all(there, messages)
    for folder, steps in there.items():
        for step in steps:
            if step > common:
                path_of(folder, step).unlink()
    return found


def is_first(newest: Iterable[dict], folders: Iterable[Path]) -> bool:
    """Whether the facts of the newest checkpoints are of the first that these folders wrote together."""
    together = sorted(folder.name for folder in folders)
    at = [facts["position"] for facts in newest]
    return all(position["written"] <= 1 and position["together"] == together for position in at)


def none_in_all(there: Mapping[Path, list[int]], messages: Sequence[str]) -> WrongRequest:
    """There are checkpoints (`there`: their steps by folder), and none will do."""
    stands = ", ".join(
        f"{folder} at {'no step' if not steps else f'step {steps[-1]}'}" for folder, steps in there.items()
    )
    why = f"no step has a usable checkpoint in every folder: {'; '.join(messages) or stands}"
    return WrongRequest(f"{why}; give the folders as they were begun together, or --overwrite")


def step_to_go_on_at(folders: Sequence[Path]) -> int | None:
    """The step at which the runs of one pass would go on, if their checkpoints are whole; None to start anew.
    Raises WrongRequest where `newest_common` would."""
    there = {folder: steps_in(folder) for folder in folders}
    common = set.intersection(*map(set, there.values())) if there else set()
    if common or not any(there.values()):
        return max(common, default=None)
    try:
        newest = [facts_of(folder, steps[-1]) for folder, steps in there.items() if steps]
    except Unusable as why:
        raise none_in_all(there, [str(why)]) from why
    if not is_first(newest, folders):
        raise none_in_all(there, [])
    return None


def to_go_on_from(config_hash: dict[Path, str], anew: bool) -> tuple[Position, Iterable]:
    """Where training stands, and every folder's state (tensors and facts; None: at the start):
    `newest_common` as rank 0 finds it, which the others read, too, a folder at a time."""
    found = None if anew or not ranks.here.first else newest_common(config_hash)
    position = ranks.broadcast(found[0][1]["position"] if found else None)
    if position is None:
        return Position(), [None] * len(config_hash)
    read_here = (read(folder, position["step"], known) for folder, known in config_hash.items())
    return Position(**position), found or read_here


def describe_nonfinite(name: str, values) -> str | None:
    """Which entries of a tensor are not finite, and where it is largest; None when all are finite."""
    import torch

    bad = ~torch.isfinite(values)
    if not bad.any():
        return None

    def place(flat) -> str:
        return "[" + ", ".join(str(int(i)) for i in torch.unravel_index(flat, values.shape)) + "]"

    if not values.dim():
        return f"{name} = {values.item()}"
    first = ", ".join(f"{place(i)} = {values.flatten()[i].item()}" for i in bad.flatten().nonzero()[:3, 0])
    rest = values.detach().abs().masked_fill(bad, 0)
    return (
        f"{name} not finite in {int(bad.sum())} of {bad.numel()} entries ({first}; largest finite"
        f" {rest.max().item():.3g} at {place(rest.argmax())})"
    )


def refuse_nonfinite(named: dict, where: str):
    """Raises RunFailed, naming the tensors with entries that are not finite, if there are any; `where` in
    training this is."""
    from sae_separation.devices import all_finite

    if all_finite(named.values()):
        return
    wrong = [text for name, t in named.items() if (text := describe_nonfinite(name, t))]
    if wrong:
        of_lm = "activations of the LM" in wrong[0]
        remedy = "see to the LM, its dtype and --layer" if of_lm else "lower --lr or --alpha"
        more = f"; {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise RunFailed(f"{'; '.join(wrong[:4])}{more} {where}: {remedy}")
