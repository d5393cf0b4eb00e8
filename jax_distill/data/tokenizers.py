"""Captions to the token ids of FLUX's text encoders.

The counterpart of `captions.CaptionEncoder` for real text encoders: it turns words into arrays on
the host and knows no network. The tokenizers are transformers', which does not need PyTorch for
them.

Source: diffusers' `FluxPipeline.encode_prompt`, whose ids these are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

CLIP_FOLDER, T5_FOLDER = "tokenizer", "tokenizer_2"
_SHOWN = 60  # characters of a caption in a message
_UNLIMITED = 10**6  # transformers writes a larger number for a tokenizer without a limit


class TokenIds(NamedTuple):
    """Padded token ids of B captions.

    Attributes:
      clip: (B, 77) int32.
      t5: (B, L) int32.
    """

    clip: np.ndarray
    t5: np.ndarray


class FluxTokenizer:
    """The two tokenizers of a FLUX folder."""

    def __init__(self, clip: Any, t5: Any, t5_length: int):
        """Takes tokenizers of transformers; `load` reads them from a folder.

        Args:
          clip: CLIP's, whose `model_max_length` is the length of its ids.
          t5: T5's.
          t5_length: L, 256 for FLUX.1-lite and 512 for FLUX.1-dev.

        Raises:
          ValueError: CLIP's tokenizer has no length, or `t5_length` has no room for a word.
        """
        if clip.model_max_length > _UNLIMITED:
            raise ValueError(
                "CLIP tokenizer: it has no model_max_length; set it to 77 in tokenizer_config.json"
            )
        if t5_length < 2:
            raise ValueError(f"t5_length: {t5_length} is not at least 2, a word and the end token")
        self._clip, self._t5 = clip, t5
        self.clip_length, self.t5_length = clip.model_max_length, t5_length

    @classmethod
    def load(cls, folder: Path, t5_length: int = 256) -> "FluxTokenizer":
        """Reads `tokenizer/` and `tokenizer_2/` of a diffusers folder; asks no network.

        Args:
          folder: of the pipeline.
          t5_length: as in the constructor.

        Raises:
          ValueError: a tokenizer's folder is missing or cannot be read.
          ImportError: transformers is not installed.
        """
        try:
            from transformers import CLIPTokenizer, T5TokenizerFast
        except ImportError as error:
            raise ImportError(
                "FLUX's tokenizers need transformers; pip install 'jax-distill[flux]'"
            ) from error

        def read(kind: Any, name: str) -> Any:
            path = Path(folder) / name
            if not path.is_dir():
                raise ValueError(f"'{path}' is missing; give a diffusers folder of FLUX")
            # transformers makes up a tokenizer of an empty vocabulary where it finds no files.
            files = dict(kind.vocab_files_names)
            files.pop("tokenizer_file", None)
            missing = [file for file in files.values() if not (path / file).is_file()]
            if missing and not (path / "tokenizer.json").is_file():
                raise ValueError(f"'{path}' has neither tokenizer.json nor {missing[0]}")
            try:
                return kind.from_pretrained(path, local_files_only=True)
            except Exception as error:  # tokenizers has no class of its own for bad files
                raise ValueError(f"'{path}' holds no {kind.__name__}: {error}") from error

        return cls(read(CLIPTokenizer, CLIP_FOLDER), read(T5TokenizerFast, T5_FOLDER), t5_length)

    def encode(self, captions: Sequence[str], *, strict: bool = False) -> TokenIds:
        """Token ids as diffusers' `FluxPipeline` has them: truncated, then padded to the length.

        Args:
          captions: B of them.
          strict: whether a caption that does not fit is an error; otherwise its end is cut off, and
            a log line says so. FLUX reads the words from T5's ids, and takes from CLIP's a summary.

        Raises:
          ValueError: `strict`, and a caption has too many tokens.
        """
        captions = list(captions)
        if not captions:
            raise ValueError("captions: none given; pass one or more")
        return TokenIds(
            self._encode("CLIP", self._clip, captions, self.clip_length, strict),
            self._encode("T5", self._t5, captions, self.t5_length, strict),
        )

    def _encode(
        self, name: str, tokenizer: Any, captions: list[str], limit: int, strict: bool
    ) -> np.ndarray:
        """Ids (B, limit) of one tokenizer; start and end tokens count."""
        whole = tokenizer(captions, truncation=False, verbose=False)["input_ids"]
        for caption, ids in zip(captions, whole):
            if len(ids) <= limit:
                continue
            shown = caption if len(caption) <= _SHOWN else caption[:_SHOWN] + ".."
            found = f"caption {shown!r}: its {len(ids)} {name} tokens are more than {limit}"
            if strict:
                fix = "shorten it" + (" or raise t5_length" if name == "T5" else "")
                raise ValueError(f"{found}; {fix}")
            logging.warning("%s; the rest is cut off", found)
        padded = tokenizer(captions, padding="max_length", max_length=limit, truncation=True)
        return np.asarray(padded["input_ids"], np.int32)
