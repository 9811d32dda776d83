"""The task families of the synthetic outcomes: each writes one query of a level from 0 (easy) to LEVELS - 1.

Text alone; who answers it correctly is decided in :mod:`arllm.train.synthetic`.
"""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Callable, Mapping, Sequence

LEVELS = 8  # a query of level k has difficulty k / (LEVELS - 1)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NAMES = _words(
    "Ada Ben Clara David Elena Farid Grace Hugo Irene Jonas Kavya Liam Maria Nadia Oscar Priya Quentin Rosa"
    " Samir Tara Umar Vera Walter Yusuf Zoe"
)
_THINGS = _words("stamps marbles pencils shells tickets coins postcards apples buttons stickers cards beads")
_MONTHS = _words(  # calendar.month_name would follow the locale
    "January February March April May June July August September October November December"
)
_WORDS = _words(
    "lantern kitchen journey blanket harvest dolphin mountain sandwich umbrella triangle painter captain"
    " keyboard notebook elephant hospital calendar festival bonfire cardinal pumpkin bracelet compass weather"
    " thunder gardener library blossom cottage feather hammock magnet orchard pilgrim quarter rainbow shelter"
    " tunnel village whisper"
)
_EDITS = (
    "reverse it",
    "sort its letters alphabetically",
    "remove its first letter",
    "remove its last letter",
    "remove every vowel",
    "swap its first and last letters",
    "move its last letter to the front",
    "double its first letter",
    'replace every "e" with "o"',
    'add the letter "{letter}" at the end',
    'put the letter "{letter}" in front',
)
_CATEGORIES = tuple(  # disjoint, and more words each than the longest question takes
    _words(category)
    for category in (
        "apple pear plum cherry mango lemon banana apricot peach grape fig melon",
        "oak birch willow maple beech ash elm pine spruce larch cedar poplar",
        "iron copper zinc silver gold tin lead nickel titanium aluminium chromium platinum",
        "sparrow robin eagle owl heron gull finch wren stork raven swallow pigeon",
        "salmon trout cod herring tuna perch carp pike eel haddock mackerel sardine",
        "violin cello flute trumpet oboe harp drum piano clarinet banjo guitar tuba",
        "bus tram lorry bicycle train van ferry taxi scooter tractor canoe helicopter",
        "baker nurse teacher plumber lawyer farmer judge tailor pilot dentist carpenter sailor",
        "shirt scarf glove jacket sock hat skirt coat belt jumper trousers dress",
    )
)
_COMPARISONS = (
    ("taller", "shorter", "tallest"),
    ("older", "younger", "oldest"),
    ("faster", "slower", "fastest"),
    ("heavier", "lighter", "heaviest"),
    ("stronger", "weaker", "strongest"),
)
_ORDINALS = (
    "",
    "second ",
    "third ",
    "fourth ",
    "fifth ",
    "sixth ",
    "seventh ",
    "eighth ",
    "ninth ",
    "tenth ",
)
_PROGRAM_QUESTIONS = (
    "What does this Python program print?",
    "What is the output of the following Python code?",
    "Read this Python code and say what it prints.",
)
_LOOP_STATEMENTS = (
    "{total} += {a}",
    "{total} -= {i}",
    "{total} += {i} * {a}",
    "{total} = {total} * 2 - {b}",
    "{total} = {total} % {b} + {i}",
    "if {i} % 2 == 0:\n        {total} += {b}",
    "if {total} > {b}:\n        {total} -= {a}",
)
_FUNCTION_BODIES = ("x + {a}", "{a} * x - {b}", "x % {b} + {a}", "max(x, {b})", "abs(x - {b})", "{b} - x")


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _arithmetic(rng: random.Random, level: int) -> str:
    top = 20 * (level + 1) ** 2
    if rng.random() < 0.5:
        expression = str(rng.randint(2, top))
        for _ in range(level + 1):
            expression += f" {rng.choice('+-*')} {rng.randint(2, top)}"
        question = rng.choice(
            (
                "What is {}?",
                "Calculate {} and give the result.",
                "Work out the value of {}.",
                "How much is {}?",
            )
        )
        return question.format(expression)
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    start = total = rng.randint(5, top)
    events = []
    for _ in range(level + 1):
        if total > 5 and rng.random() < 0.5:  # nobody gives away more than they have
            amount = rng.randint(2, total - 2)
            total -= amount
            events.append(rng.choice(("gives {} away", "loses {}", "sells {}")).format(amount))
        else:
            amount = rng.randint(2, top)
            total += amount
            events.append(rng.choice(("buys {} more", "finds {} more", "is given {} more")).format(amount))
    if len(events) == 1:
        return f"{name} starts with {start} {things} and {events[0]}. How many {things} does {name} have now?"
    story = f"{name} starts with {start} {things}, then {_listed(events)}."
    question = rng.choice(("How many {0} does {1} have now?", "How many {0} does {1} have in the end?"))
    return f"{story} {question.format(things, name)}"


