"""The kernels around the layers of a step, and the step with drafts that is made of them, against torch.

On a GPU the kernels run as they are, elsewhere in Triton's interpreter (see `interpreted` in tests/conftest.py).
"""

import os

import pytest
import torch

from modeling_deepseek_r1 import decoding_rows as twins
from modeling_deepseek_r1.decoding_rows import LOWEST, SLOTS, Feed, RowState
from tests.modeling.helpers import padded, random_ids, tiny_model
from tests.modeling.test_mtp_decoding import DRAFTS, drafting_model

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")
if DEVICE == "cuda" or INTERPRETED:
    from modeling_deepseek_r1 import decoding_mtp, kernels_drafting

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
@pytest.mark.slow
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
@pytest.mark.slow
def test_slow_ones_in_the_interpreter(interpreted_slow):
    interpreted_slow(__file__)


def random(*shape, dtype=FP32):
    return torch.randn(*shape).to(DEVICE, dtype)


def feed_of(tokens, width, vocab, dtype):
    parts = [random(tokens, width, dtype=dtype), random(width, dtype=dtype), random(vocab, width, dtype=dtype)]
    return Feed(*parts, random(width, dtype=dtype), random(width, dtype=dtype), 1e-6,
                torch.empty(tokens, 2 * width, dtype=dtype, device=DEVICE))  # fmt: skip


def close(result, expected, dtype):
    torch.testing.assert_close(result.float(), expected.float(), rtol=1e-5 if dtype == FP32 else 2e-2, atol=1e-5)


@runs_kernels
def test_begin():
    tokens, embedding = torch.tensor([[3, 0], [8, 3]], device=DEVICE), random(9, 37, dtype=BF16)
    hidden, counts = torch.empty(4, 37, dtype=BF16, device=DEVICE), torch.ones(70, 23, dtype=torch.int32, device=DEVICE)
    kernels_drafting.begin(tokens, embedding, hidden, counts)
    assert torch.equal(hidden, embedding[tokens.flatten()]) and not counts.any()
    kernels_drafting.begin(tokens[:1], embedding, hidden[2:], None)
    assert torch.equal(hidden[2:], embedding[tokens[0]])


