"""Train Steerling from scratch: causal masked diffusion with a concept layer, on a laptop.

    python train_tiny.py                                    # the bundled model: under an hour
    python train_tiny.py --minutes 10 --batch 4             # what a student has
    python train_tiny.py --evaluate runs/tiny               # how good it is, as a table
    python train_tiny.py --text my.txt --out runs/mine      # on your own text
    python train_tiny.py --text my.txt --evaluate runs/mine # ... and how good that is
    torchrun --nproc-per-node 2 train_tiny.py               # on several GPUs, or CPU processes

One step: cut windows from a stream of stories, let every diffusion block draw a noise level t, turn
each of its tokens into <|mask|> with probability t, predict the originals with the block-causal
model; the token loss is taken at the masked positions only. The model reads this one noisy
sequence: a block is predicted from earlier blocks that are noisy too (Block Diffusion puts a clean
copy beside it, which costs about twice as much). When text is written, earlier blocks are clean.

The concept layer learns at the same time; `steerling_min/training/losses.py` says what, and why,
and `steerling_min/training/objective.py` puts a step together.
"""

import dataclasses
import gc
import math
import os
import random
import shutil
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from steerling_min import Config, Steerling
from steerling_min.config import TOKEN_IDS
from steerling_min.diffusion import corrupt, noise_levels, token_loss
from steerling_min.files.cli import Parser, one_line_errors
from steerling_min.files.config_json import config_to_dict, write_generation
from steerling_min.files.labels import Label, Labels, load_labels, write_labels
from steerling_min.files.loading import find_labels, load, pick_device
from steerling_min.files.tokenizer import RANK_FILE, Tokenizer
from steerling_min.files.writing import replacing
from steerling_min.training.atlas import Atlas
from steerling_min.training.curve import save_png, text_curve
from steerling_min.training.data import Stories, Texts, count_tokens, cut
from steerling_min.training.distributed import RANK, WORLD, agreed
from steerling_min.training.evaluate import (evaluate, held_out_loss, measure_text, per_character,
                                             print_table, write)
from steerling_min.training.losses import lift_weights
from steerling_min.training.objective import PARTS, Draws, Objective, draw_injections
from steerling_min.training.resume import STATE, load_state, save_state

STEPS = 7_000        # of the bundled model
WARMUP = 100         # steps until the peak learning rate; half a cosine down to 0 follows
EMBEDDING_STD = 0.2  # initial: of the tokens' and the known concepts' embeddings
CONCEPT_NORM = 3.0   # length of the known concepts' first embeddings
DROPOUT = 0.4        # residual dropout: the share of windows without epsilon (Guide Labs: some 0.1)
STEER_FROM = 0.3     # injections start after this part of training
LOG_EVERY = 100      # steps
SAVE_EVERY = 60      # seconds

SIZES = {  # what differs from Config.tiny()
    "tiny": {},                                                                     # 1.2 M
    "small": {"n_layers": 8, "n_embd": 256, "n_head": 8},                           # 8 M
    "medium": {"n_layers": 12, "n_embd": 768, "n_head": 12, "n_kv_heads": 4,
               "block_size": 512, "diff_block_size": 32},                           # 105 M
    "large": {"n_layers": 24, "n_embd": 1536, "n_head": 16, "n_kv_heads": 4,
              "block_size": 1024, "diff_block_size": 64, "factorize_rank": 128},    # 823 M
}


