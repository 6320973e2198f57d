"""The fused norms, rotary parts and SwiGLU of training against plain autograd, forward and every gradient.

As in test_kernels_experts.py: the kernels run natively on a GPU; without one `test_in_the_interpreter` runs this file
again under Triton's interpreter (see `interpreted` in tests/conftest.py).
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from modeling_deepseek_r1 import fused
from modeling_deepseek_r1 import training_blocks as blocks
from modeling_deepseek_r1 import training_linear as linears
from modeling_deepseek_r1.attention import DeepSeekR1LatentAttention
from modeling_deepseek_r1.norms import DeepSeekR1RMSNorm
from modeling_deepseek_r1.rotary import rotate
from tests.modeling.helpers import tiny_config

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")
if DEVICE == "cuda" or INTERPRETED:
    from modeling_deepseek_r1 import kernels_norms

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape, dtype=FP32, needs=True):
    return torch.randn(*shape).to(DEVICE, dtype).requires_grad_(needs)


def strided(batch, seq, width, dtype=FP32, before=0, after=0):
    """A leaf and its slice along the last dimension, as the latent and the rotary key of one projection are."""
    leaf = random(batch, seq, before + width + after, dtype=dtype)
    return leaf, leaf[..., before : before + width]


def close(result, reference, dtype=None):
    """fp32: another order of sums. Else a result is rounded once, and so may be the sum it is made of (a residual's);
    the interpreter cuts bf16 off, by up to 2^-7."""
    tolerance = {FP32: 2e-6, BF16: 2**-6, FP16: 2e-3}[dtype or result.dtype]
    torch.testing.assert_close(result.float(), reference.float(), rtol=tolerance, atol=tolerance)


def close_to_scale(grad, reference, dtype=None):
    """`close` for gradients: a sum over rows is as exact as its largest part."""
    scale = reference.float().abs().max().clamp_min(1.0) if reference.numel() else 1.0
    close(grad.float() / scale, reference.float() / scale, dtype or grad.dtype)


def check(fused, plain, inputs, dtypes=None):
    """Outputs and gradients of both under the same random gradients; the plain one in fp32 of the same numbers."""
    inputs = [x.detach().requires_grad_(x.requires_grad) if x.is_leaf else x for x in inputs]
    wide = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]
    outputs, expected = fused(*inputs), plain(*wide)
    dtypes = dtypes or [output.dtype for output in outputs]
    ours, theirs, outer = [], [], []
    for output, reference, dtype in zip(outputs, expected, dtypes, strict=True):
        assert output.dtype == dtype and output.shape == reference.shape
        close(output, reference)
        if reference.requires_grad:
            ours.append(output)
            theirs.append(reference)
            outer.append(torch.randn(output.shape).to(output))
    needing = [k for k, x in enumerate(inputs) if x.requires_grad]
    grads = torch.autograd.grad(ours, [inputs[k] for k in needing], outer)
    references = torch.autograd.grad(theirs, [wide[k] for k in needing], [grad.float() for grad in outer])
    narrowest = max((x.dtype for x in [*inputs, *outputs]), key=lambda dtype: torch.finfo(dtype).eps)
    for k, grad, reference in zip(needing, grads, references):
        assert grad.dtype == inputs[k].dtype and grad.shape == inputs[k].shape
        close_to_scale(grad, reference, narrowest)
    return outputs, grads


# ---- norms ---------------------------------------------------------------------------------------------------------


def norm(x, weight):
    module = DeepSeekR1RMSNorm(weight.shape[0], 1e-5)
    return F.rms_norm(x, weight.shape, weight, module.variance_epsilon)


@runs_kernels
@pytest.mark.parametrize("rows, width, dtype, weight_dtype, out_dtype", [
    (6, 64, FP32, FP32, None), (33, 40, FP32, FP32, None), (5, 704, BF16, FP32, BF16), (7, 96, BF16, BF16, None),
    (3, 1408, FP16, FP32, None), (2, 8192, BF16, BF16, None), (3, 24, FP32, FP32, BF16),
])  # fmt: skip
def test_kernel_rms_norm(rows, width, dtype, weight_dtype, out_dtype):
    fused = lambda x, weight: (blocks.fused_rms_norm(x, weight, 1e-5, out_dtype),)
    expected = out_dtype or torch.promote_types(dtype, weight_dtype)
    inputs = (random(rows, width, dtype=dtype), random(width, dtype=weight_dtype))
    check(fused, lambda x, weight: (norm(x, weight),), inputs, [expected])


@runs_kernels
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_kernel_rms_norm_of_a_slice_in_many_tiles(frozen, monkeypatch):
    monkeypatch.setattr(kernels_norms, "MULTIPROCESSORS", 1)  # 4 programs for 5 tiles: a program loops
    monkeypatch.setattr(kernels_norms, "BACKWARD_TILE", 64)
    leaf, weight = strided(2, 5, 20, after=12)[0], random(20)
    (leaf, weight)[frozen or 0].requires_grad_(frozen is None)
    fused = lambda leaf, weight: (blocks.fused_rms_norm(leaf[..., 4:24], weight, 1e-5),)
    outputs, grads = check(fused, lambda leaf, weight: (norm(leaf[..., 4:24], weight),), (leaf, weight))
    again = fused(leaf, weight)[0]
    assert torch.equal(again, outputs[0]) and outputs[0].is_contiguous()


@runs_kernels
@pytest.mark.parametrize("width, dtype, delta_dtype, out_dtype", [
    (40, FP32, FP32, None), (704, BF16, BF16, None), (96, FP32, BF16, BF16), (33, BF16, FP32, None),
])  # fmt: skip
def test_kernel_add_rms_norm(width, dtype, delta_dtype, out_dtype):
    fused = lambda *inputs: blocks.fused_add_rms_norm(*inputs, 1e-5, out_dtype)

    def plain(residual, delta, weight):
        total = residual + delta
        # rounded as the residual stream is, with the gradient of no rounding
        total = total + (total.to(dtype).float() - total).detach()
        return total, norm(total, weight)

    inputs = random(3, 4, width, dtype=dtype), random(3, 4, width, dtype=delta_dtype), random(width, dtype=dtype)
    check(fused, plain, inputs, [dtype, out_dtype or dtype])
    inputs[0].requires_grad_(False)
    check(fused, plain, inputs)
    check(fused, plain, (random(3, 4, width, dtype=dtype), inputs[1].detach(), inputs[2].detach()))
    total, normed = blocks.fused_add_rms_norm(*inputs, 1e-5, FP32)
    close(normed, norm(total.float(), inputs[2].float()))  # of what the stream keeps, not of the sum before rounding


@runs_kernels
@pytest.mark.parametrize("used", [0, 1])
def test_kernel_add_rms_norm_with_one_output_used(used):
    inputs = random(5, 24), random(5, 24, dtype=BF16), random(24)
    plain = lambda residual, delta, weight: (residual + delta, norm(residual + delta, weight))[used : used + 1]
    fused = lambda *inputs: blocks.fused_add_rms_norm(*inputs, 1e-5)[used : used + 1]
    if used == 0:  # the weight has no gradient then
        inputs[2].requires_grad_(False)
    check(fused, plain, inputs)


@runs_kernels
@pytest.mark.parametrize("dtype, out_dtype", [(FP32, None), (BF16, BF16), (FP32, BF16)])
def test_kernel_rms_norm_that_passes_its_input_on(dtype, out_dtype):
    """Both readers' gradients in one tensor; also with one of them alone."""
    inputs = random(5, 3, 40, dtype=dtype), random(40, dtype=dtype)
    fused = lambda x, weight: blocks.fused_add_rms_norm(x, None, weight, 1e-5, out_dtype)
    plain = lambda x, weight: (x, norm(x, weight))
    outputs, _ = check(fused, plain, inputs, [dtype, out_dtype or dtype])
    assert torch.equal(outputs[0], inputs[0])
    check(lambda *x: fused(*x)[1:], lambda *x: plain(*x)[1:], inputs, [out_dtype or dtype])
    (alone,) = torch.autograd.grad(fused(*inputs)[0].sum(), inputs[:1])
    assert torch.equal(alone, torch.ones_like(alone))


@runs_kernels
@pytest.mark.parametrize("dtype, rest", [(FP32, 8), (BF16, 16), (FP16, 1)])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_kernel_split_rms_norm(dtype, rest, frozen):
    inputs = random(2, 7, 24 + rest, dtype=dtype), random(24, dtype=dtype)
    inputs[frozen or 0].requires_grad_(frozen is None)
    plain = lambda x, weight: (norm(x[..., :24], weight), x[..., 24:])
    outputs, _ = check(lambda x, weight: blocks.fused_split_rms_norm(x, weight, 1e-5), plain, inputs)
    assert outputs[1]._is_view()
    twin = blocks.split_rms_norm_twin(*inputs, 1e-5)
    assert torch.equal(twin[1], outputs[1])
    close(outputs[0], twin[0].float())


@runs_kernels
@pytest.mark.parametrize("parts, width", [(1, 24), (255, 40), (528, 1024), (700, 17)])
def test_kernel_sum_of_parts(parts, width):
    partial = random(parts, width, needs=False)
    for dtype in (FP32, FP16):
        total = kernels_norms._sum_of_parts(partial, random(width, dtype=dtype))
        assert total.dtype == dtype and torch.equal(total, kernels_norms._sum_of_parts(partial, total))
        torch.testing.assert_close(total.float(), partial.sum(0), rtol=1e-3 if dtype == FP16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype, weight_dtype", [(FP32, FP32), (BF16, FP32), (BF16, BF16)])
def test_norm_twins_are_the_modules(dtype, weight_dtype, monkeypatch):
    monkeypatch.setattr(fused, "_enabled", False)
    module = DeepSeekR1RMSNorm(24, 1e-5).to(DEVICE, weight_dtype)
    module.weight.data.uniform_(0.5, 2.0)
    x, delta = random(5, 24, dtype=dtype), random(5, 24, dtype=dtype)
    assert torch.equal(blocks.rms_norm_twin(x, module.weight, 1e-5), module(x))
    total, normed = blocks.add_rms_norm_twin(x, delta, module.weight, 1e-5, BF16)
    assert torch.equal(total, x + delta) and torch.equal(normed, module(x + delta).to(BF16))


# ---- queries and keys ----------------------------------------------------------------------------------------------

SMALL = {"heads": 3, "nope": 24, "rope": 8, "value": 20}


def attention_inputs(heads, nope, rope, value, batch=2, seq=3, positions=1, dtype=FP32, angle_dtype=None):
    """q, kv, a leaf whose end is the rotary key, cos, sin; and the sizes."""
    angle = torch.randn(positions, seq, rope // 2) * 3
    cos, sin = (f(angle).to(DEVICE, angle_dtype or dtype) for f in (torch.cos, torch.sin))
    q, kv = (random(batch, seq, heads * (nope + last), dtype=dtype) for last in (rope, value))
    return (q, kv, strided(batch, seq, rope, dtype, before=16)[0], cos, sin), (nope, rope, value)


def both_ways(sizes, interleave, inplace=False):
    rope = sizes[1]

    def run(function, extra, q, kv, leaf, cos, sin):
        q = q * 1.0 if inplace else q
        return function(q, kv, leaf[..., -rope:], cos, sin, *sizes, interleave, *extra)

    return (
        lambda *inputs: run(blocks.fused_queries_keys, (inplace,), *inputs),
        lambda *inputs: run(blocks.queries_keys_twin, (), *inputs),
    )


@runs_kernels
@pytest.mark.parametrize("sizes, options, interleave, inplace", [
    (SMALL, {"positions": 2}, True, False), (SMALL, {"positions": 2}, False, True), (SMALL, {}, True, True),
    (SMALL, {"dtype": BF16}, True, True), (SMALL, {"dtype": BF16}, False, False),
    (SMALL, {"dtype": FP16, "angle_dtype": FP32}, True, False),
    ({"heads": 18, "nope": 128, "rope": 12, "value": 64}, {"batch": 1, "seq": 2}, True, True),
    ({"heads": 18, "nope": 128, "rope": 12, "value": 64}, {"batch": 1, "seq": 2}, False, False),
    ({"heads": 1, "nope": 4, "rope": 2, "value": 7}, {"positions": 2}, True, False),
])  # fmt: skip
def test_kernel_queries_keys(sizes, options, interleave, inplace):
    inputs, widths = attention_inputs(**sizes, **options)
    outputs, _ = check(*both_ways(widths, interleave, inplace), inputs)
    assert all(output.transpose(1, 2).is_contiguous() for output in outputs[:2])
    assert outputs[2].untyped_storage().data_ptr() == inputs[1].untyped_storage().data_ptr()


@runs_kernels
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_kernel_queries_keys_with_frozen_inputs(frozen):
    inputs, widths = attention_inputs(**SMALL)
    for k in frozen:
        inputs[k].requires_grad_(False)
    check(*both_ways(widths, True), inputs)


@runs_kernels
def test_kernel_queries_keys_takes_any_gradient():
    inputs, widths = attention_inputs(**SMALL)
    fused, plain = both_ways(widths, True)
    for pick in (lambda out: sum(x.sum() for x in out), lambda out: out[1].sum(),  # expanded; others not used
                 lambda out: (out[0].flatten(1) ** 2).sum() + (out[1].contiguous() ** 3).sum()):  # fmt: skip
        ours, theirs = (torch.autograd.grad(pick(f(*inputs)), inputs[:3], allow_unused=True) for f in (fused, plain))
        for result, reference in zip(ours, theirs):
            close_to_scale(result, torch.zeros_like(result) if reference is None else reference)


@runs_kernels
def test_kernel_queries_in_place():
    (q, kv, leaf, cos, sin), sizes = attention_inputs(**SMALL)
    arguments = (kv, leaf[..., -8:], cos, sin, *sizes, True, True)
    states, weight = random(2, 3, 10), random(q.shape[-1], 10)
    fresh = F.linear(states, weight)  # what a projection returns: no view for autograd
    queries, keys, _ = blocks.fused_queries_keys(fresh, *arguments)
    assert queries.untyped_storage().data_ptr() == fresh.untyped_storage().data_ptr()
    plain = blocks.queries_keys_twin(F.linear(states, weight), *arguments[:-1])
    ours, theirs = (torch.autograd.grad((a * b).square().sum(), (states, weight, leaf))
                    for a, b in ((queries, keys), plain[:2]))  # fmt: skip
    for result, reference in zip(ours, theirs):
        close_to_scale(result, reference)
    with pytest.raises(ValueError, match="inplace=True"):
        blocks.fused_queries_keys(q, *arguments)  # a leaf
    with pytest.raises(ValueError, match="view: True"):
        blocks.fused_queries_keys((q * 1.0).view(2, 3, -1), *arguments)
    saved = (q * 1.0).exp()  # its backward reads its own result
    queries, _, _ = blocks.fused_queries_keys(saved, *arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        queries.sum().backward()


@pytest.mark.parametrize("interleave", [True, False])
def test_queries_keys_twin_is_the_attention(interleave):
    config = tiny_config(rope_interleave=interleave)
    attention = DeepSeekR1LatentAttention(config, 0).to(DEVICE)
    states, seen = random(2, 5, config.hidden_size), {}
    for name in ("q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa"):
        getattr(attention, name).register_forward_hook(lambda *call, name=name: seen.__setitem__(name, call[2]))
    angle = torch.randn(2, 5, config.qk_rope_head_dim // 2, device=DEVICE)
    cos, sin = angle.cos(), angle.sin()
    queries = attention.project_queries(states)
    latent, key_rope = attention.compress(states)
    turned = rotate(queries[..., config.qk_nope_head_dim :], cos[:, None], sin[:, None], interleave)
    queries = torch.cat((queries[..., : config.qk_nope_head_dim], turned), dim=-1)
    expected = queries, *attention.expand(latent, rotate(key_rope, cos[:, None], sin[:, None], interleave))
    result = blocks.queries_keys_twin(
        seen["q_b_proj"], seen["kv_b_proj"], seen["kv_a_proj_with_mqa"][..., config.kv_lora_rank :], cos, sin,
        config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, interleave,
    )  # fmt: skip
    for output, reference in zip(result, expected, strict=True):
        assert torch.equal(output, reference)


# ---- SwiGLU --------------------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("rows, width, dtype", [(5, 24, FP32), (20, 300, FP32), (3, 1408, BF16), (4, 704, FP16)])
@pytest.mark.parametrize("packed", [True, False])
def test_kernel_swiglu(rows, width, dtype, packed):
    plain = lambda gate, up: (F.silu(gate) * up,)
    if packed:
        check(lambda x: (blocks.fused_swiglu_packed(x),), lambda x: plain(*x.chunk(2, dim=-1)),
              [random(rows, 2 * width, dtype=dtype)])  # fmt: skip
        return
    fused = lambda gate, up: (blocks.fused_swiglu(gate, up),)
    inputs = [random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)]
    check(fused, plain, inputs)
    for frozen in inputs:
        check(fused, plain, [x.detach().requires_grad_(x is not frozen) for x in inputs])
    halves = lambda f: lambda x: f(*x.chunk(2, dim=-1))
    check(halves(fused), halves(plain), [random(rows, 2 * width, dtype=dtype)])


@runs_kernels
@pytest.mark.parametrize("rows, width, dtype", [(5, 24, FP32), (20, 300, FP32), (3, 1408, BF16)])
def test_kernel_swiglu_gives_its_output_again(rows, width, dtype):
    """In the gradient's place, with the same gradients and to the bit the forward's numbers."""
    gate_up, grad = random(rows, 2 * width, dtype=dtype, needs=False), random(rows, width, dtype=dtype, needs=False)
    results = []
    for output in (None, grad):
        halves = [torch.empty_like(grad) for _ in range(2)]
        kernels_norms.swiglu_backward(grad, *gate_up.chunk(2, dim=-1), *halves, output)
        results.append(halves)
    assert all(torch.equal(first, second) for first, second in zip(*results))
    assert torch.equal(grad, kernels_norms.swiglu_forward(*gate_up.chunk(2, dim=-1)))


# ---- linear layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_two_linears_are_two(dtype, used):
    inputs = [random(2, 5, 16, dtype=dtype), random(24, 16, dtype=dtype), random(12, 16, dtype=dtype)]
    pick = lambda outputs: tuple(outputs[k] for k in used)
    plain = lambda x, *weights: pick([F.linear(x, weight) for weight in weights])
    fused = lambda *x: pick(linears.fused_two_linears(*x))
    assert all(torch.equal(mine, other) for mine, other in zip(fused(*inputs), plain(*inputs)))
    for frozen in (None, 0, 1 + used[0]):
        inputs = [x.detach().requires_grad_(k != frozen and (k == 0 or k - 1 in used)) for k, x in enumerate(inputs)]
        check(fused, plain, inputs)
    assert not fused(*inputs)[0]._is_view()  # else queries could not be turned in place


@runs_kernels
def test_attention_with_one_gradient_for_its_states(monkeypatch):
    """Against the modules called one by one, with and without compressed queries."""
    monkeypatch.setattr(fused, "_enabled", True)
    for rank in (None, 12):
        config = tiny_config(q_lora_rank=rank)
        attention = DeepSeekR1LatentAttention(config, 0).to(DEVICE)
        for parameter in attention.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        inputs = random(2, 5, config.hidden_size), *attention.parameters()
        results = []
        for function in (attention.project_fused, attention.project):
            outputs = function(inputs[0])
            grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs, allow_unused=True)
            results.append((outputs, grads))
        for mine, other in zip(results[0][0], results[1][0]):
            close(mine, other)
        for mine, other in zip(results[0][1], results[1][1]):
            assert (mine is None) == (other is None)  # o_proj
            if mine is not None:
                close_to_scale(mine, other)


# ---- all -----------------------------------------------------------------------------------------------------------


def block(x, weight, kv, cos, sin):
    """All four in a row, as a layer uses them."""
    total, normed = blocks.fused_add_rms_norm(x, blocks.fused_rms_norm(x, weight, 1e-6), weight, 1e-6)
    out = blocks.fused_queries_keys(normed * 2.0, kv, total[..., :8], cos, sin, 24, 8, 20, True, inplace=True)
    return blocks.fused_swiglu(out[0], out[1]).sum((1, 3)) + blocks.fused_swiglu_packed(out[2]).sum((1, 3))


@runs_kernels
@pytest.mark.parametrize("reentrant", [True, False])
def test_kernel_gradients_through_checkpoints_repeat(reentrant):
    (q, kv, _, cos, sin), _ = attention_inputs(**SMALL)
    inputs = (q, random(96), kv)
    runs = [
        torch.autograd.grad(run.square().sum(), inputs)
        if not reentrant or k < 2
        else _gradients_by_backward(run.square().sum(), inputs)
        for k, run in enumerate((
            block(*inputs, cos, sin), block(*inputs, cos, sin),
            checkpoint(block, *inputs, cos, sin, use_reentrant=reentrant),
        ))
    ]  # fmt: skip
    for first, second, third in zip(*runs):
        assert torch.equal(first, second) and torch.equal(first, third)


def _gradients_by_backward(loss, inputs):
    loss.backward()
    return [x.grad for x in inputs]


@runs_kernels
def test_kernel_functions_take_no_rows():
    x, weight = random(0, 24), random(24)
    total, normed = blocks.fused_add_rms_norm(x, blocks.fused_rms_norm(x, weight, 1e-6), weight, 1e-6)
    swiglu = blocks.fused_swiglu(total, normed), blocks.fused_swiglu_packed(total)
    (inputs, sizes) = attention_inputs(**SMALL, seq=0)
    outputs = both_ways(sizes, True)[0](*inputs)
    grads = torch.autograd.grad([y.sum() for y in (*swiglu, *outputs)], (x, weight, *inputs[:3]))
    assert [g.shape for g in grads] == [y.shape for y in (x, weight, *inputs[:3])] and not grads[1].any()


@pytest.mark.parametrize("call, message", [
    (lambda x: blocks.fused_rms_norm(x, x[0, 0, :3], 1e-6), "one number for each channel"),
    (lambda x: blocks.fused_add_rms_norm(x, x[:1], x[0, 0], 1e-6), r"delta \(1, 3, 8\)"),
    (lambda x: blocks.fused_split_rms_norm(x, x[0, 0], 1e-6), "more channels"),
    (lambda x: blocks.fused_swiglu(x, x[..., :4]), r"up \(2, 3, 4\)"),
    (lambda x: blocks.fused_swiglu_packed(x[..., :7]), "even width"),
    (lambda x: blocks.fused_queries_keys(x, x, x[..., :4], x[..., :2], x[..., :2], 4, 4, 5, True), "value=5"),
    (lambda x: blocks.fused_queries_keys(x, x, x[..., :3], x[..., :1], x[..., :1], 5, 3, 5, True), "rope=3"),
    (lambda x: blocks.fused_queries_keys(x, x, x[..., :4], x[:, :1, :2], x[:, :1, :2], 4, 4, 4, True), r"cos \(2, 1"),
])  # fmt: skip
def test_errors_name_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(random(2, 3, 8))
