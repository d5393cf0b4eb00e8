"""LoRA students: adapters beside a frozen teacher are the network that they are merged into."""

import dataclasses
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import made_records
import ml_dtypes
import numpy as np
import pytest
import torch
from absl.testing import flagsaver
from diffusers import FluxPipeline, FluxTransformer2DModel
from flax import traverse_util
from ml_collections import ConfigDict
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from random_pipeline import save_random
from safetensors.torch import load_file
from tiny_runs import GUIDANCE, RUNS, State, random_parameters, run_program, save_run

from jax_distill import config, main, pipeline
from jax_distill.assembly import adapters, build
from jax_distill.data import records
from jax_distill.devices import sharding
from jax_distill.evaluation.metrics import read_metrics
from jax_distill.flow import Batch, Text
from jax_distill.models import lora
from jax_distill.objectives.objective import View
from jax_distill.planning.flops import count_flops
from jax_distill.runs import commands
from jax_distill.runs.exporting import export
from jax_distill.runs.porting import port
from jax_distill.training import checkpoint

ROOT = Path(__file__).parents[1]
METHODS = ("meanflow", "imm", "time_rescale")
TEACHER = RUNS["flow_matching"]


def student(method: str, **settings) -> ConfigDict:
    """A tiny student with adapters of rank 2."""
    result = RUNS[method].copy_and_resolve_references()
    with result.unlocked():
        result.lora.update({"rank": 2, "alpha": 6.0} | settings)
        result.batch_size = 4
    return result


@functools.cache
def networks() -> tuple[dict, dict]:
    """A teacher's parameters, and those of a student whose adapters are random."""
    frozen = random_parameters(TEACHER)
    own = random_parameters(RUNS["meanflow"], seed=1)
    settings = adapters.settings(student("scm"))
    state = settings.split(
        jax.random.key(0), {**own, **frozen, "time_embedder": own["time_embedder"]}
    )
    rng = np.random.default_rng(2)
    state = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), state)
    return frozen, state


def state_of(configuration: ConfigDict) -> dict:
    frozen, state = networks()
    own = build.initial_parameters(configuration)
    return {name: leaf for name, leaf in state.items() if name in own}


def flat(tree: dict) -> dict[str, object]:
    return traverse_util.flatten_dict(tree, sep="/")


