"""The trainer: what it steers, what it refuses, and that every setting reaches the run."""

import math
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import another_value, there

from experiment import ARMS, ActivationBlock, Trainer
from sae_separation import losses, rounds
from sae_separation.errors import RunFailed
from sae_separation.losses import grouped_grad, groups_and_pairs, omega_all_pairs
from sae_separation.resample import resample
from sae_separation.rounds import Rounds
from sae_separation.sparse import SPARSE_SHARE, remove_radial, unit_rows
from sae_separation.specs import GIVEN

SMALL = tiny.config(
    arm="vanilla",
    d_sae=256,
    target_l0=8.0,
    batch_size=512,
    tokens=200 * 512,
    group_size=32,
    group_update_steps=20,
    resample_steps=40,
    dead_tokens=20_000,
    warmup_steps=20,
    k=8,
)


def train(config, activations, steps=60, seed=0, killed=0) -> tuple[Trainer, list[dict]]:
    """Train for some steps; the first `killed` features start too far down to fire."""
    trainer = Trainer(config, seed, activations.x.shape[1], max(200, steps), activations)
    trainer.sae.b_enc.data[:killed] = -100.0
    batches = [
        (x, trainer.labels(forget, document))
        for (x, forget), document in zip(
            activations.batches(config.batch_size), activations.documents(config.batch_size)
        )
    ]
    history = [
        {k: v.item() for k, v in trainer.step(*batches[i % len(batches)]).items()} for i in range(steps)
    ]
    return trainer, history


WITH_SAE = [arm for arm, row in ARMS.items() if row.trains_sae]


@pytest.mark.parametrize("arm", WITH_SAE)
def test_every_arm_learns_keeps_unit_rows_and_stays_finite(arm, block):
    trainer, history = train(replace(SMALL, arm=arm), block)
    assert history[-1]["fvu"] < (0.95 if arm.startswith("frozen") else 0.8) * history[0]["fvu"]
    assert all(math.isfinite(v) for record in history for v in record.values())
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1).cpu(), torch.ones(256))
    assert any("omega" in record or "omega_firing" in record for record in history) == ARMS[arm].has_loss


