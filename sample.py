"""Write text with a Steerling checkpoint: the bundled tiny model, or the full 8B from a folder.

    python sample.py --prompt "The old sailor"
    python sample.py --prompt "The old sailor" --steer space=8
    python sample.py --prompt "The old sailor" --explain
    python sample.py --find sea
    python sample.py --model guidelabs/steerling-8b --prompt "Light travels" --max-new-tokens 256
    echo "The old sailor" | python sample.py --temperature 0
"""

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from steerling_min import Steering, Steerling, Tokenizer, load, log_likelihood, unmask
from steerling_min.attribution import promoted
from steerling_min.files.cli import Parser, one_line_errors, printable
from steerling_min.files.config_json import GENERATION, read_generation
from steerling_min.files.labels import GET_LABELS, Label, Labels, load_labels
from steerling_min.files.loading import SMALL, find_checkpoint, find_labels
from steerling_min.files.writing import replacing, target
from steerling_min.sampling import Options
from steerling_min.steering import SUPPRESS
from steerling_min.unmasking import Step
from steerling_min.views.animation import animation
from steerling_min.views.explain import explain, print_explanation
from steerling_min.views.page import page
from steerling_min.views.resemblance import (print_resemblances, resemblances, texts_of_file,
                                             texts_of_world)
from steerling_min.views.watch import live, watch

SHOWING = ("explain", "json", "html", "svg", "resembles")  # options that show concepts' names
# --find and --score write no text: what they have a use for.
MODEL = {"model", "device", "dtype", "quantize"}
FIND, SCORE = {"find", "discovered", "labels", *MODEL}, {"score", "prompt", "chat", *MODEL}
MOST = 20  # concepts that --find lists
# Where neither the command line nor the model says more. None: entropy sampling.
DEFAULTS = {"max_new_tokens": 128, "temperature": None, "top_p": Options.top_p,
            "repetition_penalty": Options.repetition_penalty, "allow_eos": False, "align": True}


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    add = p.add_argument_group("writing", "A model has defaults of its own where it says so in "
                               f"its folder's {GENERATION}.").add_argument
    add("--prompt", metavar="TEXT", help="what to continue; else standard input is read")
    add("--chat", action="store_true", help="the prompt is a message to an instruct model")
    add("--max-new-tokens", type=int, metavar="N", help=f"tokens to write, at most (default: "
        f"{DEFAULTS['max_new_tokens']}, or what the context has room for)")
    add("--num-samples", type=int, default=1, metavar="N",
        help="texts to write; the second is what --seed SEED+1 alone would give")
    add("--seed", type=int, help="of the draws (default: a random one, printed)")
    add("--steps", type=int, metavar="N", help="denoising steps in all (default: one per token)")
    add("--threshold", type=float, metavar="P",
        help="instead of --steps: commit all positions at least this confident, 0 to 1")
    add("--temperature", type=float, metavar="X", help="fixed temperature, 0 = greedy; switches "
        "off entropy sampling, in which each token's entropy sets it")
    add("--top-p", type=float, metavar="P",
        help=f"nucleus of every draw (default: {DEFAULTS['top_p']})")
    add("--repetition-penalty", type=float, metavar="X", help="makes tokens that the text "
        f"already has less likely; 1 = off (default: {DEFAULTS['repetition_penalty']})")
    add("--allow-eos", action=argparse.BooleanOptionalAction, help="let the text end by "
        "itself (default: no; with --order global always)")
    add("--order", choices=["window", "global"], default="window",
        help="fill window by window, or the surest position of all (default: window)")
    add("--align", action=argparse.BooleanOptionalAction, help="cut windows at the edges of "
        "attention blocks, instead of counting them from the prompt's end (default: yes)")

    add = p.add_argument_group("concepts").add_argument
    add("--steer", action="append", default=[], metavar="CONCEPT=STRENGTH",
        help="by name or number, several times; above 0: bring it out, so many logits strong (8 is "
        "usual), until 32 tokens are written; below 0: keep it out to the end (-4). A group, by "
        "its name or as A+B, is steered along the sum of its directions")
    add("--suppression", type=float, default=SUPPRESS, metavar="X", help="for --steer below 0: the "
        "logits also taken off the token that the concept promotes most, and off other tokens in "
        f"proportion. Of a group the first concept counts (default: {SUPPRESS:g})")
    add("--explain", action="store_true", help="what each token is due to")
    add("--find", metavar="WORDS", help="write nothing; search the known concepts: by their "
        "labels, else by a token that they promote; or a number")
    add("--discovered", action="store_true", help="with --find: the discovered concepts as well")
    add("--labels", type=Path, metavar="FILE", help="names of the concepts, .csv or .parquet "
        "(default: STEERLING_CONCEPTS_PATH, else concept_labels beside the checkpoint, else, for "
        "the 8B, in the hub's cache)")

    add("--resembles", type=Path, nargs="?", const=True, metavar="FILE", help="the training "
        "chunks that each chunk of the (first) text is most like: FILE's, plain text or "
        ".jsonl as for train_tiny.py --text (default: the tiny world's stories)")

    add = p.add_argument_group("output").add_argument
    add("--watch", action="store_true", help="see the text being unmasked")
    add("--json", action="store_true", help="text and explanation as one JSON object")
    add("--html", type=Path, metavar="FILE", help="write a page to explore the (first) text in: "
        "each token's concepts, inputs and step (tracing inputs takes a while)")
    add("--svg", type=Path, metavar="FILE",
        help="write an animation of the (first) text's unmasking")
    add("--score", action="append", metavar="TEXT", help="write nothing; a lower bound on the "
        "log-likelihood of TEXT after the prompt, in nats; several times to compare")

    add = p.add_argument_group("model").add_argument
    add("--model", metavar="FOLDER", help="checkpoint folder, or a hub id that has been downloaded "
        "(default: the bundled tiny model)")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu; for a small model cpu) "
        "or a name")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: bfloat16 on cuda, else float32)")
    add("--quantize", choices=["int8"],
        help="keep each weight in one byte: the 8B on a GPU of 16 GB")
    add("--compile", action="store_true", help="torch.compile the blocks: slow to start, faster "
        "after that")
    return p


