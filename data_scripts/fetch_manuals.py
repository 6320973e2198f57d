"""Manuals of free software as documents: systems, languages, libraries and tools, from Debian's packages.

    python -m data_scripts.fetch_manuals --output_dir data/raw                        # 320 MB of downloads
    python -m data_scripts.fetch_manuals --output_dir data/raw --only postgresql-doc sqlite-doc --max_characters 1000000

A page is a document; pages longer than 20,000 characters are cut at blank lines. Pages in reStructuredText, HTML or
troff become plain text (`markup_text.py`, `man_text.py`); indices, search pages and lists of changes are left out and
counted. Licences are those of the packages' copyright files, in short. Package versions are those that the configured
Debian release has; the manifests record them.
"""

import re
from functools import partial

from data_scripts.reading.fetching import Source, main, pages
from data_scripts.reading.man_text import man_to_text
from data_scripts.reading.markup_text import html_to_text, rst_to_text, vim_help_to_text


def manual(name, package, patterns, extract, licence, origin, skip=None, remove=()):
    """A source of English pages from one Debian package or several (`package` may be a tuple)."""
    names = (package,) if isinstance(package, str) else package
    extract = partial(extract, remove=remove) if remove else extract
    pattern = re.compile(skip) if skip else None

    def documents(packages, left_out):
        for each in packages:
            yield from pages(each, patterns, extract, left_out, pattern)

    return Source(name, "text", ("en",), licence, origin, tuple(("debian", each) for each in names), documents)


def doc(path):
    return [f"usr/share/doc/{path}"]


SOURCES = [
    manual("linux-doc", "linux-doc-6.1", doc("linux-doc-*/Documentation/*.rst"), rst_to_text, "GPL-2",
           "documentation of the Linux kernel", skip=r"/translations/"),
    manual("man-pages", ("manpages", "manpages-dev"), ["usr/share/man/man*"], man_to_text,
           "mixed free (GPL-2+, BSD, Linux man-pages copyleft)", "manual pages of Linux and the C library"),
    manual("python-doc", "python3.11-doc", doc("python3.11/html/_sources/*.txt"), rst_to_text, "PSF-2.0",
           "documentation of Python"),
    manual("postgresql-doc", "postgresql-doc-15", doc("postgresql-doc-15/html/*.html"), html_to_text, "PostgreSQL",
           "manual of PostgreSQL"),
    manual("debian-handbook", "debian-handbook", doc("debian-handbook/html/en-US/*.html"), html_to_text,
           "GPL-2+ or CC-BY-SA-3.0", "The Debian Administrator's Handbook, English"),
    manual("libreoffice-help", "libreoffice-help-en-us", ["usr/share/libreoffice/help/en-US/text/*.html"], html_to_text,
           "MPL-2.0", "help of LibreOffice, English"),
    manual("sqlite-doc", "sqlite3-doc", doc("sqlite3/*.html"), html_to_text, "public domain", "documentation of SQLite",
           skip=r"/(keyword_index|sitemap|toc|doclist|doc_.*link.*)\.html"),
    manual("perl-doc", "perl-doc", ["usr/share/man/man[13]/*"], man_to_text, "GPL-1+ or Artistic",
           "manual and module documentation of Perl", skip=r"/perltoc\."),
    manual("django-doc", "python-django-doc", doc("python-django-doc/html/*.html"), html_to_text, "BSD-3-Clause",
           "documentation of Django"),
    manual("scipy-doc", "python-scipy-doc", doc("python-scipy-doc/html/*.html"), html_to_text, "BSD-3-Clause",
           "documentation of SciPy", skip=r"/dev/|/release"),
    manual("pandas-doc", "python-pandas-doc", doc("python-pandas-doc/html/*.html"), html_to_text, "BSD-3-Clause",
           "documentation of pandas"),
    manual("sklearn-doc", "python-sklearn-doc", doc("python-sklearn-doc/html/*.html"), html_to_text, "BSD-3-Clause",
           "documentation of scikit-learn"),
    manual("sympy-doc", "python-sympy-doc", doc("python-sympy-doc/html/*.html"), html_to_text, "BSD-3-Clause",
           "documentation of SymPy"),
    manual("erlang-doc", "erlang-doc", doc("erlang-doc/*.html"), html_to_text, "Apache-2.0",
           "documentation of Erlang/OTP",
           skip=r"/(users_guide|.*_app_index|part_notes.*|notes.*|release_notes.*)\.html"),
    manual("vim-help", "vim-runtime", ["usr/share/vim/vim*/doc/*.txt"], vim_help_to_text, "Vim licence",
           "help of Vim", skip=r"/(version\d|todo|tags)"),
    manual("cmake-doc", "cmake-doc", doc("cmake-data/html/*.html"), html_to_text, "BSD-3-Clause",
           "documentation of CMake"),
    manual("git-doc", "git-doc", doc("git-doc/*.html"), html_to_text, "GPL-2", "documentation of Git"),
    manual("octave-doc", "octave-doc", doc("octave/*.html/*.html"), html_to_text, "GPL-3+", "manual of GNU Octave"),
    manual("rust-doc", "rust-doc", [f"usr/share/doc/rust-doc/html/{book}/*.html" for book in
                                    ("book", "reference", "rust-by-example", "nomicon", "edition-guide", "cargo",
                                     "embedded-book", "rustc", "rustdoc")],
           html_to_text, "MIT or Apache-2.0", "The Rust Programming Language, the reference and other books",
           skip=r"/book/(first|2018|second)-edition/|/lints/listing/"),
    manual("ghc-doc", "ghc-doc", doc("ghc-doc/html/users_guide/*.txt"), rst_to_text, "BSD-3-Clause",
           "user's guide of the Glasgow Haskell Compiler", skip=r"-notes\.txt"),
    manual("qt-doc", "qtbase5-doc-html", ["usr/share/qt5/doc/*.html"], html_to_text, "GFDL-1.3",
           "documentation of Qt 5", skip=r"-(obsolete|compat|example-\w+|qml-members)\.html|-(cpp|h|pro|qml)\.html$"),
    manual("gap-doc", "gap-doc", ["usr/share/gap/doc/*.html"], html_to_text, "GPL-2+",
           "manual of GAP, a system for computational algebra", skip=r"/chooser\.html|_mj\.html"),
]

if __name__ == "__main__":
    main("fetch_manuals", SOURCES, __doc__)
