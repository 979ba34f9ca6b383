"""Write text with a Steerling checkpoint: the bundled tiny model, or the full 8B from a folder.

    python sample.py --prompt "The old sailor"
    python sample.py --model guidelabs/steerling-8b --prompt "Light travels" --max-new-tokens 256
    echo "The old sailor" | python sample.py --temperature 0
"""

import argparse
import random
import sys
import time

import torch

from steerling_min import Steerling, Tokenizer, load, unmask
from steerling_min.cli import Parser


def parse_args() -> argparse.Namespace:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", metavar="TEXT", help="what to continue; else standard input is read")
    p.add_argument("--model", metavar="FOLDER", help="checkpoint folder, or a hub id that has been "
                   "downloaded (default: the bundled tiny model)")
    p.add_argument("--max-new-tokens", type=int, metavar="N",
                   help="tokens to write (default: 128, or what the context has room for)")
    p.add_argument("--steps", type=int, metavar="N",
                   help="denoising steps in all (default: one per token)")
    p.add_argument("--threshold", type=float, metavar="P",
                   help="instead of --steps: commit all positions at least this confident, 0 to 1")
    p.add_argument("--temperature", type=float, metavar="X", help="fixed temperature, 0 = greedy; "
                   "switches off entropy sampling, in which each token's entropy sets it")
    p.add_argument("--top-p", type=float, default=0.8, metavar="P",
                   help="nucleus of every draw (default: 0.8)")
    p.add_argument("--order", choices=["window", "global"], default="window",
                   help="fill block by block, or the surest position of all (default: window)")
    p.add_argument("--no-align", action="store_true",
                   help="count windows from the prompt's end, not by attention blocks")
    p.add_argument("--num-samples", type=int, default=1, metavar="N",
                   help="texts to write; the second is what --seed SEED+1 alone would give")
    p.add_argument("--seed", type=int, help="of the draws (default: a random one, printed)")
    p.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu) or a name")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                   help="of the weights (default: bfloat16 on cuda, else float32)")
    args = p.parse_args()
    if args.num_samples < 1:
        p.error(f"--num-samples {args.num_samples}: must be at least 1")
    if args.prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            p.error("no prompt: give --prompt TEXT, or pipe one in")
        try:
            args.prompt = sys.stdin.read().rstrip("\n")
        except UnicodeDecodeError:
            p.error("the prompt on standard input is not UTF-8 text")
    if args.seed is None:
        args.seed = random.randrange(2**31)
    return args


def text_of(tokenizer: Tokenizer, ids: list[int], cut_at: list[int]) -> str:
    """Tokens as text, up to the first of the ids in cut_at; each chunk on a line of its own."""
    ids = ids[: min([i for i, token in enumerate(ids) if token in cut_at], default=len(ids))]
    chunks = [[]]
    for token in ids:
        if token == tokenizer.endofchunk_token_id:
            chunks.append([])
        else:
            chunks[-1].append(token)
    return "\n".join(tokenizer.decode(chunk) for chunk in chunks)


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


def write(model: Steerling, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Generate, then print each text and one closing line of figures."""
    device = model.transformer.tok_emb.weight.device
    prompt = tokenizer.encode(args.prompt)
    new = args.max_new_tokens
    if new is None:
        new = min(128, model.config.block_size - len(prompt))
    began = time.perf_counter()
    steps = 0
    for step in unmask(model, [prompt] * args.num_samples, new, steps=args.steps,
                       temperature=args.temperature or 0.0, top_p=args.top_p,
                       entropy_sampling=args.temperature is None,
                       confidence_threshold=args.threshold, order=args.order,
                       align=args.order == "window" and not args.no_align, seed=args.seed):
        steps, last = steps + 1, step
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began

    cut_at = [tokenizer.eos_token_id] + [tokenizer.mask_token_id] * (args.order == "global")
    for row, unwritten in zip(last.tokens.tolist(), last.unwritten.tolist()):
        print(text_of(tokenizer, row, cut_at))
        print("---")
        if unwritten:
            print(f"ended early: {unwritten} of {new} positions were left unwritten")
    written = new * args.num_samples - int(last.unwritten.sum())
    read = steps * sum(p.numel() * p.element_size() for p in model.transformer.parameters())
    print(f"{written} tokens in {steps} steps, {seconds:.2f} s: {written / seconds:.1f} tok/s, "
          f"{read / seconds / 1e9:.1f} GB/s of weights read, {peak_memory(device)}")


def main() -> None:
    args = parse_args()
    if sys.stdout is not None:  # a terminal that lacks a character gets "?" instead of no text
        sys.stdout.reconfigure(errors="replace")
    try:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model, tokenizer = load(args.model, args.device, dtype)
        weight = model.transformer.tok_emb.weight
        size = sum(p.numel() for p in model.parameters())
        print(f"model {args.model or 'tiny (bundled)'}: {size:,} parameters, "
              f"{str(weight.dtype).removeprefix('torch.')}, on {weight.device}; seed {args.seed}; "
              + ("entropy sampling" if args.temperature is None
                 else f"temperature {args.temperature:g}"))
        write(model, tokenizer, args)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # the allocators of torch have no exception type in common
        print("sample.py: not enough memory; a shorter --max-new-tokens, fewer --num-samples or "
              "--dtype bfloat16 need less", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
