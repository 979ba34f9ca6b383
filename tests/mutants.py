"""Do the tests notice when the code is wrong? Mutation testing, run by hand.

    python tests/mutants.py                             # the mistakes listed below
    python tests/mutants.py --only rotary               # those with this in name or file
    python tests/mutants.py --sample 8 --seed 1         # 8 of them, drawn at random
    python tests/mutants.py --generated --sample 50     # 50 small edits, drawn at random
    python tests/mutants.py --generated --only sampling.py --jobs 4
    python tests/mutants.py --list                      # prints them and runs nothing

A mutant is a copy of the repository with one edit. It is killed when a test fails in it, or hangs.
One that survives shows a test that is missing, or an edit that no test can notice: these stand in
equivalent.json. First the edited file's tests run, tests/test_X.py for X.py; if they pass, those in
AFTER. A generated mutant is named by its line, with the edit in brackets: "x.py:7: return a [< ->
<=] b".

Survivors: none known. All generated mutants of November 2026, 4,519, were run once. What survived
led to tests, or stands in equivalent.json with its reason.
"""

import argparse
import ast
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from forks import FORKS

ROOT = Path(__file__).parent.parent
FILES = {path.name: path.relative_to(ROOT).as_posix()  # no two have one name
         for path in [*(ROOT / "steerling_min").rglob("*.py"),
                      ROOT / "steerling_min" / "training" / "grammar.json",
                      ROOT / "sample.py", ROOT / "train_tiny.py"] if path.name != "__init__.py"}
MEMORY = 16 * 2**30  # bytes for each process: a mutant may fill a list for ever


class Mistake(NamedTuple):
    name: str
    file: str
    old: str  # must stand in the file exactly once
    new: str


