"""Tokenizes captions for FLUX's text encoders.

The tokenizers are transformers', which does not need PyTorch for them.

Source: diffusers' `FluxPipeline.encode_prompt`, which makes the same ids.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from jax_distill.models.sizes import LONGEST
from jax_distill.storage import buckets, disks, paths
from jax_distill.storage.files import check_regular, unread
from jax_distill.storage.quoting import one_line, shown

CLIP_FOLDER, T5_FOLDER = "tokenizer", "tokenizer_2"
_FIX = "download the tokenizer's folder again"
_SHOWN = 60  # characters of a caption in a message
_WARNED = 100  # captions whose end is cut off, in a log
_ONE_AT_A_TIME = threading.Lock()  # a call changes the settings of transformers' tokenizers
_BYTES = 64 << 20  # of a file; T5's largest has 2 MB


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
        length = clip.model_max_length
        if not isinstance(length, int) or not 2 <= length <= LONGEST:
            raise ValueError(
                f"CLIP tokenizer: it has no model_max_length of captions ({shown(length)}); set it"
                " to 77 in tokenizer_config.json"
            )
        if t5_length < 2:
            raise ValueError(f"t5_length: {t5_length} is not at least 2, a word and the end token")
        if t5_length > LONGEST:
            raise ValueError(f"t5_length: {t5_length} is more than {LONGEST}, FLUX's have 512")
        self._clip, self._t5 = clip, t5
        self.clip_length, self.t5_length = clip.model_max_length, t5_length

    @classmethod
    def load(cls, folder: Path, t5_length: int = 256) -> "FluxTokenizer":
        """Reads `tokenizer/` and `tokenizer_2/` of a diffusers folder, offline.

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
            path = paths.path(folder) / name
            if not path.is_dir():
                raise ValueError(f"'{path}' is missing; give a diffusers folder of FLUX")
            with buckets.on_disk(path) as copy:
                return read_folder(kind, copy)

        def read_folder(kind: Any, path: Path) -> Any:
            # transformers makes up a tokenizer of an empty vocabulary where it finds no files.
            files = dict(kind.vocab_files_names)
            files.pop("tokenizer_file", None)
            missing = [file for file in files.values() if not (path / file).is_file()]
            if missing and not (path / "tokenizer.json").is_file():
                raise ValueError(f"'{path}' has neither tokenizer.json nor {missing[0]}")
            for file in path.iterdir():
                if file.exists() and not file.is_dir():
                    check_regular(file)
                    if file.stat().st_size > _BYTES:
                        raise ValueError(f"'{file}' is longer than any tokenizer's file")
            # The class is given: nothing in the folder's `auto_map` is imported, and no chat
            # template is rendered.
            with _sentence(f"'{path}'", f"does not hold a {kind.__name__}"):
                disks.read_all(path)  # transformers would say of a disk's errors that files lack
                return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)

        return cls(read(CLIPTokenizer, CLIP_FOLDER), read(T5TokenizerFast, T5_FOLDER), t5_length)

    def encode(self, captions: Sequence[str], *, strict: bool = False) -> TokenIds:
        """Tokenizes as diffusers' `FluxPipeline` does: truncates, then pads to the length.

        Args:
          captions: B of them.
          strict: whether a caption that is too long is an error; otherwise its end is cut off, and
            the log says so of the first hundred. FLUX reads the words from T5's ids, and a summary
            from CLIP's.

        Raises:
          ValueError: `strict`, and a caption has too many tokens.
        """
        captions = list(captions)
        if not captions:
            raise ValueError("captions: none given; pass one or more")
        with _ONE_AT_A_TIME:
            return TokenIds(
                self._encode("CLIP", self._clip, captions, self.clip_length, strict),
                self._encode("T5", self._t5, captions, self.t5_length, strict),
            )

    def rows(self, captions: Sequence[str]) -> list[int]:
        """The number of T5's tokens of each caption, with the end token and without padding."""
        with _sentence("the T5 tokenizer", "cannot encode captions"):
            found = self._t5(list(captions), truncation=True, max_length=self.t5_length)
        return [len(ids) for ids in found["input_ids"]]

    def _encode(
        self, name: str, tokenizer: Any, captions: list[str], limit: int, strict: bool
    ) -> np.ndarray:
        """The ids (B, limit) of one tokenizer, start and end tokens included."""
        with _sentence(f"the {name} tokenizer", "cannot encode captions"):
            whole = tokenizer(captions, truncation=False, verbose=False)["input_ids"]
        for caption, ids in zip(captions, whole):
            if len(ids) <= limit:
                continue
            shown = caption if len(caption) <= _SHOWN else caption[:_SHOWN] + ".."
            found = f"caption {shown!r}: its {len(ids)} {name} tokens are more than {limit}"
            if strict:
                fix = "shorten it" + (" or raise t5_length" if name == "T5" else "")
                raise ValueError(f"{found}; {fix}")
            logging.log_first_n(logging.WARNING, "%s; the rest is cut off", _WARNED, found)
        with _sentence(f"the {name} tokenizer", "cannot encode captions"):
            padded = tokenizer(captions, padding="max_length", max_length=limit, truncation=True)
            ids = np.asarray(padded["input_ids"], np.int32)
        if ids.shape != (len(captions), limit):
            raise ValueError(
                f"the {name} tokenizer makes ids of shape {ids.shape} of {len(captions)} captions"
                f" and {limit} tokens; {_FIX}"
            )
        return ids


@contextlib.contextmanager
def _sentence(where: str, what: str) -> Iterator[None]:
    """Turns any error that a tokenizer's files cause in transformers into one sentence.

    Raises:
      ValueError: with `where`, then `what` unless the files cannot be read for now.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust are no exceptions of Python's
        reason = one_line(str(error).partition("\n")[0], 200) or type(error).__name__
        raise unread(where, error, disks.raised) or ValueError(
            f"{where} {what} ({reason}); {_FIX}"
        ) from None
