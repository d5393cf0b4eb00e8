"""TDM: a student that draws in 4 evaluations by Euler steps, data-free, from the bundled teacher.

python -m jax_distill.main --config=configs/tdm.py

Expect 0.195, 0.548 and 0.697 in 1, 2 and 4 steps (sCM: 0.332, 0.623, 0.647). 18 minutes on one CPU
core, beside other work. It trains the ends of four steps, and draws best with as many.

python -m jax_distill.main --config=configs/tdm.py:flux_lite
    --config.teacher.checkpoint=PORTED --config.data.path=PREPARED

FLUX.1-lite-8B at 512 px on a pod, with the published rates; not run at that size yet. Of the
prepared data only captions are read. The presets `:lora` and `:flux_lite_lora` train adapters of
both players, as those of configs/scm.py do.
"""

from jax_distill.assembly.build import objective_settings
from jax_distill.config import as_teacher, overrides, shorten, student


def get_config(preset: str = ""):
    config = student(preset)
    config.name = "tdm_lora" if preset == "lora" else "tdm"
    config.optimizer.b1, config.optimizer.b2 = 0.0, 0.95
    if preset.startswith("flux_lite"):
        as_teacher(config)
        config.name = f"tdm_{preset}"
        config.total_steps = 500
        config.evaluation.guidance = 3.5
        config.optimizer.clip_norm = 1.0
        config.optimizer.warmup_steps = 50
        fake_rate = config.optimizer.learning_rate if preset == "flux_lite_lora" else 2e-5
        config.optimizer.learning_rate = fake_rate / 5
        config.optimizers.fake = overrides(config.optimizer, learning_rate=fake_rate)
        config.objective = objective_settings("tdm", guidance_scales=(3.5,))
        return config.lock()
    config.total_steps = 901  # as many evaluations as configs/scm.py
    config.batch_size = 16  # many moves of few samples go further, see docs/findings.md
    config.ema_decay = 0.99
    config.optimizer.learning_rate = 5e-4
    config.optimizers.fake = overrides(config.optimizer, learning_rate=1e-3, schedule="constant")
    config.objective = objective_settings(
        "tdm",
        guidance_scales=(2.0, 2.5, 3.0),
        # With the published 1e-3 differences count by their signs alone; see the class.
        huber_constant=0.1,
    )
    if preset == "smoke":
        shorten(config)
    return config.lock()
