"""SiD: a student that draws in 1, 2 or 4 evaluations, data-free, from the bundled teacher.

python -m jax_distill.main --config=configs/sid.py

Expect 0.272, 0.500 and 0.610 in 1, 2 and 4 steps (sCM: 0.332, 0.623, 0.647). 18 minutes on one CPU
core, beside other work.

python -m jax_distill.main --config=configs/sid.py:flux_lite
    --config.teacher.checkpoint=PORTED --config.data.path=PREPARED

FLUX.1-lite-8B at 512 px on a pod, with the published rates; not run at that size yet. Of the
prepared data only captions are read. The presets `:lora` and `:flux_lite_lora` train adapters of
both players, as those of configs/scm.py do.
"""

from jax_distill.assembly.build import objective_settings
from jax_distill.config import as_teacher, overrides, shorten, student

# The fake score embeds the scale, as the student does: it needs no guidance of its own.
SETTINGS = {"steps": 4, "learned_scale": 1.0, "compared_scale": 1.0}


def get_config(preset: str = ""):
    config = student(preset)
    config.name = "sid_lora" if preset == "lora" else "sid"
    config.optimizer.b1, config.optimizer.b2 = 0.0, 0.999
    if preset.startswith("flux_lite"):
        as_teacher(config)
        config.name = f"sid_{preset}"
        config.evaluation.guidance = 3.5
        config.optimizers.fake = overrides(
            config.optimizer, learning_rate=config.optimizer.learning_rate
        )
        config.objective = objective_settings("sid", guidance_scales=(3.5,), **SETTINGS)
        return config.lock()
    config.total_steps = 902  # as many evaluations as configs/scm.py
    config.batch_size = 16  # many moves of few samples go further, see docs/findings.md
    config.ema_decay = 0.99
    config.optimizer.learning_rate = 2.5e-4
    config.optimizers.fake = overrides(config.optimizer, learning_rate=1e-3, schedule="constant")
    # At time 1 the teacher's network hardly looks at its input.
    config.objective = objective_settings(
        "sid", guidance_scales=(2.0, 2.5, 3.0), time_start=0.87, **SETTINGS
    )
    if preset == "smoke":
        shorten(config)
    return config.lock()