def _dates(rng: random.Random, level: int) -> str:
    day = datetime.date(rng.randint(1980, 2030), 1, 1) + datetime.timedelta(days=rng.randrange(365))
    shifts = []
    for _ in range(level + 1):
        amount, unit = rng.choice(
            ((rng.randint(2, 30 * (level + 1)), "days"), (rng.randint(2, 8 * (level + 1)), "weeks"))
        )
        shifts.append(f"go {rng.choice(('forward', 'back'))} {amount} {unit}")
    start = f"{day.day} {_MONTHS[day.month - 1]} {day.year}"
    question = rng.choice(
        ("Which date is it then?", "On which date do you arrive?", "Give the resulting day, month and year.")
    )
    return f"Starting from {start}, {_listed(shifts)}. {question}"


def _sequences(rng: random.Random, level: int) -> str:
    # The terms follow a polynomial whose degree grows with the level: differences[k] is the k-th difference.
    degree = 1 + level // 3
    differences = [rng.randint(-20, 60)] + [rng.randint(2, 9 + 2 * level) for _ in range(degree)]
    terms = []
    for _ in range(5 + level):
        terms.append(str(differences[0]))
        for k in range(degree):
            differences[k] += differences[k + 1]
    question = rng.choice(
        (
            "Which number comes next in the sequence {}?",
            "The sequence {} follows a rule. What is the next term?",
            "Find the number that continues this sequence: {}.",
        )
    )
    return question.format(", ".join(terms))


def _letters(rng: random.Random, level: int) -> str:
    edits = [edit.format(letter=rng.choice("bdkmstz")) for edit in rng.sample(_EDITS, level + 1)]
    question = rng.choice(
        (
            "What do you get?",
            "What is the result?",
            "Write down the result.",
            "How many letters does the result have?",
        )
    )
    return f'Starting with the word "{rng.choice(_WORDS)}", {_listed(edits)}. {question}'


def _odd_one_out(rng: random.Random, level: int) -> str:
    category, other = rng.sample(_CATEGORIES, 2)
    words = [*rng.sample(category, 3 + level), rng.choice(other)]
    rng.shuffle(words)
    question = rng.choice(
        (
            "Which of these does not belong with the others: {}?",
            "Find the odd one out: {}.",
            "All but one of these words belong to one group: {}. Which one does not?",
        )
    )
    return question.format(", ".join(words))


def _ordering(rng: random.Random, level: int) -> str:
    names = rng.sample(_NAMES, 3 + level)
    more, less, most = rng.choice(_COMPARISONS)
    # One clue per neighbouring pair, so that the order is complete and the answer unique.
    clues = [
        f"{a} is {more} than {b}." if rng.random() < 0.5 else f"{b} is {less} than {a}."
        for a, b in itertools.pairwise(names)
    ]
    rng.shuffle(clues)
    question = f"Who is the {rng.choice(_ORDINALS[: len(names)])}{most}?"
    return rng.choice(("{0} {1}", "{1} You know this: {0}")).format(" ".join(clues), question)


def _boolean(rng: random.Random, level: int) -> str:
    variables = rng.sample("pqrstuvwxyz", level + 2)
    facts = _listed([f"{v} is {rng.choice(('true', 'false'))}" for v in variables])
    leaves = [rng.choice(("", "not ")) + v for v in variables]
    rng.shuffle(leaves)
    expression = leaves[0]
    for k, leaf in enumerate(leaves[1:]):
        inner = f"({expression})" if k else expression
        sides = [inner, leaf]
        rng.shuffle(sides)
        expression = rng.choice((" and ", " or ")).join(sides)
    question = rng.choice(
        ("Suppose {}. Is the expression {} true or false?", "Given that {}, what is the truth value of {}?")
    )
    return question.format(facts, expression)


def _loops(rng: random.Random, level: int) -> str:
    total, i = rng.choice(("total", "count", "score", "value", "result")), rng.choice("ijkn")
    body = "\n    ".join(
        rng.choice(_LOOP_STATEMENTS).format(total=total, i=i, a=rng.randint(2, 9), b=rng.randint(5, 40))
        for _ in range(level + 1)
    )
    times = rng.randint(2, 4) + level
    program = f"{total} = {rng.randint(0, 20)}\nfor {i} in range({times}):\n    {body}\nprint({total})"
    return f"{rng.choice(_PROGRAM_QUESTIONS)}\n\n{program}"


def _functions(rng: random.Random, level: int) -> str:
    names = rng.sample(("f", "g", "h", "step", "twist", "fold", "shift", "blend"), 1 + (level + 1) // 2)
    definitions = [
        f"def {name}(x):\n    return {body.format(a=rng.randint(2, 9), b=rng.randint(5, 40))}\n\n"
        for name, body in zip(names, rng.sample(_FUNCTION_BODIES, len(names)), strict=True)
    ]
    call = str(rng.randint(1, 30))
    for k in range(level + 1):  # every function is called once before any is called again
        call = f"{names[k] if k < len(names) else rng.choice(names)}({call})"
    return f"{rng.choice(_PROGRAM_QUESTIONS)}\n\n{''.join(definitions)}print({call})"


TASKS: Mapping[str, tuple[str, Callable[[random.Random, int], str]]] = {
    "arithmetic": ("synthetic_math", _arithmetic),
    "dates": ("synthetic_math", _dates),
    "sequences": ("synthetic_math", _sequences),
    "letters": ("synthetic_language", _letters),
    "odd_one_out": ("synthetic_language", _odd_one_out),
    "ordering": ("synthetic_logic", _ordering),
    "boolean": ("synthetic_logic", _boolean),
    "loops": ("synthetic_code", _loops),
    "functions": ("synthetic_code", _functions),
}
