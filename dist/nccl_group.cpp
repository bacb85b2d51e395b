// Data of CUDA tensors between processes, with NCCL: one communicator for each lane, a stream of its own. Reductions
// are NCCL's, in its order and precision. Calls do not block, so that the failure of the world can end them.
#include <cuda_runtime.h>
#include <nccl.h>

#include <chrono>
#include <map>
#include <numeric>
#include <optional>
#include <thread>

#include "core/backend.h"
#include "core/shared_library.h"
#include "dist/process_engine.h"

namespace weft::dist {
namespace {

/// The functions of NCCL that are used, each by its name without "nccl".
#define WEFT_NCCL_FUNCTIONS(DO) \
  DO(GetErrorString);           \
  DO(GetUniqueId);              \
  DO(CommInitRankConfig);       \
  DO(CommGetAsyncError);        \
  DO(CommAbort);                \
  DO(CommDestroy);              \
  DO(GroupStart);               \
  DO(GroupEnd);                 \
  DO(AllReduce);                \
  DO(Reduce);                   \
  DO(Broadcast);                \
  DO(Send);                     \
  DO(Recv)

struct Nccl {
#define WEFT_FUNCTION(name) decltype(&nccl##name) name = nullptr
  WEFT_NCCL_FUNCTIONS(WEFT_FUNCTION);
#undef WEFT_FUNCTION
};

/// WEFT_NCCL is the path of the one that the program was built with.
SharedLibrary nccl_library() { return {"NCCL", {concat("libnccl.so.", NCCL_MAJOR), WEFT_NCCL}}; }

/// NCCL, which the first call loads. @throws Error kDevice naming what was looked for if the library is not there or
/// lacks a function.
const Nccl& nccl() {
  static const Nccl functions = [] {
    const SharedLibrary library = nccl_library();
    Nccl found;
#define WEFT_FUNCTION(name) library.require(found.name, "nccl" #name)
    WEFT_NCCL_FUNCTIONS(WEFT_FUNCTION);
#undef WEFT_FUNCTION
    return found;
  }();
  return functions;
}

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  fail(ErrorKind::kDevice, "nccl", what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

void check_nccl(ncclResult_t status, const char* what) {
  if (status != ncclSuccess && status != ncclInProgress) {
    fail(ErrorKind::kIo, "nccl", what, ": ", nccl().GetErrorString(status));
  }
}

ncclDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return ncclFloat32;
    case DType::f64:
      return ncclFloat64;
    case DType::f16:
      return ncclFloat16;
    case DType::bf16:
      return ncclBfloat16;
    case DType::i32:
      return ncclInt32;
    case DType::i64:
      return ncclInt64;
    default:
      return ncclUint8;
  }
}

ncclRedOp_t reduction_of(Reduction reduction) {
  switch (reduction) {
    case Reduction::max:
      return ncclMax;
    case Reduction::min:
      return ncclMin;
    case Reduction::avg:
      return ncclAvg;
    default:
      return ncclSum;
  }
}

class NcclEngine : public ProcessEngine {
 public:
  NcclEngine(const ProcessOptions& options, Store& store, int device)
      : ProcessEngine(options, store), store_(store), device_(Device::cuda(device)), timeout_(options.connect_timeout) {
    connecting([this] { be_ready(); });
    nccl();
    compute_ = static_cast<cudaStream_t>(backend(device_).use());
  }
  ~NcclEngine() override {
    leave();
    backend(device_).use();
    for (auto& [key, lane] : lanes_) {
      if (lane.communicator != nullptr) {
        board().failed() ? nccl().CommAbort(lane.communicator) : nccl().CommDestroy(lane.communicator);
      }
      if (lane.stream != nullptr) cudaStreamDestroy(lane.stream);
      for (const cudaEvent_t event : {lane.before, lane.after}) {
        if (event != nullptr) cudaEventDestroy(event);
      }
    }
  }
  const char* name() const override { return "nccl"; }
  Device device() const override { return device_; }

