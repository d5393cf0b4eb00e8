"""rCM: sCM's loss and distribution matching together, from the bundled teacher or from FLUX.

python -m jax_distill.main --config=configs/rcm.py

Expect 0.318, 0.538 and 0.585 in 1, 2 and 4 steps (sCM: 0.332, 0.623, 0.647); its settings are
tuned no further than the times of its sampler. 18 minutes on one CPU core, beside other work.

python -m jax_distill.main --config=configs/rcm.py:flux_lite
    --config.teacher.checkpoint=PORTED --config.data.path=PREPARED

FLUX.1-lite-8B at 512 px on a pod, with the rates of the paper's small model; not run at that size
yet. The presets `:lora` and `:flux_lite_lora` train adapters, of the student and of the fake score
beside one frozen teacher, as those of configs/scm.py do.
"""

import math

from jax_distill.assembly.build import objective_settings
from jax_distill.config import overrides, shorten, student


def get_config(preset: str = ""):
    config = student(preset)
    config.name = "rcm_lora" if preset == "lora" else "rcm"
    config.optimizers.fake = overrides(config.optimizer, name="adamw", b1=0.0)
    if preset.startswith("flux_lite"):
        config.name = f"rcm_{preset}"
        config.objective = objective_settings("rcm", guidance_scales=(3.5,))
        config.evaluation.guidance = 3.5
        config.optimizer.b1 = 0.0
        config.optimizer.weight_decay = 0.01
        config.optimizer.learning_rate = 2e-6 if preset == "flux_lite" else 1e-4
        config.optimizers.fake.learning_rate = config.optimizer.learning_rate / 5
        return config.lock()
    config.total_steps = 1885  # as many evaluations as configs/scm.py
    config.batch_size = 16  # many moves of few samples go further, see docs/findings.md
    config.ema_decay = 0.99
    config.optimizers.fake.update(name="muon", learning_rate=1e-3, schedule="constant")
    config.objective = objective_settings(
        "rcm",
        # As in configs/scm.py.
        data_scale=0.5,
        guidance_scales=(2.0, 2.5, 3.0),
        tangent_warmup=50,
        angle_mean=-1.0,
        tangent_constant=10.0,
        drop_nonfinite=False,
        scm_steps=1000,
        student_every=2,
        # Two steps by the published 1.5, of pictures with more tokens, score 0.2 less here.
        sample_angles=(math.atan(80), 1.23, 0.88, 0.49),
    )
    if preset == "smoke":
        shorten(config)
        config.objective.scm_steps, config.objective.student_every = 1, 2
    return config.lock()
