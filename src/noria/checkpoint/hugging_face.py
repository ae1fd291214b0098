"""Reads a Hugging Face model directory: its JSON texts, tokenizer files, and which file holds which tensor.

A file name never leaves the directory: names come from the directory's own files, which are not trusted. Knows nothing
of model families or of the checkpoint that is made of it.
"""

import fnmatch
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from noria.checkpoint.checkpoint import TOKENIZER_FILES, parse_json
from noria.checkpoint.tensor_files import Tensor, list_tensors
from noria.errors import InputError
from noria.model import MORE_TEMPLATES

MAX_TEXT_NBYTES = 1 << 28  # of config.json, an index or a tokenizer file
MAX_TEMPLATES = 64
MAX_NAME_NBYTES = 255  # of a file name, on any file system
# In the order of preference: files of torch only where there is nothing else.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# Files of other formats, by the pattern of their names: what they are, and what to do.
FOREIGN = {
    "adapter_config.json": (
        "an adapter of peft",
        "give the directory of its model, and the adapter's with --lora: noria convert HF_DIR MODEL.h5 --lora ADAPTER_DIR",
    ),
    "*.gguf": ("GGUF, llama.cpp's format", "take the directory that it was made from"),
    "consolidated.*": (
        "weights in the format of their makers' own programs",
        "take the model in Hugging Face's format (model*.safetensors), or convert it by transformers first",
    ),
    "weights*.npz": ("MLX's format", "take the directory that it was made from"),
    "tf_model*.h5": ("TensorFlow's weights", "save them by transformers as safetensors first"),
    "flax_model*.msgpack": ("Flax's weights", "save them by transformers as safetensors first"),
    "*.onnx": ("ONNX", "take the directory that it was made from"),
}


def foreign(names: Iterable[str]) -> str:
    """`; consolidated.00.pth is ...: take ...`, of the first known file of another format; else nothing."""
    for pattern, (kind, remedy) in FOREIGN.items():
        found = sorted(fnmatch.filter(names, pattern))
        if found:
            return f"; {found[0]} is {kind}: {remedy}"
    return ""


def _is_adapter(name: str) -> bool:
    return name.startswith("adapter_model.")


class Folder:
    """A folder of files whose names and links never leave it. Raises InputError if there is none."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            hint = ": download the model first, for instance with `hf download`" if str(path).count("/") == 1 else ""
            raise InputError(f"{path} does not exist{hint}")
        if not self.path.is_dir():
            known = foreign([self.path.name])
            raise InputError(f"{path} is a file{known or ': give the Hugging Face directory that holds config.json'}")
        self._root = _trusted_root(self.path.resolve())

    @property
    def name(self) -> str:
        """The model's name: of the directory, or `owner/model@revision` in a download cache."""
        path = self.path.resolve()
        owner = path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return f"{owner}@{path.name}" if path.parent.name == "snapshots" else path.name

    def file(self, name: str) -> Path | None:
        """The path of a top-level file, or None. Raises InputError for a name or a link that leaves the directory."""
        if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            raise InputError(f"{self.path}: the file name {name[:80]!r} leaves the directory: names here are plain")
        if len(name.encode(errors="replace")) > MAX_NAME_NBYTES:
            raise InputError(f"{self.path}: {name[:80]!r}... is not a file name: it has {len(name)} characters")
        return self._checked(self.path / name)

    def _checked(self, path: Path) -> Path | None:
        if not path.is_symlink() and not path.exists():
            return None
        target = Path(os.path.realpath(path))  # unlike resolve(), of links that go round in a circle too
        if not target.is_relative_to(self._root):
            raise InputError(
                f"{path} is a link to {target}, outside {self._root}: copy the file into the directory (a link is"
                " followed only inside the directory, or inside a cache folder with snapshots/ and blobs/)"
            )
        if not target.is_file():
            raise InputError(
                f"{path} {'is not a regular file' if target.exists() else 'is a link to nothing'}: download it again"
            )
        if not os.access(target, os.R_OK):
            raise InputError(f"{path} cannot be read: permission denied")
        return path

    def content(self, name: str) -> bytes | None:
        """The bytes of a small file, or None if there is none."""
        path = self.file(name)
        return None if path is None else self._content(path)

    def _content(self, path: Path) -> bytes:
        if path.stat().st_size > MAX_TEXT_NBYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes, at most {MAX_TEXT_NBYTES} are read")
        return path.read_bytes()

    def json(self, name: str) -> tuple[str, dict[str, Any]] | None:
        """The text of a JSON file and its object, or None if there is none."""
        content = self.content(name)
        if content is None:
            return None
        tree = parse_json(content, str(self.path / name))
        try:
            return content.decode("utf-8-sig"), tree
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path / name} is not UTF-8: {error}") from error


