"""`generate(..., use_mtp=True)`: drafts change how fast tokens come, never which tokens or how they are distributed."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import StoppingCriteria

from modeling_deepseek_r1 import decoding_mtp
from modeling_deepseek_r1.decoding_engine import DecodingEngine, StepBatch, batch_size_for

from .helpers import close, library_twin, padded, random_ids, tiny_model

DRAFTS = {"use_mtp": True, "do_sample": False}


@torch.no_grad()
def drafting_model(layers=1, drafts=1, context=0.0, right=True, **changes):
    """A model that looks at earlier tokens only as far as `context`, and whose MTP layers do as its main layers.

    context 0: the next token follows from the last one alone, and every draft is right, or wrong unless `right`.
    """
    model = tiny_model(num_nextn_predict_layers=layers, implementation="sdpa", **changes)
    for name, weight in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            weight.mul_(context)
    for layer in model.model.mtp_layers:
        width = model.config.hidden_size
        layer.eh_proj.weight[:, width:].mul_(context)
        layer.eh_proj.weight[:, :width] = torch.eye(width) * (1 if right else -1)
        layer.enorm.weight.fill_(1.0)
        layer.shared_head["norm"].weight.copy_(model.model.norm.weight)
    model.decoding.drafts = drafts
    return model


def mtp_cache(monkeypatch):
    """Keeps caches open behind `generate`; -> the list that receives them."""
    kept = []

    def close_later(engine):
        kept.append(engine.cache)
        engine.cache = None

    monkeypatch.setattr(DecodingEngine, "close", close_later)
    return kept


@pytest.mark.parametrize("layers, drafts, context", [(1, 1, 0.5), (1, 2, 0.4), (1, 3, 1.0), (2, 2, 0.4), (2, 3, 0.4),
                                                     (3, 3, 0.2)])  # fmt: skip
def test_greedy_tokens_equal_the_librarys(layers, drafts, context):
    model = drafting_model(layers, drafts, context)
    model.decoding.prefill_tokens = 8  # prompts are read in chunks
    ids, mask, _ = padded(random_ids(4, 9), "left", (0, 5, 2, 0))
    ids[3] = ids[0]  # a prompt that is read once for two rows
    options = {"attention_mask": mask, "max_length": 25, "pad_token_id": 0}
    twin = library_twin(model)
    endless = twin.generate(ids, do_sample=False, eos_token_id=None, **options)
    assert torch.equal(model.generate(ids, eos_token_id=None, **options, **DRAFTS), endless)
    statistics = model.decoding_statistics
    assert statistics["tokens"] == 4 * 15
    if context < 1:
        assert 0 < statistics["accepted"] < statistics["drafted"]
    # Ends in the middle of a run, at other columns in other rows; the rest is padding.
    for end in (endless[0, 14], endless[1, 20])[: 1 + layers // 2]:
        expected = twin.generate(ids, do_sample=False, eos_token_id=[int(end), 2], **options)
        tokens = model.generate(ids, eos_token_id=[int(end), 2], **options, **DRAFTS)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("length", range(10, 18))
def test_a_row_ends_at_max_length_in_the_middle_of_a_run(length):
    model, ids = drafting_model(1, 3), random_ids(2, 9)
    tokens = model.generate(ids, max_length=length, eos_token_id=None, **DRAFTS)
    assert torch.equal(tokens, library_twin(model).generate(ids, max_length=length, eos_token_id=None, do_sample=False))


@pytest.mark.parametrize("right", [True, False])
def test_statistics_of_drafts_that_are_all_right_or_all_wrong(right):
    model, ids = drafting_model(1, 2, right=right), random_ids(2, 6)
    model.generate(ids, max_new_tokens=12, eos_token_id=None, **DRAFTS)
    # 1 token from the prompt, 11 from steps. All right: 3 + 3 + 3 + 2. All wrong: 11 steps, the last with room for 1.
    if right:
        expected = {"steps": 4, "drafted": 16, "accepted": 16, "tokens": 22, "acceptance": 1.0,
                    "acceptance_by_depth": [1.0, 1.0], "tokens_per_step": 11 / 4}  # fmt: skip
    else:
        expected = {"steps": 11, "drafted": 42, "accepted": 0, "tokens": 22, "acceptance": 0.0,
                    "acceptance_by_depth": [0.0, 0.0], "tokens_per_step": 1.0}  # fmt: skip
    assert model.decoding_statistics == expected


def test_statistics_leave_finished_rows_out():
    model, ids = drafting_model(1, 1), random_ids(2, 6)
    twin = library_twin(model).generate(ids, max_new_tokens=9, eos_token_id=None, do_sample=False)
    end = int(twin[0, 6])
    assert end not in twin[1, 6:]
    model.generate(ids, max_new_tokens=9, eos_token_id=end, pad_token_id=0, **DRAFTS)
    # Row 0 ends with the token of its prompt; row 1 has 8 more, 2 a step.
    assert {"steps": 4, "drafted": 4, "accepted": 4, "tokens": 8}.items() <= model.decoding_statistics.items()


@pytest.mark.parametrize("layers, drafts", [(1, 1), (1, 2), (2, 2), (3, 3)])
@torch.no_grad()
def test_cache_and_drafts_are_those_of_the_full_forward(layers, drafts, monkeypatch):
    model, caches, steps = drafting_model(layers, drafts, 0.05), mtp_cache(monkeypatch), []
    model.decoding.prefill_tokens = 5
    original = decoding_mtp.Drafting.__call__

    def recording(drafting, batch):
        steps.append((batch.tokens.clone(), batch.lengths.clone(), batch.finished.clone()))
        return original(drafting, batch)

    monkeypatch.setattr(decoding_mtp.Drafting, "__call__", recording)
    ids, mask, _ = padded(random_ids(3, 8), "left", (3, 0, 0))
    ids[2] = ids[1]  # read once
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=None, **DRAFTS)
    assert model.decoding_statistics["acceptance"] > 0.15
    for row, skipped in enumerate((3, 0, 0)):
        sequence = tokens[row : row + 1, skipped:]

        def predicted(known):
            """The MTP layers' states over `known` (1, T), and their cache."""
            states, cache = model.model(known, use_cache=False).last_hidden_state, DynamicCache()
            return list(model.mtp_hidden_states(states, known, None, None, None, past_key_values=cache)), cache

        _, cache = predicted(sequence)
        for depth in range(layers):
            index, final = model.config.num_hidden_layers + depth, sequence.shape[1] - 1 - depth - drafts
            expected = torch.cat((cache.layers[index].keys, cache.layers[index].values), dim=-1)[0, 0]
            close(caches[0].buffers[index][row, :final], expected[:final])
        for batch_tokens, lengths, finished in steps:
            length = int(lengths[row])
            if finished[row]:
                continue  # what it drafts means nothing
            known = torch.cat((sequence[:, :length], batch_tokens[row : row + 1]), dim=1)
            for depth in range(min(layers, drafts)):
                states = predicted(known[:, : length + 1 + depth])[0][depth][:, length - 1]
                assert model.lm_head(states).argmax() == batch_tokens[row, 1 + depth]


