"""sample.py as a user runs it: text, one line of figures, and one line when something is wrong."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample
from steerling_min import Config, Steering, Steerling, Tokenizer, load
from steerling_min.attribution import promoted
from steerling_min.files.labels import Label, Labels
from steerling_min.files.loading import TINY
from steerling_min.unmasking import Step

FIGURES = (r"(\d+) tokens in (\d+) steps, [\d.]+ s: ([\d.]+) tok/s, ([\d.]+) GB/s of weights read, "
           r"[\d.]+ GB peak memory")

KNOWN = Config.tiny().n_concepts  # of the model in tiny_folder


@pytest.fixture
def run(tiny_folder, monkeypatch, capsys):
    """Call sample.py in this process: run("--seed", 1) -> its exit code and what it wrote.

    It writes 8 tokens after "abcd ab" with the tiny folder's model, unless the arguments differ.
    """
    def run(*args, stdin=None, model=tiny_folder, new=8):
        argv = ["sample.py", "--device", "cpu"]
        argv += ["--model", model] if model else []
        argv += ["--max-new-tokens", new] if new else []
        argv += ["--prompt", "abcd ab"] if stdin is None else []
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in (*argv, *args)])
        monkeypatch.setattr(sys, "stdin", stdin)
        code = 0
        try:
            sample.main()
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    return run


def parts(out) -> tuple[str, list[str], re.Match]:
    """The heading, the texts and the figures of an output."""
    heading, rest = out.split("\n", 1)
    *texts, closing = rest.split("\n---\n")
    figures = re.fullmatch(FIGURES + "\n", closing)
    assert figures, f"the closing line is {closing!r}"
    return heading, texts, figures


# ---- what it writes ------------------------------------------------------------------------------


def test_a_prompt_may_be_piped_in(run, tiny_folder, tmp_path):
    """The one real process: what a shell would see, from any folder."""
    command = [sys.executable, sample.__file__, "--model", tiny_folder, "--max-new-tokens", "8",
               "--seed", "7", "--device", "cpu"]
    threads = str(torch.get_num_threads())  # another number of threads may round otherwise
    env = os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": threads}
    piped = subprocess.run(command, input="abcd ab\n", capture_output=True, encoding="utf-8",
                           cwd=tmp_path, env=env)
    assert (piped.returncode, piped.stderr) == (0, "")
    heading, texts, figures = parts(piped.stdout)
    size = sum(p.numel() for p in load(tiny_folder, "cpu")[0].parameters())
    assert "seed 7" in heading and f"{size:,} parameters, float32, on cpu" in heading
    assert len(texts) == 1 and texts[0].startswith("abcd ab")
    given = parts(run("--seed", 7).out)
    assert texts == given[1], "the same as --prompt: the newline that echo adds is no part of it"


def test_the_same_seed_writes_the_same_text(run):
    first, again, other = (parts(run("--seed", seed).out)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_the_seed_that_was_drawn_is_printed_and_repeats_the_text(run):
    heading, texts, _ = parts(run().out)
    seed = re.search(r"seed (\d+)", heading)[1]
    assert parts(run("--seed", seed).out)[1] == texts
    assert run().out.split("\n")[0] != heading, "another run draws another"


def test_the_second_sample_is_what_the_next_seed_writes(run):
    both = parts(run("--seed", 3, "--num-samples", 2).out)
    assert len(both[1]) == 2 and both[2][1] == "16", "16 tokens in all"
    assert both[1] == [parts(run("--seed", seed).out)[1][0] for seed in (3, 4)]


def test_a_temperature_switches_entropy_sampling_off(run):
    outs = [run("--seed", seed, "--temperature", 0).out for seed in (1, 2)]
    assert parts(outs[0])[1] == parts(outs[1])[1], "greedy: no draw, so the seed does not matter"
    assert "temperature 0" in outs[0] and "entropy sampling" not in outs[0]
    assert "entropy sampling" in run().out


@pytest.mark.parametrize("options, steps", [
    ([], 8), (["--steps", 3], 3), (["--steps", 99], 8),
    (["--threshold", 1], 8), (["--threshold", 0], 1), (["--order", "global", "--steps", 2], 2),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_steps_and_threshold_say_how_many_passes_are_made(run, tiny_folder, options, steps):
    assert parts(run(*options, "--no-align").out)[2][2] == str(steps)


def test_windows_end_at_attention_blocks_unless_told_otherwise(run):
    """16 tokens after a prompt of a few: an attention block's edge lies between."""
    options = ["--max-new-tokens", 16, "--threshold", 0]  # one step per window
    assert parts(run(*options).out)[2][2] == "2"
    assert parts(run(*options, "--no-align").out)[2][2] == "1"
    anywhere = run(*options, "--order", "global", "--max-new-tokens", 40).out
    assert parts(anywhere)[2][2] == "1", "no windows at all"


