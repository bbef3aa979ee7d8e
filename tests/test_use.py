"""A run is read back, and an LM under one of its cells says what the evaluation heard it say."""

import copy
import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT
from test_robustness import tiny_sae

from sae_separation import generate, load_run, methods, reader, run_folder, switched_off, testbeds
from sae_separation.errors import WrongRequest
from sae_separation.evals.cells import Chosen, FeatureSwitch, intervening, under_cell
from sae_separation.evals.unlearning import repeatable
from sae_separation.exam import prompt_batches
from sae_separation.export import load_exported
from sae_separation.files import seal, write_json
from sae_separation.interventions import feature_hook
from sae_separation.saved_run import SavedRun

PROMPTS = ["Molor is red. abc defgh ab<eos>cdef ghab", "Xkatan is blue. mnop qrst", "bad cab fed hag " * 3]


def write_run(folder: Path, testbed, arm: str, details: dict[str, dict]) -> SavedRun:
    """A complete run of one seed, whose sae_seed0 is there already, with what its evaluations recorded."""
    lm = testbed.lm.name_or_path
    settings = {"arm": arm, "seeds": [0], "testbed": "custom", "lm": lm}
    names = {"name": "custom", "hook_name": testbed.hook_name, "d_in": testbed.d_in}
    sources = {"lm": {"source": lm, "sha256": testbeds.sha256_of_weights(Path(lm))}}
    made = {"requested": settings, "config": settings, "testbed": names | {"sources": sources}}
    (folder / "eval").mkdir()
    write_json(folder / "config.json", seal(made))
    (folder / "train_log.jsonl").touch()
    write_json(folder / "warnings.json", [])
    for section, said in details.items():
        write_json(folder / f"eval/seed0_{section}.json", said)
    record = {"files": run_folder.files_of(folder / "sae_seed0"), "sections": {}, "notes": {}, "made_by": {}}
    write_json(run_folder.record_of(folder, 0), seal(record))
    run_folder.write_result(folder, {"training": {"means": {"final_l0": 8.0}}})
    return load_run(folder)


@pytest.fixture(scope="module")
def sae(facts_evaluator, tmp_path_factory) -> tuple[Path, Any]:
    """An SAE of random directions: the run folder that it is in, and the SAE as it is evaluated."""
    folder, state = tmp_path_factory.mktemp("runs") / "it", torch.get_rng_state()
    torch.manual_seed(0)
    tiny_sae(facts_evaluator).save_model(folder / "sae_seed0")
    torch.set_rng_state(state)
    return folder, load_exported(folder / "sae_seed0")


@pytest.fixture(scope="module")
def switch(facts_evaluator, sae) -> FeatureSwitch:
    return FeatureSwitch(facts_evaluator, sae[1])


@pytest.fixture(scope="module")
def run(facts_evaluator, sae, switch) -> SavedRun:
    """Its run, with cells recorded as the evaluations record them."""
    folder, it = sae
    grid, best, firing = switch.cells(), {}, facts_evaluator.firing(it)
    for how in ("clamp", "conditional", "guardrail"):
        cell = next(c for c in grid if c["write"] == "clamp" and c["multiplier"] == 30)
        cell = {k: v for k, v in cell.items() if k != "write"} | {"intervention": how}
        best[how] = repeatable(facts_evaluator, it, firing, cell | {"forget": 0, "retain": 0})
    measured = [cell | {"forget_accuracy": 0.5, "retain_accuracy": 1.0, "left": 0.4} for cell in grid]
    robustness = {"cell": measured[0], "needed": switch.needed, "frontier": measured}
    unlearning = {"units": switch.needed["units"], "best": best, "sweep": list(best.values())}
    details = {"robustness": robustness, "unlearning": unlearning}
    return write_run(folder, facts_evaluator.testbed, "vanilla", details)


@pytest.fixture(scope="module")
def batch(facts_testbed):
    """Rows of different lengths, read everywhere."""
    (made,) = prompt_batches(facts_testbed.tokenizer, PROMPTS)
    return replace(made, positions=None)


def told(batch, logits):
    return logits


def mask_of(batch):
    """Where a row of the batch has no padding [row, pos]."""
    lengths = [len(PROMPTS[row].replace("<eos>", "e")) + 1 for row in batch.rows]
    return (torch.arange(batch.tokens.shape[1]) < torch.tensor(lengths)[:, None]).long()


