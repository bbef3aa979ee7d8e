"""Training on a device that is waited for seldom; the stream, evaluations and a run on a GPU, where there is
one."""

import contextlib
import copy
import math
import subprocess
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import SMALL_SWEEP, small_command
from test_trainer import SMALL

from experiment import ActivationBlock, ActivationStream, OrthogonalSAE, Trainer
from sae_separation import checkpoint, losses, testbeds
from sae_separation import stream as stream_module
from sae_separation.devices import all_finite, upload
from sae_separation.errors import RunFailed
from sae_separation.evals.core import core
from sae_separation.evals.corpus import corpus
from sae_separation.evals.evaluator import Evaluator
from sae_separation.evals.geometry import geometry
from sae_separation.evals.unlearning import unlearning
from sae_separation.export import export, load_exported
from sae_separation.gradients import accumulate_grads
from sae_separation.sparse import batch_top_k, largest_entries
from sae_separation.specs import DataConfig

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EVERY = 25  # steps between two that are looked at


def seldom(config, block: ActivationBlock, seed: int = 0) -> Trainer:
    """A trainer that looks as one on a GPU does, wherever it is."""
    trainer = Trainer(config, seed, block.x.shape[1], 200, block)
    trainer.always_looks = False
    return trainer


def run(trainer: Trainer, block: ActivationBlock, steps: range) -> list[dict[str, float]]:
    """The terms of the steps that are looked at."""
    batches, seen = list(block.batches(512)), []
    for i in steps:
        measured = trainer.step(*batches[i % len(batches)], look=i % EVERY == 0)
        if i % EVERY == 0:
            seen.append({name: value.item() for name, value in measured.items()})
    return seen


# ---- what is looked at


def test_on_a_cpu_every_step_is_looked_at_whether_it_is_logged_or_not(activations):
    trainer = Trainer(SMALL, 0, activations.x.shape[1], 200, activations)
    x, forget = next(activations.batches(512))
    assert trainer.always_looks
    trainer.step(x, forget, look=False)
    x = x.clone()
    x[3, 4] = math.nan
    with pytest.raises(
        RunFailed, match="activations of the LM not finite in 1 of .* at step 1 of arm vanilla"
    ):
        trainer.step(x, forget, look=False)


def test_elsewhere_a_failure_is_named_at_the_next_look_and_where_it_came_from(block):
    """NaN in one batch, 20 steps before."""
    trainer = seldom(SMALL, block)
    run(trainer, block, range(0, 30))
    x, forget = next(block.batches(512))
    x = x.clone()
    x[3, 4] = math.nan
    trainer.step(x, forget, look=False)
    run(trainer, block, range(31, 50))
    with pytest.raises(RunFailed) as failed:
        run(trainer, block, range(50, 51))
    text = str(failed.value)
    assert "activations of the LM, their sum since the last look = nan" in text and "at step 50" in text
    assert "see to the LM" in text


def test_a_weight_that_is_none_is_named_at_the_next_look(block):
    trainer = seldom(SMALL, block)
    run(trainer, block, range(0, 30))
    trainer.sae.W_dec.data[2, 9] = math.nan
    run(trainer, block, range(30, 50))
    with pytest.raises(
        RunFailed, match="W_dec not finite in .* at step 50 of arm vanilla, seed 0: lower --lr"
    ):
        run(trainer, block, range(50, 51))


def test_what_is_put_off_is_done_at_the_next_look(block):
    """Groups are due at steps 0, 16, 32 and 48 of a round of eight, resampling at 40 and 80."""
    config = replace(SMALL, arm="grouped", group_update_steps=16, resample_steps=40, dead_tokens=5_000)
    trainer, groups, resampled = seldom(config, block), [], []
    trainer.sae.b_enc.data[:40] = -100.0
    for i in range(60):
        run(trainer, block, range(i, i + 1))
        groups.append(trainer.sae.groups)
        resampled.append(trainer.resampled)
    formed = [i for i in range(1, 60) if groups[i] is not groups[i - 1]]
    assert formed == [25, 50] and len(groups[0]) == 8
    assert [i for i in range(1, 60) if resampled[i] > resampled[i - 1]] == [50]


