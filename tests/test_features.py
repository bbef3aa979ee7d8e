"""Features, answers and prompts as they are told: on a tiny LM with a random SAE, against the LM run as it is
with a hook among its layers; and the pages that are made of them."""

import base64
import contextlib
import json
import zlib

import numpy as np
import pytest
import tiny_facts
import torch
from tiny_facts import OneHook

from sae_separation import evals
from sae_separation.evals import answers, cells, features
from sae_separation.exam import logits_at, trained_on
from sae_separation.plots import pages


@pytest.fixture(scope="module")
def sae():
    return tiny_facts.random_sae()


@pytest.fixture(scope="module")
def told(facts_evaluator, sae):
    """Metrics and details under a cell of two features."""
    switch = cells.FeatureSwitch(facts_evaluator, sae)
    switch.settings = switch.settings | {"retain_thresholds": [1.0], "n_features_list": [2, 30]}
    grid = switch.cells_of([7, 3, 11], {"retain_threshold": 1.0})
    facts_evaluator.chosen[sae] = grid[-1] | {"n_features": 2, "features": [7, 3], "multiplier": 3}, grid
    return features.features(facts_evaluator, sae, 0, "it")


@contextlib.contextmanager
def hooked(lm, change):
    """Inside, change(stream [row, pos, D]) is what the hook layer puts out."""
    handle = lm.layers[lm.layer].register_forward_hook(lambda module, args, out: change(out))
    try:
        yield
    finally:
        handle.remove()


def said_by_hand(lm, exam, change) -> list[int]:
    """Places of the answers, the whole LM run for each batch; change(stream, batch)."""

    def read(batch):
        with torch.no_grad(), hooked(lm, lambda out: change(out, batch)):
            return exam.read(batch, logits_at(lm.lm, batch.tokens, batch.positions, **batch.seen(lm.lm)))

    return exam.said(read).tolist()


def test_the_numbers_of_features_are_those_of_the_text(facts_evaluator, sae, told):
    metrics, details = told
    firing = facts_evaluator.firing(sae)
    alive = (firing.forget + firing.retain > 0).nonzero()[:, 0].tolist()
    assert metrics["n_alive"] == len(alive) == len(details["alive"]["feature"]) and metrics["n_clamped"] == 2
    shown = details["features"]
    assert [f["feature"] for f in shown[:2]] == [7, 3] and len(shown) > 10
    assert [f["in_cell"] for f in shown] == [True, True] + [False] * (len(shown) - 2)
    assert all(f["affinity"] > 0 for f in shown[2:]), "the others lean to forget text"
    order = np.array([details["alive"][k] for k in ("forget", "retain")])
    affinity = (order[0] - order[1]) / order.sum(0)
    assert (np.diff(affinity) < 0.01).all()
    W = sae.W_dec
    for f in shown:
        i = f["feature"]
        for key, rate in (("forget", firing.forget), ("retain", firing.retain), ("mean", firing.unit)):
            assert f[key] == pytest.approx(rate[i].item(), rel=0.01)
        near = sorted((j for j in alive if j != i), key=lambda j: -(W[i] @ W[j]).item())[:5]
        assert [j for j, _ in f["neighbours"]] == near
        assert f["neighbours"][0][1] == pytest.approx((W[i] @ W[near[0]]).item(), abs=0.01)
    assert [f["cells"] for f in shown[:2]] == [{"retain_threshold 1.0": 2}] * 2
    assert all(f["cells"] == ({"retain_threshold 1.0": 3} if f["feature"] == 11 else {}) for f in shown[2:])


