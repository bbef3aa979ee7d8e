"""SAEBench's meta-structure evaluation: how much of the decoder a small SAE of its rows explains."""

from sae_separation import saebench
from sae_separation.evals.evaluator import Evaluator, finite
from sae_separation.losses import has_bf16


def meta_structure(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict]:
    """The share of the variance of W_dec's rows that a BatchTopK SAE of a quarter of the width explains
    (Bussmann et al., ICML 2025, appendix D.1), and SAEBench's own output. It needs no text and no LM. Where
    bfloat16 is slow, on a CPU without instructions for it, SAEBench's autocast to it is left out."""
    output = saebench.run_meta_structure(sae, autocast=has_bf16(sae.device))
    metrics = {k: v for k, v in output["eval_result_metrics"].items() if k != "train_time_seconds"}
    return finite("meta_structure", metrics, output)
