"""Optimizers by name, from optax."""

import re

import jax
import optax
from ml_collections import ConfigDict

from jax_distill.config import ConfigError
from jax_distill.training import rounding


def learning_rate(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """The schedule: linear warm-up, then one of

    - constant;
    - cosine: to zero at `total_steps`;
    - trapezoid: constant, then linear to zero over the last `decay_share` of the steps, so that a
      run can be made longer from any checkpoint before that.

    Raises:
      ConfigError: another name.
    """
    warmup = config.warmup_steps
    if config.schedule == "constant":
        later = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "cosine":
        later = optax.cosine_decay_schedule(config.learning_rate, max(total_steps - warmup, 1))
    elif config.schedule == "trapezoid":
        decay = max(int(config.decay_share * total_steps), 1)
        fall = optax.linear_schedule(config.learning_rate, 0.0, decay)
        later = optax.join_schedules(
            [optax.constant_schedule(config.learning_rate), fall], [total_steps - warmup - decay]
        )
    else:
        raise ConfigError(
            f"optimizer.schedule: {config.schedule!r} is not one of constant, cosine, trapezoid"
        )
    ramp = optax.linear_schedule(0.0, config.learning_rate, max(warmup, 1))
    return optax.join_schedules([ramp, later], [warmup]) if warmup else later


def make_optimizer(
    config: ConfigDict, total_steps: int, *, inherited: bool = False
) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer that `config.name` names.

    `muon` orthogonalises the momentum of every matrix inside the blocks, adapters' too (stacked
    layers one by one) at AdamW's update size (arXiv:2502.16982); all else falls to NAdamW, at
    `adam_share` of the learning rate. Parameters whose path, such as
    `network/time_embedder/linear_1/bias`, the pattern `frozen` finds a match in stay as they are.
    With `moments` "bfloat16", what the optimizer remembers takes half the memory, see `rounding`.
    `inherited` is as in `trained`.

    Raises:
      ConfigError: unknown name of the optimizer or of its schedule, or no pattern.
    """
    schedule = learning_rate(config, total_steps)
    if config.name == "adamw":
        optimizer = optax.adamw(
            schedule, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay
        )
    elif config.name == "muon":
        optimizer = optax.contrib.muon(
            schedule,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=lambda count: config.adam_share * schedule(count),
            muon_weight_dimension_numbers=_matrices_of_blocks,
            consistent_rms=0.2,
        )
    else:
        raise ConfigError(f"optimizer.name: {config.name!r} is not one of adamw, muon")
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if config.moments == "bfloat16":
        optimizer = rounding.in_bfloat16(optimizer)
    if not config.frozen:
        return optimizer
    _frozen(config)  # is a pattern

    def labels(params):
        names = {True: "trained", False: "frozen"}
        return jax.tree.map(names.get, trained(config, params, inherited=inherited))

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def trained(config: ConfigDict, params: dict, *, inherited: bool = False) -> dict:
    """Whether each parameter is trained, a tree of bools: `config.frozen` has no match in its path.

    Args:
      config: the optimizer's settings.
      params: of a player.
      inherited: whether the pattern is another player's, and need not match: heads have none of
        the parameters that a network keeps frozen.

    Raises:
      ConfigError: no pattern, or it matches no parameter.
    """
    if not config.frozen:
        return jax.tree.map(lambda _: True, params)
    frozen = _frozen(config)

    def is_trained(path, leaf):
        del leaf
        return not frozen.search("/".join(str(key.key) for key in path))

    found = jax.tree_util.tree_map_with_path(is_trained, params)
    if all(jax.tree.leaves(found)) and not inherited:
        raise ConfigError(f"optimizer.frozen: {config.frozen!r} matches no parameter")
    return found


def _frozen(config: ConfigDict) -> re.Pattern:
    try:
        return re.compile(config.frozen)
    except re.error as error:
        raise ConfigError(f"optimizer.frozen: {config.frozen!r} is no pattern: {error}") from None


def _matrices_of_blocks(params: dict) -> dict:
    def dimensions(path, leaf):
        stacked_matrix = leaf.ndim == 3 and path[-1].key in ("kernel", "lora_a", "lora_b")
        return optax.contrib.MuonDimensionNumbers(1, 2) if stacked_matrix else None

    return jax.tree_util.tree_map_with_path(dimensions, params)
