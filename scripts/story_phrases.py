"""What people say to a storyteller, and which words they would not ask for: the data of `story_chats.py`."""

from __future__ import annotations

# Ways to ask, by kind; {} is what is asked for.
PHRASES = {
    "words": (
        "Tell a story with the words {}.", "Tell me a story with the words {}.",
        "Write a story that uses the words {}.", "Use the words {} in a story.",
        "Can you tell a story with the words {}?", "A story with {}, please.", "Please tell me a story with {}.",
        "Make up a story with these words: {}",
    ),
    "word": (
        "Tell a story with the word {}.", "Write a story that uses the word {}.", "A story with the word {}, please.",
        "Can you tell a story with the word {}?",
    ),
    "sentence": (
        "Write a sentence with the words {}.", "A sentence with {}, please.", "Use {} in a sentence.",
        "Make a sentence with {}.",
    ),
    "short": (
        "Tell a short story with the words {}.", "Write a very short story with the words {}.",
        "A short story with {}, please.", "Tell me a short story with {}.", "Use {} in a short story.",
    ),
    "short word": (
        "Tell a short story with the word {}.", "A short story with the word {}, please.",
        "Write a very short story with the word {}.",
    ),
    "about": (
        "Tell a story about {}.", "Tell me a story about {}.", "Write a story about {}.", "A story about {}, please.",
        "Can you tell me a story about {}?", "I want a story about {}.", "Please write a short story about {}.",
    ),
    "begins": (
        "Tell a story that begins with: {}", "Tell a story that starts with: {}", 'Begin a story with "{}"',
        "Start a story like this: {}", 'Write a story whose first sentence is "{}"',
    ),
    "go on": (
        "Go on: {}", "Continue: {}", "Go on with this story: {}", "Finish this story: {}", "What happens next? {}",
        "Continue this story: {}", "How does this story end? {}",
    ),
    "any": (
        "Tell a story.", "Tell me a story.", "Tell me a story, please.", "Write a short story.", "A story, please!",
        "Can you tell me a story?", "I want to hear a story.", "Make up a story.", "Tell me something.",
    ),
    "then": ("Go on.", "Go on!", "Continue.", "What happens next?", "And then?", "And then what happened?",
             "More, please.", "Tell me more.", "How does it end?"),
    "another": ("Another one.", "Another story, please.", "Tell me another one.", "One more!",
                "Now another one, please.", "Can you tell another story?"),
    "another with": ("Now one with the words {}.", "Another one, with the words {}.",
                     "Now tell a story with the words {}.", "And one with {}?"),
    "another with one": ("Now one with the word {}.", "Another one, with the word {}.", "And one with {}?"),
    "another about": ("Now one about {}.", "Another one, about {}.", "And a story about {}?",
                      "Now tell me one about {}."),
}  # fmt: skip


