#include "models/step_graph.h"

#include <utility>

#include "core/log.h"

namespace weft::models {
namespace {

/// Steps before the one that is recorded: by then kernels are loaded, products have their algorithms, and memory has
/// settled.
constexpr int64_t kWarmUp = 2;

}  // namespace

std::string StepGraph::reason(const std::string& why_not) const {
  if (use_ == GraphUse::off) return "it is off";
  const std::string why = device_.kind == DeviceKind::cpu ? concat("the device is ", device_) : why_not;
  if (use_ == GraphUse::on && !why.empty()) {
    fail(ErrorKind::kUsage, "trainer", "cuda_graph = on: a step cannot be recorded as a graph: ", why,
         ". Hint: auto records where it is possible");
  }
  return why.empty() ? failed_ : why;
}

void StepGraph::forget() {
  graph_ = nullptr;
  gradients_.clear();
}

bool StepGraph::record(const Parameters& parameters, const std::function<void()>& body) {
  forget();
  try {
    graph_ = backend(device_).capture([&] {
      body();
      for (const Parameter& parameter : parameters) gradients_.push_back(parameter.tensor.grad());
    });
  } catch (const Error& error) {
    // Nothing was done yet. What is wrong with the work itself will show again when it is called.
    forget();
    for (const Parameter& parameter : parameters) parameter.tensor.clear_grad();
    if (use_ == GraphUse::on) throw;
    failed_ = error.what();
    return false;
  }
  ++recordings_;
  log::info("cuda graph: step recorded: ", frozen_);
  return true;
}

void StepGraph::run(const std::string& frozen, const std::string& why_not, const Parameters& parameters,
                    const std::function<void()>& body) {
  ++steps_;
  const auto call = [&] {
    ++calls_;
    body();
  };
  if (DryRun::active()) return call();
  if (std::string why = reason(why_not); !why.empty()) {
    if (use_ != GraphUse::off && device_.kind != DeviceKind::cpu && said_ != why)
      log::warn("cuda graph: steps are not recorded: ", why);
    said_ = std::move(why);
    forget();
    return call();
  }
  if (frozen != frozen_) {
    if (graph_ != nullptr) log::info("cuda graph: step to be recorded again: ", frozen, " instead of ", frozen_);
    forget();
    frozen_ = frozen;
    calls_ = 0;
  }
  if (calls_ < kWarmUp) return call();
  if (graph_ != nullptr && graph_->taken() != 0) {
    log::info("cuda graph: step to be recorded again: ", human_bytes(graph_->taken()),
              " of its memory belong to others now");
    forget();
  }
  if (graph_ == nullptr && !record(parameters, body)) {
    log::warn("cuda graph: steps are not recorded: ", failed_);
    said_ = failed_;
    return call();
  }
  graph_->launch();
  ++launches_;
  for (size_t i = 0; i < parameters.size(); ++i) parameters[i].tensor.set_grad(gradients_[i]);
}

std::string StepGraph::summary() const {
  return concat(launches_, " of ", steps_, " steps, recorded ", recordings_, recordings_ == 1 ? " time" : " times");
}

}  // namespace weft::models