# ------------------------------------------------------------ sampling

SMALL = {"vocab_size": 7, "num_hidden_layers": 2, "n_routed_experts": None, "initializer_range": 0.4}
PROCESSORS = {
    "plain": {"temperature": 1.5, "top_k": 0},
    "filters": {"temperature": 1.7, "top_k": 5, "top_p": 0.9, "min_p": 0.02},
    "past": {"temperature": 1.2, "top_k": 0, "repetition_penalty": 2.5, "min_new_tokens": 2},
}


def small_model(drafts, layers=1):
    """Its drafts are drawn from a distribution far from the model's own."""
    model = tiny_model(num_nextn_predict_layers=layers, implementation="sdpa", **SMALL)
    model.decoding.drafts = drafts
    return model


@torch.no_grad()
def exact_distribution(model, prompt, length, options):
    """(V ** length,) probabilities of the first `length` tokens, by full forwards and the library's processors."""
    vocab = model.config.vocab_size
    total = torch.ones(1, dtype=torch.float64)
    sequences = prompt.unsqueeze(0)
    for step in range(length):
        scores = model(sequences, use_cache=False).logits[:, -1].float()
        if "min_new_tokens" in options:
            minimum = logits_process.MinNewTokensLengthLogitsProcessor(len(prompt), options["min_new_tokens"], 2)
            scores = minimum(sequences, scores)
        if "repetition_penalty" in options:
            scores = logits_process.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(sequences, scores)
        scores = scores / options["temperature"]
        for name, warper in (("top_k", logits_process.TopKLogitsWarper), ("top_p", logits_process.TopPLogitsWarper),
                             ("min_p", logits_process.MinPLogitsWarper)):  # fmt: skip
            if options.get(name):
                scores = warper(options[name])(sequences, scores)
        total = (total.unsqueeze(1) * scores.double().softmax(-1)).flatten()
        following = torch.arange(vocab).repeat(len(sequences)).unsqueeze(1)
        sequences = torch.cat((sequences.repeat_interleave(vocab, 0), following), dim=1)
    return total