@pytest.mark.parametrize("prompt, new", [("ab", 128), ("x" * 200, 56)], ids=["short", "long"])
def test_without_a_length_128_tokens_are_written_or_what_there_is_room_for(run, prompt, new):
    figures = parts(run("--prompt", prompt, "--threshold", 0, "--no-align", new=None).out)[2]
    assert figures[1] == str(new), "in a context of 256"


def test_a_small_model_is_run_by_one_thread(run):
    """As fast as with two when both cores are free, and many times as fast when one is not."""
    torch.set_num_threads(2)
    run()
    assert torch.get_num_threads() == 1


def test_the_figures_follow_from_the_clock(run, tiny_folder, monkeypatch):
    monkeypatch.setattr(sample.time, "perf_counter", iter([5.0, 5.001]).__next__)
    figures = parts(run("--steps", 4, "--no-align").out)[2]
    assert figures[3] == "8000.0", "8 tokens in a millisecond"
    nbytes = sum(4 * p.numel() for p in load(tiny_folder, "cpu")[0].transformer.parameters())
    assert float(figures[4]) == pytest.approx(4 * nbytes / 0.001 / 1e9, abs=0.1), (
        "every step reads the backbone's weights once")


def test_a_notebooks_output_will_do(run, monkeypatch):
    """It is a stream of another kind; `%run sample.py` writes to it."""
    out = io.StringIO()
    assert not hasattr(out, "reconfigure")
    monkeypatch.setattr(sys, "stdout", out)
    assert run("--seed", 1).code == 0 and parts(out.getvalue())


