"""DPG-Bench's score, distances of features, CLIP score, and intervals, against plain formulas."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from scipy import linalg
from scipy.spatial.distance import cdist

from jax_distill.evaluation.benchmarks import distances, dpg, intervals
from jax_distill.evaluation.benchmarks.prompts import BUNDLED, DensePrompt, Question, read_dpg
from jax_distill.storage.files import FileError


def question(number, *parents, category="entity - whole"):
    return Question(number, parents, category.partition(" ")[0], category, "Is there one?")


def dense(*questions, item="kettle0"):
    return DensePrompt(item, "a kettle", questions)


def test_a_yes_below_a_no_does_not_count():
    prompt = dense(question(1), question(2, 1), question(3, 2), question(4, 1, 5), question(5))
    for answers in itertools.product([False, True], repeat=5):
        a, b, c, d, e = answers
        counted = dpg.granted(prompt, dict(zip(range(1, 6), answers)))
        assert list(counted.values()) == [a, a and b, a and b and c, a and d and e, e]
        share = dpg.picture_score(prompt, dict(zip(range(1, 6), answers)))
        assert share == sum(counted.values()) / 5


def test_a_child_before_its_parent_sees_the_answer_itself():
    prompt = dense(question(3, 2), question(2, 1), question(1))
    assert dpg.granted(prompt, {1: False, 2: True, 3: True}) == {3: True, 2: False, 1: False}


def values(figures, count):
    return {name: figure(np.ones(count)) for name, figure in figures.items()}


def test_prompts_count_alike_in_the_score_and_questions_in_categories():
    first = dense(question(1), question(2, 1, category="attribute - color"))
    second = dense(question(1), *(question(i, 1, category="entity - part") for i in range(2, 5)))
    answers = [
        [{1: True, 2: True}, {1: False, 2: True}],  # 1 and 0
        [{1: True, 2: True, 3: False, 4: False}],  # a half
    ]
    found = values(dpg.figures(answers, [first, second]), 2)
    assert found == pytest.approx(
        {
            "score": 50,
            "entity": 100 * 3 / 6,
            "attribute": 100,  # whatever the parents
            "entity - whole": 100 * 2 / 3,
            "entity - part": 100 / 3,
            "attribute - color": 100,
        }
    )


def test_the_bundled_questions_are_read_and_answered(tmp_path):
    prompts = read_dpg(BUNDLED / "dpg.csv")
    assert [prompt.item for prompt in prompts] == ["kettle0", "owl1", "drum2"]
    assert prompts[0].text.endswith("stove, left of two small blue cups.")
    assert prompts[0].questions[6] == Question(
        7, (1, 2), "relation", "relation - spatial", "Is the kettle on the stove?"
    )
    assert (prompts[1].questions[0].broad, prompts[1].questions[0].parents) == ("global", ())
    path = tmp_path / "answers.jsonl"
    lines = [
        {"item_id": p.item, "picture": k, "answers": {str(q.number): reply for q in p.questions}}
        for p in prompts
        for k, reply in enumerate(["yes", True, " No\n", False])
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    figures = dpg.figures(dpg.read_answers(path, prompts), prompts)
    assert set(values(figures, 3).values()) == {50.0}
    path = tmp_path / "short.csv"
    path.write_text(
        (BUNDLED / "dpg.csv").read_text().replace("question_natural_language", "question")
    )
    assert read_dpg(path) == prompts


HEAD = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
ROW = "a,a dog,1,0,entity - whole (dog),Is there a dog?\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column item_id"),
        (HEAD, "no prompts"),
        (HEAD.replace("tuple", "triple") + ROW, "no column tuple"),
        (HEAD + ROW.replace("a,a dog", "a,a dog, a big one"), "7 cells under 6 columns"),
        (HEAD + ROW.replace("a,a dog", "../a,a dog"), "no name of a file"),
        (HEAD + ROW.replace("a dog", ""), "the caption is empty"),
        (HEAD + ROW.replace(",1,", ",one,"), "proposition_id 'one' is no number"),
        (HEAD + ROW.replace(",1,", ",0,"), "count from 1"),
        (HEAD + ROW.replace(",0,", ",,"), "dependency '' is no number"),
        (HEAD + ROW.replace(",0,", ",2,"), "depends on 2"),
        (HEAD + ROW.replace("entity - whole (", "("), "does not begin with a category"),
        (HEAD + ROW.replace("Is there a dog?", ""), "write the question"),
        (HEAD + ROW.replace("entity - whole", "score - it"), "'score' is what the overall figure"),
        (HEAD + ROW + ROW, "proposition_id 1 twice"),
        (HEAD + ROW + ROW.replace("a,a", "b,a") + ROW, "are apart"),
        (HEAD + ROW + '"a', "no CSV"),
    ],
)
def test_damaged_tables_are_refused_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "dpg.csv"
    path.write_text(text)
    with pytest.raises(FileError, match=message) as error:
        read_dpg(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_id": "b"}, "no prompt 'b'"),
        ({"answers": {"1": "yes"}}, "question '2' is not answered"),
        ({"answers": {"1": "yes", "2": "no", "3": "no"}}, "question '3' is not asked"),
        ({"answers": {"1": 1, "2": "no"}}, "answers"),
        ({"answers": {"1": "yes", "2": "yes, it is"}}, "question '2' is 'yes, it is', neither yes"),
        ({"answers": {"1": "yes", "2": ""}}, "question '2' is '', neither yes nor no"),
        ({"picture": "0"}, "picture"),
    ],
)
def test_damaged_answers_are_refused_in_one_sentence(tmp_path, changes, message):
    path, prompts = tmp_path / "answers.jsonl", [dense(question(1), question(2), item="a")]
    line = {"item_id": "a", "picture": 0, "answers": {"1": "yes", "2": "no"}}
    path.write_text(json.dumps(line))
    assert dpg.read_answers(path, prompts) == [[{1: True, 2: False}]]
    with pytest.raises(FileError, match="listed twice"):
        path.write_text(f"{json.dumps(line)}\n{json.dumps(line)}")
        dpg.read_answers(path, prompts)
    path.write_text(json.dumps({**line, **changes}))
    with pytest.raises(FileError, match=message) as error:
        dpg.read_answers(path, prompts)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileError, match="about 1 of 1 prompts"):
        path.write_text("")
        dpg.read_answers(path, prompts)


def features(seed, count, size=12, shift=0.0):
    """Correlated features that are not centred."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)) @ np.tril(np.ones((size, size)) / 3) + 1 + shift


