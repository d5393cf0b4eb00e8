"""One training step: the players whose turn it is move, each by its own loss and optimizer."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from jax_distill import streams
from jax_distill.config import ConfigError, optimizer_of
from jax_distill.devices import sharding
from jax_distill.flow import Batch
from jax_distill.objectives.objective import STUDENT, Method, Player, View
from jax_distill.training import rounding
from jax_distill.training.optimizer import make_optimizer, trained

INIT_STREAM = 2**32 - 1  # apart from the streams of the steps
ROUNDING_STREAM = 2**32 - 2  # of a step; that of the n-th player is n less
COUNTED = 10**6
"""Steps over which turns are counted; those of a longer run are taken to come as often."""


class PlayerState(NamedTuple):
    """All that a move changes of a player."""

    params: dict
    ema: dict  # running average of params; empty where none is kept
    opt_state: Any
    moves: jax.Array  # made, those that were skipped too
    skipped: jax.Array  # moves left out because their loss or gradient was not finite


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # steps taken
    players: dict[str, PlayerState]


def turns(objective: Method, total_steps: int) -> dict[tuple[str, ...], int]:
    """The distinct turns of a run, with the number of steps of each; see `COUNTED`.

    Raises:
      ConfigError: a turn without players, or with one that there is not.
    """
    players = objective.players
    if STUDENT not in players or not players[STUDENT].averaged:
        raise ConfigError(f"objective: its players have no {STUDENT!r} whose average is kept")
    if set(objective.players) == {STUDENT}:
        return {(STUDENT,): total_steps}
    counts: dict[tuple[str, ...], int] = {}
    counted = min(total_steps, COUNTED)
    for step in range(counted):
        turn = objective.turn(step)
        counts[turn] = counts.get(turn, 0) + 1
    for turn in counts:
        if not turn or len(set(turn)) < len(turn) or not set(turn) <= set(objective.players):
            known = ", ".join(objective.players)
            raise ConfigError(f"objective: {turn} is no turn of its players, {known}")
    return {turn: count * total_steps // counted for turn, count in counts.items()}


def moves_of(objective: Method, total_steps: int) -> dict[str, int]:
    """How often each player moves in a run."""
    counts = dict.fromkeys(objective.players, 0)
    for turn, count in turns(objective, total_steps).items():
        for name in turn:
            counts[name] += count
    return counts


Optimizers = Mapping[str, optax.GradientTransformation]
"""By the players' names."""


def make_optimizers(objective: Method, config: ConfigDict) -> Optimizers:
    """The optimizer of each player, whose schedule counts the player's own moves.

    Raises:
      ConfigError: the student never moves.
    """
    moves = moves_of(objective, config.total_steps)
    if config.total_steps and not moves.get(STUDENT, 1):
        raise ConfigError(
            f"total_steps: in {config.total_steps} steps the student does not move once; take more,"
            " or lower objective.heads_first"
        )
    return {
        name: make_optimizer(
            optimizer_of(config, player.optimizer),
            moves[name],
            inherited=_inherits_frozen(config, player),
        )
        for name, player in objective.players.items()
    }


def _inherits_frozen(config: ConfigDict, player: Player) -> bool:
    """Whether `frozen` of a player's optimizer is the student's."""
    own = config.optimizers.get(player.optimizer, {}) if player.optimizer else config.optimizer
    return own.get("frozen") is None


def init_state(
    objective: Method,
    optimizers: Optimizers,
    params: dict,
    seed: int,
    ema_dtype: str = "float32",
) -> TrainState:
    """A state at step zero from the network's initial parameters, made float32."""
    made = objective.init(jax.random.fold_in(streams.key(seed), INIT_STREAM), params)
    zero = jnp.zeros((), jnp.int32)

    def state(name: str, averaged: bool) -> PlayerState:
        params = jax.tree.map(
            lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), made[name]
        )
        average = rounding.narrow(params, ema_dtype) if averaged else {}
        return PlayerState(params, average, optimizers[name].init(params), zero, zero)

    players = {name: state(name, x.averaged) for name, x in objective.players.items()}
    return TrainState(zero, players)


def partition(tree: Any, chosen: Any) -> tuple[Any, Any]:
    """The chosen leaves of a tree and the others: None, which is no leaf, in a leaf's place."""
    return (
        jax.tree.map(lambda leaf, is_chosen: leaf if is_chosen else None, tree, chosen),
        jax.tree.map(lambda leaf, is_chosen: None if is_chosen else leaf, tree, chosen),
    )


def combine(chosen: Any, others: Any) -> Any:
    """The tree that `partition` took apart."""

    def is_none(leaf):
        return leaf is None

    return jax.tree.map(lambda a, b: b if a is None else a, chosen, others, is_leaf=is_none)


def kept_share(config: ConfigDict, moves: jax.Array) -> jax.Array:
    """The share of a running average that stays in it at the move after so many.

    It is `ema_decay`, and (1 + n) / (w + n) at first, after n moves, with w of `ema_warmup`. With
    `ema_power`, s, it follows a power of the moves, so that the average has a standard deviation of
    s times their number in time.

    Source: Karras et al., arXiv:2312.02696, appendix C.1.
    """
    if not config.ema_power:
        return jnp.minimum(config.ema_decay, (1.0 + moves) / (config.ema_warmup + moves))
    precision = config.ema_power**-2
    power = np.roots([1, 7, 16 - precision, 12 - precision]).real.max()
    return (1 - 1 / (moves + 1.0)) ** (power + 1)


