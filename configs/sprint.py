"""SANA-Sprint: sCM, and heads on the teacher's features that judge its samples.

python -m jax_distill.main --config=configs/sprint.py

Expect 0.398, 0.593 and 0.622 in 1, 2 and 4 steps (sCM: 0.332, 0.623, 0.647), and a diversity of
0.57 to 0.72 of the teacher's in what it spreads least. 25 minutes on one CPU core.

python -m jax_distill.main --config=configs/sprint.py --config.start.checkpoint=runs/scm
    --config.total_steps=5000 --config.objective.heads_first=0
    --config.objective.tangent_warmup=0 --config.objective.adversarial_weight=1500

From the student of configs/scm.py, longer, and with more weight on the heads' opinion: 0.553, 0.670
and 0.712 on all 600 prompts, a diversity of 0.67 to 0.72, and pictures nearer to real ones than the
teacher's are (a distance of 0.013, the teacher's 0.038). An hour on one CPU core.

python -m jax_distill.main --config=configs/sprint.py:flux_lite
    --config.teacher.checkpoint=PORTED --config.data.path=PREPARED

FLUX.1-lite-8B at 512 px on a pod, with four heads as published; not run at that size yet. The
presets `:lora` and `:flux_lite_lora` train adapters, as those of configs/scm.py do.
"""

from jax_distill.assembly.build import objective_settings
from jax_distill.config import overrides, shorten, student


def get_config(preset: str = ""):
    config = student(preset)
    config.name = "sprint_lora" if preset == "lora" else "sprint"
    config.optimizers.heads = overrides(
        config.optimizer, name="adamw", learning_rate=2e-6, frozen="", b1=0.0
    )
    if preset.startswith("flux_lite"):
        config.name = f"sprint_{preset}"
        config.objective = objective_settings("sprint", blocks=(4, 13, 23, 32))
        return config.lock()
    config.total_steps = 2600
    config.batch_size = 16  # many moves of few samples go further, see docs/findings.md
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
        heads_first=1000,
    )
    if preset == "smoke":
        shorten(config)
        config.objective.heads_first = 1
    return config.lock()
