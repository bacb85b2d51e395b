#include "dist/threads.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "dist/engine.h"
#include "dist/reduce_tree.h"

namespace weft::dist {
namespace {

/// Bytes of a copy that a task of the pool makes.
constexpr int64_t kCopyGrain = 1 << 20;

void copy_bytes(std::byte* to, const std::byte* from, int64_t bytes) {
  if (to == from) return;
  parallel_for(bytes, kCopyGrain, [&](int64_t begin, int64_t end) {
    std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
  });
}

/// Where the ranks of one lane meet and see each other's buffers.
class Meeting {
 public:
  /// Returns the operations of all ranks when all have come. From then on all of them go on to leave(), so that
  /// nobody's buffers go away while others use them; before, a failure of the world lets everyone go.
  std::vector<const Operation*> enter(const Operation& op, Board& board, int rank) {
    std::unique_lock lock(mutex_);
    ops_.resize(static_cast<size_t>(op.size()));
    ops_[static_cast<size_t>(op.rank)] = &op;
    const uint64_t round = rounds_;
    if (++came_ == op.size()) {
      ++rounds_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return rounds_ != round || failed_; });
      if (rounds_ == round) {
        --came_;
        lock.unlock();
        board.throw_failure(rank, op.stamp);
      }
    }
    return ops_;
  }
  void leave(int size) {
    std::unique_lock lock(mutex_);
    const uint64_t round = rounds_;
    if (++left_ == size) {
      came_ = left_ = 0;
      ++rounds_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return rounds_ != round; });
    }
  }
  void fail() {
    const std::lock_guard lock(mutex_);
    failed_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<const Operation*> ops_;
  int came_ = 0, left_ = 0;
  uint64_t rounds_ = 0;
  bool failed_ = false;
};

/// What the ranks of one world share.
class Meetings {
 public:
  Meeting& of(const Operation& op) {
    // Groups of one name with different members are different groups.
    const std::string key = concat(op.stamp.lane, '@', op.stamp.members);
    const std::lock_guard lock(mutex_);
    Meeting& meeting = meetings_[key];
    if (failed_) meeting.fail();
    return meeting;
  }
  void fail() {
    const std::lock_guard lock(mutex_);
    failed_ = true;
    for (auto& [key, meeting] : meetings_) meeting.fail();
  }

 private:
  std::mutex mutex_;
  std::map<std::string, Meeting> meetings_;
  bool failed_ = false;
};

/// Each rank reads the others' inputs and writes its share of the results where they belong.
class ThreadsEngine : public Engine {
 public:
  ThreadsEngine(std::shared_ptr<Board> board, std::shared_ptr<Meetings> meetings, int rank)
      : Engine(std::move(board), rank), meetings_(std::move(meetings)) {}
  const char* name() const override { return "threads"; }

  int64_t run(const Operation& op) override {
    if (op.stamp.op == Collective::barrier) return 0;  // all have come: that was found when the stamps were compared
    const int64_t bytes = bytes_sent(op);
    if (op.size() == 1) {
      move(op, {&op});
      return bytes;
    }
    Meeting& meeting = meetings_->of(op);
    move(op, meeting.enter(op, board(), rank()));
    meeting.leave(op.size());
    return bytes;
  }

 private:
  static void move(const Operation& op, const std::vector<const Operation*>& all) {
    const int64_t each = size_of(op.stamp.dtype);
    const auto n = all.size();
    const auto me = static_cast<size_t>(op.rank);
    const auto copy = [&](const Operation& to, int64_t to_element, const Operation& from, int64_t from_element,
                          int64_t elements) {
      if (elements > 0) copy_bytes(to.out() + to_element * each, from.in() + from_element * each, elements * each);
    };
    switch (op.stamp.op) {
      case Collective::all_reduce: {
        // Everybody's piece `rank` is read and written by this rank alone, which is why this may be in place.
        const Pieces pieces = Pieces::even(op.input.numel(), op.size());
        reduce(op, all, pieces.at(op.rank), pieces.at(op.rank), pieces.size(op.rank), all);
        break;
      }
      case Collective::reduce_scatter: {
        const Pieces pieces = Pieces::rows(op.stamp.send_counts, row_elements(op.stamp.shape));
        reduce(op, all, pieces.at(op.rank), 0, pieces.size(op.rank), {&op});
        break;
      }
      case Collective::all_gather: {
        const Pieces pieces = Pieces::rows(op.stamp.send_counts, row_elements(op.stamp.shape));
        for (size_t i = 0; i < n; ++i) {
          const size_t from = (me + i) % n;
          const bool in_place = all[from]->input.is_same(all[from]->output);
          const int64_t at = pieces.at(static_cast<int>(from));
          if (from != me || !in_place) copy(op, at, *all[from], in_place ? at : 0, pieces.size(static_cast<int>(from)));
        }
        break;
      }
      case Collective::broadcast:
        if (op.rank != op.stamp.root) copy(op, 0, *all[static_cast<size_t>(op.stamp.root)], 0, op.input.numel());
        break;
      case Collective::all_to_all: {
        const int64_t row = row_elements(op.stamp.shape);
        const Pieces received = Pieces::rows(op.stamp.receive_counts, row);
        for (size_t i = 0; i < n; ++i) {
          const size_t from = (me + i) % n;
          const Pieces sent = Pieces::rows(all[from]->stamp.send_counts, row);
          copy(op, received.at(static_cast<int>(from)), *all[from], sent.at(op.rank), sent.size(op.rank));
        }
        break;
      }
      case Collective::recv:
        copy(op, 0, *all[0], 0, op.output.numel());
        break;
      case Collective::send:
      case Collective::barrier:
        break;
    }
  }

