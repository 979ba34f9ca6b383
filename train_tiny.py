"""Train Steerling from scratch: causal masked diffusion with a concept layer, on a laptop.

    python train_tiny.py                                    # the tiny world: an hour and a half
    python train_tiny.py --minutes 10 --batch 4             # what a student has
    python train_tiny.py --evaluate runs/tiny               # how good it is, as a table
    python train_tiny.py --text my.txt --out runs/mine      # on your own text
    python train_tiny.py --text my.txt --evaluate runs/mine # ... and how good that is
    python train_tiny.py --resume --out runs/mine           # go on after Ctrl-C, or for longer
    torchrun --nproc-per-node 2 train_tiny.py               # on several GPUs, or CPU processes

A step cuts windows from a stream of stories. Every diffusion block draws a noise level t, and each
of its tokens becomes <|mask|> with probability t. The block-causal model predicts the originals.
The token loss is taken at the masked positions only.

The model reads this one noisy sequence. So a block is predicted from earlier blocks that are noisy,
too. When text is written, earlier blocks are clean. (Block Diffusion puts a clean copy beside the
noisy sequence, which costs about twice as much.)

The concept layer learns at the same time. `steerling_min/training/losses.py` says what it learns,
and why. `steerling_min/training/objective.py` puts a step together.
"""

import dataclasses
import gc
import math
import os
import random
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from steerling_min import Config, Steerling
from steerling_min.config import TOKEN_IDS
from steerling_min.diffusion import corrupt, noise_levels, token_loss
from steerling_min.files.checkpoint import Unfilled, free_memory, tie
from steerling_min.files.cli import Parser, one_line_errors
from steerling_min.files.labels import Label, load_labels
from steerling_min.files.loading import SMALL, find_labels, load, pick_device
from steerling_min.files.tokenizer import Tokenizer
from steerling_min.files.writing import replacing
from steerling_min.iguide import rows
from steerling_min.model import initial_std
from steerling_min.training.atlas import Atlas
from steerling_min.training.curve import save_png, text_curve
from steerling_min.training.data import Stories, Stream, Texts, count_tokens, cut, places
from steerling_min.training.distributed import RANK, WORLD, agreed, gathered, put, shard, whole
from steerling_min.training.evaluate import (evaluate, held_out_loss, measure_text, per_character,
                                             print_table, write)
from steerling_min.training.losses import lift_weights
from steerling_min.training.muon import Muon
from steerling_min.training.objective import PARTS, Draws, Objective, draw_injections
from steerling_min.training.run import RUN, Run, parse_options, read_run

STEPS = 15_000       # unless --steps or --minutes says otherwise
VOCAB = 1024         # of a text
WARMUP = 100         # steps of linear warm-up, times half a cosine down to 0
EMBEDDING_STD = 0.2  # initial: of the tokens' and the known concepts' embeddings
CONCEPT_NORM = 3.0   # length of the known concepts' first embeddings
DROPOUT = 0.3        # residual dropout: the share of windows without epsilon (Guide Labs: some 0.1)
TEXT_DROPOUT = 0.1   # the same for --text, which takes longer to learn than the tiny world
# The share of tokens in the windows without epsilon that are to be predicted from known concepts
# alone. Otherwise the unknown features say all that must be said, and a word's concept stays silent
# at its own word. The labels of a text do not name its words, so this is done in the tiny world
# only. It is ours: the 8B is said to leave out a tenth of the known concepts instead.
ALONE = 0.2
# The share of the gradient of the concepts' logits that reaches the backbone. If all of it does, a
# model of a text learns no language, and then no concepts either. Example: Tiny Shakespeare, cut
# into 15 parts, each part a concept, after 3,500 steps. With all of the gradient it ended at 2.25
# nats per character and AUC 0.55; with a tenth, at 1.79 and 0.79.
PULL, TEXT_PULL = 1.0, 0.1
STEER_FROM = 0.3     # injections start after this part of training
LOG_EVERY = 100      # steps
PRINT_EVERY = 20     # seconds, where there is no terminal
SAVE_EVERY = 60      # seconds
EVALUATE = ("evaluate", "text", "concepts", "top", "seed", "device")  # what --evaluate reads