def test_what_is_put_off_is_in_the_checkpoint(block):
    """A trainer restored between due and done goes on as one that was not interrupted."""
    config = replace(SMALL, arm="grouped", group_update_steps=16, resample_steps=40, dead_tokens=5_000)
    whole, parts = seldom(config, block), seldom(config, block)
    for trainer in (whole, parts):
        trainer.sae.b_enc.data[:40] = -100.0
        run(trainer, block, range(0, 45))
    tensors, facts = parts.state()
    assert facts["due"] == ["groups", "resample"]
    kept = {name: t.detach().cpu().clone() for name, t in tensors.items()}
    again = seldom(config, block)
    again.restore(kept, facts)
    for trainer in (whole, again):
        run(trainer, block, range(45, 60))
    assert whole.resampled == again.resampled > 0 and torch.equal(whole.sae.groups, again.sae.groups)
    for name, t in whole.state()[0].items():
        assert torch.equal(t, again.state()[0][name]), name


def test_a_checkpoint_from_before_there_was_anything_to_put_off_is_taken(block):
    trainer = seldom(SMALL, block)
    run(trainer, block, range(0, 3))
    tensors, facts = trainer.state()
    del facts["due"]
    other = seldom(SMALL, block)
    other.restore({name: t.detach().cpu() for name, t in tensors.items()}, facts)
    assert other.due == []


@pytest.mark.parametrize("arm", ["vanilla", "grouped", "adaptive"])
def test_looking_seldom_learns_the_curve_of_looking_always(arm, block):
    config = replace(SMALL, arm=arm, resample_steps=0, group_update_steps=1000)
    often, rarely = Trainer(config, 0, block.x.shape[1], 200, block), seldom(config, block)
    often.always_looks = True
    a, b = run(often, block, range(0, 76)), run(rarely, block, range(0, 76))
    assert a == b, "nothing is put off here, so nothing differs"


# ---- waits


@contextlib.contextmanager
def waits():
    """A list that holds, afterwards, where inside a GPU was waited for: file and line, as torch tells it."""
    places = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
            told = "called a synchronizing CUDA operation"
            places += [(w.filename, w.lineno) for w in seen if str(w.message).startswith(told)]


@GPU
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"arm": "fixed"},
        {"arm": "grouped", "d_sae": 2050, "group_update_steps": 8},
        {"arm": "ortsae", "d_sae": 2050},
        {"arm": "adaptive"},
        {"activation": "batchtopk"},
        {"activation": "batchtopk", "d_sae": 2050, "feature_dropout": 0.1},
        {"activation": "softk"},
        {"unlock_steps": 3, "feature_dropout": 0.1, "grad_clip": 1.0, "feature_lr_power": 0.5},
    ],
    ids=str,
)
def test_a_gpu_is_waited_for_at_logged_steps_alone(settings, activations, monkeypatch):
    """With groups and chunks that are not all full, groups due every eight steps and dead features; of
    batchtopk both paths."""
    monkeypatch.setattr("sae_separation.gradients.SPARSE_SHARE_ON_GPU", 0.02)
    block = ActivationBlock(activations.x.cuda(), activations.forget.cuda())
    config = replace(SMALL, **{"resample_steps": 10, "dead_tokens": 3_000} | settings)
    trainer = Trainer(config, 0, block.x.shape[1], 200, block)
    assert not trainer.always_looks
    trainer.sae.b_enc.data[:40] = -100.0
    batches, waited = list(block.batches(512)), []
    for i in range(2 * EVERY + 2):
        with waits() as places:
            trainer.step(*batches[i % len(batches)], look=i % EVERY == 0)
        waited += [(i, *place) for place in places]
    assert {step for step, *_ in waited} <= {0, EVERY, 2 * EVERY}, waited
    assert waited, "the comparison would be empty"


@GPU
def test_a_gpu_is_waited_for_once_a_block(micro):
    """But for transformers, which looks at positions in every pass of the LM."""
    there = replace(micro, lm=copy.deepcopy(micro.lm).cuda())
    stream = ActivationStream(there, context_size=128, buffer_tokens=65_536, seed=5)
    stream.next_block()
    assert stream.n_lm_batches > 1
    with waits() as places:
        stream.next_block()
    ours = [place for place in places if "/transformers/" not in place[0]]
    assert len(ours) == 1 and len(places) <= 1 + stream.n_lm_batches, places


