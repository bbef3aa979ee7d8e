"""Questions as people have them: every form is read right or refused for a true reason."""

import csv
import gzip
import io
import json
import shutil
from dataclasses import replace

import datasets
import pytest
import tiny
import zstandard

import experiment
from sae_separation import testbeds
from sae_separation.errors import WrongRequest
from sae_separation.evals import unlearning
from sae_separation.evals.evaluator import Evaluator
from sae_separation.export import export, load_exported
from sae_separation.questions import Question, read_questions, without_letters
from sae_separation.saebench import letter_prompt
from sae_separation.specs import DataConfig

ROWS = [{k: v for k, v in q.items() if k != "subject"} for q in tiny.questions("astronomy", 12)]
RIGHT = [row["answer"] for row in ROWS]


def read(path) -> dict[str, list[Question]]:
    read_questions.cache_clear()
    return read_questions((str(path),))[0]


def as_csv(rows: list[list], delimiter: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue()


def as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(header=None, delimiter=",") -> str:
    rows = [[q["question"], *q["choices"], "ABCD"[q["answer"]]] for q in ROWS]
    return as_csv(([header] if header else []) + rows, delimiter)


def answered(make) -> list[dict]:
    """The questions with answers written in another way."""
    return [q | {"answer": make(q)} for q in ROWS]


def arc(labels: str) -> list[dict]:
    return [
        {
            "id": i,
            "question": q["question"],
            "choices": {"text": q["choices"], "label": list(labels)},
            "answerKey": labels[q["answer"]],
        }
        for i, q in enumerate(ROWS)
    ]


def arc_stem(labels: str) -> list[dict]:
    choices = [[{"text": c, "label": label} for c, label in zip(q["choices"], labels)] for q in ROWS]
    return [
        {"question": {"stem": q["question"], "choices": c}, "answerKey": labels[q["answer"]]}
        for q, c in zip(ROWS, choices)
    ]


def options(make) -> list[dict]:
    return [{"question": q["question"], "options": make(q["choices"]), "answer": q["answer"]} for q in ROWS]


def by_letter(choices: list[str]) -> dict[str, str]:
    return dict(zip("ABCD", choices))


def in_words(rows: list[dict]) -> list[dict]:
    return [row | {"answer": q["choices"][q["answer"]]} for row, q in zip(rows, ROWS)]


FORMS = {
    "a list": ("json", json.dumps(ROWS)),
    "a list under questions": ("json", json.dumps({"version": 2, "questions": ROWS})),
    "lines": ("jsonl", as_lines(ROWS)),
    "MMLU's table": ("csv", table()),
    "a table with a header": ("csv", table(["question", "A", "B", "C", "D", "answer"])),
    "a table with names in capitals": ("csv", table(["Question", "A", "B", "C", "D", "Answer"])),
    "a table with tabs": ("tsv", table(delimiter="\t")),
    "ARC's labels": ("jsonl", as_lines(arc("ABCD"))),
    "ARC's labels that are digits": ("jsonl", as_lines(arc("1234"))),
    "ARC's stem": ("jsonl", as_lines(arc_stem("ABCD"))),
    "ARC's stem with digits": ("jsonl", as_lines(arc_stem("1234"))),
    "labels in another order": ("jsonl", as_lines(arc("BADC"))),
    "options": ("jsonl", as_lines(options(list))),
    "options by letter": ("jsonl", as_lines(options(by_letter))),
    "answers by letter": ("jsonl", as_lines(answered(lambda q: "abcd"[q["answer"]]))),
    "answers as digits": ("jsonl", as_lines(answered(lambda q: f" {q['answer']}"))),
    "answers in words": ("jsonl", as_lines(in_words(ROWS))),
    "answers in words, options by letter": ("jsonl", as_lines(in_words(options(by_letter)))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_questions(form, tmp_path):
    kind, content = FORMS[form]
    (tmp_path / f"astronomy.{kind}").write_text(content)
    found = read(tmp_path / f"astronomy.{kind}")
    assert list(found) == ["astronomy"] and [q.answer for q in found["astronomy"]] == RIGHT
    assert [(q.question, list(q.choices)) for q in found["astronomy"]] == [
        (q["question"], q["choices"]) for q in ROWS
    ]


def test_questions_as_the_hub_has_them_in_parquet(tmp_path):
    rows = [q | {"subject": s} for s in ("astronomy", "law") for q in tiny.questions(s, 12)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "q.parquet")
    found = read(tmp_path / "q.parquet")
    assert {s: [q.answer for q in qs] for s, qs in found.items()} == {
        s: [q["answer"] for q in tiny.questions(s, 12)] for s in ("astronomy", "law")
    }
    datasets.Dataset.from_list(arc("1234")).to_parquet(tmp_path / "arc.parquet")
    assert [q.answer for q in read(tmp_path / "arc.parquet")["arc"]] == RIGHT


def test_mmlus_files_are_subjects_whatever_their_split(tmp_path):
    lines = table().splitlines(keepends=True)
    for name, part in {
        "world_religions_test.csv": lines[:8],
        "world_religions_dev.csv": lines[8:],
        "law.csv": [table().replace("What", "Which")],
    }.items():
        (tmp_path / name).write_text("".join(part))
    assert {s: len(q) for s, q in read(tmp_path).items()} == {"world_religions": 12, "law": 12}


def test_a_cell_may_hold_commas_quotes_and_line_breaks(tmp_path):
    (tmp_path / "a.csv").write_text(
        as_csv([['Who said "no,\nnever"?', "A, B", 'the "King"', "x\ny", "z", "C"]])
    )
    [question] = read(tmp_path / "a.csv")["a"]
    assert question == Question("a", 'Who said "no,\nnever"?', ("A, B", 'the "King"', "x\ny", "z"), 2)


def test_an_answer_in_words_may_look_like_a_letter_or_a_digit_where_the_file_holds_words(tmp_path):
    blood = {"question": "Which blood group?", "choices": ["0", "A", "B", "AB"]}
    words = [
        *in_words(ROWS),
        blood | {"answer": "A"},
        blood | {"question": "And?", "answer": "0"},
    ]
    tiny.save_jsonl(tmp_path / "words.jsonl", words)
    assert [q.answer for q in read(tmp_path / "words.jsonl")["words"]] == [*RIGHT, 1, 0]
    tiny.save_jsonl(
        tmp_path / "letters.jsonl",
        [
            *answered(lambda q: "ABCD"[q["answer"]]),
            blood | {"answer": "D"},
            blood | {"question": "And?", "answer": "A"},
        ],
    )
    assert [q.answer for q in read(tmp_path / "letters.jsonl")["letters"]] == [*RIGHT, 3, 0]


REFUSED = {
    "answers counted from 1": (
        answered(lambda q: str(q["answer"] + 1)),
        "the answer is '4', not an index from 0 to 3 .counted from 1 only where",
    ),
    "numbers counted from 1": (answered(lambda q: q["answer"] + 1), "the answer is '4'.*counted from 1"),
    "no label": (
        [q | {"answerKey": "5"} for q in arc("1234")],
        r"entry 1: the answer is '5', not a label \(1, 2, 3, 4\)",
    ),
    "labels that are the same": (arc("AABC"), "the labels of its choices are .*, not four different ones"),
    "choices without labels": (
        [q | {"choices": [{"text": c} for c in "abcd"]} for q in ROWS],
        "not four different ones",
    ),
    "words that are no choice": (
        answered(lambda q: "none of them"),
        "the answer is 'none of them', not an index .* or the text of one choice",
    ),
    "half a surrogate pair": (
        [q | {"question": "why \ud800"} for q in ROWS],
        "entry 1: the question is not a text",
    ),
    "four of five options": (options(lambda c: by_letter(c) | {"E": "more"}), "5 choices instead of 4"),
    "a list under another name": ({"items": ROWS}, "holds dict, not a list of questions or"),
    "one question": (ROWS[0], "holds dict, not a list of questions or"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_form_is_refused_with_a_true_reason(case, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(REFUSED[case][0]))
    with pytest.raises(WrongRequest, match=REFUSED[case][1]) as refused:
        read(tmp_path / "a.json")
    assert "\n" not in str(refused.value) and "a.json" in str(refused.value)


FURTHER = [
    q
    | {
        "entity": "Vella",
        "relation": "host",
        "rephrased": f"In {i}, what is it?",
        "sentences": [f"{i} is", f"What {i} is called is"],
        "values": [*reversed(q["choices"]), "a fifth"],
    }
    for i, q in enumerate(ROWS)
]


def further(**changes) -> list[dict]:
    """The questions with these fields in place of their own; None takes one out."""
    return [{k: v for k, v in (q | changes).items() if v is not None} for q in FURTHER]


def test_further_forms_of_a_question_are_read_from_every_kind_of_file(tmp_path):
    wanted = [
        Question(
            "astronomy",
            q["question"],
            tuple(q["choices"]),
            q["answer"],
            entity="Vella",
            relation="host",
            rephrased=q["rephrased"],
            sentences=tuple(q["sentences"]),
            values=tuple(q["values"]),
        )
        for q in FURTHER
    ]
    spaced = [
        q | {"rephrased": f" {q['rephrased']}\n", "values": [f"{v} " for v in q["values"]]} for q in FURTHER
    ]
    tiny.save_jsonl(tmp_path / "astronomy.jsonl", FURTHER)
    (tmp_path / "astronomy.json").write_text(json.dumps(spaced))
    tiny.save_jsonl(tmp_path / "astronomy.ndjson", [{k.title(): v for k, v in q.items()} for q in FURTHER])
    datasets.Dataset.from_list(FURTHER).to_parquet(tmp_path / "astronomy.parquet")
    for kind in ("jsonl", "json", "ndjson", "parquet"):
        assert read(tmp_path / f"astronomy.{kind}")["astronomy"] == wanted, kind
    head = ["question", "A", "B", "C", "D", "answer", "Entity", "relation", "rephrased"]
    cells = [
        [q["question"], *q["choices"], q["answer"], q["entity"], q["relation"], q["rephrased"]]
        for q in FURTHER
    ]
    (tmp_path / "astronomy.csv").write_text(as_csv([head, *cells]))
    assert read(tmp_path / "astronomy.csv")["astronomy"] == [
        replace(q, sentences=(), values=()) for q in wanted
    ]


def test_a_question_has_those_further_forms_that_are_not_empty(tmp_path):
    some = [{"rephrased": "And what?"}, {"sentences": ["It is"]}, {"values": None, "sentences": None}]
    some += [{"entity": "", "relation": None, "sentences": [], "rephrased": None}]
    tiny.save_jsonl(tmp_path / "a.jsonl", [q | change for q, change in zip(FURTHER, some)])
    rephrased, one, neither, values = read(tmp_path / "a.jsonl")["a"]
    assert rephrased.rephrased == "And what?" and one.sentences == ("It is",)
    assert (neither.values, neither.sentences, neither.entity) == ((), (), "Vella")
    assert (values.entity, values.relation, values.rephrased, values.sentences) == ("", "", "", ())
    assert len(values.values) == 5
    datasets.Dataset.from_list([FURTHER[0], ROWS[1]]).to_parquet(tmp_path / "b.parquet")
    full, plain = read(tmp_path / "b.parquet")["b"]
    assert full.values and plain == Question("b", ROWS[1]["question"], tuple(ROWS[1]["choices"]), RIGHT[1])


def test_letters_in_front_of_choices_do_not_keep_the_right_one_from_being_among_the_values(tmp_path):
    lettered = [
        q | {"choices": [f"{letter}. {choice}" for letter, choice in zip("ABCD", q["choices"])]}
        for q in FURTHER
    ]
    tiny.save_jsonl(tmp_path / "a.jsonl", lettered)
    assert [q.choices[q.answer] in q.values for q in read(tmp_path / "a.jsonl")["a"]] == [True] * len(ROWS)


WRONG_FURTHER = {
    "an entity that is no text": ({"entity": 3}, "its entity is not a text"),
    "a relation that is a list": ({"relation": ["host"]}, "its relation is not a text"),
    "another wording of white space": ({"rephrased": " "}, "its rephrased is not a text"),
    "a sentence that is no list": ({"sentences": "It is"}, "its sentences are not a list of texts"),
    "a sentence that is no text": ({"sentences": ["It is", None]}, "one of its sentences is not a text"),
    "three sentences": ({"sentences": ["It is", "It was", "It has been"]}, "it has 3 sentences"),
    "sentences without values": ({"values": None}, "it has sentences, and no values that could end them"),
    "values that are no list": ({"values": "otters"}, "its values are not a list of texts"),
    "a value that is no text": ({"values": ["otters", 3]}, "one of its values is not a text"),
    "no right value": (
        {"values": ["otters", "moles"]},
        r"its values \(otters, moles\) are not the right choice",
    ),
    "the right value alone": (
        {"values": [ROWS[0]["choices"][RIGHT[0]]]},
        "its values .* are not the right choice .* and others",
    ),
    "a value twice": ({"values": [*ROWS[0]["choices"]] * 2}, "two of its values are the same"),
}


@pytest.mark.parametrize("case", WRONG_FURTHER)
def test_further_forms_that_cannot_be_asked_are_refused_in_one_line(case, tmp_path):
    changes, why = WRONG_FURTHER[case]
    tiny.save_jsonl(tmp_path / "a.jsonl", further(**changes))
    with pytest.raises(
        WrongRequest, match=rf"^--questions .*a.jsonl line 1: {why}.*; it may have \{{entity"
    ) as no:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            "a.csv",
            "why?,a,b,c,d,A\nwhy not?,a,b,c,d\n",
            r"a.csv line 2: 5 columns instead of 6 \(question, a, b, c, d, answer\)",
        ),
        ("a.csv", 'why?,a,b,c,d,A\n"why not?,a,b,c,d,A\n', "a.csv line 2: no CSV"),
        ("a.csv", "why?;a;b;c;d;A\n", "a.csv line 1: 1 columns instead of 6"),
        ("a.csv", "question,choices,answer\nwhy?,abcd,A\n", "a.csv line 2: no choices instead of 4"),
        ("a.parquet", "PAR1", "a.parquet cannot be read"),
        ("a.jsonl.zst", "no frame", "a.jsonl.zst cannot be read"),
    ],
)
def test_broken_files_are_refused_by_name_and_line(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(WrongRequest, match=said) as refused:
        read(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_white_space_around_a_text_is_no_part_of_it(tmp_path):
    plain = tiny.questions("law", 12)
    spaced = [
        q
        | {
            "subject": " law ",
            "question": q["question"] + "\n",
            "choices": [(" " * (i == q["answer"])) + c for i, c in enumerate(q["choices"])],
        }
        for q in plain
    ]
    tiny.save_jsonl(tmp_path / "plain.jsonl", plain)
    tiny.save_jsonl(tmp_path / "spaced.jsonl", spaced)
    assert read(tmp_path / "spaced.jsonl") == read(tmp_path / "plain.jsonl")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    for form in ("a list", "lines", "MMLU's table", "a table with a header"):
        kind, content = FORMS[form]
        (tmp_path / f"astronomy.{kind}").write_text(content, encoding="utf-8-sig")
        assert [q.answer for q in read(tmp_path / f"astronomy.{kind}")["astronomy"]] == RIGHT, form


def test_packed_files_and_names_in_capitals_are_read(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "one.PARQUET")
    for form in ("a list", "lines", "MMLU's table"):
        kind, content = FORMS[form]
        for end in (kind, "ndjson") if kind == "jsonl" else (kind,):
            (tmp_path / f"one.{end.upper()}").write_text(content)
            (tmp_path / f"one.{end}.gz").write_bytes(gzip.compress(content.encode()))
            (tmp_path / f"one.{end.title()}.ZST").write_bytes(zstandard.compress(content.encode()))
    assert len(list(tmp_path.iterdir())) == 13
    for path in tmp_path.iterdir():
        assert [q.answer for q in read(path)["one"]] == RIGHT, path.name


def test_a_glob_or_file_that_exists_comes_before_subject_and_file(tmp_path):
    (tmp_path / "split=test").mkdir()
    tiny.save_jsonl(tmp_path / "split=test" / "law.jsonl", ROWS)
    assert list(read(tmp_path / "split=test" / "*.jsonl")) == list(read(tmp_path / "split=test")) == ["law"]
    assert list(read(f"art={tmp_path}/split=test/*.jsonl")) == ["art"]
    tiny.save_jsonl(tmp_path / "a=b#c.jsonl", tiny.questions("music", 12))
    assert list(read(tmp_path / "a=b#c.jsonl")) == list(read(tmp_path / "a=*#c.jsonl")) == ["music"]


def test_other_files_beside_questions_are_passed_over_and_told_where_they_could_be_meant(tmp_path):
    tiny.save_jsonl(tmp_path / "law.jsonl", ROWS)
    for name in ("README.md", "README.txt", "LICENSE", "picture.png"):
        (tmp_path / name).write_text("Questions about law.")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    found, _, notes = read_questions((str(tmp_path),))
    assert [q.answer for q in found["law"]] == RIGHT and read(f"{tmp_path}/*").keys() == {"law"}
    assert notes == [
        f"--questions {tmp_path}/dataset_infos.json was passed over: no questions were found in it"
    ]
    for name, said in (
        (
            "README.txt",
            "files of this kind are not read; give .json, .jsonl, .ndjson, .csv, .tsv or .parquet",
        ),
        ("dataset_infos.json", "holds dict"),
    ):
        with pytest.raises(WrongRequest, match=said):
            read(tmp_path / name)
    (tmp_path / "broken.json").write_text(json.dumps([{"question": "why?"}]))
    with pytest.raises(WrongRequest, match="broken.json entry 1: no field choices"):
        read(tmp_path)


# ---- with an LM


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A small LM and a user's files, as settings."""
    folder = tmp_path_factory.mktemp("own")
    files = tiny.own_files(folder)
    settings = {"lm": str(tiny.save_lm(folder / "lm")), "layer": 1, "forget_subject": "biology"}
    return settings | {k: (str(v),) for k, v in files.items()}


SUBJECTS = [
    "biology",
    "us_history",
    "us-history",
    "US_history",
    "college_biology",
    "wmdp-bio",
    "loss_added",
    "ablate_params",
    "subject1",
]


def test_subjects_are_counted_apart_whatever_their_names(own, tmp_path, monkeypatch):
    """An LM is right on all that it knows, unless SAEBench's files mix two subjects."""
    asked = [q for i, s in enumerate(SUBJECTS) for q in tiny.questions(s, 16 + 2 * i)]
    paths = (str(tiny.save_jsonl(tmp_path / "asked.jsonl", asked)),)
    testbed = testbeds.load(DataConfig(**own | {"questions": paths}))
    sweep = {"retain_thresholds": [0.01], "n_features_list": [5], "multipliers": [10]}
    evaluator = Evaluator(replace(testbed, n_held_out=16, sweep=sweep), 32, n_contexts=16)
    monkeypatch.setattr(unlearning, "MIN_KNOWN", 1)
    monkeypatch.setattr(unlearning, "INTERVENTIONS", ("clamp",))
    described = {
        "model_name": "tiny",
        "hook_name": testbed.hook_name,
        "hook_layer": 1,
        "context_size": 32,
        "prepend_bos": True,
    }
    export(experiment.OrthogonalSAE(tiny.D_IN, 64, seed=0), tmp_path / "sae", described)
    metrics, details, _ = unlearning.unlearning(evaluator, load_exported(tmp_path / "sae"), 0, "tiny")
    known = details["known"]
    assert list(known) == SUBJECTS and min(known.values()) > 0 and len(set(known.values())) > 2
    assert (
        metrics["n_known_forget"] == known["biology"]
        and metrics["n_known_retain"] == sum(known.values()) - known["biology"]
    )
    assert metrics["lm_forget_accuracy"] == metrics["lm_retain_accuracy"] == 1.0
    assert {q.subject for qs in evaluator.questions.by_subject.values() for q in qs} == set(SUBJECTS), (
        "prompts show the user's names"
    )
    prompt = letter_prompt(evaluator.questions.by_subject["subject1"][0], (0, 1, 2, 3))
    assert prompt.startswith("The following are multiple choice questions (with answers) about us history.\n")


def test_a_choice_without_a_token_is_refused_before_anything_is_trained(own, tmp_path):
    """A tokenizer that knows ASCII alone, and drops the rest."""
    lm = shutil.copytree(own["lm"], tmp_path / "lm")
    tokenizer = json.loads((lm / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        t: i for t, i in tokenizer["model"]["vocab"].items() if t.isascii() or t.startswith("Ġ")
    }
    (lm / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = tiny.questions("biology", 20) + tiny.questions("history", 20)
    rows[30] |= {"question": "How many?", "choices": ["五", "five", "six", "ten"]}
    for scoring in ("cloze", "letter"):
        wanted = own | {
            "lm": str(lm),
            "questions": (str(tiny.save_jsonl(tmp_path / "q.jsonl", rows)),),
            "scoring": scoring,
        }
        with pytest.raises(
            WrongRequest,
            match=r"the choice '五' of 'How many\?' \(history\) is no token of this LM's",
        ):
            read_questions.cache_clear()
            testbeds.load(DataConfig(**wanted))
    rows[30]["choices"][0] = "5 五"
    tiny.save_jsonl(tmp_path / "q.jsonl", rows)
    read_questions.cache_clear()
    assert testbeds.load(DataConfig(**wanted)).questions["history"][10].choices[0] == "5 五"
    rows[31]["values"] = [*rows[31]["choices"], "六"]
    tiny.save_jsonl(tmp_path / "q.jsonl", rows)
    read_questions.cache_clear()
    with pytest.raises(WrongRequest, match="the choice '六' of .* is no token of this LM's"):
        testbeds.load(DataConfig(**wanted))


def test_one_question_with_two_answers_is_refused(tmp_path):
    asked = tiny.questions("biology", 100)
    asked.append(asked[0] | {"answer": (asked[0]["answer"] + 1) % 4})
    path = tiny.save_jsonl(tmp_path / "q.jsonl", asked)
    with pytest.raises(
        WrongRequest, match=r"q.jsonl line 101 stands at .*q.jsonl line 1 too, with another answer"
    ):
        read_questions((str(path),))


@pytest.mark.parametrize(
    "choices, answer",
    [(["1", "2", "3", "4"], "2"), (["3", "2", "1", "0"], "0"), (["B", "C", "D", "A"], "A")],
)
def test_answers_that_can_be_read_in_two_ways_are_refused_unless_another_tells(tmp_path, choices, answer):
    question = {"subject": "s", "question": "Which?", "choices": choices, "answer": answer}
    with pytest.raises(
        WrongRequest, match=f"line 1: the answer '{answer}' is the text of one choice, and the letter"
    ):
        read_questions((str(tiny.save_jsonl(tmp_path / "both.jsonl", [question])),))
    letter = {"subject": "s", "question": "And?", "choices": list("wxyz"), "answer": "C"}
    read = read_questions((str(tiny.save_jsonl(tmp_path / "letters.jsonl", [question, letter])),))[0]["s"]
    assert (
        read[0].answer == ("ABCD".index(answer) if answer.isalpha() else int(answer)) and read[1].answer == 2
    )
    word = letter | {"answer": "y"}
    read = read_questions((str(tiny.save_jsonl(tmp_path / "words.jsonl", [question, word])),))[0]["s"]
    assert read[0].choices[read[0].answer] == answer and read[1].answer == 2


def test_letters_in_front_of_all_four_choices_are_no_part_of_them():
    assert without_letters(("A. geckos", "(B) herons", "C: newts", "D) a\nb")) == (
        "geckos",
        "herons",
        "newts",
        "a\nb",
    )
    for kept in (("A. Smith", "B. Jones", "C. Lee", "Darwin"), ("A.", "B. b", "C. c", "D. d")):
        assert without_letters(kept) == kept, "not all carry their letter"
