"""What a user may do around `generate`, and what the fast path must not make of it: hooks, threads, modes, copies."""

import copy
import gc
import threading
import types
import weakref

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface, LogitsProcessor, MaxLengthCriteria, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM
from modeling_deepseek_r1.attention import eager_attention_forward
from modeling_deepseek_r1.decoding_cache import PrefillView
from modeling_deepseek_r1.decoding_options import DecodingOptions

from .helpers import VOCAB, library_twin, padded, random_ids, tiny_config
from .test_decoding import fast_model, no_library_loop, tokens_of  # noqa: F401


def without_fast_path(model, ids, **options):
    model.decoding.enabled = False
    tokens = tokens_of(model, ids, **options)
    model.decoding.enabled = True
    return tokens


# ---------------------------------------------------------------- what changes the model's sums


def shifted(module, given, output):
    steer = lambda states: states + torch.linspace(-2, 2, states.shape[-1])
    return (steer(output[0]), *output[1:]) if isinstance(output, tuple) else steer(output)


@pytest.mark.parametrize("place", ["layers.1", "layers.0.self_attn.kv_b_proj", "layers.1.mlp.experts", "norm"])
def test_hooks_on_any_module_act(place):
    model, ids = fast_model(), random_ids(2, 7)
    twin, plain = library_twin(model), tokens_of(model, ids)
    for each in (model, twin):
        each.model.get_submodule(place).register_forward_hook(shifted)
    tokens = tokens_of(model, ids)
    assert torch.equal(tokens, tokens_of(twin, ids)) and not torch.equal(tokens, plain)


def test_hooks_on_all_modules_act():
    model, ids, seen = fast_model(), random_ids(1, 7), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        tokens_of(model, ids, max_new_tokens=4)
    finally:
        handle.remove()
    assert seen.count("DeepSeekR1DecoderLayer") == 3 * 4


def test_recording_hidden_states_once_leaves_the_fast_path_as_it_is(no_library_loop):  # noqa: F811
    model, ids = fast_model(), random_ids(1, 7)
    expected = tokens_of(model, ids)
    with torch.no_grad():
        model(ids, output_hidden_states=True)  # installs hooks that stay
    model.enable_input_require_grads()
    assert torch.equal(tokens_of(model, ids), expected)
    assert len(model.decoding_engine.step.single_token) == 3


class Louder(DeepSeekR1ForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + 0.2 * torch.arange(VOCAB)
        return outputs


class Otherwise(DeepSeekR1ForCausalLM):
    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        self.updates = getattr(self, "updates", 0) + 1
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)


def test_methods_of_a_subclass_and_of_an_instance_are_called():
    model, ids = fast_model(), random_ids(2, 7)
    plain = tokens_of(model, ids)
    model.__class__ = Louder
    louder = tokens_of(model, ids)
    assert torch.equal(louder, without_fast_path(model, ids)) and not torch.equal(louder, plain)
    model.__class__ = Otherwise
    assert torch.equal(tokens_of(model, ids), plain) and model.updates == 12
    model.__class__ = DeepSeekR1ForCausalLM
    model.forward = types.MethodType(lambda self, input_ids=None, **kwargs: Louder.forward(self, input_ids, **kwargs),
                                     model)  # fmt: skip
    with pytest.raises(TypeError, match="super"):  # the instance is no Louder: its own forward was called
        tokens_of(model, ids)


def test_accelerates_autocast_keeps_the_fast_path(no_library_loop):  # noqa: F811
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(fast_model())
    assert "forward" in vars(model)
    tokens_of(model, random_ids(2, 7))
    assert model.decoding_engine.step.dtype == torch.bfloat16


def test_a_prompt_of_peft_is_not_forgotten():
    model, ids = fast_model(), random_ids(2, 7)
    plain = tokens_of(model, ids)
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    nn.init.normal_(prompted.prompt_encoder.default.embedding.weight)
    run = lambda: prompted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                                    do_sample=False, pad_token_id=0)  # fmt: skip
    tokens = run()
    model.decoding.enabled = False
    assert torch.equal(tokens, run()) and not torch.equal(tokens, plain)


