"""The teacher with a student's inputs, t in place of 1000 t and the guidance scale embedded.

python -m jax_distill.main --config=configs/time_rescale.py

configs/scm.py does this itself, in `<workdir>/time_rescale`. A run of its own is a teacher for many
students, which then skip the stage: --config.teacher.checkpoint=runs/time_rescale.
"""

from jax_distill.build import objective_settings
from jax_distill.config import base


def get_config(preset: str = ""):
    config = base(preset)
    config.name = "time_rescale"
    config.total_steps = 1000
    config.batch_size = 64
    config.ema_decay = 0.99
    config.model = {"time_scale": 1.0, "guidance_embeds": True}
    config.objective = objective_settings("time_rescale", guidance_scales=(2.0, 2.5, 3.0))
    config.evaluation.guidance = 2.5
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.frozen = "time_embedder"  # refitted by hand
    config.data.examples = 12_800
    return config.lock()