MISTAKES = [Mistake(name, file, old, new) for file, found in {
    "attention.py": [
        ("a block does not see itself: > for >=", "// S >= key[None, :]", "// S > key[None, :]"),
        ("causal inside a block, too", "query[:, None] // S >= key[None, :] // S  #",
         "query[:, None] >= key[None, :]  #"),
        ("blocks are counted from the first query", "query[:, None] // S >= key[None, :] // S  #",
         "(query[:, None] - query[0]) // S >= (key[None, :] - query[0]) // S  #"),
        ("q and k swapped in the stored matrix",
         "q, k, v = heads.split([self.n_head, self.n_kv_heads, self.n_kv_heads]",
         "k, q, v = heads.split([self.n_kv_heads, self.n_head, self.n_kv_heads]"),
        ("scores are not divided by sqrt(d)", "enable_gqa=True)", "enable_gqa=True, scale=1.0)"),
        ("query head i reads key/value head i % G",
         "out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)",
         "k, v = (x.repeat(1, self.n_head // self.n_kv_heads, 1, 1) for x in (k, v))\n"
         "        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)"),
        ("the mask is of floats, which are added",
         "query[:, None] // S >= key[None, :] // S  #",
         "(query[:, None] // S >= key[None, :] // S).float()  #"),
        ("clamped on one side", "clamp(-self.clip_qkv, self.clip_qkv)", "clamp(max=self.clip_qkv)"),
        ("q, k, v are not clamped", "qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)", "pass"),
        ("q_norm missing", "self.q_norm(q)", "q"),
        ("q is normalised after its rotation", "rotate(self.q_norm(q), cos, sin)",
         "self.q_norm(rotate(q, cos, sin))"),
        ("rotary: clockwise", "torch.cat([-b, a], dim=-1)", "torch.cat([b, -a], dim=-1)"),
        ("rotary: the halves not exchanged", "torch.cat([-b, a], dim=-1)",
         "torch.cat([-a, b], dim=-1)"),
        ("rotary: pairs are neighbours", "x.chunk(2, dim=-1)",
         "(x[..., ::2], x[..., 1::2])"),
        ("rotary: 2j twice", "base ** (j / d)", "base ** (2 * j / d)"),
    ],
    "backbone.py": [
        ("rotary: positions restart with the cache", "rotary_tables(queries,",
         "rotary_tables(queries - start,"),
        ("all layers share one place in the cache", "cache.of(layer)", "cache.of(0)"),
        ("the output matrix is not tied", "self.lm_head.weight = self.tok_emb.weight",
         "nn.init.normal_(self.lm_head.weight)"),
        ("injection from layer + 1", "layer + 1 >= inject_layer", "layer >= inject_layer"),
        ("injection after one layer only", "layer + 1 >= inject_layer",
         "layer + 1 == inject_layer"),
        ("positions are made on the CPU", "torch.arange(end, device=x.device)",
         "torch.arange(end)"),
    ],
    "block.py": [
        ("norm before the attention", "self.ln_1(self.attn(x, cos, sin, mask, cache))",
         "self.attn(self.ln_1(x), cos, sin, mask, cache)"),
        ("norm before the MLP", "self.ln_2(self.mlp(x))", "self.mlp(self.ln_2(x))"),
        ("up and gate swapped", "up, gate = ", "gate, up = "),
        ("silu on the wrong half", "up * F.silu(gate)", "F.silu(up) * gate"),
    ],
    "norm.py": [
        ("norm: eps outside the root",
         "y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)",
         "y / (y.square().mean(-1, keepdim=True).sqrt() + self.eps)"),
        ("norm: the mean is subtracted", "y = x.float()",
         "y = x.float() - x.float().mean(-1, keepdim=True)"),
    ],
    "iguide.py": [
        ("top-k: one too many", "topk(head.topk,", "topk(head.topk + 1,"),
        ("padding rows of the known head are selected",
         "self.concept_predictor.weight[: self.n_concepts]", "self.concept_predictor.weight"),
        ("known logits are not clamped", "predictor).float().clamp(-MAX_LOGIT, MAX_LOGIT)",
         "predictor).float()"),
        ("epsilon with the wrong sign", "rest = hidden - (plain_known + plain_unknown)",
         "rest = (plain_known + plain_unknown) - hidden"),
        ("epsilon is computed after the edit, and cancels it",
         "rest = hidden - (plain_known + plain_unknown)",
         "rest = hidden - (known_now + unknown_now)"),
        ("epsilon stays under an edit", 'if epsilon == "drop" and', "if False and"),
        ("epsilon dropped without an edit", ' == "drop" and (known or unknown)', ' == "drop"'),
        ("epsilon dropped under known edits only", "and (known or unknown)", "and known"),
        ("epsilon dropped at all positions", "rest.masked_fill(positions[..., None], 0.0)",
         "torch.zeros_like(rest)"),
        ("a weight is added, not set",
         "weights = weights.masked_fill((ids == concept) & positions[..., None], 0.0)", "pass"),
        ("a weight is set at all positions", "value * positions[..., None]",
         "torch.full_like(weights[..., :1], value)"),
        ("the unknown head reads what the known one leaves",
         "unknown_head, hidden, unknown, positions",
         "unknown_head, hidden - plain_known, unknown, positions"),
    ],
    "model.py": [
        ("logits skip the concept layer", "lm_head(parts.composed)", "lm_head(hidden)"),
    ],
    "config_json.py": [
        ("config: the concept heads' block_size is read", ' if k != "block_size"', ""),
    ],
    "config.py": [
        ("config: topk_known where topk_known_features is given",
         "self.topk_known_features or self.topk_known", "self.topk_known"),
    ],
    "checkpoint.py": [
        ("loaded weights are not tied", "assign=True)\n    tie(model)", "assign=True)"),
    ],
    "quantize.py": [
        ("int8: a scale for many rows together", ".amax(1, keepdim=True)",
         ".amax().expand(len(part), 1)"),
        ("int8: cut off, not rounded", ".round()", ""),
    ],
    "diffusion.py": [
        ("noise grows from block to block", "t = torch.rand(B, n_blocks, generator=generator)",
         "t = (torch.arange(n_blocks) + torch.rand(B, n_blocks, generator=generator)) / n_blocks"),
        ("neighbouring blocks have opposite noise",
         "t = torch.rand(B, n_blocks, generator=generator)",
         "t = torch.rand(B, n_blocks, generator=generator)\n"
         "    t[:, 1::2] = 1 - t[:, : n_blocks // 2 * 2 : 2]"),
        ("the originals are masked, too", "tokens.masked_fill(masked, mask_token_id), masked",
         "tokens.masked_fill_(masked, mask_token_id), masked"),
        ("masks are drawn without the generator", "torch.rand(tokens.shape, generator=generator)",
         "torch.rand(tokens.shape)"),
        ("the short block comes first", "dim=1)[:, :T]", "dim=1)[:, -T:]"),
        ("the bound's numbers of masks are not spread",
         "(torch.arange(samples) + torch.rand((B, 1), generator=generator)) / samples",
         "torch.rand((B, samples), generator=generator)"),
        ("a noise level per sequence", "t = torch.rand(B, n_blocks, generator=generator)",
         "t = torch.rand(B, 1, generator=generator).expand(-1, n_blocks)"),
        ("one draw masks 16 tokens", "draws = torch.rand(tokens.shape, generator=generator)",
         "draws = torch.rand(tokens.shape, generator=generator)[:, "
         "::16].repeat_interleave(16, dim=1)[:, :tokens.shape[1]]"),
        ("another token than the mask", "masked_fill(masked, mask_token_id)",
         "masked_fill(masked, mask_token_id - 1)"),
        ("loss: multiplied by t", "losses / t.to", "losses * t.to"),
        ("the bound without n/m", "losses.sum(-1) * (n / m.clamp(min=1)).to(device)",
         "losses.sum(-1)"),
        ("the bound's samples mask what is not asked about", "order.masked_fill(~here, 2.0)",
         "order"),
    ],
    "cache.py": [
        ("a GPU is waited for after the pass", "hidden[rows, positions - fresh.start]",
         "hidden[asked[:, fresh]]"),
        ("cache: one block too far", "cache.length = min(numbers) // S * S",
         "cache.length = (min(numbers) // S + 1) * S"),
        ("cache: one block short", "cache.length = min(numbers) // S * S",
         "cache.length = max(0, min(numbers) // S - 1) * S"),
        ("cache: stale keys, an unfinished block is kept", "cache.length = min(numbers) // S * S",
         "cache.length = min(numbers)"),
        ("cache: moved too early, to the last block asked", "cache.length = min(numbers) // S * S",
         "cache.length = max(numbers) // S * S"),
        ("cache: the block is cut after the last mask", "(max(numbers) // S + 1) * S)",
         "max(numbers) + 1)"),
    ],
    "unmasking.py": [
        ("a GPU is asked whether a row has ended", "~torch.isin(ids, roles.end).any()",
         "not torch.isin(ids, roles.end).any()"),
        ("a GPU's texts are drawn by the CPU", "torch.Generator(device)", "torch.Generator()"),
        ("interventions do not reach the text", "lm_head(steerer.compose(hidden))",
         "lm_head(hidden)"),
        ("guidance: the masked prompt is not injected", "steerer.vectors(tokens == mask_id,",
         "steerer.vectors((tokens == mask_id) & (torch.arange(tokens.shape[1]) >= L),"),
        ("one row's end ends all", "active[b] &= ~torch.isin(ids, roles.end)",
         "active &= ~torch.isin(ids, roles.end)"),
        ("committed tokens are written again", "asked = (tokens == mask) & active",
         "asked = (torch.arange(T, device=device) >= start) & active"),
        ("windows are not kept apart", "asked[:, end:] = False", "pass"),
        ("the mask may be committed", "[config.mask_token_id, config.pad_token_id]",
         "[config.pad_token_id]"),
        ("EOS may be committed", "role.append(config.eos_token_id)", "pass"),
        ("an end of text leaves its left unwritten", "role = last if how.allow_eos",
         "role = end if how.allow_eos"),
        ("an end overwrites itself", "device=row.device) > last", "device=row.device) >= last"),
        ("stop tokens in the prompt count", "torch.isin(tokens[:, L:end], roles.stop)",
         "torch.isin(tokens[:, :end], roles.stop)"),
        ("one seed for all rows", "manual_seed(seed + b)", "manual_seed(seed)"),
        ("a step's tokens change later", "Step(tokens.clone(),", "Step(tokens,"),
        ("guidance: scale off by one", "(cfg_scale + 1) * (c - u)", "cfg_scale * (c - u)"),
        ("guidance: the blind run's hidden states", "hidden, _ = hidden.chunk(2)",
         "_, hidden = hidden.chunk(2)"),
        ("cache: kept although an injection ended", "cache.length = 0", "pass"),
        ("cache: emptied at every step", "and steerer.switched(committed)", ""),
        ("injection where a token stands already", "vectors(tokens == mask_id,",
         "vectors(tokens >= 0,"),
        ("the cutoff counts the prompt", "(tokens[:, L:] != mask_id)", "(tokens != mask_id)"),
    ],
    "objective.py": [
        ("loss: on all tokens", "injected, strength = draws\n",
         "injected, strength = draws\n        masked = torch.ones_like(masked)\n"),
        ("loss: compares with the noisy tokens", "(token_logits, batch.tokens,",
         "(token_logits, noisy,"),
        ("special tokens have the last chunk's labels",
         "torch.cat([sums, sums.new_zeros(1, sums.shape[1])])[batch.chunks]",
         "sums[batch.chunks]"),
        ("the last concept is injected where none is",
         "(strength * per_logit[at]).where(injected >= 0, 0.0)",
         "strength * per_logit[at]"),
        ("alpha is not detached", ".weight).detach()", ".weight)"),
        ("special tokens are to express a concept", "(row >= 0) & (chunk >= 0)",
         "row >= 0"),
        ("reconstruction: of what the labels leave, to the end",
         "detached, at_masks, forced)", "detached, at_masks, labelled)"),
        ("the head's own losses reach the backbone", "at_masks.detach())", "at_masks)"),
        ("independence weighs more as known features grow",
         " / mean(known.detach().square()).sqrt().clamp(min=1e-6)", ""),
        ("residual dropout per token, not per window", "dropped[:, None].expand_as(masked)[masked]",
         "(torch.rand(masked.shape) < dropped.float().mean())[masked]"),
        ("without epsilon the unknown side is detached, too",
         "unknown_features(\n            model.unknown_head, at_masks[without_epsilon])",
         "detached[without_epsilon]"),
    ],
    "losses.py": [
        ("reconstruction: the target is not detached", "(hidden - known).detach()",
         "(hidden - known)"),
        ("independence: the known side is not detached", "known.detach()", "known"),
        # centring one of the two would be enough
        ("independence: not centred",
         "    K = K - total(K.sum(0)) / M\n    U = U - total(U.sum(0)) / M\n", ""),
        ("log P of a rounded 1 - P", "torch.log(-torch.expm1(absent))",
         "torch.log(1 - absent.exp())"),
        ("noisy-OR as a product, which underflows",
         "log_no.new_zeros(N, logits.shape[-1]).index_add(0, chunks[inside], log_no)",
         "log_no.new_zeros(N, logits.shape[-1]).index_add(0, chunks[inside], log_no).exp().log()"),
        ("presence: one mean over all pairs", "mean(-present[labels]) + absence * mean("
         "-absent[~labels])",
         "mean(-torch.where(labels, present, absent))"),
        ("epsilon is kept where it is to be dropped",
         "torch.where(dropped[..., None], forced_known",
         "torch.where(~dropped[..., None], forced_known"),
        ("teacher forcing falls to 0", "0.55 + 0.45 * math.cos", "0.5 + 0.5 * math.cos"),
        ("respond: concept 0 counts as none", "at = injected >= 0", "at = injected > 0"),
        ("express: the logarithm before the mean",
         "mean(-torch.log(mass.new_zeros(len(n)).index_add(0, group, mass) / n + 1e-6))",
         "mean(-torch.log(mass + 1e-6))"),
    ],
    "data.py": [
        ("windows share the numbers of their chunks",
         "chunks + N * torch.arange(len(starts))[:, None]", "chunks"),
    ],
    "distributed.py": [
        ("the mean of the processes' means", "n = loss.new_tensor(float(count))",
         "n = loss.new_tensor(1.0)"),
    ],
    "sampling.py": [
        ("the least confident first", "argsort(descending=True, stable=True)",
         "argsort(stable=True)"),
        ("rounding decides between equals",
         "confidence.where(confidence < best - 1e-5 * best * (1 - best), best)", "confidence"),
        ("threshold: none may be committed", "chosen = chosen if len(chosen) else order[:1]",
         "pass"),
        ("penalty: repetition is rewarded", "seen / penalty, seen * penalty",
         "seen * penalty, seen / penalty"),
        ("penalty: per occurrence", "seen = torch.where(seen > 0,",
         "penalty = penalty ** (tokens[:, None] == tokens).sum(0)\n"
         "    seen = torch.where(seen > 0,"),
        ("steps are taken back from the first window",
         "min((i for i, c in enumerate(counts) if c > 1), key=owed)",
         "min(i for i, c in enumerate(counts) if c > 1)"),
        ("a draw waits for the device", "generator=generator)].squeeze(0)",
         "generator=generator)[0]]"),
        ("entropy temperature: k may be 1", ".clamp(min=2)", ""),
        ("entropy temperature: k without the 1", "(1 + (p.cumsum(-1) <= top_p).sum())",
         "(p.cumsum(-1) <= top_p).sum()"),
        ("nucleus: the token's own mass counts", "before = p.cumsum(-1) - p",
         "before = p.cumsum(-1)"),
        ("nucleus: the first token is dropped at top_p 0", "before <= top_p, 0.0",
         "before < top_p, 0.0"),
        ("the last steps of a window commit one more", "(i < m % s)", "(i >= s - m % s)"),
        ("aligned windows are not aligned", "S - L % S if align else S", "S"),
    ],
    "steering.py": [
        ("the cutoff is off by one", "masked & (committed < cutoff)",
         "masked & (committed <= cutoff)"),
        ("one alpha for all directions", "(directions @ tok_emb.T).amax(-1)",
         "(directions @ tok_emb.T).amax()"),
        ("alpha by the largest size", "(directions @ tok_emb.T).amax(-1)",
         "(directions @ tok_emb.T).abs().amax(-1)"),
        ("what is injected stays float32", "x.to(self.model.dtype) for layer, x", "x for layer, x"),
        ("alpha is not divided by the best alignment",
         "strength / (directions @ tok_emb.T).amax(-1)", "strength * directions.norm(dim=-1)"),
        ("suppression is added", "logits - self.suppression", "logits + self.suppression"),
        ("suppression without relu", "[0]).relu()", "[0])"),
        ("unlearn pushes toward the concept", "UNLEARN, SUPPRESS = -4.0",
         "UNLEARN, SUPPRESS = 4.0"),
    ],
    "attribution.py": [
        ("shares: of single contributions' sizes", "torch.stack([self.known.sum(1), "
         "self.unknown.sum(1), self.epsilon], dim=1)",
         "torch.stack([self.known.abs().sum(1), self.unknown.abs().sum(1), self.epsilon], dim=1)"),
        ("shares: epsilon is no part", "sizes.sum(1, keepdim=True).clamp(min=1e-12)",
         "sizes[:, :2].sum(1, keepdim=True).clamp(min=1e-12)"),
        ("a chunk's mass: contributions of both signs cancel",
         "found.known.abs().sum(1) + found.unknown.abs().sum(1) + found.epsilon.abs())",
         "found.known.sum(1).abs() + found.unknown.sum(1).abs() + found.epsilon.abs())"),
        ("inputs out of scope count", "inside = attributions * scope", "inside = attributions"),
        ("the least alike first", "(corpus @ chunk).topk", "(-corpus @ chunk).topk"),
        ("what was overwritten is explained", "order = order[steps[-1]", "order[steps[-1]"),
        ("attribution without the weight", "weights[0] * head.alignment", "head.alignment"),
        ("integrated gradients without - baseline", "((x - baseline) * gradient", "(x * gradient"),
        ("integrated gradients: both ends of the path", "torch.arange(1, steps + 1,",
         "torch.arange(0, steps + 1,"),
    ],
}.items() for name, old, new in found]

