"""Bars on stderr: how much of set-up and of evaluation is finished, what is done now, and how long still.

    with set_up:                                  # what begins a part of it need not know of the bar
        set_up.begin("reading the forget text")
        set_up.close()                            # before the next bar
    with bar("evaluating", seconds) as on:
        with section.of(on, 110): ...             # a section that takes so many seconds
            for form in section.steps(forms, 0.3): ...    # a loop in it, three tenths of what is left of it

Parts count by the seconds that they took on the embedded testbed: their shares, not their length, are what
matters.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

SET_UP = {  # its parts, in order
    "reading the questions": 1,
    "reading the forget text": 6,
    "reading the retain text": 5,
    "loading the LM": 15,
    "checking the LM": 4,
    "laying out the evaluations' contexts": 5,
    "computing the first activations": 9,
}
CONTEXTS = 5  # computing the residual stream of the contexts that evaluations share
FITTING, READING = 20, 150  # a method that needs no SAE, and one that reads the tokens before


def bar(what: str, seconds: float) -> Any:
    """A bar (tqdm) of so many seconds' work; nothing is shown where there is none."""
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left{postfix}"
    return tqdm(total=seconds, desc=what, bar_format=form, smoothing=0, disable=not seconds)


def count(on: Any, seconds: float):
    """So many seconds' work is finished; sums of shares, rounded, lead to no more than all of it."""
    on.update(min(seconds, on.total - on.n))


def done_before(on: Any, seconds: float):
    """Count what an earlier start has finished, which says nothing of how long the rest takes."""
    on.initial += seconds
    on.update(seconds)


class SetUp:
    """Set-up as a bar, once it is entered: all parts before the one that has begun are finished."""

    def __init__(self):
        self.bar: Any = None

    def __enter__(self):
        self.bar = bar("setting up", sum(SET_UP.values()))

    def begin(self, part: str):
        if self.bar is not None:
            finished = sum(list(SET_UP.values())[: list(SET_UP).index(part)])
            self.bar.n = max(finished, self.bar.n)
            self.bar.set_postfix_str(part)

    def close(self):
        """All of it is finished."""
        if self.bar is not None:
            self.bar.n = self.bar.total
            self.bar.set_postfix_str("")
            self.leave()

    def leave(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __exit__(self, *_):
        self.leave()


set_up = SetUp()


class Section:
    """A section of an evaluation as a length of its bar. Its loops count their steps; the rest of it counts
    at the end. Outside of `of` nothing is shown."""

    def __init__(self):
        self.bar: Any = None
        self.left = 0.0  # seconds, which are not counted yet

    @contextlib.contextmanager
    def of(self, on: Any, seconds: float) -> Iterator[None]:
        """Inside, a section of so many seconds is made, which are all counted afterwards."""
        self.bar, self.left = on, seconds
        try:
            yield
            count(on, self.left)
        finally:
            self.bar, self.left = None, 0.0

    def steps(self, items: Collection[T], share: float) -> Iterator[T]:
        """The items, one after the other, which are together this share of what is left of the section."""
        seconds = share * self.left / max(1, len(items))
        for item in items:
            yield item
            if self.bar is not None:
                count(self.bar, seconds)
                self.left -= seconds


section = Section()
