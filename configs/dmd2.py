"""DMD2: a student that draws in 1, 2 or 4 evaluations, from the bundled teacher or from FLUX.

python -m jax_distill.main --config=configs/dmd2.py

Expect 0.373, 0.543 and 0.580 in 1, 2 and 4 steps (sCM: 0.332, 0.623, 0.647), from 0.24, 0.46 and
0.63 at its start: it is good for one step only. 17 minutes on one CPU core.

python -m jax_distill.main --config=configs/dmd2.py:flux_lite
    --config.teacher.checkpoint=PORTED --config.data.path=PREPARED

FLUX.1-lite-8B at 512 px on a pod, without heads; not run at that size yet. Of the prepared data
only captions are read, but with `objective.gan_weight` above 0 or `objective.inputs=noised`. The
presets `:lora` and `:flux_lite_lora` train adapters of both players beside one frozen teacher, as
those of configs/scm.py do.
"""

from jax_distill.assembly.build import objective_settings
from jax_distill.config import as_teacher, overrides, shorten, student


def get_config(preset: str = ""):
    config = student(preset)
    config.name = "dmd2_lora" if preset == "lora" else "dmd2"
    if preset.startswith("flux_lite"):
        as_teacher(config)
        config.name = f"dmd2_{preset}"
        config.evaluation.guidance = 3.5
        config.optimizer.b1 = 0.0
        config.optimizer.clip_norm = 1.0
        if preset == "flux_lite":
            config.optimizer.learning_rate = 1e-5
        rate = config.optimizer.learning_rate
        config.optimizers.fake = overrides(config.optimizer, learning_rate=rate)
        # The shift is FLUX's at 512 px, as that of the student's times is.
        config.objective = objective_settings("dmd2", guidance_scales=(3.5,), score_shift=0.63)
        return config.lock()
    config.total_steps = 831  # as many evaluations as configs/scm.py
    config.batch_size = 16  # many moves of few samples go further, see docs/findings.md
    config.ema_decay = 0.98  # slow from the first move on, for the sake of `proximal`
    config.ema_warmup = 1.0
    config.optimizer.learning_rate = 1e-3
    config.optimizers.fake = overrides(config.optimizer, schedule="constant")
    config.objective = objective_settings(
        "dmd2",
        guidance_scales=(2.0, 2.5, 3.0),
        steps=2,
        time_start=0.87,  # at 1 the teacher's network hardly looks at its input
        student_every=1,
        proximal=1.0,
        gan_weight=0.1,
        gan_blocks=(0, 1, 2, 3, 4, 5),
    )
    if preset == "smoke":
        shorten(config)
        config.objective.student_every = 2
    return config.lock()
