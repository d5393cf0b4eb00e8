"""A mixture of Gaussians in the plane, whose flow is known, and small networks that learn it.

A caption says how much of each component there is (`Text.pooled`, (B, K)), the empty one that of
the whole mixture. Samples are (B, 1, 2). With it a method can be trained in seconds, and the
distance of its samples from the target measured:

    start = pretrained()
    state = train(method, start, steps=500, optimizers={"fake": {"learning_rate": 1e-3}})
    before, after = (distance(drawn(method, tree, steps=1)) for tree in
                     ({"network": start}, state.players["student"].ema))
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_distill import config, streams
from jax_distill.flow import Batch, Network, Text, interpolate, per_sample
from jax_distill.objectives.teacher import unguided
from jax_distill.training.step import init_state, make_optimizers, make_step

MEANS = jnp.array([[1.5, 0.3], [0.2, 1.4], [-1.3, 0.6], [-0.9, -1.3], [0.9, -1.1]])
WEIGHTS = jnp.array([0.3, 0.25, 0.2, 0.15, 0.1])
STD = 0.2
WIDTH, DEPTH = 64, 2
SHAPE = (1, 2)
NULL = Text(jnp.zeros((1, 1, 1)), WEIGHTS[None])


def captions(count: int) -> Text:
    """Captions of the whole mixture."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape[1:])), NULL)


def samples(key: jax.Array, text: Text) -> jax.Array:
    """Data (B, 1, 2) for captions (B, ..)."""
    key_component, key_noise = jax.random.split(key)
    component = jax.random.categorical(key_component, jnp.log(text.pooled))
    noise = jax.random.normal(key_noise, (len(component), *SHAPE))
    return MEANS[component][:, None] + STD * noise


def exact() -> Network:
    """The mixture's own velocity; its parameters (`exact_params`) are those of random features."""

    def velocity(params, x, t, text, guidance=None, interval=None):
        del params, guidance, interval
        t = per_sample(t, x)
        variance = ((1 - t) * STD) ** 2 + t**2
        away = x - (1 - t) * MEANS  # (B, K, 2)
        logits = jnp.log(text.pooled) - jnp.sum(away**2, -1) / (2 * variance[..., 0])
        share = jax.nn.softmax(logits)[..., None]
        # The noise and the data that are expected of each component.
        noise = t / variance * away
        data = MEANS + (1 - t) * STD**2 / variance * away
        return jnp.sum(share * (noise - data), 1, keepdims=True)

    def features(params, x, t, text, guidance=None, interval=None, *, blocks, with_velocity=False):
        waves = jnp.sin(
            x @ params["waves"] + per_sample(t, x) * params["speeds"] + params["phases"]
        )
        found = (waves,) * len(blocks)
        return (velocity(params, x, t, text), found) if with_velocity else found

    return Network(velocity, lambda *args: None, features, grid=(1, 1))


def exact_params() -> dict:
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((2, WIDTH)), rng.standard_normal(WIDTH)
    phases = rng.uniform(0, 2 * np.pi, WIDTH)
    names = ("waves", "speeds", "phases")
    return {n: jnp.asarray(v, jnp.float32) for n, v in zip(names, (2 * drawn[0], drawn[1], phases))}


TEACHER = unguided(exact())
FROZEN = {"teacher": exact_params(), "null": NULL}


def perceptron() -> Network:
    """A residual perceptron of x, t and the caption; it takes no guidance scale."""

    def dense(params, x):
        return x @ params["kernel"] + params["bias"]

    def embedding(params, t, text, guidance=None):
        angles = t[:, None] * jnp.pi * jnp.arange(1, 5)
        waves = jnp.concatenate([t[:, None], jnp.sin(angles), jnp.cos(angles)], -1)
        pooled = dense(params["pooled_embedder"]["linear_1"], text.pooled)
        pooled = dense(params["pooled_embedder"]["linear_2"], jax.nn.silu(pooled))
        return dense(params["time_embedder"], waves) + pooled

    def run(params, x, t, text):
        shift = embedding(params, t, text)[:, None]
        hidden, found = dense(params["input"], x) + shift, []
        for block in params["blocks"].values():
            hidden = hidden + jax.nn.silu(dense(block, jax.nn.silu(hidden)) + shift)
            found.append(hidden)
        return dense(params["output"], jax.nn.silu(hidden)), found

    def velocity(params, x, t, text, guidance=None, interval=None):
        del guidance, interval
        return run(params, x, t, text)[0]

    def features(params, x, t, text, guidance=None, interval=None, *, blocks, with_velocity=False):
        output, every = run(params, x, t, text)
        found = tuple(every[block] for block in blocks)
        return (output, found) if with_velocity else found

    return Network(velocity, embedding, features, grid=(1, 1))


