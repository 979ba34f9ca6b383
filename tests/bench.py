"""How fast text is written, and how close that is to the machine's limits. Run by hand.

    python tests/bench.py                                    # the small configuration, on the CPU
    python tests/bench.py --size 8b --device cuda            # random 8B weights, made on the card
    python tests/bench.py --size 8b --device cuda --compile
    python tests/bench.py --size 8b --device cuda --quantize int8
    python tests/bench.py --attention --size 8b --device cuda    # which kernels SDPA takes
    python tests/bench.py --int8 --size tiny                 # what int8 weights change
    python tests/bench.py --train                            # training the tiny model

Text is written one token per step after a prompt of 32. The columns are explained under the table.
Times of shared machines are noise: compare within one run, and trust what is measured in turns.
"""

import argparse
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from steerling_min import Config, Steerling, generate, load, unmask
from steerling_min.files.checkpoint import save_model, tie
from steerling_min.files.config_json import config_to_dict
from steerling_min.training.data import cut, endless_stories, pack
from steerling_min.files.quantize import quantize

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_tiny  # noqa: E402

PROMPT = 32
PLAIN_STEPS = 64  # of the plain way, one window's: all of its windows cost the same
SIZES = {
    "small": dict(n_layers=8, n_embd=256, n_head=8, n_kv_heads=4, n_concepts=2048,
                  n_unknown_concepts=4096, factorize_rank=64, block_size=PROMPT + 4096),
    "8b": dict(block_size=PROMPT + 4096),
}
CONCEPT_FIELDS = ("n_concepts", "topk_known", "topk_known_features", "n_unknown_concepts",
                  "unknown_topk", "factorize_rank", "factorize_unknown", "pad_multiple",
                  "concept_dim", "use_unknown", "apply_topk_to_unknown", "use_epsilon_correction",
                  "use_attention_known", "use_attention_unknown", "topk_on_logits")
SDPA = ["flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
        "fused_attention"]
MATRIX_PRODUCTS = {"mm", "bmm", "addmm", *(f"_scaled_dot_product_{kernel}{way}"
                                           for kernel in SDPA for way in ("", "_backward"))}

EXPLANATION = """
ms/step, tokens/s: writing with the cache, the mean over all steps but the first two.
GB/s: bytes of the backbone's weights per second, as if each step read them once.
peak GB: the most memory the process held; on a GPU, the most that was allocated there.
/ roofline: ms/step over max(weights / copy speed, operations / speed of a large product), estimated
for an average step and without attention.
/ products: our step's time, over that of its own matrix products alone. plain / ours: the time of a
step without the cache, which recomputes everything, over ours. Both are measured in turns with our
steps in one process; not with --compile.
official / ours: the official package, where it can be imported, in a process of its own.
"""


# ---- one measurement, in a process of its own ----------------------------------------------------


def make_model(size: str, device: str, dtype: torch.dtype, int8: bool = False,
               std: float = 0.2) -> Steerling:
    """Random weights, larger than an initialisation's, so that confidences are well apart."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Steerling(Config(**SIZES[size])).to(dtype)
    if int8:
        quantize(model)  # shapes only: there is no room for more on a small card
    model = model.to_empty(device=device).eval().requires_grad_(False)
    tie(model)
    for name, x in model.state_dict().items():
        if x.dtype == torch.int8:
            x.random_(-127, 128)  # of standard deviation 73
        elif name.endswith(".scale"):
            x.fill_(std / 73)
        elif x.dim() == 1:
            x.fill_(1.0)
        else:
            x.normal_(std=std)
    return model


def make_prompt() -> list[int]:
    return torch.randint(0, 100_000, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def milliseconds(device: str, f, *args, **kwargs) -> float:
    """How long f(*args, **kwargs) takes."""
    wait(device)
    began = time.perf_counter()
    f(*args, **kwargs)
    wait(device)
    return 1000 * (time.perf_counter() - began)


class Record(TorchDispatchMode):
    """Keeps the matrix products that run inside it, with their inputs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.__name__.split(".")[0] in MATRIX_PRODUCTS:
            self.calls.append((op, args, kwargs))
        return op(*args, **kwargs)

    @torch.no_grad()
    def replay(self) -> None:
        """Compute the same products by themselves, in the same order."""
        for op, args, kwargs in self.calls:
            op(*args, **kwargs)


