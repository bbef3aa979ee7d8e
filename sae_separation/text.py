"""The text that a user brings: read, judged, split into a part to train on and one held out.

    documents, records, notes = read_text("forget_text", ("bio/*.jsonl",), n_characters=10**8)
    text = split_text(documents)                               # text.train, text.held_out

A source of text or questions is a file, a folder, a glob, or a data set of the hub,
owner/name[:config][@split]; #column at its end names the column that holds the text. Local files of text are
.txt and .md (blank lines part documents), .jsonl (.ndjson), .csv, .tsv and .parquet, all but the last also as
.gz and .zst, in small letters or capitals. Folders are read with what links in them lead to. What exists here
is taken from here.
"""

import codecs
import contextlib
import csv
import glob
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sae_separation.errors import RunFailed, WrongRequest

if TYPE_CHECKING:
    import datasets

HELD_OUT = 0.1  # of a text's characters


LONG = 0.05  # of a text's characters; a longer document is cut before a part is held out


SHORT = 1000  # characters; a document that is no longer is never cut


MOST_BAD = 0.01  # of the records of a text; more is refused


MOST_CHARACTERS = 10**9  # read of a text's local files


MOST_DOCUMENT = 10**8  # characters of a document in them, or of the line that holds it


LONGEST = 60  # characters of the user's own text in a message


SUFFIXES = re.compile(r"\.(txt|md|jsonl|ndjson|csv|tsv|json|parquet(?!\.))(\.gz|\.zst)?$", re.IGNORECASE)


QUESTION_KINDS = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet")


ABOUT_A_FOLDER = re.compile(r"(readme|licen[cs]e)(?![a-z_]).*\.(txt|md)(\.gz|\.zst)?", re.IGNORECASE)


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


HUB_SOURCE = re.compile(
    rf"(?P<repo>{HUB_NAME.pattern})(?::(?P<config>[^@#]+))?(?:@(?P<split>[^#]+))?(?:#(?P<column>.+))?"
)


def cache_folder() -> Path:
    """Where this program keeps what is slow to make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orthogonal-sae"


@dataclass(frozen=True)
class Source:
    """One source of text or questions: local `files`, or a hub data set; `notes` on what was left out."""

    said: str
    files: tuple[Path, ...] = ()
    repo: str = ""
    config: str | None = None
    split: str = "train"
    column: str = "text"
    subject: str = ""
    notes: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        return not self.repo


def parse_source(option: str, said: str, start: str = "") -> Source:
    """A source; its relative paths begin at the folder `start`. Raises WrongRequest, naming the option, for
    what is no source or holds no readable file."""
    subject, name = "", said
    if option == "questions" and "=" in said and not is_here(said, start):
        subject, name = said.split("=", 1)
    path, column = name, "text"
    if "#" in name and not is_here(name, start):
        path, column = name.rsplit("#", 1)
    expanded = os.path.join(start, os.path.expanduser(path))
    hub = HUB_SOURCE.fullmatch(name)
    if (
        os.path.exists(expanded)
        or glob.has_magic(path)
        or path.startswith((".", "/", "~"))
        or SUFFIXES.search(path)
        or not hub
    ):
        files, notes = _files(option, os.path.join(start, path), expanded)
        return Source(said, files, column=column or "text", subject=subject, notes=notes)
    return Source(
        said, (), hub["repo"], hub["config"], hub["split"] or "train", hub["column"] or "text", subject
    )


def is_here(path: str, start: str = "") -> bool:
    """Whether a file or folder has this name, or the glob finds any."""
    expanded = os.path.join(start, os.path.expanduser(path))
    return os.path.exists(expanded) or next(glob.iglob(expanded, recursive=True), None) is not None


def _files(option: str, path: str, expanded: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of a local source, each once, and notes on what of a folder was left out."""
    kinds = QUESTION_KINDS if option == "questions" else tuple(READERS)
    known = f".{', .'.join(kinds[:-1])} or .{kinds[-1]}"
    folder = os.path.isdir(expanded)
    if os.path.isfile(expanded):
        if kind_of(Path(expanded)) not in kinds:
            raise WrongRequest(
                f"--{option} {path}: files of this kind are not read; give {known} (also as .gz or .zst)"
            )
        return (Path(expanded),), ()
    inside = _candidates(option, path, expanded)
    files, left_out = {}, []
    with reading(option, path):
        for file in sorted(inside):
            if file.name.startswith(".") or kind_of(file) not in kinds or file.is_dir():
                continue
            if not file.exists():
                target = os.readlink(file)
                raise WrongRequest(f"--{option} {file} is a link to {target}, which is not there: mend it")
            if folder and ABOUT_A_FOLDER.fullmatch(file.name):
                left_out.append(str(file.relative_to(expanded)))
            elif file.is_file():
                files.setdefault(os.path.realpath(file), file)
    note = f"{', '.join(left_out)[:LONGEST]} left out (READMEs and LICENSEs of a folder; a glob reads them)"
    if not files:
        raise WrongRequest(f"--{option} {path} holds no {known} file{f'; {note}' if left_out else ''}")
    return tuple(files.values()), (f"--{option} {path}: {note}",) if left_out else ()


