"""SAEBench's sparse probing: what a few features of an SAE tell of 113 properties of texts."""

from pathlib import Path

from sae_separation import saebench
from sae_separation.evals.evaluator import Evaluator, finite
from sae_separation.exam import most_positions


def datasets() -> list[str]:
    """Of sae-probes, which holds their texts."""
    from sae_probes import DATASETS

    return list(DATASETS)


def probing_folder(evaluator: Evaluator) -> Path:
    """The private folder that holds what the LM gives for every text; made once for all SAEs."""
    folder, testbed = evaluator.artifacts / "probing", evaluator.testbed
    longest = int(min(1024, most_positions(testbed.lm.config.to_dict())))
    saebench.keep_probing_activations(evaluator.lm, testbed.tokenizer, datasets(), longest, folder)
    return folder


def sparse_probing(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict]:
    """Accuracy, AUC and F1 of logistic regressions on 1, 2 and 5 features, chosen by mean difference, on the
    data sets of sae-probes (Kantamneni et al., arXiv 2502.16681), and those on the whole stream (llm_);
    details by data set."""
    folder = evaluator.once(probing_folder)
    output = saebench.run_sparse_probing(sae, evaluator.lm, datasets(), folder, name)
    metrics = {k: v for group in output["eval_result_metrics"].values() for k, v in group.items()}
    return finite("sparse_probing", metrics, output)
