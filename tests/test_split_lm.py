"""An LM whose layers accelerate has placed on several devices is stopped, resumed and asked as one on one;
its last layer is run where it is read alone."""

import copy
import importlib.util
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import there

from sae_separation import checks, testbeds
from sae_separation.errors import WrongRequest
from sae_separation.evals.depth import layers_above
from sae_separation.exam import Exam, id_batches, logits_at
from sae_separation.forms import FORMS, PLACES, Asker
from sae_separation.lm import SPLIT, InterventionLM, decoder_layers, device_of, load_lm, load_tokenizer
from sae_separation.specs import SPECS
from sae_separation.testbeds import device_for


def around(lm) -> Any:
    """What an InterventionLM reads of a testbed."""
    layers = decoder_layers(lm)
    return SimpleNamespace(
        lm=lm, layers=layers, layer=1, hook_name="model.layers.1", name="tiny", alone_up_to=math.inf
    )


def test_a_dispatched_lm_gives_the_same_bits(tmp_path):
    """Without GPUs a layer lies on the disk: the hooks are those that move tensors between devices."""
    accelerate = pytest.importorskip("accelerate")
    folder = tiny.save_lm(tmp_path / "lm")
    plain, split = load_lm(folder, "cpu"), load_lm(folder, SPLIT)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(tiny.N_LAYERS)}
    accelerate.dispatch_model(split, places, main_device="cpu", offload_dir=tmp_path / "disk")
    assert split.model.layers[1].mlp.up_proj.weight.is_meta
    assert (device_of(plain), device_of(split)) == ("cpu", SPLIT)
    tokenizer, found = load_tokenizer(folder), []
    (batch,) = id_batches(tokenizer, [[7, 8, 9, 10], [11, 12, 13, 14]])
    for lm in (plain, split):
        asked = InterventionLM(around(lm))
        resid = asked.resid(batch.tokens)
        with asked.resumed_from(2 * resid):
            resumed = logits_at(lm, batch.tokens, batch.positions)
        logits = logits_at(lm, batch.tokens, batch.positions)
        alone = asked.logits_of(batch, asked.resumed_from(2 * resid))
        torch.testing.assert_close(alone, resumed)
        found.append((resid, resumed, logits, alone, layers_above(asked, batch, resid)))
    for ours, theirs in zip(*found):
        assert torch.equal(ours, theirs)
    assert not torch.equal(found[0][1], found[0][2])


def test_what_cannot_be_split_is_refused(monkeypatch):
    for gpus, said in ((0, "none is here"), (1, "one is here")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        with pytest.raises(WrongRequest, match=said):
            checks.check_split_lm()
    assert device_for(SPECS["pythia-70m"], split_lm=False) == "cuda"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WrongRequest, match="pip install accelerate"):
        checks.check_split_lm()


def shaken(resid, hook):
    noise = torch.randn(resid.shape[1:], generator=torch.Generator().manual_seed(0))
    return torch.where(hook.trained[..., None], resid + 1.5 * resid.std() * noise, resid)


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
@pytest.mark.parametrize("shared_stems", [False, True])
def test_the_last_layer_run_where_it_is_read_answers_as_the_whole_one(micro, scoring, shared_stems):
    """Under a hook that leaves a part of the answers right, and with the work of a few tokens."""
    assert micro.alone_up_to == math.inf
    questions = micro.questions["biology"][::6] + micro.questions["history"][::6]
    exam = Exam(micro.tokenizer, questions, scoring, shared_stems=shared_stems)
    seen = []
    mlp = micro.layers[-1].mlp
    handle = mlp.register_forward_hook(lambda module, args, out: seen.append(out[..., 0].numel()))
    found = []
    for most in (micro.alone_up_to, 0):
        lm = InterventionLM(replace(micro, alone_up_to=most))
        lm.hook = shaken
        found.append(exam.probs_from(partial(lm.ask, read=exam.read)))
    handle.remove()
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    right = found[0].argmax(1) == exam.answers
    assert torch.equal(right, found[1].argmax(1) == exam.answers)
    assert 0.1 < right.float().mean() < 0.9, "the comparison would be empty"
    half = len(seen) // 2
    reads, tokens = (sum(getattr(b, name).numel() for b in exam.batches) for name in ("positions", "tokens"))
    assert sum(seen[:half]) == 2 * reads and sum(seen[half:]) == 2 * tokens, "plainly, and under the hook"


def test_an_lm_whose_last_layer_cannot_be_run_alone_is_found_out(micro):
    """Its attention goes by where a query stands among the queries, or it keeps nothing in a cache."""
    lm = copy.deepcopy(micro.lm)
    attention = lm.gpt_neox.layers[-1].attention
    forward = attention.forward

    def by_own_places(*args, **kwargs):
        n = kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1]
        mask = kwargs["attention_mask"]
        kwargs["attention_mask"] = None if mask is None else mask.roll(1, 2) if n > 1 else mask
        return forward(*args, **kwargs)

    def without_cache(*args, **kwargs):
        return forward(*args, **kwargs | {"layer_past": None})

    for changed in (by_own_places, without_cache):
        attention.forward = changed
        testbed = replace(micro, lm=lm, alone_up_to=math.inf)
        testbeds.lay_out(testbed)
        assert testbed.alone_up_to == 0
    attention.forward = forward
    testbeds.lay_out(testbed)
    assert testbed.alone_up_to == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_right_and_wrong_in_a_form_are_those_of_the_whole_layer(micro, place):
    """Under a hook that takes a part of the answers. Ends of one token each are read at one place."""
    questions = [q for some in micro.questions.values() for q in some[::40]]
    asker = Asker(micro, questions, context_size=128)
    right = []
    for form in (form for form in FORMS if form.place == place and form.header != "other"):
        made = asker.exam(form)
        assert made is not None
        exam, _ = made
        assert all(there(batch.positions).shape[1] == 1 for batch in exam.batches)
        found = []
        for most in (micro.alone_up_to, 0):
            lm = InterventionLM(replace(micro, alone_up_to=most))
            lm.hook = shaken
            found.append(exam.said(partial(lm.ask, read=exam.read)))
        assert torch.equal(*found), form.name
        right.append(found[0] == exam.answers)
    assert 0.1 < torch.cat(right).float().mean() < 0.9, "the comparison would be empty"
