"""Prepared data sets of tensorflow-datasets, in ArrayRecord's format, without TensorFlow."""

import itertools
import re
from typing import Any

from jax_distill.data.pictures import Encoded
from jax_distill.data.sources.source import USUAL, Captioned, Columns, check_caption, check_index
from jax_distill.storage import disks, paths
from jax_distill.storage.files import FileError, unread

PREFIX = "tfds:"
IMAGE_FEATURES = ("image",)
_NAME = re.compile(
    rf"{PREFIX}(?P<name>(?:\w+://?)?[^:\[\]]+(?::\d+\.\d+\.\d+)?)(?::(?P<split>[^/]+))?",
    re.DOTALL,
)
_MAKE = "make it with tfds build NAME --file_format=array_record"


class TensorflowDataset:
    """Captioned pictures of a data set that tfds has prepared.

    Pictures are kept encoded: nothing of TensorFlow is imported. A key is the split and the index
    in the whole of it, whichever part is read.

    Args:
      address: tfds:NAME[:SPLIT], where NAME is tfds's, with `/config` and `:version` if need be,
        in the folder that TFDS_DATA_DIR names; or the folder of one version, which may be in a
        bucket. SPLIT is tfds's, such
        as "train" or "train[:10%]".
      columns: names of features; by default, "image", and "text" or "caption".

    Raises:
      FileError: there is no such data set, split or feature, or its format has no random access.
    """

    has_pictures = True

    def __init__(self, address: str, columns: Columns = USUAL):
        self.name = f"'{address}'"
        named = _NAME.fullmatch(address)
        if named is None:
            raise FileError(f"{self.name} is no address; write tfds:NAME or tfds:NAME:SPLIT")
        name, split = named["name"], named["split"] or "train"
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise FileError(
                f"{self.name} is read by tensorflow-datasets, which is missing; pip install"
                " 'jax-distill[data]'"
            ) from None
        try:
            folder = paths.path(name)
            builder = (
                tfds.builder_from_directory(name)
                if paths.is_bucket(folder) or (folder / "dataset_info.json").is_file()
                else tfds.core.read_only_builder.builder_from_files(name)
            )
        except paths.NoBucket as error:
            raise FileError(str(error)) from None
        except Exception as error:  # tfds raises many kinds
            raise self._refused("is not prepared here", error, _MAKE) from None
        features = builder.info.features
        image = columns.image_among(list(features), self.name, IMAGE_FEATURES)
        caption = columns.caption_among(list(features), self.name)
        self._check(features[image], image, tfds.features.Image, "pictures", "image_column")
        self._check(features[caption], caption, tfds.features.Text, "text", "caption_column")
        self._names = image, caption
        # The two alone are parsed: decoders of other features may need TensorFlow.
        self._features = tfds.features.FeaturesDict({n: features[n] for n in self._names})
        self._decoders = {image: tfds.decode.SkipDecoding()}
        try:
            self._records = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
            splits = builder.info.splits
            parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
            whole = [range(splits[part.splitname].num_examples) for part in parts]
            self._parts = [
                (part.splitname, rows[part.from_ : part.to]) for part, rows in zip(parts, whole)
            ]
        except NotImplementedError as error:
            raise self._refused("has no random access", error, _MAKE) from None
        except Exception as error:
            fix = f"it has the splits {', '.join(builder.info.splits)}"
            raise self._refused(f"has no split {split!r}", error, fix) from None
        if not len(self):
            raise FileError(f"{self.name} has no examples; name another split")
        if len(self) != sum(len(rows) for _, rows in self._parts):
            raise FileError(
                f"{self.name} has {len(self)} examples where its description has others; {_MAKE}"
            )
        for first, second in itertools.combinations(self._parts, 2):
            begin, end = max(first[1].start, second[1].start), min(first[1].stop, second[1].stop)
            if first[0] == second[0] and begin < end:
                raise FileError(
                    f"{self.name} reads examples of {first[0]!r} twice; name parts that do not"
                    " overlap"
                )

    def _refused(self, what: str, error: Exception, fix: str) -> FileError:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        return unread(self.name, error, _passing) or FileError(
            f"{self.name} {what} ({reason}); {fix}"
        )

    def _check(self, feature: Any, name: str, kind: type, what: str, flag: str) -> None:
        floats = kind.__name__ == "Image" and feature.np_dtype.kind == "f"
        if not isinstance(feature, kind) or floats:
            raise FileError(
                f"{self.name}: feature {name!r} is {feature!r:.200}, which is no {what}; name"
                f" another with --{flag}".replace("\n", " ")
            )

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        check_index(index, len(self))
        for split, rows in self._parts:
            if index < len(rows):
                return f"{split}:{rows[index]}"
            index -= len(rows)
        raise IndexError(index)

    def __getitem__(self, index: int) -> Captioned:
        key = self.key(index)
        where = f"{self.name}, example {key}"
        try:
            example = self._features.deserialize_example_np(
                self._records[index], decoders=self._decoders
            )
            picture, caption = (example[name] for name in self._names)
            caption = caption.decode()
        except Exception as error:  # of damaged records, many kinds
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise unread(where, error) or FileError(
                f"{where} is damaged ({reason}); restore or prepare the data set again"
            ) from None
        check_caption(caption, where)
        return Captioned(key, caption, Encoded(picture, where))


def _passing(error: BaseException) -> bool:
    """Whether an error of opening says nothing about the data set; tfds quotes names in its own."""
    return disks.raised(error) or any(map(disks.of_network, disks.chain(error)))