def test_the_sae_trained_is_the_function_evaluated(block):
    """FVU reported by a training step equals FVU of forward() on the same batch and weights."""
    trainer, _ = train(SMALL, block, steps=30)
    x, forget = next(block.batches(512))
    fvu = trainer.sae.loss_terms(x)[0].item()
    plain = ((trainer.sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()
    assert fvu == pytest.approx(plain, rel=1e-4)
    assert trainer.step(x, forget)["fvu"].item() == pytest.approx(plain, rel=0.02)


def test_the_input_is_scaled_to_mean_square_norm_d_in(block):
    trainer, _ = train(SMALL, block, steps=1)
    assert (block.x * trainer.sae.scale).pow(2).sum(1).mean().item() == pytest.approx(
        block.x.shape[1], rel=1e-4
    )


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_lambda_is_steered_to_the_target_l0(activation, block):
    _, history = train(replace(SMALL, decay_fraction=0.0, activation=activation), block, steps=900)
    assert sum(r["l0"] for r in history[-50:]) / 50 == pytest.approx(8.0, abs=2.0)
    assert history[-1]["l1_coefficient"] != history[0]["l1_coefficient"]
    _, fixed = train(replace(SMALL, target_l0=0.0), block, steps=20)
    assert fixed[-1]["l1_coefficient"] == pytest.approx(SMALL.l1)


@pytest.mark.parametrize(("target_l0", "l0"), [(8.0, 16), (0.0, 32)])
def test_relu_starts_sparse_whether_lambda_is_steered_or_held(target_l0, l0, activations):
    """At twice the target L0, or where there is none at a quarter of d_in = 128."""
    _, history = train(replace(SMALL, target_l0=target_l0), activations, steps=1)
    assert history[0]["l0"] == pytest.approx(l0, rel=0.15)


def test_the_orthogonality_losses_lower_what_they_measure(block):
    plain, _ = train(SMALL, block, steps=150)
    fixed, _ = train(replace(SMALL, arm="fixed", alpha=1.0), block, steps=150)
    grouped, _ = train(replace(SMALL, arm="grouped", alpha=1.0, group_update_steps=1000), block, steps=150)
    assert omega_all_pairs(fixed.sae.W_dec) < 0.95 * omega_all_pairs(plain.sae.W_dec)
    inside = [
        grouped_grad(W, *groups_and_pairs(W, grouped.sae.groups)).value
        for W in (grouped.sae.W_dec.detach(), plain.sae.W_dec.detach())
    ]
    assert inside[0] < 0.5 * inside[1]


def test_a_frozen_decoder_is_never_trained(block):
    config = replace(SMALL, arm="frozen_decoder")
    trainer, _ = train(config, block, killed=40)
    assert torch.equal(trainer.sae.W_dec, Trainer(config, 0, block.x.shape[1], 200, block).sae.W_dec)
    assert trainer.resampled >= 40, "revived features keep their random directions too"


def test_a_frozen_encoder_keeps_its_weights_and_trains_biases_and_decoder(activations):
    config = replace(SMALL, arm="frozen_encoder")
    trainer, _ = train(config, activations, killed=40)
    start = Trainer(config, 0, activations.x.shape[1], 200, activations).sae
    assert torch.equal(trainer.sae.W_enc, start.W_enc) and trainer.resampled >= 40
    assert not torch.equal(trainer.sae.b_enc, start.b_enc) and not torch.equal(trainer.sae.W_dec, start.W_dec)


def test_a_soft_frozen_decoder_stays_near_its_start(activations):
    least = []
    for cosine in (0.9, 0.99):
        config = replace(SMALL, arm="soft_frozen_decoder", least_cosine=cosine)
        sae = train(config, activations, killed=40)[0].sae
        start = Trainer(config, 0, activations.x.shape[1], 200, activations).sae
        least.append((sae.W_dec * start.W_dec).sum(1).min().item())
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(256))
    assert least == pytest.approx([0.9, 0.99], abs=1e-4)


def test_adaptive_directions_are_steered_to_their_overlap_and_both_parts_by_themselves(activations):
    """At an alpha of its own each: the overlap is met, while the other part's alpha rises as in adaptive."""
    config = replace(SMALL, arm="adaptive_both", alpha=1.0, target_overlap=0.3)
    trainer, history = train(config, activations, steps=150)
    alone, _ = train(replace(config, arm="adaptive_directions", alpha=0.1), activations, steps=150)
    plain, _ = train(replace(config, arm="adaptive"), activations, steps=150)
    rate = plain.sae.rate[1]
    free = losses.forget_overlap(plain.sae.W_dec, rate, 40).item()
    for one in (trainer, alone):
        assert one._overlap().item() < 0.7 * free
    assert history[-1]["alpha"] == pytest.approx(plain._weights()[1].item(), rel=0.05)
    assert history[-1]["alpha_directions"] != history[-1]["alpha"] and history[-1]["omega"] > 0
    state = trainer.state()[0]
    assert "log_alpha_directions" in state and "log_alpha_directions" not in plain.state()[0]
    (warning,) = plain.out_of_reach()
    assert "adaptive had no effect yet" in warning and not train(SMALL, activations, 1)[0].out_of_reach()


def test_ortsae_visits_a_row_every_fifth_step_with_five_times_the_weight(activations, monkeypatch):
    """256 features in one chunk of 512: all of them at one of five steps, as published; in chunks of 64,
    one at each of four steps of five."""
    for chunk_size, at in ((512, [0, 5, 10]), (64, [0, 1, 2, 3, 5, 6, 7, 8, 10])):
        visits, visit = [], Rounds.visit
        monkeypatch.setattr(Rounds, "visit", lambda *args: visits.append(visit(*args)) or visits[-1])
        _, history = train(
            replace(SMALL, arm="ortsae", alpha=0.25, chunk_size=chunk_size), activations, steps=11
        )
        monkeypatch.undo()
        assert len(visits) == 11 and sum(v is not None for v in visits) == len(at)
        omegas = [0.0, *(record["omega"] for record in history)]
        first = min(i for i in range(11) if visits[i] is not None)
        assert sorted(sum((v.rows.tolist() for v in visits[:5] if v is not None), [])) == list(range(256))
        plain = train(SMALL, activations, steps=first + 1)[1][first]
        if first == 0:
            assert history[0]["loss"] - plain["loss"] == pytest.approx(0.25 * omegas[1], rel=1e-4), (
                "the log holds the plain weight"
            )


@pytest.mark.parametrize("arm", ["fixed", "grouped", "ortsae"])
def test_a_round_adds_the_gradient_of_every_row_once_with_the_weight_of_the_round(arm, block, monkeypatch):
    monkeypatch.setattr(rounds, "ROWS_A_STEP", 30)  # nine steps a round
    trainer = Trainer(replace(SMALL, arm=arm, chunk_size=40), 0, block.x.shape[1], 200, block)
    sae, alpha = trainer.sae, torch.tensor(0.3, device=block.x.device)
    sae.groups = torch.arange(256).view(8, 32)
    sae.W_dec.grad = torch.zeros_like(sae.W_dec)
    in_parts = there(trainer.rounds)
    assert in_parts.steps == min(9, ARMS[arm].longest)
    for step in range(in_parts.steps):
        in_parts.add_gradient(sae.W_dec, sae.groups, step, alpha)
    seen = sae.W_dec.grad.clone()
    at_once = Rounds(in_parts.loss, lambda *_: (in_parts.blocks, in_parts.whole))
    whole = there(at_once.visit(sae.W_dec, sae.groups, 0))
    expected = torch.zeros_like(seen)
    expected[whole.rows] = whole.grad
    torch.testing.assert_close(seen, in_parts.steps * 0.3 * expected)
    assert seen.abs().max() > 1e-4


def test_dead_features_are_revived_with_unit_rows_and_fresh_moments(block):
    trainer, _ = train(replace(SMALL, resample_steps=0), block, steps=10)
    sae = trainer.sae
    with torch.no_grad():
        sae.b_enc[:40] = -100.0
        sae.idle[:40] = SMALL.dead_tokens
    x, _ = next(block.batches(512))
    assert (sae.encode(x)[:, :40] > 0).sum() == 0
    dead = sae.idle >= SMALL.dead_tokens
    assert resample(sae, dead, x, trainer.adam, trainer.generator) == 40
    assert (sae.encode(x)[:, :40] > 0).any(0).float().mean() > 0.9
    assert sae.idle[:40].max() == 0
    torch.testing.assert_close(sae.W_dec.norm(dim=1).cpu(), torch.ones(256))
    assert (
        trainer.adam.state[sae.W_enc_FD]["exp_avg"][:40].abs().max()
        == 0
        < trainer.adam.state[sae.W_enc_FD]["exp_avg"][40:].abs().max()
    )


@pytest.mark.parametrize(
    "settings", [{}, {"activation": "batchtopk"}, {"arm": "soft_frozen_decoder"}, {"layer_norm": True}]
)
def test_revived_features_mend_the_reconstruction_at_once(settings, block):
    """With the living's mean bias 100 of them made the FVU of the next step 1.2 to 4.6 times what it was."""
    trainer, _ = train(replace(SMALL, resample_steps=0, **settings), block, steps=150)
    sae, (x, forget) = trainer.sae, next(block.batches(512))
    with torch.no_grad():
        sae.b_enc[:100] = -100.0
    before = trainer.step(x, forget)
    dead = (torch.arange(256) < 100).to(x.device)
    resample(sae, dead, x, trainer.adam, trainer.generator, trainer.start_FD, 0.8)
    after = trainer.step(x, forget)
    assert after["fvu"] < 0.9 * before["fvu"] and after["l0"] < 1.2 * before["l0"]


def test_a_forget_group_under_a_loss_on_its_firing_is_left_to_that(block):
    """Pointed at a row it would fire on retain text, under an alpha that has risen."""
    config = replace(SMALL, arm="adaptive", resample_steps=10, dead_tokens=2_000, forget_features=20)
    trainer, _ = train(config, block, steps=60, killed=40)
    fires = (trainer.sae.encode(block.x[:2000]) > 0).any(0)
    assert (trainer.sae.b_enc[:20] < -50).all() and fires[20:40].float().mean() > 0.9
    assert trainer.resampled >= 20


def W_nan(trainer):
    return trainer.sae.W_dec.T @ trainer.sae.W_dec * math.nan


@pytest.mark.parametrize("where", ["activation", "weight", "omega"])
def test_a_non_finite_term_stops_the_run_and_is_named(where, block, monkeypatch):
    trainer, _ = train(replace(SMALL, arm="fixed"), block, steps=10)
    x, forget = next(block.batches(512))
    before = trainer.sae.W_dec.detach().clone()
    if where == "activation":
        x = x.clone()
        x[3, 4] = math.nan
    elif where == "weight":
        trainer.sae.b_dec.data[0] = before.new_tensor(math.inf)
    else:
        prepare = there(trainer.rounds).prepare
        monkeypatch.setattr(trainer.rounds, "prepare", lambda *args: (prepare(*args)[0], W_nan(trainer)))
    with pytest.raises(
        RunFailed,
        match=f"{'omega' if where == 'omega' else 'fvu'} = (nan|inf).* at step 10 of arm fixed, seed 0",
    ):
        trainer.step(x, forget)
    assert torch.equal(trainer.sae.W_dec, before), "no step was taken on it"


LIVING = {"arm": "adaptive", "forget_features": 60}  # 20 of them are not killed
# field -> (what else is set: an arm, or settings; changed value); what a field must change is the trained
# weights
CHANGES = {
    "alpha": ("fixed", 0.7),
    "l1": ("vanilla", 0.1),
    "lr": ("vanilla", 5e-4),
    "warmup_steps": ("vanilla", 5),
    "decay_fraction": ("vanilla", 0.95),
    "target_l0": ("vanilla", 30.0),
    "group_size": ("grouped", 16),
    "group_update_steps": ("grouped", 7),
    "forget_features": ("adaptive", 20),
    "label_noise": ("adaptive", 0.2),
    "margin": (LIVING, 0.3),
    "gap_weight": ("adaptive", 0.1),
    "chunk_size": ("ortsae", 50),
    "target_sharing": (LIVING, 1.0),
    "target_overlap": ("adaptive_directions", 1.0),
    "dead_tokens": ("vanilla", 10**6),
    "resample_steps": ("vanilla", 25),
    "d_sae": ("vanilla", 300),
    "batch_size": ("vanilla", 400),
    "arm": ("vanilla", "fixed"),
    "activation": ("vanilla", "batchtopk"),
    "k": ({"activation": "batchtopk"}, 20),
    "temperature": ({"activation": "softk"}, 1.0),
    "bandwidth": ({"activation": "jumprelu"}, 0.1),
    "alpha_start": ("fixed", 0.01),
    "loss_warmup_steps": ("vanilla", 50),
    "layer_norm": ("vanilla", True),
    "skip": ("vanilla", 0.3),
    "orthogonal_init": ("vanilla", True),
    "feature_dropout": ("vanilla", 0.2),
    "unlock_steps": ("vanilla", 20),
    "feature_lr_power": ("vanilla", 0.5),
    "grad_clip": ("vanilla", 1e-3),
    "grad_accumulation": ("vanilla", 2),
}
for arm, row in ARMS.items():  # an arm's own option that is not above
    if row.trains_sae:
        CHANGES = {name: (arm, another_value(made)) for name, made in row.options.items()} | CHANGES
ELSEWHERE = {
    "testbed",
    *GIVEN,
    "features_of",
    "seeds",
    "tokens",
    "context_size",
    "buffer_tokens",
    "time_budget_minutes",
    "compile",
}  # reach the stream and the run, or have a test of their own


def test_every_field_of_the_config_is_looked_at():
    from dataclasses import fields

    assert set(CHANGES) | ELSEWHERE == {f.name for f in fields(SMALL)}


@pytest.mark.parametrize("name", CHANGES)
def test_changing_a_field_changes_the_run(name, activations):
    also, value = CHANGES[name]
    base = replace(SMALL, **({"arm": also} if isinstance(also, str) else also))
    one, two = (
        train(c, activations, steps=61, killed=40)[0].sae for c in (base, replace(base, **{name: value}))
    )
    assert one.W_dec.shape != two.W_dec.shape or not torch.equal(one.W_enc, two.W_enc)


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(block):
    one, two, three = (
        train(replace(SMALL, arm="adaptive"), block, steps=30, seed=s)[0].sae.W_dec for s in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_seeds_trained_side_by_side_are_independent(block):
    alone = train(SMALL, block, steps=20, seed=1)[0].sae.W_enc
    a, b = (Trainer(SMALL, s, block.x.shape[1], 200, block) for s in (0, 1))
    batches = list(block.batches(512))
    for i in range(20):
        for t in (a, b):
            t.step(*batches[i % len(batches)])
    assert torch.equal(b.sae.W_enc, alone)


def test_label_noise_turns_the_labels_of_its_share_of_documents_whole_and_others_for_another_seed(
    activations,
):
    wrong = []
    for seed in (0, 1):
        config = replace(SMALL, arm="adaptive", label_noise=0.2)
        trainer = Trainer(config, seed, activations.x.shape[1], 200, activations)
        wrong.append(trainer.labels(activations.forget, activations.document) != activations.forget)
        assert wrong[-1].float().mean().item() == pytest.approx(0.2, abs=0.06)
        told = set(activations.document[wrong[-1]].tolist())
        assert not told & set(activations.document[~wrong[-1]].tolist())
    assert not torch.equal(*wrong) and len(activations.document.unique()) > 50
    plain = Trainer(replace(SMALL, arm="adaptive"), 0, activations.x.shape[1], 200, activations)
    assert plain.labels(activations.forget, activations.document) is activations.forget


def test_a_single_domain_in_the_stream_trains_too(block):
    only = ActivationBlock(block.x, torch.zeros_like(block.forget))
    for arm in WITH_SAE:
        _, history = train(replace(SMALL, arm=arm), only, steps=45)
        assert all(math.isfinite(v) for r in history for v in r.values())


@pytest.mark.parametrize("settings", [{"l1": 0.05}, {"activation": "batchtopk"}, {"activation": "softk"}])
def test_the_sparse_path_learns_the_curve_of_the_dense_one(settings, activations, monkeypatch):
    """Same seed, all steps but the first on one path: the FVU curves stay within 1 % of the variance of
    each other."""
    curves = []
    for share in (2.0, 0.0):
        monkeypatch.setattr("sae_separation.gradients.SPARSE_SHARE", dict.fromkeys(SPARSE_SHARE, share))
        curves.append(
            [
                r["fvu"]
                for r in train(
                    replace(SMALL, resample_steps=0, target_l0=0.0, **settings), activations, steps=120
                )[1]
            ]
        )
    assert max(abs(a - b) for a, b in zip(*curves)) < 0.01 and curves[0][-1] < 0.5
    assert curves[0] != curves[1], "the paths round differently: the comparison would be empty"


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("settings", [{"arm": "adaptive"}, {"activation": "batchtopk"}])
def test_the_compiled_step_learns_the_curve_of_the_plain_one(settings, activations, monkeypatch):
    """Same seed, two SAEs after one another: FVU within half a per cent of the variance all along (in fp32
    it is a tenth: fused operations are not rounded to bfloat16 between them); the second SAE runs what was
    compiled for the first."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    config = replace(SMALL, resample_steps=0, **settings)
    monkeypatch.setattr("sae_separation.gradients.SPARSE_SHARE", dict.fromkeys(SPARSE_SHARE, 0.0))
    curves, graphs = [], []
    for compiled, seed in ((False, 1), (True, 0), (True, 1)):
        trainer, history = train(replace(config, compile=compiled), activations, steps=60, seed=seed)
        curves.append([r["fvu"] for r in history])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == 0 < graphs[1] == graphs[2]
    assert max(abs(a - b) for a, b in zip(curves[0], curves[2])) < 5e-3 and curves[0][-1] < 0.8 * curves[0][0]


@pytest.mark.parametrize(("arm", "alpha"), [("fixed", 0.1), ("grouped", 0.1), ("ortsae", 0.25)])
def test_the_longest_rounds_learn_the_curve_of_the_shortest(arm, alpha, activations, monkeypatch):
    """Same seed: FVU, averaged over 50 steps, within 1 % of the variance all along, Ω within 5 %; without
    the loss, Ω is another."""
    curves, omegas = [], []
    longest = ARMS[arm].longest
    for name, rows_a_step in ((arm, 32), (arm, 512), ("vanilla", 512)):
        monkeypatch.setattr(rounds, "ROWS_A_STEP", rows_a_step)
        config = replace(
            SMALL,
            arm=name,
            alpha=alpha,
            d_sae=512,
            group_size=64,
            chunk_size=64,
            group_update_steps=96,
            resample_steps=0,
        )
        trainer, history = train(config, activations, steps=400)
        steps = trainer.rounds.steps if trainer.rounds else 1
        assert steps == (longest if rows_a_step == 32 else ARMS[name].every)
        curves.append([sum(r["fvu"] for r in history[i : i + 50]) / 50 for i in range(0, 400, 50)])
        omegas.append(omega_all_pairs(trainer.sae.W_dec).item())
    assert max(abs(a - b) for a, b in zip(*curves[:2])) < 0.01 and curves[0] != curves[1]
    assert omegas[0] == pytest.approx(omegas[1], rel=0.05) and omegas[2] > 1.1 * omegas[1]


def test_a_round_is_long_for_large_dictionaries_and_gentle_losses_only():
    def steps(arm, d_sae, alpha=0.1, lr=0.003):
        row = ARMS[arm]
        return rounds.steps_of_round(d_sae, alpha * lr, row.every, row.longest, row.gentle)

    assert [steps("fixed", n) for n in (64, 1024, 1025, 4096, 16_384, 131_072)] == [1, 1, 2, 4, 16, 16]
    assert [steps("grouped", 16_384, alpha) for alpha in (0.01, 0.5, 1.0, 10.0)] == [8, 2, 1, 1] and steps(
        "grouped", 16_384, 1.0, 3e-4
    ) == 8
    assert [steps("ortsae", n, 0.25) for n in (1024, 4096, 16_384)] == [5, 5, 16] and steps(
        "ortsae", 16_384, 10.0
    ) == 5
    assert steps("fixed", 16_384, alpha=0.0) == 16


@pytest.mark.parametrize("clip", [0.0, 0.02])
def test_a_visit_weighs_on_the_second_moment_as_if_it_had_come_at_every_step(clip, activations, monkeypatch):
    """v after a step, from the gradient taken apart: (g + n p)² of Adam, less what n visits at once weigh
    more than one a step, n² p² - n p²."""
    monkeypatch.setattr(rounds, "ROWS_A_STEP", 64)  # four steps a round
    trainer, _ = train(replace(SMALL, arm="fixed", grad_clip=clip, resample_steps=0), activations, steps=7)
    sae, seen = trainer.sae, {}
    moment = trainer.adam.state[sae.W_dec]["exp_avg_sq"]
    before, add, step = moment.clone(), there(trainer.rounds).add_gradient, trainer.adam.step

    def added(*args):
        visited = there(add(*args))
        seen.update(rows=visited.rows, part=visited.grad.clone())
        return visited

    monkeypatch.setattr(trainer.rounds, "add_gradient", added)
    monkeypatch.setattr(
        trainer.adam, "step", lambda: (seen.setdefault("grad", there(sae.W_dec.grad).clone()), step())[1]
    )
    whole = {}
    clipped = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, most: whole.setdefault("norm", clipped(parameters, most)),
    )
    trainer.step(*next(activations.batches(512)))
    rows, grad = seen["rows"], seen["part"]
    assert rows.tolist() == list(range(192, 256)), "the eighth step is the last of its round"
    scale = min(1.0, clip / whole["norm"].item()) if clip else 1.0
    assert scale < 1 or not clip
    expected = 0.999 * before + 0.001 * seen["grad"].square()
    expected[rows] -= 0.001 * (1 - 1 / 4) * (scale * grad).square()
    torch.testing.assert_close(moment, expected.clamp(min=0), rtol=1e-4, atol=1e-12)
    assert (0.001 * 0.75 * (scale * grad).square() > 1e-3 * moment[rows]).any(), (
        "the comparison would be empty"
    )


def test_the_fast_step_follows_autograd_and_plain_adam(activations):
    """Same weights, same batches: hand-written gradients in the machine's fast dtype with fused Adam
    against autograd in fp32 with plain Adam; the FVU curves stay within 1 % of the variance of each other."""
    trainer = Trainer(
        replace(SMALL, target_l0=0.0, resample_steps=0), 0, activations.x.shape[1], 200, activations
    )
    plain = Trainer(
        replace(SMALL, target_l0=0.0, resample_steps=0), 0, activations.x.shape[1], 200, activations
    )
    plain.adam = torch.optim.Adam(
        plain.sae.parameters(), lr=SMALL.lr, betas=(0.9, 0.999), fused=False, foreach=False
    )
    plain.schedule = torch.optim.lr_scheduler.LambdaLR(plain.adam, plain._lr_factor)
    batches, gaps = list(activations.batches(512)), []
    for step in range(120):
        x, forget = batches[step % len(batches)]
        fast = trainer.step(x, forget)["fvu"].item()
        fvu, sparsity = plain.sae.loss_terms(x)
        (fvu + SMALL.l1 * sparsity).backward()
        remove_radial(there(plain.sae.W_dec.grad), plain.sae.W_dec)
        plain.adam.step()
        plain.adam.zero_grad()
        plain.schedule.step()
        unit_rows(plain.sae.W_dec)
        gaps.append(abs(fast - fvu.item()))
    assert max(gaps) < 0.01 and fvu.item() < 0.5
