"""Opens HDF5 files that are not trusted: existence, format, links, types, and where a dataset's bytes lie.

Knows HDF5 alone, nothing of models or generations. Nothing is read or allocated because a file says so: an extent is
checked against the size of its file first, and a link never leaves the folder of the file that holds it.
"""

import os
import re
import stat
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import h5py
from h5py import h5a, h5d, h5o, h5t

from noria.errors import InputError
from noria.tools.damage import damaged_is_input_error
from noria.tools.headers import text_nbytes
from noria.tools.looking import Looker
from noria.tools.trailer import agrees

MAX_TEXT_NBYTES = 256 << 20  # of an attribute
MAX_ATTRIBUTES_NBYTES = 16 << 20  # of one object; long texts lie elsewhere in the file
MAX_LINKS = 4  # links from file to file on the way to one object
_NUMPY_TYPES = {"float64": h5t.IEEE_F64LE, "float32": h5t.IEEE_F32LE, "float16": h5t.IEEE_F16LE, "uint8": h5t.STD_U8LE}


def hdf5_type(dtype: str) -> h5t.TypeID:
    """The stored type of a dtype. bfloat16 is a float type of its own bit fields: any HDF5 reader sees its values."""
    if dtype != "bfloat16":
        return _NUMPY_TYPES[dtype]
    kind = h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)  # sign, exponent (at, bits), mantissa (at, bits)
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


@dataclass(frozen=True)
class Extent:
    """`nbytes` at `offset` of the open file descriptor `fd`, whose file is `path`."""

    fd: int
    path: Path
    offset: int
    nbytes: int


def open_hdf5(path: Path, looker: Looker | None = None) -> h5py.File:
    """The file, open for reading. One without a checksum is looked at first, by the `looker` or one of its own.

    Raises InputError for one that is missing, foreign, truncated or not readable.
    """
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            hint = (
                f": make a checkpoint of it with `noria convert {path} model.h5`"
                if (path / "config.json").is_file()
                else ""
            )
            raise InputError(f"{path} is a directory, not an HDF5 file{hint}")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file")
        with path.open("rb") as file:
            beginning = file.read(8)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if not h5py.is_hdf5(path):
        raise InputError(f"{path} is not an HDF5 file: its {status.st_size} bytes begin with {beginning!r}")
    with nullcontext(looker) if looker else Looker() as one:
        if not agrees(path):
            one.look(path)
    try:
        return h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    sizes = re.search(r"eof = (\d+).*stored_eof = (\d+)", str(error))
    if sizes:
        return f"is truncated: it has {sizes[1]} bytes of {sizes[2]}; copy or make it again"
    return f"cannot be opened as HDF5: {str(error)[:200]!r}"


def format_of(path: Path) -> str:
    """The attribute `format` that every file of Noria carries, or an InputError if it has none."""
    with open_hdf5(path) as file, damaged_is_input_error(path):
        if "format" not in file.attrs:
            raise InputError(f"{path} is an HDF5 file, but not one of Noria's: it has no attribute 'format'")
        return text_attribute(file, "format", path)


def attribute(node: h5py.Group, name: str, path: Path) -> object:
    """One number or text, of an attribute that is no array; None if there is none. Raises InputError for anything else.

    Looked at before it is read: what the file says of its size is the size that reading it would allocate.
    """
    if not h5a.exists(node.id, name.encode()):
        return None
    stored = h5o.get_info(node.id).meta_size.attr
    if stored.heap_size > MAX_ATTRIBUTES_NBYTES:  # HDF5 reads an attribute whole when it opens it
        raise InputError(
            f"{path}: the attributes of {node.name!r} take {stored.heap_size} bytes, at most"
            f" {MAX_ATTRIBUTES_NBYTES} are read for {name!r}: Noria did not make this file, or it is damaged"
        )
    found = h5a.open(node.id, name.encode())
    nbytes, whole = found.get_storage_size(), path.stat().st_size
    if found.shape != () or nbytes > whole:
        raise InputError(
            f"{path}: {node.name!r} needs one value as its attribute {name!r}, it has shape {_shape(found.shape)}"
            f" of {nbytes} bytes (the file has {whole}): it is damaged, copy or make the file again"
        )
    _check_length(node, name, found.get_type(), path)
    return node.attrs.get(name)


