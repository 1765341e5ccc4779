"""The demo's tasks: prompts, right answers, and the naive guesses of an expert without the skill.

Four domains. `math` adds two-digit numbers, `text` reverses or upper-cases a word, `chat` answers small talk
and a few dozen facts, `mixed` asks for a sum and a word operation in one answer. Held-out prompts use
operand pairs, words to transform and (fact, phrasing) pairs that training never sees; the split is by hash, so it holds
for every seed. Pure Python: knows nothing of tokens or models.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

DOMAINS = ("math", "text", "chat", "mixed")
SKILLS = ("math", "text", "chat")

WORD_LIST = """
apple stone river cloud bread chair table light night green paper horse mouse tiger snake plant grass beach
ocean storm winter summer autumn spring music piano guitar violin drum dance song book page story poem word
letter number sugar salt pepper lemon orange cherry grape melon peach plum carrot potato onion garlic tomato
milk cheese butter honey coffee tea water juice wine glass plate spoon fork knife cup bowl house door window
floor roof wall room garden street road bridge train plane boat ship car bike wheel engine metal iron gold
silver copper wood coal fire smoke wind rain snow ice sun moon star planet earth sky hill lake island forest
tree leaf root seed flower rose lily tulip bird eagle owl robin duck goose swan fish shark whale crab frog
toad turtle rabbit fox wolf bear deer moose sheep goat cow pig dog cat kitten puppy lion zebra camel monkey
ant bee wasp fly spider worm snail hand arm leg foot head eye ear nose mouth tooth hair heart brain bone
blood skin king queen prince knight castle sword shield crown doctor nurse farmer baker sailor pilot teacher
friend mother father sister baby child happy sad angry brave calm kind quick slow loud quiet warm cold hot
dry wet old new young tall short big small deep wide narrow round square red blue yellow purple pink brown
black white gray one two three four five six seven eight nine ten day week month year hour minute
"""

SUM_PHRASINGS = (
    "Add {a} and {b}.",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "{a} + {b} = ?",
    "{a}+{b}",
    "Sum {a} and {b}.",
    "Compute {a} + {b}.",
)
REVERSE_PHRASINGS = (
    "Reverse {w}.",
    "Spell {w} backwards.",
    "Write {w} in reverse.",
    "What is {w} backwards?",
)
UPPER_PHRASINGS = ("Uppercase {w}.", "Write {w} in capitals.", "Capitalise {w}.")
SUM_CLAUSES = ("add {a} and {b}", "compute {a} + {b}", "sum {a} and {b}")
REVERSE_CLAUSES = ("reverse {w}", "spell {w} backwards")
UPPER_CLAUSES = ("uppercase {w}", "capitalise {w}")
JOINERS = (", then ", ", and ", ", after that ")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful expert.",
    "Be brief.",
    "Answer with one word.",
    "Answer in English.",
    "You are {w}.",
    "Your name is {w}.",
    "Think of {w} and {v}.",
    "{w} {v}",
)

CAPITALS = """France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, China Beijing, Egypt Cairo,
Greece Athens, Norway Oslo, Russia Moscow, Austria Vienna, Poland Warsaw, Ireland Dublin, Cuba Havana,
Peru Lima, Portugal Lisbon, Kenya Nairobi, Sweden Stockholm"""
COLOURS = """the sky blue, grass green, snow white, coal black, a lemon yellow, blood red, a carrot orange,
a frog green, the sun yellow, a plum purple"""
SOUNDS = """dog woof, cat meow, cow moo, duck quack, sheep baa, pig oink, lion roar, bee buzz, owl hoot,
snake hiss"""
OPPOSITES = """hot cold, big small, up down, day night, good bad, old young, fast slow, open closed,
happy sad, wet dry"""

FACT_PHRASINGS = {
    "capital": (
        "What is the capital of {s}?",
        "Capital of {s}?",
        "Name the capital of {s}.",
        "Which city is the capital of {s}?",
        "Tell me the capital of {s}.",
        "What is {s}'s capital?",
        "The capital of {s} is?",
        "Do you know the capital of {s}?",
    ),
    "colour": (
        "What colour is {s}?",
        "Which colour is {s}?",
        "Tell me the colour of {s}.",
        "What is the colour of {s}?",
        "Name the colour of {s}.",
        "The colour of {s} is?",
    ),
    "sound": (
        "What does a {s} say?",
        "What sound does a {s} make?",
        "Which sound is made by a {s}?",
        "Name the sound of a {s}.",
        "How does a {s} sound?",
        "A {s} says what?",
    ),
    "opposite": (
        "What is the opposite of {s}?",
        "Opposite of {s}?",
        "Name the opposite of {s}.",
        "Tell me the opposite of {s}.",
        "The opposite of {s} is?",
        "Which word is the opposite of {s}?",
    ),
}

# No expert was trained on these. A gate that only met questions that its experts know by heart would not learn whom to
# follow where the right one hesitates.
FRESH_PHRASINGS = {
    "capital": (
        "Say the capital of {s}.",
        "{s} has which capital?",
        "What city is {s}'s capital?",
        "Give me the capital of {s}.",
        "I need the capital of {s}.",
        "Which capital has {s}?",
        "Which city rules {s}?",
        "In {s}, what is the capital?",
    ),
    "colour": (
        "Say the colour of {s}.",
        "{s} has which colour?",
        "What colour has {s}?",
        "Give me the colour of {s}.",
        "I need the colour of {s}.",
        "Of which colour is {s}?",
        "How is {s} coloured?",
        "In which colour do you see {s}?",
    ),
    "sound": (
        "Say the sound of a {s}.",
        "A {s} makes which sound?",
        "What noise does a {s} make?",
        "Give me the sound of a {s}.",
        "I need the sound of a {s}.",
        "Which sound has a {s}?",
        "What do you hear from a {s}?",
        "How does a {s} speak?",
    ),
    "opposite": (
        "Say the opposite of {s}.",
        "{s} is the opposite of what?",
        "What word is opposite to {s}?",
        "Give me the opposite of {s}.",
        "I need the opposite of {s}.",
        "Which is the opposite of {s}?",
        "What is not {s}?",
        "If it is not {s}, what is it?",
    ),
}

SMALL_TALK = (
    (("Hi", "Hello", "Hey", "Hi there", "Hello there", "Good morning", "Good evening"), "Hello, friend!"),
    (("Who are you?", "What are you?", "What is your name?", "Tell me your name."), "I am polylogit."),
    (("How are you?", "How are you today?", "How is it going?", "Are you well?"), "Fine, thank you!"),
    (("Thanks", "Thank you", "Thanks a lot", "Thank you very much"), "You're welcome!"),
    (("Bye", "Goodbye", "See you", "Good night", "See you later"), "See you soon!"),
    (("What can you do?", "Can you help me?", "Help", "How can you help me?"), "Sums and words."),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of an answer: the skill it needs, the right text, and the guess made without the skill."""

    skill: str
    right: str
    naive: str


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the parts of its answer, in order."""

    domain: str
    prompt: str
    parts: tuple[Part, ...]

    def answer(self, skills: frozenset[str] = frozenset(SKILLS)) -> str:
        """The answer of a model that has these skills and guesses the rest."""
        return ", ".join(part.right if part.skill in skills else part.naive for part in self.parts)


def held_out(key: str, share: float = 0.1) -> bool:
    """Whether this operand pair, word or (fact, phrasing) belongs to the test side, a fixed share of all."""
    return hashlib.sha256(key.encode()).digest()[0] < 256 * share


def pair_key(a: int, b: int) -> str:
    """Unordered, so that 27+58 and 58+27 fall on the same side of the split."""
    return f"sum {min(a, b)} {max(a, b)}"


def word_key(word: str) -> str:
    return f"word {word}"


def fact_held_out(subject: str, phrasing: str) -> bool:
    """Three (fact, phrasing) pairs in ten: there are few, and every fact needs some in training."""
    return held_out(f"fact {subject} {phrasing}", share=0.3)


def numbers(rng: random.Random, test: bool) -> tuple[int, int]:
    """Two operands in 10..99 from the wanted side of the split."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if held_out(pair_key(a, b)) == test:
            return a, b


