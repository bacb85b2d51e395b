#include "core/memory.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "core/backend.h"
#include "core/error.h"

namespace weft {
namespace {

constexpr size_t kCpuAlignment = 64, kDeviceAlignment = 256;
/// Small requests share segments of 4 MiB; larger ones share segments of 32 MiB or have one of their own size. Keeping
/// the two apart stops long-lived small blocks from splitting what large ones need.
constexpr size_t kSmallRequest = size_t{256} << 10;
constexpr size_t kSmallSegment = size_t{4} << 20;
constexpr size_t kLargeSegment = size_t{32} << 20;
constexpr size_t kPage = size_t{2} << 20;

thread_local MemoryCategory current_category = MemoryCategory::activations;
std::atomic<int> dry_runs = 0;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

const char* name(MemoryCategory category) {
  static constexpr const char* kNames[] = {"parameters", "gradients",     "optimizer", "activations",
                                           "workspace",  "communication", "data",      "checkpoint"};
  return kNames[static_cast<size_t>(category)];
}

MemoryScope::MemoryScope(MemoryCategory category) : previous_(current_category) { current_category = category; }
MemoryScope::~MemoryScope() { current_category = previous_; }
MemoryCategory MemoryScope::current() { return current_category; }

DryRun::DryRun() { ++dry_runs; }
DryRun::~DryRun() { --dry_runs; }
bool DryRun::active() { return dry_runs.load(std::memory_order_relaxed) > 0; }

struct ReplayMemory::State {
  struct Range {
    char *begin, *end;
  };
  Allocator::State* allocator;
  bool recording = true;
  std::vector<Range> ranges;  // sorted and joined once the recording has stopped
  std::unordered_map<void*, int64_t> takers;
  int64_t taken = 0;

  bool overlaps(const char* data, size_t bytes) const {
    const auto after =
        std::partition_point(ranges.begin(), ranges.end(), [&](const Range& r) { return r.end <= data; });
    return after != ranges.end() && after->begin < data + bytes;
  }
  void sort() {
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    std::vector<Range> joined;
    for (const Range& range : ranges) {
      if (joined.empty() || range.begin > joined.back().end)
        joined.push_back(range);
      else
        joined.back().end = std::max(joined.back().end, range.end);
    }
    ranges = std::move(joined);
  }
};

struct Allocator::State {
  struct Block {
    char* data;
    size_t bytes;
    bool small;
    bool used = false;
    MemoryCategory category = MemoryCategory::activations;
    Block* before = nullptr;  // neighbours in the same segment
    Block* after = nullptr;
  };
  struct Smaller {
    bool operator()(const Block* a, const Block* b) const {
      return a->bytes != b->bytes ? a->bytes < b->bytes : a->data < b->data;
    }
  };

  Device device;
  bool dry, pinned;
  mutable std::mutex mutex;
  std::set<Block*, Smaller> unused[2];  // by size, then address: best fit, deterministic; [small]
  std::unordered_map<void*, Block*> used;
  MemoryStatistics statistics;
  std::vector<ReplayMemory::State*> replays;

  size_t alignment() const { return device.kind == DeviceKind::cpu ? kCpuAlignment : kDeviceAlignment; }

  /// Whether recorded work may still use a segment.
  bool is_kept(const Block& segment) const {
    return std::any_of(replays.begin(), replays.end(), [&](const ReplayMemory::State* replay) {
      return replay->recording || replay->overlaps(segment.data, segment.bytes);
    });
  }
  void note_allocated(const Block& block) {
    for (ReplayMemory::State* replay : replays) {
      if (replay->recording) {
        replay->ranges.push_back({block.data, block.data + block.bytes});
      } else if (replay->overlaps(block.data, block.bytes)) {
        replay->takers.emplace(block.data, static_cast<int64_t>(block.bytes));
        replay->taken += static_cast<int64_t>(block.bytes);
      }
    }
  }
  void note_freed(const Block& block) {
    for (ReplayMemory::State* replay : replays) {
      const auto found = replay->takers.find(block.data);
      if (found == replay->takers.end()) continue;
      replay->taken -= found->second;
      replay->takers.erase(found);
    }
  }