def chi_square(observed, expected):
    """p-value of counts against expected counts; cells with fewer than 5 expected are one cell."""
    assert observed[expected == 0].sum() == 0
    small = expected < 5
    observed = torch.cat((observed[~small], observed[small].sum().view(1)))
    expected = torch.cat((expected[~small], expected[small].sum().view(1).clamp_min(1e-9)))
    statistic = ((observed - expected) ** 2 / expected)[expected > 1e-6].sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0), statistic.float() / 2))


def p_value(model, options, rows=5000, length=3):
    prompt = torch.tensor([3, 5, 4, 3])
    # One token more than is looked at, so that no step is cut short.
    tokens = model.generate(prompt.expand(rows, -1), do_sample=True, use_mtp=True, max_new_tokens=length + 1,
                            pad_token_id=0, eos_token_id=2 if "min_new_tokens" in options else None, **options)
    tokens = tokens[:, 4 : 4 + length]
    place = sum(tokens[:, i] * model.config.vocab_size ** (length - 1 - i) for i in range(length))
    probabilities = exact_distribution(model, prompt, length, options)
    observed = torch.bincount(place, minlength=len(probabilities)).double()
    if not model.decoding_statistics["accepted"]:
        raise AssertionError("no draft was accepted: nothing is tested")
    return chi_square(observed, probabilities * rows)


@pytest.mark.parametrize("kind, drafts, layers", [("plain", 1, 1), ("plain", 3, 2), ("filters", 2, 1), ("past", 2, 1)])
def test_sampled_tokens_have_the_exact_joint_distribution(kind, drafts, layers):
    options = PROCESSORS[kind]
    model = small_model(drafts, layers)
    if kind == "past":  # most drafts are kept, so that what follows was chosen in their presence
        model = drafting_model(layers, drafts, 0.05, **SMALL)
    assert p_value(model, options) > 1e-3


def accept_all(probabilities, drafts, draft_probabilities):
    everything = torch.full(drafts.shape[:1], drafts.shape[1])
    return everything, decoding_mtp.draw(probabilities[:, -1])


def without_residual(probabilities, drafts, draft_probabilities):
    accepted, _ = ORIGINAL(probabilities, drafts, draft_probabilities)
    return accepted, decoding_mtp.draw(decoding_mtp.pick(probabilities, accepted).squeeze(1))


ORIGINAL = decoding_mtp.accept_sampled


@pytest.mark.parametrize("wrong", [accept_all, without_residual])
def test_the_test_of_the_distribution_sees_wrong_acceptance(wrong, monkeypatch):
    monkeypatch.setattr(decoding_mtp, "accept_sampled", wrong)
    assert p_value(small_model(1), PROCESSORS["plain"]) < 1e-6


def test_drafts_drawn_from_the_same_distribution_are_all_accepted():
    probabilities = torch.rand(500, 3, 11).softmax(-1)
    drafts = decoding_mtp.draw(probabilities[:, :2])
    draft_probabilities = torch.cat((probabilities[:, :2], torch.zeros(500, 1, 11)), dim=1)
    accepted, following = decoding_mtp.accept_sampled(probabilities, drafts, draft_probabilities)
    assert (accepted == 2).all() and following.max() < 11


# ------------------------------------------------------------ around it

def keep_batches(monkeypatch):
    """Batches filled up with padding rows and kept from call to call, as where graphs of them are recorded."""
    kept = {}

    def batch(engine, rows, steps, kind, make_body):
        key = (batch_size_for(rows), steps, kind)
        if key not in kept:
            kept[key] = StepBatch(engine, batch_size_for(rows), steps)
            kept[key].body = make_body(kept[key])
        return kept[key]

    monkeypatch.setattr(DecodingEngine, "batch", batch)
    return kept