# Where a mutant of this file is looked for next; else in all tests but those in APART.
AFTER = {file + ".py": [f"tests/test_{name}.py" for name in names.split()] for file, names in {
    "animation": "sample", "attention": "block backbone model cache unmasking",
    "attribution": "explain page",
    "backbone": "model device cache unmasking steering attribution",
    "block": "backbone model", "checkpoint": "loading quantize model sample",
    "atlas": "train_tiny", "cache": "unmasking device steering",
    "cli": "course loading sample run train_tiny",
    "config": "config_json model iguide checkpoint tokenizer unmasking",
    "config_json": "checkpoint loading model", "curve": "train_tiny",
    "data": "train_tiny evaluate resemblance", "diffusion": "objective evaluate sample",
    "distributed": "losses train_tiny", "evaluate": "train_tiny",
    "explain": "page animation sample", "iguide": "model steering attribution objective unmasking",
    "labels": "explain animation sample", "loading": "checkpoint sample",
    "losses": "objective train_tiny",
    "model": "checkpoint quantize attribution unmasking sample", "norm": "block backbone model",
    "muon": "train_tiny", "objective": "train_tiny", "page": "sample",
    "quantize": "checkpoint sample",
    "run": "train_tiny", "sampling": "unmasking cache",
    "steering": "unmasking cache attribution objective sample", "tokenizer": "data loading sample",
    "train_tiny": "run distributed data evaluate",
    "unmasking": "cache device steering attribution evaluate sample",
    "watch": "sample", "world": "data evaluate", "writing": "checkpoint page run"}.items()}
