"""Continuous batching: every request gets the tokens that `generate` gives it alone, whatever shares its batch."""

import functools
import random

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestStatus

from modeling_deepseek_r1 import decoding_batch
from modeling_deepseek_r1.decoding_cache import ROUND, LatentCache
from modeling_deepseek_r1.decoding_engine import DecodingEngine, StepBatch

from .helpers import VOCAB, tiny_model

ENDS = [2, 5, 9, 11, 33]  # several, so that random weights end rows at random lengths


@pytest.fixture
def model():
    torch.manual_seed(1)
    return tiny_model(max_position_embeddings=128)


@pytest.fixture
def ahead(monkeypatch):
    """The order of events of a GPU: blocks of 8 steps whose tokens arrive one block late, rows refilled together."""
    monkeypatch.setattr(decoding_batch, "pipeline", lambda device: (8, 1, 0.3))
    monkeypatch.setattr(decoding_batch.Report, "arrived", lambda report: False)


@pytest.fixture
def recorded(monkeypatch, ahead):
    """Recorded steps without a GPU: batches filled up to fixed sizes, run for warming up, and kept between calls."""
    def record(batch, body):
        batch.body = body
        batch.idle()
        for _ in range(3):
            body(batch)

    monkeypatch.setattr(DecodingEngine, "records", property(lambda engine: True))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(StepBatch, "record", record)


def random_prompts(count, longest=40, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def expected(model, prompts, rows=55, **settings):
    """The library's own loop in left-padded batches -> lists of new tokens, cut behind the end token."""
    model.decoding.enabled, tokens = False, []
    for start in range(0, len(prompts), rows):
        group = prompts[start : start + rows]
        width = max(map(len, group))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in group])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in group])
        for row in model.generate(ids, attention_mask=mask, do_sample=False, **settings)[:, width:].tolist():
            end = next((place + 1 for place, token in enumerate(row) if token in settings["eos_token_id"]), len(row))
            tokens.append(row[:end])
    model.decoding.enabled = True
    return tokens


def new_tokens(outputs):
    return [output.generated_tokens for output in outputs.values()]


@functools.cache
def hundreds():
    """220 prompts and what the library's loop makes of them."""
    torch.manual_seed(1)
    prompts = random_prompts(220)
    return prompts, expected(tiny_model(max_position_embeddings=128), prompts, max_new_tokens=20, eos_token_id=ENDS)


@pytest.mark.parametrize("pipeline", ["at_once", "ahead", "recorded"])
def test_hundreds_of_requests_get_what_each_gets_alone(model, request, pipeline, monkeypatch):
    if pipeline != "at_once":
        request.getfixturevalue(pipeline)
    caches, init = [], LatentCache.__init__

    def watched(cache, *args, **kwargs):
        init(cache, *args, **kwargs)
        caches.append((cache.cache_rows, cache.capacity))

    monkeypatch.setattr(LatentCache, "__init__", watched)
    prompts, alone = hundreds()
    model.decoding.batch_slots, model.decoding.prefill_tokens = 23, 64
    caches.clear()
    outputs = model.generate_batch(prompts, max_new_tokens=20, eos_token_id=ENDS)
    assert list(outputs) == [f"req_{index}" for index in range(220)]
    assert [output.prompt_ids for output in outputs.values()] == prompts
    assert all(output.status == RequestStatus.FINISHED and output.error is None for output in outputs.values())
    tokens = new_tokens(outputs)
    assert tokens == alone
    assert len(set(map(len, tokens))) > 15 and any(row[-1] in ENDS for row in tokens)
    assert caches == [(24, ROUND)]  # 23 rows and the scratch row for 220 requests


def test_recorded_steps_are_kept_and_told_the_numbers_of_each_call(model, recorded):
    prompts, results = random_prompts(16, 12), []
    model.decoding.batch_slots = 6
    for penalty, ends in ((1.3, ENDS), (2.5, ENDS[:2]), (1.3, ENDS)):
        settings = {"max_new_tokens": 20, "eos_token_id": ends, "repetition_penalty": penalty}
        results.append(new_tokens(model.generate_batch(prompts, do_sample=False, **settings)))
        if len(results) < 3:
            assert results[-1] == expected(model, prompts, **settings)
        if len(results) == 2:
            kept = dict(model.decoding_engine.batches)
    assert results[0] == results[2] != results[1]
    assert model.decoding_engine.batches == kept and len(kept) > 1  # 6 rows, and fewer at the end


