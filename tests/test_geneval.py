"""GenEval's judge against each of its rules, on detections made by hand."""

import json

import msgspec
import numpy as np
import pytest

from jax_distill.evaluation.benchmarks import geneval
from jax_distill.evaluation.benchmarks.geneval import Detection
from jax_distill.evaluation.benchmarks.intervals import estimates
from jax_distill.evaluation.benchmarks.prompts import BUNDLED, Color, Prompt, read_geneval
from jax_distill.storage.files import FileError

COLORS = Color.__args__


def colored(color):
    """Of all colours, one of them the largest."""
    return {name: float(name == color) for name in COLORS}


def thing(name, score=0.95, at=(50, 50), size=(10, 10), color=None, **colors):
    """A detected object by its centre."""
    (x, y), (width, height) = at, size
    return Detection(
        name=name,
        box=(x - width / 2, y - height / 2, x + width / 2, y + height / 2),
        score=score,
        colors={color: 1.0} if color else colors or None,
    )


def asks(*include, tag="two_object", exclude=()):
    """A prompt; a clause is (class, count) or a table."""
    clauses = [c if isinstance(c, dict) else {"class": c[0], "count": c[1]} for c in include]
    absent = [{"class": name, "count": count} for name, count in exclude]
    return msgspec.convert(
        {"tag": tag, "include": clauses, "exclude": absent, "prompt": "a photo"}, Prompt
    )


def right(detections, prompt):
    verdict = geneval.judge(detections, prompt)
    assert verdict.correct == (not verdict.reasons)
    return verdict.correct


@pytest.mark.parametrize(
    ("tag", "score", "counts"),
    [
        ("two_object", 0.3, False),
        ("two_object", 0.3001, True),
        ("counting", 0.9, False),
        ("counting", 0.9001, True),
        ("colors", 0.5, True),
    ],
)
def test_a_score_must_be_above_the_threshold_of_its_task(tag, score, counts):
    assert right([thing("dog", score)], asks(("dog", 1), tag=tag)) is counts


def test_too_few_objects_are_wrong_and_too_many_only_where_they_are_excluded():
    for found in range(6):
        dogs = [thing("dog")] * found
        assert right(dogs, asks(("dog", 2))) is (found >= 2)
        assert right(dogs, asks(("dog", 2), exclude=[("dog", 3)])) is (found == 2)


def test_every_clause_must_hold_and_other_classes_do_not_matter():
    prompt = asks(("dog", 1), ("cat", 1))
    assert right([thing("dog"), thing("cat"), thing("cow")], prompt)
    assert not right([thing("dog"), thing("dog")], prompt)
    assert geneval.judge([], prompt).reasons == ("dog: 0 of 1 found", "cat: 0 of 1 found")


def test_one_of_several_excluded_classes_is_enough_and_a_missing_one_is_none():
    prompt = asks(exclude=[("dog", 1), ("cat", 2)])
    assert right([thing("cat"), thing("cow")], prompt)
    assert not right([thing("dog")], prompt)
    assert not right([thing("cat")] * 2, prompt)
    # As every clause counts all that is kept, one may ask for what another forbids.
    assert not right([thing("dog")] * 2, asks(("dog", 1), exclude=[("dog", 2)]))


def test_sixteen_of_a_class_are_kept_after_the_threshold():
    assert right([thing("dog")] * 40, asks(("dog", 16), exclude=[("dog", 17)]))
    assert not right([thing("dog")] * 40, asks(("dog", 17)))
    unsure = [thing("dog", 0.2)] * 20 + [thing("dog", 0.5)] * 16
    assert right(unsure, asks(("dog", 16)))
    kept = geneval.kept([thing("dog", 0.31 + i / 100) for i in range(30)], "colors")["dog"]
    assert [each.score for each in kept] == sorted((each.score for each in kept), reverse=True)
    assert min(each.score for each in kept) == pytest.approx(0.45)


def test_overlapping_boxes_count_apart():
    assert right([thing("dog"), thing("dog")], asks(("dog", 2)))