OWN = {"functions": "course", "__main__": "course"}  # whose tests have another name
# Not among "all": slow ones, and those that read the package's text, not what it does.
APART = ("train_tiny", "run", "unmasking", "page", "sample", "distributed", "evaluate", "course",
         "readme")

# Generated mutants, named without their line's number, that no test can notice: why.
EQUIVALENT = {f"{file}: {edit}": why for file, found in json.loads(
    (ROOT / "tests" / "equivalent.json").read_text(encoding="utf-8")).items()
    for edit, why in found.items()}


# ---- generated mutants ---------------------------------------------------------------------------

SKIPPED = ("cli.py", "grammar.py", "grammar.json", "exercises.py")
TABLES = {"EXERCISES", "MODIFICATIONS", "MEASURES"}  # words and numbers for people
SYMMETRIC = {"max", "min", "transpose", "equal",
             "isinstance",  # a type error, which nobody overlooks
             "require"}     # the words of a message
DULL = {"print", "add_argument", "error"}            # calls for people
COMPARISONS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
               ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
               ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
               ast.And: ("and", "or"), ast.Or: ("or", "and")}
ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}


class Mutant(NamedTuple):
    name: str
    key: str   # the name without its line's number
    file: str  # relative to the repository
    text: str  # of the whole file


def called(node: ast.AST) -> str:
    """The name of the function or method that a call calls, else ""."""
    func = getattr(node, "func", None)
    return getattr(func, "id", getattr(func, "attr", ""))


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may be edited: not those of messages, decorators and tables."""
    targets = getattr(node, "targets", [])
    if (isinstance(node, (ast.Raise, ast.JoinedStr)) or called(node) in DULL
            or any(getattr(target, "id", "") in TABLES for target in targets)):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        if child not in getattr(node, "decorator_list", []):
            yield from nodes_of(child)


def joins_text(node: ast.AST) -> bool:
    """Is it a string, or a sum with one among its terms?"""
    if isinstance(node, ast.BinOp):
        return joins_text(node.left) or joins_text(node.right)
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def edits_of(text: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Every small edit of a file: from where to where (bytes), and what is put there."""
    begins = [0]
    for line in text.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))

    def start(node):
        return begins[node.lineno - 1] + node.col_offset

    def end(node):
        return begins[node.end_lineno - 1] + node.end_col_offset

    def between(left, right, old, new):  # only the operator and parentheses stand there
        at = text.index(old.encode(), end(left), start(right))
        return at, at + len(old), new.encode()

    for node in nodes_of(ast.parse(text)):
        if isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                yield between(left, right, *COMPARISONS[type(op)])
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:]):
                yield between(left, right, *COMPARISONS[type(node.op)])
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not joins_text(node):
            at, after, other = between(node.left, node.right, *ARITHMETIC[type(node.op)])
            yield at, after, other
            if isinstance(node.op, (ast.Add, ast.Sub)):  # drop a term
                yield at, end(node), b""
            if isinstance(node.op, ast.Add):
                yield start(node), after, b""
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield start(node), start(node) + 3, b""
        elif (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
                and not isinstance(node.operand, ast.Constant)):
            yield start(node), start(node) + 1, b""
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            value = node.value
            for other in [not value] if type(value) is bool else [value + 1, 0][:1 + (value == 1)]:
                yield start(node), end(node), repr(other).encode()
        elif isinstance(node, ast.Call) and called(node) not in SYMMETRIC:
            for a, b in zip(node.args, node.args[1:]):
                if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred):
                    one, two = text[start(a):end(a)], text[start(b):end(b)]
                    yield start(a), end(b), two + text[end(a):start(b)] + one
        elif (isinstance(node, ast.AugAssign)
                or isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Yield))
                and called(node.value) not in DULL
                or isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)):
            yield start(node), end(node), b"pass"