OFFER = "Give me some words, a first sentence, or say who the story is about."
WELCOME = "You are welcome! Shall I tell another story?"
# What is said besides requests: to learn, to measure, and the answer. {} is filled from the list that follows.
TALK: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("Hi", "Hi!", "Hello", "Hello!", "Hey", "Hello there!", "Good morning!", "Good morning", "Hi there",
      "Good evening.", "How are you?", "Hello, how are you?", "hi", "hello"),
     ("Hey!", "Hi there!", "Good day!", "Hello there", "hey", "Hi, how are you?"),
     f"Hello! I can tell stories. {OFFER}"),
    (("Who are you?", "What are you?", "What is your name?", "Are you a robot?", "Who made you?",
      "Tell me about yourself."),
     ("What's your name?", "Are you a person?", "Who am I talking to?"),
     f"I am a very small language model. I can tell stories. {OFFER}"),
    (("What can you do?", "Help", "Help!", "What do you know?", "How does this work?", "What should I ask you?",
      "What can I ask?"),
     ("What can you do for me?", "Can you help me?", "What do you do?"),
     f"I can tell stories. {OFFER}"),
)  # fmt: skip
UNKNOWN = f"I do not know about that, but I can tell stories. {OFFER}"
# Questions from outside of its world: to learn with the first fillings, to measure with those after the bar.
QUESTIONS = (
    ("What is the capital of {}?", "France, Germany, Japan, Spain, India, Canada, Italy, China | Peru, Egypt, Norway"),
    ("Who was {}?", "Albert Einstein, Napoleon, Julius Caesar, Isaac Newton, Cleopatra | Mozart, Marie Curie"),
    ("Who wrote {}?", "Hamlet, Moby Dick, the Bible, Don Quixote, War and Peace | Faust, Dracula"),
    ("What is {} plus {}?", "2, 3, 12, 7, 40, 25, 8, 16 | 4, 15, 31"),
    ("How much is {} times {}?", "3, 5, 12, 9, 20 | 6, 11"),
    ("Write a Python function that {}.",
     "sorts a list, adds two numbers, reads a file, reverses a string | finds a prime, counts words"),
    ("Translate this into {}.", "German, French, Spanish, Latin | Italian, Greek"),
    ("How do I {}?", "cook rice, fix my car, learn English, install Linux, lose weight, open a bank account | "
                     "bake bread, write a letter, sell my house"),
    ("Explain {}.", "gravity, quantum physics, the internet, inflation, machine learning | evolution, electricity"),
    ("What is {}?", "a black hole, an atom, the meaning of life, democracy, a neural network, DNA | "
                    "a computer, photosynthesis"),
    ("When did {}?", "World War II end, the Roman Empire fall, Columbus sail | the French Revolution start, Rome burn"),
    ("Why {}?", "is the sky blue, do we dream, is the sea salty, do cats purr | is grass green, do birds migrate"),
    ("What do you think about {}?", "politics, the news, football, the president, climate change | religion, money"),
    ("How {}?", "old is the earth, far is the moon, tall is Mount Everest, many people live in China | "
                "fast is light, big is the sun"),
    ("Give me {}.", "a recipe for soup, a list of planets, five facts about Rome | a recipe for pizza, some advice"),
    ("What is the weather like {}?", "today, tomorrow, in London, in New York | in Paris, next week"),
)  # fmt: skip
THANKS = ("Thank you!", "Thanks", "Thanks!", "Thank you.", "That was a nice story.", "I like it!", "That was nice!",
          "Good story!", "Thank you very much.")  # fmt: skip
YES = ("Yes", "Yes, please.", "Yes please!", "OK", "Please do.", "Sure", "Yes!")

# Words that nobody would ask a story for, and nouns that are none by themselves.
FUNCTION_WORDS = set(
    """
about above across after again against ahead all almost alone along already also although always another any anyone
anything around asked away because been before began behind being below beside besides better between both called came
can cannot come coming could did different does doing done down during each either else enough even ever every everyone
everything everywhere first for found from gave get gets getting give given goes going gone got had has have having her
here hers herself him himself his how however however if instead into its itself just keep kept knew know known last
later least left less let like liked long look looked looking lot lots made make makes making many may maybe might more
most much must named near need needed neither never next none nor not nothing now off often once one only onto other
others our out over own part perhaps put quite quickly rather ready really said same saw say saying see seem seemed seen
several shall she should since some someone something sometimes soon started still such suddenly sure take taken taking
tell than that the their them themselves then there these they thing things think this those though thought three
through time today together told too took towards tried try trying turn turned two under until upon use used using very
want wanted was way well went were what whatever when where which while who whole whose why will wish with within
without wonder would yes yet you your yours
""".split()
)
NO_THINGS = {"bit", "day", "end", "few", "little", "other", "middle", "moment", "minute", "next", "past", "rest", "top",
              "moral", "same", "story", "inside", "ground", "air", "way", "sound", "idea"}  # fmt: skip
