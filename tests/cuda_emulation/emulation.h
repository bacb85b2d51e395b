#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

/// The CUDA runtime and device code on the CPU, so that kernels compiled as plain C++ run in tests without a GPU.
///
/// Kernels are done when the call that asks for them returns; copies that need not be wait, as copies on another stream
/// may, until somebody waits for them (see Late). The blocks of a grid run one after another, in an order
/// that depends on the seed; the threads of a block are fibers of the calling thread, each of which runs until it waits
/// for others, and which of those that are ready goes next depends on the seed as well. So a kernel that lacks a
/// barrier, or whose result depends on an order, gives a wrong number for some seed. What CUDA calls undefined and can
/// be seen (a barrier that not all threads reach, a warp operation without one of its lanes, a write outside an
/// allocation) ends the process with a message on stderr.
namespace weft_emulation {

/// The orders of all later launches are a function of `seed` and of the number of launches since this call.
void set_seed(uint64_t seed);

/// What of the work queued on streams is left for as long as it may be: until its stream or an event behind it is
/// waited for, or other work of its stream, or of one that waits for it, is done. So a wait that is missing shows up as
/// a wrong number: with kCopies that of work for a copy, and memory that is used again before a copy has read it; with
/// kKernels that of a copy for work. Copies from pageable memory read it, and copies to it are done, when the call
/// returns.
enum class Late { kNothing, kCopies, kKernels };
/// For all later calls; kCopies at the start.
void set_late(Late late);

/// How much memory the device has; 4 GiB at the start.
void set_memory(size_t bytes);

/// The dynamic shared memory of the running block, aligned to 1024 bytes, 0xff when the block begins.
unsigned char* dynamic_shared();

/// What the device says of itself from now on; 9.0 at the start.
void set_compute_capability(int major, int minor);

/// Whether there is an emulated cuDNN from now on; there is at the start.
void set_cudnn(bool there);
bool has_cudnn();

/// From now on the ranges that this thread marks for a profiler are kept, until they are taken: one a line, indented by
/// one space for each that it is within.
void keep_ranges();
std::vector<std::string> take_ranges();

/// Ends the process if a byte just outside one of the live allocations was written; cudaFree does so for its own.
void check_guards();

/// Puts the clock of events forward, by what work would have taken.
void pass_time(double seconds);

/// How many products cublasLtMatmul has computed with the algorithm that is proposed as number `algorithm`, from 0
/// to 3.
int64_t products_with(int algorithm);

}  // namespace weft_emulation
