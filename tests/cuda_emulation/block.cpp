#include "block.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "fibers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

constinit thread_local uint3 threadIdx = {}, blockIdx = {};
constinit thread_local dim3 blockDim, gridDim;

namespace weft_emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kGuard = 64, kMaxShared = 232448;
constexpr unsigned char kGuardByte = 0xf5;

std::atomic<uint64_t> seed{0}, launches{0};

/// splitmix64 (Steele et al. 2014): every seed gives a good sequence.
class Random {
 public:
  explicit Random(uint64_t state = 0) : state_(state) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  /// Below `bound`, which is below 2^32.
  uint64_t below(uint64_t bound) { return (next() >> 32) * bound >> 32; }

 private:
  uint64_t state_;
};

const char* name(Barrier kind) {
  static constexpr const char* kNames[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and",
                                           "__syncthreads_or"};
  return kNames[static_cast<int>(kind)];
}

const char* name(WarpOperation operation) {
  static constexpr const char* kNames[] = {"__syncwarp",
                                           "__shfl_sync",
                                           "__shfl_up_sync",
                                           "__shfl_down_sync",
                                           "__shfl_xor_sync",
                                           "__ballot_sync",
                                           "__any_sync",
                                           "__all_sync",
                                           "__match_any_sync",
                                           "__reduce_add_sync",
                                           "__reduce_min_sync(unsigned)",
                                           "__reduce_max_sync(unsigned)",
                                           "__reduce_min_sync(int)",
                                           "__reduce_max_sync(int)"};
  return kNames[static_cast<int>(operation)];
}

bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

/// One thread of the running block.
struct Thread {
  enum class State : uint8_t { kReady, kAtBarrier, kInWarpOperation, kExited };
  uint3 index = {};
  Fiber* fiber = nullptr;  // null until it starts
  State state = State::kReady;
  WarpOperation operation = WarpOperation::kSync;
  unsigned mask = 0;
  int source = 0;
  uint64_t value = 0, result = 0;
  std::source_location where;
};

/// A warp operation that some of its lanes have not reached.
struct Pending {
  WarpOperation operation;
  unsigned mask, arrived;
};

struct Warp {
  unsigned live = 0;
  std::vector<Pending> pending;
};

/// The execution of grids on one operating-system thread.
class Machine {
 public:
  ~Machine();
  void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
  int barrier(Barrier kind, bool predicate, const std::source_location& where);
  uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int source,
                          const std::source_location& where);
  unsigned live_lanes() const { return warps_[current_ / kWarp].live; }
  unsigned lane() const { return current_ % kWarp; }
  void yield();
  unsigned char* shared() const { return shared_; }
  bool running() const { return thread_ != nullptr; }
  void print_place() const;

 private:
  static void fiber_entry();
  void run_block(uint64_t linear_block);
  void run_threads();
  void run_next(bool finished);
  void exit_thread();
  void release_barrier();
  void complete(const Pending& operation);
  [[noreturn]] void deadlock();
  void make_ready(unsigned thread);
  unsigned take_ready();
  Fiber* idle_fiber();
  void prepare_shared();
  void check_shared() const;

  // The launch.
  const std::function<void()>* thread_ = nullptr;
  uint64_t launch_ = 0;
  size_t shared_bytes_ = 0;
  unsigned char* shared_ = nullptr;
  Random random_;
  // The block.
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned> ready_, at_barrier_;
  unsigned live_ = 0, current_ = 0;
  Barrier barrier_ = Barrier::kPlain;
  std::source_location barrier_where_;
  int barrier_count_ = 0;
  // The stacks.
  Fiber main_;
  Fiber* active_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

constinit thread_local Machine* machine = nullptr;

Machine& running_machine(const char* what) {
  if (machine == nullptr || !machine->running()) die("%s outside a kernel", what);
  return *machine;
}

Machine::~Machine() {
  if (shared_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared_, kMaxShared + kGuard);
#endif
  std::free(shared_);
}

