"""studies/layers.py: at which layer an LM looks up what its oracle never knew."""

import copy
from dataclasses import replace

import pytest
import tiny
import tiny_facts
import torch

from sae_separation import saebench
from sae_separation.errors import WrongRequest
from sae_separation.evals import depth
from sae_separation.exam import logits_at
from sae_separation.lm import InterventionLM, load_lm
from studies import layers


def test_a_crossing_is_the_lm_made_of_the_layers_of_both(facts_testbed, tmp_path):
    evaluator = tiny_facts.evaluator(facts_testbed)
    other = InterventionLM(
        replace(facts_testbed, lm=load_lm(tiny.save_lm(tmp_path / "other", seed=5), "cpu"))
    )
    lm, exam, n = evaluator.lm, evaluator.questions.exam(saebench.FORGET, None), len(facts_testbed.layers)
    found = layers.crossed(other, lm, exam, list(range(n - 1)))
    for layer in range(n - 1):
        both = copy.deepcopy(lm.lm)
        both.model.embed_tokens = other.lm.model.embed_tokens
        for lower in range(layer + 1):
            both.model.layers[lower] = other.lm.model.layers[lower]
        expected = exam.probs(
            lambda batch, both=both: logits_at(both, batch.tokens, batch.positions, **batch.seen(both))
        )
        assert torch.allclose(found[layer], expected, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    own, _ = evaluator.questions.ask(saebench.FORGET)
    assert torch.allclose(layers.crossed(lm, lm, exam, [0])[0], own, atol=1e-5)


def test_a_sweep_is_of_questions_that_the_lm_knows_and_of_both_readouts(facts_testbed, tmp_path):
    evaluator = tiny_facts.evaluator(replace(facts_testbed, layer=0))
    random = load_lm(tiny.save_lm(tmp_path / "other", seed=5), "cpu")
    evaluator.oracle = InterventionLM(replace(facts_testbed, lm=random, layer=0))
    evaluator.questions.known[saebench.FORGET][20:] = False
    found = layers.swept(evaluator, [0, 1])
    exam = evaluator.questions.exam(saebench.FORGET, tuple(range(20)))
    assert found["forget"]["lm_above"] == pytest.approx(
        layers.right(evaluator.oracle, evaluator.lm, exam, [0, 1])
    )
    for whose, of in (("lm", depth.of_lm), ("oracle", depth.of_oracle)):
        by_subject = tiny.there(of(evaluator))
        (retain,) = by_subject.keys() - {saebench.FORGET}
        assert found["retain"][f"readout_{whose}"] == pytest.approx(by_subject[retain][:2])


def test_an_lm_without_an_oracle_is_refused(facts_testbed):
    with pytest.raises(WrongRequest, match="tiny has no oracle"):
        layers.row_of(facts_testbed)


def test_the_layer_is_where_more_is_looked_up_before_than_above():
    fit = {"oracle_above": [1.0, 1.0, 0.95], "lm_above": [1.0, 1.0, 0.97]}
    forget = {"oracle_above": [0.2, 0.5, 0.9], "lm_above": [0.9, 0.6, 0.3]}
    assert layers.looked_up([3, 6, 9], forget, fit) == 9
    assert layers.looked_up([3, 6], forget, fit) is None
    assert layers.looked_up([3, 6, 9], forget, fit | {"lm_above": [1.0, 1.0, 0.5]}) is None, "they do not fit"


def test_a_given_lm_has_a_row_beside_the_shipped_one_of_its_world(facts_testbed):
    of_world = replace(facts_testbed, describe={"world_seed": 0})
    assert layers.name_of("smollm2-taught", "", of_world) == "smollm2-taught, world 0"
    assert layers.name_of("smollm2-taught", "mine/lm", of_world) == "smollm2-taught, mine/lm"
