import json
import random
import re
import shutil

import pytest

from data_scripts import augment as module
from data_scripts.augmentation import augment_translation
from data_scripts.augmentation.augment_english import WordNet, WordPairs, inflect
from data_scripts.augmentation.augment_protected import operands, user_texts
from data_scripts.augmentation.augment_synonyms import Synonyms
from data_scripts.augmentation.augment_syntax import (
    adverbial,
    clause,
    contraction,
    expansion,
    instructions,
    particle,
    politeness,
    that,
)
from data_scripts.augmentation.augment_translation import BackTranslation
from data_scripts.prepare_sft import key_of, side_of
from recipes.task_puzzles import PUZZLE_TASKS
from recipes.tasks import get_task

ENGLISH = ("the pupils of a school calculate the result quickly and the students compute it rapidly with an answer. "
           "the old pupils compute the sum. the students read a book in the garden. the pupils read the volume. ") * 30
# part of speech: [(words of a synset, times that each was met in this sense)]
SENSES = {"noun": [(["student", "pupil"], [9, 8]), (["pupil"], [2]), (["book", "volume"], [20, 5]),
                   (["volume", "loudness"], [9, 5])],
          "verb": [(["compute", "calculate"], [8, 9])], "adj": [(["old", "aged"], [9, 1])],
          "adv": [(["quickly", "rapidly"], [9, 9])]}


@pytest.fixture(scope="module")
def wordnet_files(tmp_path_factory):
    """A WordNet of eight words in the files and format of the real one."""
    folder = tmp_path_factory.mktemp("wordnet")
    numbers, counts = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}, []
    for pos, synsets in SENSES.items():
        index, data = {}, ["  1 a line of the licence"]
        for place, (words, met) in enumerate(synsets):
            offset = f"{place:08d}"
            listed = " ".join(f"{word} 0" for word in words)
            data.append(f"{offset} 00 {pos[0]} {len(words):02x} {listed} 000 | a gloss")
            for word, count in zip(words, met):
                index.setdefault(word, []).append((-count, offset))
        (folder / f"data.{pos}").write_text("\n".join(data) + "\n")
        lines = ["  1 a line of the licence"]
        for word, senses in sorted(index.items()):
            senses.sort()
            offsets = " ".join(offset for _, offset in senses)
            lines.append(f"{word} {pos[0]} {len(senses)} 0 {len(senses)} {len(senses)} {offsets}")
            counts += [f"{word}%{numbers[pos]}:00:00:: {n} {-count}" for n, (count, _) in enumerate(senses, 1)]
        (folder / f"index.{pos}").write_text("\n".join(lines) + "\n")
        (folder / f"{pos}.exc").write_text("")
    (folder / "cntlist.rev").write_text("\n".join(counts) + "\n")
    return folder


@pytest.fixture(scope="module")
def synonyms(wordnet_files):
    return Synonyms(WordNet(wordnet_files), WordPairs([ENGLISH]))


def conversation(question, answer="Yes.", **columns):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


@pytest.fixture(scope="module")
def problems():
    """Rows of generated tasks, as prepare_sft writes them, with their problems."""
    found = []
    for name, task in PUZZLE_TASKS.items():
        if task.generated and "train" in task.splits:
            for problem in task.problems("train", seed=0, difficulty=task.levels[0], size=4, repeat=True):
                answer = f"<think>\nworking\n</think>\n\n{problem.reference}"
                row = conversation(problem.prompt, answer, task=name, source="t", difficulty=task.levels[0],
                                   style="terse", key=problem.metadata["key"])
                found.append((problem, row))
    return found


def test_synonyms_keep_form_case_and_what_the_answer_says(synonyms):
    rng = random.Random(0)
    assert synonyms.candidates("students") == ["pupils"] and synonyms.candidates("computes") == []  # not met in English
    assert synonyms.candidates("books") == []  # "volume" mostly means loudness
    text, changes = synonyms.variant("The old students compute the result quickly and rapidly.", set(), rng)
    assert text.startswith("The old pupils ") and changes[0] == {"rule": "synonym", "from": "students", "to": "pupils"}
    assert synonyms.variant("The old students read.", {"students"}, rng) is None
    for kept in ('Read "the students compute" aloud.', "Sort these: the students compute", "`the students compute`",
                 "The students' compute-time", "We met 3 students.", "See the [students] here."):
        found = synonyms.variant(kept, set(), rng)
        assert found is None or "students" in found[0]


def test_regular_inflection():
    for lemma, ending, form in (("carry", "ed", "carried"), ("box", "s", "boxes"), ("stop", "ing", "stopping"),
                                ("make", "ing", "making"), ("play", "ed", "played"), ("answer", "ing", "answering"),
                                ("see", "ing", "seeing"), ("city", "s", "cities"), ("occur", "ed", None),
                                ("die", "ing", None)):
        assert inflect(lemma, ending) == form


