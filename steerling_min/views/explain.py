"""A written text explained token by token and chunk by chunk, for people and for programs."""

from collections.abc import Sequence
from functools import cache

from ..attribution import attribute_text, chunk_attribution, promoted
from ..files.cli import printable
from ..files.labels import Labels
from ..model import Steerling
from ..steering import Steering
from ..files.tokenizer import Tokenizer
from ..unmasking import Step

PARTS = ("known", "discovered", "epsilon")  # discovered: of the head that the code calls unknown
COLUMNS = 100                               # of a printed line
# Background colours for what a token was written by: one behind dark letters, one behind light
# letters. Of two colours one is always the lighter. So they can be told apart in grey, and by
# people who do not see red or green.
COLOURS = {
    "content": ("#4797e5", "#0063ac"), "entity": ("#e8922c", "#794600"),
    "tone": ("#5fce8c", "#00502a"), "document": ("#feb4f6", "#5b1c58"),
    "known": ("#b96b6c", "#a6595a"),  # by a known concept of no such type
    "discovered": ("#ebf5ff", "#161e27"), "epsilon": ("#e6e1bf", "#2f2a0d")}


def explain(model: Steerling, tokenizer: Tokenizer, labels: Labels, steps: Sequence[Step],
            row: int = 0, steering: Steering | None = None, top: int = 5) -> dict:
    """Everything that a run of `unmask` knows about one of its texts, ready for json.dumps.

    {"tokens": [one per written token, in the order of the text, of
        {"position", "id", "text", "step" (1 is the first), "confidence" (0 to 1),
         "logit" (before suppression, penalty and guidance),
         "parts": {"known", "discovered", "epsilon"}, in logits: their sum is the logit,
         "shares": the same, as sizes over the sum of the three sizes,
         "written_by": the largest part; if that is known, the type of its largest concept,
         "concepts": the `top` concepts of each head that did most for or against it, the largest
                     first: [{"head" ("known" or "discovered"), "id" (counted within its head),
                     "name" (without a label: tokens that it raises or, where it spoke against the
                     token, lowers), "type" (where a label says it), "contribution" (logits)}]}],
     "chunks": [one per stretch of written tokens between <|endofchunk|>s, of
        {"start", "end" (positions, the end is not in it), "text",
         "concepts": the same as above with a signed "share" for a contribution, and "epsilon": the
                     share of epsilon (`chunk_attribution`)}],
     "shares": the mean of the tokens' shares}
    """
    @cache
    def about(head: str, concept: int, against: bool) -> dict:
        """Who a concept is. A discovered one without a label goes by three tokens that it raises
        or, where it spoke against a token, by three that it lowers."""
        label, name = getattr(labels, head).get(concept), labels.name(concept, head)
        if head == "unknown" and not label:
            best = promoted(model, concept, 6, head)[against].tolist()
            words = dict.fromkeys(tokenizer.quoted(i).replace("' ", "'") for i in best)
            name = " ".join(["~ not" if against else "~", *[*words][:3]])  # ' a' and 'a' are one
        type = {"type": label.type} if label and label.type else {}
        return {"head": "known" if head == "known" else "discovered", "id": concept, "name": name,
                **type}

    def largest(known, unknown, measure: str) -> list[dict]:
        """The top of each head's (concept, value) pairs, together."""
        found = [{**about(head, concept, value < 0), measure: value}
                 for head, pairs in (("known", known), ("unknown", unknown))
                 for concept, value in sorted(pairs, key=lambda pair: -abs(pair[1]))[:top]]
        return sorted(found, key=lambda concept: -abs(concept[measure]))

    positions, found = attribute_text(model, steps, row, steering)
    when = {position: (number, confidence)
            for number, step in enumerate(steps, start=1)
            for position, confidence in zip(step.positions[row].tolist(),
                                            step.confidences[row].tolist())}
    pieces = tokenizer.pieces(steps[-1].tokens[row].tolist())
    shares = found.shares()
    tokens = []
    for i, (position, parts) in enumerate(zip(positions.tolist(), found.parts().tolist())):
        known, unknown = (list(zip(ids[i].tolist(), values[i].tolist())) for ids, values in (
            (found.known_ids, found.known), (found.unknown_ids, found.unknown)))
        writer = PARTS[parts.index(max(parts))]
        if writer == "known":
            best = about("known", max(known, key=lambda pair: pair[1])[0], False)
            writer = best["type"] if best.get("type") in COLOURS else "known"
        tokens.append({
            "position": position, "id": found.tokens[i].item(), "text": pieces[position],
            "step": when[position][0], "confidence": when[position][1],
            "logit": sum(parts), "parts": dict(zip(PARTS, parts)),
            "shares": dict(zip(PARTS, shares[i].tolist())), "written_by": writer,
            "concepts": largest(known, unknown, "contribution")})
    ends, chunks = found.tokens == tokenizer.endofchunk_token_id, []
    for number in range(int(ends.sum()) + 1):
        rows = ((ends.cumsum(0) == number) & ~ends).nonzero()[:, 0]
        if len(rows):
            inside, chunk = positions[rows].tolist(), chunk_attribution(found[rows])
            chunks.append({
                "start": inside[0], "end": inside[-1] + 1,
                "text": "".join(pieces[position] for position in inside),
                "concepts": largest(chunk.known.items(), chunk.unknown.items(), "share"),
                "epsilon": chunk.epsilon})
    return {"tokens": tokens, "chunks": chunks, "shares": dict(zip(PARTS, shares.mean(0).tolist()))}


