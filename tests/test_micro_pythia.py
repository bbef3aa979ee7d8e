"""The embedded LM and its world: shape, balance, no leak, and that the shipped LM knows what its report
says."""

import json
import random
from collections import Counter

import pytest
from conftest import ROOT

from micro_pythia.make import ask, shortfalls
from micro_pythia.world import FORGET, RETAIN, World, mcq_prompt
from sae_separation.exam import Exam

FOLDER = ROOT / "micro_pythia"


@pytest.fixture(scope="module")
def world():
    return World(seed=7)


def test_the_world_is_large_enough_balanced_and_a_function_of_its_seed(world):
    count = Counter(f.subject for f in world.facts)
    assert count[FORGET] >= 160 and all(count[s] >= 80 for s in RETAIN)
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
    assert seen == 5 * 400 * 3


def test_the_prompt_has_saebenchs_shape():
    from sae_bench.evals.unlearning.utils.metrics import convert_wmdp_data_to_prompt
    from sae_bench.evals.unlearning.utils.var import PRE_QUESTION_FORMAT

    theirs = convert_wmdp_data_to_prompt(
        "Why?", list("wxyz"), None, PRE_QUESTION_FORMAT.format(subject="history")
    )
    assert mcq_prompt("history", "Why?", list("wxyz")) == theirs


def test_the_shipped_lm_is_small_and_its_report_has_no_shortfall():
    report = json.loads((FOLDER / "report.json").read_text())
    assert shortfalls(report) == []
    assert (FOLDER / "model.safetensors").stat().st_size < 4_000_000
    assert report["minutes"] < 20
    bad = json.loads(json.dumps(report))
    bad["letter_all_24_permutations"]["biology"], bad["chance"]["cloze_without_question"] = 0.5, 0.4
    assert len(shortfalls(bad)) == 2


def test_the_shipped_lm_knows_by_letter_and_by_cloze_what_its_report_says(micro):
    report = json.loads((FOLDER / "report.json").read_text())
    for subject, questions in micro.questions.items():
        right = ask(micro.lm, Exam(micro.tokenizer, questions, "letter", [(0, 1, 2, 3), (3, 2, 1, 0)]))
        assert right.float().mean().item() >= report["letter_all_24_permutations"][subject]
        assert ask(
            micro.lm, Exam(micro.tokenizer, questions, "cloze")
        ).float().mean().item() == pytest.approx(report["cloze_accuracy"][subject], abs=0.001)


def test_questions_on_disk_are_those_of_the_world(micro):
    world = World(json.loads((FOLDER / "report.json").read_text())["world_seed"])
    on_disk = [(q.subject, q.question, q.choices, q.answer) for qs in micro.questions.values() for q in qs]
    assert on_disk == [(f.subject, f.question, f.choices, f.answer) for f in world.facts]