def generated() -> list[Mutant]:
    """All generated mutants, equivalent ones included."""
    found = []
    for path in sorted(ROOT / file for name, file in FILES.items() if name not in SKIPPED):
        text = path.read_bytes()
        for start, end, new in edits_of(text):
            if new == text[start:end]:
                continue
            begin = text.rfind(b"\n", 0, start) + 1
            before, after = text[begin:start].decode(), text[end:].decode().partition("\n")[0]
            what = f"{before}[{text[start:end].decode()} -> {new.decode()}]{after}"
            what = " ".join(what.partition("  # ")[0].split())
            line = text.count(b"\n", 0, start) + 1
            found.append(Mutant(f"{path.name}:{line}: {what}", f"{path.name}: {what}",
                                FILES[path.name],
                                (text[:start] + new + text[end:]).decode()))
    return found


def by_hand() -> list[Mutant]:
    """The mistakes as mutants. Exits, with a line for each that does not fit its file any more."""
    found, wrong = [], []
    for name, file, old, new in MISTAKES:
        text = (ROOT / FILES[file]).read_text(encoding="utf-8")
        if text.count(old) != 1:
            wrong.append(f"{file}: {name}: the old text stands there {text.count(old)} times "
                         "(say the mistake in today's code, in mutants.py or mistakes.json)")
        found.append(Mutant(f"{file}: {name}", f"{file}: {name}", FILES[file],
                            text.replace(old, new)))
    for mutant in found:
        try:
            if mutant.file.endswith(".py"):
                compile(mutant.text, mutant.file, "exec")
        except SyntaxError as error:
            wrong.append(f"{mutant.name}: {error}")
    if wrong:
        sys.exit("\n".join(wrong))
    return found