def parse_args() -> argparse.Namespace:
    """The arguments, checked as far as that needs no model; the prompt read where it is piped in.
    """
    p = parser()
    args = p.parse_args()
    given = p.given(args).keys()
    for flag, others in ("find", given - FIND), ("score", given - SCORE), ("json", {"watch"}):
        for other in sorted(given & others) if flag in given else ():
            p.error(f"--{flag} and --{other.replace('_', '-')} exclude each other: give one")
    away = any("=-" in flag for flag in args.steer)
    for ok, wrong in (
            (args.num_samples >= 1, f"--num-samples {args.num_samples}: must be at least 1"),
            (args.find is None or args.find.strip(),
             "--find: give words to look for, or a concept's number"),
            ("find" in given or not args.discovered, "--discovered is for --find: give both"),
            ("" not in (args.score or []), "--score: the text to score is empty"),
            (args.suppression >= 0, f"--suppression {args.suppression:g}: must be 0 or more"),
            (away or "suppression" not in given, "--suppression is for a --steer below 0"),
            (args.order == "window" or not args.align and args.allow_eos is not False,
             "--order global has no windows to --align, and cannot take --no-allow-eos")):
        if not ok:
            p.error(wrong)
    files = [target(file) for file in (args.html, args.svg) if file]
    if len(files) > len(set(files)):
        p.error(f"--html and --svg would both write {args.svg}: give two files")
    try:
        if args.prompt is None and args.find is None:
            if sys.stdin is None or sys.stdin.isatty():
                p.error("no prompt: give --prompt TEXT, or pipe one in")
            text = sys.stdin.read().removeprefix("\ufeff")
            args.prompt = text.replace("\r\n", "\n").rstrip("\n")
        "".join([args.prompt or "", *(args.score or [])]).encode()  # bytes may be hidden in it
    except UnicodeError:
        p.error("the prompt, or a text to score, is not UTF-8")
    if args.seed is None:
        args.seed = random.randrange(2**31)
    return args


