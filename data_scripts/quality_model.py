"""A small linear model of text quality: logistic regression on hashed words, pairs and shapes of lines.

    python -m data_scripts.quality_model train --from_raw data/raw --output models/quality
    python -m data_scripts.quality_model train --good books/ handbook.txt --bad spam.jsonl --output models/quality
    python -m data_scripts.quality_model score --model models/quality data/raw/fortunes --show 5

`--from_raw` is weak supervision for when there are no labels: good are documents of the sources of prose that pass
the rules (`filter_steps`); bad are those that the rules refuse, and good ones spoilt in the ways of the web: words
shuffled, letters wrong, menus, lists of keywords, an advertisement over and over. Whole sources are held out, so the
report says what the model is worth on those it has not seen. The idea is that of GPT-3's and DCLM's classifiers
(arXiv:2005.14165, App. A; arXiv:2406.11794). Weights are saved as safetensors beside a JSON of settings and report;
none are shipped.
"""

import argparse
import json
import logging
import random
import re
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from data_scripts.cleaning.corpus_blocks import PROSE, DocumentFilter, check_share, kind_of, passages
from data_scripts.document_folder import is_document_folder, read_documents, read_folder_manifest
from data_scripts.packing import packed_writer

logger = logging.getLogger(__name__)

FORMAT, VERSION = "quality-model", 1
FEATURES = 2 ** 18
PIECES = re.compile(r"[A-Za-z]+|\d+|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_]+|[^\w\s]|\n+")
PASSAGE, PASSAGES = 800, 3  # characters and number: what is looked at of a document
LEAST_CHARACTERS = 100      # shorter ones are neither trained on nor refused
OURS = re.compile(r"quality\.(?:json|safetensors)|manifest\.json")


def features_of(text):
    """The features of a text as strings: pieces, pairs of them, and the shapes of its lines."""
    text = "\n".join(passages(text, PASSAGE, PASSAGES))
    pieces = [piece if len(piece) < 20 else "<long>" for piece in PIECES.findall(text.lower())]
    pieces = ["<number>" if piece[0].isdigit() else "<line>" if piece[0] == "\n" else piece for piece in pieces]
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    shapes = [f"<shape {min(len(line) // 16, 8)} {line[-1] if not line[-1].isalnum() else 'x'}>" for line in lines]
    return pieces + [f"{one} {two}" for one, two in zip(pieces, pieces[1:])] + shapes


def _hashed(texts):
    from sklearn.feature_extraction.text import HashingVectorizer
    return HashingVectorizer(n_features=FEATURES, analyzer=features_of, norm="l2").transform(texts)


class QualityModel:
    """Weights and bias; `probabilities(texts)` are those of being good."""

    def __init__(self, weights, bias, settings):
        self.weights, self.bias, self.settings = weights, bias, settings

    @classmethod
    def fit(cls, texts, labels, seed=0, settings=None):
        """Train on texts and their labels (1 good, 0 bad), both classes weighted alike."""
        from sklearn.linear_model import LogisticRegression
        fitted = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300, random_state=seed)
        fitted.fit(_hashed(texts), labels)
        return cls(fitted.coef_[0].astype(np.float32), float(fitted.intercept_[0]), settings or {})

    def probabilities(self, texts):
        return 1 / (1 + np.exp(-(_hashed(texts) @ self.weights + self.bias)))

    def save(self, folder, report):
        """Write the model as a folder, complete or not at all."""
        from safetensors.numpy import save_file
        with packed_writer.build_beside(folder, OURS, "a quality model") as partial:
            save_file({"weights": self.weights, "bias": np.float32([self.bias])}, partial / "quality.safetensors")
            packed_writer.write_manifest(partial, {"format": FORMAT, "version": VERSION, "features": FEATURES,
                                                   "settings": self.settings, "report": report})

    @classmethod
    def load(cls, folder):
        """Read a saved model.

        Raises:
            ValueError: no such model, or one of another version.
        """
        from safetensors.numpy import load_file
        path = Path(folder) / "manifest.json"
        if not path.is_file():
            raise ValueError(f"quality_model={str(folder)!r} is no model: it has no manifest.json; make one with "
                             "python -m data_scripts.quality_model train")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if (manifest.get("format"), manifest.get("version"), manifest.get("features")) != (FORMAT, VERSION, FEATURES):
            raise ValueError(f"{path} is of format {manifest.get('format')!r} version {manifest.get('version')} with "
                             f"{manifest.get('features')} features, expected {FORMAT!r} version {VERSION} with "
                             f"{FEATURES}")
        tensors = load_file(Path(folder) / "quality.safetensors")
        return cls(tensors["weights"], float(tensors["bias"][0]), manifest["settings"])


