"""Attention kernels of decoding against their torch twins, the twins against the module, the FP8 cache.

On a GPU the kernels run as they are, elsewhere in Triton's interpreter (see `interpreted` in tests/conftest.py).
"""

import functools
import os

import pytest
import torch

from modeling_deepseek_r1 import decoding_attention as twins
from modeling_deepseek_r1.attention import DeepSeekR1LatentAttention, eager_attention_forward
from modeling_deepseek_r1.rotary import DeepSeekR1RotaryEmbedding
from tests.modeling.helpers import tiny_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in the interpreter's process")
if DEVICE == "cuda" or INTERPRETED:
    from modeling_deepseek_r1 import kernels_attention as kernels
if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    from triton.runtime.interpreter import tl as triton_language

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_to_fp

    def widened(handle):
        """The interpreter holds bf16 as 16-bit integers and would multiply those; bf16 is the upper half of fp32."""
        if handle.dtype.scalar != triton_language.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), triton_language.float32)

    def rounding_cast(self, source, dtype, mode):
        """The interpreter cuts e4m3 off; the card rounds to nearest even, as torch does."""
        if dtype.scalar != triton_language.float8e4nv:
            return plain_cast(self, source, dtype, mode)
        rounded = torch.tensor(source.data).to(torch.float8_e4m3fn).view(torch.uint8)
        return TensorHandle(rounded.numpy(), triton_language.float8e4nv)

    @pytest.fixture(autouse=True)
    def numbers_of_the_card(monkeypatch):
        dot = lambda self, a, b, *rest: plain_dot(self, widened(a), widened(b), *rest)
        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
        monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", rounding_cast)

# H, nope, v, r, R; lengths before the step; steps; fp8. Sizes that fit no block, and those of the FP8 cache.
CASES = [
    (3, 10, 6, 24, 6, [0, 70, 5], 1, False),
    (5, 16, 20, 32, 8, [70, 0], 3, False),
    (7, 8, 8, 16, 4, [66, 0, 5], 3, False),                                        # 9 tokens: more than few
    (3, 8, 8, 384, 6, [0, 70], 2, True),                                           # three scales in a block of four
]
LAYERS, LAYER, MARGIN = 3, 1, 4


def relative_error(result, reference):
    return ((result.double() - reference.double()).norm() / reference.double().norm()).item()


def close(result, reference, dtype):
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    return relative_error(result, reference) < limit