def plain_step(model: Steerling, optimizer: torch.optim.Optimizer, tokens: Tensor,
               generator: torch.Generator | None = None) -> Tensor:
    """What training is, and nothing else: hide tokens (B, T), predict them.

    Returns the loss: the mean over the masked tokens.
    """
    t = noise_levels(*tokens.shape, model.config.diff_block_size, generator)     # (B, T)
    noisy, masked = corrupt(tokens, t, model.config.mask_token_id, generator)    # (B, T) each
    loss = token_loss(model(noisy).logits[masked], tokens, masked, t)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def take_step(objective: Objective, optimizer: torch.optim.Optimizer, draws: Draws,
              progress: float, lr: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with everything that the concept layer learns from; returns the losses by name."""
    with torch.autocast(draws.noisy.device.type, dtype, enabled=dtype != torch.float32):
        losses = objective(draws, progress)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return losses


def make_model(size: str, corpus: Stories | Texts, seed: int) -> Steerling:
    """Random weights, in a configuration that fits the corpus."""
    torch.manual_seed(seed)
    C = len(corpus.labels) or 1
    tiny = Config.tiny(corpus.tokenizer.vocab_size)
    k = min(tiny.topk_known, C)
    ids = {name: getattr(corpus.tokenizer, name, None) for name in TOKEN_IDS}
    model = Steerling(dataclasses.replace(tiny, n_concepts=C, topk_known=k, topk_known_features=k,
                                          **ids, **SIZES[size]))
    # From embeddings of 0.02 the first branches compute vectors smaller than sqrt(norm_eps), which
    # their norms damp instead of normalising. With 0.2 the loss after 300 steps was 3.5, not 4.6.
    # The known concepts' embeddings are to matter beside them (1,000 steps: 2.6, not 2.8).
    nn.init.normal_(model.transformer.tok_emb.weight, std=EMBEDDING_STD)
    nn.init.normal_(model.known_head.concept_embedding.weight, std=EMBEDDING_STD)
    return model


@torch.no_grad()
def start_concepts(model: Steerling, lift: Tensor) -> None:
    """Let every known concept's embedding begin in the direction of the tokens that it lifts, of
    length CONCEPT_NORM. lift (C, V); a concept that lifts nothing is left as it is."""
    directions = lift @ model.transformer.tok_emb.weight  # (C, D)
    given = directions.any(1)
    embedding = model.known_head.concept_embedding.weight[: len(lift)]
    embedding[given] = CONCEPT_NORM * F.normalize(directions[given], dim=-1)


def make_optimizer(model: Steerling) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, not on the norms' weights."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    # `train` sets the learning rate; fused: one pass over each parameter
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up to the peak, times half a cosine that falls to 0 at the end."""
    return peak * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))


def draw_step(corpus: Stories | Texts, config: Config, step: int, progress: float,
              args: Namespace) -> Draws:
    """Everything random in a step, for this process's windows.

    Each process draws for all windows and takes every WORLD-th. All draws follow from seed, step
    and progress, so that a run can go on from any step.
    """
    generator = torch.Generator()
    generator.manual_seed(random.Random(f"noise {args.seed} {step}").getrandbits(63))
    stream, starts = corpus.windows(step, args.batch, config.block_size)
    batch = cut(stream, starts, config.block_size)
    B, T = batch.tokens.shape
    t = noise_levels(B, T, config.diff_block_size, generator)
    noisy, masked = corrupt(batch.tokens, t * batch.learnt, config.mask_token_id, generator)
    dropout = 0.0 if "dropout" in args.without else DROPOUT
    dropped = torch.rand(B, generator=generator) < dropout
    injected, strength = draw_injections(batch, corpus.injected, generator)
    steering = corpus.labels and progress >= STEER_FROM and "steering" not in args.without
    mine = slice(RANK, None, WORLD)
    share = cut(stream, starts[mine], T)  # cut again: a process numbers the chunks of its windows
    # as when text is written, only where masks stand
    injected = injected.masked_fill(~masked, -1)[mine] if steering else None
    return Draws(share, noisy[mine], masked[mine], t[mine], dropped[mine], injected, strength[mine])


