"""Which tests run when, in one place. Names are `file::function`, below tests/; conftest.py turns them into markers.

`make test-fast` leaves out what is here and everything hostile; `make test` leaves out what is long; `make test-all` runs it too.
tests/contracts/test_marks.py checks that every name here is a test, and that each test of a grid that is long leaves cases
in `make test`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

COLLECTED = pytest.StashKey[list[tuple[str, str]]]()
"""In the configuration of a run: (file, name) of every test, those that are left out too."""

ALONE = {
    # a file, or one test: what else the machine does would show in their figures
    "benchmarks/test_prove_smoke.py::test_every_section_runs_and_is_written",
    "concurrency/test_load.py",
    "corpus/test_flat.py",
    "contracts/test_front_door.py::test_importing_memsafe_is_cheap",
    "langchain/test_async.py",
    "llama_index/test_embedding_contract.py::test_the_event_loop_stays_free",
    "llama_index/test_embedding_contract.py::test_loading_after_unpickling_leaves_the_loop_free",
    "llama_index/test_rerank.py::test_the_event_loop_stays_free",
    "machine/test_device.py::test_a_real_resident_peak",
    "machine/test_heap.py",
    "machine/test_linux.py::test_a_snapshot_is_cheap",
    "machine/test_linux.py::test_the_peak_can_be_restarted_here",
    "machine/test_meter.py::test_metering_is_affordable",
    "machine/test_threads.py",
    "planning/test_planner.py::test_planning_costs_microseconds_per_input",
}
"""Nothing runs beside them."""

SLOW = {
    "attention/test_packing.py::test_a_window_takes_memory_by_length_and_not_by_its_square",
    "attention/test_packing.py::test_attention_equals_the_formula",
    "attention/test_packing.py::test_every_pooling_runs_unchanged",
    "attention/test_packing.py::test_half_precision_uses_the_variable_length_kernel",
    "attention/test_packing.py::test_nothing_quadratic_is_made",
    "attention/test_packing.py::test_packed_rows_equal_single_rows",
    "attention/test_packing.py::test_padded_rows_under_the_small_mask",
    "attention/test_packing.py::test_quick_heads_give_the_same_rows",
    "attention/test_packing.py::test_threads_share_a_model",
    "benchmarks/test_prove_smoke.py::test_every_section_runs_and_is_written",
    "benchmarks/test_prove_smoke.py::test_without_a_card_it_says_so",
    "concurrency/test_processes.py::test_a_forked_child_has_a_worker_of_its_own",
    "concurrency/test_processes.py::test_calls_while_the_interpreter_exits_fail_rather_than_hang",
    "concurrency/test_processes.py::test_spawned_workers",
    "concurrency/test_processes.py::test_the_interpreter_exits_promptly",
    "concurrency/test_processes.py::test_what_is_being_closed_at_the_very_end_is_closed_before_the_interpreter_goes",
    "concurrency/test_sharing.py::test_different_lengths_under_threads",
    "concurrency/test_sharing.py::test_embedder_and_reranker_in_both_worlds",
    "concurrency/test_sharing.py::test_memory_does_not_multiply_with_callers",
    "concurrency/test_sharing.py::test_one_loaded_model_in_two_embedders",
    "concurrency/test_sharing.py::test_real_queries_share_micro_batches",
    "concurrency/test_sharing.py::test_replicas_of_a_real_model",
    "contracts/test_documents.py::test_readme_runs",
    "contracts/test_examples.py::test_demo_reranker_ranks_better_than_chance",
    "contracts/test_examples.py::test_example_runs_offline",
    "contracts/test_front_door.py::test_public_names",
    "contracts/test_packaging.py::test_installed_wheel_is_what_is_imported",
    "contracts/test_tools.py::test_linter_is_content",
    "contracts/test_typing.py::test_checker_sees_our_types",
    "contracts/test_typing.py::test_consumer_type_checks",
    "contracts/test_examples.py::test_big_corpus",
    "contracts/test_examples.py::test_into_vector_stores",
    "core/test_embedder.py::test_closed",
    "core/test_embedder.py::test_every_architecture",
    "core/test_embedder.py::test_every_pooling_mode",
    "core/test_embedder.py::test_lengths_beyond_the_positions",
    "core/test_embedder.py::test_loaded_model",
    "core/test_embedder.py::test_order_duplicates_and_odd_texts",
    "core/test_embedder.py::test_precision",
    "core/test_embedder.py::test_real_model_on_real_texts",
    "core/test_embedder.py::test_two_copies_share_the_work",
    "core/test_embedder.py::test_two_poolings_and_a_dense_layer",
    "core/test_reranker.py::test_activations",
    "core/test_reranker.py::test_async",
    "core/test_reranker.py::test_every_architecture",
    "core/test_reranker.py::test_real_model",
    "corpus/test_caches.py::test_an_identity_tells_models_apart",
    "corpus/test_caches.py::test_langchain_computes_once",
    "corpus/test_caches.py::test_llama_index_computes_once",
    "corpus/test_cli.py",
    "corpus/test_crashes.py::test_a_full_disk",
    "corpus/test_crashes.py::test_a_torn_block",
    "corpus/test_crashes.py::test_killed_at_a_random_moment",
    "corpus/test_crashes.py::test_killed_at_every_step_to_the_disk",
    "corpus/test_crashes.py::test_killed_at_fifty_random_moments",
    "corpus/test_fixed.py::test_the_same_bits_beside_other_work",
    "corpus/test_flat.py",
    "corpus/test_handle.py",
    "corpus/test_sources.py::test_a_file_that_cannot_be_read",
    "corpus/test_stores.py::test_another_model_is_refused",
    "engine/test_runner.py::test_nothing_predicted_above_the_budget_is_ever_started",
    "langchain/test_async.py::test_cancelling",
    "langchain/test_async.py::test_loop_stays_free",
    "langchain/test_async.py::test_loop_stays_free_while_reranking",
    "langchain/test_async.py::test_subclasses_are_obeyed",
    "langchain/test_cross_encoder.py::test_same_reranking",
    "langchain/test_cross_encoder.py::test_same_scores",
    "langchain/test_embeddings.py::test_batch_size_caps_rows",
    "langchain/test_embeddings.py::test_dtype",
    "langchain/test_embeddings_parity.py::test_multi_process",
    "langchain/test_embeddings_parity.py::test_same_numbers",
    "langchain/test_embeddings_parity.py::test_same_quantized",
    "langchain/test_rerank.py::test_callbacks",
    "langchain/test_rerank.py::test_construction",
    "langchain/test_rerank.py::test_negative_top_n",
    "langchain/test_rerank.py::test_top_n",
    "langchain/test_rerank.py::test_two_labels",
    "langchain/test_state.py::test_copy_with_another_model",
    "langchain/test_state.py::test_dump_makes_an_equal_one",
    "langchain/test_state.py::test_forked_child_loads_its_own",
    "langchain/test_state.py::test_pickle",
    "llama_index/test_embedding_contract.py::test_a_bad_text_is_named_by_its_place_at_once",
    "llama_index/test_embedding_contract.py::test_a_text_too_large_leaves_the_others_in_the_cache",
    "llama_index/test_embedding_contract.py::test_instructions_by_model_name",
    "llama_index/test_embedding_contract.py::test_lengths_beyond_the_models_positions_are_cut",
    "llama_index/test_embedding_contract.py::test_loading_after_unpickling_leaves_the_loop_free",
    "llama_index/test_embedding_contract.py::test_memory_options_reach_the_core",
    "llama_index/test_embedding_contract.py::test_no_upstream_package_is_imported",
    "llama_index/test_embedding_contract.py::test_parallel_process_gives_the_same_numbers",
    "llama_index/test_embedding_contract.py::test_target_devices_become_workers_of_the_core",
    "llama_index/test_embedding_contract.py::test_the_cache_is_read_and_written",
    "llama_index/test_embedding_contract.py::test_the_core_sees_the_whole_list_in_one_call",
    "llama_index/test_embedding_contract.py::test_the_event_loop_stays_free",
    "llama_index/test_embedding_contract.py::test_what_is_finished_is_in_the_cache_when_a_later_part_fails",
    "llama_index/test_embedding_contract.py::test_which_prompt_is_used",
    "llama_index/test_embedding_contract.py::test_which_route_is_taken",
    "llama_index/test_embedding_parity.py::test_numbers_are_upstreams",
    "llama_index/test_embedding_state.py::test_a_dictionary_builds_an_equal_object",
    "llama_index/test_embedding_state.py::test_a_dictionary_keeps_the_group_size",
    "llama_index/test_embedding_state.py::test_a_pickle_holds_configuration_not_weights",
    "llama_index/test_embedding_state.py::test_a_real_fork",
    "llama_index/test_embedding_state.py::test_a_reranker_pickles_alike",
    "llama_index/test_embedding_state.py::test_a_subclass_survives_pickling",
    "llama_index/test_embedding_state.py::test_an_object_that_is_dropped_frees_its_model",
    "llama_index/test_embedding_state.py::test_deepcopy_is_independent",
    "llama_index/test_embedding_state.py::test_ingestion_cache_is_used",
    "llama_index/test_embedding_state.py::test_ingestion_with_worker_processes",
    "llama_index/test_embedding_state.py::test_memory_settings_are_not_in_the_cache_key",
    "llama_index/test_embedding_state.py::test_model_copy_shares_the_model",
    "llama_index/test_embedding_state.py::test_what_cannot_be_pickled_is_left_out",
    "llama_index/test_rerank.py::test_a_subclass_that_overrides_the_work_is_obeyed",
    "llama_index/test_rerank.py::test_from_flag_differs_from_the_plain_constructor",
    "llama_index/test_rerank.py::test_from_flag_gives_flags_numbers",
    "llama_index/test_rerank.py::test_from_flag_in_words",
    "llama_index/test_rerank.py::test_scores_and_order_are_upstreams",
    "llama_index/test_rerank.py::test_several_labels_are_refused",
    "llama_index/test_rerank.py::test_the_callers_nodes_are_left_alone",
    "llama_index/test_rerank.py::test_the_event_loop_stays_free",
    "llama_index/test_upstream_suites.py::test_batches_keep_their_order",
    "llama_index/test_upstream_suites.py::test_flag_reranker_class",
    "llama_index/test_upstream_suites.py::test_with_cache_async",
    "machine/test_allocator.py::test_works_before_torch_is_imported",
    "machine/test_device.py::test_mps_growth_is_the_peak",
    "machine/test_meter.py::test_against_a_count_by_hand_on_a_real_model",
    "machine/test_store.py::test_a_file_changed_anywhere_is_a_value_or_nothing",
    "machine/test_store.py::test_any_content_is_a_value_or_nothing",
    "machine/test_store.py::test_any_figures_are_a_model_or_nothing",
    "models/test_cuda_paths.py::test_costs_are_kept_for_their_card",
    "models/test_cuda_paths.py::test_memory_that_runs_out_in_the_self_check",
    "models/test_cuda_paths.py::test_padded_features_travel_from_pinned_memory",
    "models/test_cuda_paths.py::test_the_half_rung_asks_no_kernel_for_mixed_dtypes",
    "models/test_cuda_paths.py::test_what_a_self_check_took_is_given_back",
    "models/test_fuse.py::test_models_keep_their_numbers",
    "models/test_fuse.py::test_the_peak_shrinks",
    "models/test_fuse.py::test_the_self_check_decides",
    "models/test_ladder.py::test_a_rung_takes_no_more_than_was_predicted",
    "models/test_ladder.py::test_float16_rows_that_overflow_are_computed_again",
    "models/test_ladder.py::test_half_is_offered_only_where_it_is_native",
    "models/test_ladder.py::test_rows_of_every_rung",
    "models/test_ladder.py::test_sliced_feed_forward_gives_the_same_hidden_states",
    "models/test_ladder.py::test_slices_are_really_taken",
    "models/test_selfcheck.py::test_a_mistake_of_half_precision_is_still_seen",
    "models/test_selfcheck.py::test_a_wrong_small_mask_is_caught",
    "models/test_selfcheck.py::test_a_wrong_window_is_caught",
    "models/test_selfcheck.py::test_architectures_on_the_interface_pass",
    "models/test_selfcheck.py::test_architectures_with_their_own_attention_fail",
    "models/test_selfcheck.py::test_half_precision_passes_within_its_rounding",
    "models/test_selfcheck.py::test_the_head_is_the_quickest_that_is_right",
    "models/test_selfcheck.py::test_the_real_model_passes",
    "models/test_weights.py::test_running_out_while_loading_is_the_same_error",
    "models/test_weights.py::test_the_real_model_needs_what_it_is_said_to",
    "planning/test_simulated.py::test_sizes_are_within_the_targets_on_every_curve_and_mix",
    "planning/test_cost.py::test_a_measurement_above_its_bound_raises_the_bound_at_once",
    "service/test_service.py::test_llama_index_embeds_through_the_service",
    "service/test_service.py::test_llama_index_reranks_through_the_service",
    "service/test_service.py::test_many_clients_at_once",
    "service/test_service.py::test_requests_that_are_refused",
    "service/test_service.py::test_shutdown_finishes_what_is_in_progress",
    "service/test_service.py::test_the_program",
    "vector_stores/test_vector_stores.py::test_langchain",
    "vector_stores/test_vector_stores.py::test_llama_index",
}
"""About a second of a core and more, or a grid of more than two in all; not in `make test-fast`."""

LONG = {
    # each option of a class that is replaced, each architecture: a branch of ours keeps a case, the rest is a second look
    "core/test_embedder.py::test_every_pooling_mode": "bert-|-mean]",
    "core/test_reranker.py::test_every_architecture": "-1]",
    "corpus/test_cli.py::test_control_c": r"\[2\]",
    "corpus/test_crashes.py::test_killed_at_every_step_to_the_disk": "before",
    "hostile/test_trials.py::test_random_jobs_finish_or_raise_the_right_error": r"\[0-",
    "langchain/test_embeddings_parity.py::test_same_quantized": "int8",
    "llama_index/test_embedding_contract.py::test_instructions_by_model_name": "False-BAAI/bge-small|True-hkunlp",
    "llama_index/test_embedding_parity.py::test_numbers_are_upstreams": "defaults|instruction|max_length]|half|truncate|prompt",
    "llama_index/test_embedding_state.py::test_ingestion_with_worker_processes": "arun",
    "llama_index/test_rerank.py::test_scores_and_order_are_upstreams": "defaults|none|short|logits|prompt|keep",
    "models/test_cuda_paths.py::test_the_half_rung_asks_no_kernel_for_mixed_dtypes": r"\[bert|gte",
    "models/test_ladder.py::test_a_rung_takes_no_more_than_was_predicted": "-bert|-gte|-modernbert|-mpnet",
    "models/test_selfcheck.py::test_architectures_with_their_own_attention_fail": "embedder",
    "vector_stores/test_vector_stores.py::test_langchain": "qdrant|faiss",
    "vector_stores/test_vector_stores.py::test_llama_index": "qdrant|faiss",
    # each example runs alone in its own process; the demo does what the other three do, one after the other
    "contracts/test_examples.py::test_example_runs_offline": "demo",
}
"""Grids: the cases whose name matches the pattern (a regular expression, searched) stay in `make test`, the others are long. They
protect a second time: where the cases differ in what takes another branch of ours, each branch keeps one."""

TWICE = {
    "corpus/test_crashes.py::test_killed_at_fifty_random_moments": "corpus/test_crashes.py::test_killed_at_a_random_moment",
    "corpus/test_flat.py::test_a_million_texts_take_the_memory_of_a_hundred_thousand": "corpus/test_flat.py::test_twenty_times_the_texts_take_the_same_memory",
    "corpus/test_handle.py::test_a_ray_worker_that_dies": "corpus/test_handle.py::test_it_travels_as_settings",
    "concurrency/test_load.py::test_mixed_traffic_for_seconds": "concurrency/test_sharing.py::test_different_lengths_under_threads",
    "models/test_architectures.py::test_rows_of_every_architecture": "models/test_architectures.py::test_rows_of_a_few_architectures",
    "planning/test_simulated.py::test_sizes_are_within_the_targets_for_twenty_seeds": "planning/test_simulated.py::test_sizes_are_within_the_targets_on_every_curve_and_mix",
    "langchain/test_state.py::test_worker_process": "langchain/test_state.py::test_forked_child_loads_its_own",
}
"""Long tests, each with the test in `make test` that keeps its promise."""


def marks_of(file: str, name: str) -> Iterator[str]:
    """The markers of the test `name` (``test_x[case]``) in `file`, a path below tests/."""
    test = f"{file}::{name.partition('[')[0]}"
    if file.startswith("hostile/"):
        yield from ("hostile", "alone")
    elif file in ALONE or test in ALONE:
        yield "alone"
    if file in SLOW or test in SLOW:
        yield "slow"
    kept = LONG.get(test)
    if test in TWICE or (kept is not None and re.search(kept, name) is None):
        yield "long"