SIZES = {  # what differs from Config.tiny()
    "tiny": {},                                                                     # 1.4 M
    "small": {"n_layers": 8, "n_embd": 256, "n_head": 8},                           # 8 M
    "medium": {"n_layers": 12, "n_embd": 768, "n_head": 12, "n_kv_heads": 4,
               "block_size": 512, "diff_block_size": 32},                           # 105 M
    "large": {"n_layers": 24, "n_embd": 1536, "n_head": 16, "n_kv_heads": 4,
              "block_size": 1024, "diff_block_size": 64},                           # 824 M
}


def plain_step(model: Steerling, optimizer: torch.optim.Optimizer, tokens: Tensor,
               generator: torch.Generator | None = None) -> Tensor:
    """What learning the language is, and nothing else: hide tokens (B, T), predict them.

    Returns the loss: the mean over the masked tokens. The concept heads learn nothing from it, as
    long as epsilon makes the composed state the hidden state: see `losses.compose`.
    """
    B, T = tokens.shape
    t = noise_levels(B, T, model.config.diff_block_size, generator)              # (B, T)
    noisy, masked = corrupt(tokens, t, model.config.mask_token_id, generator)    # (B, T) each
    loss = token_loss(model(noisy).logits[masked], tokens, masked, t)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def take_step(objective: Objective, optimizer: torch.optim.Optimizer, draws: Draws,
              progress: float, lr: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """A training step with every loss, those of the concept layer included. Returns them by name.
    """
    with torch.autocast(draws.noisy.device.type, dtype, enabled=dtype != torch.float32):
        losses = objective(draws, progress)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return losses


def make_model(size: str, corpus: Stories | Texts) -> Steerling:
    """A model in a configuration that fits the corpus, on the meta device: it has no numbers yet.
    """
    C = len(corpus.labels) or 1
    tiny = Config.tiny(corpus.tokenizer.vocab_size)
    k = min(tiny.topk_known, C)
    ids: dict = {name: getattr(corpus.tokenizer, name, None) for name in TOKEN_IDS}
    with torch.device("meta"), Unfilled():
        return Steerling(dataclasses.replace(tiny, n_concepts=C, topk_known=k,
                                             topk_known_features=k, **ids, **SIZES[size]))


def add_concepts(model: Steerling, C: int) -> None:
    """Enlarge the known head to C concepts, if it has fewer. The model must have no numbers yet."""
    known = model.known_head
    if C > known.n_concepts:
        model.config = dataclasses.replace(model.config, n_concepts=C)
        known.n_concepts = C
        for module in (known.concept_predictor, known.concept_embedding):
            module.weight = nn.Parameter(torch.empty(
                rows(C, model.config.pad_multiple), model.config.n_embd, device="meta"))


def first_weight(name: str, shape: torch.Size, config: Config) -> Tensor:
    """A parameter as training begins with it."""
    if len(shape) == 1:
        return torch.ones(shape)
    # With embeddings of standard deviation 0.02 the first branches compute vectors smaller than
    # sqrt(norm_eps). Their norms damp such vectors instead of normalising them. With 0.2 the loss
    # after 300 steps was 3.5, not 4.6. The known concepts' embeddings get 0.2, too, so that they
    # count beside the tokens' (1,000 steps: 2.6, not 2.8); those of concepts that lift tokens are
    # then replaced by `start_concepts`.
    embeds = name in ("transformer.tok_emb.weight", "known_head.concept_embedding.weight")
    return torch.randn(shape) * (EMBEDDING_STD if embeds else initial_std(name, config.n_layers))


@torch.no_grad()
def fill(model: Steerling, device: torch.device, weight: Callable) -> Steerling:
    """Give a model its numbers on a device: weight(name, shape, config) for each parameter in turn.
    A process that holds a part of each parameter keeps only that part. Returns the model."""
    model.to_empty(device=device)
    tie(model)
    for name, p in model.named_parameters():
        put(p, weight(name, p.shape, model.config))
    return model


@torch.no_grad()
def start_concepts(model: Steerling, lift: Tensor, spoken: Tensor, n: int = 0) -> None:
    """Point the embedding of each new concept at the tokens that the concept lifts.

    The first n concepts are old; their embeddings stay. A new embedding gets the mean length of the
    old ones, or CONCEPT_NORM if n is 0. The rows of lift (P, V) belong to the concepts in spoken
    (P,). A concept that lifts nothing keeps its embedding.
    """
    directions = lift @ whole(model.transformer.tok_emb.weight)  # (P, D)
    given = directions.any(1) & (spoken >= n)
    embedding = whole(model.known_head.concept_embedding.weight).clone()
    length = embedding[:n].norm(dim=-1).mean() if n else CONCEPT_NORM
    embedding[spoken[given]] = length * F.normalize(directions[given], dim=-1)
    put(model.known_head.concept_embedding.weight, embedding)


def make_optimizer(model: Steerling) -> Muon:
    """Make the optimizer: Muon for the matrices of the blocks and of the unknown head, AdamW for
    the embeddings, the known head and the norms. Norms have no weight decay.

    Why AdamW: a step concerns few rows of the embeddings and of the known head, those of its tokens
    and concepts. AdamW gives each row step sizes of its own. A model of SMALL parameters or more
    gets AdamW alone. Its matrices are so large that making Muon's steps orthogonal would take as
    long as all the rest, or longer.
    """
    large = sum(p.numel() for p in model.parameters()) >= SMALL
    inside = {*model.transformer.blocks.parameters(), *model.unknown_head.parameters()}
    groups: list[dict] = [{"params": [], "orthogonal": orthogonal, "weight_decay": decay}
                          for orthogonal, decay in ((True, 0.1), (False, 0.1), (False, 0.0))]
    inner, outer, norms = groups
    for p in model.parameters():
        group = norms if p.dim() == 1 else inner if p in inside and not large else outer
        group["params"].append(p)
    # `train` sets the learning rate; fused: one pass over each parameter
    optimizer = Muon(groups, betas=(0.9, 0.95), fused=True)
    for group in groups:  # before the first step, so that it can be saved from the start
        for p in group["params"]:
            optimizer.state[p] = {"exp_avg": torch.zeros_like(p)}
            if not group["orthogonal"]:
                optimizer.state[p] |= {"step": torch.zeros((), device=p.device),
                                       "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up to the peak, times half a cosine that falls to 0 at the end."""
    return peak * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))


