"""What the LM says without and with the switch: its answer to every question in three formats, and how it
goes on with some prompts. Of an SAE or of a method without one, under the cell that SAEBench's rule chooses
(cells.py)."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_separation import saebench
from sae_separation.evals.cells import Halves, chosen_for, halves, said, under_cell
from sae_separation.evals.evaluator import Evaluator, finite
from sae_separation.exam import Batch, Completions, id_batches
from sae_separation.forms import Asker, Form
from sae_separation.lm import InterventionLM
from sae_separation.questions import Question

FORMATS = {  # as the LM read them in training, alone
    "letter": Form("letter", "own", "trained", "alone"),
    "cloze": Form("cloze", "no", "trained", "alone"),
    "prose": Form("prose", "no", "trained", "alone"),
}
N_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 16, 20  # prompts are half of forget, half of retain text


class Format(NamedTuple):
    """One format: its exam, the places of the questions that it asks, each one's answers in words, and the
    place that the LM itself answers with [n]."""

    exam: Completions
    places: list[int]
    words: list[tuple[str, ...]]
    plain: Tensor


class Paper(NamedTuple):
    """All questions in all formats that they and the LM allow, asked of the LM without an intervention: the
    questions, SAEBench's name of each one's subject, and the formats by name."""

    questions: list[Question]
    subjects: list[str]
    formats: dict[str, Format]

    def is_forget(self, places: list[int]) -> Tensor:
        """Which of the questions at these places are of the forget subject [n] (bool)."""
        return torch.tensor([self.subjects[i] == saebench.FORGET for i in places])


def paper(evaluator: Evaluator) -> Paper:
    """What is asked of every SAE alike."""
    by_subject = evaluator.questions.by_subject
    pairs = [(subject, question) for subject, some in by_subject.items() for question in some]
    out = Paper([question for _, question in pairs], [subject for subject, _ in pairs], {})
    asker = Asker(evaluator.testbed, out.questions, evaluator.context_size)
    evaluator.lm.reset_hooks()
    for name, form in FORMATS.items():
        if made := asker.exam(form):
            exam, places = made
            asked = [out.questions[i] for i in places]
            words = [q.values if name == "prose" else q.choices for q in asked]
            out.formats[name] = Format(exam, places, words, said(evaluator.lm, exam))
    return out


def questions(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict]:
    """Accuracy on forget and on retain questions in each format, without (lm_*) and with the chosen cell, and
    the share of the answers that it changes; the answers themselves; and the prompts with how the LM goes on.

    An answer is True where it is right both times, None where the question is not asked so, and else a pair,
    without and with: True if right, or the words that the LM gives."""
    evaluator = evaluator.examiner
    of = chosen_for(evaluator, sae)
    switch, cell = of.switch, of.cell
    asked: Paper = evaluator.once(paper)
    metrics, answers = {}, {}
    for name, one in asked.formats.items():
        with under_cell(switch, cell):
            now = said(switch.lm, one.exam)
        metrics |= of_format(name, one, now, asked.is_forget(one.places))
        for n, place in enumerate(one.places):
            right, words = int(one.exam.answers[n]), one.words[n]
            told = [True if s[n] == right else words[int(s[n])] for s in (one.plain, now)]
            answers[place, name] = True if told == [True, True] else told
    rows = []
    for place, (question, half) in enumerate(zip(asked.questions, half_of(evaluator))):
        row = [question.subject, question.question, question.choices[question.answer], half]
        rows.append(row + [answers.get((place, name)) for name in asked.formats])
    with under_cell(switch, cell):
        goes_on = continued(switch.lm, evaluator, evaluator.once(prompts))
    switch.lm.forget_answers()
    plain = evaluator.once(plainly_continued)
    details = of.recorded | {
        "columns": ["subject", "question", "right", "half", *asked.formats],
        "rows": rows,
        "prompts": [
            {"domain": domain, "prompt": text, "without": without, "with": now}
            for (domain, text, _), without, now in zip(evaluator.once(prompts), plain, goes_on)
        ],
    }
    return finite("questions", metrics, details)


def of_format(name: str, asked: Format, now: Tensor, forget: Tensor) -> dict[str, float]:
    """The metrics of one format, on the forget and on the retain questions that it asks, if there are any."""
    right, out = asked.exam.answers, {}
    for domain, group in (("forget", forget), ("retain", ~forget)):
        if group.any():
            out[f"lm_accuracy_{name}_{domain}"] = share((asked.plain == right)[group])
            out[f"accuracy_{name}_{domain}"] = share((now == right)[group])
            out[f"changed_{name}_{domain}"] = share((now != asked.plain)[group])
    return out


def share(which: Tensor) -> float:
    return which.float().mean().item()


def half_of(evaluator: Evaluator) -> list[str]:
    """Of each question, what it is for: to choose the cell, to report it, or to report what it does to facts
    that the forget text does not tell."""
    split: Halves = evaluator.once(halves)
    out = []
    for subject, some in evaluator.questions.by_subject.items():
        uses = {i: "choosing" for i in split.choosing[subject]}
        uses |= {i: "unseen" for i in split.unseen if subject == saebench.FORGET}
        out += [uses.get(i, "reporting") for i in range(len(some))]
    return out


# ------------------------------------------------------------------------------------------------ prompts


def prompts(evaluator: Evaluator) -> list[tuple[str, str, list[int]]]:
    """Domain, text and token ids of N_PROMPTS beginnings of held-out documents, each half as long as its
    document or PROMPT_TOKENS long."""
    testbed, out = evaluator.testbed, []
    asker = Asker(testbed, [], evaluator.context_size)
    for domain, documents in (("forget", asker.documents[True]), ("retain", asker.documents[False])):
        for text in documents[: N_PROMPTS // 2]:
            ids = asker.tokens(text)
            ids = ids[: min(PROMPT_TOKENS, max(1, len(ids) // 2))]
            out.append((domain, testbed.tokenizer.decode(ids), ids))
    return out


def plainly_continued(evaluator: Evaluator) -> list[str]:
    """How the LM goes on with the prompts without an intervention."""
    evaluator.lm.reset_hooks()
    return continued(evaluator.lm, evaluator, evaluator.once(prompts))


def continued(lm: InterventionLM, evaluator: Evaluator, begun: list[tuple[str, str, list[int]]]) -> list[str]:
    """What the LM says next, under its hook if there is one: NEW_TOKENS tokens, each the likeliest, up to an
    EOS."""
    testbed = evaluator.testbed
    how = {"device": lm.lm.device, "mixed_lengths": testbed.mixed_lengths}
    rows = [list(ids) for *_, ids in begun]
    for _ in range(NEW_TOKENS):
        for batch in id_batches(testbed.tokenizer, rows, **how):
            assert batch.rows is not None
            for row, token in zip(batch.rows, lm.ask(batch, likeliest).tolist()):
                rows[row] = rows[row] + [token]
    said_next = [row[len(ids) :] for row, (*_, ids) in zip(rows, begun)]
    eos = testbed.tokenizer.eos_token_id
    said_next = [new[: new.index(eos)] if eos in new else new for new in said_next]
    return [testbed.tokenizer.decode(new) for new in said_next]


def likeliest(batch: Batch, logits: Tensor) -> Tensor:
    """Tokens [row] from logits [row, 1, vocab]."""
    return logits[:, 0].argmax(-1)