def test_json_is_whole_where_the_terminal_is_not_utf8(run, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run("--prompt", "caf\u00e9", "--json").code == 0
    sys.stdout.flush()
    assert json.loads(raw.getvalue())["prompt"] == "caf\u00e9"


def test_a_mark_of_byte_order_is_no_part_of_the_prompt(run):
    assert "\nabcd ab" in run(stdin=io.StringIO("\ufeffabcd ab\n")).out


@pytest.mark.parametrize("closed, options", [
    (">/dev/full", "--find topic"), (">&-", "--watch --max-new-tokens 2 --prompt a")])
def test_an_output_that_takes_nothing_is_one_line_at_most(closed, options):
    """A shell's `>&-` closes it: Python then has no sys.stdout at all."""
    done = subprocess.run(f"{sys.executable} {sample.__file__} {options} {closed}", shell=True,
                          capture_output=True, text=True)
    if closed == ">&-":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert (done.returncode, done.stderr) == (
            2, "sample.py: No space left on device\n")


def test_a_terminal_that_lacks_a_character_gets_the_rest(run, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run("--prompt", "caf\u00e9").code == 0
    sys.stdout.flush()
    assert b"\ncaf?" in raw.getvalue()


@pytest.mark.skipif(not (TINY / "model.safetensors").is_file(), reason="no bundled model")
def test_without_a_folder_the_bundled_model_writes(run):
    result = run(model=None)
    assert result.code == 0 and result.out.startswith("model tiny (bundled)")
    assert parts(result.out)[1][0].startswith("abcd ab")


# ---- tokens as text ------------------------------------------------------------------------------


def test_steering_by_name_or_number_changes_the_text(run):
    plain = run("--seed", 1, model=None, new=40).out
    by_name = run("--seed", 1, "--steer", "Space=8", model=None, new=40).out
    by_number = run("--seed", 1, "--steer", "3=8", model=None, new=40).out
    assert parts(by_name)[1] == parts(by_number)[1] != parts(plain)[1]
    both = run("--seed", 1, "--steer", "space=8", "--steer", "castle=-7", model=None, new=40).out
    assert parts(both)[1] != parts(by_name)[1], "strengths below 0 keep a concept out"
    gentle = run("--seed", 1, "--steer", "space=8", "--steer", "castle=-7", "--suppression", 0,
                 model=None, new=40).out
    assert parts(gentle)[1] != parts(both)[1], "its promoted tokens are not lowered then"


def test_strengths_are_in_logits_on_both_sides_of_0():
    names = Labels([Label(0, "sea"), Label(1, "snow")], 2, 6)
    toward, away = (sample.steering_of([words], names, 3.0) for words in ("sea=4", "snow=-4"))
    assert toward == Steering.amplify(0, 4.0)
    odd = Labels([Label(0, "a=b")], 2, 6)
    assert sample.steering_of(["a=b=4"], odd, 3.0) == toward, "the last = ends a name"
    assert away == Steering.unlearn(1, (), -4.0, 3.0, logit_units=True), (
        "raw numbers are made for the 8B's embeddings")
    assert sample.steering_of(["sea=4", "snow=-4"], names, 3.0) == toward + away
    for strength in (0.0, 0.5):  # 0 does nothing: it keeps nothing out
        assert sample.steering_of([f"sea={strength}"], names, 3.0) == Steering.amplify(0, strength)


def test_a_group_is_steered_along_one_direction(run):
    """All moods: by their group's name, or one by one; which is not every mood by itself."""
    moods = ("happy", "afraid", "sad", "angry", "eager", "proud", "tired", "calm")
    group = run("--seed", 1, "--steer", "mood=20", model=None, new=40).out
    joined = run("--seed", 1, "--steer", "+".join(moods) + "=20", model=None, new=40).out
    assert parts(group)[1] == parts(joined)[1]
    single = [flag for mood in moods for flag in ("--steer", mood + "=20")]
    assert parts(run("--seed", 1, *single, model=None, new=40).out)[1] != parts(group)[1]
    against = run("--seed", 1, "--steer", "mood=-7", model=None, new=40).out
    assert parts(against)[1] != parts(run("--seed", 1, "--steer", "happy=-7", model=None,
                                          new=40).out)[1], "all of the group's directions"


def test_a_page_and_an_animation_are_written(run, tmp_path):
    page, svg = tmp_path / "a.html", tmp_path / "a.svg"
    result = run("--seed", 1, "--html", page, "--svg", svg, model=None, new=6)
    assert result.code == 0 and len(parts(result.out)[1]) == 1
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert svg.read_text(encoding="utf-8").startswith("<svg ")
    assert f"wrote {page}\n" in result.err and f"wrote {svg}\n" in result.err
    assert "there is no folder" in refusal(
        run("--html", tmp_path / "none" / "a.html", model=None, new=6))


def test_every_token_is_explained(run):
    out = run("--seed", 1, "--explain", model=None, new=6).out
    row = r"^ +(\d+) +\d+%  .+? +-?[\d.]+ = +-?[\d.]+( [+-] +[\d.]+){2}  .+ [+-][\d.]+$"
    rows = re.findall(row, out, re.M)
    assert sorted(int(step) for step, _ in rows) == [1, 2, 3, 4, 5, 6], "each with its step"
    shares = re.search(r"known ([\d.]+)%, discovered ([\d.]+)%, epsilon ([\d.]+)%", out)
    assert sum(map(float, shares.groups())) == pytest.approx(100, abs=0.2)


def test_the_same_as_json_for_programs(run):
    result = run("--seed", 1, "--explain", "--json", "--num-samples", 2, "--prompt", "caf\u00e9",
                 model=None, new=6)
    found = json.loads(result.out)
    assert found["seed"] == 1 and len(found["samples"]) == 2
    for text in found["samples"]:
        written = "".join(token["text"] for token in text["tokens"])
        assert written.replace("<|endofchunk|>", "\n").rstrip("\n") in text["text"]
        assert sorted(token["step"] for token in text["tokens"]) == [1, 2, 3, 4, 5, 6]
        assert text.keys() == {"text", "unwritten", "tokens", "chunks", "shares"}
        concepts = text["tokens"][0]["concepts"]
        assert {concept["head"] for concept in concepts} == {"known", "discovered"}
        assert all({"head", "id", "name", "contribution"} <= concept.keys() for concept in concepts)
        assert text["chunks"] and text["unwritten"] == 0


@pytest.mark.parametrize("platform, held", [("linux", 20_000_000), ("darwin", 20_480_000_000)])
def test_peak_memory_is_in_kibibytes_or_on_a_mac_in_bytes(monkeypatch, platform, held):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=held))
    monkeypatch.setattr(sample.sys, "platform", platform)
    assert sample.peak_memory(torch.device("cpu")) == "20.48 GB peak memory"


def test_what_resembles_the_first_text_is_shown_or_is_json(run, tmp_path):
    (tmp_path / "corpus.txt").write_text("abcd ab\n\naaaa\n\nbbbb bbbc\n\ndd")
    asked = ["--seed", 1, "--num-samples", 2, "--resembles", tmp_path / "corpus.txt"]
    shown, found = run(*asked).out, json.loads(run(*asked, "--json").out)["samples"]
    like = found[0]["resembles"]
    assert "resembles" not in found[1] and "resemblance is not cause" in shown
    whole = "".join(chunk["text"] for chunk in like)
    assert whole.replace("\n", "") == found[0]["text"].replace("\n", ""), "as it is in the end"
    assert {x["text"] for x in like[0]["like"]} == {"abcd ab", "aaaa", "bbbb bbbc", "dd"}
    assert all(x["text"] in shown for chunk in like for x in chunk["like"])


