"""Runs the PTX that Triton and nvcc emit without a GPU: all threads of a block, every access checked.

    pytest --ptx 90 tests/triton/test_triton_select.py -k collect

runs the tests marked `interpret` and `ptx`, as they are, on emulated PTX of sm_90 (or 80); --ptx-orders N runs every
launch N more times, blocks in random orders and warps in random turns, and compares memory. The interpreter is compiled
into build/ptx_emulator at first use (g++ with C++20).

Faults end a launch and fail the test: an access that is misaligned or outside the tensors handed to the launch and
those a pointer table points to, shared memory or parameters outside, deadlock, trap, anything not implemented. Findings
fail the test, too: a read of shared memory that nobody wrote; two threads at one byte, one of them writing another
value, not both atomic, no barrier between (across blocks there is none); a barrier that part of a warp reaches;
warp-wide instructions that name exited threads or read inactive lanes; division of an integer by zero; memory that
depends on the order of blocks and warps. Registers and shared memory start as rubbish; NaN results are NVIDIA's.

Not seen: ptxas and its scheduling, timing, caches and the memory model beyond barriers, streams, CUDA's host API,
tensor cores; asynchronous copies happen at once. fma, div.rn and sqrt.rn are exact, approximate instructions are exact
results rounded, not NVIDIA's. Local memory, calls and textures are not implemented.

    names, instructions, module   PTX text to a table of instructions; anything not understood raises with its line
    machine/                      the interpreter, in C++
    launch                        one launch: parameters, allocations, findings in words
    session                       what a test run has found, and how it wants launches run
    triton_driver                 beneath Triton: its specialisation and compiler, then this, not CUDA's launcher
    cuda_kernels                  csrc/cuda by nvcc -ptx, launched as its host code launches it
    plugin                        the options of pytest
"""
