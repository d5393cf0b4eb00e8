"""The autoencoder of the shapes world: FLUX's AutoencoderKL, small.

python -m jax_distill.main --config=configs/autoencoder.py
"""

from jax_distill.config import base


def get_config(preset: str = ""):
    config = base(preset)
    config.name = "autoencoder"
    config.total_steps = 3000
    config.batch_size = 16
    config.ema_decay = 0.998
    config.objective.name = "autoencoder"
    config.objective.kl_weight = 1e-3
    config.objective.l1_weight = 0.1
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.data.examples = 1_000_000
    return config.lock()
