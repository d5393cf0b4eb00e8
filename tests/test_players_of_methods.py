"""Steps of real methods of two players: micro-batches, and moves that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_players import apart, cast, matching_config, prepared

from jax_distill.training.step import init_state, make_optimizers, make_step

SETTINGS = {
    "dmd2": {"cadence": "both", "student_every": 1},
    # Else data have the captions of their neighbours in the micro-batch.
    "ladd": {"mismatched": False},
}


class Steps:
    """Steps of one method in double precision, each row of the batch with draws of its own."""

    def __init__(self, name, patch):
        self.config = matching_config(0, name, dtype="float64")
        with self.config.unlocked():
            self.config.objective.update(SETTINGS[name])
        self.objective, params, self.frozen, self.batch = prepared(self.config)
        self.draws = self.objective.draw(jax.random.key(5), self.batch)
        patch.setattr(type(self.objective), "draw", lambda _, key, batch: self.draws_of(batch))
        self.optimizers = make_optimizers(self.objective, self.config)
        state = init_state(self.objective, self.optimizers, params, 0)
        self.state = cast(state, "float64")
        (self.other,) = set(self.objective.players) - {"student"}

    def draws_of(self, batch):
        """Those of the rows, wherever they stand in a micro-batch."""
        rows = jnp.argmin(jnp.abs(batch.x[:, :1, 0] - self.batch.x[:, 0, 0]), 1)

        def of_rows(leaf):
            count = len(self.batch.x)
            return jnp.take(leaf, rows, leaf.shape.index(count)) if leaf.ndim else leaf

        return jax.tree.map(of_rows, self.draws)

    def take(self, accumulate=1):
        """The players and metrics after a step in which both of them move."""
        with self.config.unlocked():
            self.config.accumulate = accumulate
        turn = self.objective.turn(0)
        assert set(turn) == {"student", self.other}
        step = jax.jit(make_step(self.objective, self.optimizers, self.config, turn))
        state, metrics = step(self.state, self.frozen, self.batch)
        return state.players, metrics

    def with_bad_data(self):
        """Data that only the second player reads are noised with what is not finite."""
        name = "heads" if hasattr(self.draws, "heads") else "judge"
        part = getattr(self.draws, name)
        bad = part.real_noise.at[0, 1, 1].set(jnp.inf)
        self.draws = self.draws._replace(**{name: part._replace(real_noise=bad)})
        return self.take()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_does_not_depend_on_micro_batches_and_a_bad_move_holds_back_its_player(
    name, monkeypatch
):
    with jax.enable_x64(True):
        steps = Steps(name, monkeypatch)
        whole, metrics = steps.take()
        metrics.pop("student/score_difference", None)  # a root of a mean, which parts have not
        for count in (2, 4):
            parts, found = steps.take(count)
            for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
                assert apart(a, b) < 1e-9
            assert max(apart(metrics[name], found[name]) for name in metrics) < 1e-9
        held, found = steps.with_bad_data()
    other, before = held[steps.other], steps.state.players[steps.other]
    assert int(other.skipped) == 1 and not np.isfinite(found[f"{steps.other}/loss"])
    for a, b in zip(jax.tree.leaves(other[:3]), jax.tree.leaves(before[:3]), strict=True):
        np.testing.assert_array_equal(a, b)
    students = held["student"], whole["student"]
    for a, b in zip(*map(jax.tree.leaves, students), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert int(held["student"].skipped) == 0