def kernel_formula(drawn, real):
    x, y = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (drawn, real))
    means = [np.exp(-cdist(*each, "sqeuclidean") / 200).mean() for each in ((x, x), (y, y), (x, y))]
    return 1000 * (means[0] + means[1] - 2 * means[2])


def root_formula(drawn, real):
    s1, s2 = np.cov(drawn, rowvar=False), np.cov(real, rowvar=False)
    shift = drawn.mean(0) - real.mean(0)
    return shift @ shift + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)


@pytest.mark.parametrize(
    ("distance", "formula"),
    [(distances.cmmd, kernel_formula), (distances.frechet, root_formula)],
)
@pytest.mark.parametrize("sizes", [(40, 40), (25, 1100)])
def test_distances_are_their_formulas(distance, formula, sizes):
    drawn, real = features(0, sizes[0]), features(1, sizes[1], shift=0.3)
    found = distance(drawn, real)
    assert found == pytest.approx(formula(drawn, real), rel=1e-6, abs=1e-9)
    assert found == pytest.approx(distance(real, drawn), rel=1e-9)
    order = np.random.default_rng(2).permutation(len(drawn))
    assert found == pytest.approx(distance(drawn[order], real), rel=1e-9)
    turn = linalg.qr(np.random.default_rng(3).normal(size=(12, 12)))[0]
    assert found == pytest.approx(distance(drawn @ turn, real @ turn), rel=1e-9)
    assert distance(drawn.astype(np.float32), real) == pytest.approx(found, rel=1e-4)
    assert abs(distance(drawn, drawn)) < 1e-10 < found


