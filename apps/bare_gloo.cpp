#include "apps/bare_gloo.h"

#include <gloo/allgather.h>
#include <gloo/allreduce.h>
#include <gloo/math.h>
#include <gloo/reduce_scatter.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/file_store.h>
#include <gloo/transport/tcp/device.h>

#include "core/error.h"

namespace weft::apps {

struct BareGloo::State {
  std::shared_ptr<gloo::rendezvous::Context> context;
  uint32_t tag = 0;
};

BareGloo::BareGloo(int rank, int size, const std::filesystem::path& directory) : state_(std::make_unique<State>()) {
  try {
    gloo::transport::tcp::attr attribute;
    attribute.hostname = "127.0.0.1";
    auto device = gloo::transport::tcp::CreateDevice(attribute);
    std::filesystem::create_directories(directory);
    gloo::rendezvous::FileStore store(directory.string());
    state_->context = std::make_shared<gloo::rendezvous::Context>(rank, size);
    state_->context->connectFullMesh(store, device);
  } catch (const std::exception& error) {
    fail(ErrorKind::kIo, "bench", "Gloo cannot connect rank ", rank, " of ", size, ": ", error.what());
  }
}

BareGloo::~BareGloo() { state_->context->closeConnections(); }

void BareGloo::all_reduce(float* data, int64_t elements) {
  gloo::AllreduceOptions options(state_->context);
  options.setOutput(data, static_cast<size_t>(elements));
  options.setReduceFunction(static_cast<void (*)(void*, const void*, const void*, size_t)>(&gloo::sum<float>));
  options.setTag(state_->tag++);
  gloo::allreduce(options);
}

void BareGloo::reduce_scatter(float* data, int64_t elements) {
  const int size = state_->context->size;
  const std::vector<int> counts(static_cast<size_t>(size), static_cast<int>(elements / size));
  gloo::ReduceScatterHalvingDoubling<float>(state_->context, {data}, static_cast<int>(elements), counts).run();
}

void BareGloo::all_gather(float* input, float* output, int64_t elements) {
  gloo::AllgatherOptions options(state_->context);
  options.setInput(input, static_cast<size_t>(elements));
  options.setOutput(output, static_cast<size_t>(elements * state_->context->size));
  options.setTag(state_->tag++);
  gloo::allgather(options);
}

}  // namespace weft::apps