def draw_step(corpus: Stories | Texts, config: Config, step: int, progress: float,
              args: Namespace) -> Draws:
    """Everything random in a step, for this process's windows.

    Each process draws for all windows and takes every WORLD-th. All draws follow from seed, step
    and progress, so that a run can go on from any step. args: its seed, batch and without are read.
    """
    generator = torch.Generator()
    generator.manual_seed(random.Random(f"noise {args.seed} {step}").getrandbits(63))
    stream, starts = corpus.windows(step, args.batch, config.block_size)
    batch = cut(stream, starts, config.block_size)
    B, T = batch.tokens.shape
    t = noise_levels(B, T, config.diff_block_size, generator)
    noisy, masked = corrupt(batch.tokens, t * batch.learnt, config.mask_token_id, generator)
    dropout, share_alone = (DROPOUT, ALONE) if isinstance(corpus, Stories) else (TEXT_DROPOUT, 0.0)
    dropout = 0.0 if "dropout" in args.without else dropout
    dropped = torch.rand(B, generator=generator) < dropout
    concepts, strength = draw_injections(batch, corpus.injected, generator)
    alone = torch.rand(B, T, generator=generator) < share_alone
    labelled = stream.labels.shape[1] > 0
    steering = labelled and progress >= STEER_FROM and "steering" not in args.without
    mine = slice(RANK, None, WORLD)
    share = cut(stream, starts[mine], T)  # cut again: a process numbers the chunks of its windows
    # only at masked positions, as in sampling
    injected = concepts.masked_fill(~masked, -1)[mine] if steering else None
    return Draws(share, noisy[mine], masked[mine], t[mine], dropped[mine], alone[mine], injected,
                 strength[mine])


