"""Sampling: equal to a plain loop, true to the distribution, and the same however it is computed."""

import numpy
import peft
import pytest
import torch
from scipy.stats import chisquare
from transformers import GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM

from data_scripts.train_tokenizer import train_tokenizer
from recipes import sampling
from recipes.sampling import SamplingSettings, TokenChoice, draw, evaluation_mode, sample_completions
from tests.modeling.helpers import tiny_model

VOCAB = 320
TEXTS = ["sum 12 + 30 = 42. What is the colour of the quick brown fox?"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, VOCAB)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = tiny_model(vocab_size=VOCAB, max_position_embeddings=128, num_hidden_layers=2)
    model.generation_config.pad_token_id = None
    return model


def prompts_of(tokenizer, lengths=(3, 9, 1, 5, 7)):
    ids = tokenizer(TEXTS[0])["input_ids"]
    return [ids[:length] for length in lengths]


def ids_of(completions):
    return [[completion.token_ids for completion in samples] for samples in completions]


@torch.no_grad()
def plain_greedy(model, prompt, count, ends):
    """One token at a time, one prompt at a time, no cache: (ids without the end token, finished, mean log-prob)."""
    ids, log_probs = list(prompt), []
    while len(ids) < len(prompt) + count:
        scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        token = int(scores.argmax())
        log_probs.append(float(scores[token]))
        if token in ends:
            return ids[len(prompt):], True, sum(log_probs) / len(log_probs)
        ids.append(token)
    return ids[len(prompt):], False, sum(log_probs) / len(log_probs)


def check_greedy(model, tokenizer, ends):
    settings = SamplingSettings(max_new_tokens=12, batch_size=3)
    prompts = prompts_of(tokenizer)
    found = [samples[0] for samples in sample_completions(model, tokenizer, prompts, settings)]
    expected = [plain_greedy(model, prompt, 12, ends) for prompt in prompts]
    assert [(c.token_ids, c.finished) for c in found] == [e[:2] for e in expected]
    # fp32 with left padding and a cache against neither: sums in another order
    assert [c.log_prob for c in found] == pytest.approx([e[2] for e in expected], abs=1e-4)
    return found


def test_greedy_equals_a_plain_loop_with_several_end_tokens(model, tokenizer):
    model.generation_config.eos_token_id = None
    free = check_greedy(model, tokenizer, {tokenizer.eos_token_id})
    middle = free[1].token_ids[4]  # now ends a completion: some finish early, at different steps
    model.generation_config.eos_token_id = [middle, 2]
    try:
        ended = check_greedy(model, tokenizer, {middle, 2, tokenizer.eos_token_id})
    finally:
        model.generation_config.eos_token_id = None
    assert ended[1].finished and len(ended[1].token_ids) <= 4 and tokenizer.decode([middle]) not in ended[1].token_ids


def test_adapters_work(tokenizer):
    base = tiny_model(vocab_size=VOCAB, max_position_embeddings=128, num_hidden_layers=2)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False))
    before = [base.generation_config, adapted.generation_config]
    check_greedy(adapted.eval(), tokenizer, {tokenizer.eos_token_id, 2})
    assert [base.generation_config, adapted.generation_config] == before


