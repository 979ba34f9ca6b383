"""The course as two tables: functions to rebuild, and changes to make to the model.

The exercises stand in an order in which each can be checked while all that follow are blank.
"""

from pathlib import Path
from typing import NamedTuple

BLOCK = "tests/test_block.py tests/test_backbone.py"
IGUIDE = "tests/test_iguide.py tests/test_model.py"
HANDED_OUT = Path(__file__).with_name("handed_out.txt")  # only in a handout: names of its exercises


class Exercise(NamedTuple):
    name: str
    where: str       # file in steerling_min/ and function: "block.py MLP.forward"
    level: int       # 1 easy, 2 middling, 3 hard
    minutes: int     # for somebody who knows PyTorch
    read: str        # besides the docstring
    tests: str = ""  # arguments of pytest; in the table nothing, for tests/test_X.py of X.py


EXERCISES = {e.name: e._replace(tests=e.tests or f"tests/test_{Path(e.where.split()[0]).stem}.py")
             for e in [
    # the backbone
    Exercise("norm", "norm.py RMSNorm.forward", 1, 10, "arXiv 1910.07467"),
    Exercise("mask", "attention.py block_causal_mask", 1, 10, "README, point 2",
             "tests/test_attention.py -k 'mask or block'"),
    Exercise("angles", "attention.py rotary_tables", 2, 20, "RoFormer, arXiv 2104.09864",
             "tests/test_attention.py -k 'angle or position or pair or float32'"),
    Exercise("rotate", "attention.py rotate", 2, 15, "RoFormer, arXiv 2104.09864",
             "tests/test_attention.py -k 'turn or rotation or pair or distance'"),
    Exercise("attention", "attention.py Attention.forward", 2, 40,
             "README, points 8 and 9; KVCache.update; rotate",
             "tests/test_attention.py tests/test_backbone.py"),
    Exercise("swiglu", "block.py MLP.forward", 1, 10, "arXiv 2002.05202", BLOCK),
    Exercise("block", "block.py Block.forward", 1, 10, "README, point 8", BLOCK),
    Exercise("backbone", "backbone.py Backbone.from_embeddings", 2, 30,
             "attention.py, block.py, config.py"),
    # the concept layer
    Exercise("known-logits", "iguide.py KnownHead.logits", 1, 10, "MAX_LOGIT and rows", IGUIDE),
    Exercise("unknown-features", "iguide.py UnknownHead.features", 1, 10,
             "KnownHead.features, weighted_sum", IGUIDE),
    Exercise("top-concepts", "iguide.py top_concepts", 2, 20, "KnownHead.logits", IGUIDE),
    Exercise("decompose", "iguide.py decompose", 3, 30, "apply_head; README, points 6, 7 and below",
             IGUIDE),
    Exercise("set-weights", "iguide.py set_weights", 2, 20, "decompose", IGUIDE),
    # diffusion: training
    Exercise("noise", "diffusion.py noise_levels", 1, 10, "README, point 3",
             "tests/test_diffusion.py -k 'noise or level'"),
    Exercise("corrupt", "diffusion.py corrupt", 1, 10, "README, point 1",
             "tests/test_diffusion.py -k 'masked_with or masking or its_own_level'"),
    Exercise("token-loss", "diffusion.py token_loss", 2, 20, "MDLM, arXiv 2406.07524",
             "tests/test_diffusion.py "
             "-k 'loss or is_the_mean or over_t or costs or weighting or gradient'"),
    Exercise("bound", "diffusion.py likelihood_bound", 3, 45, "diff_block_size in config.py",
             "tests/test_diffusion.py -k 'bound or score or likel'"),
    Exercise("noisy-or", "training/losses.py log_absent", 2, 20, "presence_loss"),
    Exercise("presence", "training/losses.py presence_loss", 2, 20, "log_absent, distributed.py"),
    Exercise("reconstruction", "training/losses.py reconstruction_loss", 1, 10, "distributed.py"),
    Exercise("independence", "training/losses.py independence_loss", 2, 30, "distributed.py"),
    Exercise("compose", "training/losses.py compose", 2, 20, "README, The gradient question",
             "tests/test_losses.py tests/test_objective.py"),
    # diffusion: writing
    Exercise("penalty", "sampling.py penalize_repetition", 1, 10, "CTRL, arXiv 1909.05858"),
    Exercise("temperature", "sampling.py entropy_temperature", 1, 15, "sample"),
    Exercise("nucleus", "sampling.py nucleus", 1, 15, "arXiv 1904.09751"),
    Exercise("confidence", "sampling.py most_confident", 2, 25, "README, point 4"),
    Exercise("schedule", "sampling.py spread_steps", 3, 30, "commits_per_step, windows"),
    Exercise("cache", "cache.py cached_hidden", 3, 45, "KVCache, Backbone.from_embeddings"),
    Exercise("sampler", "unmasking.py unmask", 3, 90, "unmask_plainly, asked_logits, sampling.py",
             "tests/test_unmasking.py tests/test_cache.py"),
    # concepts at work
    Exercise("alpha", "steering.py alpha_of", 1, 10, "Injection"),
    Exercise("injection", "steering.py Steerer.vectors", 2, 20, "Injection, Steerer.__init__"),
    Exercise("attribution", "attribution.py attribute", 2, 30,
             "Decomposition, set_weights and alignment in iguide.py; decompose_under"),
    Exercise("gradients", "attribution.py input_attribution", 3, 40, "arXiv 1703.01365"),
]}
if HANDED_OUT.is_file():
    EXERCISES = {name: EXERCISES[name] for name in HANDED_OUT.read_text("utf-8").split()}


