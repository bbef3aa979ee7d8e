"""The forms in which a fact can be asked for: by letter, by cloze or in prose; under its subject's header,
none or another subject's; worded as in the text or anew; alone, or behind something else.

    asker = Asker(testbed, questions, context_size=128)
    for form in forms_of(testbed):
        exam = asker.exam(form, places)
"""

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import islice, product

from torch import Tensor

from sae_separation import saebench
from sae_separation.exam import Completions, most_positions, single_letters
from sae_separation.lm import Testbed, fast_lm_tokens
from sae_separation.questions import Question

HOW = ("letter", "cloze", "prose")
HEADERS = ("own", "no", "other")
WORDINGS = ("trained", "anew")
PLACES = ("alone", "example", "passage", "sheet")
N_DOCUMENTS = 1000  # held out, of each domain, that passages are taken from


@dataclass(frozen=True)
class Form:
    """how: `letter` (SAEBench's prompt), `cloze` (`Question: ... Answer:`, ended by a choice) or `prose` (a
    sentence, ended by one of the relation's values). header: SAEBench's line that names the subject: its own,
    none, or that of a subject of the other domain. wording: as in the text, or anew. place: alone; behind a
    worked example of its own subject; behind a passage of the other domain's held-out text, as long as the
    context allows; or in a sheet, behind a worked example of each domain."""

    how: str
    header: str
    wording: str
    place: str

    @property
    def name(self) -> str:
        return "_".join(astuple(self))


FORMS = [Form(*parts) for parts in product(HOW, HEADERS, WORDINGS, PLACES)]


def tells(text: str, question: Question) -> bool:
    """Whether a text may state the fact that is asked: it holds the right answer, and the entity if the
    question names one."""
    return question.choices[question.answer] in text and question.entity in text


class Asker:
    """A testbed's questions in every form that they allow; the same examples and passages every time.

    `questions` are those of the testbed, by subject; nothing that stands in front of one states its fact.
    """

    def __init__(self, testbed: Testbed, questions: Sequence[Question], context_size: int):
        self.testbed, self.questions, self.context_size = testbed, questions, context_size
        self.by_subject: dict[str, list[Question]] = testbed.questions
        self.retain = [s for s in testbed.questions if s != testbed.forget_subject]

    def allowed(self, form: Form, question: Question) -> bool:
        """Whether the question has what the form needs."""
        if form.how == "prose":
            right = question.choices[question.answer] in question.values
            return right and len(question.sentences) > WORDINGS.index(form.wording)
        return form.wording == "trained" or bool(question.rephrased)

    def exam(self, form: Form) -> tuple[Completions, list[int]] | None:
        """The questions that allow the form, asked in it, and their places. None where there are none, where
        letters are more than one token of the LM's tokenizer, and where a prompt exceeds its positions."""
        testbed, by_letter = self.testbed, form.how == "letter"
        places = [i for i, q in enumerate(self.questions) if self.allowed(form, q)]
        if not places or by_letter and self.letters is None:
            return None
        how = {"device": testbed.lm.device, "mixed_lengths": testbed.mixed_lengths}
        how |= {"tokens_per_batch": fast_lm_tokens(testbed)}
        how |= {"spelled_out": by_letter and testbed.prompt_format is not None}
        how |= {"asked": [self.ask(form, i) for i in places], "letters": self.letters if by_letter else None}
        most = most_positions(testbed.lm.config.to_dict())
        exam = Completions(testbed.tokenizer, shared_stems=testbed.shared_stems, **how)
        if testbed.shared_stems and exam.longest > min(most, testbed.alone_up_to):  # a mask is no window
            exam = Completions(testbed.tokenizer, **how)
        return (exam, places) if exam.longest <= most else None

    @cached_property
    def letters(self) -> Tensor | None:
        """As Completions takes them."""
        found = single_letters(self.testbed.tokenizer, self.testbed.prompt_format)
        return None if found is None else found.to(self.testbed.lm.device)

    def ask(self, form: Form, place: int) -> tuple[str, tuple[str, ...], int]:
        """The text in front of the answer, the answers there are (none: letters), and the right one."""
        question = self.questions[place]
        rng = random.Random(f"{question.subject} {question.question}")
        before = self.header(form, question, place) + self.examples(form, question, rng)
        if form.place == "passage":
            used = self.prompt(form, question, before)
            before = self.passage(question, self.context_size - 4 - len(self.tokens(used)), rng) + before
        right = question.choices[question.answer]
        ends = {"letter": (), "cloze": question.choices, "prose": question.values}[form.how]
        text = self.prompt(form, question, before)
        return text, ends, ends.index(right) if form.how == "prose" else question.answer

    def header(self, form: Form, question: Question, place: int) -> str:
        if form.header == "no":
            return ""
        other = self.testbed.forget_subject
        if question.subject == other:
            other = self.retain[place % len(self.retain)]
        return saebench.header(question.subject if form.header == "own" else other)

    def examples(self, form: Form, question: Question, rng: random.Random) -> str:
        """Worked examples in the question's own form, none of which states its fact."""
        if form.place not in ("example", "sheet"):
            return ""
        pools = [self.by_subject[question.subject]]
        if form.place == "sheet":
            others = [q for subject in self.retain for q in self.by_subject[subject]]
            pools = [self.by_subject[self.testbed.forget_subject], others]
            rng.shuffle(pools)
        return "".join(self.example(form, question, rng.sample(pool, len(pool))) for pool in pools)

    def example(self, form: Form, question: Question, pool: list[Question]) -> str:
        """The first of a pool that can stand in front of a question; "" where none can."""
        for other in pool:
            if self.allowed(replace(form, wording="trained"), other) and other != question:
                text = self.worked(form, other)
                if not tells(text, question):
                    return text
        return ""

    def worked(self, form: Form, example: Question) -> str:
        """An example with its answer, worded as in the text."""
        right = example.choices[example.answer]
        if form.how == "prose":
            return f"{example.sentences[0]} {right}. "
        if form.how == "cloze":
            return f"Question: {example.question}\nAnswer: {right}\n\n"
        return f"{saebench.letter_prompt(example, range(4), before='')} {'ABCD'[example.answer]}\n\n"

    def prompt(self, form: Form, question: Question, before: str) -> str:
        anew = form.wording == "anew"
        if form.how == "prose":
            return before + question.sentences[WORDINGS.index(form.wording)]
        asked = replace(question, question=question.rephrased) if anew else question
        if form.how == "cloze":
            return f"{before}Question: {asked.question}\nAnswer:"
        return saebench.letter_prompt(asked, range(4), self.testbed.prompt_format, before=before)

    def tokens(self, text: str) -> list[int]:
        return self.testbed.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def documents(self) -> dict[bool, list[str]]:
        """Held-out documents that are not of the forget domain (False) and that are (True), or their
        beginnings."""
        longest = 8 * self.context_size
        texts = {False: self.testbed.retain.held_out, True: self.testbed.forget.held_out}
        return {
            forget: [dict(row)["text"][:longest] for row in islice(text, N_DOCUMENTS)]
            for forget, text in texts.items()
        }

    def passage(self, question: Question, room: int, rng: random.Random) -> str:
        """Documents of the other domain, `room` tokens of them; "" where nothing fits."""
        pool, text, ids = self.documents[question.subject != self.testbed.forget_subject], "", []
        for document in rng.sample(pool, min(len(pool), 64)):
            if len(ids) >= room:
                break
            if not tells(document, question):
                text += document + "\n\n"
                ids = self.tokens(text)
        if room <= 0 or not ids:
            return ""
        return self.testbed.tokenizer.decode(ids[:room]).rstrip() + "\n\n"
