#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/device.h"

namespace weft {

/// What memory is for; every allocation is counted under one of these names.
enum class MemoryCategory : uint8_t {
  parameters,
  gradients,
  optimizer,
  activations,
  workspace,
  communication,
  data,
  checkpoint,  ///< copies that are being written to disk
};
inline constexpr int kMemoryCategories = 8;
const char* name(MemoryCategory category);

/// While it lives, allocations of this thread are counted under `category`. The default is activations.
class MemoryScope {
 public:
  explicit MemoryScope(MemoryCategory category);
  ~MemoryScope();
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;
  static MemoryCategory current();

 private:
  MemoryCategory previous_;
};

/// While it lives, new tensors of any thread get addresses but no memory, and no kernel runs: a real step can be
/// replayed to see what it would take. Touching the data of such a tensor is a segmentation fault by construction;
/// reads through the library (item(), to_vector()) are errors. Must not be mixed with tensors made outside.
class DryRun {
 public:
  DryRun();
  ~DryRun();
  DryRun(const DryRun&) = delete;
  DryRun& operator=(const DryRun&) = delete;
  static bool active();
};

struct MemoryStatistics {
  struct Use {
    int64_t current = 0;  ///< bytes held now
    int64_t peak = 0;     ///< most bytes held at once in this category
    int64_t at_peak = 0;  ///< bytes of this category at the moment when the total was highest
  };
  std::array<Use, kMemoryCategories> categories;
  Use total;
  int64_t reserved = 0;            ///< bytes taken from the system, cached ones included
  int64_t system_allocations = 0;  ///< times the system was asked, since the start
};

/// The memory that recorded work (Graph, core/backend.h) uses each time it runs: all that was allocated while it was
/// recorded. Most of it was free again before the recording ended; others may use it between two runs, because the
/// work of a device is ordered, but must have given it back when the next begins. As long as this object lives none of
/// it is given back to the system; while it records, nothing at all is.
class ReplayMemory {
 public:
  ~ReplayMemory();
  ReplayMemory(const ReplayMemory&) = delete;
  ReplayMemory& operator=(const ReplayMemory&) = delete;
  /// What is allocated from now on is not part of it.
  void stop();
  /// Bytes of it that others have allocated since and not given back: a run now would write over what is theirs.
  int64_t taken() const;
  /// Bytes of it.
  int64_t bytes() const;

 private:
  friend class Allocator;
  struct State;
  ReplayMemory();
  std::unique_ptr<State> state_;
};

/// A caching allocator: memory that is given back is kept, split and joined, so that a training step that repeats asks
/// the system for nothing, as a rule after its second time: best fit may split the blocks of a step otherwise the
/// second time than the first, but settles. Blocks are 64-byte aligned on a CPU and 256-byte aligned on other devices,
/// so that no choice of a kernel by alignment depends on what was allocated before. Thread-safe.
class Allocator {
 public:
  /// @throws Error kMemory with the category table if the system has no more.
  void* allocate(size_t bytes, MemoryCategory category);
  void free(void* data);
  /// Counts memory in use under another category from now on: an activation that is kept as a gradient, say.
  void recount(void* data, MemoryCategory category);
  MemoryStatistics statistics() const;
  void reset_peak();
  /// Gives cached memory that is not in use back to the system, but for what a ReplayMemory keeps.
  void release_cached();
  /// Notes what is allocated from now on, until ReplayMemory::stop().
  std::unique_ptr<ReplayMemory> record();

  struct State;
  friend class ReplayMemory;
  /// @param pinned  host memory that the device copies from and to by itself, instead of its own
  explicit Allocator(Device device, bool dry, bool pinned = false);
  ~Allocator();

 private:
  State* state_;
};

/// The allocator of a device; while a DryRun is active, its dry twin.
Allocator& allocator(Device device);
/// That of page-locked host memory for copies from and to the device (Tensor::pinned).
Allocator& pinned_allocator(Device device);

/// The table of categories with current and peak use, as text.
std::string memory_table(const MemoryStatistics& statistics);

/// "1.9 GiB".
std::string human_bytes(int64_t bytes);

/// Peak resident memory of this process in bytes, as the operating system counts it.
int64_t peak_resident_bytes();

}  // namespace weft
