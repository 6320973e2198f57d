"""What bytes of unknown origin are as text: encoding found over the whole file, stray null bytes, cuts of bounded size.

A file is read twice in blocks: once to see what it is (`inspect_stream`), once to decode it (`decoded_chunks`), so
that neither a large file nor one huge line takes memory, and the decision rests on all of it.
"""

import codecs
import hashlib
import re
from dataclasses import dataclass

BLOCK = 1 << 18            # bytes read at once
SAMPLE = 1 << 16           # bytes with non-ASCII neighbours that the detector sees at most
BINARY_SHARE = 0.01        # of control characters (null bytes too) from which on a file is no text
BROKEN_SHARE = 0.1         # of non-ASCII bytes: up to here a file is UTF-8 with errors, not another encoding
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# What a detector answers for Latin-1 is, in files people have, its superset with curly quotes.
SUPERSETS = {"iso8859-1": "cp1252", "ascii": "cp1252", "gbk": "gb18030", "gb2312": "gb18030", "euc-kr": "cp949",
             "uhc": "cp949", "shift_jis": "cp932"}
HIGH = bytes(range(128, 256))
CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1a\x1b"))
SENTENCE = re.compile(r"[.!?][\"')\]]*\s|[。！？；]")


class Undecodable(ValueError):
    """Bytes that are text in no encoding found for them."""


@dataclass
class Inspection:
    """What a first reading found: `encoding` is None where there is no text in it, and `reason` says why."""

    bytes: int
    sha256: str
    encoding: str | None
    errors: str = "strict"     # for the decoder: "replace" where a UTF-8 file has some invalid bytes
    reason: str = ""
    null_bytes: int = 0        # single ones, which are removed


class _Utf8Check:
    """Counts the invalid bytes of a UTF-8 stream and the non-ASCII bytes."""

    def __init__(self):
        self.broken = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("count-broken")

    def _count(self, error):
        self.broken += error.end - error.start
        return "\ufffd", error.end

    def feed(self, block, final=False):
        codecs.register_error("count-broken", self._count)
        self._decoder.decode(block, final)


def _detect(sample):
    """The encoding that the detector of browsers (uchardet) finds, as a codec of Python's, or None."""
    try:
        from resiliparse.parse.encoding import detect_encoding
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading files that are not UTF-8 needs resiliparse: `pip install -e '.[corpus]'`, "
                                  "or convert them, for instance with iconv") from error
    found = (detect_encoding(sample, max_len=0, html5_compatible=False) or "").lower()
    try:
        return codecs.lookup(SUPERSETS.get(found, found)).name
    except LookupError:
        return None


def _without_mark(size, utf8, high, nulls, parity, sample):
    """(encoding, errors, reason) of bytes without a byte order mark."""
    if nulls > 0.2 * size and max(parity) > 0.95 * nulls:  # Latin letters in UTF-16: every other byte is null
        return ("utf-16-be" if parity[0] > parity[1] else "utf-16-le"), "strict", ""
    if not utf8.broken:
        return "utf-8", "strict", ""
    if utf8.broken <= BROKEN_SHARE * high:
        return "utf-8", "replace", ""
    found = _detect(sample)
    return (found, "strict", "") if found else (None, "strict", "encoding not recognised")


def inspect_stream(stream):
    """Read a binary stream to its end and say what it is (`Inspection`)."""
    digest, utf8, sample = hashlib.sha256(), _Utf8Check(), bytearray()
    size = high = nulls = controls = 0
    parity, start = [0, 0], b""
    while block := stream.read(BLOCK):
        digest.update(block)
        start = start or block[:4]
        ascii_left = block.translate(None, HIGH)
        if len(ascii_left) < len(block):
            high += len(block) - len(ascii_left)
            if len(sample) < SAMPLE:
                for line in block.splitlines(keepends=True):
                    if not line.isascii():
                        sample += line[:SAMPLE]
        null_here = block.count(0)
        if null_here:
            nulls += null_here
            even = block[::2].count(0)
            parity[size % 2] += even
            parity[1 - size % 2] += null_here - even
        controls += len(block) - len(block.translate(None, CONTROLS))
        utf8.feed(block)
        size += len(block)
    utf8.feed(b"", final=True)
    mark = next((name for mark, name in MARKS if start.startswith(mark)), None)
    if mark:
        encoding, errors, reason = mark, "replace" if mark == "utf-8-sig" and utf8.broken else "strict", ""
    else:
        encoding, errors, reason = _without_mark(size, utf8, high, nulls, parity, bytes(sample[:SAMPLE]))
    wide = encoding is not None and encoding.startswith(("utf-16", "utf-32"))
    if not wide and controls > max(BINARY_SHARE * size, 3):
        encoding, reason = None, "binary"
    return Inspection(size, digest.hexdigest(), encoding, errors, reason, 0 if wide else nulls)


def decoded_chunks(stream, inspection):
    """Yield the text of a stream in chunks, null characters removed.

    Raises:
        Undecodable: a byte that the encoding found does not have.
    """
    decoder = codecs.getincrementaldecoder(inspection.encoding)(inspection.errors)
    offset = 0
    try:
        while block := stream.read(BLOCK):
            chunk = decoder.decode(block)
            offset += len(block)
            yield chunk.replace("\0", "")
        yield decoder.decode(b"", final=True).replace("\0", "")
    except UnicodeDecodeError as error:
        raise Undecodable(f"not {inspection.encoding}, which it looks like: invalid byte within {BLOCK:,} bytes of "
                          f"offset {offset:,} ({error.reason}); convert it to UTF-8, for instance with iconv"
                          ) from error


def _place_to_cut(text, start, aim, longest):
    """Where a piece that begins at `start` ends: the first blank line after `aim` characters, else the last line end,
    sentence end or space before `longest`, else `longest`."""
    low, high = start + aim, start + longest
    blank = re.compile(r"\n[ \t\r]*\n+").search(text, low, high)
    if blank:
        return blank.end()
    newline = text.rfind("\n", low, high)
    if newline >= 0:
        return newline + 1
    ends = [match.end() for match in SENTENCE.finditer(text, low, high)]
    space = text.rfind(" ", low, high)
    return ends[-1] if ends else space + 1 if space >= 0 else high


def pieces(chunks, longest, aim=None):
    """Cut a text that comes in chunks into pieces of at most `longest` characters, in memory bounded by that.

    Nothing is lost: the pieces joined are the chunks joined. A text of at most `longest` characters stays whole, a
    longer one is cut where a piece of `aim` (default two fifths of `longest`) characters has a blank line next.
    """
    aim = aim or 2 * longest // 5
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > longest:
            end = _place_to_cut(buffer, start, aim, longest)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer
