"""Peak memory of packing a corpus, for a source and one ten times its size.

    python benchmarks/bench_corpus_memory.py [--megabytes 300] [--times 10] [--folder DIR] [--documents_of 4000]

Writes a folder of documents of so many megabytes of random words, and one `--times` as large, packs each with
`prepare_pretraining --corpus` in a process of its own (one worker, a tokenizer learned beforehand) and prints the peak
resident memory of both and of the imports alone. `--limit_megabytes` also forbids the larger run more memory for data
than that above its imports (RLIMIT_DATA). Needs about as much free disk as the larger source; all is removed.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_scripts import document_folder
from data_scripts.train_tokenizer import train_tokenizer

CHILD = """
import json, resource, sys
from data_scripts.packing.corpus_packing import prepare_corpus
import transformers.tokenization_utils_tokenizers, tokenizers, zstandard
folder, corpus, tokenizer, limit = sys.argv[1:]
data = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
imports = peak()
if int(limit):
    resource.setrlimit(resource.RLIMIT_DATA, (data() + int(limit) * 2**20,) * 2)
manifest = prepare_corpus(folder, corpus, tokenizer_folder=tokenizer, progress=False)
split = manifest["splits"]["train"]
print(json.dumps({"imports": imports, "peak": peak(), "tokens": split["tokens"], "documents": split["documents"]}))
"""


def write_source(folder, megabytes, characters, seed=0):
    """Random words with the frequencies of Zipf's law, as a folder of documents of about `characters` each."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("etaoinshrdlu") for _ in range(rng.randint(2, 10))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    with document_folder.building(folder, source="made", kind="text", languages=["en"]) as writer:
        while writer.bytes < megabytes * 1_000_000:
            for _ in range(100):
                text = " ".join(rng.choices(words, weights, k=characters // 7))
                writer.write(text, str(writer.documents))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--documents_of", type=int, default=4_000, help="characters of a document, about")
    parser.add_argument("--limit_megabytes", type=int, default=0, help="above the imports, for the larger run")
    parser.add_argument("--folder", help="where to work (default: the place for temporary files)")
    args = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        work = Path(work)
        for megabytes in (args.megabytes, args.megabytes * args.times):
            source = work / f"clean-{megabytes}" / "made"
            write_source(source, megabytes, args.documents_of)
            if not (work / "tokenizer").is_dir():
                texts = (d["text"] for d, _ in zip(document_folder.read_documents(source), range(500)))
                train_tokenizer(texts, 4_096).save_pretrained(work / "tokenizer")
            limit = args.limit_megabytes if results else 0
            begin = time.perf_counter()
            run = subprocess.run([sys.executable, "-c", CHILD, str(work / "packed"), str(source.parent),
                                  str(work / "tokenizer"), str(limit)], capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"packing {megabytes} MB failed:\n{run.stderr[-2000:]}")
            result = json.loads(run.stdout) | {"megabytes": megabytes, "seconds": time.perf_counter() - begin}
            results.append(result)
            print(f"{megabytes:>6} MB in {result['documents']:,} documents: peak {result['peak']:,.0f} MiB, imports "
                  f"alone {result['imports']:,.0f} MiB, {result['seconds']:.0f} s", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
