"""The teacher of the shapes world: flow matching with caption dropout, FLUX-shaped.

python -m jax_distill.main --config=configs/teacher.py

Two hours on two CPU cores; expect 0.71 at 50 steps. The bundled teacher continued from
there for 70 minutes, its rate raised once more; expect 0.75:

python -m jax_distill.main --config=configs/teacher.py --config.total_steps=12500
--config.optimizer.decay_share=0.9
"""

from jax_distill.assembly.build import objective_settings
from jax_distill.config import base


def get_config(preset: str = ""):
    config = base(preset)
    config.name = "teacher"
    config.total_steps = 7000
    config.batch_size = 128
    config.ema_decay = 0.997
    config.objective = objective_settings("flow_matching", time_mean=0.5)
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.schedule = "trapezoid"
    config.optimizer.decay_share = 0.5
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.01
    config.data.examples = 60_000
    config.checkpoint.every = 200
    config.evaluation.guidance = 2.5
    return config.lock()
