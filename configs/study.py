"""The comparison of all methods from the same teacher, with the same budget and seeds.

python -m jax_distill.study --config=configs/study.py
python -m jax_distill.study --config=configs/study.py:ablations
python -m jax_distill.study --config=configs/study.py:matching

The first gives every run the same network evaluations, from which its steps follow: those of the
default run of configs/scm.py, its time rescale among them; two rows go on from there. The second
changes one thing of sCM or of MeanFlow a row, in runs of 300 steps: what each stabiliser is worth.
The third does so with DMD2, at half the budget of the first; the row that starts from a student
has as many moves as the one from the teacher, and costs that student's training more.
"""

from ml_collections import ConfigDict

from jax_distill.config import ConfigError

BUNDLED = "teacher.checkpoint=embedded"  # as the configs have it, each with a rescale of its own
SMALL = "evaluation.every=900"  # of small batches, which take more steps for the budget
# A row's name, its config file, and settings of its own as "key=value"; {workdir} is the study's
# and {seed} the cell's. A row's own total_steps is not of the budget.
METHODS = (
    ("sCM", "configs/scm.py", BUNDLED),
    # So many steps are enough for intervals that shrink: better in 4 and 8 than the derivative.
    ("MeanFlow", "configs/meanflow.py", BUNDLED, "objective.discrete_warmup=570"),
    ("IMM", "configs/imm.py", BUNDLED),
    ("DMD2", "configs/dmd2.py", BUNDLED),
    ("rCM", "configs/rcm.py", BUNDLED, SMALL),
    ("TDM", "configs/tdm.py", BUNDLED),
    ("SiD", "configs/sid.py", BUNDLED),
    ("LADD", "configs/ladd.py", BUNDLED, SMALL),
    ("Sprint", "configs/sprint.py", BUNDLED, SMALL),
)

# Not of the budget: longer runs, from the first row's students, for about four times as much.
FROM_SCM = "start.checkpoint={workdir}/sCM-{seed}"
REFINE = (BUNDLED, FROM_SCM, "evaluation.every=1700")
REFINED = (
    ("Sprint from sCM", "configs/sprint.py:refine", *REFINE, "total_steps=6200"),
    ("LADD from sCM", "configs/ladd.py:refine", *REFINE, "total_steps=4900"),
)

SCM, MEANFLOW = "configs/scm.py", "configs/meanflow.py"
SHRINKING = "objective.discrete_warmup=285"  # 95 % of the run
# From the bundled teacher, to which the rescale then adds the guidance alone.
THOUSAND = ("model.time_scale=1000.0", "teacher.checkpoint=embedded", "rescale.total_steps=150")
# As much guidance as without: omega / (1 - kappa) is one.
KAPPA = ("objective.kappa=0.5", "objective.omega=0.5")
ABLATIONS = (
    ("sCM", SCM),
    ("sCM, 1000 t", SCM, *THOUSAND),
    ("sCM, 1000 t, not normalised", SCM, *THOUSAND, "objective.normalize_tangent=False"),
    ("sCM, time embedder trained", SCM, "optimizer.frozen="),
    ("sCM, no tangent warm-up", SCM, "objective.tangent_warmup=0"),
    ("sCM, tangent not normalised", SCM, "objective.normalize_tangent=False"),
    ("sCM, published angles", SCM, "objective.angle_mean=0.2", "objective.tangent_constant=0.1"),
    ("sCM, image-free", SCM, "data.path={workdir}/drawn"),
    ("MeanFlow", MEANFLOW),
    ("MeanFlow, finite intervals first", MEANFLOW, "objective.discrete_warmup=200"),
    ("MeanFlow, intervals that shrink", MEANFLOW, SHRINKING),
    # The rest as in the study, which has such intervals.
    ("MeanFlow, copied start", MEANFLOW, SHRINKING, "objective.interval_start=copy"),
    ("MeanFlow, sample velocity", MEANFLOW, SHRINKING, "objective.target_velocity=sample"),
    ("MeanFlow, kappa 0.5", MEANFLOW, SHRINKING, *KAPPA),
    ("MeanFlow, kappa 0.5 in a window", MEANFLOW, SHRINKING, *KAPPA, "objective.mix_to=0.75"),
    ("MeanFlow, image-free", MEANFLOW, SHRINKING, "data.path={workdir}/drawn"),
)
DMD2 = "configs/dmd2.py"
MATCHING = (
    ("sCM", SCM),  # the start of another row
    ("DMD2", DMD2),
    ("DMD2 from sCM", DMD2, FROM_SCM, "total_steps=349"),  # as many as the row before
    ("DMD2, no heads", DMD2, "objective.gan_weight=0.0"),
    *((f"DMD2, a move in {n}", DMD2, f"objective.student_every={n}") for n in (2, 5, 10)),
    ("DMD2, decoupled", DMD2, "objective.decoupled=True"),
    ("DMD2, noised data", DMD2, "objective.inputs=noised"),
)
# As in the students' own runs, not the longer one that is a teacher of many.
SHORT_RESCALE = ("total_steps=150", "optimizer.warmup_steps=15", "optimizer.learning_rate=3e-4")


def get_config(preset: str = ""):
    if preset not in ("", "ablations", "matching", "smoke"):
        known = "ablations, matching, smoke"
        raise ConfigError(f"--config: unknown preset {preset!r}; known: {known}")
    config = ConfigDict(
        {
            "name": "study",
            "rows": METHODS + REFINED,
            "seeds": (0, 1),
            "common": {"evaluations": 278_500},  # of every cell, for one picture each
            "student_steps": (1, 2, 4, 8),
            "teacher_steps": (50, 8, 4, 2, 1),
            "prompts": 600,
            "evaluate_every": 300,  # training steps between scores
            "examples": 12_800,
            "data_seed": 0,
            "drawn_steps": 0,  # of the teacher that draws {workdir}/drawn, image-free; 0: not made
            "teacher": {
                "checkpoint": "",
                "config": "configs/time_rescale.py",
                "settings": SHORT_RESCALE,
            },
            "grid_prompts": 8,
            "grid_steps": (1, 4),
        }
    )
    if preset == "ablations":
        config.name, config.rows, config.seeds = "ablations", ABLATIONS, (0,)
        config.student_steps, config.drawn_steps, config.evaluate_every = (1, 2, 4), 20, 150
        config.common, config.teacher.settings = {"total_steps": 300, "batch_size": 64}, ()
    if preset == "matching":
        config.name, config.rows, config.seeds = "matching", MATCHING, (0,)
        config.common.evaluations = 139_250  # half the study's
        config.student_steps = (1, 2, 4)
    if preset == "smoke":
        config.name = "study_smoke"
        few = ("objective.heads_first=0",)  # else all steps would be the heads'
        config.rows = tuple(
            (*row, *few) if row[0] in ("LADD", "Sprint") else row for row in METHODS
        )
        config.seeds = (0,)
        config.common.update({"evaluations": 960, "batch_size": 16})
        config.student_steps, config.teacher_steps, config.grid_steps = (1, 2), (10, 1), (1,)
        config.prompts, config.evaluate_every, config.examples, config.grid_prompts = 12, 2, 256, 2
        config.teacher.settings = ("total_steps=4", "batch_size=16", "optimizer.learning_rate=1e-5")
        config.teacher.settings += ("evaluation.diversity_prompts=6",)
    return config.lock()
