"""IMM: a student that draws in a few evaluations, by matching moments, from the embedded teacher.

python -m jax_distill.main --config=configs/imm.py

python -m jax_distill.main --config=configs/imm.py:flux_lite
    --config.teacher.checkpoint=PORTED --config.data.path=PREPARED

FLUX.1-lite-8B at 512 px on a pod; not run at that size yet.
"""

from jax_distill.build import objective_settings
from jax_distill.config import shorten, student


def get_config(preset: str = ""):
    config = student(preset)
    config.name = "imm"
    config.model.interval_embeds = True
    if preset == "flux_lite":
        config.name = "imm_flux_lite"
        config.evaluation.guidance = 3.5
        config.objective = objective_settings("imm")
        return config.lock()
    config.total_steps = 600
    config.objective = objective_settings("imm", guidance_scales=(2.0, 2.5, 3.0))
    if preset == "smoke":
        shorten(config)
    return config.lock()
