"""The teacher with a student's inputs, t in place of 1000 t and the guidance scale embedded.

python -m jax_distill.main --config=configs/time_rescale.py

configs/scm.py does this itself, in `<workdir>/time_rescale`. A run of its own is a teacher for many
students, which then skip the stage: --config.teacher.checkpoint=runs/time_rescale.

python -m jax_distill.main --config=configs/time_rescale.py:flux_lite
    --config.teacher.checkpoint=PORTED --config.data.path=PREPARED

The same for FLUX.1-lite-8B at 512 px on a pod; not run at that size yet. Both stages, the refitted
time embedder and the velocity matching, are compared in `rescale.json`: how far velocities are from
the teacher's, and how smooth the network has become in time.
"""

from jax_distill.assembly.build import objective_settings
from jax_distill.config import base, flux, student_model


def get_config(preset: str = ""):
    config = base(preset, presets=("", "flux_lite"))
    config.name = "time_rescale"
    if preset == "flux_lite":
        flux(config)
        config.name = "time_rescale_flux_lite"
        config.total_steps = config.rescale.total_steps
        config.evaluation.guidance = 3.5
        config.objective = objective_settings("time_rescale")
        config.optimizer.learning_rate = config.rescale.learning_rate
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = config.total_steps // 10
        return config.lock()
    config.total_steps = 1000
    config.batch_size = 64
    config.ema_decay = 0.99
    config.model = student_model()
    config.objective = objective_settings("time_rescale", guidance_scales=(2.0, 2.5, 3.0))
    config.evaluation.guidance = 2.5
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.frozen = "time_embedder"  # refitted by hand
    config.data.examples = 12_800
    return config.lock()
