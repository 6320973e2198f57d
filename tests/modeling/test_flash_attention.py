"""FlashAttention-4 and other flash attentions of the library: who is called with what, and that documents stay apart.

Plain loops that check their arguments stand in for the package; the `gpu` tests need the real one.
"""

import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch
import transformers.modeling_flash_attention_utils as library

from modeling_deepseek_r1 import flash_attention
from modeling_deepseek_r1.documents import Documents

from .helpers import close, gradients, padded, random_ids, tiny_model

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
library_functions = flash_attention.ALL_ATTENTION_FUNCTIONS
ROWS, LENGTH, HEADS = 2, 11, 4
NOPE, ROPE, VALUE = 12, 4, 8  # multiples of 8, values narrower than keys
SIZES = dict(qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE)
STARTS = [0, 3, 7]  # of three documents in the first row; the second is one
BOUNDS = [0, 3, 7, 11, 22]


def row_by_row(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    """`flash_attn_func`: q (B, Q, H, d), k (B, S, H, d), v (B, S, H, v), the last query at the last key -> (B, Q, H, v)
    and log-sum-exps (B, H, Q)."""
    assert q.shape[::3] == k.shape[::3] and k.shape[:-1] == v.shape[:-1] and q.shape[2] == k.shape[2]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    if causal:
        later = torch.ones(q.shape[1], k.shape[1]).triu(1 + k.shape[1] - q.shape[1])
        scores = scores.masked_fill(later.bool(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


class Kernels:
    """In the place of the package: keeps (which function, width of values, bounds, keyword arguments) of every call."""

    def __init__(self):
        self.calls = []

    def dense(self, q, k, v, softmax_scale=None, causal=False, deterministic=False):
        self.calls.append(("dense", v.shape[-1], None, dict(scale=softmax_scale, deterministic=deterministic)))
        assert causal and q.dim() == 4
        return row_by_row(q, k, v, softmax_scale, causal)

    def variable(
        self, q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, deterministic=False,
    ):  # fmt: skip
        bounds = cu_seqlens_q.tolist()
        self.calls.append(("variable", v.shape[-1], bounds, dict(scale=softmax_scale, deterministic=deterministic)))
        assert causal and q.dim() == 3 and bounds == cu_seqlens_k.tolist() and bounds[-1] == len(q) == len(v)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(bounds, bounds[1:]))
        parts = [row_by_row(*(x[a:b].unsqueeze(0) for x in (q, k, v)), softmax_scale, causal)[0][0]
                 for a, b in zip(bounds, bounds[1:])]  # fmt: skip
        return torch.cat(parts)


@pytest.fixture
def kernels(monkeypatch):
    """Plain loops as flash-attn-4 and behind every flash attention of the library, in fp32 so that results compare."""
    kernels = Kernels()
    package, module = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    module.flash_attn_func, module.flash_attn_varlen_func = kernels.dense, kernels.variable
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    monkeypatch.setattr(flash_attention, "DTYPES", (torch.float32,))
    functions = kernels.dense, kernels.variable, None, library._pad_input, library._unpad_input
    process = library._lazy_define_process_function(kernels.variable)
    monkeypatch.setattr(library, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, (process, dict)))
    return kernels


def flash_model(implementation="flash_attention_4", **changes):
    """Named in the config alone: `set_attn_implementation` would look for the package and a GPU."""
    model = tiny_model(implementation="sdpa", **SIZES, **changes)
    model.config._attn_implementation = implementation
    return model


def step(model, ids, implementation, autocast=False, **inputs):
    """-> loss and gradients of a training step."""
    model.config._attn_implementation = implementation
    model.train().zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=inputs.pop("labels", ids), **inputs).loss
    loss.backward()
    return loss.detach(), {name: grad.clone() for name, grad in gradients(model).items()}


def assert_same_step(model, ids, implementation, **inputs):
    expected = step(model, ids, "sdpa", **inputs)
    loss, found = step(model, ids, implementation, **inputs)
    close(loss, expected[0])
    assert found.keys() == expected[1].keys()
    for name, gradient in found.items():
        close(gradient, expected[1][name], rtol=1e-3, msg=name)  # sums in another order, behind four layers


def packed_positions():
    first = [position - max(s for s in STARTS if s <= position) for position in range(LENGTH)]
    return torch.tensor([first, list(range(LENGTH))])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_whole_rows_go_to_the_kernels_unpadded(kernels, checkpointing):
    model = flash_model(num_nextn_predict_layers=1)
    if checkpointing:
        model.activation_checkpointing_enable()
    assert_same_step(model, random_ids(ROWS, LENGTH), "flash_attention_4")
    scale, passes = model.model.layers[0].self_attn.scaling, 1 + checkpointing
    assert math.isclose(scale, (NOPE + ROPE) ** -0.5)
    call = "dense", VALUE, None, dict(scale=scale, deterministic=False)
    assert kernels.calls == [call] * len(model.model.layers) * passes


