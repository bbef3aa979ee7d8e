"""The evaluations of an SAE: one row each. Imports no torch, so that the command line and plot.py can read
the rows.

An evaluation is a file with a function, and a row. The function takes the Evaluator (evaluator.py: LM,
contexts, questions), an SAE as read back from its files, the seed and a name that no other SAE has. It
returns metrics (name -> number, or None where undefined), details (what eval/ keeps of them) and, if there
are any, notes: warnings of how the metrics are to be read.
"""

import pkgutil
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One evaluation: its name on the command line, its section in final_info.json, its function
    (module:name), the metrics that are `shown` in the summary of a run, and those with a column (metric ->
    its head) in the tables of plot.py. `asks`: it asks the LM questions. Not `by_default`: it is made only
    where it is named. `needs_sae`: it has no meaning for a method without one. `seconds`: about how long it
    takes of one SAE of the embedded testbed; progress is counted in it."""

    name: str
    section: str
    function: str
    shown: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    says: dict[str, str] = field(default_factory=dict)
    asks: bool = False
    by_default: bool = True
    needs_sae: bool = False
    seconds: float = 10

    def fits(self, settings) -> bool:
        """Whether it has a meaning for a run of these settings."""
        return not (self.needs_sae and settings.arm in settings.without_sae)

    def measure(self, evaluator, sae, seed: int, name: str) -> tuple[dict, dict, list[str]]:
        """Metrics, details and notes of one SAE."""
        metrics, details, *notes = pkgutil.resolve_name(self.function)(evaluator, sae, seed, name)
        return metrics, details, sum(notes, [])


GAIN = "forget_ce_gain_at_retain_ce_cost_0.05"
ROWS = [
    Row(
        "core",
        "core",
        "sae_separation.evals.core:core",
        seconds=5,
        shown=("l0", "explained_variance", "ce_loss_score", "frac_alive"),
        columns={
            "l0": "L0",
            "explained_variance": "expl. var.",
            "ce_loss_score": "CE recovered",
            "frac_alive": "alive",
        },
        says={
            "l0": "active features a token",
            "explained_variance": "share of the activations' variance that the SAE explains",
            "ce_loss_score": "share of the cross-entropy lost to zero ablation that the reconstruction keeps",
            "frac_alive": "share of features that fire on held-out text",
        },
        needs_sae=True,
    ),
    Row(
        "unlearning",
        "unlearning",
        "sae_separation.evals.unlearning:unlearning",
        seconds=45,
        shown=(
            "unlearning_score",
            "unlearning_score_conditional",
            "unlearning_score_guardrail",
            "random_feature_score",
            "forget_accuracy",
            "retain_accuracy",
        ),
        columns={
            "unlearning_score": "unlearning",
            "unlearning_score_guardrail": "with guardrail",
            "random_feature_score": "random floor",
        },
        says={
            "unlearning_score": "SAEBench's: 1 less the lowest accuracy on known forget questions that a "
            "clamp reaches with 0.99 of the retain questions kept",
            "unlearning_score_guardrail": "the same, the clamp acting on texts recognised as forget text",
            "random_feature_score": "the same for random features",
        },
        asks=True,
    ),
    Row(
        "corpus",
        "corpus_unlearning",
        "sae_separation.evals.corpus:corpus",
        seconds=30,
        shown=(GAIN,),
        columns={GAIN: "forget CE gain"},
        says={
            GAIN: "most cross-entropy added on held-out forget text at a cost of at most 0.05 on retain "
            "text, nats a token"
        },
    ),
    Row(
        "geometry",
        "geometry",
        "sae_separation.evals.geometry:geometry",
        seconds=1,
        shown=("omega", "mean_max_cosine", "omega_between_domains"),
        columns={"omega": "Ω", "mean_max_cosine": "mean max cos"},
        says={
            "omega": "mean squared cosine of two features' decoder rows, times d_in: 1 for random "
            "directions, 0 for orthogonal ones",
            "mean_max_cosine": "mean over features of the largest |cosine| with another",
        },
        needs_sae=True,
    ),
    Row(
        "robustness",
        "robustness",
        "sae_separation.evals.robustness:robustness",
        seconds=110,
        shown=(
            "standard_score",
            "worst_case_score",
            "mean_score",
            "knowledge_left_max",
            "kept_at_worst",
            "unseen_worst_case_score",
            "worst_case_score_4bit",
        ),
        columns={"worst_case_score": "worst case", "mean_score": "mean of forms"},
        says={
            "worst_case_score": "1 less the most knowledge left in any form of asking; 0 where a form keeps "
            "too little of the rest",
            "mean_score": "mean over forms of 1 less the knowledge left, 0 for one that keeps too little",
        },
        asks=True,
        by_default=False,
    ),
    Row(
        "choice",
        "choice",
        "sae_separation.evals.choice:choice",
        seconds=120,
        shown=("worst_case_score", "mean_score", "knowledge_left_max", "kept_at_worst"),
        says={
            "worst_case_score": "the worst case of the cell whose worst case in 24 forms is best on average "
            "over resampled questions, on the other half"
        },
        asks=True,
        by_default=False,
    ),
    Row(
        "depth",
        "depth",
        "sae_separation.evals.depth:depth",
        seconds=10,
        shown=("depth_score", "depth_score_4bit", "readout_forget", "readout_retain"),
        columns={"depth_score": "depth"},
        says={
            "depth_score": "how little a linear readout of later layers finds of the facts: 0 as in the "
            "LM, 1 as in the oracle"
        },
        asks=True,
        by_default=False,
    ),
    Row(
        "relearning",
        "relearning",
        "sae_separation.evals.relearning:relearning",
        seconds=65,
        shown=(
            "left_before",
            "left_after_100_steps",
            "left_after_100_steps_whole_lm",
            "left_after_100_steps_without_facts",
            "oracle_left_after_100_steps",
        ),
        columns={"left_after_100_steps": "relearned"},
        says={
            "left_after_100_steps": "knowledge left of facts that are not shown after 100 steps of "
            "fine-tuning on the other half"
        },
        asks=True,
        by_default=False,
    ),
    Row(
        "features",
        "features",
        "sae_separation.evals.features:features",
        seconds=10,
        shown=("n_alive", "n_leaning_to_forget", "n_clamped", "n_that_change_answers"),
        asks=True,
        by_default=False,
        needs_sae=True,
    ),
    Row(
        "questions",
        "questions",
        "sae_separation.evals.answers:questions",
        seconds=8,
        shown=(
            "changed_letter_forget",
            "changed_letter_retain",
            "changed_cloze_forget",
            "changed_cloze_retain",
        ),
        asks=True,
        by_default=False,
    ),
    Row(
        "sparse_probing",
        "sparse_probing",
        "sae_separation.evals.sparse_probing:sparse_probing",
        seconds=7200,
        shown=("sae_top_1_test_accuracy", "sae_top_5_test_accuracy", "llm_test_accuracy"),
        columns={"sae_top_1_test_accuracy": "probing, 1 feature"},
        says={
            "sae_top_1_test_accuracy": "accuracy of a logistic regression on one feature, mean over the data "
            "sets of sae-probes"
        },
        by_default=False,
        needs_sae=True,
    ),
    Row(
        "meta_structure",
        "meta_structure",
        "sae_separation.evals.meta_structure:meta_structure",
        seconds=60,
        shown=("decoder_fraction_variance_explained",),
        columns={"decoder_fraction_variance_explained": "meta-SAE"},
        says={
            "decoder_fraction_variance_explained": "variance of the decoder's rows that an SAE of a quarter "
            "of the width explains"
        },
        by_default=False,
        needs_sae=True,
    ),
]


def names() -> tuple[str, ...]:
    """As the command line has them."""
    return tuple(row.name for row in ROWS)


def rows_of(evals: tuple[str, ...]) -> list[Row]:
    """The rows that a command asks for, in the order of the registry; where none are given those that are
    made by default, "none" is none."""
    return [row for row in ROWS if (row.name in evals if evals else row.by_default)]


def seconds_of(rows: list[Row], settings) -> float:
    """About how long an SAE of a run of these settings takes on the embedded testbed."""
    return sum(row.seconds for row in rows if row.fits(settings))