def peak(device: str) -> float:
    """The most memory this process held so far, in GB: the GPU's, or its own (Linux)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def measure(size: str, n: int, device: str, dtype: torch.dtype, int8: bool, compiled: bool) -> dict:
    """Writing n tokens with the cache: milliseconds per step, the last tokens, memory."""
    model, prompt = make_model(size, device, dtype, int8), [make_prompt()]
    if compiled:
        for block in model.transformer.blocks:
            block.compile(dynamic=True)
        generate(model, prompt, n, seed=0)  # whatever is to be compiled is met once
    for i, step in enumerate(unmask(model, prompt, n, seed=0)):
        if i == 1:  # warm
            wait(device)
            began = time.perf_counter()
    wait(device)
    return {"ms": 1000 * (time.perf_counter() - began) / (n - 2), "peak": peak(device),
            "tokens": step.tokens[0].tolist(),
            "weights": sum({x.data_ptr(): x.nbytes for x in model.transformer.state_dict().values()
                            }.values())}


def measure_in_turns(size: str, n: int, device: str, dtype: torch.dtype, int8: bool) -> dict:
    """A step with the cache, its matrix products alone and a step of the plain way: how the others
    compare with the first. Of four steps the outer are timed, the inner ones' products replayed:
    so both have as many masks on average."""
    model, prompt = make_model(size, device, dtype, int8), [make_prompt()]
    run, plain_run = (unmask(model, prompt, n, seed=0, use_cache=c) for c in (True, False))
    ours, products, plain = [], [], []
    for i in range(n):
        if i % 4 in (0, 3):
            ours.append(milliseconds(device, next, run))
        else:
            with Record() as record:
                next(run)
            products.append(milliseconds(device, record.replay))
        if i % (n // PLAIN_STEPS) == 0:
            plain.append(milliseconds(device, next, plain_run))
    step, alone, everything = (statistics.mean(x[1:]) for x in (ours, products, plain))
    return {"products": step / alone, "plain": everything / step}  # the first of each warms up


def measure_official(size: str, n: int, device: str, dtype: torch.dtype) -> dict:
    """The official package on the same weights, one token per step. Beyond 64 tokens that would
    take too long; it follows from two shorter runs, as a step costs a pass and a draw per token."""
    from steerling import GenerationConfig, SteerlingGenerator
    S = Config().diff_block_size
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(size, "cpu", dtype)
        save_model(model, Path(folder))
        config = config_to_dict(model.config)  # it reads the layout that nests the heads
        config["concept"] = {name: config[name] for name in CONCEPT_FIELDS}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        del model
        generator = SteerlingGenerator.from_pretrained(folder, device=device, dtype=dtype)

    found: list[torch.Tensor] = []

    def write(steps: int) -> None:
        options = GenerationConfig(max_new_tokens=n, steps=steps, seed=0)
        found.append(generator.generate_full(torch.tensor([make_prompt()]), options).tokens)
    if n == S:
        return {"ms": milliseconds(device, write, n) / n, "tokens": found[0].flatten().tolist()}
    few, more = (milliseconds(device, write, steps) for steps in (n // S, 2 * n // S))
    one_pass = (more - few) / (n // S)
    one_draw = (few - n // S * one_pass) / n
    return {"ms": one_pass + one_draw, "tokens": None}


def fastest(device: str, repeat: int, f, *args, **kwargs) -> float:
    """Seconds that f(*args, **kwargs) takes at best."""
    return min(milliseconds(device, f, *args, **kwargs) for _ in range(repeat)) / 1000


def limits(device: str, dtype: torch.dtype) -> dict:
    """What the machine can do: bytes/s of a large copy, operations/s of a large product."""
    n = 2**28 if device.startswith("cuda") else 2**26
    a, b = torch.ones(n, device=device), torch.empty(n, device=device)
    m = 8192 if device.startswith("cuda") else 2048
    x = torch.randn(m, m, device=device, dtype=dtype)

    return {"copy": 2 * a.nbytes / fastest(device, 5, b.copy_, a),
            "matrix": 2 * m**3 / fastest(device, 5, torch.matmul, x, x)}


# ---- the tables ----------------------------------------------------------------------------------


def apart(f, *args) -> dict:
    """f(*args) in a process of its own: memory is measured from nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


