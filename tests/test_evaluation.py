"""The evaluation on the embedded LM: asking, intervening, scoring and measuring, against slow or hand-made answers."""

import numpy as np
import pytest
import torch

import experiment
import testbeds


@pytest.fixture(scope="module")
def evaluator(micro):
    return experiment.Evaluator(micro, context_size=128, n_contexts=32)


@pytest.fixture(scope="module")
def exported(short_runs):
    return experiment.load_exported(short_runs / "run_0" / "sae_seed0")


def test_letter_answers_equal_asking_one_prompt_at_a_time(micro):
    questions = [q for qs in micro.questions.values() for q in qs[:4]]
    exam = testbeds.Exam(micro.tokenizer, questions, "letter", [(0, 1, 2, 3), (3, 1, 0, 2)])
    got = exam.probs(lambda b: testbeds.logits_at(micro.lm, b.tokens, b.positions))
    letters = [micro.tokenizer(f" {c}", add_special_tokens=False)["input_ids"][0] for c in "ABCD"]
    row = 0
    for question in questions:
        for permutation in ((0, 1, 2, 3), (3, 1, 0, 2)):
            choices = [question.choices[i] for i in permutation]
            text = f"The following are multiple choice questions (with answers) about {question.subject}.\n{question.question}"
            text += "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices)) + "\nAnswer:"
            ids = [micro.tokenizer.bos_token_id] + micro.tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                slow = micro.lm(torch.tensor([ids])).logits[0, -1].softmax(-1)[letters]
            torch.testing.assert_close(got[row], slow, atol=1e-4, rtol=1e-3)
            row += 1


def test_cloze_answers_equal_the_mean_log_likelihood_of_each_choice(micro):
    questions = [testbeds.Question("x", "Who is it?", ("Kraelan syndrome", "otters", "two words", "liver"), 1)] + micro.questions["biology"][:3]
    exam = testbeds.Exam(micro.tokenizer, questions, "cloze", [(0, 1, 2, 3), (1, 0, 3, 2)])
    with torch.no_grad():
        got = exam.probs(lambda b: testbeds.logits_at(micro.lm, b.tokens, b.positions)).view(len(questions), 2, 4)
    for question, probs in zip(questions, got):
        scores = []
        for choice in question.choices:
            stem = [micro.tokenizer.bos_token_id] + micro.tokenizer(f"Question: {question.question}\nAnswer:", add_special_tokens=False)["input_ids"]
            end = micro.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                told = micro.lm(torch.tensor([stem + end])).logits[0].log_softmax(-1)
            scores.append(sum(told[len(stem) - 1 + i, t] for i, t in enumerate(end)) / len(end))
        torch.testing.assert_close(probs[0], torch.stack(scores).softmax(0), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(probs[1], probs[0][[1, 0, 3, 2]])


def test_running_on_from_cached_activations_equals_the_whole_lm(micro, evaluator):
    exam = testbeds.Exam(micro.tokenizer, micro.questions["history"][:10])
    lm = evaluator.lm
    whole = exam.probs(lm.forward)
    lm.add_hook("", lambda resid, hook: resid)
    torch.testing.assert_close(exam.probs(lm.forward), whole, atol=1e-5, rtol=1e-4)
    lm.add_hook("", lambda resid, hook: torch.zeros_like(resid))
    assert (exam.probs(lm.forward) - whole).abs().max() > 0.1
    lm.reset_hooks()
    assert all("forward" not in vars(layer) for layer in micro.layers), "the LM is as it was"
    tokens, resid = evaluator.held_out["retain"]
    logits = micro.lm(tokens[:8]).logits[:, :-1]
    assert lm.ce(tokens[:8], resid[:8]) == pytest.approx(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:8, 1:].flatten()).item(), abs=1e-4)


def test_clamping_the_chosen_features_alone_equals_clamping_within_the_whole_sae(exported, evaluator):
    from sae_bench.evals.unlearning.utils.intervention import anthropic_clamp_resid_SAE_features as clamp

    x, chosen = evaluator.held_out["forget"][1][:4], torch.tensor([3, 99, 500])
    alone = clamp(x, None, experiment.ChosenFeatures(exported, chosen, torch.ones(1024)), [0, 1, 2], 5)
    whole = clamp(x, None, exported, chosen.tolist(), 5)
    torch.testing.assert_close(alone, whole, atol=1e-4, rtol=1e-4)
    assert (whole - x).abs().max() > 0.1, "the comparison would be empty"


def test_units_are_the_mean_active_values(exported, evaluator):
    forget_rate, retain_rate, unit = evaluator.firing(exported)
    alive = (forget_rate + retain_rate > 0).nonzero()[:50, 0]
    in_units = experiment.ChosenFeatures(exported, alive, unit)
    f = torch.cat([in_units.encode(r[~torch.isin(t, evaluator.special)]) for t, r in evaluator.select.values()])
    torch.testing.assert_close(f.sum(0) / (f > 0).sum(0), torch.ones(len(alive)), atol=1e-3, rtol=1e-3)


