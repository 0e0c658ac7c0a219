"""Write very short stories from a seeded grammar: what does the demo model learn, and how are stories compared?

A story is drawn in three steps. First the cast: a hero, a helper, a home, and one of about thirty problems with its
own objects, causes and matching solutions. Then one template for each part (beginning, problem, feeling, helper,
solution, end). Then every choice inside the templates. Nothing is drawn twice, so a name, an animal or an object stays
what it was. The templates and their language are in story_phrases.py.

Sentences are short, as in a picture book. The long ones come from seams only, between two sentences that were both
drawn freely; that is why two stories hardly ever share eight words of a sentence, even with all names and nouns masked
(`skeleton_windows` says exactly what is compared).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

from story_phrases import (
    ANIMALS,
    BOYS,
    CATEGORIES,
    COLOURS,
    CONJUNCTIONS,
    ENDINGS,
    FEELINGS,
    FUNCTION_WORDS,
    GIRLS,
    HOMES,
    IDEAS,
    JOYS,
    LESSONS,
    MEETINGS,
    OPENINGS,
    PROBLEMS,
    PRONOUNS,
    RELATIONS,
    SPEECH_VERBS,
    TALKS,
    THANKS,
    TIMES,
    TRAITS,
    WEATHER,
    Problem,
)

T = TypeVar("T")

WINDOW = 8
"""Words of a sentence that two stories must not share once names and nouns are masked."""

SHORT_SEAMS, LONG_SEAMS, MAX_HALF = 0.5, 0.12, 5
"""How often two sentences become one: if the result has fewer than WINDOW words, and if it has more (then each half
has at most five). Shared skeletons grow with the square of LONG_SEAMS."""

WORDS = (45, 115)
"""A story outside this range of words is drawn again."""


# ------------------------------------------------------------------------------------------------ drawing a story

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SEAM = re.compile(r"\.? \((and|then|so|but|because|until)\) ")
LINKABLE = re.compile(r"(?!How|What)(?:[A-Z]\w+|he|she|his|her|a|the|they|tears|it) [^\"?!]*\.")
END = re.compile(r'[.!?]"? | \(')
SLOT = re.compile(r"\{(\w+)\}")
SENTENCE_END = re.compile(r'(?<=[.!?])(?:"(?= [A-Z"])|(?!")) *|(?<=[.!?]") (?=[A-Z"])')
FIRST_WORD = re.compile(r'(^"?|[.!?:] "?|[.!?]" "?)([a-z]+)')
SPOKEN = frozenset([*SPEECH_VERBS, "he", "she"])


class Dice:
    """Draws that depend on the seed alone: `random()` is the one method whose sequence Python promises to keep."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        """Return True with the probability `share`."""
        return self._random.random() < share

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options, each equally likely."""
        return options[int(self._random.random() * len(options))]


def story(seed: int, index: int) -> str:
    """Return story number `index` of the stream `seed`: 45 to 115 words of plain ASCII in one line."""
    dice = Dice(f"{seed}/{index}")
    while True:
        problem = dice.pick(PROBLEMS)
        helped = dice.chance(0.6)
        cast = draw_cast(dice, problem, helped)
        parts = [(seam, fill(part, cast, dice)) for seam, part in draw_parts(dice, problem, helped) if part]
        text = finish(link(parts), cast, dice)
        if WORDS[0] <= len(text.split()) <= WORDS[1]:
            return text


def stories(seed: int, start: int, stop: int) -> Iterator[str]:
    """Yield the stories `start` to `stop` - 1 of the stream `seed`."""
    return (story(seed, index) for index in range(start, stop))


def draw_cast(dice: Dice, problem: Problem, helped: bool) -> dict[str, str]:
    """Draw who and what the story is about: the value of every slot, fixed from here on."""
    she, her = dice.pick(("she", "he")), dice.pick(("she", "he"))
    hero = dice.pick(GIRLS if she == "she" else BOYS)
    friend = dice.pick([name for name in (GIRLS if her == "she" else BOYS) if name != hero])
    kind = dice.pick(("girl" if she == "she" else "boy", *[dice.pick(ANIMALS)] * 2))
    things = {
        slot: dice.pick([thing for thing in options.split("|") if thing != kind])
        for slot, options in problem.things.items()
    }
    taken = {kind, *things.values()}
    friend_kind = dice.pick([animal for animal in ANIMALS if animal not in taken])
    relation = dice.pick([word for word in RELATIONS[her] if word not in taken])
    introduced = f"{friend} the {friend_kind}" if dice.chance(0.6) else f"{PRONOUNS[she]['his']} {relation} {friend}"
    cast = {
        "H": hero,
        "k": kind,
        "F": friend,
        "F1": introduced,
        "fhim": PRONOUNS[her]["him"],
        **PRONOUNS[she],
        **things,
    }
    cast |= {"trait": dice.pick(TRAITS), "c": dice.pick(COLOURS), "home": dice.pick(HOMES)}
    if helped:
        return cast | {"S": friend, "T": "they", "T2": "them"}
    return cast | {"S": hero, "T": PRONOUNS[she]["he"], "T2": PRONOUNS[she]["him"]}


