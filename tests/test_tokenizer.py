"""The tokenizer: the 8B's ids, special tokens that text cannot produce, and a vocabulary of
one's own."""

import base64
import os
import random
import tempfile
from pathlib import Path

import pytest
import regex
import requests
import tiktoken
import torch
from conftest import TEXT

from steerling_min import Config, Tokenizer
from steerling_min.files.tokenizer import PATTERN, byte_pairs, merge

CACHED = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # tiktoken's name for cl100k_base's rank file
SENTENCES = [
    "", " ", "The old sailor wrote home.", "  two  spaces\tand a tab\r\n\n", "naïve café, œuvre",
    "1234567890 + 3.14 = ?", "日本語のテキスト", "עברית and العربية", "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 \u200b\u2028\x00\x7f",
    "<|mask|> <|endoftext|><|endofchunk|><|eot_id|>", "\r\n\n\n  \n\x00\x85\u3000",
    "a" * 3000, " " * 3000, "\n" * 3000, "\u0301" * 3000, "\u4e16" * 3000, "?" * 3000, "7" * 3000,
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


def test_what_generate_returns_can_be_decoded_as_it_is():
    """Without .tolist(), which everybody forgets. Numbers that come one by one will do, too."""
    tokenizer = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)})
    ids = [97, tokenizer.endofchunk_token_id, 98, tokenizer.mask_token_id, 99]
    for given in (ids, torch.tensor(ids), iter(ids)):
        assert tokenizer.decode(given) == "a\nb"


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
    assert instruct.encode_chat([("user", "")]).count(instruct.eot_id) == 1, "empty turns end, too"
    with pytest.raises(ValueError, match="a chat needs an instruct model"):
        tiny.encode_chat([("user", "Hi")])


def test_chunks_stand_on_lines_of_their_own_and_texts_apart(tiny):
    a, b = tiny.encode("ab"), tiny.encode("cd")
    eoc, bos, eos = tiny.endofchunk_token_id, tiny.bos_token_id, tiny.eos_token_id
    assert tiny.decode([bos, *a, eoc, *b, eos, eos]) == "ab\ncd", "nothing before, nothing behind"
    for between in ([eos, bos], [eos], [bos], [eoc, eos, eos, bos]):
        assert tiny.decode([*a, *between, *b]) == "ab\n\ncd", "an end that is missing is one, too"
    assert tiny.decode([eoc, *tiny.encode("\n "), eoc]) == "\n ", "its own blanks stay"


def test_five_special_tokens_follow_the_ranks_and_the_chats_only_if_asked_for(tiny):
    ranks = tiny.encoding._mergeable_ranks
    sizes = [Tokenizer.from_ranks(ranks, *said).vocab_size for said in ((), (True,))]
    assert sizes == [len(ranks) + 5, len(ranks) + 8]


def test_a_base_models_text_ends_at_the_first_hole(tiny):
    a, b, mask = tiny.encode("ab"), tiny.encode("cd"), tiny.mask_token_id
    assert tiny.decode([*a, mask, *b]) == "ab", "'cd' does not go on from 'ab'"
    assert tiny.decode([mask, *b]) == "" and tiny.decode([*a, *b, mask, mask]) == "abcd"
    assert tiny.decode([*a, mask, *b], specials=True) == "ab<|mask|>cd"
    instruct = Tokenizer.from_ranks(tiny.encoding._mergeable_ranks, instruct=True)
    turn = [*a, instruct.mask_token_id, *b, instruct.eot_id]
    assert instruct.decode(turn) == "abcd", "a turn may end before all left of its end is written"


def test_other_special_tokens_are_left_out_unless_asked_for(tiny):
    a, b = tiny.encode("ab"), tiny.encode("cd")
    ids = [tiny.bos_token_id, *a, tiny.pad_token_id, *b, tiny.pad_token_id, tiny.eos_token_id]
    assert tiny.decode(ids) == "abcd"
    assert tiny.decode(ids, specials=True) == "<|bos|>ab<|pad|>cd<|pad|><|endoftext|>"
    both = tiny.encode("\u00e9")
    assert tiny.decode([both[0], tiny.pad_token_id, both[1]]) == "\u00e9"