def test_penalties_and_least_lengths_count_for_each_request(model, ahead):
    prompts = random_prompts(40, 12)
    model.decoding.batch_slots = 7
    settings = {"max_new_tokens": 12, "min_new_tokens": 5, "eos_token_id": ENDS, "repetition_penalty": 1.5}
    tokens = new_tokens(model.generate_batch(prompts, **settings))
    assert tokens == expected(model, prompts, **settings)
    assert min(map(len, tokens)) > 5
    plain = new_tokens(model.generate_batch(prompts, max_new_tokens=12, eos_token_id=ENDS))
    assert plain != tokens


def test_rows_stand_still_at_their_max_length(model, ahead):
    """The cache is full to the last place there: a row that ran on to the end of its block would leave it."""
    prompts = [prompt * 3 for prompt in random_prompts(12, 18)]
    model.decoding.batch_slots = 4
    config = GenerationConfig(max_length=ROUND, eos_token_id=-1, pad_token_id=0)
    tokens = new_tokens(model.generate_batch(prompts, config))
    assert [len(prompt) + len(row) for prompt, row in zip(prompts, tokens)] == [ROUND] * 12
    for prompt, row in zip(prompts[:4], tokens):
        assert [row] == expected(model, [prompt], max_new_tokens=len(row), eos_token_id=[VOCAB])
    with pytest.raises(ValueError, match=r"req_1: its prompt of 64 tokens and max_length=64 leave no token"):
        model.generate_batch([[5], [5] * ROUND], config)


def test_log_probabilities_are_those_of_a_full_forward_pass(model, recorded):
    prompts = random_prompts(12, 9)
    model.decoding.batch_slots, model.decoding.record_log_probs = 5, True
    settings = {"max_new_tokens": 11, "do_sample": True, "temperature": 0.5, "top_k": 0, "eos_token_id": ENDS}
    raw = model.generate_batch(prompts, **settings)
    config = ContinuousBatchingConfig(return_logprobs=True)
    processed = model.generate_batch(prompts, continuous_batching_config=config, **settings)
    for outputs, temperature in ((raw, 1.0), (processed, 0.5)):
        for output in outputs.values():
            ids = torch.tensor([output.prompt_ids + output.generated_tokens])
            scores = model(ids).logits[0, len(output.prompt_ids) - 1 : -1] / temperature
            log_probs = scores.log_softmax(-1).gather(1, ids[0, len(output.prompt_ids) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(output.logprobs), log_probs, atol=2e-5, rtol=1e-5)
    assert model.generate_batch(prompts[:1], max_new_tokens=3)["req_0"].logprobs
    model.decoding.record_log_probs = False
    assert model.generate_batch(prompts[:1], max_new_tokens=3)["req_0"].logprobs == []


def test_samples_of_one_prompt_follow_the_models_distribution(model, ahead):
    prompt, count = [7, 50, 31], 1500
    outputs = model.generate_batch(
        [[4], prompt], GenerationConfig(max_new_tokens=1, do_sample=True, num_return_sequences=count, pad_token_id=0)
    )
    assert list(outputs)[count - 2 : count + 1] == [f"req_0__child#{count - 2}", "req_0", "req_1__child#0"]
    counts = torch.bincount(torch.tensor(new_tokens(outputs)[count:]).flatten(), minlength=VOCAB)
    wanted = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).detach() * count
    common = wanted > 5
    assert common.sum() > 15
    chi_square = ((counts - wanted)[common] ** 2 / wanted[common]).sum() / common.sum()
    assert 0.4 < chi_square < 1.9  # 1 in the mean, spread sqrt(2 / 30) or less


