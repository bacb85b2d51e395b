// Streams, events, and the capture of streams into graphs.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "emulation.h"
#include "runtime.h"

namespace {

using Work = std::function<void()>;
using Time = std::chrono::steady_clock::time_point;

/// The work of a stream that is left to be done.
struct Queue {
  std::deque<Work> left;
  uint64_t submitted = 0, begun = 0;
};

/// How many operations of each stream of a capture come before a point of it.
using Clock = std::map<const CUstream_st*, int>;

/// A capture under way: what was recorded, in the order in which it was, which is one that the dependencies allow.
struct Capture {
  CUstream_st* origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool ended = false, invalidated = false;
  std::set<CUstream_st*> streams;
  std::vector<Work> work;
};

}  // namespace

struct CUstream_st {
  bool blocking = true;
  std::mutex running;
  std::shared_ptr<Queue> queue = std::make_shared<Queue>();
  std::shared_ptr<Capture> capture;
  Clock clock;
};

struct CUevent_st {
  bool timed = true, recorded = false;
  Time time;
  std::shared_ptr<Queue> queue;  // where it was last recorded outside a capture, and behind how much work
  uint64_t position = 0;
  std::shared_ptr<Capture> capture;  // where it was last recorded, if that was in a capture
  Clock clock;
};

struct CUgraph_st {
  std::vector<Work> work;
};
struct CUgraphExec_st {
  std::vector<Work> work;
  std::mutex running;
};

