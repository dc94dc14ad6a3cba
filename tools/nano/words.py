"""Closed lists and phrasings of the nano model's data; all written for this project."""

# ruff: noqa: SIM905 - word lists read better as text
from __future__ import annotations

CAPITALS: dict[str, str] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Austria": "Vienna", "Belgium": "Brussels",
    "the Netherlands": "Amsterdam", "Denmark": "Copenhagen", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Ireland": "Dublin", "Greece": "Athens",
    "Poland": "Warsaw", "Hungary": "Budapest", "Romania": "Bucharest", "Bulgaria": "Sofia",
    "Croatia": "Zagreb", "Serbia": "Belgrade", "Ukraine": "Kyiv", "Russia": "Moscow",
    "Turkey": "Ankara", "Iceland": "Reykjavik", "England": "London",
    "the United Kingdom": "London", "Switzerland": "Bern", "Japan": "Tokyo",
    "China": "Beijing", "India": "New Delhi", "South Korea": "Seoul", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Indonesia": "Jakarta", "Malaysia": "Kuala Lumpur",
    "the Philippines": "Manila", "Iran": "Tehran", "Iraq": "Baghdad",
    "Saudi Arabia": "Riyadh", "Israel": "Jerusalem", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Nigeria": "Abuja", "Ethiopia": "Addis Ababa", "Morocco": "Rabat", "Ghana": "Accra",
    "South Africa": "Pretoria", "Canada": "Ottawa", "the United States": "Washington",
    "Mexico": "Mexico City", "Cuba": "Havana", "Brazil": "Brasilia",
    "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima", "Colombia": "Bogota",
    "Venezuela": "Caracas", "Australia": "Canberra", "New Zealand": "Wellington",
    "the USA": "Washington", "the UK": "London", "the Czech Republic": "Prague",
    "Zimbabwe": "Harare", "Zambia": "Lusaka", "Uruguay": "Montevideo", "Uganda": "Kampala",
    "Tunisia": "Tunis", "Syria": "Damascus", "Sudan": "Khartoum", "Somalia": "Mogadishu",
    "Slovenia": "Ljubljana", "Slovakia": "Bratislava", "Singapore": "Singapore",
    "Senegal": "Dakar", "Rwanda": "Kigali", "Qatar": "Doha", "Paraguay": "Asuncion",
    "Pakistan": "Islamabad", "Oman": "Muscat", "Niger": "Niamey", "Nicaragua": "Managua",
    "Nepal": "Kathmandu", "Namibia": "Windhoek", "Mozambique": "Maputo",
    "Mongolia": "Ulaanbaatar", "Malta": "Valletta", "Mali": "Bamako",
    "Madagascar": "Antananarivo", "Luxembourg": "Luxembourg", "Lithuania": "Vilnius",
    "Libya": "Tripoli", "Lebanon": "Beirut", "Latvia": "Riga", "Laos": "Vientiane",
    "Kazakhstan": "Astana", "Jordan": "Amman", "Jamaica": "Kingston", "Georgia": "Tbilisi",
    "Estonia": "Tallinn", "Ecuador": "Quito", "Cyprus": "Nicosia", "Cambodia": "Phnom Penh",
    "Belarus": "Minsk", "Bangladesh": "Dhaka", "Azerbaijan": "Baku", "Armenia": "Yerevan",
    "Algeria": "Algiers", "Albania": "Tirana", "Afghanistan": "Kabul", "Scotland": "Edinburgh",
    "Wales": "Cardiff",
}  # fmt: skip

UNKNOWN_COUNTRIES = (
    "Yemen Togo Samoa Panama Monaco Moldova Malawi Liberia Kuwait Honduras Haiti Guyana Guinea "
    "Guatemala Gabon Fiji Congo Chad Cameroon Burundi Botswana Bolivia Bhutan Benin Barbados "
    "Bahrain Angola Andorra Atlantis Narnia Mars Texas Bavaria Europe Africa Mordor Wonderland "
    "Florida Asia Sicily Utopia Gondor Jupiter Alaska Brittany Antarctica Disneyland"
).split()

