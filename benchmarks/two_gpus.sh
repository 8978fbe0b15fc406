#!/usr/bin/env bash
# What needs two GPUs of one host: tests first, then benchmarks. At most four minutes. Run it from the repository's root.
# VLLM_SITE: a folder with vLLM, for its benchmark with two workers; left out without one.
set -uo pipefail
python=${PYTHON:-python3}
export NCCL_NVLS_ENABLE=0 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
timeout 100 "$python" -m pytest -q -p no:cacheprovider -x --tb=short \
    "tests/model/test_replicated_models.py::test_the_latent_is_stored_once_and_every_rank_restarts_from_it[2 cuda deepseek_v2 of 512 and 64]" \
    "tests/model/test_tensor_parallel.py::test_a_split_model_restarts_from_disk_and_recomputes_together_what_one_rank_lost[cuda]"
timeout 45 "$python" -m pytest -q -p no:cacheprovider --tb=short \
    "tests/model/test_tensor_parallel.py::test_a_rank_that_fails_in_a_step_and_lives_on_ends_the_others_in_bounded_time[2 cuda llama fail]"
if [ -n "${VLLM_SITE:-}" ]; then
    PYTHONPATH="$VLLM_SITE:$PYTHONPATH" timeout 90 "$python" -m benchmarks.vllm --tensor-parallel 2 --modes tierkv --layers 8 --eager
fi