class QualityFilter(DocumentFilter):
    """Drops documents that a quality model finds bad; writes metadata "quality".

    Args:
        model: folder of the model.
        thresholds: {kind: lowest probability of being good}; kinds without one pass. None: the model's threshold, for
            the kinds that it was trained on.
    """

    name = "quality"

    def __init__(self, model, thresholds=None, batch_size=64, exclusion_writer=None):
        super().__init__(None, exclusion_writer)
        loaded = QualityModel.load(model)  # fails here, not in a worker
        if thresholds is None:
            thresholds = dict.fromkeys(loaded.settings.get("kinds", PROSE), loaded.settings.get("threshold", 0.5))
        for kind, threshold in thresholds.items():
            check_share(f"threshold of {kind}", threshold)
        self.model, self.thresholds, self.batch_size, self._loaded = str(model), dict(thresholds), batch_size, loaded

    def __getstate__(self):
        return {**self.__dict__, "_loaded": None}

    def judge(self, document):
        return self.filter_batch([document])[0]

    def filter_batch(self, batch):
        self._loaded = self._loaded or QualityModel.load(self.model)
        looked_at = [document for document in batch if kind_of(document) in self.thresholds
                     and len(document.text) >= LEAST_CHARACTERS]
        scores = self._loaded.probabilities([document.text for document in looked_at]) if looked_at else []
        verdicts = {}
        for document, score in zip(looked_at, scores):
            document.metadata["quality"] = round(float(score), 4)
            verdicts[id(document)] = (float(score) >= self.thresholds[kind_of(document)]) or (False, "low_quality")
        return [verdicts.get(id(document), True) for document in batch]


MENU = ("Home About Contact Login Register Next Previous Search Sitemap Privacy Terms Help Share Tweet Print "
        "Reply Menu Subscribe Archive Tags Comments Cart Checkout Account Newsletter Download FAQ").split()
SALES = ("buy now best price free shipping click here limited offer cheap online discount order today 100% "
         "guaranteed win casino bonus viagra replica watches loans seo traffic followers").split()


def spoil(text, rng):
    """A text as it should not be in a corpus, in one of six ways."""
    way = rng.randrange(6)
    words = text.split()
    if way == 0:    # words in any order
        rng.shuffle(words)
        return " ".join(words)
    if way == 1:    # wrong letters
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz~|#0123456789") if rng.random() < 0.25 and sign.isalnum()
                       else sign for sign in text)
    if way == 2:    # menus around pieces of it
        return "\n".join(" ".join(rng.choices(MENU, k=rng.randint(1, 4))) if rng.random() < 0.7 else
                         " ".join(rng.sample(words, min(3, len(words)))) for _ in range(rng.randint(15, 80)))
    if way == 3:    # an advertisement of its words
        phrase = rng.choices(SALES, k=5) + rng.choices(words, k=2)
        return " ".join(" ".join(rng.sample(phrase, len(phrase))) for _ in range(rng.randint(10, 40)))
    if way == 4:    # a list of keywords
        return ", ".join(rng.choice(words).strip(".,;:()") for _ in range(rng.randint(40, 200)))
    lines = text.split("\n")  # words cut off, lines in disorder
    rng.shuffle(lines)
    return "\n".join(line[rng.randint(0, 20):][:rng.randint(5, 40)] for line in lines)