def perceptron_params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def layer(inputs, outputs, gain=1.0):
        kernel = gain * rng.standard_normal((inputs, outputs)) / inputs**0.5
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(outputs)}

    pooled = {"linear_1": layer(len(WEIGHTS), WIDTH), "linear_2": layer(WIDTH, WIDTH)}
    return {
        "input": layer(2, WIDTH, 2.0),
        "time_embedder": layer(9, WIDTH),
        "pooled_embedder": pooled,
        "blocks": {str(n): layer(WIDTH, WIDTH) for n in range(DEPTH)},
        "output": layer(WIDTH, 2, 0.1),
    }


@functools.cache
def pretrained(steps: int = 1000, rows: int = 128) -> dict:
    """A perceptron's parameters after learning the mixture's velocity: where students start."""
    network, target = perceptron(), exact()
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.0)

    def loss(params, key):
        keys = jax.random.split(key, 3)
        text = captions(rows)
        x, noise = samples(keys[0], text), jax.random.normal(keys[1], (rows, *SHAPE))
        t = jax.random.uniform(keys[2], (rows,))
        x_t = interpolate(x, noise, t)
        error = network.velocity(params, x_t, t, text) - target.velocity({}, x_t, t, text)
        return jnp.mean(jnp.square(error))

    @jax.jit
    def learn(params):
        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return learn(perceptron_params())


def train(
    method,
    params: dict,
    steps: int,
    *,
    rows: int = 256,
    frozen: dict = FROZEN,
    optimizers: dict | None = None,
    ema_decay: float = 0.99,
    text=captions,
    **optimizer,
):
    """The `TrainState` after so many steps of a method, on fresh data of the mixture.

    Args:
      method: whose student is `perceptron`.
      params: of the student's network.
      steps: to take.
      rows: of a batch.
      frozen: of the `View`.
      optimizers: settings of the other players' optimizers, by their names.
      ema_decay: of the averages.
      text: the captions of a batch of so many rows.
      optimizer: settings of the student's optimizer.
    """
    settings = config.base()
    with settings.unlocked():
        settings.total_steps, settings.batch_size, settings.ema_decay = steps, rows, ema_decay
        settings.optimizer.update({"learning_rate": 3e-4, "clip_norm": 10.0} | optimizer)
        settings.optimizers = optimizers or {}
    made = make_optimizers(method, settings)
    state, compiled = init_state(method, made, params, 0), {}

    def taken(turn):
        step = make_step(method, made, settings, turn)

        @jax.jit
        def take(state, key):
            captions = text(rows)
            return step(state, frozen, Batch(samples(key, captions), captions))

        return take

    for number in range(steps):
        turn = method.turn(number)
        if turn not in compiled:
            compiled[turn] = taken(turn)
        state, _ = compiled[turn](state, jax.random.fold_in(streams.key(1), number))
    return state


def drawn(method, tree: dict, steps: int, count: int = 2000, seed: int = 5) -> jax.Array:
    """Samples (count, 2) of a student's tree."""
    key_noise, key_restart = jax.random.split(jax.random.key(seed))
    noise = jax.random.normal(key_noise, (count, *SHAPE))

    @jax.jit
    def draw(tree):
        guidance = jnp.ones(count)
        return method.sample(tree, noise, captions(count), NULL, guidance, key_restart, steps)

    return draw(tree)[:, 0]


@jax.jit
def distance(points: jax.Array) -> jax.Array:
    """The energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of points (B, 2) from the mixture.

    Of as many points of the mixture itself it is 0.001 or so.
    """
    others = samples(jax.random.key(9), captions(len(points)))[:, 0]

    def mean(a, b):
        square = jnp.sum(jnp.square(a[:, None] - b[None]), -1)
        return jnp.mean(jnp.sqrt(square + 1e-12))

    return 2 * mean(points, others) - mean(points, points) - mean(others, others)


def shares(points: jax.Array) -> jax.Array:
    """The share of points (B, 2) that is nearest to each component, (K,): lost ones have none."""
    square = jnp.sum(jnp.square(points[:, None] - MEANS), -1)
    return jnp.mean(jax.nn.one_hot(jnp.argmin(square, 1), len(MEANS)), 0)
