"""Multiple-choice questions that a user brings, read in the forms that people have them in.

questions, records, notes = read_questions(("asked.jsonl",))   # questions["biology"]: list[Question]
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from sae_separation.errors import WrongRequest
from sae_separation.text import LONGEST, Source, _open, kind_of, one_line, parse_source, read_hub, reading

MOST_DOUBLE = 0.02  # of the questions of a file that may stand twice, or hold a choice twice; more is refused


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `choices[answer]` is right.

    What else a source may say of it: `entity`, whom it is about, and `relation`, what it asks of it;
    `rephrased`, a wording that no text holds; `values`, among them the right choice, and one or two
    `sentences` that it ends, the first worded as in the text, the second not.
    """

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int
    entity: str = ""
    relation: str = ""
    rephrased: str = ""
    sentences: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All that an LM can be asked with."""
        return self.question, self.rephrased, *self.choices, *self.sentences, *self.values


def common_form(record: dict) -> dict:
    """A record with question, choices (a list), labels (of the choices, or None), answer and subject under
    these names, as far as it has them, and all else that it holds. Capitals do not matter in names. Read are
    the forms of

    WMDP and MMLU: question, choices, answer; in tables question, A, B, C, D, answer
    ARC: question and choices {"text": [...], "label": [...]}, or question.stem and question.choices, a list
    of {text, label}; answerKey
    others: options for choices, as a list or by letter.
    """
    record = {str(name).strip().lower(): value for name, value in record.items()} | {"labels": None}
    if isinstance(record.get("question"), dict):
        record |= {"question": record["question"].get("stem"), "choices": record["question"].get("choices")}
    for name, other in (("choices", "options"), ("answer", "answerkey")):
        if name not in record and other in record:
            record[name] = record[other]
    if "choices" not in record and set("abcd") <= set(record):
        record["choices"] = [record[letter] for letter in "abcd"]
    choices = record.get("choices")
    if isinstance(choices, list) and choices and all(isinstance(c, dict) for c in choices):
        choices = {"text": [c.get("text") for c in choices], "label": [c.get("label") for c in choices]}
    if isinstance(choices, dict) and "text" in choices:
        record |= {"choices": choices["text"], "labels": choices.get("label")}
    elif isinstance(choices, dict):
        record |= {"choices": list(choices.values()), "labels": list(choices)}
    if isinstance(record["labels"], list | tuple):
        record["labels"] = [str(label).strip().upper() for label in record["labels"]]
    return record


def named_choice(answer, labels: list[str] | None) -> int | None:
    """The place of the choice that an answer names: by a label, where there are some, else a letter; or,
    where labels are no digits, by an index from 0, also as a text. None if it names none."""
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        return None
    said = str(answer).strip().upper()
    names = labels or ["A", "B", "C", "D"]
    if said in names:
        return names.index(said)
    return int(said) if said in ("0", "1", "2", "3") and not any(name.isdigit() for name in names) else None


def without_letters(choices: tuple[str, ...]) -> tuple[str, ...]:
    """The choices without their own letters ("A. ", "(B) ", "C: "), where all carry theirs."""
    found = [re.fullmatch(rf"\(?{letter}[).:]\s+(\S.*)", c, re.S) for letter, c in zip("ABCD", choices)]
    return tuple(match[1] for match in found if match) if all(found) else choices


FORM = (
    "a question is {question, choices: four texts, answer: 0 to 3, A to D, a label or a choice's text,"
    " subject}"
)
FURTHER = (
    "it may have {entity, relation, rephrased: each a text, values: texts with the right choice among them,"
    " sentences: one or two that a value ends}"
)


def _refuse(place: str, what: str, form: str = FORM) -> NoReturn:
    raise WrongRequest(f"{place}: {what}; {form}")


def _text(value, place: str, what: str, form: str = FORM) -> str:
    """A text without white space around it. Raises WrongRequest for what is none."""
    if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
        _refuse(place, f"{what} is not a text", form)
    return value.strip()


def _texts(value, place: str, name: str) -> tuple[str, ...]:
    """Raises WrongRequest for what is no list of texts."""
    if not isinstance(value, list | tuple):
        _refuse(place, f"its {name} are not a list of texts", FURTHER)
    return tuple(_text(one, place, f"one of its {name}", FURTHER) for one in value)


def further_forms(record: dict, right: str, place: str) -> dict[str, Any]:
    """In what other forms a question can be asked, as fields of Question; a field that is empty is not there.
    `right` is the right choice. Raises WrongRequest for what cannot be asked."""
    found: dict[str, Any] = {}
    for name in ("entity", "relation", "rephrased", "values", "sentences"):
        value = record.get(name)
        if value in (None, "", [], ()):
            continue
        is_list = name in ("values", "sentences")
        found[name] = _texts(value, place, name) if is_list else _text(value, place, f"its {name}", FURTHER)
    values, sentences = found.get("values", ()), found.get("sentences", ())
    if sentences and not values:
        _refuse(place, "it has sentences, and no values that could end them", FURTHER)
    if len(sentences) > 2:
        _refuse(place, f"it has {len(sentences)} sentences", FURTHER)
    if len(set(values)) < len(values):
        _refuse(place, f"two of its values are the same ({', '.join(values)[:LONGEST]})", FURTHER)
    if values and (right not in values or len(values) < 2):
        are = f"its values ({', '.join(values)[:LONGEST]})"
        _refuse(place, f"{are} are not the right choice {right[:LONGEST]!r} and others", FURTHER)
    return found


def to_question(record: dict, subject: str, place: str, in_words: bool) -> Question:
    """A question from its `common_form`, without white space around its texts; `in_words`: an answer is first
    looked for among the choices' own texts. Raises WrongRequest, with place and remedy, for what is not a
    question with four choices and an answer among them."""
    missing = [k for k in ("question", "choices", "answer") if k not in record]
    if missing:
        fields = ", ".join(k for k in record if k != "labels")
        _refuse(place, f"no field {missing[0]} but {fields[:LONGEST] or 'none'}")
    question, choices, labels, answer = (record[k] for k in ("question", "choices", "labels", "answer"))
    question = _text(question, place, "the question")
    if not isinstance(choices, list | tuple) or len(choices) != 4:
        _refuse(place, f"{len(choices) if isinstance(choices, list | tuple) else 'no'} choices instead of 4")
    choices = without_letters(tuple(_text(choice, place, "a choice") for choice in choices))
    if labels is not None and (not isinstance(labels, list) or len(labels) != 4 or len(set(labels)) < 4):
        _refuse(place, f"the labels of its choices are {str(labels)[:LONGEST]}, not four different ones")
    said = answer.strip() if in_words and isinstance(answer, str) else None
    right = choices.index(said) if choices.count(said) == 1 else named_choice(answer, labels)
    if right is None:
        known = "an index from 0 to 3 (counted from 1 only where choices have labels), a letter from A to D"
        known = f"a label ({', '.join(labels)})" if labels else known
        _refuse(place, f"the answer is {str(answer)[:LONGEST]!r}, not {known} or the text of one choice")
    subject = record.get("subject", subject)
    if not isinstance(subject, str) or not re.fullmatch(r"[\w() .,&'-]{1,80}", subject.strip()):
        _refuse(place, f"the subject is {str(subject)[:LONGEST]!r}, not a short name")
    more = further_forms(record, choices[right], place)
    return Question(subject.strip(), question, choices, right, **more)


def _csv_records(rows, file: str) -> Iterator[tuple[dict, str]]:
    """Rows of a csv.reader under the names of a header; where there is none they are MMLU's."""
    names = None
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if names is None:
                names = [cell.strip().lower() for cell in row]
                if "question" in names and {"answer", "answerkey"} & set(names):
                    continue
                names = ["question", "a", "b", "c", "d", "answer"]
            if len(row) != len(names):
                why = f"{len(row)} columns instead of {len(names)} ({', '.join(names)[:LONGEST]})"
                raise WrongRequest(f"{file} line {rows.line_num}: {why}; mend it")
            yield dict(zip(names, row)), f"{file} line {rows.line_num}"
    except csv.Error as error:
        raise WrongRequest(f"{file} line {rows.line_num}: no CSV ({error}): mend it") from error


