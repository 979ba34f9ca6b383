"""Measure a model of the tiny world: its language, its concepts, its steering.

The grammar knows the truth, so each number is a share or a ratio with a known best value. Held-out
stories come from a seed that training never uses; samples are drawn with `generate`'s defaults,
windows aligned, one token per step, and no repetition penalty (stories repeat names on purpose).
"""

import random
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..attribution import attribute
from ..diffusion import corrupt, likelihood_bound, noise_levels
from ..files.loading import load
from ..model import Steerling
from ..steering import Steering
from ..files.tokenizer import Tokenizer
from ..unmasking import generate
from . import world
from .data import Batch, Stream, cut, endless_stories, has_concepts, pack
from .losses import log_absent
from .world import CONCEPTS, TOPICS, Story, hero_of, recognise, split_sentences

HELD_OUT = "held out for the evaluation"
SPECIALS = ("<|bos|>", "<|endofchunk|>", "<|endoftext|>")

MEASURES = {  # what is measured: its target
    "sentences in the grammar": "≥ 97 %",
    "hero's name kept": "≥ 90 %",
    "likelihood bound / entropy": "≤ 1.15",
    "bound, nats per token": "",
    "AUC of known concepts": "≥ 0.98",
    "... half of the tokens masked": "",
    "share through concepts": "≥ 85 %",
    "... through known concepts": "",
    "accuracy lost without epsilon, t = 0.15": "≤ 1 point",
    "... t = 0.5": "≤ 2 points",
    "... t uniform": "≤ 4 points",
    "cross-covariance of known and unknown": "≤ 1/3 of without its loss",
    "topic amplified, neutral prompt": "≥ 90 %",
    "... sentences in the grammar": "≥ 90 %",
    "topic amplified, other topic before": "≥ 85 %",
    "... sentences in the grammar, after the other topic": "≥ 80 %",
    "topic not amplified, either prompt": "about 12 %",
    "topic unlearned, same topic before": "≤ 5 %",
    "... sentences in the grammar, topic unlearned": "",
}


@torch.no_grad()
def held_out_loss(model: Steerling, batch: Batch) -> float:
    """The token loss on windows that training never reads, with the same noise every time."""
    config, device = model.config, model.device
    generator = torch.Generator().manual_seed(0)
    t = noise_levels(*batch.tokens.shape, config.diff_block_size, generator)
    noisy, masked = corrupt(batch.tokens, t, config.mask_token_id, generator)
    hidden = model.transformer(noisy.to(device))  # with epsilon, what is composed
    logits = model.transformer.lm_head(hidden[masked.to(device)])
    return cross_entropy(logits, batch.tokens[masked].to(device)).item()


def share(verdicts: list[bool]) -> float:
    """How many of them are true, 0 to 1; 0 where there is nothing to judge."""
    return sum(verdicts) / max(1, len(verdicts))


# ---- language ------------------------------------------------------------------------------------


def tokens_of(story: Story, tokenizer: Tokenizer) -> list[int]:
    return pack([story.chunks], tokenizer).tokens.tolist()


def write(model: Steerling, tokenizer: Tokenizer, prompt: list[int], n: int, seed: int,
          steering: Steering | None = None) -> tuple[str, str]:
    """Continue a prompt by n tokens; returns the prompt's text and the new text."""
    tokens = generate(model, [prompt], n, align=True, repetition_penalty=1.0, seed=seed,
                      steering=steering)[0].tolist()
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


def language(model: Steerling, tokenizer: Tokenizer, n: int) -> dict[str, float]:
    """Samples: are the sentences in the grammar, and does the hero keep the name?"""
    rng, right, kept = random.Random(HELD_OUT), [], []
    for i in range(n):
        prompt = tokens_of(world.write_story(rng), tokenizer)[: rng.randint(1, 100)]
        before, after = write(model, tokenizer, prompt, 128, i)
        chunks = new_chunks(before, after)
        right += [recognise(s) is not None for chunk in chunks for s in chunk]
        text = (before + after).split("<|bos|>")[1]  # up to the next story, if one was begun
        first, *later = text.split("<|endofchunk|>")
        heroes = [hero_of(s) for chunk in later for s in split_sentences(chunk)]
        kept += [hero == hero_of(split_sentences(first)[0]) for hero in heroes if hero]
    return {"sentences in the grammar": share(right), "hero's name kept": share(kept)}


