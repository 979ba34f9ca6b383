"""Measure a model of the tiny world, its language, its concepts, its steering; or of any text.

The grammar knows the truth, so each number is a share or a ratio with a known best value. Held-out
stories come from a seed that training never uses; samples are drawn with `generate`'s defaults,
but windows are aligned, and there is no repetition penalty (stories repeat names on purpose).

The concept layer is judged by its authors' four measures, under their names (`measures.py`).
What is measured besides has another name.
"""

import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from ..attribution import attribute_text, embed_chunks, resembling
from ..diffusion import corrupt, likelihood_bound, noise_levels, token_loss
from ..files.loading import load
from ..files.tokenizer import Tokenizer
from ..model import Steerling
from ..steering import Steering
from ..unmasking import generate, unmask
from . import world
from .data import (Batch, Stream, count_tokens, cut, endless_stories, first_stories, pack,
                   spread)
from .losses import lift_weights
from .measures import (alignment, contribution, detection, in_named_words, look, separation,
                       share)
from .world import CONCEPTS, TOPICS, WORDS, Story, hero_of, recognise, split_sentences

HELD_OUT = "held out for the evaluation"
SAMPLING: dict = {"align": True, "repetition_penalty": 1.0}
SPECIALS = ("<|bos|>", "<|endofchunk|>", "<|endoftext|>")
WORD_SAMPLE = {"noun": 16, "animal": 4, "place": 4}  # how many words of each kind are amplified


class Measure(NamedTuple):
    unit: str         # how a value is printed
    target: str = ""
    paper: str = ""   # the value that the 8B's authors report


SHARE, POINTS, NUMBER, COUNT = "{:.1%}", "{:.2f} points", "{:.4f}", "{:.0f}"
MEASURES = {
    "sentences in the grammar": Measure(SHARE, "≥ 97%"),
    "hero's name kept": Measure(SHARE, "≥ 90%"),
    "likelihood bound / entropy": Measure(NUMBER, "≤ 1.15"),
    "bound, nats per token": Measure(NUMBER),
    "detection: macro AUC": Measure(NUMBER, "≥ 0.98", "0.962"),
    "... half of the tokens masked": Measure(NUMBER, "≥ 0.95"),
    "... concepts left out: in no chunk, or in all": Measure(COUNT, "0"),
    "separation: cross-covariance": Measure(NUMBER, "≤ 1/2 of without its loss"),
    "contribution: known + discovered (Eq. 22)": Measure(SHARE, "≥ 84%", "over 84%"),
    "... known": Measure(SHARE, "≥ 33%"),
    "... known, at content words": Measure(SHARE, "≥ 60%", "most"),
    "... known, at all other tokens": Measure(SHARE),
    "... discovered": Measure(SHARE),
    "... epsilon": Measure(SHARE, "≤ 16%"),
    "contribution to what the model writes: known": Measure(SHARE, "≥ 33%", "37.5% (one text)"),
    "... known, at content words that it writes": Measure(SHARE, "≥ 60%", "most"),
    "... discovered, to what it writes": Measure(SHARE, "", "50.1% (one text)"),
    "... epsilon, to what it writes": Measure(SHARE, "≤ 16%", "12.4% (one text)"),
    "alignment: words' concepts that promote their word most": Measure(SHARE, "≥ 95%"),
    "... topics, moods, forms: promoted tokens that fit": Measure(SHARE, "≥ 80%"),
    "accuracy lost without epsilon, t = 0.15": Measure(POINTS, "≤ 1 point"),
    "... t = 0.5": Measure(POINTS, "≤ 2 points"),
    "... t uniform": Measure(POINTS, "≤ 4 points"),
    "topic amplified, neutral prompt": Measure(SHARE, "≥ 90%", "concept score 0.015 → 0.783"),
    "... sentences in the grammar": Measure(SHARE, "≥ 90%"),
    "topic amplified, other topic before": Measure(SHARE, "≥ 85%"),
    "... sentences in the grammar, after the other topic": Measure(SHARE, "≥ 80%"),
    "topic not amplified, either prompt": Measure(SHARE, "about 10%"),
    "topic unlearned, same topic before": Measure(SHARE, "≤ 5%"),
    "... not unlearned": Measure(SHARE, "about half"),
    "... sentences in the grammar, topic unlearned": Measure(SHARE, "≥ 85%"),
    "word amplified: chunks that say it": Measure(SHARE, "≥ 60%"),
    "... not amplified": Measure(SHARE, "≤ 1/10 of it"),
    "... sentences in the grammar, word amplified": Measure(SHARE),
    "resemblance: nearest training chunks of the same topic": Measure(SHARE, "≥ 95%"),
}