def test_a_kept_batch_serves_calls_of_other_sizes_and_numbers(monkeypatch):
    model, kept = drafting_model(2, 2, 0.4), keep_batches(monkeypatch)
    twin = library_twin(model)
    for rows, width, penalty in ((9, 7, 1.5), (10, 4, 3.0), (9, 5, 1.5)):
        ids = random_ids(rows, width)
        options = {"max_new_tokens": 9, "pad_token_id": 0, "repetition_penalty": penalty}
        end = int(twin.generate(ids[:1], do_sample=False, eos_token_id=None, **options)[0, -4])
        tokens = model.generate(ids, eos_token_id=end, **options, **DRAFTS)
        assert torch.equal(tokens, twin.generate(ids, do_sample=False, eos_token_id=end, **options))
        assert model.decoding_statistics["tokens"] <= rows * 8
    assert len(kept) == 1


def test_the_cache_grows_while_rows_have_different_lengths(monkeypatch):
    monkeypatch.setattr(decoding_mtp, "GROWTH", 1)
    model, caches, ids = drafting_model(1, 2, 0.3), mtp_cache(monkeypatch), random_ids(2, 50)
    options = {"max_new_tokens": 40, "eos_token_id": None}
    tokens = model.generate(ids, **options, **DRAFTS)
    assert caches[0].capacity == 128
    assert torch.equal(tokens, library_twin(model).generate(ids, do_sample=False, **options))


class Listener:
    def __init__(self):
        self.shown, self.ended = [], False

    def put(self, tokens):
        self.shown.append(tokens.tolist())

    def end(self):
        self.ended = True


class StopsAt(StoppingCriteria):
    """Ends a row that has `token`; notes the lengths that it was shown."""

    def __init__(self, token):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


def test_streamer_and_criteria_see_every_token():
    model, ids = drafting_model(1, 3), random_ids(1, 6)
    endless = model.generate(ids, max_new_tokens=12, eos_token_id=None, **DRAFTS)
    listener, criterion = Listener(), StopsAt(int(endless[0, 11]))
    first = int((endless[0, 6:] == endless[0, 11]).nonzero()[0]) + 7  # a cycle may bring the token earlier
    tokens = model.generate(ids, max_new_tokens=12, eos_token_id=None, streamer=listener, stopping_criteria=[criterion],
                            **DRAFTS)  # fmt: skip
    assert torch.equal(tokens, endless[:, :first])
    assert listener.ended and listener.shown == [ids.tolist(), *([token] for token in tokens[0, 6:].tolist())]
    assert criterion.lengths == list(range(7, first + 1))


def test_the_returned_cache_goes_on():
    model, ids = drafting_model(1, 2, 0.4), random_ids(2, 6)
    output = model.generate(ids, max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True, **DRAFTS)
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    with torch.no_grad():
        close(model(output.sequences[:, -1:], past_key_values=output.past_key_values).logits[:, -1],
              model(output.sequences, use_cache=False).logits[:, -1])  # fmt: skip


def test_a_trained_model_in_training_mode_is_left_as_it_was():
    model, ids = drafting_model(1, 2, 0.4, attention_dropout=0.5).train(), random_ids(2, 6)
    tokens = model.generate(ids, max_new_tokens=8, eos_token_id=None, **DRAFTS)
    assert all(module.training for module in model.modules())
    assert not model.model._forward_hooks
    assert torch.equal(tokens, library_twin(model).generate(ids, max_new_tokens=8, eos_token_id=None, do_sample=False))


def test_a_model_without_layers_is_told_so():
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        tiny_model().generate(random_ids(2, 5), max_new_tokens=3, **DRAFTS)


def test_scores_come_from_plain_decoding():
    model, ids = drafting_model(1, 2), random_ids(2, 6)
    options = {"max_new_tokens": 5, "eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(ids, **options, **DRAFTS)
    assert len(output.scores) == 5 and model.decoding_statistics == {}
    assert torch.equal(output.sequences, library_twin(model).generate(ids, do_sample=False, **options).sequences)


class Unknown(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.roll(1, -1)


def test_unknown_processors_come_from_plain_decoding():
    model, ids = drafting_model(1, 2), random_ids(2, 6)
    options = {"max_new_tokens": 5, "eos_token_id": None, "logits_processor": [Unknown()]}
    tokens = model.generate(ids, **options, **DRAFTS)
    assert model.decoding_statistics == {}
    assert torch.equal(tokens, library_twin(model).generate(ids, do_sample=False, **options))


def test_prompt_lookup_stays_the_librarys():
    model, ids = drafting_model(1, 2), random_ids(1, 6)
    tokens = model.generate(ids, max_new_tokens=8, eos_token_id=None, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(tokens, library_twin(model).generate(ids, max_new_tokens=8, eos_token_id=None, do_sample=False))
