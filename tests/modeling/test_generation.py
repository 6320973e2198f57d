"""Generation: every strategy and cache gives the library's tokens on the same weights."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache, pipeline, set_seed
from transformers.utils import is_optimum_quanto_available

from .helpers import VOCAB, close, library_twin, padded, random_ids, tiny_model

# eos is not among the tokens that random weights are likely to end on; fixed lengths keep the comparison whole.
LENGTH = {"max_new_tokens": 8, "min_new_tokens": 8}
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "returned_beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
}


def generate(model, ids, seed=7, **kwargs):
    set_seed(seed)
    return model.generate(ids, **LENGTH, **kwargs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_equal_the_librarys(strategy, side, implementation):
    model = tiny_model(num_nextn_predict_layers=1, implementation=implementation)
    ids, mask, _ = padded(random_ids(2, 7), side)
    mask = torch.ones_like(ids) if mask is None else mask
    ours, theirs = (generate(m, ids, attention_mask=mask, **STRATEGIES[strategy]) for m in (model, library_twin(model)))
    assert torch.equal(ours, theirs)
    assert len(set(ours[:, 7:].flatten().tolist())) > 5  # not one token over and over


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_left_padded_batch_generates_what_each_row_does_alone(implementation):
    model = tiny_model(implementation=implementation)
    ids, mask, _ = padded(random_ids(3, 9), "left", (0, 5, 2))
    batched = generate(model, ids, attention_mask=mask, do_sample=False)
    for row, real, tokens in zip(ids, mask.bool(), batched, strict=True):
        alone = generate(model, row[real][None], attention_mask=torch.ones_like(row[real][None]), do_sample=False)
        assert torch.equal(tokens[9:], alone[0, real.sum() :])


@pytest.mark.parametrize("cache", ["dynamic", "static", "dynamic_by_name", "none"])
def test_every_cache_gives_the_same_tokens(cache):
    model, ids = tiny_model(), random_ids(2, 7)
    expected = generate(model, ids, do_sample=False)
    options = {
        "dynamic": {"past_key_values": DynamicCache(config=model.config)},
        "static": {"past_key_values": StaticCache(model.config, max_cache_len=20), "disable_compile": True},
        "dynamic_by_name": {"cache_implementation": "dynamic"},
        "none": {"use_cache": False},
    }[cache]
    assert torch.equal(generate(model, ids, do_sample=False, **options), expected)


QUANTO = pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed")
QUANTISED = [
    {"backend": "fp8"},
    pytest.param(  # slow: compiles an extension, a minute
        {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 4}, marks=[pytest.mark.slow, QUANTO]
    ),
]


@pytest.mark.parametrize("config", QUANTISED, ids=lambda config: config["backend"])
def test_a_quantised_cache_generates(config):
    model, ids = tiny_model(), random_ids(2, 7)
    tokens = generate(model, ids, do_sample=False, cache_implementation="quantized", cache_config=config)
    # The first tokens; later a near-tie may fall elsewhere, and what follows it differs.
    assert tokens.shape == (2, 15) and torch.equal(tokens[:, :9], generate(model, ids, do_sample=False)[:, :9])


def test_assisted_decoding_gives_the_models_own_tokens():
    model, ids = tiny_model(), random_ids(1, 7)
    assistant = tiny_model(num_hidden_layers=2)
    with torch.no_grad():  # similar enough for part of its drafts to be accepted
        assistant.load_state_dict({k: v for k, v in model.state_dict().items() if k in assistant.state_dict()})
    expected = generate(model, ids, do_sample=False)
    for helper in (assistant, tiny_model()):
        assert torch.equal(generate(model, ids, do_sample=False, assistant_model=helper), expected)
    assert torch.equal(generate(model, ids, do_sample=False, prompt_lookup_num_tokens=3), expected)


def test_generation_continues_a_cache_and_reports_logits():
    model, ids = tiny_model(), random_ids(1, 7)
    first = generate(model, ids, do_sample=False, return_dict_in_generate=True, output_logits=True)
    again = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    direct = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert torch.equal(again, direct)
    with torch.no_grad():
        full = model(first.sequences).logits[:, 6:-1]
    close(torch.stack(first.logits, dim=1), full)


def test_generating_from_embeddings():
    model, ids = tiny_model(), random_ids(2, 7)
    embeds = model.get_input_embeddings()(ids)
    tokens = generate(model, None, inputs_embeds=embeds, attention_mask=torch.ones_like(ids), do_sample=False)
    assert torch.equal(tokens, generate(model, ids, do_sample=False)[:, 7:])


def test_generation_leaves_training_state_alone():
    """A rollout in training mode (TRL's) counts no expert load and moves no buffer."""
    model, ids = tiny_model(num_nextn_predict_layers=1).train(), random_ids(2, 7)
    before = {name: value.clone() for name, value in model.named_buffers()}
    generate(model, ids, do_sample=True)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert not any(router.load_counts.any() for router in model.routers.values())


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def test_pipeline(tmp_path):
    model, tokenizer = tiny_model(), word_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generator.model) is type(model)
    prompts = ["w10 w11 w12", "w20 w21"]
    outputs = generator(prompts, batch_size=2, do_sample=False, return_full_text=False, **LENGTH)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = tokenizer.decode(generate(model, ids, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True)
        assert output[0]["generated_text"].split() == expected.split() and len(expected.split()) >= 6