def train(model: Steerling, corpus: Stories | Texts, args: Namespace) -> list[dict]:
    """Train until `args.steps` steps or `args.minutes` minutes are over; returns the loss curve.

    Every schedule but the warm-up follows `progress`, from 0 to 1.
    """
    config, device = model.config, model.device
    must_match = ("steps", "minutes", "batch", "lr", "seed", "without")  # when the run is resumed
    settings = {"config": config_to_dict(config), "text": [str(file) for file in args.text or []],
                **{name: getattr(args, name) for name in must_match}}
    optimizer = make_optimizer(model)
    step, elapsed, history = 0, 0.0, []
    if args.resume:
        step, elapsed, history = load_state(args.out, model, optimizer, settings)
    if args.compile:
        model.transformer.compile()
    counted, _ = corpus.windows("counted", 200, config.block_size)
    lift = lift_weights(count_tokens(counted, config.n_concepts, config.vocab_size)).to(device)
    if step == 0:
        start_concepts(model, lift)
    objective = Objective(model, args.without, lift)
    if dist.is_initialized():
        objective = nn.parallel.DistributedDataParallel(objective)
    held_out, first, recent = corpus.held_out(8, config.block_size), step, {}
    started = saved = printed = time.monotonic()
    before = elapsed

    while (progress := max(step / args.steps, agreed(elapsed, device) / (60 * args.minutes))) < 1:
        draws = draw_step(corpus, config, step, progress, args).to(device)
        losses = take_step(objective, optimizer, draws, progress,
                           learning_rate(step, progress, args.lr), args.dtype)

        step, now = step + 1, time.monotonic()
        elapsed = before + now - started
        for name, loss in losses.items():
            recent.setdefault(name, []).append(loss.detach())
        if RANK > 0:
            continue  # the first process prints and saves
        speed = (step - first) * args.batch * config.block_size / (now - started)
        when = f"{speed:,.0f} tokens/s, {elapsed / 60 * (1 / max(progress, 1e-9) - 1):.1f} min left"
        if step % LOG_EVERY == 0:
            means = {name: torch.stack(x).mean().item() for name, x in recent.items()}
            means["held out"], recent = held_out_loss(model, held_out), {}
            if args.text:
                means["nats per character"] = per_character(model, corpus.tokenizer, held_out)
            if not math.isfinite(sum(means.values())):
                raise ValueError(f"at step {step} the loss is not a number any more: try a smaller "
                                 f"--lr than {args.lr}; what was saved before is intact")
            history.append({"step": step, **means})
            print_line(step, means, when, "\n")
            if now - saved > SAVE_EVERY:
                save_state(args.out, model, optimizer, settings, step, elapsed, history)
                saved = now
        elif sys.stdout.isatty() and now - printed > 1:
            print_line(step, losses, when, "\r")
            printed = now
    if RANK == 0:
        save_state(args.out, model, optimizer, settings, step, elapsed, history)
    return history


def parse_args() -> Namespace:
    p = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of the run")
    p.add_argument("--minutes", type=float, help="train for so long instead of --steps")
    p.add_argument("--steps", type=int, help=f"training steps (default: {STEPS})")
    p.add_argument("--batch", type=int, default=8, help="windows of a step, of all processes")
    p.add_argument("--lr", type=float, default=6e-3,
                   help="peak learning rate (default: 0.006; larger models want less)")
    p.add_argument("--seed", type=int, default=0, help="of weights, stories and noise")
    p.add_argument("--size", choices=SIZES, default="tiny", help="of the model")
    p.add_argument("--text", type=Path, nargs="+", metavar="FILE",
                   help="train on these files: plain text, each one stream with its line breaks; "
                        'or .jsonl, each line a chunk {"text": "...", "concepts": ["name", ...]} '
                        '(concepts are optional; neighbours with one "document" belong together), '
                        'or a conversation {"messages": [{"role": ..., "content": ...}, ...]}. The '
                        "last tenth is held out; of labelled lines, a tenth drawn from all over")
    p.add_argument("--concepts", type=Path, metavar="FILE",
                   help="names of the concepts in --text shard.parquet (FineWeb Atlas)")
    p.add_argument("--top", type=int, default=64, metavar="N",
                   help="how many of its concepts, the most frequent of each type (default: 64)")
    p.add_argument("--vocab", type=int, default=1024, metavar="N",
                   help="tokens that are learnt from --text, at most (default: 1024)")
    p.add_argument("--without", nargs="+", choices=PARTS, default=[], metavar="PART",
                   help="leave parts out: " + "; ".join(f"{k}: {v}" for k, v in PARTS.items()))
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                   help="of the computation; the weights stay float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the backbone")
    p.add_argument("--evaluate", nargs="*", metavar="FOLDER",
                   help="train nothing; measure these models (default: the bundled one), with "
                        "--text on what was held out of it")
    args = p.parse_args()
    for name, ok, supported in (
            ("steps", args.steps is None or args.steps >= 1, "at least 1"),
            ("minutes", args.minutes is None or 0 < args.minutes < math.inf, "above 0"),
            ("lr", 0 < args.lr < 1, "above 0 and below 1"),
            ("top", args.top >= 1, "at least 1"),
            ("seed", 0 <= args.seed < 2**63, "0 to 2^63 - 1"),
            ("batch", args.batch >= 1 and args.batch % WORLD == 0,
             f"a positive multiple of the {WORLD} processes")):
        if not ok:
            p.error(f"--{name} {getattr(args, name)}: {supported}")
    if (args.concepts is not None) != any(file.suffix.lower() == ".parquet"
                                          for file in args.text or []):
        p.error("--text shard.parquet has numbers for concepts, and --concepts FILE their names: "
                "give both")
    args.steps = args.steps or (STEPS if args.minutes is None else math.inf)
    args.minutes = args.minutes or math.inf
    args.dtype = getattr(torch, args.dtype)
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
            run(args)


