"""Where the rows of a batch stand in their sequences, on the device, and the end of a step in plain torch.

A step ends with few numbers and many decisions: which drafts are kept, which tokens become part of a sequence, who has
finished, what the next step reads, what is counted. `advance_reference` makes them all in torch; on a GPU it is one
kernel (`kernels_drafting.advance`). The other functions here are the twins of that file's other kernels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

LOWEST = -(2**63)
SLOTS = 32  # places for the best token of a row, so that the programs of the head do not queue for one


class RowState:
    """What the steps of one batch keep on the device.

    Static tensors (B rows, S = 1 + n tokens a step): `cursor` (B,) int64, filled columns of a row's sequence; `base`
    (B,) int64, where it starts in the flat sequences; `limit` () int64, its longest length; `home` (1,) int64, the
    address of the flat sequences, which kernels write to (`sequences`, the tensor itself, is what torch writes to);
    `before` (B,) int32, the lengths before the last step, `accepted` (B,) int32, drafts kept in it, `picks` (B,) int64,
    the number b * S + accepted of the last token kept, and `following` (n, B) int32, the positions from that on;
    `winners` (B * S, SLOTS) int64, best tokens of a head, packed; `statistics` (B, 2, S) int64: drafts made and, last,
    steps; drafts accepted and, last, tokens.
    """

    def __init__(self, size, steps, device):
        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.size, self.steps, self.sequences = size, steps, None
        self.cursor, self.base, self.limit, self.home = zeros(size), zeros(size), zeros(), zeros(1)
        self.before, self.accepted = zeros(size, dtype=torch.int32), zeros(size, dtype=torch.int32)
        self.picks, self.following = zeros(size), zeros(max(steps - 1, 1), size, dtype=torch.int32)
        self.winners = torch.full((size * steps, SLOTS), LOWEST, dtype=torch.int64, device=device)
        self.statistics = zeros(size, 2, steps)

    def open(self, sequences, rows, cursor):
        """Before a call: `sequences` (., L) contiguous int64, of which rows (list) are this batch's, all filled up to
        column `cursor`."""
        device, (_, limit) = self.cursor.device, sequences.shape
        self.sequences = sequences
        self.home.fill_(sequences.data_ptr())
        self.limit.fill_(limit)
        self.cursor.zero_()
        self.base.zero_()
        self.cursor[: len(rows)] = cursor
        self.base[: len(rows)] = torch.tensor(rows, dtype=torch.int64).to(device) * limit
        self.winners.fill_(LOWEST)  # whatever a call that failed has left
        self.statistics.zero_()


class Feed(NamedTuple):
    """What the input of an MTP layer is made of: [enorm(embedding of the token); hnorm(norm(state))].

    Shapes: hidden (T, D), states before the norm they lack; norm, enorm, hnorm (D,); embedding (V, D); output
    (., 2 D), written. `eps` is that of all three norms.
    """

    hidden: torch.Tensor
    norm: torch.Tensor
    embedding: torch.Tensor
    enorm: torch.Tensor
    hnorm: torch.Tensor
    eps: float
    output: torch.Tensor


def unpack(winners):
    """(..., parts) packed (score, token) pairs -> (...) int64, the token of the best."""
    return 0x7FFFFFFF - (winners.amax(-1) & 0x7FFFFFFF)


def pack(scores, tokens):
    """fp32 scores and tokens -> int64 in the order of the scores, the smaller token first among equals."""
    bits = torch.where(scores == 0, 0.0, scores).float().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.long() << 32 | (0x7FFFFFFF - tokens)


def advance_reference(tokens, lengths, finished, best, state, eos_ids=None, accepted=None, seen=None, feed=None,
                      packed=False):
    """The end of a step: keeps drafts, notes tokens in the sequences, and prepares the next step; all in place.

    A draft is kept if all before it are and it is the best token of its place; a token is noted up to the first end
    of sequence and the longest length; a row that finishes moves on once more, so that later steps write behind it, and
    then stays.
    Shapes (B rows, S = 1 + n): tokens (B, S) int64, a row's last token and its drafts; the first becomes the next
    token, drafts are left; lengths (B,) int32; finished (B,) bool; best (B, S) int64, the choice behind each of them,
    or (B * S, parts) packed (`packed`), which is reset; state: RowState; eos_ids (E,) int64 padded with -1, or None;
    accepted (B,) int64: how many drafts are kept, decided elsewhere; seen: None or (seen (B, V) bool, seen_from (B,)
    int64), what a repetition penalty counts from a column on; feed: None or a `Feed` of B * S tokens
    -> (B, S) int64, the tokens behind the positions of this step (valid up to the first that is not kept).
    """
    rows, steps = tokens.shape
    chosen = unpack(best).view(rows, steps) if packed else best.clone()
    if packed:
        best.fill_(LOWEST)
    order = torch.arange(steps, device=tokens.device)
    if accepted is None:
        accepted = (chosen[:, :-1] == tokens[:, 1:]).long().cumprod(-1).sum(-1)
    ends = torch.zeros_like(chosen, dtype=torch.bool)
    if eos_ids is not None:
        ends = (chosen.unsqueeze(-1) == eos_ids).any(-1)
    active, columns = ~finished, state.cursor.unsqueeze(1) + order
    ended_before = ends.long().cumsum(-1) - ends.long() > 0
    noted = (order <= accepted.unsqueeze(1)) & (columns < state.limit) & ~ended_before & active.unsqueeze(1)
    places = (state.base.unsqueeze(1) + columns)[noted]
    if state.sequences is not None:
        state.sequences.view(-1)[places] = chosen[noted]
    if seen is not None:
        row, place = (noted & (columns >= seen[1].unsqueeze(1))).nonzero(as_tuple=True)
        seen[0][row, chosen[row, place]] = True
    count = noted.sum(-1)
    # A draft past the longest length or behind the end of its sequence is none.
    room, last = (state.limit - state.cursor).unsqueeze(1), order == steps - 1
    state.statistics[:, 0] += active.unsqueeze(1) & (last | (order < room))
    kept = order < torch.minimum(accepted, count).unsqueeze(1)
    state.statistics[:, 1] += torch.where(last, count.unsqueeze(1), kept.long())
    state.cursor += count
    finished |= (ends & noted).any(-1) | (state.cursor >= state.limit)
    state.before.copy_(lengths)
    state.accepted.copy_(accepted)
    state.picks.copy_(torch.arange(rows, device=tokens.device) * steps + accepted)
    later = torch.arange(1, len(state.following) + 1, device=tokens.device).unsqueeze(1)
    state.following.copy_(lengths + accepted + later)
    lengths += ((accepted + 1) * active).int()
    tokens[:, 0] = chosen.gather(1, accepted.unsqueeze(1)).squeeze(1)
    if feed is not None:
        feed_reference(feed, chosen.flatten(), feed.hidden)
    return chosen


def feed_reference(feed, tokens, hidden):
    """Fills `feed.output` for tokens (T,) and states (T, D)."""
    def normed(values, weight):
        return F.rms_norm(values, weight.shape, weight, feed.eps)

    embeds = normed(F.embedding(tokens, feed.embedding), feed.enorm)
    feed.output.copy_(torch.cat((embeds, normed(normed(hidden, feed.norm), feed.hnorm)), dim=-1))


def note_draft_reference(tokens, column, winners, feed=None, picks=None):
    """tokens[:, column] = the best tokens; `winners` (B, parts) packed, reset. With `feed` the input of a further pass
    over them, and over the states of rows `picks` (B,) of feed.hidden."""
    drafted = unpack(winners)
    winners.fill_(LOWEST)
    tokens[:, column] = drafted
    if feed is not None:
        feed_reference(feed, drafted, feed.hidden if picks is None else feed.hidden[picks])


def best_tokens_reference(hidden, norm, eps, weight, winners, picks=None):
    """Packs the best token of each row of norm(hidden) @ weight.T into `winners` (T, parts), which holds LOWEST.

    Shapes: hidden (N, D); norm (D,); weight (V, D); picks (T,) int64 rows of hidden, None: all. Scores are rounded to
    hidden's dtype before they are compared, as those of plain decoding are; no NaN is best.
    """
    hidden = hidden if picks is None else hidden[picks]
    scores = (F.rms_norm(hidden, norm.shape, norm, eps).float() @ weight.float().t()).to(hidden.dtype).float()
    token = torch.arange(weight.shape[0], device=hidden.device)
    winners[:, 0] = pack(scores.masked_fill(scores.isnan(), -torch.inf), token).amax(-1)


def begin_reference(tokens, embedding, hidden, counts):
    """hidden (T, D) = embeddings of tokens (T,); counts (None: there are none) = 0."""
    hidden.copy_(F.embedding(tokens, embedding))
    if counts is not None:
        counts.zero_()
