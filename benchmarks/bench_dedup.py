"""Near duplicates and evaluation items planted in real documents: what is found, what is removed wrongly, the cost.

    python benchmarks/bench_dedup.py --raw data/raw --sources python-doc linux-doc --output RESULTS
    python benchmarks/bench_dedup.py                                     # on the built-in sources

Recall is that of datatrove's MinHash as `clean_corpus` runs it, by the true Jaccard similarity of the shingles of copy
and original, beside the theory 1 - (1 - s^8)^14. The copies: a share of the words changed, paragraphs moved, a header
and a footer added, case and spacing changed. Hard negatives: the same template filled with other words.
"""

import argparse
import itertools
import json
import random
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from data_scripts import clean_corpus, document_folder, overlap
from data_scripts.cleaning import unit_hashes
from data_scripts.cleaning.clean_settings import read_settings
from data_scripts.cleaning.decontamination import EvaluationIndex
from data_scripts.cleaning.evaluation_sets import task_items
from data_scripts.cleaning.filter_steps import STEPS
from data_scripts.cleaning.near_duplicates import chance_of_meeting
from data_scripts.sources import BUILT_IN

BINS = (0, .3, .5, .6, .7, .8, .9, 1.01)


def real_texts(raw, sources, count, generator):
    """Distinct real documents of 150 to 2,000 words that are not near duplicates of one another by their shingles."""
    def texts():
        if raw is None:
            for name in ("text", "multilingual"):
                yield from (getattr(row, "text", row) for row in BUILT_IN[name](0))
        for source in sources:
            rows = document_folder.read_documents(Path(raw, source))
            yield from (row["text"] for row in itertools.islice(rows, 20_000))

    pool = [text for text in texts() if 150 <= sum(map(len, overlap.units(text))) <= 2_000]
    generator.shuffle(pool)
    kept, owners = [], {}
    for text in pool:
        shingles = set(unit_hashes.shingles(text, 5).tolist())
        others = Counter(owners[value] for value in shingles if value in owners)
        if not others or others.most_common(1)[0][1] < .2 * len(shingles):
            owners.update(dict.fromkeys(shingles, len(kept)))
            kept.append(text)
        if len(kept) == count:
            break
    return kept


def change_words(text, share, generator, vocabulary):
    words = text.split(" ")
    for place in generator.sample(range(len(words)), int(share * len(words))):
        words[place] = generator.choice(vocabulary)
    return " ".join(words)


def copies(text, generator, vocabulary):
    """[(how it was changed, the changed text)]."""
    paragraphs = text.split("\n")
    generator.shuffle(paragraphs)
    frame = " ".join(generator.choices(vocabulary, k=30))
    made = [(f"{share:.0%} of words", change_words(text, share, generator, vocabulary))
            for share in (.01, .03, .05, .1, .2, .3)]
    return made + [("paragraphs moved", "\n".join(paragraphs)), ("header and footer", f"{frame}\n{text}\n{frame}"),
                   ("case and spacing", text.swapcase().replace(" ", "  ").replace(".", " ."))]


