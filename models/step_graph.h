#pragma once
#include <functional>
#include <memory>
#include <string>

#include "core/backend.h"
#include "optim/parameter.h"

namespace weft::models {

/// Whether training steps are recorded and run as one graph (core/backend.h): where that is possible, always, or never.
enum class GraphUse : uint8_t { automatic, on, off };

/// Does one and the same work step after step: a few times by calling it, then by launching its recording. The bits are
/// the same; a launch saves the host's time for each kernel.
class StepGraph {
 public:
  StepGraph(GraphUse use, Device device) : use_(use), device_(device) {}

  /// Does body(), which computes gradients of `parameters` from none and uses them; they are on the parameters on
  /// return, either way.
  /// @param frozen   in words, what of the host a recording would keep: shapes and modes. When it changes, body is
  ///                 called again for some steps and recorded anew.
  /// @param why_not  what in body needs the host now, or "". @throws Error kUsage with it for GraphUse::on.
  void run(const std::string& frozen, const std::string& why_not, const Parameters& parameters,
           const std::function<void()>& body);

  /// Why steps are not recorded, or "" if they are; `why_not` is what in the work needs the host, or "".
  /// @throws Error kUsage for GraphUse::on, if there is a reason.
  std::string reason(const std::string& why_not) const;
  /// "98 of 100 steps, recorded once".
  std::string summary() const;
  int64_t launches() const { return launches_; }
  int64_t recordings() const { return recordings_; }

 private:
  /// @returns whether there is a recording now.
  bool record(const Parameters& parameters, const std::function<void()>& body);
  void forget();

  GraphUse use_;
  Device device_;
  std::string frozen_, said_, failed_;
  int64_t calls_ = 0;  ///< since the last change
  int64_t steps_ = 0, launches_ = 0, recordings_ = 0;
  std::unique_ptr<Graph> graph_;
  std::vector<Tensor> gradients_;  ///< where the recording puts them; held, so that they can be looked at after a run
};

}  // namespace weft::models
