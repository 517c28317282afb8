"""Sentences to speak, made by a small grammar from word lists: a count and a seed come in, distinct lines come out."""

from __future__ import annotations

from typing import Final

import numpy as np

from compositor.errors import InvalidInput

# Words are chosen for their sounds: every English phoneme, and many that close or round the lips.
_WORDS: Final = {
    "person": """my mother|the baker|our neighbour|a friend of mine|the captain|your brother|the old fisherman|Bob|Emma
        |Oliver|the young painter|Zoe|the whole family|her uncle|George|the bus driver|Paul|a famous chef|the judge
        |my father|Vivian|the gardener|Joyce|a visitor|Thomas|the boys|everyone|the children|Humphrey|the watchmaker
        |Fiona|the teacher|Beth|the mayor|a stranger|Wayne|the choir|our team|Phoebe|the pilot""",
    "past": """bought|painted|found|moved|borrowed|washed|remembered|carried|opened|kept|mended|photographed|measured
        |brought|described|sold|lifted|wrapped|pushed|noticed|repaired|chose|loved|hid|cooked|polished|dropped|saved
        |looked for|asked about|thought about|paid for|jumped over|fell behind""",
    "base": """buy|paint|find|move|borrow|wash|remember|carry|open|keep|mend|photograph|measure|bring|describe|sell|lift
        |wrap|push|notice|repair|choose|taste|hide|cook|polish|drop|save|show me|talk about|put away|pick up|leave
        |pay for""",
    "adjective": """blue|heavy|beautiful|small|very old|warm|bright|smooth|yellow|empty|brown|fresh|wooden|quiet|huge
        |cheap|sharp|round|purple|vague|wet|five|soft|golden|thin|foggy|enormous|sour|perfect|polite|new|simple|broken""",
    "thing": """paper boat|apple pie|lamp|bicycle|jumper|map|bottle of milk|photo album|piano|umbrella|football|window
        |basket of plums|cup of tea|birthday cake|voice recorder|wooden spoon|coffee pot|key|television|garden gate
        |bag of flour|treasure chest|yellow coat|thermometer|phone|loaf of bread|mirror|toy aeroplane|bowl of soup
        |measuring tape|jar of honey|chair|violin|postcard|pair of shoes|wheelbarrow|teapot|newspaper|shelf""",
    "place": """in the kitchen|by the river|behind the house|at the market|on the bus|near the old bridge|under the bed
        |in the middle of the village|above the shop|at the beach|beside the oak tree|in Paris|around the corner
        |outside the museum|from the farm|in the attic|along the path|below the mountain|at home|in the box
        |over the fence|through the valley|on the roof|in the hallway|at the airport""",
    "time": """this morning|on Monday|before breakfast|after the meeting|in five minutes|every evening|last year
        |tomorrow|at half past seven|in November|the other day|for the first time|at noon|once a week|on my birthday
        |again|two hours ago|in the afternoon|during the show|whenever it rains|by the way|all summer|as usual""",
    "quality": """better than before|far too expensive|almost impossible|wonderful|a bit of a problem|rather funny
        |very important|just fine|the best of all|hard to believe|about to begin|quite obvious|unusual|ready to go
        |as good as new|much more comfortable|above average|perfectly normal|worth a try|over by now""",
    "opener": """well|by the way|of course|as far as I know|if you ask me|to be honest|please|maybe|wait a moment
        |believe me|however|oh|excuse me|from now on|for example|you know|after all|no|yes|in my opinion""",
    "number": "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fourteen|twenty|fifty|a hundred|a thousand",
}  # fmt: skip
_TEMPLATES: Final = (
    "{person} {past} the {adjective} {thing} {place}",
    "{person} {past} a {thing} {time}",
    "please {base} the {thing} {time}",
    "{opener}, {person} {past} the {thing}",
    "why did {person} {base} the {adjective} {thing}?",
    "the {thing} {place} is {quality}",
    "we should {base} {number} of them {time}",
    "can you {base} the {adjective} {thing} {place}?",
    "{opener}, the {adjective} {thing} was {quality}",
    "{time}, {person} {past} the {thing} {place}",
    "I will {base} it {place} {time}",
    "{number} people {past} the {thing}, and it was {quality}",
    "they always {base} my {adjective} {thing}",
    "is the {thing} {quality}?",
    "{opener}, I have to {base} the {thing}",
    "{person} and {person} {past} it {time}",
    "there are {number} more {place}",
    "do not {base} that {thing}, it is {quality}",
    "when you {base} the {thing}, {person} will be {place}",
    "hello, I am {place}",
    "that is {quality}",
    "how about {number} or {number}?",
)  # fmt: skip
_ATTEMPTS: Final = 50  # for each sentence, before the grammar is called exhausted


def make_sentences(count: int, seed: int = 0) -> list[str]:
    """`count` distinct sentences; the same arguments give the same ones, and a greater count only adds to them.

    Raises InvalidInput where the grammar cannot give so many.
    """
    random = np.random.default_rng([seed, 1])
    words = {kind: _alternatives(text) for kind, text in _WORDS.items()}
    made = dict[str, None]()
    for _ in range(_ATTEMPTS * count):
        if len(made) == count:
            break
        made[_sentence(random, words)] = None
    if len(made) < count:
        raise InvalidInput(f"sentences: the grammar gave {len(made)} of {count}; ask for fewer")
    return list(made)


def _alternatives(text: str) -> list[str]:
    return [" ".join(entry.split()) for entry in text.split("|")]


def _sentence(random: np.random.Generator, words: dict[str, list[str]]) -> str:
    template = _TEMPLATES[int(random.integers(len(_TEMPLATES)))]
    while "{" in template:
        kind = template[template.index("{") + 1 : template.index("}")]
        word = words[kind][int(random.integers(len(words[kind])))]
        template = template.replace(f"{{{kind}}}", word, 1)
    return template[0].upper() + template[1:] + ("" if template.endswith("?") else ".")
