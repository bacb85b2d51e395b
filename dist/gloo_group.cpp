// Data of CPU tensors between processes, with Gloo's point-to-point messages. Gloo's own collectives are not used:
// their sums are added in an order that depends on sizes and numbers of ranks. Messages between two ranks in one
// operation share a slot and arrive in order.
#include <gloo/common/error.h>
#include <gloo/common/logging.h>
#include <gloo/context.h>
#include <gloo/transport/context.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <numeric>
#include <set>

#include "dist/process_engine.h"
#include "dist/reduce_tree.h"

namespace weft::dist {
namespace {

using Buffer = gloo::transport::UnboundBuffer;

/// Gloo closes all its connections when a wait takes longer than its timeout. A wait here ends with the data or with
/// the failure of the world, which is found elsewhere.
constexpr std::chrono::hours kNever{24 * 365};
/// Bytes of scratch memory that a reduction takes for the pieces of other ranks: two blocks of them, one of which
/// arrives while the other is added up.
constexpr int64_t kScratchBytes = int64_t{4} << 20;

/// Gloo's connections between all ranks. Gloo's own way to make them cannot be ended from outside and waits for those
/// that will not come.
class Connections : public gloo::Context {
 public:
  Connections(const ProcessOptions& options, std::shared_ptr<gloo::transport::Device> device)
      : gloo::Context(options.rank, options.size) {
    setTimeout(std::chrono::milliseconds(static_cast<int64_t>(options.connect_timeout * 1000)));
    transportContext_ = device->createContext(rank, size);
    transportContext_->setTimeout(getTimeout());
    device_ = std::move(device);
    for (int peer = 0; peer < size; ++peer) {
      if (peer != rank) transportContext_->createPair(peer);
    }
  }
  /// Where each of the others reaches this rank.
  std::vector<std::string> addresses() {
    std::vector<std::string> all(static_cast<size_t>(size));
    for (int peer = 0; peer < size; ++peer) {
      if (peer == rank) continue;
      const std::vector<char> bytes = getPair(peer)->address().bytes();
      all[static_cast<size_t>(peer)].assign(bytes.begin(), bytes.end());
    }
    return all;
  }
  /// Returns when there is a connection; or, with or without an exception, when another thread closes all.
  void connect(int peer, const std::string& address) {
    getPair(peer)->connect(std::vector<char>(address.begin(), address.end()));
  }
};

/// Where a process ends between being connected and being asked for its address, Gloo throws on its own thread, where
/// nobody can catch it. While this lives, that ends the process with the words that `describe` finds for it.
class LastWords {
 public:
  using Describe = std::function<std::string(const char* what)>;
  explicit LastWords(Describe describe) {
    const std::lock_guard lock(mutex());
    current() = std::move(describe);
    before_ = std::set_terminate(say);
  }
  ~LastWords() {
    const std::lock_guard lock(mutex());
    current() = {};
    std::set_terminate(before_);
  }
  LastWords(const LastWords&) = delete;
  LastWords& operator=(const LastWords&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static Describe& current() {
    static Describe describe;
    return describe;
  }
  [[noreturn]] static void say() {
    Describe describe;
    {
      const std::lock_guard lock(mutex());
      describe = current();
    }
    try {
      if (const std::exception_ptr thrown = std::current_exception(); thrown && describe)
        std::rethrow_exception(thrown);
    } catch (const gloo::EnforceNotMet& error) {
      std::fprintf(stderr, "%s\n", describe(error.what()).c_str());
      _exit(1);
    } catch (...) {
    }
    std::abort();
  }

  std::terminate_handler before_;
};

class GlooEngine : public ProcessEngine {
 public:
  GlooEngine(const ProcessOptions& options, Store& store) : ProcessEngine(options, store) {
    // Gloo writes to sockets that the other side may have closed.
    struct sigaction action{};
    if (sigaction(SIGPIPE, nullptr, &action) == 0 && action.sa_handler == SIG_DFL) signal(SIGPIPE, SIG_IGN);
    gloo::transport::tcp::attr attribute;
    attribute.hostname = options.address;
    const LastWords last_words([this](const char* what) { return connecting_failed(what); });
    try {
      connecting([&] {
        context_ = std::make_shared<Connections>(options, gloo::transport::tcp::CreateDevice(attribute));
        on_abort([this] { abort_waits(); });
        const std::vector<std::string> theirs = exchange(context_->addresses());
        passed("addressed");
        for (int peer = 0; peer < options.size && !board().failed(); ++peer) {
          if (peer == options.rank) continue;
          context_->connect(peer, theirs[static_cast<size_t>(peer)]);
          passed("paired");
        }
        be_ready();
        connected_ = true;
      });
    } catch (...) {
      on_abort({});
      throw;
    }
  }
  ~GlooEngine() override {
    on_abort({});
    leave();
    if (context_) context_->closeConnections();
  }
  const char* name() const override { return "gloo"; }