def likelihood(model: Steerling, tokenizer: Tokenizer, n: int) -> dict[str, float]:
    """The bound on stories' -log p, given <|bos|>, and its ratio to the grammar's entropy.

    What the model loses to the grammar on the same stories is added to the exact entropy: the mean
    of -log p over n stories alone would be off by more than the model's loss.
    """
    rng, generator = random.Random(HELD_OUT), torch.Generator().manual_seed(0)
    lost, bounds, n_tokens = [], [], 0
    for _ in range(n):
        story = world.write_story(rng)
        tokens = torch.tensor([tokens_of(story, tokenizer)], device=model.device)
        new = tokens.shape[1] - 1  # all but <|bos|>
        bound = likelihood_bound(model, tokens, 1, 8, generator).item() * new
        lost.append(bound + story.log_prob)
        bounds.append(bound)
        n_tokens += new
    return {"likelihood bound / entropy": 1 + fmean(lost) / world.entropy(),
            "bound, nats per token": sum(bounds) / n_tokens}


# ---- concepts ------------------------------------------------------------------------------------


def auc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a random positive scores above a random negative; ties count half.

    scores (n,), labels (n,) bool, with at least one of each.
    """
    positives, negatives = scores[labels], scores[~labels].sort().values
    below = torch.searchsorted(negatives, positives)               # negatives that score less
    not_above = torch.searchsorted(negatives, positives, right=True)
    return ((below + not_above).double().mean() / (2 * len(negatives))).item()


def covariance(a: Tensor, b: Tensor) -> Tensor:
    """Cross-covariance (D, D) of features (M, D)."""
    return (a - a.mean(0)).T @ (b - b.mean(0)) / (len(a) - 1)


@torch.no_grad()
def concepts(model: Steerling, stream: Stream, n: int) -> dict[str, float]:
    """Detection, share, the weight of epsilon, and independence, on n held-out windows."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    T, C = config.block_size, config.n_concepts
    rows: dict[str, list] = {}

    def add(name, *values):
        rows.setdefault(name, []).append(values)

    for start in range(0, n, 8):
        batch = cut(stream, torch.arange(start, start + 8) * T, T)
        uniform = noise_levels(8, T, config.diff_block_size, generator)
        for name, t in (("clean", 0.0), ("0.15", 0.15), ("0.5", 0.5), ("uniform", None)):
            level = uniform if t is None else torch.full((8, T), t)
            noisy, masked = corrupt(batch.tokens, level, config.mask_token_id, generator)
            out = model(noisy.to(model.device))
            if name in ("clean", "0.5"):
                logits = model.known_head.logits(out.hidden).cpu()
                add("p " + name, -log_absent(logits, batch.chunks, len(batch.labels)),
                    has_concepts(batch.labels, C))
            if name == "clean":
                continue
            y = batch.tokens[masked].to(model.device)
            without_epsilon = model.transformer.lm_head((out.known + out.unknown)[masked])
            add("right " + name, out.logits[masked].argmax(-1) == y,
                without_epsilon.argmax(-1) == y)
            if name == "uniform":
                add("mass", attribute(model, out.hidden[masked], y).mass())
                add("features", out.known[masked], out.unknown[masked])
    found = {name: [torch.cat(x) for x in zip(*values)] for name, values in rows.items()}

    def macro_auc(scores, labels):
        return fmean(auc(scores[:, c], labels[:, c]) for c in range(C))

    def lost(right, without):
        return 100 * (right.float().mean() - without.float().mean()).item()
    known, unknown, epsilon = found["mass"][0].sum(0)
    everything = known + unknown + epsilon
    K, U = found["features"]
    cross = covariance(K, U).norm() / (covariance(K, K).norm() * covariance(U, U).norm()).sqrt()
    return {"AUC of known concepts": macro_auc(*found["p clean"]),
            "... half of the tokens masked": macro_auc(*found["p 0.5"]),
            "share through concepts": ((known + unknown) / everything).item(),
            "... through known concepts": (known / everything).item(),
            "accuracy lost without epsilon, t = 0.15": lost(*found["right 0.15"]),
            "... t = 0.5": lost(*found["right 0.5"]),
            "... t uniform": lost(*found["right uniform"]),
            "cross-covariance of known and unknown": cross.item()}