def assert_close(actual, expected, tolerance=2e-5):
    def check(a, b):
        scale = np.abs(np.asarray(b)).max() + 1e-12
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)

    jax.tree.map(check, actual, expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_objective_trains_the_adapters_and_what_it_has_besides(method):
    settings = student(method)
    ((_, loss, arguments),) = build.abstract_losses(settings, TEACHER)
    assert jax.eval_shape(loss, *arguments).shape == ()
    assert flat(arguments[0]["network"]).keys() == flat(state_of(settings)).keys()


@pytest.mark.parametrize("kind", ["plain", "quantized", "adapted", "adapted_quantized"])
def test_a_product_of_parts_is_that_of_the_parts_side_by_side(kind):
    """And so are its derivatives by the parts."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    kernel = normal(9, 6)
    if "quantized" in kind:
        kernel = lora.quantize(kernel)
    if "adapted" in kind:
        kernel = lora.Adapted(kernel, normal(9, 2), normal(2, 6), 0.5)
    parts = normal(2, 5, 3), normal(2, 5, 4), normal(2, 5, 2)

    def whole(*parts):
        inputs = jnp.concatenate(parts, -1)
        return lora.dot_general(inputs, kernel, (((2,), (0,)), ((), ())))

    def in_parts(*parts):
        return lora.dot_side_by_side(parts, kernel)

    (expected, expected_d), (found, found_d) = (
        jax.jvp(function, parts, parts[:2] + (parts[2] * 2,)) for function in (whole, in_parts)
    )
    assert_close((found, found_d), (expected, expected_d), 1e-5)


def test_loss_and_gradient_are_those_of_merged_kernels():
    """Through the jvp of sCM."""
    settings = student("scm")
    beside = build.objective(settings, TEACHER)
    plain, frozen_network = beside.objective, networks()[0]
    key = jax.random.key(3)
    shape = build.token_shape(settings)
    text = Text(
        *(jax.random.normal(key, x.shape) for x in jax.tree.leaves(build.text_like(settings, 4)))
    )
    batch = Batch(jax.random.normal(key, (4, *shape)), text)
    state = {"network": state_of(settings)}
    state["logvar"] = plain.init_student(key, frozen_network)["logvar"]
    frozen = {"teacher": frozen_network, "null": jax.tree.map(lambda x: x[:1], text)}
    trees = {"student": state}

    def merged(state):
        """W + (alpha / r) A B, written out."""
        whole = flat({**frozen_network, **{k: v for k, v in state.items() if k in lora.EMBEDDERS}})
        beside = flat(state)
        for path, a in beside.items():
            if path.endswith("/lora_a"):
                b = beside[path.replace("lora_a", "lora_b")]
                whole[path.replace("lora_a", "kernel")] += 6.0 / 2 * a @ b
        return traverse_util.unflatten_dict(whole, sep="/")

    def of_merged(state, view, batch, draws, step):
        whole = {**state, "network": merged(state["network"])}
        return plain.loss(whole, View(view.frozen), batch, draws, step)

    arguments = (state, View(frozen, trees, trees), batch, beside.draw(key, batch), jnp.asarray(5))
    own = beside.players["student"].loss
    (loss, _), gradient = jax.jit(jax.value_and_grad(own, has_aux=True))(*arguments)
    (expected, _), slow = jax.jit(jax.value_and_grad(of_merged, has_aux=True))(*arguments)
    assert_close(loss, expected)
    assert_close(gradient, slow, 2e-3)
    assert all(np.abs(leaf).max() > 0 for path, leaf in flat(gradient).items() if "lora" in path)


def test_the_teacher_is_the_student_with_its_adapters_off_and_exists_once():
    settings = adapters.settings(student("scm"))
    frozen = random_parameters(TEACHER)
    own = random_parameters(RUNS["scm"], seed=1)
    initial = {**own, **{k: v for k, v in frozen.items() if k != "time_embedder"}}
    state = settings.split(jax.random.key(0), initial)
    trained = {path.split("/")[-1] for path in flat(state) if "embedder" not in path}
    assert trained == {"lora_a", "lora_b"}
    assert {path.split("/")[0] for path in flat(state)} >= {"time_embedder", "guidance_embedder"}
    whole = settings.attach(frozen, state)
    assert_close(lora.merged(whole), initial, 0)
    for path, leaf in flat(whole).items():
        if path.split("/")[0] in lora.EMBEDDERS:
            continue
        assert (leaf.base if isinstance(leaf, lora.Adapted) else leaf) is flat(frozen)[path]
    # Adapters that are there are gone on with, and can be laid beside the same kernels again.
    again = settings.attach(whole, settings.split(jax.random.key(1), whole))
    assert flat(again).keys() == flat(whole).keys()
    for path, leaf in flat(again).items():
        assert leaf is flat(whole)[path] or leaf.lora_a is flat(whole)[path].lora_a


def test_no_gradient_of_frozen_kernels_is_computed():
    """Student and tangent forward, teacher twice for its guidance, and one backward, not two."""

    def flops(settings):
        ((_, loss, arguments),) = build.abstract_losses(settings, TEACHER)
        return count_flops(jax.grad(loss), *arguments)

    full, beside = flops(RUNS["scm"]), flops(student("scm", rank=1))
    assert beside < 0.9 * full * 4 / RUNS["scm"].batch_size


def test_int8_kernels_are_nearest_and_never_wide_outside_their_product():
    kernel = jax.random.normal(jax.random.key(0), (3, 32, 8)) * jnp.arange(1, 9)
    quantized = lora.quantize(kernel)
    assert quantized.values.dtype == jnp.int8 and quantized.scale.shape == (3, 1, 8)
    error = np.abs(quantized.dequantized() - kernel)
    assert (error <= 0.5001 * quantized.scale).all() and error.max() > 0
    x = jax.random.normal(jax.random.key(1), (5, 32))
    product = lora.dot_general(x, quantized[1], (((1,), (0,)), ((), ())))
    assert_close(product, x @ quantized.dequantized()[1], 1e-6)

    frozen, _ = networks()
    small = lora.quantized(frozen)
    kinds = {path: type(leaf) is lora.Quantized for path, leaf in flat(small).items()}
    assert kinds == {p: "blocks/" in p and p.endswith("/kernel") for p in flat(frozen)}


def test_frozen_kernels_are_sharded_as_plain_ones_whatever_their_kind():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.AXES)
    frozen, state = networks()
    plain = flat(sharding.shard_state(frozen, mesh))
    whole = adapters.settings(student("scm")).attach(lora.quantized(frozen), state)
    for path, place in flat(sharding.shard_state(whole, mesh)).items():
        if isinstance(place, lora.Adapted):
            assert place.base.values.spec == plain[path].spec
            assert place.base.scale.spec[-1] == plain[path].spec[-1]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"targets": "blcks"}, "targets: 'blcks' matches no projection; their paths are such as"),
        ({"targets": "("}, "targets: '(' is no pattern"),
        ({"rank": 32}, "rank: 32 is not less than 32, the smaller side of 'double_blocks/"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(settings, expected):
    shapes = jax.eval_shape(lambda: build.initial_parameters(RUNS["scm"]))
    with pytest.raises(ValueError, match=re.escape(expected)):
        adapters.settings(student("scm", **settings)).kernels(shapes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("teacher") / "run", TEACHER)


def save_student(workdir: Path, method: str, teacher: Path, **settings) -> Path:
    configuration = student(method, **settings)
    with configuration.unlocked():
        configuration.teacher.checkpoint = str(teacher)
    config.save(configuration, workdir)
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, State({"student": {"ema": {"network": state_of(configuration)}}}), {})
    return workdir


def theirs(folder: Path, *, text: Text, noise: np.ndarray, t: float) -> np.ndarray:
    """The velocity of the program on an exported folder's card."""
    network = run_program(folder)["network"]
    with torch.no_grad():
        inputs = (torch.from_numpy(np.array(x)) for x in (text.sequence, text.pooled))
        return network(torch.from_numpy(noise), t, *inputs, GUIDANCE).numpy()


@pytest.mark.parametrize(("method", "base"), [("meanflow", ""), ("scm", "int8")])
def test_exports_of_a_student_are_what_is_loaded(teacher, tmp_path, method, base):
    """Merged, and as adapters beside the exported teacher in stock diffusers."""
    run = save_student(tmp_path / "run", method, teacher, base=base)
    pipe = pipeline.load(run)
    text = Text(*map(jnp.asarray, pipe.world.encode(["a red circle"])))
    noise = np.random.default_rng(0).standard_normal((1, 16, 64)).astype(np.float32)
    interval = {"interval": jnp.zeros(1)} if method == "meanflow" else {}
    ours = jax.jit(build.network(pipe.config).velocity)(
        pipe.params["network"], noise, jnp.full(1, 0.4), text, jnp.full(1, GUIDANCE), **interval
    )
    export(str(run), tmp_path / "merged", layout="safetensors")
    assert_close(theirs(tmp_path / "merged", text=text, noise=noise, t=0.4), ours, 1e-4)
    if base:  # a student of t, merged and refitted for stock diffusers
        export(str(run), tmp_path / "folder")
        stock = FluxTransformer2DModel.from_pretrained(tmp_path / "folder/transformer")
        own = run_program(tmp_path / "merged")
        own["network"].__globals__.update(transformer=stock, TIME_SCALE=1000.0)
        inputs = (torch.from_numpy(np.array(x)) for x in (text.sequence, text.pooled))
        with torch.no_grad():
            velocity = own["network"](torch.from_numpy(noise), 0.4, *inputs, GUIDANCE)
        assert_close(velocity.numpy(), ours, 1e-3)
        return
    export(str(run), tmp_path / "adapters", layout="lora")
    export(str(teacher), tmp_path / "adapters/FLUX")
    assert_close(theirs(tmp_path / "adapters", text=text, noise=noise, t=0.4), ours, 1e-4)
    card = (tmp_path / "adapters/README.md").read_text()
    assert "embedders.safetensors` has what adapters cannot express" in card
    with pytest.raises(ValueError, match="--dtype: --format=lora has adapters in float32"):
        export(str(run), tmp_path / "none", layout="lora", dtype="bfloat16")
    with pytest.raises(ValueError, match="--format=lora: '.*' has no adapters"):
        export(str(teacher), tmp_path / "none", layout="lora")


LENGTH, SIZE = 12, (32, 48)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """diffusers' folder, ours of it, and data for training."""
    source, root = tmp_path_factory.mktemp("diffusers"), tmp_path_factory.mktemp("flux")
    save_random(source)
    port(str(source), root / "ported", dtype="float32", text_length=LENGTH)
    rng = np.random.default_rng(0)

    def embedded(count):
        sequence, pooled = (
            rng.standard_normal((count, LENGTH, 24)),
            rng.standard_normal((count, 16)),
        )
        return Text(sequence.astype(ml_dtypes.bfloat16), pooled.astype(ml_dtypes.bfloat16))

    latents, text = rng.standard_normal((8, 6, 16)).astype(np.float16), embedded(8)
    rows = [
        records.LatentRecord(latents[i], f"caption {i}", f"{i}", text.sequence[i], text.pooled[i])
        for i in range(8)
    ]
    facts = {"world": "flux", "resolution": list(SIZE)}
    made_records.write(root / "data", rows, facts, null=embedded(1))
    return source, root


def train(root: Path, workdir: Path, *changes: str) -> object:
    """Runs the training command in this process; returns its error, if any."""
    settings = {
        "total_steps": 2,
        "batch_size": 2,
        "accumulate": 1,
        "rescale.batch_size": 2,
        "log_every": 1,
        "samples.every": 0,
        "samples.prompts": 1,
        "samples.teacher_steps": 1,
        "evaluation.student_steps": "1",
        "evaluation.teacher_steps": "1",
        "data.resolution": f"{SIZE[0]},{SIZE[1]}",
        "data.path": root / "data",
        "teacher.checkpoint": root / "ported",
        "dtype": "float32",
        "lora.rank": 3,
        "lora.base": "",
        # So much that a few steps show.
        "optimizer.learning_rate": 0.01,
        "optimizer.frozen": "time_embedder",
    }
    settings |= dict(change.split("=") for change in changes)
    argv = ["main", f"--config={ROOT}/configs/scm.py:flux_lite_lora", f"--workdir={workdir}"]
    argv += [f"--config.{key}={value}" for key, value in settings.items()]
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(sys, "argv", argv)
        try:
            commands.run(main.main)
        except SystemExit as stop:
            return stop.code


@pytest.fixture(scope="module")
def run(flux):
    workdir = flux[1] / "run"
    assert not train(flux[1], workdir)
    return workdir


def test_only_adapters_and_embedders_are_saved_and_training_goes_on(flux, run, tmp_path):
    saved = flat(checkpoint.load_averaged(run)["network"])
    assert {path.rpartition("/")[2] for path in saved if "embedder" not in path} == {
        "lora_a",
        "lora_b",
    }
    assert max(np.abs(leaf).max() for path, leaf in saved.items() if "lora_b" in path) > 1e-3
    assert "holds another run, of lora.rank=3 and not 2" in train(flux[1], run, "lora.rank=2")
    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    assert not train(flux[1], longer, "total_steps=3")
    assert checkpoint.complete_steps(longer)[0] == 3
    lines = read_metrics(longer / "metrics.jsonl").lines
    assert [line["step"] for line in lines] == [1, 2, 3]
    straight = tmp_path / "straight"
    shutil.copytree(run / "time_rescale", straight / "time_rescale")  # its first stage is the same
    assert not train(flux[1], straight, "total_steps=3")
    gone_on = checkpoint.load_averaged(longer)["network"]
    jax.tree.map(
        np.testing.assert_array_equal, checkpoint.load_averaged(straight)["network"], gone_on
    )


def test_adapters_are_not_laid_beside_another_teacher(flux, run, tmp_path):
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    note = json.loads((changed / adapters.TEACHER).read_text())
    (changed / adapters.TEACHER).write_text(json.dumps({"checksum": note["checksum"] ^ 1}))
    assert "is no longer what the adapters" in train(flux[1], changed, "total_steps=3")
    assert checkpoint.complete_steps(changed)[0] == 2
    with pytest.raises(ValueError, match="put the old one back"):
        pipeline.load(changed).params  # noqa: B018


def test_exported_adapters_draw_the_same_in_stock_diffusers(flux, run, tmp_path):
    """`FluxPipeline.load_lora_weights`, and PEFT's own functions, on the teacher's folder."""
    source, ours = flux[0], pipeline.load(run)
    export(str(run), tmp_path / "out", layout="lora")
    pipe = FluxPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    embedders = load_file(tmp_path / "out/embedders.safetensors")
    assert not pipe.transformer.load_state_dict(embedders, strict=False).unexpected_keys
    noise = np.random.default_rng(1).standard_normal((1, 6, 16)).astype(np.float32)

    def draw():
        tokens = pipe(
            "a red circle",
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=1,
            sigmas=[1.0],
            guidance_scale=GUIDANCE,
            latents=torch.from_numpy(noise),
            max_sequence_length=LENGTH,
            output_type="latent",
        ).images
        return tokens.detach().numpy()

    expected = ours.latents(
        Text(*map(jnp.asarray, ours.world.encode(["a red circle"]))),
        steps=1,
        guidance=GUIDANCE,
        noise=noise,
    )
    assert np.abs(draw() - expected).max() > 1e-3 * np.abs(expected).max()  # the teacher
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors")
    assert_close(draw(), expected, 1e-4)

    model = FluxTransformer2DModel.from_pretrained(source / "transformer")
    model.load_state_dict(embedders, strict=False)
    inject_adapter_in_model(LoraConfig.from_pretrained(str(tmp_path / "out")), model)
    weights = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    weights = {name.removeprefix("transformer."): leaf for name, leaf in weights.items()}
    assert not set_peft_model_state_dict(model, weights).unexpected_keys
    pipe.transformer = model
    assert_close(draw(), expected, 1e-4)

    card = (tmp_path / "out/README.md").read_text()
    assert f"the diffusers folder that '{flux[1] / 'ported'}' was ported from" in card
    (tmp_path / "out/FLUX").symlink_to(source)
    assert run_program(tmp_path / "out", 1)["pictures"][0].size == SIZE[::-1]


def test_wrong_settings_stop_before_anything_is_written(flux, tmp_path):
    for change, expected in (
        ("lora.targets=blcks", "lora.targets: 'blcks' matches no projection"),
        ("lora.base=int4", "lora.base: 'int4' is not one of int8"),
        ("lora.rank=64", "lora.rank: 64 is not less than"),
    ):
        assert expected in train(flux[1], tmp_path / "none", change)
    assert not list(tmp_path.iterdir())


def test_a_state_of_another_rank_is_not_laid_beside_the_teacher():
    """Such as of a run of no adapters, whose configuration was changed by hand."""
    settings = adapters.settings(student("scm"))
    frozen = random_parameters(TEACHER)
    state = settings.split(jax.random.key(0), frozen)
    other = dataclasses.replace(settings, rank=settings.rank + 1)
    with pytest.raises(ValueError, match=f"has adapters of rank {settings.rank}; put"):
        other.attach(frozen, state)
    with pytest.raises(ValueError, match="lora.rank: .* has none; put the run's config.json back"):
        settings.attach(frozen, frozen)