def test_cmmd_is_of_directions_alone():
    drawn, real = features(0, 30), features(1, 30, shift=0.3)
    lengths = np.random.default_rng(0).uniform(0.1, 10, (30, 1))
    assert distances.cmmd(drawn * lengths, real) == pytest.approx(distances.cmmd(drawn, real))
    # Two opposite pictures: 1 + 1 - 2 exp(-4 / 200), times 1000.
    one = np.eye(1, 5)
    assert distances.cmmd(one, -3 * one) == pytest.approx(2000 * (1 - np.exp(-0.02)), rel=1e-12)


def test_the_frechet_distance_is_exact_for_singular_covariances():
    drawn, real = features(0, 9, size=40), features(1, 7, size=40)
    root = linalg.svdvals((drawn - drawn.mean(0)) @ (real - real.mean(0)).T).sum() / (8 * 6) ** 0.5
    shift = drawn.mean(0) - real.mean(0)
    known = shift @ shift + drawn.var(0, ddof=1).sum() + real.var(0, ddof=1).sum() - 2 * root
    assert distances.frechet(drawn, real) == pytest.approx(known, rel=1e-12)
    # A shift of one and the same set, whatever its covariance, is all of the distance.
    assert distances.frechet(drawn, drawn + 2) == pytest.approx(4 * 40, rel=1e-12)
    scaled = drawn.mean(0) + 3 * (drawn - drawn.mean(0))
    assert distances.frechet(drawn, scaled) == pytest.approx(4 * drawn.var(0, ddof=1).sum())


@pytest.mark.parametrize("figure", [distances.cmmd_figure, distances.frechet_figure])
def test_a_weight_is_how_often_the_pictures_of_a_prompt_occur(figure):
    rng = np.random.default_rng(0)
    drawn, real, prompts = features(0, 30), features(1, 50), rng.permutation(np.arange(30) % 7)
    weights = np.array([2, 0, 1, 3, 1, 0, 1])
    often = np.repeat(np.arange(30), weights[prompts])
    plain = {distances.cmmd_figure: distances.cmmd, distances.frechet_figure: distances.frechet}
    weighted = figure(drawn, real, prompts)
    assert weighted(weights) == pytest.approx(plain[figure](drawn[often], real), rel=1e-9)
    several = np.stack([weights, np.ones(7), weights[::-1]])
    assert weighted(several) == pytest.approx([weighted(each) for each in several], rel=1e-9)


def test_cmmd_keeps_no_matrix_of_all_pairs():
    """Neither of pictures nor of prompts: 32 MB here, and 7 GB of the 30,000 prompts of COCO."""
    drawn, real = features(0, 2000, size=2), features(1, 10, size=2)
    tracemalloc.start()
    distances.cmmd_figure(drawn, real, np.arange(2000))
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 2**20 and peak < 8 * 2000**2 / 4


def test_clip_scores_are_cosines_of_pictures_and_their_texts():
    pictures, texts = features(0, 8, shift=-1), features(1, 8, shift=-1)
    cosines = np.diag(1 - cdist(pictures, texts, "cosine"))
    assert (cosines < 0).any() and (cosines > 0).any()
    found = distances.clip_scores(pictures, 5 * texts)
    assert found == pytest.approx(100 * np.maximum(cosines, 0), rel=1e-6)
    prompts = [0, 1, 1, 2, 2, 2, 0, 3]
    figure = distances.clip_figure(pictures, texts, prompts)
    assert figure(np.ones(4)) == pytest.approx(found.mean())
    assert figure(np.array([0, 1, 0, 0])) == pytest.approx(found[1:3].mean())


