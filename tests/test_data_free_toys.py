"""DMD2, TDM and SiD on a mixture in the plane: without data, from a network of its velocity."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy_mixture as toy

from jax_distill.objectives.dmd2 import DMD2
from jax_distill.objectives.sid import SiD
from jax_distill.objectives.tdm import TDM

PLAIN = {"learned_scale": 1.0, "compared_scale": 1.0}
HEADS = {"gan_weight": 0.1, "gan_blocks": (0,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "before", "after"),
    [
        (DMD2, {"steps": 1, "student_every": 5, "guidance_scales": (1.0,)}, 0.8, 0.035),
        (DMD2, {"steps": 1, "student_every": 5, "guidance_scales": (1.0,), **HEADS}, 0.8, 0.035),
        (TDM, {"steps": 2}, 0.15, 0.03),
        (TDM, {"steps": 1, "huber_constant": 0.1}, 0.8, 0.03),
        (SiD, {"steps": 1, **PLAIN}, 0.8, 0.03),
    ],
)
def test_the_generator_comes_to_the_mixture(kind, settings, before, after):
    method = kind(toy.perceptron(), toy.TEACHER, time_shift=0.0, **settings)
    start, rates = toy.pretrained(), {"b1": 0.0, "schedule": "cosine"}
    fakes = {"fake": {"learning_rate": 1e-3}}
    moves = 400 if method.student_every == 1 else 200
    state = toy.train(method, start, moves * method.student_every, optimizers=fakes, **rates)
    trees = {"network": start}, state.players["student"].ema
    first, last = (toy.drawn(method, tree, method.steps) for tree in trees)
    assert toy.distance(first) > before and toy.distance(last) < after
    assert jnp.all(toy.shares(last) > toy.WEIGHTS / 2)  # no component is lost
    assert np.isfinite(last).all()
