"""Perplexity and bits per byte of any causal language model on held-out text.

Each document stands alone: begin token + tokens + end token, as in the packed sets. One that is longer
than the window is cut into windows that overlap by half; the overlap is context only, so every token but
the first is predicted exactly once, from at least half a window of its document. Bits per byte divide by
the UTF-8 bytes of the text and compare models with different tokenizers; perplexity is per token and does not.
"""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from transformers import AutoTokenizer

from recipes.data import PackedTokens, bits_per_byte, is_packed_folder, load_text_dataset
from recipes.sampling import context_length, evaluation_mode, in_batches, whole_model
from recipes.text_files import has_split

DEFAULT_WINDOW = 2048
LARGEST_LOSS = 700.0  # nats: its exponential, the perplexity, is still a number


class Document(NamedTuple):
    text: str
    source: str = "text"


class Window(NamedTuple):
    """Tokens [begin, ...) of a document; those from `first` on (counted in the window) are predicted."""

    document: int
    token_ids: list
    first: int


def _packed_documents(folder, split):
    """The texts of a packed split, decoded by the tokenizer that made it, and checked by their length in bytes."""
    rows = PackedTokens(folder, split, 2)
    tokenizer = AutoTokenizer.from_pretrained(Path(folder).expanduser() / "tokenizer")
    for number, (ids, size, source) in enumerate(rows.documents()):
        text = tokenizer.decode(ids[1:-1].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if len(text.encode("utf-8", "surrogatepass")) != size:
            raise ValueError(f"document {number} of {folder} ({split}) cannot be told from its tokens: its tokenizer "
                             "loses text when decoding; evaluate on the text files that it was made from")
        yield Document(text, source)


def held_out_documents(location, text_column="text", max_bytes=None):
    """(documents, split) of a data set: its validation part, or "all" where it has no such part.

    Args:
        location: a packed folder, a file or folder of text, or a Hub data set.
        max_bytes: leading whole documents up to about this many bytes of text.
    """
    if is_packed_folder(location):
        split = "validation"
        found = _packed_documents(location, split)
    else:
        split = "validation" if has_split(location, "validation") else "all"
        rows = load_text_dataset(location, "train" if split == "all" else split, text_column)
        found = (Document(text) for text in rows[text_column])
    documents, size = [], 0
    for document in found:
        if max_bytes is not None and size >= max_bytes:
            break
        if not isinstance(document.text, str | None):
            raise ValueError(f"{location}: column {text_column!r} holds a {type(document.text).__name__}, no text; "
                             "name the right one with --text_column")
        if document.text and document.text.strip():
            documents.append(document)
            size += len(document.text.encode("utf-8", "surrogatepass"))
    return documents, split


def encode(tokenizer, texts):
    """Lists of ids: begin token + tokens + end token; a special token's spelling in a text stays text.

    A tokenizer without begin token starts documents with its end token, as its model was trained to.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no eos_token, which ends a document; set one")
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
                        verbose=False)["input_ids"]
    return [[begin, *ids, end] for ids in encoded]


def cut_windows(encoded, window):
    """Windows of at most `window` tokens over encoded documents, overlapping by half."""
    windows = []
    for number, ids in enumerate(encoded):
        done = 1  # the first token is not predicted
        while done < len(ids):
            begin = 0 if done == 1 else done - window // 2
            windows.append(Window(number, ids[begin:begin + window], done - begin))
            done = min(begin + window, len(ids))
    return windows


def _losses(model, windows):
    """Summed negative log-likelihood (nats) of each window's predicted tokens."""
    length = max(len(window.token_ids) for window in windows)
    ids = torch.zeros(len(windows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, :len(window.token_ids)] = torch.tensor(window.token_ids)
        mask[row, :len(window.token_ids)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    sums = []
    for row, (_, tokens, first) in enumerate(windows):  # row by row: fp32 logits of one row only
        predicted = slice(first, len(tokens))
        scores = logits[row, first - 1:len(tokens) - 1].float()
        sums.append(F.cross_entropy(scores, ids[row, predicted], reduction="none").double().sum())
    return torch.stack(sums).tolist()


def _checked_window(model, window):
    context = context_length(model)
    window = min(context or DEFAULT_WINDOW, DEFAULT_WINDOW) if window is None else window
    if window < 4 or (context is not None and window > context):
        raise ValueError(f"text_window={window} must lie in [4, max_position_embeddings={context}]")
    return window


def evaluate_text(model, tokenizer, data, *, window=None, batch_size=8, text_column="text", max_bytes=None,
                  accelerator=None):
    """{"perplexity", "bits_per_byte", "loss", "tokens", "bytes", ...} of held-out documents.

    Args:
        data: a location (see `held_out_documents`) or a list of texts. A packed set serves every model, whatever
            tokenizer made it: its texts are encoded anew.
        window: tokens the model sees at once. Default: its context, at most 2048.
    Returns:
        also "sources" (bits per byte of each), "documents", "windows", "window", "split", "checksum" of the texts.
    Raises:
        ValueError: no documents; a window beyond the context; a model whose loss is no number.
    """
    model = whole_model(model)
    window = _checked_window(model, window)
    if isinstance(data, (str, Path)):
        documents, split = held_out_documents(data, text_column, max_bytes)
    else:
        documents, split = [Document(text) for text in data if text.strip()], "given"
    if not documents:
        raise ValueError(f"text_dataset={data!r} has no text to evaluate on")
    encoded = encode(tokenizer, [document.text for document in documents])
    windows = sorted(cut_windows(encoded, window), key=lambda w: -len(w.token_ids))
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    sums = []
    with evaluation_mode(model):
        for batch, losses in in_batches(windows[rank::world], batch_size, lambda batch: _losses(model, batch)):
            sums += [(part.document, loss) for part, loss in zip(batch, losses)]
    sums = gather_object(sums) if world > 1 else sums
    found = _text_figures(documents, encoded, sums)
    checksum = hashlib.sha256("\0".join(document.text for document in documents).encode("utf-8", "surrogatepass"))
    return found | {"windows": len(windows), "window": window, "split": split, "checksum": checksum.hexdigest()[:16]}


def _text_figures(documents, encoded, sums):
    """Figures from [(document, nats)]. fsum: the result does not depend on the order in which they came."""
    sizes = [len(document.text.encode("utf-8", "surrogatepass")) for document in documents]
    tokens, total = sum(len(ids) - 1 for ids in encoded), math.fsum(loss for _, loss in sums)
    if not total / tokens < LARGEST_LOSS:
        raise ValueError(f"the loss on held-out text is {total / tokens} nats per token: check the model's weights, or "
                         "load it with dtype=float32")
    sources = {}
    for name in dict.fromkeys(document.source for document in documents):
        own = {number for number, document in enumerate(documents) if document.source == name}
        nats = math.fsum(loss for number, loss in sums if number in own)
        sources[name] = bits_per_byte(nats, sum(sizes[number] for number in own))
    return {"perplexity": math.exp(total / tokens), "bits_per_byte": bits_per_byte(total, sum(sizes)),
            "loss": total / tokens, "tokens": tokens, "bytes": sum(sizes), "documents": len(documents),
            "sources": sources}