def test_model_random_state_and_generation_config_are_as_before(model, tokenizer):
    model.train()
    model.model.layers[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    config = model.generation_config
    config.repetition_penalty, config.do_sample, config.temperature = 9.0, True, 3.0
    settings = SamplingSettings(max_new_tokens=8, temperature=1.0)
    state = torch.get_rng_state()
    odd = sample_completions(model, tokenizer, prompts_of(tokenizer), settings)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config and config.repetition_penalty == 9.0
    config.repetition_penalty, config.do_sample, config.temperature = None, None, None
    model.eval()
    assert ids_of(sample_completions(model, tokenizer, prompts_of(tokenizer), settings)) == ids_of(odd)


def test_evaluation_mode_comes_back_after_an_error(model):
    model.train()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not model.training
        raise KeyError
    assert model.training
    model.eval()


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_batch_size_order_and_company_change_nothing(model, tokenizer, temperature):
    prompts, count = prompts_of(tokenizer), 2 if temperature else 1
    keys = [f"problem {number}" for number in range(len(prompts))]
    def run(batch_size, prompts, keys, samples=count):
        settings = SamplingSettings(max_new_tokens=9, temperature=temperature, top_p=0.95, samples=samples, seed=5,
                                    batch_size=batch_size)
        return sample_completions(model, tokenizer, prompts, settings, keys)
    expected = run(1, prompts, keys)
    for batch_size in (3, 8):
        assert ids_of(run(batch_size, prompts, keys)) == ids_of(expected)
    assert ids_of(run(4, prompts[::-1], keys[::-1]))[::-1] == ids_of(expected)
    alone = run(8, prompts[2:3], keys[2:3], samples=1)
    assert ids_of(alone)[0] == ids_of(expected)[2][:1]
    if temperature:
        flat = [tuple(ids) for samples in ids_of(expected) for ids in samples]
        assert len(set(flat)) == len(flat)
        other = run(8, prompts, [f"another {key}" for key in keys])
        assert ids_of(other) != ids_of(expected)


def test_models_that_cannot_do_with_padding_get_one_prompt_at_a_time(tokenizer, caplog):
    """RWKV takes an attention mask and does nothing with it."""
    config = RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    model, prompts = RwkvForCausalLM(config).eval(), prompts_of(tokenizer, (3, 9, 2, 9, 3))
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(std=0.3)
    one, many = (sample_completions(model, tokenizer, prompts, SamplingSettings(
        max_new_tokens=6, temperature=1.0, batch_size=size)) for size in (1, 5))
    assert ids_of(one) == ids_of(many) and caplog.text.count("answers of RwkvForCausalLM depend") == 1


def test_logits_that_are_no_numbers_are_an_error(tokenizer):
    broken = tiny_model(vocab_size=VOCAB, max_position_embeddings=128, num_hidden_layers=1)
    broken.lm_head.weight.data[7] = float("nan")
    for temperature in (0.0, 1.0):
        settings = SamplingSettings(max_new_tokens=2, temperature=temperature)
        with pytest.raises(ValueError, match="not numbers.*dtype=float32"):
            sample_completions(broken, tokenizer, prompts_of(tokenizer), settings)


def test_sampled_tokens_follow_the_softmax(model, tokenizer):
    prompt, count = prompts_of(tokenizer, (6,))[0], 3000
    settings = SamplingSettings(max_new_tokens=1, temperature=0.7, samples=count, batch_size=1000)
    (found,) = sample_completions(model, tokenizer, [prompt], settings)
    with torch.no_grad():
        shares = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1).numpy()
    # an end token is not among the token_ids: it is told by `finished` (tiny models: eos of the config and tokenizer)
    ends = sampling.end_token_ids(model, tokenizer)
    tokens = numpy.array([ends[0] if completion.finished else completion.token_ids[0] for completion in found])
    counts = numpy.bincount(tokens, minlength=VOCAB).astype(float)
    shares[ends[0]], shares[ends[1:]] = shares[ends].sum(), 0
    often = shares * count >= 5  # chi-square's usual condition; the rest is one class
    observed = numpy.append(counts[often], counts[~often].sum())
    expected = numpy.append(shares[often], shares[~often].sum()) * count
    assert often.sum() > 20 and chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (7, 1.0), (0, 0.6), (9, 0.5)])
def test_choice_has_the_truncated_distribution(top_k, top_p):
    scores, count = 2 * torch.randn(1, 50), 20_000
    numbers = ((torch.arange(count) + 0.5) / count).unsqueeze(1).double()  # an even grid: shares are exact to 1/count
    choice = TokenChoice(SamplingSettings(temperature=0.8, top_k=top_k, top_p=top_p), numbers, 4)
    left = choice(torch.zeros(count, 4, dtype=torch.long), scores.expand(count, -1))
    assert (left > -torch.inf).sum(-1).eq(1).all()
    shares = left.argmax(-1).bincount(minlength=50) / count

    wanted = (scores[0].double() / 0.8).softmax(-1)
    ranked = sorted(range(50), key=lambda token: -wanted[token])[:top_k or 50]
    total, kept, mass = sum(wanted[ranked]), [], 0.0
    for token in ranked:  # nucleus: the fewest tokens whose mass reaches top_p
        if mass >= top_p:
            break
        kept.append(token)
        mass += wanted[token] / total
    expected = torch.zeros(50).double()
    expected[kept] = wanted[kept] / wanted[kept].sum()
    torch.testing.assert_close(shares.double(), expected, atol=2 / count, rtol=0)
    torch.testing.assert_close(choice.log_probs[0], scores[0].log_softmax(-1)[left.argmax(-1)])  # temperature 1


