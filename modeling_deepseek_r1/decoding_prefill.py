"""Reading prompts into the latent cache: by the expanded form, in bounded memory, each distinct prompt once."""

import torch

from .decoding_cache import PrefillView


def compact_prompts(input_ids, attention_mask):
    """Left-padded (B, P) ids -> the same ids moved to the left, and the rows' lengths (a list).

    Padding behind a prompt needs no mask: no real token sees it under causal attention.
    """
    rows, width = input_ids.shape
    if attention_mask is None:
        return input_ids, [width] * rows
    lengths = attention_mask.bool().sum(-1)
    places = (torch.arange(width, device=input_ids.device) + (width - lengths).unsqueeze(1)) % width
    return input_ids.gather(1, places), lengths.tolist()


def distinct_rows(ids, lengths):
    """-> (indices of the first row of each distinct prompt, for every row the place of its prompt among them)."""
    seen, firsts, place = {}, [], []
    for row, (tokens, length) in enumerate(zip(ids.tolist(), lengths)):
        key = tuple(tokens[:length])
        if key not in seen:
            seen[key] = len(firsts)
            firsts.append(row)
        place.append(seen[key])
    return firsts, place


def passes(rows, lengths, budget):
    """Groups rows, longest first, so that rows * longest stays within `budget` tokens; one row may be longer alone."""
    group, longest = [], 0
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if group and (len(group) + 1) * longest > budget:
            yield group
            group = []
        longest = lengths[row] if not group else longest
        group.append(row)
    if group:
        yield group


@torch.no_grad()
def prefill(model, ids, lengths, open_cache, budget, cache_rows=None, on_states=None):
    """Fills cache rows with prompts and returns the logits that follow each.

    Args:
        ids: (B, P) int64, prompts from column 0 on; what lies behind `lengths` means nothing.
        open_cache: dtype -> the LatentCache to fill.
        budget: tokens that one forward pass takes at most; a longer prompt is read in chunks of as many.
        cache_rows: cache row of each prompt; None: 0, 1, ...
        on_states: called with (cache rows of the group (list), start, prompts (b, S), real lengths (list)) before each
            pass; what it returns is called with the pass's outputs (for what else must see the prompts).
    Returns:
        (B, V) logits in the model's own output dtype.
    """
    device = model.model.embed_tokens.weight.device
    ids = ids.to(device)
    cache_rows = list(range(len(lengths))) if cache_rows is None else list(cache_rows)
    firsts, place = distinct_rows(ids, lengths)
    logits, where = [], {}
    for group in passes(firsts, lengths, budget):
        longest = lengths[group[0]]
        targets = torch.tensor([cache_rows[row] for row in group], device=device)
        for start in range(0, longest, max(budget // len(group), 1)):
            end = min(start + max(budget // len(group), 1), longest)
            chunk = ids[group, start:end]
            done = on_states and on_states([cache_rows[r] for r in group], start, chunk, [lengths[r] for r in group])
            last = torch.tensor([min(max(lengths[row] - 1 - start, 0), end - start - 1) for row in group])
            outputs = model(
                input_ids=chunk,
                position_ids=torch.arange(start, end, device=device).unsqueeze(0).expand(len(group), -1),
                past_key_values=PrefillView(targets, start, open_cache),
                use_cache=True,
                logits_to_keep=last.unsqueeze(1).to(device),
                return_dict=True,
            )
            if done:
                done(outputs)
        where.update({row: len(where) + i for i, row in enumerate(group)})
        logits.append(outputs.logits[:, 0])
    copy_prompts(open_cache(None), firsts, place, cache_rows, max(lengths))
    order = torch.tensor([where[firsts[p]] for p in place], device=device)
    return torch.cat(logits).index_select(0, order)


def copy_prompts(cache, firsts, place, cache_rows, width):
    """Gives the rows of repeated prompts what the first row of each has read."""
    copies = [(cache_rows[firsts[p]], cache_rows[row]) for row, p in enumerate(place) if firsts[p] != row]
    if not copies:
        return
    source, target = torch.tensor(copies, device=cache.buffers[0].device).t()
    for buffer in cache.buffers:
        buffer[target, :width] = buffer[source, :width]