def test_the_adapters_that_act_are_seen_and_part_of_what_a_graph_depends_on(no_library_loop):  # noqa: F811
    model, ids = fast_model(), random_ids(2, 7)
    plain, keys = tokens_of(model, ids), []
    lora = LoraConfig(r=4, target_modules=["q_b_proj", "kv_b_proj"], target_parameters=["experts.gate_up_proj"],
                      init_lora_weights=False)  # fmt: skip
    adapted = get_peft_model(model, lora).eval()

    def run():
        tokens = tokens_of(adapted, ids)
        keys.append(model.decoding_engine.step_key)
        return tokens

    tokens = run()
    assert torch.equal(tokens, run()) and keys[0] == keys[1] and not torch.equal(tokens, plain)
    with adapted.disable_adapter():
        assert torch.equal(run(), plain)
    adapted.add_adapter("other", LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    adapted.set_adapter("other")
    other = run()
    adapted.set_adapter("default")
    assert torch.equal(run(), tokens) and not torch.equal(other, tokens)
    assert len(set(keys[1:])) == 4  # adapted, disabled, other, adapted with another one loaded


class Packed(nn.Module):
    """A linear layer as a quantised one may be: no parameter, no `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("packed", linear.weight.detach().clone())

    def forward(self, states):
        return states @ self.packed.t()


@pytest.mark.parametrize("name", ["q_a_proj", "kv_b_proj"])
def test_layers_without_a_weight_are_called(name, no_library_loop):  # noqa: F811
    model, ids = fast_model(), random_ids(1, 7)
    expected = tokens_of(model, ids)
    for layer in model.model.layers:
        setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    assert torch.equal(tokens_of(model, ids), expected)
    cached = model(ids, use_cache=True).past_key_values
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cached)


def test_a_bias_on_the_up_projection_counts():
    model, ids = fast_model(), random_ids(2, 7)
    linear = model.model.layers[1].self_attn.kv_b_proj
    linear.bias = nn.Parameter(torch.randn(linear.out_features))
    assert torch.equal(tokens_of(model, ids), without_fast_path(model, ids))


def test_an_attention_function_of_the_callers_is_called():
    calls, model = [], fast_model()
    AttentionInterface.register("counted", lambda *a, **k: calls.append(1) or eager_attention_forward(*a, **k))
    AttentionMaskInterface.register("counted", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation("counted")
    tokens_of(model, random_ids(1, 7), max_new_tokens=4)
    assert len(calls) == 3 * 4


def test_offloaded_and_missing_weights():
    model, ids = fast_model(), random_ids(2, 7)
    expected = tokens_of(model, ids)
    assert torch.equal(tokens_of(cpu_offload(model, execution_device=torch.device("cpu")), ids), expected)
    with torch.device("meta"):
        empty = DeepSeekR1ForCausalLM(tiny_config())
    with pytest.raises(ValueError, match="meta device"):
        tokens_of(empty, ids)


# ---------------------------------------------------------------- prompts, lengths, processors


def test_short_prompts_and_limits():
    model = fast_model()
    twin = library_twin(model)
    for ids, options in (
        (None, {}), (random_ids(1, 1), {}), (random_ids(2, 7), {"max_new_tokens": 1}),
        (random_ids(2, 7), {"stopping_criteria": [MaxLengthCriteria(4)]}),
    ):  # fmt: skip
        run = lambda m: m.generate(ids, do_sample=False, pad_token_id=0, **{"max_new_tokens": 6, **options})
        assert torch.equal(run(model), run(twin))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_any_dtype(dtype, no_library_loop):  # noqa: F811
    model = fast_model()
    ids, mask, _ = padded(random_ids(2, 7), "left", (0, 4))
    assert torch.equal(tokens_of(model, ids, mask.to(dtype)), tokens_of(model, ids, mask))


def test_a_row_that_is_all_padding_leaves_the_others_alone():
    model, ids = fast_model(), random_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1] = 0
    assert torch.equal(tokens_of(model, ids, mask)[0], tokens_of(model, ids[:1])[0])


def test_processors_and_criteria_get_contiguous_ids():
    class Flat(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + input_ids.view(-1).sum() * 0

    model, ids = fast_model(), random_ids(3, 7)
    assert torch.equal(tokens_of(model, ids, logits_processor=[Flat()]), tokens_of(model, ids))


@pytest.mark.parametrize("pads", [(0, 0), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_static_cache_of_the_callers(pads, dtype):
    model = fast_model().to(dtype)
    ids, mask, _ = padded(random_ids(2, 7), "left", pads)
    cache = StaticCache(model.config, max_cache_len=40)  # more keys than queries already while the prompt is read
    tokens = tokens_of(model, ids, mask, past_key_values=cache, disable_compile=True)
    assert torch.equal(tokens, tokens_of(library_twin(model).to(dtype), ids, mask))


def test_a_returned_cache_goes_on_where_it_ended():
    model = fast_model()
    ids, mask, _ = padded(random_ids(2, 7), "left", (0, 4))
    options = {"eos_token_id": None, "max_new_tokens": 5}
    expected = tokens_of(model, ids, mask, eos_token_id=None, max_new_tokens=10)
    first = tokens_of(model, ids, mask, return_dict_in_generate=True, **options)
    mask = torch.cat((mask, mask.new_ones(2, 5)), dim=1)
    assert torch.equal(tokens_of(model, first.sequences, mask, past_key_values=first.past_key_values, **options),
                       expected)  # fmt: skip


# ---------------------------------------------------------------- modes, threads, errors, memory


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_inference_mode_before_and_after(dtype):
    model, ids = fast_model(), random_ids(2, 7)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        with torch.inference_mode():
            first = tokens_of(model, ids)
        second = tokens_of(model, ids)  # what the engine kept can be written to
        with torch.inference_mode():
            assert torch.equal(first, second) and torch.equal(first, tokens_of(model, ids))


def test_threads_take_turns():
    model = fast_model(attention_dropout=0.5)
    prompts = [random_ids(1, 5 + i) for i in range(3)]
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    run = lambda ids: model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    expected, found = [run(ids) for ids in prompts], {}
    model.train()
    threads = [threading.Thread(target=lambda i=i: found.update({i: run(prompts[i])})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(3))
    assert all(module.training for module in model.modules())


class Streamer:
    def __init__(self, act):
        self.act, self.calls = act, 0

    def put(self, tokens):
        self.calls += 1
        self.act(self.calls)

    def end(self):
        pass


def test_a_streamer_may_generate():
    model, ids, found = fast_model(), random_ids(2, 7), []
    expected = [tokens_of(model, row[None]) for row in ids]
    streamer = Streamer(lambda _: found.append(tokens_of(model, ids[1:])))
    engine = model.decoding_engine
    assert torch.equal(tokens_of(model, ids[:1], streamer=streamer), expected[0])
    assert len(found) > 4 and all(torch.equal(tokens, expected[1]) for tokens in found)
    assert model.decoding_engine is engine and not engine.busy


def test_errors_leave_nothing_behind(monkeypatch):
    model, ids = fast_model(), random_ids(1, 7)
    expected = tokens_of(model, ids)
    model.train()
    model.decoding.record_routes = True
    with pytest.raises(ZeroDivisionError):
        tokens_of(model, ids, streamer=Streamer(lambda calls: 1 / (3 - calls)))
    with monkeypatch.context() as patch:
        patch.setattr(PrefillView, "update", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokens_of(model, ids)
    assert model.decoding_engine.cache is None and not any(m._forward_hooks for m in model.modules())
    assert all(module.training for module in model.modules()) and model.decoding_record is None
    assert torch.equal(tokens_of(model, ids), expected) and model.decoding_record.routes is not None
    model.decoding.enabled = False
    tokens_of(model, ids)
    assert model.decoding_record is None  # not that of another call


def test_options_can_be_replaced():
    model, ids = fast_model(), random_ids(1, 7)
    tokens_of(model, ids)
    model.decoding = DecodingOptions(record_log_probs=True)
    tokens_of(model, ids)
    assert model.decoding_record.log_probs.shape == (1, 12)
    with pytest.raises(ValueError, match="DecodingOptions"):
        model.decoding = {"enabled": False}


def test_memory_is_given_back():
    model, ids = fast_model(), random_ids(1, 7)
    tokens_of(model, ids)
    old = weakref.ref(model.model.layers[0].mlp.up_proj.weight.untyped_storage())
    kept = weakref.ref(model.decoding_engine)
    model.to(torch.float32)
    assert kept() is model.decoding_engine  # nothing moved
    model.to(torch.float64)
    assert kept() is None and old() is None
    tokens_of(model, ids)
    other, gone = copy.copy(model), weakref.ref(model)
    assert other.decoding_engine.model is other
    del other
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
