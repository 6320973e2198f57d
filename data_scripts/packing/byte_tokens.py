"""Any bytes <-> token ids, exactly, also where they are not UTF-8.

What decodes as UTF-8 is encoded as text is; each byte that does not becomes that byte's own token. The alphabet is
the one of byte-level BPE: printable bytes stand for themselves, the others for characters from U+0100 on.
Source: GPT-2's vocabulary (Radford et al., 2019), Sec. 2.2.
"""

import functools
import re

_INVALID = re.compile("[\udc80-\udcff]")  # what "surrogateescape" puts for a byte that does not decode


@functools.lru_cache(maxsize=1)
def byte_alphabet():
    """{byte: the character that stands for it in the vocabulary}, 256 entries."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def _byte_ids(tokenizer):
    """The id of each byte's own token."""
    alphabet = byte_alphabet()
    ids = {byte: tokenizer.backend_tokenizer.token_to_id(letter) for byte, letter in alphabet.items()}
    missing = [byte for byte, index in ids.items() if index is None]
    if missing:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no token for byte {missing[0]:#04x}: it is no "
                         "byte-level one; train one with data_scripts/train_tokenizer.py")
    return ids


def encode_bytes(tokenizer, data):
    """Bytes -> ids, without begin and end tokens; special tokens' spellings are plain text.

    Raises:
        ValueError: the tokenizer lacks a token for some byte.
    """
    text = data.decode("utf-8", "surrogateescape")
    valid = _INVALID.split(text)
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        encodings = backend.encode_batch_fast(valid, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    if len(valid) == 1:
        return list(encodings[0].ids)
    byte_ids, ids = _byte_ids(tokenizer), list(encodings[0].ids)
    for letter, encoding in zip(_INVALID.findall(text), encodings[1:]):
        ids += [byte_ids[ord(letter) - 0xDC00], *encoding.ids]
    return ids


def decode_bytes(tokenizer, ids):
    """Ids -> the bytes that they stand for; tokens added whole (marks, place holders) as their spelling in UTF-8.

    Raises:
        ValueError: an id that the vocabulary does not have.
    """
    to_byte = {letter: byte for byte, letter in byte_alphabet().items()}
    backend, parts = tokenizer.backend_tokenizer, []
    added = {index: token.content.encode("utf-8") for index, token in backend.get_added_tokens_decoder().items()}
    for index in map(int, ids):
        token = backend.id_to_token(index)
        if token is None:
            raise ValueError(f"id {index} is not in the vocabulary of {len(tokenizer)} ids")
        parts.append(added[index] if index in added else bytes(map(to_byte.__getitem__, token)))
    return b"".join(parts)
