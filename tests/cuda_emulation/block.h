#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

#include "emulation.h"
#include "vector_types.h"

namespace weft_emulation {

/// Runs `thread` once for every thread of a grid; the caller has checked the sizes.
void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread);

/// What the threads of a block do together, called from within one. `where` is the place in the kernel.
enum class Barrier { kPlain, kCount, kAnd, kOr };
int block_barrier(Barrier kind, bool predicate, std::source_location where);

enum class WarpOperation {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kAdd,
  kMinUnsigned,
  kMaxUnsigned,
  kMinSigned,
  kMaxSigned
};
/// Waits for all lanes of `mask`; then the value of lane `source` for a shuffle, else what the operation makes of all
/// values.
uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int source, std::source_location where);

unsigned live_lanes();
unsigned lane();
/// Lets other threads of the block run.
void yield();
/// Ends the process with a message that names launch, block and thread.
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace weft_emulation

extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;
