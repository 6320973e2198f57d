"""The fast path of `generate`: the library's tokens on the same weights, and what it does besides."""

import copy
import logging
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    set_seed,
)

from modeling_deepseek_r1 import decoding, decoding_loop
from modeling_deepseek_r1.decoding_engine import batch_size_for

from .helpers import VOCAB, close, library_twin, padded, random_ids, tiny_model
from .test_generation import word_tokenizer

ENDS = [2, 5, 9, 11, 23, 31, 40, 41, 42, 57]  # rows end at different steps


def fast_model(**changes):
    torch.manual_seed(1)
    return tiny_model(implementation="sdpa", **changes)


def tokens_of(model, ids, mask=None, seed=3, **options):
    set_seed(seed)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **options)


@pytest.fixture
def no_library_loop(monkeypatch):
    """The library's own loop must not be what answers."""
    def refuse(*args, **kwargs):
        raise AssertionError("the library's loop was called")

    monkeypatch.setattr("transformers.generation.utils.GenerationMixin._sample", refuse)


SETTINGS = {
    "greedy": {},
    "ends": {"eos_token_id": ENDS},
    # Draws are made for the rows that are left, so that seeds give the library's tokens while none is dropped.
    "sampling": {"do_sample": True, "temperature": 0.8, "min_new_tokens": 12},
    "nucleus": {"do_sample": True, "top_p": 0.7, "top_k": 30, "min_p": 0.01, "min_new_tokens": 12},
    "penalty": {"repetition_penalty": 1.7, "eos_token_id": ENDS, "min_new_tokens": 4},
    "samples": {"do_sample": True, "num_return_sequences": 3, "min_new_tokens": 12},
    "unknown_processor": {"no_repeat_ngram_size": 2, "eos_token_id": ENDS},
}


@pytest.mark.parametrize("rows, pads", [(1, (0,)), (3, (0, 5, 2)), (6, (4, 0, 0, 1, 6, 2))])
@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_equal_the_librarys(settings, rows, pads):
    model = fast_model()
    ids, mask, _ = padded(random_ids(rows, 9), "left", pads)
    expected = tokens_of(library_twin(model), ids, mask, **SETTINGS[settings])
    assert torch.equal(tokens_of(model, ids, mask, **SETTINGS[settings]), expected)


@pytest.mark.parametrize("changes", [
    {"q_lora_rank": None, "n_shared_experts": 0}, {"n_routed_experts": None}, {"tie_word_embeddings": True},
    {"scoring_func": "softmax", "topk_method": "greedy"}, {"rope_interleave": False}, {"num_nextn_predict_layers": 1},
], ids=str)  # fmt: skip
def test_every_kind_of_model(changes, no_library_loop):
    model = fast_model(**changes)
    ids, mask, _ = padded(random_ids(3, 8), "left", (0, 3, 1))
    full = torch.cat((mask, mask.new_ones(3, 12)), dim=1)
    tokens = tokens_of(model, ids, mask)
    with torch.no_grad():
        logits = model(tokens, attention_mask=full, position_ids=(full.cumsum(-1) - 1).clamp(min=0)).logits
    said = logits[:, 7:-1].argmax(-1)  # one full forward pass says the same, up to a row's end
    alive = torch.nn.functional.pad((said == 2).cumsum(-1)[:, :-1] == 0, (1, 0), value=True)
    assert torch.equal(tokens[:, 8:], said * alive) and alive.sum() > 20


def test_finished_rows_are_dropped(monkeypatch, no_library_loop):
    sizes, model = [], fast_model()
    original = model.decoding_engine.batch
    monkeypatch.setattr(model.decoding_engine, "batch", lambda rows, *a: sizes.append(rows) or original(rows, *a))
    ids = random_ids(8, 6)
    tokens = tokens_of(model, ids, eos_token_id=ENDS, max_new_tokens=40)
    assert sizes[0] <= 8 and len(sizes) > 2 and sorted(sizes, reverse=True) == sizes
    alone = [tokens_of(model, row[None], eos_token_id=ENDS, max_new_tokens=40)[0] for row in ids]
    for row, expected in zip(tokens, alone):
        assert torch.equal(row[: len(expected)], expected) and not row[len(expected) :].any()
    assert tokens.shape[1] == max(map(len, alone))  # not a column more


def character_tokenizer():
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(30 + i): i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def test_stop_strings_and_other_criteria():
    model, tokenizer = fast_model(), character_tokenizer()
    ids = random_ids(3, 6)
    plain = tokens_of(model, ids)
    text = tokenizer.decode(plain[1, 9:11])
    options = {"stop_strings": [text], "tokenizer": tokenizer, "eos_token_id": 2}
    ours, theirs = (tokens_of(m, ids, **options) for m in (model, library_twin(model)))
    assert torch.equal(ours, theirs) and not torch.equal(ours, plain)

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 10)

    assert torch.equal(tokens_of(model, ids, stopping_criteria=[AfterFour()]), plain[:, :10])


