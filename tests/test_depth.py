"""The depth of removal: a linear readout of the values, layer by layer."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_facts
import torch
from tiny_facts import VALUES, OneHook

from sae_separation import evals
from sae_separation.evals import cells
from sae_separation.evals import depth as module
from sae_separation.evals.depth import depth, depth_score, material, readout_of, streams
from sae_separation.lm import InterventionLM


def measured(facts_evaluator, method) -> tuple[dict, dict, list[str]]:
    return depth(facts_evaluator, method.chosen_on(facts_evaluator), 0, "it")


def test_what_changes_nothing_has_depth_0_and_what_overwrites_every_token_depth_1(facts_evaluator):
    before = [p.clone() for p in facts_evaluator.lm.lm.parameters()]
    metrics, details, notes = measured(facts_evaluator, OneHook(tiny_facts.nothing))
    assert metrics["depth_score"] == metrics["depth_score_4bit"] == 0
    assert metrics["readout_forget"] == metrics["lm_readout_forget"] > 0.5
    assert metrics["readout_retain"] == metrics["lm_readout_retain"] > 0.5
    assert metrics["oracle_readout_forget"] is None and "no oracle: chance" in notes[0]
    assert details["layers"] == [1, 2] and set(details["by_layer"]) == {"biology", "history"}
    over, details, _ = measured(facts_evaluator, OneHook(tiny_facts.retain_mean))
    assert over["depth_score"] > 0.9 and over["depth_score_4bit"] > 0.9
    assert details["by_layer"]["biology"]["intervention"][0] == details["chance"] == 0.25
    assert over["readout_retain"] < 0.4 and over["lm_readout_retain"] == metrics["lm_readout_retain"]
    assert all(torch.equal(p, q) for p, q in zip(facts_evaluator.lm.lm.parameters(), before))
    assert facts_evaluator.lm.hook is None


def test_the_oracle_has_depth_1_and_stands_where_chance_stood(facts_testbed):
    """An LM whose tokens do not see one another knows nothing of the question at its end."""
    facts_evaluator = tiny_facts.evaluator(facts_testbed)
    blind = copy.deepcopy(facts_testbed.lm)
    for layer in blind.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    facts_evaluator.oracle = InterventionLM(replace(facts_testbed, lm=blind))
    metrics, details, notes = measured(facts_evaluator, OneHook(on_oracle=True))
    assert metrics["depth_score"] == metrics["depth_score_4bit"] == 1 and not notes
    assert metrics["readout_forget"] == metrics["oracle_readout_forget"] < metrics["lm_readout_forget"]
    assert details["by_layer"]["biology"]["oracle"] == details["by_layer"]["biology"]["intervention"]


def test_without_an_allowed_cell_nothing_is_switched_off(facts_evaluator):
    of_all = OneHook(tiny_facts.retain_mean)
    assert cells.chosen_for(facts_evaluator, of_all).cell is None, "it keeps nothing"
    metrics, _, notes = depth(facts_evaluator, of_all, 0, "it")
    assert metrics["depth_score"] == 0 and any("nothing was switched off" in note for note in notes)


def test_the_cell_is_chosen_once_an_sae(facts_evaluator, monkeypatch):
    made, method = [], OneHook(tiny_facts.nothing)

    def chosen(facts_evaluator, switch):
        made.append(({"n": len(made)}, []))
        return made[-1]

    monkeypatch.setattr(cells, "chosen", chosen)
    assert [cells.chosen_for(facts_evaluator, method).cell for _ in range(2)] == 2 * [{"n": 0}]
    assert cells.chosen_for(facts_evaluator, OneHook(tiny_facts.nothing)).cell == {"n": 1} and len(made) == 2


def test_the_stream_is_the_lms_own_after_every_layer_from_the_hook_up(facts_evaluator):
    asked = facts_evaluator.once(material)
    x = streams(facts_evaluator.lm, asked.batches, None)
    prompts = [prompt for readout in asked.readouts for some in readout.prompts for prompt in some]
    assert len(x) == len(prompts)
    tokenizer, i = facts_evaluator.testbed.tokenizer, 30
    ids = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer(prompts[i], add_special_tokens=False)["input_ids"]]]
    )
    with torch.no_grad():
        hidden = facts_evaluator.lm.lm.model(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(x[i, 0], hidden[2][0, -1], atol=1e-4)
    last = facts_evaluator.lm.lm.model.norm(x[i, 1])  # hidden_states end behind the last norm
    assert torch.allclose(last, hidden[3][0, -1], atol=1e-4)


def test_folds_part_entities_and_leave_no_value_out_of_training():
    asked = [tiny_facts.question("biology", "hue", i) for i in range(24)]
    alone = replace(
        asked[0], entity="Alone", choices=("grey", "red", "blue", "green"), values=("grey", *VALUES)
    )
    asked = [replace(q, values=("grey", *VALUES)) for q in asked] + [alone]
    readout = tiny.there(readout_of("biology", asked))
    assert len(readout.prompts) == 24 and readout.n_values == 4, "no other has its value"
    assert readout.prompts[5][0] == f"Question: {asked[5].question}\nAnswer:"
    assert readout.prompts[5][1] == f"Question: {asked[5].rephrased}\nAnswer:"
    assert [VALUES[label - 1] for label in readout.labels] == [q.choices[q.answer] for q in asked[:24]]
    for fold in (0, 1, 2):
        assert set(readout.labels[readout.folds != fold]) == {1, 2, 3, 4}
        assert (readout.folds == fold).sum() == 8
    assert readout_of("biology", asked[:4]) is None
    only_once = [replace(q, rephrased="") for q in asked]
    assert [len(some) for some in tiny.there(readout_of("biology", only_once)).prompts] == [1] * 24


def test_a_readout_finds_what_is_there_and_not_what_it_was_only_fitted_on():
    rng = np.random.default_rng(0)
    readout = tiny.there(readout_of("biology", [tiny_facts.question("biology", "hue", i) for i in range(24)]))
    noise = rng.normal(size=(24, 2, 64))
    assert readout.accuracy(noise) < 0.5
    told = noise.copy()
    told[np.arange(24), :, readout.labels] += 20
    told[:, :, 8:] = 0
    assert readout.accuracy(told) == 1
    of_entities = np.eye(24)[:, None].repeat(2, 1) * 20
    assert readout.accuracy(of_entities) < 0.5, "an entity says nothing of another"
    assert readout.accuracy(np.zeros((24, 2, 64))) == 0.25


@pytest.mark.parametrize(
    "lm, reference, under, score",
    [
        ([0.8, 0.6], [0.2, 0.2], [0.8, 0.6], 0.0),
        ([0.8, 0.6], [0.2, 0.2], [0.2, 0.2], 1.0),
        ([0.8, 0.6], [0.2, 0.2], [0.5, 0.5], (0.5 + 0.25) / 2),
        ([0.8, 0.6], [0.2, 0.2], [0.9, 0.1], 0.5),
        ([0.8, 0.25], [0.2, 0.2], [0.5, 0.9], 0.5),
        ([0.25, 0.25], [0.2, 0.2], [0.2, 0.2], None),
    ],
)
def test_the_score_is_the_mean_way_from_the_lm_to_the_reference(lm, reference, under, score):
    found = depth_score(lm, reference, under)
    assert found == (score if score is None else pytest.approx(score))


def test_questions_that_say_nothing_of_entities_leave_depth_undefined(facts_testbed):
    facts_evaluator = tiny_facts.evaluator(
        replace(facts_testbed, questions=tiny_facts.questions(about=False))
    )
    metrics, details, notes = measured(facts_evaluator, OneHook(tiny_facts.nothing))
    assert set(metrics) == set(module.METRICS) and set(metrics.values()) == {None} and details == {}
    assert notes == [module.NO_RELATIONS]


def test_depth_is_made_where_it_is_named():
    (row,) = evals.rows_of(("depth",))
    assert row.asks and row not in evals.rows_of(())
    assert {*row.shown, *row.columns} <= set(module.METRICS)