@pytest.mark.parametrize("rule, before, after", [
    (contraction, "What is the sum?", "What's the sum?"), (contraction, "Yes, I am.", None),
    (contraction, 'Write "I do not know" twice.', None), (expansion, "I don't know it.", "I do not know it."),
    (expansion, "Why can't you eat?", None), (expansion, "It's been late.", None),
    (clause, "If you have time, call the office.", "Call the office if you have time."),
    (clause, "What happens when the water boils?", "When the water boils, what happens?"),
    (clause, "Tell me if the water boils.", None), (clause, "If it rains, it pours.", None),
    (clause, "London is wet because the rain falls.", None), (clause, "Count 3 apples if the bag is open.", None),
    (adverbial, "Today, we met a friend.", "We met a friend today."),
    (adverbial, "We met a friend today.", "Today, we met a friend."),
    (that, "I think that it is late.", "I think it is late."),
    (that, "She said he was late.", "She said that he was late."),
    (that, "Who do you think he is?", None), (that, 'Read "I think that it is late" aloud.', None),
    (particle, "Switch off the light.", "Switch the light off."), (particle, "We look out the window.", None),
    (clause, "Because of the rain, we stayed home.", None), (adverbial, "The work shall end by tomorrow.", None),
    (politeness, "List of all rivers.", None), (politeness, "Please calculate it.", None),
    (politeness, "Water boils at noon.", None)])
def test_rules(rule, before, after):
    assert {rule(before, random.Random(seed)) for seed in range(6)} == {after}


def test_politeness_asks_for_the_first_sentence():
    found = {politeness("Explain gravity to a child. Be brief.", random.Random(seed)) for seed in range(30)}
    assert found == {"Please explain gravity to a child. Be brief.", "Could you explain gravity to a child? Be brief.",
                     "Can you explain gravity to a child? Be brief.",
                     "Would you please explain gravity to a child? Be brief."}
    operand = "Spell this word backward (example: sun -> nus): dig"
    assert politeness(operand, random.Random(0)) == "Please s" + operand[1:]


def test_independent_instructions_change_places_and_others_do_not():
    free = "Write a poem. Rules:\n- Be brief.\n- Use British spelling.\n- Avoid rhymes.\nGo."
    new = instructions(free, random.Random(0))
    assert new != free and sorted(new.split("\n")) == sorted(free.split("\n"))
    assert new.startswith("Write a poem. Rules:\n- ") and new.endswith("\nGo.")
    assert instructions(free.replace("Avoid", "Then avoid"), random.Random(0)) is None
    assert instructions(free.replace("Rules", "Items"), random.Random(0)) is None


def solved(name, prompt):
    """The answer worked out from a prompt by other means than the task's; None for tasks not handled here."""
    if name == "chain_sum":
        sign, *parts = re.findall(r"[-+]|\d+", "+ " + prompt.rpartition(":")[2])
        signs, numbers = [sign, *parts[1::2]], parts[0::2]
        return str(sum(int(n) if s == "+" else -int(n) for s, n in zip(signs, numbers)))
    if name == "letter_counting":
        letter, text = re.search(r'letter "(.)".*?: "(.*)"', prompt, re.DOTALL).groups()
        return str(text.lower().count(letter))
    if name == "spell_backward":
        return prompt.rpartition(": ")[2][::-1]
    if name == "count_primes":
        low, high = map(int, re.search(r"between (\d+) and (\d+)", prompt).groups())
        return str(sum(n > 1 and all(n % d for d in range(2, n)) for n in range(low, high + 1)))
    if name == "word_sequence_reversal":
        return ", ".join(prompt.rpartition(": ")[2].split(", ")[::-1])
    return None


