"""Files of weights, diffusers folders and tokenizers, all of them strangers'."""

import ast
import json
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np

from fuzzing import package
from fuzzing.kind import OUTSIDE, Kind, decoded, same
from fuzzing.mutations import (
    CANARY,
    PAYLOADS,
    SECRET,
    damage_bytes,
    damage_file,
    damage_json,
    damage_lines,
    damage_safetensors,
    damage_torch,
)

PORTED = 0.2  # of the folders, which are ported, not only read
EXPORTED = 0.2  # of those that were ported, whose card is looked at
OUTPUT = "output"


def _outside(root: Path) -> None:
    (root / OUTSIDE).mkdir()
    (root / OUTSIDE / "secret.txt").write_text(SECRET)


def _numpy(tensors: dict) -> dict[str, np.ndarray]:
    """PyTorch's tensors as arrays of the same bits."""
    import torch

    arrays = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            arrays[name] = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            arrays[name] = tensor.contiguous().numpy()
    return arrays


# Files


def _make_weights(root: Path) -> None:
    import random_files
    import torch
    from safetensors.torch import save_file

    _outside(root)
    torch.manual_seed(0)
    pair = random_files.state_dict(interval=True, dtype=torch.bfloat16)
    plain = random_files.state_dict(dtype=torch.bfloat16)
    shapes = random_files.bfl_shapes()
    bfl = {k: torch.from_numpy(x) for k, x in random_files.random_arrays(shapes).items()}
    bfl = {name: tensor.to(torch.bfloat16) for name, tensor in bfl.items()}
    told = {"format": "pt", "time_scale": "1.0", "guidance_factor": "1.0", "objective": "scm"}
    files = {
        "diffusers.safetensors": (plain, told),
        "pair.safetensors": (pair, None),
        "bfl.safetensors": (bfl, {"format": "pt"}),
        "wrapped.pt": ({"module": pair | random_files.loss_head()}, None),
        "plain.pt": (plain, None),
        "bfl.pt": (bfl, None),
        "nested.bin": ({name: torch.nn.Parameter(x) for name, x in plain.items()}, None),
    }
    for name, (state, metadata) in files.items():
        folder = root / name.replace(".", "_")
        folder.mkdir()
        if name.endswith(".safetensors"):
            save_file(state, folder / name, metadata=metadata)
        else:
            torch.save(state, folder / name)


def _file(folder: Path) -> Path:
    known = (".safetensors", ".pt", ".bin")
    found = [path for path in sorted(folder.iterdir()) if path.suffix in known]
    return found[0] if found else folder / "missing.safetensors"


def _damage_weights(rng: Random, folder: Path) -> None:
    path = _file(folder)
    safe = path.suffix == ".safetensors"
    damage_file(rng, path, damage_safetensors if safe else damage_torch, 0.03)


def _read_weights(rng: Random, folder: Path) -> Any:
    return package.read_weights(_file(folder))


