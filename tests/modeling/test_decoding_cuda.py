"""The fast path on a GPU: kernels and graphs inside `generate`, against the library's loop on the same model."""

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from modeling_deepseek_r1.decoding_fused import KernelStep

from .helpers import padded, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDE = dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=96, num_attention_heads=8,
            num_key_value_heads=8, n_routed_experts=32, n_group=4, topk_group=2, num_experts_per_tok=4, q_lora_rank=64,
            kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, vocab_size=800,
            max_position_embeddings=4096, initializer_range=0.1)  # fmt: skip


def model_on_gpu(dtype=torch.float32, **changes):
    torch.manual_seed(1)
    return tiny_model(implementation="sdpa", **{**WIDE, **changes}).to("cuda", dtype)


def prompts(rows, width=30):
    ids = torch.randint(3, 800, (rows, width), generator=torch.Generator().manual_seed(rows))
    ids, mask, _ = padded(ids, "left", [(5 * row) % (width - 2) for row in range(rows)])
    return ids.cuda(), mask.cuda()


def tokens_of(model, ids, mask, **options):
    set_seed(5)
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0,
                                                       **options})  # fmt: skip


def by_the_library(model, ids, mask, **options):
    model.decoding.enabled = False
    tokens = tokens_of(model, ids, mask, **options)
    model.decoding.enabled = True
    return tokens


@pytest.mark.parametrize("rows", [1, 3, 7, 20, 70])
@pytest.mark.parametrize("graphs", [False, True])
def test_greedy_tokens_equal_the_librarys(rows, graphs):
    model = model_on_gpu()
    model.decoding.graphs = graphs
    ids, mask = prompts(rows)
    options = {"eos_token_id": list(range(3, 60)), "repetition_penalty": 1.1}
    tokens = tokens_of(model, ids, mask, **options)
    assert type(model.decoding_engine.step) is KernelStep and bool(model.decoding_engine.batches) == graphs
    assert torch.equal(tokens, by_the_library(model, ids, mask, **options))


@pytest.mark.parametrize("changes", [
    {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}, {"n_routed_experts": None},
    {"n_shared_experts": 0, "q_lora_rank": None, "n_group": 1, "topk_group": 1}, {"rope_interleave": False},
    {"kv_lora_rank": 80, "qk_rope_head_dim": 12, "moe_intermediate_size": 40},
], ids=str)  # fmt: skip
def test_every_kind_of_model(changes):
    model = model_on_gpu(**changes)
    ids, mask = prompts(5)
    assert torch.equal(tokens_of(model, ids, mask), by_the_library(model, ids, mask))
    assert type(model.decoding_engine.step) is KernelStep


def test_one_graph_serves_every_length_and_setting():
    model, first = model_on_gpu(), None
    for width, new, temperature in ((4, 8, 0.7), (900, 12, 1.3), (30, 600, 0.2)):
        ids, mask = prompts(3, width)
        tokens_of(model, ids, mask, max_new_tokens=new, do_sample=True, temperature=temperature, top_k=50)
        kinds = {key: id(batch.graph) for key, batch in model.decoding_engine.batches.items() if key[0] == 3}
        first = first or kinds
        assert kinds == first and len(kinds) == 1
    ids, mask = prompts(3, 900)
    assert torch.equal(tokens_of(model, ids, mask), by_the_library(model, ids, mask))


def test_weights_changed_in_place_need_no_new_graph():
    model, other = model_on_gpu(), model_on_gpu()
    ids, mask = prompts(3)
    tokens_of(model, ids, mask)
    graphs = {key: id(batch.graph) for key, batch in model.decoding_engine.batches.items()}
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters()):
            theirs.copy_(torch.randn_like(theirs) * mine.std() + mine.mean())
            mine.copy_(theirs)
    assert torch.equal(tokens_of(model, ids, mask), by_the_library(other, ids, mask))
    assert graphs == {key: id(batch.graph) for key, batch in model.decoding_engine.batches.items()}


def test_logits_in_bf16_are_near_those_of_the_expanded_form():
    """By the median row: where rounding makes two experts change places (2 rows of 32 on a CPU), a row parts by 0.1 to
    0.4, whichever form is the better one."""
    model = model_on_gpu(torch.bfloat16)
    ids, mask = prompts(16, 700)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2, "min_new_tokens": 2}

    def errors(ours, theirs):
        return (ours.float() - theirs.float()).norm(dim=-1) / theirs.float().norm(dim=-1)

    for dtype in ("auto", "fp8"):
        model.decoding.cache_dtype = dtype
        ours, theirs = tokens_of(model, ids, mask, **options), by_the_library(model, ids, mask, **options)
        assert errors(ours.logits[0], theirs.logits[0]).median() < 0.02     # the prompt, expanded in both
        same = ours.sequences[:, -2] == theirs.sequences[:, -2]             # the token that the second step is given
        assert same.sum() >= 12
        assert errors(ours.logits[1], theirs.logits[1])[same].median() < (0.03 if dtype == "auto" else 0.15)


