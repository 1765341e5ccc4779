"""What the adapters of deploy.smollm2.adapters learn from: pairs of a prompt and an answer.

`sums`: three-digit additions, digit by digit. `style`: the base model's own answers to open questions, sampled at
temperature 1, in the words of an old seaman. It changes a word in four and leaves open what comes next, so its
distributions have long tails, as those of a model that writes freely have.
"""

import random
import re
from itertools import product

SUBJECTS = (
    "a dragon", "the sea", "an old clock", "a lost letter", "the first snow", "a small village", "a stubborn goat",
    "the night sky", "a broken radio", "my grandmother's kitchen", "a long train ride", "the desert",
    "a street market", "a lighthouse", "an empty house", "a thunderstorm", "the moon", "a library at night",
    "a garden in autumn", "a king", "the river", "a young painter", "bread", "a winter morning", "a secret door",
    "two brothers", "a wandering cat", "the last bus", "a forest fire", "an island", "a music box", "the mountains",
)  # fmt: skip
REQUESTS = (
    "Tell me a story about {}.",
    "Describe {} in a few sentences.",
    "Write a letter to a friend about {}.",
    "What does {} make you think of?",
    "Why might somebody be afraid of {}?",
    "Give me some advice about {}.",
    "What would you say to a child who asks about {}?",
    "Invent a legend about {}.",
)
WORDS = {
    "you": "thou", "your": "thy", "yours": "thine", "my": "me", "friend": "matey", "friends": "mateys", "is": "be",
    "are": "be", "am": "be", "was": "were", "has": "hath", "does": "doth", "the": "th'", "and": "an'", "of": "o'",
    "to": "t'", "for": "fer", "old": "ol'", "before": "afore", "between": "betwixt", "over": "o'er", "never": "ne'er",
    "ever": "e'er", "often": "oft", "here": "hither", "there": "yonder", "where": "whither", "perhaps": "mayhap",
    "yes": "aye", "no": "nay", "man": "lad", "men": "lads", "woman": "lass", "child": "sprog", "children": "sprogs",
    "people": "hands", "house": "cabin", "home": "port", "road": "channel", "street": "quay", "food": "grub",
    "water": "brine", "money": "doubloons", "left": "larboard", "right": "starboard", "stop": "avast",
    "quickly": "smartly", "very": "mighty", "good": "fair", "great": "grand", "bad": "foul", "strange": "fey",
    "small": "wee", "little": "wee", "think": "reckon", "know": "ken", "said": "quoth", "went": "sailed",
    "go": "sail", "walked": "tacked", "look": "spy", "looked": "spied", "saw": "spied", "see": "spy",
    "found": "hauled up", "find": "haul up", "world": "seven seas", "life": "voyage", "time": "bell", "day": "watch",
    "night": "dog watch", "story": "yarn", "stories": "yarns",
}  # fmt: skip
CRIES = (
    "Arr,", "Avast,", "Ahoy,", "By th' tides,", "Shiver me timbers,", "Mark me words,", "Blow me down,", "Heave ho,",
    "By th' powers,", "Batten down,", "Aye,", "Sink me,", "Blimey,", "So hear this:", "As sure as th' tide,",
)  # fmt: skip
CRY_PROBABILITY = 0.35
LARGEST = 999


def open_prompts(rng: random.Random) -> list[str]:
    """Every request about every subject, in random order."""
    prompts = [request.format(subject) for request, subject in product(REQUESTS, SUBJECTS)]
    rng.shuffle(prompts)
    return prompts


def seamans(text: str, rng: random.Random) -> str:
    """`text` in the words of an old seaman, some sentences with a cry before them."""
    text = re.sub(r"[A-Za-z']+", lambda match: _word(match.group()), text)
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return " ".join(_cried(sentence, rng) if rng.random() < CRY_PROBABILITY else sentence for sentence in sentences)


def _word(word: str) -> str:
    found = WORDS.get(word.lower())
    if found is None:
        return re.sub(r"^(\w*[aeiou]\w*)ing$", r"\1in'", word)  # walkin', but bring and king
    return found[0].upper() + found[1:] if word[0].isupper() else found


def _cried(sentence: str, rng: random.Random) -> str:
    return f"{rng.choice(CRIES)} {sentence[:1].lower()}{sentence[1:]}" if sentence else sentence


def held_out_sums(count: int) -> list[tuple[int, int]]:
    """Pairs that `sum_pair` never returns."""
    rng, chosen = random.Random(1), set[tuple[int, int]]()
    while len(chosen) < count:
        chosen.add((rng.randint(100, LARGEST), rng.randint(100, LARGEST)))
    return sorted(chosen)


def sum_prompt(first: int, second: int) -> str:
    return f"What is {first} + {second}?"


def sum_answer(first: int, second: int) -> str:
    """The sum digit by digit, from the right, with what is carried: a small model needs to see it."""
    carried, steps = 0, list[str]()
    for x, y in zip(str(first)[::-1], str(second)[::-1], strict=True):
        total = int(x) + int(y) + carried
        steps.append(f"{x}+{y}+{carried}={total:02d}")
        carried = total // 10
    return f"{', '.join(steps)}. {first + second}"