def test_augmented_problems_still_have_their_answer(problems, synonyms):
    checked, copies = set(), 0
    module._PLACES.update(changers={"synonyms": synonyms}, pairs=WordPairs([ENGLISH, *(p.prompt for p, _ in problems)]))
    for number, (problem, row) in enumerate(problems):
        for seed in range(5):
            found, _ = module.copies_of((number, row, ["synonyms", "syntax"]), seed)
            for copy in found:
                copies += 1
                prompt = copy["messages"][0]["content"]
                assert operands(prompt) == operands(problem.prompt) and prompt != problem.prompt
                assert re.findall(r"\d+", prompt) == re.findall(r"\d+", problem.prompt)
                assert prompt.partition(":")[2] == problem.prompt.partition(":")[2]
                assert copy["messages"][1:] == row["messages"][1:]
                if (answer := solved(problem.task, prompt)) is not None:
                    assert get_task(problem.task).score(answer, problem).correct, prompt
                    checked.add(problem.task)
    assert copies > 100 and checked == {"chain_sum", "letter_counting", "spell_backward", "count_primes",
                                        "word_sequence_reversal"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory, problems, wordnet_files):
    """(folder of the input, arguments) of a small set with rows of tasks, chats, prompts and other scripts."""
    folder = tmp_path_factory.mktemp("set")
    rows = [row for _, row in problems][:60]
    rows += [conversation(f"Here the students compute the sum {n}. What is the next?") for n in range(20)]
    rows += [conversation(f"Here the pupils compute the sum {n}.") for n in range(40)]
    rows += [{"prompt": f"Explain gravity to child {n}.", "completion": "It pulls."} for n in range(10)]
    rows += [conversation("学而时习之，不亦说乎？"), {"text": "The students compute the result quickly."}]
    path = write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", [conversation("Please explain gravity to child 3.")])
    return path, {"synonyms": 0.9, "syntax": 0.9, "seed": 3, "wordnet": wordnet_files, "progress": False}


def test_a_set_keeps_originals_and_marks_copies(made, tmp_path):
    path, arguments = made
    manifest = module.augment(path, tmp_path / "one", **arguments)
    originals, rows = read(path), read(tmp_path / "one" / "train.jsonl")
    assert [{**row, "key": row.get("key"), "augmentation": None} for row in originals] == \
        [row for row in rows if not row["augmentation"]]
    copies, last = [], None
    for row in rows:
        if not row["augmentation"]:
            last = row
            continue
        copies.append(row)
        mark = row["augmentation"]
        assert mark["kind"] in module.KINDS and mark["changes"] and mark["licence"]
        assert mark["of"] == module.key_of(last)
        assert row["key"] == module.key_of(last)
        if "messages" in row:
            full = {"key": "", "task": "", **row}
            assert side_of(full, 0.3) == side_of({**full, **last, "key": last["key"] or ""}, 0.3)
            assert key_of(full) == key_of({**full, **last, "key": last["key"] or ""})
    assert len(copies) == sum(manifest["copies"].values()) > 40 and manifest["originals"] == len(originals)
    assert (tmp_path / "one" / "test.jsonl").read_bytes() == path.with_name("test.jsonl").read_bytes()
    asked = [module.normal(user_texts(row)[0][1]) for row in copies]
    assert "please explain gravity to child 3." not in asked
    tried, refused = manifest["tried"], manifest["refused"]
    for kind in tried:  # nothing is lost without a reason
        assert tried[kind] == manifest["copies"][kind] + sum(refused.get(kind, {}).values())
    assert refused["syntax"]["not English"] >= 1


def test_the_seed_decides_and_workers_do_not(made, tmp_path):
    path, arguments = made
    for name, changed in (("one", {}), ("two", {"workers": 2}), ("other", {"seed": 4})):
        module.augment(path, tmp_path / name, **{**arguments, **changed})
    one, two, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


def test_held_out_rows_are_refused(tmp_path, wordnet_files, problems):
    task = get_task("chain_sum")
    problem = task.problems("test", seed=0, difficulty=1, size=1)[0]
    for name, row, message in (("test.jsonl", conversation("Hi."), "held out by its name"),
                               ("a.jsonl", conversation("Hi.", split="eval"), "line 1 is held out"),
                               ("b.jsonl", conversation(problem.prompt, task="chain_sum", key=problem.metadata["key"]),
                                "line 1 is held out"),
                               ("c.jsonl", {"x": 1}, "no user's text in the columns x"),
                               ("d.jsonl", conversation("Hi.", augmentation={"kind": "syntax"}), "copy already")):
        path = write(tmp_path / name, [row])
        with pytest.raises(ValueError, match=message):
            module.augment(path, tmp_path / "out", syntax=1.0, progress=False)
        assert not (tmp_path / "out").exists()
    module.augment(tmp_path / "test.jsonl", tmp_path / "out", syntax=1.0, force=True, progress=False)