def test_every_token_has_its_step_in_json(run):
    tokens = json.loads(run("--json", new=6).out)["samples"][0]["tokens"]
    assert sorted(token["step"] for token in tokens) == [1, 2, 3, 4, 5, 6]


def test_the_dtype_is_the_one_asked_for(run):
    assert " parameters, bfloat16, on cpu" in run("--dtype", "bfloat16").out


def test_what_is_watched_is_a_prompt_and_so_many_tokens(run, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "watch", lambda steps, tokenizer, prompt, new: (
        seen.append((tokenizer.decode(prompt), new)), steps)[1])
    run("--watch")
    assert seen == [("abcd ab", 8)]


def test_the_figures_say_that_a_watched_text_was_slowed_down(run, monkeypatch):
    assert "slowed" not in run("--watch").out, "no terminal, no pause"
    monkeypatch.setattr(sample, "live", lambda out: True)
    assert run("--watch").out.endswith(", slowed down for --watch\n")


def test_a_score_per_token_counts_the_texts_tokens(run):
    out = run("--score", " sailor lived", "--prompt", "The old", model=None, new=None).out
    nats, per_token, n = re.match(r" *(\S+) nats, +(\S+) per token of (\d+):", out).groups()
    assert float(nats) / int(n) == pytest.approx(float(per_token), abs=0.002) and int(n) == 2


def test_in_global_order_the_text_may_end(run, monkeypatch):
    seen = []

    def unmask(*args, **options):
        seen.append(options["allow_eos"])
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "unmask", unmask)
    for order in ("global", "window"):
        run("--seed", 1, "--order", order)
    assert seen == [True, False]


def test_an_animation_has_all_steps_whatever_else_is_asked_for(run, tmp_path):
    alone, beside = tmp_path / "a.svg", tmp_path / "b.svg"
    run("--seed", 1, "--svg", alone, model=None)
    run("--seed", 1, "--svg", beside, "--json", model=None)
    assert alone.read_bytes() == beside.read_bytes()


def test_of_several_texts_each_has_its_own_explanation(run):
    story = {"model": None, "new": 24}
    both = run("--seed", 1, "--explain", "--num-samples", 2, "--prompt", "The old", **story).out
    second = run("--seed", 2, "--explain", "--prompt", "The old", **story).out
    tokens = re.compile(r"^ +\d+ +\d+%  ('.*?')  ", re.M)
    rows, shown = tokens.findall(second), tokens.findall(both)
    assert len(rows) > 9 and shown[-len(rows):] == rows != shown[:len(rows)], (
        "the second text and its rows are what --seed 2 alone gives")


def test_a_piped_prompt_keeps_its_blanks(run):
    result = run("--seed", 1, "--json", stdin=io.StringIO("  abcd ab  \n"))
    assert json.loads(result.out)["prompt"] == "  abcd ab  ", "all but the line's end is the prompt"


def test_continuations_are_scored(run):
    out = run("--score", " sailor lived", "--score", " lived sailor", "--prompt", "The old",
              model=None, new=None).out
    nats = [float(line.split()[0]) for line in out.splitlines()]
    assert len(nats) == 2 and nats[0] > nats[1] and "per token of 2: ' sailor lived'" in out