def prepare(model: Steerling, corpus: Stories | Texts, counted: Stream, args: Namespace, run: Run,
            device: torch.device) -> Objective:
    """Build the Objective of a run around its model. The model gets its numbers here: first ones,
    or those of --init. counted: a part of the corpus that says which tokens go with which concept.
    """
    config = model.config
    if RANK == 0 and not counted.labels.shape[1]:
        run.say("no labels: presence, alignment, teacher forcing and steering losses are off")
    spoken = torch.arange(config.n_concepts)
    if args.init:  # only those of its concepts that occur in the data: few of the 8B's 33,732
        spoken = torch.tensor(sorted(corpus.ids), dtype=torch.int64)
    counted = counted._replace(labels=places(spoken, config.n_concepts)[counted.labels])
    lift = lift_weights(count_tokens(counted, len(spoken), config.vocab_size)).to(device)
    spoken = spoken.to(device)
    objective = Objective(model, args.without, lift, spoken if args.init else None,
                          PULL if isinstance(corpus, Stories) else TEXT_PULL)
    for block in model.transformer.blocks:
        if args.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if args.compile:
            block.compile()
    # The blocks of a small model are sharded as one: a message for each would take more time.
    if WORLD > 1:
        small = sum(p.numel() for p in model.parameters()) < SMALL
        shard(objective, [] if small else model.transformer.blocks, getattr(torch, args.dtype),
              device)
    torch.manual_seed(args.seed)
    fill(model, device, run.stored_weight if args.init or args.resume else first_weight)
    if not args.resume:
        start_concepts(model, lift, spoken, len(run.labels.all_known()))
    return objective


def train(objective: Objective, corpus: Stories | Texts, args: Namespace, run: Run) -> list[dict]:
    """Train until `args.steps` steps or `args.minutes` minutes are over, or the run is asked to
    stop; returns the loss curve.

    Every schedule but the warm-up follows the progress, from 0 to 1. All processes log and save,
    since each has a part of the model; the first one prints and writes.
    """
    model = objective.model
    config, device, dtype = model.config, model.device, getattr(torch, args.dtype)
    optimizer = make_optimizer(model)
    run.begin(model, optimizer, corpus)
    recent: dict[str, list[Tensor]] = {}  # losses since the last line of the curve
    first, before, held_out = run.step, run.seconds, corpus.held_out(8, config.block_size)
    started = saved = time.monotonic()
    printed = -math.inf  # the first step shows at once that it works

    with run.stopping_between_steps():
        while (progress := agreed(run.stopped() or run.done(), device)) < 1:
            draws = draw_step(corpus, config, run.step, progress, args).to(device)
            losses = take_step(objective, optimizer, draws, progress,
                               learning_rate(run.step, progress, args.lr), dtype)

            now = time.monotonic()
            run.step, run.seconds = run.step + 1, before + now - started
            for name, loss in losses.items():
                recent.setdefault(name, []).append(loss.detach())
            logged = run.step % LOG_EVERY == 0
            shown = RANK == 0 and (logged or now - printed >= (1 if run.terminal else PRINT_EVERY))
            if logged or shown:  # the means since the last line of the curve
                means = {name: torch.stack(x).mean().item() for name, x in recent.items()}
            if logged:
                recent = {}
                with gathered(objective):
                    means["held out"] = held_out_loss(model, held_out)
                    if args.text:
                        means["nats per character"] = per_character(model, corpus.tokenizer,
                                                                    held_out)
                if not math.isfinite(sum(means.values())):
                    raise ValueError(
                        f"at step {run.step} the loss is not a number any more: try a smaller --lr "
                        f"than {args.lr}; what was saved before is intact")
                run.history.append({"step": run.step, **means})
            if shown:
                speed = (run.step - first) * args.batch * config.block_size / (now - started)
                left = run.seconds / 60 * (1 / run.done() - 1)
                said = ", ".join(f"{name} {loss:.3f}" for name, loss in means.items())
                run.say(f"step {run.step}: {speed:,.0f} tokens/s, {left:.1f} min left; {said}",
                        passing=not logged)
                printed = now
            if logged and agreed(now - saved > SAVE_EVERY, device):
                run.save(model, optimizer)
                saved = now
        run.save(model, optimizer)
    return run.history


