"""A cell chosen by how it does however it is asked, and not in one form alone.

SAEBench's rule takes the cell that leaves the least in one form. Where several leave nothing there, it
chooses by the luck of guesses. Here a cell is judged by its worst case in CHOOSING forms, on the half of the
questions that chooses, and measured on the other half in all forms, as robustness does.

A worst case is 0 where more than a hundredth of the retain answers is lost: by its plain value the boldest
cell at the very edge is taken, and falls over it on other questions. So it is the mean over resampled
questions that decides, as a cell at the edge falls over it in many of the draws; then the same mean of the
mean score; of equals the first.
"""

from sae_separation.evals.cells import Halves, chosen_for, halves
from sae_separation.evals.evaluator import Evaluator, finite
from sae_separation.evals.robustness import (
    Examined,
    examined,
    examined_in,
    in_all_forms,
    resampled,
    undominated,
    without_questions,
)
from sae_separation.forms import Form
from sae_separation.progress import section

CHOOSING = [
    Form(how, header, wording, place)
    for how in ("letter", "cloze", "prose")
    for header in ("own" if how == "letter" else "no", "other")
    for wording in ("trained", "anew")
    for place in ("alone", "passage")
]
MOST = 12  # cells that are tried; of a larger grid those that no other beats in the one form
METRICS = ("worst_case_score", "mean_score", "knowledge_left_max", "kept_at_worst", "retain_kept_min")


def choosing(evaluator: Evaluator) -> Examined:
    """What cells are chosen by."""
    split: Halves = evaluator.once(halves)
    return examined_in(evaluator, split.choosing, (), CHOOSING)


def choice(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict, list[str]]:
    """The metrics of robustness under the cell that is chosen so; with what every cell that was tried came to
    where it was chosen, and notes."""
    evaluator = evaluator.examiner
    if few := without_questions(evaluator, "choice"):
        return dict.fromkeys(METRICS), {}, [few]
    switch, _, cells = chosen_for(evaluator, sae)
    tried = cells if len(cells) <= MOST else undominated(cells)
    by, exam = evaluator.once(choosing), evaluator.once(examined)
    if not by.forms or not exam.forms:
        return dict.fromkeys(METRICS), {}, ["choice: the LM answers in too few forms"]
    found = []
    for cell in section.steps([None, *tried], 0.7):
        metrics, _, right = in_all_forms(evaluator, by, switch, cell)
        draws = resampled(by, right, seed=0)
        expected = {f"expected_{m}": float(draws[m].mean()) for m in ("worst_case_score", "mean_score")}
        found.append({"cell": cell} | {m: metrics[m] for m in METRICS} | expected)
    best = max(found, key=lambda row: (row["expected_worst_case_score"], row["expected_mean_score"]))
    metrics, table, _ = in_all_forms(evaluator, exam, switch, best["cell"])
    switch.lm.forget_answers()
    details = {"cell": best["cell"], "needed": switch.needed if best["cell"] else {}, "cells": found}
    details |= {"forms": table, "chosen_by": [asked.form.name for asked in by.forms]}
    notes = [] if best["cell"] else ["choice: no cell does better than none: nothing was switched off"]
    return *finite("choice", {m: metrics[m] for m in METRICS}, details), notes