def test_documents_go_by_their_bounds(kernels):
    model = flash_model(num_nextn_predict_layers=1)
    assert_same_step(model, random_ids(ROWS, LENGTH), "flash_attention_4", position_ids=packed_positions())
    assert [call[:3] for call in kernels.calls] == [("variable", VALUE, BOUNDS)] * len(model.model.layers)


def test_one_row_with_the_bounds_that_a_collator_gives(kernels):
    """As TRL's padding-free batches come; rows that are one document each need no bounds."""
    model, bounds = flash_model(), torch.tensor(BOUNDS, dtype=torch.int32)
    ids, positions = random_ids(1, ROWS * LENGTH), packed_positions().view(1, -1)
    offsets = Documents(bounds, LENGTH).as_arguments()
    assert_same_step(model, ids, "flash_attention_4", position_ids=positions, **offsets)
    assert [call[:3] for call in kernels.calls] == [("variable", VALUE, BOUNDS)] * len(model.model.layers)
    kernels.calls.clear()
    step(model, random_ids(ROWS, LENGTH), "flash_attention_4", position_ids=torch.arange(LENGTH).unsqueeze(0))
    assert {call[0] for call in kernels.calls} == {"dense"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_through_the_library(kernels, side):
    model = flash_model()
    ids, mask, labels = padded(random_ids(ROWS, LENGTH), side)
    assert_same_step(model, ids, "flash_attention_4", attention_mask=mask, labels=labels)
    assert [call[:3] for call in kernels.calls] == [("variable", NOPE + ROPE, [0, 11, 18])] * len(model.model.layers)


def test_generation_with_a_cache(kernels):
    model, ids = flash_model(), random_ids(ROWS, LENGTH)
    with torch.no_grad():
        first = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits
        names = [call[0] for call in kernels.calls]
        model.config._attn_implementation = "eager"
        close(last, model(ids).logits[:, -1:])
    assert names == ["dense"] * 2 * len(model.model.layers)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "kernels-community/flash-attn4"])
def test_every_flash_attention_keeps_the_documents_of_several_rows_apart(kernels, monkeypatch, implementation):
    """The library by itself looks for documents in a batch of one row only."""
    model = flash_model(implementation)
    monkeypatch.setitem(library_functions, implementation, library_functions["flash_attention_2"])
    assert_same_step(model, random_ids(ROWS, LENGTH), implementation, position_ids=packed_positions())
    assert [call[:3] for call in kernels.calls] == [("variable", NOPE + ROPE, BOUNDS)] * len(model.model.layers)


def test_who_replaces_the_librarys_function_is_called(kernels, monkeypatch):
    model, called = flash_model(), []

    def own(module, query, key, value, attention_mask, **kwargs):
        called.append(kwargs["cu_seq_lens_q"].tolist())
        return torch.zeros_like(value).transpose(1, 2), None

    monkeypatch.setitem(library_functions, "flash_attention_4", own)
    step(model, random_ids(ROWS, LENGTH), "flash_attention_4", position_ids=packed_positions())
    assert called == [BOUNDS] * len(model.model.layers) and not kernels.calls


@pytest.mark.parametrize("by", ["torch", "environment"])
def test_a_fixed_order_of_sums_where_it_is_asked_for(kernels, monkeypatch, by):
    if by == "torch":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    step(flash_model(), random_ids(), "flash_attention_4")
    assert all(call[3]["deterministic"] for call in kernels.calls) and kernels.calls


# ---- errors --------------------------------------------------------------------------------------------------------


def parts(width=16, value=8, dtype=torch.bfloat16):
    return *(torch.zeros(1, 2, 5, width, dtype=dtype) for _ in range(2)), torch.zeros(1, 2, 5, value, dtype=dtype)


@pytest.mark.parametrize("arguments, dropout, message", [
    ({"width": 12}, 0.0, r"qk_nope_head_dim \+ qk_rope_head_dim=12 and v_head_dim=8 must be multiples of 8"),
    ({"width": 264}, 0.0, "up to 256"), ({"value": 6}, 0.0, "v_head_dim=6"),
    ({"dtype": torch.float32}, 0.0, "are float32: load weights in bfloat16"), ({}, 0.1, "attention_dropout=0.1"),
])  # fmt: skip
def test_what_the_kernels_do_not_take(arguments, dropout, message):
    with pytest.raises(ValueError, match=message):
        flash_attention.flash_attention_4(*parts(**arguments), 1.0, dropout=dropout)


