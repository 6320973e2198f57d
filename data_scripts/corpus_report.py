"""A corpus at a glance: one page with tokens by source, lengths, languages, what was removed and why, samples.

    python -m data_scripts.corpus_report data/clean --packed data/small --output report.html

Reads `report.json` and the manifests that `clean_corpus` wrote, the packed set's manifest and index, and a few
documents of each source; needs nothing else to be looked at.
"""

import argparse
import heapq
import html
import json
import random
from pathlib import Path

import numpy

from data_scripts.document_folder import read_documents, read_folder_manifest, source_folders
from data_scripts.packing import packed_writer
from recipes.checkpoint_files import write_atomically
from recipes.report_page import COLORS, facts_table, figure_svg, page, plt

KIND_COLORS = {"text": COLORS[0], "code": COLORS[1], "multilingual": COLORS[2], "mathematics": COLORS[3]}
SAMPLE_CHARACTERS = 600
SAMPLES_READ = 2_000   # documents of a source that its samples are drawn from: the page takes seconds, not minutes


def _read_json(path, key, maker):
    """A JSON file that has a key; ValueError names what else it is."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); {maker} writes such a file") from error
    if not isinstance(found, dict) or key not in found:
        raise ValueError(f"{path} has no {key!r}: it is not what {maker} writes")
    return found


def read_clean(folder):
    """({source: manifest} in the order of their kinds, report) of a cleaned corpus."""
    folder = Path(folder)
    path = folder / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no report.json, which data_scripts.clean_corpus writes last: give the "
                                "folder it wrote, or run it again")
    manifests = {part.name: read_folder_manifest(part) for part in source_folders(folder)}
    kinds = list(KIND_COLORS)
    for name, manifest in manifests.items():
        if manifest["kind"] not in kinds:
            raise ValueError(f"{folder / name}/manifest.json: kind={manifest['kind']!r}; known are {', '.join(kinds)}")
    order = sorted(manifests, key=lambda name: (kinds.index(manifests[name]["kind"]), name))
    return {name: manifests[name] for name in order}, _read_json(path, "steps", "data_scripts.clean_corpus")


def read_packed(folder):
    """(manifest, (N,) records of all training documents) of a packed set."""
    folder = Path(folder)
    manifest = packed_writer.read_manifest(folder)
    records = [numpy.load(folder / file["documents_name"]) for file in manifest["splits"]["train"]["files"]]
    return manifest, numpy.concatenate(records)


# ---------------------------------------------------------------- plots


def _bars(names, values, colors, label):
    figure, axes = plt.subplots(figsize=(7.2, 0.7 + 0.19 * len(names)), layout="constrained")
    axes.barh(range(len(names)), values, color=colors)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(alpha=0.25, axis="x")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure_svg(figure)


def source_bars(sizes, kinds, label):
    """Horizontal bars of {source: size in millions}, coloured by kind."""
    names = list(sizes)
    return _bars(names, [sizes[n] / 1e6 for n in names], [KIND_COLORS.get(kinds.get(n), "#555") for n in names], label)


def length_histogram(lengths, kinds, label):
    """Histogram of {source: lengths} on a logarithmic scale, one line a kind."""
    figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    longest = max((values.max() for values in lengths.values() if len(values)), default=1)
    edges = numpy.logspace(0, numpy.log10(longest + 1), 50)
    for kind, color in KIND_COLORS.items():
        found = [values for source, values in lengths.items() if kinds.get(source) == kind and len(values)]
        if found:
            axes.hist(numpy.concatenate(found), edges, histtype="step", color=color, label=kind, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("documents")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return figure_svg(figure)


def _figure(svg, caption):
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


# ---------------------------------------------------------------- tables


def table(head, rows):
    """HTML of a table; cells that are no text are shown with thousands separators."""
    def show(cell):
        if isinstance(cell, float):
            return f"{cell:,.2f}"
        return f"{cell:,}" if isinstance(cell, int) else html.escape(str(cell))

    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{show(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div style='overflow-x:auto'><table><tr>{cells}</tr>{body}</table></div>"


def source_table(manifests, packed):
    """Sources with their licence, sizes, and what of them is in the packed set."""
    rows = []
    for name, manifest in manifests.items():
        row = [name, manifest["kind"], _shorten(", ".join(manifest.get("languages", [])), 40),
               _shorten(manifest.get("licence", "unknown"), 60), manifest["documents"], manifest["characters"]]
        entry = packed and packed["splits"]["train"]["sources"].get(name)
        if packed:
            row += [entry["tokens"], entry["bytes"] / entry["tokens"], float(entry.get("epochs", 1))] \
                if entry and entry["tokens"] else ["none", "", ""]
        rows.append(row)
    head = ["source", "kind", "languages", "licence", "documents", "characters"]
    return table(head + (["tokens", "bytes per token", "epochs"] if packed else []), rows)


def step_table(report):
    """Each step with its time, what it took out, and its most frequent reasons."""
    rows = []
    for step in report["steps"]:
        parts = step["sources"].values()
        reasons = {}
        for part in parts:
            for reason, count in part.get("reasons", {}).items():
                reasons[reason] = reasons.get(reason, 0) + count
        total = [sum(part[key] for part in parts) for key in ("documents_in", "documents_out", "characters_in",
                                                              "characters_out")]
        best = heapq.nlargest(4, reasons.items(), key=lambda item: item[1])
        rows.append([step["name"], float(step["seconds"]), total[0], total[0] - total[1],
                     f"{(total[2] - total[3]) / max(total[2], 1):.2%}", sum(part.get("changed", 0) for part in parts),
                     ", ".join(f"{reason} {count:,}" for reason, count in best)])
    return table(["step", "CPU seconds", "documents", "removed", "characters removed", "changed", "reasons"], rows)


def removed_by_source(report, manifests):
    """Characters that each step took out, by source, as per cent of what came in."""
    names = [step["name"] for step in report["steps"]]
    rows = []
    for source in manifests:
        row = [source]
        for step in report["steps"]:
            part = step["sources"].get(source)
            lost = part["characters_in"] - part["characters_out"] if part else 0
            share = lost / part["characters_in"] if lost > 0 else 0
            row.append(f"{share:.1%}" if share >= 0.0005 else "< 0.1%" if share else "")
        rows.append(row)
    return table(["source", *names], rows)


def language_table(report):
    """The most frequent languages found in each source."""
    rows = []
    for source, found in report.get("languages", {}).items():
        total = sum(found.values())
        best = heapq.nlargest(8, found.items(), key=lambda item: item[1])
        rows.append([source, len(found), ", ".join(f"{name} {count / total:.1%}" for name, count in best)])
    return table(["source", "languages", "share of documents"], rows) if rows else ""


# ---------------------------------------------------------------- parts of the page


def _shorten(text, length):
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[:length - 1] + "…"


def _pre(text):
    shown = text[:SAMPLE_CHARACTERS]
    return f"<pre>{html.escape(shown)}{'…' if len(text) > len(shown) else ''}</pre>"


def _side_by_side(example):
    line = f"{example['kept']['source']} and {example['removed']['source']}, similarity {example['similarity']:.2f}"
    cells = "".join(f"<td><p class=note>{side}: {html.escape(document['id'])}</p>{_pre(document['text'])}</td>"
                    for side, document in ((side, example[side]) for side in ("kept", "removed")))
    return f"<details><summary>{html.escape(line)}</summary><table><tr>{cells}</tr></table></details>"


def duplicates_part(report):
    """What was found twice: counts, pairs of sources, the largest clusters, a few pairs side by side."""
    rows, examples = [], ""
    for name in ("exact", "near"):
        found = (report.get("duplicates") or {}).get(name) or {}
        if not found:
            continue
        rows.append((f"{name}: clusters, documents in them, removed",
                     ", ".join(f"{found[key]:,}" for key in ("clusters", "documents", "removed"))))
        pairs = heapq.nlargest(8, found["pairs_across_sources"].items(), key=lambda item: item[1])
        rows += [(f"{name}: between {pair.replace('|', ' and ')}", f"{count:,}") for pair, count in pairs]
        within = heapq.nlargest(6, found["pairs_within_sources"].items(), key=lambda item: item[1])
        rows.append((f"{name}: most within a source", ", ".join(f"{pair} {count:,}" for pair, count in within)))
        rows += [(f"{name}: a cluster of {cluster['documents']:,}", _shorten(cluster["id"], 110))
                 for cluster in found["largest"][:3]]
        examples += "".join(map(_side_by_side, found["examples"][:5]))
    body = facts_table(rows) + examples if rows else "<p class=note>No step looked for duplicates.</p>"
    return f"<h2>Duplicates</h2><section>{body}</section>"


def contamination_part(report):
    """Evaluation sets against the corpus."""
    sets = (report.get("decontamination") or {}).get("sets") or {}
    if not sets:
        return ""
    keys = ("items", "findable", "found", "documents_removed", "documents_cut")
    body = table(["evaluation set", "items", "long enough to be found", "found", "documents removed", "cut"],
                 [[name, *(entry[key] for key in keys)] for name, entry in sets.items()])
    for name, entry in sets.items():
        for example in entry["examples"]:
            shown = "\n".join(f"{key}: {value}" for key, value in example.items())
            body += f"<details><summary>found of {html.escape(name)}</summary>{_pre(shown)}</details>"
    return f"<h2>Evaluation sets kept out</h2><section>{body}</section>"


def removed_part(report):
    """Examples that one can read of what each step took out or changed."""
    body = ""
    for step in report["steps"]:
        for example in step.get("examples", []):
            line = f"{step['name']}: {example['reason']} ({example['source']}, {_shorten(example['id'], 80)})"
            if kept := example.get("duplicate_of"):
                line += f"; kept is {kept['source']}, {_shorten(kept['id'], 80)}"
            shown = _pre(example["text"])
            if "before" in example:
                shown = f"<p class=note>before</p>{_pre(example['before'])}<p class=note>after</p>{shown}"
            body += f"<details><summary>{html.escape(line)}</summary>{shown}</details>"
    return f"<h2>Removed, and why</h2><section>{body or '<p class=note>Nothing was removed.</p>'}</section>"


def samples_part(folder, manifests, per_source=2, seed=0):
    """Random documents of each source, drawn from its first SAMPLES_READ ones."""
    body = ""
    for name in manifests:
        chosen, number = [], 0
        draw = random.Random(f"{seed} {name}")
        for document in read_documents(Path(folder) / name):
            if number >= SAMPLES_READ:
                break
            number += 1
            if len(chosen) < per_source:
                chosen.append(document)
            elif (place := draw.randrange(number)) < per_source:
                chosen[place] = document
        texts = "".join(f"<p class=note>{html.escape(d['id'])}</p>{_pre(d['text'].strip())}" for d in chosen)
        body += f"<details><summary>{html.escape(name)}</summary>{texts}</details>"
    return f"<h2>Random samples</h2><section>{body}</section>"


def tokenizer_part(path):
    """The table that `data_scripts.compare_tokenizers` wrote."""
    found = _read_json(path, "tokenizers", "data_scripts.compare_tokenizers")["tokenizers"]
    rows = [["mixed", *(entry["mixed"] for entry in found.values())]]
    for grouping in ("kind", "language"):
        labels = sorted({label for entry in found.values() for label in entry["bytes_per_token"].get(grouping, {})})
        rows += [[label, *(entry["bytes_per_token"].get(grouping, {}).get(label, "") for entry in found.values())]
                 for label in labels]
    head = ["text", *(f"{name} ({entry['vocab_size']:,})" for name, entry in found.items())]
    return f"<h2>Tokenizers, bytes per token</h2><section>{table(head, rows)}</section>"


def build_page(folder, packed_folder=None, tokenizers=None):
    """The page as text."""
    manifests, report = read_clean(folder)
    kinds = {name: manifest["kind"] for name, manifest in manifests.items()}
    packed, records = read_packed(packed_folder) if packed_folder else (None, None)
    characters = {name: manifest["characters"] for name, manifest in manifests.items()}
    facts = [("sources", f"{len(manifests)}"), ("documents", f"{sum(m['documents'] for m in manifests.values()):,}"),
             ("characters", f"{sum(characters.values()):,}"),
             ("bytes of text", f"{sum(m['bytes'] for m in manifests.values()):,}"),
             ("seconds of cleaning", f"{report.get('seconds', 0):,.0f}")]
    figures = [_figure(source_bars(characters, kinds, "million characters after cleaning"), "Cleaned text by source.")]
    if packed:
        train = packed["splits"]["train"]
        facts += [("training tokens", f"{train['tokens']:,}"), ("vocabulary", f"{packed['vocab_size']:,}")]
        for kind in KIND_COLORS:
            tokens = sum(e["tokens"] for name, e in train["sources"].items() if kinds.get(name) == kind)
            facts.append((f"tokens of {kind}", f"{tokens:,} ({tokens / train['tokens']:.1%})"))
        figures.insert(0, _figure(source_bars({n: e["tokens"] for n, e in train["sources"].items()}, kinds,
                                              "million training tokens"), "Training tokens by source."))
        lengths = {name: records["tokens"][records["source"] == place] for place, name in enumerate(packed["sources"])}
        figures.append(_figure(length_histogram(lengths, kinds, "tokens in a document"),
                               "Documents by their length in tokens."))
    legend = " ".join(f"<span style='color:{color}'>■</span> {kind}" for kind, color in KIND_COLORS.items())
    body = (f"<h1>Corpus</h1><p class=note>{legend}</p><h2>Size</h2><section>{facts_table(facts)}</section>"
            f"<div class=plots>{''.join(figures)}</div>"
            f"<h2>Sources</h2><section>{source_table(manifests, packed)}</section>"
            f"<h2>Steps</h2><section>{step_table(report)}</section>"
            f"<h2>Characters removed, by source</h2><section>{removed_by_source(report, manifests)}</section>"
            f"<h2>Languages found</h2><section>{language_table(report)}</section>"
            + duplicates_part(report) + contamination_part(report)
            + (tokenizer_part(tokenizers) if tokenizers else "")
            + removed_part(report) + samples_part(folder, manifests))
    return page("Corpus", body)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clean_dir", help="folder that data_scripts.clean_corpus wrote")
    parser.add_argument("--packed", help="packed data set made from it, for tokens and lengths")
    parser.add_argument("--tokenizers", help="JSON of data_scripts.compare_tokenizers")
    parser.add_argument("--output", help="where the page goes (default: report.html in clean_dir)")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output or Path(arguments.clean_dir) / "report.html")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, build_page(arguments.clean_dir, arguments.packed, arguments.tokenizers))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(output)


if __name__ == "__main__":
    main()
