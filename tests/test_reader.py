"""pieces.py and reader.py: what a reader learns from, what it reads, and that it learns."""

import random
from typing import Any

import pytest
import torch

from micro_pythia.world import World
from sae_separation import export, pieces, reader, saebench
from sae_separation.evals.evaluator import Evaluator
from sae_separation.exam import Residuals, special_ids
from sae_separation.forms import FORMS, Asker
from studies import readers

HEAD = "The following are multiple choice questions (with answers) about biology."
QUIZ = f"{HEAD}\nWho?\nA. x\nB. y\n\nWhat?\nA. x"
SIZE = 64


@pytest.fixture(scope="module")
def generator():
    return torch.Generator().manual_seed(0)


# ---- what it learns from


def test_a_document_falls_into_questions_under_their_header_or_into_sentences():
    assert pieces.pieces(QUIZ) == (HEAD, ["Who?\nA. x\nB. y", "What?\nA. x"])
    told = "A lives in B. It is old.\n\nC is D."
    assert pieces.pieces(told) == ("", ["A lives in B.", "It is old.", "C is D."])
    assert saebench.header("biology").startswith(pieces.HEADER)


def test_pieces_of_both_domains_come_one_by_one_under_any_header():
    other = QUIZ.replace("biology", "history")
    every = pieces.mixed_pieces({True: [QUIZ], False: [other, "Prose of. Retain text."]}, random.Random(0))
    drawn = [next(every) for _ in range(600)]
    assert 240 < sum(forget for _, forget in drawn) < 360
    heads = {
        (text.partition("\n")[0] if text.startswith("The foll") else "", forget) for text, forget in drawn
    }
    assert {h.rpartition(" ")[2] for h, forget in heads if forget} == {"", "biology.", "history."}
    assert {text for text, forget in drawn if "Retain" in text} == {"Retain text."}


def test_text_without_headers_has_none():
    every = pieces.mixed_pieces({True: [QUIZ], False: ["Prose. More."]}, random.Random(0))
    assert {text for text, forget in (next(every) for _ in range(100)) if not forget} == {"Prose.", "More."}


def test_mixed_contexts_know_of_every_token_whose_it_is(micro):
    tokens, labels = pieces.mixed_contexts(micro, 64, SIZE, seed=0)
    assert tokens.shape == labels.shape == (64, SIZE)
    special = torch.isin(tokens, special_ids(micro.tokenizer))
    assert torch.equal(labels == -1, special) and special[:, 0].all()
    assert 0.4 < labels[:, 1:].float().mean() < 0.6
    told = [micro.tokenizer.decode(tokens[labels == of]) for of in (0, 1)]
    named = [[name for name in World(0).entities["geography"] if name in text] for text in told]
    assert len(named[0]) > 10 and not named[1]
    other, _ = pieces.mixed_contexts(micro, 64, SIZE, seed=0, held_out=True)
    assert not torch.equal(tokens, other)
    again, _ = pieces.mixed_contexts(micro, 64, SIZE, seed=0)
    assert torch.equal(tokens, again)


def test_other_words_stand_for_words_and_never_for_what_makes_a_question(micro, generator):
    tokens, _ = pieces.mixed_contexts(micro, 64, SIZE, seed=0)
    changed = pieces.with_others(tokens, micro.tokenizer, 0.2, generator) != tokens
    assert 0.03 < changed.float().mean() < 0.2
    kept = {micro.tokenizer.decode([i]).strip() for i in tokens[changed].tolist()}
    assert not kept & {"A.", "B", "C", "Answer", "Question", "", "."}


def test_text_without_words_stays_as_it_is(micro, generator):
    tokens = torch.full((2, 8), micro.tokenizer.eos_token_id)
    assert torch.equal(pieces.with_others(tokens, micro.tokenizer, 0.2, generator), tokens)


def test_bigrams_are_counted_and_smoothed_towards_frequencies():
    tokens = torch.tensor([[1, 2, 1, 2], [1, 3, 3, 1]])
    found = pieces.log_bigram(tokens).exp()
    pairs = [(a, b) for row in tokens.tolist() for a, b in zip(row, row[1:])]
    for row, of_row in zip(tokens.tolist(), found.tolist()):
        for a, b, p in zip(row, row[1:], of_row):
            share = sum(y == b for _, y in pairs) / len(pairs)
            wanted = (pairs.count((a, b)) + pieces.ADDED * share) / (
                sum(x == a for x, _ in pairs) + pieces.ADDED
            )
            assert p == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def marked(micro):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "N_CONTEXTS", 96)
        return Evaluator(micro, context_size=128, n_contexts=16).once(reader.marked_text)