class Directory(Folder):
    """A model directory. Raises InputError if it is none. `adapted`: an adapter may lie beside the model."""

    def __init__(self, path: str | Path, adapted: bool = False):
        super().__init__(path)
        self._adapted = adapted
        if not (self.path / "config.json").is_file():
            snapshots = sorted(self.path.glob("snapshots/*/config.json"))
            hint = f"; did you mean {snapshots[-1].parent}?" if snapshots else ""
            known = foreign(self._names()) or ": it is not a Hugging Face model directory"
            raise InputError(f"{path} has no config.json{known}{hint}")

    def tokenizer(self) -> dict[str, bytes]:
        """The tokenizer's files by name; vocabulary and merges only where there is no tokenizer.json."""
        whole = self.file("tokenizer.json") is not None
        names = [name for name in TOKENIZER_FILES if not (whole and name in ("vocab.json", "merges.txt"))]
        contents = {name: self.content(name) for name in names} | {MORE_TEMPLATES: self._more_templates()}
        return {name: content for name, content in contents.items() if content is not None}

    def _more_templates(self) -> bytes | None:
        """The files additional_chat_templates/NAME.jinja as one JSON object, name -> text."""
        paths = sorted((self.path / Path(MORE_TEMPLATES).stem).glob("*.jinja"))
        if len(paths) > MAX_TEMPLATES:
            raise InputError(f"{paths[0].parent} has {len(paths)} templates, at most {MAX_TEMPLATES} are read")
        try:
            found = {
                path.stem: self._content(file).decode("utf-8-sig") for path in paths if (file := self._checked(path))
            }
        except UnicodeDecodeError as error:
            raise InputError(f"{paths[0].parent} has a template that is not UTF-8: {error}") from error
        return json.dumps(found).encode() if found else None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name. Raises InputError for shards that are missing, damaged, or not what the index says."""
        names = self._names()
        if not self._adapted and "adapter_config.json" in names and any(map(_is_adapter, names)):
            raise InputError(f"{self.path} holds an adapter beside the model{foreign(['adapter_config.json'])}")
        for name in WEIGHTS:
            path = self.file(name)
            if path is not None:
                return self._indexed(name) if name.endswith(".index.json") else list_tensors(path)
        raise InputError(f"{self.path} has no weights: none of {', '.join(WEIGHTS)}{foreign(self._names())}")

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.path))

    def _indexed(self, index: str) -> dict[str, Tensor]:
        where = self.path / index
        _, tree = self.json(index) or ("", {})
        weight_map = tree.get("weight_map")
        suffix = ".safetensors" if "safetensors" in index else ".bin"
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError(f"{where} has no weight_map from tensor names to file names")
        shards = {}
        for shard in dict.fromkeys(weight_map.values()):
            path = self.file(shard)
            if path is None:
                raise InputError(f"{where} names the file {shard!r}, which is missing: download it again")
            if path.suffix != suffix:
                raise InputError(f"{where} names the file {shard!r}, it should be a {suffix} file")
            shards[shard] = list_tensors(path)
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                raise InputError(f"{where} says that {shard!r} holds {name!r}, but it does not: download both again")
        return {name: shards[shard][name] for name, shard in weight_map.items()}


def _trusted_root(path: Path) -> Path:
    """The folder that links may point into: the directory, or the cache folder of a model whose snapshot it is."""
    cache = path.parent.parent
    in_cache = path.parent.name == "snapshots" and (cache / "blobs").is_dir()
    return cache if in_cache else path
