"""Few-step distillation of text-to-image models in JAX."""

import os

# TensorFlow, which writes TensorBoard's files, is silent unless it fails.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# epath, which reaches buckets, asks once. TensorFlow is slow to import; what else gcsfs would try
# is for buckets of one zone, and asks for each kind beforehand.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def load(source="embedded"):
    """The pipeline of a run's workdir, of a ported folder, or of the bundled teacher.

    See `jax_distill.pipeline.load`, which this calls (and imports only then).
    """
    from jax_distill import pipeline

    return pipeline.load(source)
