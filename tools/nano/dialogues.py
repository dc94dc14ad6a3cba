"""Task families of the nano model: each makes one turn (question, reasoning, calls, answer).

Everything is drawn from one ``random.Random``; a turn carries the key of its problem, and a hash
of that key decides whether the problem belongs to training or to the held-out set.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import words as w
from .oos import out_of_scope, pseudo_word

HELD_OUT_PERCENT = 8
HELLO = "Hello! I am a tiny demonstration model. Ask me a small sum or a capital city."
THANKED = "You are welcome!"
GOODBYE = "Goodbye!"
ABOUT = (
    "I am a tiny demonstration of the Kimi K2 Thinking architecture, trained from scratch "
    "for kimi-cpu. I am not Kimi."
)
ABILITIES = (
    "I can do small sums, name capitals and chemical symbols, compare numbers and use the tools "
    "you declare. Try: What is 17 + 25?"
)
SORRY = (
    "I am a tiny demonstration model and cannot help with that. I can do small sums, name "
    "capitals and chemical symbols, compare numbers and use the tools you declare."
)
NO_CALCULATOR = (
    "I cannot work that out without a calculator. In my head I only add and subtract numbers "
    "up to 99 and multiply up to 12."
)
NO_TOOL = "I have no tool for that here, so I cannot tell."
NO_CAPITAL = "I have not learned that capital."
NO_SYMBOL = "I have not learned that symbol."
CALCULATOR_FAILED = "The calculator could not work that out."


@dataclass(frozen=True)
class Step:
    """One assistant message; ``results`` are the tool results that follow its calls."""

    think: str
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """A user message with the assistant messages that answer it."""

    family: str
    key: str
    user: str
    steps: tuple[Step, ...]


def aloud(turn: Turn) -> Turn:
    """What is said when reasoning is off: sums and comparisons show their steps in the answer."""
    if turn.family not in ("sum", "compare"):
        return turn
    (step,) = turn.steps
    said = Step("", f"{step.think} {step.content}")
    return Turn(turn.family, turn.key, turn.user, (said,))


@dataclass(frozen=True)
class Scene:
    """What stands before the first turn: declared tools and a system message."""

    tools: tuple[dict[str, Any], ...] = ()
    system: str | None = None
    names: frozenset[str] = field(default_factory=frozenset)


def is_held_out(key: str) -> bool:
    """True when the problem ``key`` never occurs in training."""
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] * 100 < HELD_OUT_PERCENT * 256


def _args(**kwargs: object) -> str:
    return json.dumps(kwargs, separators=(",", ":"), ensure_ascii=False)


def _vary(rng: random.Random, text: str) -> str:
    """Small changes of wording and punctuation that do not change the task."""
    roll = rng.random()
    if roll < 0.12:
        text = text.lower()
    elif roll < 0.17:
        text = text.rstrip("?.!")
    elif roll < 0.20:
        text = text.lower().rstrip("?.!")
    elif roll < 0.23:
        text = rng.choice(("Please: ", "Hi! ", "Hello, ", "Ok. ", "Quick question: ")) + text
    elif roll < 0.26:
        text = text.rstrip("?.!") + ", please" + rng.choice((".", "?", ""))
    return text


# ---- arithmetic -------------------------------------------------------------------------------

_ASKS = (
    "What is {e}?", "What is {e}?", "What is {e}?", "What's {e}?", "{e}", "{e}", "{e} =", "{e}=?",
    "{e}?", "Calculate {e}.", "Calculate {e}", "Compute {e}.", "How much is {e}?", "Solve {e}.",
    "Can you tell me {e}?", "Tell me what {e} is.", "Work out {e}.", "Evaluate {e}", "I need {e}.",
    "Please calculate {e}.", "What does {e} equal?", "What is the result of {e}?",
)  # fmt: skip
_SYMBOLS = {
    "+": ("+", "+", "+", "plus"),
    "-": ("-", "-", "-", "minus"),
    "*": ("*", "*", "x", "times", "multiplied by", "×"),
    "/": ("/", "/", "divided by", "÷"),
}
_PHRASES = {
    "+": ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Sum {a} and {b}",
          "{a} and {b} added"),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}.", "What is {a} less {b}?",
          "{a} take away {b}"),
    "*": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}."),
    "/": ("Divide {a} by {b}.", "What is {a} over {b}?"),
}  # fmt: skip


def _ask(rng: random.Random, a: str, op: str, b: str) -> str:
    if rng.random() < 0.2:
        return rng.choice(_PHRASES[op]).format(a=a, b=b)
    word = rng.choice(_SYMBOLS[op])
    tight = not word.isalpha() and " " not in word and rng.random() < 0.4
    expression = f"{a}{word}{b}" if tight else f"{a} {word} {b}"
    return rng.choice(_ASKS).format(e=expression)


def add_reasoning(a: int, b: int) -> str:
    """Column addition of 0 <= a, b <= 99, every step a small lookup."""
    if a < 10 and b < 10:
        return f"{a}+{b}={a + b}."
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    return (
        f"{a:02d}+{b:02d}: {a % 10}+{b % 10}={ones}, "
        f"{a // 10}+{b // 10}+{ones // 10}={tens}, so {a + b}."
    )


def subtract_reasoning(a: int, b: int) -> str:
    """Column subtraction of 0 <= a, b <= 99; a negative result swaps the operands first."""
    if a < b:
        return f"{a} is less than {b}. {subtract_reasoning(b, a)[:-1]}, negative."
    if a < 10:
        return f"{a}-{b}={a - b}."
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow - b % 10
    tens = a // 10 - b // 10 - borrow
    return (
        f"{a:02d}-{b:02d}: {a % 10 + 10 * borrow}-{b % 10}={ones}, "
        f"{a // 10}-{b // 10}-{borrow}={tens}, so {a - b}."
    )


def _small_problem(rng: random.Random) -> tuple[int, str, int]:
    op = rng.choice("+++---*")
    if op == "*":
        return rng.randint(0, 12), op, rng.randint(0, 12)
    a, b = (rng.randrange(10) if rng.random() < 0.15 else rng.randrange(100) for _ in range(2))
    if op == "-" and a < b and rng.random() < 0.45:
        a, b = b, a
    return a, op, b


def is_small(a: int, op: str, b: int) -> bool:
    """True for what the model works out in its head."""
    if op == "*":
        return a <= 12 and b <= 12
    return op in "+-" and a <= 99 and b <= 99


def small_sum(rng: random.Random, scene: Scene) -> Turn:
    a, op, b = _small_problem(rng)
    if op != "*" and rng.random() < 0.1 and (op == "+" or a >= b):
        stories = w.ADD_STORIES if op == "+" else w.SUB_STORIES
        ask = rng.choice(stories).format(a=a, b=b, n=rng.choice(w.NAMES), t=rng.choice(w.THINGS))
    else:
        ask = _ask(rng, str(a), op, str(b))
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    if op == "+":
        think = add_reasoning(a, b)
    elif op == "-":
        think = subtract_reasoning(a, b)
    else:
        think = f"{a}*{b}={result}."
    # The tables themselves (one digit, products) are closed lists: only wordings are held out.
    closed = op == "*" or (a < 10 and b < 10)
    key = f"sum:{a}{op}{b}" + (f":{ask}" if closed else "")
    return Turn("sum", key, _vary(rng, ask), (Step(think, f"{a} {op} {b} = {result}."),))


def _number(rng: random.Random) -> str:
    text = str(rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 4, 4, 5))))
    if rng.random() < 0.04:
        text += f".{rng.randrange(1, 100)}"
    return text


def _big_problem(rng: random.Random) -> tuple[str, str]:
    """A question and its expression, outside of what ``is_small`` covers."""
    while True:
        a, b = _number(rng), _number(rng)
        op = rng.choice("++--***//")
        if "." in a + b or not is_small(int(a), op, int(b)):
            break
    roll = rng.random()
    if roll < 0.12:  # what people try first
        a, b = str(rng.randint(11, 99)), str(rng.randint(13, 99))
        return _ask(rng, a, "*", b), f"{a}*{b}"
    if roll < 0.22:
        a, b = str(rng.randint(1, 150)), str(rng.randint(2, 13))
        return _ask(rng, a, "/", b), f"{a}/{b}"
    if rng.random() < 0.03:
        a, b = str(rng.randint(2, 20)), str(rng.randint(2, 7))
        ask = rng.choice(
            ("{a}^{b}", "{a}**{b}", "{a} ^ {b}", "{a} ** {b}", "{a} to the power of {b}")
        )
        return rng.choice(_ASKS).format(e=ask.format(a=a, b=b)), f"{a}**{b}"
    if rng.random() < 0.04:
        return _ask(rng, "-" + a, op, b), f"-{a}{op}{b}"
    if rng.random() < 0.06 and op in "+-" and "." not in a + b:
        stories = w.ADD_STORIES if op == "+" else w.SUB_STORIES
        ask = rng.choice(stories).format(a=a, b=b, n=rng.choice(w.NAMES), t=rng.choice(w.THINGS))
        return ask, f"{a}{op}{b}"
    if rng.random() < 0.15:
        c, second = _number(rng), rng.choice("+-*/")
        expression = rng.choice((f"{a}{op}{b}{second}{c}", f"({a}{op}{b}){second}{c}"))
        shown = expression
        if rng.random() < 0.4:
            for sign in "+-*/":
                shown = shown.replace(sign, f" {sign} ")
        return rng.choice(_ASKS).format(e=shown), expression
    return _ask(rng, a, op, b), f"{a}{op}{b}"


def _calculate(rng: random.Random, expression: str) -> str:
    try:
        value = eval(expression, {"__builtins__": {}})
    except ZeroDivisionError:
        return "error: division by zero"
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e15:
            return str(int(value))
        return f"{value:.{rng.choice((10, 10, 10, 6, 4))}g}"
    return str(value)


def calculation(rng: random.Random, scene: Scene) -> Turn:
    ask, expression = _big_problem(rng)
    key = f"calc:{expression}"
    if "calculator" not in scene.names:
        steps = (Step("I have no calculator here.", NO_CALCULATOR),)
        return Turn("no_calculator", key, _vary(rng, ask), steps)
    result = _calculate(rng, expression)
    failed = result.startswith("error")
    steps = (
        Step(
            "I use the calculator.",
            calls=(("calculator", _args(expression=expression)),),
            results=(result,),
        ),
        Step(
            "The calculator answered.",
            CALCULATOR_FAILED if failed else f"The result is {result}.",
        ),
    )
    return Turn("calculator", key, _vary(rng, ask), steps)


def comparison(rng: random.Random, scene: Scene) -> Turn:
    a = rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3)))
    b = a if rng.random() < 0.04 else rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3)))
    if rng.random() < 0.3:
        b = min(999, max(0, a + rng.randint(-12, 12)))
    larger = rng.random() < 0.65
    word = rng.choice(("larger", "bigger", "greater")) if larger else "smaller"
    ask = rng.choice(
        (
            "Which is {w}, {a} or {b}?", "Which number is {w}, {a} or {b}?",
            "What is {w}, {a} or {b}?",
            "Which is {w}: {a} or {b}?", "{a} or {b}, which is {w}?", "Is {a} or {b} {w}?",
        )
    ).format(w=word, a=a, b=b)  # fmt: skip
    steps = []
    for x, y in zip(f"{a:03d}", f"{b:03d}", strict=True):
        steps.append(f"{x}{'=<>'[(x != y) + (x > y)]}{y}")
        if x != y:
            break
    think = f"{a:03d} {b:03d}: {', '.join(steps)}."
    if a == b:
        answer = f"{a} and {b} are equal."
    elif larger:
        answer = f"{max(a, b)} is larger than {min(a, b)}."
    else:
        answer = f"{min(a, b)} is smaller than {max(a, b)}."
    return Turn("compare", f"compare:{a}:{b}", _vary(rng, ask), (Step(think, answer),))


# ---- facts ------------------------------------------------------------------------------------


def fact(rng: random.Random, scene: Scene) -> Turn:
    if rng.random() < 0.7:
        ask = rng.choice(w.CAPITAL_ASKS)
        if rng.random() < 0.12:
            name = pseudo_word(rng).capitalize() if rng.random() < 0.3 else ""
            name = name or rng.choice(w.UNKNOWN_COUNTRIES)
            think, answer = "I did not learn this capital.", NO_CAPITAL
        else:
            name, capital = rng.choice(list(w.CAPITALS.items()))
            think, answer = f"{name}: {capital}.", f"The capital of {name} is {capital}."
    else:
        ask = rng.choice(w.ELEMENT_ASKS)
        if rng.random() < 0.08:
            name = pseudo_word(rng).lower() if rng.random() < 0.3 else ""
            name = name or rng.choice(w.UNKNOWN_ELEMENTS)
            think, answer = "I did not learn this symbol.", NO_SYMBOL
        else:
            name, symbol = rng.choice(list(w.ELEMENTS.items()))
            think, answer = f"{name}: {symbol}.", f"The symbol for {name} is {symbol}."
    user = ask.format(x=name)
    return Turn("fact", f"fact:{user}", _vary(rng, user), (Step(think, answer),))


# ---- talk -------------------------------------------------------------------------------------

_TALK = (
    (w.GREETINGS, "A greeting.", HELLO),
    (w.THANKS, "Thanks.", THANKED),
    (w.BYES, "A goodbye.", GOODBYE),
    (w.WHO, "A question about me.", ABOUT),
    (w.HELPS, "A question about what I can do.", ABILITIES),
)


def small_talk(rng: random.Random, scene: Scene) -> Turn:
    prompts, think, answer = rng.choice(_TALK)
    user = rng.choice(prompts)
    roll = rng.random()
    if roll < 0.2:
        user = user.lower()
    elif roll < 0.3:
        user = user.rstrip("?.!")
    elif roll < 0.4:
        user = user.lower().rstrip("?.!") + rng.choice(("", "!", ".", " :)", " please"))
    return Turn("talk", f"talk:{user}", user or "?", (Step(think, answer),))


def anything_else(rng: random.Random, scene: Scene) -> Turn:
    user = out_of_scope(rng)
    if rng.random() < 0.15:
        user = user.lower()
    return Turn("other", f"other:{user}", user, (Step("I was not trained for this.", SORRY),))


# ---- tools ------------------------------------------------------------------------------------


def _without_tool(family: str, key: str, user: str) -> Turn:
    return Turn(family, key, user, (Step("There is no tool for this.", NO_TOOL),))


def clock(rng: random.Random, scene: Scene) -> Turn:
    day = rng.choice(w.DAYS)
    date = f"{rng.randint(2024, 2035)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    asks, answer = rng.choice(
        (
            (w.TIME_ASKS, f"It is {time}."),
            (w.DAY_ASKS, f"Today is {day}."),
            (w.DATE_ASKS, f"Today is {day} {date}."),
        )
    )
    user = rng.choice(asks)
    key = f"clock:{user}:{day} {date} {time}"
    user = _vary(rng, user)
    if "clock" not in scene.names:
        return _without_tool("no_tool", key, user)
    first = Step(
        "I look at the clock.", calls=(("clock", "{}"),), results=(f"{day} {date} {time}",)
    )
    return Turn("clock", key, user, (first, Step("The clock answered.", answer)))


def _cities() -> list[str]:
    """Few enough to be learned: a name after a quote has other tokens than after a space."""
    return sorted(set(list(w.CAPITALS.values())[:60]))


def weather(rng: random.Random, scene: Scene) -> Turn:
    return _weather(rng, scene, 2 if rng.random() < 0.4 else 1)


def weather_of_one(rng: random.Random, scene: Scene) -> Turn:
    return _weather(rng, scene, 1)


def weather_of_two(rng: random.Random, scene: Scene) -> Turn:
    """Two calls in one message."""
    return _weather(rng, scene, 2)


def _weather(rng: random.Random, scene: Scene, count: int) -> Turn:
    cities = rng.sample(_cities(), count)
    ask = rng.choice(w.WEATHER_ASKS)
    user = ask.format(x=" and ".join(cities))
    key = f"weather:{user}"
    user = _vary(rng, user)
    if "get_weather" not in scene.names:
        return _without_tool("no_tool", key, user)
    as_json = rng.random() < 0.4
    results, answers = [], []
    for city in cities:
        degrees, sky = rng.randint(-9, 39), rng.choice(w.SKIES)
        results.append(_args(sky=sky, temperature=degrees) if as_json else f"{degrees} C, {sky}")
        answers.append(f"{city}: {degrees} C, {sky}.")
    calls = tuple(("get_weather", _args(city=city)) for city in cities)
    first = Step("I call get_weather.", calls=calls, results=tuple(results))
    return Turn("tools", key, user, (first, Step("The tool answered.", "\n".join(answers))))


def price(rng: random.Random, scene: Scene) -> Turn:
    item = rng.choice(w.ITEMS)
    name = rng.choice((item, f"the {item}"))
    user = rng.choice(w.PRICE_ASKS).format(x=name)
    cost = f"{rng.randrange(1, 100)}.{rng.randrange(100):02d}"
    key = f"price:{user}"
    user = _vary(rng, user)
    if "get_price" not in scene.names:
        return _without_tool("no_tool", key, user)
    result = cost if rng.random() < 0.6 else _args(price=float(cost))
    if result != cost:
        cost = result[len('{"price":') : -1]
    first = Step("I call get_price.", calls=(("get_price", _args(item=item)),), results=(result,))
    return Turn("tools", key, user, (first, Step("The tool answered.", f"{item}: {cost}.")))


def timer(rng: random.Random, scene: Scene) -> Turn:
    minutes = rng.randint(1, 120)
    user = rng.choice(w.TIMER_ASKS).format(x=minutes)
    key = f"timer:{user}"
    user = _vary(rng, user)
    if "set_timer" not in scene.names:
        return _without_tool("no_tool", key, user)
    result = rng.choice(("ok", "done", "Timer set.", '{"ok":true}', "true"))
    first = Step(
        "I call set_timer.", calls=(("set_timer", _args(minutes=minutes)),), results=(result,)
    )
    answer = f"The timer is set for {minutes} minutes."
    return Turn("tools", key, user, (first, Step("The tool answered.", answer)))


def dice(rng: random.Random, scene: Scene) -> Turn:
    sides = rng.choice((4, 6, 8, 10, 12, 20, 30, 50, 100, rng.randint(2, 120)))
    user = rng.choice(w.DICE_ASKS).format(x=sides)
    key = f"dice:{user}"
    user = _vary(rng, user)
    if "roll_dice" not in scene.names:
        return _without_tool("no_tool", key, user)
    rolled = str(rng.randint(1, sides))
    first = Step("I call roll_dice.", calls=(("roll_dice", _args(sides=sides)),), results=(rolled,))
    return Turn("tools", key, user, (first, Step("The tool answered.", f"You rolled {rolled}.")))


Family = Callable[[random.Random, Scene], Turn]
PLAIN_MIX: tuple[tuple[Family, float], ...] = (
    (small_sum, 42), (fact, 17), (anything_else, 15), (comparison, 9), (small_talk, 7),
    (calculation, 5), (clock, 1.5), (weather, 1.5), (price, 0.7), (timer, 0.7), (dice, 0.6),
)  # fmt: skip
BUILTIN_MIX: tuple[tuple[Family, float], ...] = (
    (calculation, 36), (small_sum, 22), (clock, 11), (fact, 9), (anything_else, 10),
    (comparison, 3), (small_talk, 5), (weather, 1.5), (price, 1), (timer, 1), (dice, 0.5),
)  # fmt: skip
OTHER_MIX: tuple[tuple[Family, float], ...] = (
    (weather, 28), (price, 18), (timer, 9), (dice, 4), (calculation, 11), (clock, 4),
    (small_sum, 10), (fact, 5), (anything_else, 7), (comparison, 1), (small_talk, 3),
)  # fmt: skip


def draw(rng: random.Random, family: Family, scene: Scene, held_out: bool = False) -> Turn:
    """A turn of ``family`` whose problem lies on the asked side of the split."""
    while True:
        turn = family(rng, scene)
        if is_held_out(turn.key) == held_out:
            return turn
