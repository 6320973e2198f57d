"""The cache of the fast path: one buffer of latents and rotary keys a layer, read in place by every step."""

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from .decoding_attention import dequantize_latents, quantize_latents

ROUND = 64  # capacities are multiples of this, so that a longer request seldom needs a new buffer


def fp8_width(rank, rope):
    """Bytes of one token in the FP8 layout: e4m3 latent, an fp32 scale per 128 channels, bf16 rotary key."""
    return rank + -(-rank // 128) * 4 + 2 * rope


class LatentCache:
    """Latents and rotary keys of `cache_rows` sequences, compact from position 0 (no padding).

    Shapes: `buffers[layer]` (cache_rows, capacity, kv_lora_rank + qk_rope_head_dim) of `dtype`, or uint8 of
    `fp8_width` bytes a token. Grows by `reserve`. The last row is scratch: padding rows of a batch write there.
    `table` (layers + 1,) int64 on the device holds the buffers' addresses and their elements a row: kernels find the
    cache through it, so that a recorded graph outlives any one cache (`table`: the tensor that it reads).
    """

    def __init__(self, config, layers, cache_rows, capacity, dtype, device, fp8=False, table=None):
        self.rank, self.rope = config.kv_lora_rank, config.qk_rope_head_dim
        self.dtype, self.fp8, self.cache_rows = dtype, fp8, cache_rows + 1
        self.capacity = 0
        self.width = fp8_width(self.rank, self.rope) if fp8 else self.rank + self.rope
        storage = torch.uint8 if fp8 else dtype
        self.buffers = [torch.empty(self.cache_rows, 0, self.width, dtype=storage, device=device)] * layers
        self.table = torch.zeros(layers + 1, dtype=torch.int64, device=device) if table is None else table
        self.reserve(capacity)

    @property
    def scratch_row(self):
        return self.cache_rows - 1

    @property
    def bytes_per_token(self):
        """Bytes that one token takes in one layer."""
        return self.width * self.buffers[0].element_size()

    def reserve(self, tokens):
        """Makes room for `tokens` a row, layer by layer: only one layer is held twice meanwhile."""
        if tokens <= self.capacity:
            return
        capacity = -(-tokens // ROUND) * ROUND
        for layer, buffer in enumerate(self.buffers):
            # Zeros and not empty: a kernel may load (and mask) what lies behind a row's last token.
            grown = buffer.new_zeros(self.cache_rows, capacity, self.width)
            grown[:, : self.capacity] = buffer
            self.buffers[layer] = grown
        self.capacity = capacity
        self.table.copy_(torch.tensor([b.data_ptr() for b in self.buffers] + [capacity * self.width]))

    def encode(self, latent, key_rope):
        """(..., r) and (..., R) -> (..., width), what is stored."""
        if self.fp8:
            return quantize_latents(latent, key_rope)
        return torch.cat((latent, key_rope), dim=-1).to(self.dtype)

    def decode(self, stored):
        """Stored (..., width) -> latent (..., r), rotary key (..., R) of `dtype`."""
        if self.fp8:
            return dequantize_latents(stored, self.rank, self.rope, self.dtype)
        return stored.split((self.rank, self.rope), dim=-1)

    def write(self, layer, latent, key_rope, rows, lengths):
        """Stores S new tokens of each row b behind its `lengths[b]`. Shapes: (B, S, r), (B, S, R), rows and lengths
        (B,) int."""
        places = lengths.long().unsqueeze(1) + torch.arange(latent.shape[1], device=lengths.device)
        self.buffers[layer][rows.long().unsqueeze(1), places] = self.encode(latent, key_rope)

    def as_library_cache(self, config, rows, lengths, total):
        """The first `config.num_hidden_layers` layers as a DynamicCache of `total` positions, left-padded again.

        Row b of the result holds `lengths[b]` tokens of cache row `rows[b]` at its end.
        """
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            parts = [
                F.pad(self.buffers[layer][row, :length], (0, 0, total - length, 0))
                for row, length in zip(rows, lengths)
            ]
            latent, key_rope = self.decode(torch.stack(parts))
            cache.update(latent.unsqueeze(1).contiguous(), key_rope.unsqueeze(1).contiguous(), layer)
        return cache


class PrefillView:
    """What a forward pass sees as its cache while prompts are read: rows `first`.. of a `LatentCache`, from `start`.

    The model's ordinary forward calls `update` in every layer. The cache is made at the first call, because only
    there the compute dtype (autocast's) is known.
    """

    def __init__(self, rows, start, open_cache):
        self.rows, self.start, self.open_cache = rows, start, open_cache

    def get_seq_length(self, layer_idx=0):
        return self.start

    def update(self, latent, key_rope, layer, compute_dtype):
        """(B, 1, S, r), (B, 1, S, R) new -> all seen so far, (B, 1, start + S, r) and (B, 1, start + S, R)."""
        cache = self.open_cache(compute_dtype)
        end = self.start + latent.shape[2]
        stored = cache.encode(latent.squeeze(1), key_rope.squeeze(1))
        cache.buffers[layer][self.rows, self.start : end] = stored
        if self.start == 0:
            return latent, key_rope
        latent, key_rope = cache.decode(cache.buffers[layer][self.rows, :end])
        return latent.unsqueeze(1), key_rope.unsqueeze(1)