ELEMENTS: dict[str, str] = {
    "hydrogen": "H", "helium": "He", "lithium": "Li", "carbon": "C", "nitrogen": "N",
    "oxygen": "O", "fluorine": "F", "neon": "Ne", "sodium": "Na", "magnesium": "Mg",
    "aluminium": "Al", "silicon": "Si", "phosphorus": "P", "sulfur": "S", "chlorine": "Cl",
    "argon": "Ar", "potassium": "K", "calcium": "Ca", "iron": "Fe", "nickel": "Ni",
    "copper": "Cu", "zinc": "Zn", "silver": "Ag", "tin": "Sn", "iodine": "I", "gold": "Au",
    "mercury": "Hg", "lead": "Pb", "uranium": "U", "platinum": "Pt",
}  # fmt: skip

UNKNOWN_ELEMENTS = (
    "titanium vanadium tungsten cobalt xenon krypton radium radon boron arsenic barium "
    "bismuth cadmium gallium indium osmium rhodium thorium unobtainium kryptonite"
).split()

CAPITAL_ASKS = (
    "What is the capital of {x}?", "What is the capital of {x}?", "What's the capital of {x}?",
    "capital of {x}", "Capital of {x}?", "Which city is the capital of {x}?",
    "Name the capital of {x}.", "Tell me the capital of {x}.", "What is the capital city of {x}?",
    "Do you know the capital of {x}?", "I want to know the capital of {x}.",
    "Can you tell me the capital of {x}?", "What city is the capital of {x}?",
    "The capital of {x}?", "Give me the capital of {x}.", "What is {x}'s capital?",
)  # fmt: skip

ELEMENT_ASKS = (
    "What is the chemical symbol for {x}?", "What is the chemical symbol of {x}?",
    "What is the symbol for {x}?", "chemical symbol of {x}", "Symbol of {x}?",
    "Tell me the symbol for {x}.", "Give me the chemical symbol for {x}.",
    "What's the symbol of the element {x}?", "Which symbol does {x} have?",
    "Name the chemical symbol of {x}.", "Do you know the symbol for {x}?",
)  # fmt: skip

GREETINGS = (
    "Hello", "Hi", "Hey", "Hello!", "Hi!", "Hey!", "Hello there", "Hi there!", "Good morning",
    "Good evening", "Good afternoon", "Hello Kimi", "Hi Kimi!", "Hey there", "Greetings",
    "Hello, how are you?", "Hi, how are you?", "How are you?", "How are you doing?",
    "How do you do?", "What's up?", "Howdy", "Good day", "Hello hello", "Hi, nice to meet you.",
    "Hey Kimi, how are you today?", "Good morning!", "Hello, Kimi.", "Hallo", "Bonjour", "Hola",
    "Hello, friend", "Yo", "hi hi", "Hello, can you hear me?", "Are you there?", "Good night",
)  # fmt: skip

THANKS = (
    "Thanks", "Thank you", "Thanks!", "Thank you!", "Thank you very much.", "Thanks a lot!",
    "Many thanks", "Great, thanks", "Ok, thanks", "Thank you, Kimi.", "Perfect, thank you!",
    "Nice, thanks.", "Cool, thank you", "Well done!", "Great!", "Good job", "Nice work!",
    "That was helpful.", "That's right!", "Correct, thanks.", "Thx", "Awesome", "You are great",
)  # fmt: skip

BYES = (
    "Bye", "Goodbye", "Bye!", "Goodbye!", "See you", "See you later.", "Bye bye", "Bye, Kimi.",
    "Talk to you later", "I have to go now.", "Good night!", "Farewell", "See you tomorrow!",
    "That's all, bye.", "Ciao", "Have a nice day!", "I am leaving now",
)  # fmt: skip

WHO = (
    "Who are you?", "What are you?", "Who are you", "What is your name?", "What's your name?",
    "Are you Kimi?", "Are you a robot?", "Are you an AI?", "Are you human?", "Introduce yourself.",
    "Tell me about yourself.", "Which model are you?", "What model are you?", "Who made you?",
    "Who created you?", "Who trained you?", "Are you ChatGPT?", "Are you Kimi K2?",
    "What kind of model are you?", "Do you have a name?", "How big are you?",
    "Are you the real Kimi?", "Where do you come from?", "Say something about yourself",
)  # fmt: skip

