"""Token ids are those of diffusers' pipeline; captions that do not fit are named or cut."""

import logging
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from random_text import write_tokenizers
from transformers import CLIPTokenizer, T5TokenizerFast

from jax_distill.worlds.flux import tokenizers
from jax_distill.worlds.flux.tokenizers import FluxTokenizer

WORDS = ("a red circle above a blue square", "", "two Crosses, 3 discs!", "unknown Ω words")
LONG = "a red circle and " * 30
LENGTHS = (77, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    write_tokenizers(path, LENGTHS[0])
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return FluxTokenizer.load(folder, LENGTHS[1])


def of_diffusers(folder, captions):
    """The ids that FluxPipeline gives its text encoders."""
    seen = []

    class Spy(torch.nn.Module):
        dtype = torch.float32

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids, output_hidden_states):
            seen.append(ids.numpy())
            features = torch.zeros(*ids.shape, 1)
            pooled = types.SimpleNamespace(pooler_output=features[:, 0])
            return pooled if len(seen) == 1 else (features,)

    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    pipeline = FluxPipeline(None, None, Spy(), clip, Spy(), t5, None)
    pipeline.encode_prompt(
        list(captions), None, device=torch.device("cpu"), max_sequence_length=LENGTHS[1]
    )
    return seen


def test_ids_are_those_of_diffusers(folder, tokenizer):
    captions = [*WORDS, LONG]
    theirs = of_diffusers(folder, captions)
    ours = tokenizer.encode(captions)
    for ids, expected, length in zip(ours, theirs, LENGTHS):
        assert ids.shape == (len(captions), length) and ids.dtype == np.int32
        np.testing.assert_array_equal(ids, expected)
    # They tell captions apart, and do not depend on what they are encoded with.
    assert len(np.unique(ours.clip, axis=0)) == len(np.unique(ours.t5, axis=0)) == len(captions)
    for row, caption in enumerate(captions):
        alone = tokenizer.encode([caption])
        np.testing.assert_array_equal(alone.clip[0], ours.clip[row])
        np.testing.assert_array_equal(alone.t5[0], ours.t5[row])


def test_a_caption_that_fits_exactly_is_whole(tokenizer):
    """Tokens of "a": one each, and CLIP's start and end, T5's end."""
    for length, name in ((75, "CLIP"), (23, "T5")):
        fits, too_long = ("a " * n for n in (length, length + 1))
        only = FluxTokenizer(tokenizer._clip, tokenizer._t5, 24 if name == "T5" else 512)
        only.encode([fits], strict=True)
        limit = length + 2 if name == "CLIP" else length + 1
        with pytest.raises(
            ValueError, match=f"its {limit + 1} {name} tokens are more than {limit};"
        ):
            only.encode(["a", too_long], strict=True)


def test_rows_of_a_caption_end_with_its_end_token(tokenizer):
    captions = [*WORDS, "<pad> red", LONG]
    ids, rows = tokenizer.encode(captions).t5, tokenizer.rows(captions)
    assert rows[1] == 1 and rows[-1] == LENGTHS[1]
    for row, own in zip(ids, rows):
        assert row[own - 1] == 1 and not row[own:].any()  # </s>, then <pad>


def test_a_caption_that_does_not_fit_is_named(tokenizer, caplog, monkeypatch):
    message = r"^caption '(a red circle and ){3}a red cir\w*\.\.': its \d+ CLIP .* 77; shorten it$"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode([LONG], strict=True)
    with pytest.raises(ValueError, match="24; shorten it or raise t5_length$"):
        tokenizer.encode(["a " * 30], strict=True)
    monkeypatch.setattr(tokenizers, "_WARNED", 2**31)  # others may have told a hundred
    with caplog.at_level(logging.WARNING, logger="absl"):
        tokenizer.encode(WORDS)
        assert not caplog.records
        tokenizer.encode([LONG])
    assert [record.message.split()[-1] for record in caplog.records] == ["off", "off"]
    assert "a red circle" in caplog.records[0].message and "77" in caplog.records[0].message


def test_a_folder_without_tokenizers_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="tokenizer' is missing; give a diffusers folder"):
        FluxTokenizer.load(tmp_path)
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    (tmp_path / "tokenizer_2").mkdir()
    with pytest.raises(
        ValueError, match=r"tokenizer_2' has neither tokenizer\.json nor spiece\.mod"
    ):
        FluxTokenizer.load(tmp_path)
    (tmp_path / "tokenizer_2" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer_2' does not hold a T5Tokenizer"):
        FluxTokenizer.load(tmp_path)


def test_lengths_that_cannot_be_are_refused(tokenizer):
    with pytest.raises(ValueError, match="t5_length: 1 is not at least 2"):
        FluxTokenizer(tokenizer._clip, tokenizer._t5, 1)
    with pytest.raises(ValueError, match="CLIP tokenizer: it has no model_max_length"):
        FluxTokenizer(types.SimpleNamespace(model_max_length=int(1e30)), tokenizer._t5, 256)
    with pytest.raises(ValueError, match="captions: none given"):
        tokenizer.encode([])


def test_no_pytorch_is_loaded(folder):
    code = (
        "import sys; from jax_distill.worlds.flux.tokenizers import FluxTokenizer;"
        f"FluxTokenizer.load({str(folder)!r}).encode(['a red circle']);"
        "assert 'torch' not in sys.modules and 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
