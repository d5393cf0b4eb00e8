"""Prompts of GenEval and of DPG-Bench, read as their authors publish them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec

from jax_distill.data.sources.source import check_caption
from jax_distill.storage.files import FileError, read_json_lines, read_text
from jax_distill.storage.quoting import shown

Findings = TypeVar("Findings")

BUNDLED = Path(__file__).parent / "bundled"
"""Few prompts of our own in both formats, `geneval.jsonl` and `dpg.csv`, for tests and trials."""

Color = Literal[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
]
Relation = Literal["left of", "right of", "above", "below"]
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]
ClassName = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]

OVERALL = "score"
"""What the figure of a whole benchmark is called, beside those of its tasks or categories."""

_COLUMNS = (
    *("item_id", "text", "proposition_id", "dependency", "tuple"),
    "question_natural_language",
)


_SHORT = {"question": "question_natural_language"}


class Included(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """A clause of what a picture has: `count` objects of a class or more.

    Attributes:
      name: of the class.
      count: of objects.
      color: of each of them.
      position: a relation to the objects of an earlier clause, and the place of that clause.
    """

    name: ClassName = msgspec.field(name="class")
    count: Count
    color: Color | None = None
    position: tuple[Relation, int] | None = None


class Excluded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A clause of what a picture has not: `count` objects of a class or more."""

    name: ClassName = msgspec.field(name="class")
    count: Count