RED_DOG = {"class": "dog", "count": 1, "color": "red"}


def test_colours_are_those_of_the_surest_objects_alone():
    red, blue = (thing("dog", score, color=color) for score, color in [(0.8, "red"), (0.9, "blue")])
    assert not right([red, blue], asks(RED_DOG))
    assert right([red, blue], asks({**RED_DOG, "color": "blue"}))
    assert not right([red, blue], asks({**RED_DOG, "count": 2}))
    assert right([red, red, blue], asks({**RED_DOG, "color": "blue"}))
    assert right([thing("dog", 0.95, color="red"), red, blue], asks(RED_DOG))
    assert right([red, red], asks({**RED_DOG, "count": 2}))


def test_clauses_of_one_class_look_at_the_same_objects():
    red, blue = (thing("dog", score, color=color) for score, color in [(0.9, "red"), (0.8, "blue")])
    assert not right([red, blue], asks(RED_DOG, {**RED_DOG, "color": "blue"}))
    assert right([red], asks(RED_DOG, RED_DOG, ("dog", 1)))


def test_the_largest_colour_score_names_the_colour():
    scores = dict(zip(COLORS, np.linspace(-1, -0.1, len(COLORS))))
    assert thing("dog", **scores).color == COLORS[-1]
    assert thing("dog", white=0.25, red=0.25, blue=0.1).color == "red"  # the first among equals


def test_colour_scores_are_needed_for_objects_that_are_looked_at():
    plain = [thing("dog", 0.9, color="red"), thing("dog", 0.8), thing("cat")]
    assert right(plain, asks(RED_DOG, ("cat", 1)))
    with pytest.raises(ValueError, match="'dog' has no colour scores.*add them"):
        geneval.judge(plain, asks({**RED_DOG, "count": 2}))
    assert not right(plain, asks({**RED_DOG, "count": 3}))  # too few: no colour is looked at


def test_among_equal_scores_the_later_object_comes_first():
    red, blue = (thing("dog", color=color) for color in ("red", "blue"))
    assert right([blue, red], asks(RED_DOG))
    assert not right([red, blue], asks(RED_DOG))
    red = msgspec.structs.replace(red, score=float(np.nextafter(np.float32(0.95), np.float32(0))))
    blue = msgspec.structs.replace(blue, score=red.score - 1e-9)  # the same in float32
    assert not right([red, blue], asks(RED_DOG)) and right([blue, red], asks(RED_DOG))


OFFSETS = [
    ((-20, 0), ["left of"]),
    ((20, 0), ["right of"]),
    ((0, -20), ["above"]),
    ((0, 20), ["below"]),
    ((20, 20), ["right of", "below"]),
    ((-20, -20), ["left of", "above"]),
    ((0, 0), []),
    ((2, 0), []),  # a tenth of both sizes, 2, is all of it
    ((2.0009, 0), []),
    ((4, 0), []),  # 2 of 4 are left: a half, not more
    ((4.001, 0), ["right of"]),
    ((-4.001, 0), ["left of"]),
    ((3, 4), []),  # (1, 2) of 5
    ((12, 16), ["right of", "below"][1:]),  # (10, 14) of 20: a half and 0.7
    ((12.01, 16), ["right of", "below"]),
]


@pytest.mark.parametrize(("offset", "expected"), OFFSETS)
def test_relations_are_of_shortened_offsets(offset, expected):
    first, second = thing("dog", at=(50 + offset[0], 50 + offset[1])), thing("cat")
    assert geneval.relations(first, second) == expected
    mirrored = [each for pair in (("left of", "right of"), ("above", "below")) for each in pair]
    opposite = dict(zip(mirrored, [mirrored[1], mirrored[0], mirrored[3], mirrored[2]]))
    assert geneval.relations(second, first) == [opposite[each] for each in expected]


def test_wide_boxes_shorten_their_own_axis():
    def found(size):
        return geneval.relations(thing("dog", at=(70, 70), size=size), thing("cat", size=size))

    assert found((10, 10)) == ["right of", "below"]
    assert found((100, 10)) == ["below"]
    assert found((10, 100)) == ["right of"]
    assert found((100, 100)) == []