  /// outputs[at_output...] of `to` = reduction over ranks of inputs[at_input...].
  static void reduce(const Operation& op, const std::vector<const Operation*>& from, int64_t at_input,
                     int64_t at_output, int64_t elements, const std::vector<const Operation*>& to) {
    if (elements == 0) return;
    const int64_t each = size_of(op.stamp.dtype);
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    for (const Operation* each_op : from) inputs.push_back(each_op->in() + at_input * each);
    for (const Operation* each_op : to) outputs.push_back(each_op->out() + at_output * each);
    reduce_tree(op.stamp.reduction, op.stamp.dtype, inputs, outputs, elements);
  }

  std::shared_ptr<Meetings> meetings_;
};

/// What one rank gets is what it has.
class SelfEngine final : public Engine {
 public:
  explicit SelfEngine(Device device)
      : Engine(std::make_shared<Board>(1, -1, ThreadsOptions().timeout), 0), device_(device) {}
  const char* name() const override { return "self"; }
  Device device() const override { return device_; }

  int64_t run(const Operation& op) override {
    const autograd::NoGrad no_grad;
    if (op.stamp.op != Collective::barrier && !op.input.is_same(op.output))
      op.output.reshape({-1}).copy_(op.input.reshape({-1}));
    return 0;
  }

 private:
  Device device_;
};

/// Throws `error` again with the rank that threw it.
[[noreturn]] void rethrow(const std::exception_ptr& error, int rank, int ranks) {
  const std::string where = concat("rank ", rank, " of ", ranks, ": ");
  try {
    std::rethrow_exception(error);
  } catch (const GroupError& e) {
    throw GroupError(e.kind(), e.rank(), where + e.what());
  } catch (const Error& e) {
    throw Error(e.kind(), where + e.what());
  }
}

}  // namespace

Group self_group(Device device) { return Group(std::make_shared<SelfEngine>(device), "world", {0}); }

void run_threads(int ranks, const std::function<void(Group&)>& program, const ThreadsOptions& options) {
  if (ranks < 1 || ranks > 1024) fail(ErrorKind::kValue, "run_threads", "ranks must be from 1 to 1024, got ", ranks);
  const auto board = std::make_shared<Board>(ranks, -1, options.timeout);
  const auto meetings = std::make_shared<Meetings>();
  board->flight_record = options.flight_record;
  board->on_failure = [meetings](const Board::Failure&) { meetings->fail(); };
  std::vector<int> everyone(static_cast<size_t>(ranks));
  std::iota(everyone.begin(), everyone.end(), 0);

  std::mutex mutex;
  std::exception_ptr cause, consequence;
  int cause_rank = -1, consequence_rank = -1;
  const auto run = [&](int rank) {
    std::string what;
    try {
      std::shared_ptr<Engine> engine = std::make_shared<ThreadsEngine>(board, meetings, rank);
      if (options.engine) engine = options.engine(engine);
      Group world(std::move(engine), "world", everyone);
      program(world);
    } catch (const GroupError& error) {
      const std::lock_guard lock(mutex);
      if (!consequence) consequence = std::current_exception(), consequence_rank = rank;
      what = error.what();
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!cause) cause = std::current_exception(), cause_rank = rank;
      what = "an exception of an unknown type";
      try {
        throw;
      } catch (const std::exception& error) {
        what = error.what();
      } catch (...) {
      }
    }
    if (what.empty()) {
      board->gone(rank, "has returned from its program");
    } else {
      board->fail_all(ErrorKind::kState, rank,
                      concat("rank ", rank, " of ", ranks, " threw: ", what, "; ", board->last_operation(rank)));
    }
  };

  std::vector<std::thread> threads;
  try {
    for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(run, rank);
  } catch (const std::system_error& error) {
    cause = std::make_exception_ptr(Error(ErrorKind::kMemory, concat("[run_threads] the system gave ", threads.size(),
                                                                     " of ", ranks, " threads: ", error.what())));
    cause_rank = static_cast<int>(threads.size());
    board->fail_all(ErrorKind::kMemory, cause_rank, "not all ranks could be started");
  }
  for (std::thread& thread : threads) thread.join();
  if (cause) rethrow(cause, cause_rank, ranks);
  if (consequence) rethrow(consequence, consequence_rank, ranks);
}

}  // namespace weft::dist