def test_fp32_masters_under_autocast_decode_from_bf16_copies():
    model = model_on_gpu()
    ids, mask = prompts(3)
    twin = model_on_gpu(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        tokens = tokens_of(model, ids, mask)
        step = model.decoding_engine.step
        assert type(step) is KernelStep and step.dtype == torch.bfloat16 and step.copies
        with torch.no_grad():
            model.lm_head.weight.neg_()                                      # the copies are read anew
        assert not torch.equal(tokens_of(model, ids, mask), tokens)
        model.lm_head.weight.data.neg_()
        assert torch.equal(tokens_of(model, ids, mask), tokens)
    same = (tokens_of(twin, ids, mask)[:, 30:36] == tokens[:, 30:36]).float().mean()
    assert same > 0.6                                                        # rounding moves near ties


def test_adapters_decode_by_modules_inside_a_graph():
    model = model_on_gpu()
    ids, mask = prompts(3)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["kv_b_proj", "q_a_proj", "o_proj"],
                                               init_lora_weights=False)).eval()  # fmt: skip
    tokens = tokens_of(adapted, ids, mask)
    assert type(model.decoding_engine.step) is not KernelStep and model.decoding_engine.batches
    assert torch.equal(tokens, by_the_library(model, ids, mask))


def test_sampling_follows_the_distribution():
    model = model_on_gpu(vocab_size=12)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    ids = torch.randint(3, 12, (1, 6), device="cuda").expand(4096, -1)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": True, "temperature": 0.8, "top_k": 8}
    tokens = tokens_of(model, ids, torch.ones_like(ids), **options)[:, 6:]
    with torch.no_grad():
        first = tokens[:, 0].mode().values
        chosen = tokens[tokens[:, 0] == first, 1]
        logits = model(torch.cat((ids[:1], first.view(1, 1)), dim=1)).logits[0, -1] / 0.8
    logits[2] = -torch.inf                                                   # min_new_tokens keeps the end away
    logits[logits < logits.topk(8).values[-1]] = -torch.inf
    expected = logits.softmax(-1) * len(chosen)
    observed = chosen.bincount(minlength=12)
    assert observed[expected == 0].sum() == 0 and len(chosen) > 300
    used = expected > 0
    chi_square = ((observed[used] - expected[used]).square() / expected[used]).sum()
    assert chi_square < 30                                                   # 7 degrees of freedom: p = 1e-4


def test_seeds_reproduce_and_differ():
    model = model_on_gpu()
    ids, mask = prompts(4)
    runs = [tokens_of(model, ids, mask, do_sample=True, top_p=0.9) for _ in range(3)]
    torch.manual_seed(6)
    other = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=True, top_p=0.9, pad_token_id=0)
    assert torch.equal(runs[1], runs[2]) and torch.equal(runs[0], runs[1]) and not torch.equal(other, runs[1])


@pytest.mark.parametrize("drafts, rows", [(1, 1), (2, 5), (1, 20)])
def test_drafting_gives_the_same_tokens(drafts, rows):
    model = model_on_gpu(num_nextn_predict_layers=1)
    ids, mask = prompts(rows)
    model.decoding.drafts = drafts
    options = {"eos_token_id": list(range(3, 20))}
    tokens = tokens_of(model, ids, mask, use_mtp=True, **options)
    assert model.decoding_statistics["drafted"] > 0
    assert torch.equal(tokens, by_the_library(model, ids, mask, **options))


def test_generate_batch_equals_generate():
    model = model_on_gpu()
    model.decoding.batch_slots = 12
    generator = torch.Generator().manual_seed(0)
    requests = [torch.randint(3, 800, (n,), generator=generator).tolist() for n in torch.randint(1, 90, (60,)).tolist()]
    found = model.generate_batch(requests, max_new_tokens=40, do_sample=False, eos_token_id=list(range(3, 20)))
    assert [found[f"req_{i}"].prompt_ids for i in range(60)] == requests
    for i in range(0, 60, 7):
        ids = torch.tensor([requests[i]], device="cuda")
        alone = by_the_library(model, ids, torch.ones_like(ids), max_new_tokens=40, eos_token_id=list(range(3, 20)))
        assert found[f"req_{i}"].generated_tokens == alone[0, ids.shape[1] :].tolist()


def test_routes_and_log_probs_are_recorded_in_graphs():
    model = model_on_gpu()
    ids, mask = prompts(5)
    model.decoding.record_routes = model.decoding.record_log_probs = True
    tokens = tokens_of(model, ids, mask, do_sample=True, min_new_tokens=24)
    record = model.decoding_record
    full = torch.cat((mask, mask.new_ones(5, 24)), dim=1)
    found = []
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda module, given, output: found.append(output[2]))
    with torch.no_grad():
        logits = model(tokens, attention_mask=full, position_ids=(full.cumsum(-1) - 1).clamp(min=0)).logits
    routes = torch.stack(found, dim=1).view(5, tokens.shape[1], 2, 4).sort(-1).values[:, :-1]
    same = (record.routes.sort(-1).values == routes)[full[:, :-1].bool()].float().mean()
    assert same > 0.999
    expected = logits.log_softmax(-1)[:, 29:-1].gather(-1, tokens[:, 30:, None]).squeeze(-1)
    torch.testing.assert_close(record.log_probs, expected, atol=1e-3, rtol=1e-3)


def test_the_cache_is_gone_and_graphs_are_small():
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = model_on_gpu()
    ids, mask = prompts(64, 500)
    tokens_of(model, ids, mask)
    torch.cuda.synchronize()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert model.decoding_engine.cache is None
    assert torch.cuda.memory_allocated() - before < weights + 150 * 2**20
    del model
    assert torch.cuda.memory_allocated() - before < 100 * 2**20               # without a look by the garbage collector