HELPS = (
    "What can you do?", "What can you do", "Help", "help", "Help me", "How can you help me?",
    "What do you know?", "What are you able to do?", "Can you help me?", "What are your skills?",
    "What can I ask you?", "How do I use you?", "What should I ask?", "Show me what you can do.",
    "What do you do?", "Give me an example.", "Tell me what you can do", "What is this?",
    "What questions can you answer?", "I need help", "Test", "test", "Ok", "Yes", "No", "ok",
    "?", "Hmm", "What tasks can you do?", "List your abilities.", "Which tools do you have?",
)  # fmt: skip

TIME_ASKS = (
    "What time is it?", "What time is it?", "What time is it now?", "What's the time?",
    "Tell me the time.", "Tell me the time, please.", "Do you know what time it is?",
    "Can you tell me the time?", "What is the time?", "What is the current time?",
    "time now", "How late is it?", "Please tell me what time it is.", "Current time?",
)  # fmt: skip
DAY_ASKS = (
    "What day is it?", "What day is it today?", "What day is today?", "Which day is today?",
    "What day of the week is it?", "Which day of the week is today?", "Tell me the day.",
    "Can you tell me what day it is?", "What weekday is it?",
)  # fmt: skip
DATE_ASKS = (
    "What is the date?", "What is today's date?", "What's the date today?", "Tell me the date.",
    "What date is it?", "What date is today?", "Can you tell me today's date?",
    "What is the current date?", "Which date is it today?", "date today",
)  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

WEATHER_ASKS = (
    "What is the weather in {x}?", "What's the weather in {x}?", "How is the weather in {x}?",
    "How is the weather in {x} today?", "Weather in {x}", "Weather in {x}?",
    "Tell me the weather in {x}.", "Is it raining in {x}?", "Is it cold in {x}?",
    "What is the weather like in {x}?", "Check the weather in {x}.", "How warm is it in {x}?",
)  # fmt: skip
PRICE_ASKS = (
    "What is the price of {x}?", "How much is {x}?", "How much does {x} cost?", "Price of {x}",
    "What does {x} cost?", "Tell me the price of {x}.", "Look up the price of {x}.",
    "What's the price of {x}?", "Price of {x}?",
)  # fmt: skip
TIMER_ASKS = (
    "Set a timer for {x} minutes.", "Set a timer for {x} minutes", "Start a timer for {x} minutes.",
    "Timer for {x} minutes", "Please set a {x} minute timer.", "Remind me in {x} minutes.",
    "Set a {x} minute timer", "I need a timer for {x} minutes.",
)  # fmt: skip
DICE_ASKS = (
    "Roll a die with {x} sides.", "Roll a {x} sided die.", "Throw a die with {x} sides",
    "Please roll a {x} sided die", "Roll a d{x}.",
)  # fmt: skip
ITEMS = (
    "apple banana bread milk butter cheese coffee tea sugar rice pizza cake lemon orange "
    "potato tomato onion water juice wine beer soap book pen paper lamp chair table phone "
    "camera shirt shoes hat bike ticket umbrella candle flower mirror knife"
).split()
SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear")

NAMES = "Tom Anna Ben Mia Leo Eva Sam Lucy Max Nina Paul Emma".split()
THINGS = "apples coins books pens cards eggs stamps balls cakes cookies flowers stones".split()
ADD_STORIES = (
    "{n} has {a} {t} and gets {b} more. How many {t} does {n} have?",
    "I have {a} {t} and buy {b} more. How many do I have now?",
    "There are {a} {t} in a box and {b} on the table. How many are there?",
    "{n} finds {a} {t} and then {b} more. How many is that?",
)
SUB_STORIES = (
    "{n} has {a} {t} and loses {b}. How many are left?",
    "I have {a} {t} and give away {b}. How many do I have now?",
    "There are {a} {t} in a box. {n} takes {b} of them. How many are left?",
    "{n} had {a} {t} and sold {b}. How many {t} are left?",
)

SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "Answer briefly.",
    "You are Kimi.", "You are an AI assistant.", "Be kind and short.", "You are a pirate.",
    "You are a calculator.", "Always be polite.", "You are a teacher for young children.",
    "Reply in one sentence.", "Think step by step.", "You are an expert programmer.",
)  # fmt: skip
