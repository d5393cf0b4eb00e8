"""IMM: a student that draws in a few evaluations, by matching moments, from the embedded teacher.

python -m jax_distill.main --config=configs/imm.py
"""

from jax_distill.build import objective_settings
from jax_distill.config import shorten, student


def get_config(preset: str = ""):
    config = student(preset)
    config.name = "imm"
    config.total_steps = 600
    config.model.interval_embeds = True
    config.objective = objective_settings("imm", guidance_scales=(2.0, 2.5, 3.0))
    if preset == "smoke":
        shorten(config)
    return config.lock()
