"""Markup to text: what is said stays, what is layout goes."""

import time

import pytest

from data_scripts.reading.man_text import NotText, arguments, man_to_text, unescape
from data_scripts.reading.markup_text import html_to_text, rst_to_text, vim_help_to_text

MAN = r'''.\" a comment
.de Sp
.if t .sp .5v
..
.ie n .ds Aq '
.el \{\
.TP
hidden for paper
.\}
.TH TOY 1 2024
.SH NAME
toy \- do \fInothing\fP
.SH OPTIONS
.TP
.BR \-v ", " \-\-verbose
Say more,
and \(lqlouder\(rq.
.IP \(bu 2
One
.IP \(bu
Two\&.
.PP
See
.BR open (2).
.RS
.EX
if (x)
    y = "\en";
.EE
.RE
.TS
l l.
A	B
T{
long
cell
T}	C
.TE
'''


def test_manual_page():
    assert man_to_text(MAN) == """NAME

toy - do nothing

OPTIONS

-v, --verbose
    Say more, and “louder”.

• One

• Two.

See open(2).

    if (x)
        y = "\\n";

A	B
long cell	C"""


def test_manual_pages_without_text_of_their_own_are_told_apart():
    with pytest.raises(NotText, match="point to another"):
        man_to_text(".so man2/open.2\n")
    with pytest.raises(NotText, match="mdoc"):
        man_to_text(".Dd May 1\n.Dt TOY 1\n.Sh NAME\n")


def test_troff_escapes_and_arguments():
    assert unescape(r"\fBa\fR\s-1b\s0 \e \(em \[u00E9] \*(Aq \-x\h'2n'") == "ab \\ — é ' -x"
    assert arguments(r'a "b c" d\ e "say ""no"""') == ["a", "b c", "d e", 'say "no"']
    assert man_to_text(".PP\n这是一行\n又是一行\nand English\ntoo") == "这是一行又是一行 and English too"


def test_html_keeps_content_and_code_and_drops_navigation():
    page = """<html><head><title>t</title><style>p {color: red}</style></head><body>
    <div class="navheader"><a href="a">Prev</a> <a href="b">Next</a></div><nav>Home</nav>
    <div class="body"><h1>Sorting<a class="headerlink" href="#x">¶</a></h1>
    <p>Sorts the <b>list</b> in place, and what comes after it stays as it was before.</p>
    <pre>def f(x):
    return x &lt; 1</pre><p>The cost is <img class="math" src="1.png" alt="n \\log n"/>.</p>
    <dl><dt><strong>key</strong><span class="classifier">callable</span></dt><dd><p>How to compare.</p></dd></dl>
    </div><div class="navfooter">Prev Next</div><footer>made by a program</footer></body></html>"""
    text = html_to_text(page)
    assert "def f(x):\n    return x < 1" in text and "Sorts the list in place" in text and "key : callable" in text
    assert "$n \\log n$" in text
    assert not any(word in text for word in ("Prev", "Home", "¶", "color", "program"))


RST = """.. _label:

Title
=====

.. toctree::
   :maxdepth: 2

   other

Use :func:`~os.path.join` or :ref:`the
guide <guide>`, see :pep:`484` and ``x = 1`` (`site <https://a.org>`_). [1]_

.. note:: Mind this.

.. code-block:: python
   :linenos:

   x = ":func:`kept`"

.. function:: open(path)
   :noindex:

   Opens ``path``::

       f = open("a")  # ``also`` kept

.. A comment
   of two lines

.. [1] The footnote.
"""


def test_rst_loses_directives_only():
    assert rst_to_text(RST) == '''Title
=====

Use os.path.join or the
guide, see PEP 484 and `x = 1` (site (https://a.org)).

Note: Mind this.

   x = ":func:`kept`"

open(path)

   Opens `path`:

       f = open("a")  # ``also`` kept

The footnote.'''


def test_vim_help_loses_tags_and_modeline():
    source = ("*a.txt*  For Vim\n\n*tag*\nUse |:tcl| like this: >\n\t:tcl puts 2 * 3 * 4\n<\nDone.  *other*\n"
              " vim:tw=78:ts=8:\n")
    assert vim_help_to_text(source) == "  For Vim\n\nUse :tcl like this:\n        :tcl puts 2 * 3 * 4\n\nDone."


@pytest.mark.parametrize("to_text, source", [
    (rst_to_text, ":a" * 40_000), (vim_help_to_text, " \t" * 20_000 + "x"), (rst_to_text, " " * 40_000 + "x")])
def test_long_runs_take_no_quadratic_time(to_text, source):
    start = time.process_time()
    to_text(source)
    assert time.process_time() - start < 1