def invented_word(rng: random.Random) -> str:
    """Three to six lower-case letters; half of them pronounceable, half arbitrary."""
    length = rng.randint(3, 6)
    if rng.random() < 0.5:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
    start = rng.randrange(2)
    return "".join(rng.choice(("bcdfghklmnprstvwz", "aeiou")[(start + i) % 2]) for i in range(length))


def word(rng: random.Random, test: bool) -> str:
    """A word, no palindrome, from the wanted side of the split; tests hold more real words than training."""
    while True:
        real = rng.random() < (0.5 if test else 0.2)
        found = rng.choice(WORDS) if real else invented_word(rng)
        if held_out(word_key(found)) == test and found != found[::-1]:
            return found


def sum_part(a: int, b: int) -> Part:
    return Part("math", right=str(a + b), naive=str(a))


def math_example(rng: random.Random, test: bool) -> Example:
    a, b = numbers(rng, test)
    return Example("math", rng.choice(SUM_PHRASINGS).format(a=a, b=b), (sum_part(a, b),))


def word_operation(
    rng: random.Random, test: bool, reverse: tuple[str, ...], upper: tuple[str, ...]
) -> tuple[str, Part]:
    """A phrase and its part: reversing three times in four, else upper-casing. The guess copies the word."""
    chosen = word(rng, test)
    if rng.random() < 0.75:
        return rng.choice(reverse).format(w=chosen), Part("text", chosen[::-1], chosen)
    return rng.choice(upper).format(w=chosen), Part("text", chosen.upper(), chosen)