def complete(args: argparse.Namespace, model: Steerling, L: int) -> None:
    """Fill in what the command line left open after a prompt of L tokens: the model's own default,
    or ours."""
    defaults = DEFAULTS | read_generation(find_checkpoint(args.model), model.config)
    defaults["max_new_tokens"] = min(defaults["max_new_tokens"], model.config.block_size - L)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def labels_for(args: argparse.Namespace, model: Steerling) -> Labels:
    """Load the concepts' names, if an option needs them or --labels gives a file.

    Otherwise no label file is read, so that plain text needs neither the file nor its reader.
    """
    showing = any(getattr(args, flag) for flag in SHOWING)
    file = args.labels
    if file is None and (showing or args.steer or args.find is not None):
        file = find_labels(args.model)
    labels = load_labels(file, model.config)
    if showing:
        note_missing(labels)
    return labels


def note_missing(labels: Labels) -> None:
    """Where names are shown and there are none, say where to get them."""
    if not (labels.known or labels.unknown):
        print(f"no labels, so concepts go by their numbers; {GET_LABELS}", file=sys.stderr)


def steering_of(flags: list[str], labels: Labels, suppression: float) -> Steering | None:
    """CONCEPT=STRENGTH flags, combined: amplified above 0, unlearned below."""
    steering, seen = None, set[int]()
    for flag in flags:
        name, _, number = flag.rpartition("=")
        try:
            strength = float(number)
        except ValueError:
            strength = math.nan
        if not name or not math.isfinite(strength):
            raise ValueError(f"--steer {printable(flag)}: expected CONCEPT=STRENGTH, as in sea=8 "
                             "or 12=-7")
        concept, *group = ids = labels.resolve(name)
        for id in ids:
            if id in seen:
                raise ValueError(f"--steer {printable(flag)}: {printable(labels.name(id))} has a "
                                 "strength already")
        seen.update(ids)
        one = (Steering.amplify(ids, strength) if strength >= 0
               else Steering.unlearn(concept, tuple(group), strength, suppression,
                                     logit_units=True))
        steering = one if steering is None else steering + one
    return steering


def find(model: Steerling, tokenizer: Tokenizer, labels: Labels, query: str,
         discovered: bool) -> None:
    """Print the concepts that a query means, best first, and the tokens that each promotes.

    A query means the concept of that number, and the concepts whose labels have its words. If there
    are none, it means those that promote one of its words. Discovered concepts are left out unless
    asked for.
    """
    heads = {"known": labels.n_known}
    if discovered:
        heads["unknown"] = labels.n_unknown
    number = re.fullmatch("#?([0-9]{1,18})", query.strip())
    hits = [labels.label(int(number[1]), head) for head in heads
            if number and int(number[1]) < heads[head]]
    hits += [label for label in labels.find(query, discovered) if label not in hits]
    if not hits:
        hits = [labels.label(concept, head) for concept, head in
                promoting(model, tokenizer, query, heads)]
        if not hits:
            some = f"{len(labels.known)} of {labels.n_known} known concepts have labels"
            raise ValueError(f"--find {printable(query)}: no label has these words, and no concept "
                             "promotes one of them; " + (some if labels.known else GET_LABELS))
        print("no label has these words; these concepts promote them:")
    for label in hits[:MOST]:
        print_concept(model, tokenizer, labels, label)
    if len(hits) > MOST:
        print(f"and {len(hits) - MOST} more: rarer words find fewer")
    note_missing(labels)


def print_concept(model: Steerling, tokenizer: Tokenizer, labels: Labels, label: Label) -> None:
    """One line: a concept's number, name, group and description, and the tokens it promotes."""
    tokens, _ = promoted(model, label.id, 8, head=label.head)
    words = ", ".join(map(tokenizer.quoted, tokens.tolist()))
    kind = "discovered" if labels.unknown.get(label.id) == label else ""  # else the name says so
    about = ": ".join(part for part in (kind, label.group, label.description) if part)
    print(f"{label.id:>6}  {printable(label.name)}{f' ({printable(about, 160)})' if about else ''} "
          f"promotes {words}")


