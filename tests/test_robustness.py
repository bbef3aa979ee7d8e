"""Forms of asking, and what is left and kept in them: on the embedded LM with some of its questions, under
interventions whose effect is known."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import there

from micro_pythia.world import World
from sae_separation import progress, saebench
from sae_separation.evals import cells, choice, robustness
from sae_separation.evals.evaluator import Evaluator
from sae_separation.forms import FORMS, Asker, Form, tells
from sae_separation.questions import Question
from studies.gates import Ideal

UNASKED: Any = None  # the exam of a form whose answers are given
EACH, EACH_OF_RETAIN = 8, 12  # one question in so many


@pytest.fixture(scope="module")
def few(micro):
    """The testbed with some of its questions."""
    each = {s: EACH if s == micro.forget_subject else EACH_OF_RETAIN for s in micro.questions}
    return replace(
        micro, questions={s: some[:: each[s]] for s, some in micro.questions.items()}, n_held_out=32
    )


@pytest.fixture(scope="module")
def evaluator(few):
    return Evaluator(few, context_size=128)


class Hooked:
    """A switch with one cell."""

    needed = {}

    def __init__(self, evaluator, hook):
        self.lm, self.one = evaluator.lm, hook

    def cells(self):
        return [{"only": 1}]

    def hook(self, cell):
        return self.one

    def on(self, evaluator):
        return Hooked(evaluator, self.one)


class Bar:
    """Stands for tqdm's."""

    def __init__(self, total: float = 1000):
        self.moves: list[float] = []
        self.total = total

    @property
    def n(self) -> float:
        return sum(self.moves)

    def update(self, seconds: float):
        self.moves.append(seconds)


def test_a_section_counts_the_steps_of_its_loops_and_at_the_end_the_rest():
    bar, section = Bar(), progress.Section()
    with section.of(bar, 100):
        assert list(section.steps("abcd", 0.4)) == list("abcd") and bar.moves == [10] * 4
        assert list(section.steps("ab", 0.5)) == ["a", "b"] and list(section.steps("", 0.5)) == []
    assert bar.moves == [10] * 4 + [15, 15, 30]
    assert list(section.steps("abc", 0.4)) == list("abc") and len(bar.moves) == 7, "of no section"
    with pytest.raises(ZeroDivisionError), section.of(bar, 100):
        raise ZeroDivisionError
    assert len(bar.moves) == 7, "one that failed is not finished"
    almost = Bar(99.9)
    with section.of(almost, 100):
        list(section.steps("abc", 0.4))
    assert almost.n == almost.total, "rounding leads to no more than all of it"


def under(monkeypatch, evaluator, hook):
    switch = Hooked(evaluator, hook)
    monkeypatch.setattr(cells, "switch_of", lambda evaluator, sae: switch)
    return robustness.robustness(evaluator, switch, 0, "hooked")


def test_there_are_all_crossings_and_each_is_asked_as_its_name_says(few):
    assert len({form.name for form in FORMS}) == 3 * 3 * 2 * 4
    forget, retain = few.questions["biology"][0], few.questions["history"][0]
    asker = Asker(few, [forget, retain], 128)
    letter = Form("letter", "own", "trained", "alone")
    assert asker.ask(letter, 0)[0] == saebench.letter_prompt(forget, range(4))
    none = asker.ask(replace(letter, header="no"), 1)[0]
    assert none == saebench.letter_prompt(retain, range(4), before="") and none.startswith(retain.question)
    assert asker.ask(replace(letter, header="other"), 1)[0].startswith(saebench.header("biology"))
    assert forget.rephrased in asker.ask(replace(letter, wording="anew"), 0)[0]
    text, ends, right = asker.ask(Form("prose", "no", "trained", "alone"), 0)
    assert text == forget.sentences[0] and ends[right] == forget.choices[forget.answer] and len(ends) == 10
    sheet = asker.ask(replace(letter, place="sheet"), 0)[0]
    assert sheet.count("\nAnswer: ") == 2 and sheet.endswith("\nAnswer:")


