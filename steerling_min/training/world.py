"""The tiny world: labelled short stories from a grammar, so that the truth is known.

    The old sailor Mara lived near the harbour with a dog named Biscuit and a brass key. Salt wind
      blew Mara and Biscuit across the pale bay until sunset. Mara smiled all the way home.
    The waves carried Biscuit to the narrow reef. "Look at the shiny gull," said Mara.

A story is four to seven chunks (two of them above). The first sentence draws a hero, a friend, a
place and a thing, which come back by name in later chunks: a reader must remember them. Every
chunk has one topic, often a mood, sometimes a form. It is labelled with them and with each thing
that it mentions: with most of its words, that is, but not "the" or "until". The first chunk
above is about the sea, happy, and mentions "old", "sailor", "Mara", "harbour", "dog", "Biscuit",
"brass key", "pale", "bay" and "sunset". The tables of `grammar.py` write the
stories, recognise sentences, and give the exact entropy: the limit that training can approach.
"""

import math
import random
import re
from collections.abc import Sequence
from functools import cache
from statistics import fmean as mean
from typing import NamedTuple

from ..files.labels import Label
from .grammar import FORMS, INTRO, MOODS, SAID, SENTENCE_SLOTS, STORY_SLOTS, TOPICS

CHUNKS = (4, 5, 6, 7)  # chunks of a story, equally likely
KEEP_TOPIC = 1 / 2     # a chunk keeps the topic of the one before; else any other, equally likely
MOOD = 2 / 3           # share of chunks with a mood sentence
FORM = 1 / 2           # share of chunks, after the first, with a form sentence
SENTENCE_END = re.compile(r"(?<=[.?]) (?=[A-Z\"])")  # where a chunk is cut into sentences


# ---- the concepts --------------------------------------------------------------------------------

# What a chunk as a whole has: group, its names, type, and how to say that a chunk has it.
WHOLE: list[tuple] = [("topic", TOPICS, "content", "is about the topic"),
                      ("mood", MOODS, "tone", "shows the mood"),
                      ("form", FORMS, "document", "has a sentence of the form")]
# The slots whose words are entities; other words are content.
ENTITIES = ("hero", "friend", "place")


def named_words() -> dict[str, str]:
    """Every word, or pair of words, that is a concept, and its group: a slot or a kind of SAID."""
    topics_nouns = [noun for nouns, _ in TOPICS.values() for noun in nouns]
    tables = [STORY_SLOTS, {"noun": topics_nouns}, SENTENCE_SLOTS, SAID]
    return {word: slot for table in tables for slot, words in table.items() for word in words}


CONCEPTS = tuple(Label(i, *rest) for i, rest in enumerate(
    [(name, f"the chunk {has} {name}", group, type)
     for group, names, type, has in WHOLE for name in names]
    + [(word, f"the chunk mentions {word}", group,
        "entity" if group in ENTITIES else "content")
       for word, group in named_words().items()]))
CONCEPT_IDS = {concept.name: concept.id for concept in CONCEPTS}
WORDS = {CONCEPT_IDS[word]: word for word in named_words()}  # of the concepts that name words


# ---- writing -------------------------------------------------------------------------------------

class Chunk(NamedTuple):
    text: str
    concepts: tuple[int, ...]  # sorted ids
    turns: Sequence[tuple[str, str]] = ()  # of a conversation: role and content


class Story(NamedTuple):
    chunks: tuple[Chunk, ...]
    hero: str
    log_prob: float  # natural log of the probability that write_story writes this text


def slots_of(template: str) -> list[str]:
    """The names of a template's slots, in order."""
    return re.findall(r"\{(\w+)\}", template)


def fillers(slot: str, nouns: list[str]) -> list[str]:
    """What may stand in a slot, given the nouns of the topic."""
    return nouns if slot == "noun" else {**STORY_SLOTS, **SENTENCE_SLOTS}[slot]


@cache
def said(template: str) -> frozenset[str]:
    """The words of a template itself, not of its slots, that are concepts."""
    words = re.findall(r"\w+", re.sub(r"\{\w+\}", "", template))
    return frozenset(word for word in words if CONCEPT_IDS.get(word) in WORDS)


