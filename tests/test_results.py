"""Laws of results.json: what was scored is read back, and what is no score is refused by name."""

import json

import pytest

from jax_distill.evaluation.results import parse_results, read_results

TASKS = {"counting": 0.5, "colors": 0.9}
CONTENT = {
    "teacher": {
        "nfe": 50,
        "score": 0.8,
        "tasks": TASKS,
        "few": {"10": {"score": 0.6, "tasks": TASKS}, "2": {"score": 0.2, "tasks": TASKS}},
    },
    "student": {"4": {"score": 0.76, "tasks": TASKS}, "1": {"score": 0.4, "tasks": TASKS}},
    "measures": {
        "nfe": 50,
        "real": {"latents": 1.3, "place": 18.0, "size": 2.0, "color": 0.8, "twice": 1.0},
        "teacher": {"latents": 1.2, "place": 16.0, "size": 2.0, "color": 0.8, "twice": 0.9},
        "student": {
            "2": {"latents": 0.9, "place": 16.0, "size": 1.6, "color": 0.4, "to_real": None},
        },
    },
    "config": {"seed": 3},
    "seed": 3,
}


def test_scores_are_read_back_in_the_order_of_steps(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(CONTENT))
    results = read_results(tmp_path / "results.json")
    assert results == parse_results(CONTENT)
    assert (results.teacher.score, results.teacher.tasks, results.nfe) == (0.8, TASKS, 50)
    assert list(results.student) == [1, 4] and list(results.few) == [2, 10]
    assert results.student[4].score == 0.76 and results.few[10].tasks == TASKS
    assert results.shares(results.student) == pytest.approx({1: 0.5, 4: 0.95})


def test_measures_are_read_back_and_may_be_missing():
    measured = parse_results(CONTENT).measured
    assert measured.teacher.latents == 1.2 and measured.nfe == 50 and measured.real.to_real is None
    assert measured.student[2].diversity_share(measured.teacher) == 0.5  # its colours
    assert measured.real.diversity_share(measured.teacher) == 1.0
    older = {key: value for key, value in CONTENT.items() if key != "measures"}
    assert parse_results(older).measured_columns() == []
    collapsed = measured.teacher._replace(color=0.0)
    assert measured.student[2].diversity_share(collapsed) is None


def test_what_is_not_there_is_empty(tmp_path):
    assert read_results(tmp_path / "results.json") is None
    assert parse_results({}).columns() == []
    assert parse_results({"student": CONTENT["student"]}).shares(parse_results(CONTENT).few) == {}
    zero = parse_results({"teacher": {"score": 0.0}, "student": CONTENT["student"]})
    assert zero.shares(zero.student) == {}


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"teacher": {"nfe": 50, "sco', "Unterminated string"),
        ("", "Expecting value"),
        ("[1, 2]", r"the content is \[1, 2\]"),
        ('{"teacher": 0.5}', "teacher is 0.5"),
        ('{"teacher": {"nfe": 50}}', "teacher.score is None"),
        ('{"student": {"2": {"score": NaN}}}', "student.2.score is nan"),
        ('{"student": {"2": {"score": true}}}', "student.2.score is True"),
        ('{"student": {"two": {"score": 0.5}}}', "student has 'two' for a number of steps"),
        ('{"student": {"2": {"score": 0.5, "tasks": {"a": "x"}}}}', "student.2.tasks.a is 'x'"),
        ('{"measures": []}', r"measures is \[\]"),
        ('{"measures": {"nfe": 0}}', "measures.nfe is 0"),
        ('{"measures": {"real": 1}}', "measures.real is 1"),
        ('{"measures": {"student": {"2": {"place": NaN}}}}', "measures.student.2.place is nan"),
        ('{"measures": {"teacher": {"place": "9"}}}', "measures.teacher.place is '9'"),
        ('{"measures": {"teacher": {"<b>": 1}}}', "has '<b>' for the name of a measure"),
        ('{"teacher": {"score": 0.5, "few": [1]}}', r"teacher.few is \[1\]"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_sentence(tmp_path, text, reason):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read_results(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