# ---- running them --------------------------------------------------------------------------------


def tests_of(mutant: Mutant, second: bool) -> list[str]:
    """Test files to run first, and when these pass."""
    file = Path(mutant.file)
    mine = f"tests/test_{OWN.get(file.stem, file.stem)}.py"
    fast = [f"tests/{test.name}" for test in sorted((ROOT / "tests").glob("test_*.py"))
            if test.stem.removeprefix("test_") not in APART and f"tests/{test.name}" != mine]
    if second:
        return AFTER.get(file.name, fast)
    return [mine] if (ROOT / mine).is_file() else fast


def environment(copy: Path) -> dict[str, str]:
    """That of a run in a copy: its package comes before an installed one."""
    return {**os.environ, "PYTHONPATH": str(copy),
            "PYTHONDONTWRITEBYTECODE": "1"}  # a stale .pyc must not stand in for the mutant


def pytest_in(copy: Path, arguments: list[str], report: Path, limit: float | None) -> None:
    """What a process of its own does: run pytest in a copy, and write what it says to a file."""
    os.setsid()
    if limit:
        signal.alarm(round(limit) + 9)  # it ends even if nobody is left who would stop it
    with open(report, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(copy)
    os.environ.update(environment(copy))
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True
    status = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(status)


def run_tests(copy: Path, tests: list[str], options: list[str], limit: float | None) -> str:
    """Run test files in a copy; returns the test that failed first (or what went wrong), or ""."""
    report = copy.with_suffix(".txt")
    process = FORKS.Process(target=pytest_in, args=(  # not a daemon: tests start processes
        copy, ["-q", "--tb=no", "-p", "no:cacheprovider", *options, *tests], report, limit))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)  # and the processes that a test has started
        process.join()
        return f"a hang, stopped after {limit:.0f} s"
    if process.exitcode == 0:
        return ""
    output = report.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", output, re.M)
    return ", ".join(failed) or (output.strip().splitlines() or ["no output"])[-1]