# ---- steering ------------------------------------------------------------------------------------


def topic_share(model: Steerling, tokenizer: Tokenizer, steer, neutral: bool, n: int,
                same: bool = False) -> tuple[float, float]:
    """Every topic, n times: the share of new chunks that carry it, of sentences in the grammar.

    A story's first sentence (neutral), or its first chunk, about the topic (same) or about another
    one, is continued by 32 tokens under steer(topic).
    """
    rng, carry, right = random.Random(HELD_OUT), [], []
    for topic in range(len(TOPICS)):
        for i in range(n):
            while True:
                story = world.write_story(rng)
                first = story.chunks[0]
                if neutral or (topic in first.concepts) == same:
                    break
            prompt = [tokenizer.bos_token_id]
            if neutral:
                prompt += tokenizer.encode(split_sentences(first.text)[0])
            else:
                prompt += tokenizer.encode(first.text) + [tokenizer.endofchunk_token_id]
            texts = write(model, tokenizer, prompt, 32, n * topic + i, steer(topic))
            for chunk in new_chunks(*texts):
                shown = [recognise(sentence) for sentence in chunk]
                right += [concepts is not None for concepts in shown]
                carry.append(any(topic in concepts for concepts in shown if concepts))
    return share(carry), share(right)


def steering(model: Steerling, tokenizer: Tokenizer, n: int) -> dict[str, float]:
    """Each topic amplified and unlearned, by the presets' defaults."""
    def topics(steer, **prompts):
        return topic_share(model, tokenizer, steer, n=n, **prompts)
    neutral, neutral_right = topics(Steering.amplify, neutral=True)
    other, other_right = topics(Steering.amplify, neutral=False)
    plain = [topics(lambda topic: None, neutral=neutral)[0] for neutral in (True, False)]
    unlearned, unlearned_right = topics(Steering.unlearn, neutral=False, same=True)
    return {"topic amplified, neutral prompt": neutral,
            "... sentences in the grammar": neutral_right,
            "topic amplified, other topic before": other,
            "... sentences in the grammar, after the other topic": other_right,
            "topic not amplified, either prompt": fmean(plain),
            "topic unlearned, same topic before": unlearned,
            "... sentences in the grammar, topic unlearned": unlearned_right}


# ---- the table -----------------------------------------------------------------------------------


def evaluate(folder: str | None, device: str = "auto") -> dict[str, float]:
    """Every measure of the model in a folder (None: the bundled one). Raises as `load` does."""
    model, tokenizer = load(folder, device, torch.float32)
    if model.config.n_concepts != len(CONCEPTS):
        raise ValueError(f"{folder} was not trained on the tiny world's stories; its "
                         f"{model.config.n_concepts} concepts are not the world's")
    stream = pack(endless_stories(HELD_OUT), tokenizer, enough=64 * model.config.block_size)
    return {**language(model, tokenizer, 100), **likelihood(model, tokenizer, 100),
            **concepts(model, stream, 64), **steering(model, tokenizer, 8)}


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """Print measures, their targets, and a column per model, as Markdown."""
    print("| measure | target |", " | ".join(columns), "|")
    print("|---|---|" + "---|" * len(columns))
    for name, target in MEASURES.items():
        cells = []
        for measured in columns.values():
            value = measured[name]
            if "%" in target or name.startswith(("share", "... through", "... sentences")):
                cells.append(f"{100 * value:.1f} %")
            elif "point" in target:
                cells.append(f"{value:.2f} points")
            else:
                cells.append(f"{value:.4f}")
        print("|", name, "|", target, "|", " | ".join(cells), "|", flush=True)