  int64_t run(const Operation& op) override {
    try {
      return move(op);
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      transport_failed(op, error.what());
    }
  }

 private:
  /// The messages of one rank in one operation. All that were started are waited for, or given up, at the end.
  class Messages {
   public:
    Messages(GlooEngine& engine, const Operation& op) : engine_(engine), op_(op), slot_(engine.slot_of(op)) {}
    ~Messages() { engine_.forget(open_); }
    Messages(const Messages&) = delete;
    Messages& operator=(const Messages&) = delete;

    /// `to`, `from`: index in the group. Nothing is sent for zero bytes.
    void send(int to, const std::byte* data, int64_t bytes) {
      if (bytes == 0) return;
      // Gloo's buffers are not const; it only reads this one.
      Buffer& buffer = open(const_cast<std::byte*>(data), bytes);
      sending_.push_back(&buffer);
      buffer.send(world(to), slot_);
      sent_ += bytes;
    }
    void receive(int from, std::byte* data, int64_t bytes) {
      if (bytes == 0) return;
      Buffer& buffer = open(data, bytes);
      receiving_.push_back(&buffer);
      buffer.recv(world(from), slot_);
    }
    void wait() {
      for (Buffer* buffer : receiving_) {
        if (!buffer->waitRecv(kNever)) engine_.board().throw_failure(engine_.rank(), op_.stamp);
      }
      for (Buffer* buffer : sending_) {
        if (!buffer->waitSend(kNever)) engine_.board().throw_failure(engine_.rank(), op_.stamp);
      }
      engine_.forget(open_);
      open_.clear();
      sending_.clear();
      receiving_.clear();
    }
    int64_t sent() const { return sent_; }

   private:
    Buffer& open(std::byte* data, int64_t bytes) {
      open_.push_back(engine_.context_->createUnboundBuffer(data, static_cast<size_t>(bytes)));
      engine_.remember(*open_.back(), op_);
      return *open_.back();
    }
    int world(int index) const { return (*op_.members)[static_cast<size_t>(index)]; }

    GlooEngine& engine_;
    const Operation& op_;
    const uint64_t slot_;
    std::vector<std::unique_ptr<Buffer>> open_;
    std::vector<Buffer*> sending_, receiving_;
    int64_t sent_ = 0;
  };

  int64_t move(const Operation& op);
  int64_t reduce(const Operation& op, const Pieces& pieces, std::byte* result);
  void gather(const Operation& op, Messages& messages, const Pieces& pieces, int skip);

