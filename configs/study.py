"""The comparison of all methods from the same teacher, with the same budget and seeds.

python -m jax_distill.study --config=configs/study.py
"""

from ml_collections import ConfigDict

from jax_distill.config import ConfigError

# A row's name, its config file, and settings of its own as "key=value".
METHODS = (
    ("sCM", "configs/scm.py"),
    ("MeanFlow", "configs/meanflow.py"),
    ("IMM", "configs/imm.py"),
)


def get_config(preset: str = ""):
    if preset not in ("", "smoke"):
        raise ConfigError(f"--config: there is no preset {preset!r} after the colon; known: smoke")
    config = ConfigDict(
        {
            "name": "study",
            "rows": METHODS,
            "seeds": (0, 1),
            "common": {"total_steps": 600, "batch_size": 64},  # of every cell
            "student_steps": (1, 2, 4, 8),
            "teacher_steps": (50, 8, 4, 2, 1),
            "prompts": 600,
            "evaluate_every": 150,  # training steps between scores
            "examples": 12_800,
            "data_seed": 0,
            "teacher": {"checkpoint": "", "config": "configs/time_rescale.py", "settings": ()},
            "grid_prompts": 8,
            "grid_steps": (1, 4),
        }
    )
    if preset == "smoke":
        config.name = "study_smoke"
        config.seeds = (0,)
        config.common.update({"total_steps": 4, "batch_size": 16})
        config.student_steps, config.teacher_steps, config.grid_steps = (1, 2), (10, 1), (1,)
        config.prompts, config.evaluate_every, config.examples, config.grid_prompts = 12, 2, 256, 2
        config.teacher.settings = ("total_steps=4", "batch_size=16", "optimizer.learning_rate=1e-5")
    return config.lock()