def beside(relation="left of", place=0, count=1, name="dog"):
    return {"class": name, "count": count, "position": [relation, place]}


def test_every_pair_must_be_in_the_relation():
    left, middle, far = (thing("dog", at=(x, 50)) for x in (10, 90, 95))
    cats = [thing("cat", at=(60, 50)), thing("cat", at=(120, 50))]
    assert right([left, *cats], asks(("cat", 2), beside()))
    assert not right([middle, *cats], asks(("cat", 2), beside()))
    assert right([left, left, *cats], asks(("cat", 2), beside(count=2)))
    assert not right([left, middle, *cats], asks(("cat", 2), beside(count=2)))
    assert right([left, msgspec.structs.replace(far, score=0.5), *cats], asks(("cat", 2), beside()))


def test_a_clause_that_does_not_hold_leaves_nothing_to_be_beside():
    dog = thing("dog", at=(10, 50))
    cat = thing("cat", at=(90, 50), color="red")
    reasons = geneval.judge([dog], asks(("cat", 1), beside())).reasons
    assert reasons == ("cat: 0 of 1 found", "dog: nothing that it could be left of")
    blue = {"class": "cat", "count": 1, "color": "blue"}
    reasons = geneval.judge([dog, cat], asks(blue, beside())).reasons
    assert reasons == ("cat: not blue but red", "dog: nothing that it could be left of")
    # Nor does a clause whose own relation fails.
    cow = thing("cow", at=(200, 50))
    chain = asks(("cat", 1), beside("right of"), beside("right of", 1, name="cow"))
    assert len(geneval.judge([dog, cat, cow], chain).reasons) == 2
    assert right([dog, cat, cow], asks(("cat", 1), beside(), beside("right of", 0, name="cow")))


def test_a_wrong_colour_is_told_before_a_wrong_place():
    clause = {**beside("above"), "color": "red"}
    detections = [thing("cat"), thing("dog", at=(50, 90), color="blue")]
    assert geneval.judge(detections, asks(("cat", 1), clause)).reasons == ("dog: not red but blue",)
    detections[1] = thing("dog", at=(50, 90), color="red")
    assert geneval.judge(detections, asks(("cat", 1), clause)).reasons == (
        "dog: not above cat but below",
    )


def test_an_object_can_not_be_beside_itself():
    assert not right([thing("dog")], asks(("dog", 1), beside()))


def random_picture(rng, prompt):
    names = [clause.name for clause in prompt.include]
    return [
        thing(
            str(rng.choice(names)),
            score=float(rng.uniform(0.2, 1)),
            at=rng.uniform(0, 500, 2),
            size=rng.uniform(0, 80, 2),
            **dict(zip(COLORS, rng.random(len(COLORS)))),
        )
        for _ in range(rng.integers(0, 12))
    ]


def test_verdicts_ignore_order_scale_and_unsure_objects_and_turn_with_the_picture():
    rng, seen = np.random.default_rng(0), set()
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for prompt in read_geneval(BUNDLED / "geneval.jsonl") * 40:
        picture = random_picture(rng, prompt)
        verdict = right(picture, prompt)
        shuffled = [picture[i] for i in rng.permutation(len(picture))]
        assert right(shuffled, prompt) == verdict
        assert right([*picture, *(thing(each.name, 0.3) for each in picture)], prompt) == verdict
        far = [
            msgspec.structs.replace(each, box=tuple(3 * x + 7 for x in each.box))
            for each in picture
        ]
        assert right(far, prompt) == verdict
        around = [
            msgspec.structs.replace(each, box=tuple(-each.box[i] for i in (2, 3, 0, 1)))
            for each in picture
        ]
        clauses = [
            msgspec.structs.replace(c, position=(turned[c.position[0]], c.position[1]))
            if c.position
            else c
            for c in prompt.include
        ]
        other = msgspec.structs.replace(prompt, include=tuple(clauses))
        assert right(around, other) == verdict
        seen.add((prompt.tag, verdict))
    assert len(seen) > 9  # both verdicts of nearly all tasks


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def perfect(prompt):
    """Objects that are what a prompt asks for, as JSON."""
    objects = []
    for place, clause in enumerate(prompt.include):
        steps = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
        x, y = steps[clause.position[0]] if clause.position else (place * 3, 0)
        objects += [
            {
                "class": clause.name,
                "box": [100 * x, 100 * y, 100 * x + 20, 100 * y + 20],
                "score": 0.95,
                "colors": colored(clause.color or "red"),
            }
        ] * clause.count
    return objects