  /// Lanes have slots of their own, numbered by operation.
  uint64_t slot_of(const Operation& op) {
    const std::string key = concat(op.stamp.lane, '@', op.stamp.members);
    uint32_t hash = 2166136261u;  // FNV-1a
    for (const char c : key) hash = (hash ^ static_cast<uint8_t>(c)) * 16777619u;
    const std::lock_guard lock(mutex_);
    const auto [found, added] = lanes_.emplace(hash, key);
    if (!added && found->second != key) {
      fail(ErrorKind::kValue, "gloo", "the groups ", quoted(found->second), " and ", quoted(key),
           " have one hash. Hint: another name for one of them");
    }
    return static_cast<uint64_t>(hash) << 32 | (op.stamp.sequence & 0xffffffffu);
  }

  // Buffers that somebody may wait for, which the failure of the world must end.
  void remember(Buffer& buffer, const Operation& op) {
    const std::lock_guard lock(mutex_);
    if (aborted_) board().throw_failure(rank(), op.stamp);
    waiting_.insert(&buffer);
  }
  void forget(const std::vector<std::unique_ptr<Buffer>>& buffers) {
    const std::lock_guard lock(mutex_);
    for (const auto& buffer : buffers) waiting_.erase(buffer.get());
  }
  void abort_waits() {
    const std::lock_guard lock(mutex_);
    aborted_ = true;
    if (!connected_) context_->closeConnections();
    for (Buffer* buffer : waiting_) {
      buffer->abortWaitRecv();
      buffer->abortWaitSend();
    }
  }

