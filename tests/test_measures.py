"""The four measures, on models and numbers made by hand, so that the right answer is known."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIG, close

from steerling_min.attribution import Attribution, attribute
from steerling_min.files.tokenizer import Tokenizer
from steerling_min.training.data import Stories, Stream
from steerling_min.training.measures import (alignment, auc, contribution, covariance, detection,
                                             in_named_words, look, separation, share)
from steerling_min.training.world import CONCEPT_IDS, CONCEPTS, WORDS

TOKENIZER = Stories(0).tokenizer

# ---- what a model makes of held-out text ---------------------------------------------------------

# What known, unknown and epsilon say of token p, at position p of every window.
PARTS = torch.tensor([
    [2., 1., 1.],     # 4 of the true token: right, and without epsilon, too
    [1., -3., 5.],    # 3: right; without epsilon -2: wrong
    [-1., -1., -1.],  # below another token's 0.5: wrong either way
    [0., 2., -3.],    # wrong; without epsilon 2: right
    [1., 0., 0.], [0., 1., 0.], [3., 1., -1.],  # right either way
    [0., 0., 1.],     # right; without epsilon 0, below another token's 0.5: wrong
])
RIGHT = [True, True, False, False, True, True, True, True]
WITHOUT_EPSILON = [True, False, False, True, True, True, True, False]


class ByHand:
    """A model whose every answer is known. Its windows have eight positions in two blocks, and
    token v's embedding is the v-th unit vector, so a state *is* its logits.

    At position p it says PARTS[p] of token p, and (by `unknown`) 0.5 of token 8, whatever it reads.
    Concept c of three has logit 5 at token c, and -5 at all others and at masks.
    """

    config = dataclasses.replace(CONFIG, block_size=8, diff_block_size=4, n_concepts=3)
    device = torch.device("cpu")

    def __init__(self):
        E = torch.eye(self.config.vocab_size)
        self.transformer = SimpleNamespace(tok_emb=lambda ids: E[ids], lm_head=lambda x: x)
        self.known_head = SimpleNamespace(logits=lambda x: 10 * x[..., :3] - 5)
        self.E, self.read = E, []

    def __call__(self, tokens):
        self.read.append(tokens)
        known, unknown, epsilon = (PARTS[:, i, None] * self.E[:8] for i in range(3))
        unknown = unknown + 0.5 * self.E[8]
        parts = [x.expand(len(tokens), 8, -1) for x in (known, unknown, epsilon)]
        return SimpleNamespace(hidden=self.E[tokens], known=parts[0], unknown=parts[1],
                               epsilon=parts[2], logits=sum(parts))


def windows(n, chunks=None, labels=((0, -1),)):
    """A stream of n windows: token p at position p of each. All one chunk, unless given."""
    chunks = [0] * 8 * n if chunks is None else chunks
    return Stream(torch.arange(8).repeat(n), torch.tensor(chunks), torch.tensor(labels))


def seen(t, n=10, named=None, **stream):
    """What `look` reports of n windows, and what the model was given to read, (n, 8)."""
    model = ByHand()
    named = torch.zeros(8 * n, dtype=torch.bool) if named is None else named
    return look(model, windows(n, **stream), named, t, n), torch.cat(model.read)


def test_the_model_reads_noisy_tokens_not_clean_ones():
    mask = CONFIG.mask_token_id
    for t in (0.0, 0.15, 0.5, 1.0):
        found, read = seen(t, n=400)
        hidden = read == mask
        assert abs(hidden.float().mean() - t) < 0.03, f"a share of {t} of the tokens is masked"
        assert (read[~hidden] == torch.arange(8).expand(400, 8)[~hidden]).all(), "the rest stays"
        assert len(found.right) == hidden.sum(), "what is judged is what was hidden"


def test_uniform_noise_draws_a_level_for_every_block():
    """Of four tokens with one t ~ U(0, 1), each number of masks from 0 to 4 is equally likely."""
    _, read = seen(None, n=1000)
    masks = (read.view(2000, 4) == CONFIG.mask_token_id).sum(1)
    for m in range(5):
        assert abs((masks == m).float().mean() - 1 / 5) < 0.04, f"{m} masks of 4"


def test_the_noise_is_the_same_every_time():
    assert torch.equal(seen(None)[1], seen(None)[1]), "or no two models could be compared"


def test_the_parts_are_those_of_the_token_that_was_hidden():
    found, _ = seen(1.0)
    close(found.parts, PARTS.repeat(10, 1), "known, unknown, epsilon, as products with the true "
          "token's embedding, signs kept")


def test_the_parts_are_what_attribution_finds_concept_by_concept(model):
    """Two ways to one number: features times the embedding, and each concept by itself."""
    T = model.config.block_size
    tokens = torch.randint(0, 100, (2 * T,), generator=torch.Generator().manual_seed(0))
    stream = Stream(tokens, torch.zeros_like(tokens), torch.tensor([[0]]))
    found = look(model, stream, torch.zeros(2 * T, dtype=torch.bool), 1.0, 2)
    with torch.no_grad():
        hidden = model(torch.full((1, T), model.config.mask_token_id)).hidden[0]
        expected = attribute(model, hidden.repeat(2, 1), tokens)
    close(found.parts, expected.parts(), "the parts of a logit", atol=1e-4)
    close(torch.tensor(contribution(found.parts)), expected.shares().mean(0), "Eq. 22")


def test_a_token_is_right_when_nothing_is_likelier():
    found, _ = seen(1.0)
    assert found.right.tolist() == RIGHT * 10, "with epsilon: known + unknown + epsilon"
    assert found.without_epsilon.tolist() == WITHOUT_EPSILON * 10, "known + unknown alone"


def test_features_are_those_of_the_hidden_positions():
    found, _ = seen(1.0)
    close(found.known.diagonal(dim1=0, dim2=1)[:8], PARTS[:, 0], "known, position by position")
    close(found.unknown[:8, :8].diagonal(), PARTS[:, 1], "unknown, position by position")


def test_windows_follow_one_another_through_the_stream():
    named = torch.rand(80, generator=torch.Generator().manual_seed(0)) < 0.5
    found, read = seen(1.0, named=named)
    assert found.named.tolist() == named.tolist(), "a mark for each token, not one for each window"
    found, read = seen(0.5, named=named)
    assert found.named.tolist() == named[(read == CONFIG.mask_token_id).flatten()].tolist()


def test_a_chunk_that_an_edge_cuts_is_not_judged():
    """What it is labelled with may stand in the part that the window does not show."""
    chunks = [-1, 0, 0, -1, 1, 1, -1, 2,  2, 2, -1, 3, 3, 3, 3, -1,  4, -1, 5, 5, 5, -1, 6, 6]
    found, _ = seen(0.0, n=3, chunks=chunks, labels=[[0], [1], [-1], [2], [0], [1], [0]])
    assert found.labels.long().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]], (
        "chunks 0, 1, 3 and 5 are whole; every concept has its column")


def test_a_chunk_has_a_concept_unless_all_of_its_tokens_say_no():
    found, _ = seen(0.0, n=1, chunks=[-1, 0, 0, -1, 1, 1, 1, -1], labels=[[1], [2]])
    no = math.log1p(math.exp(-5.0))  # -log(1 - p) at a token that denies a concept
    yes = math.log1p(math.exp(5.0))  # at a token that has it
    close(found.present, torch.tensor([[2 * no, yes + no, yes + no], [3 * no] * 3]),
          "-log(1 - P), the sum over the chunk's tokens: 1 and 2 in chunk 0; 4, 5, 6 in chunk 1")


def marked(text, tokenizer):
    """The tokens of a text that stand in a word which a concept names."""
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(text)])
    named = in_named_words(ids, tokenizer)
    assert len(named) == len(ids) and not named[0], "<|bos|> is no word"
    return [tokenizer.decode([i]) for i, yes in zip(ids.tolist(), named.tolist()) if yes]


def test_content_tokens_stand_in_words_that_a_concept_names():
    text = "Mara danced around the paper map. The astronauts gave Juno a tiny map of the star."
    assert marked(text, TOKENIZER) == [
        "Mara", " danced", " paper", " map", " astronauts", " Juno", " tiny", " star"], (
        "both words of a pair; 'map' alone is no concept; function words and '.' are not content")


def test_content_tokens_are_found_between_parts_of_letters():
    """A model writes tokens, not letters: one that has hardly learnt writes a half of one."""
    mara, half = TOKENIZER.encode(" Mara"), TOKENIZER.encode("é")[:1]
    assert TOKENIZER.decode(half) != "é", "the first of its two bytes"
    named = in_named_words(torch.tensor([*half, *half, *mara, *half]), TOKENIZER)
    assert named.tolist() == [False, False, True, False]


def test_a_word_of_several_tokens_is_content_as_a_whole():
    letters = Tokenizer.train("", 300)  # it has no words, only bytes
    assert "".join(marked("a rope, two ropes", letters)) == "rope", "'ropes' is another word"


# ---- detection -----------------------------------------------------------------------------------


def test_auc_is_the_chance_that_a_positive_outranks_a_negative():
    scores, labels = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]).bool()
    pairs = [(p > n).item() for p in scores[labels] for n in scores[~labels]]
    assert auc(scores, labels) == sum(pairs) / len(pairs) == 0.75
    assert auc(scores, scores > 0.3) == 1.0 and auc(-scores, scores > 0.3) == 0.0
    assert auc(torch.zeros(4), labels) == 0.5, "ties count half"


def test_detection_is_the_mean_over_all_concepts_that_can_be_judged():
    labels = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 0, 1]])
    present = torch.tensor([[4., 1, 1, 2, 5], [3, 2, 2, 2, 2], [2, 3, 3, 2, 3], [1, 4, 4, 2, 4]])
    # concept 0: 1; concept 1: in no chunk; 2: in all; 3: all tie, 1/2; 4: above two of three
    found, left_out = detection(present, labels.bool())
    assert found == pytest.approx((1 + 1 / 2 + 2 / 3) / 3), (
        "each concept counts the same, however many chunks have it, the first and the last too")
    assert left_out == 2, "of a concept that no chunk has, or each, there is no AUC"


# ---- separation ----------------------------------------------------------------------------------

A = torch.tensor([1., 1, -1, -1])  # A and B are uncorrelated, and equally large
B = torch.tensor([1., -1, 1, -1])
NIL = torch.zeros(4)


def test_covariance_is_that_of_statistics():
    x = torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(covariance(x, x), torch.cov(x.T))


@pytest.mark.parametrize("known, unknown, expected", [
    ([A, NIL], [NIL, B], 0),                      # uncorrelated
    ([A, B], [A, B], 1),                          # the same
    ([A, NIL], [NIL, 5 - 2 * A], 1),              # neither place, sign, size nor mean matter
    ([A, NIL], [A + B, NIL], 1 / math.sqrt(2)),   # 4/3 over the root of 4/3 * 8/3
    ([A, B], [A, NIL], 2 ** -0.25),               # 4/3 over the root of sqrt(2) 4/3 * 4/3
])
def test_separation_is_0_for_uncorrelated_features_and_1_for_equal_ones(known, unknown, expected):
    found = separation(torch.stack(known, 1), torch.stack(unknown, 1))
    assert found == pytest.approx(expected, abs=1e-6)


# ---- contribution --------------------------------------------------------------------------------


def test_contribution_is_eq_22_worked_out_by_hand():
    parts = torch.tensor([[2., -1, 1],    # shares 1/2, 1/4, 1/4, though the logit is 2
                          [0., 3, -1],    # 0, 3/4, 1/4
                          [-9., 0, -1]])  # 9/10, 0, 1/10
    assert contribution(parts) == pytest.approx([1.4 / 3, 1 / 3, 0.2]), (
        "each token's parts, by size, over the sum of all three sizes; then the mean over tokens")


def test_a_token_with_a_large_logit_counts_no_more_than_another():
    assert contribution(torch.tensor([[100., 0, 0], [0, 0, 1]])) == pytest.approx([0.5, 0, 0.5])


def test_contributions_of_both_signs_cancel_before_sizes_are_taken():
    """Known concepts of +7 and -5 say 2. By single contributions they would say 12."""
    ids = torch.tensor([[0, 1]])
    found = Attribution(torch.tensor([3]), ids, torch.tensor([[7., -5.]]), ids,
                        torch.tensor([[1., -2.]]), torch.tensor([1.]))
    assert contribution(found.parts()) == pytest.approx([2 / 4, 1 / 4, 1 / 4])


def test_a_logit_of_nothing_is_nobodys():
    assert contribution(torch.zeros(1, 3)) == [0, 0, 0], "and not nan"


# ---- alignment -----------------------------------------------------------------------------------


def aligned(best, lifted=()):
    """Alignment of a model whose concept c promotes the tokens best[c], the most promoted first.

    All others are promoted by 0. lifted: pairs of a concept and a token.
    """
    E = torch.zeros(len(CONCEPTS), TOKENIZER.vocab_size)
    for concept, tokens in best.items():
        E[concept, tokens] = torch.arange(len(tokens), 0, -1).float()
    table = SimpleNamespace(n_concepts=len(E), embedding=lambda concept: E[concept])
    tok_emb = SimpleNamespace(weight=torch.eye(E.shape[1]))
    model = SimpleNamespace(known_head=table, transformer=SimpleNamespace(tok_emb=tok_emb),
                            device=torch.device("cpu"))
    fit = torch.zeros(E.shape, dtype=torch.bool)
    for concept, token in lifted:
        fit[concept, token] = True
    return alignment(model, TOKENIZER, fit)


def token(word):
    [found] = TOKENIZER.encode(word)
    return found


def test_a_words_concept_is_aligned_when_it_promotes_the_word_most():
    best = {concept: [token(" " + word.split()[0]), 3] for concept, word in WORDS.items()}
    assert aligned(best)[0] == 1.0
    wrong = {"robot": [token(" led"), token(" robot")],  # second is not most
             "paper map": [token(" glass")],
             "harbour": [token(" a")],  # a letter of it is not the word
             "waves": []}
    best |= {CONCEPT_IDS[word]: tokens for word, tokens in wrong.items()}
    n = len(WORDS)
    assert aligned(best)[0] == pytest.approx((n - 4) / n), f"{list(wrong)} are not aligned"
    best[CONCEPT_IDS["paper map"]] = [token(" map")]
    assert aligned(best)[0] == pytest.approx((n - 3) / n), "either word of a pair will do"
    best[CONCEPT_IDS["Mara"]] = [token("Mara")]
    assert aligned(best)[0] == pytest.approx((n - 3) / n), "so will a word that begins a chunk"


def test_a_topics_ten_most_promoted_tokens_are_to_be_likelier_in_its_chunks():
    wholes = [concept.id for concept in CONCEPTS if concept.id not in WORDS]
    best = {concept: list(range(100 + 20 * concept, 111 + 20 * concept)) for concept in wholes}
    assert aligned(best, [(c, best[c][i]) for c in wholes for i in (0, 3, 9)])[1] == (
        pytest.approx(0.3)), "three of the ten"
    assert aligned(best, [(c, best[c][10]) for c in wholes])[1] == 0, "the eleventh is not asked"
    assert aligned(best, [(c + 1, t) for c in wholes for t in best[c]])[1] == 0, (
        "likelier with the concept itself, not with its neighbour")


def test_nothing_to_judge_is_a_share_of_0():
    assert share([]) == 0 and share([True]) == 1 and share([True, False, True, True]) == 0.75