@torch.no_grad()
def promoting(model: Steerling, tokenizer: Tokenizer, query: str, heads: Iterable[str]
              ) -> list[tuple[int, str]]:
    """Find concepts that have a word of the query among the 8 tokens that they promote most.

    Returns at most MOST pairs of concept and head; those that promote a word most strongly come
    first. Words that are more than one token are skipped.
    """
    forms = {form for word in query.split() for form in (word, word.lower(), word.capitalize())}
    tokens = [ids[0] for ids in map(tokenizer.encode, sorted(forms | {" " + x for x in forms}))
              if len(ids) == 1]
    found: dict[tuple[int, str], float] = {}
    for head in heads:
        table = model.known_head if head == "known" else model.unknown_head
        concepts = torch.arange(table.n_concepts, device=model.device)
        for token in tokens:
            y = model.transformer.tok_emb(torch.tensor(token, device=model.device))  # (D,)
            strengths = table.alignment(concepts[:, None], y.expand(len(concepts), -1))[:, 0]
            for concept in strengths.topk(min(MOST, len(concepts))).indices.tolist():
                if token in promoted(model, concept, 8, head=head)[0]:
                    found[concept, head] = max(strengths[concept].item(),
                                               found.get((concept, head), -math.inf))
    return sorted(found, key=lambda concept: found[concept], reverse=True)[:MOST]


def score(model: Steerling, tokenizer: Tokenizer, prompt: list[int], texts: list[str]) -> None:
    """Print how likely each text is after the prompt."""
    for text in texts:
        ids = tokenizer.encode(text)
        nats = log_likelihood(model, prompt, ids)
        if not math.isfinite(nats):
            raise ValueError("--score: the likelihood is not a finite number: the model is broken")
        print(f"{nats:9.3f} nats, {nats / len(ids):7.3f} per token of {len(ids)}: {text!r}")