def write_story(rng: random.Random) -> Story:
    """Draw a story. No two ways of drawing give the same text, so log_prob is the text's."""
    log_prob = 0.0

    def choose(options):
        nonlocal log_prob
        log_prob -= math.log(len(options))
        return rng.choice(options)

    def happens(p):
        nonlocal log_prob
        yes = rng.random() < p
        log_prob += math.log(p if yes else 1 - p)
        return yes

    def sentence(templates, nouns):
        text = choose(templates)
        names.update(said(text))
        for slot in slots_of(text):
            filler = story[slot] if slot in story else choose(fillers(slot, nouns))
            names.add(filler)
            text = text.replace("{" + slot + "}", filler)
        return text

    story = {slot: choose(STORY_SLOTS[slot]) for slot in slots_of(INTRO)}
    chunks, topic = [], None
    for i in range(choose(CHUNKS)):
        if topic is None or not happens(KEEP_TOPIC):
            topic = choose([name for name in TOPICS if name != topic])
        nouns, templates = TOPICS[topic]
        names = {topic}  # of the chunk's concepts; `sentence` adds those of the words it writes
        sentences = [sentence(templates, nouns)]
        for kinds, yes in ((MOODS, happens(MOOD)), (FORMS, i > 0 and happens(FORM))):
            if yes:
                names.add(kind := choose(list(kinds)))
                sentences.append(sentence(kinds[kind], nouns))
        if i == 0:
            sentences.insert(0, sentence([INTRO], nouns))
        chunks.append(Chunk(" ".join(sentences), tuple(sorted(CONCEPT_IDS[n] for n in names))))
    return Story(tuple(chunks), story["hero"], log_prob)


# ---- recognising ---------------------------------------------------------------------------------

def pattern_of(template: str, nouns: list[str]) -> re.Pattern:
    """A regular expression that matches exactly the sentences a template can become."""
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for slot in slots_of(template):
        pattern = pattern.replace("{" + slot + "}", f"({'|'.join(fillers(slot, nouns))})")
    return re.compile(pattern)


ALL_NOUNS = sorted({noun for nouns, _ in TOPICS.values() for noun in nouns})
RULES: list[tuple[re.Pattern, set[str]]] = [(pattern_of(INTRO, []), set())] + [
    (pattern_of(template, nouns), {name} | said(template))
    for name, (nouns, templates) in [
        *TOPICS.items(),
        *((name, (ALL_NOUNS, templates)) for name, templates in {**MOODS, **FORMS}.items())]
    for template in templates]


def split_sentences(text: str) -> list[str]:
    """A chunk's text cut into its sentences."""
    return SENTENCE_END.split(text) if text else []


def recognise(sentence: str) -> tuple[int, ...] | None:
    """The ids of the concepts that a sentence shows; None when it is not in the grammar."""
    for pattern, names in RULES:
        if found := pattern.fullmatch(sentence):
            return tuple(sorted(CONCEPT_IDS[name] for name in names.union(found.groups())))
    return None


def hero_of(sentence: str) -> str | None:
    """The hero's name in a sentence, or None."""
    return next((name for name in STORY_SLOTS["hero"] if re.search(rf"\b{name}\b", sentence)), None)


# ---- the limit -----------------------------------------------------------------------------------


def entropy() -> float:
    """The exact entropy of a story, in nats: the expectation of -log_prob.

    It follows write_story: an introduction, a topic sentence and perhaps a mood in the first
    chunk; a topic sentence, perhaps a mood and perhaps a form in each later one. Each draw adds its
    own entropy: ln n where n options are equally likely.
    """
    topics = TOPICS.values()

    def coin(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    def sentence(templates, nouns):
        drawn = (sum(math.log(len(fillers(slot, nouns))) for slot in slots_of(template)
                     if slot not in STORY_SLOTS) for template in templates)
        return math.log(len(templates)) + mean(drawn)

    def one_of(kinds):  # a drawn mood or form, then its sentence; nouns of any topic
        return math.log(len(kinds)) + mean(sentence(templates, nouns) for nouns, _ in topics
                                           for templates in kinds.values())

    about = mean(sentence(templates, nouns) for nouns, templates in topics)
    mood, form = coin(MOOD) + MOOD * one_of(MOODS), coin(FORM) + FORM * one_of(FORMS)
    switch = coin(KEEP_TOPIC) + (1 - KEEP_TOPIC) * math.log(len(topics) - 1)
    first_chunk = math.log(len(topics)) + about + mood
    later_chunk = switch + about + mood + form
    names = sum(math.log(len(STORY_SLOTS[slot])) for slot in slots_of(INTRO))
    return math.log(len(CHUNKS)) + names + first_chunk + (mean(CHUNKS) - 1) * later_chunk