def make_step(
    objective: Method,
    optimizers: Optimizers,
    config: ConfigDict,
    turn: tuple[str, ...] = (STUDENT,),
) -> Callable[[TrainState, dict, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step of a turn, (state, frozen, batch) -> (state, metrics), to be jitted.

    Its randomness is a function of (seed, step). A move whose loss or gradient is not finite
    changes nothing of its player but the counters; the other players move all the same. Metrics
    of an objective of several players have the player's name before theirs.
    """
    order = list(objective.players)

    def move(name: str, players: Mapping[str, PlayerState], frozen: dict, batch: Batch, key):
        own, player = players[name], objective.players[name]
        view = View(
            frozen,
            {other: state.params for other, state in players.items()},
            {o: players[o].ema for o, x in objective.players.items() if x.averaged},
        )
        section, inherited = (
            optimizer_of(config, player.optimizer),
            _inherits_frozen(config, player),
        )
        is_trained = trained(section, own.params, inherited=inherited)
        learned, constant = partition(own.params, is_trained)

        def loss_and_gradient(batch, key):
            draws = objective.draw(key, batch)

            def loss_of(learned):
                return player.loss(combine(learned, constant), view, batch, draws, own.moves)

            (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(learned)
            return {"loss": loss, **metrics}, gradient

        metrics, gradient = accumulated(loss_and_gradient, batch, key, config.accumulate)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        gradient = combine(gradient, jax.tree.map(jnp.zeros_like, constant))
        updates, opt_state = optimizers[name].update(gradient, own.opt_state, own.params)
        params = optax.apply_updates(own.params, updates)
        ema = own.ema
        if player.averaged:
            decay = kept_share(config, own.moves)
            ema = optax.incremental_update(params, rounding.widen(own.ema), 1 - decay)
            stream = jax.random.fold_in(key, ROUNDING_STREAM - order.index(name))
            ema = rounding.narrow_as(stream, ema, own.ema)

        def keep_if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params, ema, opt_state = keep_if_finite((params, ema, opt_state), own[:3])
        moved = PlayerState(params, ema, opt_state, own.moves + 1, own.skipped + ~finite)
        return moved, {**metrics, "gradient_norm": norm, "skipped": moved.skipped}

    def step(state: TrainState, frozen: dict, batch: Batch):
        key = jax.random.fold_in(streams.key(config.seed), state.step)
        players, metrics = dict(state.players), {}
        for name in turn:
            before = players[name].skipped
            players[name], found = move(name, players, frozen, batch, key)
            metrics |= {metric_name(objective, name, kind): x for kind, x in found.items()}
            if name == STUDENT:
                moved = players[name].skipped == before
                players |= followed(objective, players, moved)
        return TrainState(state.step + 1, players), metrics

    return step


def followed(
    objective: Method, players: Mapping[str, PlayerState], moved: jax.Array
) -> dict[str, PlayerState]:
    """The players that follow the student, after it has moved, each nearer to it by its share.

    Of adapters each factor is mixed, not their product.

    Args:
      objective: of the run.
      players: all of them.
      moved: whether the student's move was made; after a skipped one nobody follows.
    """
    network = players[STUDENT].params["network"]
    found = {}
    for name, player in objective.players.items():
        if player.follows:
            own = players[name].params
            share = jnp.where(moved, player.follows, 0.0)

            def nearer(own, student, share=share):
                return own + share * (student - own)  # what is the same in both stays, to the bit

            mixed = jax.tree.map(nearer, own["network"], network)
            found[name] = players[name]._replace(params={**own, "network": mixed})
    return found


def metric_name(objective: Method, player: str, metric: str) -> str:
    """A metric as it is logged: with the player's name, where there are several."""
    return metric if len(objective.players) == 1 else f"{player}/{metric}"


def accumulated(
    loss_and_gradient: Callable, batch: Batch, key: jax.Array, count: int
) -> tuple[dict[str, jax.Array], Any]:
    """The mean of (metrics, gradient) over so many micro-batches, one after another."""
    if count == 1:
        return loss_and_gradient(batch, key)
    # Rows in turns: each device splits its own, and none moves.
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, count)
    shapes = jax.eval_shape(loss_and_gradient, jax.tree.map(lambda x: x[0], micro), key)

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, loss_and_gradient(*inputs)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (micro, keys))
    return jax.tree.map(lambda leaf: leaf / count, total)


def jit_step(
    objective: Method,
    optimizers: Optimizers,
    config: ConfigDict,
    shardings: TrainState,
    turn: tuple[str, ...] = (STUDENT,),
) -> Any:
    """`make_step`, jitted: the state is donated, and comes back under the same shardings."""
    step = make_step(objective, optimizers, config, turn)
    mesh = shardings.step.mesh

    def placed(state: TrainState, frozen: dict, batch: Batch):
        with sharding.activations_on(mesh, split_tokens=config.mesh.split_tokens):
            return step(state, frozen, batch)

    return jax.jit(placed, donate_argnums=0, out_shardings=(shardings, None))


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and types of a tree, with the places of a tree of shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings,
    )


def nonfinite(metrics: Mapping[str, float]) -> Iterator[str]:
    """The losses and norms of gradients that are not finite, by their names."""
    for name, value in metrics.items():
        if name.rpartition("/")[2] in ("loss", "gradient_norm") and not math.isfinite(value):
            yield name
