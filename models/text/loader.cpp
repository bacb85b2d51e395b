#include "models/text/loader.h"

#include <algorithm>
#include <bit>
#include <condition_variable>
#include <deque>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>

#include "core/error.h"

namespace weft::text {
namespace {

/// SplitMix64's output function (Steele et al. 2014) of a and b: a different stream for every pair.
uint64_t scramble(uint64_t a, uint64_t b) {
  uint64_t x = a + (b + 1) * 0x9e3779b97f4a7c15ULL;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
  return x ^ x >> 31;
}

/// Place `index` of a permutation of [0, size) that `key` selects: a balanced Feistel network on the next even number
/// of bits, applied until it falls below size (it is a permutation there, so that it does; fewer than 4 times on
/// average).
uint64_t permuted(uint64_t index, uint64_t size, uint64_t key) {
  if (size == 1) return 0;
  constexpr uint64_t kRounds = 8;
  const int half = (std::bit_width(size - 1) + 1) / 2;
  const uint64_t mask = (uint64_t{1} << half) - 1;
  do {
    uint64_t left = index >> half, right = index & mask;
    for (uint64_t round = 0; round < kRounds; ++round) {
      const uint64_t next = left ^ (scramble(scramble(key, round), right) & mask);
      left = right;
      right = next;
    }
    index = left << half | right;
  } while (index >= size);
  return index;
}

/// One row: `context` tokens from `begin` and the token after each.
void fill_row(const TokenSource& source, int64_t begin, int64_t row, std::vector<int32_t>& window, Batch& batch) {
  source.read(begin, window);
  const auto at = row * batch.context;
  std::copy(window.begin(), window.end() - 1, batch.inputs.begin() + at);
  std::copy(window.begin() + 1, window.end(), batch.targets.begin() + at);
}

Batch empty_batch(int64_t rows, int64_t context) {
  const auto size = static_cast<size_t>(rows * context);
  return {rows, context, std::vector<int32_t>(size, 0), std::vector<int32_t>(size, Batch::kIgnore), 0};
}

void check_at_least(const char* where, const char* what, int64_t value, int64_t least) {
  if (value < least) fail(ErrorKind::kValue, where, what, " must be at least ", least, ", got ", value);
}

void check_batch_size(const char* where, int64_t batch, int64_t context) {
  check_at_least(where, "batch", batch, 1);
  check_at_least(where, "context", context, 1);
  if (batch > std::numeric_limits<int32_t>::max() / context) {
    fail(ErrorKind::kValue, where, "batch * context must be below 2^31, got ", batch, " * ", context);
  }
}

template <class Source>
Source checked(Source source, const char* where) {
  if (source == nullptr) fail(ErrorKind::kValue, where, "source is null");
  return source;
}

}  // namespace

SampleOrder::SampleOrder(int64_t tokens, int64_t context, uint64_t seed)
    : tokens_(tokens), context_(context), windows_(0), seed_(seed) {
  check_at_least("Loader", "context", context, 1);
  if (tokens <= context) {
    fail(ErrorKind::kValue, "Loader", "a sample of context ", context, " takes ", context, " + 1 tokens; the data has ",
         tokens, ". Hint: more data or a shorter context");
  }
  windows_ = std::max<int64_t>((tokens - 1) / context - 1, 1);
}

int64_t SampleOrder::begin(int64_t sample) const {
  const uint64_t key = scramble(seed_, static_cast<uint64_t>(sample / windows_));
  // The remainder of a 64-bit number: the bias of at most slack / 2^64 is beyond notice.
  const int64_t slack = tokens_ - 1 - windows_ * context_;
  const auto offset = static_cast<int64_t>(scramble(key, 0) % static_cast<uint64_t>(slack + 1));
  const uint64_t window =
      permuted(static_cast<uint64_t>(sample % windows_), static_cast<uint64_t>(windows_), scramble(key, 1));
  return offset + static_cast<int64_t>(window) * context_;
}

/// Position and, if wanted, a thread that prepares batches ahead. The thread reads only what never changes and what the
/// mutex guards.
struct Loader::Impl {
  Impl(std::shared_ptr<const TokenSource> from, const LoaderOptions& given)
      : source(checked(std::move(from), "Loader")), options(given), order(source->size(), given.context, given.seed) {
    check_batch_size("Loader", options.batch, options.context);
    check_at_least("Loader", "world_size", options.world_size, 1);
    check_at_least("Loader", "prefetch", options.prefetch, 0);
    if (options.rank < 0 || options.rank >= options.world_size) {
      fail(ErrorKind::kValue, "Loader", "rank must be in [0, world_size), got rank ", options.rank, " of ",
           options.world_size);
    }
    if (options.batch > std::numeric_limits<int32_t>::max() / options.world_size) {
      fail(ErrorKind::kValue, "Loader", "batch * world_size must be below 2^31, got ", options.batch, " * ",
           options.world_size);
    }
    share_out();
    if (options.prefetch > 0) thread = std::thread([this] { produce(); });
  }