@torch.no_grad()
def held_out_loss(model: Steerling, batch: Batch) -> float:
    """The token loss on windows that training never reads, with the same noise every time."""
    (B, T), config, device = batch.tokens.shape, model.config, model.device
    generator = torch.Generator().manual_seed(0)
    t = noise_levels(B, T, config.diff_block_size, generator)
    noisy, masked = corrupt(batch.tokens, t * batch.learnt, config.mask_token_id, generator)
    hidden = model.transformer(noisy.to(device))  # with epsilon, what is composed
    logits = model.transformer.lm_head(hidden[masked.to(device)])
    return token_loss(logits, batch.tokens.to(device), masked.to(device), t).item()


# ---- language ------------------------------------------------------------------------------------


def tokens_of(story: Story, tokenizer: Tokenizer) -> list[int]:
    return pack([story.chunks], tokenizer).tokens.tolist()


def write(model: Steerling, tokenizer: Tokenizer, prompt: list[int], n: int, seed: int,
          steering: Steering | None = None) -> tuple[str, str]:
    """Continue a prompt by n tokens; returns the prompt's text and the new text."""
    tokens = generate(model, [prompt], n, **SAMPLING, seed=seed, steering=steering)[0].tolist()
    return (tokenizer.decode(prompt, specials=True),
            tokenizer.decode(tokens[len(prompt):], specials=True))


def new_chunks(before: str, after: str) -> list[list[str]]:
    """The chunks of a text of which something was written, each as its new, whole sentences.

    A sentence that the prompt began counts as new; the last, cut off by the end, does not.
    """
    text = before + after
    for special in SPECIALS:
        text = text.replace(special, "\0" * len(special))
    chunks, at = [], 0
    for chunk in text.split("\0"):
        sentences, begin = [], at
        for sentence in split_sentences(chunk):
            begin = text.index(sentence, begin) + len(sentence)
            if len(before) < begin < len(text):
                sentences.append(sentence)
        if sentences:
            chunks.append(sentences)
        at += len(chunk) + 1
    return chunks


def heroes_kept(before: str, after: str) -> list[bool]:
    """For each new sentence after the first chunk that names a hero: is it the story's hero?"""
    story = (before + after).split("<|bos|>")[1]  # up to the next story, if one was begun
    first = story.partition("<|endofchunk|>")[0]
    given = max(len(before) - len("<|bos|>"), len(first))  # what is not judged
    found = [hero_of(s) for chunk in new_chunks(story[:given], story[given:]) for s in chunk]
    hero = hero_of(first.partition(". ")[0])  # of the introduction
    return [name == hero for name in found if name]


def language(model: Steerling, tokenizer: Tokenizer, n: int) -> dict[str, float]:
    """Samples: are the sentences in the grammar, and does the hero keep the name?"""
    rng, right, kept = random.Random(HELD_OUT), [], []
    for i in range(n):
        prompt = tokens_of(world.write_story(rng), tokenizer)[: rng.randint(1, 100)]
        texts = write(model, tokenizer, prompt, 128, i)
        right += [recognise(s) is not None for chunk in new_chunks(*texts) for s in chunk]
        kept += heroes_kept(*texts)
    return {"sentences in the grammar": share(right), "hero's name kept": share(kept)}


def likelihood(model: Steerling, tokenizer: Tokenizer, n: int) -> dict[str, float]:
    """The bound on stories' -log p, given <|bos|>, and its ratio to the grammar's entropy.

    The excess of the bound over a story's own -log p is averaged over n stories, and added to the
    exact entropy. Stories vary so much that the mean of their bounds alone would be off by more.
    """
    rng, generator = random.Random(HELD_OUT), torch.Generator().manual_seed(0)
    lost, bounds, n_tokens = [], [], 0
    for _ in range(n):
        story = world.write_story(rng)
        tokens = torch.tensor([tokens_of(story, tokenizer)], device=model.device)
        new = tokens.shape[1] - 1  # all but <|bos|>
        asked = torch.arange(1 + new)[None] > 0
        bound = likelihood_bound(model, tokens, asked, 8, generator).item() * new
        lost.append(bound + story.log_prob)
        bounds.append(bound)
        n_tokens += new
    return {"likelihood bound / entropy": 1 + fmean(lost) / world.entropy(),
            "bound, nats per token": sum(bounds) / n_tokens}