def test_nothing_in_front_of_a_question_states_its_fact_and_passages_are_of_the_other_domain(few):
    questions = [q for some in few.questions.values() for q in some[:3]]
    asker, rng = Asker(few, questions, 128), random.Random(0)
    for i, question in enumerate(questions):
        alone = len(asker.tokens(asker.ask(Form("letter", "own", "trained", "alone"), i)[0]))
        for form in FORMS:
            text = asker.ask(form, i)[0]
            own = asker.prompt(form, question, "")
            before = text[: text.rindex(own)] if own in text else text
            assert not any(tells(part, question) for part in before.split("\n\n")), (form.name, text)
        passage = asker.passage(question, 80, rng)
        of_forget = question.subject == "biology"
        held_out = few.retain.held_out if of_forget else few.forget.held_out
        assert any(passage[:40] in row["text"] for row in held_out)
        text = asker.ask(Form("letter", "own", "trained", "passage"), i)[0]
        assert alone + 20 < len(asker.tokens(text)) <= 127


def test_a_question_is_asked_in_the_forms_that_it_allows():
    plain = Question("biology", "What?", ("a", "b", "c", "d"), 0)
    full = replace(plain, rephrased="Which?", sentences=("It is",), values=("a", "b", "e"))
    asker = Asker.__new__(Asker)
    names = [{f.name for f in FORMS if asker.allowed(f, q)} for q in (plain, full)]
    assert len(names[0]) == 2 * 3 * 4 and not any("anew" in n or "prose" in n for n in names[0])
    assert len(names[1]) == 2 * 3 * 2 * 4 + 3 * 4 and not any("prose" in n and "anew" in n for n in names[1])


class Answered(robustness.Asked):
    """A form in which so many of 20 forget and of 20 retain questions are right."""

    def right(self, lm) -> np.ndarray:
        ASKED.append(self.form.name)
        n = {"letter": 9, "cloze": 10, "prose": 20}[self.form.how]
        n = {"own": 0 if self.form.how == "prose" else n, "no": n, "other": 18}[self.form.header]
        return np.tile(np.arange(20) < n, 2)


ASKED = []  # forms, in their order


def test_an_lm_that_fails_at_a_kinds_plainest_form_is_not_asked_the_others():
    """Unless half is right: then any other form may count. Taught in prose without a header, it may fail with
    one."""
    every = range(40)
    forms: list = [Answered(form, UNASKED, list(every), 0.25, np.ones(40, bool)) for form in FORMS]
    forget = np.array([i < 20 for i in every])
    exam = robustness.Examined(forget.astype(str), forget, ~forget & forget, ~forget, forms, {}, ["before"])
    ASKED.clear()
    found = robustness.answered(SimpleNamespace(hook=None, reset_hooks=lambda: None), exam)  # type: ignore
    by_letter = [form.name for form in FORMS if form.how == "letter"]
    assert found.not_asked == ["before", *by_letter[1:]] and exam.not_asked == ["before"]
    plainest = ["letter_own_trained_alone", "cloze_no_trained_alone", "prose_no_trained_alone"]
    rest = [form.name for form in FORMS if form.name not in by_letter and form.name not in plainest]
    assert ASKED == [*plainest, *rest]
    counted = {form.form.name for form in found.forms}
    counts = {("cloze", "other"), ("prose", "no"), ("prose", "other")}
    assert counted == {f.name for f in FORMS if (f.how, f.header) in counts}
    assert [form.form for form in found.forms] == [form for form in FORMS if form.name in counted]
    assert found.left_out[by_letter[0]] == {"forget": 0.45, "retain": 0.45}
    assert len(found.left_out) + len(counted) + len(by_letter) - 1 == len(FORMS)


