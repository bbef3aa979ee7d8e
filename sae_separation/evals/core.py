"""SAEBench's core evaluation: L0, reconstruction, and what of the LM's loss the SAE recovers."""

import torch

from sae_separation import saebench
from sae_separation.errors import RunFailed
from sae_separation.evals.evaluator import Evaluator, finite

# ratios, NaN where the denominator is 0: nothing is reconstructed, or nothing was there to recover
RATIOS = (
    "explained_variance",
    "explained_variance_legacy",
    "cossim",
    "l2_ratio",
    "relative_reconstruction_bias",
    "ce_loss_score",
    "kl_div_score",
)


def proxy(evaluator: Evaluator):
    """The LM in the form that core takes any LM."""
    return saebench.shared_proxy(evaluator.lm, evaluator.testbed.tokenizer)


def core(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict]:
    """SAEBench's core evaluation, unchanged, on held-out text, half forget and half retain: metrics by leaf
    name, and SAEBench's own output."""
    testbed = evaluator.testbed
    forget, retain = (evaluator.held_out[domain].tokens for domain in ("forget", "retain"))
    n = min(testbed.n_held_out, len(forget), len(retain))
    contexts = torch.stack([forget[:n], retain[:n]], 1).flatten(0, 1)
    try:
        output = saebench.run_core(evaluator.once(proxy), sae, contexts, evaluator.special, testbed.name)
    except ZeroDivisionError as error:
        raise RunFailed(
            f"core: zeroing layer {testbed.layer} changes nothing in what the LM predicts, so SAEBench"
            " divides by 0: is the LM trained? --evals without core leaves it out"
        ) from error
    metrics = {k: v for group in output["eval_result_metrics"].values() for k, v in group.items()}
    return finite("core", metrics, output, may_be_undefined=RATIOS)
