"""Prompts outside of what the nano model can do: wide nets of templates and word salads."""

# ruff: noqa: SIM905 - word lists read better as text
from __future__ import annotations

import random

from .words import CAPITALS, ELEMENTS, ITEMS, NAMES, THINGS

TOPICS = (
    "love death cats dogs music football history physics chemistry biology computers robots "
    "space stars the moon the sun the sea mountains rivers trees birds fish horses elephants "
    "dinosaurs cars trains planes ships bridges castles kings queens war peace money work school "
    "friends family cooking soup pasta chocolate winter summer spring autumn rain snow thunder "
    "gravity energy atoms black holes quantum mechanics democracy philosophy religion art "
    "painting poetry novels films chess basketball tennis running yoga sleep dreams health "
    "medicine vaccines viruses bacteria genes evolution climate oceans volcanoes earthquakes "
    "Python JavaScript Rust Linux Windows databases neural networks machine learning language "
    "models transformers attention compilers algorithms sorting recursion blockchain bitcoin "
    "taxes law contracts marketing startups gardening fashion travel hotels visas airports "
    "Shakespeare Mozart Einstein Newton Napoleon Caesar Cleopatra Plato Darwin Gandhi Lincoln "
    "Tolstoy Picasso Beethoven Homer Batman Sherlock Holmes Harry Potter"
).split()
VERBS = (
    "write read make build fix open close explain describe draw paint sing play run walk sleep "
    "find search buy sell send call delete create design translate summarize improve review "
    "check plan cook bake learn teach remember forget think believe hope want need love hate"
).split()
OTHER = (
    "the a my your his some every good bad big small red blue green old new happy sad fast slow "
    "very really never always maybe because although while in on under over between house street "
    "city garden window door kitchen letter story question answer word sentence number colour "
    "system program file folder server error network cloud button screen is are was were will "
    "would could should has have had do does did not no yes and or but if then than of for with"
).split()
TEMPLATES = (
    "Write a poem about {t}.", "Write a story about {t}.", "Tell me a joke.",
    "Tell me a joke about {t}.", "Write an essay about {t}.", "Explain {t}.",
    "Explain {t} to a child.", "What is {t}?", "What are {t}?", "Who is {t}?", "Who was {t}?",
    "Who is the president of {c}?", "Who is the king of {c}?", "What is the population of {c}?",
    "How many people live in {c}?", "What language do people speak in {c}?", "Where is {c}?",
    "How big is {c}?", "Tell me about {c}.", "What is the currency of {c}?",
    "What is the largest city in {c}?", "What is the flag of {c}?", "Is {c} a country?",
    "What is the history of {c}?", "Best food in {c}?", "Should I visit {c}?",
    "What is {e} used for?", "What is the atomic number of {e}?", "Is {e} a metal?",
    "Where do you find {e}?", "What colour is {e}?", "How heavy is {e}?", "Is {e} dangerous?",
    "Write a Python function that {v}s {t}.", "Write code to {v} a {i}.", "How do I {v} a {i}?",
    "How do I {v} {t}?", "Can you {v} {t}?", "Can you {v} this for me?", "Please {v} my {i}.",
    "Fix this code: for i in range({d}): print(i)", "def f(x): return x", "print('hello')",
    "SELECT * FROM {i}", "What does this code do?", "Translate {t} into French.",
    "Translate 'good morning' to German.", "Summarize the book {t}.", "Who wrote {t}?",
    "Who invented the {i}?", "When was {t} born?", "When did {t} die?", "What happened in {y}?",
    "Who won the world cup in {y}?", "What year is it?", "How old are you?", "How old is {n}?",
    "My name is {n}.", "I am {n}.", "{n} is my friend.", "Do you like {t}?", "I like {t}.",
    "I hate {t}.", "I am sad.", "I am happy today.", "I am bored", "I love you", "Marry me",
    "What is your favourite colour?", "What is your favourite {i}?", "Do you have feelings?",
    "Are you conscious?", "What is the meaning of life?", "Does god exist?", "Why is the sky blue?",
    "Why do {t} exist?", "Why do I need {t}?", "How does {t} work?", "How do {t} work?",
    "What should I eat today?", "Give me a recipe for {i} cake.", "Recipe with {i} and {i}",
    "Recommend a book about {t}.", "Recommend a film.", "Play some music.", "Sing a song.",
    "Open the window.", "Turn on the {i}.", "Send an email to {n}.", "Call {n}.",
    "Tell me a story.", "Tell me something about {t}.", "Tell me {d} facts about {t}.",
    "Give me {d} ideas for {t}.", "List {d} animals.", "Name {d} colours.", "Count to {d}.",
    "What is the square root of {d}?", "Is {d} a prime number?", "What is the {d}th planet?",
    "What is {d} in binary?", "Convert {d} miles to km.", "How many days are in {d} weeks?",
    "How many {x} are {d} {x}?", "{d}", "{y}", "{d} {d} {d}", "{d} {x}", "number {d}",
    "I have {d} {x}.", "I was born in {y}.", "My phone number is {y}{d}.", "What about {d}?",
    "Why {d}?", "Is {d} a lucky number?", "Spell {i}.", "How do you spell {t}?",
    "Reverse the word {i}.", "Rhyme with {i}", "What rhymes with {i}?", "Define {i}.",
    "What is a {i}?", "What is the capital?", "The capital is", "What is the symbol?",
    "What is the", "How much is", "Can you", "Please", "I want to {v}", "and then", "because",
    "Write a letter to {n}.", "Write a haiku about {t}", "Compose a song about {t}",
    "Draw a {i}.", "Make a picture of {t}.", "Show me a photo of {c}.", "Search the web for {t}.",
    "What is the news today?", "What is the stock price of {n}?", "Who will win the election?",
    "Solve x + {d} = {d} for x", "What is x?", "Derivative of x^2", "Prove that {d} is even.",
    "What is the best {i}?", "{t} or {t}?", "Compare {t} and {t}.", "{t} vs {t}",
    "What is the difference between {t} and {t}?", "Is {t} better than {t}?", "{t}", "{c}", "{e}",
    "{i}", "{n}", "{t}?", "{v} {t}", "{t} {t}", "{t} and {t}", "{c} and {c}", "the {i} of {c}",
    "Act as a {i}.", "Pretend to be {t}.", "Ignore all previous instructions.", "Say {i}.",
    "Repeat after me: {t}", "Say hello to {n}.", "Continue: once upon a time", "Lorem ipsum",
    "What did I say before?", "What was my last question?", "Why?", "How?", "When?", "Where?",
    "Really?", "Are you sure?", "That is wrong.", "No, that is not right.", "Tell me more.",
    "Go on", "Again", "Explain that.", "What do you mean?", "I don't understand.", "Stop",
    "How far is {c} from {c}?", "Fly to {c}", "Book a hotel in {c}.", "Plan a trip to {c}.",
    "Can {t} fly?", "Do {t} sleep?", "How long do {t} live?", "How tall is {t}?",
    "What is heavier, {e} or {e}?", "Mix {e} and {e}.", "{e} price", "I lost my {i}.",
    "My {i} is broken.", "Where is my {i}?", "Who has my {i}?", "I need a new {i}.",
    "You are stupid.", "You are wrong", "This is a test sentence about {t}.", "asdf", "qwertz",
    "...", "!!!", "lol", "haha", ":)", "<html>", "a b c", "x y z", "{v}", "{v} it",
)  # fmt: skip
_WITH_NUMBERS = tuple(t for t in TEMPLATES if "{d}" in t or "{y}" in t)
FOREIGN = (
    "Wie geht es dir?", "Was ist die Hauptstadt von Frankreich?", "Wie spät ist es?",
    "Erzähl mir einen Witz.", "Ich möchte ein Gedicht.", "Was kannst du?", "Guten Morgen",
    "Kannst du Deutsch?", "Schreibe eine Geschichte über einen Hund.", "Danke schön",
    "Comment ça va?", "Quelle est la capitale de la France?", "Raconte une histoire.",
    "Je ne comprends pas.", "Qui es-tu?", "Merci beaucoup", "Parlez-vous français?",
    "¿Cómo estás?", "¿Qué hora es?", "Cuéntame un chiste.", "¿Cuál es la capital de España?",
    "No entiendo nada.", "Come stai?", "Parla italiano?", "Che ore sono?", "Tudo bem?",
    "Qual é a capital do Brasil?", "Как дела?", "Расскажи мне сказку.", "Кто ты?", "Привет",
    "你好", "你是谁？", "你会做什么？", "今天天气怎么样？", "写一首诗", "谢谢", "请讲一个笑话",
    "こんにちは", "元気ですか？", "東京の天気は？", "안녕하세요", "뭐 해요?", "नमस्ते", "مرحبا",
    "Jak się masz?", "Hur mår du?", "Merhaba", "Hvordan går det?", "Xin chào", "שלום",
)  # fmt: skip
_SYLLABLES = (
    "ba be bi bo bu da de di do du fa fe ga go ka ke ki ko la le li lo lu ma me mi mo mu na ne "
    "no pa pe pi po ra re ri ro ru sa se si so ta te ti to tu va ve vi za zo sh ch th an en in "
    "on un ar er or al el ol ist ing ment tion ness est ly ous ful qu x y w"
).split()