def test_no_intervention_leaves_all_and_keeps_all(evaluator, monkeypatch):
    bar = Bar()
    with progress.section.of(bar, 110):
        metrics, details, notes = under(monkeypatch, evaluator, lambda resid, hook: None)
    assert len(bar.moves) > 2 * metrics["n_forms"] and max(bar.moves) < 110 / 2
    assert sum(bar.moves) == pytest.approx(110)
    assert metrics["knowledge_left_max"] == 1.0 and metrics["kept_at_worst"] == 1.0
    assert metrics["worst_case_score"] == metrics["mean_score"] == metrics["standard_score"] == 0.0
    assert metrics["retain_ce_cost"] == pytest.approx(0, abs=1e-6)
    assert metrics["n_forms"] + len(details["left_out"]) == len(FORMS)
    assert {row["kept"] for row in details["forms"]} == {1.0}


def test_what_spoils_everything_scores_nothing(evaluator, monkeypatch):
    metrics, details, notes = under(monkeypatch, evaluator, lambda resid, hook: torch.zeros_like(resid))
    assert details["cell"] is None and metrics["worst_case_score"] == 0.0
    assert any("nothing was switched off" in note for note in notes)


@pytest.fixture(scope="module")
def guard(evaluator):
    """It empties rows that begin with the forget subject's header."""
    first = evaluator.testbed.tokenizer(saebench.header("biology"), add_special_tokens=False)["input_ids"]
    begins = torch.tensor(first)

    def empty(resid, hook):
        n = len(begins)
        rows = (
            (hook.tokens[:, 1 : n + 1] == begins).all(1) if hook.tokens.shape[1] > n else torch.zeros(1) > 0
        )
        return torch.where(rows[:, None, None] & hook.trained[..., None], torch.zeros_like(resid), resid)

    return empty


def test_a_guard_on_the_first_words_is_seen_through(evaluator, guard, monkeypatch):
    """The standard form is forgotten, and the rest is there."""
    metrics, details, _ = under(monkeypatch, evaluator, guard)
    assert metrics["standard_score"] > 0.4 and metrics["worst_case_score"] == 0.0
    left = {row["form"]: row["left"] for row in details["forms"]}
    assert left["letter_own_trained_alone"] < 0.5 and left["letter_no_trained_passage"] == 1.0
    kept = {row["form"]: row["kept"] for row in details["forms"]}
    assert kept["letter_other_trained_alone"] < 0.9


def test_a_choice_by_several_forms_takes_what_one_form_cannot_tell(evaluator, guard, monkeypatch):
    """The guard and an ideal gate both forget the standard form; the rule of one form takes the first."""
    ideal = Ideal(evaluator.testbed, World(0), "all")

    def gate(resid, hook):
        return torch.where(
            (ideal(hook) > 0)[..., None] & hook.trained[..., None], evaluator.retain_mean, resid
        )

    hooks = {"guard": guard, "gate": gate, "nothing": lambda resid, hook: None}
    switch: Any = Hooked(evaluator, None)
    switch.cells, switch.hook = lambda: [{"name": name} for name in hooks], lambda cell: hooks[cell["name"]]
    found = {"name": "guard", "forget_accuracy": 0.25, "retain_accuracy": 1.0}
    of_all = [found | {"name": name} for name in hooks]
    monkeypatch.setattr(choice, "chosen_for", lambda *_: cells.Chosen(switch, of_all[0], of_all))
    metrics, details, notes = choice.choice(evaluator, None, 0, "it")
    assert details["cell"]["name"] == "gate" and not notes
    tried = {row["cell"] and row["cell"]["name"]: row["worst_case_score"] for row in details["cells"]}
    assert tried["guard"] == tried["nothing"] == tried[None] == 0 < tried["gate"]
    assert len(details["chosen_by"]) == 24 < len(details["forms"])
    assert metrics["knowledge_left_max"] == max(row["left"] for row in details["forms"])
    assert 0.3 < metrics["mean_score"] and set(metrics) == set(choice.METRICS)


