"""SAEBench: all that is imported of it, patched in it and worked around.

SAEBench knows Gemma by name, loads its questions from the hub, names files after subjects and keeps its
results as pickles. It is given any LM, the testbed's questions and a private folder instead; its protocol,
its prompts and its scores stay its own. Importing it takes seconds, so functions do.
"""

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from sae_separation.questions import Question

SWEEP = {
    "retain_thresholds": [0.001, 0.01],
    "n_features_list": [5, 10, 20, 50],
    "multipliers": [1, 3, 10, 30],
}
AS_LISTED = ((0, 1, 2, 3),)
ALL_PERMUTATIONS = [list(p) for p in permutations(range(4))]
FORGET = "wmdp-bio"  # what SAEBench calls the forget subject


def as_expected(sae, device: str):
    """An SAE as sae_lens reads it, its config in the form that SAEBench expects."""
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    loaded = load_and_format_sae("", sae, device)
    assert loaded is not None  # None is for an SAE that it did not find
    return loaded[1]


def aliases(subjects: Iterable[str], forget_subject: str) -> dict[str, str]:
    """By the name that SAEBench is given, the user's subject. SAEBench names files after subjects, so that
    two can share one, and some names mean something to it."""
    return {FORGET if s == forget_subject else f"subject{i}": s for i, s in enumerate(subjects)}


def header(subject: str) -> str:
    """The line that SAEBench puts in front of a question."""
    from sae_bench.evals.unlearning.utils.var import PRE_QUESTION_FORMAT

    return PRE_QUESTION_FORMAT.format(subject=subject.replace("_", " "))


def letter_prompt(
    question: Question,
    permutation: Sequence[int],
    prompt_format: str | None = None,
    without_question=False,
    before: str | None = None,
) -> str:
    """The prompt that SAEBench's unlearning evaluation gives an LM, made by SAEBench's own function; with
    `before` in the header's place, if it is given."""
    from sae_bench.evals.unlearning.utils.metrics import convert_wmdp_data_to_prompt

    before = header(question.subject) if before is None else before
    return convert_wmdp_data_to_prompt(
        question.question, question.choices, prompt_format, before, permutation, without_question
    )


# ------------------------------------------------------------------------------------------------ unlearning


def top_features(rates: tuple[np.ndarray, np.ndarray], threshold: float, n: int) -> np.ndarray:
    """The first n features in SAEBench's order of clamping, of those whose retain rate is under the
    threshold; `rates` are firing rates [F] on forget and on retain text."""
    from sae_bench.evals.unlearning.utils.feature_activation import get_top_features

    return get_top_features(*rates, retain_threshold=threshold)[:n]


def right(probs: Tensor, answers: Tensor) -> Tensor:
    """Whether the likeliest choice of probs [..., 4] is the answer [...] (bool); not where it was never asked
    (NaN)."""
    return (probs.argmax(-1) == answers) & ~probs.isnan().any(-1)


@cache
def question_ids(path: Path) -> tuple[int, ...]:
    """Places of the chosen questions, from a file that SAEBench writes once into a private folder and reads
    for every answer."""
    return tuple(np.genfromtxt(path, ndmin=1, dtype=int).tolist())


def mcq_metrics(
    ask: Callable[..., tuple[Tensor, Tensor]],
    model,
    mcq_batch_size,
    artifacts_folder,
    dataset_name: str,
    target_metric: str | None = None,
    permutations: Sequence[Sequence[int]] = AS_LISTED,
    without_question: bool = False,
    split: str = "all",
    **_,
) -> dict[str, Any]:
    """Stands in for SAEBench's `calculate_MCQ_metrics`, which knows Gemma by name only: the same prompts and
    the same numbers for any LM. ask(subject, places of the chosen questions or None for all, permutations,
    without_question) gives probabilities [n, 4] and right choices [n]."""
    chosen = None
    if target_metric is not None:
        name = dataset_name if dataset_name == FORGET else f"mmlu-{dataset_name.replace('_', '-')}"
        chosen = question_ids(
            Path(artifacts_folder) / f"data/question_ids/{split}/{name}_{target_metric}.csv"
        )
    probs, answers = ask(dataset_name, chosen, permutations, without_question)
    correct = right(probs, answers).float()
    return {
        "mean_correct": correct.mean().item(),
        "total_correct": int(correct.sum()),
        "is_correct": correct.numpy(),
        "output_probs": probs.half().numpy(),
    }