class Step:
    """Random inputs of one step, cache buffers of every layer in shuffled rows, and the table that points at them."""

    def __init__(self, case, dtype):
        self.heads, self.nope, self.v, self.rank, self.rope, lengths, self.steps, self.fp8 = case
        batch, self.dtype = len(lengths), dtype
        self.tokens = batch * self.steps
        capacity = max(lengths) + self.steps + MARGIN

        def random(*shape):
            return torch.randn(*shape, device=DEVICE).to(dtype)

        latent = random(LAYERS, batch + 2, capacity, self.rank)
        key_rope = random(LAYERS, batch + 2, capacity, self.rope)
        self.cache = (twins.quantize_latents(latent, key_rope) if self.fp8
                      else torch.cat((latent, key_rope), dim=-1)).contiguous()  # fmt: skip
        self.point()
        self.rows = (torch.randperm(batch + 2)[:batch]).to(DEVICE, torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.queries = random(self.tokens, self.heads, self.nope + self.rope)
        self.compressed = random(self.tokens, self.rank + self.rope)
        self.norm_weight = random(self.rank)
        self.weight = random(self.heads * (self.nope + self.v), self.rank)
        self.inv_freq = 100.0 ** -torch.arange(0, 1, 2 / self.rope, device=DEVICE)[: self.rope // 2]
        self.scale = (self.nope + self.rope) ** -0.5

    def point(self):
        self.table = torch.tensor([layer.data_ptr() for layer in self.cache] + [self.cache[0, 0].numel()],
                                  device=DEVICE)  # fmt: skip

    def empty(self, *shape, dtype=None):
        return torch.full(shape, torch.nan, dtype=dtype or self.dtype, device=DEVICE)

    def prepare_arguments(self, query_rope, interleave):
        return (self.queries, self.compressed, self.norm_weight, 1e-6, self.inv_freq, 1.25, self.table, LAYER,
                self.rows, self.lengths, self.steps, query_rope, interleave, self.fp8, self.rank)  # fmt: skip

    def attend(self, function, query_latent, query_rope, splits):
        """-> partial and lse of `function`; the empty partials stay NaN."""
        partial = self.empty(splits, self.tokens, self.heads, self.rank, dtype=torch.float32)
        partial_lse = self.empty(splits, self.tokens, self.heads, dtype=torch.float32)
        function(query_latent, query_rope, self.table, LAYER, self.rows, self.lengths, self.steps, self.scale,
                 self.fp8, partial, partial_lse, splits)  # fmt: skip
        return partial, partial_lse

    def random_queries(self):
        """Query parts with strides that are not their shapes', wide enough for a peaked softmax."""
        latent = 0.3 * torch.randn(self.heads, self.tokens, self.rank + 3, device=DEVICE)
        rope = torch.randn(self.tokens, self.heads, self.rope, device=DEVICE)
        return latent.to(self.dtype).transpose(0, 1)[..., : self.rank], rope.to(self.dtype)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


@runs_kernels
@pytest.mark.parametrize("dtype, fused", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("case", CASES)
def test_kernels_prepare_and_absorb(case, dtype, fused):
    step, interleave = Step(case, dtype), dtype == torch.float32 and fused
    initial = step.cache.clone()
    expected_rope, expected_latent = (step.empty(step.tokens, step.heads, width) for width in (step.rope, step.rank))
    twins.prepare_latents_twin(*step.prepare_arguments(expected_rope, interleave))
    twins.absorb_queries_twin(step.queries, step.weight, expected_latent, step.nope)
    expected_cache = step.cache.clone()
    assert not torch.equal(expected_cache, initial)

    step.cache.copy_(initial)
    query_rope, query_latent = torch.empty_like(expected_rope), torch.empty_like(expected_latent)
    arguments = step.prepare_arguments(query_rope, interleave)
    if fused:
        kernels.prepare_and_absorb(*arguments, step.weight, query_latent)
    else:
        kernels.prepare_latents(*arguments)
        kernels.absorb_queries(step.queries, step.weight, query_latent, step.nope)
    assert close(query_rope, expected_rope, dtype) and close(query_latent, expected_latent, dtype)
    untouched = (expected_cache == initial).all(-1)
    assert torch.equal(step.cache[untouched], initial[untouched])
    if step.fp8:
        written = twins.dequantize_latents(step.cache, step.rank, step.rope, torch.float32)
        expected = twins.dequantize_latents(expected_cache, step.rank, step.rope, torch.float32)
        for part, reference in zip(written, expected, strict=True):
            # The latent may differ in its last bit and then round to the neighbour, 6 to 12 % away.
            assert relative_error(part[~untouched], reference[~untouched]) < 2e-2
    else:
        assert close(step.cache[~untouched], expected_cache[~untouched], dtype)


@runs_kernels
@pytest.mark.parametrize("case, dtype", [*((case, torch.float32) for case in CASES), (CASES[0], torch.float16),
                                         (CASES[1], torch.bfloat16), (CASES[3], torch.bfloat16),
                                         (CASES[3], torch.float16)])  # fmt: skip
def test_kernels_attend_and_expand(case, dtype):
    step = Step(case, dtype)
    query_latent, query_rope = step.random_queries()
    partial, lse = step.attend(twins.latent_attention_twin, query_latent, query_rope, 1)
    expected, expected_lse = partial[0], lse[0]
    expected_output = step.empty(step.tokens, step.heads, step.v)
    twins.expand_values_twin(partial, lse, step.weight, expected_output, step.nope)
    # Blocks of their own cut 21 (head, step) pairs into two programs; shares hold 64 tokens, so that some stay empty.
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2} if step.heads == 7 else None
    for splits in (1, 3):
        attention = functools.partial(kernels.latent_attention, blocks=blocks)
        partial, lse = step.attend(attention, query_latent, query_rope, splits)
        assert close(twins.combine_splits_twin(partial, lse), expected, dtype)
        assert close(lse.logsumexp(0), expected_lse, dtype)
        output = step.empty(step.tokens, step.heads, step.v)
        kernels.expand_values(partial, lse, step.weight, output, step.nope)
        assert close(output, expected_output, dtype)
    assert partial[-1].isnan().all() and lse[-1].eq(-torch.inf).all()


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_unpack_every_byte(dtype):
    """One token is all there is to see, so the output is its latent: every e4m3 number, times its group's scale."""
    step = Step((3, 8, 8, 256, 6, [0], 1, True), dtype)
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)[torch.randperm(256)]
    codes[codes & 127 == 127] = 0                                                  # the two NaNs
    scales = torch.tensor([2.0**-9, 3 * 2.0**-20], device=DEVICE)                  # both exact in fp16, up to 2^k
    entry = step.cache[LAYER, int(step.rows[0]), 0]
    entry[:256], entry[256:264] = codes, scales.view(torch.uint8)
    partial, _ = step.attend(kernels.latent_attention, *step.random_queries(), 1)
    expected = (codes.view(torch.float8_e4m3fn).float().view(2, 128) * scales[:, None]).flatten()
    torch.testing.assert_close(partial[0, 0], expected.expand(3, -1), rtol=1e-6, atol=0)


@runs_kernels
@pytest.mark.parametrize("latent_size, query_size", [(1e-8, 1e6), (2e4, 2e-6)])
def test_kernels_fp8_cache_of_any_magnitude(latent_size, query_size):
    """Latents and queries beyond fp16, and tokens and groups that differ by 2^16: nothing overflows or is lost."""
    step = Step((3, 8, 8, 256, 6, [70, 130], 2, True), torch.bfloat16)
    spread = torch.randint(-8, 9, (*step.cache.shape[:3], 2, 1), device=DEVICE)
    latent = latent_size * torch.randn(*step.cache.shape[:3], 2, 128, device=DEVICE) * torch.exp2(spread)
    step.cache = twins.quantize_latents(latent.flatten(-2), torch.randn(*step.cache.shape[:3], 6, device=DEVICE))
    step.point()
    query_latent, query_rope = step.random_queries()
    query_latent = query_latent * query_size
    expected, expected_lse = step.attend(twins.latent_attention_twin, query_latent, query_rope, 1)
    partial, lse = step.attend(kernels.latent_attention, query_latent, query_rope, 3)
    result = twins.combine_splits_twin(partial, lse)
    for group in (slice(128), slice(128, 256)):
        assert close(result[..., group], expected[0][..., group], step.dtype)
    assert close(lse.logsumexp(0), expected_lse[0], step.dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_read_one_split_as_it_is(dtype, monkeypatch):
    """One split in the compute dtype needs no joining, and its lse is not looked at."""
    step = Step(CASES[2], dtype)
    queries = step.random_queries()
    expected = step.empty(step.tokens, step.heads, step.v)
    twins.expand_values_twin(*step.attend(twins.latent_attention_twin, *queries, 1), step.weight, expected, step.nope)
    partial, lse = step.empty(1, step.tokens, step.heads, step.rank), step.empty(1, step.tokens, step.heads)
    kernels.latent_attention(*queries, step.table, LAYER, step.rows, step.lengths, step.steps, step.scale, False,
                             partial, lse.float(), 1)  # fmt: skip
    monkeypatch.setattr(kernels, "combine_splits", None)
    output = torch.empty_like(expected)
    kernels.expand_values(partial, lse, step.weight, output, step.nope)
    assert close(output, expected, dtype)


@runs_kernels
def test_kernels_follow_the_table():
    """A new, larger cache with the rows elsewhere gives the same bits: nothing of the old one is remembered."""
    step = Step(CASES[0], torch.float32)
    queries = step.random_queries()
    first, _ = step.attend(kernels.latent_attention, *queries, 2)
    moved = torch.randn(LAYERS, step.cache.shape[1] + 2, step.cache.shape[2] + 9, step.cache.shape[3], device=DEVICE)
    moved[:, 2:, : step.cache.shape[2]] = step.cache
    step.cache, step.rows = moved, step.rows + 2
    step.point()
    second, _ = step.attend(kernels.latent_attention, *queries, 2)
    assert torch.equal(first[0], second[0])


@runs_kernels
def test_kernels_refuse_what_does_not_fit():
    step = Step(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="cast the weight"):
        kernels.absorb_queries(step.queries.bfloat16(), step.weight, step.queries, step.nope)
    with pytest.raises(ValueError, match="multiple of 128"):
        kernels.prepare_latents(*step.prepare_arguments(step.empty(step.tokens, step.heads, step.rope), False)[:-2],
                                True, step.rank)  # fmt: skip


@pytest.mark.parametrize("splits", [2, 4])
def test_twin_does_not_depend_on_splits(splits):
    step = Step(CASES[1], torch.float32)
    queries = step.random_queries()
    whole = twins.combine_splits_twin(*step.attend(twins.latent_attention_twin, *queries, 1))
    parts = twins.combine_splits_twin(*step.attend(twins.latent_attention_twin, *queries, splits))
    torch.testing.assert_close(parts, whole)


def test_fp8_cache():
    latent, key_rope = torch.randn(50, 512) * torch.randn(50, 1).exp(), torch.randn(50, 64)
    packed = twins.quantize_latents(latent, key_rope)
    assert packed.shape == (50, 656)
    values, rotary = twins.dequantize_latents(packed, 512, 64, torch.float32)
    assert 0.015 < relative_error(values, latent) < 0.03                           # e4m3: 3 bits of mantissa
    assert torch.equal(rotary, key_rope.bfloat16().float())
    again, _ = twins.dequantize_latents(twins.quantize_latents(values, rotary), 512, 64, torch.float32)
    torch.testing.assert_close(again, values)
    with pytest.raises(ValueError, match="kv_lora_rank=96"):
        twins.latent_bytes(96, 64)


@pytest.mark.parametrize("interleave", [False, True])
def test_step_of_twins_equals_the_module(interleave):
    """Three tokens after a past of five, absorbed from a cache, against the module's expanded attention in full."""
    config = tiny_config(rope_interleave=interleave, q_lora_rank=None)
    config._attn_implementation = "eager"
    module, rotary = DeepSeekR1LatentAttention(config, 0).to(DEVICE), DeepSeekR1RotaryEmbedding(config).to(DEVICE)
    torch.nn.init.normal_(module.kv_a_layernorm.weight)
    heads, nope, rope, rank = 4, config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    states = torch.randn(2, 8, config.hidden_size, device=DEVICE)
    angles = rotary(states, torch.arange(8, device=DEVICE)[None].expand(2, -1))
    mask = torch.full((8, 8), -torch.inf, device=DEVICE).triu(1)[None, None]
    expected, _ = module(states, angles, mask)

    cache = torch.zeros(2, 10, rank + rope, device=DEVICE)
    table = torch.tensor([cache.data_ptr(), 10 * (rank + rope)], device=DEVICE)
    rows = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    weight, outputs = module.kv_b_proj.weight, []
    with torch.no_grad():
        for past, steps in ((0, 5), (5, 3)):
            new = states[:, past : past + steps].flatten(0, 1)
            queries = module.q_proj(new).unflatten(-1, (heads, -1))
            lengths = torch.full((2,), past, dtype=torch.int32, device=DEVICE)
            query_rope, query_latent = new.new_empty(2 * steps, heads, rope), new.new_empty(2 * steps, heads, rank)
            twins.prepare_latents_twin(queries, module.kv_a_proj_with_mqa(new), module.kv_a_layernorm.weight, 1e-6,
                                       rotary.inv_freq, rotary.attention_scaling, table, 0, rows, lengths, steps,
                                       query_rope, interleave, False, rank)  # fmt: skip
            twins.absorb_queries_twin(queries, weight, query_latent, nope)
            partial, lse = (new.new_empty(1, 2 * steps, heads, rank), new.new_empty(1, 2 * steps, heads))
            twins.latent_attention_twin(query_latent, query_rope, table, 0, rows, lengths, steps, module.scaling,
                                        False, partial, lse, 1)  # fmt: skip
            output = new.new_empty(2 * steps, heads, config.v_head_dim)
            twins.expand_values_twin(partial, lse, weight, output, nope)
            outputs.append(module.o_proj(output.flatten(1)).unflatten(0, (2, steps)))

            latent, key_rope = cache[rows.long(), : past + steps].split((rank, rope), dim=-1)
            by_row = [part.unflatten(0, (2, steps)).transpose(1, 2) for part in (query_latent, query_rope)]
            causal = torch.ones(steps, past + steps, dtype=torch.bool, device=DEVICE).tril(past)
            absorbed = twins.absorbed_attention(*by_row, latent, key_rope, module.scaling, causal)
            attended = partial[0].unflatten(0, (2, steps)).transpose(1, 2)
            torch.testing.assert_close(absorbed, attended, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch, mask_kind", [(1, None), (2, None), (1, "bool"), (3, "additive")])
def test_absorbed_attention_masks(batch, mask_kind):
    buffer = torch.randn(batch, 11, 20)
    latent, key_rope = buffer.split((16, 4), dim=-1)
    query_latent, query_rope = torch.randn(batch, 3, 2, 16), torch.randn(batch, 3, 2, 4)
    seen = torch.rand(batch, 1, 2, 11) > 0.4
    seen[..., 0] = True
    mask = {None: None, "bool": seen, "additive": torch.zeros_like(seen, dtype=torch.float).masked_fill(~seen, -1e30)}
    output = twins.absorbed_attention(query_latent, query_rope, latent, key_rope, 0.2, mask[mask_kind])
    scores = torch.einsum("bhsc,btc->bhst", torch.cat((query_latent, query_rope), -1), buffer) * 0.2
    scores = scores if mask_kind is None else scores.masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(output, torch.einsum("bhst,btc->bhsc", scores.softmax(-1), latent))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count, total", [(7, 40), (40, 40), (1, 5), (64, 200)])
def test_causal_chunk(count, total, dtype):
    queries, keys = torch.randn(2, 3, count, 24), torch.randn(2, 3, total, 24)
    values = torch.randn(2, 3, total, 16)
    queries, keys, values = (part.to(DEVICE, dtype) for part in (queries, keys, values))
    output = twins.causal_chunk_attention(queries, keys, values, 0.3, mask_elements=20 * total)
    mask = torch.full((count, total), -torch.inf, device=DEVICE).triu(total - count + 1)
    module = torch.nn.Module().eval()
    expected, _ = eager_attention_forward(module, queries.float(), keys.float(), values.float(), mask, 0.3)
    assert relative_error(output, expected.transpose(1, 2)) < (1e-5 if dtype == torch.float32 else 1e-2)
    with pytest.raises(ValueError, match="last positions"):
        twins.causal_chunk_attention(keys, queries[:, :, :1], values[:, :, :1], 0.3)


def test_merge_is_exact():
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 6)
    parts = []
    for begin, end in ((0, 13), (13, 40)):
        scores = query @ key[:, :, begin:end].mT
        parts += [scores.softmax(-1) @ value[:, :, begin:end], scores.logsumexp(-1, keepdim=True)]
    torch.testing.assert_close(twins.merge_attention(*parts), (query @ key.mT).softmax(-1) @ value)