class Modification(NamedTuple):
    name: str
    task: str
    where: str
    changes: tuple[str, ...]  # tests that must change
    breaks_parity: bool       # with the weights and texts of the official package
    keeps: str                # tests that must not change


MODIFICATIONS = {m.name: m for m in [
    Modification(
        "block-size", "Write with smaller diffusion blocks than the model was trained with. Give "
        "sample.py a flag that sets diff_block_size after loading; compare stories of the tiny "
        "model with blocks of 16, 8, 4 and 1. What is lost, and why?",
        "sample.py, files/loading.py; new tests in test_sample.py", (), False,
        "all of them: without the flag nothing changes"),
    Modification(
        "pre-norm", "Normalise what a branch reads and not what it writes, as GPT-2 did. Train "
        "both for 500 steps and compare the losses.", "block.py, Block.forward",
        ("test_block.py::test_the_norms_sit_on_the_branches_outputs",
         "test_block.py::test_nothing_normalises_what_a_branch_reads"), True,
        "test_attention.py, test_iguide.py, test_sampling.py, test_losses.py"),
    Modification(
        "sliding-window", "Let a block see itself and the two blocks before it only. How far back "
        "can information still travel? Does the hero keep the name?",
        "attention.py, block_causal_mask",
        ("test_attention.py::test_a_block_of_one_is_causal_and_a_block_of_all_is_bidirectional",),
        True, "test_unmasking.py but for parity; test_cache.py: the cache stays exact. Could it be "
        "shorter now?"),
    Modification(
        "one-level", "Draw one noise level for a whole sequence, as masked diffusion without "
        "blocks does. Which of the model's uses does that train for worse?",
        "diffusion.py, noise_levels",
        ("test_diffusion.py::test_every_block_of_every_sequence_has_its_own_noise_level",), False,
        "the other tests of test_diffusion.py; test_train_tiny.py"),
    Modification(
        "cosine-noise", "Draw t = 1 - cos(u pi / 2), u uniform: blocks with fewer masks. Compare "
        "the likelihood bound (the held-out loss is on this noise, too), and say why the weighting "
        "1/t is no bound any more.",
        "diffusion.py, noise_levels", ("test_diffusion.py::test_noise_levels_are_uniform",), False,
        "the other tests of test_diffusion.py; test_train_tiny.py"),
    Modification(
        "all-concepts", "Let every concept contribute, not the top k only. What does that do to "
        "the share of epsilon, and to an explanation's length?", "iguide.py, top_concepts",
        ("test_iguide.py::test_the_largest_logits_are_kept_largest_first",
         "test_iguide.py::test_selection_ranks_by_logit_where_float32_sigmoids_tie",
         "test_iguide.py::test_a_long_text_never_has_the_logits_of_all_concepts_at_once",
         "test_iguide.py::test_keeping_epsilon_changes_the_edited_contribution_and_nothing_else",
         "test_attribution.py::test_contributions_and_epsilon_sum_to_the_logit"), True,
        "test_unmasking.py, parity of the texts included: with epsilon the heads only explain"),
    Modification(
        "softmax-concepts", "Let concepts compete: weights by a softmax over the selected logits, "
        "in place of a sigmoid of each. Which loss has to change with it?",
        "iguide.py, apply_head; attribution.py; training/objective.py",
        ("test_iguide.py::test_known_features_weigh_embeddings_by_sigmoid",
         "test_iguide.py::test_unknown_embeddings_are_coefficients_times_basis",
         "test_iguide.py::"
         "test_keeping_epsilon_changes_the_edited_contribution_and_nothing_else",
         "test_steering.py::test_an_edit_with_epsilon_kept_moves_logits_along_the_embedding"), True,
        "test_unmasking.py; test_attribution.py, once it uses the new weights"),
    Modification(
        "keep-epsilon", "Keep epsilon under an intervention unless told otherwise. Steer by "
        "interventions both ways: how much of an edit does epsilon take back?",
        "iguide.py, decompose",
        ("test_iguide.py::test_epsilon_is_left_out_at_edited_positions_only",
         "test_iguide.py::test_an_edit_of_unknown_concepts_alone_has_an_effect"), False,
        "test_model.py, test_steering.py, test_attribution.py"),
    Modification(
        "random-order", "Fill random positions of the window, not the surest (draw them from the "
        "row's own generator). How many sentences stay in the grammar?",
        "sampling.py, most_confident and choose",
        ("test_sampling.py::test_the_surest_positions_come_first",
         "test_sampling.py::test_masks_that_look_alike_are_filled_from_the_left",
         "test_sampling.py::test_very_sure_positions_are_still_told_apart",
         "test_sampling.py::test_a_threshold_takes_all_that_reach_it_and_one_at_least",
         "test_sampling.py::test_bans_and_penalty_come_before_confidence",
         "test_unmasking.py::test_global_order_takes_the_surest_position_of_the_whole_text",
         "test_unmasking.py::test_a_step_says_what_it_committed",
         "test_unmasking.py::test_a_threshold_needs_fewer_steps_and_each_commit_reaches_it",
         "test_unmasking.py::"
         "test_end_of_turn_fills_what_is_right_of_it_and_leaves_masks_left_of_it",
         "test_unmasking.py::test_eos_is_banned_in_windows_unless_allowed",
         "test_unmasking.py::test_in_global_order_eos_ends_after_its_step_and_fills_nothing"), True,
        "test_cache.py::test_the_cache_is_exact, "
        "test_unmasking.py::test_a_row_of_a_batch_is_what_it_would_be_alone"),
    Modification(
        "min-p", "Keep the tokens that are at least (1 - top_p) times as probable as the best, in "
        "place of the nucleus.", "sampling.py, nucleus",
        ("test_sampling.py::"
         "test_the_nucleus_keeps_tokens_while_the_mass_before_them_is_within_top_p",), True,
        "all others of test_sampling.py and test_unmasking.py; greedy texts keep their parity"),
    Modification(
        "remasking", "Let a step mask a committed token of the window again when the model, asked "
        "once more, gives it less than a threshold, as an option of unmask that is off by default. "
        "When can that go on forever, and what does the cache have to do with it?",
        "unmasking.py, unmask; new tests in test_unmasking.py", (), False,
        "all of them: test_everything_is_written_and_nothing_is_rewritten says what is given up"),
]}