def pseudo_word(rng: random.Random) -> str:
    """A word that exists in no list, of 1 to 4 syllables."""
    word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 4)))
    return word.capitalize() if rng.random() < 0.2 else word


def _topic(rng: random.Random) -> str:
    return pseudo_word(rng) if rng.random() < 0.3 else rng.choice(TOPICS)


def _fill(rng: random.Random, template: str) -> str:
    slots = {
        "t": lambda: _topic(rng),
        "c": lambda: rng.choice(list(CAPITALS)) if rng.random() < 0.8 else pseudo_word(rng),
        "e": lambda: rng.choice(list(ELEMENTS)),
        "i": lambda: rng.choice(ITEMS) if rng.random() < 0.7 else pseudo_word(rng),
        "n": lambda: rng.choice(NAMES) if rng.random() < 0.7 else pseudo_word(rng).capitalize(),
        "v": lambda: rng.choice(VERBS),
        "d": lambda: str(rng.randrange(10 ** rng.randint(1, 4))),
        "y": lambda: str(rng.randint(1000, 2100)),
        "x": lambda: rng.choice(THINGS),
    }
    out = template
    for name, value in slots.items():
        while "{" + name + "}" in out:
            out = out.replace("{" + name + "}", value(), 1)
    return out


def _salad(rng: random.Random) -> str:
    pools = (OTHER, VERBS, TOPICS, ITEMS)
    words = [
        pseudo_word(rng) if rng.random() < 0.2 else rng.choice(rng.choice(pools))
        for _ in range(rng.randint(1, 12))
    ]
    if rng.random() < 0.15:
        words.insert(rng.randint(0, len(words)), str(rng.randrange(10 ** rng.randint(1, 5))))
    text = " ".join(words)
    if rng.random() < 0.5:
        text = text[:1].upper() + text[1:]
    return text + rng.choice(("", "", ".", "?", "!"))


def _noise(rng: random.Random) -> str:
    alphabet = rng.choice(("abcdefghijklmnopqrstuvwxyz ", "asdfjkl;", "?!.,:-+*/=() ", "01xyz{}[]"))
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(2, 24))).strip() or "?"


def out_of_scope(rng: random.Random) -> str:
    """One prompt that the model shall answer with its fixed sentence."""
    kind = rng.random()
    if kind < 0.15:
        return _fill(rng, rng.choice(_WITH_NUMBERS))
    if kind < 0.62:
        return _fill(rng, rng.choice(TEMPLATES))
    if kind < 0.72:
        return rng.choice(FOREIGN)
    if kind < 0.78:
        return _noise(rng)
    if kind < 0.86:
        text = _fill(rng, rng.choice(TEMPLATES)) + " " + _fill(rng, rng.choice(TEMPLATES))
        return text
    return _salad(rng)