void Machine::print_place() const {
  std::fprintf(stderr, "launch %llu, block (%u,%u,%u), thread (%u,%u,%u): ", static_cast<unsigned long long>(launch_),
               blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
}

void Machine::run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  if (running()) die("a kernel launches a kernel");
  thread_ = &thread;
  launch_ = launches.fetch_add(1) + 1;
  shared_bytes_ = shared_bytes;
  blockDim = block;
  gridDim = grid;
  random_ = Random(Random(seed.load() ^ launch_ << 20).next());
  const unsigned count = block.x * block.y * block.z;
  threads_.assign(count, Thread());
  for (unsigned i = 0; i < count; ++i) threads_[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  warps_.resize((count + kWarp - 1) / kWarp);
  prepare_shared();

  // block = (start + i * stride) mod blocks visits every block once if stride and blocks have no common factor.
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t few = std::min<uint64_t>(blocks, uint64_t{1} << 31);
  uint64_t stride = 1 + random_.below(few), block_index = random_.below(few);
  while (std::gcd(stride, blocks) != 1) ++stride;
  for (uint64_t i = 0; i < blocks; ++i, block_index = (block_index + stride) % blocks) {
    blockIdx = {static_cast<unsigned>(block_index % grid.x), static_cast<unsigned>(block_index / grid.x % grid.y),
                static_cast<unsigned>(block_index / grid.x / grid.y)};
    run_block(i);
  }
  thread_ = nullptr;
}

void Machine::run_block(uint64_t order) {
  const unsigned count = static_cast<unsigned>(threads_.size());
  if (order > 0) {
    for (Thread& thread : threads_) {
      thread.fiber = nullptr;
      thread.state = Thread::State::kReady;
    }
    if (shared_bytes_ > 0) std::memset(shared_, 0xff, shared_bytes_);
  }
  for (unsigned w = 0; w < warps_.size(); ++w) {
    const unsigned lanes = std::min(kWarp, count - w * kWarp);
    warps_[w].live = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  }
  ready_.resize(count);
  std::iota(ready_.begin(), ready_.end(), 0u);
  live_ = count;

  current_ = take_ready();
  threadIdx = threads_[current_].index;
  active_ = threads_[current_].fiber = idle_fiber();
  main_.switch_to(*active_);
  check_shared();
}

void Machine::prepare_shared() {
  if (shared_ == nullptr)
    shared_ = static_cast<unsigned char*>(std::aligned_alloc(1024, (kMaxShared + kGuard + 1023) / 1024 * 1024));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared_, shared_bytes_);
  __asan_poison_memory_region(shared_ + shared_bytes_, kMaxShared + kGuard - shared_bytes_);
#else
  std::memset(shared_ + shared_bytes_, kGuardByte, kGuard);
#endif
  std::memset(shared_, 0xff, shared_bytes_);
}

void Machine::check_shared() const {
#if !defined(__SANITIZE_ADDRESS__)
  const unsigned char* guard = shared_ + shared_bytes_;
  if (std::any_of(guard, guard + kGuard, [](unsigned char byte) { return byte != kGuardByte; })) {
    die("a thread of this block wrote past the end of its %zu bytes of dynamic shared memory", shared_bytes_);
  }
#endif
}

// ---- which thread runs ----

void Machine::fiber_entry() {
  machine->active_->arrived();
  machine->run_threads();
}

void Machine::run_threads() {
  for (;;) {
    (*thread_)();
    exit_thread();
    run_next(true);
  }
}

/// Leaves the current thread, which has exited or waits, for one that is ready. A fiber whose thread has exited starts
/// the next one itself, so that threads that never wait share one stack and switch nothing. Returns when `current_` is
/// a thread of this fiber.
void Machine::run_next(bool finished) {
  Fiber* const self = active_;
  if (ready_.empty()) {
    if (live_ > 0) deadlock();
    idle_.push_back(self);
    self->switch_to(main_);
    return;
  }
  current_ = take_ready();
  Thread& next = threads_[current_];
  threadIdx = next.index;
  if (next.fiber == nullptr) next.fiber = finished ? self : idle_fiber();
  if (next.fiber == self) return;
  if (finished) idle_.push_back(self);
  active_ = next.fiber;
  self->switch_to(*next.fiber);
}