def run_sweep(
    lm,
    features,
    rates: tuple[np.ndarray, np.ndarray],
    questions: dict[str, list[Question]],
    folder: Path,
    name: str,
    clamp: Callable,
    ask: Callable[..., tuple[Tensor, Tensor]],
    **settings,
) -> tuple[list[dict], float]:
    """SAEBench's unlearning sweep, by its own `run_eval_single_sae`: the cells (settings, accuracies, right
    or wrong by question) and SAEBench's score.

    `lm` is a lm.InterventionLM, `features` an interventions.ChosenFeatures, `rates` the firing rates of its
    features on forget and on retain text. `questions`, by SAEBench's names of subjects, are those that `ask`
    asks (`mcq_metrics`); `clamp` takes the place of SAEBench's intervention. Its files go into folder/name.
    Grad mode and random state are afterwards as before.
    """
    from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
    from sae_bench.evals.unlearning.utils import eval as sweep_eval
    from sae_bench.evals.unlearning.utils import feature_activation, metrics

    sparsities = folder / name / feature_activation.SPARSITIES_DIR
    sparsities.mkdir(parents=True)
    for rate, filename in zip(
        rates, (feature_activation.FORGET_FILENAME, feature_activation.RETAIN_FILENAME)
    ):
        np.savetxt(sparsities / filename, rate, fmt="%f")
    config = UnlearningEvalConfig(
        dataset_names=list(questions),
        model_name=lm.cfg.model_name,
        llm_batch_size=32,
        llm_dtype="float32",
        **settings,
    )

    def load_dataset(path: str, subject: str, split: str) -> list[dict]:
        return [asdict(q) for q in questions[subject]]

    def no_bar(iterable, **_):
        return iterable

    numpy_state, grad_mode = np.random.get_state(), torch.is_grad_enabled()
    np.random.seed(0)
    try:
        with (
            patch.object(metrics, "anthropic_clamp_resid_SAE_features", clamp),
            patch.object(metrics, "calculate_MCQ_metrics", partial(mcq_metrics, ask)),
            patch.object(metrics, "load_dataset", load_dataset),
            patch.object(metrics, "tqdm", no_bar),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # np.genfromtxt on subjects without a known question
            sweep_eval.run_eval_single_sae(lm, features, config, str(folder), name, force_rerun=False)
    finally:
        np.random.set_state(numpy_state)
        torch.set_grad_enabled(grad_mode)
        lm.reset_hooks()
    return read_sweep(folder / name / "results/metrics", list(questions))


def read_sweep(results: Path, subjects: list[str]) -> tuple[list[dict], float]:
    """The cells of a sweep and its score, from the files that SAEBench has just written into our private
    folder."""
    from sae_bench.evals.unlearning import main as unlearning

    score = float(unlearning.get_unlearning_scores(unlearning.get_metrics_df(str(results))))
    cells = []
    for path in sorted(results.glob("*.pkl")):
        measured = pickle.loads(path.read_bytes())
        settings = unlearning.get_params(path.name)
        assert settings is not None  # None is for a file of another name
        multiplier, n_features, _, threshold = settings
        forget = measured[FORGET]["is_correct"]
        retain = np.concatenate([measured[s]["is_correct"] for s in subjects if s != FORGET])
        cells.append(
            {
                "retain_threshold": float(threshold),
                "n_features": int(n_features),
                "multiplier": int(multiplier),
                "forget_accuracy": float(forget.mean()),
                "retain_accuracy": float(retain.mean()),
                "forget": forget,
                "retain": retain,
            }
        )
    return cells, score


# ------------------------------------------------------------------------------------------------------ core


def run_core(proxy, sae, contexts: Tensor, special: Tensor, model_name: str) -> dict[str, Any]:
    """SAEBench's core evaluation, unchanged, of an SAE on contexts [n, pos], and its own output; `proxy` is a
    `shared_proxy`, `special` ids [m] count in no reconstruction. Raises ZeroDivisionError where zeroing the
    layer changes nothing."""
    import datasets
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_lens import ActivationsStore

    n_batches = max(1, len(contexts) // 16)
    settings = CoreEvalConfig(
        model_name=model_name,
        batch_size_prompts=16,
        context_size=contexts.shape[1],
        dataset="held-out text",
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
    )
    dataset = datasets.Dataset.from_dict({"input_ids": contexts.tolist()}).to_iterable_dataset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        store = ActivationsStore.from_sae(
            proxy, sae, dataset=dataset, context_size=contexts.shape[1], device=str(sae.device)
        )
        groups, features = core.run_evals(sae, store, proxy, settings, ignore_tokens=set(special.tolist()))
    groups["misc_metrics"] = core.calculate_misc_metrics(features)
    return {"eval_type_id": "core", "eval_config": asdict(settings), "eval_result_metrics": groups}


class Passes:
    """What passes of the LM gave, by their kind and the content of their tokens; at most `most_bytes` are
    kept, and what was not is made again."""

    def __init__(self, most_bytes: int):
        self.left, self.kept = most_bytes, {}

    def once(self, kind: str, tokens: Tensor, make: Callable):
        key = kind, tokens.cpu().numpy().tobytes()
        if key in self.kept:
            return self.kept[key]
        out = make()
        size = sum(t.nbytes for t in ([out] if isinstance(out, Tensor) else out))
        if size <= self.left:
            self.kept[key] = out
            self.left -= size
        return out


def list_as_tuple(module, args, output):
    return tuple(output) if isinstance(output, list) else output


def shared_proxy(lm, tokenizer, most_bytes: int = 2**29):
    """An lm.InterventionLM as a sae_lens HookedProxyLM, which core asks for. It does once a batch what core
    asks of it for every SAE alike: the layers up to the hook, from which all other passes go on; and, while
    there is room, the clean and the zero-ablated pass."""
    from sae_lens.load_model import HookedProxyLM

    passes = Passes(most_bytes)

    class SharedProxy(HookedProxyLM):
        def resid(self, tokens):
            return passes.once("resid", tokens, partial(lm.resid, tokens))

        def run_with_hooks(self, tokens, fwd_hooks, **kwargs):
            hooked = partial(super().run_with_hooks, fwd_hooks=fwd_hooks, **kwargs)
            run = partial(self.resumed, tokens, hooked)
            if getattr(fwd_hooks[0][1], "__name__", "") == "standard_zero_ablate_hook":
                return passes.once("ablated", tokens, run)
            return run()

        def run_with_cache(self, tokens, **kwargs):
            """No logits: core stops the LM here, for the stream at the hook layer alone."""
            return None, {lm.hook_name: self.resid(tokens).to(lm.lm.dtype)}

        def forward(self, tokens, **kwargs):
            run = super().forward
            if any(point.fwd_hooks for point in self.hook_dict.values()):
                return run(tokens, **kwargs)
            return passes.once("clean", tokens, partial(self.resumed, tokens, partial(run, **kwargs)))

        def resumed(self, tokens, run):
            """run(tokens), above the hook layer alone."""
            with lm.resumed_from(self.resid(tokens)):
                return run(tokens)

    lm.layers[lm.layer].register_forward_hook(list_as_tuple)  # sae_lens' hook ignores lists
    return SharedProxy(lm.lm, tokenizer, hook_names=[lm.hook_name])


# ----------------------------------------------------------------------------------------- without questions


@contextlib.contextmanager
def quietly():
    """Inside, what SAEBench and its libraries print and warn of, and their bars, are not shown."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run_meta_structure(sae, **settings) -> dict[str, Any]:
    """SAEBench's meta-structure evaluation, unchanged, of the rows of W_dec; `settings` in place of
    SAEBench's."""
    from sae_bench.evals.meta_structure import main as meta
    from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig

    config = MetaStructureEvalConfig(**settings)
    meta._set_random_seed(config.random_seed)
    with quietly(), torch.enable_grad():
        output = meta.run_eval_single_sae("", "", sae, config, str(sae.device))
    metrics = asdict(output.eval_result_metrics.meta_structure)
    return {"eval_type_id": "meta_structure", "eval_config": asdict(config), "eval_result_metrics": metrics}


def keep_probing_activations(lm, tokenizer, datasets: Sequence[str], longest: int, folder: Path):
    """Have sae-probes' own code keep, in its folder and form, the residual stream (fp32) of an
    lm.InterventionLM at the last token of every text of its data sets; of longer texts the last `longest`
    tokens count."""
    from sae_probes import generate_model_activations as generate

    tokenizer = copy.deepcopy(tokenizer)  # sae-probes sets the sides on which it pads and cuts
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def run_with_cache(tokens: Tensor, **_):
        return None, {lm.hook_name: lm.resid(tokens)}

    model: Any = SimpleNamespace(tokenizer=tokenizer, run_with_cache=run_with_cache)
    with quietly():
        generate.ensure_dataset_activations(
            lm.cfg.model_name,
            list(datasets),
            [lm.hook_name],
            folder / "activations",
            device=str(lm.cfg.device),
            max_seq_len=longest,
            batch_size=128,  # each stops the LM once
            model=model,
        )


def run_sparse_probing(sae, lm, datasets: Sequence[str], folder: Path, name: str) -> dict[str, Any]:
    """SAEBench's sparse probing by sae-probes, unchanged, of an SAE, on what `keep_probing_activations` has
    kept in the same folder. `name` is one that no other SAE has."""
    from sae_bench.evals.sparse_probing_sae_probes import main as probing
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig

    config = SparseProbingSaeProbesEvalConfig(
        model_name=lm.cfg.model_name,
        dataset_names=list(datasets),
        results_path=str(folder / "probes"),
        model_cache_path=str(folder / "activations"),
    )

    def dataset_of(path: Path) -> str:
        return path.stem.partition(f"_{lm.hook_name}_")[0]  # SAEBench's knows TransformerLens' names of hooks

    with quietly(), torch.no_grad(), patch.object(probing, "_parse_dataset_from_filename", dataset_of):
        (output,) = probing.run_eval(config, [(name, sae)], str(sae.device), str(folder / "output")).values()
    settings = {k: v for k, v in asdict(config).items() if not k.endswith("_path")}
    groups = {
        part: {k: v for k, v in metrics.items() if v is not None}
        for part, metrics in output["eval_result_metrics"].items()
    }
    details = {
        found["dataset_name"]: {
            k: v for k, v in found.items() if k.startswith(("sae_top_", "llm_")) and v is not None
        }
        for found in output["eval_result_details"]
    }
    return {
        "eval_type_id": "sparse_probing_sae_probes",
        "eval_config": settings,
        "eval_result_metrics": groups,
        "eval_result_details": details,
    }