def draw_parts(dice: Dice, problem: Problem, helped: bool) -> list[tuple[str, str]]:
    """Draw a template for each part of the story, in the order in which they are told, with the seam before it."""
    event = dice.pick(problem.event)
    if dice.chance(0.3) and not event.startswith(('"', "[crash")):
        event = f"{dice.pick(TIMES)}, {event}"
    beginning = [
        ("", dice.pick(OPENINGS)),
        ("", dice.pick(WEATHER) if dice.chance(0.3) else ""),
        ("", dice.pick(problem.setup)),
        ("but", event),
    ]
    middle = [("so", dice.pick(FEELINGS[problem.mood]))]
    middle += [("and", dice.pick(MEETINGS)), ("", dice.pick(TALKS))] if helped else [("but", dice.pick(IDEAS))]
    middle += [("then", dice.pick(problem.routes))]
    end = [("and", dice.pick(problem.close)), ("and", dice.pick(JOYS) if dice.chance(0.7) else "")]
    if dice.chance(0.3):
        end.reverse()
    end += [
        ("and", dice.pick(THANKS) if helped and dice.chance(0.6) else ""),
        ("", dice.pick(LESSONS)),
        ("", dice.pick(ENDINGS)),
    ]
    return beginning + middle + end


def sentences(text: str) -> list[str]:
    """Split a story at . ! ? unless the mark ends quoted speech that the sentence goes on after."""
    return [part for part in SENTENCE_END.split(text) if part.strip(' "')]


def link(parts: list[tuple[str, str]]) -> str:
    """Join the parts: by their seam between two plain statements, by a space next to speech, ? and !."""
    text = parts[0][1]
    for seam, part in parts[1:]:
        plain = text.endswith(".") and '"' not in sentences(text)[-1] and LINKABLE.match(part)
        text += f" ({seam}) {part}" if plain and seam else f" {part}"
    return text


def fill(template: str, cast: dict[str, str], dice: Dice) -> str:
    """Draw every choice of a template, innermost first, and put the cast into its slots."""
    while match := CHOICE.search(template):
        template = template[: match.start()] + dice.pick(match[1].split("|")) + template[match.end() :]
    while SLOT.search(template):
        template = SLOT.sub(lambda match: cast[match[1]], template)
    return template


def finish(text: str, cast: dict[str, str], dice: Dice) -> str:
    """Turn seams into full stops or conjunctions, then set capitals and articles."""
    while match := SEAM.search(text):
        before, after = text[: match.start()], text[match.end() :]
        joint = weld(match, dice)
        subject = END.split(before)[-1].split(" ")[0]
        if joint != ". " and subject in (cast["H"], cast["he"]) and after.startswith(cast["H"] + " "):
            after = cast["he"] + after.removeprefix(cast["H"])  # "Mia sat down, and she laughed"
        text = before + joint + after
    text = FIRST_WORD.sub(capital, text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def weld(seam: re.Match[str], dice: Dice) -> str:
    """Draw what joins the two sentences at a seam: always a full stop when one half alone nearly fills a window."""
    left = len(END.split(seam.string[: seam.start()])[-1].split())
    right = len(END.split(seam.string[seam.end() :])[0].split())
    short = left + right < WINDOW - 1
    if (short and dice.chance(SHORT_SEAMS)) or (max(left, right) <= MAX_HALF and dice.chance(LONG_SEAMS)):
        return dice.pick(CONJUNCTIONS[seam[1]])
    return ". "


def capital(match: re.Match[str]) -> str:
    """Set the capital of a sentence's first word, but not of the verb after a question or a shout in quotes."""
    before, word = match[1], match[2]
    if before.startswith(('?"', '!"')) and before.endswith(" ") and word in SPOKEN:
        return before + word
    return before + word[0].upper() + word[1:]


# ------------------------------------------------------------------------------------------------ comparing stories

WORD = re.compile(r"[a-z]+")


# a word of several categories counts as the first of them
MASKS = {
    word.lower(): category
    for category, words in reversed(CATEGORIES.items())
    for word in words
    if word not in FUNCTION_WORDS
} | {"an": "a"}


def skeleton(sentence: str) -> tuple[str, ...]:
    """Return the words of a sentence in small letters, each name, pronoun, animal, place, thing ... as its category.

    Punctuation does not count, and a word is masked wherever it stands, also where it is no slot: "Mia had a red
    kite." is (NAME, had, a, ADJ, THING). The categories are those of story_phrases.py.
    """
    return tuple(MASKS.get(word, word) for word in WORD.findall(sentence.lower()))


def skeleton_windows(text: str, n: int = WINDOW) -> set[tuple[str, ...]]:
    """Return every run of n consecutive skeleton words inside one sentence of the text.

    Two stories share a sentence skeleton of n words exactly if these sets meet: stricter than comparing whole
    sentences, because eight words in a row are enough, wherever they stand.
    """
    return {words[i : i + n] for words in map(skeleton, sentences(text)) for i in range(len(words) - n + 1)}


def shared_windows(texts: Sequence[str], n: int = WINDOW) -> list[tuple[int, int, tuple[str, ...]]]:
    """Return (i, j, window) for each pair of texts i < j that shares a skeleton of n words."""
    holders: dict[tuple[str, ...], list[int]] = {}
    shared = []
    for j, text in enumerate(texts):
        for window in sorted(skeleton_windows(text, n)):
            shared += [(i, j, window) for i in holders.setdefault(window, [])]
            holders[window].append(j)
    return shared