def evaluate_on_text(folder: str | None, args: Namespace) -> None:
    """Print what a model makes of the part of --text that training held out, and what it writes."""
    model, tokenizer = load(folder, args.device, torch.float32)
    named = load_labels(find_labels(folder), model.config)
    corpus = make_corpus(args, model.config.block_size, tokenizer,
                         [named.label(i) for i in range(model.config.n_concepts)])
    print(f"{folder or 'the bundled model'}, on held-out text of {', '.join(map(str, args.text))}:")
    for name, value in measure_text(model, tokenizer, corpus.rest).items():
        print(f"{value:10.4f}  {name}")
    start, n = [tokenizer.bos_token_id], min(128, model.config.block_size - 1)
    for seed in range(3):
        print(f"--- sample {seed}", write(model, tokenizer, start, n, seed)[1], sep="\n")


def make_corpus(args: Namespace, T: int, tokenizer: Tokenizer | None = None,
                labels: Sequence[Label] = ()) -> Stories | Texts:
    """What to train on, in windows of T; tokenizer and labels are those of a model, if any."""
    if not args.text:
        return Stories(args.seed)
    if args.concepts:
        return Atlas(args.text, args.seed, T, args.vocab, tokenizer, labels, args.concepts,
                     args.top)
    return Texts(args.text, args.seed, T, args.vocab, tokenizer, labels)


def run(args: Namespace) -> None:
    """Set up, train, save."""
    device = pick_device(args.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    corpus = make_corpus(args, SIZES[args.size].get("block_size", Config.tiny().block_size))
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / STATE).exists() and not args.resume:
        raise ValueError(f"{args.out} holds a run already: --resume goes on with it, another --out "
                         "starts a new one")
    model = make_model(args.size, corpus, args.seed).to(device)
    if RANK == 0:
        size = sum(p.numel() for p in model.parameters())
        print(f"{size:,} parameters on {WORLD} x {device}; {args.batch} windows of "
              f"{model.config.block_size} tokens a step; vocabulary {corpus.tokenizer.vocab_size}; "
              f"{len(corpus.labels)} known concepts")
        if not corpus.labels:
            print("no labels: the presence loss, teacher forcing and steering losses are off")
    history = train(model, corpus, args)
    if RANK == 0:
        model.save_pretrained(args.out)
        corpus.tokenizer.save(args.out / RANK_FILE)
        if not args.text:  # stories repeat names on purpose, and end
            write_generation(args.out, max_new_tokens=250, repetition_penalty=1.0, allow_eos=True)
        write_labels(Labels(corpus.labels, model.config.n_concepts,
                            model.config.n_unknown_concepts), args.out)
        if history:
            print(text_curve(history))
            try:
                with replacing(args.out / "loss.png") as partial:
                    save_png(history, partial)
            except ImportError:
                print("matplotlib would draw this as loss.png: pip install -e '.[notebook]'")
        print(f"saved to {args.out}")
    if WORLD > 1:  # DistributedDataParallel lives on in reference cycles, and keeps threads running
        gc.collect()  # that abort a process which ends before them
        dist.destroy_process_group()


def print_line(step: int, losses: dict, when: str, end: str) -> None:
    """Step, losses, speed and time left; with end "\\r" the next line is printed over it."""
    line = f"step {step}: " + " ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    line = f"{line}; {when}"
    if end == "\r":  # a line that wraps could not be overwritten
        line = line[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
    print(line, end=end, flush=True)


if __name__ == "__main__":
    main()
