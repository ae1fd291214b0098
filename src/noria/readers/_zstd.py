"""A Zstandard file as plain bytes, in bounded memory. Needs zstandard, which the extra noria-mpi[zstd] installs."""

import io
from typing import Any, BinaryIO

from noria.errors import InputError

MAGIC = b"\x28\xb5\x2f\xfd"
MAX_WINDOW_NBYTES = 2**27  # what the zstd command too decompresses unasked
_PIECE_NBYTES = 512  # read at once: a piece is 128 blocks at most, which may be 16 MiB


class Decompressed(io.RawIOBase):
    """The bytes of the frames in `file`, in order. Raises OSError where it is damaged, EOFError where it is cut short."""

    def __init__(self, file: BinaryIO, name: str):
        try:
            import zstandard
        except ImportError as error:
            raise InputError(f"prompts {name}: Zstandard needs zstandard: pip install zstandard") from error
        self._file, self._error = file, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_NBYTES)
        self._frame, self._begun = self._decompressor.decompressobj(), False
        self._plain = memoryview(b"")
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # a writable buffer
        while not self._plain:
            if not self._packed:
                self._packed = self._file.read(_PIECE_NBYTES)
            if not self._packed:
                if self._begun:
                    raise EOFError("its last frame is incomplete")
                return 0
            self._plain = memoryview(self._decompress())
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _decompress(self) -> bytes:
        packed, self._packed, self._begun = self._packed, b"", True
        try:
            plain = self._frame.decompress(packed)
        except self._error as error:
            words = str(error).removeprefix("zstd decompressor error: ")
            if "memory" in words or "window" in words.lower():
                words = f"its window is larger than {MAX_WINDOW_NBYTES // 2**20} MiB: compress it with zstd --long=27 or less"
            raise OSError(words) from error
        if self._frame.eof:
            self._packed, self._begun = self._frame.unused_data, False
            self._frame = self._decompressor.decompressobj()
        return plain
