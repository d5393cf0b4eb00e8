"""Files of weights, ported folders and cards that deserve what is said of them."""

import dataclasses
import json
import shutil
import zipfile

import numpy as np
import random_files
import random_pipeline
import test_hostile_cards
from safetensors.numpy import load_file, save_file
from test_torch_files import archive, state, stored

from jax_distill.interop import orbax_tree, ported_folder
from jax_distill.interop.readers import sources
from jax_distill.runs.porting import port


def ask_all(root, ask):
    """Asks for all of them.

    Args:
      root: an empty folder.
      ask: (function, arguments) is called for each, and keeps what the function raises.
    """
    source, good = root / "flux", root / "good"
    random_pipeline.save_random(source)
    port(source, good, text_length=16)

    def edited(folder, file, change, read):
        copy = shutil.copytree(folder, root / "copy")
        path = copy / file
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        ask(read, copy)
        shutil.rmtree(copy)

    def source_with(file, **changes):
        edited(source, file, lambda values: values.update(changes), lambda x: port(x, root / "out"))

    source_with("transformer/config.json", _class_name="SD3Transformer2DModel")
    source_with("transformer/config.json", num_layers=10**8)
    source_with("text_encoder_2/config.json", num_layers="2")
    source_with("vae/config.json", quantization_config={"quant_method": "bitsandbytes"})
    source_with("scheduler/scheduler_config.json", shift="3")
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    source_with(index, weight_map={"x": "../x.safetensors"})

    def damaged(change):
        copy = shutil.copytree(source, root / "copy")
        change(copy)
        ask(port, copy, root / "out")
        shutil.rmtree(copy)

    def weights(folder, change):
        path = folder / "text_encoder/model.safetensors"
        tensors = load_file(path)
        change(tensors, min(tensors))
        save_file(tensors, path)

    def linked(folder):
        path = folder / "tokenizer/vocab.json"
        path.unlink(missing_ok=True)
        path.symlink_to(__file__)

    cut = "text_encoder/model.safetensors"
    damaged(lambda folder: (folder / cut).write_bytes((folder / cut).read_bytes()[:-9]))
    damaged(lambda folder: weights(folder, random_files.pop))
    damaged(lambda folder: weights(folder, random_files.infinite))
    damaged(linked)

    def of_file(name, make):
        make(root / name)
        ask(sources.read, root / name)

    of_file("a.pt", lambda path: archive(path, b"cos\nsystem\n(Vx\ntR."))
    of_file("b.pt", lambda path: archive(path, b"}."))

    def compressed(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", b"}.")

    def twice(path):
        archive(path, state(stored()), bytes(8))
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("more/data/0", bytes(8))

    of_file("c.pt", compressed)
    of_file("d.pt", twice)
    of_file("e.pt", lambda path: archive(path, state(stored(), shape=b"(I9\nt"), bytes(8)))

    shapes = {name: np.zeros(2, np.float32) for name in ("a.lora_A.weight", "b.weight")}
    of_file("a.safetensors", lambda path: save_file(shapes, path))
    for number, name in enumerate(("x.absmax", "x.qweight", "controlnet_blocks.0.weight")):
        save = lambda path, name=name: save_file({name: np.zeros(2, np.float32)}, path)  # noqa: E731
        of_file(f"b{number}.safetensors", save)
    of_file("c.safetensors", lambda path: path.write_bytes(b"\xff" * 8))
    of_file("d.safetensors", lambda path: path.write_bytes(b"GGUF" + bytes(20)))
    of_file("e.weights", lambda path: path.write_bytes(bytes(20)))
    network = random_files.arrays(random_files.state_dict())
    folder = root / "transformer"

    def blocks(path):
        save_file(network | {"transformer_blocks.99999999.x": np.zeros(1, np.float32)}, path)

    blocks(root / "f.safetensors")
    base = {"axes_dims_rope": (4, 6, 6)}
    ask(sources.read, root / "f.safetensors", base)
    whole = network | {"proj_out.bias": np.zeros(16, np.int32)}
    save_file(whole, root / "g.safetensors")
    read = sources.read(root / "g.safetensors", base)
    ask(read.parts["network"].check)

    ask(ported_folder.describe, folder)
    edited(good, "ported.json", lambda x: x.update(text_length=10**9), ported_folder.describe)
    edited(
        good,
        "ported.json",
        lambda x: x["parts"]["t5"].update(num_layers=10**8),
        ported_folder.describe,
    )
    wider = random_pipeline.T5.to_dict() | {"d_ff": 48}
    ask(ported_folder.open_part, good, "t5", wider)
    (min(good.glob("clip/*/.zarray"))).write_text("{")
    ask(orbax_tree.open_tree, good / "clip")
    ask(port, root / ".x.1.partial", root / "out")
    ask(dataclasses.replace, test_hostile_cards.BENIGN, guidance="1); import os")