@pytest.mark.parametrize("settings", ["greedy", "unknown_processor"])
def test_streamer_gets_every_token(settings):
    model, tokenizer = fast_model(), word_tokenizer()
    ids = random_ids(1, 6)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    tokens = tokens_of(model, ids, streamer=streamer, **SETTINGS[settings])
    assert "".join(streamer).split() == tokenizer.decode(tokens[0, 6:]).split()


def test_scores_and_logits_are_the_librarys():
    model, ids = fast_model(), random_ids(3, 6)
    options = {"do_sample": True, "top_k": 7, "eos_token_id": ENDS, "return_dict_in_generate": True,
               "output_scores": True, "output_logits": True}  # fmt: skip
    ours, theirs = (tokens_of(m, ids, **options) for m in (model, library_twin(model)))
    assert torch.equal(ours.sequences, theirs.sequences)
    for kept in ("scores", "logits"):
        close(torch.stack(ours[kept]), torch.stack(theirs[kept]))


# ---------------------------------------------------------------- memory


def test_long_prompts_are_read_in_chunks_and_the_cache_grows(monkeypatch, no_library_loop):
    model = fast_model(max_position_embeddings=256)
    ids, mask, _ = padded(random_ids(3, 41), "left", (0, 17, 3))
    expected = tokens_of(model, ids, mask, max_new_tokens=120)
    passes, forward = [], type(model).forward
    count = lambda *a, **k: passes.append(k["input_ids"].numel()) or forward(*a, **k)
    monkeypatch.setattr(type(model), "forward", count)
    monkeypatch.setattr(decoding_loop, "GROWTH", 1)
    model.decoding.prefill_tokens = 16
    assert torch.equal(tokens_of(model, ids, mask, max_new_tokens=120), expected)
    assert max(passes) <= 16 and sum(passes) == 41 + 24 + 38


def test_a_prompt_that_repeats_is_read_once(monkeypatch):
    model = fast_model()
    ids = random_ids(2, 9).repeat_interleave(3, dim=0)
    passes, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: passes.append(k["input_ids"].shape) or forward(*a, **k))
    tokens = tokens_of(model, ids)
    assert passes == [(2, 9)]
    assert torch.equal(tokens[0], tokens[2]) and torch.equal(tokens[3:4], tokens_of(model, ids[3:4]))


def test_fp8_cache_is_small_and_near(no_library_loop):
    model = fast_model(kv_lora_rank=128, qk_rope_head_dim=8)
    ids = random_ids(2, 20)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3}
    exact = torch.stack(tokens_of(model, ids, **options).logits)
    model.decoding.cache_dtype = "fp8"
    sizes, original = [], model.decoding_engine.open
    model.decoding_engine.open = lambda *a: sizes.append(original(*a).bytes_per_token) or model.decoding_engine.cache
    rough = torch.stack(tokens_of(model, ids, **options).logits)
    assert sizes == [128 + 4 + 2 * 8]
    error = (rough[1] - exact[1]).norm() / exact[1].norm()
    assert 1e-4 < error < 0.1


# ---------------------------------------------------------------- weights, modes, copies


def test_training_mode_does_not_drop_out(no_library_loop):
    model = fast_model(hidden_dropout=0.5, attention_dropout=0.5)
    ids = random_ids(2, 7)
    expected = tokens_of(model, ids)
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(tokens_of(model, ids), expected)
    assert all(module.training for module in model.modules())


def test_weights_changed_in_place_or_moved_are_seen():
    model, other = fast_model(), tiny_model(implementation="sdpa")
    ids = random_ids(2, 7)
    tokens_of(model, ids)
    model.load_state_dict(other.state_dict())
    assert torch.equal(tokens_of(model, ids), tokens_of(other, ids))
    model.double()
    assert torch.equal(tokens_of(model, ids), tokens_of(other.double(), ids))


def test_an_adapter_on_the_up_projection_is_seen(no_library_loop):
    model = fast_model()
    ids = random_ids(2, 7)
    plain = tokens_of(model, ids)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["kv_b_proj", "q_a_proj", "o_proj"],
                                               init_lora_weights=False)).eval()  # fmt: skip
    tokens = tokens_of(adapted, ids)
    assert torch.equal(tokens, tokens_of(adapted.merge_and_unload(), ids)) and not torch.equal(tokens, plain)


def test_a_model_that_has_generated_can_be_copied_and_pickled():
    model, ids = fast_model(), random_ids(1, 7)
    expected = tokens_of(model, ids)
    assert torch.equal(tokens_of(copy.deepcopy(model), ids), expected)
    assert torch.equal(tokens_of(pickle.loads(pickle.dumps(model)), ids), expected)


