"""Players whose networks are affine, `v = a x + b`: their losses can be differentiated by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_distill.flow import Batch, GaussianOracle, Network, Text
from jax_distill.objectives.objective import View
from jax_distill.objectives.teacher import embedded_guidance

SHAPE = (4, 2, 3)
COUNT = SHAPE[:1]
TEXT = Text(jnp.zeros((4, 2, 5)), jnp.zeros((4, 4)))
BATCH = Batch(jnp.zeros(SHAPE), TEXT)
STUDENT, FAKE = (0.4, -0.3), (0.7, 0.2)  # a, b
DATA = GaussianOracle(0.6, 0.5)
TEACHER = embedded_guidance(GaussianOracle.network())


def network() -> Network:
    """Captions and guidance scales are not looked at."""

    def velocity(params, x, t, text=None, guidance=None, interval=None):
        return params["a"] * x + params["b"]

    return Network(velocity, None)


def tree(a: float, b: float) -> dict:
    return {"network": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}


def view(student: tuple = STUDENT, fake: tuple = FAKE) -> View:
    nets = {"student": tree(*student), "fake": tree(*fake)}
    return View({"teacher": DATA, "null": Text(TEXT.sequence[:1], TEXT.pooled[:1])}, nets)


def normal(seed: int, shape: tuple = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def per_sample(values) -> np.ndarray:
    return np.asarray(values)[:, None, None]


def teachers_data(x_t: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the teacher predicts of x_t at t (B, 1, 1), and its slope by x_t: 0.2's k."""
    k = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
    return 0.6 + k * (x_t - (1 - t) * 0.6), k


def graded(loss):
    """(own, view, batch, draws, moves) -> ((loss, metrics), gradient), compiled."""
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def part(leaf, rows):
    """Some rows of a batch or of draws; the noise of restarts has steps before its samples."""
    return leaf if leaf.ndim == 0 else leaf[:, rows] if leaf.ndim == 4 else leaf[rows]


def assert_mean_of_parts(loss, own, seen, batch, draws):
    """A loss and its gradient are the means of those of the micro-batches, with their draws."""
    grade = graded(loss)
    whole, gradient = grade(own, seen, batch, draws, 0)
    for count in (2, 4):
        slices = [slice(n, None, count) for n in range(count)]
        parts = [
            grade(own, seen, *jax.tree.map(lambda x, rows=rows: part(x, rows), (batch, draws)), 0)
            for rows in slices
        ]
        np.testing.assert_allclose(np.mean([p[0][0] for p in parts]), whole[0], rtol=1e-10)
        for name, wanted in gradient["network"].items():
            found = np.mean([p[1]["network"][name] for p in parts])
            np.testing.assert_allclose(found, wanted, rtol=1e-10)