def peak_memory(device: torch.device) -> str:
    """The most memory held so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB peak GPU memory"
    try:
        import resource  # not on Windows
    except ImportError:
        return "peak memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 1e9:.2f} GB peak memory"


def write(model: Steerling, tokenizer: Tokenizer, labels: Labels, prompt: list[int],
          args: argparse.Namespace) -> None:
    """Generate, then print each text and one closing line of figures, or all of it as JSON."""
    new = args.max_new_tokens
    steering = steering_of(args.steer, labels, args.suppression)
    if args.resembles:  # read now what the text is to be compared with: it may not be readable
        corpus = texts_of_world(model) if args.resembles is True else texts_of_file(args.resembles)
    if args.compile:
        for block in model.transformer.blocks:  # one after the other: all are compiled once
            block.compile(dynamic=True)  # the window's and the cache's lengths vary
    began = time.perf_counter()
    run = unmask(model, [prompt] * args.num_samples, new, steps=args.steps,
                 temperature=args.temperature or 0.0, top_p=args.top_p,
                 entropy_sampling=args.temperature is None, confidence_threshold=args.threshold,
                 repetition_penalty=args.repetition_penalty, order=args.order,
                 allow_eos=args.allow_eos or args.order == "global",
                 align=args.align and args.order == "window", seed=args.seed, steering=steering)
    steps, counts = follow(watch(run, tokenizer, prompt, new) if args.watch else run, tokenizer,
                           args)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began

    last = steps[-1]
    samples = [{"text": tokenizer.decode(tokens), "unwritten": unwritten}
               for tokens, unwritten in zip(last.tokens.tolist(), last.unwritten.tolist())]
    if args.explain or args.json:
        for row, sample in enumerate(samples):
            sample |= explain(model, tokenizer, labels, steps, row, steering)
    if args.resembles:
        samples[0]["resembles"] = resemblances(model, tokenizer, labels, last.tokens[0].tolist(),
                                               corpus)
    if args.json:
        print(json.dumps({"prompt": args.prompt, "seed": args.seed, "steer": args.steer,
                          "samples": samples}))
    else:
        print_texts(samples, args)
        print(figures(model, counts, seconds)
              + (", slowed down for --watch" if args.watch and live(sys.stdout) else ""))
        if args.resembles:
            print_resemblances(samples[0]["resembles"])
    if args.html:
        print(f"tracing {new} tokens to their inputs, for {args.html} ...", file=sys.stderr)
    for file, draw in ((args.html, page), (args.svg, animation)):  # files last
        if file:
            with replacing(file) as partial:
                partial.write_text(draw(model, tokenizer, labels, steps, prompt,
                                        steering=steering), encoding="utf-8")
            print(f"wrote {file}", file=sys.stderr)


def follow(run: Iterable[Step], tokenizer: Tokenizer, args: argparse.Namespace
           ) -> tuple[list[Step], list[int]]:
    """Go through a run; return its steps, and how many tokens each wrote.

    If no explanation is asked for, only the last step is kept: all of them may take gigabytes. If
    Ctrl-C interrupts the run, its texts so far are printed.
    """
    steps: list[Step] = []
    counts = []
    try:
        for step in run:
            if not (args.explain or args.json or args.html or args.svg):
                steps.clear()
            steps.append(step)
            counts.append(sum(map(len, step.ids)))
    except KeyboardInterrupt:
        for row in steps[-1].tokens.tolist() if steps else []:  # --json promises JSON or nothing
            print("\n" + tokenizer.decode(row), file=sys.stderr if args.json else sys.stdout)
        raise
    return steps, counts


def print_texts(samples: list[dict], args: argparse.Namespace) -> None:
    """Each text, and what is to be said of it."""
    for sample in samples:
        print(sample["text"])
        print("---")
        if sample["unwritten"]:
            print(f"ended early: {sample['unwritten']} of {args.max_new_tokens} positions were "
                  "left unwritten")
        if args.explain:
            print_explanation(sample)


def figures(model: Steerling, counts: list[int], seconds: float) -> str:
    """One line: tokens, steps, seconds, speed, memory. counts: the tokens that each step wrote."""
    backbone = model.transformer
    read = len(counts) * sum(x.nbytes for x in [*backbone.parameters(), *backbone.buffers()])
    return (f"{sum(counts)} tokens in {len(counts)} steps, {seconds:.2f} s: "
            f"{sum(counts) / seconds:.1f} tok/s, {read / seconds / 1e9:.1f} GB/s of weights read, "
            f"{peak_memory(model.device)}")


def main() -> None:
    with one_line_errors("sample.py", memory="a shorter --max-new-tokens, fewer --num-samples or "
                         "--dtype bfloat16 need less"):
        args = parse_args()
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character gets "?"
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model, tokenizer = load(args.model, args.device, dtype, args.quantize == "int8")
        labels = labels_for(args, model)
        if args.find is not None:
            find(model, tokenizer, labels, args.find, args.discovered)
            return
        prompt = (tokenizer.encode_chat([("user", args.prompt)]) if args.chat
                  else tokenizer.encode(args.prompt))
        if args.score:
            score(model, tokenizer, prompt, args.score)
            return
        complete(args, model, len(prompt))
        size = sum(x.numel() for x in [*model.parameters(), *model.buffers()])
        if size < SMALL:
            torch.set_num_threads(1)  # more would only wait for each other
        print(f"model {args.model or 'tiny (bundled)'}: {size:,} parameters, "
              f"{args.quantize or str(model.dtype).removeprefix('torch.')}, on {model.device}; "
              f"seed {args.seed}; "
              + ("entropy sampling" if args.temperature is None
                 else f"temperature {args.temperature:g}"),
              file=sys.stderr if args.json else sys.stdout)
        write(model, tokenizer, labels, prompt, args)


if __name__ == "__main__":
    main()