@GPU
def test_working_ahead_waits_for_no_gpu_and_handing_over_once(micro):
    """But for transformers, as above."""
    there = replace(micro, lm=copy.deepcopy(micro.lm).cuda())
    stream = ActivationStream(there, context_size=128, buffer_tokens=65_536, seed=5)
    stream.next_block()
    for share in (0.3, 0.6, 1.0):
        with waits() as places:
            stream.work_ahead(share, 10**9)
        assert all("/transformers/" in file for file, _ in places), places
    assert len(stream.makings[0].sinks) == stream.n_lm_batches > 1
    with waits() as places:
        stream.next_block()
    assert len(places) == 1 and "/transformers/" not in places[0][0], places


@GPU
def test_what_two_streams_make_of_a_gpu_is_what_one_makes(micro, monkeypatch):
    """Training's stream is late: it copies each block when the stream of blocks has long let go of it, and is
    at the next but one. But for the rounding of the LM's products."""
    there = replace(micro, lm=copy.deepcopy(micro.lm).cuda())

    def copied(n: int) -> list[tuple]:
        stream, copies = ActivationStream(there, 128, 65_536, seed=5, lm_tokens=8192), []
        for i in range(n):
            block = stream.next_block()
            torch.cuda._sleep(5 * 10**8)  # cycles: a quarter of a second
            copies.append(tuple(t.clone() for t in vars(block).values()))
            del block
            for share in (0.2, 0.7, 1.0):
                stream.work_ahead(share, 10**9 if i < n - 2 else 0)
        assert (stream.side is None) == (not stream_module.AHEAD_ON)
        return copies

    beside = copied(5)
    monkeypatch.setattr(stream_module, "AHEAD_ON", ())
    for (x, *rest), (plain, *others) in zip(beside, copied(5), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
        assert (x - plain).norm() < 0.02 * plain.norm()


@GPU
@pytest.mark.parametrize("settings", [{"arm": "adaptive"}, {"activation": "batchtopk"}], ids=str)
def test_the_compiled_step_learns_the_curve_of_the_plain_one_on_a_gpu(settings, activations):
    """FVU within half a per cent of the variance: what is fused is not rounded to bfloat16 in between."""
    block = ActivationBlock(activations.x.cuda(), activations.forget.cuda())
    config, curves = replace(SMALL, resample_steps=0, **settings), []
    for compiled in (False, True):
        trainer = Trainer(replace(config, compile=compiled), 0, block.x.shape[1], 200, block)
        curves.append([terms["fvu"] for terms in run(trainer, block, range(0, 76))])
    assert max(abs(a - b) for a, b in zip(*curves)) < 5e-3 and curves[0][-1] < 0.8 * curves[0][0]


# ---- the sparse path of BatchTopK


@pytest.mark.parametrize("lower", [0.0, 1.5])
def test_the_largest_entries_are_the_features_of_batch_top_k(lower, device):
    """Also where fewer than k B are active."""
    sae = OrthogonalSAE(24, 96, seed=3, activation="batchtopk", k=5).to(device)
    sae.b_enc.data.sub_(lower)
    other = copy.deepcopy(sae)
    u = torch.randn(64, 24, generator=torch.Generator().manual_seed(5)).to(device)
    col, row, value, slope = largest_entries(sae, u)
    f, _ = batch_top_k(other.pre_activations(u), other)
    assert (int((f > 0).sum()) < 5 * 64) == (lower > 0) and len(value) == 5 * 64
    entries = torch.zeros_like(f).index_put_((row, col), value)
    torch.testing.assert_close(entries, f)
    assert torch.equal(slope, (value > 0).float()) and torch.equal(col, col.sort().values)
    torch.testing.assert_close(sae.threshold, other.threshold)


@GPU
@pytest.mark.parametrize("lower", [0.0, 2.0])
def test_on_a_gpu_the_sparse_path_of_batch_top_k_measures_what_the_dense_one_does(lower, monkeypatch):
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(5)).cuda() + 0.5
    forget, l1, seen = torch.arange(256).cuda() < 100, torch.tensor(0.0).cuda(), []
    signs = losses.random_signs(256, 16, torch.Generator().manual_seed(1)).cuda()
    for share in (0.0, 2.0):
        monkeypatch.setattr("sae_separation.gradients.SPARSE_SHARE_ON_GPU", share)
        sae = OrthogonalSAE(24, 96, seed=3, activation="batchtopk", k=5).cuda()
        sae.b_enc.data.sub_(lower)
        gain = torch.arange(96).cuda() % 7 / 3
        terms = accumulate_grads(sae, x, forget, l1, torch.float32, None, gain, 1.0, signs)
        seen.append(
            [terms.fvu, terms.l1, terms.l0, terms.fired, terms.sketch, *(p.grad for p in sae.parameters())]
        )
        sae.W_enc.data[3, 7] = torch.nan
        assert not accumulate_grads(sae, x, forget, l1, torch.float32).fvu.isfinite()
    for dense, sparse in zip(*seen):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)
    assert seen[0][3].sum() > 0


