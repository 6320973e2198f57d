"""Zstandard files as binary streams that tell a complete file from one that was cut off."""

import io

BLOCK = 4_096  # compressed bytes decompressed at once: what they may hold is the memory this takes


class ZstdStream(io.RawIOBase):
    """A Zstandard stream decompressed, of one frame or several; zstandard's own reader takes a cut one for complete.

    Raises:
        EOFError: the stream ends inside a frame, or is damaged.
    """

    def __init__(self, raw):
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("reading .zst needs zstandard: `pip install -e '.[corpus]'`") from error
        self._raw, self._new, self._error = raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame, self._ready, self._taken = None, b"", 0

    def readable(self):
        return True

    def _more(self):
        block = getattr(self._frame, "unused_data", b"") or self._raw.read(BLOCK)
        if not block:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("the compressed file ends too early")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = self._new()
        try:
            self._ready, self._taken = self._frame.decompress(block), 0
        except self._error as error:
            raise EOFError(str(error)) from error
        return True

    def readinto(self, buffer):
        while self._taken == len(self._ready) and self._more():
            pass
        part = self._ready[self._taken:self._taken + len(buffer)]
        self._taken += len(part)
        buffer[:len(part)] = part
        return len(part)
