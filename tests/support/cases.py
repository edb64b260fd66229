"""Tests with many slow cases: `make test` runs a few of each, the soak runs the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

CASES: dict[str, dict[str, int | tuple[str, ...]]] = {
    "tests/cli/test_hostile_run.py": {
        "test_every_command__hostile_run_folder__executes_and_touches_nothing": (
            *("_own_code", "_link_log", "_link_records", "_huge", "_block"),
        ),
    },
    "tests/cli/test_process.py": {
        "test_errors__wrong_input__one_message_and_exit_code": 6,
        "test_imports__client__nothing_heavy": 5,
        "test_output__narrow_terminal__does_not_fail": 3,
    },
    "tests/cluster/test_cloud_prices.py": {
        "test_prepare_network__of_another_cluster_of_the_name__is_refused_and_unchanged": 3,
    },
    "tests/cluster/test_firewall.py": {
        "test_up__fails_or_is_interrupted__port_22_is_never_open_to_the_world": 3,
    },
    "tests/cluster/test_kubernetes.py": {
        "test_up__fails__says_why_and_what_to_do": 6,
    },
    "tests/config/test_hostile_files.py": {
        "test_load_job__damaged_file__gives_a_job_or_one_error": 6,
    },
    "tests/data/test_examples.py": {
        "test_prepare__counts_that_are_no_whole_numbers__are_refused_with_the_class": 4,
    },
    "tests/elastic/test_replicas.py": {
        "test_store__invalid_request__connection_closed_without_traceback": 3,
    },
    "tests/model/test_new_head.py": {
        "test_inspect__model_without_a_classifier__has_a_new_head_from_the_seed": 4,
    },
    "tests/objective/test_contrastive.py": {
        "test_loss__any_micro_batches__is_that_of_the_whole_batch": 2,
    },
    "tests/objective/test_router_loss.py": {
        "test_pairs__any_layout__add_the_auxiliary_loss_of_transformers_for_each_pair": 3,
    },
    "tests/objective/test_trl.py": {
        "test_dpo__one_batch__has_the_loss_and_the_gradients_of_trl": 4,
    },
    "tests/plan/test_model_shapes.py": {
        "test_job__published_shape__has_its_parameters_and_plans_up_to_4096_gpus": 3,
    },
    "tests/runtime/test_resolve_code.py": {
        "test_resolve_code__unusable_class__names_both_lines": 2,
        "test_resolve_code__unusable_metric_directions__are_refused": 1,
        "test_with_directions__metric_of_a_user_objective__has_its_direction": 1,
    },
    "tests/serve/test_choose.py": {
        "test_frequencies_equal_the_probabilities_of_transformers": 5,
    },
    "tests/serve/test_engine.py": {
        "test_a_text_that_guesses_is_the_same_and_takes_fewer_steps": 3,
        "test_greedy_texts_of_every_family_equal_those_of_transformers": 2,
    },
    "tests/serve/test_export_adapters.py": {
        "test_export__adapters__have_the_logits_of_the_run_in_peft_and_merged": 1,
    },
    "tests/test_user_code.py": {
        "test_load_class__not_module_and_class__is_refused": 3,
        "test_load_class__unusable_module__names_the_users_line": 3,
    },
    "tests/train/test_init_from.py": {
        "test_train__from_a_checkpoint__has_the_losses_of_its_exported_weights": ("3-2",),
    },
    "tests/train/test_lora.py": {
        "test_train__one_rank__has_the_losses_of_peft": 2,
    },
    "tests/train/test_masked_targets.py": {
        "test_train__masked_targets__same_losses_as_one_rank_and_one_batch": 3,
    },
    "tests/train/test_optimizer_8bit.py": {
        "test_adamw_8bit__resumed_at_another_world_size__keeps_the_curve": 1,
    },
    "tests/train/test_pretrained.py": {
        "test_train__from_a_folder__has_the_losses_of_the_weights_in_it": ("3-2-bf16",),
    },
    "tests/train/test_reshard.py": {
        "test_resume__model_weights__equal_saved_weights": ("some-zero 1", "some-zero 3", "some-zero 3 hpz"),
    },
    "tests/train/test_resize_embeddings.py": {
        "test_train__embedding_is_enlarged__has_the_losses_of_weights_that_were_resized_before": ("3-2-False",),
    },
    "tests/train/test_state.py": {
        "test_claims__all_ranks__every_element_once": 4,
    },
    "tests/train/test_worker.py": {
        "test_losses__bf16__match_fp32_within_rounding": ("1", "3"),
        "test_resume__same_world_size__losses_bit_for_bit": ("3-bf16",),
    },
}
"""By module and test, the cases that `make test` runs, by number or by id; the others have the mark `slow`."""


def mark_further_cases(items: Iterable[pytest.Item]) -> None:
    """Give the mark `slow` to the cases of tests in `CASES` that are not to run in `make test`."""
    seen: Counter[str] = Counter()
    for item in items:
        test, _, case = item.nodeid.partition("[")
        module, _, name = test.partition("::")
        chosen = CASES.get(module, {}).get(name)
        if chosen is None or item.get_closest_marker("slow"):
            continue
        seen[test] += 1
        if seen[test] > chosen if isinstance(chosen, int) else case[:-1] not in chosen:
            item.add_marker(pytest.mark.slow)
