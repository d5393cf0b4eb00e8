"""DPG-Bench's score: answers to the questions of each prompt, yes or no.

The rules are those of the authors' program (Hu et al., 2024, arXiv:2403.05135,
dpg_bench/compute_dpg_bench.py), but that its categories are of the last picture of each prompt
alone, and here of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from jax_distill.evaluation.benchmarks.intervals import Figure, ratio
from jax_distill.evaluation.benchmarks.prompts import DensePrompt, in_order
from jax_distill.storage.files import FileError, read_json_lines
from jax_distill.storage.quoting import shown

Answers = Mapping[int, bool]
"""Of a picture, by the questions' numbers; true is yes."""

_FIX = "mend that line or ask again"
_REPLIES = {True: True, False: False, "yes": True, "no": False}


class _Line(msgspec.Struct):
    """A line of a file of answers."""

    item_id: str
    picture: Annotated[int, msgspec.Meta(ge=0, le=10**9)]
    answers: dict[str, bool | str]


def granted(prompt: DensePrompt, answers: Answers) -> dict[int, bool]:
    """The answers that count: a yes does not where that to a parent question is a no.

    Questions are taken in their order, so that a yes that does not count takes those of its own
    children along if they come after it.

    Args:
      prompt: with its questions.
      answers: to each of them.
    """
    counted = {question.number: answers[question.number] for question in prompt.questions}
    for question in prompt.questions:
        if not all(counted[parent] for parent in question.parents):
            counted[question.number] = False
    return counted


def picture_score(prompt: DensePrompt, answers: Answers) -> float:
    """The share of questions of a prompt with a yes that counts, 0..1."""
    counted = granted(prompt, answers)
    return sum(counted.values()) / len(counted)


def figures(
    answers: Sequence[Sequence[Answers]], prompts: Sequence[DensePrompt]
) -> dict[str, Figure]:
    """The scores, 0..100, as functions of the prompts' weights, see `intervals.Figure`.

    Args:
      answers: for each prompt, for each of its pictures.
      prompts: of them.

    Returns:
      "score", the mean over prompts of the mean over pictures. Then categories, broad ones such as
      "attribute" and detailed ones such as "attribute - color": shares of all their questions,
      with each yes counted whatever the parents.
    """
    scores = [
        np.mean([picture_score(prompt, each) for each in pictures])
        for pictures, prompt in zip(answers, prompts, strict=True)
    ]
    figures_by_name = {"score": ratio(np.array(scores), np.ones(len(prompts)), 100)}
    questions = [question for prompt in prompts for question in prompt.questions]
    broad = dict.fromkeys(question.broad for question in questions)
    detailed = sorted({question.detailed for question in questions} - set(broad))
    for category in (*broad, *detailed):
        totals, counts = np.zeros((2, len(prompts)))
        for place, (pictures, prompt) in enumerate(zip(answers, prompts)):
            asked = [q.number for q in prompt.questions if category in (q.broad, q.detailed)]
            totals[place] = sum(each[number] for each in pictures for number in asked)
            counts[place] = len(pictures) * len(asked)
        figures_by_name[category] = ratio(totals, counts, 100)
    return figures_by_name


def read_answers(path: Path, prompts: Sequence[DensePrompt]) -> list[list[dict[int, bool]]]:
    """Reads the answers to all questions about the pictures of a benchmark.

    Each line of the file is of one picture: {"item_id": "kettle0", "picture": 0, "answers": {"1":
    "yes", "2": "no", ..}}. Blanks and capitals do not matter; true is a yes and false a no. The
    authors' program takes any other text as a no; here it is refused, as a model that answers in
    sentences would have a low score unseen.

    Returns:
      For each prompt its pictures, in the order of their numbers, and for each the answers.

    Raises:
      FileError: the file is not of that form, has a picture twice or an answer that is neither yes
        nor no, or lacks an answer or the pictures of a prompt.
      FileNotFoundError: there is none.
    """
    asked = {prompt.item: {str(q.number): q.number for q in prompt.questions} for prompt in prompts}
    answered: dict[str, dict[int, dict[int, bool]]] = {item: {} for item in asked}
    for number, entry in read_json_lines(path, _Line, fix=_FIX):
        where = f"'{path}', line {number}"
        line = msgspec.convert(entry, _Line)
        numbers = asked.get(line.item_id)
        if numbers is None:
            raise FileError(f"{where}: there is no prompt {shown(line.item_id)}; {_FIX}")
        if line.picture in answered[line.item_id]:
            raise FileError(
                f"{where}: picture {shown(line.picture)} of {shown(line.item_id)} is listed twice;"
                " remove one"
            )
        if odd := sorted(numbers.keys() ^ line.answers.keys()):
            what = "is not answered" if odd[0] in numbers else "is not asked"
            raise FileError(f"{where}: question {shown(odd[0])} {what}; {_FIX}")
        replies = {
            key: answer.strip().lower() if isinstance(answer, str) else answer
            for key, answer in line.answers.items()
        }
        if odd := [key for key, reply in replies.items() if reply not in _REPLIES]:
            raise FileError(
                f"{where}: the answer to question {shown(odd[0])} is {shown(line.answers[odd[0]])},"
                f" neither yes nor no; {_FIX}"
            )
        answered[line.item_id][line.picture] = {
            numbers[key]: _REPLIES[reply] for key, reply in replies.items()
        }
    if lacking := [item for item, pictures in answered.items() if not pictures]:
        raise FileError(
            f"'{path}' has no answers about {len(lacking)} of {len(answered)} prompts, such as"
            f" {shown(lacking[0])}; ask about them, too"
        )
    return in_order(answered, path)