  int64_t run(const Operation& op) override {
    if (op.stamp.op == Collective::barrier) return 0;  // all have come: that was found when the stamps were compared
    if (op.input.device() != device_) {
      fail(ErrorKind::kDevice, "nccl", op.stamp.describe(), ": the tensor is on ", op.input.device(), ", the group on ",
           device_);
    }
    backend(device_).use();
    Lane& lane = lane_of(op);
    try {
      // What is queued on the device so far has made the input, or read the output.
      check_cuda(cudaEventRecord(lane.before, compute_), "an event");
      check_cuda(cudaStreamWaitEvent(lane.stream, lane.before, 0), "a wait for an event");
      move(op, lane);
      settle(op, lane);
      check_cuda(cudaEventRecord(lane.after, lane.stream), "an event");
      wait(op, lane);
    } catch (const GroupError&) {
      throw;
    } catch (const Error& error) {
      transport_failed(op, error.what());
    }
    return bytes_sent(op);
  }

 private:
  struct Lane {
    ncclComm_t communicator = nullptr;
    cudaStream_t stream = nullptr;
    cudaEvent_t before = nullptr, after = nullptr;
  };

  /// The lane of an operation; its communicator is made at the first.
  Lane& lane_of(const Operation& op) {
    const std::string key = concat(op.stamp.lane, '@', op.stamp.members);
    Lane* lane = nullptr;
    {
      const std::lock_guard lock(mutex_);
      lane = &lanes_[key];
    }
    if (lane->communicator != nullptr) return *lane;
    check_cuda(cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking), "a stream");
    check_cuda(cudaEventCreateWithFlags(&lane->before, cudaEventDisableTiming), "an event");
    check_cuda(cudaEventCreateWithFlags(&lane->after, cudaEventDisableTiming), "an event");
    ncclUniqueId id{};
    if (op.rank == 0) {
      check_nccl(nccl().GetUniqueId(&id), "an id");
      store_.set("nccl/" + key, std::string(id.internal, sizeof id.internal));
    } else {
      const std::string text = awaited("nccl/" + key, op);
      if (text.size() != sizeof id.internal) fail(ErrorKind::kData, "nccl", "the id of ", quoted(key), " is broken");
      text.copy(id.internal, sizeof id.internal);
    }
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    check_nccl(nccl().CommInitRankConfig(&lane->communicator, op.size(), id, op.rank, &config), "a communicator");
    settle(op, *lane);
    return *lane;
  }