namespace {

using weft_emulation::result;

std::atomic<int64_t> passed_nanoseconds = 0;

std::mutex mutex;  // guards all that follows and the capture and clock of every stream and event
std::vector<std::shared_ptr<Capture>>& captures() {
  static std::vector<std::shared_ptr<Capture>> all;
  return all;
}

/// What a thread's calls that allocate or wait may spoil.
thread_local cudaStreamCaptureMode calls_of_thread = cudaStreamCaptureModeGlobal;

std::mutex& null_stream() {
  static std::mutex running;
  return running;
}

std::atomic<weft_emulation::Late> late = weft_emulation::Late::kCopies;

/// Held while work is left or while what was left is done: work may wait for that of any other stream.
std::recursive_mutex& leaving() {
  static std::recursive_mutex mutex;
  return mutex;
}
std::set<CUstream_st*>& streams() {
  static std::set<CUstream_st*> all;
  return all;
}

void run_until(Queue& queue, uint64_t position) {
  const std::lock_guard lock(leaving());
  while (queue.begun < position && !queue.left.empty()) {
    const Work work = std::move(queue.left.front());
    queue.left.pop_front();
    ++queue.begun;
    work();
  }
}
void finish(CUstream_st& stream) { run_until(*stream.queue, UINT64_MAX); }

/// What the null stream waits for.
void finish_blocking() {
  const std::lock_guard lock(leaving());
  for (CUstream_st* stream : streams()) {
    if (stream->blocking) finish(*stream);
  }
}

void invalidate(Capture& capture) { capture.invalidated = true; }

template <class Condition>
bool invalidate_if(Condition condition) {
  bool any = false;
  for (const auto& capture : captures()) {
    if (!condition(*capture)) continue;
    invalidate(*capture);
    any = true;
  }
  return any;
}

bool blocks_null_stream(const Capture& capture) {
  return std::any_of(capture.streams.begin(), capture.streams.end(), [](const CUstream_st* s) { return s->blocking; });
}

/// The null stream waits for all blocking streams, which a capture cannot express.
bool waits_for_capture() { return invalidate_if(blocks_null_stream); }

void leave(const std::shared_ptr<Capture>& capture) {
  capture->ended = true;
  for (CUstream_st* stream : capture->streams) {
    stream->capture = nullptr;
    stream->clock.clear();
  }
  std::erase(captures(), capture);
}

/// Whether a call that waits for a stream may be made; spoils its capture if not.
cudaError_t may_wait_for(cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  if (stream == nullptr) return waits_for_capture() ? cudaErrorStreamCaptureImplicit : cudaSuccess;
  if (stream->capture == nullptr) return cudaSuccess;
  invalidate(*stream->capture);
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t may_wait_for(cudaEvent_t event) {
  {
    const std::lock_guard lock(mutex);
    if (event->capture != nullptr) {
      if (!event->capture->ended) invalidate(*event->capture);
      return cudaErrorCapturedEvent;
    }
  }
  return weft_emulation::refuse_while_capturing();
}

}  // namespace

namespace weft_emulation {

void pass_time(double seconds) { passed_nanoseconds += static_cast<int64_t>(seconds * 1e9); }

cudaError_t refuse_while_capturing() {
  if (calls_of_thread == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  const std::lock_guard lock(mutex);
  const bool refused = invalidate_if([](const Capture& capture) {
    return (capture.mode == cudaStreamCaptureModeGlobal && calls_of_thread == cudaStreamCaptureModeGlobal) ||
           (capture.mode == cudaStreamCaptureModeThreadLocal && capture.thread == std::this_thread::get_id());
  });
  return refused ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

void set_late(Late what) { late = what; }

void finish_stream(cudaStream_t stream) {
  if (stream != nullptr) finish(*stream);
}

void finish_all() {
  const std::lock_guard lock(leaving());
  for (CUstream_st* stream : streams()) finish(*stream);
}

cudaError_t submit(cudaStream_t stream, Work work, Kind kind) {
  {
    const std::lock_guard lock(mutex);
    if (stream == nullptr && waits_for_capture()) return result(cudaErrorStreamCaptureImplicit);
    if (stream != nullptr && stream->capture != nullptr) {
      if (stream->capture->invalidated) return result(cudaErrorStreamCaptureInvalidated);
      stream->capture->work.push_back(std::move(work));
      ++stream->clock[stream];
      return cudaSuccess;
    }
  }
  if (stream == nullptr) {
    finish_blocking();
  } else {
    const std::lock_guard lock(leaving());
    Queue& queue = *stream->queue;
    ++queue.submitted;
    if (late == (kind == Kind::kCopy ? Late::kCopies : Late::kKernels)) {
      queue.left.push_back(std::move(work));
      return cudaSuccess;
    }
    finish(*stream);
    ++queue.begun;
  }
  const std::lock_guard lock(stream == nullptr ? null_stream() : stream->running);
  work();
  return cudaSuccess;
}

}  // namespace weft_emulation

// ---- streams ----

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  if (stream == nullptr || flags > cudaStreamNonBlocking) return result(cudaErrorInvalidValue);
  *stream = new CUstream_st;
  (*stream)->blocking = flags != cudaStreamNonBlocking;
  const std::lock_guard lock(leaving());
  streams().insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  {
    const std::lock_guard lock(mutex);
    if (const auto capture = stream->capture; capture != nullptr) {
      invalidate(*capture);
      capture->streams.erase(stream);
      if (capture->origin == stream) leave(capture);
    }
  }
  finish(*stream);
  {
    const std::lock_guard lock(leaving());
    streams().erase(stream);
  }
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const cudaError_t error = may_wait_for(stream); error != cudaSuccess) return result(error);
  stream == nullptr ? finish_blocking() : finish(*stream);
  const std::lock_guard wait(stream == nullptr ? null_stream() : stream->running);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

cudaError_t cudaDeviceSynchronize() {
  {
    const std::lock_guard lock(mutex);
    if (invalidate_if([](const Capture&) { return true; })) return result(cudaErrorStreamCaptureUnsupported);
  }
  weft_emulation::finish_all();
  return cudaSuccess;
}

namespace {

/// Work behind this on the stream is done after that before the event.
void leave_wait(CUstream_st& stream, const CUevent_st& event) {
  if (event.queue == nullptr) return;
  const std::lock_guard lock(leaving());
  if (event.queue->begun >= event.position) return;
  stream.queue->left.emplace_back([queue = event.queue, position = event.position] { run_until(*queue, position); });
  ++stream.queue->submitted;
}

}  // namespace

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  const std::lock_guard lock(mutex);
  if (stream == nullptr) {
    if (waits_for_capture() || event->capture != nullptr) return result(cudaErrorStreamCaptureImplicit);
    if (event->queue != nullptr) run_until(*event->queue, event->position);
    return cudaSuccess;
  }
  if (event->capture == nullptr) {
    if (!event->recorded) return cudaSuccess;
    if (stream->capture == nullptr) return leave_wait(*stream, *event), cudaSuccess;
    invalidate(*stream->capture);
    return result(cudaErrorStreamCaptureIsolation);
  }
  if (event->capture->ended) return result(cudaErrorCapturedEvent);
  if (event->capture->invalidated) return result(cudaErrorStreamCaptureInvalidated);
  if (stream->capture != nullptr && stream->capture != event->capture) {
    invalidate(*stream->capture);
    invalidate(*event->capture);
    return result(cudaErrorStreamCaptureMerge);
  }
  stream->capture = event->capture;
  stream->capture->streams.insert(stream);
  for (const auto& [other, count] : event->clock) {
    int& seen = stream->clock[other];
    seen = std::max(seen, count);
  }
  return cudaSuccess;
}

// ---- events ----

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int flags) {
  if (event == nullptr || flags > (cudaEventBlockingSync | cudaEventDisableTiming))
    return result(cudaErrorInvalidValue);
  *event = new CUevent_st;
  (*event)->timed = !(flags & cudaEventDisableTiming);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  const std::lock_guard lock(mutex);
  if (stream == nullptr && waits_for_capture()) return result(cudaErrorStreamCaptureImplicit);
  event->capture = stream == nullptr ? nullptr : stream->capture;
  if (event->capture == nullptr) {
    event->recorded = true;
    event->time = std::chrono::steady_clock::now() + std::chrono::nanoseconds(passed_nanoseconds);
    const std::lock_guard left(leaving());
    event->queue = stream == nullptr ? nullptr : stream->queue;
    event->position = stream == nullptr ? 0 : stream->queue->submitted;
    return cudaSuccess;
  }
  event->clock = stream->clock;
  return result(event->capture->invalidated ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (const cudaError_t error = may_wait_for(event); error != cudaSuccess) return result(error);
  if (event->queue != nullptr) run_until(*event->queue, event->position);
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (start == nullptr || end == nullptr) return result(cudaErrorInvalidResourceHandle);
  const std::lock_guard lock(mutex);
  for (const CUevent_st* event : {start, end}) {
    if (event->capture != nullptr) return result(cudaErrorCapturedEvent);
    if (!event->timed || !event->recorded) return result(cudaErrorInvalidResourceHandle);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}

// ---- capture and graphs ----

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (stream == nullptr) return result(cudaErrorStreamCaptureUnsupported);
  const std::lock_guard lock(mutex);
  if (stream->capture != nullptr) return result(cudaErrorIllegalState);
  stream->capture =
      std::make_shared<Capture>(Capture{stream, mode, std::this_thread::get_id(), false, false, {stream}, {}});
  captures().push_back(stream->capture);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (graph == nullptr) return result(cudaErrorInvalidValue);
  *graph = nullptr;
  const std::lock_guard lock(mutex);
  const auto capture = stream == nullptr ? nullptr : stream->capture;
  if (capture == nullptr) return result(cudaErrorIllegalState);
  if (capture->origin != stream) {
    invalidate(*capture);
    return result(cudaErrorStreamCaptureUnmatched);
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
    return result(cudaErrorStreamCaptureWrongThread);
  }
  bool joined = true;
  for (const CUstream_st* other : capture->streams) {
    const auto done = other->clock.find(other);
    joined = joined && (done == other->clock.end() || stream->clock[other] >= done->second);
  }
  leave(capture);
  if (capture->invalidated) return result(cudaErrorStreamCaptureInvalidated);
  if (!joined) return result(cudaErrorStreamCaptureUnjoined);
  *graph = new CUgraph_st{std::move(capture->work)};
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (mode == nullptr) return result(cudaErrorInvalidValue);
  std::swap(*mode, calls_of_thread);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (status == nullptr) return result(cudaErrorInvalidValue);
  const std::lock_guard lock(mutex);
  *status = cudaStreamCaptureStatusNone;
  if (stream == nullptr) {
    const bool blocked =
        std::any_of(captures().begin(), captures().end(), [](const auto& c) { return blocks_null_stream(*c); });
    return result(blocked ? cudaErrorStreamCaptureImplicit : cudaSuccess);
  }
  if (stream->capture != nullptr) {
    *status = stream->capture->invalidated ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (executable == nullptr || graph == nullptr) return result(cudaErrorInvalidValue);
  *executable = new CUgraphExec_st;
  (*executable)->work = graph->work;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (executable == nullptr) return result(cudaErrorInvalidValue);
  return weft_emulation::submit(stream, [executable] {
    const std::lock_guard lock(executable->running);
    for (const Work& work : executable->work) work();
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (graph == nullptr) return result(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  if (executable == nullptr) return result(cudaErrorInvalidValue);
  delete executable;
  return cudaSuccess;
}