def test_what_counts_is_what_the_lm_knows_and_a_bigram_does_not(micro, marked):
    """On the contexts as they are; those with other words are told apart by where they stand."""
    tokens, labels = pieces.mixed_contexts(micro, 64, 128, seed=0)
    assert len(marked.x) == 96 and torch.equal(marked.forget[:64], labels == 1)
    log_p = micro.lm(tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    gain = (log_p - pieces.log_bigram(tokens)).clamp(min=0)
    counts = marked.weight[:64, :-1] > 0
    assert torch.allclose(marked.weight[:64, :-1][counts], gain[counts], atol=1e-3)
    ends = labels[:, 1:] != labels[:, :-1]
    assert not (counts & ends).any() and not (marked.weight[:, -1] > 0).any()
    clear = ~ends & (gain > 0.51) & (labels[:, :-1] >= 0)
    assert counts[clear].all() and (gain[counts] < 0.49).float().mean() < 0.05
    at = marked.trained[:64] & counts.new_ones(64, 128)
    assert torch.allclose(marked.x[:64][at].float(), micro_resid(micro, tokens)[at], rtol=1e-2, atol=1e-2)
    assert not marked.x[~marked.trained].any()


def test_an_lm_that_knows_nothing_of_the_text_is_refused(micro, monkeypatch):
    monkeypatch.setattr(reader, "N_CONTEXTS", 6)
    monkeypatch.setattr(reader, "log_bigram", lambda tokens: torch.zeros(len(tokens), tokens.shape[1] - 1))
    with pytest.raises(reader.RunFailed, match="the retain text better than a bigram .* leave this arm out"):
        reader.marked_text(Evaluator(micro, context_size=128, n_contexts=16))


def micro_resid(micro, tokens):
    return micro.lm(tokens, output_hidden_states=True).hidden_states[micro.layer + 1]


# ---- what it reads


def test_means_are_of_what_came_before_and_of_nothing_that_follows():
    z = torch.randn(2, 7, 3)
    for decay in reader.DECAYS:
        found, mean = reader.mean_before(z, decay, {}), torch.zeros(2, 3)
        for t in range(7):
            assert torch.allclose(found[:, t], mean, atol=1e-6)
            mean = decay * mean + (1 - decay) * z[:, t]


def test_of_several_ends_in_a_row_each_has_the_means_that_it_has_alone():
    """A stem of three tokens, and two ends of two."""
    places = torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    sees = torch.ones(7, 7).tril().bool()
    sees[5:, 3:5] = False
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~sees, torch.finfo(torch.float32).min)
    z = torch.randn(1, 7, 3)
    found = reader.mean_before(z, 0.9, {"position_ids": places, "attention_mask": mask})
    for end in ([3, 4], [5, 6]):
        alone = reader.mean_before(z[:, [0, 1, 2, *end]], 0.9, {})
        assert torch.allclose(found[:, [0, 1, 2, *end]], alone, atol=1e-6)


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_features_are_those_of_the_sae(kind, generator):
    names = {"W_enc": (6, 10), "b_enc": (10,), "W_dec": (10, 6), "b_dec": (6,)}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in names.items()}
    if kind == "jumprelu":
        weights["threshold"] = torch.rand(10, generator=generator)
    sae = export.build(kind, weights)
    x = torch.randn(4, 5, 6, generator=generator)
    found = reader.features_of(x, reader.of_features(sae))
    assert (found > 0).any() and torch.allclose(found, sae.encode(x), atol=1e-5)


def test_features_that_compete_are_refused(generator):
    weights = {"W_enc": torch.randn(6, 10), "b_enc": torch.zeros(10), "W_dec": torch.randn(10, 6)}
    sae = export.build("topk", weights | {"b_dec": torch.zeros(6)}, k=3)
    with pytest.raises(reader.WrongRequest, match="are topk"):
        reader.of_features(sae)


def score_by_hand(x, trained, tensors) -> torch.Tensor:
    """Of one row, token by token."""
    f = torch.stack([(row - tensors["shift"]) / tensors["size"] * on for row, on in zip(x, trained)])
    out = []
    for t in range(len(x)):
        hidden = tensors["b_in"] + f[t] @ tensors["W_in"][0]
        for d, W in zip(reader.DECAYS, tensors["W_in"][1:]):
            mean = sum(((1 - d) * d ** (k - 1) * f[t - k] for k in range(1, t + 1)), torch.zeros(x.shape[1]))
            hidden = hidden + mean @ W
        out.append(torch.relu(hidden) @ tensors["w_out"] + tensors["b_out"])
    return torch.cat(out)