def test_dropout_is_refused_in_training_alone(kernels):
    model = flash_model(attention_dropout=0.1)
    with torch.no_grad():
        model(random_ids())
    with pytest.raises(ValueError, match="attention_dropout=0.1"):
        step(model, random_ids(), "flash_attention_4")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="needs the package flash-attn-4"):
        flash_attention.flash_attention_4(*parts(), 1.0)


@pytest.mark.skipif(bool(importlib.util.find_spec("flash_attn")), reason="the package is there")
def test_choosing_it_without_the_package_fails_at_once():
    with pytest.raises(ImportError, match="FlashAttention4"):
        tiny_model(**SIZES).set_attn_implementation("flash_attention_4")


# ---- the real kernels ----------------------------------------------------------------------------------------------


def needs_the_kernels(test):
    reason = "FlashAttention-4's backward pass needs a Hopper GPU or newer"
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason=reason)(test))


@needs_the_kernels
@pytest.mark.parametrize("documents", [False, True])
def test_a_training_step_on_a_gpu(documents):
    """At the released widths under autocast: as near to the fp32 step as torch's attention is, on the same routes."""
    pytest.importorskip("flash_attn.cute")
    model = tiny_model(
        implementation="sdpa", qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, hidden_size=64,
        moe_intermediate_size=32, max_position_embeddings=256,
    ).cuda()  # fmt: skip
    ids, config = random_ids(2, 200).cuda(), model.config
    routes = torch.rand(*ids.shape, len(model.routers), config.n_routed_experts, device="cuda").argsort(-1)
    inputs = {"routes": routes[..., : config.num_experts_per_tok]}
    if documents:
        first = torch.cat((torch.arange(3), torch.arange(120), torch.arange(77)))
        inputs["position_ids"] = torch.stack((first, torch.arange(200))).cuda()
    exact = step(model, ids, "sdpa", **inputs)
    near = step(model, ids, "sdpa", autocast=True, **inputs)
    model.set_attn_implementation("flash_attention_4")  # as a user would: the library looks for package and GPU
    found = step(model, ids, "flash_attention_4", autocast=True, **inputs)
    assert abs(found[0] - exact[0]) <= 2 * abs(near[0] - exact[0]) + 0.01
    for name, wanted in exact[1].items():
        error, allowed = ((each[1][name].float() - wanted).norm() for each in (found, near))
        assert error <= 2 * allowed + 0.02 * wanted.norm(), f"{name}: {error} against {allowed}, {wanted.norm()}"


@needs_the_kernels
@pytest.mark.parametrize("length", [1024, 1000])
@pytest.mark.parametrize("documents", [False, True])
def test_the_kernels_on_a_gpu(documents, length):
    """bf16 at the released widths, against fp32 math: no farther than twice torch's own bf16 math under a mask."""
    pytest.importorskip("flash_attn.cute")
    inputs = [torch.randn(2, length, 3, width, device="cuda") for width in (192, 192, 256)]
    grad = torch.randn(2, length, 3, 128, device="cuda")
    bounds = [0, 5, 300, 301, length, length + 700, 2 * length] if documents else [0, length, 2 * length]
    bounds = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    found = Documents(bounds, int(bounds.diff().max())) if documents else None
    place = torch.arange(2 * length, device="cuda").view(2, length)
    belongs = torch.bucketize(place.int(), bounds, right=True)
    mask = (belongs.unsqueeze(2) == belongs.unsqueeze(1)) & (place.unsqueeze(2) >= place.unsqueeze(1))

    def run(dtype, attend):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        queries, keys, both = (x.transpose(1, 2) for x in leaves)
        output = attend(queries, keys, both[..., 128:])  # values as a slice, as kv_b_proj gives them
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    def plain(queries, keys, values):
        scores = (queries @ keys.transpose(2, 3) * 0.1).masked_fill(~mask.unsqueeze(1), -torch.inf)
        return (scores.softmax(-1) @ values).transpose(1, 2)

    exact = run(torch.float32, plain)
    rounded = run(torch.bfloat16, plain)
    fused = run(torch.bfloat16, lambda *x: flash_attention.flash_attention_4(*x, 0.1, found))
    for name, wanted, near, ours in zip(("output", "queries", "keys", "values"), exact, rounded, fused):
        error, allowed = ((x.float() - wanted).norm() for x in (ours, near))
        assert error <= 2 * allowed, f"{name}: {error} against {allowed}, {wanted.norm()}"