def _question_records(path: Path, alone: bool) -> Iterator[tuple[object, str]]:
    """Records of a file of questions, and their places; none of a .json of other things, if not `alone`."""
    kind, file = kind_of(path), f"--questions {path}"
    if kind == "parquet":
        import pyarrow.parquet as pq

        yield from ((row, f"{file} row {i}") for i, row in enumerate(pq.read_table(path).to_pylist(), 1))
        return
    with _open(path) as lines:
        if kind in ("csv", "tsv"):
            rows = csv.reader(lines, delimiter="\t" if kind == "tsv" else ",", strict=True)
            yield from _csv_records(rows, file)
        elif kind == "json":
            records = json.load(lines)
            if isinstance(records, dict) and "questions" in records:
                records = records["questions"]
            elif isinstance(records, dict) and "question" not in records and not alone:
                records = []  # such as dataset_infos.json
            if not isinstance(records, list):
                what = f'{type(records).__name__}, not a list of questions or {{"questions": a list}}'
                raise WrongRequest(f"{file} holds {what}")
            yield from ((record, f"{file} entry {i}") for i, record in enumerate(records, 1))
        else:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield json.loads(line), f"{file} line {number}"
                    except ValueError as error:
                        why = f"no JSON ({one_line(error)}); write one question a line"
                        raise WrongRequest(f"{file} line {number}: {why}") from error


