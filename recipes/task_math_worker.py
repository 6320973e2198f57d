"""A process that compares mathematical answers with math-verify, one JSON line in, one out.

It is a process of its own because an answer like 9^{9^{9^9}} can take for ever or all memory to
evaluate: the parent (`recipes.task_mathematics`) kills it after a time limit and starts another, in
any thread; math-verify's own limit needs the main thread and does not interrupt long multiplications.
Answers are read by math-verify's LaTeX grammar only. Its plain-expression reader is not used: it ends
in sympy's `parse_expr`, which evaluates Python.
"""

import json
import logging
import resource
import sys

MEMORY_BYTES = 2 << 30


def compare(parse, verify, config, reference, answer):
    """{"correct": bool, "parsed": bool}."""
    def read(text):
        return parse(f"${text}$", extraction_config=[config], fallback_mode="no_fallback", parsing_timeout=3)
    given = read(answer)
    if not given:
        return {"correct": False, "parsed": False}
    gold = read(reference)
    return {"correct": bool(gold) and bool(verify(gold, given, timeout_seconds=3)), "parsed": True}


def main():
    replies, sys.stdout = sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    config = LatexExtractionConfig()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = compare(parse, verify, config, request["reference"], request["answer"])
        except Exception:  # hostile text: unreadable
            reply = {"correct": False, "parsed": False}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
