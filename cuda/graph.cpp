// Recorded work: a capture of the device's stream.
#include "cuda/graph.h"

#include <utility>

#include "core/error.h"
#include "core/memory.h"
#include "cuda/error.h"

namespace weft::cuda {
namespace {

class CapturedGraph final : public Graph {
 public:
  CapturedGraph(Context& context, cudaGraphExec_t executable, std::unique_ptr<ReplayMemory> memory)
      : context_(context), executable_(executable), memory_(std::move(memory)) {}
  ~CapturedGraph() override { cudaGraphExecDestroy(executable_); }

  void launch() override {
    if (const int64_t bytes = taken(); bytes != 0) {
      fail(ErrorKind::kState, "graph", human_bytes(bytes),
           " of the memory that the recorded work writes belong to others now; it has to be recorded again");
    }
    context_.use();
    WEFT_CUDA(cudaGraphLaunch(executable_, context_.stream));
  }
  int64_t taken() const override { return memory_->taken(); }

 private:
  Context& context_;
  cudaGraphExec_t executable_;
  std::unique_ptr<ReplayMemory> memory_;
};

/// A capture under way; one that is not ended by end() is thrown away.
class Capture {
 public:
  explicit Capture(Context& context) : context_(context) {
    if (context_.capturing) fail(ErrorKind::kState, "capture", "work of this device is being recorded already");
    // Only calls of this thread spoil it: others may do as they like, on other devices.
    WEFT_CUDA(cudaStreamBeginCapture(context_.stream, cudaStreamCaptureModeThreadLocal));
    context_.capturing = true;
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  ~Capture() {
    if (!context_.capturing) return;
    cudaGraph_t graph = nullptr;
    if (cudaStreamEndCapture(context_.stream, &graph) != cudaSuccess) cudaGetLastError();
    if (graph != nullptr) cudaGraphDestroy(graph);
    context_.capturing = false;
  }
  cudaGraphExec_t end() {
    cudaGraph_t graph = nullptr;
    context_.capturing = false;
    WEFT_CUDA(cudaStreamEndCapture(context_.stream, &graph));
    cudaGraphExec_t executable = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    WEFT_CUDA(status);
    return executable;
  }

 private:
  Context& context_;
};

}  // namespace

AllowWhileCapturing::AllowWhileCapturing() { WEFT_CUDA(cudaThreadExchangeStreamCaptureMode(&mode_)); }
AllowWhileCapturing::~AllowWhileCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }

std::unique_ptr<Graph> capture(Context& context, const std::function<void()>& queue) {
  context.use();
  std::unique_ptr<ReplayMemory> memory = allocator(Device::cuda(context.index)).record();
  Capture recording(context);
  queue();
  memory->stop();
  return std::make_unique<CapturedGraph>(context, recording.end(), std::move(memory));
}

}  // namespace weft::cuda
