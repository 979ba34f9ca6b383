"""Train the tiny Steerling on its tiny world: causal masked diffusion, from scratch, on a laptop.

    python train_tiny.py                 # about half an hour on two CPU cores, into runs/tiny
    python sample.py --model runs/tiny --prompt "The old sailor"

One step: take windows of packed stories, let every diffusion block draw a noise level t, turn each
of its tokens into <|mask|> with probability t, predict the originals with the block-causal model,
and learn from the masked positions only. The model reads this one noisy sequence: a block is
predicted from earlier blocks that are noisy too (Block Diffusion puts a clean copy beside it, which
costs about twice as much). When text is written, earlier blocks are clean.
"""

import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from steerling_min import Config, Steerling, Tokenizer, generate, load
from steerling_min.cli import Parser
from steerling_min.diffusion import corrupt, noise_levels, token_loss
from steerling_min.model import pick_device
from steerling_min.tokenizer import RANK_FILE
from steerling_min.world import recognise, split_sentences, write_story

BATCH = 8            # windows of one step
WARMUP = 100         # steps until the peak learning rate; a cosine to 0 follows
EMBEDDING_STD = 0.2  # of tok_emb's first weights
LOG_EVERY = 50       # steps
VOCAB_SIZE = 512     # of the tokenizer, special tokens included


def make_tokenizer() -> Tokenizer:
    """Learn the tiny vocabulary from 100 stories; the same one every time."""
    rng = random.Random(0)
    stories = [" ".join(chunk.text for chunk in write_story(rng).chunks) for _ in range(100)]
    return Tokenizer.train("\n".join(stories), VOCAB_SIZE)


def story_tokens(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """One document: <|bos|> chunk <|endofchunk|> chunk ... <|endoftext|>."""
    tokens = [tokenizer.bos_token_id]
    for chunk in write_story(rng).chunks:
        tokens += tokenizer.encode(chunk.text) + [tokenizer.endofchunk_token_id]
    return tokens[:-1] + [tokenizer.eos_token_id]


def batches(tokenizer: Tokenizer, B: int, T: int, seed: int) -> Iterator[Tensor]:
    """Endless (B, T) windows cut from one stream of stories; no padding, no document mask."""
    rng = random.Random(seed)
    stream = []
    while True:
        while len(stream) < B * T:
            stream += story_tokens(tokenizer, rng)
        yield torch.tensor(stream[: B * T]).view(B, T)
        stream = stream[B * T:]


def start(seed: int) -> tuple[Steerling, Tokenizer]:
    """A tiny model with random weights, and its tokenizer."""
    torch.manual_seed(seed)
    model = Steerling(Config.tiny())
    # From embeddings of 0.02 the first branches compute vectors smaller than sqrt(norm_eps), which
    # their norms damp instead of normalising. With 0.2 the loss after 300 steps was 3.5, not 4.6.
    torch.nn.init.normal_(model.transformer.tok_emb.weight, std=EMBEDDING_STD)
    return model, make_tokenizer()


def make_optimizer(model: Steerling) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, not on the norms' weights."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))  # `train` sets the learning rate


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to the peak, then half a cosine down to 0 at `steps`."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def train(model: Steerling, tokenizer: Tokenizer, steps: int, peak: float, seed: int) -> None:
    """Train for `steps` steps, printing loss and speed."""
    config, device = model.config, model.transformer.tok_emb.weight.device
    data = batches(tokenizer, BATCH, config.block_size, seed)
    noise = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model)
    began, total = time.time(), 0.0
    for step in range(steps):
        tokens = next(data).to(device)  # (B, T)
        t = noise_levels(*tokens.shape, config.diff_block_size, noise)
        noisy, masked = corrupt(tokens, t, config.mask_token_id, noise)
        # With epsilon, composed is the hidden state: the concept heads would get no gradient from
        # this loss, so they do not run, and keep their random weights.
        logits = model.transformer.lm_head(model.transformer(noisy))  # (B, T, V)
        loss = token_loss(logits, tokens, masked, t)

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        optimizer.step()

        total += loss.item()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            n, seconds = step % LOG_EVERY + 1, time.time() - began
            speed = (step + 1) * tokens.numel() / seconds
            left = seconds / (step + 1) * (steps - step - 1)
            print(f"step {step + 1:>5}/{steps}  loss {total / n:.3f}  {speed:,.0f} tokens/s  "
                  f"{left / 60:.1f} min left", flush=True)
            total = 0.0


def share_in_grammar(model: Steerling, tokenizer: Tokenizer, stories: int, seed: int) -> float:
    """The share of sampled sentences that belong to the world's grammar.

    Each text continues the first chunk of a story that training never saw, of any length; windows
    are aligned, one token is committed per step, everything else is `generate`'s default. The
    last sentence of a text is cut off by its end and does not count.
    """
    rng, right, total = random.Random(f"held out {seed}"), 0, 0
    for i in range(stories):
        prompt = story_tokens(tokenizer, rng)
        prompt = prompt[: prompt.index(tokenizer.endofchunk_token_id) + 1]
        new = generate(model, [prompt], 128, align=True, seed=seed + i)[0, len(prompt):].tolist()
        text = tokenizer.decode(new, specials=True)
        for special in ("<|bos|>", "<|endofchunk|>", "<|endoftext|>"):
            text = text.replace(special, "\n")
        sentences = [s for line in text.split("\n") for s in split_sentences(line)][:-1]
        right += sum(recognise(s) is not None for s in sentences)
        total += len(sentences)
    return right / total


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="checkpoint folder")
    parser.add_argument("--init", metavar="FOLDER", help="start from this checkpoint's weights")
    parser.add_argument("--steps", type=int, default=7000, help="training steps")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, stories and noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: at least 1")
    if not 0 < args.lr < 1:
        parser.error(f"--lr {args.lr}: above 0 and below 1")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed}: 0 to 2^63 - 1")
    try:
        device = pick_device(args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.init:
            model, tokenizer = load(args.init, args.device, torch.float32)
        else:
            model, tokenizer = start(args.seed)
        size = sum(p.numel() for p in model.parameters())
        print(f"{size:,} parameters on {device}; {BATCH} x {model.config.block_size} tokens a step")
        train(model.to(device).train(), tokenizer, args.steps, args.lr, args.seed)
        model.save_pretrained(args.out)
        tokenizer.save(args.out / RANK_FILE)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"saved to {args.out}")
    share = share_in_grammar(model.eval(), tokenizer, stories=20, seed=args.seed)
    print(f"{share:.1%} of sampled sentences are in the grammar")


if __name__ == "__main__":
    main()