def weakly_labelled(raw, per_source, seed, progress=True):
    """[(source, text, label)] of the sources of prose in a folder of raw sources.

    Raises:
        ValueError: fewer than two such sources.
    """
    from datatrove.data import Document

    from data_scripts.cleaning.filter_steps import FilterSettings, filter_steps
    folders = [path for path in sorted(Path(raw).iterdir()) if is_document_folder(path)]
    folders = [path for path in folders if read_folder_manifest(path)["kind"] in PROSE]
    if len(folders) < 2:
        raise ValueError(f"--from_raw {raw}: {len(folders)} sources of kind {' or '.join(PROSE)} found, at least 2 are "
                         "needed, since whole sources are held out; fetch more, or use --good and --bad")
    blocks = [block for _, block in filter_steps(FilterSettings(skip=("code", "licence_headers", "private_data")))]
    rows = []
    for path in tqdm(folders, desc="label", unit=" sources", disable=not progress):
        manifest, rng = read_folder_manifest(path), random.Random(f"{seed} {path.name}")
        facts = {"kind": manifest["kind"], "languages": manifest.get("languages")}
        for row in _reservoir(read_documents(path), per_source, rng):
            document = Document(text=row["text"], id=row["id"], metadata={**row["metadata"], **facts})
            verdict = _first_refusal(document, blocks)
            if len(document.text) < LEAST_CHARACTERS or verdict and verdict.startswith("language"):
                continue
            rows.append((path.name, document.text, int(verdict is None)))
            if verdict is None:
                rows.append((path.name, spoil(document.text, rng), 0))
    return rows


def _first_refusal(document, blocks):
    """The reason of the first filter that refuses a document, or None; editors change it on the way."""
    for block in blocks:
        if not hasattr(block, "filter"):
            block.edit(document)
            continue
        verdict = block.filter(document)
        if verdict is not True:
            return verdict[1]
    return None


def _reservoir(rows, size, rng):
    """`size` rows of a stream, each with the same chance, in bounded memory."""
    kept = []
    for number, row in enumerate(rows):
        if number < size:
            kept.append(row)
        elif (place := rng.randrange(number + 1)) < size:
            kept[place] = row
    return kept


def read_labelled(places, label, per_source, seed):
    """[(place, text, label)] of folders of documents, text files, and folders or files that `sources` reads."""
    from data_scripts import sources
    rows = []
    for place in places:
        if is_document_folder(place):
            texts = (row["text"] for row in read_documents(place))
        else:
            texts = (document.text for document in sources.open_source("text", str(place)))
        rows += [(str(place), text, label) for text in _reservoir(texts, per_source, random.Random(seed))
                 if len(text) >= LEAST_CHARACTERS]
    if not rows:
        raise ValueError(f"no text of at least {LEAST_CHARACTERS} characters in {', '.join(map(str, places))}")
    return rows


def split_sources(rows, fraction, seed):
    """(training, held out) rows: whole sources are held out where a label has several, else single documents."""
    names = sorted({name for name, _, _ in rows})
    rng = random.Random(seed)
    if all(len({name for name, _, label in rows if label == wanted}) > 1 for wanted in (0, 1)):
        for _ in range(100):  # until both labels are on both sides
            held = set(rng.sample(names, max(1, round(fraction * len(names)))))
            sides = [[row for row in rows if (row[0] in held) is side] for side in (False, True)]
            if all({label for _, _, label in side} == {0, 1} for side in sides):
                return (*sides, sorted(held))
    order = rng.sample(rows, len(rows))
    count = max(2, round(fraction * len(rows)))
    return order[count:], order[:count], []