# ---- concepts ------------------------------------------------------------------------------------


def concepts(model: Steerling, tokenizer: Tokenizer, n: int, counted: int) -> dict[str, float]:
    """The four measures, and what is lost without epsilon, on n held-out windows. The text is
    longer, `counted` tokens: enough to say which of them go with which concept."""
    config = model.config
    stream = pack(endless_stories(HELD_OUT), tokenizer, enough=counted)
    named = in_named_words(stream.tokens, tokenizer)
    clean, light, half, uniform = (look(model, stream, named, t, n) for t in (0, 0.15, 0.5, None))
    lifted = lift_weights(count_tokens(stream, config.n_concepts, config.vocab_size)) > 0

    area, left_out = detection(clean.present, clean.labels)
    known, unknown, epsilon = contribution(uniform.parts)
    words, fitting = alignment(model, tokenizer, lifted)

    def lost(seen):
        return 100 * (seen.right.float().mean() - seen.without_epsilon.float().mean()).item()
    return {"detection: macro AUC": area,
            "... half of the tokens masked": detection(half.present, half.labels)[0],
            "... concepts left out: in no chunk, or in all": left_out,
            "separation: cross-covariance": separation(uniform.known, uniform.unknown),
            "contribution: known + discovered (Eq. 22)": known + unknown,
            "... known": known,
            "... known, at content words": contribution(uniform.parts[uniform.named])[0],
            "... known, at all other tokens": contribution(uniform.parts[~uniform.named])[0],
            "... discovered": unknown,
            "... epsilon": epsilon,
            "alignment: words' concepts that promote their word most": words,
            "... topics, moods, forms: promoted tokens that fit": fitting,
            "accuracy lost without epsilon, t = 0.15": lost(light),
            "... t = 0.5": lost(half),
            "... t uniform": lost(uniform)}


def written(model: Steerling, tokenizer: Tokenizer, n: int) -> dict[str, float]:
    """The contributions to the tokens of n texts, each at the step that wrote it. The 8B's figures
    are of this kind. (Held-out windows also ask about words that no model could be sure of.)"""
    parts, named = [], []
    for seed in range(n):
        _, found = attribute_text(model, list(unmask(
            model, [[tokenizer.bos_token_id]], 128, **SAMPLING, seed=seed)))
        parts.append(found.parts().cpu())
        named.append(in_named_words(found.tokens, tokenizer))
    every, content = torch.cat(parts), torch.cat(named)  # (M, 3), (M,)
    known, unknown, epsilon = contribution(every)
    return {"contribution to what the model writes: known": known,
            "... known, at content words that it writes": contribution(every[content])[0],
            "... discovered, to what it writes": unknown,
            "... epsilon, to what it writes": epsilon}


# ---- steering ------------------------------------------------------------------------------------


def topic_prompts(tokenizer: Tokenizer, n: int, before: str) -> Iterator[tuple[int, list[int]]]:
    """n prompts for each topic: a story's first sentence ("neutral"), or its first chunk, which is
    about the topic ("same") or not ("other")."""
    rng = random.Random(HELD_OUT)
    for topic in range(len(TOPICS)):
        firsts = (world.write_story(rng).chunks[0] for _ in count())
        fitting = (chunk for chunk in firsts
                   if before == "neutral" or (topic in chunk.concepts) == (before == "same"))
        for _, chunk in zip(range(n), fitting):
            if before == "neutral":
                text, end = split_sentences(chunk.text)[0], []
            else:
                text, end = chunk.text, [tokenizer.endofchunk_token_id]
            yield topic, [tokenizer.bos_token_id, *tokenizer.encode(text), *end]