def holds_as_evaluated(testbed, run, name, batch, wanted, plain):
    """The LM under a cell says what the evaluation heard, on every token that is no padding."""
    mask = mask_of(batch)
    with switched_off(testbed.lm, run, cell=name), torch.no_grad():
        got = testbed.lm(batch.tokens, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], wanted[real], atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(testbed.lm(batch.tokens, use_cache=False).logits, plain)
    return not torch.allclose(got[real], plain[real], atol=1e-3)


def test_logits_are_those_of_the_evaluation_for_every_cell(facts_evaluator, switch, run, batch):
    lm, best = facts_evaluator.lm, {}
    plain = lm.ask(batch, read=told)
    for how in ("clamp", "conditional", "guardrail"):
        best["unlearning" + f"_{how}" * (how != "clamp")] = how
    cells, changed = run.cells(), {}
    assert list(cells)[:4] == ["robustness", *best] and len(cells) == 4 + len(switch.cells())
    for name in [*list(cells)[:4], *list(cells)[4::4]]:
        cell = cells[name]
        if name in best:  # as unlearning's sweep has it
            hook = feature_hook(switch.features, cell.settings, facts_evaluator.retain_mean)
            with intervening(lm, hook):
                wanted = lm.ask(batch, read=told)
        else:
            with under_cell(switch, cell.settings):
                wanted = lm.ask(batch, read=told)
        changed[name] = holds_as_evaluated(facts_evaluator.testbed, run, name, batch, wanted, plain)
    assert sum(changed.values()) > len(changed) / 2 and changed["robustness"] and changed["unlearning"]


KINDS = ("difference_of_means", "context_gate", "token_list", "mean_guard", "rmu")


def drawn_gate(evaluator, kind, generator, features):
    """A gate in context of random weights: this LM knows too little of its text to fit one."""
    d_in, n = evaluator.testbed.d_in, 1 + len(reader.DECAYS)
    shapes = {"W_in": (n, d_in, 8), "b_in": (8,), "w_out": (8,), "b_out": (1,)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {"shift": torch.zeros(d_in), "size": torch.ones(d_in), "retain_mean": evaluator.retain_mean}
    return tensors, {"cells": [{"retain_share": 0.001, "threshold": 0.0, "write": "zero"}]}


@pytest.mark.parametrize("kind", KINDS)
def test_so_they_are_for_methods_without_an_sae(kind, facts_evaluator, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "CHECKPOINTS", (2,))
    monkeypatch.setitem(methods.TRAINING, "batch", 4)
    monkeypatch.setattr(methods, "read_in_context", drawn_gate)
    method = methods.fit(kind, facts_evaluator, seed=0)
    method.save(tmp_path / "sae_seed0")
    switch, testbed = method.switch(facts_evaluator), facts_evaluator.testbed
    cell = switch.cells()[0]
    run = write_run(tmp_path, testbed, kind, {"robustness": {"cell": cell, "needed": {}, "frontier": [cell]}})
    assert run.cell().name == "robustness" and len(run.cells()) == 2
    plain = facts_evaluator.lm.ask(batch, read=told)
    with under_cell(switch, cell):
        wanted = facts_evaluator.lm.ask(batch, read=told)
    assert holds_as_evaluated(testbed, run, None, batch, wanted, plain)


@pytest.fixture(scope="module")
def zero(run) -> str:
    """A cell that sets the stream of many tokens to zero."""
    return max(
        (n for n in run.cells() if "write=zero" in n), key=lambda n: run.cells()[n].settings["n_features"]
    )


def with_cache(lm) -> dict:
    """A new KV cache, under the name that the LM's transformers has for it."""
    named = inspect.signature(type(lm).forward).parameters
    return {
        "cache" if "cache" in named else "past_key_values": transformers.DynamicCache(),
        "use_cache": True,
    }


@torch.no_grad()
def test_token_by_token_with_a_cache_it_says_what_one_pass_says(facts_testbed, run, zero):
    """Special tokens and massive ones, of the prompt and of what follows, stay as they are."""
    lm, tokenizer = copy.deepcopy(facts_testbed.lm), facts_testbed.tokenizer
    ids = tokenizer(["abc defg<eos>ab zab cdez fgh"], add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids)
    lm.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("z")] *= 1000
    seen = []
    with switched_off(lm, run, cell=zero, tokenizer=tokenizer) as off:
        handle = off.layer.register_forward_hook(lambda layer, args, out: seen.append(out.clone()))
        once = lm(tokens, use_cache=False).logits
        cached = with_cache(lm)
        places = torch.arange(tokens.shape[1]).split([12] + [1] * (tokens.shape[1] - 12))
        parts = [lm(tokens[:, some], **cached).logits for some in places]
        handle.remove()
    torch.testing.assert_close(torch.cat(parts, 1), once, atol=1e-3, rtol=1e-3)
    emptied = (seen[0] == 0).all(-1)
    assert torch.equal(torch.cat([(part == 0).all(-1) for part in seen[1:]], 1), emptied)
    kept = {"<eos>", "z"}
    for token, is_empty in zip(tokenizer.convert_ids_to_tokens(ids[0]), emptied[0]):
        assert not (is_empty and token in kept)
    assert emptied.sum() > 3 and not emptied[0, 0]


