"""The tokenizer: the 8B's ids, special tokens that text cannot produce, and a vocabulary of
one's own."""

import base64
import os
import random
import tempfile
from pathlib import Path

import pytest
import requests
import tiktoken
from conftest import TEXT

from steerling_min import Config, Tokenizer

CACHED = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # tiktoken's name for cl100k_base's rank file
SENTENCES = [
    "", " ", "The old sailor wrote home.", "  two  spaces\tand a tab\r\n\n", "naïve café, œuvre",
    "1234567890 + 3.14 = ?", "日本語のテキスト", "עברית and العربية", "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 \u200b\u2028\x00\x7f",
    "<|mask|> <|endoftext|><|endofchunk|><|eot_id|>",
]


@pytest.fixture(scope="module")
def cl100k() -> Tokenizer:
    cache = (os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
             or Path(tempfile.gettempdir()) / "data-gym-cache")
    if not (Path(cache) / CACHED).is_file():
        pytest.skip(f"cl100k_base is not cached in {cache}; TIKTOKEN_CACHE_DIR names the folder")
    return Tokenizer.cl100k()


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.train(TEXT, 512)


# ---- the 8B's ------------------------------------------------------------------------------------


def test_the_8bs_ids(cl100k):
    assert cl100k.vocab_size == 100_281
    for token, i in {"<|endoftext|>": 100_257, "<|pad|>": 100_277, "<|bos|>": 100_278,
                     "<|endofchunk|>": 100_279, "<|mask|>": 100_280}.items():
        assert cl100k.decode([i], specials=True) == token
    for name, i in Config.steerling_8b().token_ids.items():
        assert getattr(cl100k, name) == i, name
    assert cl100k.encode("hello world") == [15339, 1917], "cl100k_base's own ids"


def test_the_instruct_variant_has_three_more(cl100k):
    instruct = Tokenizer.cl100k(instruct=True)
    assert instruct.vocab_size == 100_284
    names = ("start_header_id", "end_header_id", "eot_id")
    assert [getattr(instruct, name) for name in names] == [100_281, 100_282, 100_283]
    assert instruct.decode([100_281, 100_282, 100_283], specials=True) == (
        "<|start_header_id|><|end_header_id|><|eot_id|>")
    assert instruct.mask_token_id == cl100k.mask_token_id


def test_whatever_the_model_writes_can_be_decoded(cl100k):
    """cl100k_base leaves ids without a token, 100256 for one; the model has logits for them."""
    everything = cl100k.decode(range(cl100k.vocab_size))
    assert "<|" not in cl100k.decode(range(100_256, cl100k.vocab_size)), "all of them special"
    assert len(everything) > 100_000
    assert cl100k.decode([100_256, 9906], specials=True) == "<|unused_100256|>Hello"


@pytest.mark.parametrize("error", [requests.ConnectionError("no\nroute"), TimeoutError(),
                                   PermissionError("cache")], ids=lambda e: type(e).__name__)
