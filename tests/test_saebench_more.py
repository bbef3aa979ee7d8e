"""SAEBench's evaluations that need no questions: meta-structure, and sparse probing by sae-probes."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from sae_separation import evals, saebench
from sae_separation.evals import meta_structure, sparse_probing
from sae_separation.export import build, load_exported, save
from sae_separation.losses import has_bf16

ROWS = {row.name: row for row in evals.ROWS}
SHORT = "117_us_state_FL"  # the smallest data set of sae-probes


def sae_of(testbed, folder, W_dec: torch.Tensor):
    F, D = W_dec.shape
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    weights = {"W_enc": W_dec.T, "b_enc": torch.zeros(F), "W_dec": W_dec, "b_dec": torch.zeros(D)}
    about = {"model_name": testbed.name, "hook_name": testbed.hook_name, "hook_layer": testbed.layer}
    save(build("standard", weights), folder, about | {"context_size": 32, "prepend_bos": True})
    return load_exported(folder)


def test_both_are_made_only_where_they_are_named_and_of_saes_alone():
    for name in ("sparse_probing", "meta_structure"):
        assert ROWS[name].needs_sae and not ROWS[name].by_default and not ROWS[name].asks


def test_meta_structure_tells_a_decoder_of_repeated_rows_from_a_random_one(tmp_path, monkeypatch):
    testbed = SimpleNamespace(name="tiny", hook_name="model.layers.1", layer=1)
    generator = torch.Generator().manual_seed(0)
    repeated = torch.randn(4, 16, generator=generator).repeat(16, 1)
    random = torch.randn(64, 16, generator=generator)
    short = {"train_steps": 200, "train_batch_size": 64, "learning_rate": 5e-3, "k": 2}
    monkeypatch.setattr(saebench, "run_meta_structure", partial(saebench.run_meta_structure, **short))
    nothing: Any = None
    explained = []
    for i, W_dec in enumerate((repeated, random)):
        sae = sae_of(testbed, tmp_path / str(i), W_dec)
        metrics, output = meta_structure.meta_structure(nothing, sae, 0, "it")
        explained.append(metrics["decoder_fraction_variance_explained"])
        assert output["eval_config"]["autocast"] == has_bf16(sae.device), "elsewhere it takes minutes"
        assert not sae.W_dec.requires_grad and torch.is_grad_enabled()
    assert 1 >= explained[0] > explained[1] + 0.1


@pytest.fixture(scope="module")
def probed(facts_evaluator, tmp_path_factory):
    """Metrics and details of one SAE on one data set, and the folder."""
    testbed, made = facts_evaluator.testbed, pytest.MonkeyPatch()
    W_dec = torch.randn(48, tiny.D_IN, generator=torch.Generator().manual_seed(0))
    sae = sae_of(testbed, tmp_path_factory.mktemp("sae"), W_dec)
    made.setattr(sparse_probing, "datasets", lambda: [SHORT])
    try:
        yield sparse_probing.sparse_probing(facts_evaluator, sae, 0, "tiny_seed0")
    finally:
        made.undo()


def test_probes_read_the_stream_at_the_last_token_of_each_text(facts_evaluator, probed):
    from sae_probes.utils_data import read_numbered_dataset_df

    testbed = facts_evaluator.testbed
    (file,) = (facts_evaluator.artifacts / "probing/activations").glob("*/*.pt")
    kept = torch.load(file, weights_only=True)
    texts = read_numbered_dataset_df(SHORT)["prompt"].tolist()
    assert kept.shape == (len(texts), tiny.D_IN)
    for i in (0, len(texts) // 2):
        ids = torch.tensor([testbed.tokenizer(texts[i])["input_ids"]])
        torch.testing.assert_close(kept[i], facts_evaluator.lm.resid(ids)[0, -1], rtol=1e-4, atol=1e-4)


def test_probes_metrics_are_saebenchs_and_finite(probed):
    metrics, details = probed
    names = [f"sae_top_{k}_test_{what}" for k in (1, 2, 5) for what in ("accuracy", "auc", "f1")]
    assert set(metrics) == {*names, *(f"llm_test_{what}" for what in ("accuracy", "auc", "f1"))}
    assert all(0 <= value <= 1 for value in metrics.values()) and set(ROWS["sparse_probing"].shown) <= set(
        metrics
    )
    assert details["eval_result_details"] == {SHORT: metrics} and json.dumps(details, allow_nan=False)
