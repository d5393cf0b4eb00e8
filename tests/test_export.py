"""What is exported is what was ported, bit for bit; a bad source makes nothing."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from typing import NamedTuple

import diffusers.utils.dynamic_modules_utils as dynamic_modules
import numpy as np
import pytest
import random_flux
import random_pipeline
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file as load_torch_file
from tiny_runs import RUNS, run_program, save_run
from transformers import CLIPTextModel, T5EncoderModel

from jax_distill import config
from jax_distill.interop import ported_folder
from jax_distill.interop.readers import torch_files
from jax_distill.runs.exporting import export
from jax_distill.runs.porting import port
from jax_distill.training import checkpoint

NETWORK = dataclasses.replace(random_pipeline.TRANSFORMER, num_layers=2, num_single_layers=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run") / "scm", RUNS["scm"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "flux"
    pipe = random_pipeline.save_random(folder, random_pipeline.Sizes(NETWORK))
    pipe.to(torch.bfloat16).save_pretrained(folder, max_shard_size="15KB")
    return folder


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """Ported, for pictures of 64 x 64."""
    output = tmp_path_factory.mktemp("ported") / "flux"
    port(str(source), output)
    values = json.loads((output / "config.json").read_text())
    values["data"]["resolution"] = [64, 64]
    (output / "config.json").write_text(json.dumps(values))
    return output


def tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_torch_file(file).items()}


def assert_identical(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape
        assert torch.equal(actual[name], tensor), name


def test_a_diffusers_folder_comes_back_bit_for_bit(source, folder, tmp_path):
    export(str(folder), tmp_path / "out", shard_bytes=20_000)
    classes = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    for name, kind in classes.items():
        theirs = tensors(source / name)
        assert_identical(tensors(tmp_path / "out" / name), theirs)
        kind.from_pretrained(tmp_path / "out" / name)
    for name in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        before, after = (
            json.loads((root / name).read_text()) for root in (source, tmp_path / "out")
        )
        assert before == after
    port(str(tmp_path / "out"), tmp_path / "again")
    for name in ported_folder.PARTS:
        before, after = folder / name, tmp_path / "again" / name
        files = sorted(path.relative_to(before) for path in before.rglob("*") if path.is_file())
        assert files
        for path in files:
            assert (before / path).read_bytes() == (after / path).read_bytes(), path


def test_a_transformer_alone_comes_back(tmp_path):
    network = dataclasses.replace(NETWORK, guidance_embeds=False)
    model = random_flux.reference(network).half()
    model.save_pretrained(tmp_path / "transformer", max_shard_size="40KB")
    port(str(tmp_path / "transformer"), tmp_path / "ported", shift="1")
    export(str(tmp_path / "ported"), tmp_path / "out")
    assert_identical(tensors(tmp_path / "out/transformer"), dict(model.state_dict()))
    card = (tmp_path / "out/README.md").read_text()
    assert 'FluxPipeline.from_pretrained("FLUX", transformer=None' in card


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """T2I-Distill's file of a MeanFlow student."""
    path = tmp_path_factory.mktemp("student") / "meanflow.pt"
    state = random_flux.reference(NETWORK).state_dict()
    torch.manual_seed(1)
    width = NETWORK.hidden_size
    for number, inputs in ((1, 256), (2, width)):
        state[f"timestep_embedder2.linear_{number}.weight"] = torch.randn(width, inputs) / 16
        state[f"timestep_embedder2.linear_{number}.bias"] = torch.randn(width)
    torch.save({"module": state}, path)
    return path


def test_t2i_distills_file_comes_back(student, folder, tmp_path):
    port(str(student), tmp_path / "ported", base=str(folder))
    export(str(tmp_path / "ported"), tmp_path / "out", layout="t2i_distill")
    back = torch.load(tmp_path / "out/model.pt", weights_only=True)["module"]
    assert_identical(back, torch.load(student)["module"])

    port(str(tmp_path / "out/model.pt"), tmp_path / "again", base=str(folder))
    for name in ("time_scale", "guidance_factor"):
        assert config.load(tmp_path / "again").model[name] == 1.0


def test_the_cards_program_draws_where_parts_are_of_several_types(
    student, folder, tmp_path, monkeypatch
):
    """A float32 student beside bfloat16 text encoders."""
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    port(str(student), tmp_path / "ported", base=str(folder))
    export(str(tmp_path / "ported"), tmp_path / "out")
    assert run_program(tmp_path / "out")["pictures"][0].size == (64, 64)


def test_what_cannot_be_refitted_is_refused(tmp_path):
    source = save_run(tmp_path / "teacher", RUNS["flow_matching"])
    with pytest.raises(ValueError, match="1 t cannot be that of 1000 t.*model.time_scale=1"):
        export(str(source), tmp_path / "out", layout="t2i_distill")
    assert not (tmp_path / "out").exists()


def test_one_safetensors_file_comes_back(student, folder, tmp_path):
    port(str(student), tmp_path / "ported", base=str(folder))
    export(str(tmp_path / "ported"), tmp_path / "out", layout="safetensors")
    path = tmp_path / "out/model.safetensors"
    assert_identical(load_torch_file(path), torch.load(student)["module"])
    port(str(path), tmp_path / "again", base=str(folder))
    assert config.load(tmp_path / "again").model.time_scale == 1.0


def command(*arguments):
    """The command's error, if any; in a process of its own, whose flags are the command's."""
    ran = subprocess.run(
        [sys.executable, "-m", "jax_distill.export", *arguments], capture_output=True, text=True
    )
    return ran.stderr if ran.returncode else None


def test_the_command_has_a_format_a_type_and_a_time_scale(run, tmp_path):
    source = f"--checkpoint={run}"
    assert not command(
        source,
        f"--output={tmp_path / 'out'}",
        "--format=safetensors",
        "--dtype=bfloat16",
        "--time_scale=1000",
    )
    state = load_torch_file(tmp_path / "out/model.safetensors")
    assert state["x_embedder.weight"].dtype == torch.bfloat16
    assert state["time_text_embed.timestep_embedder.linear_1.weight"].dtype == torch.float32
    assert "the network embeds 1000 t" in (tmp_path / "out/README.md").read_text()
    stop = command(source, f"--output={tmp_path / 'none'}", "--time_scale=2")
    assert "what reads --format=diffusers embeds 1000 t, not 2 t" in stop
    assert not (tmp_path / "none").exists()


def test_bad_sources_make_nothing(run, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is no workdir of a run"):
        export(str(tmp_path / "none"), tmp_path / "out")
    with pytest.raises(ValueError, match="exists; remove it or choose another"):
        export(str(run), tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ValueError, match="out': no space left; make room"):
            export(str(run), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/checkpoints/1/progress/metadata"
    saved = json.loads(path.read_text())
    saved["checksums"]["student.ema"] += 1
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="1' is damaged: its checksums do not fit"):
        export(str(tmp_path / "run"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class OldState(NamedTuple):
    """The state of a version without players."""

    ema: dict


def test_a_checkpoint_of_the_old_layout_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with checkpoint.Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        checkpoints.save(1, OldState({"network": {"bias": np.zeros(2)}}), {})
    with pytest.raises(
        checkpoint.OldLayout, match="in another layout; go on with that version, or"
    ):
        export(str(tmp_path / "run"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_written_and_read_without_torch_is_the_same(student, tmp_path):
    torch_files.write_file(tmp_path / "x.pt", torch_files.read_file(student))
    back = torch_files.read_file(tmp_path / "x.pt")
    for name, tensor in torch_files.read_file(student).items():
        np.testing.assert_array_equal(back[name].read(), tensor.read())
