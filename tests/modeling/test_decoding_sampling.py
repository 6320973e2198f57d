"""Tokens chosen on the device against the library's processors, and the kernels against their torch twins.

On a GPU the kernels run as they are, elsewhere in Triton's interpreter (see `interpreted` in tests/conftest.py).
"""

import os

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as library
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from modeling_deepseek_r1 import kernels_sampling as kernels
from modeling_deepseek_r1.decoding_sampling import MAX_EOS_IDS, TokenSelector, split_criteria

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    kernels.triton is None or not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or the interpreter"
)
runs_elsewhere = pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
if INTERPRETED or torch.cuda.is_available():
    import triton
    import triton.language as tl

    @triton.jit
    def _write_exponentials(words, output, COUNT: tl.constexpr):
        lane = tl.arange(0, COUNT)
        tl.store(output + lane, kernels._exponential(tl.load(words + lane).to(tl.uint32, bitcast=True)))

PAD, EOS = 3, [1, 4]


def processors_of(case, prompt, vocab):
    """One of many lists, in the order of `generate` and in others."""
    length, padding = prompt.shape[1], (prompt != PAD).int().argmax(1)
    return LogitsProcessorList({
        "none": [],
        "temperature": [library.TemperatureLogitsWarper(0.7)],
        "all filters": [library.TemperatureLogitsWarper(1.3), library.TopKLogitsWarper(20),
                        library.TopPLogitsWarper(0.9), library.MinPLogitsWarper(0.05)],
        "reversed": [library.MinPLogitsWarper(0.01), library.TopPLogitsWarper(0.8), library.TopKLogitsWarper(5),
                     library.TemperatureLogitsWarper(0.6)],
        "twice": [library.TopKLogitsWarper(30), library.TopKLogitsWarper(9), library.TemperatureLogitsWarper(0.9)],
        "top-k beyond": [library.TopKLogitsWarper(vocab + 7), library.TemperatureLogitsWarper(2.0)],
        "penalty": [library.RepetitionPenaltyLogitsProcessor(1.9), library.TemperatureLogitsWarper(0.8)],
        "penalty, padding": [library.RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=padding)],
        "penalty, generated": [library.RepetitionPenaltyLogitsProcessor(0.6, prompt_ignore_length=length + 2)],
        "lengths": [library.MinLengthLogitsProcessor(length + 2, EOS),
                    library.MinNewTokensLengthLogitsProcessor(length, 4, EOS), library.TopPLogitsWarper(0.95)],
        "tokens": [library.SequenceBiasLogitsProcessor([[[2], 3.0], [[5], -2.5]]),
                   library.NoBadWordsLogitsProcessor([[0], [6]], EOS),
                   library.SuppressTokensLogitsProcessor([5, vocab + 1]),
                   library.SuppressTokensAtBeginLogitsProcessor([2, 7], length + 1)],
        "end": [library.ForcedEOSTokenLogitsProcessor(length + 5, EOS[:1]), library.InfNanRemoveLogitsProcessor(),
                library.ExponentialDecayLengthPenalty((2, 1.6), EOS[:1], length), library.LogitNormalization()],
    }[case])


CASES = ["none", "temperature", "all filters", "reversed", "twice", "top-k beyond", "penalty", "penalty, padding",
         "penalty, generated", "lengths", "tokens", "end"]


def generate(choose, logits, prompt, seed):
    """-> (B, prompt + steps) ids, `choose(ids, logits of the step)` called as in a loop."""
    torch.manual_seed(seed)
    ids = prompt
    for step_logits in logits:
        ids = torch.cat((ids, choose(ids, step_logits.clone()).unsqueeze(1)), 1)
    return ids


def library_choice(processors, do_sample, race=None):
    """`_sample`'s body: processors, argmax or multinomial (or `race`), padding of finished rows."""
    finished = None
    draw = race or (lambda scores: torch.multinomial(scores.softmax(-1), 1).squeeze(1))

    def choose(ids, logits):
        nonlocal finished
        scores = processors(ids, logits.float())
        tokens = draw(scores) if do_sample else scores.argmax(-1)
        finished = torch.zeros_like(tokens, dtype=torch.bool) if finished is None else finished
        tokens = torch.where(finished, PAD, tokens)
        finished = finished | torch.isin(tokens, torch.tensor(EOS, device=tokens.device))
        return tokens

    return choose