  ~Impl() {
    if (!thread.joinable()) return;
    {
      const std::lock_guard lock(mutex);
      stop = true;
    }
    room.notify_all();
    thread.join();
  }

  /// Which batches of a round are this rank's.
  void share_out() {
    const std::vector<int64_t>& shares = options.shares;
    if (shares.empty()) {
      in_round = options.world_size, before = options.rank, own = 1;
      return;
    }
    if (static_cast<int64_t>(shares.size()) != options.world_size) {
      fail(ErrorKind::kValue, "Loader", "there must be a share for each of the ", options.world_size, " ranks, got ",
           shares.size());
    }
    for (size_t rank = 0; rank < shares.size(); ++rank) {
      check_at_least("Loader", "a share", shares[rank], 1);
      if (shares[rank] > std::numeric_limits<int32_t>::max() / options.batch - in_round)
        fail(ErrorKind::kValue, "Loader", "a round must be of fewer than 2^31 samples");
      if (static_cast<int64_t>(rank) < options.rank) before += shares[rank];
      in_round += shares[rank];
    }
    own = shares[static_cast<size_t>(options.rank)];
  }

  /// Samples that all ranks have consumed when this one has taken `number` batches since `anchor`.
  int64_t position_at(int64_t number) const {
    return anchor + (number / own * in_round + number % own * in_round / own) * options.batch;
  }

  /// This rank's batch `number` since `from`.
  Batch make(int64_t number, int64_t from) const {
    const int64_t first = from + (number / own * in_round + before + number % own) * options.batch;
    Batch batch = empty_batch(options.batch, options.context);
    std::vector<int32_t> window(static_cast<size_t>(options.context) + 1);
    for (int64_t row = 0; row < options.batch; ++row) {
      fill_row(*source, order.begin(first + row), row, window, batch);
    }
    batch.valid = options.batch * options.context;
    return batch;
  }

  void produce() {
    std::unique_lock lock(mutex);
    for (;;) {
      room.wait(lock, [&] { return stop || (!failed && static_cast<int64_t>(ready.size()) < options.prefetch); });
      if (stop) return;
      const int64_t number = upcoming, from = anchor, started = seeks;
      lock.unlock();
      Item item;
      try {
        item.batch = make(number, from);
      } catch (...) {
        item.error = std::current_exception();
      }
      lock.lock();
      if (seeks != started) continue;  // prepared for a place that is no longer wanted
      failed = item.error != nullptr;
      if (!failed) ++upcoming;
      ready.push_back(std::move(item));
      filled.notify_one();
    }
  }

  Batch take() {
    std::unique_lock lock(mutex);
    filled.wait(lock, [&] { return !ready.empty(); });
    Item item = std::move(ready.front());
    ready.pop_front();
    if (item.error) failed = false;  // the thread tries `upcoming` again
    lock.unlock();
    room.notify_one();
    if (item.error) std::rethrow_exception(item.error);
    return std::move(item.batch);
  }

  struct Item {
    Batch batch;
    std::exception_ptr error;
  };