def _check_length(node: h5py.Group, name: str, kind: h5t.TypeID, path: Path) -> None:
    """Raises InputError for a text of variable length that says it is longer than its file, or than is read."""
    if not isinstance(kind, h5t.TypeStringID) or not kind.is_variable_str():
        plain = isinstance(kind, h5t.TypeIntegerID | h5t.TypeFloatID | h5t.TypeStringID | h5t.TypeEnumID)
        if not plain:  # may hold texts of variable length itself
            raise InputError(
                f"{path}: {node.name!r} needs a number or a text as its attribute {name!r}: it is damaged,"
                " copy or make the file again"
            )
        return
    file = Path(node.file.filename)
    with file.open("rb") as opened:
        nbytes = text_nbytes(opened.fileno(), h5o.get_info(node.id).addr, name)
    most = min(file.stat().st_size, MAX_TEXT_NBYTES)
    if nbytes is None or nbytes > most:
        said = "is not stored as HDF5 stores it by default" if nbytes is None else f"says it has {nbytes} bytes"
        raise InputError(
            f"{path}: the attribute {name!r} of {node.name!r} {said}, at most {most} are read:"
            " it is damaged, copy or make the file again"
        )


def text_attribute(node: h5py.Group, name: str, path: Path) -> str:
    """A string attribute. Raises InputError if it is absent or no string."""
    value = attribute(node, name, path)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise InputError(f"{path}: {node.name!r} needs a text attribute {name!r}, it has {type(value).__name__}")
    return str(value)