def hard_negatives(count, generator, vocabulary):
    """Texts of one template, two fifths of whose words are fixed."""
    template = [generator.choice(vocabulary) if i // 8 % 5 < 2 else None for i in range(400)]
    return [" ".join(word or generator.choice(vocabulary) for word in template) for _ in range(count)]


def write_source(folder, name, rows):
    writer = document_folder.DocumentWriter(folder / name)
    for identifier, text in rows:
        writer.write(text, identifier, path=identifier, language="en")
    document_folder.write_folder_manifest(folder / name, writer.close(), source=name, kind="text", licence="-",
                                          languages=["en"], origin="benchmark", packages=[], left_out={}, command="-")


def duplicates(texts, work, generator, similarity, workers):
    """Plant, clean, count: recall by true similarity and by change, precision of what was removed."""
    vocabulary = sorted({word for text in texts for word in text.split() if word.isalpha()})
    planted, rows = {}, []
    for number, text in enumerate(texts):
        rows.append((f"real/{number}", text))
    kinds = len(copies(texts[0], random.Random(0), vocabulary))
    for number, text in enumerate(texts):
        how, changed = copies(text, generator, vocabulary)[number % kinds]
        a, b = (set(unit_hashes.shingles(side, 5).tolist()) for side in (text, changed))
        planted[f"copy/{number}"] = how, len(a & b) / len(a | b), number
        rows.append((f"copy/{number}", changed))
    rows += [(f"template/{number}", text) for number, text in enumerate(hard_negatives(len(texts) // 4, generator,
                                                                                       vocabulary))]
    write_source(work / "raw", "planted", rows)
    settings = read_settings(None, **{"skip": [*STEPS, "decontamination"],
                                      "near_duplicates.minimum_similarity": {"text": similarity}})
    report = clean_corpus.clean(work / "raw", work / f"clean-{similarity}", settings, workers)
    removed = {}
    for path in (work / f"clean-{similarity}" / "removed").rglob("*.zst"):
        for line in document_folder.read_lines(path):
            row = json.loads(line)
            removed[row["id"]] = row["metadata"]["duplicate_of"]["id"]
    bins, ways = defaultdict(list), defaultdict(list)
    for identifier, (how, true, number) in planted.items():
        place = next(i for i in range(len(BINS) - 1) if true < BINS[i + 1])
        found = removed.get(identifier) == f"real/{number}"
        bins[place].append((true, found))
        ways[how].append((true, found))
    right = sum(kept == f"real/{planted[name][2]}" for name, kept in removed.items() if name in planted)
    return {
        "documents": len(rows), "planted": len(planted), "removed": len(removed), "removed_rightly": right,
        "precision": round(right / len(removed), 4) if removed else None,
        "templates_removed": sum(name.startswith("template/") for name in removed),
        "real_removed": sum(name.startswith("real/") for name in removed),
        "by_similarity": [{"from": BINS[i], "to": min(1, BINS[i + 1]), "pairs": len(bins[i]),
                           "recall": round(sum(found for _, found in bins[i]) / len(bins[i]), 3),
                           "theory": round(sum(chance_of_meeting(true, settings.near_duplicates) for true, _ in bins[i])
                                           / len(bins[i]), 3)} for i in sorted(bins)],
        "by_change": {how: {"pairs": len(found), "mean_similarity": round(sum(t for t, _ in found) / len(found), 3),
                            "recall": round(sum(f for _, f in found) / len(found), 3)}
                      for how, found in sorted(ways.items())},
        "stages": report["stages"]}


def respaced(text, generator):
    words, characters = overlap.units(text)
    words = words + ["".join(characters)] * bool(characters)
    cases, spaces = (str.upper, str.title, str.lower), (" ", "\n", "  - ", ", ")
    return "".join(generator.choice(cases)(word) + generator.choice(spaces) for word in words)


def contamination(texts, settings, generator):
    """Up to 20 items of each set planted with other spacing inside a text; and the texts without items."""
    sets = task_items(settings)
    index = EvaluationIndex.build(sets, settings)
    rows = {}
    for name, items in sets.items():
        chosen = generator.sample(items, min(20, len(items)))
        found = 0
        for item in chosen:
            before, after = generator.choices(texts, k=2)
            matches = index.find(f"{before}\n{respaced(item.parts[0], generator)} {item.answer}\n{after}")
            found += any(index.items[match.item]["set"] == name for match in matches)
        rows[name] = {"items": len(items), "findable": index.counts[name]["findable"], "planted": len(chosen),
                      "found": found}
    hits = [text for text in texts if index.find(text)]
    return {"sets": rows, "clean_texts": len(texts), "clean_texts_removed": len(hits),
            "clean_characters": sum(map(len, texts))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", help="folder of raw sources (default: the built-in ones)")
    parser.add_argument("--sources", nargs="*", default=[])
    parser.add_argument("--documents", type=int, default=1_800)
    parser.add_argument("--tasks_dir", help="fetched evaluation sets; without them the generated tasks alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder for dedup.json")
    arguments = parser.parse_args()
    generator = random.Random(0)
    texts = real_texts(arguments.raw, arguments.sources, arguments.documents, generator)
    if len(texts) < 100:
        parser.exit(2, f"error: {len(texts)} distinct texts of 150 to 2,000 words found, too few to measure on; name "
                       "--sources of --raw\n")
    results = {"texts": len(texts), "near": {}}
    settings = read_settings(None, **{"decontamination.tasks_dir": arguments.tasks_dir,
                                      "decontamination.without_packaged": not arguments.tasks_dir}).decontamination
    results["contamination"] = contamination(texts, settings, random.Random(2))
    print(json.dumps(results["contamination"]), flush=True)
    for similarity in (0.0, 0.6):
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "raw").mkdir()
            results["near"][similarity] = duplicates(texts, Path(work), random.Random(1), similarity, arguments.workers)
        print(json.dumps(results["near"][similarity]), flush=True)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "dedup.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