def test_too_few_known_questions_give_null_and_the_reason(evaluator, exported, monkeypatch):
    monkeypatch.setattr(experiment, "MIN_KNOWN", 10_000)
    metrics, _, notes = evaluator.unlearning(exported, 0, "none")
    assert metrics["unlearning_score"] is None and metrics["n_known_forget"] > 100
    assert "10000 of each are needed" in notes[0]


def test_an_sae_without_a_selectable_feature_scores_zero(evaluator, exported):
    subjects = list(evaluator.subjects)
    cells, score = evaluator.sweep(exported, np.ones(1024), np.ones(1024), torch.ones(1024), "hopeless", subjects, **experiment.SWEEP)
    assert score == 0.0 and all(c["n_features"] == 0 and c["forget_accuracy"] == 1.0 for c in cells)


def test_the_lm_is_right_on_all_its_known_questions(evaluator, exported):
    evaluator.sweep(exported, np.ones(1024), np.zeros(1024), torch.ones(1024), "probe", list(evaluator.subjects), retain_thresholds=[0.001], n_features_list=[1], multipliers=[1])
    assert evaluator._accuracy(list(evaluator.subjects)) == (1.0, 1.0)


def test_corpus_unlearning_is_the_best_gain_within_each_cost(evaluator, exported):
    metrics, details = evaluator.corpus(exported)
    for cost in (0.01, 0.05, 0.1):
        within = [row["forget_ce_gain"] for row in details["sweep"] if row["retain_ce_cost"] <= cost]
        assert metrics[f"forget_ce_gain_at_retain_ce_cost_{cost}"] == max([0.0, *within])
    strongest = max(details["sweep"], key=lambda r: (r["multiplier"], r["n_features"]))
    assert strongest["forget_ce_gain"] > 0.05, "clamping forget features hurts forget text"


def test_bootstrap_interval_by_hand():
    cells = [{"forget": np.array([1.0] * 100), "retain": np.ones(300)}]
    assert experiment.bootstrap_interval(cells, 0) == [0.0, 0.0]
    cells.append({"forget": np.array([0.0] * 40 + [1.0] * 60), "retain": np.ones(300)})
    low, high = experiment.bootstrap_interval(cells, 0)
    assert low == pytest.approx(0.4 - 1.96 * 0.049, abs=0.03) and high == pytest.approx(0.4 + 1.96 * 0.049, abs=0.03)
    cells[1]["retain"] = np.array([0.0] * 150 + [1.0] * 150)
    assert experiment.bootstrap_interval(cells, 0) == [0.0, 0.0], "a cell that harms retain questions never counts"


def test_geometry_of_a_dictionary_made_by_hand(evaluator, micro, monkeypatch):
    """Forget rows span axes 0-3 with one row twice as close, retain rows axes 4-7, shared rows repeat axis 8."""
    W = torch.zeros(10, micro.d_in)
    for i in range(4):
        W[i, i], W[4 + i, 4 + i] = 1.0, 1.0
    W[0, 1] = W[0, 0] = 0.5**0.5  # rows 0 and 1 at 45 degrees: singular values sqrt(1 ± sqrt(.5)), 1, 1
    W[8, 8] = W[9, 8] = 1.0
    forget, retain = torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0, 1.0]), torch.tensor([0.0] * 4 + [1.0] * 6)
    monkeypatch.setattr(evaluator, "firing", lambda sae: (forget, retain, torch.ones(10)))
    metrics, details = evaluator.geometry(type("SAE", (), {"W_dec": W}))
    assert metrics["condition_number_forget"] == pytest.approx(((1 + 0.5**0.5) / (1 - 0.5**0.5)) ** 0.5, rel=1e-5)
    assert metrics["condition_number_retain"] == pytest.approx(1.0) and metrics["effective_rank_retain"] == pytest.approx(4.0)
    assert metrics["condition_number_shared"] is None, "two equal rows have no condition number"
    assert metrics["effective_rank_shared"] == pytest.approx(1.0)
    assert metrics["max_principal_cosine_forget_retain"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["omega_between_domains"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["frac_pairs_above_0.2"] == pytest.approx(4 / 90)
    assert metrics["mean_max_cosine"] == pytest.approx((2 * 0.5**0.5 + 2) / 10)
    assert metrics["omega"] == pytest.approx(micro.d_in * (2 * 0.5 + 2) / 90)


def test_dead_features_do_not_enter_the_geometry(evaluator, micro, monkeypatch):
    W = torch.eye(micro.d_in)[:6]
    W[5] = W[0]  # a dead twin
    alive = torch.tensor([1.0, 1, 1, 0, 0, 0])
    monkeypatch.setattr(evaluator, "firing", lambda sae: (alive, torch.zeros(6), torch.ones(6)))
    metrics, _ = evaluator.geometry(type("SAE", (), {"W_dec": W}))
    assert metrics["n_forget"] == 3 and metrics["mean_max_cosine"] == 0.0 and metrics["condition_number_forget"] == pytest.approx(1.0)
    assert metrics["condition_number_retain"] is None and metrics["max_principal_cosine_forget_retain"] is None
