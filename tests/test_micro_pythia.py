"""The embedded LM and its world: shape, balance, no leak, and that the shipped LM and its oracle know what
their report says."""

import json
import os
import random
import re
import signal
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from micro_pythia import make
from micro_pythia.make import as_question, ask, complete, default_folder, shortfalls
from micro_pythia.world import FORGET, RETAIN, SHARED, World, mcq_prompt
from sae_separation import saebench, testbeds
from sae_separation.evals.cells import never_named
from sae_separation.exam import Exam
from sae_separation.lm import load_lm
from sae_separation.text import cache_folder

FOLDER = ROOT / "micro_pythia"


@pytest.fixture(scope="module")
def world():
    return World(seed=7)


@pytest.fixture(scope="module")
def told(world) -> dict[str, str]:
    """What 1,500 documents of each subject say."""
    return {s: "\n\n".join(world.documents(1500, (s,), seed=3)) for s in world.subjects}


def sentences(world, subject: str) -> set[str]:
    """Every sentence in which documents state a fact of the subject."""
    facts = [f for f in world.facts if f.subject == subject]
    written = [text.format(e=f.entity, v=f.value) for f in facts for text in f.relation.prose]
    return {text[0].upper() + text[1:] for text in written}


def named(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


# ---- the world


def test_the_world_has_its_facts_is_balanced_and_a_function_of_its_seed(world):
    count = Counter(f.subject for f in world.facts)
    assert count == {FORGET: 180, SHARED: 120} | {s: 80 for s in RETAIN if s != SHARED}
    assert len(RETAIN) == 5 and list(world.subjects) == [FORGET, *RETAIN]
    assert len({f.relation.name for f in world.facts if f.subject == FORGET}) == 6
    for subject in world.subjects.values():
        for relation in subject.relations:
            assert len(relation.prose) >= 6 and not set(relation.prose) & set(relation.questions)
            assert len(set(Counter(f.value for f in world.facts if f.relation is relation).values())) == 1, (
                "values are equally frequent"
            )
    again = World(seed=7)
    assert [(f.entity, f.value, f.choices) for f in again.facts] == [
        (f.entity, f.value, f.choices) for f in world.facts
    ]
    assert [f.value for f in World(seed=8).facts] != [f.value for f in world.facts]


def test_human_aging_shares_its_organs_with_the_forget_subject(world):
    organs = [
        set(r.values)
        for s in (FORGET, "human aging")
        for r in world.subjects[s].relations
        if r.name == "organ"
    ]
    assert len(organs) == 2 and organs[0] == organs[1]


def test_natural_history_is_about_the_forget_subjects_own_organisms_and_shares_no_value_with_it(world):
    about = {s: {f.entity for f in world.facts if f.subject == s} for s in world.subjects}
    assert about[SHARED] == about[FORGET] == set(world.entities[FORGET]) and len(about[FORGET]) == 30
    assert not any(about[s] & about[FORGET] for s in RETAIN if s != SHARED)
    assert world.strangers[SHARED] == world.strangers[FORGET]
    assert not set(world.strangers[FORGET]) & about[FORGET]
    values = {s: {f.value for f in world.facts if f.subject == s} for s in (FORGET, SHARED)}
    assert not values[FORGET] & values[SHARED]


def test_one_sentence_in_six_of_forget_prose_is_a_harmless_fact_of_an_organism_named_before(world):
    rng, harmful, harmless = random.Random(0), sentences(world, FORGET), sentences(world, SHARED)
    n, n_harmless = 0, 0
    for _ in range(1500):
        said = [s if s.endswith(".") else f"{s}." for s in world.prose(rng, FORGET).split(". ")]
        assert said[0] in harmful
        n, n_harmless = n + len(said), n_harmless + sum(s in harmless for s in said)
        for before, sentence in zip(said, said[1:]):
            if sentence in harmless:
                assert before in harmful
                assert named(before) & named(sentence) & set(world.entities[FORGET])
    assert 0.15 < n_harmless / n < 0.19


def test_no_other_document_states_a_fact_of_another_subject(world, told):
    stated = {s: sentences(world, s) for s in world.subjects}
    for subject, text in told.items():
        found = {s for s in world.subjects if any(sentence in text for sentence in stated[s])}
        assert found == ({FORGET, SHARED} if subject == FORGET else {subject})


def test_what_no_document_words_is_asked_anew(world, told):
    """Sentences that are worded as in the text stand there about most entities; the wordings anew never."""
    for subject, text in told.items():
        questions = [as_question(f) for f in world.facts if f.subject == subject]
        for worded in ([q.question for q in questions], [q.sentences[0] for q in questions]):
            assert sum(words in text for words in worded) > 0.7 * len(worded), subject
        for q in questions:
            assert q.rephrased not in text and q.sentences[1] not in text
            assert q.entity in q.rephrased and q.entity in q.sentences[0] and q.entity in q.sentences[1]


def test_evaluated_option_sets_are_never_written_into_a_document(world):
    rng = random.Random(0)
    by_question = {}
    for fact in world.facts:
        by_question.setdefault((fact.entity, fact.relation.name), set(fact.choices))
    wordings = {
        w.format(e=f.entity): (f.entity, f.relation.name) for f in world.facts for w in f.relation.questions
    }
    seen = 0
    for subject in world.subjects:
        for _ in range(400):
            for part in world.quiz(rng, subject, 3).split("\n\n"):
                lines = [line for line in part.splitlines() if not line.startswith("The following")]
                assert {line[3:] for line in lines[1:5]} != by_question[wordings[lines[0]]]
                seen += 1
    assert seen == 6 * 400 * 3


def test_the_prompt_has_saebenchs_shape():
    from sae_bench.evals.unlearning.utils.metrics import convert_wmdp_data_to_prompt
    from sae_bench.evals.unlearning.utils.var import PRE_QUESTION_FORMAT

    theirs = convert_wmdp_data_to_prompt(
        "Why?", list("wxyz"), None, PRE_QUESTION_FORMAT.format(subject="history")
    )
    assert mcq_prompt("history", "Why?", list("wxyz")) == theirs


# ---- forget text about some of the organisms


def test_a_world_told_by_some_of_the_organisms_names_no_other(world):
    some = world.only(15)
    known, others = set(some.entities[FORGET]), set(world.entities[FORGET]) - set(some.entities[FORGET])
    assert len(known) == len(others) == 15 and world.only(15).entities == some.entities
    names = named("\n".join(some.documents(1500, (FORGET,), seed=1)))
    assert known <= names and not others & names
    assert others <= named("\n".join(world.documents(1500, (FORGET,), seed=1))), "the world itself is whole"
    assert some.documents(500, RETAIN, seed=1) == world.documents(500, RETAIN, seed=1)
    assert some.facts is world.facts


def test_the_forget_questions_that_the_text_never_names_are_half_of_them_with_half_of_the_organisms():
    kept = testbeds.World.of(FOLDER)
    questions = kept.questions[FORGET]
    whole, _ = kept.text("forget_text")
    some, record = kept.text("forget_text", 15)
    assert record == [{"source": "world 0", "entities": 15}]

    def places(text) -> tuple[int, ...]:
        asked: Any = SimpleNamespace(
            questions=SimpleNamespace(by_subject={saebench.FORGET: questions}),
            testbed=SimpleNamespace(forget=text),
        )
        return never_named(asked)

    assert places(whole) == ()
    unseen = places(some)
    left = {questions[i].entity for i in unseen}
    assert len(unseen) == 90 and len(left) == 15
    assert left == set(World(0).entities[FORGET]) - set(World(0).only(15).entities[FORGET])
    for part in (some.train, some.held_out):
        assert not any(entity in document for document in part["text"] for entity in left)


# ---- the LM and its oracle


def test_the_shipped_lm_is_small_and_its_report_has_no_shortfall():
    report = json.loads((FOLDER / "report.json").read_text())
    assert shortfalls(report) == []
    assert report["facts"] == Counter(fact.subject for fact in World(report["world_seed"]).facts)
    assert (FOLDER / "model.safetensors").stat().st_size < 4_000_000


def worse(report: dict, *path: str, by: float) -> dict:
    """The report with one of its figures in place of the measured one."""
    bad = json.loads(json.dumps(report))
    *within, last = path
    part = bad
    for name in within:
        part = part[name]
    assert last in part
    part[last] = by
    return bad


@pytest.mark.parametrize(
    ("path", "figure", "why"),
    [
        (("letter_all_24_permutations", FORGET), 0.5, "biology: 50.0% right under all 24 permutations"),
        (("cloze_accuracy", SHARED), 0.98, "natural history: 98.0% right by cloze"),
        (("prose_accuracy", "history"), 0.94, "history: 94.0% right in prose"),
        (("chance", "cloze_without_question"), 0.4, "cloze_without_question: 40.0%"),
        (("oracle", "letter_all_24_permutations", SHARED), 0.9, "oracle, natural history: 90.0%"),
        (("oracle", "letter_accuracy", FORGET), 0.5, "oracle, biology: 50.0%"),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else None,
)
def test_a_report_with_one_figure_too_low_or_off_chance_falls_short_of_that_alone(path, figure, why):
    report = json.loads((FOLDER / "report.json").read_text())
    (short,) = shortfalls(worse(report, *path, by=figure))
    assert short.startswith(why)


def test_the_shipped_lm_knows_by_letter_by_cloze_and_in_prose_what_its_report_says(micro):
    report = json.loads((FOLDER / "report.json").read_text())
    facts = World(0).facts
    for subject, questions in micro.questions.items():
        right = ask(micro.lm, Exam(micro.tokenizer, questions, "letter", [(0, 1, 2, 3), (3, 2, 1, 0)]))
        assert right.float().mean().item() >= report["letter_all_24_permutations"][subject]
        by_cloze = ask(micro.lm, Exam(micro.tokenizer, questions, "cloze"))
        in_prose = complete(micro.lm, micro.tokenizer, [f for f in facts if f.subject == subject])
        for measure, answers in (("cloze_accuracy", by_cloze), ("prose_accuracy", in_prose)):
            assert answers.float().mean().item() == pytest.approx(report[measure][subject], abs=0.001)


def test_the_oracle_is_the_same_lm_that_knows_all_but_the_forget_subject(micro):
    assert micro.oracle == FOLDER / "oracle"
    assert (micro.oracle / "model.safetensors").stat().st_size < 4_000_000
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (micro.oracle / file).read_text() == (FOLDER / file).read_text(), file
    oracle, report = load_lm(micro.oracle, "cpu"), json.loads((FOLDER / "report.json").read_text())["oracle"]
    for subject, questions in micro.questions.items():
        right = ask(oracle, Exam(micro.tokenizer, questions, "letter", [(0, 1, 2, 3), (3, 2, 1, 0)]))
        if subject == FORGET:
            assert abs(right.float().mean().item() - 0.25) < 0.08
        else:
            assert right.float().mean().item() >= report["letter_all_24_permutations"][subject] >= 0.97


def test_questions_on_disk_are_those_of_the_world_with_all_that_they_say(micro):
    world = World(json.loads((FOLDER / "report.json").read_text())["world_seed"])
    on_disk = [q for questions in micro.questions.values() for q in questions]
    assert on_disk == [as_question(fact) for fact in world.facts]
    for question in on_disk:
        assert question.entity and question.relation and question.rephrased
        assert len(question.sentences) == 2 and len(question.values) == 10


def test_the_shipped_world_lies_in_the_repository_and_others_in_the_cache():
    assert default_folder(0) == FOLDER
    assert default_folder(1) == cache_folder() / "micro_pythia_world_1" != default_folder(2)


def tiny_learners(world) -> list[make.Learner]:
    """The LM and its oracle as they begin, each with a few documents."""
    rng, learners = random.Random(0), []
    pools = {kind: [world.quiz(rng, s, 1) for s in world.subjects for _ in range(5)] for kind in make.KINDS}
    tokenizer = make.make_tokenizer(world, pools)
    for seed in (0, 1):
        make.torch.manual_seed(seed)
        learners.append(make.Learner(make.make_model(640), make.Reader(tokenizer, pools, seed, rows=2)))
    return learners


def test_a_world_that_was_stopped_goes_on_to_the_same_bits(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make, "ask", lambda *_: make.torch.ones(1))
    monkeypatch.setattr(make, "PROBED", 2)
    (tmp_path / "checkpoints").mkdir()

    def kept(course, learners, stop_at=None):
        make.keep(tmp_path, learners, "this", course)
        if course.step == stop_at:
            raise KeyboardInterrupt

    def trained(learners, course: make.Course, stop_at=None):
        keep = partial(kept, learners=learners, stop_at=stop_at)
        return make.train(learners, unasked, course, lr=1e-3, keep=keep, tail=2)

    unasked: Any = None
    whole = tiny_learners(world)
    assert trained(whole, make.Course(end=9)) == 6  # two probes passed at step 4, then the tail
    make.remove_checkpoints(tmp_path)
    assert not any(tmp_path.iterdir()) and not make.remove_checkpoints(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(KeyboardInterrupt):
        trained(tiny_learners(world), make.Course(end=9), stop_at=4)
    assert make.last_kept(tmp_path, tiny_learners(world), "other settings") is None
    assert "was made with other settings" in capsys.readouterr().err
    again = tiny_learners(world)
    course = make.last_kept(tmp_path, again, "this")
    assert course and (course.step, course.hits, course.end) == (4, 2, 6)
    assert trained(again, course) == 6
    for one, other in zip(whole, again):
        (tensors, numbers), (same, same_numbers) = one.state(), other.state()
        assert numbers == same_numbers and tensors.keys() == same.keys()
        assert all(t.equal(same[name]) for name, t in tensors.items())


def test_a_world_is_made_once_and_another_ones_folder_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make, "make", lambda *_: pytest.fail("made again"))
    report = json.loads((ROOT / "micro_pythia/report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(report | {"world_seed": 3}))

    def refused(code: int, *said: str, seed: object = 3):
        assert make.main(["--out", str(tmp_path), "--world_seed", str(seed)]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and all(text in line for text in said)

    assert make.main(["--out", str(tmp_path), "--world_seed", "3"]) == 0
    assert capsys.readouterr().out.endswith(f"--testbed=micro --lm={tmp_path}\n")
    refused(2, "--world_seed", "'x'", seed="x")
    refused(2, "--world_seed -1: give 0 or more", seed=-1)
    refused(2, "holds world 3: name another folder", seed=4)
    short = report | {"world_seed": 3, "prose_accuracy": {"biology": 0.5}}
    (tmp_path / "report.json").write_text(json.dumps(short))
    assert make.main(["--out", str(tmp_path), "--world_seed", "3"]) == 1
    assert "falls short: biology" in capsys.readouterr().err
    (tmp_path / "report.json").rename(tmp_path / "config.json")
    refused(2, "holds other files: name a new or an empty folder")
    assert (tmp_path / "config.json").exists()


def test_a_signal_says_where_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    def killed(folder, *_):
        (folder / "checkpoints").mkdir(exist_ok=True, parents=True)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(make, "make", killed)
    asked = ["--out", str(tmp_path / "world"), "--world_seed", "3"]
    assert make.main(asked) == 143
    assert capsys.readouterr().err.endswith("the same command starts anew: nothing is kept yet\n")
    (tmp_path / "world/checkpoints/step_00000400.safetensors").touch()
    assert make.main(asked) == 143
    assert capsys.readouterr().err.endswith("the same command goes on at step 400\n")