def test_a_file_of_right_and_wrong_pictures_is_scored_by_task(tmp_path):
    prompts = read_geneval(BUNDLED / "geneval.jsonl")
    lines = []
    for sample in (3, 0, 2, 1):  # in any order
        for place, prompt in enumerate(prompts):
            good = sample < (4 if prompt.tag == "counting" else place % 2 + 1)
            objects = perfect(prompt) if good else []
            picture = f"{place:05d}/samples/{sample:04d}.png"
            lines.append({"picture": picture, "objects": objects})
    found = geneval.read_detections(written(tmp_path / "found.jsonl", lines), prompts)
    judged = geneval.verdicts(found, prompts)
    assert [v.correct for v in judged[1]] == [True, True, False, False]
    scores = estimates(
        geneval.figures(judged, prompts), [prompt.tag for prompt in prompts], count=200
    )
    tasks = {name: each for name, each in scores.items() if name != "score"}
    assert tasks.keys() == {prompt.tag for prompt in prompts}
    assert all(each.value == (1 if tag == "counting" else 0.375) for tag, each in tasks.items())
    assert scores["score"].value == pytest.approx((1 + 5 * 0.375) / 6)
    assert scores["counting"] == (1, 1, 1)
    assert scores["score"].low < scores["score"].value < scores["score"].high


def test_the_mean_is_of_tasks_whatever_their_sizes_and_of_pictures_within_one():
    prompts = [asks(("dog", 1), tag="colors")] * 3 + [asks(("dog", 1), tag="counting")]
    yes, no = geneval.Verdict(True, ()), geneval.Verdict(False, ("no",))
    judged = [[yes] * 4, [no], [no], [no, no]]
    scores = geneval.figures(judged, prompts)
    found = {name: figure(np.ones(4)) for name, figure in scores.items()}
    assert found == pytest.approx({"score": 1 / 3, "colors": 2 / 3, "counting": 0})


GOOD = {
    "picture": "00000/samples/0000.png",
    "objects": [
        {
            "class": "dog",
            "box": [0, 0, 9, 9],
            "score": 0.5,
            "colors": colored("red"),
            "mask": "a.png",
        }
    ],
}


def damaged(**changes):
    return {**GOOD, "objects": [{**GOOD["objects"][0], **changes}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"objects": []}, "picture"),
        ({**GOOD, "picture": "0.png"}, "not named as 00000/samples/0000.png"),
        ({**GOOD, "picture": "00009/samples/0000.png"}, "prompt 9, but there are 1"),
        (damaged(box=[0, 0, 9]), "box"),
        (damaged(box=[9, 0, 0, 9]), "ends before it begins"),
        (damaged(box=[0, 0, float("nan"), 9]), "box|not finite"),
        (damaged(box=[0, 0, 10**400, 9]), "line 1"),
        (damaged(score=1.5), "score"),
        (damaged(score=float("nan")), "score|not finite"),
        (damaged(score="0.5"), "score"),
        (damaged(colors={"mauve": 1}), "colors"),
        (damaged(colors=[1] * 10), "colors"),
        (damaged(colors={"red": 1}), "1 of the 10 colours"),
        (damaged(colours=colored("red")), "colours"),
        (damaged(**{"class": 3}), "class"),
    ],
)
def test_damaged_detections_are_refused_in_one_sentence(tmp_path, line, message):
    path = written(tmp_path / "found.jsonl", [line])
    with pytest.raises(FileError, match=message) as error:
        geneval.read_detections(path, [asks(("dog", 1))])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_repeated_pictures_are_refused(tmp_path):
    prompts = [asks(("dog", 1))] * 2
    with pytest.raises(FileError, match="no picture of 1 of 2 prompts, such as 00001"):
        geneval.read_detections(written(tmp_path / "a.jsonl", [GOOD]), prompts)
    with pytest.raises(FileError, match="line 2: picture .* is listed twice"):
        geneval.read_detections(written(tmp_path / "b.jsonl", [GOOD, GOOD]), prompts)
    names = ("00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png")
    lines = [{**GOOD, "picture": name} for name in names]
    with pytest.raises(FileError, match="lacks picture 1 of prompt '00001'"):
        geneval.read_detections(written(tmp_path / "c.jsonl", lines), prompts)