def test_without_network_one_line_says_what_to_do(error, monkeypatch):
    def get_encoding(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(FileNotFoundError) as caught:
        Tokenizer.cl100k()
    message = str(caught.value)
    assert "TIKTOKEN_CACHE_DIR" in message and "cl100k_base" in message
    assert "\n" not in message and type(error).__name__ in message


# ---- text and ids --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SENTENCES, ids=range(len(SENTENCES)))
@pytest.mark.parametrize("which", ["cl100k", "tiny"])
def test_text_comes_back_and_never_makes_a_special_token(which, text, request):
    tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids & set(ids), "text that looks like one is ordinary text"


def test_an_unpaired_surrogate_is_replaced_not_fatal(tiny):
    """What a shell hands over when an argument is not UTF-8."""
    assert tiny.decode(tiny.encode("a\udcffb")) == "a\ufffdb"


def test_a_chat_follows_the_template_and_ends_where_the_answer_begins(tiny):
    ranks = tiny.encoding._mergeable_ranks
    instruct = Tokenizer.from_ranks(ranks, instruct=True)
    ids = instruct.encode_chat([("system", "Be kind."), ("user", "Hi <|eot_id|>")])
    assert instruct.decode(ids, specials=True) == (
        "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|endofchunk|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi <|eot_id|><|endofchunk|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert ids.count(instruct.eot_id) == 2, "text that looks like a special token is text"
    with pytest.raises(ValueError, match="a chat needs an instruct model"):
        tiny.encode_chat([("user", "Hi")])


def test_chunks_stand_on_lines_of_their_own_and_texts_apart(tiny):
    a, b = tiny.encode("ab"), tiny.encode("cd")
    eoc, bos, eos = tiny.endofchunk_token_id, tiny.bos_token_id, tiny.eos_token_id
    assert tiny.decode([bos, *a, eoc, *b, eos, eos]) == "ab\ncd", "nothing before, nothing behind"
    for between in ([eos, bos], [eos], [bos], [eoc, eos, eos, bos]):
        assert tiny.decode([*a, *between, *b]) == "ab\n\ncd", "an end that is missing is one, too"
    assert tiny.decode([eoc, *tiny.encode("\n "), eoc]) == "\n ", "its own blanks stay"


def test_other_special_tokens_are_left_out_unless_asked_for(tiny):
    a, b = tiny.encode("ab"), tiny.encode("cd")
    ids = [tiny.bos_token_id, *a, tiny.mask_token_id, *b, tiny.pad_token_id, tiny.eos_token_id]
    assert tiny.decode(ids) == "abcd"
    assert tiny.decode(ids, specials=True) == "<|bos|>ab<|mask|>cd<|pad|><|endoftext|>"
    both = tiny.encode("\u00e9")
    assert tiny.decode([both[0], tiny.mask_token_id, both[1]]) == "\u00e9"


@pytest.mark.parametrize("wrong", [-1, 512, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(tiny, wrong):
    with pytest.raises(ValueError, match=f"token id {wrong} .* vocabulary of 512"):
        tiny.decode([97, wrong])


# ---- a vocabulary of one's own -------------------------------------------------------------------


@pytest.mark.parametrize("size", [261, 300, 512])
def test_training_gives_exactly_the_size_asked_for_where_there_are_words_enough(size):
    tokenizer = Tokenizer.train(TEXT, size)
    assert tokenizer.vocab_size == size
    assert sorted(tokenizer.special_ids) == list(range(size - 5, size)), "the five specials last"
    pieces = [tokenizer.encoding.decode_single_token_bytes(i) for i in range(size - 5)]
    assert len(set(pieces)) == size - 5, "every id has a piece of text of its own"
    assert Tokenizer.train("one two one", 512).vocab_size == 256 + 3 + 5, "'one', ' two', ' one'"


def test_the_tiny_models_ids_are_its_configs(tiny):
    for name, i in Config.tiny(vocab_size=512).token_ids.items():
        assert getattr(tiny, name) == i, name


def test_the_most_frequent_words_become_one_token(tiny):
    assert len(tiny.encode(" abcd aaab")) == 2, "a word takes the space before it along"
    assert len(tiny.encode("zq")) == 2, "never seen: a token per byte"
    two = Tokenizer.train("rare often often", 256 + 1 + 5)  # room for one word
    assert len(two.encode("rare often")) == 4 + 1, "the rare one is spelt out"
    assert len(tiny.encode("é")) == 2, "outside ASCII: a token per byte of UTF-8"


def test_a_saved_vocabulary_is_read_back(tiny, tmp_path):
    tiny.save(tmp_path / "tokenizer.tiktoken")
    again = Tokenizer.from_file(tmp_path / "tokenizer.tiktoken", instruct=True)
    assert again.encode(TEXT) == tiny.encode(TEXT)
    assert again.mask_token_id == tiny.mask_token_id == 511
    assert again.vocab_size == 515 and again.eot_id == 514


def lines(ranks):
    return "".join(f"{base64.b64encode(piece).decode()} {i}\n" for piece, i in ranks)


BYTES = [(bytes([i]), i) for i in range(256)]


def test_the_256_bytes_alone_are_a_vocabulary(tmp_path):
    (tmp_path / "ranks").write_text(lines(BYTES))
    tokenizer = Tokenizer.from_file(tmp_path / "ranks")
    assert tokenizer.encode("né") == list("né".encode())
    assert tokenizer.vocab_size == 261


@pytest.mark.parametrize("content", [
    "", "hello\n", "%%% 0\n", lines(BYTES) + "IG9s!!!! 256\n", lines(BYTES + [(b"", 256)]),
    "YQ== one\n", "YQ== 0 1\n", b"\xff\xfe\x00",
    lines(BYTES[:255] + [(b"\xff", 256)]), lines(BYTES + BYTES[97:98]),
    lines(BYTES + [(b"ab", 255)]), lines(BYTES[:-1]),
], ids=["empty", "no rank", "not base64", "not base64 alone", "no bytes", "not a number",
        "three columns", "binary", "a gap in the ranks", "a line twice", "a rank twice",
        "a byte missing"])
def test_a_malformed_rank_file_is_named(content, tmp_path):
    file = tmp_path / "tokenizer.tiktoken"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="tokenizer.tiktoken") as error:
        Tokenizer.from_file(file)
    assert "\n" not in str(error.value)


# ---- token by token ------------------------------------------------------------------------------


def test_a_character_of_several_tokens_stands_with_the_last_of_them(tiny):
    text = "The old caf\u00e9 \u2615 \u65e5\u672c"
    pieces = tiny.pieces(tiny.encode(text))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert tiny.pieces([*"\u00e9\u2615a".encode()]) == ["", "\u00e9", "", "", "\u2615", "a"]


def test_bytes_that_are_no_character_stand_with_their_own_token(tiny):
    mask = tiny.mask_token_id
    assert tiny.pieces([0xe2, 0x98, 97]) == ["", "\ufffd", "a"]
    assert tiny.pieces([0xe2, mask, 0xff]) == ["\ufffd", "<|mask|>", "\ufffd"]
    assert tiny.pieces([97, 0xe2]) == ["a", "\ufffd"] and tiny.pieces([]) == []


@pytest.mark.parametrize("name", ["tiny", "cl100k"])
def test_pieces_joined_are_the_decoded_text(name, request):
    tokenizer, draw = request.getfixturevalue(name), random.Random(0)
    for sentence in SENTENCES:
        assert "".join(tokenizer.pieces(tokenizer.encode(sentence))) == sentence
    rare = [*range(200, 256), *range(tokenizer.vocab_size - 5, tokenizer.vocab_size)]
    for _ in range(300):
        ids = draw.choices(rare, k=draw.randrange(12))
        pieces = tokenizer.pieces(ids)
        assert "".join(pieces) == tokenizer.decode(ids, specials=True) and len(pieces) == len(ids)


def test_a_token_alone_is_quoted_as_python_writes_it(tiny):
    assert list(map(tiny.quoted, [97, 10, 0xe2, tiny.endofchunk_token_id])) == [
        "'a'", r"'\n'", r"b'\xe2'", "<|endofchunk|>"]