def _candidates(option: str, path: str, expanded: str) -> Iterator[Path]:
    """Every file that a folder holds or a glob finds. Raises WrongRequest for a path that is neither."""
    if os.path.isdir(expanded):
        return (Path(here) / name for here in _walk(expanded) for name in os.listdir(here))
    if glob.has_magic(expanded):
        return map(Path, _glob(expanded))
    if os.path.exists(expanded):
        raise WrongRequest(f"--{option} {path} is no file (a pipe or a device): write it to a file first")
    if os.path.islink(expanded):
        target = os.readlink(expanded)
        raise WrongRequest(f"--{option} {path} is a link to {target}, which is not there: mend it")
    raise WrongRequest(
        f"--{option} {path} does not exist here and is no hub data set (owner/name:config@split): give a"
        " file, a folder, a glob or a data set"
    )


def kind_of(file: Path) -> str:
    """What a file is by its name, in small letters, without .gz and .zst; "" for what is never read."""
    found = SUFFIXES.search(file.name)
    return found[1].lower() if found else ""


def _walk(folder: str) -> Iterator[str]:
    """A folder and those in it, linked ones too, each once, hidden ones not. Raises OSError for shut ones."""

    def refuse(error: OSError):
        raise error

    seen = set()
    for here, inside, _ in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        inside[:] = [] if real in seen else sorted(name for name in inside if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield here


def _glob(pattern: str) -> Iterator[str]:
    """As glob.glob, but ** enters linked folders once, however they loop."""
    top, *below = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if not below:
        yield from glob.glob(pattern)
        return
    for start in glob.glob(top) if top else ["."]:
        for folder in _walk(start):
            yield from _glob(os.path.join(glob.escape(folder), below[0] or "*"))


@contextlib.contextmanager
def reading(option: str, path: Path | str):
    """Inside, what keeps a file from being read becomes a WrongRequest that names it."""
    try:
        yield
    except MemoryError as error:
        why = "memory ran out"
        raise WrongRequest(f"--{option} {path} cannot be read ({why}): give a smaller part of it") from error
    except Exception as error:  # pyarrow, zstandard, csv, gzip and codecs have errors of their own
        libraries = ("pyarrow", "zstd", "zstandard", "zlib", "_csv")
        known = isinstance(error, OSError | ValueError | EOFError | RecursionError)
        if not known and type(error).__module__.split(".")[0] not in libraries:
            raise
        why = one_line(error)
        if isinstance(error, UnicodeDecodeError):
            marked = error.start == 0 and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            what = " but UTF-16" if marked else " but binary or UTF-16" if b"\0" in error.object else ""
            why = f"it is not UTF-8 text{what}"
        raise WrongRequest(f"--{option} {path} cannot be read ({why}): mend it or leave it out") from error


def one_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, with its kind."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:most]}" if text else type(error).__name__


@dataclass(frozen=True)
class Text:
    """Documents of one domain; the two parts share no document. Both are datasets.Dataset with a column
    `text`."""

    train: "datasets.Dataset"
    held_out: "datasets.Dataset"


class Tally:
    """Counts the records of one source that cannot be read, and refuses them when they are more than
    MOST_BAD."""

    def __init__(self, option: str, source: Source):
        self.option, self.source = option, source
        self.records = self.empty = self.bad = 0
        self.first = ""  # record that is left out, and why
        self.place = ""  # of the last record
        self.cut = ""  # place of the first that is not read, after MOST_CHARACTERS

    def add(self, text, place: str, column: str = "", why: str = "") -> str | None:
        """The document's text without white space around it, so that one document is the same in every kind
        of file; None for one that is left out, be it for the reason `why`."""
        self.records += 1
        self.place = place
        if not why and text is not None and not isinstance(text, str):
            why = f"column {column} holds {type(text).__name__}, not text"
        if not why and text and re.search("[\ud800-\udfff]", text):
            why = "half a surrogate pair, which no tokenizer takes"
        if why:
            self.bad += 1
            self.first = self.first or f"{place}: {why}"
            return None
        if text is None or not text.strip():
            self.empty += 1
            return None
        return text.strip()

    def judge(self):
        if self.bad > MOST_BAD * self.records:
            raise WrongRequest(
                f"--{self.option} {self.source.said}: {self.bad} of {self.records} records cannot be read,"
                f" first {self.first}; more than {MOST_BAD:.0%} is refused: mend them, or name the column"
                " with #column"
            )

    @property
    def notes(self) -> list[str]:
        name = f"--{self.option} {self.source.said}"
        bad = f"{name}: {self.bad} of {self.records} records were left out, first {self.first}"
        cut = (
            f"{name}: not read from {self.cut} on, for {MOST_CHARACTERS:,} characters are the most of a text"
        )
        return [*self.source.notes, *([bad] if self.bad else []), *([cut] if self.cut else [])]


class ZstFile(io.RawIOBase):
    """A .zst file unpacked, frame after frame. Raises EOFError where one is cut off, as gzip does."""

    def __init__(self, path: Path):
        self.file, self.frame, self.packed, self.unpacked = path.open("rb"), None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self):
        self.file.close()
        super().close()

    def readinto(self, buffer) -> int:
        import zstandard

        while not self.unpacked:
            packed = self.packed or self.file.read(1024)  # few: they can unpack to 30 MB
            if not packed and self.frame:
                raise EOFError("the file ends before its last frame does: it is cut off")
            if not packed:
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self.unpacked = memoryview(self.frame.decompress(packed))
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.unpacked))
        buffer[:n], self.unpacked = self.unpacked[:n], self.unpacked[n:]
        return n


