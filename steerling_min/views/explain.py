"""A written text explained token by token, for people and for programs."""

from collections.abc import Sequence

from ..attribution import attribute_text
from ..files.labels import Labels
from ..model import Steerling
from ..steering import Steering
from ..files.tokenizer import Tokenizer
from ..unmasking import Step

PARTS = ("known", "unknown", "epsilon")


def explain(model: Steerling, tokenizer: Tokenizer, labels: Labels, steps: Sequence[Step],
            row: int = 0, steering: Steering | None = None, top: int = 5) -> dict:
    """Everything that a run of `unmask` knows about one of its texts, ready for json.dumps.

    {"tokens": [one per written token, in the order of the text, of
        {"position", "id", "text", "step" (0 is the first), "confidence" (0 to 1),
         "logit" (before suppression, penalty and guidance),
         "concepts": the `top` known concepts that did most for or against it,
                     [{"id", "name", "contribution" (logits)}],
         "shares": {"known", "unknown", "epsilon"}: parts of the logit's absolute mass, 1 in all}],
     "shares": their mean over the tokens}
    """
    positions, found = attribute_text(model, steps, row, steering)
    when = {position: (number, confidence)
            for number, step in enumerate(steps)
            for position, confidence in zip(step.positions[row].tolist(),
                                            step.confidences[row].tolist())}
    logits = found.known.sum(1) + found.unknown.sum(1) + found.epsilon
    shares = found.shares()
    tokens = []
    for i, position in enumerate(positions.tolist()):
        order = found.known[i].abs().argsort(descending=True)[:top]
        tokens.append({
            "position": position, "id": found.tokens[i].item(),
            "text": tokenizer.decode([found.tokens[i].item()], specials=True),
            "step": when[position][0], "confidence": when[position][1], "logit": logits[i].item(),
            "concepts": [{"id": c, "name": labels.name(c), "contribution": x}
                         for c, x in zip(found.known_ids[i][order].tolist(),
                                         found.known[i][order].tolist())],
            "shares": dict(zip(PARTS, shares[i].tolist()))})
    return {"tokens": tokens, "shares": dict(zip(PARTS, shares.mean(0).tolist()))}


def print_explanation(explained: dict, top: int = 3) -> None:
    """A line per token: its step, its confidence, its text, and the concepts that did most."""
    width = max((len(repr(token["text"])) for token in explained["tokens"]), default=0)
    print(f"step  sure  {'token':{width}}  logit = known concepts (the {top} largest) + the rest")
    for token in explained["tokens"]:
        concepts = ", ".join(f"{c['name']} {c['contribution']:+.2f}"
                             for c in token["concepts"][:top])
        print(f"{token['step']:4}  {token['confidence']:4.0%}  {token['text']!r:{width}}  "
              f"{token['logit']:5.1f}  {concepts}")
    shares = ", ".join(f"{name} {share:.1%}" for name, share in explained["shares"].items())
    print(f"shares of the logits' absolute mass, mean over tokens: {shares}")