GOOD = np.eye(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distances.cmmd(GOOD, GOOD[:, :3]), "of 4 and 3 numbers"),
        (lambda: distances.cmmd(GOOD[:0], GOOD), r"drawn: features of shape \(0, 4\)"),
        (lambda: distances.cmmd(GOOD, GOOD * [[1], [0], [1], [1]]), "real: embedding 1 is zero"),
        (lambda: distances.frechet(GOOD[:1], GOOD), "at least 2 pictures"),
        (lambda: distances.frechet(GOOD, GOOD / [[1], [1], [0], [1]]), "features 2 are not finite"),
        (lambda: distances.frechet_figure(GOOD, GOOD, [0, 0, 2, 2]), "pictures of every prompt"),
        (lambda: distances.cmmd_figure(GOOD, GOOD, [0, 1]), "for each of 4 pictures"),
        (lambda: distances.cmmd_figure(GOOD, GOOD, [0.0, 1, 2, 3]), "a whole number from 0"),
        (lambda: distances.clip_figure(GOOD, GOOD, [True, False, True, False]), "a whole number"),
        (
            lambda: intervals.differences({"a": mean([1])}, {}, [0]),
            "second model has no figure 'a'",
        ),
        (lambda: intervals.differences({}, {"a": mean([1])}, [0]), "first model has no figure 'a'"),
        (lambda: distances.clip_scores(GOOD, GOOD[:2]), "a text's for each"),
        (lambda: intervals.estimate(intervals.ratio([], []), []), "there are none"),
        (lambda: intervals.estimate(intervals.ratio([1], [1]), [0], level=1), "level 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_features_that_say_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def mean(numbers):
    return intervals.ratio(numbers, np.ones(len(numbers)))


def test_resamples_keep_the_sizes_of_groups():
    groups = ["a", "b", "a", "b", "b", "c"]
    weights = intervals.resamples(groups, 4000, 0)
    assert set(weights[:, [0, 2]].sum(1)) == {2} and set(weights[:, [1, 3, 4]].sum(1)) == {3}
    assert set(weights[:, 5]) == {1}
    assert weights.mean(0) == pytest.approx(np.ones(6), abs=0.06)


def test_an_interval_is_that_of_the_normal_law():
    numbers = np.random.default_rng(0).normal(3, 2, 400)
    found = intervals.estimate(mean(numbers), [""] * 400, count=4000)
    assert found.value == pytest.approx(numbers.mean())
    half = 1.96 * numbers.std() / 20
    assert (found.low, found.high) == pytest.approx(
        (found.value - half, found.value + half), abs=0.06 * half
    )
    assert found == intervals.estimate(mean(numbers), [""] * 400, count=4000)  # a seed's own


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for seed in range(300):
        right = rng.binomial(4, rng.beta(2, 2, 60))  # of four pictures of each prompt
        found = intervals.estimate(
            intervals.ratio(right, np.full(60, 4)), [0] * 60, count=200, seed=seed
        )
        held += found.low <= 0.5 <= found.high
    assert 0.9 < held / 300 < 0.98


def test_intervals_of_distances_lie_around_them():
    drawn, real = features(0, 60, size=4), features(1, 60, size=4, shift=1)
    for figure in (distances.cmmd_figure, distances.frechet_figure):
        found = intervals.estimate(figure(drawn, real, np.arange(60)), [0] * 60, count=200)
        assert 0 < found.low < found.value < found.high


def test_paired_intervals_see_what_two_apart_do_not():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 200)
    teacher, student = ({"score": mean(hard + rng.normal(m, 0.5, 200))} for m in (0.3, 0))
    found = intervals.differences(teacher, student, [0] * 200)["score"]
    assert found.high < 0 and found.value == pytest.approx(-0.3, abs=0.15)
    apart = [intervals.estimates(each, [0] * 200)["score"] for each in (teacher, student)]
    assert apart[0].low < apart[1].high
    assert intervals.differences(teacher, teacher, [0] * 200)["score"] == (0, 0, 0)


def test_a_category_that_a_resample_lacks_has_an_interval_of_the_others():
    figure = intervals.ratio([1, 0, 0, 0], [2, 0, 0, 0])
    assert intervals.estimate(figure, [0] * 4) == pytest.approx((0.5, 0.5, 0.5))