  /// A key of the store, which rank 0 of the lane sets; the failure of the world ends the wait.
  std::string awaited(const std::string& key, const Operation& op) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_);
    while (std::chrono::steady_clock::now() < deadline) {
      if (board().failed()) board().throw_failure(rank(), op.stamp);
      if (std::optional<std::string> value = store_.find(key)) return *std::move(value);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return store_.get(key, 0);
  }

  /// Returns when NCCL has taken the calls; the failure of the world ends it.
  void settle(const Operation& op, Lane& lane) {
    for (ncclResult_t state = ncclInProgress;;) {
      check_nccl(nccl().CommGetAsyncError(lane.communicator, &state), "the state of a communicator");
      if (state == ncclSuccess) return;
      check_nccl(state, "a communicator");
      give_up_if_failed(op, lane);
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  /// Returns when the data have moved; the failure of the world ends it.
  void wait(const Operation& op, Lane& lane) {
    for (;;) {
      const cudaError_t status = cudaEventQuery(lane.after);
      if (status == cudaSuccess) return;
      if (status != cudaErrorNotReady) check_cuda(status, "the data's transport");
      ncclResult_t state = ncclSuccess;
      check_nccl(nccl().CommGetAsyncError(lane.communicator, &state), "the state of a communicator");
      check_nccl(state, "the data's transport");
      give_up_if_failed(op, lane);
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  void give_up_if_failed(const Operation& op, Lane& lane) {
    if (!board().failed()) return;
    nccl().CommAbort(std::exchange(lane.communicator, nullptr));
    board().throw_failure(rank(), op.stamp);
  }

  static void move(const Operation& op, Lane& lane) {
    const DType dtype = op.stamp.dtype;
    const int64_t each = size_of(dtype), row = op.stamp.op == Collective::barrier ? 0 : row_elements(op.stamp.shape);
    const auto count = static_cast<size_t>(op.input.numel());
    const ncclRedOp_t reduction = reduction_of(op.stamp.reduction);
    // What is not added up moves as bytes.
    const auto send = [&](const std::byte* data, int64_t elements, int to) {
      if (elements == 0) return;
      check_nccl(nccl().Send(data, static_cast<size_t>(elements * each), ncclUint8, to, lane.communicator, lane.stream),
                 "send");
    };
    const auto receive = [&](std::byte* data, int64_t elements, int from) {
      if (elements == 0) return;
      check_nccl(
          nccl().Recv(data, static_cast<size_t>(elements * each), ncclUint8, from, lane.communicator, lane.stream),
          "receive");
    };
    check_nccl(nccl().GroupStart(), "a group of calls");
    switch (op.stamp.op) {
      case Collective::all_reduce:
        check_nccl(
            nccl().AllReduce(op.in(), op.out(), count, type_of(dtype), reduction, lane.communicator, lane.stream),
            "all_reduce");
        break;
      case Collective::reduce_scatter: {
        const Pieces pieces = Pieces::rows(op.stamp.send_counts, row);
        for (int r = 0; r < op.size(); ++r) {
          if (pieces.size(r) == 0) continue;
          check_nccl(nccl().Reduce(op.in() + pieces.at(r) * each, op.out(), static_cast<size_t>(pieces.size(r)),
                                   type_of(dtype), reduction, r, lane.communicator, lane.stream),
                     "reduce_scatter");
        }
        break;
      }
      case Collective::all_gather: {
        const Pieces pieces = Pieces::rows(op.stamp.send_counts, row);
        const std::byte* mine = op.input.is_same(op.output) ? op.in() + pieces.at(op.rank) * each : op.in();
        for (int r = 0; r < op.size(); ++r) {
          if (pieces.size(r) == 0) continue;
          std::byte* const to = op.out() + pieces.at(r) * each;
          check_nccl(nccl().Broadcast(r == op.rank ? mine : to, to, static_cast<size_t>(pieces.size(r) * each),
                                      ncclUint8, r, lane.communicator, lane.stream),
                     "all_gather");
        }
        break;
      }
      case Collective::broadcast:
        check_nccl(nccl().Broadcast(op.in(), op.out(), count * static_cast<size_t>(each), ncclUint8, op.stamp.root,
                                    lane.communicator, lane.stream),
                   "broadcast");
        break;
      case Collective::all_to_all: {
        const Pieces sent = Pieces::rows(op.stamp.send_counts, row), got = Pieces::rows(op.stamp.receive_counts, row);
        for (int r = 0; r < op.size(); ++r) {
          send(op.in() + sent.at(r) * each, sent.size(r), r);
          receive(op.out() + got.at(r) * each, got.size(r), r);
        }
        break;
      }
      case Collective::send:
        send(op.in(), op.input.numel(), 1);
        break;
      case Collective::recv:
        receive(op.out(), op.output.numel(), 0);
        break;
      case Collective::barrier:
        break;
    }
    check_nccl(nccl().GroupEnd(), "a group of calls");
  }

  Store& store_;
  const Device device_;
  const double timeout_;
  cudaStream_t compute_ = nullptr;
  std::mutex mutex_;
  std::map<std::string, Lane> lanes_;
};

}  // namespace

Group nccl_group(const ProcessOptions& options, Store& store, int device) {
  auto engine = std::make_shared<NcclEngine>(options, store, device);
  std::vector<int> everyone(static_cast<size_t>(options.size));
  std::iota(everyone.begin(), everyone.end(), 0);
  return Group(std::move(engine), "world", std::move(everyone));
}

const char* why_no_nccl() { return ""; }

std::string describe_nccl() {
  const std::string built = concat("built with ", NCCL_MAJOR, '.', NCCL_MINOR, '.', NCCL_PATCH);
  const auto ask = nccl_library().find<ncclResult_t(int*)>("ncclGetVersion");
  int version = 0;
  if (ask == nullptr || ask(&version) != ncclSuccess) return "not found; " + built;
  return concat(version / 10000, '.', version / 100 % 100, '.', version % 100, ", ", built);
}

}  // namespace weft::dist
