"""SANA-Sprint: sCM, and heads on the teacher's features that judge its samples.

python -m jax_distill.main --config=configs/sprint.py

From the teacher, an sCM student and its heads at once: expect 0.423, 0.610 and 0.650 in 1, 2 and 4
steps (sCM: 0.332, 0.623, 0.647). 16 minutes on one CPU core, beside other work.

python -m jax_distill.main --config=configs/sprint.py:refine --config.start.checkpoint=runs/scm

From the student of configs/scm.py, in runs/scm if nothing is said: expect 0.533, 0.647 and 0.710 in
1, 2 and 4 steps, which are 71%, 86% and 94% of the teacher's score; with seed 1, and that seed's
student, 0.547, 0.648 and 0.690. The pictures are as near to real ones as others of these (a
distance of 0.010 to 0.015; the teacher's have 0.043), and their diversity is 0.5 to 0.6 of the
teacher's in what it spreads least, sizes. 35 minutes on one CPU core; with what its start cost, 3.6
times the network evaluations of configs/scm.py.

python -m jax_distill.main --config=configs/sprint.py:flux_lite
    --config.teacher.checkpoint=PORTED --config.data.path=PREPARED

FLUX.1-lite-8B at 512 px on a pod, with four heads as published; not run at that size yet. The
presets `:lora` and `:flux_lite_lora` train adapters, as those of configs/scm.py do.
"""

from jax_distill.assembly.build import objective_settings
from jax_distill.config import overrides, shorten, student


def get_config(preset: str = ""):
    config = student(preset, own=("refine",))
    config.name = f"sprint_{preset}" if preset in ("lora", "refine") else "sprint"
    config.optimizers.heads = overrides(
        config.optimizer, name="adamw", learning_rate=2e-6, frozen="", b1=0.0
    )
    if preset.startswith("flux_lite"):
        config.name = f"sprint_{preset}"
        config.objective = objective_settings("sprint", blocks=(4, 13, 23, 32))
        return config.lock()
    config.total_steps = 1910  # as many evaluations as configs/scm.py
    config.batch_size = 8  # many moves of few samples go further, see docs/findings.md
    config.ema_decay = 0.995
    config.optimizer.learning_rate = 1.5e-3
    config.optimizers.heads.update(name="muon", learning_rate=1e-3, schedule="constant")
    config.objective = objective_settings(
        "sprint",
        # sCM's part is that of configs/scm.py.
        guidance_scales=(2.0, 2.5, 3.0),
        tangent_warmup=50,
        angle_mean=-1.0,
        tangent_constant=10.0,
        weighting="sum",
        # Sums of squares have a gradient of 800 or so at the start, the heads' opinion one of 0.6.
        adversarial_weight=600.0,
        noise_share=0.7,
        judge_mean=-1.0,
        judge_std=1.4,
        heads_first=400,
        middle_angle=1.15,  # of two steps: .03 more than from 1.3, which is best for sCM alone
    )
    if preset == "refine":
        config.start.checkpoint = "runs/scm"
        config.total_steps = 6200
        config.objective.heads_first = 1500
        config.objective.tangent_warmup = 0
        config.objective.adversarial_weight = 1500.0
    if preset == "smoke":
        shorten(config)
        config.objective.heads_first = 1
    return config.lock()