def test_contexts_are_the_held_out_ones_that_a_feature_fires_most_in(facts_evaluator, sae, told):
    decode = facts_evaluator.testbed.tokenizer.decode
    for f in told[1]["features"][:6]:
        best = []
        for domain, (tokens, resid) in facts_evaluator.held_out.items():
            fires = sae.encode(resid)[..., f["feature"]] * trained_on(tokens, facts_evaluator.special)
            for ids, row in zip(tokens.tolist(), fires):
                at = int(row.argmax())
                start, end = max(0, at - features.BEFORE), at + features.BEHIND + 1
                best.append(
                    (row[at].item(), domain, decode(ids[start:end]), at - start, row[start:end].tolist())
                )
        best.sort(key=lambda one: -one[0])
        assert len(f["contexts"]) == 10
        for (domain, at, texts, values), (most, *expected) in zip(f["contexts"], best):
            assert [domain, "".join(texts), at] == expected[:3] and len(texts) == len(values)
            assert values == pytest.approx(expected[3], rel=0.06) and values[at] == pytest.approx(
                most, rel=0.06
            )


def test_the_answers_that_one_feature_changes_are_those_of_the_whole_lm_under_it(facts_evaluator, sae, told):
    metrics, details = told
    assert details["written_alone"] == {"write": "clamp", "multiplier": 3}
    assert set(details["needed"]) == {"units", "retain_mean"}
    lm, paper = facts_evaluator.lm, facts_evaluator.once(answers.paper)
    unit = facts_evaluator.firing(sae).unit
    changing = [f for f in details["features"] if f["changes"]["n"]]
    assert metrics["n_that_change_answers"] == len(changing) > 0
    some = changing[:2]
    for f in some:
        i = f["feature"]

        def clamped(stream, batch):
            value = sae.encode(stream)[..., i]
            fires = (value > 0) & batch.trained
            return stream + torch.where(fires, -3 * unit[i] - value, 0.0)[..., None] * sae.W_dec[i]

        for name, (forget, retain) in f["changes"]["by_format"].items():
            one = paper.formats[name]
            now = torch.tensor(said_by_hand(lm, one.exam, clamped))
            other = now != one.plain
            of_forget = paper.is_forget(one.places)
            assert [int((other & of_forget).sum()), int((other & ~of_forget).sum())] == [forget, retain]
    name, question, without, now, right = some[0]["changes"]["examples"][0]
    assert name in paper.formats and without != now and right in tiny_facts.VALUES
    assert question in [q.question for q in paper.questions]


def test_answers_and_prompts_are_those_of_the_whole_lm_without_and_with_the_hook(facts_evaluator):
    evaluator, testbed = facts_evaluator, facts_evaluator.testbed
    method = OneHook(tiny_facts.retain_mean).chosen_on(evaluator)
    metrics, details = answers.questions(evaluator, method, 0, "it")
    assert details["columns"] == ["subject", "question", "right", "half", "letter", "cloze"], "no prose here"
    assert len(details["rows"]) == sum(map(len, testbed.questions.values()))
    halves = [row[3] for row in details["rows"]]
    assert {h: halves.count(h) for h in set(halves)} == {"choosing": 36, "reporting": 36}
    paper, mean = evaluator.once(answers.paper), evaluator.retain_mean
    for place, name in enumerate(paper.formats, 4):
        exam = paper.formats[name].exam
        plain = said_by_hand(evaluator.lm, exam, lambda out, batch: out)
        now = said_by_hand(evaluator.lm, exam, lambda out, batch: mean.expand_as(out))
        for row, before, after, right in zip(details["rows"], plain, now, exam.answers.tolist()):
            words = [True if s == right else tiny_facts.VALUES[s] for s in (before, after)]
            assert row[place] == (True if words == [True, True] else words)
        accuracy = (torch.tensor(now) == exam.answers)[:48].float().mean().item()
        assert metrics[f"accuracy_{name}_forget"] == pytest.approx(accuracy)
    prompts = details["prompts"]
    assert [p["domain"] for p in prompts] == ["forget"] * 10 + ["retain"] * 10
    ids = [ids for *_, ids in evaluator.once(answers.prompts)]
    for p, row in list(zip(prompts, ids))[::7]:
        for key, change in (("without", lambda out: out), ("with", lambda out: mean.expand_as(out))):
            whole = torch.tensor([[testbed.tokenizer.bos_token_id, *row]])
            with hooked(evaluator.lm, change):
                said = testbed.lm.generate(whole, max_new_tokens=20, do_sample=False, use_cache=False)
            new = said[0, whole.shape[1] :].tolist()
            new = new[: new.index(1)] if 1 in new else new
            assert p[key] == testbed.tokenizer.decode(new)


