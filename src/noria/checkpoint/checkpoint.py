"""Reads a checkpoint: its header is checked whole before anything is allocated, its blocks are read by plain preadv.

Knows nothing of devices, ranks or torch: a block goes into whatever writable
memory the caller has. The writer is writer.py.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import xxhash

from noria import models
from noria.blocks import ALIGNMENT, DTYPE_NBYTES, Block, lay_out, layer_name
from noria.checkpoint.forms import form_words, read_forms, stored_as
from noria.errors import InputError
from noria.model import MORE_TEMPLATES, ModelShape
from noria.pieces import Encoded
from noria.tools.container import (
    Extent,
    LinkedFiles,
    attribute,
    check_inside,
    read_full,
    text_attribute,
)
from noria.tools.damage import damaged_is_input_error

FORMAT = "noria-checkpoint"
VERSION = 2  # 1: all parameters are plain and of the checkpoint's dtype
CHECKSUM = "xxh3_128"  # attribute of a block's group: 32 hexadecimal digits over the block's bytes, padding included
KEYS = "config_keys"  # attribute: "known" where the version that converted it refused other keys of config.json
# The files of a tokenizer; vocab.json and merges.txt where there is no tokenizer.json.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    MORE_TEMPLATES,
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
MAX_TOKENIZER_NBYTES = 1 << 30
_VERIFY_NBYTES = 16 << 20


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises InputError, naming `where`, for anything else."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {str(error)[:200]}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{where} holds a JSON {type(tree).__name__}, it should be an object")
    return tree


def model_shape(config: dict[str, Any], where: str, notes: list[str] | None = None) -> tuple[ModuleType, ModelShape]:
    """As models.shape_of. Raises InputError naming `where`."""
    try:
        return models.shape_of(config, notes)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f"{where}: its config.json cannot be understood: {type(error).__name__} {str(error)[:200]}"
        ) from error


def block_names(shape: ModelShape) -> Iterator[str]:
    """The names of a model's blocks in the order in which a token passes them."""
    yield "embed"
    yield from (layer_name(layer) for layer in range(shape.num_layers))
    yield "head"


def model_block(
    family: ModuleType, shape: ModelShape, name: str, dtype: str, encoded: Mapping[str, Encoded] | None = None
) -> Block:
    """The layout of one block in `dtype`; `encoded`: its parameters that are not plain."""
    if name == "embed":
        shapes = family.embed_parameters(shape)
    elif name == "head":
        shapes = family.head_parameters(shape)
    else:
        shapes = family.layer_parameters(shape, int(name.rpartition("/")[2]))
    return lay_out(name, shapes, dtype, encoded)


