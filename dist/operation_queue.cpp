#include "dist/operation_queue.h"

#include <chrono>

namespace weft::dist {
namespace {

/// Tells an operation how long its rank's program stood still for it.
class Standstill {
 public:
  explicit Standstill(Work::State& state) : state_(state) {}
  ~Standstill() { state_.waited(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count()); }
  Standstill(const Standstill&) = delete;
  Standstill& operator=(const Standstill&) = delete;

 private:
  Work::State& state_;
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace

void Work::State::execute(bool user) noexcept {
  const std::shared_ptr<Engine> kept = engine;
  Board& board = engine->board();
  const int world_rank = engine->rank();
  std::exception_ptr failure;
  try {
    board.match(world_rank, op.stamp, *op.members, user);
    board.recorder().matched(record);
    const int64_t bytes = engine->run(op);
    count(op, bytes);
  } catch (const GroupError&) {
    failure = std::current_exception();
  } catch (const std::exception& error) {
    // The others are in the same operation and would wait for this rank's data.
    failure = std::current_exception();
    board.fail_all(
        ErrorKind::kIo, world_rank,
        concat("rank ", world_rank, " of ", board.size(), " could not do ", op.stamp.describe(), ": ", error.what()));
  }
  board.recorder().finished(record, failure == nullptr);
  const std::lock_guard lock(mutex);
  op.input = op.output = Tensor();
  engine = nullptr;  // a Work that is kept keeps no world
  error = failure;
  done = true;
  changed.notify_all();
}

void Work::wait() const {
  State& state = *state_;
  std::shared_ptr<Engine> engine;
  {
    const std::lock_guard lock(state.mutex);
    if (state.done) {
      if (state.error) std::rethrow_exception(state.error);
      return;
    }
    engine = state.engine;
  }
  const Standstill standstill(state);
  const Board::Waiting waiting(engine->board(), engine->rank(), state.op.stamp, *state.op.members);
  std::unique_lock lock(state.mutex);
  state.changed.wait(lock, [&] { return state.done; });
  if (state.error) std::rethrow_exception(state.error);
}

bool Work::done() const {
  const std::lock_guard lock(state_->mutex);
  return state_->done;
}

OperationQueue::~OperationQueue() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void OperationQueue::enqueue(std::shared_ptr<Work::State> work) {
  waiting_.push_back(std::move(work));
  if (!thread_.joinable()) thread_ = std::thread([this] { serve(); });
  changed_.notify_all();
}

void OperationQueue::push(std::shared_ptr<Work::State> work) {
  const std::lock_guard lock(mutex_);
  enqueue(std::move(work));
}

void OperationQueue::run(const std::shared_ptr<Work::State>& work) {
  {
    std::unique_lock lock(mutex_);
    if (!waiting_.empty() || running_) {
      enqueue(work);
      lock.unlock();
      return Work(work).wait();
    }
    running_ = work;
  }
  {
    const Standstill standstill(*work);
    work->execute(true);
  }
  {
    const std::lock_guard lock(mutex_);
    running_ = nullptr;
    changed_.notify_all();
  }
  Work(work).wait();
}

std::shared_ptr<Work::State> OperationQueue::last() {
  const std::lock_guard lock(mutex_);
  return waiting_.empty() ? running_ : waiting_.back();
}

void OperationQueue::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return (!waiting_.empty() && !running_) || (stop_ && waiting_.empty() && !running_); });
    if (waiting_.empty()) return;
    running_ = std::move(waiting_.front());
    waiting_.pop_front();
    lock.unlock();
    running_->execute(false);
    lock.lock();
    running_ = nullptr;
    changed_.notify_all();
  }
}

}  // namespace weft::dist