def test_command_line(made, tmp_path, capsys):
    path, arguments = made
    command = ["--input", str(path), "--output", str(tmp_path / "out"), "--syntax", "0.5", "--show", "1"]
    module.main(command)
    first = capsys.readouterr().out
    assert "originals kept" in first and "  + " in first and "not made" in first
    stamp = (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns
    module.main(command)
    assert (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns == stamp
    for bad, message in ((["--syntax", "2"], "syntax=2.0 must lie in"), (["--syntax", "0"], "nothing to do"),
                         (["--synonyms", "1", "--wordnet", str(tmp_path)], "holds no data.noun")):
        with pytest.raises(SystemExit) as error:
            module.main([*command, *bad])
        assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("before, after, expected", [
    # What was lost, doubled or turned round on the way stays as written; the new word is taken over.
    ("The students computed the large sum in 3 days with Anna.", "The sum  big computed in the 3 days Ana.",
     "The students computed the big sum in 3 days with Anna."),
    ("However, the students read the sum.", "Even so, the read students it.", "Even so, the students read the sum."),
    ("The students started the sum.", "The students begun the sum.", None),
    ("The students had started the sum.", "The students had begun the sum.", "The students had begun the sum."),
    ("The students compute the sum of trees.", "The students compute the sum of dogs.", None),
    ("The students have a large sum of (large) books.", "The students have big sum of books.", None),  # met twice
    ('The students read "the large sum" here.', 'The students read "the big sum" here.', None),
    ("The students compute about 5 sums.", "The students compute roughly 5 sums.",
     "The students compute roughly 5 sums.")])
def test_what_came_back_is_taken_over_where_it_is_known_to_read_well(back, before, after, expected):
    back.translations = {before: after}
    found = back.variant(before, set(), random.Random(0))
    assert (found and found[0]) == expected
    assert back.variant(before, {"large", "begun", "even", "roughly"}, random.Random(0)) is None


@pytest.fixture
def back(tmp_path, wordnet_files, monkeypatch):
    """Translation with a WordNet that also knows an irregular verb; no Apertium is called."""
    folder = shutil.copytree(wordnet_files, tmp_path / "wordnet")
    for pos, words in (("verb", ("start", "begin")), ("adj", ("large", "big"))):
        with open(folder / f"index.{pos}", "a") as index, open(folder / f"data.{pos}", "a") as data:
            for number, word in enumerate(words):
                data.write(f"0000090{number} 00 {pos[0]} 01 {word} 0 000 | a gloss\n")
                index.write(f"{word} {pos[0]} 1 0 1 1 0000090{number}\n")
    (folder / "verb.exc").write_text("began begin\nbegun begin\n")
    monkeypatch.setattr(augment_translation, "check_installed", lambda: None)
    return BackTranslation(WordNet(folder), WordPairs([ENGLISH]))


@pytest.mark.parametrize("rows, beside, message", [
    ([{"messages": [{"role": "system", "content": "Hi."}]}], None, "line 1.*messages holds no turn of a user"),
    ([{"messages": ["Hi.", 3]}], None, "line 1.*messages holds no turn of a user"),
    ([conversation("Hi.")], "{broken\n", "test.jsonl.*line 1.*repair the row"),
    ([conversation("Hi.")], '{"x": 1}\n', "test.jsonl.*line 1.*no user's text")])
def test_rows_without_a_question_are_named(tmp_path, rows, beside, message):
    path = write(tmp_path / "train.jsonl", rows)
    if beside:
        (tmp_path / "test.jsonl").write_text(beside)
    with pytest.raises(ValueError, match=message):
        module.augment(path, tmp_path / "out", syntax=1.0, progress=False)


def test_only_the_first_turn_is_greeted(monkeypatch):
    monkeypatch.setattr("data_scripts.augmentation.augment_syntax.GREETED", 1.0)
    turn, pairs = {"role": "user", "content": "Which book is old?"}, WordPairs(["Which book is old?"])
    copy, _ = module.augmented({"messages": [turn, {"role": "assistant", "content": "Mine."}, turn]}, 0, "syntax",
                               module.Syntax(), pairs, 0)
    first, last = (copy["messages"][n]["content"] for n in (0, 2))
    assert first.endswith(turn["content"]) and first != last == turn["content"]
    assert module.Syntax().variant("The book lies there.", set(), random.Random(0)) is None


def test_missing_apertium_names_the_command(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(ValueError, match="apt-get install -y --no-install-recommends apertium apertium-eng-spa"):
        augment_translation.check_installed()


@pytest.mark.skipif(shutil.which("apertium") is None, reason="apertium is not installed")
def test_sentences_stay_apart_on_their_way():
    sentences = ["What is your name?", "The cat sleeps on the table.", "We met Anna in 1999!", "Is it late."]
    back = augment_translation.there_and_back(sentences)
    assert len(back) == 4 and "Anna" in back[2] and "1999" in back[2] and "cat" in back[1]
    assert back[1:3] == augment_translation.there_and_back(sentences[1:3])


def test_the_about_of_a_question_is_no_number_word():
    (about,) = [pattern for pattern, new in augment_translation.PHRASES if new == "roughly"]
    assert about.search("It took about 3 days.") and not about.search("What about 3 cows?")
