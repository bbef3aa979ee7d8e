"""The command that makes SAEDashboard's page: what it refuses, and what it gives SAEDashboard, for which a
stand-in is put."""

import json
import re
import sys
from types import ModuleType

import pytest
import tiny_facts
import torch

from sae_separation import dashboard, run_folder
from sae_separation.exam import special_ids
from sae_separation.files import seal


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with what the command reads before it loads anything."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "it"
    for part in ("eval", "sae_seed3"):
        (folder / part).mkdir(parents=True)
    about = {"requested": {"testbed": "micro"}, "config": {"seeds": [3, 4], "arm": "vanilla"}}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "sae_seed3/sae_weights.safetensors").write_bytes(b"weights")
    (folder / "final_info.json").write_text('{"training": {}}')
    of_sae(folder, d_sae=48)
    return folder


def of_sae(folder, **about):
    """What an SAE's cfg.json says, and its record."""
    (folder / "sae_seed3/cfg.json").write_text(json.dumps(about))
    record = {"files": run_folder.files_of(folder / "sae_seed3"), "sections": {}, "notes": {}}
    (folder / "eval/seed3_metrics.json").write_text(json.dumps(seal(record)))


def ended(capsys, *args) -> tuple[int, str]:
    return dashboard.main([str(a) for a in args]), capsys.readouterr().err


def test_what_cannot_be_shown_is_one_line_that_says_what_to_do(run, capsys, monkeypatch):
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    for args, why in (
        ([run, "--seed", 5], r"it has no seed 5: its seeds are \[3, 4\]"),
        ([run, "--seed", 4], "sae_seed4/cfg.json is missing"),
        ([run], "tells of no features: give --features, or first python experiment.py .*--evals features"),
        ([run, "--features", 48], "--features 48: the SAE has features 0 to 47"),
        ([run, "--features", 7], "SAEDashboard is not installed: pip install --no-deps sae-dashboard "),
        ([run, "--pages"], r"unrecognized arguments: --pages \(--help lists the options\)"),
    ):
        code, text = ended(capsys, *args)
        assert code == 2 and text.count("\n") == 1
        assert re.search(why, text), text
    (run / "eval/seed3_features.json").write_text("{")
    assert "seed3_features.json: Expecting" in ended(capsys, run)[1]
    of_sae(run, kind="leace")
    assert "has no SAE: its arm is vanilla" in ended(capsys, run)[1]


def test_the_features_told_of_are_shown(run):
    shown = {"feature": 0, "forget": 0, "retain": 0, "affinity": 0, "mean": 0, "in_cell": True, "cells": {}}
    shown |= {"neighbours": [], "contexts": [], "changes": {"n": 0, "by_format": {}, "examples": []}}
    told = {"features": [shown | {"feature": i} for i in (12, 5)]}
    (run / "eval/seed3_features.json").write_text(json.dumps(told))
    assert dashboard.features_of(run, 3, 48, None) == [12, 5] and dashboard.features_of(run, 3, 48, [1]) == [
        1
    ]


def test_saedashboard_is_given_held_out_text_and_the_stream_at_the_hook_layer(
    facts_testbed, tmp_path, monkeypatch
):
    """As SAEDashboard's wrapper asks: hooks that keep what they are called with."""
    seen = {}

    class Runner:
        def __init__(self, config):
            seen["config"] = config

        def run(self, sae, lm, tokens):
            seen.update(sae=sae, tokens=tokens, W_U=lm.W_U, tokenizer=lm.tokenizer)

            def keep(activation, hook):
                hook.ctx["activation"] = activation

            point = seen["config"]["point"]
            lm.run_with_hooks(tokens[:2], stop_at_layer=2, fwd_hooks=[(point, keep)])
            seen["stream"] = lm.hook_dict[point].ctx.pop("activation")
            return "the page"

    def config(point, features, **more):
        return {"point": point, "features": features} | more

    stands_in = {
        "sae_vis_data": {"SaeVisConfig": config},
        "sae_vis_runner": {"SaeVisRunner": Runner},
        "data_writing_fns": {"save_feature_centric_vis": lambda data, path: path.write_text(data)},
    }
    monkeypatch.setitem(sys.modules, "sae_dashboard", ModuleType("sae_dashboard"))
    for name, contents in stands_in.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"sae_dashboard.{name}", module)
    sae = tiny_facts.random_sae()
    sae.save_model(tmp_path)
    dashboard.write_page(facts_testbed, 32, tmp_path, [7, 3], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "the page"
    assert seen["config"]["point"] == "blocks.1.hook_resid_post" and seen["config"]["features"] == [7, 3]
    assert seen["config"]["ignore_tokens"] == set(special_ids(facts_testbed.tokenizer).tolist())
    assert torch.equal(seen["sae"].W_dec, sae.W_dec) and seen["tokens"].shape[1] == 32
    with torch.no_grad():
        hidden = facts_testbed.lm.model(seen["tokens"][:2], output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(seen["stream"], hidden)
    assert torch.equal(seen["W_U"], facts_testbed.lm.lm_head.weight.T)