class Prompt(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """A prompt of GenEval (Ghosh et al., 2023, arXiv:2310.11513).

    `msgspec.to_builtins` makes the published form of it.

    Attributes:
      tag: the task; "counting" is judged with a threshold of its own.
      include: clauses that all must hold.
      exclude: clauses of which none may be met.
      prompt: the text to be drawn.
    """

    tag: ClassName
    include: tuple[Included, ...] = ()
    exclude: tuple[Excluded, ...] = ()
    prompt: str


class Question(NamedTuple):
    """A question about a picture.

    Attributes:
      number: among those of the prompt, proposition_id in the file.
      parents: numbers of the questions without whose yes a yes is worth nothing.
      broad: category, such as "attribute".
      detailed: such as "attribute - color".
      text: in English.
    """

    number: int
    parents: tuple[int, ...]
    broad: str
    detailed: str
    text: str


class DensePrompt(NamedTuple):
    """A prompt of DPG-Bench (Hu et al., 2024, arXiv:2403.05135).

    Attributes:
      item: its name, which is also that of its grid of pictures.
      text: to be drawn.
      questions: in the order of the file.
    """

    item: str
    text: str
    questions: tuple[Question, ...]


def read_geneval(path: Path) -> list[Prompt]:
    """The prompts of GenEval's `evaluation_metadata.jsonl`, or of a file like it.

    Raises:
      FileError: the file is not of that form, or a clause refers to one that is not before it.
      FileNotFoundError: there is none.
    """
    prompts = []
    for number, entry in read_json_lines(path, Prompt):
        where = f"'{path}', line {number}"
        prompt = msgspec.convert(entry, Prompt)
        check_caption(prompt.prompt, where)
        _check_category(prompt.tag, f"{where}: tag")
        for place, clause in enumerate(prompt.include):
            if clause.position is not None and not 0 <= clause.position[1] < place:
                raise FileError(
                    f"{where}: clause {place} of include is placed beside clause"
                    f" {shown(clause.position[1])}, which is not before it; count clauses from 0"
                )
        prompts.append(prompt)
    if not prompts:
        raise FileError(f"'{path}' has no prompts; give a file with one a line")
    return prompts


def read_dpg(path: Path) -> list[DensePrompt]:
    """The prompts of DPG-Bench's `dpg_bench.csv`, or of a file like it: a row for each question.

    The text of a prompt is that of its first row. Categories are read from the column `tuple`, as
    the authors' program does. Unlike here, that program skips the first row of the file, and cannot
    score the first prompt if others of its questions depend on that one.

    Raises:
      FileError: the file is not of that form, naming the row; or a prompt's questions are not
        together, have a number twice, or depend on one that is missing.
      FileNotFoundError: there is none.
    """
    items: dict[str, DensePrompt] = {}
    last = None
    for where, row in _rows(path):
        item = row["item_id"]
        # The name is that of a file, too.
        if not item or item.startswith(".") or not item.isprintable() or set(item) & set("/\\"):
            raise FileError(f"{where}: item_id {shown(item)} is no name of a file; mend it")
        if item not in items:
            check_caption(row["text"], where)
            items[item] = DensePrompt(item, row["text"], ())
        elif item != last:
            raise FileError(f"{where}: the rows of item {shown(item)} are apart; put them together")
        known = items[item]
        question = _question(row, where)
        if any(question.number == other.number for other in known.questions):
            raise FileError(
                f"{where}: item {shown(item)} has proposition_id {question.number} twice; number"
                " its questions"
            )
        items[item] = known._replace(questions=(*known.questions, question))
        last = item
    if not items:
        raise FileError(f"'{path}' has no prompts; give a file with a row for each question")
    for prompt in items.values():
        numbers = {question.number for question in prompt.questions}
        for question in prompt.questions:
            if missing := set(question.parents) - numbers:
                raise FileError(
                    f"'{path}': question {question.number} of item {shown(prompt.item)} depends on"
                    f" {min(missing)}, which the item does not have; add it or write 0 for none"
                )
    return list(items.values())


def _rows(path: Path):
    """The rows of a table by column, each with its place for messages; empty ones are skipped."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        head = [_SHORT.get(name.strip(), name.strip()) for name in next(reader, [])]
        if lacking := [name for name in _COLUMNS if name not in head]:
            raise FileError(
                f"'{path}' has no column {lacking[0]}; give a table with {', '.join(_COLUMNS)}"
            )
        for cells in reader:
            where = f"'{path}', line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(head):
                raise FileError(
                    f"{where}: {len(cells)} cells under {len(head)} columns; quote cells that have"
                    " commas inside"
                )
            yield where, {name: cell.strip() for name, cell in zip(head, cells)}
    except csv.Error as error:
        raise FileError(f"'{path}', line {reader.line_num}: no CSV ({error}); mend it") from None


def _question(row: dict[str, str], where: str) -> Question:
    detailed = row["tuple"].partition("(")[0].strip(" -")
    if not detailed:
        raise FileError(f"{where}: tuple {shown(row['tuple'])} does not begin with a category")
    for category in (detailed, detailed.partition("-")[0].strip()):
        _check_category(category, f"{where}: category")
    if not row["question_natural_language"]:
        raise FileError(f"{where}: question_natural_language is empty; write the question")
    number = _number(row["proposition_id"], f"{where}: proposition_id")
    if not number:
        raise FileError(f"{where}: proposition_id is 0, which stands for no question; count from 1")
    parents = [_number(each, f"{where}: dependency") for each in row["dependency"].split(",")]
    return Question(
        number,
        tuple(parent for parent in parents if parent),  # 0 stands for none
        detailed.partition("-")[0].strip(),
        detailed,
        row["question_natural_language"],
    )


def _check_category(name: str, where: str) -> None:
    """Raises FileError for a name that the mean of all categories has in results."""
    if name == OVERALL:
        raise FileError(f"{where} {shown(name)} is what the overall figure is called; rename it")


def _number(text: str, where: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise FileError(f"{where} {shown(text)} is no number of a question; write 0, 1 or 1,2")
    return int(text)


def in_order(findings: Mapping[str, Mapping[int, Findings]], path: Path) -> list[list[Findings]]:
    """What was found in each prompt's pictures, in the order of their numbers.

    Args:
      findings: by the prompt's name and the picture's number.
      path: of the file, for the message.

    Raises:
      FileError: a picture is missing: all prompts have as many, numbered from 0.
    """
    count = 1 + max(max(pictures) for pictures in findings.values())
    for name, pictures in findings.items():
        lacking = next((number for number in range(count) if number not in pictures), None)
        if lacking is not None:
            raise FileError(
                f"'{path}' lacks picture {lacking} of prompt {shown(name)}, and others have one"
                f" numbered {count - 1}; add it"
            )
    return [[pictures[number] for number in range(count)] for pictures in findings.values()]
