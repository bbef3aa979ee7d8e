"""A grid of runs on one command line: one run a combination of the values of options that are given several.

rest, several = split(["--out_dir=mine", "--alpha", "0.1", "1"], ["alpha"])   # {"alpha": ["0.1", "1"]}
combinations(rest, several)                      # a command line of its own for each
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

OPTION = re.compile(r"--?([A-Za-z]\w*)")


def split(argv: Sequence[str], names: Collection[str]) -> tuple[list[str], dict[str, list[str]]]:
    """A command line without those options among `names` that are given several values, and these values by
    option, in the order of `names`. Of an option that is given twice the last one counts, as in argparse."""
    pieces: list[list[str]] = [[]]  # an option and what follows it
    for text in argv:
        pieces += [[]] if OPTION.match(text) else []
        pieces[-1].append(text)
    rest, several = [], {}
    for piece in pieces:
        option = OPTION.fullmatch(piece[0]) if piece else None
        name = option[1] if option else ""
        if name in names and len(piece) > 2:
            several[name] = piece[1:]
        else:
            several.pop(name, None)
            rest += piece
    return rest, {name: several[name] for name in names if name in several}


def combinations(rest: Sequence[str], several: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """The command lines of all runs: the last option changes fastest."""
    for values in itertools.product(*several.values()):
        yield [*rest, *(f"--{name}={value}" for name, value in zip(several, values))]


def folder_name(arm: str, settings: Mapping[str, float]) -> str:
    """Of one run: its arm, and what it has of the options with several values (fixed_layer1_alpha0.01)."""
    return "_".join((arm, *(f"{name}{value:.12g}" for name, value in settings.items())))