@GPU
def test_on_a_gpu_the_sparse_path_gives_the_same_bits_again(activations, monkeypatch):
    monkeypatch.setattr("sae_separation.gradients.SPARSE_SHARE_ON_GPU", 0.02)
    block = ActivationBlock(activations.x.cuda(), activations.forget.cuda())
    config = replace(SMALL, activation="batchtopk", d_sae=2048)
    one, two = (Trainer(config, 0, block.x.shape[1], 200, block) for _ in range(2))
    for trainer in (one, two):
        run(trainer, block, range(0, 60))
    assert torch.equal(one.sae.W_dec, two.sae.W_dec) and torch.equal(one.sae.b_enc, two.sae.b_enc)


# ---- tensors


def test_upload_gives_the_same_values_and_all_finite_looks_at_all_devices(device):
    t = torch.arange(6.0).view(2, 3)
    there = upload(t, device)
    assert there.device.type == device.type and torch.equal(there.cpu(), t) and upload(there, device) is there
    assert all_finite([t, there, torch.arange(3)]) and all_finite([])
    assert not all_finite([t, there / 0])


# ---- the whole, on a device


def test_a_block_holds_the_same_rows_in_the_same_places_on_any_device(testbed, micro):
    """But for the rounding of the LM's products."""
    how = {"context_size": 128, "buffer_tokens": 16_384, "seed": 5, "lm_tokens": 8192}
    block, plain = (ActivationStream(bed, **how).next_block() for bed in (testbed, micro))
    assert torch.equal(block.forget.cpu(), plain.forget)
    assert (block.x.cpu() - plain.x).norm() < 0.02 * plain.x.norm()


@GPU
def test_evaluations_on_a_gpu_measure_what_they_do_on_a_cpu(small_micro, activations, tmp_path):
    """An SAE trained on the GPU, exported, and measured there and on the CPU, on 16 contexts and 40
    questions."""
    micro = testbeds.load(DataConfig(testbed="micro", **small_micro))
    block = ActivationBlock(activations.x.cuda(), activations.forget.cuda())
    config = tiny.config(arm="adaptive", d_sae=512, target_l0=16.0, tokens=10**6)
    trainer = Trainer(config, 0, block.x.shape[1], 200, block)
    batches = list(block.batches(2048))
    for i in range(60):
        trainer.step(*batches[i % len(batches)])
    about = {"model_name": "micro", "hook_name": micro.hook_name, "hook_layer": 1, "context_size": 128}
    export(trainer.sae, tmp_path, about | {"prepend_bos": True})
    found = []
    for lm in (copy.deepcopy(micro.lm).cuda(), micro.lm):
        bed = replace(micro, lm=lm, sweep=SMALL_SWEEP, n_held_out=16)
        evaluator, sae = Evaluator(bed, context_size=128), load_exported(tmp_path, bed.lm.device)
        found.append({})
        for evaluation in (core, geometry, unlearning, corpus):
            found[-1] |= evaluation(evaluator, sae, 0, "it")[0]
    here, there = found
    for name in ("explained_variance", "ce_loss_score", "l0", "mean_max_cosine", "unlearning_score"):
        assert here[name] == pytest.approx(there[name], rel=0.02, abs=0.02), name
    assert set(here) == set(there) and all(math.isfinite(v) for v in here.values() if v is not None)


@GPU
@pytest.mark.slow
def test_a_run_on_a_gpu_trains_and_evaluates_and_its_checkpoints_are_read_again(tmp_path):
    """The embedded testbed, which the plan keeps on the CPU as it is too small to gain."""
    data = ["--testbed=micro", "--seeds", 0, "--tokens", "256k", "--buffer_tokens", 32768]
    how = ["--checkpoint_seconds", 0, "--evals", "core", "geometry"]
    command = small_command("--out_dir", tmp_path / "run_6", *data, *how)
    command[2] = command[2].replace("n_held_out=16", "n_held_out=16, gpu=True")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert checkpoint.steps_in(tmp_path / "run_6") == []