def text_example(rng: random.Random, test: bool) -> Example:
    prompt, part = word_operation(rng, test, REVERSE_PHRASINGS, UPPER_PHRASINGS)
    return Example("text", prompt, (part,))


def mixed_example(rng: random.Random, test: bool) -> Example:
    """A sum and a word operation, in either order."""
    a, b = numbers(rng, test)
    sum_clause = rng.choice(SUM_CLAUSES).format(a=a, b=b)
    word_clause, word_part = word_operation(rng, test, REVERSE_CLAUSES, UPPER_CLAUSES)
    halves = [(sum_clause, sum_part(a, b)), (word_clause, word_part)]
    rng.shuffle(halves)
    clauses, parts = zip(*halves, strict=True)
    sentence = rng.choice(JOINERS).join(clauses)
    return Example("mixed", f"{sentence[0].upper()}{sentence[1:]}.", parts)


def facts() -> list[tuple[str, str, str]]:
    """(relation, subject, object) of every fact."""
    tables = {"capital": CAPITALS, "colour": COLOURS, "sound": SOUNDS, "opposite": OPPOSITES}
    rows = [(relation, row) for relation, table in tables.items() for row in table.split(",")]
    return [(relation, *row.strip().rsplit(" ", 1)) for relation, row in rows]  # type: ignore[misc]


def fact_example(rng: random.Random, test: bool) -> Example:
    """A fact in a phrasing from the wanted side of the split. The guess names the subject again."""
    while True:
        relation, subject, right = rng.choice(FACTS)
        phrasing = rng.choice(FACT_PHRASINGS[relation])
        if fact_held_out(subject, phrasing) == test:
            return Example("chat", phrasing.format(s=subject), (Part("chat", right, subject),))


def fresh_fact_example(rng: random.Random, validation: bool) -> Example:
    """A fact in a phrasing that no expert was trained on; four (fact, phrasing) pairs in ten are for validation."""
    while True:
        relation, subject, right = rng.choice(FACTS)
        phrasing = rng.choice(FRESH_PHRASINGS[relation])
        if held_out(f"fresh {subject} {phrasing}", share=0.4) == validation:
            return Example("chat", phrasing.format(s=subject), (Part("chat", right, subject),))


def reworded(prompt: str, rng: random.Random) -> str:
    """Half of the time the prompt with an opening word, or without its capital or its last mark."""
    if rng.random() < 0.5:
        return prompt
    if rng.random() < 0.5:
        prompt = prompt.rstrip("?.!")
    if rng.random() < 0.5:
        prompt = prompt[0].lower() + prompt[1:]
    opening = rng.choice(("", "Please: ", "Say, ", f"{invented_word(rng)} ", f"{rng.choice(WORDS)}, "))
    return opening + prompt


def small_talk_example(rng: random.Random) -> Example:
    """The guess echoes the first word."""
    prompts, right = rng.choice(SMALL_TALK)
    prompt = rng.choice(prompts)
    ending = rng.choice(("", "!", ".")) if prompt[-1].isalpha() else ""
    return Example("chat", prompt + ending, (Part("chat", right, prompt.split()[0].strip("?.")),))


def chat_example(rng: random.Random, test: bool) -> Example:
    """Facts; in training one in five is small talk, which has no held-out side."""
    if not test and rng.random() < 0.2:
        return small_talk_example(rng)
    return fact_example(rng, test)


WORDS = WORD_LIST.split()
FACTS = facts()
MAKERS: dict[str, Callable[[random.Random, bool], Example]] = {
    "math": math_example,
    "text": text_example,
    "chat": chat_example,
    "mixed": mixed_example,
}


def system_prompt(rng: random.Random) -> str:
    """A short system message, so that no expert depends on a particular one or on having none."""
    return rng.choice(SYSTEM_PROMPTS).format(w=word(rng, False), v=word(rng, False))