@torch.no_grad()
def test_rows_padded_on_the_left_are_generated_as_alone(facts_testbed, run, zero):
    lm, tokenizer = facts_testbed.lm, facts_testbed.tokenizer
    rows = [[2, *ids] for ids in tokenizer(PROMPTS[:2], add_special_tokens=False)["input_ids"]]
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with switched_off(lm, run, cell=zero):
        together = lm.generate(tokens, attention_mask=(tokens != 0).long(), **how)
        for row, out in zip(rows, together):
            alone = lm.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **how)
            assert alone[0, len(row) :].tolist() == out[longest:].tolist()
            without = lm.generate(
                torch.tensor([row]), attention_mask=torch.ones(1, len(row)), use_cache=False, **how
            )
            assert without.tolist() == alone.tolist()


@torch.no_grad()
def test_a_cell_that_looks_at_whole_rows_takes_no_cache(facts_testbed, run):
    lm, tokens = facts_testbed.lm, torch.tensor([[2, 60, 61, 62]])
    how = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 3, "do_sample": False}
    with switched_off(lm, run, cell="unlearning_guardrail") as off:
        assert off.sees_rows
        with pytest.raises(WrongRequest, match="looks at whole rows .*: generate with use_cache=False$"):
            lm.generate(tokens, eos_token_id=None, **how)
        assert lm.generate(tokens, eos_token_id=None, use_cache=False, **how).shape == (1, 7)


@torch.no_grad()
def test_whatever_happens_the_lm_is_as_before(facts_testbed, run):
    lm, layer = facts_testbed.lm, facts_testbed.layers[facts_testbed.layer]

    def hooks() -> list[int]:
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in (lm, layer)]

    before, tokens = hooks(), torch.tensor([[2, 60, 61]])
    cached = with_cache(lm)
    plain = lm(tokens, **cached)
    off = switched_off(lm, run, seed=0)
    with pytest.raises(ZeroDivisionError), off:
        assert hooks() != before and off.cell.name == "robustness"
        with pytest.raises(WrongRequest, match="^this LM is switched off already: "), switched_off(lm, run):
            pass
        with pytest.raises(WrongRequest, match="^this LM is switched off already: "), off:
            pass
        with pytest.raises(WrongRequest, match="holds 3 tokens a row that were not read inside"):
            lm(tokens[:, :1], **cached)
        with pytest.raises(WrongRequest, match="is given no input_ids"):
            lm(inputs_embeds=lm.get_input_embeddings()(tokens))
        with pytest.raises(WrongRequest, match="call the LM as a whole"):
            lm.model(tokens)
        assert hooks() != before
        raise ZeroDivisionError
    assert hooks() == before and torch.equal(lm(tokens, use_cache=False).logits, plain.logits)
    with off:  # again
        assert hooks() != before
    assert hooks() == before