class Checkpoint:
    """An open checkpoint. Blocks may be read from several threads; `close` when none is reading any more.

    shape, family, dtype: what the model is; version: of the file's format; config, generation_config: its own JSON
    objects; blocks: layouts by name; tokenizer: bytes by file name; header_hash: the same for the same model wherever it
    lies; adapter: name and hash of the one that was merged into it; nbytes: of all blocks; notes: for the user, a line each.
    """

    def __init__(self, path: Path):
        self.path, self.notes = Path(path), list[str]()
        self._files = LinkedFiles(self.path)
        try:
            with damaged_is_input_error(self.path):
                texts = self._read_header(self._files.root)
                self.tokenizer = self._read_tokenizer()
                self._files.check_checksums()  # last: whatever else is wrong has words of its own
                self.header_hash = self._hash(texts)
        except BaseException:
            self._files.close()
            raise
        self._files.close_hdf5()
        self._verified: set[str] = set()

    def _read_header(self, root: h5py.File) -> dict[str, str]:
        self.version = _version(root, self.path)
        self.source = text_attribute(root, "source", self.path)
        self.adapter = text_attribute(root, "adapter", self.path) if "adapter" in root.attrs else ""
        self.dtype = text_attribute(root, "dtype", self.path)
        if self.dtype not in DTYPE_NBYTES:
            raise InputError(f"{self.path}: dtype is {self.dtype!r}; known: {', '.join(DTYPE_NBYTES)}")
        texts = {name: text_attribute(root, name, self.path) for name in ("config", "generation_config")}
        self.config = parse_json(texts["config"], f"{self.path}: config")
        self.generation_config = parse_json(texts["generation_config"], f"{self.path}: generation_config")
        notes = None if KEYS in root.attrs else self.notes
        module, self.shape = model_shape(self.config, str(self.path), notes)
        self.family = self.shape.family
        family = text_attribute(root, "family", self.path)
        if family != self.family:
            raise InputError(f"{self.path}: family is {family!r}, its config says {self.family!r}")
        self._find_blocks(module)
        self.nbytes = sum(block.nbytes for block in self.blocks.values())
        return texts

    def _find_blocks(self, module: ModuleType) -> None:
        # the file's own count bounds the loop: a config may claim any number of layers
        layers = self._files.find("layers")
        held = len(layers) if isinstance(layers, h5py.Group) else 0
        if held != self.shape.num_layers:
            raise InputError(f"{self.path} holds {held} layers, its config says {self.shape.num_layers}")
        self.blocks: dict[str, Block] = {}
        self._forms: dict[str, str] = {}  # what the file says of its encoded parameters
        self._extents: dict[str, Extent] = {}
        self._checksums: dict[str, str] = {}
        for name in block_names(self.shape):
            plain = model_block(module, self.shape, name, self.dtype)
            encoded = read_forms(self._files, plain, self.shape.tied, self.dtype) if self.version > 1 else {}
            self._forms |= {f"{name}/{parameter}": form_words(form) for parameter, form in encoded.items()}
            block = self.blocks[name] = model_block(module, self.shape, name, self.dtype, encoded) if encoded else plain
            self._extents[name] = self._block_extent(block)
            self._checksums[name] = text_attribute(self._files.find(name), CHECKSUM, self.path)

    def _block_extent(self, block: Block) -> Extent:
        begin: Extent | None = None
        for parameter in block.parameters:
            path = f"{block.name}/{parameter.name}"
            extent = self._files.extent(path, *stored_as(parameter))
            begin = begin or Extent(extent.fd, extent.path, extent.offset - parameter.offset, block.nbytes)
            where = (extent.fd, extent.offset)
            if where != (begin.fd, begin.offset + parameter.offset) or extent.offset % ALIGNMENT:
                raise InputError(
                    f"{self.path}: {path!r} is at byte {extent.offset} of {extent.path.name},"
                    " not where its block has it"
                )
        assert begin is not None, "a block has parameters"
        check_inside(begin, block.name)
        return begin

    def _read_tokenizer(self) -> dict[str, bytes]:
        group = self._files.find("tokenizer")
        names = [name for name in TOKENIZER_FILES if isinstance(group, h5py.Group) and name in group]
        extents = {name: self._files.extent(f"tokenizer/{name}", "uint8") for name in names}
        nbytes = sum(extent.nbytes for extent in extents.values())
        if nbytes > MAX_TOKENIZER_NBYTES:
            raise InputError(f"{self.path}: its tokenizer has {nbytes} bytes, at most {MAX_TOKENIZER_NBYTES} are read")
        contents = {name: bytearray(extent.nbytes) for name, extent in extents.items()}
        for name, content in contents.items():
            read_full(extents[name].fd, memoryview(content), extents[name].offset, extents[name].path)
        return {name: bytes(content) for name, content in contents.items()}

    def _hash(self, texts: dict[str, str]) -> str:
        digest = xxhash.xxh3_128()
        contents = [FORMAT, str(self.version), self.family, self.dtype, *texts.values()]
        contents += [word for pair in (*self._forms.items(), *self._checksums.items()) for word in pair]
        for content in [text.encode() for text in contents] + [
            part for pair in self.tokenizer.items() for part in pair
        ]:
            content = content.encode() if isinstance(content, str) else content
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()

    def read_block(self, name: str, into: bytearray | memoryview) -> None:
        """Fills the writable buffer `into`, of exactly the block's nbytes, with the block.

        Raises InputError, naming the block, if the bytes are not those that were written (checked at its first load).
        """
        view = memoryview(into).cast("B")
        assert len(view) == self.blocks[name].nbytes, (name, len(view), self.blocks[name].nbytes)
        extent = self._extents[name]
        read_full(extent.fd, view, extent.offset, extent.path)
        if check := self.checking(name):
            check.update(view)
            check.finish()

    def piece(self, name: str, parameter: str, piece: int) -> Extent:
        """Where a piece of a block's parameter lies, such as an expert: one read. The checksum is of whole blocks alone."""
        found = next(one for one in self.blocks[name].parameters if one.name == parameter)
        whole, (offset, nbytes) = self._extents[name], found.place(piece)
        return Extent(whole.fd, whole.path, whole.offset + offset, nbytes)

    def extent(self, name: str) -> Extent:
        """Where a block lies. The descriptor stays the checkpoint's and is closed with it."""
        return self._extents[name]

    def checking(self, name: str) -> "Checking | None":
        """What checks the bytes of a block that the caller reads itself; None if they were found right before."""
        return None if name in self._verified else Checking(self, name)

    def _check(self, name: str, found: str) -> None:
        if found != self._checksums[name]:
            path = self._extents[name].path
            raise InputError(
                f"{path}: block {name!r} is damaged: its checksum is {found}, the header says"
                f" {self._checksums[name][:32]!r}; copy or convert the model again"
            )

    def verified(self, name: str, found: str) -> None:
        """Takes the checksum found of a block's bytes. Raises InputError, naming the block, if it is another."""
        self._check(name, found)
        self._verified.add(name)

    def verify_block(self, name: str) -> None:
        """Reads a block and drops it, in a few MiB of memory. Raises InputError, naming it, if its bytes changed."""
        digest, extent = xxhash.xxh3_128(), self._extents[name]
        buffer = memoryview(bytearray(min(extent.nbytes, _VERIFY_NBYTES)))
        for at in range(0, extent.nbytes, _VERIFY_NBYTES):
            part = buffer[: min(_VERIFY_NBYTES, extent.nbytes - at)]
            read_full(extent.fd, part, extent.offset + at, extent.path)
            digest.update(part)
        self._check(name, digest.hexdigest())

    @property
    def num_parameters(self) -> int:
        """Numbers in the model; a tied embedding, which two blocks share, counts once."""
        counts = {
            (self._extents[block.name].path, self._extents[block.name].offset + parameter.offset): parameter.numbers
            for block in self.blocks.values()
            for parameter in block.parameters
        }
        return sum(counts.values())

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checking:
    """Takes the bytes of one block in order, in pieces of any size; `finish` raises InputError if they are damaged."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._checkpoint, self._name, self._digest = checkpoint, name, xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        for at in range(0, len(data), _VERIFY_NBYTES):  # in turns with threads that read
            self._digest.update(data[at : at + _VERIFY_NBYTES])

    def finish(self) -> None:
        self._checkpoint.verified(self._name, self._digest.hexdigest())


def _version(root: h5py.File, path: Path) -> int:
    """The version of the file's format. Raises InputError for a file of another format, or of a newer version."""
    found = text_attribute(root, "format", path) if "format" in root.attrs else None
    if found != FORMAT:
        raise InputError(
            f"{path} is not a checkpoint: its format is {found!r}, not {FORMAT!r}; make one with noria convert"
        )
    version: Any = attribute(root, "version", path)
    if getattr(version, "shape", None) != () or version.dtype.kind not in "iu" or version < 1:
        raise InputError(f"{path}: version is {version!r}, it should be a whole number from 1 on")
    if version > VERSION:
        raise InputError(
            f"{path} is version {version} of the format, this Noria reads up to {VERSION}: use a newer Noria"
        )
    return int(version)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`. Raises InputError if it is missing, foreign, truncated, newer or inconsistent."""
    return Checkpoint(Path(path))