@pytest.mark.parametrize("wrong", [-1, 512, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(tiny, wrong):
    with pytest.raises(ValueError, match=f"token id {wrong} .* vocabulary of 512"):
        tiny.decode([97, wrong])


# ---- a vocabulary of one's own -------------------------------------------------------------------


@pytest.mark.parametrize("size", [261, 300, 512])
def test_training_gives_exactly_the_size_asked_for_where_the_text_fills_it(size):
    tokenizer = Tokenizer.train(TEXT, size)
    assert tokenizer.vocab_size == size
    assert sorted(tokenizer.special_ids) == list(range(size - 5, size)), "the five specials last"
    pieces = [tokenizer.encoding.decode_single_token_bytes(i) for i in range(size - 5)]
    assert len(set(pieces)) == size - 5, "every id has a piece of text of its own"
    assert Tokenizer.train("one two", 512).vocab_size == 261, "no pair of bytes is there twice"


def test_an_instruct_vocabulary_has_its_three_tokens_within_the_size():
    tokenizer = Tokenizer.train(TEXT, 300, instruct=True)
    assert tokenizer.vocab_size == 300 and tokenizer.eot_id == 299


@pytest.mark.parametrize("size, instruct, least", [(260, False, 261), (263, True, 264),
                                                   (-1, False, 261)])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size, instruct, least):
    with pytest.raises(ValueError, match=f"{size} is too small: .* are {least}"):
        Tokenizer.train(TEXT, size, instruct)


def test_the_tiny_models_ids_are_its_configs(tiny):
    for name, i in Config.tiny(vocab_size=512).token_ids.items():
        assert getattr(tiny, name) == i, name


def words_of(text):
    return regex.findall(PATTERN, text)


def test_text_is_cut_into_words_of_any_script():
    assert words_of("Go, now!\n\nROMEO:\nWell") == ["Go", ",", " now", "!\n\n", "ROMEO", ":\n",
                                                    "Well"]
    assert words_of("  na\u00efve e\u0301t\u00e9 12345") == [" ", " na\u00efve", " e\u0301t\u00e9",
                                                          " 123", "45"]
    assert words_of("\u65e5\u672c. \u05e2\u05d1") == ["\u65e5\u672c", ".", " \u05e2\u05d1"]


@pytest.mark.parametrize("text", SENTENCES, ids=range(len(SENTENCES)))
def test_words_are_all_of_the_text_and_the_encoder_cuts_as_the_learner_did(text):
    words = words_of(text)
    assert "".join(words) == text, "nothing may fall between the words"
    pieces = {bytes([i]): i for i in range(256)}
    for word in words:  # if each word is a token, a word that is cut otherwise is several
        pieces.setdefault(word.encode(), len(pieces))
    assert len(Tokenizer.from_ranks(pieces).encode(text)) == len(words)


def split(word):
    return [bytes([b]) for b in word]


@pytest.mark.parametrize("pieces, token, merged", [
    ("a b a b", "ab", "ab ab"), ("b a a b", "ab", "b a ab"), ("a a a", "aa", "aa a"),
    ("a a a a", "aa", "aa aa"), ("aa a aa a", "aaa", "aaa aaa"), ("a bc ab c", "abc", "abc abc"),
    ("a b c", "abc", "a b c"), ("ab", "ab", "ab"), ("", "ab", ""), ("b a", "ab", "b a")])
def test_a_merge_joins_pairs_from_left_to_right(pieces, token, merged):
    before = pieces.encode().split()
    assert merge(list(before), token.encode()) == merged.encode().split(), (
        "two neighbours that together are the token become one piece; a piece is in one pair only")


def learnt(words, n=10**6):
    ranks = byte_pairs(words, n)
    assert list(ranks.values()) == list(range(len(ranks))), "ranks count on from the 256 bytes"
    assert list(ranks)[:256] == split(bytes(range(256)))
    return list(ranks)[256:]


def test_the_most_frequent_pair_of_the_words_is_learnt_first():
    """The example of the paper: arXiv 1508.07909, algorithm 1, without its ends of words."""
    words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    assert learnt(words)[:7] == [b"es", b"est", b"lo", b"low", b"ne", b"west", b"newest"], (
        "es 9 times, then est; lo 7, then low; ne 6 times: a word counts as often as it occurs")
    assert byte_pairs(words, 258).keys() - byte_pairs(words, 256).keys() == {b"es", b"est"}


def test_of_equal_pairs_the_one_that_came_up_first_is_learnt():
    assert learnt({b"xy": 2, b"ab": 2}) == [b"xy", b"ab"]
    assert learnt({b"abc": 2}) == [b"ab", b"abc"], "bc was as frequent, until a b was merged"


def test_pairs_that_occur_once_are_not_learnt():
    assert learnt({b"abcd": 1}) == [] and learnt({}) == []
    assert learnt({b"ab": 1, b"xab": 1}) == [b"ab"]


def test_merging_changes_what_the_neighbours_are():
    assert learnt({b"cabd": 3, b"ab": 2}) == [b"ab", b"cab", b"cabd"], (
        "where a and b are merged, there is no pair ca and no pair bd any more")
    assert learnt({b"aaaa": 1}) == [b"aa"], "three pairs aa at first; [aa, aa] is one pair aaaa"


def test_what_is_learnt_is_what_the_encoder_merges():
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    tokenizer = Tokenizer.train(text, 800)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.vocab_size == 800
    assert len(text) / len(ids) > 2, "learnt pairs must make the text shorter in tokens"
    assert len(set(ids) - set(range(256))) > 400, "and most of them occur in it as they are"


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