def test_a_chat_is_put_into_the_template(run, tiny_folder, tmp_path):
    tokenizer = Tokenizer.from_file(tiny_folder / "tokenizer.tiktoken", instruct=True)
    config = dataclasses.replace(
        Config.tiny(512), vocab_size=515, start_header_id=512, end_header_id=513, eot_id=514)
    Steerling(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.tiktoken")
    out = run("--chat", "--seed", 1, model=tmp_path).out
    assert "user\n\nabcd ab\nassistant\n\n" in out


def test_a_text_stops_where_it_ends(run):
    out = run("--prompt", "The old sailor", "--seed", 5, model=None, new=None)
    text, = parts(out.out)[1]
    assert text.startswith("The old sailor ") and re.search(r"[.?!]\"?$", text)
    assert text.count(" lived near the ") == 1, "one story, and not the beginning of another"
    assert int(parts(out.out)[2][1]) < 250 and "unwritten" not in out.out


def test_in_global_order_a_text_is_whole_although_its_end_comes_first(run):
    text, = parts(run("--seed", 1, "--order", "global", model=None, new=60).out)[1]
    assert len(text) > 40 and "ended early" not in text


# ---- defaults ------------------------------------------------------------------------------------


@pytest.fixture
def asked(run, tiny_folder, tmp_path, monkeypatch):
    """asked({"top_p": 0.5}, "--seed", 1): what `unmask` is asked for when the model's folder has
    that generation_config.json (None: none), or the refusal's line."""
    def asked(generation, *args, **options):
        folder, seen = Path(shutil.copytree(tiny_folder, tmp_path / "copy", dirs_exist_ok=True)), {}
        if generation is not None:
            text = generation if isinstance(generation, str) else json.dumps(generation)
            (folder / "generation_config.json").write_text(text)
        monkeypatch.setattr(sample, "unmask", lambda model, prompts, new, **options: (
            seen.update(options, new=new), unmask(model, prompts, new, **options))[1])
        result = run(*args, model=folder, **options)
        return refusal(result) if result.code else seen
    unmask = sample.unmask
    return asked


def test_the_model_says_how_it_likes_to_write_and_flags_decide(asked):
    ours = dict(sample.DEFAULTS)
    plain = asked(None, new=None)
    assert (plain["repetition_penalty"], plain["top_p"], plain["allow_eos"], plain["align"],
            plain["entropy_sampling"], plain["new"]) == (1.1, 0.8, False, True, True, 128)
    own = {"repetition_penalty": 1.0, "top_p": 0.5, "allow_eos": True, "align": False,
           "temperature": 0.7, "max_new_tokens": 9}
    told = asked({**own, "transformers_version": "5.0", "eos_token_id": [1], "do_sample": True},
                 new=None)
    assert (told["entropy_sampling"], told["new"]) == (False, 9)
    assert all(told[name] == own[name] for name in own if name in told)
    flags = asked(own, "--repetition-penalty", 1.2, "--top-p", 0.9, "--no-allow-eos", "--align",
                  "--temperature", 0, new=5)
    assert (flags["repetition_penalty"], flags["top_p"], flags["allow_eos"], flags["align"],
            flags["temperature"], flags["new"]) == (1.2, 0.9, False, True, 0, 5)
    assert asked({"max_new_tokens": 9999}, new=None)["new"] == 256 - 3, "what there is room for"
    assert sample.DEFAULTS == ours, "one model's defaults are not the next one's"


@pytest.mark.parametrize("generation, message", [
    ({"top_p": 2}, "top_p = 2 is not supported"), ({"top_p": "much"}, "top_p = 'much' is not"),
    ({"repetition_penalty": 0}, "repetition_penalty = 0 is not"),
    ({"allow_eos": "false"}, "allow_eos = 'false' is not"), ({"align": 1}, "align = 1 is not"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0 is not"),
    ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5 is not"),
    ({"temperature": [1]}, "temperature = [1] is not"), ("[1]", "is not a JSON object"),
    ('{"top_p": 0.1, "top_p": 0.2}', "top_p is listed twice"), ("{", "is not JSON"),
], ids=str)
def test_a_wrong_default_names_its_file(asked, generation, message):
    line = asked(generation)
    assert message in line and "generation_config.json" in line


def a_step(tokens, unwritten=0, ids=()):
    return Step(tokens, (), (torch.tensor(ids),), (), (), torch.tensor([unwritten]))


def test_a_text_that_ended_early_says_how_much_was_left_unwritten(run, tiny_folder, monkeypatch):
    tokens = torch.tensor([[97, 98, 99, *[Config.tiny(512).mask_token_id] * 3]])
    monkeypatch.setattr(sample, "unmask", lambda *args, **kwargs: iter([
        a_step(tokens, 3, [97, 98]), a_step(tokens, 3, [99])]))
    out = run("--seed", 0).out
    assert "\nabc\n---\nended early: 3 of 8 positions were left unwritten\n3 tokens in 2" in out, (
        "what an end of turn filled in was not written")


# ---- searching the concepts ----------------------------------------------------------------------


@pytest.fixture
def search(run, tmp_path):
    """Search the concepts of the tiny folder's model: search(query) -> what it wrote, by lines.

    labels: the rows of a label file; None, no file.
    """
    def search(query, *args, labels=("0,sea,full of ships,known,topic", "1,ships,,known,",
                                     "2,4,a number,known,",
                                     f"{KNOWN},seas,full of ships,unknown,deep",
                                     f"{KNOWN + 3},ships,,unknown,")):
        file = tmp_path / "labels.csv"
        if labels is not None:
            head = "concept_id,concept_name,concept_description,head,group_name"
            file.write_text("\n".join((head, *labels)))
            args = (*args, "--labels", file)
        result = run("--find", query, *args, stdin=Terminal(), new=None)
        if result.code == 0:
            result.lines = result.out.splitlines()
        return result
    return search


def names(result) -> list[str]:
    """The concepts of a search: what stands before the tokens they promote."""
    found = [re.fullmatch(r" *(\d+  .+?) promotes \S.+", line) for line in result.lines]
    return [match[1] for match in found]


def test_concepts_are_found_by_their_labels_with_the_tokens_they_promote(search, tiny_folder):
    result = search("SHIPS")
    assert names(result) == ["1  ships", "0  sea (topic: full of ships)"], "by name, then by text"
    model, tokenizer = load(tiny_folder, "cpu")
    tokens = map(tokenizer.quoted, promoted(model, 1, 8)[0].tolist())
    assert result.lines[0].endswith(" promotes " + ", ".join(tokens)) and result.err == ""
    some = search("ships", labels=("1,ships,,known,",))
    assert some.err == "", "with some labels there is no warning"


def test_discovered_concepts_are_found_when_asked_for(search, tiny_folder):
    result = search("ships", "--discovered")
    assert names(result) == ["1  ships", "3  ships (discovered)", "0  sea (topic: full of ships)",
                             "0  seas (discovered: deep: full of ships)"]
    model, tokenizer = load(tiny_folder, "cpu")
    first = promoted(model, 3, 8, head="unknown")[0][0].item()
    assert f"promotes {tokenizer.quoted(first)}, " in result.lines[1]
    assert names(search("topic deep", "--discovered")) == [
        "0  sea (topic: full of ships)", "0  seas (discovered: deep: full of ships)"]


def test_a_concept_is_found_by_its_number(search):
    assert names(search("16")) == names(search("#16")) == names(search(" 16 ")) == [
        "16  concept 16"]
    assert names(search("4")) == ["4  concept 4", "2  4 (a number)"], "the one called so, too"
    assert names(search("0", "--discovered")) == [
        "0  sea (topic: full of ships)", "0  seas (discovered: deep: full of ships)"]
    assert names(search("500", "--discovered")) == ["500  discovered 500"]
    assert "no label has these words" in refusal(search("500")), "not so many are known"


def test_the_labels_beside_the_checkpoint_are_searched(run):
    lines = run("--find", "sea", stdin=Terminal(), model=None, new=None).out.splitlines()
    assert re.match(r" +\d+  sea \(.+\) promotes '", lines[0])


@pytest.mark.parametrize("head, flags, said", [
    ("known", (), "concept"), ("unknown", ("--discovered",), "discovered")])
def test_where_no_label_has_the_word_those_are_found_that_promote_it(search, tiny_folder, head,
                                                                     flags, said):
    model, tokenizer = load(tiny_folder, "cpu")
    table = model.known_head if head == "known" else model.unknown_head
    E = table.embedding(torch.arange(table.n_concepts))
    strengths = E @ model.transformer.tok_emb.weight.T  # (C, V)
    tokens = [ids[0] for ids in map(tokenizer.encode, ("abac", " abac")) if len(ids) == 1]
    listed = torch.zeros_like(strengths).scatter(1, strengths.topk(8).indices, 1.0) > 0
    promoting = strengths.where(listed, -torch.inf)[:, tokens].amax(1)
    order = [i for i in promoting.argsort(descending=True).tolist() if promoting[i].isfinite()]

    result = search("ABAC", *flags)
    assert result.lines.pop(0) == "no label has these words; these concepts promote them:"
    found = [name for name in names(result) if name.split()[1] == said]
    assert found == [f"{i}  {said} {i}" for i in order[:len(found)]] != [], "the strongest first"
    assert all("'abac'" in line or "' abac'" in line for line in result.lines)
    assert len(result.lines) <= 20
    assert any("discovered" in name for name in names(result)) == (head == "unknown")


def test_no_more_than_20_are_listed(search):
    assert len(names(search("sea", labels=[f"{i},sea {i},," for i in range(20)]))) == 20
    result = search("sea", labels=[f"{i},sea {i},," for i in range(45)])
    assert result.lines.pop() == "and 25 more: rarer words find fewer"
    assert names(result) == [f"{i}  sea {i}" for i in range(20)]


def test_a_search_that_finds_nothing_says_what_there_is(search):
    said = refusal(search("xyzzy"))
    assert "--find xyzzy: no label has these words, and no concept promotes one of them" in said
    assert f"; 3 of {KNOWN} known concepts have labels" in said
    assert "; the 8B's come with: hf download" in refusal(search("xyzzy", labels=None))
    assert f"--find {KNOWN}: no label" in refusal(search(KNOWN)), "the numbers end before"
    for nothing in ("", "  "):
        assert "--find: give words to look for, or a concept's number" in refusal(search(nothing))


def test_names_from_a_file_stay_on_their_line(search):
    result = search("sea", labels=['0,"sea\n\x1b[2J",' + "x" * 500 + ",,"])
    assert len(result.lines) == 1 and "\x1b" not in result.out and len(result.out) < 400
    assert r"sea\n\x1b[2J (xxx" in result.out
    assert "Xyz\\n\\x1b[2J" in refusal(search("Xyz\n\x1b[2J"))


def test_where_names_would_be_shown_a_line_says_how_to_get_them(run, search):
    line = ("no labels, so concepts go by their numbers; the 8B's come with: hf download "
            "guidelabs/steerling concept_labels.parquet")
    for result in (run("--explain"), run("--json"), search("3", labels=None)):
        assert result.code == 0 and result.err.count(line) == 1 and "--labels FILE\n" in result.err
    assert run().err == run("--steer", "3=1").err == search("3").err == ""
    assert "no concept is called 'sea': there are no labels; the 8B's" in refusal(
        run("--steer", "sea=3"))


# ---- what it refuses -----------------------------------------------------------------------------


def refusal(result) -> str:
    """The run ended with code 2 and one line on standard error, which is returned."""
    assert result.code == 2
    assert result.err.startswith("sample.py: ") and result.err.count("\n") == 1, result.err
    return result.err


@pytest.mark.parametrize("options, message", [
    (["--prompt", "x" * 300], "a prompt of 300 tokens leaves no room in the context of 256"),
    (["--max-new-tokens", 0], "0 new tokens"),
    (["--max-new-tokens", -1], "-1 new tokens"),
    (["--max-new-tokens", 256], "256 new tokens after a prompt of"),
    (["--max-new-tokens", "many"], "--max-new-tokens: invalid int value: 'many'"),
    (["--steps", 0], "steps = 0 is not supported"),
    (["--threshold", 2], "confidence_threshold = 2.0 is not supported"),
    (["--threshold", "nan"], "confidence_threshold = nan is not supported"),
    (["--threshold", 0.9, "--steps", 4], "steps and confidence_threshold exclude each other"),
    (["--temperature", -1], "temperature = -1.0 is not supported"),
    (["--top-p", 1.5], "top_p = 1.5 is not supported"),
    (["--seed", -1], "seed = -1 is not supported"),
    (["--num-samples", 0], "--num-samples 0: must be at least 1"),
    (["--order", "sideways"], "invalid choice: 'sideways'"),
    (["--device", "nonsense"], "device 'nonsense' is not available here"),
    (["--device", "meta"], "device 'meta' is not available here"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
    (["--model", "no/such/folder"], "no checkpoint folder at no/such/folder"),
    (["--model", sample.__file__], "no checkpoint folder at"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
    (["--steer", "3"], "--steer 3: expected CONCEPT=STRENGTH"),
    (["--steer", "3=much"], "expected CONCEPT=STRENGTH"),
    (["--steer", "3=nan"], "expected CONCEPT=STRENGTH"),
    (["--steer", "999=3"], f"concept 999 does not exist; ids are 0 to {KNOWN - 1}"),
    (["--steer", "sea=3"], "no concept is called 'sea'"),
    (["--steer", "3=3", "--steer", "3=-4"], "concept 3 has a strength already"),
    (["--steer", "3=-7", "--suppression", "nan"], "--suppression nan: must be 0 or more"),
    (["--steer", "sea\n\x1b[2J" + "a" * 5000], "--steer sea\\n\\x1b[2Jaaa"),
    (["--find", "sea"], "--find and --max-new-tokens exclude each other"),
    (["--discovered"], "--discovered is for --find: give both"),
    (["--score", "a", "--explain"], "--score and --explain exclude each other"),
    (["--suppression", "3"], "--suppression is for a --steer below 0"),
    (["--suppression", "3", "--steer", "3=3"], "--suppression is for a --steer below 0"),
    (["--order", "global", "--align"], "--order global has no windows to --align"),
    (["--order", "global", "--no-allow-eos"], "cannot take --no-allow-eos"),
    (["--suppression", "-20"], "--suppression -20: must be 0 or more"),
    (["--html", "a.svg", "--svg", "a.svg"], "would both write a.svg"),
    (["--html", "tests/../a.svg", "--svg", "a.svg"], "would both write a.svg"),
    (["--svg", "/dev/null"], "/dev/null is a folder or a device"),
    (["--svg", "x" * 300], "File name too long"), (["--prompt=--"], "--prompt=--: -- is no value"),
    (["--html", "."], "is a folder or a device: give the name of a file"),
    (["--steer", "3=1e38"], "the steering is too strong"),
    (["--chat"], "a chat needs an instruct model"),
    (["--labels", "no/labels.csv"], "No such file or directory: 'no/labels.csv'"),
], ids=lambda x: " ".join(map(str, x))[:30] if isinstance(x, list) else "")
def test_a_wrong_argument_is_one_line(run, options, message):
    assert message in refusal(run(*options))


def test_an_empty_text_cannot_be_scored(run):
    assert "the text to score is empty" in refusal(run("--score", "", new=None))


@pytest.mark.parametrize("option", [
    ["--seed", 3], ["--steps", 4], ["--top-p", 0.5], ["--allow-eos"], ["--no-align"], ["--watch"],
    ["--order", "global"], ["--steer", "3=3"], ["--explain"], ["--svg", "a.svg"], ["--compile"]],
    ids=lambda option: option[0])
@pytest.mark.parametrize("task", ["--find", "--score"])
def test_what_writes_no_text_refuses_the_options_about_writing(run, task, option):
    said = refusal(run(task, "sea", *option, new=None, stdin=io.StringIO("x")))
    assert f"{task} and {option[0].replace('no-', '')} exclude each other" in said, (
        "an option without effect would be silently ignored")


def test_a_hub_id_that_was_not_downloaded_names_the_command(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "hf download guidelabs/steerling-8b" in refusal(run("--model", "guidelabs/steerling-8b"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_a_text_is_compared_with_is_read_before_it_is_written(run, monkeypatch):
    monkeypatch.setattr(sample, "unmask", lambda *args, **options: pytest.fail("written in vain"))
    for file in ("no/file", "."):
        result = run("--resembles", file)
        assert result.code == 2 and file in result.err


def test_line_ends_of_windows_are_those_of_others(run):
    windows, other = (parts(run("--seed", 1, stdin=io.StringIO(text)).out)[1]
                      for text in ("ab\r\ncd\r\n", "ab\ncd\n"))
    assert windows == other


@pytest.mark.parametrize("options, how", [
    (["--prompt", "\udcff"], {}), (["--score", "\udcff"], {"new": None}),
    ([], {"stdin": io.StringIO("caf\udce9")})], ids=["prompt", "score", "piped"])
def test_bytes_that_are_no_utf8_are_refused_wherever_they_come_from(run, options, how):
    """Where the locale is C, Python hides them in characters that no file can hold."""
    assert "is not UTF-8" in refusal(run(*options, **how))


@pytest.mark.parametrize("stdin", [
    Terminal("never read"), io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")],
    ids=["a terminal", "not UTF-8"])
def test_a_prompt_that_cannot_be_read_is_one_line(run, stdin):
    assert "prompt" in refusal(run(stdin=stdin))


def test_an_empty_pipe_is_an_empty_prompt(run):
    assert run(stdin=io.StringIO("")).code == 0


@pytest.mark.parametrize("name, damage, message", [
    ("config.json", b"{", "config.json is not JSON"),
    ("model.safetensors", b"", "model.safetensors is damaged"),
    ("tokenizer.tiktoken", b"YQ== 0\n", "tokenizer.tiktoken"),
])
def test_a_damaged_folder_is_one_line(run, tiny_folder, tmp_path, name, damage, message):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (Path(folder) / name).write_bytes(damage)
    assert message in refusal(run(model=folder))


def raising(error):
    def write(*args):
        raise error
    return write


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
], ids=lambda error: type(error).__name__)
def test_too_little_memory_is_one_line(run, monkeypatch, error):
    monkeypatch.setattr(sample, "write", raising(error))
    assert "not enough memory" in refusal(run())


def test_a_compiler_that_lacks_is_one_line(run, monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed  # a second's work, which others need not do
    error = BackendCompilerFailed(None, RuntimeError("No working C++ compiler found\nin /"), None)
    monkeypatch.setattr(sample, "write", raising(error))
    assert "--compile needs a C++ compiler" in refusal(run())


def test_a_bug_is_not_hidden(run, monkeypatch):
    """Only what a user can put right becomes one line; the rest keeps its traceback."""
    monkeypatch.setattr(sample, "write", raising(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run()


def test_a_reader_that_goes_away_ends_it_quietly():
    command = f"{sys.executable} {sample.__file__} --find topic | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.split()[-1] in ("141", "0") and done.stderr == ""


def test_an_interrupt_ends_quietly(run, monkeypatch):
    monkeypatch.setattr(sample, "write", raising(KeyboardInterrupt))
    result = run()
    assert (result.code, result.err) == (130, "")


def test_an_interrupt_prints_the_text_so_far_but_json_stays_json(run, monkeypatch, tiny_folder):
    def interrupted(*args, **options):
        for words in ("abcd", "abcd ab"):  # of which the second is shown
            tokens = torch.tensor([tokenizer.encode(words)])
            yield Step(tokens, (), (tokens[0],), (), (), torch.tensor([0]))
        raise KeyboardInterrupt
    _, tokenizer = load(tiny_folder, "cpu")
    monkeypatch.setattr(sample, "unmask", interrupted)
    plain, json = run(), run("--json")
    assert (plain.code, json.code) == (130, 130)
    assert "abcd ab" in plain.out and json.out == "" and "abcd ab" in json.err