def word_prompts(tokenizer: Tokenizer, n: int) -> Iterator[tuple[int, list[int]]]:
    """Yield n prompts for each word of a fixed sample of nouns, animals and places.

    A prompt is a story's first sentence. That sentence names an animal and a place. For a word of
    these two kinds, the prompt ends just before the sentence's own word of the kind. For a noun it
    is the whole sentence.
    """
    rng = random.Random(HELD_OUT)
    for kind, number in WORD_SAMPLE.items():
        words = {concept.id: concept.name for concept in CONCEPTS if concept.group == kind}
        for concept in rng.sample(list(words), number):
            for _ in range(n):
                first = split_sentences(world.write_story(rng).chunks[0].text)[0]
                text = re.split(rf" ({'|'.join(words.values())})\b", first)[0]
                yield concept, [tokenizer.bos_token_id, *tokenizer.encode(text)]


def shows(chunk: list[str], concept: int) -> bool:
    """Whether a chunk's sentences say a concept's word; a topic is read from the grammar."""
    if concept in WORDS:
        return re.search(rf"\b{WORDS[concept]}\b", " ".join(chunk)) is not None
    return any(concept in (recognise(sentence) or ()) for sentence in chunk)


def steered(model: Steerling, tokenizer: Tokenizer, prompts: Iterable[tuple[int, list[int]]],
            steer: Callable[[int], Steering | None]) -> tuple[float, float]:
    """Continue prompts by 32 tokens each, steered by steer(concept), and judge what is written.

    prompts are (concept, token ids). Returns two shares: of the new chunks, those that show the
    concept; and of their sentences, those in the grammar.
    """
    shown, right = [], []
    for seed, (concept, prompt) in enumerate(prompts):
        for chunk in new_chunks(*write(model, tokenizer, prompt, 32, seed, steer(concept))):
            shown.append(shows(chunk, concept))
            right += [recognise(sentence) is not None for sentence in chunk]
    return share(shown), share(right)