def device_choice(selector, prompt):
    state = selector.new_state(len(prompt))
    selector.reset_state(state, prompt)

    def choose(ids, logits):
        tokens = selector.choose(logits, state)
        selector.finish(tokens, state)
        return tokens

    return choose


def make_selector(processors, prompt, vocab, do_sample, device="cpu"):
    config = GenerationConfig(do_sample=do_sample, pad_token_id=PAD, eos_token_id=EOS)
    selector, reason = TokenSelector.from_processors(processors, config, prompt.shape[1], vocab, device, EOS)
    assert selector is not None, reason
    return selector


def random_case(batch, vocab, steps=7, dtype=torch.float32):
    prompt = torch.randint(5, vocab, (batch, 6))
    for row in range(batch):
        prompt[row, : row % 4] = PAD  # left padding
    logits = (torch.randn(steps, batch, vocab) * 3).to(dtype)
    logits[..., PAD] += 1
    return prompt, logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_tokens_equal_the_librarys(case, do_sample):
    changed = 0
    for seed, (batch, vocab, dtype) in enumerate([(1, 12, torch.float32), (3, 60, torch.bfloat16),
                                                  (5, 500, torch.float32), (4, 33, torch.float16)]):
        torch.manual_seed(seed)
        prompt, logits = random_case(batch, vocab, dtype=dtype)
        processors = processors_of(case, prompt, vocab)
        selector = make_selector(processors, prompt, vocab, do_sample)
        ours = generate(device_choice(selector, prompt), logits, prompt, seed)
        assert torch.equal(ours, generate(library_choice(processors, do_sample), logits, prompt, seed))
        plain = generate(library_choice(LogitsProcessorList(), do_sample), logits, prompt, seed)
        changed += not torch.equal(ours, plain)
    if case in ("penalty", "penalty, padding", "lengths", "tokens", "end"):
        assert changed, "the processors never mattered: the test proves nothing"


@pytest.mark.parametrize("case", CASES)
def test_processed_scores_equal_the_librarys(case):
    prompt, logits = random_case(4, 40, steps=1)
    logits[0, 0, 10:] = -torch.inf
    logits[0, 1] = 0.5
    logits[0, 2] = logits[0, 2].round()
    processors = processors_of(case, prompt, 40)
    selector = make_selector(processors, prompt, 40, True)
    state = selector.new_state(4)
    selector.reset_state(state, prompt)
    assert torch.equal(selector.process(logits[0], state), processors(prompt, logits[0].clone()))


def test_rows_at_different_steps():
    """`step` may be one number a row: each row then obeys its own length."""
    prompt, logits = random_case(3, 30, steps=1)
    selector = make_selector(processors_of("lengths", prompt, 30), prompt, 30, True)
    state = selector.new_state(3)
    state.step = torch.tensor([0, 3, 4])
    blocked = (selector.process(logits[0].clamp(-1, 1), state)[:, EOS] == -torch.inf).all(1)
    assert blocked.tolist() == [True, True, False]


def test_rows_can_start_anew():
    """A refilled row forgets its past, the others keep theirs."""
    prompt, logits = random_case(3, 30, steps=3)
    selector = make_selector(processors_of("penalty, padding", prompt, 30), prompt, 30, False)
    state = selector.new_state(3)
    state.step = torch.zeros(3, dtype=torch.int64)
    selector.reset_state(state, prompt)
    for step_logits in logits:
        selector.finish(selector.choose(step_logits, state), state)
    state.finished.fill_(True)
    before = state.seen.clone()
    selector.reset_state(state, torch.tensor([[PAD, 9, 8]]), rows=torch.tensor([1]), ignore=torch.tensor([1]))
    assert state.step.tolist() == [3, 0, 3] and state.finished.tolist() == [True, False, True]
    assert state.seen[1].nonzero().flatten().tolist() == [8, 9]
    assert torch.equal(state.seen[[0, 2]], before[[0, 2]])


