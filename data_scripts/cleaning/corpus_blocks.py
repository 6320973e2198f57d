"""What the blocks of the cleaning pipeline share: datatrove's steps, aware of a document's kind.

A filter answers True or (False, reason); an editor changes a document and counts what it changed. Both are pickled to
the workers, so they hold plain settings and load models at first use. The driver sets `exclusion_writer`.
"""


try:
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.filters.base_filter import BaseFilter
except ImportError as error:
    raise ImportError(f"cleaning a corpus needs datatrove ({error}): pip install -e '.[corpus]'") from error

PROSE = ("text", "multilingual")  # kinds that consist of sentences
KINDS = (*PROSE, "code", "mathematics")
SAMPLE, SAMPLES = 6_000, 5        # characters and number of the passages by which a long document is judged


def kind_of(document):
    """A document's kind, "text" unless its metadata says otherwise."""
    return document.metadata.get("kind", "text")


def check_share(name, value, low=0.0, high=1.0):
    """Raise ValueError unless a setting is a number in [low, high]."""
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must lie in [{low:g}, {high:g}]")


def passages(text, size=SAMPLE, number=SAMPLES):
    """Equally spaced passages of a text, whole lines where it has some; the text itself if it is not longer.

    Rates of repetition grow with length, and so do costs: long documents are judged by passages of one size.
    """
    if len(text) <= size * number:
        return [text]
    found = []
    for place in range(number):
        start = (len(text) - size) * place // (number - 1)
        line = text.find("\n", start, start + size // 4) + 1 if place else 0
        found.append(text[line or start:start + size])
    return found


class DocumentFilter(BaseFilter):
    """A filter for documents of some kinds; the others pass. Subclasses define `judge(document)`.

    Args:
        kinds: the kinds that are looked at; None: every kind.
        exclusion_writer: a datatrove writer for what is removed.
    """

    def __init__(self, kinds=None, exclusion_writer=None):
        super().__init__(exclusion_writer)
        unknown = set(kinds or ()) - set(KINDS)
        if unknown:
            raise ValueError(f"kinds={list(kinds)} names {sorted(unknown)[0]!r}; known kinds are {', '.join(KINDS)}")
        self.kinds = None if kinds is None else tuple(kinds)

    def filter(self, document):
        if self.kinds is not None and kind_of(document) not in self.kinds:
            self.stat_update("not_looked_at")
            return True
        return self.judge(document)

    def judge(self, document):
        """True to keep the document, else (False, reason)."""
        raise NotImplementedError


class DocumentEditor(PipelineStep):
    """A step that changes documents and drops none. Subclasses define `edit(document) -> {what: how often}`."""

    type = "✂️ - EDIT"

    def run(self, data, rank=0, world_size=1):
        for document in data:
            with self.track_time():
                before = document.text
                for what, count in self.edit(document).items():
                    if count:
                        self.stat_update(what, value=count)
            self.stat_update("total")
            if document.text != before:
                self.stat_update("changed")
            yield document

    def edit(self, document):
        """Change the document in place; counts of what was changed."""
        raise NotImplementedError