def test_a_cell_at_the_edge_of_what_must_be_kept_is_expected_to_fall_over_it():
    """Of 200 retain questions 2 may be lost. With 2 lost that holds in P(X <= 2) of the draws, X binomial;
    the cell that loses none scores less by its plain value, and is expected to score more."""
    n, subject = 200, np.array(["forget"] * 100 + ["one"] * 100 + ["two"] * 100)
    forget = subject == "forget"
    asked = robustness.Asked(Form("cloze", "no", "trained", "alone"), UNASKED, [], 0.25, np.ones(300, bool))
    exam = robustness.Examined(subject, forget, ~np.ones(300, bool), forget & False, [asked], {}, [])
    bold, careful = np.r_[np.zeros(100), np.ones(200)] > 0, np.r_[np.zeros(100), np.ones(200)] > 0
    bold[-2:], careful[:40] = False, True  # of 100 forget answers 40 are left: (0.4 - 0.25) / 0.75 = 0.2
    expected = [robustness.resampled(exam, right[None], 0, 20_000) for right in (bold, careful)]
    lost = [math.comb(n, k) * 0.01**k * 0.99 ** (n - k) for k in range(3)]
    assert expected[0]["worst_case_score"].mean() == pytest.approx(sum(lost), abs=0.02)
    assert expected[1]["worst_case_score"].mean() == pytest.approx(0.8, abs=0.01)
    assert expected[0]["knowledge_left_max"].max() == 0 and expected[1]["kept_at_worst"].min() == 1


def test_resampled_questions_are_the_same_for_all_that_is_asked_of_them():
    """Against plain draws: a subject of 20 that has lost one answer, and one that no form asks."""
    subject = np.array(["forget"] * 50 + ["large"] * 180 + ["small"] * 20 + ["unknown"] * 2)
    forget, right = subject == "forget", subject != "forget"
    right[-3] = False
    asked = robustness.Asked(Form("cloze", "no", "trained", "alone"), UNASKED, [], 0.25, subject != "unknown")
    exam = robustness.Examined(subject, forget, forget & False, forget & False, [asked], {}, [])
    rng, passed = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = np.flatnonzero(~forget)[rng.integers(0, 202, 202)]
        kept = {s: right[drawn[subject[drawn] == s]] for s in ("large", "small")}
        every = np.concatenate([*kept.values()])
        passed.append(every.mean() >= 0.99 and kept["small"].mean() >= 0.95)
    found = robustness.resampled(exam, right[None], 0, 4000)["worst_case_score"]
    assert found.mean() == pytest.approx(np.mean(passed), abs=0.04)


@pytest.mark.parametrize("means, best", [((0.0, 0.2, 0.4), 1), ((0.0, 0.0, 0.0), None)])
def test_where_no_cell_keeps_enough_the_best_mean_decides_and_none_is_said(
    means, best, evaluator, monkeypatch
):
    switch: Any = Hooked(evaluator, lambda resid, hook: None)
    of_all = [{"number": i} for i in range(2)]
    monkeypatch.setattr(choice, "chosen_for", lambda *_: cells.Chosen(switch, of_all[0], of_all))
    found = ({"worst_case_score": np.zeros(3), "mean_score": np.full(3, mean)} for mean in means)
    monkeypatch.setattr(choice, "resampled", lambda *_, **__: next(found))
    _, details, notes = choice.choice(evaluator, None, 0, "it")
    assert details["cell"] == (best and of_all[best]) and bool(notes) == (best is None)


def test_scores_by_hand():
    def row(left, kept, kept_min):
        return {"left": left, "kept": kept, "kept_enough": kept >= 0.99 and kept_min >= 0.95}

    assert robustness.summary([row(0.2, 1.0, 1.0), row(0.1, 0.99, 0.95)], "left") == {
        "worst_case_score": pytest.approx(0.8),
        "mean_score": pytest.approx(0.85),
        "knowledge_left_max": 0.2,
    }
    for spoilt in (row(0.0, 0.98, 1.0), row(0.0, 1.0, 0.94)):
        out = robustness.summary([row(0.2, 1.0, 1.0), spoilt], "left")
        assert out["worst_case_score"] == 0 and out["mean_score"] == pytest.approx(0.4)


