"""studies/gates.py: what the gates learn from and read, and the patterns that know the world."""

import random

import pytest
import torch

from micro_pythia.world import FORGET, SHARED, World
from sae_separation.exam import Residuals
from sae_separation.forms import FORMS, Asker
from sae_separation.methods import mlp
from studies import gates

HEAD = "The following are multiple choice questions (with answers) about biology."
QUIZ = f"{HEAD}\nWho?\nA. x\nB. y\n\nWhat?\nA. x"


def test_a_document_falls_into_questions_under_their_header_or_into_sentences():
    assert gates.pieces(QUIZ) == (HEAD, ["Who?\nA. x\nB. y", "What?\nA. x"])
    assert gates.pieces("A lives in B. It is old.\n\nC is D.") == (
        "",
        ["A lives in B.", "It is old.", "C is D."],
    )


def test_pieces_of_both_domains_come_one_by_one_under_any_header():
    other = QUIZ.replace("biology", "history")
    every = gates.mixed_pieces({True: [QUIZ], False: [other, "Prose of. Retain text."]}, random.Random(0))
    drawn = [next(every) for _ in range(600)]
    assert 240 < sum(forget for _, forget in drawn) < 360
    heads = {
        (text.partition("\n")[0] if text.startswith("The foll") else "", forget) for text, forget in drawn
    }
    assert {h.rpartition(" ")[2] for h, forget in heads if forget} == {"", "biology.", "history."}
    assert {text for text, forget in drawn if "Retain" in text} == {"Retain text."}


def test_mixed_contexts_know_of_every_token_whose_it_is(micro):
    tokens, labels = gates.mixed_contexts(micro, 64, seed=0)
    assert tokens.shape == labels.shape == (64, gates.CONTEXT)
    assert (labels[:, 0] == -1).all() and 0.4 < labels[:, 1:].float().mean() < 0.6
    told = [micro.tokenizer.decode(tokens[labels == of]) for of in (0, 1)]
    named = [[name for name in World(0).entities["geography"] if name in text] for text in told]
    assert len(named[0]) > 10 and not named[1]
    other = gates.with_others(tokens, micro, torch.Generator().manual_seed(0))
    changed = other != tokens
    assert 0.03 < changed.float().mean() < gates.REPLACED
    kept = {micro.tokenizer.decode([i]).strip() for i in tokens[changed].tolist()}
    assert not kept & {"A.", "B", "C", "Answer", "Question", "", "."}


def test_context_is_what_came_before_and_nothing_of_what_follows():
    x = torch.randn(2, 7, 3)
    read = gates.seen(x, "context")
    assert (
        read.shape == (2, 7, 9) and torch.equal(read[..., :3], x) and torch.equal(gates.seen(x, "token"), x)
    )
    for i, decay in enumerate(gates.DECAYS, 1):
        mean = torch.zeros(2, 3)
        for t in range(7):
            assert torch.allclose(read[:, t, 3 * i : 3 * i + 3], mean, atol=1e-6)
            mean = decay * mean + (1 - decay) * x[:, t]


def test_rows_of_the_embedded_lm_hold_one_end_each_as_means_of_what_came_before_need(micro):
    asker = Asker(micro, sum(micro.questions.values(), [])[::40], gates.CONTEXT)
    exams = [made[0] for form in FORMS[::5] if (made := asker.exam(form))]
    assert len(exams) > 10 and not any(b.seen(micro.lm) for exam in exams for b in exam.batches)


@pytest.mark.parametrize("regularised", [False, True])
def test_a_probe_learns_and_its_thresholds_are_shares_of_what_counts(regularised):
    draw = torch.Generator().manual_seed(0)
    forget = (torch.rand(4000, generator=draw) < 0.5).float()
    x = torch.randn(4000, 6, generator=draw) + 3 * forget[:, None] * torch.eye(6)[0]
    weight = torch.rand(4000, generator=draw)
    data, gate = gates.Examples(x, forget, weight), gates.Gate(1, "token", regularised=regularised, hidden=8)
    probe = gates.fit(data, gate, d_in=6, steps=200, seed=0)
    assert ((mlp(x, probe) > 0) == (forget > 0.5)).float().mean() > 0.9
    cells = gates.thresholds(data, probe)
    score, retain = mlp(x, probe), forget < 0.5
    for cell in cells:
        share = weight[retain & (score > cell["threshold"])].sum() / weight[retain].sum()
        assert share <= cell["retain_share"] <= share + 2 / weight[retain].sum()


def test_the_ideal_gate_fires_on_forget_facts_alone(micro):
    world = World(0)
    of = {s: next(f for f in world.facts if f.subject == s) for s in (FORGET, SHARED)}
    for which in ("all", "last"):
        ideal = gates.Ideal(micro, world, which)
        for subject, fact in of.items():
            told = fact.relation.sentence.format(e=fact.entity)
            for text in (told, f"Question: {fact.question}\nAnswer:"):
                ids = micro.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                fires = ideal(Residuals(torch.zeros(*ids.shape, 1), ids > 0, ids))[0]
                assert fires[-1] == (subject == FORGET)
                assert fires.sum() == 0 if subject != FORGET else fires.sum() == 1 or which == "all"