def chi_square(counts, expected):
    """-> p-value of Pearson's statistic (no SciPy: the regularised incomplete gamma function of torch)."""
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), (statistic / 2).float()).item()


def check_distribution(selector, draws, device):
    logits = torch.linspace(-1.0, 2.0, 11, device=device)
    rows = logits.expand(2_000, -1).contiguous()
    state = selector.new_state(len(rows))
    counts = sum(torch.bincount(selector.choose(rows, state), minlength=11) for _ in range(draws // len(rows))).cpu()
    expected = (logits / 0.7).softmax(-1).double().cpu()
    assert chi_square(counts.double(), expected * counts.sum()) > 1e-4
    wrong = (logits / 0.75).softmax(-1).double().cpu()
    assert chi_square(counts.double(), wrong * counts.sum()) < 1e-4


def test_draws_follow_the_distribution():
    prompt = torch.full((1, 4), 5)
    processors = LogitsProcessorList([library.TemperatureLogitsWarper(0.7)])
    check_distribution(make_selector(processors, prompt, 11, True), 100_000, "cpu")


class OwnTemperature(library.TemperatureLogitsWarper):
    pass


@pytest.mark.parametrize("processor, reason", [
    (OwnTemperature(0.5), "OwnTemperature"),
    (library.NoRepeatNGramLogitsProcessor(2), "NoRepeatNGram"),
    (library.TypicalLogitsWarper(0.5), "Typical"),
    (library.TopPLogitsWarper(0.5, min_tokens_to_keep=2), "min_tokens_to_keep=2"),
    (library.TopKLogitsWarper(5, filter_value=-9.0), "filter_value=-9.0"),
    (library.NoBadWordsLogitsProcessor([[2], [5, 6]]), "several tokens"),
    (library.SequenceBiasLogitsProcessor([[[99], 1.0]]), "outside of the vocabulary"),
    (lambda ids, scores: scores, "function"),
])
def test_unknown_processors_are_refused(processor, reason):
    config = GenerationConfig(do_sample=True, pad_token_id=PAD)
    selector, why = TokenSelector.from_processors([processor], config, 4, 20, "cpu")
    assert selector is None and reason in why


def test_too_many_ends_and_no_pad_are_refused():
    build = lambda eos, **config: TokenSelector.from_processors([], GenerationConfig(**config), 4, 99, "cpu", eos)
    assert build(list(range(MAX_EOS_IDS)), pad_token_id=0)[0] is not None
    assert f"{MAX_EOS_IDS + 1} end-of-sequence ids" in build(list(range(MAX_EOS_IDS + 1)), pad_token_id=0)[1]
    assert "pad_token_id" in build([1])[1]


def test_parameters_are_rewritten_in_place():
    prompt, logits = random_case(4, 50)
    first, second, other = (LogitsProcessorList([library.RepetitionPenaltyLogitsProcessor(penalty),
                                                 library.TemperatureLogitsWarper(t), library.TopKLogitsWarper(k)])
                            for penalty, t, k in ((1.2, 0.5, 3), (1.9, 2.0, 40), (1.5, 1.5, 10)))
    selector = make_selector(first, prompt, 50, True)
    addresses = {name: value.data_ptr() for name, value in selector.parameters.items()}
    fresh = make_selector(second, prompt, 50, True)
    assert selector.signature == fresh.signature and hash(selector.signature) == hash(fresh.signature)
    selector.load_parameters(fresh)
    assert addresses == {name: value.data_ptr() for name, value in selector.parameters.items()}
    expected = generate(library_choice(second, True), logits, prompt, 1)
    assert torch.equal(generate(device_choice(selector, prompt), logits, prompt, 1), expected)
    shorter = make_selector(other[:2], prompt, 50, True)
    assert shorter.signature != selector.signature
    assert make_selector(second, prompt, 50, False).signature != selector.signature
    with pytest.raises(ValueError, match="signature"):
        selector.load_parameters(shorter)


def test_criteria_are_split():
    class OwnEos(EosTokenCriteria):
        pass

    own, clock = OwnEos(9), MaxTimeCriteria(3.0)
    criteria = StoppingCriteriaList([MaxLengthCriteria(20), clock, EosTokenCriteria([4, 1]), MaxLengthCriteria(15),
                                     EosTokenCriteria(7)])
    assert split_criteria(criteria) == (15, [1, 4, 7], [clock])
    assert split_criteria([own]) == (None, [], [own])  # its finished rows are padded, as the library does
    assert split_criteria([clock]) == (None, None, [clock])


def test_log_probabilities_are_of_the_unprocessed_logits():
    prompt, logits = random_case(3, 50)
    selector = make_selector(processors_of("all filters", prompt, 50), prompt, 50, True)
    tokens, out = torch.tensor([4, 49, 0]), torch.empty(3)
    assert selector.log_prob_of(logits[0], tokens, out) is out
    torch.testing.assert_close(out, logits[0].log_softmax(-1)[range(3), tokens])


# ---- the kernels' noise --------------------------------------------------------------------------------------------


def test_philox_gives_its_known_answers():
    """Random123's vectors for all bits zero and all set."""
    words = lambda bits: [f"{int(word):08x}" for word in kernels.philox_reference(*[torch.tensor(bits)] * 6)]
    assert words(0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words(0xFFFFFFFF) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_noise_is_exponential_and_independent():
    """By chi-square, ten equally probable bins: one row, one token, pairs of neighbours, down to 1e-6 of the mass."""
    noise = kernels.exponential_reference(torch.tensor([12345678901234567, 5]), 200, 5000)
    assert noise.min() > 0 and noise.isfinite().all()
    fair = lambda share: chi_square(torch.histc(share, 10, 0, 1).double(), torch.full((10,), share.numel() / 10.0))
    share = -torch.expm1(-noise)
    pairs = lambda a, b: (a * 10).long().clamp(max=9) * 10 + (b * 10).long().clamp(max=9)
    for part in (share, share[7], share[:, 4999], share[:, :5], (share[share < 1e-3] * 1e3)):
        assert fair(part) > 1e-4
    stride = kernels.STRIDE
    for a, b in ((share[:, :-1], share[:, 1:]), (share[:-1], share[1:]), (share[:, :-stride], share[:, stride:])):
        counts = torch.bincount(pairs(a, b).flatten(), minlength=100).double()
        assert chi_square(counts, torch.full((100,), a.numel() / 100.0)) > 1e-4
    assert abs((share < 1e-4).double().mean() * 1e4 - 1) < 0.5  # 100 expected
    other = kernels.exponential_reference(torch.tensor([12345678901234567, 6]), 3, 50)
    assert not (other == noise[:3, :50]).any()


def test_twins_draws_follow_the_distribution():
    logits = torch.linspace(-1.0, 2.0, 11)
    logits[3] = -9.0  # rare: 20 of 100,000
    rows = logits.expand(100_000, -1)
    counts = torch.bincount(kernels.draw_tokens_reference(rows, torch.tensor([99, 2**62 + 1])), minlength=11).double()
    assert chi_square(counts, logits.double().softmax(-1) * len(rows)) > 1e-4
    assert chi_square(counts, (logits / 1.1).double().softmax(-1) * len(rows)) < 1e-4


# ---- kernels -------------------------------------------------------------------------------------------------------


def quick(values, count):
    """All values; those after the first `count`, the interpreter being slow, marked so."""
    return values[:count] + [pytest.param(value, marks=pytest.mark.slow) for value in values[count:]]


FILTER_SETTINGS = [  # temperature, top_k, top_p, min_p
    (0.8, 12, 0.95, 0.05), (None, None, 0.9, None), (1.1, 300, 0.7, None),
    (None, None, 1.0, None), (1.5, None, None, 0.1), (0.7, 7, None, None),
    (None, 1, None, None), (1.0, 500, None, None), (0.5, None, 0.3, None), (None, None, 1e-6, None),
    (None, None, 0.0, None), (None, None, None, 1.0), (None, None, None, 0.0), (None, None, 0.7, 0.2),
    (0.6, 40, None, 0.02), (None, 20, 0.999, None), (None, None, 0.9999, None),
]
DRAWS = [(0.7, None, None, None), (0.7, 30, 0.9, 0.01), (None,) * 4]


def numbers_of(setting):
    temperature, top_k, top_p, min_p = setting
    tensor = lambda value, dtype=torch.float32: torch.tensor(value, dtype=dtype, device=DEVICE)
    numbers = {} if temperature is None else {"inverse_temperature": tensor(1 / temperature)}
    numbers |= {} if top_k is None else {"top_k": tensor(top_k, torch.int64)}
    numbers |= {} if top_p is None else {"one_minus_p": tensor(1 - top_p)}
    return numbers | ({} if min_p is None else {"min_p": tensor(min_p)})


def difficult_logits(vocab):
    """Rows: normal, wide, equal, ties, few finite, one finite, huge range, zeros of both signs, sorted.

    `vocab` is to be prime: the mass of some of the equal scores then never is p but for rounding.
    """
    rows = torch.randn(9, vocab) * torch.tensor([1, 6, 0, 2, 1, 0, 3000, 0, 0]).unsqueeze(1)
    rows[3] = rows[3].round()
    rows[4, torch.randperm(vocab)[: vocab - 6]] = -torch.inf
    rows[5, 1:] = -torch.inf
    rows[7] = torch.where(torch.rand(vocab) < 0.5, 0.0, -0.0)
    rows[8] = torch.linspace(5, -5, vocab)
    return rows.to(DEVICE)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a row, without a large vocabulary."""
    if INTERPRETED:
        for name, value in (("BLOCK", 64), ("CANDIDATES", 64), ("STRIDE", 16), ("MANY_ROWS", 5)):
            monkeypatch.setattr(kernels, name, value)


@runs_elsewhere
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


@runs_elsewhere
@pytest.mark.slow
def test_slow_ones_in_the_interpreter(interpreted_slow):
    interpreted_slow(__file__)


@needs_kernels
@pytest.mark.parametrize("setting", quick(FILTER_SETTINGS, 2))
def test_kernel_keeps_what_the_library_keeps(setting, small_blocks):
    logits = difficult_logits(89)
    numbers = numbers_of(setting)
    warpers = LogitsProcessorList()
    temperature, top_k, top_p, min_p = setting
    warpers += [library.TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [library.TopPLogitsWarper(top_p)] if top_p is not None else []
    warpers += [library.MinPLogitsWarper(min_p)] if min_p is not None else []
    ours = kernels.filter_scores(logits, **numbers)
    scaled = logits if temperature is None else logits * numbers["inverse_temperature"]
    expected = warpers(None, scaled)
    rows = list(range(9))
    if top_p is not None:  # the library's sort promises no order of ties: only how many are kept
        torch.testing.assert_close(ours.isfinite().sum(1), expected.isfinite().sum(1))
        rows = [0, 1, 4, 5, 6, 8]
    assert torch.equal(ours[rows], expected[rows])
    assert torch.equal(ours, kernels.filter_scores_reference(logits, **numbers))


@needs_kernels
@pytest.mark.parametrize("dtype", quick([torch.bfloat16, torch.float32, torch.float16], 1))
@pytest.mark.parametrize("setting", quick(DRAWS, 2))
def test_kernel_draws_what_the_twin_draws(setting, dtype, small_blocks):
    """The same noise, so the same tokens: the last group of four runs is cut, and a row has several programs. The
    scores are nearly equal: any noise that is not the twin's shows."""
    numbers, logits = numbers_of(setting), (torch.randn(8, 90, device=DEVICE) * 0.2).to(dtype)
    seed = kernels.draw_seed(DEVICE)
    drawn = kernels.draw_tokens(logits, seed, **numbers)
    assert torch.equal(drawn, kernels.draw_tokens_reference(logits, seed, **numbers))


@needs_kernels
def test_kernel_noise_is_right_at_both_ends():
    edges = torch.tensor([0, 1, 2, 2**26 - 1, 2**26, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    words = torch.cat((edges, torch.logspace(0, 9.63, 1000).long(), torch.randint(2**32, (15,)))).to(DEVICE)
    output = torch.empty(1024, device=DEVICE)
    _write_exponentials[(1,)](words.to(torch.int32), output, COUNT=1024)
    expected = -torch.log1p((words.double() + 0.5) / -(2.0**32)) / 0.6931471805599453
    torch.testing.assert_close(output.double(), expected, rtol=3e-5, atol=0)


@needs_kernels
def test_kernel_takes_the_first_of_the_largest(small_blocks):
    logits = (torch.randn(3, 90, device=DEVICE) * 2).round()
    assert torch.equal(kernels.draw_tokens(logits, None), logits.argmax(-1))


@needs_kernels
@pytest.mark.slow
def test_kernel_draws_follow_the_distribution(small_blocks):
    """The twin's do (see above) and the kernel draws what the twin draws; here once more from end to end."""
    logits, rows = torch.linspace(-1.0, 2.0, 11, device=DEVICE), 300 if INTERPRETED else 200_000
    for setting in DRAWS[:1] + [(0.7, 11, None, None)]:
        counts = torch.bincount(kernels.draw_tokens(
            logits.expand(rows, -1), kernels.draw_seed(DEVICE), **numbers_of(setting)), minlength=11)  # fmt: skip
        expected = (logits / 0.7).softmax(-1).double().cpu()
        assert chi_square(counts.double().cpu(), expected * rows) > 1e-4


@needs_kernels
def test_kernel_serves_rows_without_a_finite_score(small_blocks):
    logits = torch.full((2, 100), -torch.inf, device=DEVICE)
    logits[1] = torch.nan
    for setting in [(None,) * 4, FILTER_SETTINGS[0]]:
        drawn = kernels.draw_tokens(logits, kernels.draw_seed(DEVICE), **numbers_of(setting))
        assert ((drawn >= 0) & (drawn < 100)).all()


@needs_kernels
@pytest.mark.parametrize("case", quick(["penalty", "reversed", *CASES], 1))
def test_kernel_selector_races_the_librarys_scores(case, small_blocks):
    prompt, logits = random_case(2, 60, steps=2)
    prompt, logits = prompt.to(DEVICE), logits.to(DEVICE)
    processors = processors_of(case, prompt, 90)
    for processor in processors:
        if hasattr(processor, "eos_token_id"):
            processor.eos_token_id = processor.eos_token_id.to(DEVICE)
    selector = make_selector(processors, prompt, 60, True, DEVICE)
    selector.use_kernels = True
    ours = generate(device_choice(selector, prompt), logits, prompt, 5)
    race = lambda scores: kernels.draw_tokens_reference(scores, kernels.draw_seed(DEVICE))
    assert torch.equal(ours, generate(library_choice(processors, True, race), logits, prompt, 5))


@needs_kernels
def test_kernel_ends_rows():
    tokens, finished = torch.arange(100, device=DEVICE) % 9, torch.rand(100, device=DEVICE) < 0.3
    eos, pad = torch.tensor([4, 7] + [-1] * 14, device=DEVICE), torch.tensor(3, device=DEVICE)
    expected = tokens.clone(), finished.clone()
    kernels.finish_rows(tokens, finished, eos, pad)
    kernels.finish_rows_reference(*expected, eos, pad)
    assert torch.equal(tokens, expected[0]) and torch.equal(finished, expected[1])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_log_probabilities(dtype, small_blocks):
    logits = (torch.randn(5, 150, device=DEVICE) * 9).to(dtype)
    logits[0, 60:] = -torch.inf
    tokens, out, expected = torch.randint(60, (5,), device=DEVICE), *torch.empty(2, 5, device=DEVICE)
    kernels.token_log_probs(logits, tokens, out)
    kernels.token_log_probs_reference(logits, tokens, expected)
    torch.testing.assert_close(out, expected)  # fp32 sums in another order
