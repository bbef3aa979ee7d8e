"""The evaluation on the embedded LM: asking, intervening, scoring and measuring, against slow or hand-made
answers."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_trainer import train
from tiny import there

import experiment
from sae_separation import saebench
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.evals import unlearning
from sae_separation.evals.core import RATIOS, core, proxy
from sae_separation.evals.corpus import corpus
from sae_separation.evals.evaluator import Evaluator, Firing, Questions, evaluation_contexts, finite
from sae_separation.evals.geometry import geometry
from sae_separation.exam import Batch, Exam, logits_at, special_ids, trained_on
from sae_separation.export import export, load_exported
from sae_separation.interventions import (
    INTERVENTIONS,
    ChosenFeatures,
    firing_share,
    intervene,
    whole_contexts,
)
from sae_separation.lm import InterventionLM
from sae_separation.questions import Question
from sae_separation.text import Text


@pytest.fixture(scope="module")
def evaluator(micro):
    """On a quarter of the questions, with a sweep of few and many features, weakly and strongly."""
    some = {subject: questions[::4] for subject, questions in micro.questions.items()}
    sweep = {"n_features_list": [5, 50], "multipliers": [1, 30]}
    return Evaluator(replace(micro, questions=some, sweep=sweep), context_size=128, n_contexts=32)


@pytest.fixture(scope="module")
def exported(micro, activations, tmp_path_factory):
    """An SAE that has learned something, as read back from disk."""
    config = tiny.config(arm="vanilla", d_sae=1024, target_l0=16.0, tokens=10**6)
    trainer, folder = train(config, activations, steps=200)[0], tmp_path_factory.mktemp("sae")
    export(
        trainer.sae,
        folder,
        {
            "model_name": "micro",
            "hook_name": micro.hook_name,
            "hook_layer": 1,
            "context_size": 128,
            "prepend_bos": True,
        },
    )
    return load_exported(folder)


def test_letter_answers_equal_asking_one_prompt_at_a_time(micro):
    questions = [q for qs in micro.questions.values() for q in qs[:4]]
    exam = Exam(micro.tokenizer, questions, "letter", [(0, 1, 2, 3), (3, 1, 0, 2)])
    got = exam.probs(lambda b: logits_at(micro.lm, b.tokens, b.positions))
    letters = [micro.tokenizer(f" {c}", add_special_tokens=False)["input_ids"][0] for c in "ABCD"]
    row = 0
    for question in questions:
        for permutation in ((0, 1, 2, 3), (3, 1, 0, 2)):
            choices = [question.choices[i] for i in permutation]
            text = (
                "The following are multiple choice questions (with answers) about"
                f" {question.subject}.\n{question.question}"
            )
            text += "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices)) + "\nAnswer:"
            ids = [micro.tokenizer.bos_token_id] + micro.tokenizer(text, add_special_tokens=False)[
                "input_ids"
            ]
            with torch.no_grad():
                slow = micro.lm(torch.tensor([ids])).logits[0, -1].softmax(-1)[letters]
            torch.testing.assert_close(got[row], slow, atol=1e-4, rtol=1e-3)
            row += 1


@pytest.mark.parametrize("shared_stems", [True, False])
def test_cloze_answers_equal_the_mean_log_likelihood_of_each_choice(micro, shared_stems):
    questions = [
        Question("x", "Who is it?", ("Kraelan syndrome", "otters", "two words", "liver"), 1)
    ] + micro.questions["biology"][:3]
    exam = Exam(micro.tokenizer, questions, "cloze", [(0, 1, 2, 3), (1, 0, 3, 2)], shared_stems=shared_stems)
    assert exam.n_rows == (4 if shared_stems else 16)
    with torch.no_grad():
        got = exam.probs(lambda b: logits_at(micro.lm, b.tokens, b.positions, **b.seen(micro.lm))).view(
            len(questions), 2, 4
        )
    for question, probs in zip(questions, got):
        scores = []
        for choice in question.choices:
            stem = [micro.tokenizer.bos_token_id] + micro.tokenizer(
                f"Question: {question.question}\nAnswer:", add_special_tokens=False
            )["input_ids"]
            end = micro.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                told = micro.lm(torch.tensor([stem + end])).logits[0].log_softmax(-1)
            scores.append(sum(told[len(stem) - 1 + i, t] for i, t in enumerate(end)) / len(end))
        torch.testing.assert_close(probs[0], torch.stack(scores).softmax(0), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(probs[1], probs[0][[1, 0, 3, 2]])


def ask(lm, exam):
    return exam.probs_from(partial(lm.ask, read=exam.read))


def test_running_on_from_cached_activations_equals_the_whole_lm(micro, evaluator):
    exam = Exam(micro.tokenizer, micro.questions["history"][:10])
    lm = evaluator.lm
    before = [
        vars(layer).get("forward") for layer in micro.layers
    ]  # nnsight's own, where a test before this one has streamed activations
    whole = ask(lm, exam)
    lm.add_hook("", lambda resid, hook: resid)
    assert torch.equal(ask(lm, exam), whole), "bit for bit: the same rows in the same batch"
    lm.add_hook("", lambda resid, hook: torch.zeros_like(resid))
    assert (ask(lm, exam) - whole).abs().max() > 0.1
    lm.reset_hooks()
    assert all(
        vars(layer).get("forward") is forward for layer, forward in zip(micro.layers, before, strict=True)
    ), "the LM is as it was"
    tokens, resid = (t[:8] for t in evaluator.held_out["retain"])
    contexts = whole_contexts(tokens, resid, evaluator.special)
    logits = micro.lm(contexts.tokens).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), contexts.tokens[:, 1:].flatten(), reduction="none"
    ).view(8, -1)
    torch.testing.assert_close(lm.ce(contexts), losses.mean(1), atol=1e-6, rtol=1e-6)


def test_clamping_the_chosen_features_alone_equals_clamping_within_the_whole_sae(exported, evaluator):
    from sae_bench.evals.unlearning.utils.intervention import anthropic_clamp_resid_SAE_features

    clamp: Any = anthropic_clamp_resid_SAE_features  # of any SAE; its hook is not looked at

    x, chosen = evaluator.held_out["forget"][1][:4], torch.tensor([3, 99, 500])
    features = ChosenFeatures(exported, chosen, torch.ones(1024))
    alone = clamp(x, None, features, [0, 1, 2], 5)
    whole = clamp(x, None, exported, chosen.tolist(), 5)
    torch.testing.assert_close(alone, whole, atol=1e-4, rtol=1e-4)
    contexts = whole_contexts(evaluator.held_out["forget"][0][:4], x, evaluator.special)
    for places, slow in (([0, 1, 2], whole), ([1], clamp(x, None, exported, [99], 5))):
        fast, touched = there(intervene(x, there(contexts.residuals), features, places, 5)), contexts.trained
        torch.testing.assert_close(fast[touched], slow[touched], atol=1e-4, rtol=1e-4)
        assert torch.equal(fast[~touched], x[~touched]), (
            "BOS and EOS, on which no SAE is trained, are left alone"
        )
    assert 4 < (~touched).sum() < 40, "each context starts with a BOS, and documents in it end with EOS"
    assert (whole - x).abs().max() > 0.1, "the comparison would be empty"


@pytest.mark.parametrize(
    "activation", ["relu", "batchtopk"]
)  # features that are encoded alone, and with all others
def test_clamping_knows_layer_normalised_saes(activation, evaluator, tmp_path):
    """Against the definition; SAEBench's clamp decodes twice, and sae_lens forgets a layer norm after the
    first time."""
    sae = experiment.OrthogonalSAE(128, 64, 0, activation=activation, layer_norm=True)
    export(
        sae,
        tmp_path,
        {"model_name": "micro", "hook_name": "h", "hook_layer": 1, "context_size": 128, "prepend_bos": True},
    )
    sae = load_exported(tmp_path)
    tokens, x = (t[:4] for t in evaluator.held_out["forget"])
    features = ChosenFeatures(sae, torch.tensor([3, 9, 50]), torch.ones(64))
    f = sae.encode(x)
    plain = sae.decode(f)
    f = sae.encode(x)
    f[:, 1:, features.chosen] = torch.where(f[:, 1:, features.chosen] > 0, -5.0, 0.0)
    wanted = x + sae.decode(f) - plain
    contexts = whole_contexts(tokens, x, evaluator.special)
    clamped = there(intervene(x, there(contexts.residuals), features, [0, 1, 2], 5))
    torch.testing.assert_close(clamped[contexts.trained], wanted[contexts.trained], atol=1e-4, rtol=1e-4)
    assert (wanted - x).abs().max() > 0.1


def test_remembered_answers_equal_saebenchs_clamp_asked_afresh(exported, evaluator, micro):
    """Nested feature sets, of which later ones find many rows remembered, against SAEBench's hook on all
    rows."""
    from sae_bench.evals.unlearning.utils.intervention import anthropic_clamp_resid_SAE_features

    clamp: Any = anthropic_clamp_resid_SAE_features  # of any SAE; its hook is not looked at

    firing = evaluator.firing(exported)
    features = evaluator.choose(exported, firing.rates, firing.unit, [0.01, 0.1])
    exam, lm = (
        Exam(micro.tokenizer, micro.questions["biology"][:30] + micro.questions["history"][:30]),
        evaluator.lm,
    )
    lm.forget_answers()
    asked = 0
    for n in (1, 2, 3, 40):
        lm.add_hook("", partial(intervene, sae=features, features_to_ablate=list(range(n)), multiplier=3))
        fast = ask(lm, exam)
        lm.add_hook("", partial(clamp, sae=features, features_to_ablate=list(range(n)), multiplier=3))
        slow = exam.probs(partial(slow_logits, lm))
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-3)
        asked += exam.n_rows
    lm.reset_hooks()
    remembered = {(batch, *key) for batch, asked in lm.asked.items() for key in asked.answers}
    assert 0 < len(remembered) < asked, "rows were reused"
    lm.add_hook("", partial(intervene, sae=features, features_to_ablate=list(range(40)), multiplier=3))
    lm.forget_answers()
    torch.testing.assert_close(ask(lm, exam), fast, atol=1e-6, rtol=1e-5)  # other batches, other rounding
    lm.reset_hooks()
    assert {(batch, *key) for batch, asked in lm.asked.items() for key in asked.answers} <= remembered


def slow_logits(lm, batch):
    with torch.no_grad(), lm.resumed_from(lm.hook(lm.residuals(batch).resid, hook=None)):
        return logits_at(lm.lm, batch.tokens, batch.positions, **batch.seen(lm.lm))


class ToyLM(torch.nn.Module):
    """Tokens: 0 padding, 1 BOS, 2 "bio" (2, 0), 3 "geo" (0, 2), 4 a word (1, 0) that retain text has now
    and then. One layer, the identity; an answer is right (logit 0 above logit 1, which is 0) while the
    embeddings up to it sum to more than 0.
    """

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=1, hidden_size=2)
        self.layers, self.head = torch.nn.ModuleList([torch.nn.Identity()]), torch.nn.Identity()
        self.table = torch.tensor([[0.0, 0], [0, 0], [2, 0], [0, 2], [1, 0]])
        self.device, self.dtype, self.ran = torch.device("cpu"), torch.float32, 0

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens, use_cache=False):
        self.ran += len(tokens)
        total = self.layers[0](self.table[tokens]).cumsum(1).sum(-1, keepdim=True)
        return SimpleNamespace(logits=self.head(torch.cat([total, torch.zeros_like(total)], -1)))


@pytest.fixture
def toy():
    """The toy LM; an SAE whose feature 0 reads and writes the first direction; six forget and two retain
    questions, right-padded."""
    lm = ToyLM()
    sae = SimpleNamespace(
        W_enc=torch.eye(2),
        W_dec=torch.eye(2),
        b_enc=torch.zeros(2),
        b_dec=torch.zeros(2),
        process_sae_in=lambda x: x,
        cfg=SimpleNamespace(architecture=lambda: "standard", normalize_activations="none"),
    )
    around = dict(lm=lm, layers=lm.layers, layer=0, hook_name="layers.0", alone_up_to=0)
    toy: Any = SimpleNamespace(name="toy", **around)
    asked = InterventionLM(toy)
    tokens = torch.tensor([[1, 2, 2, 0, 0, 0]] * 6 + [[1, 3, 3, 4, 3, 0], [1, 3, 3, 3, 3, 3]])
    trained, last = tokens > 1, (tokens > 0).sum(1, keepdim=True) - 1
    retain = torch.tensor([[1, 3, 3, 3, 4]] * 20)
    features = ChosenFeatures(
        sae,
        torch.tensor([0, 1]),
        torch.ones(2),
        whole_contexts(retain, lm.table[retain], torch.tensor([1])).residuals,
    )
    return asked, features, Batch(tokens, trained, last)


def right(batch, logits):
    return (logits[:, 0, 0] > logits[:, 0, 1]).float()


def test_a_guard_saves_retain_answers_where_the_clamp_does_not(toy):
    """The word of feature 0 in one retain question is as frequent and as strong as in retain text: one
    token of four, activation 1."""
    lm, features, questions = toy
    answers = {}
    for how in INTERVENTIONS:
        lm.add_hook("", partial(intervene, sae=features, features_to_ablate=[0], multiplier=10, how=how))
        answers[how] = lm.ask(questions, right)
    assert features.guard([0]) == 0.25 and features.limit.tolist() == [1.0, 2.0]
    assert answers["clamp"].tolist() == [0] * 6 + [0, 1], "forget and the question with the word are lost"
    assert answers["conditional"].tolist() == answers["guardrail"].tolist() == [0] * 6 + [1, 1]


def test_which_positions_are_clamped(toy):
    lm, features, questions = toy
    residuals = lm.residuals(questions)
    x = residuals.resid
    x[:, -1, 0] = x[:, 0, 0] = 7.0  # padding and BOS fire, and strongly; they are no tokens of the questions
    for how, rows in (
        ("clamp", {0: [1, 2], 6: [3]}),
        ("conditional", {0: [1, 2]}),
        ("guardrail", {0: [1, 2]}),
    ):
        changed = there(intervene(x, residuals, features, [0], 10, how))
        for row in (0, 6, 7):
            at = (changed[row] != x[row]).any(-1).nonzero()[:, 0].tolist()
            assert (
                [p for p in at if questions.trained[row, p]]
                == at
                == [p for p in rows.get(row, []) + ([5] if row == 7 and how != "guardrail" else [])]
            ), (how, row)
        assert (changed[0, 1:3] == torch.tensor([-10.0, 0.0])).all()


def test_padding_does_not_count_in_the_share():
    fires = torch.tensor([[[0, 0], [1, 0], [0, 1], [0, 0], [0, 0], [0, 0]]], dtype=torch.bool)
    trained = torch.tensor([[0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert firing_share(fires, trained).tolist() == pytest.approx([2 / 3])


def test_rows_that_no_intervention_touches_are_not_run_again(toy):
    lm, features, questions = toy
    lm.add_hook("", partial(intervene, sae=features, features_to_ablate=[0], multiplier=10))
    lm.ask(questions, right)
    ran = lm.lm.ran
    lm.add_hook("", partial(intervene, sae=features, features_to_ablate=[0], multiplier=3))
    lm.ask(questions, right)
    assert lm.lm.ran == ran + 7, "the eighth question never fires feature 0"
    for how in ("conditional", "guardrail"):
        lm.add_hook("", partial(intervene, sae=features, features_to_ablate=[0], multiplier=3, how=how))
        lm.ask(questions, right)
    assert lm.lm.ran == ran + 7, "what they clamp was clamped before"


def test_a_guard_that_never_fires_gives_exactly_the_plain_answers(exported, evaluator, micro, monkeypatch):
    monkeypatch.setattr(ChosenFeatures, "guard", lambda self, features: 1.0)
    monkeypatch.setattr(ChosenFeatures, "limit", torch.full((2,), torch.inf))
    exam, lm = Exam(micro.tokenizer, micro.questions["biology"][:20]), evaluator.lm
    plain, features = (
        ask(lm, exam),
        ChosenFeatures(exported, torch.tensor([3, 99]), torch.ones(1024)),
    )
    for how in ("conditional", "guardrail"):
        lm.add_hook("", partial(intervene, sae=features, features_to_ablate=[0, 1], multiplier=30, how=how))
        assert torch.equal(ask(lm, exam), plain)
    lm.reset_hooks()


def test_thresholds_come_from_the_retain_text_of_the_selection(exported, evaluator):
    firing = evaluator.firing(exported)
    features, unit = evaluator.choose(exported, firing.rates, firing.unit, [0.1]), firing.unit
    f = torch.stack(
        [
            (exported.encode(x)[:, features.chosen] / unit[features.chosen])
            for x in evaluator.select["retain"][1]
        ]
    )
    trained = trained_on(evaluator.select["retain"][0], evaluator.special)
    sorted_values = f[trained].sort(0).values
    torch.testing.assert_close(
        features.limit, sorted_values[-(len(sorted_values) // 1000) - 1], atol=1e-4, rtol=1e-4
    )
    assert (features.limit > 0).all(), "these fire on more than a thousandth of the retain tokens"
    assert (evaluator.choose(exported, firing.rates, unit, [0.0005]).limit[2:] == 0).all(), (
        "and these on less: nothing is left alone"
    )
    share = ((f[..., :7] > 0).any(-1) & trained).sum(1) / trained.sum(1)
    assert features.guard(list(range(7))) == pytest.approx(share.quantile(0.95).item(), abs=2e-3)
    assert 0.1 < features.guard(list(range(7))) < 1


def test_what_does_not_depend_on_the_sae_is_made_once(evaluator, exported, monkeypatch):
    made = []

    def make(given):
        assert given is evaluator
        return made.append(1) or object()

    assert evaluator.once(make) is evaluator.once(make) and len(made) == 1
    assert evaluator.firing(exported) is evaluator.firing(exported), "once an SAE"


def test_the_lms_own_answers_are_asked_once_by_what_is_asked(micro, monkeypatch):
    lm, asked = InterventionLM(micro), []
    monkeypatch.setattr(lm, "ask", lambda batch, read: asked.append(batch) or torch.rand(len(batch.rows), 4))
    questions = Questions(micro, lm)
    subject = next(iter(questions.by_subject))
    assert questions.names[subject] in micro.questions
    (first, answers), n = questions.ask(subject, (0, 3, 5)), len(asked)
    assert answers.tolist() == [micro.questions[questions.names[subject]][i].answer for i in (0, 3, 5)]
    assert questions.ask(subject, (0, 3, 5))[0] is first and len(asked) == n
    assert not torch.equal(questions.ask(subject, (0, 3, 6))[0], first) and len(asked) > n
    lm.add_hook("", lambda resid, hook: None)
    assert not torch.equal(questions.ask(subject, (0, 3, 5))[0], first), "an intervention is asked anew"


def test_passes_are_kept_by_content_up_to_a_number_of_bytes():
    passes, tokens = saebench.Passes(most_bytes=100), torch.arange(4)
    kept = passes.once("clean", tokens, lambda: torch.zeros(20))
    assert passes.once("clean", tokens.clone(), lambda: pytest.fail("made again")) is kept
    assert passes.once("ablated", tokens, lambda: torch.ones(5)).sum() == 5, "another kind"
    larger = passes.once("clean", tokens + 1, lambda: torch.ones(2))
    assert passes.once("clean", tokens + 1, lambda: torch.ones(2)) is not larger, "no room is left"


@pytest.mark.slow
def test_sharing_passes_between_saes_leaves_cores_numbers(exported, evaluator, micro, monkeypatch):
    from sae_lens.load_model import HookedProxyLM

    first, again = (core(evaluator, exported, 0, "it") for _ in range(2))
    assert first == again
    for other in (
        HookedProxyLM(micro.lm, micro.tokenizer, hook_names=[micro.hook_name]),
        saebench.shared_proxy(evaluator.lm, micro.tokenizer, most_bytes=0),
    ):
        monkeypatch.setitem(evaluator.made, proxy, other)
        assert core(evaluator, exported, 0, "it")[0] == first[0], "bit for bit"


def test_undefined_ratios_are_null_and_any_other_number_must_be_finite():
    metrics, details = finite(
        "core",
        {"cossim": float("nan"), "mse": 1.0, "n": None},
        {"a": [{"cossim": float("inf")}, 2]},
        RATIOS,
    )
    assert metrics == {"cossim": None, "mse": 1.0, "n": None} and details == {"a": [{"cossim": None}, 2]}
    with pytest.raises(RunFailed, match="core.mse is nan"):
        finite("core", {"mse": float("nan")}, {}, RATIOS)
    with pytest.raises(RunFailed, match="corpus_unlearning.retain_ce_cost is inf"):
        finite("corpus_unlearning", {}, {"sweep": [{"retain_ce_cost": float("inf")}]})


def test_text_too_short_to_evaluate_on_is_known_without_the_lm(micro):
    short = Text(micro.retain.train, micro.retain.held_out.select(range(5)))
    with pytest.raises(WrongRequest, match="retain_text: its .* part holds . contexts of 128 tokens"):
        evaluation_contexts(replace(micro, lm=SimpleNamespace(device="cpu"), retain=short), 128)


def test_units_are_the_mean_active_values(exported, evaluator):
    forget_rate, retain_rate, unit = evaluator.firing(exported)
    alive = (forget_rate + retain_rate > 0).nonzero()[:50, 0]
    in_units = ChosenFeatures(exported, alive, unit)
    f = torch.cat(
        [in_units.encode(r[~torch.isin(t, evaluator.special)]) for t, r in evaluator.select.values()]
    )
    torch.testing.assert_close(f.sum(0) / (f > 0).sum(0), torch.ones(len(alive)), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_too_few_known_questions_give_null_and_the_reason(evaluator, exported, monkeypatch):
    monkeypatch.setattr(unlearning, "MIN_KNOWN", 10_000)
    metrics, _, notes = unlearning.unlearning(evaluator, exported, 0, "none")
    assert (
        metrics["unlearning_score"]
        is metrics["unlearning_score_guardrail"]
        is metrics["random_feature_score_conditional"]
        is None
        and metrics["n_known_forget"] > 30
    )
    assert "10000 of each are needed" in notes[0]


@pytest.mark.slow
def test_an_sae_without_a_selectable_feature_scores_zero(evaluator, exported):
    subjects = list(evaluator.questions.by_subject)
    swept = unlearning.sweeps(
        evaluator,
        exported,
        (np.ones(1024), np.ones(1024)),
        torch.ones(1024),
        "hopeless",
        subjects,
        saebench.SWEEP["retain_thresholds"],
        [0.1],
    )
    for cells, score in swept.values():
        assert score == 0.0 and all(c["n_features"] == 0 and c["forget_accuracy"] == 1.0 for c in cells)
    assert unlearning.accuracy(evaluator, subjects) == (1.0, 1.0), (
        "the LM is right on all its known questions"
    )


@pytest.mark.slow
def test_unlearning_reports_every_intervention_and_its_floor(evaluator, exported):
    metrics, details, notes = unlearning.unlearning(evaluator, exported, 0, "all")
    assert not notes and all(v is not None for v in metrics.values())
    for how, suffix in (("clamp", ""), ("conditional", "_conditional"), ("guardrail", "_guardrail")):
        cells = [c for c in details["sweep"] if c["intervention"] == how]
        allowed = [c["forget_accuracy"] for c in cells if c["retain_accuracy"] >= 0.99]
        assert metrics[f"unlearning_score{suffix}"] == pytest.approx(1 - min([1.0, *allowed]), abs=1e-6)
        assert 1 - metrics[f"forget_accuracy{suffix}"] == pytest.approx(
            metrics[f"unlearning_score{suffix}"], abs=1e-6
        )
        assert {c["retain_threshold"] for c in cells} == (
            {0.001, 0.01} if how == "clamp" else {0.001, 0.01, 0.1}
        )
        assert 0 <= metrics[f"random_feature_score{suffix}"] <= 1


@pytest.mark.slow
def test_corpus_unlearning_is_the_best_gain_within_each_cost(evaluator, exported):
    metrics, details = corpus(evaluator, exported, 0, "it")
    for how, suffix in (("clamp", ""), ("conditional", "_conditional"), ("guardrail", "_guardrail")):
        rows = [row for row in details["sweep"] if row["intervention"] == how]
        for cost in (0.01, 0.05, 0.1):
            within = [row["forget_ce_gain"] for row in rows if row["retain_ce_cost"] <= cost]
            assert metrics[f"forget_ce_gain_at_retain_ce_cost_{cost}{suffix}"] == max([0.0, *within])
    strongest = max(
        (r for r in details["sweep"] if r["intervention"] == "clamp"),
        key=lambda r: (r["multiplier"], r["n_features"]),
    )
    assert strongest["forget_ce_gain"] > 0.05, "clamping forget features hurts forget text"


def test_bootstrap_interval_by_hand():
    cells = [{"forget": np.array([1.0] * 100), "retain": np.ones(300)}]
    assert unlearning.bootstrap_interval(cells, 0) == [0.0, 0.0]
    cells.append({"forget": np.array([0.0] * 40 + [1.0] * 60), "retain": np.ones(300)})
    low, high = unlearning.bootstrap_interval(cells, 0)
    assert low == pytest.approx(0.4 - 1.96 * 0.049, abs=0.03) and high == pytest.approx(
        0.4 + 1.96 * 0.049, abs=0.03
    )
    cells[1]["retain"] = np.array([0.0] * 150 + [1.0] * 150)
    assert unlearning.bootstrap_interval(cells, 0) == [
        0.0,
        0.0,
    ], "a cell that harms retain questions never counts"


def test_geometry_of_a_dictionary_made_by_hand(evaluator, micro, monkeypatch):
    """Forget rows span axes 0-3, one row twice as close; retain rows axes 4-7; shared rows repeat axis 8."""
    W = torch.zeros(10, micro.d_in)
    for i in range(4):
        W[i, i], W[4 + i, 4 + i] = 1.0, 1.0
    W[0, 1] = W[0, 0] = 0.5**0.5  # rows 0 and 1 at 45 degrees: singular values sqrt(1 ± sqrt(.5)), 1, 1
    W[8, 8] = W[9, 8] = 1.0
    forget, retain = torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0, 1.0]), torch.tensor([0.0] * 4 + [1.0] * 6)
    monkeypatch.setattr(evaluator, "firing", lambda sae: Firing(forget, retain, torch.ones(10)))
    metrics, details = geometry(evaluator, type("SAE", (), {"W_dec": W}), 0, "it")
    assert metrics["condition_number_forget"] == pytest.approx(
        ((1 + 0.5**0.5) / (1 - 0.5**0.5)) ** 0.5, rel=1e-5
    )
    assert metrics["condition_number_retain"] == pytest.approx(1.0) and metrics[
        "effective_rank_retain"
    ] == pytest.approx(4.0)
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
    monkeypatch.setattr(evaluator, "firing", lambda sae: Firing(alive, torch.zeros(6), torch.ones(6)))
    metrics, _ = geometry(evaluator, type("SAE", (), {"W_dec": W}), 0, "it")
    assert (
        metrics["n_forget"] == 3
        and metrics["mean_max_cosine"] == 0.0
        and metrics["condition_number_forget"] == pytest.approx(1.0)
    )
    assert (
        metrics["condition_number_retain"] is None and metrics["max_principal_cosine_forget_retain"] is None
    )


def test_the_forget_group_of_an_sae_is_left_alone_on_special_tokens_of_an_exam(toy):
    """BOS in front, and whatever special token stands in a prompt: both fire feature 0 and neither is
    touched."""
    lm, features, _ = toy
    tokens = torch.tensor([[1, 2, 4, 2, 0]])
    batch = Batch(tokens, trained_on(tokens, torch.tensor([0, 1, 4])), torch.tensor([[3]]))
    lm.add_hook("", partial(intervene, sae=features, features_to_ablate=[0], multiplier=10))
    lm.ask(batch, right)
    residuals = lm.residuals(batch)
    changed = intervene(residuals.resid, residuals, features, [0], 10)
    assert (changed != residuals.resid).any(-1).tolist() == [[False, True, False, True, False]]


def test_which_tokens_an_sae_is_trained_on(micro, tmp_path):
    """Neither special tokens nor the first of a row, whatever it is; a pad token that is an ordinary word
    is a word."""
    from transformers import AutoTokenizer

    special = special_ids(micro.tokenizer)
    assert special.tolist() == [micro.tokenizer.eos_token_id], (
        "its answer letters are added tokens, but not special"
    )
    tiny.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert special_ids(tokenizer).tolist() == [
        1,
        2,
        3,
        4,
    ], "EOS, BOS and turn markers; nothing is ever padded"
    tokenizer.pad_token = "a"
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.added_tokens_decoder[tokenizer.pad_token_id].special, "transformers marks it as special"
    assert tokenizer.pad_token_id not in special_ids(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.eos_token_id in special_ids(tokenizer)
    tokens = torch.tensor([[7, 7, 0, 9], [0, 7, 7, 9]])
    assert trained_on(tokens, torch.tensor([0])).tolist() == [
        [False, True, False, True],
        [False, True, True, True],
    ]


def test_training_evaluation_and_exams_agree_on_which_tokens_are_touched(micro, evaluator):
    """Every row that the stream trains on is touched in whole contexts, and no other."""
    stream = experiment.ActivationStream(micro, 128, 4096)
    tokens = evaluator.held_out["forget"][0]
    assert (tokens[:, 1:] == micro.tokenizer.eos_token_id).any(), "the comparison would be empty"
    contexts = whole_contexts(tokens, evaluator.held_out["forget"][1], evaluator.special)
    assert torch.equal(contexts.trained, ~torch.isin(tokens, stream.special))
    for batch in Exam(micro.tokenizer, micro.questions["biology"][:5]).batches:
        assert (
            not batch.trained[:, 0].any()
            and not batch.trained[batch.tokens == micro.tokenizer.eos_token_id].any()
        )


def test_a_batch_that_takes_the_place_of_a_freed_one_gets_answers_of_its_own(toy):
    """Questions asked one batch at a time: Python gives the next batch the address of the last."""
    lm, features, _ = toy
    lm.add_hook("", partial(intervene, sae=features, features_to_ablate=[0], multiplier=10))

    def answer(word: int) -> float:
        tokens = torch.tensor([[1, word, word, word]])
        return lm.ask(Batch(tokens, tokens > 1, torch.tensor([[3]])), right).item()

    assert [answer(word) for word in (3, 2) * 20] == [1.0, 0.0] * 20
    assert not lm.asked and not features.encoded, "nothing is remembered of what is gone"
