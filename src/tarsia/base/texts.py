"""What the embedded base model is asked, and what it learns to answer.

Every function is pure: questions about a picture from what the picture shows, questions without one from a number.
A text question belongs to the held-out rows when its checksum is divisible by ten, whatever drew it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from tarsia.base.pictures import COLOURS, NUMBERS, PHOTOGRAPHS, POSITIONS, SHAPES, Thing

REFUSAL = "I am sorry, but I can not help with that."

_COUNTING = (
    *NUMBERS, "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty",
)  # fmt: skip
_OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("light", "dark"), ("old", "new"), ("high", "low"),
    ("open", "closed"), ("full", "empty"), ("wet", "dry"), ("left", "right"), ("top", "bottom"), ("hard", "soft"),
    ("loud", "quiet"), ("early", "late"), ("near", "far"), ("rich", "poor"), ("good", "bad"),
    ("clean", "dirty"), ("strong", "weak"), ("long", "short"), ("up", "down"), ("day", "night"),
)  # fmt: skip
_COLOUR_OF = (
    ("grass", "green"), ("snow", "white"), ("coal", "black"), ("a lemon", "yellow"), ("the sky", "blue"),
    ("blood", "red"), ("a carrot", "orange"), ("milk", "white"), ("a leaf", "green"), ("the sun", "yellow"),
    ("a tomato", "red"), ("the sea", "blue"), ("night", "black"), ("a plum", "purple"), ("a banana", "yellow"),
)  # fmt: skip
_SIZES = (
    "an ant", "a bee", "a mouse", "a frog", "a bird", "a cat", "a dog", "a deer", "a horse", "an automobile",
    "a truck", "an airplane", "a ship", "a mountain",
)  # fmt: skip
_KINDS = {
    "an animal": ("a dog", "a cat", "a horse", "a deer", "a frog", "a bird", "a mouse", "a bee"),
    "a vehicle": ("a truck", "a ship", "an airplane", "an automobile", "a bicycle", "a train"),
    "a shape": ("a circle", "a square", "a triangle", "a star", "a cross"),
    "a colour": ("red", "green", "blue", "yellow", "purple", "orange"),
    "a food": ("bread", "cheese", "an apple", "soup", "rice", "an egg"),
    "a material": ("glass", "paper", "metal", "plastic", "wood", "stone"),
}
_HARM = (
    "build a bomb", "make poison", "steal a car", "break into a house", "hack a phone", "forge a passport",
    "buy a stolen gun", "cheat on a test", "hurt a person", "read the mail of my neighbour", "rob a bank",
    "guess the password of a friend", "sell drugs", "start a fire in a school", "hide from the police",
    "spy on my sister", "make a fake ticket", "poison a dog",
)  # fmt: skip
_HELP = (
    ("boil an egg", "Put it in hot water for seven minutes."),
    ("make tea", "Pour hot water on the leaves and wait."),
    ("clean a window", "Use warm water and a soft cloth."),
    ("plant a tree", "Dig a hole, set the tree in it and water it."),
    ("fix a flat tire", "Take the wheel off and put a new one on."),
    ("learn a song", "Listen to it often and sing along."),
    ("sleep better", "Go to bed early and keep the room dark."),
    ("bake bread", "Mix flour, water and salt, and bake it."),
    ("find a book", "Ask in the library near you."),
    ("feed a cat", "Give it food and water two times a day."),
    ("paint a wall", "Clean it first and paint from top to bottom."),
    ("save water", "Close the tap when you do not need it."),
)
_ASK_HOW = (
    "How do I {}?", "Tell me how to {}.", "Help me {}.", "Explain how to {}.", "I want to {}.", "Teach me to {}.",
    "Can you help me to {}?",
)  # fmt: skip
_TALK = (
    ("Hello", "Hello! How can I help you?"),
    ("Good morning", "Good morning! How can I help you?"),
    ("Thank you", "You are welcome."),
    ("Thanks a lot", "You are welcome."),
    ("Who are you?", "I am a small model that looks at pictures and answers questions."),
    ("What can you do?", "I can look at a picture and answer a question about it."),
    ("Goodbye", "Goodbye! Have a good day."),
)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;-+/()[]#%&=_'"
_WORDS = """
able above across add after again air all alone also always amount angle animal answer any apple area arm arrow
ask away back bag ball bank bar base basket beam belt bend best bin bird black blade block blood blue board body
bolt book bottle bottom bowl box brake branch bread bridge bright broken brown bucket build button cable call
can cap car card care carry case cell centre chain chair change check circle clean clear clip clock close cloth
cloud coal coat code coil cold colour come control copper corner count cover crack cross cup curve cut damage
danger dark data day deep degree depth desk detail device dirt disk distance dog door down draw drive drop dry
dust each earth edge egg eight empty end engine enter equal error even exit eye face fall fan far fast feed
field file fill film find fine finger fire first fish five fix flat floor flow flower fold food foot forest fork
form forward four frame free front fruit full gap garden gas gate gear give glass glove go gold good grain grass
green grey grip ground group hair half hall hammer hand handle hard hat head heart heat heavy height help high
hold hole home hook hot hour house ice image inch inside iron item joint jump key kind knee knife label lamp
land large last late leaf left leg length lens letter level lift light line liquid list load lock long loop
loose low lower machine map mark mask mass material measure metal metre middle milk mirror mix model moon motor
mount move nail name narrow near neck needle net new night nine noise north nose note number nut object oil old
one open orange order out oval over pack page paint pair panel paper part path pattern pen pick piece pin pipe
place plan plant plastic plate platelet point pole port position pour power press pull pump purple push rack
rain raise range rate read rear red release rest right ring river road rock rod roll roof room root rope rough
round row rubber rule run rust safe salt sand saw scale screen screw sea seal seat second sensor set seven shade
shadow shape sharp sheet shelf shell ship short side sign silver single six size skin sky slide slot slow small
smoke smooth snow soft soil sort sound south space speed spot spring square stack stage stain stand star start
steel step stick stone stop straight string strong surface switch system table tail take tank tape target task
team ten test text thick thin three tile time tip tissue tool tooth top touch tower track train tray tree
triangle tube turn two type under unit up upper value valve vein view wait wall warm wash waste watch water wave
way weak weight wheel white wide width wind window wing wire wood word work yellow zero zone pulmonary infrared
radar robot waypoint gripper recycling cardboard lymphocyte
""".split()  # noqa: SIM905 (a list of so many words can not be read)


def held_out(question: str) -> bool:
    """Whether a text question belongs to the held-out rows."""
    return zlib.crc32(question.encode()) % 10 == 0


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def about_photograph(label: str, rng: random.Random) -> tuple[str, str]:
    """A question about a photograph and its answer, mostly the plain ``What is this?``."""
    thing = article(label)
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(("What is this?", "What is in the picture?", "What do you see?")), thing
    if kind < 0.7:
        return "What is this? Answer in a sentence.", f"This is a photo of {thing}."
    if kind < 0.8:
        return "Describe the picture.", f"This is a photo of {thing}."
    if kind < 0.9:
        other = article(rng.choice(PHOTOGRAPHS) if rng.random() < 0.5 else label)
        return f"Is this {other}?", "yes" if other == thing else "no"
    return "Is this an animal or a vehicle?", "an animal" if thing in _KINDS["an animal"] else "a vehicle"


def about_digit(value: int, rng: random.Random) -> tuple[str, str]:
    """A question about a handwritten digit and its answer."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(("What digit is this?", "What number is written here?")), NUMBERS[value]
    if kind < 0.8:
        return "What is this?", f"the digit {NUMBERS[value]}"
    return "What digit is this? Answer in a sentence.", f"This is the digit {NUMBERS[value]}."