def legend(explained: dict) -> dict[str, str]:
    """What the tokens were written by, in the order of COLOURS: each name, and how to say it."""
    found = {token["written_by"] for token in explained["tokens"]}
    return {name: name if name in PARTS else f"known: {name}" for name in COLOURS if name in found}


def print_explanation(explained: dict, top: int = 3) -> None:
    """A line per token, a block per chunk, and the shares of the three parts."""
    def fit(start: str, concepts: list[dict], measure: str, form: str) -> str:
        """A line with as many of the concepts as there is room for."""
        items = [f" {x[measure]:{form}}" for x in concepts]
        items = [printable(x["name"])[: COLUMNS - len(start) - len(value)] + value
                 for x, value in zip(concepts, items)]
        while len(start) + len(", ".join(items)) > COLUMNS:
            items.pop()
        return start + ", ".join(items)

    named = {"<|endofchunk|>": "chunk's end", "<|endoftext|>": "text's end",
             "": "..."}  # the character is not whole yet
    shown = [named.get(x["text"], repr(x["text"])[:20]) for x in explained["tokens"]]
    width = max(map(len, shown), default=0)
    print("logit = known concepts + discovered ones + epsilon; then those that did most, in logits")
    print(f"step  sure  {'token':{width}}  logit = known  disc.   eps.")
    for text, token in zip(shown, explained["tokens"]):
        known, *others = token["parts"].values()
        total = f"{known:5.1f}" + "".join(f" {'-' if x < 0 else '+'} {abs(x):4.1f}" for x in others)
        print(fit(f"{token['step']:4}  {token['confidence']:4.0%}  {text:{width}}  "
                  f"{token['logit']:5.1f} = {total}  ",
                  token["concepts"][:top], "contribution", "+.1f"))
    print("chunks: those that did most, in percent of the sizes of all single contributions")
    for number, chunk in enumerate(explained["chunks"], start=1):
        line = f"chunk {number}: {chunk['text'].strip()!r}"
        print(line if len(line) <= COLUMNS else line[: COLUMNS - 4] + " ...")
        for head in PARTS[:2]:
            print(fit(f"  {head:10}  ", [x for x in chunk["concepts"] if x["head"] == head],
                      "share", "+.1%"))
        print(f"  epsilon     {chunk['epsilon']:.1%}")
    shares = ", ".join(f"{name} {share:.1%}" for name, share in explained["shares"].items())
    print(f"shares of the three parts, mean over tokens: {shares}")