def parse_args() -> Namespace:
    p = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of the run")
    p.add_argument("--minutes", type=float, help="train for this long instead of --steps")
    p.add_argument("--steps", type=int, help=f"training steps (default: {STEPS})")
    p.add_argument("--batch", type=int, default=8, help="windows per step, over all processes")
    p.add_argument("--lr", type=float, default=6e-3,
                   help="peak learning rate (default: 0.006; larger models want less)")
    p.add_argument("--seed", type=int, default=0, help="of weights, stories and noise")
    p.add_argument("--size", choices=SIZES, help="of the model (default: tiny)")
    p.add_argument("--init", metavar="MODEL", help="start from this checkpoint, with its "
                   "tokenizer and its concepts; those of the text that it does not know are added "
                   "(a smaller --lr forgets less: 0.001 for the bundled model)")
    p.add_argument("--text", type=Path, nargs="+", metavar="FILE",
                   help="train on these files: plain text, each one stream with its line breaks; "
                        'or .jsonl, each line a chunk {"text": "...", "concepts": ["name", ...]} '
                        '(concepts are optional; neighbours with one "document" belong together), '
                        'or a conversation {"messages": [{"role": ..., "content": ...}, ...]}. The '
                        "last tenth is held out; of labelled lines, a tenth drawn from all over")
    p.add_argument("--concepts", type=Path, metavar="FILE",
                   help="names of the concepts in --text shard.parquet (FineWeb Atlas)")
    p.add_argument("--top", type=int, default=64, metavar="N",
                   help="learn the N most frequent of its concepts of each type (default: 64)")
    p.add_argument("--vocab", type=int, default=VOCAB, metavar="N",
                   help=f"largest vocabulary to learn from --text (default: {VOCAB})")
    p.add_argument("--without", nargs="+", choices=PARTS, default=[], metavar="PART",
                   help="leave parts out: " + "; ".join(f"{k}: {v}" for k, v in PARTS.items()))
    p.add_argument("--resume", action="store_true",
                   help="go on with the run in --out, with its own options. A larger total in "
                        "--steps or --minutes makes it longer: its schedules then go on as if that "
                        "had been planned from the start")
    p.add_argument("--device", default="auto", help="auto (cuda, else cpu; with --evaluate as "
                   "sample.py) or a name")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                   help="of the computation; the weights stay float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument("--recompute", action="store_true", help="keep no block's activations for the "
                   "backward pass, compute them again: far less memory, a third more time")
    p.add_argument("--evaluate", nargs="*", metavar="FOLDER",
                   help="train nothing; measure these models (default: the bundled one), with "
                        "--text on what was held out of it")
    args = parse_options(p)
    if not 0 <= RANK < WORLD:
        p.error("RANK and WORLD_SIZE, which torchrun sets, must be a number and a larger one")
    given = p.given(args)
    for name, ok, supported in (
            *((name, args.evaluate is None, "for training, and --evaluate trains nothing")
              for name in given if name not in EVALUATE),
            ("steps", args.steps is None or args.steps >= 1, "at least 1"),
            ("minutes", args.minutes is None or 0 < args.minutes < math.inf, "above 0"),
            ("lr", 0 < args.lr < 1, "above 0 and below 1"),
            ("top", args.top >= 1, "at least 1"),
            ("seed", 0 <= args.seed < 2**63, "0 to 2^63 - 1"),
            ("out", args.resume or args.out != Path(), "a folder of the run's own"),
            ("size", not (args.size and args.init), "the model of --init has its own"),
            ("vocab", "vocab" not in given or args.text and not args.init,
             "for --text only, and the model of --init has its own"),
            ("top", "top" not in given or args.concepts, "for --concepts only"),
            ("batch", args.batch >= 1 and args.batch % WORLD == 0,
             f"a positive multiple of the {WORLD} processes")):
        if not ok:
            p.error(f"--{name} {getattr(args, name)}: {supported}")
    if (args.concepts is not None) != any(file.suffix.lower() == ".parquet"
                                          for file in args.text or []):
        p.error("--text shard.parquet has numbers for concepts, and --concepts FILE their names: "
                "give both")
    args.steps = args.steps or (STEPS if args.minutes is None else None)
    if not args.init:
        args.size = args.size or "tiny"
    return args


def main() -> None:
    with one_line_errors("train_tiny.py", memory="a smaller --batch or --size needs less; what was "
                         "saved before is intact"):
        args = parse_args()
        if args.evaluate is not None:
            folders = {name: name for name in args.evaluate} or {"bundled": None}
            if args.text:
                for folder in folders.values():
                    evaluate_on_text(folder, args)
            else:
                print_table({name: evaluate(folder, args.device)
                             for name, folder in folders.items()})
        else:
            with Run(args) as this:
                run(args, this)


