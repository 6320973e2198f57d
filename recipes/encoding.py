"""Documents -> token ids, the same way for packed files, in-memory texts and streams."""


def encode_documents(tokenizer, texts):
    """Texts -> lists of ids, each bos + tokens + eos.

    A special token's spelling inside a document is encoded as plain text: a page that quotes an end
    token must not end there.
    Raises:
        ValueError: the tokenizer has no bos or eos token, or no fast backend.
    """
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no {name}: documents are stored as "
                             f"bos + tokens + eos; set tokenizer.{name.removesuffix('_id')} to one of its tokens")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no fast backend (tokenizer.json); load the tokenizer "
                         "with AutoTokenizer.from_pretrained(..., use_fast=True)")
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [[tokenizer.bos_token_id, *encoding.ids, tokenizer.eos_token_id] for encoding in encodings]