def test_without_a_cell_nothing_is_switched_off_and_features_are_clamped_as_strongly_as_any(
    facts_evaluator, sae
):
    facts_evaluator.chosen[sae] = None, []
    metrics, details = answers.questions(facts_evaluator, sae, 0, "it")
    assert (
        details["cell"] is None
        and details["needed"] == {}
        and not any(v for k, v in metrics.items() if k.startswith("changed"))
    )
    assert all(p["with"] == p["without"] for p in details["prompts"])
    facts_evaluator.once(answers.paper).formats.clear()  # what is asked is not the matter here
    metrics, details = features.features(facts_evaluator, sae, 0, "it")
    assert metrics["n_clamped"] == 0 and details["written_alone"] == {"write": "clamp", "multiplier": 30}
    del facts_evaluator.chosen[sae], facts_evaluator.made[answers.paper]


def test_a_switch_of_selected_features_can_write_to_each_of_them_and_to_any_others(facts_evaluator, sae):
    switch = cells.SelectedSwitch(facts_evaluator, sae)
    chosen = {i for cell in switch.cells() for i in cell["features"]}
    assert chosen and chosen <= set(switch.features.chosen.tolist()), "by every selection"
    others = switch.over([40, 2])
    assert others.features.chosen.tolist() == [2, 40] and others.ranked is switch.ranked
    assert features.cells_with(switch.cells(), min(chosen)).keys() <= {
        f"selection {how}" for how in switch.ranked
    }


def test_both_are_made_where_they_are_named_and_features_of_saes_alone():
    rows = {row.name: row for row in evals.ROWS}
    assert not rows["features"].by_default and not rows["questions"].by_default
    assert rows["features"].needs_sae and not rows["questions"].needs_sae


# -------------------------------------------------------------------------------- pages


def test_a_page_is_what_eval_says_and_damage_is_named(tmp_path, facts_evaluator, sae, told):
    (tmp_path / "eval").mkdir()
    assert pages.read(tmp_path, 0) == {}
    path = tmp_path / "eval/seed0_features.json"
    path.write_text(json.dumps(told[1]))
    page = pages.read(tmp_path, 0)
    assert [f["feature"] for f in page["features"]] == [f["feature"] for f in told[1]["features"]]
    rows = [
        ["biology", "What?", "red", "choosing", True, [True, "blue"]],
        ["x", "Which?", "red", "reporting", None, True],
    ]
    asked = page | {"rows": rows}
    texts, packed, left_out = pages.that_fit({"a": asked, "b": asked}, 10**6)
    assert [p.title for p in packed] == ["a", "b"] and not left_out
    unpacked, named = (json.loads(zlib.decompress(base64.b64decode(p.base64))) for p in (packed[0], texts))
    assert unpacked["features"] == page["features"] and len(named) == 2
    assert [[*named[number], *rest] for number, *rest in unpacked["rows"]] == rows
    room = len(packed[0].base64) + len(texts.base64) + 200
    _, few, left_out = pages.that_fit({"a": asked, "b": asked}, room)
    assert [p.title for p in few] == ["a"] and left_out == ["b"]
    damaged = json.loads(json.dumps(told[1]))
    damaged["features"][1]["contexts"][0][3] = "x"
    path.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="eval/seed0_features.json: features: contexts: not a list"):
        pages.read(tmp_path, 0)
    path.write_text("{")
    with pytest.raises(ValueError, match="eval/seed0_features.json: Expecting"):
        pages.read(tmp_path, 0)