def test_missing_colours_name_the_picture():
    with pytest.raises(ValueError, match="picture 1 of prompt 0: a detected 'dog' has no colour"):
        geneval.verdicts([[[], [thing("dog")]]], [asks(RED_DOG)])


def mutations(rng, text):
    """A text with a piece cut out, doubled or replaced."""
    first, last = sorted(rng.integers(0, len(text) + 1, 2))
    last = min(last, first + rng.integers(4))
    pieces = ["", text[first:last] * 2, "null", "-1", '"', "[]", "{}", "1e999", "NaN", "\x00", "é"]
    return text[:first] + pieces[rng.integers(len(pieces))] + text[last:]


def test_random_damage_of_detections_is_refused_or_judged(tmp_path):
    rng, path, refused = np.random.default_rng(0), tmp_path / "found.jsonl", 0
    prompts = [asks({**RED_DOG}, tag="colors")]
    for _ in range(400):
        path.write_text(mutations(rng, json.dumps(GOOD)))
        try:
            geneval.verdicts(geneval.read_detections(path, prompts), prompts)
        except ValueError as error:
            refused += 1
            assert str(error) and "\n" not in str(error)
    assert 100 < refused < 400


def test_prompts_are_written_as_they_are_published():
    text = (BUNDLED / "geneval.jsonl").read_text()
    prompts = read_geneval(BUNDLED / "geneval.jsonl")
    assert [json.dumps(msgspec.to_builtins(each)) for each in prompts] == text.splitlines()
    assert prompts[8].include[1].position == ("above", 0)
    assert {each.tag for each in prompts} == {
        *("single_object", "two_object", "counting"),
        *("colors", "position", "color_attr"),
    }


ASKED = {"tag": "position", "include": [{"class": "cat", "count": 1}, beside()], "prompt": "a cat"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tag": None}, "tag"),
        ({"tag": "score"}, "tag 'score' is what the overall figure is called"),
        ({"prompt": " "}, "the caption is empty"),
        ({"include": [{"class": "cat"}]}, "count"),
        ({"include": [{"class": "cat", "count": 0}]}, "count"),
        ({"include": [{"class": "cat", "count": 1, "color": "mauve"}]}, "mauve"),
        ({"include": [{"class": "cat", "count": 1}, beside("under")]}, "under"),
        ({"include": [beside()]}, "clause 0 of include is placed beside clause 0"),
        ({"include": [{"class": "cat", "count": 1}, beside(place=-1)]}, "beside clause -1"),
        ({"include": [{"class": "cat", "count": 1}, beside(place=1)]}, "beside clause 1"),
        ({"exclude": [{"class": "cat", "count": 0}]}, "exclude"),
    ],
)
def test_damaged_prompts_are_refused_in_one_sentence(tmp_path, changes, message):
    path = written(tmp_path / "prompts.jsonl", [ASKED, {**ASKED, **changes}])
    with pytest.raises(FileError, match=message) as error:
        read_geneval(path)
    assert f"'{path}', line 2" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileError, match="has no prompts"):
        read_geneval(written(path, []))