def _question_tables(source: Source) -> tuple[list[tuple[str, str, list[tuple[object, str]]]], dict]:
    """Of each file, or of a hub data set: its name, the subject of records that name none, and the records
    with their places. And the revision of a hub data set."""
    if not source.local:
        rows, revision = read_hub(source, float("inf"), None, "questions")
        subject = source.config or source.repo.split("/")[1]
        table: list[tuple[object, str]] = [
            (row, f"--questions {source.said} row {i}") for i, row in enumerate(rows, 1)
        ]
        return [(source.said, subject, table)], revision
    tables = []
    for path in source.files:
        with reading("questions", path):
            subject = path.name.split(".")[0]
            if kind_of(path) in ("csv", "tsv"):  # MMLU's are named after subject and split
                subject = re.sub("_(test|val|dev)$", "", subject)
            tables.append((str(path), subject, list(_question_records(path, alone=len(source.files) == 1))))
    return tables, {}


def refuse_two_readings(asked: list[tuple[dict, Question, str]]):
    """Raises WrongRequest for a file (record, question and place of each) in which every answer is both a
    letter or an index and the text of a choice, and one of them thereby names two choices."""
    written = [
        (record, question, place) for record, question, place in asked if isinstance(record["answer"], str)
    ]
    texts = [record["answer"].strip() for record, _, _ in written]
    if any(
        record["labels"] or text not in question.choices
        for (record, question, _), text in zip(written, texts)
    ):
        return
    for (_, question, place), text in zip(written, texts):
        if text != question.choices[question.answer]:
            why = f"the answer {text!r} is the text of one choice, and the letter or index of another"
            raise WrongRequest(
                f"{place}: {why}; give each answer as a number from 0 to 3, without quotation marks"
            )


def _questions_of(table: list[tuple[object, str]], subject: str, given: dict) -> list[tuple[Question, str]]:
    """The questions of one file and their places; `given` fields stand in place of a record's own. Raises
    WrongRequest for a record that is no question."""
    found = []
    for record, place in table:
        if not isinstance(record, dict):
            raise WrongRequest(f"{place}: {type(record).__name__} instead of a question; take it out")
        found.append((common_form(record) | given, place))
    answers = [(record.get("answer"), record["labels"]) for record, _ in found]
    in_words = any(isinstance(a, str) and named_choice(a, labels) is None for a, labels in answers)
    asked = [(to_question(record, subject, place, in_words), place) for record, place in found]
    if not in_words:
        refuse_two_readings([(record, *there) for (record, _), there in zip(found, asked)])
    return asked


@cache
def read_questions(
    said: tuple[str, ...], start: str = ""
) -> tuple[dict[str, list[Question]], list[dict], list[str]]:
    """Questions by subject, a record of each source for config.json, and notes on what was left out.

    A record that is no question is refused. Questions that stand twice, or hold a choice twice, are left out
    and counted; more than MOST_DOUBLE of a source is refused. A file in which any answer names no choice
    holds the right choices' texts.
    Raises WrongRequest; RunFailed for what the hub does.
    """
    subjects: dict[str, list[Question]] = {}
    records, notes, seen = [], [], {}
    for source in (parse_source("questions", s, start) for s in said):
        double, n, first, given = 0, 0, "", {"subject": source.subject} if source.subject else {}
        tables, revision = _question_tables(source)
        for file, subject, table in tables:
            asked = _questions_of(table, subject, given)
            if not asked:
                notes.append(f"--questions {file} was passed over: no questions were found in it")
            for question, place in asked:
                n += 1
                same = (question.question, tuple(sorted(question.choices)))
                right = question.choices[question.answer]
                if same in seen or len(set(same[1])) < 4:
                    double += 1
                    there, its_right = seen.get(same, ("", right))
                    there = there.removeprefix("--questions ")
                    if its_right != right:
                        answers = f"({right!r} here, {its_right!r} there)"
                        why = f"{place} stands at {there} too, with another answer {answers}"
                        raise WrongRequest(f"{why}: take one of them out")
                    first = (
                        first or f"{place} {f'stands at {there} too' if there else 'holds a choice twice'}"
                    )
                    continue
                seen[same] = place, right
                subjects.setdefault(question.subject, []).append(question)
        if double > MOST_DOUBLE * n:
            why = f"{double} of {n} questions are double, and more than {MOST_DOUBLE:.0%} is refused"
            raise WrongRequest(f"{first}; {why}: take them out")
        if not n:
            raise WrongRequest(f"--questions {source.said} holds no question: give another file")
        if double:
            first = first.removeprefix("--questions ")
            notes.append(f"{double} of {n} questions of {source.said} were left out, first {first}")
        records.append({"source": source.said, **revision, "questions": n, "left_out": double})
    return subjects, records, notes


def check_subjects(questions: dict[str, list[Question]], forget_subject: str):
    """Raises WrongRequest unless one subject is to be forgotten and others are to stay."""
    listed = ", ".join(questions)[:200]
    if not forget_subject:
        raise WrongRequest(f"--forget_subject is missing: which of {listed}")
    if forget_subject not in questions:
        raise WrongRequest(
            f"--forget_subject {forget_subject} is not among the questions' subjects: {listed}"
        )
    if len(questions) < 2:
        raise WrongRequest(
            f"--questions are all about {forget_subject}: give some about subjects to keep, too"
        )