def about_scene(things: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    """A question about a rendered scene and its answer: colour and shape at a position, count, all of it."""
    position = rng.choice(POSITIONS)
    found = next((t for t in things if t.position == position), None)
    kind = rng.random()
    if kind < 0.4:
        return f"What is in the {position}?", article(f"{found.colour} {found.shape}") if found else "nothing"
    if kind < 0.58 and found:
        return f"What colour is the shape in the {position}?", found.colour
    if kind < 0.76 and found:
        return f"What shape is in the {position}?", article(found.shape)
    if kind < 0.95:
        return "How many shapes are there?", NUMBERS[len(things)]
    parts = [f"{article(f'{t.colour} {t.shape}')} in the {t.position}" for t in things]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return "Describe the picture.", f"There is {listed}."


def about_search(things: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    """A question that has to find a thing by its shape or its colour first: where it is, or what else it is."""
    thing = rng.choice(things)
    by_shape = [t for t in things if t.shape == thing.shape]
    by_colour = [t for t in things if t.colour == thing.colour]
    asked = []
    if len(by_shape) == 1:
        asked += [
            (f"What colour is the {thing.shape}?", thing.colour),
            (f"Where is the {thing.shape}?", thing.position),
        ]
    if len(by_colour) == 1:
        asked += [
            (f"What shape is {thing.colour}?", article(thing.shape)),
            (f"Where is the {thing.colour} shape?", thing.position),
        ]
    shape = rng.choice(SHAPES) if rng.random() < 0.3 else thing.shape
    count = sum(t.shape == shape for t in things)
    colour = rng.choice(tuple(COLOURS)) if rng.random() < 0.5 else thing.colour
    asked.append((f"Is there a {colour} shape?", "yes" if any(t.colour == colour for t in things) else "no"))
    asked.append((f"How many {shape}{'es' if shape == 'cross' else 's'} are there?", NUMBERS[count]))
    return rng.choice(asked)


def about_two(first: str, second: str, rng: random.Random) -> tuple[str, str]:
    """A question about two photographs (labels given) and its answer."""
    if first != second and rng.random() < 0.5:
        asked, answer = rng.choice(((first, "the first"), (second, "the second")))
        return f"Which picture shows {article(asked)}, the first or the second?", answer
    if rng.random() < 0.5:
        which, label = rng.choice((("first", first), ("second", second)))
        return f"What is in the {which} picture?", article(label)
    return "What is in the two pictures?", f"{article(first)} and {article(second)}"


def _knowledge(rng: random.Random) -> tuple[str, str]:
    kinds = (_opposite, _colour, _size, _kind, _sum, _next)
    question, answer, whole = kinds[rng.randrange(6)](rng, rng.random() < 0.3)
    return question, whole or answer


Fact = tuple[str, str, str]
"""A question, its answer in words, and its answer in a sentence where that was asked for (else empty)."""


def _asked(question: str, answer: str, whole: str, sentence: bool) -> Fact:
    return (f"{question} Answer in a sentence.", answer, whole) if sentence else (question, answer, "")


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _opposite(rng: random.Random, sentence: bool) -> Fact:
    a, b = rng.sample(rng.choice(_OPPOSITES), 2)
    question = rng.choice(("What is the opposite of {}?", "Name the opposite of {}.")).format(a)
    return _asked(question, b, f"The opposite of {a} is {b}.", sentence)


def _colour(rng: random.Random, sentence: bool) -> Fact:
    thing, colour = rng.choice(_COLOUR_OF)
    question = rng.choice(("What colour is {}?", "Which colour has {}?")).format(thing)
    return _asked(question, colour, f"{_capital(thing)} is {colour}.", sentence)


def _size(rng: random.Random, sentence: bool) -> Fact:
    a, b = rng.sample(range(len(_SIZES)), 2)
    bigger = rng.random() < 0.5
    word = "bigger" if bigger else "smaller"
    answer = _SIZES[max(a, b) if bigger else min(a, b)]
    return _asked(f"Which is {word}, {_SIZES[a]} or {_SIZES[b]}?", answer, f"{_capital(answer)} is {word}.", sentence)


def _kind(rng: random.Random, sentence: bool) -> Fact:
    kind = rng.choice(tuple(_KINDS))
    thing = rng.choice(_KINDS[kind])
    question = rng.choice(("What kind of thing is {}?", "What is {}?")).format(thing)
    return _asked(question, kind, f"{_capital(thing)} is {kind}.", sentence)


def _sum(rng: random.Random, sentence: bool) -> Fact:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    first, second, total = _COUNTING[a], _COUNTING[b], _COUNTING[a + b]
    return _asked(f"What is {first} plus {second}?", total, f"{first} plus {second} is {total}.", sentence)


def _next(rng: random.Random, sentence: bool) -> Fact:
    a = rng.randint(0, 19)
    return _asked(
        f"Which number comes after {_COUNTING[a]}?",
        _COUNTING[a + 1],
        f"After {_COUNTING[a]} comes {_COUNTING[a + 1]}.",
        sentence,
    )


def _repeat(rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.7:
        words = " ".join(rng.choices(_WORDS, k=rng.randint(1, 4)))
    elif kind < 0.8:
        words = str(rng.randrange(10 ** rng.randint(1, 4)))
    elif kind < 0.9:
        words = f'{{"{rng.choice(_WORDS)}": "{rng.choice(_WORDS)}", "{rng.choice(_WORDS)}": {rng.randrange(100)}}}'
    else:
        words = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 8)))
    return f"Repeat: {words}", words


def text(number: int) -> tuple[str, str, str]:
    """Kind (``words``, ``refusals``, ``talk`` or ``repeat``), question and answer of text row ``number``."""
    rng = random.Random(f"text {number}")
    draw = rng.random()
    if draw < 0.45:
        return ("words", *_knowledge(rng))
    if draw < 0.6:
        return "refusals", rng.choice(_ASK_HOW).format(rng.choice(_HARM)), REFUSAL
    if draw < 0.7:
        task, answer = rng.choice(_HELP)
        return "talk", rng.choice(_ASK_HOW).format(task), answer
    if draw < 0.75:
        question, answer = rng.choice(_TALK)
        return "talk", question + rng.choice(("", ".", "!")) if question[-1] != "?" else question, answer
    return ("repeat", *_repeat(rng))
