"""An LM whose layers accelerate has placed on several devices is stopped, resumed and asked as one on one."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from sae_separation import checks
from sae_separation.errors import WrongRequest
from sae_separation.evals.depth import layers_above
from sae_separation.exam import id_batches, logits_at
from sae_separation.lm import SPLIT, InterventionLM, decoder_layers, device_of, load_lm, load_tokenizer
from sae_separation.specs import SPECS
from sae_separation.testbeds import device_for


def around(lm) -> Any:
    """What an InterventionLM reads of a testbed."""
    layers = decoder_layers(lm)
    return SimpleNamespace(lm=lm, layers=layers, layer=1, hook_name="model.layers.1", name="tiny")


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
        found.append((resid, resumed, logits, layers_above(asked, batch, resid)))
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
