#pragma once
#include <cstdint>

/// The CUDA runtime and device code on the CPU, so that kernels compiled as plain C++ run in tests without a GPU.
///
/// Everything is done when the call that asks for it returns. The blocks of a grid run one after another, in an order
/// that depends on the seed; the threads of a block are fibers of the calling thread, each of which runs until it waits
/// for others, and which of those that are ready goes next depends on the seed as well. So a kernel that lacks a
/// barrier, or whose result depends on an order, gives a wrong number for some seed. What CUDA calls undefined and can
/// be seen (a barrier that not all threads reach, a warp operation without one of its lanes, a write outside an
/// allocation) ends the process with a message on stderr.
namespace weft_emulation {

/// The orders of all later launches are a function of `seed` and of the number of launches since this call.
void set_seed(uint64_t seed);

/// The dynamic shared memory of the running block, aligned to 1024 bytes, 0xff when the block begins.
unsigned char* dynamic_shared();

/// What the device says of itself from now on; 9.0 at the start.
void set_compute_capability(int major, int minor);

/// Ends the process if a byte just outside one of the live allocations was written; cudaFree does so for its own.
void check_guards();

}  // namespace weft_emulation