def make_copy(copy: Path) -> Path:
    """Copy the repository, without what was built, into a repository of its own."""
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        ".git", ".venv", ".course", ".*cache", "__pycache__", "*.egg-info", "*.whl", "build",
        "runs", "venv"))
    for words in ("init --quiet", "add --all"):  # a handout is made of what git knows
        subprocess.run(["git", *words.split()], cwd=copy, check=True)
    code = "import steerling_min; print(steerling_min.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment(copy),
                           capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).resolve().is_relative_to(copy.resolve()):
        sys.exit(f"the copy imports {found}, not its own package")
    return copy


def run(mutants: list[Mutant], jobs: int, options: list[str], folder: Path) -> list[Mutant]:
    """Run mutants, print a line for each; returns the survivors."""
    copies: queue.Queue[Path] = queue.Queue()
    for i in range(min(jobs, len(mutants))):
        copies.put(make_copy(folder / str(i)))
    alive = mutants
    for second in (False, True):
        lists = [tests_of(mutant, second) for mutant in alive]
        began, copy = time.monotonic(), copies.get()
        everything = sorted({test for tests in lists for test in tests})
        if everything and (failed := run_tests(copy, everything, options, None)):
            sys.exit(f"these fail without any mutant (see --deselect): {failed}")
        limit = 60 + 4 * (time.monotonic() - began)
        copies.put(copy)

        def killer(mutant, tests, limit=limit):
            copy = copies.get()
            file = copy / mutant.file
            original = file.read_bytes()
            try:
                file.write_text(mutant.text, encoding="utf-8")
                return run_tests(copy, tests, ["-x", *options], limit)
            finally:
                file.write_bytes(original)
                copies.put(copy)
        left = []
        with ThreadPoolExecutor(jobs) as pool:
            for mutant, killed in zip(alive, pool.map(killer, alive, lists)):
                if killed:
                    print(f"killed    {mutant.name}    by {killed}", flush=True)
                elif second:
                    print(f"SURVIVED  {mutant.name}", flush=True)
                if not killed:
                    left.append(mutant)
        alive = left
    return alive


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--generated", action="store_true", help="generated mutants, not the listed")
    p.add_argument("--sample", type=int, metavar="N", help="so many, drawn at random")
    p.add_argument("--seed", type=int, default=0, help="of that choice")
    p.add_argument("--only", nargs="+", default=[], metavar="WORD",
                   help="mutants with one of these in their name, which begins with the file's")
    p.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    p.add_argument("--jobs", type=int, default=1, help="copies that work at the same time")
    p.add_argument("--deselect", nargs="+", default=[], metavar="TEST",
                   help="tests to leave out, tests/file.py::name, as they fail anyway")
    p.add_argument("--more", action="store_true", help="those of tests/mistakes.json, too")
    args = p.parse_args()
    if args.more:  # written module by module by somebody who had not read the tests
        more = json.loads((ROOT / "tests" / "mistakes.json").read_text(encoding="utf-8"))
        MISTAKES.extend(Mistake(name, file, old, new) for file, found in more.items()
                        for name, old, new in found)
    mutants = generated() if args.generated else by_hand()
    if args.generated and (gone := EQUIVALENT.keys() - {m.key for m in mutants}):
        sys.exit("equivalent.json has edits that are gone: " + "; ".join(sorted(gone)))
    mutants = [m for m in mutants if not args.only
               or any(word.lower() in m.name.lower() for word in args.only)]
    same = [m for m in mutants if m.key in EQUIVALENT]
    mutants = [m for m in mutants if m.key not in EQUIVALENT]
    if args.sample is not None:
        random.Random(args.seed).shuffle(mutants)
        mutants = sorted(mutants[:args.sample])
    if args.list:
        print("\n".join(mutant.name for mutant in mutants))
        print(f"{len(mutants)} mutants, and {len(same)} equivalent ones")
        return
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # of what is started here, too
    options = [f"--deselect={test}" for test in args.deselect]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        survivors = run(mutants, args.jobs, options, Path(folder))
    print(f"killed {len(mutants) - len(survivors)} of {len(mutants)}"
          + f"; {len(same)} more are equivalent" * bool(same))
    sys.exit(not args.generated and bool(survivors))


if __name__ == "__main__":
    main()
