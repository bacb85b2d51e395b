#pragma once
#include <filesystem>
#include <string>

#include "apps/options.h"
#include "core/device.h"
#include "models/step_graph.h"
#include "ops/attention_library.h"

namespace weft::apps {

/// The options --device of a command (auto, cpu, cuda or cuda:N), --gemm-algorithms and --attention.
struct DeviceOption {
  std::string text = "auto";
  std::filesystem::path gemm_algorithms;
  AttentionChoice attention = AttentionChoice::automatic;

  void declare(Options& options);
  /// The device, which is there, with the list of algorithms in use if one is given and attention as chosen. @throws
  /// Error kUsage if the text names none, kDevice if this machine or build has none of that kind or not the attention
  /// that was asked for; what use_gemm_algorithms_file() throws.
  Device device(const Options& options) const;
  /// The same for a device that was planned, a rank's own say.
  void use(const Options& options, Device device) const;
  /// What will compute attention of that shape in training, and why: "cuDNN 9.19.0".
  std::string describe_attention(Device device, const AttentionShape& shape, DType dtype) const;
  /// Logs how many products had an entry in the list, and what computed attention, once the work is done.
  void report(Device device) const;
  /// The same for a run without memory or arithmetic, which needs no such device.
  Device planned(const Options& options) const;
};

/// The option --cuda-graph of a command that trains: auto, on or off.
void declare_cuda_graph(Options& options, models::GraphUse* use);
/// "steps are recorded, after two that are not", or that they are not and why.
std::string describe_cuda_graph(const std::string& why_not);

}  // namespace weft::apps