def test_autocast_decides_the_dtype(no_library_loop):
    model, ids = fast_model(), random_ids(2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        tokens_of(model, ids)
    assert model.decoding_engine.step.dtype == torch.bfloat16
    tokens_of(model, ids)
    assert model.decoding_engine.step.dtype == torch.float32


# ---------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("on_host", [False, True])
def test_recorded_routes_and_log_probs_are_those_of_a_full_pass(on_host):
    model = fast_model()
    ids, mask, _ = padded(random_ids(3, 7), "left", (0, 3, 2))
    ids, mask = torch.cat((ids, ids[:1])), torch.cat((mask, mask[:1]))  # a prompt that repeats
    model.decoding.record_routes = model.decoding.record_log_probs = True
    options = {"no_repeat_ngram_size": 9} if on_host else {}
    tokens = tokens_of(model, ids, mask, do_sample=True, top_k=9, eos_token_id=ENDS, max_new_tokens=20, **options)
    record, width = model.decoding_record, tokens.shape[1]
    ended = torch.isin(tokens[:, 7:], torch.tensor(ENDS)).cumsum(-1)
    real = torch.cat((mask, ended - torch.isin(tokens[:, 7:], torch.tensor(ENDS)).long() == 0), dim=1).long()

    found = []
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda module, given, output: found.append(output[2]))
    with torch.no_grad():
        logits = model(tokens, attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp(min=0)).logits
    routes = torch.stack(found, dim=1).view(4, width, 2, 3).sort(-1).values[:, :-1]
    ends = torch.tensor([max(row.nonzero()) for row in real])
    computed = real[:, :-1].bool() & (torch.arange(width - 1) < ends[:, None])
    assert torch.equal(record.routes[..., 0, 0] >= 0, computed)
    assert torch.equal(record.routes.sort(-1).values[computed], routes[computed].to(torch.int16))
    log_probs = logits.log_softmax(-1)[:, 6:-1].gather(-1, tokens[:, 7:, None]).squeeze(-1)
    close(record.log_probs, log_probs * real[:, 7:], atol=1e-4)
    model.decoding.record_routes = model.decoding.record_log_probs = False
    tokens_of(model, ids, mask)
    assert model.decoding_record is None


# ---------------------------------------------------------------- what is not served


def messages(caplog, monkeypatch, model, ids, mask=None, **options):
    monkeypatch.setattr(decoding, "_told", set())
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=decoding.logger.name):
        for _ in range(2):
            made = {name: make() if name == "past_key_values" else make for name, make in options.items()}
            tokens = tokens_of(model, ids, mask, **made)
    return [record.message for record in caplog.records if "library's loop" in record.message], tokens


def test_what_is_not_served_goes_to_the_library_with_one_message(caplog, monkeypatch):
    model, ids = fast_model(), random_ids(1, 7)
    expected = tokens_of(model, ids)
    cases = {
        "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
        "no beams": {"num_beams": 2},
        "from elsewhere": {"prompt_lookup_num_tokens": 2},
        "QuantizedCache": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    }
    for text, options in cases.items():
        told, tokens = messages(caplog, monkeypatch, model, ids, **options)
        assert len(told) == 1 and text in told[0]
        if text not in ("QuantizedCache", "no beams", "from elsewhere"):
            assert torch.equal(tokens if torch.is_tensor(tokens) else tokens.sequences, expected)
    cache = lambda: StaticCache(model.config, max_cache_len=60)
    told, _ = messages(caplog, monkeypatch, model, ids, past_key_values=cache, disable_compile=True)
    assert len(told) == 1 and "StaticCache" in told[0]
    model.decoding.enabled = False
    told, tokens = messages(caplog, monkeypatch, model, ids)
    assert not told and torch.equal(tokens, expected)


def test_right_padding_is_left_to_the_library(caplog, monkeypatch):
    model, ids = fast_model(), random_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    told, tokens = messages(caplog, monkeypatch, model, ids, mask)
    assert "left-padded" in told[0] and torch.equal(tokens, tokens_of(library_twin(model), ids, mask))


def test_frequencies_that_depend_on_the_length_are_left_to_the_library(caplog, monkeypatch):
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    model, ids = fast_model(rope_parameters=rope), random_ids(2, 7)
    told, tokens = messages(caplog, monkeypatch, model, ids)
    assert "rope_type='dynamic'" in told[0] and torch.equal(tokens, tokens_of(library_twin(model), ids))


def test_options_are_checked():
    model = fast_model()
    for name, value, text in (("cache_dtype", "int4", "known"), ("drafts", 0, "at least 1"), ("kernel", 1, "known")):
        with pytest.raises(ValueError, match=text):
            setattr(model.decoding, name, value)
    assert [batch_size_for(n) for n in (1, 9, 33, 257, 320)] == [1, 10, 40, 320, 320]


def test_logits_of_chosen_positions():
    model, ids = fast_model(), random_ids(3, 9)
    places = torch.tensor([[8], [2], [5]])
    with torch.no_grad():
        close(model(ids, logits_to_keep=places).logits, model(ids).logits[torch.arange(3)[:, None], places])
    assert model(ids).logits.shape[-1] == VOCAB
