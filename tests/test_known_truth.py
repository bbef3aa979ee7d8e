"""SAEs on activations whose features are known: what the benchmark draws and measures, on a tiny world."""

import json

import pytest
import torch

from benchmarks import known_truth
from benchmarks.known_truth import BASELINE, ROWS, TRUE, Settings, World
from sae_separation.errors import WrongRequest

TINY = Settings(shrink=32, samples=6_400, eval_samples=1_024, batch_size=64)
FEW = (BASELINE, "adaptive_directions", TRUE, "random directions", "SAELens BatchTopK")


@pytest.fixture(scope="module")
def world():
    return World(TINY, seed=0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of two seeds, made one after the other, in a file."""
    out = tmp_path_factory.mktemp("known") / "truth.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_truth, "ROWS", {name: ROWS[name] for name in FEW})
        known_truth.run(TINY, [0], out, "first")
        known_truth.run(TINY, [0, 1], out, "second")
    return out, json.loads(out.read_text())


def test_half_of_the_samples_are_forget_samples_and_the_labels_say_which(world):
    assert 512 / 10 <= world.forget.sum() < 512 / 10 + 85  # whole trees, and no more than it takes
    block = next(world.blocks())
    assert block.forget.sum() == len(block.forget) // 2 and len(block.x) == TINY.chunk
    again = next(world.blocks())
    assert torch.equal(block.x, again.x) and torch.equal(block.forget, again.forget)
    with known_truth.seeded(0, "block 0"):
        acts = world.sample(TINY.chunk)
    assert torch.equal((acts[:, world.forget] > 0).any(1), block.forget)
    torch.testing.assert_close(world.model.feature_dict(acts), block.x)


def test_the_true_dictionary_scores_1_and_random_directions_the_floor(results, world):
    from sae_lens.synthetic import mean_correlation_coefficient

    rows = results[1]["seeds"]["0"]["rows"]
    assert rows[TRUE]["mcc"] == pytest.approx(1) and rows[TRUE]["uniqueness"] == 1
    assert rows[TRUE]["mcc_forget"] == pytest.approx(1) and rows[TRUE]["mcc_others"] == pytest.approx(1)
    drawn = torch.randn(128, 24, generator=torch.Generator().manual_seed(5))
    floor = mean_correlation_coefficient(drawn, world.vectors)
    assert rows["random directions"]["mcc"] == pytest.approx(floor, abs=0.03)
    assert rows[TRUE]["explained_variance"] > rows["random directions"]["explained_variance"]


def test_a_seed_that_is_done_is_not_made_again_and_others_are_paired_with_the_baseline(results):
    out, found = results
    assert [seed["made_by"]["command"] for seed in found["seeds"].values()] == ["first", "second"]
    mcc = [[seed["rows"][name]["mcc"] for name in (TRUE, BASELINE)] for seed in found["seeds"].values()]
    (a, b), summary = (true - baseline for true, baseline in mcc), found["summary"]
    assert summary[TRUE]["mcc"]["less_baseline"] == pytest.approx((a + b) / 2)
    low, high = summary[TRUE]["mcc"]["interval_95"]
    assert high - low == pytest.approx(12.706 * abs(a - b), rel=1e-3)  # t of one degree of freedom
    assert summary[BASELINE]["mcc"]["interval_95"] == [0, 0]
    with pytest.raises(WrongRequest, match="made with other settings: give another --out"):
        known_truth.run(Settings(), [0], out, "third")
