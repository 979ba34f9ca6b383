"""The tiny world's grammar: every sentence it can say, as the plain tables of `grammar.json`.

A {slot} in a sentence is replaced by one of the slot's fillers. `world.py` writes stories from
these tables, recognises their sentences, and makes a concept of every topic, mood and form, of
every filler, and of every word in SAID. Add to them, and everything else follows; but no two
concepts may share a name, "Pepper" and "pepper" neither.
"""

import json
from pathlib import Path

TABLES = json.loads(Path(__file__).with_name("grammar.json").read_text(encoding="utf-8"))

INTRO: str = TABLES["intro"]  # the first sentence of a story
# Slot: its fillers. Those of the first table are drawn once per story, in its first sentence; those
# of the second anew in every sentence that has the slot.
STORY_SLOTS: dict[str, list[str]] = TABLES["story_slots"]
SENTENCE_SLOTS: dict[str, list[str]] = TABLES["sentence_slots"]
# Words that sentences have outside their slots, by kind. For each of them, no other word stands in
# exactly the same sentences. If one did, labels of whole chunks could not tell the two apart.
SAID: dict[str, list[str]] = TABLES["said"]
# Topic: its nouns, the {noun} of its sentences, and its sentences. Some nouns have two or three.
TOPICS: dict[str, tuple[list[str], list[str]]] = {
    topic: (table["nouns"], table["sentences"]) for topic, table in TABLES["topics"].items()}
MOODS: dict[str, list[str]] = TABLES["moods"]
# The {noun} of a form is one of the chunk's topic; the sentence alone does not show the topic.
FORMS: dict[str, list[str]] = TABLES["forms"]
