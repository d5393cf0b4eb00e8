"""Each sentence of docs/formats.md is said of a file that deserves it."""

import re
from pathlib import Path

import pytest
import refused_benchmarks
import refused_data
import refused_runs
import refused_sources
import refused_weights

DOCUMENT = Path(__file__).parents[1] / "docs/formats.md"
PARTS = (refused_weights, refused_data, refused_sources, refused_runs, refused_benchmarks)


def sentences():
    """The quoted sentences, in which double backticks stand for single ones."""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("|") and (match := re.fullmatch(r"\|[^|]*\| `(.*)` \|", line)):
            yield match[1].replace("``", "`")


SENTENCES = list(sentences())


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What is said of every file here."""
    messages = []

    def ask(read, *arguments, **options):
        with pytest.raises((ValueError, SystemExit)) as error:
            read(*arguments, **options)
        messages.append(str(error.value).removeprefix("error: "))

    for part in PARTS:
        part.ask_all(tmp_path_factory.mktemp(part.__name__), ask)
    return messages


def test_the_document_has_sentences():
    assert len(SENTENCES) > 100


def test_every_table_of_sentences_has_nothing_else():
    """A row whose sentence is in another column, or quoted otherwise, would be read by nobody."""
    rows = DOCUMENT.read_text().split("| what | sentence |\n|---|---|\n")[1:]
    count = sum(len(re.match(r"(?:\|.*\n)*", table)[0].splitlines()) for table in rows)
    assert count == len(SENTENCES)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_is_said(said, sentence):
    pattern = re.escape(sentence).replace(r"\.\.\.", ".*")
    assert any(re.fullmatch(pattern, x) for x in said), "\n".join(said)


def test_every_sentence_is_one(said):
    assert all(len(x.splitlines()) == 1 for x in said)