def test_what_cannot_be_switched_off_is_told_in_a_line(facts_testbed, run, sae, tmp_path):
    lm = facts_testbed.lm
    with pytest.raises(WrongRequest, match="has no seed 7: its seeds are .0."):
        switched_off(lm, run, seed=7)
    with pytest.raises(WrongRequest, match="has no cell write=zer; the nearest of .*write=zero"):
        switched_off(lm, run, cell="write=zer")
    other = copy.deepcopy(lm)
    del other.model.layers[1:]
    with pytest.raises(WrongRequest, match="LlamaForCausalLM has no layer model.layers.1: give that LM"):
        switched_off(other, run)
    with pytest.raises(WrongRequest, match="is no run folder: it holds no config.json"):
        load_run(tmp_path)
    copied = shutil.copytree(run.folder, tmp_path / "copy")
    details = copied / "eval/seed0_robustness.json"
    details.write_text(details.read_text().replace("0.4", "0.3"))
    with pytest.raises(
        WrongRequest, match="seed0_robustness.json is not as it was written: .* evaluate again"
    ):
        load_run(copied).cells()
    shutil.rmtree(copied / "sae_seed0")
    with pytest.raises(WrongRequest, match="its SAEs are not there: "):
        load_run(copied).sae()
    (copied / "final_info.json").unlink()
    with pytest.raises(
        WrongRequest, match="is not complete: give the command that made it again, and it goes on"
    ):
        load_run(copied)


def test_every_committed_run_is_read_and_says_which_cell_is_its_best():
    run = load_run(ROOT / "run_6")
    assert run.seeds == (0, 1, 2) and run.config["arm"] == "adaptive" and "geometry" in run.results
    said = json.loads((ROOT / "run_6/eval/seed1_robustness.json").read_text())
    best = run.cell(seed=1)
    assert best.name == "robustness" and best.settings.items() <= said["cell"].items()
    assert best.settings["features"] == said["cell"]["features"] and "forget_accuracy" not in best.settings
    assert run.cells(1)[best.described].settings == best.settings
    assert len(run.cells(1)) == len(said["frontier"]) + 4, "the ruler's, SAEBench's, two guards'"
    with pytest.raises(WrongRequest, match="the oracle is an LM of its own, and no intervention"):
        load_run(ROOT / "run_21").cell()
    with pytest.raises(WrongRequest, match="its SAEs are not there"):
        run.sae()


def test_a_prompt_is_continued_without_and_with_the_switch(run, capsys):
    argv = [str(run.folder), "abc defg", "--max_new_tokens", "4"]
    assert generate.main([*argv, "--cell", "unlearning_guardrail"]) == 0
    assert generate.main(argv) == 0
    first, without, same, switched, also = capsys.readouterr().out.splitlines()[-5:]
    assert first == f"cell: robustness: {run.cell().described}"
    assert (without, switched) == ("--- without", "--- switched off")
    assert same.startswith("abc defg") and also.startswith("abc defg")
    for wrong, said in (
        (["nowhere", "x"], "nowhere is no run folder: it holds no config.json"),
        ([argv[0]], "the following arguments are required: prompt (--help lists the options)"),
        ([*argv, "--cell", "none"], "has no cell none"),
        ([*argv, "--lm", "./nowhere"], "--lm ./nowhere is neither a folder here nor a hub name"),
        ([*argv[:3], "0"], "--max_new_tokens 0: give at least 1"),
    ):
        assert generate.main(wrong) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line


@pytest.mark.parametrize("section", ["questions", "features", "depth", "relearning"])
def test_whichever_evaluation_chose_the_cell_tells_it(
    section, run, switch, facts_evaluator, tmp_path, capsys
):
    """As `recorded` keeps it, through JSON."""
    cell = next(c for c in switch.cells() if c["write"] == "retain_mean")
    shutil.copytree(run.folder / "sae_seed0", tmp_path / "sae_seed0")
    details = {section: Chosen(switch, cell, []).recorded, "unlearning": {"best": {}}}
    alone = write_run(tmp_path, facts_evaluator.testbed, "vanilla", details)
    assert (
        alone.cell().name == section
        and alone.cell().settings == run.cell(name=alone.cell().described).settings
    )
    if section == "questions":
        assert generate.main([str(tmp_path), "abc defg", "--max_new_tokens", "2"]) == 0
        assert f"cell: questions: {alone.cell().described}" in capsys.readouterr().out


def test_a_run_is_read_without_torch():
    code = "from sae_separation import load_run; load_run('run_6').cells()"
    code += "; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