def evaluate(model, rows, threshold):
    """{"auc", "precision", "recall", ...} of held-out rows: good is what is to be found."""
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score
    labels = np.array([label for _, _, label in rows])
    scores = model.probabilities([text for _, text, _ in rows])
    precision, recall, _, _ = precision_recall_fscore_support(labels, scores >= threshold, average="binary",
                                                              zero_division=0)
    return {"documents": len(rows), "good": int(labels.sum()), "auc": round(float(roc_auc_score(labels, scores)), 4),
            "threshold": threshold, "precision": round(float(precision), 4), "recall": round(float(recall), 4),
            "bad_removed": round(float((scores < threshold)[labels == 0].mean()), 4)}


def train(rows, output, *, threshold=0.1, fraction=0.2, seed=0, kinds=PROSE):
    """Train on labelled rows, report on held-out ones, save; returns the report."""
    check_share("threshold", threshold)
    check_share("held_out", fraction, 0.01, 0.9)
    if {label for _, _, label in rows} != {0, 1}:
        raise ValueError("training needs good and bad documents; only one sort was found")
    training, held_out, names = split_sources(rows, fraction, seed)
    if any({label for _, _, label in side} != {0, 1} for side in (training, held_out)):
        raise ValueError(f"{len(rows)} documents are too few to hold {fraction:g} of them out with both labels on both "
                         "sides; give more, or change --seed")
    settings = {"threshold": threshold, "seed": seed, "kinds": list(kinds)}
    model = QualityModel.fit([text for _, text, _ in training], [label for _, _, label in training], seed, settings)
    report = {"held_out_sources": names, "trained_on": len(training), "held_out": evaluate(model, held_out, threshold)}
    model.save(output, report)
    return report


def score(model, place, show, per_source, seed):
    """Print the worst and the best documents of a folder or file."""
    rows = read_labelled([place], 1, per_source, seed)
    scores = QualityModel.load(model).probabilities([text for _, text, _ in rows])
    order = np.argsort(scores, kind="stable")
    quantiles = np.quantile(scores, [0.01, 0.05, 0.25, 0.5])
    print("quantiles 1/5/25/50 %: " + " ".join(f"{value:.3f}" for value in quantiles))
    for title, places in (("worst", order[:show]), ("best", order[::-1][:show])):
        for place in places:
            print(f"{title} {scores[place]:.3f} | {' '.join(rows[place][1].split())[:160]}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("train", help="train a model and report on held-out documents")
    learn.add_argument("--from_raw", metavar="FOLDER", help="folder of raw sources: labels from the rules (see above)")
    learn.add_argument("--good", nargs="+", default=[], metavar="PLACE", help="folders or files of good documents")
    learn.add_argument("--bad", nargs="+", default=[], metavar="PLACE", help="folders or files of bad documents")
    learn.add_argument("--output", required=True, help="folder for the model; replaced as a whole")
    learn.add_argument("--threshold", type=float, default=0.1, help="lowest probability kept (default: %(default)s)")
    learn.add_argument("--held_out", type=float, default=0.2, help="share of sources (default: %(default)s)")
    look = commands.add_parser("score", help="show the worst and best documents of a place")
    look.add_argument("place", help="folder of documents, or a file")
    look.add_argument("--model", required=True)
    look.add_argument("--show", type=int, default=10, help="of each (default: %(default)s)")
    for command in (learn, look):
        command.add_argument("--per_source", type=int, default=1_000, help="documents at most (default: %(default)s)")
        command.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.command == "score":
            return score(arguments.model, arguments.place, arguments.show, arguments.per_source, arguments.seed)
        given = [bool(arguments.from_raw), bool(arguments.good), bool(arguments.bad)]
        if given not in ([True, False, False], [False, True, True]):
            raise ValueError("train takes either --from_raw, or both --good and --bad")
        if arguments.from_raw:
            rows = weakly_labelled(arguments.from_raw, arguments.per_source, arguments.seed)
        else:
            rows = [row for places, label in ((arguments.good, 1), (arguments.bad, 0))
                    for row in read_labelled(places, label, arguments.per_source, arguments.seed)]
        report = train(rows, arguments.output, threshold=arguments.threshold, fraction=arguments.held_out,
                       seed=arguments.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