def _open(path: Path) -> io.TextIOBase:
    """A text file, unpacked and without its byte-order mark."""
    packing = path.suffix.lower()
    if packing == ".gz":
        import gzip

        return gzip.open(path, "rt", encoding="utf-8-sig")
    if packing == ".zst":
        return io.TextIOWrapper(io.BufferedReader(ZstFile(path)), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


ZEROS = "zero bytes: it is binary, or UTF-16"


def _blocks(file: io.TextIOBase) -> Iterator[tuple[int, str]]:
    """Runs of lines that are not blank, cut where they reach MOST_DOCUMENT, and the line each starts in."""
    block, size, start, number = [], 0, 1, 1
    while line := file.readline(MOST_DOCUMENT):
        blank = not line.strip()
        if not blank:
            start = start if block else number
            block.append(line)
            size += len(line)
        if block and (blank or size >= MOST_DOCUMENT):
            yield start, "".join(block)
            block, size = [], 0
        number += line.endswith("\n")
    if block:
        yield start, "".join(block)


def _lines(file: io.TextIOBase) -> Iterator[tuple[int, str | None]]:
    """Lines that are not blank and their numbers; None for one longer than MOST_DOCUMENT."""
    number = 0
    while line := file.readline(MOST_DOCUMENT + 1):
        number += 1
        whole = len(line) <= MOST_DOCUMENT or line.endswith("\n")
        while line and not line.endswith("\n") and not whole:
            line = file.readline(MOST_DOCUMENT)
        if not whole or line.strip():
            yield number, line if whole else None


def _from_lines(path: Path, column: str, tally: Tally) -> Iterator[str | None]:
    with _open(path) as file:
        for number, line in _lines(file):
            text, why = _field(line, column)
            yield tally.add(text, f"{path} line {number}", column, why)


def _field(line: str | None, column: str) -> tuple[object, str]:
    """What a line of JSON holds in a column, else why it holds nothing; None is a line that is too long."""
    if line is None:
        return None, f"longer than {MOST_DOCUMENT:,} characters"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, ZEROS if "\0" in line else "no JSON"
    if isinstance(record, dict) and column in record:
        return record[column], ""
    if isinstance(record, list):
        return None, "a list, not one record: write one record a line"
    is_table = isinstance(record, dict)
    has = f"columns {', '.join(record)}"[:LONGEST] if is_table else type(record).__name__
    return None, f"no column {column} but {has}"


def _from_table(path: Path, column: str, tally: Tally) -> Iterator[str | None]:
    """A quotation mark that does not fit is refused, for it can hide any number of rows."""
    csv.field_size_limit(MOST_DOCUMENT)
    with _open(path) as file:
        lines = iter(partial(file.readline, MOST_DOCUMENT + 1), "")
        rows = csv.reader(lines, delimiter="\t" if kind_of(path) == "tsv" else ",", strict=True)
        start = 1
        try:
            header = next(rows, [])
            if any("\0" in name for name in header):
                raise ValueError(ZEROS)
            if header and column not in header:
                refuse_column(path, column, header, tally)
            start = rows.line_num + 1
            for row in rows:
                place, start = f"{path} line {start}", rows.line_num + 1
                if len(row) == len(header):
                    text = row[header.index(column)]
                    yield tally.add(text, place, why=ZEROS if "\0" in text else "")
                elif row:
                    yield tally.add(None, place, why=f"{len(row)} fields, and the header has {len(header)}")
        except csv.Error as error:
            raise ValueError(f"the row that begins in line {start}: {error}") from error


def _from_parquet(path: Path, column: str, tally: Tally) -> Iterator[str | None]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        refuse_column(path, column, file.schema_arrow.names, tally)
    batches = file.iter_batches(batch_size=1000, columns=[column])
    for number, text in enumerate((text for batch in batches for text in batch.column(0).to_pylist()), 1):
        yield tally.add(text, f"{path} row {number}", column)


def refuse_column(path: Path, column: str, columns: list[str], tally: Tally):
    has = ", ".join(columns)
    if len(columns) == 1 and ";" in has:
        raise WrongRequest(f"--{tally.option} {path} is separated by ;, not by a comma: save it with commas")
    raise WrongRequest(f"--{tally.option} {path} has no column {column} but {has}: name one with #column")


def _from_blocks(path: Path, column: str, tally: Tally) -> Iterator[str | None]:
    with _open(path) as file:
        for number, text in _blocks(file):
            yield tally.add(text, f"{path} line {number}", why=ZEROS if "\0" in text else "")


READERS = {
    "txt": _from_blocks,
    "md": _from_blocks,
    "jsonl": _from_lines,
    "ndjson": _from_lines,
    "csv": _from_table,
    "tsv": _from_table,
    "parquet": _from_parquet,
}


def read_files(tally: Tally) -> Iterator[str]:
    """Documents of a source's files. Raises WrongRequest for a file that cannot be read."""
    for path in tally.source.files:
        with reading(tally.option, path):
            for document in READERS[kind_of(path)](path, tally.source.column, tally):
                if document is not None:
                    yield document


@cache
def read_local(option: str, said: str, most: int, start: str = "") -> tuple[tuple[str, ...], Tally]:
    """Documents of a local source until they hold `most` characters, and what was left out.

    Raises WrongRequest for a file that cannot be read, and by the tally's rule.
    """
    tally = Tally(option, parse_source(option, said, start))
    documents, total = [], 0
    with reading(option, said):
        for document in read_files(tally):
            if total >= most:
                tally.cut = tally.place
                break
            documents.append(document)
            total += len(document)
        tally.judge()
        return tuple(documents), tally


def read_text(
    option: str, said: tuple[str, ...], n_characters: int = 16_000_000, start: str = ""
) -> tuple[list[str], list[dict], list[str]]:
    """Documents, a record of each source for config.json, and notes on what was left out.

    Local files are read whole, up to MOST_CHARACTERS in all. Of hub data sets, which share `n_characters`
    equally, only as much is streamed, once, into the cache; from there it is read the next time, also
    offline. Raises WrongRequest for text that cannot be used, RunFailed for what the hub does.
    """
    sources, documents, records, notes = [parse_source(option, s, start) for s in said], [], [], []
    left = MOST_CHARACTERS
    for source in sources:
        if source.local:
            found, tally = read_local(option, source.said, left, start)
            left -= sum(map(len, found))
            revision = {}
        else:
            found, tally, revision = read_hub_text(
                option, source, 2 ** math.ceil(math.log2(n_characters / sum(not s.local for s in sources)))
            )
        documents += found
        notes += tally.notes
        digest = hashlib.blake2b(digest_size=16)
        for document in found:
            digest.update(document.encode() + b"\0")
        records.append(
            {
                "source": source.said,
                **revision,
                "documents": len(found),
                "characters": sum(map(len, found)),
                "blake2b": digest.hexdigest(),
                "empty": tally.empty,
                "left_out": tally.bad,
                "first_left_out": tally.first or None,
                "not_read_from": tally.cut or None,
            }
        )
    if not documents:
        raise WrongRequest(
            f"--{option} {' '.join(said)} holds no text ({sum(r['empty'] for r in records)} empty documents):"
            " give another"
        )
    whole, n_cut = cut_long(documents)
    if len(whole) < 2:
        raise WrongRequest(
            f"--{option} {' '.join(said)} holds one document: one part is trained on and another held out, so"
            " give at least two (in .txt, blank lines part documents)"
        )
    if n_cut:
        long = f"{n_cut} of {len(set(documents))} documents hold over {LONG:.0%} of the text each"
        notes.append(f"--{option} {' '.join(said)}: {long}: cut in pieces, so that a tenth can be held out")
    return documents, records, notes


def pieces(document: str, most: int) -> Iterator[str]:
    """A document in pieces of at most `most` characters, cut where paragraphs end, or lines, sentences,
    words."""
    start = 0
    while len(document) - start > most:
        for end in ("\n\n", "\n", ". ", "? ", "! ", "。", " ", ""):
            at = document.rfind(end, start + most // 2, start + most)
            if at >= 0:
                break
        yield document[start : at + len(end)]
        start = at + len(end)
    yield document[start:]


def cut_long(documents: Iterable[str]) -> tuple[set[str], int]:
    """The documents without repetitions, those that hold over LONG of the text in pieces of a fifth of that;
    and how many those are. So HELD_OUT can be had with less than LONG too much, whatever the documents'
    lengths."""
    whole, n_cut = set(documents), 0
    while True:
        most = max(int(LONG * sum(map(len, whole))), SHORT)
        long = {d for d in whole if len(d) > most}
        if not long:
            return whole, n_cut
        n_cut = n_cut or len(long)  # once more where pieces were alike, so that less is left of the text
        whole = (whole - long) | {p for d in long for p in pieces(d, most // 5) if p.strip()}


def split_text(documents: list[str]) -> Text:
    """The documents as cut_long has them, a HELD_OUT share of their characters held out; which ones depends
    on each document alone and on the total, not on their order."""
    import datasets

    whole, _ = cut_long(documents)
    unique = sorted(whole, key=lambda d: hashlib.blake2b(d.encode(), digest_size=16).digest())
    most, held, at = HELD_OUT * sum(map(len, unique)), 0, 0
    while at < len(unique) - 1 and held < most:
        held += len(unique[at])
        at += 1
    train, held_out = (datasets.Dataset.from_dict({"text": some}) for some in (unique[at:], unique[:at]))
    return Text(train, held_out)


def check_overlap(forget: list[str], retain: list[str]) -> list[str]:
    """Notes on documents that are in both texts. Raises WrongRequest when one text holds all of the other."""
    both = set(forget) & set(retain)
    if len(both) in (len(set(forget)), len(set(retain))):
        raise WrongRequest("--forget_text and --retain_text hold the same documents: give different text")
    return [f"{len(both)} documents are in both --forget_text and --retain_text"] if both else []


def check_amount(option: str, text: Text, tokenizer, least: int):
    """Raises WrongRequest for text of fewer than `least` tokens, what one batch or one context takes."""
    total, few = 0, (piece for row in text.train for piece in pieces(dict(row)["text"], 10_000))
    while batch := list(islice(few, 16)):  # a tokenizer takes a hundred times the text's memory
        total += sum(map(len, tokenizer(batch, add_special_tokens=False)["input_ids"]))
        if total >= least:
            return
    raise WrongRequest(
        f"--{option} holds {total:,} tokens to train on ({len(text.train)} documents; {len(text.held_out)}"
        f" are held out), fewer than the {least:,} of one batch or context: give more text, or a smaller"
        " --batch_size"
    )


def read_hub(
    source: Source, n_characters: float, keep: tuple[str, ...] | None, option: str
) -> tuple[list[dict], dict]:
    """The first rows of a hub data set at a pinned revision, with the columns `keep` (None: all), as many as
    hold `n_characters` in their strings; and its revision. Streamed once into the cache.

    Raises WrongRequest for a data set, config, split or column that is not there or not open, RunFailed for
    what the hub does.
    """
    from sae_separation import hub

    root = cache_folder() / "hub" / source.repo.replace("/", "--")
    asked = json.dumps([source.config, source.split, keep, n_characters])
    file = f"{hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()}.jsonl.zst"
    try:
        revision = hub.revision(source.repo, "dataset")
    except RunFailed:
        kept = max(root.glob(f"*/{file}"), key=lambda p: p.stat().st_mtime, default=None)
        if kept is None:  # it was not read before
            raise
        revision = kept.parent.name
    path = root / revision / file
    if not path.exists():
        print(f"reading {source.said} from the hub", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            import zstandard

            with zstandard.open(Path(beside) / file, "wt", encoding="utf-8") as out:
                for row in _stream(source, revision, n_characters, keep, option):
                    out.write(json.dumps(row) + "\n")
            os.replace(Path(beside) / file, path)
    with _open(path) as lines:
        return [json.loads(line) for line in lines], {"revision": revision}


def _stream(
    source: Source, revision: str, n_characters: float, keep: tuple[str, ...] | None, option: str
) -> Iterator[dict]:
    import datasets

    from sae_separation import hub

    total = 0
    with hub.plain_errors(source.repo):
        try:
            rows = datasets.load_dataset(
                source.repo, source.config, split=source.split, revision=revision, streaming=True
            )
        except ValueError as error:  # an unknown config or split, which the message lists; or a script
            raise WrongRequest(
                f"--{option} {source.said}: {one_line(error, 400)}; give owner/name:config@split"
            ) from error
        for row in rows:
            missing = [c for c in keep or () if c not in row]
            if missing:
                raise WrongRequest(
                    f"--{option} {source.said} has no column {missing[0]} but {', '.join(row)}: name one with"
                    " #column"
                )
            row = {k: v for k, v in dict(row).items() if keep is None or k in keep}
            yield row
            total += sum(len(v) for v in row.values() if isinstance(v, str))
            if total >= n_characters:
                return


def read_hub_text(option: str, source: Source, n_characters: int) -> tuple[list[str], Tally, dict]:
    rows, revision = read_hub(source, n_characters, (source.column,), option)
    tally = Tally(option, source)
    found = [tally.add(row[source.column], f"row {i}", source.column) for i, row in enumerate(rows, 1)]
    tally.judge()
    return [d for d in found if d is not None], tally, revision
