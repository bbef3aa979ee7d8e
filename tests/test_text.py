"""A user's text in every form that people have: read whole or refused with the true reason, never cut in
silence."""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import tracemalloc

import pytest
import tiny
import zstandard

import experiment
import sae_separation.text
from sae_separation.errors import WrongRequest
from sae_separation.questions import read_questions
from sae_separation.text import (
    READERS,
    check_amount,
    check_overlap,
    parse_source,
    pieces,
    read_local,
    read_text,
    split_text,
)

DOCUMENTS = ["one two\nthree", "fünf", 'seven, "eight"']


def read(*said):
    return read_text("forget_text", tuple(map(str, said)))


def lines(documents):
    return "".join(json.dumps({"text": d}) + "\n" for d in documents)


def table(rows, delimiter=","):
    made = io.StringIO()
    csv.writer(made, delimiter=delimiter).writerows(rows)
    return made.getvalue()


FORMS = {
    "txt": "\n\n".join(DOCUMENTS),
    "md": "\n\n".join(DOCUMENTS),
    "jsonl": lines(DOCUMENTS),
    "ndjson": lines(DOCUMENTS),
    "csv": table([["n", "text"], *enumerate(DOCUMENTS)]),
    "tsv": table([["text", "n"], *((d, n) for n, d in enumerate(DOCUMENTS))], "\t"),
}
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


# ---- every kind of file


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte-order mark"])
@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_text_gives_the_same_documents(tmp_path, form, packing, mark):
    for name in (f"a.{form}{packing}", f"B.{form}{packing}".upper()):
        (tmp_path / name).write_bytes(PACKED[packing]((mark + FORMS[form]).encode()))
        found, record, notes = read(tmp_path / name)
        assert [d.strip() for d in found] == [d.strip() for d in DOCUMENTS] and not notes
        assert record[0]["documents"] == 3 and record[0]["not_read_from"] is None


def test_the_kinds_that_are_read_are_those_that_help_and_refusals_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        experiment.parse_command(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(WrongRequest) as refused:
        read(tmp_path / "a.docx")
    with pytest.raises(WrongRequest) as nothing:
        read(tmp_path)
    for kind in READERS:
        assert f".{kind}" in told[told.index("--forget_text") : told.index("--retain_text")]
        assert (
            f".{kind}" in str(refused.value)
            and f".{kind}" in str(nothing.value)
            and f".{kind}" in str(sae_separation.text.__doc__)
        )


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz"])
def test_utf_16_is_refused_as_utf_16(tmp_path, name):
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):  # the first with a mark
        text = FORMS[name.split(".")[1]].encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        read_local.cache_clear()
        with pytest.raises(WrongRequest, match=f"{name}.*UTF-16"):
            read(tmp_path / name)


def test_a_table_is_read_by_its_header_and_rows_that_do_not_fit_it_are_counted(tmp_path):
    rows = [["id", "body"], *([i, f"row {i},\n{'x' * 200_000 if i == 5 else ''}"] for i in range(150))]
    (tmp_path / "a.csv").write_text(table(rows) + "7,a comma, too many\n\n")
    found, record, notes = read(f"{tmp_path / 'a.csv'}#body")
    assert found == [r[1].strip() for r in rows[1:]] and record[0]["left_out"] == 1
    assert "1 of 151 records" in notes[0] and "a.csv line 302: 3 fields, and the header has 2" in notes[0]
    with pytest.raises(WrongRequest, match="a.csv has no column text but id, body: name one with #column"):
        read(tmp_path / "a.csv")
    for cut in ('id,body\n1,"no end\n2,more\n', 'id,body\n1,"two" words\n'):
        (tmp_path / "b.csv").write_text(cut)
        read_local.cache_clear()
        with pytest.raises(
            WrongRequest, match="b.csv cannot be read .ValueError: the row that begins in line"
        ):
            read(f"{tmp_path / 'b.csv'}#body")


def test_tilde_and_globs_lead_to_every_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for form, text in FORMS.items():
        (tmp_path / f"a.{form}").write_text(text)
    assert len(read("~")[0]) == 18 and len(read("~/*.[mc]*")[0]) == 6 and len(read("~/**/a.t*")[0]) == 6
    assert len(read("~/a.md")[0]) == len(read("~/a.tsv#n")[0]) == 3


# ---- .zst


