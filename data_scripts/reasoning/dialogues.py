"""Small conversations of several turns, made from the tasks' problems; every turn is right by construction.

A dialogue is a list of moves over one or two problems of a task: greet, ask, ask for another one
("And 4 + 9 instead?"), doubt the answer, claim a wrong or the right value, ask how it was done, thank. Each
answer comes from the solver or from the task's verifier, none from a list. What the model says about
itself is what is true of one trained on this data: it does small exact tasks, and it can be wrong.
"""

import random
import re
from itertools import cycle

from data_scripts.reasoning.traces import NoProcedure, content, make, solve
from data_scripts.reasoning.traces_base import spaced
from recipes.task_base import mix_seed
from recipes.tasks import get_task

# task: how a second problem is asked for in a few words. The groups of the pattern are what changes.
ANOTHER = {
    "chain_sum": (r"problem: (.*) =", ("And {} instead?", "What is {} then?", "Now {}, please.")),
    "products": (r"multiplication: ([0-9* ]+)\.", ("And {}?", "What is {} then?")),
    "gcd": (r"numbers: ([\d, ]+)\.", ("And of {}?", "The same for {}, please.")),
    "spell_backward": (r"nus\): (\S+)", ("And the word {}?", "Now {}, please.")),
    "word_sequence_reversal": (r"list of words: (.*)", ("And this list: {}", "Now reverse {}")),
    "leg_counting": (r"you have (.*)\?", ("And if I have {} instead?", "What about {}?")),
    "letter_counting": (r'the letter (".") appear in the text: (".*")', ("And {} in {}?", "Now count {} in {}.")),
    "count_bits": (r"number (\d+)\?", ("And for {}?", "What about {}?")),
}
GREETINGS = {"Hello!": "Hello! What shall I work out?", "Hi": "Hi! Do you have a question for me?",
             "Good morning.": "Good morning! What can I do for you?", "Hello, are you there?": "Yes, I am here."}
THANKS = {"Thanks!": "You are welcome.", "Thank you.": "You are welcome!", "Great, that is all.": "Good. Goodbye!"}
ABLE = {"What can you do?", "What are you good at?", "Can you help me?"}
ABOUT = ("I am a small language model. I work out small exact tasks: sums, lists, words, simple puzzles. I can be "
         "wrong, so check what matters.")
DOUBTS = ("Are you sure?", "Is that right?", "Please check that.")
HOW = ("How did you get that?", "Show me the steps.", "Why?")
MOVES = ("another", "doubt", "wrong claim", "right claim", "how")
FRUITLESS = 500  # problems in a row that give no dialogue short enough: then there are no more


def user(text):
    return {"role": "user", "content": text}


def assistant(reasoning, answer):
    return {"role": "assistant", "content": content(reasoning, answer)}


def _asked(problem, rng):
    pattern, forms = ANOTHER[problem.task]
    return rng.choice(forms).format(*re.search(pattern, problem.prompt).groups())


def _wrong_value(problem, answer, rng):
    """A number near the answer that the verifier refuses, or None where answers are no numbers."""
    if get_task(problem.task).kind != "number" or not answer.lstrip("-").isdigit():
        return None
    wrong = str(int(answer) + rng.choice((-2, -1, 1, 2, 10)))
    return wrong if not get_task(problem.task).score(wrong, problem).correct else None


def _turns(move, problem, other, rng):
    """(the user's and the assistant's turn of one move after `problem` was answered, the move that it was)."""
    working = solve(problem)
    answer = working.answer
    wrong = _wrong_value(problem, answer, rng)
    if move == "wrong claim" and wrong is None:
        move = "how"
    return _tell(move, problem, other, working, wrong, rng), move


def _tell(move, problem, other, working, wrong, rng):
    answer = working.answer
    steps = "\n".join(step.text for step in working.steps)
    if move == "another":
        found = make(other, rng)
        return [user(_asked(other, rng)), assistant(found.reasoning, found.answer)]
    if move == "doubt":
        again = f"again: {steps}" + f"\ncheck: {working.check}" * bool(working.check)
        return [user(rng.choice(DOUBTS)), assistant(again, f"Yes, the answer is {answer}.")]
    if move == "wrong claim":
        claim = rng.choice(("I think it is {}.", "I get {}.", "Is it not {}?")).format(wrong)
        denied = f"No, it is not {wrong}. The answer is {answer}."
        return [user(claim), assistant(f"{steps}\n{answer}, not {wrong}", denied)]
    if move == "right claim":
        return [user(f"I have {answer} too."), assistant(f"{steps}\nthe same", f"Yes, the answer is {answer}.")]
    told = "\n".join(f"{place}. {spaced(step.text)}" for place, step in enumerate(working.steps, 1))
    return [user(rng.choice(HOW)), assistant("", f"{told}\nThe answer is {answer}.")]


def dialogue(problem, other, rng):
    """(messages, moves) of one conversation about `problem` and, where it is asked for, `other`."""
    messages, moves = [], []
    if rng.random() < 0.2:
        greeting = rng.choice(list(GREETINGS))
        messages += [user(greeting), assistant("", GREETINGS[greeting])]
        moves.append("greet")
    if rng.random() < 0.1:
        messages += [user(rng.choice(sorted(ABLE))), assistant("", ABOUT)]
        moves.append("about")
    first = make(problem, rng)
    messages += [user(problem.prompt), assistant(first.reasoning, first.answer)]
    turns, chosen = _turns(rng.choice(MOVES), problem, other, rng)
    messages += turns
    moves.append(chosen)
    if rng.random() < 0.2:
        thanks = rng.choice(list(THANKS))
        messages += [user(thanks), assistant("", THANKS[thanks])]
        moves.append("thank")
    return messages, moves


def dialogues(seed, split, tasks, count, longest):
    """Yield up to `count` rows for a data set, the tasks taking turns; problems of one split only.

    Args:
        tasks: {task: levels}; those without a short way to ask again are left out.
        longest: characters of the longest assistant turn.
    """
    pairs = [(name, level) for name, levels in tasks.items() if name in ANOTHER for level in levels]
    streams = {pair: get_task(pair[0]).stream(split, mix_seed("dialogues", seed), pair[1]) for pair in pairs}
    made = fruitless = 0
    for pair in cycle(pairs):
        if made == count or not streams or fruitless >= FRUITLESS:
            return
        if pair not in streams:
            continue
        problem, other = next(streams[pair], None), next(streams[pair], None)
        if other is None:
            del streams[pair]
            continue
        rng = random.Random(mix_seed("dialogue", seed, problem.task, problem.metadata["key"]))
        fruitless += 1
        try:
            messages, moves = dialogue(problem, other, rng)
        except NoProcedure:
            continue
        if max(len(message["content"]) for message in messages) > longest:
            continue
        made, fruitless = made + 1, 0
        keys = [problem.metadata["key"]] + [other.metadata["key"]] * ("another" in moves)
        yield {"messages": messages, "task": problem.task, "difficulty": pair[1], "style": "+".join(moves),
               "key": keys[0], "keys": keys, "question": problem.prompt}
