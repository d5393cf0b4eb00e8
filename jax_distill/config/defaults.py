"""All keys of a configuration with their defaults, a section at a time."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from jax_distill.config.settings import ConfigError, Settings

TEACHER = {
    "checkpoint": "",  # a workdir, or a folder of jax_distill.port; empty: the embedded teacher
    "velocity": "rescaled",  # or "original", of the teacher before the rescale
    "guidance": "auto",  # or "embedded", "cfg", "none", see build.guidance_of
}
START = {
    "checkpoint": "",  # a workdir, from whose averaged student this one starts; empty: the teacher
}
RESCALE = {  # the stage before sCM and MeanFlow, see objectives/time_rescale.py
    "total_steps": 0,
    "batch_size": 64,
    "learning_rate": 1e-3,
}
LORA = {  # adapters beside the frozen teacher, see assembly/adapters.py
    "rank": 0,  # 0: the whole student is trained
    "alpha": 16.0,  # adapters are scaled by alpha / rank
    "targets": "blocks/",  # a pattern of the paths of kernels that have one
    "base": "",  # or "int8": how the frozen kernels of the blocks are kept
}
MODEL = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 3,
    "joint_attention_dim": 160,
    "pooled_projection_dim": 144,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
    "time_scale": 1000.0,  # multiplies t before it is embedded
    "guidance_factor": 1000.0,  # likewise the guidance scale
    "interval_embeds": False,
    "remat": "none",
    "attention": "auto",  # or "xla", "blocked", "pallas_tpu", "pallas_gpu"
}
AUTOENCODER = {
    "latent_channels": 16,
    "block_out_channels": (8, 16, 48, 96),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
DATA = {
    "path": "",  # folders made by jax_distill.prepare, commas between; empty: made in the workdir
    "weights": (1.0,),  # of the folders of `path`: examples come from each in this ratio
    # The share of examples that the loader gives with the empty caption, whatever is trained: a
    # student, its teacher and other players see the same. Methods with a `drop_rate` drop more,
    # of the captions that are left, for themselves alone.
    "caption_dropout": 0.0,
    "damaged": "fail",  # or "skip": the next good example comes in the place of a damaged one
    "damaged_share": 0.01,  # of a folder's examples, the most that "skip" passes over
    "threads": 2,  # that read batches ahead
    "prefetch": 2,  # batches that wait to be taken
    "workers": 0,  # processes that read in the place of threads
    "examples": 100_000,  # of the shapes world, when the folder is made
    "seed": 0,
    "text_length": 10,
    "embedding": "prepared",  # of FLUX's captions; or "training": embedded beside the steps
    "resolution": (512, 512),  # of FLUX's world: height and width in pixels
}
OPTIMIZER = {
    "name": "adamw",
    "learning_rate": 1e-3,
    "schedule": "constant",  # or "cosine", or "trapezoid"
    "decay_share": 0.3,  # of the steps, at the end of a trapezoid
    "warmup_steps": 0,
    "b1": 0.9,
    "b2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "moments": "float32",  # or "bfloat16", half the memory, see training/rounding.py
    "frozen": "",  # a pattern of the paths of parameters that are not trained
    "adam_share": 0.4,  # of the learning rate, for the parameters that muon leaves to AdamW
}
MESH = {
    "data": 1,
    "fsdp": -1,
    "tensor": 1,
    "split_tokens": False,  # over `tensor`, for pictures of many tokens
}
EVALUATION = {
    "prompts": 600,
    "every": 0,  # steps between scores of a student under way; 0: at the end only
    "student_steps": (1, 2, 4),
    "teacher_steps": (50, 4, 2, 1),
    "guidance": 4.5,
    "diversity_prompts": 30,  # measured at the end, see docs/measures.md; 0: nothing is
    "diversity_pictures": 8,  # of each of them
}
RUN = {
    "name": "",
    "world": "shapes",  # or "flux": see worlds/
    "seed": 0,
    "total_steps": 1000,
    "batch_size": 64,
    "accumulate": 1,  # micro-batches a step
    "ema_decay": 0.999,
    "ema_warmup": 10.0,  # the first moves forget faster; 1: none does, see training/step.py
    "ema_power": 0.0,  # or the width of a power function's average, see training/step.py
    "ema_dtype": "float32",  # or "bfloat16", half the memory, see training/rounding.py
    "on_nonfinite": "stop",  # or "skip": leave such steps out and count them
    "dtype": "float32",  # of the networks' computation; parameters stay float32
    "objective": {"name": ""},
    "teacher": TEACHER,
    "start": START,
    "rescale": RESCALE,
    "lora": LORA,
    "model": MODEL,
    "autoencoder": AUTOENCODER,
    "data": DATA,
    "optimizer": OPTIMIZER,
    "optimizers": {},  # of players other than the student, by name: see `optimizer_of`
    "mesh": MESH,
    "log_every": 50,
    "checkpoint": {"every": 500, "keep": 2},
    "samples": {"every": 0, "prompts": 8, "teacher_steps": 50},  # 0: at the end only
    "evaluation": EVALUATION,
}
OPEN = ("objective", "optimizers")
"""Sections that take new keys: those of an objective, and those of its players."""


def base(preset: str = "", *, presets: Sequence[str] = ("",)) -> ConfigDict:
    """Returns all keys with their defaults; a config file sets what is special about it.

    It is locked, so that a misspelt key is an error, except for the sections in `OPEN`.

    Args:
      preset: the part of `--config=file.py:preset` after the colon.
      presets: those that the config file knows.

    Raises:
      ConfigError: an unknown preset.
    """
    if preset not in presets:
        known = ", ".join(filter(None, presets)) or "none"
        raise ConfigError(f"--config: unknown preset {preset!r}; known: {known}")
    config = Settings(RUN).lock()
    for section in OPEN:
        config[section].unlock()
    return config


def optimizer_of(config: ConfigDict, player: str = "") -> ConfigDict:
    """Returns the settings of a player's optimizer, locked.

    Args:
      config: of a run.
      player: a name in `config.optimizers`, whose values override those of `config.optimizer`
        (None keeps them); "" or a name that is not there: the student's.
    """
    changes = config.optimizers.get(player, {})
    given = {key: value for key, value in changes.items() if value is not None}
    return ConfigDict({**config.optimizer, **given}).lock()
