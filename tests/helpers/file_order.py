"""Which files of tests run GPU code, and which a run of all begins with."""

from __future__ import annotations

GPU_CODE = ("triton", "cuda", "ptx_emulator", "sparse", "pruning/test_nothing_waits.py")
"""Where tests of GPU code are that need no GPU: `make test` looks for them nowhere else."""

LONGEST = (
    "pruning/test_nothing_waits.py",
    "triton/test_triton_coded.py",
    "triton/test_triton_select.py",
    "triton/test_captured_steps.py",
    "cuda/test_cuda_boundary.py",
    "house/test_packaging.py",
    "cli/test_cli_kills.py",
    "house/test_examples.py",
    "studies/test_ablate.py",
    "integrations/test_integration_trainer.py",
    "pruning/test_released.py",
    "integrations/test_integration_callback.py",
    "cli/test_cli.py",
    "house/test_lean.py",
    "pruning/test_missing_gradients.py",
    "cuda/test_cuda_compile.py",
    "cli/test_cli_resuming.py",
    "integrations/test_integration_loss.py",
    "pruning/test_optim.py",
    "integrations/test_integration_modes.py",
    "bench/test_bench_inference.py",
    "distributed/test_distributed.py",
    "distributed/test_select_ranks.py",
    "runs/test_report.py",
    "cuda/test_cuda_host.py",
    "cuda/test_cuda_boundary_host.py",
    "distributed/test_shards.py",
    "distributed/test_teacher_ranks.py",
    "distributed/test_coded_ranks.py",
    "pruning/test_state_device.py",
)
"""Files to begin with, so that no process is left alone with one of them at the end."""
