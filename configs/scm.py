"""sCM: a student that draws in 1, 2 or 4 evaluations, from the embedded teacher or from FLUX.

python -m jax_distill.main --config=configs/scm.py

Ten minutes on two CPU cores. Expect 0.78 of the teacher's score in 2 steps and 0.46 in 1.
"""

from jax_distill.config import base


def get_config(preset: str = ""):
    config = base(preset, presets=("", "smoke"))
    config.name = "scm"
    config.total_steps = 600
    config.batch_size = 64
    config.ema_decay = 0.99
    # What the student's network changes of the teacher's.
    config.model = {"time_scale": 1.0, "guidance_embeds": True}
    config.objective = {
        "name": "scm",
        "guidance_scales": (2.0, 2.5, 3.0),
        "tangent_warmup": 50,
        # The published 0.2 and 0.1 spend more on high noise: slower at the start.
        "angle_mean": -1.0,
        "tangent_constant": 10.0,
        "weighting": "sum",
    }
    config.evaluation.guidance = 2.5
    config.teacher.velocity = "original"
    config.rescale.total_steps = 150
    config.rescale.batch_size = 64
    config.rescale.learning_rate = 3e-4
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.optimizer.frozen = "time_embedder"  # refitted by hand; trained, the student collapses
    config.data.examples = 12_800
    if preset == "smoke":  # every stage of the run, in a minute or two; the student learns nothing
        config.total_steps = config.rescale.total_steps = 4
        config.batch_size = config.rescale.batch_size = 16
        config.log_every = 2
        config.data.examples = 256
        config.samples.prompts = 2
        config.samples.teacher_steps = 4
        config.evaluation.prompts = 12
        config.evaluation.teacher_steps = (4, 2)
    return config.lock()