def reference(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A file's arrays and metadata as its own library reads them."""
    import torch
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        state = torch.load(path, weights_only=True, map_location="cpu")
        state = state["module"] if "module" in state else state
        return _numpy({name: tensor.detach() for name, tensor in state.items()}), {}
    with safe_open(path, "pt") as file:
        return _numpy({name: file.get_tensor(name) for name in file.keys()}), file.metadata() or {}


def _differ(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> str:
    for name, array in found.items():
        if name not in wanted:
            return "a tensor is there that the file does not have"
        other = wanted[name]
        if array.dtype != other.dtype or array.shape != other.shape:
            return "a tensor is of another shape or type"
        if array.tobytes() != other.tobytes():
            return "a tensor has other numbers"
    return ""


def _differs_weights(value: Any, folder: Path, base: Path) -> str:
    found = value.parts["network"]
    path = _file(folder)
    try:
        arrays, metadata = reference(path)
        wanted = package.under_diffusers_names(arrays)
    except Exception as error:  # the library refuses it: what was read must be the base's
        arrays, metadata = reference(_file(base))
        wrong = _differ(found, package.under_diffusers_names(arrays))
        return wrong and f"{wrong}, and its library refuses it: {type(error).__name__}"
    for name, told in value.told.items():
        said = metadata.get(name)
        if said is None or (told != float(said) if isinstance(told, float) else told != said):
            return f"{name} is read as something else"
    return _differ(found, wanted)


# Diffusers folders


def _make_folders(root: Path) -> None:
    import random_files
    import random_pipeline

    _outside(root)
    scratch = root.parent / "scratch"
    pipe = random_pipeline.save_random(scratch)
    shutil.rmtree(scratch)
    pipe.save_pretrained(root / "pipeline", max_shard_size="100KB")
    random_files.save_transformer(root / "transformer", random_files.state_dict(), guidance="cfg")
    shutil.copytree(root / "pipeline", root / "source" / "pipeline")
    package.port(root / "source" / "pipeline", root / "ported")
    shutil.rmtree(root / "source")
    shard = min((root / "pipeline" / "vae").glob("*.safetensors"))
    shutil.copy(shard, root / OUTSIDE / "diffusion_pytorch_model.safetensors")


def _damage_folder(rng: Random, folder: Path) -> None:
    ported = (folder / "ported.json").exists()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    tables = [path for path in files if path.suffix == ".json" and "tokenizer" not in str(path)]
    if ported:  # its arrays are this program's own
        tables = [folder / "ported.json", folder / "config.json"]
        files = tables + [path for path in files if "tokenizer" in str(path)]
    if rng.random() < 0.2 and not ported:
        path = rng.choice([path for path in files if path.suffix == ".safetensors"])
        damage_file(rng, path, damage_safetensors)
        return
    if rng.random() < 0.1:
        path = rng.choice(files)
        damage_file(rng, path, damage_bytes, 0.5)
        return
    path = rng.choice(tables)
    fitting = ("FlowMatchEulerDiscreteScheduler", "FluxTransformer2DModel", "UNet", 10**8, 16, 2, 1)
    fitting += ([4, 6, 6], [16, 56, 56], "gelu", "relu", "quick_gelu", 0.18215, 256, 4096, 512)
    fitting += (f"../{OUTSIDE}/diffusion_pytorch_model.safetensors", "../vae/config.json", "scm")
    fitting += ("/etc/passwd", "diffusion_pytorch_model.safetensors", "CLIPTextModel", 32, 24)
    fitting += (
        "num_layers",
        "time_scale",
        "guidance_factor",
        "objective",
        "guidance",
        "patch_size",
    )
    fitting += ("quantization_config", "use_dynamic_shifting", "shift", "base_shift", "assumed")
    if "scheduler" in str(path) and rng.random() < 0.3:
        values = json.loads(path.read_bytes())
        values[rng.choice(("_class_name", "shift", "time_shift_type"))] = rng.choice(PAYLOADS)
        path.write_text(json.dumps(values))
        return
    damage_file(rng, path, lambda rng, content: damage_json(rng, content, fitting))


def _read_folder(rng: Random, folder: Path) -> Any:
    """Reads a folder, and for a share of them what `port` and `export` make of it."""
    output = folder.parent / OUTPUT
    shutil.rmtree(output, ignore_errors=True)
    ported = (folder / "ported.json").exists()
    weights = None if ported else package.read_weights(folder)
    flags = {}
    if (folder / "config.json").exists():
        flags = {"shift": "dynamic"}
    elif rng.random() < 0.3:
        flags = {"objective": rng.choice(("scm", "flow_matching"))}
    source = folder
    if not ported and rng.random() < PORTED:
        source = output / "ported"
        package.port(folder, source, **flags)
    if ported or (source != folder and rng.random() < EXPORTED):
        layout = rng.choice(("diffusers", "safetensors"))
        package.export(source, output / "exported", layout=layout)
    return weights


def _names_of(program: str) -> set[str]:
    """The names that a program uses, which are not those inside its texts."""
    return {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Name | ast.Attribute)
    }


def _wrong_card(card: str) -> str:
    """Finds what a stranger has put into a model card."""
    from jax_distill.interop.cards import programs, snippets

    ours = "".join(Path(module.__file__).read_text() for module in (programs, snippets))
    known = set(re.findall(r"\w+", ours))
    blocks = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    if len(blocks) * 2 != len(re.findall("^```", card, re.MULTILINE)):
        return "the card has programs of a stranger"
    for block in blocks:
        try:
            strange = _names_of(block) - known
        except SyntaxError:
            return "the card's program is none"
        if strange or CANARY in re.sub(r"(['\"]).*?\1", "", block):
            return f"executed: the card's program has a stranger's {min(strange, default='words')}"
    return ""


def _differs_folder(value: Any, folder: Path, base: Path) -> str:
    output = folder.parent / OUTPUT
    for path in output.rglob("*"):
        if path.name != OUTPUT and path.is_symlink():
            return "a link was copied"
        if path.is_file() and path.stat().st_size < 10**6 and SECRET.encode() in path.read_bytes():
            return "a file of another folder was copied"
    card = output / "exported" / "README.md"
    if card.exists() and (wrong := _wrong_card(card.read_text())):
        return wrong
    if value is None:
        return ""
    description = output / "ported" / "ported.json"
    described = json.loads(description.read_text()) if description.exists() else None
    folders = {"network": "transformer", "autoencoder": "vae", "clip": "text_encoder"}
    folders |= {"t5": "text_encoder_2"}
    for name, found in value.parts.items():
        inner = folder / folders[name] if len(value.parts) > 1 else folder
        said = json.loads(decoded((inner / "config.json").read_bytes()))
        if not same(dict(said), {k: x for k, x in value.configs[name].items() if k in said}):
            return f"the config of {name} is read as something else"
        wanted = {}
        for path in sorted(inner.glob("*.safetensors")):
            try:
                wanted |= reference(path)[0]
            except Exception as error:
                return f"a file is read that its library refuses: {type(error).__name__}"
        if wrong := _differ(found, wanted):
            return f"{name}: {wrong}"
        if described and not same(
            {k: x for k, x in described["parts"][name].items() if k in said}, said
        ):
            return f"the config of {name} is written as something else"
    path = folder / "scheduler" / "scheduler_config.json"
    if described and path.exists() and described["scheduler"] is not None:
        if not same(json.loads(decoded(path.read_bytes())), described["scheduler"]):
            return "the scheduler is written as something else"
    return ""


# Tokenizers


def _make_tokenizers(root: Path) -> None:
    import random_text

    _outside(root)
    random_text.write_tokenizers(root / "plain")
    from transformers import CLIPTokenizer, T5TokenizerFast

    for folder, kind in (("tokenizer", CLIPTokenizer), ("tokenizer_2", T5TokenizerFast)):
        kind.from_pretrained(root / "plain" / folder).save_pretrained(root / "saved" / folder)
        for path in (root / "plain" / folder).iterdir():
            target = root / "saved" / folder / path.name
            if not target.exists():
                shutil.copy(path, target)


def _damage_tokenizer(rng: Random, folder: Path) -> None:
    path = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
    fitting = ("a", "red</w>", 0, 5, 77, 10**5, 10**6, 512, "<pad>", "<|endoftext|>", "BPE")
    fitting += ("Unigram", "WordPiece", "Metaspace", "model_max_length", "unk_token", "pad_token")
    fitting += ("auto_map", {"AutoTokenizer": ["x.T", None]}, "tokenizer_class", "added_tokens")
    fitting += ("Regex", {"Regex": "(a*)*b"}, "Replace", "chat_template", "extra_ids", -100)
    damage = damage_lines
    if path.suffix == ".json":
        damage = damage_json
    damage_file(rng, path, lambda rng, content: damage(rng, content, fitting))


def _differs_tokenizer(value: Any, folder: Path, base: Path) -> str:
    from transformers import CLIPTokenizer, T5TokenizerFast

    for kind, name, ids, length in (
        (CLIPTokenizer, "tokenizer", value.clip, value.clip.shape[1]),
        (T5TokenizerFast, "tokenizer_2", value.t5, package.T5_LENGTH),
    ):
        try:
            tokenizer = kind.from_pretrained(folder / name, local_files_only=True)
            said = tokenizer(
                list(package.CAPTIONS), padding="max_length", max_length=length, truncation=True
            )["input_ids"]
        except Exception as error:
            return f"read a tokenizer that its library refuses: {type(error).__name__}"
        if ids.dtype != np.int32 or not np.array_equal(ids, np.asarray(said)):
            return f"ids of {name} are others"
        if ids.min() < 0:
            return f"ids of {name} are negative"
    return ""


KINDS = {
    "weights": Kind(0.11, _make_weights, _damage_weights, _read_weights, _differs_weights),
    "tokenizers": Kind(
        0.03,
        _make_tokenizers,
        _damage_tokenizer,
        lambda rng, folder: package.tokenize(folder),
        _differs_tokenizer,
    ),
    "folders": Kind(0.03, _make_folders, _damage_folder, _read_folder, _differs_folder),
}