  std::shared_ptr<Connections> context_;
  std::atomic<bool> connected_ = false;
  std::mutex mutex_;
  std::map<uint32_t, std::string> lanes_;
  std::set<Buffer*> waiting_;
  bool aborted_ = false;
};

/// result = reduction over ranks of this rank's piece of their inputs. The bytes that were sent.
int64_t GlooEngine::reduce(const Operation& op, const Pieces& pieces, std::byte* result) {
  const int n = op.size(), me = op.rank;
  const int64_t each = size_of(op.stamp.dtype);
  const int64_t block = std::max<int64_t>(kScratchBytes / (2 * n * each), 1);
  int64_t longest = 0;
  for (int r = 0; r < n; ++r) longest = std::max(longest, pieces.size(r));
  const MemoryScope scope(MemoryCategory::communication);
  const int64_t stride = std::min(block, pieces.size(me));
  const Tensor scratch = Tensor::empty({2, n, stride}, op.stamp.dtype);
  std::array<Messages, 2> messages = {Messages(*this, op), Messages(*this, op)};
  const auto half = [&](int64_t at) { return static_cast<size_t>(at / block % 2); };
  const auto received = [&](int64_t at, int rank) {
    return static_cast<std::byte*>(scratch.raw()) + (static_cast<int64_t>(half(at)) * n + rank) * stride * each;
  };
  const auto length = [&](int r, int64_t at) { return std::clamp<int64_t>(pieces.size(r) - at, 0, block); };
  const auto exchange = [&](int64_t at) {
    for (int i = 1; at < longest && i < n; ++i) {
      const int from = (me + i) % n, to = (me + n - i) % n;
      messages[half(at)].receive(from, received(at, from), length(me, at) * each);
      messages[half(at)].send(to, op.in() + (pieces.at(to) + at) * each, length(to, at) * each);
    }
  };
  exchange(0);
  for (int64_t at = 0; at < longest; at += block) {
    exchange(at + block);
    messages[half(at)].wait();
    const int64_t mine = length(me, at);
    if (mine == 0) continue;
    std::vector<const void*> inputs;
    for (int r = 0; r < n; ++r) inputs.push_back(r == me ? op.in() + (pieces.at(me) + at) * each : received(at, r));
    void* const output = result + at * each;
    reduce_tree(op.stamp.reduction, op.stamp.dtype, inputs, std::span(&output, 1), mine);
  }
  return messages[0].sent() + messages[1].sent();
}

/// Every rank's piece of the output on all ranks but `skip` (-1: none), which has them all.
void GlooEngine::gather(const Operation& op, Messages& messages, const Pieces& pieces, int skip) {
  const int n = op.size(), me = op.rank;
  const int64_t each = size_of(op.stamp.dtype);
  for (int i = 1; i < n; ++i) {
    const int from = (me + i) % n, to = (me + n - i) % n;
    if (me != skip) messages.receive(from, op.out() + pieces.at(from) * each, pieces.size(from) * each);
    if (to != skip) messages.send(to, op.out() + pieces.at(me) * each, pieces.size(me) * each);
  }
  messages.wait();
}

/// The bytes that were sent.
int64_t GlooEngine::move(const Operation& op) {
  const int n = op.size(), me = op.rank;
  const int64_t each = size_of(op.stamp.dtype);
  Messages messages(*this, op);
  int64_t reduced = 0;
  switch (op.stamp.op) {
    case Collective::all_reduce: {
      const Pieces pieces = Pieces::even(op.input.numel(), n);
      reduced = reduce(op, pieces, op.out() + pieces.at(me) * each);
      gather(op, messages, pieces, -1);
      break;
    }
    case Collective::reduce_scatter:
      reduced = reduce(op, Pieces::rows(op.stamp.send_counts, row_elements(op.stamp.shape)), op.out());
      break;
    case Collective::all_gather: {
      const Pieces pieces = Pieces::rows(op.stamp.send_counts, row_elements(op.stamp.shape));
      if (!op.input.is_same(op.output) && pieces.size(me) > 0) {
        std::memcpy(op.out() + pieces.at(me) * each, op.in(), static_cast<size_t>(pieces.size(me) * each));
      }
      gather(op, messages, pieces, -1);
      break;
    }
    case Collective::broadcast: {
      const int64_t bytes = op.input.numel() * each;
      const int root = op.stamp.root;
      if (bytes <= kDirectBroadcastBytes) {
        for (int r = 0; r < n; ++r) {
          if (me == root && r != root) messages.send(r, op.in(), bytes);
        }
        if (me != root) messages.receive(root, op.out(), bytes);
        messages.wait();
        break;
      }
      const Pieces pieces = Pieces::even(op.input.numel(), n);
      for (int r = 0; r < n; ++r) {
        if (me == root && r != root) messages.send(r, op.in() + pieces.at(r) * each, pieces.size(r) * each);
      }
      if (me != root) messages.receive(root, op.out() + pieces.at(me) * each, pieces.size(me) * each);
      messages.wait();
      gather(op, messages, pieces, root);
      break;
    }
    case Collective::all_to_all: {
      const int64_t row = row_elements(op.stamp.shape) * each;
      const Pieces to_send = Pieces::rows(op.stamp.send_counts, row),
                   to_receive = Pieces::rows(op.stamp.receive_counts, row);
      for (int i = 1; i < n; ++i) {
        const int from = (me + i) % n, to = (me + n - i) % n;
        messages.receive(from, op.out() + to_receive.at(from), to_receive.size(from));
        messages.send(to, op.in() + to_send.at(to), to_send.size(to));
      }
      if (to_send.size(me) > 0) {
        std::memcpy(op.out() + to_receive.at(me), op.in() + to_send.at(me), static_cast<size_t>(to_send.size(me)));
      }
      messages.wait();
      break;
    }
    case Collective::send:
      messages.send(1, op.in(), op.input.numel() * each);
      messages.wait();
      break;
    case Collective::recv:
      messages.receive(0, op.out(), op.output.numel() * each);
      messages.wait();
      break;
    case Collective::barrier:
      break;  // all have come: that was found when the stamps were compared
  }
  return reduced + messages.sent();
}

}  // namespace

Group gloo_group(const ProcessOptions& options, Store& store) {
  auto engine = std::make_shared<GlooEngine>(options, store);
  std::vector<int> everyone(static_cast<size_t>(options.size));
  std::iota(everyone.begin(), everyone.end(), 0);
  return Group(std::move(engine), "world", std::move(everyone));
}

const char* why_no_gloo() { return ""; }

}  // namespace weft::dist
