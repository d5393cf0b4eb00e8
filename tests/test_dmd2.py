"""DMD2 against its equations, written out in NumPy, on networks that are known functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill.flow import Batch, Network
from jax_distill.objectives.dmd2 import DMD2
from jax_distill.objectives.objective import View
from jax_distill.objectives.teacher import TeacherVelocity

SHAPE = 5, 3, 2
TREES = {
    "student": {"a": 0.7, "b": 0.2, "c": 0.05},
    "fake": {"a": 0.4, "b": -0.3, "c": 0.02},
    "teacher": {"a": 0.9, "b": 0.5, "c": 0.3},
}


def velocity(params, x, t, text=None, guidance=None, interval=None):
    """tanh(a x) + b t + c (w - 1), by the element."""
    scale = 1.0 if guidance is None else guidance
    shape = (-1, 1, 1)
    return (
        jnp.tanh(params["a"] * x)
        + params["b"] * jnp.reshape(t, shape)
        + params["c"] * (jnp.reshape(scale, shape) - 1)
    )


def features(params, x, t, text, guidance=None, interval=None, *, blocks, with_velocity=False):
    return tuple((number + 1) * jnp.tanh(params["a"] * x) for number in blocks)


NETWORK = Network(velocity, lambda *_: None, features)
TEACHER = TeacherVelocity(NETWORK, "embedded")


def method(**settings):
    return DMD2(NETWORK, TEACHER, **{"time_shift": 0.3, "guidance_scales": (3.0,), **settings})


@pytest.fixture
def given():
    """(view, batch) in double precision."""
    with jax.enable_x64(True):
        trees = {
            name: {"network": {k: jnp.asarray(v, jnp.float64) for k, v in tree.items()}}
            for name, tree in TREES.items()
        }
        view = View({"teacher": trees.pop("teacher")["network"], "null": None}, trees, {})
        yield view, Batch(jax.random.normal(jax.random.key(1), SHAPE, jnp.float64))


def draws_of(objective, batch, count=None):
    draws = objective.draw(jax.random.key(7), batch)
    if count is None:
        return draws
    return draws._replace(rollout=draws.rollout._replace(count=jnp.asarray(count)))


class Written:
    """The equations, in NumPy."""

    def __init__(self, view, batch, draws, objective):
        self.draws = jax.tree.map(lambda x: np.asarray(x, np.float64), draws)
        self.x, self.objective = np.asarray(batch.x), objective
        self.trees = {name: TREES[name] for name in TREES}

    def data(self, name, x, t, w):
        p = TREES[name]
        t, w = t[:, None, None], w[:, None, None]
        return x - t * (np.tanh(p["a"] * x) + p["b"] * t + p["c"] * (w - 1))

    def input(self):
        draws, steps = self.draws.rollout, self.objective.steps
        even = np.linspace(1, 0, steps + 1)
        times = np.exp(0.3) * even / (np.exp(0.3) * even + 1 - even)
        if self.objective.inputs == "noised":
            t = times[self.draws.index.astype(int)]
            return (1 - t)[:, None, None] * self.x + t[:, None, None] * draws.noise, t
        x = draws.noise
        for k in range(int(draws.count)):
            made = self.data("student", x, np.full(len(x), times[k]), self.draws.guidance)
            x = (1 - times[k + 1]) * made + times[k + 1] * draws.renoise[k]
        return x, np.full(len(x), times[int(draws.count)])

    def made(self):
        x, t = self.input()
        return self.data("student", x, t, self.draws.guidance)

    def noised(self, x, t, noise):
        return (1 - t)[:, None, None] * x + t[:, None, None] * noise

    def gradient(self):
        d, x = self.draws, self.made()
        mean = lambda y: np.abs(y).mean((1, 2), keepdims=True)  # noqa: E731
        x_t, ones = self.noised(x, d.t, d.noise), np.ones_like(d.t)
        fake = self.data("fake", x_t, d.t, d.guidance)
        if not self.objective.decoupled:
            real = self.data("teacher", x_t, d.t, d.guidance)
            return (fake - real) / (mean(x - real) + 1e-6)
        real = self.data("teacher", x_t, d.t, ones)
        t = 0.02 + d.share * (self.input()[1] - 0.02)
        x_s = self.noised(x, t, d.share_noise)
        plain, guided = (self.data("teacher", x_s, t, w) for w in (ones, d.guidance))
        added = (guided - plain) / (mean(x - guided) + 1e-6)
        return (fake - real) / (mean(x - real) + 1e-6) - added


@pytest.mark.parametrize(
    "settings", [{}, {"inputs": "noised"}, {"decoupled": True}, {"steps": 1}], ids=str
)
@pytest.mark.parametrize("count", [0, 2])
def test_the_students_loss_and_gradient_are_the_equations(given, settings, count):
    view, batch = given
    objective = method(**settings)
    draws = draws_of(objective, batch, min(count, objective.steps - 1))
    written = Written(view, batch, draws, objective)

    def loss(own):
        return objective.student_loss(own, view, batch, draws, 0)[0]

    value, gradient = jax.value_and_grad(loss)(view.nets["student"])
    g, (x, t) = written.gradient(), written.input()
    np.testing.assert_allclose(value, np.mean(g**2) / 2, rtol=1e-8)
    np.testing.assert_allclose(
        objective.gradient(objective.made(view.nets["student"], batch, draws), view, batch, draws),
        g,
        atol=1e-10,
    )
    # d loss = mean(g dx), and x = input - t v alone is differentiated.
    t = t[:, None, None]
    slopes = {
        "a": -t * x / np.cosh(TREES["student"]["a"] * x) ** 2,
        "b": -t * t + 0 * x,
        "c": -t * (draws.guidance[:, None, None] - 1) + 0 * x,
    }
    for name, slope in slopes.items():
        expected = np.mean(g * slope)
        np.testing.assert_allclose(gradient["network"][name], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("predicts", ["velocity", "data"])
def test_the_fake_score_learns_the_velocity_of_the_students_samples(given, predicts):
    view, batch = given
    objective = method(fake_predicts=predicts)
    draws = draws_of(objective, batch, 1)
    written = Written(view, batch, draws, objective)
    x, t = written.made(), written.draws.t
    x_t = written.noised(x, t, written.draws.noise)
    velocity = (x_t - written.data("fake", x_t, t, written.draws.guidance)) / t[:, None, None]
    error = velocity - (written.draws.noise - x)
    if predicts == "data":
        error *= t[:, None, None]
    loss, _ = objective.fake_loss(view.nets["fake"], view, batch, draws, 0)
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-8)
    gradient = jax.grad(
        lambda net: objective.fake_loss(
            view.nets["fake"], view._replace(nets={**view.nets, "student": net}), batch, draws, 0
        )[0]
    )(view.nets["student"])
    assert all(not leaf for leaf in jax.tree.leaves(gradient))  # the student is not moved by it


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_fake_score_like_the_unguided_teacher_moves_nothing(given, decoupled):
    view, batch = given
    objective = method(guidance_scales=(1.0,), decoupled=decoupled)
    draws = draws_of(objective, batch, 1)
    view.nets["fake"]["network"] = view.frozen["teacher"]
    made = objective.made(view.nets["student"], batch, draws)
    assert not np.any(objective.gradient(made, view, batch, draws))


def test_without_a_difference_of_scores_guidance_alone_is_left_to_decoupled_terms(given):
    view, batch = given
    objective = method(decoupled=True)
    draws = draws_of(objective, batch, 0)
    view.nets["fake"]["network"] = {**view.frozen["teacher"], "c": jnp.zeros((), jnp.float64)}
    made = objective.made(view.nets["student"], batch, draws)
    x, w = np.asarray(made.x), np.asarray(draws.guidance)
    t = (0.02 + draws.share * (made.t - 0.02))[:, None, None]
    x_t = (1 - t) * x + t * draws.share_noise
    p = TREES["teacher"]
    guided = x_t - t * (np.tanh(p["a"] * x_t) + p["b"] * t + p["c"] * (w[:, None, None] - 1))
    divisor = np.abs(x - guided).mean((1, 2), keepdims=True) + 1e-6
    expected = t * p["c"] * (w[:, None, None] - 1) / divisor
    gradient = objective.gradient(made, view, batch, draws)
    np.testing.assert_allclose(gradient, np.broadcast_to(expected, x.shape), atol=1e-8)


def test_guidance_has_times_below_the_input_of_the_student(given):
    view, batch = given
    objective = method(decoupled=True, steps=4)
    draws = draws_of(objective, Batch(jnp.zeros((256, 3, 2))), 3)
    assert np.all((draws.share >= 0) & (draws.share < 1))
    t = objective.sampled_by.schedule.times(4, 3)[3]
    assert float(t) < 0.5
    assert np.max(draws.share * t) < t


@pytest.mark.parametrize("decoupled", [False, True])
def test_weights_multiply_the_difference_of_the_two_scores_alone(given, decoupled):
    view, batch = given
    objective = method(decoupled=decoupled)
    draws = draws_of(objective, batch, 0)
    made = objective.made(view.nets["student"], batch, draws)
    plain, none, twice = (
        objective.gradient(made, view, batch, draws, weight) for weight in (1.0, 0.0, 2.0)
    )
    np.testing.assert_allclose(twice - plain, plain - none, atol=1e-12)
    assert np.any(none) == decoupled  # what guidance adds


def test_divergences_other_than_kl_need_heads():
    with pytest.raises(ValueError, match="objective.divergence: 'js' weighs by heads"):
        method(divergence="js").check_run("float32")
    method(divergence="js", gan_weight=0.1).check_run("float32")


def test_a_proximal_loss_moves_the_averages_sample_and_holds_to_it(given):
    view, batch = given
    objective = method(proximal=0.5)
    draws = draws_of(objective, batch, 0)
    average = {"network": {**view.nets["student"]["network"], "a": jnp.asarray(0.6, jnp.float64)}}
    view = view._replace(averages={"student": average})
    x, base = (objective.made(tree, batch, draws) for tree in (view.nets["student"], average))
    wanted = base.x - 0.5 * objective.gradient(base, view, batch, draws)
    loss, _ = objective.student_loss(view.nets["student"], view, batch, draws, 0)
    np.testing.assert_allclose(loss, np.mean((x.x - wanted) ** 2) / 2, rtol=1e-10)

    fake, _ = objective.fake_loss(view.nets["fake"], view, batch, draws, 0)
    of_average = view._replace(nets={**view.nets, "student": average})
    plain, _ = method().fake_loss(view.nets["fake"], of_average, batch, draws, 0)
    np.testing.assert_allclose(fake, plain, rtol=1e-12)


class Judge(DMD2):
    """Heads that are a known function."""

    def logits(self, fake, view, x_t, t, text, guidance):
        return fake["heads"] * jnp.mean(x_t, (1, 2))[:, None] + t[:, None]


def test_heads_learn_to_tell_data_from_samples_each_at_times_of_their_own(given):
    view, batch = given
    settings = {"time_shift": 0.3, "guidance_scales": (3.0,), "gan_weight": 0.1}
    objective = Judge(NETWORK, TEACHER, head_weight=0.7, penalty_weight=2.0, **settings)
    draws = draws_of(objective, batch, 0)
    own = {**view.nets["fake"], "heads": jnp.asarray(1.5, jnp.float64)}
    loss, metrics = objective.fake_loss(own, view, batch, draws, 0)

    x, t, heads = objective.made(view.nets["student"], batch, draws).x, draws.t, draws.heads
    at, of = t[:, None, None], heads.real_t[:, None, None]
    data = (1 - of) * batch.x + of * heads.real_noise

    def logit(x, t):
        return 1.5 * np.mean(x, (1, 2)) + t

    real, made = logit(data, heads.real_t), logit((1 - at) * x + at * draws.noise, t)
    moved = logit(data + objective.penalty_size * heads.penalty_noise, heads.real_t)
    told = np.mean(np.log1p(np.exp(-real))) + np.mean(np.log1p(np.exp(made)))
    told += 2 * np.mean((real - moved) ** 2)
    np.testing.assert_allclose(loss, metrics["velocity_loss"] + 0.7 * told, rtol=1e-10)
    assert not np.allclose(heads.real_t, t)
