"""Words for keys, values and lists."""

import re
import uuid
from collections import Counter

import numpy as np

_ADJECTIVES = (
    "able,ancient,brave,bright,busy,calm,careful,cheap,clean,clever,cold,curious,dark,deep,dry,eager,early,empty,fair,"
    "famous,fast,fierce,fine,firm,fresh,gentle,glad,grand,green,happy,hard,heavy,hollow,honest,huge,humble,icy,jolly,"
    "keen,kind,large,lazy,light,lively,loud,lucky,mild,modern,narrow,neat,noble,odd,pale,patient,plain,polite,proud,"
    "quick,quiet,rapid,rare,ready,rough,round,royal,rude,sharp,shy,silent,simple,slow,smart,smooth,soft,solid,sour,"
    "steady,stiff,strange,strong,sudden,sweet,swift,tall,tame,thick,thin,tidy,tiny,tough,vast,warm,weak,wide,wild,wise"
)
_NOUNS = (
    "anchor,apple,arrow,badge,barrel,basket,beacon,bell,bench,bishop,blanket,boat,book,bottle,branch,bridge,brush,"
    "bucket,button,cabin,camera,candle,canvas,carpet,castle,chair,cherry,circle,clock,cloud,coat,comet,copper,cotton,"
    "cradle,crown,curtain,daisy,desk,diamond,door,drum,eagle,engine,falcon,feather,fence,field,flute,forest,fountain,"
    "garden,ginger,glove,hammer,harbour,helmet,hill,horse,island,jacket,kettle,kitchen,ladder,lantern,lemon,letter,"
    "lizard,magnet,maple,market,meadow,mirror,mountain,needle,ocean,orchard,oven,paper,parrot,pencil,pepper,piano,"
    "pillow,planet,pocket,pond,queen,rabbit,ribbon,river,rocket,saddle,sailor,school,shadow,shell,silver,spoon,station,"
    "stone,storm,table,temple,thunder,ticket,tower,train,tunnel,valley,velvet,village,violin,wagon,wallet,window"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(","), _NOUNS.split(",")


def distinct(kind: str, count: int, rng: np.random.Generator) -> list[str]:
    """Different `words` (adjective-noun), `numbers` (7 digits) or `uuids`."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_one(kind, rng)] = None
    return list(found)


def _one(kind: str, rng: np.random.Generator) -> str:
    if kind == "words":
        return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def vocabulary_of(texts: list[str], count: int = 4000) -> list[str]:
    """The most frequent words of 4 to 10 small letters, in alphabetical order; those of this file where texts lack."""
    frequent = Counter(word for text in texts for word in re.findall(r"\b[a-z]{4,10}\b", text))
    return sorted({*(word for word, _ in frequent.most_common(count)), *NOUNS, *ADJECTIVES})
