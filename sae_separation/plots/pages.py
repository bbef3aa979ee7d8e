"""What report.html shows of the inside of a run: its features, its answers to questions and its prompts, as
`--evals features questions` left them in eval/. Checked part by part, and packed small.

    page = read(folder, seed)                    # {} where the run has none; ValueError for what is damaged
    texts, packed, left_out = that_fit(pages, room)

Imports no torch.
"""

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sae_separation.errors import plain
from sae_separation.files import content_of

LONGEST = 300  # characters of a text

# ------------------------------------------------------------------------------------------------ shapes
# A shape takes a value of JSON and gives what a page shows of it, or raises ValueError.


def text(value: Any) -> str:
    """Whose characters are all printable."""
    if not isinstance(value, str):
        raise ValueError("not a text")
    return plain(value[:LONGEST])


def number(value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError("not a number")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def each(of: Callable) -> Callable[[Any], list]:
    """A list of one shape."""

    def shape(value: Any) -> list:
        if not isinstance(value, list):
            raise ValueError("not a list")
        return [of(part) for part in value]

    return shape


def row(*of: Callable) -> Callable[[Any], list]:
    """A list of these shapes."""

    def shape(value: Any) -> list:
        if not isinstance(value, list) or len(value) != len(of):
            raise ValueError(f"not a list of {len(of)}")
        return [part_of(part) for part_of, part in zip(of, value)]

    return shape


def named(of: Callable) -> Callable[[Any], dict]:
    """An object of any names with values of one shape."""

    def shape(value: Any) -> dict:
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return {text(name): of(part) for name, part in value.items()}

    return shape


def fields(**of: Callable) -> Callable[[Any], dict]:
    """An object that has these names, each with its shape; what else it has is left out."""

    def shape(value: Any) -> dict:
        out = {}
        for name, part_of in of.items():
            try:
                out[name] = part_of(value[name] if isinstance(value, dict) else None)
            except KeyError:
                raise ValueError(f"no {name}") from None
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return out

    return shape


def said(value: Any) -> bool | str:
    """An answer: True where it is right, else what is said."""
    return True if value is True else text(value)


def answer(value: Any) -> bool | list | None:
    """To a question in a format (evals/answers.py)."""
    return value if value is None or value is True else row(said, said)(value)


def asked(value: Any) -> list:
    """A question with its answers."""
    if not isinstance(value, list) or len(value) < 4:
        raise ValueError("not a list of a question and its answers")
    return [*map(text, value[:4]), *map(answer, value[4:])]


PAGES = {  # section of eval/ -> what of it is shown
    "features": fields(
        features=each(
            fields(
                feature=number,
                forget=number,
                retain=number,
                affinity=number,
                mean=number,
                in_cell=flag,
                cells=named(number),
                neighbours=each(row(number, number)),
                contexts=each(row(text, number, each(text), each(number))),
                changes=fields(
                    n=number,
                    by_format=named(row(number, number)),
                    examples=each(row(text, text, text, text, text)),
                ),
            )
        )
    ),
    "questions": fields(
        columns=each(text),
        rows=each(asked),
        prompts=each(fields(**dict.fromkeys(("domain", "prompt", "without", "with"), text))),
    ),
}


def read(folder: Path, seed: int) -> dict:
    """What a page shows of one seed of a run; {} where it was not evaluated so. Raises ValueError with the
    file's name and what is wrong there."""
    page = {}
    for section, shape in PAGES.items():
        path = folder / "eval" / f"seed{seed}_{section}.json"
        if path.exists():
            try:
                page |= shape(json.loads(content_of(path)))
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"eval/{path.name}: {error}") from error
    return page


# ------------------------------------------------------------------------------------------------ size


class Packed(NamedTuple):
    """A page by its title, as text that holds its JSON deflated."""

    title: str
    base64: str


def pack(title: str, content: Any) -> Packed:
    text = json.dumps(content, separators=(",", ":")).encode()
    return Packed(title, base64.b64encode(zlib.compress(text, 9)).decode())


def with_shared_texts(pages: dict[str, dict]) -> tuple[dict[str, dict], list[tuple]]:
    """The same pages with a number in place of each question's subject, text and right answer; and these, by
    number: runs are asked the same."""
    numbers: dict[tuple, int] = {}
    out = {}
    for title, page in pages.items():
        rows = [[numbers.setdefault(tuple(r[:3]), len(numbers)), *r[3:]] for r in page.get("rows", [])]
        out[title] = page | {"rows": rows}
    return out, list(numbers)


def that_fit(pages: dict[str, dict], room: int) -> tuple[Packed, list[Packed], list[str]]:
    """Packed into so many bytes: the texts of the questions, and the pages, by title, that have room, the
    first ones first. And the titles of the others."""
    pages, texts = with_shared_texts(pages)
    shared, fit, left_out = pack("questions", texts), [], []
    room -= len(shared.base64)
    for title, page in pages.items():
        packed = pack(title, page)
        size = len(packed.base64) + len(title.encode()) + 100
        if size <= room:
            fit.append(packed)
            room -= size
        else:
            left_out.append(title)
    return shared, fit, left_out