Fiber* Machine::idle_fiber() {
  if (idle_.empty()) {
    fibers_.push_back(std::make_unique<Fiber>(fiber_entry));
    return fibers_.back().get();
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  return fiber;
}

void Machine::make_ready(unsigned thread) {
  threads_[thread].state = Thread::State::kReady;
  ready_.push_back(thread);
}

unsigned Machine::take_ready() {
  unsigned& place = ready_[random_.below(ready_.size())];
  const unsigned thread = place;
  place = ready_.back();
  ready_.pop_back();
  return thread;
}

void Machine::yield() {
  make_ready(current_);
  run_next(false);
}

void Machine::exit_thread() {
  threads_[current_].state = Thread::State::kExited;
  Warp& warp = warps_[current_ / kWarp];
  warp.live &= ~(1u << lane());
  for (const Pending& pending : warp.pending) {
    if (!(pending.mask >> lane() & 1)) continue;
    die("has exited, but lane %d of its warp waits for it in %s with mask 0x%08x", std::countr_zero(pending.arrived),
        name(pending.operation), pending.mask);
  }
  --live_;
  if (!at_barrier_.empty() && at_barrier_.size() == live_) release_barrier();
}

void Machine::deadlock() {
  std::fprintf(stderr, "cuda emulation: launch %llu, block (%u,%u,%u): no thread can go on:\n",
               static_cast<unsigned long long>(launch_), blockIdx.x, blockIdx.y, blockIdx.z);
  if (!at_barrier_.empty()) {
    const uint3 first = threads_[*std::min_element(at_barrier_.begin(), at_barrier_.end())].index;
    std::fprintf(stderr, "  %zu of %u live threads wait in %s at %s:%u, the first is thread (%u,%u,%u)\n",
                 at_barrier_.size(), live_, name(barrier_), barrier_where_.file_name(),
                 static_cast<unsigned>(barrier_where_.line()), first.x, first.y, first.z);
  }
  for (size_t w = 0; w < warps_.size(); ++w) {
    for (const Pending& pending : warps_[w].pending) {
      const Thread& first = threads_[w * kWarp + static_cast<size_t>(std::countr_zero(pending.arrived))];
      std::fprintf(stderr,
                   "  lanes 0x%08x of warp %zu wait in %s with mask 0x%08x at %s:%u, the first is thread (%u,%u,%u)\n",
                   pending.arrived, w, name(pending.operation), pending.mask, first.where.file_name(),
                   static_cast<unsigned>(first.where.line()), first.index.x, first.index.y, first.index.z);
    }
  }
  std::abort();
}

// ---- barriers ----

int Machine::barrier(Barrier kind, bool predicate, const std::source_location& where) {
  if (at_barrier_.empty()) {
    barrier_ = kind;
    barrier_where_ = where;
    barrier_count_ = 0;
  } else if (barrier_ != kind || !same_place(barrier_where_, where)) {
    const uint3 other = threads_[at_barrier_.front()].index;
    die("is at %s (%s:%u) while thread (%u,%u,%u) waits at %s (%s:%u); a barrier must be one for the whole block",
        name(kind), where.file_name(), static_cast<unsigned>(where.line()), other.x, other.y, other.z, name(barrier_),
        barrier_where_.file_name(), static_cast<unsigned>(barrier_where_.line()));
  }
  barrier_count_ += predicate;
  at_barrier_.push_back(current_);
  Thread& thread = threads_[current_];
  thread.state = Thread::State::kAtBarrier;
  if (at_barrier_.size() == live_) release_barrier();
  run_next(false);
  return static_cast<int>(thread.result);
}

void Machine::release_barrier() {
  const int arrived = static_cast<int>(at_barrier_.size());
  int result = barrier_count_;
  if (barrier_ == Barrier::kAnd) result = barrier_count_ == arrived;
  if (barrier_ == Barrier::kOr) result = barrier_count_ > 0;
  for (const unsigned thread : at_barrier_) {
    threads_[thread].result = static_cast<uint64_t>(result);
    make_ready(thread);
  }
  at_barrier_.clear();
}

// ---- warps ----

uint64_t Machine::warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int source,
                                 const std::source_location& where) {
  Warp& warp = warps_[current_ / kWarp];
  const unsigned bit = 1u << lane();
  const auto place = [&] { return static_cast<unsigned>(where.line()); };
  if (!(mask & bit))
    die("is not in the mask 0x%08x of its %s (%s:%u)", mask, name(operation), where.file_name(), place());
  if (mask & ~warp.live) {
    die("names lane %d in the mask 0x%08x of its %s (%s:%u), which has exited or is not in the block",
        std::countr_zero(mask & ~warp.live), mask, name(operation), where.file_name(), place());
  }
  Thread& thread = threads_[current_];
  thread.operation = operation;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  thread.where = where;
  thread.state = Thread::State::kInWarpOperation;

  auto pending = warp.pending.begin();
  for (; pending != warp.pending.end() && !(pending->mask == mask && pending->operation == operation); ++pending) {
    // Each of the two waits for the other in another operation, so neither will ever go on.
    if (!(pending->mask & bit) || !(pending->arrived & mask)) continue;
    const int lane = std::countr_zero(pending->arrived & mask);
    const Thread& other = threads_[current_ / kWarp * kWarp + static_cast<unsigned>(lane)];
    die("is in %s with mask 0x%08x (%s:%u), but lane %d, which it waits for, waits for it in %s with mask 0x%08x "
        "(%s:%u)",
        name(operation), mask, where.file_name(), place(), lane, name(pending->operation), pending->mask,
        other.where.file_name(), static_cast<unsigned>(other.where.line()));
  }
  if (pending == warp.pending.end()) pending = warp.pending.insert(pending, {operation, mask, 0});
  pending->arrived |= bit;
  if (pending->arrived == mask) {
    const Pending complete_one = *pending;
    warp.pending.erase(pending);
    complete(complete_one);
  }
  run_next(false);
  return thread.result;
}