  const std::shared_ptr<const TokenSource> source;
  const LoaderOptions options;
  const SampleOrder order;
  int64_t in_round = 0, before = 0, own = 0;  ///< batches of a round, those of the ranks before, and this one's
  int64_t taken = 0;                          ///< batches since the anchor
  int64_t anchor = 0;                         ///< position where the first round began

  std::mutex mutex;
  std::condition_variable room, filled;
  std::deque<Item> ready;
  int64_t upcoming = 0;  ///< number, since the anchor, of the batch that is prepared next
  int64_t seeks = 0;
  bool failed = false;  ///< the last item in `ready` is an error
  bool stop = false;
  std::thread thread;  // last: it uses all of the above
};

Loader::Loader(std::shared_ptr<const TokenSource> source, const LoaderOptions& options)
    : impl_(std::make_unique<Impl>(std::move(source), options)) {}
Loader::Loader(Shard shard, const LoaderOptions& options)
    : Loader(std::make_shared<const Shard>(std::move(shard)), options) {}
Loader::Loader(const std::string& path, const LoaderOptions& options) : Loader(Shard::open(path), options) {}
Loader::Loader(Loader&&) noexcept = default;
Loader& Loader::operator=(Loader&&) noexcept = default;
Loader::~Loader() = default;

Batch Loader::next() {
  Batch batch = impl_->options.prefetch > 0 ? impl_->take() : impl_->make(impl_->taken, impl_->anchor);
  ++impl_->taken;
  return batch;
}

int64_t Loader::position() const { return impl_->position_at(impl_->taken); }

void Loader::seek(int64_t position) {
  // The upper half of the numbers is out of reach of any run, and left free so that no sum of positions overflows.
  if (position < 0 || position > std::numeric_limits<int64_t>::max() / 2) {
    fail(ErrorKind::kValue, "Loader::seek", "position must be from 0 to 2^62 - 1, got ", position);
  }
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->anchor = position;
    impl_->taken = 0;
    impl_->upcoming = 0;
    impl_->ready.clear();
    impl_->failed = false;
    ++impl_->seeks;
  }
  impl_->room.notify_one();
}

int64_t Loader::epoch() const { return impl_->order.epoch_of(position()); }
int64_t Loader::samples_per_epoch() const { return impl_->order.per_epoch(); }
const TokenSource& Loader::source() const { return *impl_->source; }
const LoaderOptions& Loader::options() const { return impl_->options; }

Evaluation::Evaluation(std::shared_ptr<const TokenSource> source, int64_t batch, int64_t context)
    : source_(checked(std::move(source), "Evaluation")), batch_(batch), context_(context) {
  check_batch_size("Evaluation", batch, context);
  if (source_->size() < 2) {
    fail(ErrorKind::kValue, "Evaluation", "needs at least 2 tokens (one to predict from, one to predict), got ",
         source_->size());
  }
}
Evaluation::Evaluation(Shard shard, int64_t batch, int64_t context)
    : Evaluation(std::make_shared<const Shard>(std::move(shard)), batch, context) {}

int64_t Evaluation::targets() const { return source_->size() - 1; }

int64_t Evaluation::batches() const {
  const int64_t windows = (targets() - 1) / context_ + 1;
  return (windows - 1) / batch_ + 1;
}

Batch Evaluation::batch(int64_t index) const {
  if (index < 0 || index >= batches()) {
    fail(ErrorKind::kIndex, "Evaluation::batch", "index ", index, " is not in [0, ", batches(), ")");
  }
  const int64_t windows = (targets() - 1) / context_ + 1;
  Batch batch = empty_batch(std::min(batch_, windows - index * batch_), context_);
  std::vector<int32_t> window;
  for (int64_t row = 0; row < batch.rows; ++row) {
    const int64_t begin = (index * batch_ + row) * context_;
    const int64_t valid = std::min(context_, targets() - begin);
    window.resize(static_cast<size_t>(valid) + 1);
    fill_row(*source_, begin, row, window, batch);
    batch.valid += valid;
  }
  return batch;
}

}  // namespace weft::text