def test_draw_never_takes_an_impossible_token():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 4)
    assert draw(scores, torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-53]).double()).tolist() == [1, 1, 3, 3]


def test_stop_texts_end_a_completion(model, tokenizer):
    prompts = prompts_of(tokenizer)
    free = [s[0] for s in sample_completions(model, tokenizer, prompts, SamplingSettings(max_new_tokens=20))]
    stop = free[0].text[4:7]
    settings = SamplingSettings(max_new_tokens=20, stop=(stop, "never there"), batch_size=2)
    stopped = [s[0] for s in sample_completions(model, tokenizer, prompts, settings)]
    for before, after in zip(free, stopped):
        head, found, _ = before.text.partition(stop)
        assert after.text == head and after.finished == (before.finished or bool(found))
    assert stopped[0].finished and len(stopped[0].token_ids) < len(free[0].token_ids)


def test_a_full_context_shortens_and_a_filled_one_is_an_error(tokenizer):
    # GPT-2 has learned positions: one step beyond the last is an index error, so that this cannot pass by luck.
    config = GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    ids = (tokenizer(TEXTS[0])["input_ids"] * 2)
    prompts = [ids[:length] for length in (20, 4, 14, 19)]
    settings = SamplingSettings(max_new_tokens=10, batch_size=4, temperature=1.0)
    found = [s[0] for s in sample_completions(model, tokenizer, prompts, settings)]
    for prompt, completion in zip(prompts, found):
        budget = min(10, 24 - len(prompt))
        assert completion.finished or len(completion.token_ids) == budget
        assert completion.shortened == (not completion.finished and budget < 10)
    assert [c.shortened for c in found].count(True) >= 1
    with pytest.raises(ValueError, match="24 tokens fills the model's max_position_embeddings=24"):
        sample_completions(model, tokenizer, [ids[:24]], settings)
    with pytest.raises(ValueError, match="no token"):
        sample_completions(model, tokenizer, [[]], settings)


def test_batches_shrink_when_memory_does_not_suffice(model, tokenizer, monkeypatch, caplog):
    prompts, settings = prompts_of(tokenizer), SamplingSettings(max_new_tokens=5, batch_size=5)
    expected = ids_of(sample_completions(model, tokenizer, prompts, settings))
    sizes, generate, most = [], model.generate, 2
    def scarce(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **kwargs)
    monkeypatch.setattr(model, "generate", scarce)
    assert ids_of(sample_completions(model, tokenizer, prompts, settings)) == expected
    assert sizes == [1, 2, 5, 2, 2, 1] and caplog.text.count("out of device memory") == 1
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        sample_completions(model, tokenizer, prompts, settings)


def test_completions_are_told_as_they_come(model, tokenizer):
    told, settings = [], SamplingSettings(max_new_tokens=3, temperature=1.0, samples=2, batch_size=4)
    found = sample_completions(model, tokenizer, prompts_of(tokenizer), settings, on_batch=told.extend)
    assert len(told) == 10 and all(found[prompt][sample] is completion for prompt, sample, completion in told)


@pytest.mark.parametrize("changes, words", [
    ({"samples": 4}, "samples=4 with temperature=0"), ({"temperature": -1}, "temperature=-1"),
    ({"top_p": 0}, "top_p=0"), ({"top_k": -2}, "top_k=-2"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"stop": ("a", "")}, "empty"),
])  # fmt: skip
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=words):
        SamplingSettings(**changes)
