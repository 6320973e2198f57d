"""Preference pairs kept by several judgements of each: averaged, and kept where they agree by a margin.

    python -m data_scripts.judge_preferences --source data/pairs --output_dir data/kept --judges runs/rm_a runs/rm_b
    python -m data_scripts.judge_preferences --source judged_by_llm.jsonl --output_dir data/kept --relabel

DeepSeek-R1 asked a judge four times a pair, with the order of the two answers drawn anew each time so that a taste for
the first one cancels, averaged, and kept a pair if its scores differed by more than 1 (arXiv:2501.12948, Sec. 2.3.4 and
supplement). Judgements are

* reward models (`--judges`): each scores both sides; its rewards are divided by their standard deviation in training;
* or a column `judgements`: a list of {"chosen": score, "rejected": score, "first": "chosen" or "rejected"}, the last
  where the judge saw both sides at once. Then the report says how much the first place is worth to the judge.

Each row of train.jsonl and test.jsonl is that of the source with its `margin`, the mean difference of the scores, and
`judgements`. A pair that was judged the other way is left out, or turned round with `--relabel`. All is counted.
"""

import argparse
import json
import logging
import math
from collections import Counter
from pathlib import Path

import numpy
import transformers

from data_scripts.packing import packed_writer
from data_scripts.preferences.preference_files import OURS, SPLITS
from recipes.reward_data import read_pair
from recipes.sft_data import read_splits

MARGIN = 1.0  # DeepSeek-R1


def mean_margin(judgements, least):
    """Mean of chosen - rejected over the judgements of a pair.

    Where the judge saw both sides and both orders occur, each order has the same weight, so that a constant bonus for
    the first place cancels.
    Raises:
        ValueError: for fewer than `least` judgements, or scores that are not finite numbers.
    """
    if len(judgements or ()) < least:
        raise ValueError(f"{len(judgements or ())} judgements are fewer than judgements={least}; judge it again")
    for entry in judgements:
        for side in ("chosen", "rejected"):
            value = entry.get(side)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"a judgement has {side}={value!r}; each needs a finite score for chosen and rejected")
        if entry.get("first") not in (None, "chosen", "rejected"):
            raise ValueError(f"a judgement has first={entry['first']!r}; it must be chosen or rejected")
    orders = {}
    for entry in judgements:
        orders.setdefault(entry.get("first"), []).append(entry["chosen"] - entry["rejected"])
    if set(orders) == {"chosen", "rejected"}:
        return sum(sum(own) / len(own) for own in orders.values()) / 2
    every = [value for own in orders.values() for value in own]
    return sum(every) / len(every)


def first_place(rows):
    """What the first place is worth: mean score of the side shown first minus that of the other; None if not known."""
    worth = []
    for row in rows:
        for entry in row["judgements"]:
            if entry.get("first"):
                other = "rejected" if entry["first"] == "chosen" else "chosen"
                worth.append(entry[entry["first"]] - entry[other])
    return sum(worth) / len(worth) if worth else None


def turned_round(row):
    """The same judgement of a pair with its sides exchanged."""
    swap = {"chosen": "rejected", "rejected": "chosen", None: None}
    judgements = [
        {"chosen": entry["rejected"], "rejected": entry["chosen"], "first": swap[entry.get("first")]}
        for entry in row["judgements"]
    ]
    sides = {"chosen": row["rejected"], "rejected": row["chosen"]}
    return row | sides | {"judgements": judgements, "margin": -row["margin"]}


def select(rows, margin=MARGIN, least=1, relabel=False):
    """(rows kept, Counter of what became of all)."""
    kept, counts = [], Counter()
    for row in rows:
        row = row | {"margin": mean_margin(row.get("judgements"), least)}
        if row["margin"] < -margin:
            counts["judged the other way, " + ("turned round" if relabel else "left out")] += 1
            if not relabel:
                continue
            row = turned_round(row)
        elif row["margin"] <= margin:
            counts[f"margin of at most {margin:g}, left out"] += 1
            continue
        counts["kept"] += 1
        kept.append(row)
    return kept, counts


def judge(parts, folders, batch_size=64, device="cpu"):
    """{split: rows with `judgements`}, one by each model; its rewards are divided by their spread in training."""
    from recipes.reward_scoring import load_reward_model, score

    parts = {split: [row | {"judgements": []} for row in rows] for split, rows in parts.items()}
    for folder in folders:
        model, tokenizer = load_reward_model(folder, device=device)
        spread = None
        for split, rows in parts.items():
            prompts, *sides = zip(*map(read_pair, rows))
            found = [score(model, tokenizer, prompts, side, batch_size) for side in sides]
            spread = float(numpy.std(found)) if spread is None else spread
            if not spread > 0:
                raise ValueError(f"--judges {folder} gives every completion the same reward; it judges nothing")
            for row, chosen, rejected in zip(rows, *found):
                row["judgements"].append({"chosen": chosen / spread, "rejected": rejected / spread, "first": None})
    return parts


def prepare(source, output_dir, judges=(), margin=MARGIN, judgements=1, relabel=False, batch_size=64, device="cpu"):
    """Write the folder; returns its manifest.

    Raises:
        ValueError: for settings that cannot work, rows without judgements, or no pair kept.
    """
    if not margin >= 0 or judgements < 1:
        raise ValueError(f"margin={margin} must be zero or more, and judgements={judgements} at least 1")
    if Path(source).resolve() == Path(output_dir).resolve():
        raise ValueError(f"output_dir={output_dir} is the source, which would be lost; name another folder")
    splits = zip(SPLITS, read_splits(source, maker="data_scripts.prepare_preferences"))
    parts = {split: [{name: value for name, value in row.items() if value is not None} for row in found]
             for split, found in splits if found is not None and len(found)}
    if not parts.get("train"):
        raise ValueError(f"{source} has no training pairs")
    if judges:
        parts = judge(parts, judges, batch_size, device)
    elif not any("judgements" in row for rows in parts.values() for row in rows):
        raise ValueError(f"{source} has no column judgements; name reward models with --judges")
    manifest = {"source": str(source), "judges": list(map(str, judges)), "margin": margin, "splits": {}}
    for split, rows in parts.items():
        parts[split], counts = select(rows, margin, judgements, relabel)
        manifest["splits"][split] = {"pairs": len(rows), **counts, "first_place": first_place(rows)}
    if not parts["train"]:
        raise ValueError(
            f"no pair has a mean margin above {margin:g}: {manifest['splits']['train']}; lower --margin"
        )
    with packed_writer.build_beside(output_dir, OURS, "a preference set") as folder:
        for split, rows in parts.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        packed_writer.write_manifest(folder, manifest)
    return manifest


def main(argv=None):
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description="Keep preference pairs on which several judgements agree.")
    parser.add_argument("--source", required=True, help="folder or file of pairs, or a Hub name")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--judges", nargs="*", default=[], help="folders of reward models; default: column judgements")
    parser.add_argument("--margin", type=float, default=MARGIN, help="keep a pair if its mean margin is larger")
    parser.add_argument("--judgements", type=int, default=1, help="least judgements of a pair (DeepSeek-R1: 4)")
    parser.add_argument("--relabel", action="store_true", help="turn round pairs that are judged the other way")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="of the reward models: cpu or cuda")
    arguments = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        manifest = prepare(**vars(arguments))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for split, facts in manifest["splits"].items():
        print(split + ": " + ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))


if __name__ == "__main__":
    main()