def bench_writing(size: str, lengths: list[int], device: str, dtype: torch.dtype, int8: bool,
                  compiled: bool) -> None:
    official = importlib.util.find_spec("steerling") is not None and not int8
    machine = apart(limits, device, dtype)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else (
        f"CPU, {torch.get_num_threads()} threads")
    print(f"{size}, {'int8 weights, ' * int8}{dtype}, {name}, torch {torch.__version__}"
          f"{', compiled' * compiled}: copies {machine['copy'] / 1e9:.0f} GB/s, multiplies "
          f"{machine['matrix'] / 1e9:.0f} GFLOP/s")
    columns = ["new tokens", "ms/step", "tokens/s", "GB/s", "peak GB", "/ roofline"]
    columns += [] if compiled else ["/ products", "plain / ours"]
    columns += ["official / ours"] * official
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    for n in lengths:
        ours = apart(measure, size, n, device, dtype, int8, compiled)
        cells = [f"{ours['ms']:.1f}", f"{1000 / ours['ms']:.0f}",
                 f"{ours['weights'] / ours['ms'] / 1e6:.1f}", f"{ours['peak']:.2f}",
                 f"{ours['ms'] / roofline(Config(**SIZES[size]), ours['weights'], machine):.2f}"]
        if not compiled:
            ratios = apart(measure_in_turns, size, n, device, dtype, int8)
            cells += [f"{ratios['products']:.2f}", f"{ratios['plain']:.1f}"]
        if official:
            other = apart(measure_official, size, n, device, dtype)
            same = {None: "", True: ", same tokens", False: ", OTHER TOKENS"}[
                other["tokens"] and other["tokens"] == ours["tokens"]]
            cells.append(f"{other['ms'] / ours['ms']:.1f}{same}")
        print(f"| {n} |", " | ".join(cells), "|", flush=True)


def roofline(config: Config, weights: int, machine: dict) -> float:
    """Milliseconds that an average step can hardly beat: the backbone's weights (bytes) are read
    once, the blocks' are multiplied with the positions of a window's blocks (some 1.5 S, as windows
    straddle two), the output's with its masks (0.5 S). Attention is not counted."""
    S, V, D = config.diff_block_size, config.vocab_size, config.n_embd
    with torch.device("meta"):
        blocks = sum(p.numel() for p in Steerling(config).transformer.blocks.parameters())
    operations = 2 * (1.5 * S * blocks + 0.5 * S * V * D)
    return 1000 * max(weights / machine["copy"], operations / machine["matrix"])