def test_left_is_counted_on_what_the_lm_answers_and_from_chance():
    known, right = np.array([1, 1, 1, 1, 0], bool), np.array([1, 1, 0, 0, 1], bool)
    asked = robustness.Asked.__new__(robustness.Asked)
    asked.known, asked.chance = known, 0.25
    everyone = np.ones(5, bool)
    assert robustness.left(asked, right, everyone) == pytest.approx((0.5 - 0.25) / 0.75)
    assert robustness.left(asked, ~known, everyone) == 0.0


def test_halves_are_apart_and_always_the_same(evaluator):
    split = cells.halves(evaluator)
    again = cells.halves(evaluator)
    assert split == again and split.unseen == ()
    for subject, questions in evaluator.questions.by_subject.items():
        a, b = set(split.choosing[subject]), set(split.reporting[subject])
        assert not a & b and a | b == set(range(len(questions))) and abs(len(a) - len(b)) <= 1


def test_a_feature_switch_repeats_its_cells_from_what_is_recorded(evaluator, few):
    """Every cell names its features; with their units and the mean of the stream, it is the same hook."""
    torch.manual_seed(0)
    sae = tiny_sae(evaluator)
    switch = cells.FeatureSwitch(evaluator, sae)
    grid, needed = switch.cells(), switch.needed
    assert {cell["write"] for cell in grid} == {"zero", "retain_mean", "clamp"}
    tokens, resid = evaluator.select["forget"]
    batch = robustness.corpus.whole_contexts(tokens[:4], resid[:4], evaluator.special)
    hook = there(batch.residuals)
    x = hook.resid
    for cell in grid:
        f = sae.encode(x)[..., cell["features"]]
        fires = (f > 0) & hook.trained[..., None]
        if cell["write"] == "clamp":
            unit = torch.tensor([needed["units"][i] for i in cell["features"]])
            change = torch.where(fires, -cell["multiplier"] * unit - f, 0.0) @ sae.W_dec[cell["features"]]
            wanted = x + change
        else:
            new = torch.tensor(needed["retain_mean"]) * (cell["write"] == "retain_mean")
            wanted = torch.where(fires.any(-1)[..., None], new, x)
        assert torch.allclose(there(switch.hook(cell)(x, hook=hook)), wanted, atol=1e-3)


@torch.no_grad()
def tiny_sae(evaluator):
    """An SAE of random directions, whose features fire on one retain token in 200."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    d_in, d_sae = evaluator.testbed.d_in, 64
    how = {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none"}
    about = {"model_name": "micro", "hook_name": evaluator.testbed.hook_name, "hook_layer": 1}
    metadata = SAEMetadata(**about, context_size=128, prepend_bos=True)
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=d_in, d_sae=d_sae, metadata=metadata, **how))
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
    retain = evaluator.retain_residuals
    b_enc = -(retain.resid[retain.trained] @ W_dec.T).quantile(0.995, dim=0)
    sae.load_state_dict({"W_enc": W_dec.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": torch.zeros(d_in)})
    return saebench.as_expected(sae.requires_grad_(False), "cpu")


def test_the_frontier_is_what_no_other_cell_beats_in_both():
    def cell(forget, retain):
        return {"forget_accuracy": forget, "retain_accuracy": retain}

    front = [cell(0.9, 1.0), cell(0.5, 0.99), cell(0.1, 0.92)]
    beaten = [cell(0.9, 0.97), cell(0.5, 0.99), cell(0.6, 0.98), cell(0.2, 0.92)]
    outside = [cell(0.96, 1.0), cell(0.0, 0.89)]  # takes next to nothing; keeps too little
    assert robustness.undominated([*beaten[:1], *outside, *front[::-1], *beaten[1:]]) == front
    assert robustness.undominated(outside) == []