def steering(model: Steerling, tokenizer: Tokenizer, n: int) -> dict[str, float]:
    """Topics amplified and unlearned, words amplified, by the presets' defaults."""
    def topics(steer, before):
        return steered(model, tokenizer, topic_prompts(tokenizer, n, before), steer)

    def words(steer):
        return steered(model, tokenizer, word_prompts(tokenizer, max(1, n // 2)), steer)
    plain = {kind: topics(lambda concept: None, kind)[0] for kind in ("neutral", "other", "same")}
    neutral, neutral_right = topics(Steering.amplify, "neutral")
    other, other_right = topics(Steering.amplify, "other")
    unlearned, unlearned_right = topics(Steering.unlearn, "same")
    word, word_right = words(Steering.amplify)
    return {"topic amplified, neutral prompt": neutral,
            "... sentences in the grammar": neutral_right,
            "topic amplified, other topic before": other,
            "... sentences in the grammar, after the other topic": other_right,
            "topic not amplified, either prompt": (plain["neutral"] + plain["other"]) / 2,
            "topic unlearned, same topic before": unlearned,
            "... not unlearned": plain["same"],
            "... sentences in the grammar, topic unlearned": unlearned_right,
            "word amplified: chunks that say it": word,
            "... not amplified": words(lambda concept: None)[0],
            "... sentences in the grammar, word amplified": word_right}


# ---- resemblance ---------------------------------------------------------------------------------


def resemblance(model: Steerling, tokenizer: Tokenizer, n: int) -> dict[str, float]:
    """Of the five training chunks most like each chunk of n held-out stories: those of its topic.
    """
    def embedded(stories):
        chunks = [chunk for story in stories for chunk in story]
        return ([chunk.concepts[0] for chunk in chunks],  # the topic: it has the smallest id
                embed_chunks(model, [tokenizer.encode(chunk.text) for chunk in chunks]))
    topics, corpus = embedded(first_stories())
    same = []
    for topic, embedding in zip(*embedded(islice(endless_stories(HELD_OUT), n))):
        ids, _ = resembling(embedding, corpus, 5)
        same += [topics[i] == topic for i in ids.tolist()]
    return {"resemblance: nearest training chunks of the same topic": share(same)}


# ---- anyone's text -------------------------------------------------------------------------------


def in_units(nats: float, tokens: Tensor, tokenizer: Tokenizer) -> dict[str, float]:
    """Convert a bound in nats per token into nats per character and bits per byte of the text.

    The last two compare models with different vocabularies. Special tokens add to the cost, but
    not to the text. Returns all three by name.
    """
    raw = tokenizer.encoding.decode_bytes(
        [i for i in tokens.flatten().tolist() if i not in tokenizer.special_ids])
    total = nats * tokens.numel()
    return {"bound, nats per token": nats,
            "bound, nats per character": total / max(1, len(raw.decode(errors="ignore"))),
            "bound, bits per byte": total / math.log(2) / max(1, len(raw))}


def bound_in_units(model: Steerling, tokenizer: Tokenizer, tokens: Tensor, learnt: Tensor,
                   samples: int) -> dict[str, float]:
    """The bound on those tokens of windows (B, T) that training learns, always with the same noise.
    Each window must have one."""
    generator, nats = torch.Generator().manual_seed(0), 0.0
    for windows, asked in zip(tokens.split(8), learnt.split(8)):
        bound = likelihood_bound(model, windows.to(model.device), asked, samples, generator)
        nats += (bound.cpu() * asked.sum(1)).sum().item()
    return in_units(nats / learnt.sum().item(), tokens[learnt], tokenizer)


def per_character(model: Steerling, tokenizer: Tokenizer, batch: Batch) -> float:
    """The bound in nats per character, roughly: of every second window."""
    tokens, learnt = batch.tokens[::2], batch.learnt.expand_as(batch.tokens)[::2]
    return bound_in_units(model, tokenizer, tokens, learnt, 1)["bound, nats per character"]


def measure_text(model: Steerling, tokenizer: Tokenizer, rest: Stream, n: int = 200
                 ) -> dict[str, float]:
    """Measure a model on at most n windows, spread over a held-out stream.

    Returns the likelihood bound in three units. Each window stands alone, so its first block is
    predicted from nothing. If some concept is in some of the windows' chunks but not in all, the
    detection and the contribution of concepts are measured, too.
    """
    C, T = model.config.n_concepts, model.config.block_size
    n = min(n, len(rest.tokens) // T)
    tokens, chunks, labels, learnt = cut(rest, spread(rest, n, T), T)
    found = bound_in_units(model, tokenizer, tokens, learnt, 2)
    labels = labels.where(labels < C, -1)  # without concepts that the model lacks
    stream = Stream(tokens.flatten(), chunks.flatten(), labels, learnt.flatten())
    named = torch.zeros(n * T, dtype=torch.bool)
    clean, uniform = (look(model, stream, named, t, n) for t in (0, None))
    if (clean.labels.any(0) & ~clean.labels.all(0)).any():
        area, left_out = detection(clean.present, clean.labels)
        found |= {"detection: macro AUC": area,
                  "... concepts left out: in no chunk, or in all": left_out,
                  "contribution: known + discovered (Eq. 22)": sum(contribution(uniform.parts)[:2])}
    return found


# ---- the table -----------------------------------------------------------------------------------


def evaluate(folder: str | None, device: str = "auto") -> dict[str, float]:
    """Every measure of the model in a folder (None: the bundled one), with a line on stderr for
    each group of them. Raises as `load` does."""
    model, tokenizer = load(folder, device, torch.float32)
    name = folder or "the bundled model"
    if model.config.n_concepts != len(CONCEPTS):
        raise ValueError(f"{name} was not trained on the tiny world's stories; its "
                         f"{model.config.n_concepts} concepts are not the world's")
    groups: list[tuple] = [("language", language, 100), ("likelihood", likelihood, 100),
                           ("concepts", concepts, 128, 200_000), ("attribution", written, 40),
                           ("steering", steering, 8), ("resemblance", resemblance, 40)]
    found: dict[str, float] = {}
    for group, measure, *sizes in groups:
        print(f"{name}: {group} ...", end=" ", file=sys.stderr, flush=True)
        started = time.monotonic()
        found |= measure(model, tokenizer, *sizes)
        print(f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """Print measures, their targets, the 8B's values, and a column per model, as Markdown."""
    print("| measure | target | 8B |", " | ".join(columns), "|")
    print("|---|---|---|" + "---|" * len(columns))
    for name, (unit, target, paper) in MEASURES.items():
        cells = [unit.format(measured[name]) for measured in columns.values()]
        print("|", " | ".join([name, target, paper, *cells]), "|", flush=True)
