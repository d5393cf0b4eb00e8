"""The comparison of all methods, or of one method's settings, from the same teacher.

python -m jax_distill.study --config=configs/study.py            every method
python -m jax_distill.study --config=configs/study.py:ablation   one setting changed at a time
"""

from ml_collections import ConfigDict

METHODS = {
    "sCM": ("configs/scm.py",),
    "MeanFlow": ("configs/meanflow.py",),
    "IMM": ("configs/imm.py",),
}
ABLATION = {}


def get_config(preset: str = ""):
    if preset not in ("", "ablation", "smoke"):
        raise ValueError(f"there is no preset {preset!r}; known: ablation, smoke")
    config = ConfigDict(
        {
            "name": "study",
            "rows": ABLATION if preset == "ablation" else METHODS,  # a config file and settings
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
    if preset:
        config.name = f"study_{preset}"
    if preset == "smoke":
        config.seeds = (0,)
        config.common.update({"total_steps": 4, "batch_size": 16})
        config.student_steps, config.teacher_steps, config.grid_steps = (1, 2), (2, 1), (1,)
        config.prompts, config.evaluate_every, config.examples, config.grid_prompts = 12, 2, 256, 2
        config.teacher.settings = ("total_steps=4", "batch_size=16")
    return config.lock()