  /// Tells the address sanitizer which bytes may be touched: it cannot see inside memory that is cached here.
  void mark([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool usable) const {
#if defined(__SANITIZE_ADDRESS__)
    if (dry || device.kind != DeviceKind::cpu) return;
    if (usable)
      __asan_unpoison_memory_region(data, bytes);
    else
      __asan_poison_memory_region(data, bytes);
#endif
  }

  void* take_from_system(size_t bytes) {
    if (!dry) return pinned ? backend(device).host_allocate(bytes) : backend(device).system_allocate(bytes);
    // Addresses without memory: unique, and a stray access faults instead of reading nonsense.
    void* data = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }
  void give_to_system(void* data, size_t bytes) {
    if (dry)
      munmap(data, bytes);
    else if (pinned)
      backend(device).host_free(data, bytes);
    else
      backend(device).system_free(data, bytes);
  }

  Block* new_segment(size_t bytes, bool small) {
    const size_t size = small ? kSmallSegment : std::max(round_up(bytes, kPage), kLargeSegment);
    void* data = take_from_system(size);
    if (data == nullptr) return nullptr;
    mark(data, size, false);
    statistics.reserved += static_cast<int64_t>(size);
    ++statistics.system_allocations;
    return new Block{static_cast<char*>(data), size, small};
  }

  void release_cached() {
    for (auto& list : unused) {
      for (auto it = list.begin(); it != list.end();) {
        Block* block = *it;
        if (block->before || block->after || is_kept(*block)) {
          ++it;
          continue;
        }
        it = list.erase(it);
        statistics.reserved -= static_cast<int64_t>(block->bytes);
        mark(block->data, block->bytes, true);
        give_to_system(block->data, block->bytes);
        delete block;
      }
    }
  }

  void count(MemoryCategory category, int64_t bytes) {
    auto& use = statistics.categories[static_cast<size_t>(category)];
    use.current += bytes;
    use.peak = std::max(use.peak, use.current);
    statistics.total.current += bytes;
    if (statistics.total.current > statistics.total.peak) {
      statistics.total.peak = statistics.total.current;
      for (auto& each : statistics.categories) each.at_peak = each.current;
      statistics.total.at_peak = statistics.total.peak;
    }
  }
};

Allocator::Allocator(Device device, bool dry, bool pinned) : state_(new State) {
  state_->device = device;
  state_->dry = dry;
  state_->pinned = pinned;
}

Allocator::~Allocator() {
  state_->release_cached();
  delete state_;
}

void* Allocator::allocate(size_t bytes, MemoryCategory category) {
  if (bytes == 0) return nullptr;
  State& s = *state_;
  const size_t size = round_up(bytes, s.alignment());
  const bool small = size <= kSmallRequest;
  const std::lock_guard lock(s.mutex);
  State::Block key{nullptr, size, small};
  auto& list = s.unused[small];
  const auto found = list.lower_bound(&key);
  State::Block* block = nullptr;
  if (found != list.end()) {
    block = *found;
    list.erase(found);
  } else {
    block = s.new_segment(size, small);
    if (block == nullptr) {
      s.release_cached();
      block = s.new_segment(size, small);
    }
    if (block == nullptr) {
      fail(ErrorKind::kMemory, "allocate", grouped(static_cast<int64_t>(bytes)), " bytes (",
           human_bytes(static_cast<int64_t>(bytes)), ") of ", name(category),
           s.pinned ? " memory on the host, pinned for " : " memory on ", s.device, " could not be had. In use:\n",
           memory_table(s.statistics), "Hint: a smaller micro-batch, a shorter context or recomputation needs less");
    }
  }
  if (block->bytes > size) {
    auto* rest = new State::Block{block->data + size, block->bytes - size, small};
    rest->before = block;
    rest->after = block->after;
    if (rest->after) rest->after->before = rest;
    block->after = rest;
    block->bytes = size;
    list.insert(rest);
  }
  block->used = true;
  block->category = category;
  s.used.emplace(block->data, block);
  s.note_allocated(*block);
  s.mark(block->data, bytes, true);
  s.count(category, static_cast<int64_t>(size));
  return block->data;
}

void Allocator::free(void* data) {
  if (data == nullptr) return;
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  const auto found = s.used.find(data);
  State::Block* block = found->second;
  s.used.erase(found);
  s.note_freed(*block);
  s.count(block->category, -static_cast<int64_t>(block->bytes));
  s.mark(block->data, block->bytes, false);
  block->used = false;
  auto& list = s.unused[block->small];
  const auto join = [&](State::Block* left, State::Block* right) {
    left->bytes += right->bytes;
    left->after = right->after;
    if (left->after) left->after->before = left;
    delete right;
  };
  if (State::Block* after = block->after; after && !after->used) {
    list.erase(after);
    join(block, after);
  }
  if (State::Block* before = block->before; before && !before->used) {
    list.erase(before);
    join(before, block);
    block = before;
  }
  list.insert(block);
}

void Allocator::recount(void* data, MemoryCategory category) {
  if (data == nullptr) return;
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  State::Block& block = *s.used.at(data);
  s.count(block.category, -static_cast<int64_t>(block.bytes));
  block.category = category;
  s.count(category, static_cast<int64_t>(block.bytes));
}

MemoryStatistics Allocator::statistics() const {
  const std::lock_guard lock(state_->mutex);
  return state_->statistics;
}

void Allocator::reset_peak() {
  const std::lock_guard lock(state_->mutex);
  auto& statistics = state_->statistics;
  for (auto& use : statistics.categories) use.peak = use.at_peak = use.current;
  statistics.total.peak = statistics.total.at_peak = statistics.total.current;
}

void Allocator::release_cached() {
  const std::lock_guard lock(state_->mutex);
  state_->release_cached();
}

std::unique_ptr<ReplayMemory> Allocator::record() {
  std::unique_ptr<ReplayMemory> memory(new ReplayMemory);
  memory->state_->allocator = state_;
  const std::lock_guard lock(state_->mutex);
  state_->replays.push_back(memory->state_.get());
  return memory;
}

ReplayMemory::ReplayMemory() : state_(new State) {}

ReplayMemory::~ReplayMemory() {
  const std::lock_guard lock(state_->allocator->mutex);
  std::erase(state_->allocator->replays, state_.get());
}

void ReplayMemory::stop() {
  const std::lock_guard lock(state_->allocator->mutex);
  state_->recording = false;
  state_->sort();
}

int64_t ReplayMemory::taken() const {
  const std::lock_guard lock(state_->allocator->mutex);
  return state_->taken;
}

int64_t ReplayMemory::bytes() const {
  const std::lock_guard lock(state_->allocator->mutex);
  int64_t bytes = 0;
  for (const State::Range& range : state_->ranges) bytes += range.end - range.begin;
  return bytes;
}

namespace {

struct Which {
  Device device;
  bool dry, pinned;
  auto operator<=>(const Which&) const = default;
};

Allocator& allocator(const Which& which) {
  // Never destroyed: tensors in static variables may outlive any order of destruction.
  static std::mutex& mutex = *new std::mutex;
  static auto& allocators = *new std::map<Which, Allocator*>;
  thread_local Which last;
  thread_local Allocator* cached = nullptr;
  if (cached != nullptr && which == last) return *cached;
  const std::lock_guard lock(mutex);
  Allocator*& entry = allocators[which];
  if (entry == nullptr) entry = new Allocator(which.device, which.dry, which.pinned);
  last = which;
  cached = entry;
  return *entry;
}

}  // namespace

Allocator& allocator(Device device) { return allocator({device, DryRun::active(), false}); }
Allocator& pinned_allocator(Device device) { return allocator({device, DryRun::active(), true}); }

std::string human_bytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (std::abs(value) >= 1024 && unit < 4) value /= 1024, ++unit;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return text;
}

std::string memory_table(const MemoryStatistics& statistics) {
  std::string out;
  const auto line = [&](const char* label, const std::string& now, const std::string& peak,
                        const std::string& at_peak) {
    char text[128];
    std::snprintf(text, sizeof text, "  %-13s %11s  %11s  %13s\n", label, now.c_str(), peak.c_str(), at_peak.c_str());
    out += text;
  };
  const auto row = [&](const char* label, const MemoryStatistics::Use& use) {
    line(label, human_bytes(use.current), human_bytes(use.peak), human_bytes(use.at_peak));
  };
  line("category", "now", "peak", "at total peak");
  for (int i = 0; i < kMemoryCategories; ++i) {
    const auto& use = statistics.categories[static_cast<size_t>(i)];
    if (use.peak > 0) row(name(static_cast<MemoryCategory>(i)), use);
  }
  row("total", statistics.total);
  return out + "  taken from the system: " + human_bytes(statistics.reserved) + "\n";
}

int64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace weft