def test_second_tokens_are_drawn_by_the_rows_own_context(model, recorded):
    """Later steps: among continuations of one first token, the second follows its conditional distribution."""
    model.decoding.batch_slots = 200
    config = GenerationConfig(max_new_tokens=2, do_sample=True, num_return_sequences=3000, top_k=2, pad_token_id=0)
    pairs = torch.tensor([row for row in new_tokens(model.generate_batch([[7, 50, 31]], config)) if len(row) == 2])
    first = pairs[:, 0].mode().values
    seconds = pairs[pairs[:, 0] == first, 1]
    top = model(torch.tensor([[7, 50, 31, int(first)]])).logits[0, -1].topk(2)
    assert torch.isin(seconds, top.indices).all()
    share = (seconds == top.indices[0]).float().mean()
    wanted = top.values.softmax(-1)[0]
    assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / len(seconds)).sqrt() + 1e-6


@pytest.mark.parametrize("inputs, settings, message", [
    ([[5], []], {}, "req_1 is empty"),
    ([[5], [5, VOCAB]], {}, "req_1 holds 97"),
    ([[5] * 9, [5] * 90], {"max_new_tokens": 60}, "req_1: .* 150 tokens, more than max_position_embeddings=128"),
    ([[5] * 9, [5] * 90], {"max_new_tokens": 20},
     r"req_1: .* make 110 tokens, and the cache holds 100 \(batch_tokens=100\); raise model.decoding.batch_tokens"),
    ([[5]], {"max_new_tokens": 0}, "max_new_tokens"),
    ([[5]], {"num_beams": 3}, "not beam_search"),
    ([[5]], {"stop_strings": ["a"]}, "stop_strings"),
    ([[5]], {"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor.*`generate` serves it"),
    ([[5]], {"encoder_repetition_penalty": 2.0}, "EncoderRepetitionPenaltyLogitsProcessor"),
    ([[5], [5, 6]], {"min_length": 5}, "MinLengthLogitsProcessor"),
    ([[5]], {"streamer": 1}, "streamer: no argument of generate_batch"),
])  # fmt: skip
def test_what_is_not_served_is_refused_before_anything_runs(model, monkeypatch, inputs, settings, message):
    monkeypatch.setattr(DecodingEngine, "open", lambda *_: pytest.fail("a cache was made"))
    model.decoding.batch_tokens = 100
    with pytest.raises(ValueError, match=message):
        model.generate_batch(inputs, **{"max_new_tokens": 4, **settings})


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_model_usable(model, monkeypatch, error):
    model.train()
    model.lm_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    prompts, settings = random_prompts(20), {"max_new_tokens": 8, "eos_token_id": ENDS}
    wanted = new_tokens(model.generate_batch(prompts, **settings))
    run, steps = StepBatch.run, []

    def interrupted(batch):
        steps.append(batch)
        if len(steps) == 5:
            raise error
        return run(batch)

    monkeypatch.setattr(StepBatch, "run", interrupted)
    with pytest.raises(error):
        model.generate_batch(prompts, **settings)
    assert model.decoding_engine.cache is None
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert new_tokens(model.generate_batch(prompts, **settings)) == wanted


def test_interface_of_the_librarys_method(model, capsys):
    assert model.generate_batch([]) == {}
    config = ContinuousBatchingConfig(max_memory_percent=0.5)  # what TRL's trainers give
    prompts = [torch.tensor([5, 6, 7]), [8, 9]]
    given = GenerationConfig(max_new_tokens=4, eos_token_id=[-1], pad_token_id=0)
    outputs = model.generate_batch(prompts, given, config, record_timestamps=True, progress_bar=True)
    first = outputs["req_0"]
    assert first.is_finished() and len(first.generated_tokens) == len(first.timestamps) == 4
    assert first.created_time <= first.lifespan[0] <= first.timestamps[0] <= first.lifespan[1]
    assert "2/2" in capsys.readouterr().err
    assert given.eos_token_id == [-1] and given.max_length is None  # the caller's config stays as it was
    with pytest.raises(ValueError, match="per_request_processors=True"):
        model.generate_batch([[5]], given, ContinuousBatchingConfig(per_request_processors=True))