def enable_gqa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def expanded(q, k, v, mask):  # keys and values copied for every query head
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def stacked(q, k, v, mask):  # the queries of a group's heads one below the other
    G = k.shape[1]
    out = F.scaled_dot_product_attention(q.reshape(len(q), G, -1, q.shape[-1]), k, v,
                                         attn_mask=mask.repeat(q.shape[1] // G, 1))
    return out.view_as(q)


def bench_attention(size: str, lengths: list[int], device: str, dtype: torch.dtype) -> None:
    """Ways to call SDPA with the block-causal mask and grouped heads: milliseconds and kernel."""
    config = Config(**SIZES[size])
    H, G, d, S = config.n_head, config.kv_heads, config.head_dim, config.diff_block_size
    print("| keys | mask | grouped heads | ms | kernel |\n|---|---|---|---|---|")
    for n in lengths:
        q = torch.randn(1, H, S, d, device=device, dtype=dtype)
        k, v = torch.randn(2, 1, G, n, d, device=device, dtype=dtype)
        seen = torch.ones(S, n, dtype=torch.bool, device=device)
        added = torch.zeros(S, n, dtype=dtype, device=device)

        for kind, mask in (("boolean", seen), ("additive", added)):
            for call in (enable_gqa, expanded, stacked):
                with Record() as record:
                    out = call(q, k, v, mask)
                torch.testing.assert_close(out, enable_gqa(q, k, v, seen), atol=1e-2, rtol=1e-2)
                kernels = {op.__name__.split(".")[0] for op, _, _ in record.calls}
                ms = 1000 * fastest(device, 20, call, q, k, v, mask)
                print(f"| {n} | {kind} | {call.__name__} | {ms:.3f} |", ", ".join(kernels), "|")


@torch.no_grad()
def bench_int8(size: str, device: str, dtype: torch.dtype) -> None:
    """What int8 weights change: the logits, and the most likely token, at 64 masks."""
    if size == "tiny":
        model, tokenizer = load(device=device, dtype=dtype)
        stream = pack(endless_stories("int8"), tokenizer, enough=32 * 96)
        tokens = cut(stream, 96 * torch.arange(32), 96).tokens.to(device)
        tokens[:, 64:] = model.config.mask_token_id
        what = "the bundled tiny model, the last third of 32 windows of 96 tokens masked"
    else:
        model = make_model(size, device, dtype, std=0.02)
        tokens = torch.tensor([make_prompt()], device=device)
        tokens = F.pad(tokens, (0, 64), value=model.config.mask_token_id)
        what = f"random {size} weights, 64 masks after a prompt of {PROMPT}"

    def logits():
        hidden = model.transformer(tokens)[tokens == model.config.mask_token_id]
        return model.transformer.lm_head(hidden).float()
    before = logits()
    quantize(model)
    after = logits()
    error = (after - before).square().mean().sqrt() / before.std()
    same = (after.argmax(-1) == before.argmax(-1)).float().mean()
    print(f"{what}, {dtype}: int8 changes the logits by {error:.2%} of their standard deviation "
          f"(root mean square); the most likely token stays the same at {same:.1%} of the masks")


def measure_training(device: str) -> None:
    """The tiny model's training steps against their matrix products alone."""
    def train(steps):
        args = argparse.Namespace(
            steps=steps, minutes=None, batch=8, lr=3e-3, seed=0, without=[], text=None, init=None,
            resume=False, compile=False, recompute=False, dtype="float32",
            out=Path(folder) / str(steps))
        with train_tiny.Run(args) as run:
            model = train_tiny.make_model("tiny", corpus)
            counted, _ = corpus.windows("counted", 200, model.config.block_size)
            objective = train_tiny.prepare(model, corpus, counted, args, run, torch.device(device))
            train_tiny.train(objective, corpus, args, run)

    corpus, draw_step = train_tiny.Stories(0), train_tiny.draw_step
    times, products = [], []

    def between(*args):  # a step begins here: the one before it has ended
        wait(device)
        times.append(1000 * (time.perf_counter() - between.began))
        products.append(milliseconds(device, record.replay) / 4)
        between.began = time.perf_counter()
        return draw_step(*args)

    with tempfile.TemporaryDirectory() as folder:
        with Record() as record:
            train(4)
        train_tiny.draw_step, between.began = between, time.perf_counter()
        train(80)
    ms, alone = statistics.median(times[1:]), statistics.median(products[1:])
    speed = 1000 * 8 * Config.tiny().block_size / ms
    print(f"training the tiny model: {ms:.0f} ms/step, {speed:,.0f} tokens/s; its "
          f"matrix products alone {alone:.0f} ms, {alone / ms:.2f} of it")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=[*SIZES, "tiny"], default="small", help="tiny: for --int8")
    p.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096])
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16"],
                   help="default: float32 on the CPU, else bfloat16")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument("--quantize", choices=["int8"], help="write with a byte per weight")
    p.add_argument("--train", action="store_true", help="measure training instead")
    p.add_argument("--attention", action="store_true", help="measure ways to call SDPA instead")
    p.add_argument("--int8", action="store_true", help="measure the error of int8 weights instead")
    args = p.parse_args()
    if args.train:
        measure_training(args.device)
        return
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    if args.int8:
        bench_int8(args.size, args.device, dtype)
        return
    if args.attention:
        bench_attention(args.size, args.tokens, args.device, dtype)
        return
    if args.size == "tiny" or min(args.tokens) < PLAIN_STEPS:
        p.error(f"writing is measured with --size small or 8b and {PLAIN_STEPS} tokens or more")
    bench_writing(args.size, args.tokens, args.device, dtype, args.quantize == "int8",
                  args.compile)
    print(EXPLANATION)


if __name__ == "__main__":
    main()