/// Gives each lane its result here, so that a lane that runs ahead into its next operation cannot disturb the others.
void Machine::complete(const Pending& operation) {
  const unsigned first = current_ / kWarp * kWarp;
  std::array<unsigned, kWarp> lanes;
  unsigned count = 0;
  for (unsigned rest = operation.mask; rest != 0; rest &= rest - 1)
    lanes[count++] = static_cast<unsigned>(std::countr_zero(rest));
  const auto value = [&](unsigned i) { return threads_[first + lanes[i]].value; };
  const auto reduce = [&](auto combine) {
    uint64_t result = value(0);
    for (unsigned i = 1; i < count; ++i) result = combine(result, value(i));
    return result;
  };

  uint64_t result = 0;
  switch (operation.operation) {
    case WarpOperation::kSync:
      break;
    case WarpOperation::kShuffle:
    case WarpOperation::kShuffleUp:
    case WarpOperation::kShuffleDown:
    case WarpOperation::kShuffleXor:
      for (unsigned i = 0; i < count; ++i) {
        Thread& thread = threads_[first + lanes[i]];
        const unsigned source = static_cast<unsigned>(thread.source);
        thread.result = operation.mask >> source & 1 ? threads_[first + source].value : ~uint64_t{0};
      }
      break;
    case WarpOperation::kBallot:
    case WarpOperation::kAny:
    case WarpOperation::kAll:
      for (unsigned i = 0; i < count; ++i) result |= static_cast<uint64_t>(value(i) != 0) << lanes[i];
      if (operation.operation == WarpOperation::kAny) result = result != 0;
      if (operation.operation == WarpOperation::kAll) result = result == operation.mask;
      break;
    case WarpOperation::kMatchAny:
      for (unsigned i = 0; i < count; ++i) {
        uint64_t& same = threads_[first + lanes[i]].result = 0;
        for (unsigned j = 0; j < count; ++j) same |= static_cast<uint64_t>(value(j) == value(i)) << lanes[j];
      }
      break;
    case WarpOperation::kAdd:
      result = reduce([](uint64_t a, uint64_t b) { return a + b; });
      break;
    case WarpOperation::kMinUnsigned:
      result = reduce([](uint64_t a, uint64_t b) { return std::min(a, b); });
      break;
    case WarpOperation::kMaxUnsigned:
      result = reduce([](uint64_t a, uint64_t b) { return std::max(a, b); });
      break;
    case WarpOperation::kMinSigned:
      result = reduce([](uint64_t a, uint64_t b) { return static_cast<int32_t>(a) < static_cast<int32_t>(b) ? a : b; });
      break;
    case WarpOperation::kMaxSigned:
      result = reduce([](uint64_t a, uint64_t b) { return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? a : b; });
      break;
  }
  const bool own_results =
      (operation.operation >= WarpOperation::kShuffle && operation.operation <= WarpOperation::kShuffleXor) ||
      operation.operation == WarpOperation::kMatchAny;
  for (unsigned i = 0; i < count; ++i) {
    if (!own_results) threads_[first + lanes[i]].result = result;
    make_ready(first + lanes[i]);
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread) {
  static thread_local Machine own;
  machine = &own;
  own.run_grid(grid, block, dynamic_shared_bytes, thread);
}

int block_barrier(Barrier kind, bool predicate, std::source_location where) {
  return running_machine(name(kind)).barrier(kind, predicate, where);
}
uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int source,
                        std::source_location where) {
  return running_machine(name(operation)).warp_operation(operation, mask, value, source, where);
}
unsigned live_lanes() { return running_machine("__activemask").live_lanes(); }
unsigned lane() { return running_machine("a warp operation").lane(); }
void yield() { running_machine("__nanosleep").yield(); }
unsigned char* dynamic_shared() { return running_machine("dynamic_shared").shared(); }

void set_seed(uint64_t value) {
  seed = value;
  launches = 0;
}

void die(const char* format, ...) {
  std::fputs("cuda emulation: ", stderr);
  if (machine != nullptr && machine->running()) machine->print_place();
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

}  // namespace weft_emulation
