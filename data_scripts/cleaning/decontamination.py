"""Documents that hold items of evaluation sets, found by runs of words whatever the casing, spacing and punctuation.

    13 words in a row (30 CJK characters) in common with an item: found             overlap.WORDS, overlap.CHARACTERS
    an item of 8 to 12 words (18 to 29 characters): found as a whole                settings.shortest_words
    a shorter item: found if its answer follows within ANSWER_WITHIN words

A run counts only if it holds LEAST_WORDS different words of two letters or more. Without that rule all that was found
in 80 MB of manuals and code were rows of numbers, "5 6 7 8 9 10 11 12" and "0 0 0 0 1 1 ...", which stand in generated
grids and sequences; with it, eight words are enough for a whole question. "What is 3 + 4? 7" is therefore not looked
for: sums stand in every text. Generated problems are kept apart by their keys instead: a document whose metadata names
`task` and `key` is judged by `task_base.split_of`, exactly, and runs of words shared with that task do not count.

Runs that many items of one set have (instructions, "Which of the following ...") are wording of the set, not content:
those in more than `common_items` items and more than `common_share` of them do not count.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy

from data_scripts import overlap
from data_scripts.cleaning import unit_hashes
from data_scripts.cleaning.clean_blocks import EXAMPLE_CHARACTERS, EXAMPLES, read_json, save_array, write_json
from data_scripts.cleaning.corpus_blocks import BaseFilter, PipelineStep
from data_scripts.cleaning.evaluation_sets import evaluation_items
from recipes.tasks import TASKS

ANSWER_WITHIN = 12
LEAST_WORDS, LEAST_QUESTION = 4, 3
LEAST_LEFT = 200  # characters: a document from which more is cut is dropped
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？\n]")
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_TABLE = 24       # bits of a hash that a first look-up takes


class Match(NamedTuple):
    """An item found: its number, and the run of units (of words, or of characters) in the document."""

    item: int
    characters: bool
    start: int
    length: int


def _plain(text):
    """Text without marks that do not show (soft hyphens, zero-width spaces), "ß" as "ss": what "STRASSE" gives too."""
    return text if text.isascii() else _INVISIBLE.sub("", text).casefold()


def _units(text):
    return overlap.units(_plain(text))


def _unit_places(text):
    """[(begin, end)] in `text` of each word, and of each CJK character, as `_units` counts them."""
    pieces, origins, start = [], [], 0
    while start < len(text):
        end = start + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        piece = unicodedata.normalize("NFKC", _plain(text[start:end])).lower()
        pieces.append(piece)
        origins += [(start, end)] * len(piece)
        start = end
    plain = "".join(pieces)
    return tuple([(origins[found.start()][0], origins[found.end() - 1][1]) for found in pattern.finditer(plain)]
                 for pattern in (overlap._WORD, overlap._IS_CJK))


def _word_bounds(text, matches):
    """Merged (begin, end) of the matches in the text; the whole text where its units cannot be placed."""
    places, units = _unit_places(text), _units(text)
    if any(len(found) != len(counted) for found, counted in zip(places, units)):
        return [(0, len(text))]
    bounds = []
    for begin, end in sorted((places[match.characters][match.start][0],
                              places[match.characters][match.start + match.length - 1][1]) for match in matches):
        if bounds and begin <= bounds[-1][1]:
            bounds[-1] = (bounds[-1][0], max(end, bounds[-1][1]))
        else:
            bounds.append((begin, end))
    return bounds


def cut(text, bounds):
    """The text without the sentences in which the passages lie."""
    kept, position = [], 0
    for begin, end in bounds:
        before = [found.end() for found in _SENTENCE_END.finditer(text, position, begin)]
        after = _SENTENCE_END.search(text, end)
        kept.append(text[position:before[-1] if before else position].rstrip())
        position = max(position, after.end() if after else len(text))
    kept.append(text[position:].lstrip())
    return "\n".join(filter(None, kept))


class EvaluationIndex:
    """Hashes of runs of units with the items they come from; by kind of unit and by length of run."""

    def __init__(self, items, groups, counts):
        self.items, self.groups, self.counts = items, groups, counts
        self.lengths = [{length for kind, length, _ in groups if kind == characters} for characters in (0, 1)]
        self._tables = []
        for characters in (0, 1):
            table = numpy.zeros(2**_TABLE, bool)
            for (kind, _, _), (hashes, _) in groups.items():
                if kind == characters:
                    table[hashes >> numpy.uint64(64 - _TABLE)] = True
            self._tables.append(table)

    @classmethod
    def build(cls, sets, settings):
        """The index of {set: [Item]}; `counts` says for each set how many items can be found at all."""
        listed, parts, counts = [], defaultdict(list), {}
        for name, items in sets.items():
            own, commonest = defaultdict(list), max(settings.common_items, settings.common_share * len(items))
            for item in items:
                number = len(listed)
                listed.append({"set": item.set, "id": item.id, "text": item.parts[0][:EXAMPLE_CHARACTERS] if item.parts
                               else "", "answer": _units(item.answer)[0]})
                for group, hashes in _item_runs(item, settings).items():
                    own[group].append(numpy.stack([hashes, numpy.full(len(hashes), number, numpy.uint64)], 1))
            findable, common = set(), 0
            for group, found in own.items():
                rows = numpy.concatenate(found)
                _, places, items_with = numpy.unique(rows[:, 0], return_inverse=True, return_counts=True)
                rare = items_with <= commonest
                common += int((~rare).sum())
                rows = rows[rare[places.ravel()]]
                findable.update(rows[:, 1].tolist())
                parts[group].append(rows)
            counts[name] = {"items": len(items), "findable": len(findable), "common_runs": common}
        groups = {}
        for group, found in parts.items():
            rows = numpy.concatenate(found)
            rows = rows[numpy.argsort(rows[:, 0], kind="stable")]
            if len(rows):
                groups[group] = rows[:, 0].copy(), rows[:, 1].astype(numpy.uint32)
        return cls(listed, groups, counts)

    def save(self, folder):
        folder = Path(folder)
        names = []
        for place, (group, (hashes, items)) in enumerate(sorted(self.groups.items())):
            save_array(folder / f"{place}.hashes.npy", hashes)
            save_array(folder / f"{place}.items.npy", items)
            names.append(group)
        write_json(folder / "index.json", {"items": self.items, "groups": names, "counts": self.counts})

    @classmethod
    def load(cls, folder):
        folder = Path(folder)
        index = read_json(folder / "index.json")
        groups = {tuple(group): (numpy.load(folder / f"{place}.hashes.npy"), numpy.load(folder / f"{place}.items.npy"))
                  for place, group in enumerate(index["groups"])}
        return cls(index["items"], groups, index["counts"])

    def find(self, text):
        """Every `Match` of an item in the text."""
        found, units = [], _units(text)
        for characters in (0, 1):
            runs = unit_hashes.run_hashes(unit_hashes.unit_values(units[characters]), self.lengths[characters])
            for length, hashes in runs.items():
                likely = numpy.flatnonzero(self._tables[characters][hashes >> numpy.uint64(64 - _TABLE)])
                for with_answer in (False, True) if len(likely) else ():
                    found += self._look_up(characters, length, with_answer, likely, hashes[likely], units[0])
        return found

    def _look_up(self, characters, length, with_answer, places, hashes, words):
        if (characters, length, with_answer) not in self.groups:
            return
        known, items = self.groups[characters, length, with_answer]
        first, last = (numpy.searchsorted(known, hashes, side) for side in ("left", "right"))
        for hit in numpy.flatnonzero(last > first).tolist():
            start = int(places[hit])
            for number in items[first[hit]:last[hit]].tolist():
                size = length
                if with_answer:
                    answer = self.items[number]["answer"]
                    following = words[start + length:start + length + ANSWER_WITHIN + len(answer)]
                    place = next((i for i in range(len(following) - len(answer) + 1)
                                  if following[i:i + len(answer)] == answer), None)
                    if place is None:
                        continue
                    size += place + len(answer)
                yield Match(number, bool(characters), start, size)


def _item_runs(item, settings):
    """{(characters?, length of run, only with the answer?): distinct hashes} of an item."""
    found = defaultdict(list)
    for part in item.parts:
        for characters, units in enumerate(_units(part)):
            full = (overlap.WORDS, overlap.CHARACTERS)[characters]
            shortest = (settings.shortest_words, settings.shortest_characters)[characters]
            values = unit_hashes.unit_values(units)
            if len(units) >= min(shortest, full):
                size, with_answer = min(len(units), full), False
            elif characters or not _worth_with_answer(units, item.answer):
                continue
            else:
                size, with_answer = len(units), True
            hashes = unit_hashes.run_hashes(values, {size})[size]
            if not characters and not with_answer:
                hashes = hashes[[_tells(units[start:start + size]) for start in range(len(hashes))]]
            found[characters, size, with_answer].append(hashes)
    return {group: numpy.unique(numpy.concatenate(hashes)) for group, hashes in found.items()}


def _worth_with_answer(words, answer):
    answer = _units(answer)[0]
    return answer and len(words) >= LEAST_QUESTION and _tells(words + answer)


def _tells(words):
    """Whether a run of words is more than numbers and letters."""
    return len({word for word in words if len(word) > 1 and not word.isdigit()}) >= LEAST_WORDS


class BuildIndex(PipelineStep):
    """One task: collect the items of all sets of the settings and save their index."""

    type, name = "DECONTAMINATION", "evaluation sets"

    def __init__(self, settings, folder):
        super().__init__()
        self.settings, self.folder = settings, folder

    def run(self, data=None, rank=0, world_size=1):
        EvaluationIndex.build(evaluation_items(self.settings), self.settings).save(self.folder)


class Decontaminate(BaseFilter):
    """Removes documents with items of evaluation sets, or cuts those passages out; notes what was found.

    Args:
        index_folder: where `BuildIndex` saved; hits_folder: one file a task with the items that were found.
    """

    name = "decontamination"

    def __init__(self, index_folder, hits_folder, action="drop"):
        super().__init__()
        self.index_folder, self.hits_folder, self.action = str(index_folder), str(hits_folder), action

    def run(self, data, rank=0, world_size=1):
        self.index = EvaluationIndex.load(self.index_folder)
        self.hits = defaultdict(lambda: {"items": set(), "removed": 0, "cut": 0, "examples": []})
        yield from super().run(data, rank, world_size)
        write_json(Path(self.hits_folder) / f"{rank:06d}.json",
                   {name: {**hits, "items": sorted(hits["items"])} for name, hits in sorted(self.hits.items())})

    def _side(self, document):
        """(task, "train" or "test") of a generated document, by its key; (None, None) of any other."""
        task, key = document.metadata.get("task"), document.metadata.get("key")
        if not isinstance(task, str) or task not in TASKS or not key:
            return None, None
        from recipes.task_base import split_of

        return task, split_of(key) if "train" in TASKS[task].splits else "test"

    def _note(self, document, matches, text, bounds, how):
        items = self.index.items
        for name in sorted({items[match.item]["set"] for match in matches}):
            numbers = sorted({match.item for match in matches if items[match.item]["set"] == name})
            hits = self.hits[name]
            hits["items"].update(numbers)
            hits[how] += 1
            if len(hits["examples"]) < EXAMPLES:
                begin, end = bounds[0]
                hits["examples"].append({
                    "source": document.metadata["source"], "id": document.id, "item": items[numbers[0]]["id"],
                    "item_text": items[numbers[0]]["text"], "span": text[begin:end][:EXAMPLE_CHARACTERS],
                    "text": text[max(0, begin - 100):begin + EXAMPLE_CHARACTERS]})

    def filter(self, document):
        task, side = self._side(document)
        if side == "test":
            self.hits[task]["removed"] += 1
            return False, f"test problem of {task}"
        text = document.text
        matches = [match for match in self.index.find(text) if self.index.items[match.item]["set"] != task]
        if not matches:
            return True
        bounds = _word_bounds(text, matches)
        sets = Counter(self.index.items[match.item]["set"] for match in matches)
        document.metadata["matched"] = {"sets": sorted(sets), "item": self.index.items[matches[0].item]["id"],
                                        "span": text[slice(*bounds[0])][:EXAMPLE_CHARACTERS]}
        if self.action == "cut":
            left = cut(text, bounds)
            if len(left) >= LEAST_LEFT and not self.index.find(left):
                document.text = left
                self._note(document, matches, text, bounds, "cut")
                self.stat_update("cut")
                return True
        self._note(document, matches, text, bounds, "removed")
        return False, f"holds an item of {sets.most_common(1)[0][0]}"


def merge_hits(folder, hits_folder, tasks):
    """The report's entry: by set its items, how many were found, documents removed or cut, examples."""
    index = read_json(Path(folder) / "index.json")
    sets = {name: {**counts, "found": 0, "documents_removed": 0, "documents_cut": 0, "examples": []}
            for name, counts in index["counts"].items()}
    found = defaultdict(set)
    for rank in range(tasks):
        for name, hits in read_json(Path(hits_folder) / f"{rank:06d}.json").items():
            entry = sets.setdefault(name, {"items": 0, "findable": 0, "common_runs": 0, "found": 0,
                                           "documents_removed": 0, "documents_cut": 0, "examples": []})
            found[name].update(hits["items"])
            entry["documents_removed"] += hits["removed"]
            entry["documents_cut"] += hits["cut"]
            entry["examples"] = (entry["examples"] + hits["examples"])[:EXAMPLES]
    for name, items in found.items():
        sets[name]["found"] = len(items)
    return {"sets": sets, "items": len(index["items"])}