@runs_kernels
@pytest.mark.parametrize("tokens, width, vocab, dtype, picked", [
    (1, 40, 45, BF16, True), (3, 33, 70, FP32, False), (2, 2100, 40, BF16, True), (5, 2100, 9, FP32, False),
])  # fmt: skip
def test_best_tokens(tokens, width, vocab, dtype, picked):
    hidden, norm = random(tokens + 4, width, dtype=dtype), random(width, dtype=dtype)
    weight = random((vocab + 1) // 2, width)
    weight = torch.cat((weight, weight))[:vocab]  # equal scores everywhere: the first counts
    hidden[0, 0] = torch.nan
    weight = weight.to(dtype)
    picks = torch.arange(tokens, device=DEVICE) + 2 if picked else None
    hidden = hidden if picked else hidden[:tokens]
    winners, expected = (torch.full((tokens + 1, SLOTS), LOWEST, device=DEVICE) for _ in range(2))
    kernels_drafting.best_tokens(hidden, norm, 1e-6, weight, winners[:tokens], picks)
    twins.best_tokens_reference(hidden, norm, 1e-6, weight, expected[:tokens], picks)
    found, wanted = twins.unpack(winners[:tokens]), twins.unpack(expected[:tokens])
    scores = torch.nn.functional.rms_norm(hidden if picks is None else hidden[picks], (width,), norm, 1e-6).float()
    scores = scores @ weight.float().t()
    gap = scores.gather(1, wanted.unsqueeze(1)) - scores.gather(1, found.unsqueeze(1))
    assert (found < (vocab + 1) // 2).all() and (winners[tokens] == LOWEST).all()
    assert (gap.nan_to_num().abs() <= (1e-4 if dtype == FP32 else 0.02 * scores.nan_to_num().abs().max())).all()
    assert found[0] == 0 if not picked else True  # a row of NaN: some token of the vocabulary
    assert (found == wanted).float().mean() > 0.5


@runs_kernels
@pytest.mark.parametrize("rows", [3, 70])
def test_best_of_logits(rows):
    logits = random(rows, 9000, dtype=BF16)
    logits[1] = torch.nan
    found = twins.unpack(kernels_drafting.best_of_logits(logits))
    assert torch.equal(found[2:], logits.argmax(-1)[2:]) and 0 <= found[1] < 9000


def a_step(rows, steps, vocab, **changes):
    """Arguments of `advance` in which every decision occurs: few tokens, rows near their end, finished rows."""
    state = RowState(rows, steps, DEVICE)
    sequences = torch.full((rows + 1, 30), -5, device=DEVICE)
    state.open(sequences, list(range(rows, 0, -1)), 20)
    state.cursor += torch.randint(0, 11, (rows,), device=DEVICE)
    state.statistics += torch.randint(0, 9, state.statistics.shape, device=DEVICE)
    best = torch.randint(0, vocab, (rows, steps), device=DEVICE)
    tokens = torch.cat((best[:, :1], best[:, :-1]), dim=1)  # drafts that are right, but for some
    tokens = torch.where(torch.rand(rows, steps, device=DEVICE) < 0.25, (tokens + 1) % vocab, tokens)
    lengths = torch.randint(5, 90, (rows,), dtype=torch.int32, device=DEVICE)
    finished = torch.rand(rows, device=DEVICE) < 0.2
    return [tokens, lengths, finished, best, state, *changes.values()]


def copied(arguments):
    return [copy_of(argument) for argument in arguments]


def copy_of(value):
    if isinstance(value, RowState):
        other = RowState(value.size, value.steps, DEVICE)
        for name, tensor in vars(value).items():
            if isinstance(tensor, torch.Tensor):
                setattr(other, name, tensor.clone())
        other.home.fill_(other.sequences.data_ptr())
        return other
    if isinstance(value, tuple):
        parts = [copy_of(part) for part in value]
        return Feed(*parts) if isinstance(value, Feed) else tuple(parts)
    return value.clone() if isinstance(value, torch.Tensor) else value


@runs_kernels
@pytest.mark.parametrize("steps, kind", [(1, "tokens"), (2, "packed"), (4, "packed"), (3, "given"), (3, "seen")])
def test_advance(steps, kind):
    rows, vocab, width = 40, 5, 18
    eos_ids = torch.tensor([3] + [-1] * 63, device=DEVICE)
    tokens, lengths, finished, best, state = a_step(rows, steps, vocab)
    chosen, accepted, seen, feed = best, None, None, None
    if kind == "packed":
        scores = torch.randn(rows * steps, 6, device=DEVICE)
        best = twins.pack(scores, torch.randint(0, vocab, scores.shape, device=DEVICE))
        best[torch.arange(rows * steps), scores.argmax(-1)] = twins.pack(scores.amax(-1), chosen.flatten())
        feed = feed_of(rows * steps, width, vocab, BF16)
    if kind == "given":
        accepted = torch.randint(0, steps, (rows,), device=DEVICE)
    if kind == "seen":
        seen = (torch.rand(rows, vocab, device=DEVICE) < 0.2, torch.randint(18, 30, (rows,), device=DEVICE))
        eos_ids = None
    arguments = [tokens, lengths, finished, best, state, eos_ids, accepted, seen, feed]
    expected = copied(arguments)
    found = kernels_drafting.advance(*arguments, packed=kind == "packed")
    wanted = twins.advance_reference(*expected, packed=kind == "packed")
    assert torch.equal(found, wanted) and torch.equal(found, chosen)
    assert (state.sequences != -5).sum() > rows // 2 and (finished != expected[2]).sum() == 0
    for result, reference in zip(arguments[:4], expected[:4]):
        assert torch.equal(result, reference)
    for name, tensor in vars(state).items():
        if isinstance(tensor, torch.Tensor) and name != "home":
            assert torch.equal(tensor, getattr(expected[4], name)), name
    if seen is not None:
        assert torch.equal(seen[0], expected[7][0])
    if feed is not None:
        close(feed.output, expected[8].output, BF16)


@runs_kernels
@pytest.mark.parametrize("picked", [True, False])
def test_note_draft(picked):
    tokens, winners = torch.zeros(3, 4, dtype=torch.int64, device=DEVICE), torch.randn(3, 5).to(DEVICE)
    winners = twins.pack(winners, torch.randint(0, 11, (3, 5), device=DEVICE))
    feed = feed_of(9 if picked else 3, 21, 11, FP32)._replace(output=torch.empty(3, 42, device=DEVICE))
    picks = torch.tensor([2, 3, 8], device=DEVICE) if picked else None
    expected = copied([tokens, 2, winners, feed, picks])
    kernels_drafting.note_draft(tokens, 2, winners, feed, picks)
    twins.note_draft_reference(*expected)
    assert torch.equal(tokens, expected[0]) and torch.equal(winners, expected[2])
    close(feed.output, expected[3].output, FP32)


@runs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("drafts, rows", [(2, 2)])
def test_fused_drafting_equals_drafting_in_torch(drafts, rows, monkeypatch):
    """The same tokens, and the same drafts at every step."""
    model = drafting_model(1, drafts, 0.12, num_hidden_layers=2).to(DEVICE)
    model.decoding.graphs = False
    ids, mask, _ = padded(random_ids(rows, 4), "left", (2, 0))
    ids, mask, original, steps = ids.to(DEVICE), mask.to(DEVICE), decoding_mtp.Drafting.__call__, []

    def recording(drafting, batch):
        steps.append((drafting.fused is not None, batch.tokens.clone()))
        return original(drafting, batch)

    monkeypatch.setattr(decoding_mtp.Drafting, "__call__", recording)
    options = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, **DRAFTS}
    tokens, statistics = model.generate(ids, **options), model.decoding_statistics
    fused, steps[:] = list(steps), []
    monkeypatch.setattr(decoding_mtp.FusedDrafting, "serves", lambda *_: False)
    assert torch.equal(model.generate(ids, **options), tokens)
    assert model.decoding_statistics == statistics and 0 < statistics["accepted"] < statistics["drafted"]
    assert all(done for done, _ in fused) and not any(done for done, _ in steps) and len(fused) == len(steps)
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(fused, steps))


@runs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5, "min_new_tokens": 3}], ids=["largest", "others"])
def test_plain_decoding_writes_its_sequences_on_the_device(options, monkeypatch):
    """Rows of different lengths that finish at different steps, and move to smaller batches."""
    model = tiny_model(num_hidden_layers=2, implementation="sdpa").to(DEVICE)
    model.decoding.graphs = False
    ids, mask, _ = padded(random_ids(3, 5), "left", (2, 0, 1))
    ids, mask = ids.to(DEVICE), mask.to(DEVICE)
    options = {"attention_mask": mask, "max_new_tokens": 7, "pad_token_id": 0, "do_sample": False, **options}
    model.decoding.enabled = False
    endless = model.generate(ids, eos_token_id=None, **options)
    ends = [2, int(endless[0, 6]), int(endless[1, 9])]
    expected = model.generate(ids, eos_token_id=ends, **options)
    model.decoding.enabled, opened, original = True, [], RowState.open
    monkeypatch.setattr(RowState, "open", lambda state, *given: (opened.append(given[1]), original(state, *given)))
    assert torch.equal(model.generate(ids, eos_token_id=ends, **options), expected)
    assert len(opened[-1]) < 3 and opened[0] == [0, 1, 2]