def test_a_cut_off_zst_is_refused_by_name_and_whole_frames_are_read(tmp_path):
    documents = tiny.documents(60, 0)
    first, second = (zstandard.compress(lines(d).encode()) for d in (documents[:40], documents[40:]))
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skipped + first + zstandard.compress(b"") + second)
    assert read(path)[0] == documents
    for size in (3, len(first) // 2, len(first) - 1, len(first) + 2, len(first) + len(second) - 4):
        path.write_bytes((first + second)[:size])
        read_local.cache_clear()
        with pytest.raises(WrongRequest, match="a.jsonl.zst cannot be read .*cut off"):
            read(path)


def test_a_cut_off_zst_of_questions_is_refused_and_one_with_a_mark_is_read(tmp_path):
    asked = "\ufeff" + "".join(json.dumps(q) + "\n" for q in tiny.questions("biology", 40))
    whole = zstandard.compress(asked.encode())
    (tmp_path / "q.jsonl.zst").write_bytes(whole)
    assert len(read_questions((str(tmp_path / "q.jsonl.zst"),))[0]["biology"]) == 40
    (tmp_path / "cut.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.jsonl.zst").write_bytes(b"no frame")
    for name, why in (("cut", "cut off"), ("none", "ZstdError")):
        with pytest.raises(WrongRequest, match=f"{name}.jsonl.zst cannot be read .*{why}"):
            read_questions((str(tmp_path / f"{name}.jsonl.zst"),))


@pytest.mark.parametrize("window", [27, 28, 30, 31])
def test_a_zst_with_a_long_window_is_read(tmp_path, window):
    text = b"one\n\ntwo\n"
    frame = (
        b"\x28\xb5\x2f\xfd\x00"
        + bytes([window - 10 << 3])
        + (len(text) << 3 | 1).to_bytes(3, "little")
        + text
    )
    (tmp_path / "a.txt.zst").write_bytes(frame)  # one raw block
    assert read(tmp_path / "a.txt.zst")[0] == ["one", "two"]


# ---- folders


def test_linked_folders_are_read_and_what_is_reached_twice_counts_once(tmp_path):
    data, far = tmp_path / "data", tmp_path / "far"
    (data / "deep").mkdir(parents=True)
    (far / "er").mkdir(parents=True)
    for n, folder in enumerate((data, data / "deep", far, far / "er")):
        tiny.save_jsonl(folder / "a.jsonl", [f"document {n} {i}" for i in range(10)])
    plain = read(data)
    assert len(plain[0]) == 20
    (data / "more").symlink_to("../far")
    (data / "loop").symlink_to(".")
    (far / "back").symlink_to(data)
    (far / "er" / "up").symlink_to("..")
    (data / "same.jsonl").symlink_to("a.jsonl")
    read_local.cache_clear()
    for said in (data, f"{data}/", f"{data}/**/*.jsonl", f"{data}/**", f"{tmp_path}/**/a.jsonl"):
        found, record, notes = read(said)
        assert len(found) == len(set(found)) == record[0]["documents"] == 40 and not notes, said
    assert len(read(f"{data}/*.jsonl")[0]) == 10 and len(read(f"{data}/**/er/*")[0]) == 10


def test_links_to_nothing_are_named(tmp_path):
    tiny.save_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    for said in (tmp_path, tmp_path / "gone.jsonl", f"{tmp_path}/*.jsonl"):
        with pytest.raises(WrongRequest, match="gone.jsonl is a link to nowhere.jsonl, which is not there"):
            read(said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
def test_a_folder_that_is_shut_is_named(tmp_path):
    tiny.save_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    (tmp_path / "shut").mkdir(mode=0)
    with pytest.raises(WrongRequest, match="PermissionError.*shut"):
        read(tmp_path)


def test_the_readme_of_a_folder_is_no_text_of_it_unless_it_is_asked_for(tmp_path):
    (tmp_path / "a.md").write_text("one\n\ntwo")
    (tmp_path / "license_plates.txt").write_text("three\n\nfour")
    for name in ("README.md", "ReadMe-fr.txt.gz", "LICENSE.txt", "LICENCE-MIT.md"):
        (tmp_path / name).write_bytes(
            gzip.compress(b"about\n\nit") if name.endswith("gz") else b"about\n\nit"
        )
    (tmp_path / "LICENSE").write_text("about it")
    found, _, notes = read(tmp_path)
    assert [d.strip() for d in found] == ["one", "two", "three", "four"]
    assert len(notes) == 1 and "LICENCE-MIT.md, LICENSE.txt, README.md, ReadMe-fr.txt.gz left out" in notes[0]
    assert len(read(f"{tmp_path}/*.md")[0]) == 6 and len(read(tmp_path / "README.md")[0]) == 2
    (tmp_path / "a.md").unlink()
    (tmp_path / "license_plates.txt").unlink()
    with pytest.raises(WrongRequest, match="holds no .txt, .md.*README.md.* left out"):
        read(tmp_path)


# ---- long text


def ordinary_split(texts):
    """Which documents are held out where none is long."""
    unique = sorted(set(texts), key=lambda d: hashlib.blake2b(d.encode(), digest_size=16).digest())
    held = []
    while sum(map(len, held)) < 0.1 * sum(map(len, unique)):
        held.append(unique[len(held)])
    return set(held)


def shares(text):
    train, held_out = text.train["text"], text.held_out["text"]
    assert not set(train) & set(held_out) and len(set(train + held_out)) == len(train) + len(held_out)
    return train, held_out, sum(map(len, held_out)) / sum(map(len, train + held_out))


@pytest.mark.parametrize("n", [25, 60, 300])
def test_ordinary_text_is_split_by_whole_documents_and_has_the_digest_of_its_documents(tmp_path, n):
    documents = tiny.documents(n, 0)
    found, record, notes = read(tiny.save_jsonl(tmp_path / "a.jsonl", documents))
    digest = hashlib.blake2b("".join(d + "\0" for d in documents).encode(), digest_size=16).hexdigest()
    assert found == documents and record[0]["blake2b"] == digest and not notes
    assert set(split_text(found).held_out["text"]) == ordinary_split(documents)


PARAGRAPHS = "\n\n".join(f"{d}. And so on." for d in tiny.documents(400, 7))
LENGTHS = {
    "one book and many notes": [PARAGRAPHS, *tiny.documents(30, 1)],
    "one book": [PARAGRAPHS],
    "two books": [PARAGRAPHS[:60_000], PARAGRAPHS[60_000:]],
    "ten books": [PARAGRAPHS[i * 13_000 : (i + 1) * 13_000] for i in range(10)],
    "a book in one line": [" ".join(PARAGRAPHS.split()), "a note"],
    "a book without spaces": ["".join(PARAGRAPHS.split()), "a note"],
    "the same again and again": ["word " * 30_000, *tiny.documents(40, 2)],
    "longer and longer": [PARAGRAPHS[i * i * 60 : (i + 1) * (i + 1) * 60] for i in range(45)],
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_a_tenth_is_held_out_whatever_the_documents_lengths(kind):
    documents = LENGTHS[kind]
    train, held_out, share = shares(split_text(documents))
    assert 0.1 <= share < 0.15
    assert split_text(documents[::-1]).held_out["text"] == held_out
    assert all(any(piece in d for d in documents) for piece in train + held_out)
    if "again" not in kind:
        assert sum(map(len, train + held_out)) == sum(map(len, documents)), "nothing is lost"


def test_pieces_end_where_paragraphs_lines_sentences_or_words_do():
    for text, end in (
        (PARAGRAPHS, "\n\n"),
        (PARAGRAPHS.replace("\n\n", "\n"), "\n"),
        (PARAGRAPHS.replace("\n\n", " "), ". "),
        ("word " * 900, " "),
    ):
        made = list(pieces(text, 1500))
        assert "".join(made) == text and all(p.endswith(end) and 750 < len(p) <= 1500 for p in made[:-1])
    assert list(pieces("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5] and list(pieces("", 10)) == [""]


def test_a_document_that_is_cut_is_told_and_one_that_is_short_is_refused_alone(tmp_path):
    path = tiny.save_jsonl(tmp_path / "a.jsonl", LENGTHS["one book and many notes"])
    found, record, notes = read(path)
    assert found == LENGTHS["one book and many notes"] and record[0]["documents"] == 31
    assert len(notes) == 1 and "1 of 31 documents hold over 5% of the text each: cut in pieces" in notes[0]
    assert len(read(tiny.save_jsonl(tmp_path / "b.jsonl", [PARAGRAPHS]))[0]) == 1
    with pytest.raises(WrongRequest, match="holds one document"):
        read(tiny.save_jsonl(tmp_path / "c.jsonl", ["short " * 160]))


# ---- more than is read


def test_the_most_that_is_read_ends_with_a_note_and_after_the_tallys_judgement(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_separation.text.MOST_CHARACTERS", 1000)
    first = tiny.save_jsonl(tmp_path / "a.jsonl", [f"{i:010}" for i in range(99)])
    second = tiny.save_jsonl(tmp_path / "b.jsonl", [f"{i:010}" for i in range(200, 250)])
    assert not read(first)[2]
    found, record, notes = read(first, second)
    assert len(found) == 100 and record[1]["documents"] == 1 and record[0]["not_read_from"] is None
    assert record[1]["not_read_from"] == f"{second} line 2"
    assert (
        len(notes) == 1 and f"not read from {second} line 2 on, for 1,000 characters are the most" in notes[0]
    )
    exact = tiny.save_jsonl(tmp_path / "c.jsonl", [f"{i:010}" for i in range(100)])
    assert not read(exact)[2], "all of it was read"
    broken = tmp_path / "d.jsonl"
    broken.write_text("no JSON\n" * 3 + lines(f"{i:010}" for i in range(200)))
    with pytest.raises(WrongRequest, match="3 of 104 records cannot be read"):
        read(broken)


@contextlib.contextmanager
def memory_under(most):
    """Inside, Python takes less than `most` bytes at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_one_document_without_end_takes_little_memory(tmp_path, monkeypatch):
    """60 MB in 6 kB: as a line of JSON it is refused by name, as text it is read as far as text is read."""
    monkeypatch.setattr("sae_separation.text.MOST_CHARACTERS", 10**6)
    monkeypatch.setattr("sae_separation.text.MOST_DOCUMENT", 10**5)
    endless = b"many_words_" * 5_500_000
    json_line = b'{"text": "' + endless + b'"}\n' + lines(["a", "b"]).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(json_line))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(endless))
    (tmp_path / "c.csv.zst").write_bytes(zstandard.compress(b'text\n"' + endless + b'"\n'))
    del endless, json_line
    with memory_under(4 * 10**7):
        with pytest.raises(WrongRequest, match="1 of 3 records .* line 1: longer than 100,000 characters"):
            read(tmp_path / "a.jsonl.zst")
        found, record, notes = read(tmp_path / "b.txt.zst")
        assert len(found) == 10 and record[0]["characters"] == 10**6
        assert (
            record[0]["not_read_from"] == f"{tmp_path / 'b.txt.zst'} line 1" and "not read from" in notes[0]
        )
        with pytest.raises(WrongRequest, match="c.csv.zst cannot be read .*field larger than field limit"):
            read(tmp_path / "c.csv.zst")


def test_lines_up_to_the_most_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_separation.text.MOST_DOCUMENT", 100)
    documents = ["x" * (100 - len('{"text": ""}') - over) for over in (2, 1, 0)]
    (tmp_path / "a.jsonl").write_text(lines(documents).rstrip("\n"))
    assert read(tmp_path / "a.jsonl")[0] == documents
    (tmp_path / "b.txt").write_text("\n".join(["y" * 60] * 3) + "\n\nend\n")
    found, _, _ = read(tmp_path / "b.txt")
    assert [len(d) for d in found] == [121, 60, 3], "parted where it reached the most"


def test_memory_that_runs_out_while_reading_is_told_in_one_line(tmp_path, monkeypatch):
    def out_of_memory(*_):
        yield "first"
        raise MemoryError

    monkeypatch.setitem(READERS, "txt", out_of_memory)
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    with pytest.raises(
        WrongRequest, match="a.txt cannot be read .memory ran out.: give a smaller part of it"
    ):
        read(tmp_path / "a.txt")


# ---- how much of it there is


def test_text_is_tokenised_little_at_a_time_and_no_further_than_needed():
    seen = []

    def tokenizer(texts, **_):
        seen.append(sum(map(len, texts)))
        return {"input_ids": [t.split() for t in texts]}

    books = [" ".join(tiny.documents(400, seed)) for seed in range(5)]
    text = split_text(books)
    words = sum(len(t.split()) for t in text.train["text"])
    check_amount("forget_text", text, tokenizer, 2048)
    assert sum(seen) <= 160_000 and len(seen) == 1
    seen.clear()
    check_amount("forget_text", text, tokenizer, words)
    with pytest.raises(WrongRequest, match=f"holds {words:,} tokens"):
        check_amount("forget_text", text, tokenizer, words + 1)
    assert max(seen) <= 160_000


def test_one_document_is_the_same_in_every_kind_of_file(tmp_path):
    """A block of a .txt ends with its line, a column of .jsonl does not."""
    documents = tiny.documents(60, 1)
    (tmp_path / "a.txt").write_text("\n\n".join(documents) + "\n")
    tiny.save_jsonl(tmp_path / "a.jsonl", [f" {document}\n" for document in documents])
    read = [read_text("forget_text", (str(tmp_path / name),))[0] for name in ("a.txt", "a.jsonl")]
    assert read == [documents, documents]
    both = split_text(read[0] + read[1])
    assert len(both.train) + len(both.held_out) == 60
    assert not set(both.train["text"]) & set(both.held_out["text"])
    with pytest.raises(WrongRequest, match="hold the same documents"):
        check_overlap(*read)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("semi.csv", "id;text\n1;a\n", "is separated by ;, not by a comma"),
        ("quote.csv", 'text\na\nb\n"c\nd\n', "the row that begins in line 4"),
        ("list.jsonl", '[{"text": "a"}]\n', "a list, not one record: write one record a line"),
    ],
)
def test_the_remedy_for_a_common_slip_is_told(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(WrongRequest, match=said):
        read_text("forget_text", (str(tmp_path / name),), 1000)


def test_a_pipe_is_told_as_one(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(WrongRequest, match="is no file .a pipe or a device.: write it to a file first"):
        parse_source("forget_text", str(tmp_path / "pipe.txt"))