def some_tensors(generator, n_units=4, hidden=5) -> dict[str, Any]:
    shapes = {"W_in": (3, n_units, hidden), "b_in": (hidden,), "w_out": (hidden,), "b_out": (1,)}
    drawn = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return drawn | {"shift": torch.randn(n_units, generator=generator), "size": torch.ones(n_units) * 2}


@pytest.mark.parametrize("hidden", [3, 5])  # less and more than units: averaged in another order
def test_the_score_is_the_formula_and_looks_at_no_token_that_is_not_trained_on(hidden, generator):
    x, tensors = torch.randn(3, 6, 4, generator=generator), some_tensors(generator, hidden=hidden)
    trained = torch.ones(3, 6, dtype=torch.bool)
    trained[:, 0] = False
    found = reader.score(Residuals(x, trained, trained.long()), tensors)
    wanted = torch.stack([score_by_hand(row, on, tensors) for row, on in zip(x, trained)])
    assert torch.allclose(found, wanted, atol=1e-5)
    at = torch.rand(3, 6, generator=generator) < 0.5
    some = reader.hidden_of(reader.units(x, trained, tensors), tensors, {}, at=at)
    assert torch.allclose(some @ tensors["w_out"] + tensors["b_out"], wanted[at], atol=1e-5)
    x[:, 0] = torch.inf
    assert torch.allclose(reader.score(Residuals(x, trained, trained.long()), tensors), wanted, atol=1e-5)


def test_rows_of_the_embedded_lm_hold_one_end_each(micro):
    asker = Asker(micro, sum(micro.questions.values(), [])[::40], 128)
    exams = [made[0] for form in FORMS[::5] if (made := asker.exam(form))]
    assert len(exams) > 10 and not any(b.seen(micro.lm) for exam in exams for b in exam.batches)


# ---- the fit


@pytest.fixture(scope="module")
def in_context(generator) -> reader.Marked:
    """Whether a token is of forget text is told by the one before."""
    x = torch.randn(400, 16, 4, generator=generator)
    forget = torch.zeros(400, 16, dtype=torch.bool)
    forget[:, 1:] = x[:, :-1, 0] > 0
    weight = torch.rand(400, 16, generator=generator)
    weight[:, 0] = 0
    return reader.Marked(x.half(), torch.ones_like(forget), forget, weight)


@pytest.mark.parametrize("featured", [False, True])
def test_a_reader_learns_what_came_before_tells(featured, in_context, generator):
    sae = {"W_enc": torch.cat([torch.eye(4), -torch.eye(4)], 1), "b_enc": torch.zeros(8)}
    features = sae | {"threshold": torch.zeros(8)} if featured else None
    tensors = reader.fitted(in_context, 8, 300, generator, features)
    assert not any(t.requires_grad for t in tensors.values())
    read = Residuals(in_context.x.float(), in_context.trained, in_context.trained.long())
    right = ((reader.score(read, tensors) > 0) == in_context.forget)[:, 1:]
    assert right.float().mean() > 0.7  # means hold older tokens, too
    f = reader.units(read.resid, read.trained, tensors)
    alone = reader.hidden_of(f, tensors, {}, heeded=0.0) @ tensors["w_out"] + tensors["b_out"]
    assert ((alone > 0) == in_context.forget)[:, 1:].float().mean() < 0.6


def test_thresholds_are_shares_of_what_counts(in_context, generator):
    tensors = reader.fitted(in_context, 8, 2, generator)
    read = Residuals(in_context.x.float(), in_context.trained, in_context.trained.long())
    scores, retain = reader.score(read, tensors), ~in_context.forget & (in_context.weight > 0)
    whole = in_context.weight[retain].sum()
    cells = reader.thresholds(in_context, tensors)
    assert [cell["retain_share"] for cell in cells] == list(reader.RETAIN_SHARES)
    for cell in cells:
        share = in_context.weight[retain & (scores > cell["threshold"])].sum() / whole
        assert share <= cell["retain_share"] + 1e-6 <= share + 2 / whole


def test_what_is_caught_is_a_share_of_forget_text_at_a_share_of_retain_text():
    """Retain text scores 0 to 9 and counts alike; of forget text half scores above its highest tenth."""
    scores = torch.tensor([[*range(10), 8.5, 9.5, 3.0, 20.0]])
    forget = torch.tensor([[False] * 10 + [True] * 4])
    weight = torch.ones(1, 14)
    weight[0, -1] = 0
    weight[0, 11] = 2
    marked = reader.Marked(torch.zeros(1, 14, 1), torch.ones_like(forget), forget, weight)
    assert readers.caught(scores, marked, 0.1) == pytest.approx(2 / 4)
    assert readers.caught(scores, marked, 0.2) == pytest.approx(3 / 4)
