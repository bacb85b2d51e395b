#include "apps/device_option.h"

#include "apps/gemm_algorithms_file.h"
#include "core/backend.h"
#include "core/log.h"
#include "ops/gemm_algorithms.h"

namespace weft::apps {

void DeviceOption::declare(Options& o) {
  o.add("device", &text, {.placeholder = "DEVICE"},
        "where to compute: auto (the first GPU, else the CPU), cpu, cuda or cuda:N");
  o.add(
      "gemm_algorithms", &gemm_algorithms, {.placeholder = "FILE"},
      "algorithms of matrix products on a GPU, as `weft bench gemm --tune` wrote them there; without it, the library's "
      "first choice");
  o.add("attention", &attention,
        {{"auto", AttentionChoice::automatic}, {"flash", AttentionChoice::flash}, {"cudnn", AttentionChoice::cudnn}},
        "what computes attention of whole sequences on a GPU: auto (cuDNN in f16 and bf16 where it is there and knows "
        "the shape, else our own kernels; said at the start), flash (our own) or cudnn (or an error); bits differ");
}

Device DeviceOption::planned(const Options& options) const {
  try {
    return Device::parse(text);
  } catch (const Error&) {
    options.reject("device", "must be auto, cpu, cuda or cuda:N, got ", weft::quoted(text));
  }
}

Device DeviceOption::device(const Options& options) const {
  const Device device = planned(options);
  use(options, device);
  return device;
}

void DeviceOption::use(const Options& options, Device device) const {
  backend(device);
  if (device.kind == DeviceKind::cpu) {
    if (!gemm_algorithms.empty()) {
      options.reject("gemm_algorithms", "is for a GPU, but the device is ", device, ", got ",
                     weft::quoted(gemm_algorithms.string()));
    }
    if (attention == AttentionChoice::cudnn)
      options.reject("attention", "cudnn is for a GPU, but the device is ", device);
    return;
  }
  if (!gemm_algorithms.empty()) use_gemm_algorithms_file(device, gemm_algorithms.string());
  use_attention(device, attention);
}

std::string DeviceOption::describe_attention(Device device, const AttentionShape& shape, DType dtype) const {
  return device.kind == DeviceKind::cpu ? "our own kernels" : weft::describe_attention(device, shape, dtype);
}

void declare_cuda_graph(Options& o, models::GraphUse* use) {
  using models::GraphUse;
  o.add("cuda_graph", use, {{"auto", GraphUse::automatic}, {"on", GraphUse::on}, {"off", GraphUse::off}},
        "record a training step once and launch it as a whole, with the same bits: auto where it is possible, on or an "
        "error, off");
}

std::string describe_cuda_graph(const std::string& why_not) {
  return why_not.empty() ? "steps are recorded, after two that are not" : "steps are not recorded: " + why_not;
}

void DeviceOption::report(Device device) const {
  if (device.kind == DeviceKind::cuda && attention != AttentionChoice::flash) {
    const AttentionUse use = attention_use(device);
    log::info("attention: ", use.cudnn, " passes were queued by cuDNN, ", use.own, " by our own kernels");
    for (const std::string& why : use.why_own) log::info("attention by our own kernels: ", why);
  }
  if (gemm_algorithms.empty()) return;
  const GemmAlgorithmUse use = gemm_algorithm_use(device);
  log::info(gemm_algorithms.string(), ": ", use.found, " products were computed by its algorithms, ",
            use.missing.size(), " are not in it and were computed by the library's first choice",
            use.missing.empty() ? "" : concat(", the first of them ", use.missing.front()));
}

}  // namespace weft::apps