def evaluate_on_text(folder: str | None, args: Namespace) -> None:
    """Print what a model makes of the part of --text that training held out, and what it writes."""
    model, tokenizer = load(folder, args.device, torch.float32)
    known = load_labels(find_labels(folder), model.config).all_known()
    corpus = make_corpus(args, model.config.block_size, tokenizer, known)
    print(f"{folder or 'the bundled model'}, on held-out text of {', '.join(map(str, args.text))}:")
    if folder and (Path(folder) / RUN).is_file() and (
            read_run(Path(folder))["data"] != corpus.fingerprint):
        print("(it was trained on other text, which may have had parts of this one)")
    rest = corpus.rest  # type: ignore[union-attr]  # with --text the corpus is no Stories
    if not known:  # then the text's concepts are not the model's
        rest = rest._replace(labels=rest.labels[:, :0])
    for name, x in measure_text(model, tokenizer, rest).items():
        print(f"{x:10.4f}  {name}")
    start, n = [tokenizer.bos_token_id], min(128, model.config.block_size - 1)
    for seed in range(3):
        print(f"--- sample {seed}", write(model, tokenizer, start, n, seed)[1], sep="\n")


def make_corpus(args: Namespace, T: int, tokenizer: Tokenizer | None = None,
                labels: Sequence[Label] = ()) -> Stories | Texts:
    """What to train on, in windows of T; tokenizer and labels are those of a model, if any."""
    if not args.text:
        return Stories(args.seed, tokenizer, labels)
    if args.concepts:
        return Atlas(args.text, args.seed, T, args.vocab, tokenizer, labels, args.concepts,
                     args.top)
    return Texts(args.text, args.seed, T, args.vocab, tokenizer, labels)


def run(args: Namespace, this: Run) -> None:
    """Set up, train, and show how it went."""
    device = pick_device(args.device, ("cuda", "cpu"))  # no Mac's GPU was tried
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    model, tokenizer, labels = this.start_from(args.init)
    T = (model.config.block_size if model else
         SIZES[args.size].get("block_size", Config.tiny().block_size))
    corpus = make_corpus(args, T, tokenizer, labels)
    model = model or make_model(args.size, corpus)
    add_concepts(model, len(corpus.labels))
    require_room(args.batch // WORLD, model.config, device, args.recompute)
    if RANK == 0:
        size = sum(p.numel() for p in model.parameters())
        this.say(f"{size:,} parameters on {WORLD} x {device}; {args.batch} windows of {T} tokens a "
                 f"step; vocabulary {corpus.tokenizer.vocab_size}; {len(corpus.labels)} known "
                 "concepts")
    counted, _ = corpus.windows("counted", 200, T)
    history = train(prepare(model, corpus, counted, args, this, device), corpus, args, this)
    if RANK == 0:
        if len(history) > 1:
            this.say(text_curve(history))
        if history:
            alone, held_out = token_entropy(counted.tokens), history[-1]["held out"]
            if held_out > 0.9 * alone:
                this.say("too short a run to judge its texts, concepts or explanations: held out "
                         f"{held_out:.2f}; a model that knows only token frequencies has "
                         f"{alone:.2f}")
            try:
                with replacing(args.out / "loss.png") as partial:
                    save_png(history, partial)
            except ImportError:
                print("matplotlib would draw this as loss.png: pip install -e '.[notebook]'")
        more = "" if this.stopped() else ", with more --steps or --minutes"
        this.say(f"saved to {args.out}, step {this.step:,}; --resume goes on{more}")
    # The objects that shard the model survive in reference cycles, and their threads keep running.
    # Such a thread aborts a process that ends before it does. So collect the objects first.
    if WORLD > 1:
        gc.collect()
        dist.destroy_process_group()
    if this.stopped():
        sys.exit(128 + this.stopped())


def token_entropy(tokens: Tensor) -> float:
    """The loss per token (n,), in nats, of a model that knows only token frequencies."""
    return torch.distributions.Categorical(tokens.bincount().float()).entropy().item()


def require_room(B: int, config: Config, device: torch.device, recompute: bool) -> None:
    """Raise ValueError where a step's B windows cannot fit on the device: each layer keeps at least
    ten numbers as wide as its state, in float32, until the backward pass; or, to compute the others
    again, one."""
    need = (4 if recompute else 40) * B * config.block_size * config.n_layers * config.n_embd
    if need > (free := free_memory(device)):
        raise ValueError(f"--batch {B * WORLD}: a step takes over {need / 1e9:.0f} GB; "
                         f"{free / 1e9:.0f} GB are free on {device}")


if __name__ == "__main__":
    main()