class LinkedFiles:
    """An HDF5 file and those that it links to in the same folder, open together; owns their file descriptors."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._looker = Looker()
        self.root = open_hdf5(self.path, self._looker)
        self._folder = self.path.resolve().parent
        self._files = {self.path.resolve(): self.root}
        self._paths = [self.path]
        self._descriptors: dict[str, int] = {}
        self._found: dict[str, tuple[h5py.Group | h5py.Dataset, int]] = {}  # folders, by path

    def find(self, path: str) -> h5py.Group | h5py.Dataset:
        """The object at `path`. Raises InputError if it is missing or lies behind a link that is not allowed."""
        folder, _, name = path.rpartition("/")
        if folder and folder not in self._found:
            self._found[folder] = self._follow(self.root, folder, 0, path)
        node, hops = self._found[folder] if folder else (self.root, 0)
        return self._follow(node, name, hops, path)[0]

    def _follow(self, node: h5py.Group, route: str, hops: int, path: str) -> tuple[h5py.Group | h5py.Dataset, int]:
        """What lies at the end of the route from the node, and over how many links to files it led; `path` for messages."""
        parts = route.split("/")[::-1]
        while parts:
            part = parts.pop()
            link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
            if isinstance(link, h5py.HardLink):
                node = self._open_object(node, part, path)
            elif isinstance(link, h5py.ExternalLink):
                hops += 1
                if hops > MAX_LINKS:
                    raise InputError(
                        f"{self.path}: {path!r} goes through more than {MAX_LINKS} links from file to file"
                    )
                node = self._open(link.filename, path)
                parts += link.path.strip("/").split("/")[::-1]
            elif link is None:
                raise InputError(f"{self.path} has no {path!r}: it is incomplete, convert the model again")
            else:
                raise InputError(
                    f"{self.path}: {path!r} is a {type(link).__name__}: links here are hard or to other files"
                )
        return node, hops

    def _open_object(self, node: h5py.Group, part: str, path: str) -> h5py.Group | h5py.Dataset:
        try:
            return node[part]
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.path}: {path!r} is damaged: {str(error)[:200]}; copy or make it again") from error

    def _open(self, name: str, path: str) -> h5py.File:
        target = self._folder / name
        if name in ("", ".", "..") or "/" in name or "\0" in name or target.resolve().parent != self._folder:
            raise InputError(
                f"{self.path}: {path!r} links to {name!r}: a checkpoint's files must be in one folder, {self._folder}"
            )
        if target.resolve() not in self._files:
            if not target.exists():
                raise InputError(f"{self.path}: {path!r} is in the file {name!r}, which is missing in {self._folder}")
            self._files[target.resolve()] = open_hdf5(target, self._looker)
            self._paths.append(target)
        return self._files[target.resolve()]

    def check_checksums(self) -> None:
        """Raises InputError for the first file that does not agree with its checksum, if it has one."""
        for path in self._paths:
            if agrees(path) is False:
                raise InputError(
                    f"{path} is damaged: what it says of itself does not agree with its checksum; copy or make it again"
                )

    def extent(self, path: str, dtype: str, shape: tuple[int, ...] | None = None) -> Extent:
        """Where the bytes of a contiguous dataset lie; `shape` None: any one-dimensional.

        Raises InputError for another shape or type, another layout, or an extent that is not inside its file.
        """
        dataset = self.find(path)
        where = f"{self.path}: {path!r}"
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(f"{where} is not a dataset")
        if dataset.shape != shape if shape is not None else len(dataset.shape or ()) != 1:
            raise InputError(
                f"{where} has shape {_shape(dataset.shape)}, it should be {_shape(shape) if shape else '[bytes]'}"
            )
        if not dataset.id.get_type().equal(hdf5_type(dtype)):
            raise InputError(f"{where} is stored as {_type_name(dataset)}, not as {dtype}")
        create = dataset.id.get_create_plist()
        if create.get_layout() != h5d.CONTIGUOUS or create.get_external_count():
            raise InputError(f"{where} is not stored as one contiguous piece of its file")
        nbytes = dataset.id.get_space().get_simple_extent_npoints() * dataset.id.get_type().get_size()
        offset = dataset.id.get_offset()
        if offset is None and nbytes:
            raise InputError(f"{where} has no data: the file was never finished")
        extent = Extent(self._descriptor(dataset.file), Path(dataset.file.filename), offset or 0, nbytes)
        check_inside(extent, path)
        return extent

    def _descriptor(self, file: h5py.File) -> int:
        if file.filename not in self._descriptors:
            self._descriptors[file.filename] = os.dup(file.id.get_vfd_handle())
        return self._descriptors[file.filename]

    def close_hdf5(self) -> None:
        """Closes what h5py holds; the descriptors of extents stay open."""
        self._found.clear()
        self._looker.close()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def close(self) -> None:
        """Closes everything. May be called twice."""
        self.close_hdf5()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _type_name(dataset: h5py.Dataset) -> str:
    names = (name for name in (*_NUMPY_TYPES, "bfloat16") if dataset.id.get_type().equal(hdf5_type(name)))
    return next(names, str(dataset.dtype))


def _shape(shape: tuple[int, ...] | None) -> str:
    return str(list(shape)) if shape is not None else "none"


def check_inside(extent: Extent, name: str) -> None:
    """Raises InputError unless the extent lies inside its file."""
    size = os.fstat(extent.fd).st_size
    end = extent.offset + extent.nbytes
    if end > size:
        raise InputError(
            f"{extent.path} is truncated: {name!r} ends at byte {end}, the file has {size}; copy or make it again"
        )


def read_full(descriptor: int, into: memoryview, offset: int, path: Path) -> None:
    """Fills `into` (bytes) from `offset` of an open file on. Any thread may. Raises InputError at the file's end."""
    while len(into):
        count = os.preadv(descriptor, [into[: 1 << 30]], offset)
        if count == 0:
            raise InputError(f"{path} ends before byte {offset + len(into)}: it was truncated while it was read")
        into, offset = into[count:], offset + count
